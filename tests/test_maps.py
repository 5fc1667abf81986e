"""The maps of `--tools test`: what is written, which of them a later run keeps, and what they depend on."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from utils.errors import UserError
from utils.inference import maps, own_video, segment
from utils.inference.maps import fingerprint, is_current, made_with, of_run, remove_others, write_maps
from utils.inference.own_video import OwnVideo, check_place
from utils.inference.videos import Video

SETTINGS = {"weights": "0123", "size": [4, 8], "sources": "a"}


def video(*stems: str, size: tuple[int, int] = (1, 8)) -> Video:
    return Video(Path("D", "v"), stems, [np.zeros((*size, 3), np.uint8)] * len(stems), None)


def write(root: Path, *stems: str, **settings: Any) -> Video:
    for stem in stems:
        write_maps(video(stem), root, stem, np.full((1, 8), 0.75), SETTINGS | settings)
    return video(*stems)


def stems(root: Path, kind: str) -> list[str]:
    return sorted(path.stem for path in (root / kind / "D" / "v").glob("*.png"))


def test_grey_is_rounded_and_binary_is_what_is_grey_above_127(tmp_path: Path) -> None:
    probability = np.array([[0.25, 0.498, 0.499, 0.5, 0.501, 1, 1 + 1e-6, -1e-6]])
    write_maps(video("0"), tmp_path, "0", probability, SETTINGS)
    grey, binary = (Image.open(tmp_path / kind / "D/v/0.png") for kind in ("probability", "binary"))
    assert np.asarray(grey).tolist() == [[64, 127, 127, 128, 128, 255, 255, 0]]  # 63.75, 126.99, 127.245, 127.5 …
    assert np.asarray(binary).tolist() == [[0, 0, 0, 255, 255, 255, 255, 0]]
    assert (
        made_with(tmp_path / "probability/D/v/0.png") == SETTINGS and made_with(tmp_path / "binary/D/v/0.png") is None
    )


def test_the_map_that_vouches_for_both_is_written_last_and_refined_ones_of_before_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    for folder in ("crf", "crf_binary"):
        (tmp_path / folder / "D" / "v").mkdir(parents=True, exist_ok=True)
        for stem in ("0", "1"):
            (tmp_path / folder / "D" / "v" / f"{stem}.png").touch()

    def record(path: Path, *_: Any, **__: Any) -> None:
        written.append(path.relative_to(tmp_path).parts[0])
        assert stems(tmp_path, "crf") == stems(tmp_path, "crf_binary") == ["1"]

    monkeypatch.setattr(maps, "write_png", record)
    write(tmp_path, "0")
    assert written == ["binary", "probability"]


def test_a_new_mask_has_no_old_map_beside_it_that_would_vouch_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full between the two: the run before, begun again, would keep the mask as its own."""
    write(tmp_path, "0")
    write_png = maps.write_png

    def fill_up(path: Path, *what: Any, **how: Any) -> None:
        if path.parts[-4] == "probability":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_png(path, *what, **how)

    monkeypatch.setattr(maps, "write_png", fill_up)
    with pytest.raises(OSError, match="No space"):
        write_maps(video("0"), tmp_path, "0", np.full((1, 8), 0.25), SETTINGS | {"weights": "4567"})
    assert stems(tmp_path, "binary") == ["0"]
    assert not is_current(video("0"), tmp_path, SETTINGS)


def test_which_maps_are_kept(tmp_path: Path) -> None:
    both = write(tmp_path, "0", "1")
    assert is_current(both, tmp_path, SETTINGS)
    assert not is_current(both, tmp_path, SETTINGS | {"sources": "b"})
    assert not is_current(video("0", "1", "2"), tmp_path, SETTINGS)
    write(tmp_path, "1", size=[8, 4])
    assert not is_current(both, tmp_path, SETTINGS)
    for kind in ("binary", "probability"):
        write(tmp_path, "1")
        (tmp_path / kind / "D" / "v" / "1.png").unlink()
        assert not is_current(both, tmp_path, SETTINGS), kind


