"""A user's own video: frames read one by one from a file or a folder, and video files written.

Both readers look like a list of ``(H, W, 3)`` uint8 RGB arrays and hold only a few frames, whatever the length.
"""

from __future__ import annotations

import math
import os
import shlex
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datasets.errors import DataError
from datasets.images import load_flow_image, load_frame
from datasets.video_sequence import FRAME_SUFFIXES, by_stem, list_files, list_folders, raise_problem
from utils.errors import UserError
from utils.files import replacing

if TYPE_CHECKING:
    import cv2

# Frames kept decoded. Callers go through a video in batches, and flow looks one frame ahead or behind.
WINDOW = 16
DEFAULT_FPS = 25.0
# H.264, which all players show; OpenCV has no encoder of it.
CODEC = "libx264"
LONGEST_SIDE = 16384  # that it takes
SLOWEST = Fraction(1, 10_000)  # frames a second: MP4 counts time in 32 bits, and H.264 orders frames anew
# Times are in whole milliseconds in some formats: a mean rate that is this near to the stated one is the same.
TIMES_ROUNDED = 0.02
# Frames in a row that may be damaged before what follows them is not looked for.
DAMAGED_AT_MOST = 250
# What FFmpeg says where OpenCV 4.13 and 4.14 cannot turn an interlaced frame into RGB: they hand out what their memory
# held before, and report success.
NOT_CONVERTED = "interlaced to progressive"
# Pictures that are not read, which phones and cameras write among JPEG files or in place of them.
OTHER_PICTURES = (".heic", ".heif", ".avif", ".jxl", ".dng")


class LazyFrames(Sequence[np.ndarray]):
    """Frames of one video that are decoded when asked for; the last of them are kept.

    Two callers may get the same array: copy it before writing into it.

    Attributes:
        files: where the frames are stored: one image per frame, or one video file.
        stems: one name per frame, under which its results are stored.
        size: (H, W) of every frame.
        fps: mean frames per second, for a video made from the results.
        window: how many frames are kept; may be raised.
    """

    def __init__(self, files: Sequence[Path], stems: Sequence[str], size: tuple[int, int], fps: float) -> None:
        self.files = tuple(files)
        self.stems = tuple(stems)
        self.size = size
        self.fps = fps
        self.window = WINDOW
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, index: int) -> np.ndarray:
        if not -len(self) <= index < len(self):
            raise IndexError(f"frame {index} of a video of {len(self)} frames")
        index = int(index) % len(self)
        if index not in self._kept:
            # A decoder may pass other frames on its way and keep them, so the window is cut afterwards.
            self._keep(index, self.decode(index))
        self._kept.move_to_end(index)
        return self._kept[index]

    def _keep(self, index: int, frame: np.ndarray) -> None:
        self._kept[index] = frame
        while len(self._kept) > self.window:
            self._kept.popitem(last=False)

    def decode(self, index: int) -> np.ndarray:
        """Frame ``index``, from 0, decoded now whatever is kept."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}


class FolderFrames(LazyFrames):
    """Frames that lie in image files, given by their paths in order. `decode` may be called by any thread.

    Raises:
        DataError: an unreadable image, or one of another size than the first.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        files = [Path(path) for path in paths]
        if not files:
            raise DataError("a video of no frames: expected at least one image")
        first = self.load(files[0])
        super().__init__(files, [path.stem for path in files], first.shape[:2], DEFAULT_FPS)
        self._keep(0, first)

    def load(self, path: Path) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        return load_frame(path)

    def decode(self, index: int) -> np.ndarray:
        frame = self.load(self.files[index])
        if frame.shape[:2] != self.size:
            raise DataError(
                f"{self.files[index]}: size {_size(frame.shape[:2])}, but {self.files[0].name} of the same video has "
                f"{_size(self.size)} (width x height): all frames of a video need one size"
            )
        return frame


class FolderFlow(FolderFrames):
    """The same of flow images, which may be nothing else: raw flow in a PNG would pass for a dark picture."""

    def load(self, path: Path) -> np.ndarray:
        """(H, W, 3) uint8 RGB colour wheel."""
        return load_flow_image(path)


