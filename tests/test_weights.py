"""Weights files: round trips, training checkpoints, and what is said of files that will not do."""

from __future__ import annotations

import copy
import errno
import json
import os
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from datasets.flow_colour import flow_to_image
from models import CheckpointError, DBSNet, build_dbsnet, load_dbsnet, save_weights
from models.state_dicts import read_state
from models.weights import average_into
from utils.files import remove_temporaries


@pytest.fixture(scope="module")
def net() -> DBSNet:
    torch.manual_seed(0)
    net = build_dbsnet("xxs", "wilile", width=16, hidden=4, dilations=(1,), depth=1)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_((1 << 24) + 1)  # which single precision cannot hold
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


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_others_may_read_the_file_as_far_as_the_umask_lets_them(
    net: DBSNet, tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        save_weights(tmp_path / "weights.safetensors", net)
    finally:
        os.umask(before)
    assert (tmp_path / "weights.safetensors").stat().st_mode & 0o777 == mode


# Of each frame of `moving_disc`: the mean probability on the disc, of the files as they were when they were scored.
MASKS = {
    "dbsnet_xxs": [0.9780, 0.9788, 0.9798, 0.9766, 0.9767, 0.9722, 0.9747, 0.9760, 0.9807, 0.9815],
    "dbsnet_lite2": [0.9408, 0.9397, 0.9710, 0.9424, 0.9835, 0.9848, 0.9587, 0.8927, 0.7785, 0.9194],
}


def moving_disc(length: int, size: tuple[int, int] = (64, 96)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames, flow images (T, H, W, 3) and masks (T, H, W) of a disc that moves four pixels a frame to the right."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float64)
    rest = np.stack([np.sin(x / (5 + c) + y / 7) + np.sin(y / (3 + c) - x / 11) for c in range(3)], axis=-1)
    frames, flows, masks = [], [], []
    for t in range(length):
        masks.append(np.hypot(y - 32, x - (24 + 4 * t)) < 13)
        disc = np.stack([np.sin((x - 4 * t) / 3 + c) * np.sin(y / 4 + 2 * c) for c in range(3)], axis=-1)
        picture = np.where(masks[-1][..., None], 180 + 60 * disc * [1, 0.5, 0.2], 90 + 30 * rest)
        frames.append(np.rint(picture).astype(np.uint8))
        flows.append(flow_to_image(np.stack([4.0 * masks[-1] * (1 if t + 1 < length else -1), 0 * x], axis=-1)))
    return np.stack(frames), np.stack(flows), np.stack(masks)


@pytest.mark.parametrize("name", MASKS)
def test_the_published_weights_give_the_masks_that_they_were_scored_with(name: str, repository: Path) -> None:
    """Whoever changes what the network computes, in however small a way, has to score and publish other weights."""
    if name == "dbsnet_lite2":
        pytest.importorskip("timm")
    net = load_dbsnet(repository / "weights" / f"{name}.safetensors")
    frames, flows, masks = moving_disc(10)  # longer than the Transformer's window
    clip = (torch.from_numpy(images).permute(0, 3, 1, 2)[None].float() / 255 for images in (frames, flows))
    with torch.inference_mode():
        probability = net(*clip)[0, :, 0].sigmoid().double().numpy()
    found = probability > 0.5
    assert (found & masks).sum() / (found | masks).sum() > 0.9
    np.testing.assert_allclose([p[mask].mean() for p, mask in zip(probability, masks)], MASKS[name], atol=2e-4)


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


def test_what_a_killed_writer_leaves_is_found(net: DBSNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By main.py, when it goes on: the names have to fit each other."""
    path, names = tmp_path / "weights.safetensors", []

    def noted(name: Path, mode: str) -> IO[bytes]:
        names.append(name)
        return open(name, mode)

    monkeypatch.setattr("models.weights.open", noted, raising=False)
    save_weights(path, net)
    names[0].touch()  # as it is until it takes the other's place
    assert len(list(tmp_path.iterdir())) == 2
    remove_temporaries(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_says_which(net: DBSNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, mode: str) -> IO[bytes]:
        path.touch()  # a name takes no room
        return open("/dev/full", mode.replace("x", "w"))

    monkeypatch.setattr("models.weights.open", full, raising=False)
    with pytest.raises(OSError) as caught:
        save_weights(tmp_path / "w.safetensors", net)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "w.safetensors"))
    assert not list(tmp_path.iterdir())


def test_a_read_only_place_is_told_by_the_name_of_the_weights(
    net: DBSNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object, *_: object) -> IO[bytes]:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("models.weights.open", refuse, raising=False)
    with pytest.raises(OSError) as caught:
        save_weights(tmp_path / "w.safetensors", net)
    assert (caught.value.errno, caught.value.filename) == (errno.EROFS, str(tmp_path / "w.safetensors"))


def test_metadata_holds_the_configuration_and_what_is_given(net: DBSNet, tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", net, metadata={"step": "1200", "data": "DAVIS-2016"})
    with safe_open(str(tmp_path / "w.safetensors"), "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"]) == net.config
    assert metadata["step"] == "1200" and metadata["data"] == "DAVIS-2016"


def test_the_same_weights_are_the_same_file(net: DBSNet, tmp_path: Path) -> None:
    """Its SHA-256 tells whether maps are of these weights, and who downloads them that they are whole."""
    notes = {f"key {number}": f"größe {number}" for number in range(8)}
    for number in range(6):
        save_weights(tmp_path / f"{number}.safetensors", net, metadata=dict(reversed(notes.items())))
    # However they lie in memory, as in training with --channels_last.
    save_weights(tmp_path / "6.safetensors", copy.deepcopy(net).to(memory_format=torch.channels_last), metadata=notes)
    assert len({(tmp_path / f"{number}.safetensors").read_bytes() for number in range(7)}) == 1
    header = int.from_bytes((tmp_path / "0.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0  # the tensors are aligned, for those who map the file
    with safe_open(str(tmp_path / "0.safetensors"), "pt") as file:
        assert file.metadata().items() >= notes.items()
    for key, value in load_dbsnet(tmp_path / "0.safetensors").state_dict().items():
        assert torch.equal(value, net.state_dict()[key])


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
    torch.save(checkpoint(net, ema={f"_orig_mod.module.{k}": v for k, v in averaged.items()}), tmp_path / "d.pt")
    assert torch.equal(load_dbsnet(tmp_path / "a.pt").state_dict()[key], net.state_dict()[key])
    assert torch.equal(load_dbsnet(tmp_path / "b.pt").state_dict()[key], averaged[key])
    assert torch.equal(load_dbsnet(tmp_path / "c.pt").state_dict()[key], averaged[key])
    assert torch.equal(read_state(tmp_path / "c.pt")[key], averaged[key])
    assert torch.equal(read_state(tmp_path / "d.pt")[key], averaged[key])


def test_the_mean_of_networks_has_the_mean_of_their_statistics(net: DBSNet) -> None:
    nets = [copy.deepcopy(net) for _ in range(3)]
    for number, each in enumerate(nets):
        for value in each.state_dict().values():
            value += number**2
    average_into(nets[0], nets[1:])
    for key, value in net.state_dict().items():
        mean, other = (each.state_dict()[key] for each in nets[:2])
        torch.testing.assert_close(mean, value + 5 / 3 if value.is_floating_point() else value, rtol=0, atol=1e-5)
        assert torch.equal(other, value + 1)


def test_a_loaded_network_gives_the_same_masks(net: DBSNet, tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", net)
    x = torch.rand(1, 2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(load_dbsnet(tmp_path / "w.safetensors")(x, x), net.eval()(x, x))
    net.train()


def test_a_network_is_loaded_onto_the_device_that_is_asked_for(net: DBSNet, tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", net)
    loaded = load_dbsnet(tmp_path / "w.safetensors", "meta")  # stands for a GPU
    assert {value.device.type for value in loaded.state_dict().values()} == {"meta"}


def test_weights_of_another_network_are_counted_and_named(net: DBSNet, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    state = dict(net.state_dict())
    del state["decoder.head.bias"]
    state["extra"] = torch.zeros(1)
    state["skip.conv.weight"] = state["skip.conv.weight"].transpose(0, 1)  # as many numbers
    torch.save(checkpoint(net, model=state), path)
    with pytest.raises(CheckpointError) as caught:
        load_dbsnet(path)
    message = str(caught.value)
    for part in (
        str(path),
        "1 missing (first: decoder.head.bias)",
        "1 unexpected (first: extra)",
        "1 of another shape (first: skip.conv.weight: expected (16, 48, 1, 1), got (48, 16, 1, 1)",
    ):
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
    for metadata in (torch.zeros(3), {"config": {"variant": "xxs"}}):
        torch.save({"model": net.state_dict(), "metadata": metadata}, tmp_path / "foreign.pt")
        with pytest.raises(CheckpointError, match="foreign.pt"):
            load_dbsnet(tmp_path / "foreign.pt")
    sparse = {key: tensor.to_sparse() for key, tensor in net.state_dict().items()}
    torch.save(checkpoint(net, model=sparse, ema=sparse), tmp_path / "sparse.pt")
    with pytest.raises(CheckpointError, match="sparse.pt does not fit this network"):
        load_dbsnet(tmp_path / "sparse.pt")
    tampered = [
        {**net.config, **change} for change in ({"window": 0}, {"width": -16}, {"encoder": None}, {"pool": "2"})
    ]
    for config in ({"variant": "m"}, {"variant": "s", "tiers": 3}, *tampered):
        torch.save(checkpoint(net, config_model=config), tmp_path / "future.pt")
        with pytest.raises(CheckpointError, match="does not describe a network of this version"):
            load_dbsnet(tmp_path / "future.pt")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_dbsnet(tmp_path / "absent.pt")
