"""State dicts: read from any checkpoint file, checked against a network, filled in.

Everything is read with ``weights_only=True``. Of training checkpoints (``.pt`` of main.py) the averaged weights
(``ema``) are taken where there are any.
"""

from __future__ import annotations

import pickle
import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.errors import CheckpointError

# What reading a torch file raises where bytes of it are missing or others than they were.
UNREADABLE = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, LookupError, TypeError, AssertionError),
    struct.error,
)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a ``.safetensors`` or a torch file to the CPU, whatever dict it holds; raises CheckpointError, naming the
    file.

    A safetensors file gives ``{"state_dict": tensors, "metadata": {str: str}}``.
    """
    path = Path(path)
    if path.is_dir():
        names = ", ".join(name for name in ("weights.safetensors", "best.pt", "last.pt") if (path / name).is_file())
        raise CheckpointError(
            f"no checkpoint at {path}: it is a folder; give a file in it ({names or 'it has none of a training run'})"
        )
    if not path.is_file():
        raise CheckpointError(
            f"no checkpoint at {path}: give the path of an existing .safetensors, .pt, .pth or .pth.tar file"
        )
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
                return {"state_dict": state, "metadata": file.metadata() or {}}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is not a readable safetensors file ({error}): copy or download it again"
            ) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))  # how torch names a class that it does not admit
        if found is None:
            raise CheckpointError(f"{path} is not a readable torch file: copy or download it again") from None
        raise CheckpointError(
            f"{path} holds Python objects beside tensors ({found[1]}), which are not read (weights_only=True): save "
            "its state dict alone and give that file"
        ) from None
    except UNREADABLE as error:
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript archive, whose code is not run: save its state dict and give that file"
            ) from None
        why = f" ({error})" if " " in str(error) else ""  # not the bare key or byte that a parser stumbled over
        raise CheckpointError(f"{path} is not a readable torch file{why}: copy or download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, expected a dict of tensors or a checkpoint dict"
        )
    return content


def tensors_of(content: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The state dict inside a checkpoint's content (``ema``, ``model`` or ``state_dict``, else the dict itself).

    Prefixes that wrappers leave (``module.``, ``_orig_mod.``) are taken off.
    """
    for key in ("ema", "model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    state = {}
    for key, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path}: {key!r} is a {type(tensor).__name__}, expected tensors only: not a state dict"
            )
        if not isinstance(key, str):
            raise CheckpointError(f"{path}: {key!r} names a tensor, expected names that are strings: not a state dict")
        state[key.replace("_orig_mod.", "").removeprefix("module.")] = tensor
    if not state:
        raise CheckpointError(f"{path} holds no tensors")
    return state


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of any checkpoint file, wrapper prefixes taken off."""
    return tensors_of(read_checkpoint(path), path)


def describe_mismatch(expected: dict[str, torch.Size], given: dict[str, torch.Size]) -> str:
    """Say how a state dict's keys and shapes differ from a network's; empty where they agree."""
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    shapes = [key for key in expected if key in given and expected[key] != given[key]]
    parts = []
    for name, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            parts.append(f"{len(keys)} {name} (first: {', '.join(keys[:3])})")
    if shapes:
        first = ", ".join(f"{key}: expected {tuple(expected[key])}, got {tuple(given[key])}" for key in shapes[:3])
        parts.append(f"{len(shapes)} of another shape (first: {first})")
    return "; ".join(parts)


def load_state(net: torch.nn.Module, state: dict[str, Tensor], path: str | Path, name: str = "this network") -> None:
    """Fill a network from a state dict, strictly; a CheckpointError counts and names what does not fit.

    name: what the message calls the network.
    """
    problem = describe_mismatch(
        {key: tensor.shape for key, tensor in net.state_dict().items()},
        {key: tensor.shape for key, tensor in state.items()},
    )
    if problem:
        raise CheckpointError(f"{path} does not fit {name}: {problem}")
    try:
        net.load_state_dict(state)
    except RuntimeError as error:  # tensors that are sparse or quantised
        raise CheckpointError(f"{path} does not fit {name}: {' '.join(str(error).split())}") from None
