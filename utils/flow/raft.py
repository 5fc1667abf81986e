"""RAFT (Teed & Deng, ECCV 2020, https://arxiv.org/abs/2003.12039) in torchvision's implementation, with weights of
torchvision's or of princeton-vl's key format.
"""

from __future__ import annotations

import re
from http.client import HTTPException
from pathlib import Path

import torch

from models.errors import CheckpointError
from models.state_dicts import load_state, read_state
from utils.errors import UserError

# Weights that torchvision offers. C_T_V1 is princeton-vl's raft-things.pth (for raft_small: raft-small.pth) in
# torchvision's keys, the file that RAFT's own demo uses, hence the default; the others were trained by torchvision, or
# on Sintel and KITTI as well.
DEFAULT_WEIGHTS = "C_T_V1"

# princeton-vl's names -> torchvision's, applied in this order; both name the same tensors.
_PRINCETON_RULES: tuple[tuple[str, str], ...] = (
    (r"^fnet\.", "feature_encoder."),
    (r"^cnet\.", "context_encoder."),
    # encoder trunk: stem, then four residual or bottleneck blocks, then the last 1x1
    (r"^(\w+_encoder)\.conv1\.", r"\1.convnormrelu.0."),
    (r"^(\w+_encoder)\.norm1\.", r"\1.convnormrelu.1."),
    (r"^(\w+_encoder)\.conv2\.", r"\1.conv."),
    (r"^(\w+_encoder\.layer\d\.\d)\.conv(\d)\.", r"\1.convnormrelu\2.0."),
    (r"^(\w+_encoder\.layer\d\.\d)\.norm(\d)\.", r"\1.convnormrelu\2.1."),
    # update block
    (r"^update_block\.encoder\.convc(\d)\.", r"update_block.motion_encoder.convcorr\1.0."),
    (r"^update_block\.encoder\.convf(\d)\.", r"update_block.motion_encoder.convflow\1.0."),
    (r"^update_block\.encoder\.conv\.", r"update_block.motion_encoder.conv.0."),
    (r"^update_block\.gru\.conv([zrq])(\d)\.", r"update_block.recurrent_block.convgru\2.conv\1."),
    (r"^update_block\.gru\.conv([zrq])\.", r"update_block.recurrent_block.convgru1.conv\1."),  # RAFT-small has one
    (r"^update_block\.mask\.0\.", "mask_predictor.convrelu.0."),
    (r"^update_block\.mask\.2\.", "mask_predictor.conv."),
)
# The norm of a block's shortcut is registered twice there: as norm3 (residual) or norm4 (bottleneck) and in downsample.
_PRINCETON_TWICE = re.compile(r"^([fc]net\.layer\d\.\d)\.norm([34])\.(\w+)$")


def torchvision_key(key: str) -> str:
    """The name in torchvision's RAFT of a tensor of princeton-vl's RAFT (without ``module.``)."""
    for pattern, replacement in _PRINCETON_RULES:
        key = re.sub(pattern, replacement, key)
    return key


def convert_raft_state(state: dict[str, torch.Tensor], source: str = "RAFT weights") -> dict[str, torch.Tensor]:
    """Weights of RAFT under torchvision's names, from torchvision's or princeton-vl's, with or without ``module.``.

    Raises:
        CheckpointError: keys of neither format.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("feature_encoder.") for key in state):
        return state
    if not any(key.startswith("fnet.") for key in state):
        raise CheckpointError(
            f"{source}: these are not weights of RAFT. Expected keys of torchvision (feature_encoder…) or of "
            f"princeton-vl (fnet…), got {', '.join(list(state)[:3]) or 'none'}"
        )
    converted = {}
    for key, value in state.items():
        twice = _PRINCETON_TWICE.match(key)
        shortcut = f"{twice[1]}.downsample.1.{twice[3]}" if twice else None
        # In a bottleneck norm3 is a norm of its own; it is a duplicate only where the block has no conv of that number.
        if twice and shortcut in state and f"{twice[1]}.conv{twice[2]}.weight" not in state:
            if not torch.equal(value, state[shortcut]):
                raise CheckpointError(f"{source}: {key} and {shortcut} should be one tensor, but differ")
            continue
        converted[torchvision_key(key)] = value
    return converted


def load_raft(method: str = "raft", weights: str | None = None) -> torch.nn.Module:
    """torchvision's ``raft_large`` (method ``raft``) or ``raft_small`` with weights, in evaluation mode, on the CPU.

    Args:
        weights: a file (.pth, .safetensors), or a name of torchvision's own weights, which are downloaded once; None is
            ``C_T_V1``.

    Raises:
        UserError: weights that are not there and cannot be downloaded.
        CheckpointError: a file that is not exactly this network.
    """
    from torchvision.models import optical_flow

    small = method == "raft_small"
    build = optical_flow.raft_small if small else optical_flow.raft_large
    known = optical_flow.Raft_Small_Weights if small else optical_flow.Raft_Large_Weights
    model = build(weights=None)

    source = weights or DEFAULT_WEIGHTS
    if Path(source).is_file():
        state = convert_raft_state(read_state(source), source)
        is_small = not any(key.startswith("mask_predictor.") for key in state)
        if is_small != small:
            there = "raft_small" if is_small else "raft"
            raise CheckpointError(f"{source}: holds the weights of {there}, not of {method}: add --flow_method {there}")
    elif source in known.__members__:
        try:
            state = known[source].get_state_dict(progress=True, check_hash=True)
        except (OSError, HTTPException, RuntimeError) as error:
            raise UserError(
                f"the weights of {method} could not be downloaded from {known[source].url} ({error}). Either download "
                "that file elsewhere and give it by --flow_weights FILE (princeton-vl's raft-things.pth or "
                "raft-small.pth do as well), or choose --flow_method dis, which needs none"
            ) from error
    else:
        raise UserError(
            f"--flow_weights {source}: no such file, and none of torchvision's weights of {method} "
            f"({', '.join(known.__members__)}). --flow_method dis needs no weights"
        )
    # A counter that only training reads; files of old PyTorch lack it.
    counters = {key: count for key, count in model.state_dict().items() if key.endswith("num_batches_tracked")}
    load_state(model, {**counters, **state}, source, f"torchvision's {method}")
    return model.eval()
