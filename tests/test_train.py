"""main.py: it resumes exactly, validates, stops when asked, and says what is wrong."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import main
from datasets.scenes import SceneOptions
from datasets.synthetic import write_dataset
from datasets.transforms import Augment
from models import Predictor, build_dbsnet, load_dbsnet, save_weights
from utils.errors import UserError
from utils.training import resuming
from utils.training.checkpoint import save_checkpoint
from utils.training.config import TrainConfig, load_config, parse_args
from utils.training.data import build_clips, build_scene, build_sequences

SMALL = ["streams:[appearance]", "depth:0", "dilations:[1]", "rounds:1"]  # --network, to be quick
OPTIONS = {"streams": ["appearance"], "depth": 0, "dilations": [1], "rounds": 1}
TINY = [
    *"--config configs/demo.yaml --variant xxs --size 32 64 --clip_len 2 --batch_size 2 --max_steps 4".split(),
    *"--steps_per_epoch 3 --workers 0 --log_every 1 --panels_every 0 --no-tensorboard --device cpu".split(),
    *"--warmup_steps 2 --network".split(),
    *SMALL,
]


@pytest.fixture(autouse=True)
def at_the_checkout(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """Folder of a run of four steps, epochs of three, in one go."""
    folder = tmp_path_factory.mktemp("finished")
    before = os.getcwd()
    os.chdir(repository)
    try:
        assert main.main([*TINY, "--save_dir", str(folder)]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of three synthetic videos in DAVIS's layout, all in its train split."""
    return write_dataset(tmp_path_factory.mktemp("data"), videos=3, frames=5, size=(48, 80), seed=1, validation=0)


def read(folder: Path, name: str = "last.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


def lines(folder: Path, kind: str = "train") -> list[dict]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] == kind]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a call that ends with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main.main(arguments)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    return message


def equal(one: object, other: object, path: str = "") -> None:
    """Asserts that two nested structures hold the same tensors and numbers, to the last bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            equal(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for number, (a, b) in enumerate(zip(one, other)):
            equal(a, b, f"{path}/{number}")
    else:
        assert one == other, path


def test_a_resumed_run_equals_one_that_never_stopped(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY, "--save_dir", str(tmp_path)]
    for stop, more in ((2, "2"), (3, "1")):  # inside an epoch, and between two
        assert main.main([*arguments, "--stop_after", more]) == 0
        assert f"stopped at step {stop} of 4" in capsys.readouterr().out
        assert read(tmp_path)["step"] == stop
    assert main.main(arguments) == 0
    assert f"resuming {tmp_path / 'last.pt'} at step 3" in capsys.readouterr().out
    resumed, whole = read(tmp_path), read(finished)
    for key in ("model", "ema", "optimizer", "scheduler", "step", "epoch", "best", "rng"):
        equal(resumed[key], whole[key], key)
    exact = ("step", "epoch", "loss", "bce", "iou", "aux", "lr", "grad_norm")
    assert [[line[key] for key in exact] for line in lines(tmp_path)] == [
        [line[key] for key in exact] for line in lines(finished)
    ]


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


def test_a_finished_run_is_left_as_it_is(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "last.pt").read_bytes()
    assert main.main([*TINY, "--save_dir", str(finished)]) == 0
    assert "done: 4 steps" in capsys.readouterr().out
    assert (finished / "last.pt").read_bytes() == before
    assert len(lines(finished)) == 4


def test_the_files_of_a_run(finished: Path) -> None:
    config = load_config(finished / "config.yaml")
    assert config.save_dir == str(finished) and config.max_steps == 4
    # The weights that are handed out are the averaged ones, and build their own network.
    net = load_dbsnet(finished / "weights.safetensors")
    assert net.config == read(finished)["config_model"]
    equal(dict(net.state_dict()), read(finished)["ema"])
    equal(dict(load_dbsnet(finished / "last.pt").state_dict()), read(finished)["ema"])


def test_a_run_begun_on_a_gpu_goes_on_without_one(finished: Path, tmp_path: Path) -> None:
    """There AdamW is the fused one, and the optimiser's state says so."""
    arguments = [*TINY, "--save_dir", str(tmp_path)]
    assert main.main([*arguments, "--stop_after", "2"]) == 0
    checkpoint = read(tmp_path)
    for group in checkpoint["optimizer"]["param_groups"]:
        group["fused"] = True
    torch.save(checkpoint, tmp_path / "last.pt")
    assert main.main(arguments) == 0
    assert not any(group["fused"] for group in read(tmp_path)["optimizer"]["param_groups"])
    for name, value in read(finished)["model"].items():
        assert torch.equal(read(tmp_path)["model"][name], value), name


