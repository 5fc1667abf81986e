"""What a run is trained on: the options reach the clips, and broken data is named."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from datasets.clip_frames import FrameReader, cache_bytes
from datasets.scenes import SceneOptions
from datasets.synthetic import write_dataset
from datasets.transforms import Augment
from tests.training.runs import TINY, equal, fails, read, run_script
from utils.distributed import Processes
from utils.errors import UserError
from utils.training import data as training_data
from utils.training.config import parse_args
from utils.training.data import build_augment, build_clips, build_scene, build_sequences, check_cache
from utils.training.loading import read_batches
from utils.training.shared_memory import MachineMemory


def test_the_loader_workers_change_nothing(finished: Path, tmp_path: Path) -> None:
    assert main.main([*TINY, "--workers", "2", "--save_dir", str(tmp_path)]) == 0
    equal(read(tmp_path)["model"], read(finished)["model"])


def test_augmentation_on_the_training_device_changes_nothing(videos: Path, tmp_path: Path) -> None:
    data = ["--datasets", "DAVIS-2016:1", "synthetic:1", "--data_dir", str(videos), "--accumulate", "2"]
    for place in ("loader", "device"):
        words = [*TINY, *data, "--augment_on", place, "--panels_every", "3", "--save_dir", str(tmp_path / place)]
        assert main.main(words) == 0
        assert list((tmp_path / place / "panels").iterdir())
    equal(read(tmp_path / "device")["model"], read(tmp_path / "loader")["model"])


def test_multi_scale_training_draws_a_size_for_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    step = main.train_step

    def watched(run: main.Run, parts: list[dict], total: float):
        sizes = {tuple(part[name].shape[-2:]) for part in parts for name in ("frames", "flows", "masks")}
        assert len(sizes) == 1 and parts[0]["frames"].shape[:2] == (2, 2)
        seen.extend(sizes)
        return step(run, parts, total)

    monkeypatch.setattr(main, "train_step", watched)
    arguments = [*TINY, *"--size 64 128 --multi_scale 0.5 0.7 1 --max_steps 8".split()]
    assert main.main([*arguments, "--save_dir", str(tmp_path / "whole")]) == 0
    whole = list(seen)
    assert set(whole) == {(32, 64), (32, 96), (64, 128)}  # 0.7: 45 x 90, in whole multiples of 32
    seen.clear()
    assert main.main([*arguments, "--save_dir", str(tmp_path / "parts"), "--stop_after", "5"]) == 0
    assert main.main([*arguments, "--save_dir", str(tmp_path / "parts")]) == 0
    assert seen == whole
    equal(read(tmp_path / "parts")["model"], read(tmp_path / "whole")["model"])


def test_options_of_the_data_reach_the_clips(videos: Path, tmp_path: Path) -> None:
    """What clips make of them is for tests/test_clips.py and tests/test_synthetic.py."""
    flow = tmp_path / "flow"
    shutil.copytree(videos / "Flows", flow / "DAVIS-2016" / "Flows")
    words = [
        *("--datasets", "DAVIS-2016:3", "synthetic:1", "--data_dir", str(videos), "--flow_dir", str(flow)),
        *"--clip_len 3 --size 64 96 --strides 2 4 --flow_drop 0.2 --frame_drop 0.1 --frame_faults 0.25".split(),
        *"--cache ram --augment_on device --samples_per_epoch 20 --steps_per_epoch 0 --seed 7".split(),
        *"--scale 0.7 0.9 --aspect 0.8 1.1 --flip 0.4 --rotation 5 --rotation_probability 0.3".split(),
        *"--rotation_flow ignore --colour 0.2 --sharpness 0.6 --scene occluder:0.5".split(),
    ]
    config, _ = parse_args([*TINY[:2], *words])
    training, _ = build_sequences(config)
    assert all(flow in path.parents for video in training["DAVIS-2016"] for path in video.flows.values())
    faulty, steps = build_clips(config, training, step_clips=3)
    assert (steps, len(faulty), faulty.probability) == (6, 18, 0.25)
    assert faulty.part.weights == [0.75, 0.25]
    clips, made = faulty.part.parts
    assert [video.name for video in clips.sequences] == [video.name for video in training["DAVIS-2016"]]
    for part in (clips, made):
        assert (part.clip_len, part.size, part.seed, part.defer, len(part)) == (3, (64, 96), 7, True, 18)
    assert (clips.strides, clips.flow_drop, clips.frame_drop) == ((2, 4), 0.2, 0.1) and clips._store
    assert made.stills is None and made.options == SceneOptions(occluder=0.5)
    assert clips.augment == Augment(
        scale=(0.7, 0.9), aspect=(0.8, 1.1), flip=0.4, rotation=5, rotation_probability=0.3, rotation_flow="ignore",
        brightness=0.2, contrast=0.2, saturation=0.2, sharpness=0.6,
    )  # fmt: skip
    plain, _ = parse_args([*TINY[:2], "--datasets", "DAVIS-2016", "--data_dir", str(videos), "--no-augment",
                            "--steps_per_epoch", "0"])  # fmt: skip
    clips, steps = build_clips(plain, build_sequences(plain)[0], step_clips=1)
    assert clips.augment is None
    assert steps == len(clips) == 15 // plain.clip_len  # as many as the 15 labelled frames make


@pytest.mark.parametrize("processes", [1, 2])
def test_a_cache_that_does_not_fit_is_told_before_anything_is_decoded(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """The system would end the run after minutes, without a word; processes of one machine share its memory."""
    words = [*TINY, "--datasets", "DAVIS-2016", "--data_dir", str(videos), "--save_dir", str(tmp_path / "run")]
    config, _ = parse_args([*words, "--cache", "ram"])
    needed = cache_bytes(build_sequences(config)[0]["DAVIS-2016"], config.size, build_augment(config)) * processes
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(training_data, "available_memory", lambda: needed - 1)
    with monkeypatch.context() as patch:
        patch.setattr(FrameReader, "_read_frame", lambda *_: pytest.fail("decoded"))
        message = fails([*words, "--cache", "ram"], capsys)
    assert "cache: ram" in message and "--cache none" in message and ("2 processes" in message) == (processes == 2)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(training_data, "available_memory", lambda: needed)
    assert main.main([*words, "--cache", "ram", "--max_steps", "1"]) == 0
    printed = capsys.readouterr()
    assert "cache: ram: 100%" in printed.err
    assert "warning: cache: ram takes" in printed.out and "--cache none" in printed.out  # training needs memory, too
    monkeypatch.setattr(training_data, "available_memory", lambda: 2 * needed)
    assert main.main([*words, "--cache", "ram", "--max_steps", "2"]) == 0
    assert "warning" not in capsys.readouterr().out


def test_processes_that_share_memory_need_it_once(
    videos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = parse_args([*TINY, "--datasets", "DAVIS-2016", "--data_dir", str(videos), "--cache", "ram"])
    training, _ = build_sequences(config)
    needed = cache_bytes(training["DAVIS-2016"], config.size, build_augment(config))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    alone = Processes(0, 1, torch.device("cpu"))
    for count, copies in ((1, 4), (2, 2), (4, 1)):
        memory = MachineMemory(alone)
        memory.count = count
        monkeypatch.setattr(training_data, "available_memory", lambda copies=copies: copies * needed)
        check_cache(config, training, alone, memory)
        printed = capsys.readouterr().out
        assert "warning" in printed and (f"in each of {copies} processes" in printed) == (copies > 1)
        monkeypatch.setattr(training_data, "available_memory", lambda copies=copies: copies * needed - 1)
        with pytest.raises(UserError, match="--cache none"):
            check_cache(config, training, alone, memory)


def test_every_fifth_frame_of_youtube_vos_is_trained_on(tmp_path: Path) -> None:
    """`--num_frames` is the one option that the authors' README is about."""
    for folder, suffix in (("JPEGImages", "jpg"), ("Annotations", "png"), ("Flows", "png")):
        (tmp_path / "train" / folder / "video").mkdir(parents=True)
        for frame in range(12):
            (tmp_path / "train" / folder / "video" / f"{frame:05d}.{suffix}").touch()  # not decoded before training
    words = ["--datasets", "YouTube-VOS-2018", "--data_dir", str(tmp_path), "--val_sequences", "none"]
    for number, kept in (([], [0, 5, 10]), (["--num_frames", "4"], [0, 4, 8])):
        (video,) = build_sequences(parse_args([*words, *number])[0])[0]["YouTube-VOS-2018"]
        assert [int(stem) for stem in video.stems] == kept


