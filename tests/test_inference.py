"""`--tools test`: maps are the predictor's, at the source's size; it resumes, shares videos, and takes one's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import models.predictor
import models.state_dicts
import tool
import utils.video
from datasets.errors import DataError
from datasets.flow_colour import flow_to_image
from datasets.images import LazyImages, load_flow_image, load_frame
from datasets.sequences import read_dataset
from datasets.synthetic import write_dataset
from models import DBSNet, Predictor, build_dbsnet, load_dbsnet
from models.growth import PARTS, keep_stream, take_out
from models.weights import save_weights
from models.zoom import View
from utils.crf import refine
from utils.distributed import share, share_out
from utils.flow.files import FlowFiles
from utils.inference import segment, videos
from utils.inference.maps import FIELD
from utils.inference.weights import PARTS as OFFERED
from utils.video import VideoFrames, write_video

FRAMES, SIZE = 4, (48, 80)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three synthetic videos with flow, all in val."""
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, "DAVIS", videos=3, frames=FRAMES, size=SIZE, seed=2, validation=3)
    return root


def weights_file(path: Path, seed: int = 0, spread: float = 100, **notes: str) -> Path:
    torch.manual_seed(seed)
    net = build_dbsnet("xxs", depth=1, dilations=[1])
    with torch.no_grad():  # a random network says about the same everywhere; this spreads its answers around 0.5
        net.decoder.head.weight.mul_(spread)
    save_weights(path, net, metadata={"size": "32 64", **notes})
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_file(tmp_path_factory.mktemp("weights") / "w.safetensors")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def call(weights: Path, save_dir: Path, *words: object) -> None:
    arguments = ["--checkpoint", weights, "--tools", "test", "--save_dir", save_dir, "--device", "cpu", *words]
    assert tool.main([str(word) for word in arguments]) == 0


def maps(save_dir: Path, kind: str = "probability") -> dict[str, np.ndarray]:
    folder = save_dir / kind
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


def expected(
    weights: Path, data: Path, *, frame_level: int | None = None, flow_level: int | None = None, **options: object
) -> dict[str, np.ndarray]:
    """Maps straight from the predictor, as the tool asks for them, on decoded pictures, or pictures of one grey."""
    seen = frame_level is None
    usual = {"size": (32, 64), "consensus": seen and "clip_len" not in options, "smooth": seen}
    predictor = Predictor(load_dbsnet(weights), **usual | options)
    found = {}
    for sequence in read_dataset("DAVIS-2016", data):
        frames = [load_frame(path) for path in sequence.frames]
        flows = [load_flow_image(sequence.flow_path(stem)) for stem in sequence.stems]
        if frame_level is not None:
            frames = [frame * 0 + np.uint8(frame_level) for frame in frames]
        if flow_level is not None:
            flows = [flow * 0 + np.uint8(flow_level) for flow in flows]
        for index, probability in predictor(frames, flows):
            grey = np.floor(probability * 255 + 0.5).astype(np.uint8)
            found[f"DAVIS-2016/{sequence.name}/{sequence.stems[index]}.png"] = grey
    return found


def test_maps_are_the_predictors_at_the_size_of_the_source(data: Path, weights: Path, tmp_path: Path) -> None:
    call(weights, tmp_path, "--data_dir", data)
    probability, binary = maps(tmp_path), maps(tmp_path, "binary")
    wanted = expected(weights, data)
    assert probability.keys() == binary.keys() == wanted.keys() and len(wanted) == 3 * FRAMES
    for name, grey in probability.items():
        assert grey.dtype == np.uint8 and grey.shape == SIZE
        assert np.abs(grey.astype(int) - wanted[name]).max() <= 1, name
        assert np.array_equal(binary[name], np.where(grey >= 128, 255, 0)), name
    spread = np.concatenate([grey.ravel() for grey in probability.values()])
    assert spread.min() < 120 and spread.max() > 135  # the threshold had something to decide
    record = json.loads((tmp_path / "test.json").read_text())
    assert record["frames"] == 3 * FRAMES and record["settings"]["size"] == [32, 64]
    for damaged in ("{", "[]"):  # the maps are kept, and what is told of them is written again
        (tmp_path / "test.json").write_text(damaged)
        call(weights, tmp_path, "--data_dir", data)
        again = json.loads((tmp_path / "test.json").read_text())
        assert again["frames"] == 0 and (again["sha256"], again["settings"]) == (record["sha256"], record["settings"])


