"""What a run begins with: weights of another, parts and streams that join them, a teacher."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import main
from models import build_dbsnet, load_dbsnet, losses, save_weights
from models.dbsnet import MAPS
from models.errors import CheckpointError
from models.growth import keep_stream
from tests.training.runs import OPTIONS, TINY, equal, fails, lines, read
from utils.training.config import TrainConfig
from utils.training.network import load_teacher


def test_finetune_starts_from_the_weights(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = read(finished)["ema"]
    for weights in ("last.pt", "weights.safetensors"):
        folder = tmp_path / weights
        arguments = [*TINY, "--finetune", str(finished / weights), "--save_dir", str(folder)]
        # A learning rate of nought shows the weights that it starts from; statistics are kept by bn frozen.
        frozen = [*arguments, "--lr", "0", "--bn", "frozen", "--ema", "0", "--max_steps", "1"]
        assert main.main(frozen) == 0
        told = capsys.readouterr().out
        assert f"starting from {finished / weights}" in told and "network: variant xxs" in told
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
    # But for options on which no weight depends: they are as asked for now.
    fourth = [*whole, "window:4", "dropout:0.1", "--finetune", str(second / "last.pt"), "--save_dir"]
    assert main.main([*options, *fourth, str(tmp_path / "fourth")]) == 0
    config = load_dbsnet(tmp_path / "fourth" / "weights.safetensors").config
    assert config == {**load_dbsnet(second / "weights.safetensors").config, "window": 4, "dropout": 0.1}
    fourth[fourth.index("window:4")] = "window:0"
    assert "network: window must be" in fails([*options, *fourth, str(tmp_path / "fifth")], capsys)


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
    hint = [*options, "--save_dir", str(tmp_path / "again"), "--network", *plain]
    assert "--keep_stream motion" in fails([*hint, "streams:[motion]", "--finetune", both], capsys)
    assert "--add_stream" in fails([*hint, "streams:[appearance,motion]", "--finetune", first], capsys)
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


def test_one_stream_learns_what_it_is_in_a_teacher_of_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*TINY[: TINY.index("--network")], "--ema", "0", "--lr", "3e-3", "--teacher_maps", "encoders"]
    options += ["--network", "width:8", "hidden:4", "dilations:[]", "depth:0", "rounds:0"]
    teacher = str(tmp_path / "both" / "weights.safetensors")
    assert main.main([*options, "--max_steps", "30", "--save_dir", str(tmp_path / "both")]) == 0
    differences = {}
    for name, weight in (("alone", "0"), ("taught", "10")):
        words = [*options, "streams:[motion]", "--seed", "7", "--teacher", teacher, "--teacher_weight", weight]
        assert main.main([*words, "--max_steps", "30", "--save_dir", str(tmp_path / name)]) == 0
        differences[name] = [line["teacher"] for line in lines(tmp_path / name, "train")]
    assert differences["taught"][0] == differences["alone"][0]  # one start, and the same data
    assert np.mean(differences["taught"][-5:]) < 0.7 * np.mean(differences["alone"][-5:])
    # The lesson is the stream as the teacher has it: taken out of the teacher itself, it has nothing to learn.
    words = [*options, "streams:[motion]", "--finetune", teacher, "--keep_stream", "motion", "--teacher", teacher]
    assert main.main([*words, "--bn", "frozen", "--max_steps", "1", "--save_dir", str(tmp_path / "itself")]) == 0
    assert lines(tmp_path / "itself", "train")[0]["teacher"] == pytest.approx(0, abs=1e-6)
    one = str(tmp_path / "taught" / "weights.safetensors")
    for maps in MAPS:  # and is where the network is, without gradients
        config = TrainConfig(teacher=teacher, teacher_maps=maps)
        lesson = load_teacher(config, load_dbsnet(one), torch.device("meta"))
        assert lesson.streams == (("appearance", "motion") if maps == "decoder" else ("motion",))
        assert not lesson.training and all(x.is_meta and not x.requires_grad for x in lesson.parameters())
    words = [*options, "streams:[appearance]", "--teacher", one, "--save_dir", str(tmp_path / "other")]
    assert "it has motion, expected appearance" in fails(words, capsys)


def test_a_teacher_of_both_streams_is_judged_by_the_one_that_is_learned(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    options = {"width": 8, "hidden": 4, "dilations": [], "depth": 0, "rounds": 0}
    encoder = {"appearance": "resnet18", "motion": "mobilevit"}  # which pad frames to multiples of 32 and of 64
    both = build_dbsnet("xxs", "wilile", encoder=encoder, **options)
    teacher = tmp_path / "both.safetensors"
    save_weights(teacher, both)
    config = TrainConfig(teacher=str(teacher), teacher_maps="encoders")
    for stream, multiple in (("appearance", 32), ("motion", 64)):
        lesson = load_teacher(config, keep_stream(both, stream), torch.device("cpu"))
        assert lesson.streams == (stream,) and lesson.multiple == multiple
    pupil = build_dbsnet("xxs", "wilile", streams=["appearance"], **options)
    with pytest.raises(CheckpointError, match="multiple 32, expected 64"):
        load_teacher(config, pupil, torch.device("cpu"))


def test_frames_without_a_label_are_lessons_like_all_others(
    finished: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here of batches of one clip each, two to a step, of which some have fewer labels than others."""
    shutil.copytree(videos, tmp_path / "data")
    for mask in (tmp_path / "data" / "Annotations" / "480p" / "video-000").glob("*.png"):
        if mask.stem != "00002":
            mask.unlink()
    labelled, differences = [], []

    def segmentation_loss(logits: torch.Tensor, masks: torch.Tensor, valid: torch.Tensor, *rest, **options):
        labelled.append(int(valid.sum()))
        return losses.segmentation_loss(logits, masks, valid, *rest, **options)

    def distillation_loss(*maps):
        difference = losses.distillation_loss(*maps)
        differences.append(float(difference.detach()))
        return difference

    monkeypatch.setattr(main, "segmentation_loss", segmentation_loss)
    monkeypatch.setattr(main, "distillation_loss", distillation_loss)
    words = [*TINY, "--batch_size", "1", "--accumulate", "2", "--max_steps", "6", "--steps_per_epoch", "6"]
    words += [
        "--datasets",
        "DAVIS-2016",
        "--data_dir",
        str(tmp_path / "data"),
        "--strides",
        "1",
        "--teacher_weight",
        "3",
    ]
    words += ["--teacher", str(finished / "weights.safetensors")]
    assert main.main([*words, "--save_dir", str(tmp_path / "run")]) == 0
    pairs = list(zip(labelled[::2], labelled[1::2]))
    assert (2, 1) in pairs or (1, 2) in pairs
    for step, line in enumerate(lines(tmp_path / "run")):
        assert line["teacher"] == pytest.approx(np.mean(differences[2 * step : 2 * step + 2]))
        assert line["loss"] == pytest.approx(line["bce"] + line["iou"] + 0.4 * line["aux"] + 3 * line["teacher"])


