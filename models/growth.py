"""Give a trained network the parts it was built without, so that a stage can train encoders and decoder alone first.

Not of the paper, as far as the public record goes. Single frames have nothing that propagation or refinement could
learn from, and a step of the smallest network without them takes about two thirds of the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models.convlstm import DenseBiConvLSTM
from models.dbsnet import DBSNet, build_dbsnet
from models.refinement import RefinementLayer
from models.weights import describe_mismatch

PARTS = {"dilations": "propagation", "depth": "refinement", "rounds": "fusion"}
"""Options of `DBSNet` that are empty (0 or no dilations) where a part is absent, and the module each is about."""


def is_growth(before: Any, after: Any) -> bool:
    """Whether the value of an option in `PARTS` goes from absent to present."""
    return not before and bool(after)


def grow(net: DBSNet, **parts: Any) -> DBSNet:
    """A network with the weights of `net` and the parts that it lacks, which start as the identity.

    Every residual branch of a new part ends in weights of zero, so the grown network gives what `net` gives, and
    learns from there.

    Args:
        parts: ``dilations``, ``depth`` or ``rounds``, as in `DBSNet`; `net` must have none of that part yet.

    Raises:
        ValueError: an option that is no part, or a part that `net` has already.
    """
    for key, value in parts.items():
        if key not in PARTS:
            raise ValueError(f"{key} is no part that a network can be given later; those are {', '.join(PARTS)}")
        if not is_growth(net.config[key], value):
            raise ValueError(f"{key}: the network has {net.config[key]} already and cannot be given {value}")
    grown = build_dbsnet(**{**net.config, **parts})
    for module in grown.modules():
        if isinstance(module, DenseBiConvLSTM) and "dilations" in parts:
            _zero(module.proj)
        elif isinstance(module, RefinementLayer) and "depth" in parts:
            for last in (module.position, module.out, module.mlp[-1]):
                _zero(last)
        # Co-DGA's messages begin with a scale of zero in any case.
    state, old = grown.state_dict(), net.state_dict()
    # Strict but for the new parts: each tensor of the old network has its place, and no other place stays unfilled.
    new = {key for key in state if key not in old and key.startswith(tuple(PARTS[part] for part in parts))}
    problem = describe_mismatch(
        {key: value.shape for key, value in state.items() if key not in new},
        {key: value.shape for key, value in old.items()},
    )
    if problem:
        raise ValueError(f"the weights do not fit the grown network: {problem}")
    grown.load_state_dict({**state, **old})
    return grown.train(net.training)


@torch.no_grad()
def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.zero_()