@pytest.mark.parametrize("kind", ["binary", "probability"])
def test_maps_that_a_machine_left_damaged_are_not_kept(kind: str, tmp_path: Path) -> None:
    """The settings stand at the head of a map, and can be read where the rest is lost."""
    both = write(tmp_path, "0", "1")
    path = tmp_path / kind / "D" / "v" / "1.png"
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:-30], whole[:-30] + bytes(30)):
        path.write_bytes(damaged)
        assert not is_current(both, tmp_path, SETTINGS)
    path.write_bytes(whole)
    assert is_current(both, tmp_path, SETTINGS)


def test_an_image_of_others_that_is_too_large_to_be_opened_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (30, 20)).save(tmp_path / "map.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert made_with(tmp_path / "map.png") is None


def test_maps_of_frames_that_are_gone_go_with_what_came_of_them_and_others_stay(tmp_path: Path) -> None:
    write(tmp_path, "0", "1", "2")
    for kind in ("crf", "crf_binary", "probability", "binary"):
        (tmp_path / kind / "D" / "v").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 1)).save(tmp_path / kind / "D" / "v" / "mine.png")  # of somebody who does not say so
    for kind in ("crf", "crf_binary"):
        (tmp_path / kind / "D" / "v" / "2.png").touch()
    assert remove_others(video("0", "1"), tmp_path) == 1
    assert stems(tmp_path, "probability") == stems(tmp_path, "binary") == ["0", "1", "mine"]
    assert stems(tmp_path, "crf") == stems(tmp_path, "crf_binary") == ["mine"]
    assert remove_others(video("0", "1"), tmp_path) == 0


def test_another_file_under_a_name_is_told_by_its_size_or_its_time(tmp_path: Path) -> None:
    path = tmp_path / "0.png"
    found = []
    for content, time in ((b"12", 5), (b"123", 5), (b"12", 4), (b"12", 6)):
        path.write_bytes(content)
        os.utime(path, ns=(time * 10**9,) * 2)
        found.append(fingerprint([path]))
    path.rename(tmp_path / "1.png")
    found.append(fingerprint([tmp_path / "1.png"]))
    assert len(set(found)) == 5
    assert fingerprint([tmp_path / "1.png", path]) == found[-1]  # what is not there yet says nothing
    moved = tmp_path / "elsewhere" / "1.png"
    moved.parent.mkdir()
    (tmp_path / "1.png").rename(moved)
    assert fingerprint([moved]) == found[-1]


def test_what_is_alike_in_a_run() -> None:
    upright = {"weights": "0123", "size": [4, 8], "resized": [8, 4], "sources": "b"}
    assert of_run(upright) == of_run(SETTINGS) == {"weights": "0123", "size": [4, 8]}
    assert of_run({"iters": 5, "map": "x"}) == {"iters": 5}
    assert of_run(SETTINGS | {"weights": "4567"}) != of_run(SETTINGS)


@pytest.mark.parametrize(
    ("frame", "given", "expected"),
    [
        ((480, 854), None, [384, 640]),
        ((854, 480), None, [640, 384]),
        ((500, 500), None, [480, 480]),
        ((480, 640), None, [416, 576]),
        ((480, 640), [384, 640], [384, 640]),  # somebody wants it so
        ((854, 480), [384, 640], [384, 640]),
    ],
)
def test_a_size_that_nobody_gave_is_in_the_shape_of_the_video(
    frame: tuple[int, int], given: list[int] | None, expected: list[int]
) -> None:
    weights = SimpleNamespace(net=SimpleNamespace(multiple=32))
    settings = {"size": [384, 640]}
    found = segment.size_for(video("0", size=frame), settings, weights, SimpleNamespace(size=given))
    assert found == expected
    made = segment.settings_of(video("0", size=frame), settings, weights, SimpleNamespace(size=given))
    assert made.get("resized", made["size"]) == expected and made["size"] == [384, 640]


