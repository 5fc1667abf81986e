"""Weights files of this network: written, built from, averaged.

A published file is a ``.safetensors`` whose metadata holds the network's configuration (JSON under ``config``), so
that the architecture and the normalisation come from the file. Training checkpoints (``.pt`` of main.py) are built from
alike.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from models.dbsnet import DBSNet, build_dbsnet
from models.errors import CheckpointError
from models.state_dicts import load_state, read_checkpoint, tensors_of

FORMAT = "dbsnet-1"


def average_into(net: DBSNet, others: Sequence[DBSNet]) -> None:
    """Give a network the mean of its weights and those of others, each counting alike ("model soup", arXiv:2203.05482).

    It is of use for runs that began from the same trained weights: their mean then often does better than either.
    Buffers that are not floating point (counters) stay those of `net`.

    Raises:
        ValueError: a network of another configuration.
    """
    for other in others:
        if other.config != net.config:
            differing = [key for key in net.config if other.config.get(key) != net.config[key]]
            raise ValueError(f"networks of different configurations cannot be averaged: {', '.join(differing)}")
    states = [other.state_dict() for other in others]
    mean = {
        key: torch.stack([tensor, *(state[key].to(tensor) for state in states)]).mean(0)
        if tensor.is_floating_point()
        else tensor
        for key, tensor in net.state_dict().items()
    }
    net.load_state_dict(mean)


def save_weights(path: str | Path, net: DBSNet, *, half: bool = False, metadata: dict[str, str] | None = None) -> None:
    """Write a network's weights and configuration as one safetensors file, atomically.

    `half` stores floating-point tensors as float16 (half the size; loading widens them again), but one with values
    beyond 65,504, which some running variances have, as it is.
    """
    from safetensors.torch import save

    state = {
        key: (_halved(tensor) if half and tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for key, tensor in net.state_dict().items()
    }
    data = _ordered(
        save(state, {"format": FORMAT, "config": json.dumps(net.config, sort_keys=True), **(metadata or {})})
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:  # with the permissions of any new file; one of `tempfile` would be private
            file.write(data)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)  # the temporary file's name tells nobody anything, and a full disk gives none
        raise


def _ordered(data: bytes) -> bytes:
    """A safetensors file with its metadata in order.

    The library writes them in another order each time: the same weights would be another file by its SHA-256, which
    tells whether maps are of these weights.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[end:]


def _halved(tensor: torch.Tensor) -> torch.Tensor:
    half = tensor.half()
    return half if torch.equal(half.isinf(), tensor.isinf()) else tensor


def load_dbsnet(path: str | Path, device: str | torch.device = "cpu") -> DBSNet:
    """Build the network that a weights file describes, fill it, and put it in evaluation mode.

    Args:
        path: a ``.safetensors`` written by `save_weights`, or a training checkpoint of main.py.

    Raises CheckpointError for a file that cannot be read, is of another network, or does not say its configuration.
    """
    return network_of(read_checkpoint(path), path).to(device)


def network_of(content: dict[str, Any], path: str | Path) -> DBSNet:
    """`load_dbsnet` of a file that `models.state_dicts.read_checkpoint` has read; ``path`` is for errors."""
    metadata = content.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    try:
        config = json.loads(metadata["config"]) if "config" in metadata else content.get("config_model")
    except (json.JSONDecodeError, RecursionError, TypeError) as error:
        raise CheckpointError(f"{path}: the 'config' in its metadata is not JSON ({error}): write it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path} does not say which network it is of: expected a file written by this project (main.py's .pt, or "
            ".safetensors with a 'config' in its metadata). A MobileViT checkpoint goes to main.py --pretrained"
        )
    state = {
        key: tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in tensors_of(content, path).items()
    }
    try:
        net = build_dbsnet(**config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its configuration does not describe a network of this version: {error}"
        ) from None
    load_state(net, state, path)
    return net.eval()
