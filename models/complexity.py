"""Parameters and multiply-accumulates per frame: ``python -m models.complexity``.

Counted are convolutions, linear layers and matrix products (attention and Co-DGA's edges included), of everything: both
backbones, propagation, refinement, fusion and decoder, without the auxiliary heads. Left out, as is usual: norms,
activations, softmax, interpolation, additions. A multiply-accumulate (MAC) is one multiplication and one addition.

The Transformer attends to all frames of its window, so a frame costs the more the longer its clip is, up to the window.
Beyond it windows overlap by a quarter; the default length shows what a frame of a long video costs.

The network runs on the meta device, on which shapes are computed and numbers are not: any size is counted in seconds
and without memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.dbsnet import build_dbsnet
from models.mobilevit import FLAVOURS, VARIANTS

# What the network was designed to stay below: at 384x640, per frame, both streams. (MACs, parameters)
BUDGET_SIZE = (384, 640)
BUDGETS = {"s": (40e9, 16e6), "xxs": (9e9, 4e6)}
BUDGET_CLIP = 48  # frames: a video of several windows


def count_parameters(net: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)


def count_macs(call: Callable[[], Any]) -> int:
    """Multiply-accumulates of convolutions and matrix products in one call.

    Attention is made to run as plain matrix products: the counter has no formula for every fused kernel (none for the
    CPU's), and would pass it over in silence. Not in inference mode, where the counter of PyTorch 2.4 sees layers whole
    and counts nothing.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2  # the counter counts the multiplication and the addition


def macs_per_frame(size: tuple[int, int] = BUDGET_SIZE, clip_len: int = BUDGET_CLIP, **config: Any) -> tuple[int, int]:
    """Multiply-accumulates per frame at (H, W) and parameters of the network that `build_dbsnet(**config)` gives.

    Args:
        size: height and width in pixels.
        clip_len: frames of the clip.
    """
    with torch.device("meta"):
        net = build_dbsnet(**config).eval()
        frames = torch.empty(1, clip_len, 3, *size)
        macs = count_macs(lambda: net(frames, frames))
    return macs // clip_len, count_parameters(net)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Parameters and multiply-accumulates per frame of DBSNet.")
    parser.add_argument("--size", type=int, nargs=2, default=BUDGET_SIZE, metavar=("H", "W"))
    parser.add_argument("--clip_len", type=int, default=BUDGET_CLIP, help=f"frames of a clip (default: {BUDGET_CLIP})")
    parser.add_argument("--flavour", choices=FLAVOURS, default="reference")
    args = parser.parse_args(arguments)
    height, width = args.size
    if min(height, width, args.clip_len) < 1:
        parser.error(f"expected a size and a clip_len above 0, got {height} {width} and {args.clip_len}")
    print(f"DBSNet ({args.flavour}), {height}x{width}, per frame of a clip of {args.clip_len}, both streams")
    print(f"{'variant':<9}{'parameters':>12}{'GMAC':>8}  budget")
    for variant in VARIANTS:
        macs, parameters = macs_per_frame((height, width), args.clip_len, variant=variant, flavour=args.flavour)
        budget = ""
        if variant in BUDGETS and (height, width) == BUDGET_SIZE and args.clip_len == BUDGET_CLIP:
            most_macs, most_parameters = BUDGETS[variant]
            kept = macs <= most_macs and parameters <= most_parameters
            budget = f"<= {most_parameters / 1e6:g} M, <= {most_macs / 1e9:g} GMAC: {'kept' if kept else 'EXCEEDED'}"
        print(f"{variant:<9}{parameters / 1e6:>10.2f} M{macs / 1e9:>8.2f}  {budget}")


if __name__ == "__main__":
    main()