def test_options_reach_the_predictor(data: Path, weights: Path, tmp_path: Path) -> None:
    call(weights, tmp_path, "--data_dir", data, "--flip", "--scales", 1, 1.5, "--clip_len", 3, "--batch_size", 2)
    wanted = expected(weights, data, flip=True, scales=(1.0, 1.5), clip_len=3, mirror_flow=segment.mirror_flow)
    for name, grey in maps(tmp_path).items():
        assert np.abs(grey.astype(int) - wanted[name]).max() <= 1, name


def test_frames_vote_where_they_can_and_nobody_said_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, weights = tmp_path / "data", weights_file(tmp_path / "w.safetensors", spread=2000)
    write_dataset(root, "DAVIS", videos=1, frames=12, size=SIZE, seed=3, validation=1)
    voted, plain = expected(weights, root), expected(weights, root, consensus=False)
    assert max(np.abs(voted[name].astype(int) - plain[name]).max() for name in voted) > 4
    for number, (words, wanted) in enumerate((
        ((), voted), (("--consensus",), voted), (("--no-consensus",), plain),
        (("--clip_len", 4), expected(weights, root, clip_len=4)),
        (("--without", "frames"), expected(weights, root, frame_level=128)),
    )):  # fmt: skip
        save_dir = tmp_path / str(number)
        call(weights, save_dir, "--data_dir", root, *words)
        for name, grey in maps(save_dir).items():
            assert np.abs(grey.astype(int) - wanted[name]).max() <= 1, (words, name)
        record = json.loads((save_dir / "test.json").read_text())
        assert record["settings"]["consensus"] is (wanted is voted)
        assert ("frames vote" in capsys.readouterr().out) is (wanted is voted)


def test_a_closer_look_is_taken_where_the_weights_say_so_or_the_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a network without training finds is everywhere.
    monkeypatch.setattr(models.predictor, "follow", lambda found: [View(0.2, 0.3, 0.5)] * len(found))
    root = tmp_path / "data"
    write_dataset(root, "DAVIS", videos=1, frames=FRAMES, size=SIZE, seed=3, validation=1)
    files = {note: weights_file(tmp_path / f"{note}.safetensors", spread=2000, zoom=note) for note in ("yes", "no")}
    zoomed, plain = expected(files["yes"], root, zoom=True), expected(files["yes"], root)
    assert max(np.abs(zoomed[name].astype(int) - plain[name]).max() for name in zoomed) > 4
    for number, (note, words, wanted) in enumerate((
        ("yes", (), zoomed), ("yes", ("--no-zoom",), plain), ("no", (), plain), ("no", ("--zoom",), zoomed),
        ("yes", ("--clip_len", 3), expected(files["yes"], root, clip_len=3)),
    )):  # fmt: skip
        save_dir = tmp_path / str(number)
        call(files[note], save_dir, "--data_dir", root, *words)
        for name, grey in maps(save_dir).items():
            assert np.abs(grey.astype(int) - wanted[name]).max() <= 1, (note, words, name)
        record = json.loads((save_dir / "test.json").read_text())
        assert record["settings"]["zoom"] is (wanted is zoomed)
        assert ("a closer look" in capsys.readouterr().out) is (wanted is zoomed)


def test_motion_is_an_option(data: Path, tmp_path: Path) -> None:
    weights = weights_file(tmp_path / "w.safetensors", spread=2000)
    plain = expected(weights, data)
    wanted = expected(weights, data, optional_motion=True)
    assert max(np.abs(wanted[name].astype(int) - plain[name]).max() for name in wanted) > 4
    call(weights, tmp_path / "r", "--data_dir", data)
    call(weights, tmp_path / "r", "--data_dir", data, "--optional_motion")  # other settings: all maps are made anew
    for name, grey in maps(tmp_path / "r").items():
        assert np.abs(grey.astype(int) - wanted[name]).max() <= 1, name
    assert json.loads((tmp_path / "r" / "test.json").read_text())["settings"]["optional_motion"] is True


