"""Weights files: round trips, training checkpoints, and what is said of files that will not do."""

from __future__ import annotations

import copy
import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from models import CheckpointError, DBSNet, build_dbsnet, load_dbsnet, save_weights
from models.state_dicts import read_state


@pytest.fixture(scope="module")
def net() -> DBSNet:
    torch.manual_seed(0)
    net = build_dbsnet("xxs", "wilile", width=16, hidden=4, dilations=(1,), depth=1)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(12345678)
    return net.train()


def test_round_trip_is_exact(net: DBSNet, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "weights.safetensors"
    save_weights(path, net)
    loaded = load_dbsnet(path)
    assert not loaded.training and net.training
    assert loaded.config == net.config
    for key, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value) and loaded.state_dict()[key].dtype == value.dtype
    assert [file.name for file in path.parent.iterdir()] == ["weights.safetensors"]  # no temporary file is left


def test_half_is_half_the_size_and_loads_as_single_precision(net: DBSNet, tmp_path: Path) -> None:
    save_weights(tmp_path / "whole.safetensors", net)
    save_weights(tmp_path / "half.safetensors", net, half=True)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.55 * (tmp_path / "whole.safetensors").stat().st_size
    state = load_dbsnet(tmp_path / "half.safetensors").state_dict()
    for key, value in net.state_dict().items():
        assert state[key].dtype == value.dtype
        torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-6)
    assert next(net.parameters()).dtype == torch.float32


def test_half_precision_keeps_what_it_cannot_hold(net: DBSNet, tmp_path: Path) -> None:
    """The running variance of features in the hundreds: infinite, it would take their channel away."""
    wide = copy.deepcopy(net)
    key = "skip.norm.running_var"
    wide.get_buffer(key)[3] = 90_000.0
    save_weights(tmp_path / "half.safetensors", wide, half=True)
    state = load_dbsnet(tmp_path / "half.safetensors").state_dict()
    torch.testing.assert_close(state[key], wide.state_dict()[key], rtol=1e-3, atol=0)
    assert all(value.isfinite().all() for value in state.values())


def test_a_full_disk_says_which(net: DBSNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "begun").write_bytes(b"")
    monkeypatch.setattr("tempfile.mkstemp", lambda **_: (os.open("/dev/full", os.O_WRONLY), str(tmp_path / "begun")))
    with pytest.raises(OSError, match="w.safetensors") as caught:
        save_weights(tmp_path / "w.safetensors", net)
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_metadata_holds_the_configuration_and_what_is_given(net: DBSNet, tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", net, metadata={"step": "1200", "data": "DAVIS-2016"})
    with safe_open(str(tmp_path / "w.safetensors"), "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"]) == net.config
    assert metadata["step"] == "1200" and metadata["data"] == "DAVIS-2016"


def test_a_failing_write_leaves_the_old_file(net: DBSNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(path, net)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def checkpoint(net: DBSNet, **changes: object) -> dict:
    return {"model": net.state_dict(), "ema": None, "config_model": net.config, "config": {"lr": 1e-4}, "optimizer": {},
            "step": 3, "epoch": 1, "best": 0.5, **changes}  # fmt: skip


def test_training_checkpoints_prefer_the_averaged_weights(net: DBSNet, tmp_path: Path) -> None:
    averaged = {key: value + 1 if value.is_floating_point() else value for key, value in net.state_dict().items()}
    key = "decoder.head.weight"
    torch.save(checkpoint(net), tmp_path / "a.pt")
    torch.save(checkpoint(net, ema=averaged), tmp_path / "b.pt")
    torch.save(checkpoint(net, ema={f"module._orig_mod.{k}": v for k, v in averaged.items()}), tmp_path / "c.pt")
    assert torch.equal(load_dbsnet(tmp_path / "a.pt").state_dict()[key], net.state_dict()[key])
    assert torch.equal(load_dbsnet(tmp_path / "b.pt").state_dict()[key], averaged[key])
    assert torch.equal(load_dbsnet(tmp_path / "c.pt").state_dict()[key], averaged[key])
    assert torch.equal(read_state(tmp_path / "c.pt")[key], averaged[key])


def test_a_loaded_network_gives_the_same_masks(net: DBSNet, tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", net)
    x = torch.rand(1, 2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(load_dbsnet(tmp_path / "w.safetensors")(x, x), net.eval()(x, x))
    net.train()


def test_weights_of_another_network_are_counted_and_named(net: DBSNet, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    state = dict(net.state_dict())
    del state["decoder.head.bias"]
    state["extra"] = torch.zeros(1)
    state["skip.conv.weight"] = torch.zeros(2)
    torch.save(checkpoint(net, model=state), path)
    with pytest.raises(CheckpointError) as caught:
        load_dbsnet(path)
    message = str(caught.value)
    for part in (str(path), "1 missing (first: decoder.head.bias)", "1 unexpected (first: extra)",
                 "1 of another shape (first: skip.conv.weight: expected (16, 48, 1, 1), got (2,)"):  # fmt: skip
        assert part in message


def test_files_that_do_not_say_their_network(net: DBSNet, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="does not say which network"):
        load_dbsnet(tmp_path / "plain.pt")
    save_file({"a": torch.zeros(1)}, str(tmp_path / "plain.safetensors"))
    with pytest.raises(CheckpointError, match="does not say which network"):
        load_dbsnet(tmp_path / "plain.safetensors")
    save_file({"a": torch.zeros(1)}, str(tmp_path / "broken.safetensors"), metadata={"config": "{variant"})
    with pytest.raises(CheckpointError, match="broken.safetensors.*config"):
        load_dbsnet(tmp_path / "broken.safetensors")
    save_file({"a": torch.zeros(1)}, str(tmp_path / "deep.safetensors"), metadata={"config": "[" * 100_000})
    with pytest.raises(CheckpointError, match="deep.safetensors.*config"):
        load_dbsnet(tmp_path / "deep.safetensors")
    tampered = [
        {**net.config, **change} for change in ({"window": 0}, {"width": -16}, {"encoder": None}, {"pool": "2"})
    ]
    for config in ({"variant": "m"}, {"variant": "s", "tiers": 3}, *tampered):
        torch.save(checkpoint(net, config_model=config), tmp_path / "future.pt")
        with pytest.raises(CheckpointError, match="does not describe a network of this version"):
            load_dbsnet(tmp_path / "future.pt")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_dbsnet(tmp_path / "absent.pt")
