"""MobileViT, the backbone of both streams.

`MobileViT: Light-weight, General-purpose, and Mobile-friendly Vision Transformer
<https://arxiv.org/abs/2110.02178>`_ (ICLR 2022), in two flavours, because neither's weights mean anything in the other:

* ``reference``: the paper's network, the one of Apple's cvnets and of timm;
* ``wilile``: the re-implementation that DBSNet's README names as its backbone (wilile26811249/MobileViT), with its
  deviations from the paper: no norm or activation in the stem, none after the 1x1 expansion's norm, one attention
  head of width 32 without biases, a wider MLP at strides 16 and 32, no final LayerNorm, and plain convolutions with a
  bias where the paper has convolution, norm and SiLU.

The module knows nothing of checkpoint formats; `models.pretrained` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLAVOURS = ("reference", "wilile")


@dataclass(frozen=True)
class Variant:
    """The widths of one published size (paper, Table 4)."""

    stem: int  # channels at stride 2, after the stem
    stages: tuple[int, int, int, int, int]  # channels at strides 2, 4, 8, 16, 32
    tokens: tuple[int, int, int]  # width of the transformers at strides 8, 16, 32
    expansion: int  # of the inverted residuals
    final: int  # channels of the last 1x1 convolution, at stride 32


DEPTHS = (2, 4, 3)  # transformer layers at strides 8, 16, 32, the same in every size

VARIANTS = {
    "s": Variant(16, (32, 64, 96, 128, 160), (144, 192, 240), 4, 640),
    "xs": Variant(16, (32, 48, 64, 80, 96), (96, 120, 144), 4, 384),
    "xxs": Variant(16, (16, 24, 48, 64, 80), (64, 80, 96), 2, 320),
}


class ConvNormAct(nn.Module):
    """Convolution, batch norm, SiLU; the norm (the convolution then has a bias) and the activation can be left out."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, *, stride: int = 1, groups: int = 1, norm: bool = True,
                 act: bool = True) -> None:  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=not norm)
        self.norm = nn.BatchNorm2d(c_out) if norm else None
        self.act = nn.SiLU() if act else None

    def forward(self, x: Tensor) -> Tensor:  # (B, C_in, H, W) -> (B, C_out, H/stride, W/stride)
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.act is None else self.act(x)


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand 1x1, depth-wise 3x3, project 1x1; residual where the shape stays."""

    def __init__(self, c_in: int, c_out: int, *, stride: int, expansion: int, expand_act: bool) -> None:
        super().__init__()
        hidden = c_in * expansion  # a multiple of 8 in every published size, so make_divisible changes nothing
        self.expand = ConvNormAct(c_in, hidden, act=expand_act)
        self.depthwise = ConvNormAct(hidden, hidden, 3, stride=stride, groups=hidden)
        self.project = ConvNormAct(hidden, c_out, act=False)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class Attention(nn.Module):
    """Multi-head self-attention over the patches, one fused projection to queries, keys and values in that order."""

    def __init__(self, dim: int, *, heads: int, head_dim: int, scale: float, bias: bool) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=bias)
        self.out = nn.Linear(heads * head_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C) -> (B, N, C)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # 3 of (B, heads, N, head_dim)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.out(y.transpose(1, 2).reshape(b, n, -1))  # (B, heads, N, head_dim) -> (B, N, heads * head_dim)


class TransformerLayer(nn.Module):
    """Pre-norm encoder layer: attention, then a two-layer MLP with SiLU."""

    def __init__(self, dim: int, *, heads: int, head_dim: int, scale: float, bias: bool, mlp_ratio: int,
                 dropout: float) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads=heads, head_dim=head_dim, scale=scale, bias=bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.SiLU(), nn.Linear(mlp_ratio * dim, dim))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class MobileViTBlock(nn.Module):
    """Local representation, transformer across 2x2 patches, fusion with the input (paper, section 3.1).

    Attention runs across patches separately for each of the 4 positions inside a patch. Maps of odd height or width are
    resized to the next even size around the transformer, as cvnets and timm do; on even sizes that changes nothing.
    """

    def __init__(self, channels: int, dim: int, *, depth: int, flavour: str, mlp_ratio: int, dropout: float) -> None:
        super().__init__()
        reference = flavour == "reference"
        heads, head_dim = (4, dim // 4) if reference else (1, 32)
        scale = (head_dim if reference else dim) ** -0.5
        self.local = ConvNormAct(channels, channels, 3)
        self.embed = nn.Conv2d(channels, dim, 1, bias=False) if reference else ConvNormAct(channels, dim)
        self.layers = nn.Sequential(
            *(
                TransformerLayer(
                    dim,
                    heads=heads,
                    head_dim=head_dim,
                    scale=scale,
                    bias=reference,
                    mlp_ratio=mlp_ratio,
                    dropout=dropout,
                )  # fmt: skip
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(dim) if reference else nn.Identity()
        self.project = ConvNormAct(dim, channels, norm=reference, act=reference)
        self.fuse = ConvNormAct(2 * channels, channels, 3, norm=reference, act=reference)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        y = self.embed(self.local(x))
        b, d, h, w = y.shape
        even = (h + h % 2, w + w % 2)
        if even != (h, w):
            y = F.interpolate(y, size=even, mode="bilinear", align_corners=False)
        rows, columns = even[0] // 2, even[1] // 2
        # (B, d, H, W) -> (B, d, rows, 2, columns, 2) -> (B, 2, 2, rows, columns, d) -> (B*4, N, d)
        y = y.reshape(b, d, rows, 2, columns, 2).permute(0, 3, 5, 2, 4, 1).reshape(b * 4, rows * columns, d)
        y = self.norm(self.layers(y))
        # (B*4, N, d) -> (B, 2, 2, rows, columns, d) -> (B, d, rows, 2, columns, 2) -> (B, d, H, W)
        y = y.view(b, 2, 2, rows, columns, d).permute(0, 5, 3, 1, 4, 2).reshape(b, d, *even)
        if even != (h, w):
            y = F.interpolate(y, size=(h, w), mode="bilinear", align_corners=False)
        return self.fuse(torch.cat([x, self.project(y)], 1))  # (B, 2C, H, W) -> (B, C, H, W)


class MobileViT(nn.Module):
    """MobileViT without its classifier: RGB in [0, 1] to maps at strides 4, 8, 16, 32.

    Args:
        variant: ``s``, ``xs`` or ``xxs``.
        flavour: ``reference`` or ``wilile`` (see the module's docstring).
        dropout: after attention and MLP in training; 0 by default, as timm; the paper's ImageNet recipe has 0.1. (The
            code of wilile drops within the MLP, too, after its first layer. Without training the two are alike.)

    Attributes:
        channels: channels of the four maps, e.g. ``(64, 96, 128, 640)`` for S.
        reductions: their strides, ``(4, 8, 16, 32)``.
        mean, std: buffers of shape (3,); the normalisation that the weights were trained with, kept with them. The
            input is ``(rgb - mean) / std``. Both published channel orders become RGB when a checkpoint is loaded.

    Input: (B, 3, H, W); H and W multiples of 32 (``wilile``: 64). Raises ValueError otherwise.
    """

    reductions = (4, 8, 16, 32)
    mean: Tensor  # a buffer, like the next
    std: Tensor

    def __init__(self, variant: str = "s", flavour: str = "reference", *, dropout: float = 0.0) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"unknown MobileViT variant {variant!r}: expected one of {', '.join(VARIANTS)}")
        if flavour not in FLAVOURS:
            raise ValueError(f"unknown MobileViT flavour {flavour!r}: expected one of {', '.join(FLAVOURS)}")
        self.variant, self.flavour = variant, flavour
        v, reference = VARIANTS[variant], flavour == "reference"
        self.multiple = 32 if reference else 64
        self.channels = (v.stages[1], v.stages[2], v.stages[3], v.final)

        def residual(c_in: int, c_out: int, stride: int) -> InvertedResidual:
            return InvertedResidual(c_in, c_out, stride=stride, expansion=v.expansion, expand_act=reference)

        def stage(level: int) -> nn.Sequential:  # levels 0, 1, 2 at strides 8, 16, 32
            block = MobileViTBlock(
                v.stages[2 + level], v.tokens[level], depth=DEPTHS[level], flavour=flavour,
                mlp_ratio=2 if reference or level == 0 else 4, dropout=dropout,
            )  # fmt: skip
            return nn.Sequential(residual(v.stages[1 + level], v.stages[2 + level], 2), block)

        self.stem = ConvNormAct(3, v.stem, 3, stride=2, norm=reference, act=reference)
        self.stages = nn.ModuleList(
            [
                nn.Sequential(residual(v.stem, v.stages[0], 1)),
                nn.Sequential(
                    residual(v.stages[0], v.stages[1], 2),
                    residual(v.stages[1], v.stages[1], 1),
                    residual(v.stages[1], v.stages[1], 1),
                ),
                stage(0),
                stage(1),
                stage(2),
            ]
        )  # fmt: skip
        self.final = ConvNormAct(v.stages[4], v.final, norm=reference, act=reference)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))
        if not reference:  # what the wilile weights were trained with; a from-scratch network keeps it too
            self.set_normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def set_normalisation(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Set the RGB mean and standard deviation, in units of the [0, 1] input."""
        self.mean.copy_(torch.tensor(mean))
        self.std.copy_(torch.tensor(std))

    def parameters_to(self, stride: int) -> Iterator[nn.Parameter]:
        """Those of the layers at this stride (2, 4, 8, 16 or 32) or a finer one."""
        for layer in (self.stem, *self.stages[: int(math.log2(stride))], *([self.final] if stride == 32 else [])):
            yield from layer.parameters()

    def forward(self, x: Tensor) -> list[Tensor]:
        h, w = x.shape[-2:]
        if h % self.multiple or w % self.multiple:
            padded = tuple(-(-side // self.multiple) * self.multiple for side in (h, w))
            raise ValueError(
                f"MobileViT ({self.flavour}) needs height and width that are multiples of {self.multiple}, "
                f"got {h}x{w}: pad the input to {padded[0]}x{padded[1]}"
            )
        x = self.stem((x - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return [maps[1], maps[2], maps[3], self.final(x)]
