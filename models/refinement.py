"""Spatio-temporal Transformer: refines each stream with long-range dependencies among all frames.

The abstract says no more than that. Our reading: pre-norm self-attention over all T*h*w tokens of a level, at strides
16 and 32, per stream; positions come from a depth-wise convolution inside each frame and a sinusoid over time, so
neither size nor length is baked in. For long videos the attention is over a window of frames.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.windows import refinement_windows


def time_encoding(length: int, dim: int, like: Tensor) -> Tensor:
    """Sinusoid over time, centred on the clip, so that clips of any length share their middle: (T, dim)."""
    # A recorded graph would not know when a kept one is thrown away. And what is made for tools that only want shapes
    # (FakeTensorMode) has no numbers for whoever computes next.
    # What compiles is asked first: it cannot take in the question about a recording.
    keep = not torch.compiler.is_compiling() and type(like) is Tensor and not _is_recorded(like)
    make = _kept_time_encoding if keep else _time_encoding
    return make(length, dim, like.dtype, like.device)


def _is_recorded(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _time_encoding(length: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device, dtype=torch.float32) - (length - 1) / 2
    frequency = torch.exp(torch.arange(0, dim, 2, device=device, dtype=torch.float32) * (-math.log(1000.0) / dim))
    angle = position[:, None] * frequency  # (T, dim/2)
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :dim].to(dtype)


@lru_cache(maxsize=64)
def _kept_time_encoding(length: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A constant, which each layer would make anew in ten small operations."""
    with torch.inference_mode(False):  # training may want it next
        return _time_encoding(length, dim, dtype, device)


class RefinementLayer(nn.Module):
    """Depth-wise position convolution, attention of every token to the whole clip, MLP; all residual.

    With `pool` n, keys and values are means over n x n positions of a frame: what is far is looked at coarsely, at an
    n²-th of the attention's cost.
    """

    def __init__(self, dim: int, *, heads: int, mlp_ratio: int, pool: int = 1) -> None:
        super().__init__()
        self.heads, self.pool = heads, pool
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C, H, W) -> (B, T, C, H, W)
        b, t, c, h, w = x.shape
        x = x + self.position(x.flatten(0, 1)).view_as(x)
        tokens = x.permute(0, 1, 3, 4, 2).reshape(b, t * h * w, c)  # (B, T, C, H, W) -> (B, T*H*W, C)
        # (T, C) over the H*W of a frame
        y = self.norm1(tokens).view(b, t, h * w, c) + time_encoding(t, c, tokens)[:, None]
        q, k, v = (
            self._heads(part, (h, w), pool) for part, pool in zip(self.qkv(y).split(c, -1), (1, *2 * [self.pool]))
        )
        # (B, heads, T*H*W, C/heads) -> (B, T*H*W, C)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t * h * w, c)
        tokens = tokens + self.out(y)
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens.view(b, t, h, w, c).permute(0, 1, 4, 2, 3).contiguous()  # (B, T*H*W, C) -> (B, T, C, H, W)

    def _heads(self, x: Tensor, size: tuple[int, int], pool: int) -> Tensor:
        """Queries, keys or values (B, T, H*W, C), pooled in each frame -> (B, heads, T*H'*W', C/heads)."""
        b, t, _, c = x.shape
        if pool > 1:
            maps = x.reshape(b * t, *size, c).permute(0, 3, 1, 2)  # (B, T, H*W, C) -> (B*T, C, H, W)
            x = F.avg_pool2d(maps, pool, ceil_mode=True).flatten(2).transpose(1, 2)  # -> (B*T, H'*W', C)
        return x.reshape(b, -1, self.heads, c // self.heads).transpose(1, 2)


class SpatioTemporalTransformer(nn.Module):
    """`depth` refinement layers for one stream at one level, `pool` as in the layers; the identity for depth 0.

    Input and output: (B, T, C, H, W), any T >= 1. Longer clips than `window` are refined in overlapping windows.
    """

    def __init__(
        self, dim: int, *, depth: int = 2, heads: int = 4, mlp_ratio: int = 2, window: int = 8, pool: int = 1
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"the feature width must be a multiple of the number of heads, got {dim} and {heads}")
        self.window = window
        self.layers = nn.Sequential(
            *(RefinementLayer(dim, heads=heads, mlp_ratio=mlp_ratio, pool=pool) for _ in range(depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.layers:
            return x
        kept = [
            self.layers(x[:, start:stop])[:, keep - start : until - start]
            for start, stop, keep, until in refinement_windows(x.shape[1], self.window)
        ]
        return kept[0] if len(kept) == 1 else torch.cat(kept, 1)