def options(**changed: Any) -> SimpleNamespace:
    default = dict.fromkeys(("size", "batch_size", "clip_len", "zoom", "consensus", "smooth", "without", "flow_dir"))
    return SimpleNamespace(
        **default
        | {
            "flip": False,
            "scales": [1.0],
            "amp": "none",
            "optional_motion": False,
            "tools": ["test"],
            "overwrite": False,
        }
        | changed
    )


def test_what_maps_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = SimpleNamespace(streams=("appearance", "motion"))
    weights = SimpleNamespace(sha256="0123", size=(32, 64), zoom=True, net=net, path="w.pt")
    usual = segment.settings_from(options(), weights)
    assert usual == {
        **{"weights": "0123", "size": [32, 64], "clip_len": None, "flip": False, "scales": [1.0], "amp": "none"},
        **{"without": None, "zoom": True, "consensus": True, "smooth": True},
    }
    assert segment.settings_from(options(batch_size=3), weights) == usual  # rounding alone
    # A closer look, and votes, need the whole video; without frames there is nothing to vote by.
    clips = segment.settings_from(options(clip_len=4), weights)
    assert not clips["zoom"] and not clips["consensus"]
    blind = segment.settings_from(options(without="frames"), weights)
    assert not blind["consensus"] and not blind["smooth"]
    off = segment.settings_from(options(zoom=False, consensus=False), weights)
    assert not off["zoom"] and not off["consensus"]
    assert segment.settings_from(options(smooth=False), weights) == usual | {"smooth": False}
    weighed = segment.settings_from(options(optional_motion=True), weights)
    assert weighed == usual | {"optional_motion": True}
    monkeypatch.chdir(tmp_path)
    assert segment.settings_from(options(flow_dir="f"), weights) == usual | {"flow_dir": str(tmp_path / "f")}
    for wrong, said in (
        ({"scales": [1.0, 0.0]}, "--scales 1.0 0.0: expected numbers above 0"),
        ({"scales": [float("inf")]}, "--scales inf"),
        ({"scales": [float("nan")]}, "--scales nan"),
        ({"zoom": True, "clip_len": 4}, "--zoom and --clip_len 4"),
        ({"consensus": True, "clip_len": 4}, "--consensus and --clip_len 4"),
        ({"consensus": True, "without": "frames"}, "--consensus and --without frames"),
        ({"smooth": True, "without": "frames"}, "--smooth and --without frames"),
        ({"optional_motion": True, "without": "frames"}, "--optional_motion and --without frames"),
        ({"optional_motion": True, "without": "flow"}, "--optional_motion and --without flow"),
    ):
        with pytest.raises(UserError, match=said):
            segment.check(options(**wrong))
    motion = SimpleNamespace(**vars(weights) | {"net": SimpleNamespace(streams=("motion",))})
    assert not segment.settings_from(options(), motion)["consensus"]
    with pytest.raises(UserError, match="--optional_motion: w.pt is a network of one stream"):
        segment.settings_from(options(optional_motion=True), motion)