def test_a_finished_run_has_no_weights_to_offer_elsewhere(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([*TINY, "--resume", str(finished / "last.pt"), "--save_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "has its 4 steps already" in said and "weights to test with" not in said


def test_resume_none_starts_anew_and_keeps_the_old_run(tmp_path: Path) -> None:
    arguments = [*TINY, "--save_dir", str(tmp_path), "--max_steps", "1", "--tensorboard"]
    assert main.main(arguments) == 0
    first = (tmp_path / "last.pt").read_bytes()
    assert main.main([*arguments, "--resume", "none", "--seed", "5"]) == 0
    assert (tmp_path / "previous-1" / "last.pt").read_bytes() == first
    assert len(list((tmp_path / "previous-1").glob("events*"))) == len(list(tmp_path.glob("events*"))) == 1
    assert len(lines(tmp_path)) == 1
    new, old = (read(folder)["model"] for folder in (tmp_path, tmp_path / "previous-1"))
    assert any(not torch.equal(new[name], old[name]) for name in new)


def test_a_call_that_is_refused_leaves_the_folder_as_it_was(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    arguments = [*TINY, "--save_dir", str(folder)]
    assert main.main([*arguments, "--save_dir", str(tmp_path / "one"), "--stop_after", "1"]) == 0
    os.replace(tmp_path / "one" / "last.pt", folder / "one.pt")

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    before = content()
    fails([*arguments, "--resume", str(folder / "one.pt"), "--batch_size", "3"], capsys)
    fails([*arguments, "--resume", "none", "--datasets", "nowhere"], capsys)
    assert content() == before and not list(folder.glob("previous-*"))


def test_anew_from_the_weights_of_the_folder_itself(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "panels").mkdir()
    arguments = [*TINY, "--save_dir", str(folder), "--finetune", str(folder / "last.pt"), "--resume", "none"]
    assert main.main([*arguments, "--lr", "0", "--bn", "frozen", "--ema", "0", "--max_steps", "1"]) == 0
    equal(read(folder)["model"], read(finished)["ema"])
    assert (folder / "previous-1" / "panels").is_dir() and not (folder / "panels").exists()


def test_the_best_weights_of_a_run_without_its_last_checkpoint_are_kept(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = min(path.name for path in (videos / "JPEGImages" / "480p").iterdir())
    data = ["--datasets", "DAVIS-2016", "--data_dir", str(videos), "--val_sequences", name]
    arguments = [*TINY, *data, "--max_steps", "1", "--save_dir", str(tmp_path)]
    assert main.main(arguments) == 0
    best = (tmp_path / "best.pt").read_bytes()
    (tmp_path / "last.pt").unlink()
    capsys.readouterr()
    assert main.main([*arguments, "--seed", "4"]) == 0
    assert (tmp_path / "previous-1" / "best.pt").read_bytes() == best != (tmp_path / "best.pt").read_bytes()
    assert f"are in {tmp_path / 'previous-1'} now" in capsys.readouterr().out


def test_going_on_in_another_folder_keeps_its_run_and_hands_out_no_weights_of_others(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = min(path.name for path in (videos / "JPEGImages" / "480p").iterdir())
    data = ["--datasets", "DAVIS-2016", "--data_dir", str(videos), "--val_sequences", name]
    first, other = tmp_path / "first", tmp_path / "other"
    scores = iter((0.9, 0.1))
    monkeypatch.setattr(main, "validate", lambda run: {name: next(scores)})
    assert main.main([*TINY, *data, "--max_steps", "3", "--save_dir", str(first)]) == 0
    assert main.main([*TINY, "--seed", "3", "--save_dir", str(other)]) == 0
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    capsys.readouterr()
    going_on = [*TINY, *data, "--resume", str(first / "last.pt"), "--save_dir", str(other)]
    assert main.main(going_on) == 0
    said = capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (other / "previous-1").iterdir()} == before
    assert "J 0.9000 at step 3" in said and "best J 0.1000 at step 4" in said
    assert read(other, "best.pt")["step"] == 4
    equal(dict(load_dbsnet(other / "weights.safetensors").state_dict()), read(other)["ema"])


def test_scores_of_another_validation_are_not_compared(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(path.name for path in (videos / "JPEGImages" / "480p").iterdir())
    arguments = [*TINY, "--datasets", "DAVIS-2016", "--data_dir", str(videos), "--save_dir", str(tmp_path)]
    scores = iter((0.9, 0.2, 0.1))
    monkeypatch.setattr(main, "validate", lambda run: {run.validation[0].name: next(scores)})
    assert main.main([*arguments, "--max_steps", "3", "--val_sequences", names[0]]) == 0
    capsys.readouterr()
    assert main.main([*arguments, "--max_steps", "6", "--val_sequences", names[1]]) == 0
    assert "J 0.9000 at step 3, was of another validation (val_sequences)" in capsys.readouterr().out
    assert read(tmp_path, "best.pt")["best"] == {"J": 0.2, "step": 6}
    assert main.main([*arguments, "--max_steps", "9", "--val_sequences", names[1]]) == 0  # the same validation
    assert read(tmp_path)["best"] == {"J": 0.2, "step": 6}


def test_who_goes_back_to_an_earlier_checkpoint_gets_weights_of_what_comes_after_it(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = min(path.name for path in (videos / "JPEGImages" / "480p").iterdir())
    arguments = [*TINY, "--datasets", "DAVIS-2016", "--data_dir", str(videos), "--val_sequences", name]
    arguments += ["--save_dir", str(tmp_path), "--steps_per_epoch", "1", "--max_steps"]
    scores = iter((0.2, 0.9, 0.1))
    monkeypatch.setattr(main, "validate", lambda run: {name: next(scores)})
    assert main.main([*arguments, "1"]) == 0
    shutil.copy(tmp_path / "last.pt", tmp_path / "early.pt")
    assert main.main([*arguments, "2"]) == 0  # not what was wanted: back
    capsys.readouterr()
    assert main.main([*arguments, "2", "--resume", str(tmp_path / "early.pt"), "--lr", "1e-4"]) == 0
    said = capsys.readouterr().out
    # Not "best J 0.2 at step 1" with the weights of the step that had 0.9.
    assert (
        "J 0.2000 at step 1, is not in" in said and "which is of step 2" in said and "best J 0.1000 at step 2" in said
    )
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert (file.metadata()["step"], file.metadata()["J"]) == ("2", "0.1000")


def test_a_launcher_that_starts_again_would_begin_anew_each_time(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    for resume in ("none", str(finished / "last.pt")):
        message = fails([*TINY, "--resume", resume, "--save_dir", str(tmp_path)], capsys)
        assert f"--resume {resume}" in message and "--max-restarts" in message and "--resume auto" in message
    assert main.main([*TINY, "--max_steps", "1", "--save_dir", str(tmp_path)]) == 0


def test_accumulated_batches_equal_one_batch(tmp_path: Path) -> None:
    """With fixed batch norm statistics, which are the only thing that batches of a step do not share."""
    arguments = [*TINY, "--bn", "frozen", "--max_steps", "2"]
    assert main.main([*arguments, "--save_dir", str(tmp_path / "one")]) == 0
    split = ["--batch_size", "1", "--accumulate", "2"]
    assert main.main([*arguments, *split, "--save_dir", str(tmp_path / "two")]) == 0
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two")):
        for key in ("loss", "bce", "iou", "aux", "grad_norm"):
            assert one[key] == pytest.approx(two[key], rel=1e-4), key
    started = build_dbsnet("xxs", **OPTIONS).state_dict()
    for name, value in read(tmp_path / "one")["model"].items():
        if "running" in name:
            assert torch.equal(value, started[name]), name


@pytest.mark.parametrize(
    ("options", "size", "count"), [([], (32, 64), 5), (["--val_size", "64", "96", "--val_frames", "4"], (64, 96), 4)]
)
def test_validation_keeps_the_best(
    options: list[str], size: tuple[int, int], count: int, videos: Path, tmp_path: Path
) -> None:
    names = sorted(path.name for path in (videos / "JPEGImages" / "480p").iterdir())
    start = seeded_network().eval()
    first = sorted((videos / "JPEGImages" / "480p" / names[0]).iterdir())[0]
    picture = torch.from_numpy(load_image(first).copy()).permute(2, 0, 1)[None, None].float() / 255
    with torch.no_grad():  # else all its answers lie on one side of the threshold, and J is 0 whatever is done wrong
        logits, head = start(picture, picture), start.decoder.head
        head.bias.sub_(logits.mean()).div_(logits.std()).add_(0.5)
        head.weight.div_(logits.std())
    save_weights(tmp_path / "start.safetensors", start)
    data = ["--datasets", "DAVIS-2016", "--data_dir", str(videos), "--val_sequences", names[0], names[2]]
    data += ["--finetune", str(tmp_path / "start.safetensors"), "--bn", "frozen", "--lr", "1e-7"]
    assert main.main([*TINY, *data, *options, "--val_every", "2", "--save_dir", str(tmp_path)]) == 0
    scores = lines(tmp_path, "val")
    assert [line["step"] for line in scores] == [2, 4]
    assert all(set(line["sequences"]) == {names[0], names[2]} for line in scores)
    assert all(0.01 < score < 0.99 for line in scores for score in line["sequences"].values())
    best = max(scores, key=lambda line: line["J"])
    assert read(tmp_path, "best.pt")["step"] == best["step"] == read(tmp_path)["best"]["step"]
    # The score again, from the file and pixel by pixel: frames 1 … 3 of 0 … 4, at the video's own size.
    predictor = Predictor(load_dbsnet(tmp_path / "weights.safetensors"), size=size)
    for name in (names[0], names[2]):
        images, flows, masks = (
            [load_image(path) for path in sorted((videos / folder / "480p" / name).iterdir())[:count]]
            for folder in ("JPEGImages", "Flows", "Annotations")
        )
        found = []
        for index, probability in predictor(images, flows):
            mask, truth = np.round(probability * 255) > 127, masks[index] > 0
            union = np.count_nonzero(mask | truth)
            found.append(np.count_nonzero(mask & truth) / union if union else 1.0)
        assert best["sequences"][name] == pytest.approx(np.mean(found[1:-1]), abs=1e-6)


def test_validation_and_stops_leave_the_training_as_it_is(videos: Path, tmp_path: Path) -> None:
    """Also without an average of the weights, where the network that trains is the one that is validated, and with
    dropout, whose draws must not hang on what came before.
    """
    name = min(path.name for path in (videos / "JPEGImages" / "480p").iterdir())
    arguments = [*TINY, "dropout:0.5", "--ema", "0", "--save_dir"]
    validated = ["--val_datasets", "DAVIS-2016", "--data_dir", str(videos), "--val_sequences", name, "--val_every", "1"]
    assert main.main([*arguments, str(tmp_path / "plain")]) == 0
    assert main.main([*arguments, str(tmp_path / "validated"), *validated, "--stop_after", "2"]) == 0
    assert main.main([*arguments, str(tmp_path / "validated"), *validated]) == 0
    assert [line["step"] for line in lines(tmp_path / "validated", "val")] == [1, 2, 3, 4]
    for key in ("model", "optimizer"):
        equal(read(tmp_path / "validated")[key], read(tmp_path / "plain")[key], key)


@pytest.mark.parametrize("broken", ["best.pt", "last.pt"])
def test_who_dies_between_two_files_validates_again(
    broken: str, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full for one file of a validation that improved: what goes on must not lose the best weights."""
    name = min(path.name for path in (videos / "JPEGImages" / "480p").iterdir())
    data = ["--datasets", "DAVIS-2016", "--data_dir", str(videos), "--val_sequences", name]
    command = [*TINY, *data, "--val_every", "2", "--save_dir", str(tmp_path)]
    scores = iter((0.1, 0.9, 0.9))  # of steps 2, 4 and 4 again
    monkeypatch.setattr(main, "validate", lambda run: {name: next(scores)})

    def full(path: Path, checkpoint: dict) -> None:
        if path.name == broken and checkpoint["best"] == {"J": 0.9, "step": 4}:
            raise OSError(28, "No space left on device", str(path))
        save_checkpoint(path, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(resuming, "save_checkpoint", full)
        with pytest.raises(SystemExit):
            main.main(command)
    assert main.main(command) == 0
    assert read(tmp_path)["best"] == {"J": 0.9, "step": 4} and read(tmp_path, "best.pt")["step"] == 4
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert file.metadata()["J"] == "0.9000"


def load_image(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path))


def test_sequences_of_one_name_in_two_data_sets_are_both_validated(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    shutil.copytree(videos, root / "DAVIS")
    shutil.copytree(videos, root / "other")  # another set of the same layout, with the same names
    names = sorted(path.name for path in (videos / "JPEGImages" / "480p").iterdir())
    data = ["--datasets", "DAVIS-2016", "other", "--data_dir", str(root), "--val_sequences", names[0]]
    assert main.main([*TINY, *data, "--max_steps", "1", "--save_dir", str(tmp_path / "run")]) == 0
    (line,) = lines(tmp_path / "run", "val")
    assert set(line["sequences"]) == {f"DAVIS-2016/{names[0]}", f"other/{names[0]}"}
    assert len(set(line["sequences"].values())) == 1  # the same videos
    assert line["J"] == pytest.approx(np.mean(list(line["sequences"].values())))


def test_a_batch_norm_of_one_value_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [*TINY, *"--size 32 32 --batch_size 1 --clip_len 1 --max_steps 1 --save_dir".split()]
    message = fails([*small, str(tmp_path / "a")], capsys)
    assert "32x32" in message and "--bn frozen" in message and not (tmp_path / "a").exists()
    assert "32x32" in fails([*small, str(tmp_path / "a"), *"--size 64 64 --multi_scale 1 0.5".split()], capsys)
    for number, words in enumerate(("--bn frozen", "--size 32 64", "--batch_size 2", "--clip_len 2")):
        assert main.main([*small, str(tmp_path / f"b{number}"), *words.split()]) == 0


def test_a_warm_up_that_is_longer_than_the_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, "--max_steps", "1", "--lr", "1e-2", "--save_dir", str(tmp_path)]
    assert main.main([*words, "--warmup_steps", "10"]) == 0
    assert "warmup_steps 10 are the whole run: lr rises to 1.00e-03" in capsys.readouterr().out
    assert lines(tmp_path)[0]["lr"] == pytest.approx(1e-3)


def test_held_out_sequences_are_not_trained_on(videos: Path) -> None:
    names = sorted(path.name for path in (videos / "JPEGImages" / "480p").iterdir())
    config = TrainConfig(data_dir=str(videos), datasets={"DAVIS-2016": 1.0}, val_sequences=[names[1]])
    training, validation = build_sequences(config)
    assert [sequence.name for sequence in training["DAVIS-2016"]] == [names[0], names[2]]
    assert [sequence.name for sequence in validation] == [names[1]]
    with pytest.raises(UserError, match=rf"'{names[1]}x' is not in the train split of DAVIS-2016; .*{names[1]}"):
        build_sequences(TrainConfig(**{**vars(config), "val_sequences": [names[1] + "x"]}))
    with pytest.raises(UserError, match="DAVIS-2016 has no training sequence left"):
        build_sequences(TrainConfig(**{**vars(config), "val_sequences": names}))


def test_options_of_the_data_reach_the_clips(videos: Path, tmp_path: Path) -> None:
    """What clips make of them is for tests/test_clips.py and tests/test_synthetic.py."""
    flow = tmp_path / "flow"
    shutil.copytree(videos / "Flows", flow / "DAVIS-2016" / "Flows")
    words = [
        *("--datasets", "DAVIS-2016:3", "synthetic:1", "--data_dir", str(videos), "--flow_dir", str(flow)),
        *"--clip_len 3 --size 64 96 --strides 2 4 --flow_drop 0.2 --frame_drop 0.1 --frame_faults 0.25".split(),
        *"--cache ram --augment_on device --samples_per_epoch 20 --steps_per_epoch 0 --seed 7".split(),
        *"--scale 0.7 0.9 --aspect 0.8 1.1 --flip 0.4 --rotation 5 --rotation_probability 0.3".split(),
        *"--colour 0.2 --sharpness 0.6 --scene occluder:0.5".split(),
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
    assert (clips.strides, clips.flow_drop, clips.frame_drop) == ((2, 4), 0.2, 0.1) and clips.cached_bytes()
    assert made.stills is None and made.options == SceneOptions(occluder=0.5)
    assert clips.augment == Augment(
        scale=(0.7, 0.9), aspect=(0.8, 1.1), flip=0.4, rotation=5, rotation_probability=0.3, brightness=0.2,
        contrast=0.2, saturation=0.2, sharpness=0.6,
    )  # fmt: skip
    plain, _ = parse_args([*TINY[:2], "--datasets", "DAVIS-2016", "--data_dir", str(videos), "--no-augment",
                            "--steps_per_epoch", "0"])  # fmt: skip
    clips, steps = build_clips(plain, build_sequences(plain)[0], step_clips=1)
    assert clips.augment is None
    assert steps == len(clips) == 15 // plain.clip_len  # as many as the 15 labelled frames make


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


def test_an_interrupted_validation_comes_first_in_the_next_call(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = sorted(path.name for path in (videos / "JPEGImages" / "480p").iterdir())[0]
    arguments = [*TINY, "--datasets", "DAVIS-2016", "--data_dir", str(videos), "--val_sequences", name]
    arguments += ["--max_steps", "2", "--steps_per_epoch", "1", "--save_dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(main, "validate", lambda run: None)  # what it returns when asked to stop
        assert main.main(arguments) == 0
    assert read(tmp_path)["step"] == 1 and not lines(tmp_path, "val")
    assert main.main(arguments) == 0
    assert [line["step"] for line in lines(tmp_path, "val")] == [1, 2]


def test_finetune_starts_from_the_weights(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = read(finished)["ema"]
    for weights in ("last.pt", "weights.safetensors"):
        folder = tmp_path / weights
        arguments = [*TINY, "--finetune", str(finished / weights), "--save_dir", str(folder)]
        # A learning rate of nought shows the weights that it starts from; statistics are kept by bn frozen.
        frozen = [*arguments, "--lr", "0", "--bn", "frozen", "--ema", "0", "--max_steps", "1"]
        assert main.main(frozen) == 0
        equal(read(folder)["model"], expected)
    # The same command resumes, and so does one that does not say again what the run began from; it stays on record.
    frozen += ["--max_steps", "2"]
    assert main.main([word for word in frozen if word not in ("--finetune", str(finished / weights))]) == 0
    assert "resuming" in capsys.readouterr().out
    assert read(folder)["config"]["finetune"] == str(finished / weights)
    kept = (folder / "config.yaml").read_text()
    assert f"finetune: {finished / weights}" in kept
    assert main.main([*frozen, "--lr", "0.5"]) == 0  # nothing left to do, nothing to put on record
    assert (folder / "config.yaml").read_text() == kept
    # From other weights it is another run.
    other = fails([*frozen, "--finetune", str(finished / "last.pt")], capsys)
    assert "--resume none" in other and str(finished / "weights.safetensors") in other


def test_finetune_adds_the_parts_that_a_first_stage_went_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    without = ["width:8", "hidden:4", "dilations:[]", "depth:0", "rounds:0"]
    options = TINY[: TINY.index("--network")]
    assert main.main([*options, "--clip_len", "1", "--network", *without, "--save_dir", str(first)]) == 0
    whole = ["--network", "width:8", "hidden:4", "dilations:[1]", "depth:1", "rounds:1"]
    assert (
        main.main([*options, *whole, "--finetune", str(first / "weights.safetensors"), "--save_dir", str(second)]) == 0
    )
    assert load_dbsnet(second / "weights.safetensors").config["dilations"] == [1]
    # What is there already is not changed by finetuning.
    deeper = ["--network", "width:8", "hidden:4", "dilations:[1]", "depth:2", "rounds:1"]
    message = fails(
        [*options, *deeper, "--finetune", str(second / "last.pt"), "--save_dir", str(tmp_path / "third")], capsys
    )
    assert "depth 1, not 2" in message


def test_streams_that_were_trained_alone_are_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*TINY[: TINY.index("--network")], "--clip_len", "1"]
    plain = ["width:8", "hidden:4", "dilations:[]", "depth:0", "rounds:0"]
    for stream in ("appearance", "motion"):
        alone = ["--network", *plain, f"streams:[{stream}]", "--save_dir", str(tmp_path / stream)]
        assert main.main([*options, *alone]) == 0
    first, second = (str(tmp_path / stream / "weights.safetensors") for stream in ("motion", "appearance"))
    # The stream is added, and in the same run the parts that both went without.
    whole = ["--network", "width:8", "hidden:4", "dilations:[1]", "depth:1", "rounds:1"]
    joined = [*options, *whole, "--save_dir", str(tmp_path / "both"), "--finetune", first, "--add_stream"]
    assert main.main([*joined, second]) == 0
    config = load_dbsnet(tmp_path / "both" / "weights.safetensors").config
    assert config["streams"] == ["appearance", "motion"] and config["dilations"] == [1]
    assert "(add_stream)" in fails([*joined, first], capsys)  # the run in that folder began with other weights
    anew = [*options, *whole, "--save_dir", str(tmp_path / "anew")]
    assert "both are of the motion stream" in fails([*anew, "--finetune", first, "--add_stream", first], capsys)
    assert "--finetune" in fails([*anew, "--add_stream", first], capsys)
    # And one of them taken out again, to be trained on its own.
    both = str(tmp_path / "both" / "weights.safetensors")
    alone = [*options, "--network", *plain, "streams:[motion]", "--save_dir", str(tmp_path / "kept"), "--finetune"]
    assert main.main([*alone, both, "--keep_stream", "motion"]) == 0
    assert load_dbsnet(tmp_path / "kept" / "weights.safetensors").config["streams"] == ["motion"]
    anew = [*options, "--network", *plain, "--save_dir", str(tmp_path / "again"), "--keep_stream", "motion"]
    assert "expected a network of both streams" in fails([*anew, "--finetune", first], capsys)
    assert "--finetune" in fails(anew, capsys)


def test_a_network_comes_nearer_to_its_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Long enough for the teacher's batch norms to know the statistics of the pictures.
    learning = [*TINY, "--max_steps", "30", "--ema", "0", "--lr", "3e-3"]
    assert main.main([*learning, "--save_dir", str(tmp_path / "teacher")]) == 0
    teacher = tmp_path / "teacher" / "weights.safetensors"
    differences = {}
    for name, weight in (("alone", "0"), ("taught", "10")):
        folder = tmp_path / name
        taught = [*learning, "--seed", "7", "--teacher", str(teacher), "--teacher_weight", weight]
        assert main.main([*taught, "--save_dir", str(folder)]) == 0
        differences[name] = [line["teacher"] for line in lines(folder, "train")]
    assert differences["taught"][0] == differences["alone"][0]  # one start, and the same data
    assert np.mean(differences["taught"][-5:]) < 0.7 * np.mean(differences["alone"][-5:])
    wider = [*TINY[: TINY.index("--network")], "--network", "width:16", "hidden:4", "--save_dir", str(tmp_path / "w")]
    assert "width 48, expected 16" in fails([*wider, "--teacher", str(teacher)], capsys)


def test_scenes_of_synthetic_clips_are_options(capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = parse_args(["--config", "configs/demo.yaml", "--scene", "natural:0.5", "occluder:0"])
    scene = build_scene(config)
    assert scene.natural == 0.5 and scene.occluder == 0 and scene.distractor == SceneOptions().distractor
    assert "camera_static" in fails([*TINY, "--scene", "camera_statik:1"], capsys)
    assert "expected 0 to 1, got 2" in fails([*TINY, "--scene", "natural:2"], capsys)


def test_weights_of_another_network(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    anew = ["--save_dir", str(tmp_path)]
    message = fails([*TINY, *anew, "--variant", "xs", "--finetune", str(finished / "last.pt")], capsys)
    assert "variant xxs, not xs" in message and "--variant xxs" in message and str(finished / "last.pt") in message
    message = fails([*TINY, "--variant", "xs", "--save_dir", str(finished)], capsys)
    assert "variant xxs, not xs" in message and "--save_dir" in message
    save_weights(tmp_path / "other.safetensors", build_dbsnet("xxs", flavour="wilile", **OPTIONS))
    message = fails([*TINY, *anew, "--finetune", str(tmp_path / "other.safetensors")], capsys)
    assert "flavour wilile, not reference" in message
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert "text.pt" in fails([*TINY, *anew, "--finetune", str(tmp_path / "text.pt")], capsys)
    assert "text.pt" in fails([*TINY, *anew, "--pretrained", str(tmp_path / "text.pt")], capsys)
    # A folder for a file in it, and the wrong one of the two options.
    message = fails([*TINY, *anew, "--finetune", str(finished)], capsys)
    assert f"{finished}: it is a folder" in message and "weights.safetensors, last.pt" in message
    assert f"give {finished / 'last.pt'}" in fails([*TINY, *anew, "--resume", str(finished)], capsys)
    message = fails([*TINY, *anew, "--pretrained", str(finished / "weights.safetensors")], capsys)
    assert "which --finetune takes" in message


def test_a_run_that_cannot_go_on_says_why(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [*TINY, "--save_dir", str(finished)]
    assert "2 clips per step" in fails([*run, "--batch_size", "3"], capsys)
    assert "3 steps per epoch" in fails([*run, "--steps_per_epoch", "4"], capsys)
    assert "--ema" in fails([*run, "--ema", "0"], capsys)
    assert "--optimizer adamw" in fails([*run, "--optimizer", "sgd"], capsys)
    # Weights that would not be read any more.
    assert "(pretrained)" in fails([*run, "--pretrained", "mobilevit.pt"], capsys)
    config = TrainConfig(save_dir=str(finished), keep_stream="motion")
    with pytest.raises(UserError, match="keep_stream none, not motion"):
        main.find_checkpoint(config, main.start_processes("cpu"))
    file = tmp_path / "file"
    file.write_text("")
    assert "give another" in fails([*TINY, "--resume", "none", "--save_dir", str(file)], capsys)
    assert "nowhere.pt" in fails([*TINY, "--save_dir", str(tmp_path), "--resume", "nowhere.pt"], capsys)
    # Also where a checkpoint says what to build and nothing else would look at it.
    for start in ([], ["--finetune", str(finished / "last.pt")]):
        message = fails([*TINY, "widht:3", "--save_dir", str(tmp_path), *start], capsys)
        assert "unknown key 'widht'; did you mean width" in message
    assert "width must be a whole number" in fails([*TINY, "width:-1", "--save_dir", str(tmp_path)], capsys)
    assert "clips (1000000000 steps of 2)" in fails([*run, "--steps_per_epoch", "1000000000"], capsys)
    checkpoint = read(finished)
    checkpoint["config_model"]["rounds"] = -1  # of a version that took it
    torch.save(checkpoint, tmp_path / "other.pt")
    message = fails([*TINY, "--save_dir", str(tmp_path / "x"), "--resume", str(tmp_path / "other.pt")], capsys)
    assert "other.pt: its configuration does not describe a network of this version (rounds" in message


def test_a_resumed_run_takes_the_momentum_asked_for(tmp_path: Path) -> None:
    words = [*TINY, "--optimizer", "sgd", "--lr", "1e-4", "--save_dir", str(tmp_path)]
    assert main.main([*words, "--stop_after", "1"]) == 0
    assert main.main([*words, "--momentum", "0.1", "--weight_decay", "0.25"]) == 0
    groups = read(tmp_path)["optimizer"]["param_groups"]
    assert {group["momentum"] for group in groups} == {0.1}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.25}


def test_data_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--data_dir", str(tmp_path), "--save_dir", str(tmp_path / "run")]
    assert "DAVIS-2016" in fails([*arguments, "--datasets", "DAVIS-2016"], capsys)
    for name in ("DUTS-TR", "duts-tr"):
        assert "DUTS-TR-Image" in fails([*arguments, "--datasets", name], capsys)
    for name in ("DUTS", "synthtic"):  # the two that are no data sets of videos
        message = fails([*arguments, "--datasets", name], capsys)
        assert "stills are DUTS-TR" in message and "synthetic" in message
    message = fails([*arguments, "--datasets", "synthetic", "--val_sequences", "bear"], capsys)
    assert "'bear'" in message and "--val_datasets" in message and "--val_sequences none" in message


@pytest.mark.parametrize("name", ["synthetic", "DUTS-TR"])
def test_data_of_validation_alone_that_is_not_there(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default config validates on DAVIS, also where it is not trained on: the message says how to do without."""
    arguments = ["--datasets", name, "--data_dir", str(tmp_path), "--save_dir", str(tmp_path / "run")]
    message = fails([*TINY[2:], *arguments], capsys)
    for part in (str(tmp_path), "val_datasets", "dance-jump", "--val_sequences none", "DAVIS-2016 is not trained on"):
        assert part in message
    training, validation = build_sequences(parse_args([*arguments, "--val_sequences", "none"])[0])
    assert not training and not validation


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


def run_script(script: str, repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program of its own that calls main.py with these arguments."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=repository, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )  # fmt: skip


def test_a_worker_that_the_system_ends_is_told(tmp_path: Path, repository: Path) -> None:
    """As where memory runs out."""
    ended = run_script(KILLED, repository, *TINY, "--workers", "1", "--save_dir", str(tmp_path))
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "error: a loader process was ended from outside" in ended.stderr and "--workers" in ended.stderr


LIMITED = """
import resource, sys
import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
sys.exit(main.main(sys.argv[1:]))
"""


def test_a_checkpoint_that_there_is_no_room_for_is_named(tmp_path: Path, repository: Path) -> None:
    pytest.importorskip("resource")
    ended = run_script(LIMITED, repository, *TINY, "--save_dir", str(tmp_path))
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert f"error: {tmp_path / 'weights.safetensors'}: File too large; make room there" in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "log.jsonl"]


def test_an_error_that_nobody_expects_in_a_worker_ends_the_run(tmp_path: Path, repository: Path) -> None:
    """With its traceback, and not with processes that wait for each other for ever."""
    ended = run_script(FAULT, repository, *TINY, "--workers", "2", "--save_dir", str(tmp_path))
    assert ended.returncode == 1 and "ZeroDivisionError: a fault of ours" in ended.stderr


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--save_dir", str(tmp_path), "--schedule", "constant"]
    assert main.main([*arguments, "--stop_after", "1"]) == 0
    before = (tmp_path / "last.pt").read_bytes()
    message = fails([*arguments, "--lr", "1e30", "--warmup_steps", "0", "--optimizer", "adamw"], capsys)
    assert "at step" in message and "lr" in message
    assert (tmp_path / "last.pt").read_bytes() == before


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Nothing is reported before the last step, and there would be a saving after each step and at the epoch's end.
    arguments = [*TINY, "--save_dir", str(tmp_path), "--schedule", "constant", "--log_every", "100"]
    assert main.main([*arguments, "--stop_after", "1"]) == 0
    message = fails([*arguments, "--lr", "1e30", "--warmup_steps", "0", "--save_every", "1"], capsys)
    assert "not finite" in message and "last.pt" in message
    for tensor in read(tmp_path)["model"].values():
        assert torch.isfinite(tensor).all()


def test_a_call_that_ends_with_an_epoch_leaves_its_validation_to_the_next(videos: Path, tmp_path: Path) -> None:
    name = sorted(path.name for path in (videos / "JPEGImages" / "480p").iterdir())[0]
    data = ["--datasets", "DAVIS-2016", "--data_dir", str(videos), "--val_sequences", name, "--max_steps", "6"]
    for _ in range(2):
        assert main.main([*TINY, *data, "--stop_after", "3", "--save_dir", str(tmp_path / "parts")]) == 0
    assert main.main([*TINY, *data, "--save_dir", str(tmp_path / "whole")]) == 0
    parts, whole = (
        [(line["step"], line["J"]) for line in lines(tmp_path / folder, "val")] for folder in ("parts", "whole")
    )
    assert parts == whole and [step for step, _ in whole] == [3, 6]


def test_what_validation_would_stumble_over_is_said_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_dataset(tmp_path / "data", videos=2, frames=4, size=(48, 80), seed=1, validation=0)
    name = sorted(path.name for path in (root / "JPEGImages" / "480p").iterdir())[0]
    words = [*TINY, "--datasets", "DAVIS-2016", "--data_dir", str(root), "--val_sequences", name]
    told = fails([*words, "--val_frames", "2", "--save_dir", str(tmp_path / "a")], capsys)
    assert "no labelled frame" in told and "of val_frames 2; give val_frames 3 or more" in told
    assert not (tmp_path / "a").exists()
    mask = root / "Annotations" / "480p" / name / "00001.png"
    Image.fromarray(np.zeros((24, 40), np.uint8)).save(mask)
    assert str(mask) in fails([*words, "--save_dir", str(tmp_path / "b")], capsys)  # when it is read: of another size
    (root / "Flows" / "480p" / name / "00002.png").unlink()
    assert name in fails([*words, "--save_dir", str(tmp_path / "c")], capsys)
    assert not (tmp_path / "c").exists()


class Elsewhere:
    """A tensor of another device, as far as NumPy is concerned: it has to be fetched."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, index: int) -> Elsewhere:
        return Elsewhere(self.tensor[index])

    def __array__(self, *_: object, **__: object) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self) -> torch.Tensor:
        return self.tensor


def test_panels_of_a_batch_on_a_gpu() -> None:
    batch = {name: torch.randint(0, 256, (1, 2, 3, 32, 64), dtype=torch.uint8) for name in ("frames", "flows")}
    batch.update(masks=torch.ones(1, 2, 1, 32, 64, dtype=torch.uint8), valid=torch.ones(1, 2, dtype=torch.bool))
    logits = torch.randn(1, 2, 1, 32, 64)
    expected = main.picture(batch, logits)
    assert np.array_equal(main.picture({name: Elsewhere(value) for name, value in batch.items()}, logits), expected)


def test_max_minutes_stops_with_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*TINY, "--save_dir", str(tmp_path), "--max_minutes", "1e-6"]) == 0
    assert "run the same command again" in capsys.readouterr().out
    assert read(tmp_path)["step"] == 0


# To the whole group, loader workers included, as a terminal sends the one and SLURM the other.
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_stops_with_a_checkpoint(number: signal.Signals, tmp_path: Path, repository: Path) -> None:
    arguments = [*TINY, "--workers", "1", "--max_steps", "100000", "--save_dir", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "main.py", *arguments],
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not ((tmp_path / "log.jsonl").is_file() and lines(tmp_path)):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.1)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    last = out.splitlines()[-1]
    assert last.startswith("stopped at step") and number.name in last and "run the same command again" in last
    assert read(tmp_path)["step"] == lines(tmp_path)[-1]["step"] >= 1
    main.main([*arguments, "--stop_after", "1"])
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))


def test_the_learning_rate_over_the_steps() -> None:
    config = TrainConfig(warmup_steps=10, schedule="cosine")
    factors = [main.lr_factor(config, step, 110, 11) for step in range(110)]
    assert factors[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert factors[10] == 1 and factors[60] == pytest.approx(0.5)
    assert all(a > b for a, b in zip(factors[10:], factors[11:])) and 0 < factors[-1] < 1e-3
    config = TrainConfig(warmup_steps=0, schedule="step", step_epochs=2)
    drops = [main.lr_factor(config, step, 60, 10) for step in (19, 20, 40)]
    assert drops == pytest.approx([1, 0.1, 0.01])


def test_a_step_is_as_long_as_the_options_say(tmp_path: Path) -> None:
    """By plain gradient descent: the weights move by lr times the gradient, whose length is clipped or not."""
    start = {key: value.clone() for key, value in seeded_network().state_dict().items()}
    words = "--optimizer sgd --momentum 0 --weight_decay 0 --lr 0.5 --schedule constant --warmup_steps 0 --max_steps 1"
    for number, (clip, factor) in enumerate((("0", "1"), ("1e-3", "1"), ("1e-3", "0"))):
        folder = tmp_path / str(number)
        options = [*words.split(), "--grad_clip", clip, "--backbone_lr_factor", factor, "--ema", "0.9"]
        assert main.main([*TINY, *options, "--save_dir", str(folder)]) == 0
        made, average, (line,) = read(folder)["model"], read(folder)["ema"], lines(folder)
        trained = {key for key, _ in seeded_network().named_parameters()}
        moved = {key: (made[key] - start[key]).double().norm() for key in trained}
        encoder = math.hypot(*(moved[key] for key in moved if key.startswith("encoders.")))
        whole = math.hypot(*moved.values())
        if factor == "0":
            assert encoder == 0 and 0 < whole < 0.5 * 1e-3
            continue
        assert encoder > 0
        assert whole == pytest.approx(0.5 * (1e-3 if float(clip) else line["grad_norm"]), rel=1e-2)
        assert line["grad_norm"] > 1e-2  # that of the loss, before it is clipped
        for key in trained:  # at the first step the average keeps 2 / 11 of the start
            torch.testing.assert_close(average[key], (2 * start[key] + 9 * made[key]) / 11, rtol=0, atol=1e-6)


def seeded_network() -> torch.nn.Module:
    torch.manual_seed(TrainConfig().seed)
    return build_dbsnet("xxs", **OPTIONS)


def test_the_loss_is_weighted_as_the_options_say(tmp_path: Path) -> None:
    first = {}
    for name, words in (("plain", "--aux_weight 0.7"), ("edges", "--edge_weight 5 --aux_weight 0")):
        assert main.main([*TINY, *words.split(), "--max_steps", "1", "--save_dir", str(tmp_path / name)]) == 0
        (first[name],) = lines(tmp_path / name)
    plain, edges = first["plain"], first["edges"]
    assert plain["loss"] == pytest.approx(plain["bce"] + plain["iou"] + 0.7 * plain["aux"])
    assert edges["loss"] == pytest.approx(edges["bce"] + edges["iou"])
    # The same network and clips: only what weighs pixels differs, and outlines are where a mask is hardest.
    assert edges["aux"] == pytest.approx(plain["aux"]) and edges["bce"] != pytest.approx(plain["bce"], rel=1e-4)


def test_parameter_groups() -> None:
    net = build_dbsnet("xxs", **OPTIONS)
    optimizer = main.build_optimizer(TrainConfig(lr=1e-3, backbone_lr_factor=0.1, weight_decay=0.02), net)
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(group_of) == len(list(net.parameters()))
    encoder = {id(parameter) for parameter in net.encoder_parameters()}
    for name, parameter in net.named_parameters():
        group = group_of[id(parameter)]
        assert math.isclose(group["lr"], 1e-4 if id(parameter) in encoder else 1e-3), name
        assert group["weight_decay"] == (0.0 if parameter.ndim <= 1 else 0.02), name
        if name.endswith("bias"):
            assert group["weight_decay"] == 0, name


def test_frozen_encoder_layers_keep_weights_and_statistics(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the map at stride 4 is made of stays to the last bit, its batch norms' statistics too; the rest trains."""
    arguments = [*TINY, "--bn", "local", "--freeze_stride", "4", "--save_dir", str(tmp_path)]
    arguments += ["--datasets", "DAVIS-2016", "--data_dir", str(videos)]
    assert main.main([*arguments, "--stop_after", "1"]) == 0
    first = read(tmp_path)["model"]
    message = fails([*arguments, "--freeze_stride", "0"], capsys)
    assert "--freeze_stride 4" in message
    assert main.main(arguments) == 0
    last = read(tmp_path)["model"]
    shallow = [f"encoders.appearance.{part}." for part in ("stem", "stages.0", "stages.1")]
    same = {key for key in first if key.startswith("encoders.") and torch.equal(first[key], last[key])}
    frozen = {key for key in first if key.startswith(tuple(shallow))}
    statistics = {key for key in frozen if "running_" in key}
    assert frozen <= same and len(statistics) > 10
    kept = {"encoders.appearance.mean", "encoders.appearance.std"}
    assert same == frozen | kept, same ^ (frozen | kept)


@pytest.mark.parametrize(
    "amp", [pytest.param("bf16", marks=pytest.mark.slow), pytest.param("fp16", marks=pytest.mark.gpu)]
)
def test_mixed_precision_trains(amp: str, tmp_path: Path) -> None:
    device = "cuda" if amp == "fp16" else "cpu"
    arguments = [*TINY, "--amp", amp, "--device", device, "--channels_last", "--save_dir", str(tmp_path)]
    assert main.main([*arguments, "--stop_after", "2"]) == 0
    assert main.main(arguments) == 0
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path))
    assert {value.dtype for value in read(tmp_path)["model"].values()} <= {torch.float32, torch.int64}


def test_fp16_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "amp: fp16 needs a GPU" in fails([*TINY, "--amp", "fp16", "--save_dir", str(tmp_path)], capsys)


def test_tensorboard_and_panels(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = [*TINY, "--tensorboard", "--panels_every", "1", "--max_steps", "1", "--save_dir", str(tmp_path)]
    assert main.main(arguments) == 0
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([lines(tmp_path)[0]["loss"]])
    assert events.Images("train")
    picture = load_image(tmp_path / "panels" / "train_0000001.png")
    assert picture.ndim == 3 and picture.std() > 10


@pytest.mark.slow
def test_it_compiles(tmp_path: Path) -> None:
    assert main.main([*TINY, "--compile", "--max_steps", "2", "--save_dir", str(tmp_path)]) == 0
    load_dbsnet(tmp_path / "weights.safetensors")  # no _orig_mod. in the names


@pytest.mark.slow
def test_it_learns_synthetic_clips(tmp_path: Path) -> None:
    # Both streams: a still picture does not say which of several things moves.
    arguments = [*TINY, "depth:0", "dilations:[1]", "rounds:1", "streams:[appearance,motion]", "--batch_size", "4"]
    arguments += ["--max_steps", "300", "--steps_per_epoch", "300", "--lr", "2e-3", "--log_every", "60"]
    assert main.main([*arguments, "--size", "64", "96", "--save_dir", str(tmp_path)]) == 0
    curve = [line["iou"] for line in lines(tmp_path)]
    assert curve[-1] < 0.75 * curve[0], curve
