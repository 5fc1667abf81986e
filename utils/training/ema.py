"""A running average of a network's weights, which usually tests better than the weights themselves."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Net = TypeVar("Net", bound=nn.Module)


class WeightAverage(Generic[Net]):
    """Exponential moving average of all floating-point parameters and buffers; whole numbers are copied.

    ``net`` is the averaged network, in evaluation mode and without gradients. Early on the decay is smaller,
    ``(1 + step) / (10 + step)``, so that the random start is forgotten quickly.
    """

    def __init__(self, net: Net, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"expected a decay between 0 and 1, got {decay}")
        self.decay = decay
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self._own = list(self.net.state_dict().values())

    @torch.no_grad()
    def update(self, net: Net, step: int) -> None:
        """Takes in the weights of ``net`` after optimiser step number ``step`` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, values = [], []
        for own, value in zip(self._own, net.state_dict().values()):
            if own.is_floating_point():
                averages.append(own)
                values.append(value)
            else:
                own.copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)  # one kernel for all, not one for each of many small tensors