class VideoFrames(LazyFrames):
    """Frames of a video file, decoded by OpenCV in their order.

    The number of frames is counted by decoding the file once, as the number that a container states is often an
    estimate, and OpenCV tells only then what it cannot decode. Going back further than the window starts decoding again
    at the first frame, since seeking by frame number is not exact in many formats.

    Attributes:
        promised: about the number of frames that the header states, where fewer can be decoded; else None.

    Raises:
        UserError: no such file, an empty one, or one that cannot be decoded; the message holds an ffmpeg command.
        OSError: one that may not be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import cv2

        self.path = Path(path)
        self.promised: int | None = None
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such video file (for a folder of frames use --frames)")
        with self.path.open("rb") as file:  # what this user may not read, OpenCV would call no video
            if not file.read(1):
                raise UserError(f"{self.path}: an empty file (0 bytes); expected a video: copy or record it again")
        self._capture: cv2.VideoCapture | None = None
        self._next = 0

        with _said_by_ffmpeg() as said:
            capture = self._open()
            stated = capture.get(cv2.CAP_PROP_FRAME_COUNT)
            fps = capture.get(cv2.CAP_PROP_FPS)
            decoded, first = capture.read()
            if not decoded or first is None:
                raise self._undecodable("not one frame of it can be decoded")
            times = [capture.get(cv2.CAP_PROP_POS_MSEC)]
            while capture.grab():
                times.append(capture.get(cv2.CAP_PROP_POS_MSEC))
                capture.retrieve()
            # The end of the file, or a damaged frame with good ones after it? OpenCV says the same of both, and some
            # headers state no number of frames to tell by.
            later = any(capture.grab() for _ in range(DAMAGED_AT_MOST))
            capture.release()
        count = len(times)
        if any(NOT_CONVERTED in line for line in said):
            raise self._undecodable("it is interlaced, and this OpenCV cannot read such frames", "-vf yadif ")
        if later:
            raise self._undecodable(f"frame {count} is damaged, or the file is cut short there")
        rate = _rate(times, fps)
        if math.isfinite(stated) and fps > 0:
            stated *= rate / fps  # most headers state a duration, of which OpenCV makes frames by the stated rate
        if math.isfinite(stated) and stated > count + 1:
            self.promised = round(stated)
        stems = [f"{i:05d}" for i in range(count)]
        super().__init__([self.path], stems, first.shape[:2], rate)

    def decode(self, index: int) -> np.ndarray:
        import cv2

        if self._capture is None or index < self._next:
            self.close()
            self._capture = self._open()
            self._next = 0
        frame = None
        # Frames just before the wanted one may be wanted next; earlier ones are only passed over.
        while self._next <= index:
            position = self._next
            self._next += 1
            if not self._capture.grab():
                raise self._undecodable(f"frame {position} of {len(self)} cannot be decoded")
            if position != index and (position in self._kept or index - position >= self.window // 2):
                continue
            decoded, bgr = self._capture.retrieve()
            if not decoded or bgr is None:
                raise self._undecodable(f"frame {position} of {len(self)} cannot be decoded")
            if bgr.shape[:2] != self.size:
                raise self._undecodable(
                    f"frame {position} has size {_size(bgr.shape[:2])}, the first one {_size(self.size)}"
                )
            frame = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
            if position != index:
                self._keep(position, frame)
        return frame

    def _open(self) -> cv2.VideoCapture:
        import cv2

        # The whole path: FFmpeg takes what stands before a colon (2026-11-26T12:30.mp4) for a protocol, unless a slash
        # stands before it.
        capture = cv2.VideoCapture(os.path.abspath(self.path))
        if not capture.isOpened():
            raise self._undecodable("it cannot be opened as a video")
        return capture

    def _undecodable(self, what: str, filters: str = "") -> UserError:
        names = self.path, Path(f"{self.path.stem}_h264.mp4")
        # ./ before what a program would take for an option or a protocol.
        special = (str(name).startswith("-") or ":" in name.parts[0] for name in names)
        source, target = (shlex.quote(f"./{name}" if odd else str(name)) for name, odd in zip(names, special))
        return UserError(
            f"{self.path}: {what}. Convert it first, and give the new file (what ffmpeg cannot read either is "
            "cut short, damaged or no video):\n"
            f"  ffmpeg -i {source} {filters}-c:v libx264 -crf 18 -pix_fmt yuv420p -an {target}"
        )

    def close(self) -> None:
        """Closes the file; the next frame asked for opens it again."""
        if self._capture is not None:
            self._capture.release()
            self._capture = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_capture": None, "_next": 0}


def open_folder(path: str | os.PathLike[str]) -> FolderFrames:
    """The frames of a folder of images, ordered by the numbers in their names (2 before 10); see `FolderFrames`.

    Raises:
        DataError: no such folder, no image in it, one of a format that is not read, or two images of one stem.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of frames (for a video file use --video)")
    paths = list_files(folder, FRAME_SUFFIXES)
    if not paths and list_folders(folder):
        raise DataError(f"{folder}: no frame in it, only folders; expected a folder of frames, so name one of these")
    known = {path.stem for path in paths}
    unread = [path for path in list_files(folder, OTHER_PICTURES) if path.stem not in known]
    if unread:  # left out, they would shorten the video without a word
        raise DataError(
            f"{unread[0]}: pictures of this kind are not read; expected {', '.join(FRAME_SUFFIXES)}. Save all frames "
            "of the video as PNG, or take away what is no frame"
        )
    if not paths:
        raise DataError(f"{folder}: no frames in it; expected images ({', '.join(FRAME_SUFFIXES)})")
    by_stem(paths, folder.name, raise_problem)
    return FolderFrames(paths)


