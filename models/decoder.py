"""Decoder: fused maps at strides 32, 16, 8 and a skip at stride 4 to one logit, by x2 upsampling and adding."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.mobilevit import ConvNormAct


class Decoder(nn.Module):
    """Top-down path: upsample x2, add the next finer map, 3x3 convolution; one logit at stride 4.

    The auxiliary heads (one 1x1 convolution per level) give logits of the path at strides 8, 16, 32, in training only.

    Args:
        channels: width of every map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConvNormAct(channels, channels, 3) for _ in range(4))  # strides 32, 16, 8, 4
        self.head = nn.Conv2d(channels, 1, 1)
        self.aux_heads = nn.ModuleList(nn.Conv2d(channels, 1, 1) for _ in range(3))  # strides 8, 16, 32

    def forward(self, levels: list[Tensor], skip: Tensor) -> list[Tensor]:
        """Maps (N, C, h, w) at strides 8, 16, 32 and at 4 -> those of the path at strides 32, 16, 8, 4."""
        x, path = None, []
        for block, level in zip(self.blocks, [*levels[::-1], skip]):
            if x is not None:
                level = level + F.interpolate(x, size=level.shape[-2:], mode="bilinear", align_corners=False)
            x = block(level)
            path.append(x)
        return path

    def read(self, path: list[Tensor], *, return_aux: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Maps of the path -> logits (N, 1, H/4, W/4) and the auxiliary ones, finest first."""
        aux = [head(y) for head, y in zip(self.aux_heads, path[2::-1])] if return_aux else []
        return self.head(path[-1]), aux
