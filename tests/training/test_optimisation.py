"""Loss, gradient, learning rate and precision of the steps."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

import main
from models import build_dbsnet
from tests.training.runs import OPTIONS, TINY, fails, lines, read, seeded_network
from utils.distributed import Processes
from utils.errors import UserError
from utils.training.config import TrainConfig
from utils.training.optimisation import check_statistics, step_size, step_sizes
from utils.training.run import Run


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


def test_a_batch_norm_of_one_value_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [*TINY, *"--size 32 32 --batch_size 1 --clip_len 1 --max_steps 1 --save_dir".split()]
    message = fails([*small, str(tmp_path / "a")], capsys)
    assert "32x32" in message and "--bn frozen" in message and not (tmp_path / "a").exists()
    assert "32x32" in fails([*small, str(tmp_path / "a"), *"--size 64 64 --multi_scale 1 0.5".split()], capsys)
    for number, words in enumerate(("--bn frozen", "--size 32 64", "--batch_size 2", "--clip_len 2")):
        assert main.main([*small, str(tmp_path / f"b{number}"), *words.split()]) == 0


def test_values_of_a_batch_norm_are_counted_over_processes_that_share_them_and_with_the_padding() -> None:
    def refused(bn: str, world_size: int, multiple: int = 32) -> bool:
        config = TrainConfig(size=(32, 32), clip_len=1, batch_size=1, bn=bn)
        try:
            check_statistics(config, Processes(0, world_size, torch.device("cpu")), multiple)
        except UserError:
            return True
        return False

    assert refused("local", 1) and refused("sync", 1) and refused("local", 2)
    assert not refused("sync", 2) and not refused("frozen", 1)
    assert not refused("local", 1, multiple=64)  # padded to 64 x 64 pixels, four positions at stride 32


def test_sizes_of_steps_have_a_position_at_least_and_come_by_the_seed() -> None:
    config = TrainConfig(size=(32, 96), multi_scale=[0.1, 0.5, 1])
    assert step_sizes(config) == [(32, 32), (32, 64), (32, 96)]
    drawn = [[step_size(dataclasses.replace(config, seed=seed), step) for step in range(20)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_warm_up_that_is_longer_than_the_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, "--max_steps", "1", "--lr", "1e-2", "--save_dir", str(tmp_path)]
    assert main.main([*words, "--warmup_steps", "10"]) == 0
    assert "warmup_steps 10 are the whole run: lr rises to 1.00e-03" in capsys.readouterr().out
    assert lines(tmp_path)[0]["lr"] == pytest.approx(1e-3)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--save_dir", str(tmp_path), "--schedule", "constant"]
    assert main.main([*arguments, "--stop_after", "1"]) == 0
    before = (tmp_path / "last.pt").read_bytes()
    message = fails([*arguments, "--lr", "1e30", "--warmup_steps", "0", "--optimizer", "adamw"], capsys)
    assert "at step" in message and "lr" in message and f"the same command goes on from {tmp_path}" in message
    assert (tmp_path / "last.pt").read_bytes() == before
    # Which a command that names its beginning would not do by itself.
    arguments += ["--resume", str(tmp_path / "last.pt"), "--lr", "1e30", "--warmup_steps", "0"]
    assert f"the same command with --resume auto goes on from {tmp_path}" in fails(arguments, capsys)


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


def test_options_of_the_machine_reach_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, step = [], main.train_step

    def watched(run: Run, *arguments):
        kernels = [parameter for parameter in run.net.parameters() if parameter.ndim == 4]
        seen.append(all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels))
        seen.append(torch.are_deterministic_algorithms_enabled())
        return step(run, *arguments)

    monkeypatch.setattr(main, "train_step", watched)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        for words in ([], ["--deterministic", "--channels_last"]):
            assert main.main([*TINY, *words, "--max_steps", "1", "--save_dir", str(tmp_path / str(len(words)))]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False, False, True, True]


def test_fp16_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "amp: fp16 needs a GPU" in fails([*TINY, "--amp", "fp16", "--save_dir", str(tmp_path)], capsys)