def test_weights_of_another_network(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    anew = ["--save_dir", str(tmp_path)]
    message = fails([*TINY, *anew, "--variant", "xs", "--finetune", str(finished / "last.pt")], capsys)
    assert "variant xxs, not xs" in message and "--variant xxs" in message and str(finished / "last.pt") in message
    message = fails([*TINY, "--variant", "xs", "--save_dir", str(finished)], capsys)
    assert "variant xxs, not xs" in message and "--save_dir" in message
    save_weights(tmp_path / "other.safetensors", build_dbsnet("xxs", flavour="wilile", **OPTIONS))
    message = fails([*TINY, *anew, "--finetune", str(tmp_path / "other.safetensors")], capsys)
    assert "flavour wilile, not reference" in message
    # Twice said, of which one would have to be the one that counts.
    assert "give --variant xs" in fails([*TINY, "variant:xs", *anew], capsys)
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert "text.pt" in fails([*TINY, *anew, "--finetune", str(tmp_path / "text.pt")], capsys)
    assert "text.pt" in fails([*TINY, *anew, "--pretrained", str(tmp_path / "text.pt")], capsys)
    # A folder for a file in it, and the wrong one of the two options.
    message = fails([*TINY, *anew, "--finetune", str(finished)], capsys)
    assert f"{finished}: it is a folder" in message and "weights.safetensors, last.pt" in message
    assert f"give {finished / 'last.pt'}" in fails([*TINY, *anew, "--resume", str(finished)], capsys)
    message = fails([*TINY, *anew, "--pretrained", str(finished / "weights.safetensors")], capsys)
    assert "which --finetune takes" in message