def write_video(path: str | os.PathLike[str], frames: Iterable[np.ndarray], fps: float = DEFAULT_FPS) -> int:
    """Writes frames, (H, W, 3) uint8 RGB of one size, as an H.264 file (4:2:0), and returns their number.

    That is what browsers and all other players show; the file says which colours it has (BT.709), so that they agree on
    them, and has its index in front. It appears only when it is complete. An odd height or width gets one more row or
    column, a copy of the last one, because 4:2:0 knows only even sizes. A rate below `SLOWEST` is written as that.

    Raises:
        UserError: no frames, larger ones than H.264 takes, a file name that does not end in .mp4, or a PyAV that cannot
            write H.264.
        OSError: a place where nothing can be written, or a full disk.
        ValueError: a frame of another shape or dtype.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise UserError(f"{path}: videos are written as H.264 in MP4; expected a name ending in .mp4")
    if not (math.isfinite(fps) and fps > 0):
        raise UserError(f"{path}: {fps} frames per second; expected a number above 0")
    with replacing(path, suffix=".mp4") as temporary:
        return _encode(path, temporary, frames, fps)


def _encode(path: Path, temporary: Path, frames: Iterable[np.ndarray], fps: float) -> int:
    """`write_video` into a temporary file."""
    import av

    shape, count = None, 0
    with av.open(str(temporary), "w", options={"movflags": "faststart"}) as file:
        for frame in frames:
            frame = np.asarray(frame)
            if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
                raise ValueError(f"{path}: frame {count}: expected uint8 (H, W, 3), got {frame.dtype} {frame.shape}")
            if shape is None:
                shape = frame.shape
                stream = _h264(file, path, shape, fps)
            if frame.shape != shape:
                raise ValueError(f"{path}: frame {count} has shape {frame.shape}, the first one {shape}")
            frame = np.pad(frame, ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0)), mode="edge")
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            file.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709")))
            count += 1
        if shape is None:
            raise UserError(f"{path}: there are no frames to write")
        file.mux(stream.encode())
    return count


def _h264(file: Any, path: Path, shape: tuple[int, int, int], fps: float) -> Any:  # PyAV's container and stream
    """A stream of H.264 in an MP4 file, for frames of this shape, made even."""
    import av

    if max(shape) > LONGEST_SIDE:
        raise UserError(f"{path}: frames of {_size(shape[:2])}; H.264 takes {LONGEST_SIDE} pixels a side at most")
    try:
        stream = file.add_stream(CODEC, rate=max(Fraction(fps).limit_denominator(65535), SLOWEST))
    except av.codec.codec.UnknownCodecError as error:
        raise UserError(f"{path}: this PyAV cannot write H.264 ({CODEC}); install that of `pip install av`") from error
    stream.height, stream.width = (side + side % 2 for side in shape[:2])
    stream.pix_fmt = "yuv420p"
    stream.options = {"preset": "veryfast", "crf": "18"}  # near what the eye can tell
    context = stream.codec_context
    context.color_range = 1  # 16 to 235
    context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
    return stream


def _rate(times: Sequence[float], stated: float) -> float:
    """Frames per second: as the header states them, but where the times of the frames, in ms, have another mean.

    Browsers record WebM at 1000 frames a second by its header, which is but the resolution of its times, and screen
    recorders state the rate of the screen, which only moving pictures have. AVI files may have times out of order.
    """
    usable = math.isfinite(stated) and 0 < stated <= 1000
    if len(times) > 1 and all(before < after for before, after in zip(times, times[1:])):
        mean = 1000 * (len(times) - 1) / (times[-1] - times[0])
        if mean <= 1000 and not (usable and abs(mean / stated - 1) < TIMES_ROUNDED):
            return mean
    return float(stated) if usable else DEFAULT_FPS


@contextmanager
def _said_by_ffmpeg() -> Iterator[list[str]]:
    """The lines that FFmpeg writes to stderr meanwhile, when it is over: OpenCV tells of some faults in no other way.

    They go to stderr then, but where one is of `NOT_CONVERTED`: of these there are two for each frame.
    """
    said: list[str] = []
    try:
        stderr = os.dup(2)
    except OSError:  # closed, so that nobody reads it
        yield said
        return
    with tempfile.TemporaryFile() as file:
        try:
            os.dup2(file.fileno(), 2)
            yield said
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            written = file.read()
            said += written.decode(errors="replace").splitlines()
            if not any(NOT_CONVERTED in line for line in said):
                os.write(2, written)


def _size(shape: tuple[int, int]) -> str:
    """(H, W) as people write it: width x height."""
    return f"{shape[1]} x {shape[0]}"
