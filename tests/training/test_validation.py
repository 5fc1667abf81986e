"""Sequences held out of training: scored as they are, kept apart, and the best weights handed out."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import main
from datasets.synthetic import write_dataset
from models import Predictor, load_dbsnet, save_weights
from tests.training.runs import TINY, equal, fails, lines, load_image, read, seeded_network
from utils.errors import UserError
from utils.evaluation.metrics import jaccard
from utils.training import resuming, validation
from utils.training.checkpoint import save_checkpoint
from utils.training.config import TrainConfig, parse_args
from utils.training.data import build_sequences


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
    older = read(tmp_path)
    del older["config"]["val_frames"]  # an option that it did not have is not another validation
    torch.save(older, tmp_path / "last.pt")
    assert main.main([*arguments, "--max_steps", "9", "--val_sequences", names[1]]) == 0  # the same validation
    assert read(tmp_path)["best"] == {"J": 0.2, "step": 6}
    # Without validation the last weights are the ones to test with, not those that were the best for the rest of time.
    capsys.readouterr()
    assert main.main([*arguments, "--max_steps", "10"]) == 0
    told = capsys.readouterr().out
    assert "J 0.2000 at step 6, is left in" in told and "done: 10 steps; weights to test with" in told
    assert read(tmp_path, "best.pt")["step"] == 6
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert (file.metadata()["step"], file.metadata()["J"]) == ("10", "not validated")


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


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ([], {"as_trained": (64, 96), "square": (64, 64), "upright": (96, 64)}),  # 78.4 × 78.4 in the square's shape
        (["--val_size", "32", "64"], dict.fromkeys(("as_trained", "square", "upright"), (32, 64))),
    ],
)
def test_held_out_videos_keep_their_shape(
    options: list[str], sizes: dict[str, tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `tool.py --tools test` has it: a size is for one shape, unless it was given for validation."""
    data = tmp_path / "data"
    shapes = {"as_trained": (48, 72), "square": (60, 60), "upright": (72, 48)}
    for seed, (name, size) in enumerate(shapes.items()):
        made = write_dataset(tmp_path / name, videos=1, frames=4, size=size, seed=seed, validation=0)
        for folder in ("JPEGImages", "Annotations", "Flows"):
            (video,) = (made / folder / "480p").iterdir()
            shutil.copytree(video, data / "DAVIS" / folder / "480p" / name)
    (data / "DAVIS/ImageSets/2016").mkdir(parents=True)
    (data / "DAVIS/ImageSets/2016/train.txt").write_text("".join(f"{name}\n" for name in shapes))
    seen: dict[str, tuple[int, int]] = {}
    called = Predictor.__call__

    def watched(self: Predictor, frames: Sequence, flows: Sequence) -> Iterator[tuple[int, np.ndarray]]:
        seen[{shape: name for name, shape in shapes.items()}[frames[0].shape[:2]]] = self.size
        return called(self, frames, flows)

    monkeypatch.setattr(Predictor, "__call__", watched)
    arguments = [*TINY, "--size", "64", "96", "--data_dir", str(data), "--val_datasets", "DAVIS-2016"]
    assert main.main([*arguments, "--val_sequences", *shapes, *options, "--save_dir", str(tmp_path / "run")]) == 0
    assert seen == sizes


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


def test_held_out_sequences_are_not_trained_on(videos: Path) -> None:
    names = sorted(path.name for path in (videos / "JPEGImages" / "480p").iterdir())
    config = TrainConfig(data_dir=str(videos), datasets={"DAVIS-2016": 1.0}, val_sequences=[names[1]])
    training, validation = build_sequences(config)
    assert [sequence.name for sequence in training["DAVIS-2016"]] == [names[0], names[2]]
    assert [sequence.name for sequence in validation] == [names[1]]
    with pytest.raises(UserError, match=rf"'{names[1]}x' is not in the train split of DAVIS-2016; .*{names[1]}"):
        build_sequences(TrainConfig(**{**vars(config), "val_sequences": [names[1] + "x"]}))
    with pytest.raises(
        UserError, match="DAVIS-2016 has no training sequence left .* hold all of its 3 out; name fewer"
    ):
        build_sequences(TrainConfig(**{**vars(config), "val_sequences": names}))


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


@pytest.mark.parametrize("when", [["--steps_per_epoch", "1"], ["--steps_per_epoch", "2", "--val_every", "1"]])
def test_a_signal_ends_a_validation_and_nothing_is_scored_by_half_of_it(
    when: list[str], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(path.name for path in (videos / "JPEGImages" / "480p").iterdir())[:2]
    arguments = [*TINY, "--datasets", "DAVIS-2016", "--data_dir", str(videos), "--val_sequences", *names, *when]
    arguments += ["--max_steps", "2", "--save_dir", str(tmp_path)]
    scored = []

    def interrupted(*masks: np.ndarray) -> float:
        scored.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return jaccard(*masks)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "jaccard", interrupted)
        assert main.main(arguments) == 130
    assert len(scored) == 1 and "stopped at step 1 of 2 (SIGTERM)" in capsys.readouterr().out
    assert read(tmp_path)["step"] == 1 and not lines(tmp_path, "val") and not (tmp_path / "best.pt").exists()
    assert main.main(arguments) == 0
    assert [line["step"] for line in lines(tmp_path, "val")] == [1, 2]
    assert all(sorted(line["sequences"]) == names for line in lines(tmp_path, "val"))


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
