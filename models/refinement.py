"""Spatio-temporal Transformer: refines each stream with long-range dependencies among all frames.

The abstract says no more than that. Our reading: pre-norm self-attention over all T*h*w tokens of a level, at strides
16 and 32, per stream; positions come from a depth-wise convolution inside each frame and a sinusoid over time, so
neither size nor length is baked in. For long videos the attention is over a window of frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def temporal_windows(length: int, window: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a video into overlapping windows: yields (start, stop, keep_start, keep_stop).

    Frames start..stop-1 attend to each other and keep_start..keep_stop-1 of the result are kept: the middle half, so
    that every kept frame sees at least a quarter of the window on each side, except at the ends of the video. A video
    of at most `window` frames is one window.
    """
    if length <= window:
        yield 0, length, 0, length
        return
    margin = window // 4
    step = window - 2 * margin
    keep = 0
    while keep < length:
        start = max(0, min(keep - margin, length - window))
        stop = start + window
        until = length if stop >= length else min(max(keep + step, stop - margin), length)
        yield start, stop, keep, until
        keep = until


def time_encoding(length: int, dim: int, like: Tensor) -> Tensor:
    """Sinusoid over time, centred on the clip, so that clips of any length share their middle: (T, dim)."""
    position = torch.arange(length, device=like.device, dtype=torch.float32) - (length - 1) / 2
    frequency = torch.exp(torch.arange(0, dim, 2, device=like.device, dtype=torch.float32) * (-math.log(1000.0) / dim))
    angle = position[:, None] * frequency  # (T, dim/2)
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :dim].to(like.dtype)


class RefinementLayer(nn.Module):
    """Depth-wise position convolution, self-attention over all tokens of the clip, MLP; all residual."""

    def __init__(self, dim: int, *, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
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
        qkv = self.qkv(y).view(b, t * h * w, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T*H*W, C/heads)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t * h * w, c)
        tokens = tokens + self.out(y)
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens.view(b, t, h, w, c).permute(0, 1, 4, 2, 3).contiguous()  # (B, T*H*W, C) -> (B, T, C, H, W)


class SpatioTemporalTransformer(nn.Module):
    """`depth` refinement layers for one stream at one level; the identity for depth 0.

    Input and output: (B, T, C, H, W), any T >= 1. Longer clips than `window` are refined in overlapping windows.
    """

    def __init__(self, dim: int, *, depth: int = 2, heads: int = 4, mlp_ratio: int = 2, window: int = 8) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"the feature width must be a multiple of the number of heads, got {dim} and {heads}")
        self.window = window
        self.layers = nn.Sequential(*(RefinementLayer(dim, heads=heads, mlp_ratio=mlp_ratio) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        if not self.layers:
            return x
        kept = [
            self.layers(x[:, start:stop])[:, keep - start : until - start]
            for start, stop, keep, until in temporal_windows(x.shape[1], self.window)
        ]
        return kept[0] if len(kept) == 1 else torch.cat(kept, 1)
