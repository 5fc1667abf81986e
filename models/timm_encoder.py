"""An encoder of timm in the place of MobileViT. Not of the paper.

Where ImageNet-trained MobileViT weights are not at hand, those of some other network may be, and such a start is worth
more than the kind of encoder: the default weights have an EfficientNet-Lite2 for appearance (MODEL_CARD.md). A network
with such encoders can also teach one with MobileViT (`main.py --teacher`).
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from models.state_dicts import load_state, read_state


class TimmEncoder(nn.Module):
    """Any convolutional network of timm with maps at strides 4, 8, 16, 32, called as `models.mobilevit.MobileViT` is.

    Args:
        name: timm's, for instance ``tf_efficientnet_lite0``.

    Input: (B, 3, H, W) RGB in [0, 1], H and W multiples of 32. Attributes as `MobileViT` has them; `mean` and `std` are
    those that timm says the network's weights were trained with.

    Raises ValueError where timm does not know the name, or the network has other strides or takes pictures of one size
    alone; ModuleNotFoundError where timm is not installed.
    """

    reductions = (4, 8, 16, 32)
    multiple = 32
    mean: Tensor  # a buffer, like the next
    std: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        import timm

        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name.split('_')[-1]}*")[:5])
            raise ValueError(f"timm has no network {name!r}" + (f"; it has {near}" if near else ""))
        try:
            try:
                self.net = timm.create_model(name, pretrained=False, features_only=True, out_indices=(1, 2, 3, 4))
            except (IndexError, AssertionError):  # four stages, the first at stride 4 already (ConvNeXt)
                self.net = timm.create_model(name, pretrained=False, features_only=True, out_indices=(0, 1, 2, 3))
            info = self.net.feature_info
            strides = tuple(info.reduction())  # where older versions of timm find out that a stage is missing
        except (RuntimeError, ValueError, AttributeError, IndexError, AssertionError) as error:
            raise ValueError(f"timm's {name} cannot be an encoder: {error}") from None
        if strides != self.reductions:
            raise ValueError(f"timm's {name} has maps at strides {strides}, expected {self.reductions}")
        self.name, self.channels = name, tuple(info.channels())
        self._try()
        given = timm.get_pretrained_cfg(name)
        mean, std = (given.mean, given.std) if given else ((0.5,) * 3, (0.5,) * 3)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def _try(self) -> None:
        """Raises ValueError for a network that takes one size of picture alone, or whose maps are not what it says."""
        height, width = 96, 160  # multiples of 32 and of no more
        try:
            with torch.no_grad():
                maps = self.net.eval()(torch.zeros(1, 3, height, width))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ValueError(f"timm's {self.name} cannot be an encoder of any size of picture: {error}") from None
        self.net.train()
        shapes = [tuple(y.shape[1:]) for y in maps]
        expected = [(c, height // stride, width // stride) for c, stride in zip(self.channels, self.reductions)]
        if shapes != expected:
            raise ValueError(f"timm's {self.name} cannot be an encoder: its maps are {shapes}, expected {expected}")

    def parameters_to(self, stride: int) -> list[nn.Parameter]:
        """Those that train, of what the maps at this stride (4, 8, 16 or 32) and finer ones are made by."""
        training, parameters = self.net.training, [x for x in self.net.parameters() if x.requires_grad]
        with torch.enable_grad():
            maps = self.net.eval()(self.mean.new_zeros(1, 3, 128, 192))[: self.reductions.index(stride) + 1]
            total = sum(x.sum() for x in maps)
        self.net.train(training)
        if not total.requires_grad:  # what they are made by is frozen already
            return []
        made_by = torch.autograd.grad(total, parameters, allow_unused=True)
        return [parameter for parameter, gradient in zip(parameters, made_by) if gradient is not None]

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.net((x - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1))


def load_timm(encoder: TimmEncoder, path: str | Path) -> None:
    """Fill an encoder from a checkpoint with timm's keys, or an EfficientNet's with the keys of ``_blocks.0``….

    The encoder must find every tensor; what a classifier has beyond its last stage is dropped, and what another network
    has within the stages is refused. Raises CheckpointError.
    """
    state = read_state(path)
    ours = encoder.net.state_dict()
    if "_conv_stem.weight" in state:
        state = _efficientnet_keys(state, ours)
    parts = {key.split(".")[0] for key in ours}
    given = {}
    for key, tensor in state.items():
        # What is in ``stages.0`` of the whole network is in ``stages_0`` where timm takes maps from a list of parts.
        names = (key, key.replace(".", "_", 1))
        name = next((name for name in names if name in ours), None)
        if name is not None or any(name.split(".")[0] in parts for name in names):  # or a block of a deeper network
            given[name or key] = tensor
    # Counters of batches are of no use here, and old files have none.
    given.update({key: tensor for key, tensor in ours.items() if key.endswith("num_batches_tracked")})
    load_state(encoder.net, given, path, f"timm's {encoder.name}")


def _efficientnet_keys(state: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's keys for those of EfficientNet checkpoints that number their blocks through (facts: both key lists)."""
    places = sorted({tuple(map(int, m.groups())) for key in ours if (m := re.match(r"blocks\.(\d+)\.(\d+)\.", key))})
    expanded = {key.split(".")[1] for key in state if "._expand_conv." in key}
    stem = {"_conv_stem": "conv_stem", "_bn0": "bn1"}
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    full = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
            "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
    renamed = {}
    for key, tensor in state.items():
        parts = key.split(".")
        if parts[0] in stem:
            renamed[f"{stem[parts[0]]}.{parts[1]}"] = tensor
        elif parts[0] == "_blocks" and int(parts[1]) >= len(places):
            renamed[f"blocks.{key}"] = tensor  # of a deeper network
        elif parts[0] == "_blocks":
            stage, block = places[int(parts[1])]
            names = full if parts[1] in expanded else plain
            renamed[f"blocks.{stage}.{block}.{names.get(parts[2], parts[2])}.{parts[3]}"] = tensor
    return renamed