@pytest.mark.parametrize(("note", "words", "said"), [
    ("yes", ("--zoom", "--clip_len", "4"), "--zoom and --clip_len 4: give one of them"),
    ("maybe", (), "its metadata say zoom=maybe; expected yes or no"),
])  # fmt: skip
def test_a_zoom_that_cannot_be_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], note: str, words: tuple, said: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(weights_file(tmp_path / "w.safetensors", zoom=note), tmp_path / "r", "--data_dir", data, *words)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_a_consensus_that_cannot_be_is_refused(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blind = tmp_path / "blind.safetensors"
    save_weights(blind, build_dbsnet("xxs", depth=1, dilations=[1], streams=("motion",)))
    for file, words, said in (
        (weights, ("--consensus", "--clip_len", "4"), "--consensus and --clip_len 4"),
        (weights, ("--consensus", "--without", "frames"), "--consensus and --without frames"),
        (blind, ("--consensus",), "has no appearance stream"),
    ):
        with pytest.raises(SystemExit) as stopped:
            call(file, tmp_path / "r", "--data_dir", data, *words)
        assert stopped.value.code == 2 and said in capsys.readouterr().err
    call(blind, tmp_path / "b", "--data_dir", data)
    assert json.loads((tmp_path / "b" / "test.json").read_text())["settings"]["consensus"] is False


@pytest.mark.parametrize(("without", "level"), [("flow", {"flow_level": 255}), ("frames", {"frame_level": 128})])
def test_a_stream_can_be_blinded(data: Path, weights: Path, tmp_path: Path, without: str, level: dict) -> None:
    call(weights, tmp_path, "--data_dir", data, "--without", without)
    wanted, seeing = expected(weights, data, **level), expected(weights, data)
    found = maps(tmp_path)
    for name, grey in found.items():
        assert np.abs(grey.astype(int) - wanted[name]).max() <= 1, name
    assert any((grey != seeing[name]).mean() > 0.1 for name, grey in found.items())


def test_appearance_alone_needs_no_flow(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("Flows"))
    kept = next((data / "DAVIS" / "Flows").rglob("*.png"), None) or next((data / "DAVIS" / "Flows").rglob("*.jpg"))
    (bare / kept.relative_to(data)).parent.mkdir(parents=True)
    shutil.copy(kept, bare / kept.relative_to(data))  # one frame of one video has flow
    for root in (data, bare):
        call(weights, tmp_path / root.name, "--data_dir", root, "--without", "flow")
    wanted, found = maps(tmp_path / data.name), maps(tmp_path / bare.name)
    assert found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)
    words = ["--tools", "test", "--checkpoint", weights, "--data_dir", bare, "--without", "frames", "--device", "cpu"]
    with pytest.raises(SystemExit):
        tool.main([str(word) for word in [*words, "--save_dir", tmp_path / "r"]])
    assert "has no flow image" in capsys.readouterr().err

    # A network that has no other stream asks for none either; nor is any made for a video of one's own.
    save_weights(tmp_path / "appearance.safetensors", keep_stream(load_dbsnet(weights), "appearance"))
    for root in (data, bare):
        call(tmp_path / "appearance.safetensors", tmp_path / "a" / root.name, "--data_dir", root, "--size", 32, 64)
    alone, found = maps(tmp_path / "a" / data.name), maps(tmp_path / "a" / bare.name)
    assert len(alone) == 3 * FRAMES and alone.keys() == found.keys()
    assert all(np.array_equal(found[name], alone[name]) for name in alone)
    own = next((bare / "DAVIS/JPEGImages/480p").iterdir())
    call(tmp_path / "appearance.safetensors", tmp_path / "own", "--frames", own, "--size", 32, 64)
    for name, grey in maps(tmp_path / "own").items():
        assert np.array_equal(grey, alone[f"DAVIS-2016/{name}"])
    call(weights, tmp_path / "blind", "--frames", own, "--without", "flow")
    for name, grey in maps(tmp_path / "blind").items():
        assert np.array_equal(grey, wanted[f"DAVIS-2016/{name}"])
    assert not (tmp_path / "own" / "flow").exists() and not (tmp_path / "blind" / "flow").exists()


