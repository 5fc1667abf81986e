"""Batch norm folded into the convolutions before it: fewer passes over memory in inference, the same function.

In evaluation mode a batch norm is ``y = g * (x - m) / sqrt(v + e) + b`` per channel, so a convolution before it takes
the factor into its weight and the rest into a bias.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.dbsnet import DBSNet
from models.mobilevit import ConvNormAct
from models.timm_encoder import TimmEncoder

Net = TypeVar("Net", bound=nn.Module)


@torch.no_grad()
def fold_batch_norm(net: Net) -> Net:
    """A copy of `net` for inference, in evaluation mode, without batch norms; `net` is left as it is.

    The copy gives what ``net.eval()`` gives, up to rounding. Its activations work in place and its parameters take no
    gradient, and its state dict has other keys (``conv.bias`` in place of ``norm.*``): not for training or saving.

    In an encoder of timm, a batch norm that is not the only reader of one convolution, or has no weights or statistics
    of its own, stays as it is. Raises ValueError for any other batch norm that does not follow a convolution inside a
    `ConvNormAct`.
    """
    folded = copy.deepcopy(net).eval().requires_grad_(False)
    foreign = {name: module for name, module in folded.named_modules() if isinstance(module, TimmEncoder)}
    for encoder in foreign.values():
        _fold_timm(encoder)
    for module in folded.modules():
        if not isinstance(module, ConvNormAct):
            continue
        if module.norm is not None:
            _fold_pair(module.conv, module.norm)
            module.norm = None
        if module.act is not None:
            module.act = nn.SiLU(inplace=True)
    inside = tuple(f"{name}." for name in foreign)
    left = [
        name
        for name, module in folded.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not name.startswith(inside)
    ]
    if left:
        raise ValueError(f"cannot fold batch norms that stand alone: {', '.join(left)}")
    return folded


def inference_copy(
    net: DBSNet, amp: torch.dtype | None = None, memory_format: torch.memory_format = torch.channels_last
) -> DBSNet:
    """A `DBSNet` as it is fastest: folded, encoders in `memory_format`, for autocast to `amp` its weights rounded once.

    What `models.predictor.Predictor` runs, and what the benchmark times.
    """
    folded = fold_batch_norm(net)
    folded.encoders.to(memory_format=memory_format)
    if amp is not None:
        lower_weights(folded, amp)
    return folded


def lower_weights(net: nn.Module, dtype: torch.dtype) -> None:
    """Rounds the weights of convolutions and linear layers, in place, as autocast to `dtype` would in each call.

    The same results, but for timm's convolutions that standardise their weights, which are rounded before that. And no
    copy of every weight in every call: autocast keeps copies of weights that learn alone, and those copies were a sixth
    of all that a GPU was asked to do (S, a video at 384×640).
    """
    for module in net.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            module.to(dtype)


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a batch norm in evaluation mode multiplies by and then adds, per channel: each (C,), in double precision."""
    factor = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return factor, norm.bias.double() - norm.running_mean.double() * factor


def _fold_pair(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Gives the convolution the batch norm's part."""
    # In double precision, so that only the folded weight is rounded.
    factor, bias = affine(norm)
    weight = conv.weight.double() * factor[:, None, None, None]  # (C_out, C_in/groups, k, k)
    if conv.bias is not None:
        bias = bias + conv.bias.double() * factor
    # Keeps the weight's memory format, channels-last or not.
    conv.weight.copy_(weight)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)


def _fold_timm(encoder: TimmEncoder) -> None:
    """Folds each batch norm that reads the very tensor which a convolution made, and leaves its activation, if any.

    Which those are is seen while the encoder runs on a small picture, since timm's blocks go by many names. Another
    module that reads the convolution's output would see it changed, so where there is one nothing is folded.
    """
    # The tensors are kept, so that no other gets their number, and how often they had been written to.
    made: dict[int, tuple[nn.Conv2d, torch.Tensor, int]] = {}
    pairs: dict[nn.BatchNorm2d, nn.Conv2d | None] = {}
    readers: dict[nn.Conv2d, int] = {}

    def watch(module: nn.Module, inputs: tuple, output: object) -> None:
        conv, tensor, version = made.get(id(inputs[0]), (None, None, 0)) if inputs else (None, None, 0)
        if conv is not None:
            readers[conv] = readers.get(conv, 0) + 1
        if isinstance(module, nn.BatchNorm2d):
            changed = tensor is not None and tensor._version != version
            pairs[module] = conv if module not in pairs and not changed else None
        elif isinstance(module, nn.Conv2d) and isinstance(output, torch.Tensor):
            made[id(output)] = module, output, output._version

    leaves = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d) or not any(True for _ in m.children())]
    hooks = [module.register_forward_hook(watch) for module in leaves]
    weight = next(encoder.parameters())
    with torch.inference_mode(False), torch.no_grad():  # inference mode does not count writing
        encoder(torch.zeros(1, 3, 64, 64, device=weight.device, dtype=weight.dtype))
    for hook in hooks:
        hook.remove()
    names = {module: name for name, module in encoder.named_modules()}
    for norm, conv in pairs.items():
        if conv is None or readers[conv] != 1 or not norm.affine or norm.running_mean is None:
            continue
        _fold_pair(conv, norm)
        parent, _, name = names[norm].rpartition(".")
        setattr(encoder.get_submodule(parent), name, getattr(norm, "act", nn.Identity()))