def test_scenes_of_synthetic_clips_are_options(capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = parse_args(["--config", "configs/demo.yaml", "--scene", "natural:0.5", "occluder:0"])
    scene = build_scene(config)
    assert scene.natural == 0.5 and scene.occluder == 0 and scene.distractor == SceneOptions().distractor
    assert "camera_static" in fails([*TINY, "--scene", "camera_statik:1"], capsys)
    assert "expected 0 to 1, got 2" in fails([*TINY, "--scene", "natural:2"], capsys)


def test_options_that_reach_no_clip_are_told(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, "--max_steps", "1", "--flow_drop", "0.25", "--frame_faults", "0.5"]
    assert main.main([*words, "--save_dir", str(tmp_path / "synthetic")]) == 0
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "no effect" in line]
    assert told.startswith("flow_drop 0.25 has no effect")
    words += ["--clip_len", "1", "--datasets", "DAVIS-2016", "--data_dir", str(videos)]
    assert main.main([*words, "--save_dir", str(tmp_path / "videos")]) == 0
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "no effect" in line]
    assert told.startswith("frame_faults 0.5 has no effect")


def test_data_that_is_not_there(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--data_dir", str(tmp_path), "--save_dir", str(tmp_path / "run")]
    assert "DAVIS-2016" in fails([*arguments, "--datasets", "DAVIS-2016"], capsys)
    for name in ("DUTS-TR", "duts-tr"):
        assert "DUTS-TR-Image" in fails([*arguments, "--datasets", name], capsys)
    # Who has not all of a configuration's sets is told how to do with the others.
    shutil.copytree(videos, tmp_path / "DAVIS")
    several = ["--datasets", "YouTube-VOS", "DAVIS-2016:3", "FBMS", "synthetic"]
    message = fails([*arguments, *several], capsys)
    assert message.endswith("To train without it: --datasets DAVIS-2016:3 synthetic:1\n") and "YouTube-VOS" in message
    shutil.rmtree(tmp_path / "DAVIS" / "JPEGImages" / "480p" / "video-000")  # it is there, but broken
    assert "To train without" not in fails([*arguments, "--datasets", "DAVIS-2016", "synthetic"], capsys)
    shutil.rmtree(tmp_path / "DAVIS")
    for kind, suffix in (("Image", "jpg"), ("Mask", "png")):
        still = tmp_path / "DUTS-TR" / f"DUTS-TR-{kind}" / f"a.{suffix}"
        still.parent.mkdir(parents=True)
        Image.fromarray(np.full((48, 80), 200, np.uint8)).save(still)
    assert "To train without it: --datasets DUTS-TR:2" in fails([*arguments, "--datasets", "FBMS", "DUTS-TR:2"], capsys)
    for name in ("DUTS", "synthtic"):  # the two that are no data sets of videos
        message = fails([*arguments, "--datasets", name], capsys)
        assert "stills are DUTS-TR" in message and "synthetic" in message
    message = fails([*arguments, "--datasets", "synthetic", "--val_sequences", "bear"], capsys)
    assert "'bear'" in message and "--val_datasets" in message and "--val_sequences none" in message


def test_an_epoch_of_less_than_a_step_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--steps_per_epoch", "0", "--samples_per_epoch", "1", "--save_dir", str(tmp_path)]
    assert "samples_per_epoch: 1 clips are less than the 2 of one step" in fails([*TINY, *words], capsys)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_frame_is_named(workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_dataset(tmp_path, videos=1, frames=2, size=(32, 64))
    frame = next((root / "JPEGImages").rglob("00000.jpg"))
    frame.write_bytes(frame.read_bytes()[:200])
    arguments = [*TINY, "--datasets", "DAVIS-2016", "--data_dir", str(root), "--workers", workers]
    message = fails([*arguments, "--save_dir", str(tmp_path / "run")], capsys)
    assert message.startswith(f"error: {frame}: ") and len(message.splitlines()) == 1


FAULT = """
import sys
import main
from datasets.synthetic import SyntheticClips
clip = SyntheticClips.clip
def broken(self, index):
    if index == 3:
        raise ZeroDivisionError("a fault of ours")
    return clip(self, index)
SyntheticClips.clip = broken
sys.exit(main.main(sys.argv[1:]))
"""


KILLED = FAULT.replace('raise ZeroDivisionError("a fault of ours")', "os.kill(os.getpid(), 9)").replace(
    "import sys", "import os, sys"
)


def test_a_worker_that_the_system_ends_is_told(tmp_path: Path, repository: Path) -> None:
    """As where memory runs out."""
    ended = run_script(KILLED, repository, *TINY, "--workers", "1", "--save_dir", str(tmp_path))
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "error: a loader process was ended from outside" in ended.stderr and "--workers" in ended.stderr


KILLED_MEANWHILE = """
import multiprocessing, os, sys
import main
step = main.train_step
def killing(*arguments):
    learned = step(*arguments)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, 9)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    return learned
main.train_step = killing
sys.exit(main.main(sys.argv[1:]))
"""


def test_what_was_learned_before_the_system_ends_a_worker_is_saved(tmp_path: Path, repository: Path) -> None:
    words = [*TINY, "--workers", "1", "--save_dir", str(tmp_path), "--max_steps", "100", "--steps_per_epoch", "100"]
    ended = run_script(KILLED_MEANWHILE, repository, *words)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "error: a loader process was ended from outside" in ended.stderr
    assert 1 <= read(tmp_path)["step"] < 100


@pytest.mark.parametrize(("error", "message"), [
    (OSError(errno.ENOSPC, "No space left on device"), "/dev/shm"),  # what PyTorch's shared memory says has no name
    (OSError(errno.ENOSPC, "No space left on device", "cache.png"), None),
    (OSError(errno.EIO, "Input/output error"), None),
    (RuntimeError("a fault of ours"), None),
])  # fmt: skip
def test_shared_memory_that_is_full_is_told_and_no_other_error_is_taken_for_it(
    error: Exception, message: str | None
) -> None:
    def batches() -> Iterator[dict]:
        yield {}
        raise error

    reading = read_batches(batches())
    assert next(reading) == {}
    with pytest.raises(UserError if message else type(error), match=message) as caught:
        next(reading)
    assert (caught.value is error) == (message is None)


def test_an_error_that_nobody_expects_in_a_worker_ends_the_run(tmp_path: Path, repository: Path) -> None:
    """With its traceback, and not with processes that wait for each other for ever."""
    ended = run_script(FAULT, repository, *TINY, "--workers", "2", "--save_dir", str(tmp_path))
    assert ended.returncode == 1 and "ZeroDivisionError: a fault of ours" in ended.stderr
