"""Training checkpoints on disk, and the running average of weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from models.errors import CheckpointError
from models.state_dicts import read_checkpoint
from utils.errors import UserError
from utils.files import write_bytes, write_json, write_png
from utils.training.checkpoint import TRAINING_KEYS, load_checkpoint, save_checkpoint
from utils.training.ema import WeightAverage


def content() -> dict:
    return {**dict.fromkeys(TRAINING_KEYS), "model": {"weight": torch.arange(3.0)}, "step": 7}


def test_a_checkpoint_reads_back(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "deep" / "last.pt", content())
    back = load_checkpoint(path)
    assert back["step"] == 7
    assert torch.equal(back["model"]["weight"], torch.arange(3.0))
    assert [item.name for item in path.parent.iterdir()] == ["last.pt"]  # no temporary file is left


@pytest.mark.parametrize("read", [load_checkpoint, read_checkpoint])
def test_a_checkpoint_of_a_gpu_is_read_to_the_cpu(
    read: Callable[[Path], dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")  # as a GPU's tensors have it
        path = save_checkpoint(tmp_path / "last.pt", content())
    weight = read(path)["model"]["weight"]
    assert weight.device.type == "cpu" and torch.equal(weight, torch.arange(3.0))


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(tmp_path / "last.pt", content())
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("utils.files.os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {**content(), "step": 8})
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["last.pt"]


def test_errors_name_the_file_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.pt: no such checkpoint.*--resume none"):
        load_checkpoint(tmp_path / "gone.pt")
    whole = save_checkpoint(tmp_path / "last.pt", content()).read_bytes()
    for data in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        with pytest.raises(CheckpointError, match=r"cut\.pt: not a readable training checkpoint"):
            load_checkpoint(write_bytes(tmp_path / "cut.pt", data))
    # A byte of a tensor, which PyTorch reads without a word; and what its reader of lists stumbles over.
    place = whole.index(torch.arange(3.0).numpy().tobytes())
    for data in (whole[:place] + b"\x01" + whole[place + 1 :], b"\x80\x02K\x01s.", b"\x80\x02X\xff\xff"):
        with pytest.raises(CheckpointError, match=r"bit\.pt: not a readable training checkpoint.*--resume none"):
            load_checkpoint(write_bytes(tmp_path / "bit.pt", data))
    for data in (b"\x80\x02K\x01s.", b"\x80\x02X\xff\xff"):
        with pytest.raises(CheckpointError, match=r"bit\.pt is not a readable torch file"):
            read_checkpoint(write_bytes(tmp_path / "bit.pt", data))
    torch.save({"model": {}}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"optimizer.*missing.*--finetune"):
        load_checkpoint(tmp_path / "weights.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save({**content(), "config": nn.Linear(1, 1)}, tmp_path / "objects.pt")
    with pytest.raises(CheckpointError, match="objects.pt"):
        load_checkpoint(tmp_path / "objects.pt")


def test_the_average_of_weights_is_the_formula() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = WeightAverage(net, decay=0.5)
    own = {key: value for key, value in net.state_dict().items() if value.is_floating_point()}
    assert "1.running_var" in own  # statistics are averaged with the weights that they belong to
    expected = {key: value.clone() for key, value in own.items()}
    for step in range(1, 6):
        for value in own.values():
            value.normal_()
        net[1].num_batches_tracked += 1
        average.update(net, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {key: decay * expected[key] + (1 - decay) * value for key, value in own.items()}
    for key, value in expected.items():
        torch.testing.assert_close(average.net.state_dict()[key], value, rtol=0, atol=1e-6)
    assert average.net[1].num_batches_tracked == 5  # whole numbers are copied, not averaged
    assert not average.net.training and not any(parameter.requires_grad for parameter in average.net.parameters())


def test_files_refuse_what_they_cannot_hold(tmp_path: Path) -> None:
    import numpy as np

    with pytest.raises(ValueError, match=r"a\.png: expected a uint8 image"):
        write_png(tmp_path / "a.png", np.zeros((2, 2)))
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"J": float("nan")})
    assert not list(tmp_path.iterdir())