@pytest.mark.parametrize("kind", ["flow", "probability", "binary", "crf", "crf_binary", "overlay"])
def test_a_video_among_the_results_would_be_written_over(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "out" / kind / "clip.mp4"
    source.parent.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for place in (source, tmp_path / "link" / kind / "clip.mp4"):
        with pytest.raises(UserError, match="among the results of --save_dir"):
            check_place("video", str(place), str(tmp_path / "out"))
    check_place("video", str(tmp_path / "out" / "clip.mp4"), str(tmp_path / "out"))
    check_place("frames", str(tmp_path / "out" / kind), str(tmp_path / "other"))


def test_frames_go_to_the_crf_by_their_files_where_each_has_one() -> None:
    class Frames(list):
        files: tuple[Path, ...]
        stems = ("0", "1")

    def refinable(*files: str) -> bool:
        frames = Frames([np.zeros((1, 8, 3), np.uint8)] * 2)
        frames.files = tuple(map(Path, files))
        found = OwnVideo("v", frames).for_crf()
        assert found.frames == (frames.files if found.in_files else frames) and found.place == Path("v")
        return found.in_files

    assert refinable("a/0.png", "a/1.png") and refinable("a/0.JPG", "a/1.JPG")
    assert not refinable("clip.mp4") and not refinable("clip.webp")  # the second is a moving picture of two frames


def test_ones_own_video_is_of_its_frames_and_flow_and_a_refined_overlay_of_older_maps_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Frames(list):
        stems, window = ("0", "1"), 4

        def __init__(self, *files: str) -> None:
            super().__init__([np.zeros((1, 8, 3), np.uint8)] * 2)
            self.files = tuple(map(Path, files))

    def segment_stub(args: Any, videos: list[Video], processes: Any, weights: Any, written: Any) -> int:
        seen.extend(videos)
        for stem in Frames.stems[:made]:
            written(Path("v", f"{stem}.png"))
        if killed:
            raise KeyboardInterrupt
        return made

    seen: list[Video] = []
    told: list[Path] = []
    flows, made, killed = Frames("flow/0.png", "flow/1.png"), 2, False
    monkeypatch.setattr(own_video, "run_own_flow", lambda *_: flows)
    monkeypatch.setattr(own_video, "write_overlay", lambda own, save_dir, kind, path: path)
    monkeypatch.setattr(segment, "needs_flow", lambda args, weights: args.without != "flow")
    monkeypatch.setattr(segment, "run", segment_stub)
    refined = tmp_path / "overlay" / "v_crf.mp4"
    refined.parent.mkdir()

    def run(**changed: Any) -> OwnVideo:
        refined.touch()
        own = OwnVideo("v", Frames("clip.mp4"))
        main = SimpleNamespace(is_main=True, device="cpu")
        own_video.run_own(options(save_dir=tmp_path, **changed), own, main, None, told.append)
        return own

    assert run().frames.window == 4 and seen[-1].sources == (Path("clip.mp4"), *flows.files)
    assert not refined.exists() and told == [Path("v/0.png"), Path("v/1.png")]
    made = 0
    run(without="flow")
    assert refined.exists() and seen[-1].sources == (Path("clip.mp4"),) and seen[-1].flows is None
    # Readers of several passes are a clip apart: the decoder would begin anew for each.
    assert run(clip_len=3).frames.window == 4 + 3
    assert run(clip_len=3, flip=True).frames.window == run(clip_len=3, scales=[1.0, 1.5]).frames.window == 4 + 6
    made, killed = 2, True  # the next call finds these maps made, and makes none
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not refined.exists()


def test_without_pyav_it_is_told_before_maps_are_made_that_no_overlay_can_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    for module in (segment, own_video.crf):
        monkeypatch.setattr(module, "run", lambda *_: pytest.fail("maps are made"))
    monkeypatch.setattr(segment, "needs_flow", lambda *_: False)
    args = options(save_dir=tmp_path)
    own = OwnVideo("v", SimpleNamespace(stems=("0",), files=(Path("clip.mp4"),)))
    with pytest.raises(ModuleNotFoundError, match="av"):
        own_video.run_own(args, own, SimpleNamespace(is_main=True, device="cpu"), None)
    with pytest.raises(ModuleNotFoundError, match="av"):
        own_video.run_own_crf(args, own)


def test_sources_are_frames_and_flow() -> None:
    from datasets.video_sequence import VideoSequence
    from utils.inference.videos import video_of

    frames, flows = ((Path(kind, "0.png"), Path(kind, "1.png")) for kind in ("frames", "flows"))
    sequence = VideoSequence("v", "D", frames, dict(zip("01", flows)), {}, "nonzero", Path("flows"))
    assert video_of(sequence).sources == (*frames, *flows)
    blind = video_of(sequence, with_flow=False)
    assert blind.sources == frames and blind.flows is None
    assert video_of(dataclasses.replace(sequence, flows={}), with_flow=False).place == Path("D", "v")
