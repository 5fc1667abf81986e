"""Lazy frames of files and folders, and writing videos."""

from __future__ import annotations

import errno
import os
import pickle
import shlex
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.errors import DataError
from utils.errors import UserError
from utils.video import WINDOW, FolderFrames, VideoFrames, _said_by_ffmpeg, open_folder, write_video

cv2 = pytest.importorskip("cv2")
av = pytest.importorskip("av")


def picture(t: int, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """A frame that says its number by its grey level, with a red left and a blue right half."""
    image = np.full((*size, 3), 20 + 3 * t, np.uint8)
    image[:, : size[1] // 2, 0] = 250
    image[:, size[1] // 2 :, 2] = 250
    return image


def number(frame: np.ndarray) -> int:
    """The number that `picture` put in: the green channel holds it in both halves."""
    return round((float(np.median(frame[..., 1])) - 20) / 3)


@pytest.fixture()
def clip(tmp_path: Path) -> Path:
    """An exact copy of 60 frames, as an AVI of PNG-like (lossless) frames."""
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"FFV1"), 12.5, (64, 48))
    if not writer.isOpened():
        pytest.skip("this OpenCV has no lossless codec")
    for t in range(60):
        writer.write(np.ascontiguousarray(picture(t)[..., ::-1]))
    writer.release()
    return path


# ------------------------------------------------------------------------------------------------------------- reading


def test_frames_are_rgb_and_in_order(clip: Path):
    frames = VideoFrames(clip)
    assert len(frames) == 60 and frames.size == (48, 64) and frames.fps == 12.5
    assert frames.stems[:2] == ("00000", "00001") and frames.stems[-1] == "00059"
    for t, frame in enumerate(frames):
        assert frame.shape == (48, 64, 3) and frame.dtype == np.uint8 and frame.flags.c_contiguous
        assert np.abs(frame.astype(int) - picture(t)).max() <= 6  # the codec works in YUV
    assert frame[0, 0, 0] > 200 > frame[0, 0, 2]  # red on the left, so not BGR


def test_any_order_of_access_gives_the_frames_of_sequential_reading(clip: Path):
    expected = list(VideoFrames(clip))
    frames = VideoFrames(clip)
    rng = np.random.default_rng(0)
    order = [59, 0, 0, 30, 31, 29, 14, 15, 45, 44, 43, *rng.integers(0, 60, 25).tolist(), -1, -60]
    for t in order:
        np.testing.assert_array_equal(frames[t], expected[t])
    assert [number(frame) for frame in (frames[t] for t in range(57, 60))] == [57, 58, 59]
    for wrong in (60, -61):
        with pytest.raises(IndexError):
            frames[wrong]


def test_the_number_of_frames_is_what_can_be_decoded_not_what_the_header_says(tmp_path: Path, clip: Path):
    data = clip.read_bytes()
    # An AVI whose header still promises 60 frames, cut after about two thirds of the data.
    cut = tmp_path / "cut.avi"
    cut.write_bytes(data[: len(data) * 2 // 3])
    assert cv2.VideoCapture(str(cut)).get(cv2.CAP_PROP_FRAME_COUNT) > 50
    frames = VideoFrames(cut)
    assert 10 < len(frames) < 60 == frames.promised
    assert VideoFrames(clip).promised is None
    assert [number(frame) for frame in frames] == list(range(len(frames)))


def test_the_rate_is_that_of_the_frames_where_the_header_has_another(tmp_path: Path):
    """As in WebM of a browser's recorder, by whose header there is a frame every millisecond."""
    path = tmp_path / "screen.mkv"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"FFV1"), 25, (64, 48))
    if not writer.isOpened():
        pytest.skip("this OpenCV has no lossless codec")
    for t in range(20):
        writer.write(picture(t))
    writer.release()
    assert VideoFrames(path).fps == 25
    data, duration = path.read_bytes(), b"\x23\xe3\x83\x84" + (40_000_000).to_bytes(4, "big")  # of a frame, in ns
    assert duration in data
    path.write_bytes(data.replace(duration, duration[:4] + (1_000_000).to_bytes(4, "big")))
    assert cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FPS) == 1000
    frames = VideoFrames(path)
    assert frames.fps == pytest.approx(25)
    assert frames.promised is None  # 800 of them by that rate


