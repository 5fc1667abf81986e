"""Batch norm folded into the convolutions before it: fewer passes over memory in inference, the same function.

In evaluation mode a batch norm is ``y = g * (x - m) / sqrt(v + e) + b`` per channel, so a convolution before it takes
the factor into its weight and the rest into a bias.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from models.mobilevit import ConvNormAct
from models.timm_encoder import TimmEncoder


@torch.no_grad()
def fold_batch_norm(net: nn.Module) -> nn.Module:
    """A copy of `net` for inference, in evaluation mode, without batch norms; `net` is left as it is.

    The copy gives what ``net.eval()`` gives, up to rounding. Its activations work in place and its parameters take no
    gradient, and its state dict has other keys (``conv.bias`` in place of ``norm.*``): not for training or saving.

    An encoder of timm stays as it is. Raises ValueError for any other batch norm that does not follow a convolution
    inside a `ConvNormAct`.
    """
    folded = copy.deepcopy(net).eval().requires_grad_(False)
    for module in folded.modules():
        if not isinstance(module, ConvNormAct):
            continue
        conv, norm = module.conv, module.norm
        if norm is not None:
            # In double precision, so that only the folded weight is rounded.
            factor = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
            weight = conv.weight.double() * factor[:, None, None, None]  # (C_out, C_in/groups, k, k)
            bias = norm.bias.double() - norm.running_mean.double() * factor
            if conv.bias is not None:
                bias = bias + conv.bias.double() * factor
            # Keeps the weight's memory format, channels-last or not.
            conv.weight.copy_(weight)
            conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
            module.norm = None
        if module.act is not None:
            module.act = nn.SiLU(inplace=True)
    foreign = tuple(f"{name}." for name, module in folded.named_modules() if isinstance(module, TimmEncoder))
    left = [
        name
        for name, module in folded.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not name.startswith(foreign)
    ]
    if left:
        raise ValueError(f"cannot fold batch norms that stand alone: {', '.join(left)}")
    return folded