def test_a_part_can_be_taken_out(data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(OFFERED) == set(PARTS)
    net = load_dbsnet(weights)
    present = [part for part, option in PARTS.items() if net.config[option]]
    assert "propagation" in present
    for part in present:
        call(weights, tmp_path / part, "--data_dir", data, "--without", part)
        rest = take_out(net, part)
        save_weights(tmp_path / "rest.safetensors", rest, metadata={"size": "32 64"})
        record = json.loads((tmp_path / part / "test.json").read_text())  # the report tells of the network that ran
        assert record["parameters"] == sum(parameter.numel() for parameter in rest.parameters())
        assert record["network"] == rest.config
        wanted = expected(tmp_path / "rest.safetensors", data)
        for name, grey in maps(tmp_path / part).items():
            assert np.abs(grey.astype(int) - wanted[name]).max() <= 1, name
    assert any((grey != maps(tmp_path / present[0])[name]).any() for name, grey in expected(weights, data).items())


def test_results_that_are_no_numbers_are_no_masks(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Black ones, they would be, from a training that diverged; or from features that half precision cannot hold."""

    def message(change: Callable[[DBSNet], object], *words: str) -> str:
        net = load_dbsnet(weights)
        with torch.no_grad():
            change(net)
        save_weights(tmp_path / "w.safetensors", net, metadata={"size": "32 64"})
        with pytest.raises(SystemExit) as caught:
            call(tmp_path / "w.safetensors", tmp_path / "r", "--data_dir", data, *words)
        assert caught.value.code == 2 and not list(tmp_path.rglob("*.png"))
        return capsys.readouterr().err

    assert "w.safetensors: has weights that are not numbers" in message(lambda net: net.skip.conv.weight.fill_(np.nan))
    large = message(lambda net: net.decoder.blocks[0].norm.weight.fill_(1e9), "--amp", "fp16")
    kept = message(lambda net: net.skip.norm.weight.fill_(1e9))
    assert "DAVIS-2016/video-000/00000: the result of" in large and "--amp bf16 or none" in large
    assert "--clip_len N" in kept
    apart = message(lambda net: [p.mul_(1e20) for p in net.head_parameters()], "--clip_len", "3")
    assert "may have diverged; take other weights" in apart and "--clip_len" not in apart


def test_it_goes_on_where_it_stopped(data: Path, weights: Path, tmp_path: Path) -> None:
    words = ["--data_dir", data, "--datasets", "DAVIS-2016"]
    call(weights, tmp_path / "r", *words)
    folders = [tmp_path / "r" / kind / "DAVIS-2016" for kind in ("probability", "binary")]

    def times() -> dict[str, set[int]]:
        """When the maps of each video were written."""
        return {
            video.name: {path.stat().st_mtime_ns for folder in folders for path in (folder / video.name).iterdir()}
            for video in sorted(folders[0].iterdir())
        }

    first = times()
    call(weights, tmp_path / "r", *words, "--batch_size", 1)  # no matter for the result
    assert times() == first
    (folders[1] / "video-001" / "00002.png").unlink()
    call(weights, tmp_path / "r", *words)
    second = times()
    assert second["video-000"] == first["video-000"] and second["video-002"] == first["video-002"]
    assert not second["video-001"] & first["video-001"] and (folders[1] / "video-001" / "00002.png").is_file()
    # Maps of other weights or settings are not kept.
    before = maps(tmp_path / "r")
    call(weights_file(tmp_path / "other.safetensors", seed=1), tmp_path / "r", *words)
    assert all(not times()[name] & second[name] for name in second)
    assert any(not np.array_equal(grey, before[name]) for name, grey in maps(tmp_path / "r").items())
    third = times()
    call(tmp_path / "other.safetensors", tmp_path / "r", *words, "--flip", "--sequences", "video-002")
    assert times()["video-000"] == third["video-000"] and not times()["video-002"] & third["video-002"]
    call(tmp_path / "other.safetensors", tmp_path / "r", *words, "--sequences", "video-000", "--overwrite")
    assert not times()["video-000"] & third["video-000"]
    assert not list((tmp_path / "r").rglob("*.tmp"))


def test_maps_of_other_flow_are_made_again_also_where_it_is_older(data: Path, weights: Path, tmp_path: Path) -> None:
    """As when folders of flow are swapped: mv, rsync and unzip keep the dates of files."""
    root = shutil.copytree(data, tmp_path / "data")
    flows = sorted((root / "DAVIS" / "Flows").rglob("video-001/*.png"))
    call(weights, tmp_path / "r", "--data_dir", root)
    before = maps(tmp_path / "r")
    for path in flows:
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
        os.utime(path, (1e9, 1e9))
    call(weights, tmp_path / "r", "--data_dir", root)
    after = maps(tmp_path / "r")
    assert {Path(name).parent.name for name in before if (before[name] != after[name]).any()} == {"video-001"}


def test_maps_of_weights_that_were_replaced_while_they_were_read_are_made_again(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As training does each time that it has found better ones."""
    path = Path(shutil.copy(weights, tmp_path / "w.safetensors"))
    read = models.state_dicts.read_checkpoint

    def replaced(file: Path) -> dict:
        content = read(file)
        weights_file(path, seed=1)
        return content

    with monkeypatch.context() as patch:
        patch.setattr(models.state_dicts, "read_checkpoint", replaced)
        call(path, tmp_path / "r", "--data_dir", data, "--sequences", "video-000")
    call(path, tmp_path / "r", "--data_dir", data, "--sequences", "video-000")
    call(path, tmp_path / "new", "--data_dir", data, "--sequences", "video-000")
    after, new = maps(tmp_path / "r"), maps(tmp_path / "new")
    assert after.keys() == new.keys() and all(np.array_equal(after[name], new[name]) for name in new)


def test_a_mixture_of_maps_is_not_scored(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was stopped leaves those of the run before it, and their mean is nobody's score."""
    score = ["--tools", "eval", "--save_dir", tmp_path / "r", "--data_dir", data, "--datasets", "DAVIS-2016"]
    score = [str(word) for word in (*score, "--metrics", "uvos")]
    words = ["--data_dir", data]
    call(weights, tmp_path / "r", *words)
    assert tool.main(score) == 0
    call(weights, tmp_path / "r", *words, "--flip", "--sequences", "video-001")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        tool.main(score)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "flip False and True" in said and "--tools test again" in said
    assert "eval: what made them" in said  # a bar: each map is opened
    # Nor where the folder within is given as that of another method.
    with pytest.raises(SystemExit) as ended:
        tool.main([*score, "--results", str(tmp_path / "r" / "probability")])
    assert ended.value.code == 2 and "flip False and True" in capsys.readouterr().err
    assert tool.main([*score, "--sequences", "video-001"]) == 0
    call(weights, tmp_path / "r", *words, "--flip")
    assert tool.main(score) == 0


def test_maps_older_than_their_flow_are_made_again(data: Path, weights: Path, tmp_path: Path) -> None:
    root = shutil.copytree(data, tmp_path / "data")
    call(weights, tmp_path / "r", "--data_dir", root)
    before = maps(tmp_path / "r")
    refined = tmp_path / "r" / "crf" / "DAVIS-2016" / "video-001" / "00001.png"
    refined.parent.mkdir(parents=True)
    refined.write_bytes(b"of the map before")
    for path in sorted((root / "DAVIS" / "Flows").rglob("video-001/*.png")):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "r" / "probability").rglob("*.png")}
    call(weights, tmp_path / "r", "--data_dir", root)
    assert {path.parent.name for path, when in written.items() if path.stat().st_mtime_ns != when} == {"video-001"}
    assert any((grey != before[name]).any() for name, grey in maps(tmp_path / "r").items())
    assert not refined.exists()  # the CRF's of a map that is no more


@pytest.mark.parametrize(("frames", "own"), [(SIZE[::-1], (64, 32)), ((60, 60), (32, 32)), ((20, 120), (32, 96))])
def test_videos_of_another_shape_are_not_squeezed_into_the_size(
    frames: tuple[int, int], own: tuple[int, int], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "d", "DAVIS", videos=2, frames=2, size=frames, seed=2, validation=2)
    for words, size in (([], own), (["--size", 32, 64], (32, 64))):
        call(weights, tmp_path / "r", "--data_dir", tmp_path / "d", *words)
        wanted = expected(weights, tmp_path / "d", size=size)
        for name, grey in maps(tmp_path / "r").items():
            assert grey.shape == frames
            assert np.abs(grey.astype(int) - wanted[name]).max() <= 1
        capsys.readouterr()
        call(weights, tmp_path / "r", "--data_dir", tmp_path / "d", *words)
        assert f" at {size[0]}×{size[1]}, 0 frames to do" in capsys.readouterr().out


def test_the_record_is_of_the_maps_that_are_there(data: Path, weights: Path, tmp_path: Path) -> None:
    other = weights_file(tmp_path / "other.safetensors", seed=1)

    def recorded() -> str:
        return json.loads((tmp_path / "r" / "test.json").read_text())["checkpoint"]

    call(weights, tmp_path / "r", "--data_dir", data, "--sequences", "video-000")
    call(other, tmp_path / "r", "--data_dir", data, "--sequences", "video-001")
    assert recorded() == str(other)
    call(weights, tmp_path / "r", "--data_dir", data, "--sequences", "video-000")  # nothing to do
    assert recorded() == str(weights)


@pytest.mark.parametrize("clip_len", [4, 40])
def test_clips_of_an_own_video_are_decoded_once(
    clip_len: int, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [np.full((32, 64, 3), t, np.uint8) for t in range(100)]
    write_video(tmp_path / "v.mp4", frames)
    opened = []
    monkeypatch.setattr(VideoFrames, "_open", lambda self, old=VideoFrames._open: opened.append(1) or old(self))
    call(weights, tmp_path / "r", "--video", tmp_path / "v.mp4", "--clip_len", clip_len)
    assert len(opened) <= 4  # to count the frames, for the flow, for the clips, for the overlay


@pytest.mark.parametrize(
    "words", [[], ["--flip"], ["--zoom"], ["--flip", "--scales", "1", "2", "--zoom"], ["--clip_len", "3"]]
)
def test_the_bar_moves_while_frames_are_encoded_and_ends_with_them(
    words: list[str], data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All masks of a video come at its end: counted alone, they would promise hours for minutes."""
    bars, seen = [], []
    make = segment.progress_bar
    monkeypatch.setattr(segment, "progress_bar", lambda **options: bars.append(make(**options)) or bars[-1])
    monkeypatch.setattr(segment, "write_maps", lambda *_: seen.append(bars[0].n))
    call(weights, tmp_path / "r", "--data_dir", data, *words)
    assert len(bars) == 1 and bars[0].n == pytest.approx(3 * FRAMES) and len(seen) == 3 * FRAMES
    if "--clip_len" not in words:
        assert min(seen) >= segment.ENCODED * FRAMES - 1e-6  # when the first map of the first video comes


@pytest.mark.parametrize("own", [False, True])
def test_pictures_in_files_are_decoded_by_several_threads(
    own: bool, data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    third, main = threading.Event(), threading.current_thread()

    def load(path: Path) -> np.ndarray:
        if threading.current_thread() is not main:  # which makes an own video's flow, one frame after the other
            if path.stem == "00002":
                third.set()
            assert path.stem != "00001" or third.wait(60)  # which one thread alone would come to later
        return load_frame(path)

    monkeypatch.setattr(utils.video if own else videos, "load_frame", load)
    folder = data / "DAVIS" / "JPEGImages" / "480p" / "video-000"
    which = ("--frames", folder) if own else ("--data_dir", data, "--sequences", "video-000")
    call(weights, tmp_path / "r", *which)
    assert len(maps(tmp_path / "r")) == FRAMES and third.is_set()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_processes_share_the_videos(world_size: int) -> None:
    lengths = [40, 3, 90, 55, 55, 20, 1]
    parts = [share(lengths, rank, world_size) for rank in range(world_size)]
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in part) for part in parts]
    assert max(loads) <= max(max(lengths), 1.34 * sum(lengths) / world_size)  # 4/3 is the rule's proven bound


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_what_is_left(world_size: int) -> None:
    # All that a first run did would have been the first process's, had it been shared again by length alone.
    lengths, done = [90, 55, 40, 40, 30, 20, 12, 3], {0, 4, 5}
    meeting, values = threading.Barrier(world_size), [None] * world_size
    looked: list[int] = []

    def pending(index: int) -> list[str]:
        looked.append(index)
        return [] if index in done else [f"{t:05d}" for t in range(lengths[index])]

    def process(rank: int) -> dict[int, Sequence[str]]:
        def gather(value: object) -> list:
            values[rank] = value
            meeting.wait()
            return list(values)

        return share_out(SimpleNamespace(rank=rank, world_size=world_size, gather=gather), lengths, pending, "test")

    with ThreadPoolExecutor(world_size) as pool:
        parts = list(pool.map(process, range(world_size)))
    assert sorted(looked) == list(range(len(lengths)))  # each was looked at once
    assert sorted(index for part in parts for index in part) == [i for i in range(len(lengths)) if i not in done]
    assert all(len(frames) == lengths[index] for part in parts for index, frames in part.items())
    loads = [sum(len(frames) for frames in part.values()) for part in parts]
    left = sum(length for index, length in enumerate(lengths) if index not in done)
    assert max(loads) <= 1.34 * left / world_size


def test_a_mirrored_flow_image_is_that_of_the_mirrored_flow() -> None:
    rng = np.random.default_rng(0)
    flow = np.cumsum(np.cumsum(rng.normal(size=(30, 40, 2)), 0), 1).astype(np.float32)
    mirrored = flow[:, ::-1] * np.array([-1, 1], np.float32)
    found = segment.mirror_flow(flow_to_image(flow)).astype(int)
    assert np.abs(found - flow_to_image(mirrored)).mean() < 3


def test_pictures_are_decoded_when_asked_for(tmp_path: Path) -> None:
    paths = [tmp_path / f"{t}.png" for t in range(3)]
    for path, height in zip(paths, (20, 20, 22)):
        Image.fromarray(np.zeros((height, 30, 3), np.uint8)).save(path)
    asked = []
    images = LazyImages(paths, lambda path: asked.append(path) or load_frame(path))
    assert len(images) == 3 and not asked
    _ = images[1], images[1]
    assert asked == [paths[1], paths[1]]
    with pytest.raises(DataError, match=rf"{paths[2]}: 30×22 .*30×20.*{paths[0]}"):
        _ = images[2]


def test_scores_of_flow_of_two_kinds_are_no_row(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(weights, tmp_path / "supplied", "--data_dir", data, "--tools", "test", "eval")
    flow, names = tmp_path / "flow", [sequence.name for sequence in read_dataset("DAVIS-2016", data)]
    made = ["--data_dir", data, "--flow_dir", flow, "--flow_method", "dis", "--workers", 0, "--tools"]
    call(weights, tmp_path / "one", *made, "flow", "test", "eval")
    call(weights, tmp_path / "two", *made, "flow", "--flow_size", 24, 40, "--overwrite", "--sequences", names[0])
    with pytest.raises(SystemExit):
        call(weights, tmp_path / "two", *made, "test", "eval")
    said = capsys.readouterr().err
    assert "the maps are of different runs" in said and "flow dis [24, 40] and dis" in said


def test_maps_that_do_not_tell_frames_and_flow_are_kept(data: Path, weights: Path, tmp_path: Path) -> None:
    """Those of older versions: `sources` tells as much."""
    call(weights, tmp_path, "--data_dir", data)
    for number, path in enumerate(sorted((tmp_path / "probability").rglob("*.png"))):
        if number >= FRAMES:  # all but one video
            with Image.open(path) as image:
                made = json.loads(image.info[FIELD])
                info = PngImagePlugin.PngInfo()
                info.add_text(FIELD, json.dumps({k: v for k, v in made.items() if k not in ("frames", "flow")}))
                image.load()
                image.save(path, pnginfo=info)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    call(weights, tmp_path, "--data_dir", data, "--tools", "test", "eval")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == before


def test_maps_of_other_frames_are_told(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, results = tmp_path / "data", tmp_path / "results"
    shutil.copytree(data, root, copy_function=shutil.copyfile)  # with other times
    call(weights, results, "--data_dir", data)
    call(weights, results, "--data_dir", root, "--tools", "eval")
    assert "of other frames" not in capsys.readouterr().out
    first = read_dataset("DAVIS-2016", root)[0]
    Image.fromarray(load_frame(first.frames[1])).save(first.frames[1], quality=50)
    call(weights, results, "--data_dir", root, "--tools", "eval")
    assert f"warning: results: the maps of DAVIS-2016/{first.name} were made of other frames" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- own videos


def test_ones_own_frames_and_video(data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("cv2")
    decoded = film(data, tmp_path)
    call(weights, tmp_path / "a", "--video", tmp_path / "clip.mp4", "--workers", 1)
    assert "by dis" in capsys.readouterr().out
    # The decoded frames as files give the same maps.
    save_frames(decoded, tmp_path / "clip")
    call(weights, tmp_path / "b", "--frames", tmp_path / "clip", "--workers", 1, "--tools", "test")
    one, two = maps(tmp_path / "a"), maps(tmp_path / "b")
    assert list(one) == [f"clip/{stem}.png" for stem in decoded.stems] and len(one) == FRAMES
    for name, grey in one.items():
        assert grey.shape == SIZE and np.array_equal(grey, two[name])
    assert maps(tmp_path / "a", "binary").keys() == one.keys()
    assert not list(
        (data / "DAVIS" / "JPEGImages" / "480p").rglob("*flow*")
    )  # nothing is written beside the user's files
    for folder in ("a", "b"):
        assert count_frames(tmp_path / folder / "overlay" / "clip.mp4") == FRAMES


def test_flow_of_ones_own_video_is_made_again_once(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = read_dataset("DAVIS-2016", data)[0].frames[0].parent
    words = ["--frames", frames, "--workers", 0, "--overwrite", "--tools"]
    made = []
    write = FlowFiles.write
    monkeypatch.setattr(FlowFiles, "write", lambda *words: (made.append(words[2]), write(*words)))
    for tools, times in ((["flow", "test"], 1), (["flow", "test"], 1), (["test"], 1)):
        made.clear()
        call(weights, tmp_path, *words, *tools)
        assert sorted(made) == sorted([path.stem for path in frames.iterdir()] * times)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_crf_of_ones_own_video(data: Path, weights: Path, tmp_path: Path, workers: int) -> None:
    """A video file, whose frames only this process decodes, and the same frames as files: the same maps."""
    pytest.importorskip("cv2")
    pytest.importorskip("pydensecrf.densecrf")
    decoded = film(data, tmp_path)
    save_frames(decoded, tmp_path / "clip")
    words = ["--tools", "test", "crf", "--workers", workers]
    call(weights, tmp_path / "a", "--video", tmp_path / "clip.mp4", *words)
    call(weights, tmp_path / "b", "--frames", tmp_path / "clip", *words)
    one, two = maps(tmp_path / "a", "crf"), maps(tmp_path / "b", "crf")
    assert list(one) == list(two) == [f"clip/{stem}.png" for stem in decoded.stems]
    grey = maps(tmp_path / "a")
    for index, name in enumerate(one):
        assert np.array_equal(one[name], two[name])
        assert np.array_equal(one[name], refine(decoded[index], grey[name]))
    for folder in ("a", "b"):
        assert count_frames(tmp_path / folder / "overlay" / "clip_crf.mp4") == FRAMES


def test_maps_of_another_video_of_the_same_name_are_not_refined_by_this_one(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cv2")
    pytest.importorskip("pydensecrf.densecrf")
    source = film(data, tmp_path).path
    words = ["--save_dir", tmp_path / "r", "--video", source, "--workers", 1]
    crf = [str(word) for word in ("--tools", "crf", *words)]
    call(weights, tmp_path / "r", *words)
    assert tool.main(crf) == 0
    os.utime(source)  # as a copy has another time
    assert tool.main(crf) == 0
    write_video(source, [np.zeros((*SIZE, 3), np.uint8)] * FRAMES, fps=10)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        tool.main(crf)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "maps of another video than clip is now" in said and "--tools test crf" in said
    call(weights, tmp_path / "r", *words, "--tools", "test", "crf", "--overwrite")


def test_a_video_that_ends_too_early_is_told_once_by_all_tools(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 32))
    for t in range(12):
        writer.write(np.random.default_rng(t).integers(0, 256, (32, 64, 3), np.uint8))
    writer.release()
    data = (tmp_path / "v.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[: len(data) * 2 // 3])
    call(weights, tmp_path / "r", "--video", tmp_path / "cut.avi", "--tools", "flow", "test", "--workers", 0)
    output = capsys.readouterr().out
    written = len(maps(tmp_path / "r"))
    assert 1 < written < 12 and output.count("warning: ") == 1
    assert f"cut.avi: its header promises about 12 frames, and {written} can be decoded" in output


def test_a_video_of_one_frame(data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("cv2")
    write_video(tmp_path / "clip.mp4", list(film(data, tmp_path))[:1], fps=10)
    call(weights, tmp_path / "r", "--video", tmp_path / "clip.mp4", "--workers", 1)
    assert list(maps(tmp_path / "r", "binary")) == ["clip/00000.png"]
    assert count_frames(tmp_path / "r" / "overlay" / "clip.mp4") == 1
    out = capsys.readouterr().out
    assert "flow: 1 frame, by dis" in out and " 1 frame to do" in out


def test_a_shorter_video_of_the_same_name_leaves_no_maps_of_the_longer_one(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Nor the overlay of refined maps that are no longer there."""
    pytest.importorskip("cv2")
    decoded, results = film(data, tmp_path), tmp_path / "r"
    words = ["--video", tmp_path / "clip.mp4", "--workers", 1]
    call(weights, results, *words)
    refined, foreign = results / "crf" / "clip" / f"{decoded.stems[-1]}.png", results / "probability/clip/notes.png"
    for path in (refined, foreign, results / "overlay" / "clip_crf.mp4"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", SIZE[::-1]).save(path, format="png")
    write_video(tmp_path / "clip.mp4", list(decoded)[:2], fps=10)
    call(weights, results, *words, "--overwrite")
    kept = [f"clip/{stem}.png" for stem in decoded.stems[:2]]
    assert list(maps(results, "binary")) == kept and list(maps(results)) == [*kept, "clip/notes.png"]
    assert not refined.exists() and not (results / "overlay" / "clip_crf.mp4").exists()
    assert f"maps of {FRAMES - 2} frames removed" in capsys.readouterr().out


def film(data: Path, folder: Path) -> VideoFrames:
    """A video of the data set as ``clip.mp4`` in a folder, and its frames as they are decoded."""
    frames = sorted((data / "DAVIS" / "JPEGImages" / "480p" / "video-001").iterdir())
    write_video(folder / "clip.mp4", [load_frame(path) for path in frames], fps=10)
    return VideoFrames(folder / "clip.mp4")


def save_frames(decoded: VideoFrames, folder: Path) -> None:
    folder.mkdir()
    for stem, frame in zip(decoded.stems, decoded):
        Image.fromarray(frame).save(folder / f"{stem}.png")


def count_frames(path: Path) -> int:
    import cv2

    capture, count = cv2.VideoCapture(str(path)), 0
    while capture.grab():
        count += 1
    return count


@pytest.mark.slow
def test_two_processes_write_what_one_does(data: Path, weights: Path, tmp_path: Path, repository: Path) -> None:
    call(weights, tmp_path / "one", "--data_dir", data)
    words = [
        "--checkpoint",
        weights,
        "--tools",
        "test",
        "eval",
        "--metrics",
        "uvos",
        "--data_dir",
        data,
        "--device",
        "cpu",
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "tool.py"]
    done = subprocess.run(
        [str(word) for word in [*launch, *words, "--save_dir", tmp_path / "two"]],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    one, two = maps(tmp_path / "one"), maps(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, grey in one.items():
        assert np.abs(grey.astype(int) - two[name]).max() <= 1
    assert json.loads((tmp_path / "two" / "evaluation.json").read_text())["protocol"]["sequences"] == 3