def test_a_video_whose_pictures_are_missing_or_change_while_it_is_read(tmp_path: Path):
    path, size = tmp_path / "a.mp4", (48, 64)
    pictures = np.random.default_rng(0).integers(0, 256, (6, *size, 3), dtype=np.uint8)
    write_video(path, pictures)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"mdat") + 4])  # a download that was broken off; its index comes first
    with pytest.raises(UserError, match=r"a\.mp4: not one frame of it can be decoded(.|\n)*ffmpeg"):
        VideoFrames(path)
    path.write_bytes(whole)
    for others, told in (
        (pictures[:3], "frame 3 of 6 cannot be decoded"),
        (pictures[:, :32], "frame 0 has size 64 x 32, the first one 64 x 48"),
    ):
        frames = VideoFrames(path)
        write_video(path, others)
        with pytest.raises(UserError, match=told):
            list(frames)
        frames.close()
        path.write_bytes(whole)


@pytest.mark.parametrize("stated", [60, -9.2e18])
def test_a_damaged_frame_is_no_end(clip: Path, stated: float, monkeypatch: pytest.MonkeyPatch):
    class Damaged:
        """OpenCV on a file whose frame 2 is damaged: once it fails, and goes on after it. A live recording states no
        number of frames.
        """

        def __init__(self, path: str) -> None:
            self.inner, self.at = cv2_capture(path), 0

        def grab(self) -> bool:
            self.at += 1
            return self.inner.grab() and self.at != 2

        def get(self, prop: int) -> float:
            return stated if prop == cv2.CAP_PROP_FRAME_COUNT else self.inner.get(prop)

        def __getattr__(self, name: str):
            return getattr(self.inner, name)

    cv2_capture = cv2.VideoCapture
    assert len(VideoFrames(clip)) > 5
    monkeypatch.setattr(cv2, "VideoCapture", Damaged)
    with pytest.raises(UserError, match="frame 2 is damaged(.|\n)*ffmpeg"):
        VideoFrames(clip)


def test_an_interlaced_video_is_read_or_refused_never_made_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """OpenCV 4.13 and 4.14 give what their memory held before, the same for all frames, and report success."""
    path = tmp_path / "broadcast.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mpg2"), 25, (64, 48))
    if not writer.isOpened():
        pytest.skip("this OpenCV cannot write MPEG-2")
    for t in range(6):
        writer.write(np.full((48, 64, 3), 20 + 30 * t, np.uint8))
    writer.release()
    data = bytearray(path.read_bytes())
    parts = data.split(b"\0\0\1\xb5")  # extensions: of the sequence (kind 1) and of each picture (kind 8)
    for part in parts[1:]:
        if part[0] >> 4 == 8:
            part[4] &= 0x7F  # no progressive frame
        else:
            part[1] &= 0xF7  # no progressive sequence
    path.write_bytes(b"\0\0\1\xb5".join(parts))
    capfd.readouterr()
    try:
        frames = VideoFrames(path)
    except UserError as error:
        assert "interlaced" in str(error) and "ffmpeg -i" in str(error) and "-vf yadif" in str(error)
        assert capfd.readouterr().err == ""  # no two lines for each frame
    else:
        assert [round((frame.mean() - 20) / 30) for frame in frames] == list(range(6))


def test_what_ffmpeg_says_is_heard_and_can_still_be_read(capfd: pytest.CaptureFixture[str]):
    with pytest.raises(KeyboardInterrupt), _said_by_ffmpeg() as said:
        os.write(2, b"frame 3 is damaged\n")
        assert capfd.readouterr().err == ""
        raise KeyboardInterrupt
    assert said == ["frame 3 is damaged"] and capfd.readouterr().err == "frame 3 is damaged\n"
    os.write(2, b"after it\n")
    assert capfd.readouterr().err == "after it\n"


def test_memory_does_not_grow_with_the_length(tmp_path: Path):
    peaks = []
    for count in (20, 120):
        folder = tmp_path / str(count)
        folder.mkdir()
        for t in range(count):
            Image.fromarray(picture(t % 60, (120, 160))).save(folder / f"{t}.png")
        frames = open_folder(folder)
        tracemalloc.start()
        for _ in frames:
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 3 * 120 * 160 * 3 < (WINDOW + 12) * 120 * 160 * 3


def test_frames_can_be_sent_to_another_process(clip: Path):
    frames = VideoFrames(clip)
    expected = frames[7]
    again = pickle.loads(pickle.dumps(frames))
    np.testing.assert_array_equal(again[7], expected)
    assert len(pickle.dumps(frames)) < 20_000  # without the frames


@pytest.mark.parametrize("content", [b"this is no video", bytes(5000)], ids=["text", "zeros"])
def test_a_video_that_cannot_be_decoded_names_the_command_that_converts_it(tmp_path: Path, content: bytes):
    path = tmp_path / "my clip.mp4"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"ffmpeg -i '.*my clip.mp4' -c:v libx264") as caught:
        VideoFrames(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("name", ["12:30:05.avi", "2026-11-26T12:30.avi", "file:1.avi", "50%03d.avi", "-v.avi"])
def test_names_that_ffmpeg_would_read_otherwise(clip: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    """A protocol before a colon, a number after a percent sign, an option; a name without its folder is the case."""
    clip.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    frames = VideoFrames(name)
    assert len(frames) == 60 and [number(frames[t]) for t in (0, 59)] == [0, 59]
    Path(name).write_bytes(b"this is no video")
    with pytest.raises(UserError) as caught:
        VideoFrames(name)
    words = shlex.split(str(caught.value).splitlines()[1])
    for word in (words[2], words[-1]):
        assert Path(word).name in (name, f"{Path(name).stem}_h264.mp4")
        assert not word.startswith("-") and ":" not in word.split("/")[0]


def test_a_video_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="no such video file"):
        VideoFrames(tmp_path / "nothing.mp4")
    with pytest.raises(UserError, match="--frames"):
        VideoFrames(tmp_path)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(UserError, match=r"empty.mp4: an empty file \(0 bytes\)") as caught:
        VideoFrames(tmp_path / "empty.mp4")
    assert "ffmpeg" not in str(caught.value)  # which could do nothing with it


def test_what_may_not_be_read_or_written_is_named(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rather than called no video, or by a temporary name. The superuser may, so the system is made to refuse."""

    def refused(path: object, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch, pytest.raises(PermissionError) as caught:
        patch.setattr(Path, "open", refused)
        VideoFrames(clip)
    assert caught.value.filename == str(clip)
    with monkeypatch.context() as patch, pytest.raises(PermissionError) as caught:
        patch.setattr(Path, "touch", refused)
        write_video(tmp_path / "made.mp4", [picture(0)])
    assert caught.value.filename == str(tmp_path / "made.mp4")


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path: Path):
    for t in (10, 9, 1, 2, 0):
        Image.fromarray(picture(t)).save(tmp_path / f"frame{t}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / "._frame1.png").write_bytes(b"left by another system")
    frames = open_folder(tmp_path)
    assert frames.stems == ("frame0", "frame1", "frame2", "frame9", "frame10")
    assert [number(frame) for frame in frames] == [0, 1, 2, 9, 10]
    np.testing.assert_array_equal(frames[-1], picture(10))


def test_pictures_that_are_not_read_do_not_shorten_a_video(tmp_path: Path):
    """A phone writes HEIC among JPEG files, and a camera a raw picture beside each of them."""
    for t in range(3):
        Image.fromarray(picture(t)).save(tmp_path / f"{t}.jpg")
    (tmp_path / "1.DNG").write_bytes(b"the same picture")
    assert len(open_folder(tmp_path)) == 3
    (tmp_path / "3.HEIC").write_bytes(b"a fourth picture")
    with pytest.raises(DataError, match="3.HEIC: pictures of this kind are not read; expected .jpg.*as PNG"):
        open_folder(tmp_path)


def test_folders_that_are_no_video(tmp_path: Path):
    with pytest.raises(DataError, match="no such folder"):
        open_folder(tmp_path / "nothing")
    with pytest.raises(DataError, match="no frames in it"):
        open_folder(tmp_path)
    with pytest.raises(DataError, match="no frame in it, only folders"):
        open_folder(tmp_path.parent)
    Image.fromarray(picture(0)).save(tmp_path / "0.png")
    Image.fromarray(picture(0)).save(tmp_path / "0.jpg")
    with pytest.raises(DataError, match="0.jpg and 0.png"):
        open_folder(tmp_path)
    (tmp_path / "0.jpg").unlink()
    Image.fromarray(picture(1, (48, 66))).save(tmp_path / "1.png")
    Image.fromarray(picture(2)).save(tmp_path / "2.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    frames = open_folder(tmp_path)
    with pytest.raises(DataError, match=r"1.png: size 66 x 48, but 0.png .* 64 x 48"):
        frames[1]
    with pytest.raises(DataError, match="2.png"):
        frames[2]
    with pytest.raises(DataError, match="no frames"):
        FolderFrames([])


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("size", [(48, 64), (47, 63), (31, 64)])
def test_what_is_written_can_be_read(tmp_path: Path, size: tuple[int, int]):
    path = tmp_path / "out" / "made.mp4"
    assert write_video(path, (picture(t, size) for t in range(9)), fps=10) == 9
    frames = VideoFrames(path)
    assert len(frames) == 9 and frames.fps == pytest.approx(10)
    assert frames.size == (size[0] + size[0] % 2, size[1] + size[1] % 2)  # nothing is cut off
    for t, frame in enumerate(frames):
        assert abs(number(frame) - t) <= 1
        assert frame[size[0] // 2, 5, 0] > 200 > frame[size[0] // 2, 5, 2]
    assert [p.name for p in path.parent.iterdir()] == ["made.mp4"]


def test_the_rate_is_written_as_it_is(tmp_path: Path):
    """Also the mean of a slow-motion video, and that of a time lapse."""
    frames = [np.full((32, 64, 3), 20 * t, np.uint8) for t in range(5)]
    for rate in (238.526, 119.88, 29.97, 0.5, 1000):
        assert write_video(tmp_path / "v.mp4", frames, rate) == 5
        assert VideoFrames(tmp_path / "v.mp4").fps == pytest.approx(rate, rel=1e-4)
    # Slower than MP4 can say, of frames that follow one another well enough for some to be coded after later ones.
    noise = cv2.resize(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8), (64, 48))
    assert write_video(tmp_path / "v.mp4", [np.roll(noise, t, axis=1) for t in range(5)], 1e-6) == 5
    assert VideoFrames(tmp_path / "v.mp4").fps == pytest.approx(1e-4)


def test_the_row_and_column_that_make_a_size_even_are_no_border(tmp_path: Path):
    write_video(tmp_path / "v.mp4", [np.full((47, 63, 3), 200, np.uint8)])
    np.testing.assert_allclose(VideoFrames(tmp_path / "v.mp4")[0], np.full((48, 64, 3), 200), atol=3)


def test_what_is_written_looks_as_what_was_drawn(tmp_path: Path):
    """Within 38 dB, about where the eye begins to see it; in grey, as colours have half the rows and columns."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 20), dtype=np.uint8)
    drawn = [np.repeat(cv2.resize(np.roll(noise, t), (160, 128))[..., None], 3, axis=2) for t in range(3)]
    write_video(tmp_path / "v.mp4", drawn)
    for frame, before in zip(VideoFrames(tmp_path / "v.mp4"), drawn, strict=True):
        error = np.mean((frame.astype(float) - before) ** 2)
        assert 10 * np.log10(255**2 / error) > 38


def test_browsers_show_what_is_written(tmp_path: Path):
    """H.264, 4:2:0 of 8 bits, its index in front, so that it plays while it loads, and the colours that it says."""
    path = tmp_path / "made.mp4"
    colours = [(255, 120, 0), (0, 80, 255), (40, 200, 40)]
    write_video(path, [np.full((720, 1280, 3), colour, np.uint8) for colour in colours])
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.codec_context.color_primaries == stream.codec_context.color_trc == 1  # BT.709
        for frame, colour in zip(file.decode(stream), colours, strict=True):
            assert (frame.colorspace, frame.color_range) == (1, 1)  # BT.709, 16 to 235
            y, u, v = (float(np.median(plane)) for plane in np.split(frame.to_ndarray().ravel(), [-460_800, -230_400]))
            # ITU-R BT.709, section 3 and 4: from luma and colour differences back to red, green, blue.
            luma, blue, red = (y - 16) / 219, (u - 128) / 224 * 1.8556, (v - 128) / 224 * 1.5748
            r, b = luma + red, luma + blue
            g = (luma - 0.2126 * r - 0.0722 * b) / 0.7152
            np.testing.assert_allclose([255 * c for c in (r, g, b)], colour, atol=3)


def test_names_as_long_as_they_may_be(tmp_path: Path):
    name = "\N{GRINNING FACE}" * 62 + ".mp4"  # 252 bytes of the 255 that file systems take
    assert write_video(tmp_path / name, [np.zeros((16, 16, 3), np.uint8)]) == 1
    with pytest.raises(OSError, match="aaaa.mp4") as caught:
        write_video(tmp_path / ("a" * 252 + ".mp4"), [np.zeros((16, 16, 3), np.uint8)])
    assert Path(caught.value.filename).name == "a" * 252 + ".mp4"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_interrupted_video_leaves_nothing_new_behind(tmp_path: Path):
    path = tmp_path / "made.mp4"
    path.write_bytes(b"older")

    def frames():
        yield picture(0)
        yield picture(1)
        raise RuntimeError("the network stopped")

    with pytest.raises(RuntimeError, match="the network stopped"):
        write_video(path, frames())
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


def test_ctrl_c_before_the_first_frame_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    close = os.close

    def interrupted(handle: int) -> None:
        close(handle)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "close", interrupted)
        write_video(tmp_path / "made.mp4", [picture(0)])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "made.mp4"
    path.write_bytes(b"older")
    opened = av.open

    def full(name: str, *args: object, **options: object) -> object:
        os.unlink(name)
        os.symlink("/dev/full", name)
        return opened(name, *args, **options)

    monkeypatch.setattr(av, "open", full)
    with pytest.raises(OSError, match="No space left.*made.mp4"):
        write_video(path, (picture(t) for t in range(40)))
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


def test_a_pyav_without_h264_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("utils.video.CODEC", "libx265_of_no_build")
    with pytest.raises(UserError, match="made.mp4: this PyAV cannot write H.264.*pip install av"):
        write_video(tmp_path / "made.mp4", [picture(0)])
    assert list(tmp_path.iterdir()) == []


def test_videos_that_cannot_be_written(tmp_path: Path):
    with pytest.raises(UserError, match="no frames"):
        write_video(tmp_path / "a.mp4", [])
    with pytest.raises(UserError, match="ending in .mp4"):
        write_video(tmp_path / "a.avi", [picture(0)])
    with pytest.raises(UserError, match="frames per second"):
        write_video(tmp_path / "a.mp4", [picture(0)], fps=0)
    with pytest.raises(ValueError, match="frame 1 has shape"):
        write_video(tmp_path / "a.mp4", [picture(0), picture(0, (48, 66))])
    with pytest.raises(ValueError, match="frame 0: expected uint8"):
        write_video(tmp_path / "a.mp4", [picture(0) / 255])
    with pytest.raises(UserError, match="a.mp4: frames of 16386 x 8; H.264 takes 16384"):
        write_video(tmp_path / "a.mp4", [np.zeros((8, 16386, 3), np.uint8)])
    assert list(tmp_path.iterdir()) == []
    assert write_video(tmp_path / "a.mp4", [np.zeros((8, 16384, 3), np.uint8)]) == 1
