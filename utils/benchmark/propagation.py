"""The dense bi-ConvLSTM against the plain way: one frame, one direction, one stream at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.convlstm import BiConvLSTM, DenseBiConvLSTM
from utils.benchmark.timing import Timing, time_calls


class PlainCell(nn.Module):
    """A ConvLSTM cell as it is commonly written: one convolution of input and hidden state together."""

    def __init__(self, layer: BiConvLSTM, stream: int, direction: int) -> None:
        super().__init__()
        shape = (layer.streams, 2, 4 * layer.hidden)
        weight_in = layer.input_conv.weight.unflatten(0, shape)[stream, direction]  # (S*2*4h, C, 3, 3) -> (4h, C, 3, 3)
        weight_h = layer.recurrent_conv.weight.unflatten(0, shape)[stream, direction]
        self.weight = nn.Parameter(torch.cat([weight_in, weight_h], 1).detach().clone())
        self.bias = nn.Parameter(layer.input_conv.bias.view(shape)[stream, direction].detach().clone())
        self.hidden, self.dilation = layer.hidden, layer.input_conv.dilation

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        gates = F.conv2d(torch.cat([x, hidden], 1), self.weight, self.bias, 1, self.dilation, self.dilation)
        i, f, g, o = gates.chunk(4, 1)  # (B, 4*h, H, W) -> 4 of (B, h, H, W)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell


class PlainPropagation(nn.Module):
    """The function of a `DenseBiConvLSTM`, with its weights, by loops over streams, layers, directions and frames."""

    def __init__(self, dense: DenseBiConvLSTM) -> None:
        super().__init__()
        self.streams, self.channels = dense.streams, dense.channels
        self.cells = nn.ModuleList(
            nn.ModuleList(nn.ModuleList(PlainCell(layer, s, way) for way in (0, 1)) for layer in dense.layers)
            for s in range(dense.streams)
        )
        weights = dense.proj.weight.unflatten(0, (dense.streams, -1))
        biases = dense.proj.bias.view(dense.streams, -1)
        self.weights = nn.ParameterList(weights[s].detach().clone() for s in range(dense.streams))
        self.biases = nn.ParameterList(biases[s].detach().clone() for s in range(dense.streams))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, S*d, H, W) -> the same
        length, streams = x.shape[1], []
        for s, part in enumerate(x.split(self.channels, 2)):
            dense = frames = list(part.unbind(1))
            for pair in self.cells[s]:
                states: list[list[Tensor]] = []
                for cell, order in zip(pair, (range(length), range(length - 1, -1, -1))):
                    hidden = memory = x.new_zeros(x.shape[0], cell.hidden, *x.shape[-2:])
                    made: list[Tensor] = [hidden] * length
                    for t in order:
                        hidden, memory = cell(dense[t], hidden, memory)
                        made[t] = hidden
                    states.append(made)
                dense = [torch.cat(parts, 1) for parts in zip(dense, *states)]
            streams.append([f + F.conv2d(y, self.weights[s], self.biases[s]) for f, y in zip(frames, dense)])
        return torch.stack([torch.cat(parts, 1) for parts in zip(*streams)], 1)


def propagation_macs(dense: DenseBiConvLSTM, length: int, size: tuple[int, int]) -> int:
    """Multiply-accumulates of the convolutions of one clip's forward call: what no order of work can save."""
    weights = sum(
        layer.input_conv.weight.numel() + layer.recurrent_conv.weight.numel() * (length - 1) / length
        for layer in dense.layers
    )
    return round(length * size[0] * size[1] * (weights + dense.proj.weight.numel()))


def arithmetic_rates(device: torch.device, repeats: int = 5) -> dict[str, float]:
    """Multiply-accumulates per second of a large matrix product and of a large 3x3 convolution, with the threads and
    the load of this moment. On a CPU they are the work of two libraries, of which either may know the processor better.
    """
    side = 1024 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device)
    channels, edge = (256, 32) if device.type == "cpu" else (1024, 64)
    x = torch.randn(1, channels, edge, edge, device=device)
    weight = torch.randn(channels, channels, 3, 3, device=device)
    with torch.inference_mode():
        times = time_calls(
            {"matrix product": lambda: a @ a, "convolution": lambda: F.conv2d(x, weight, padding=1)}, device, repeats
        )
    macs = {"matrix product": side**3, "convolution": channels**2 * 9 * edge**2}
    return {name: macs[name] / _seconds(timing, device) for name, timing in times.items()}


def _seconds(timing: Timing, device: torch.device) -> float:
    """Of one call; on a CPU by the time of the processor, which other work on the machine does not enter."""
    return timing.processor / torch.get_num_threads() if device.type == "cpu" else timing.median


def bench_propagation(
    device: torch.device, *, channels: int = 64, hidden: int = 16, length: int = 8, repeats: int = 5,
    sizes: tuple[tuple[int, int], ...] = ((48, 80), (12, 20)),
) -> list[dict[str, Any]]:  # fmt: skip
    """Both ways in turns, forward (inference) and forward with backward, at each size; results are compared first.

    Raises:
        RuntimeError: the two ways disagree by more than rounding.
    """
    results = []
    rate = max(arithmetic_rates(device).values())
    for size in sizes:
        torch.manual_seed(0)
        dense = DenseBiConvLSTM(channels, hidden).to(device)
        plain = PlainPropagation(dense).to(device)
        x = torch.randn(1, length, dense.streams * channels, *size, device=device)
        leaf = x.clone().requires_grad_()

        def infer(module: nn.Module, x: Tensor = x) -> Tensor:
            with torch.inference_mode():
                return module(x)

        def learn(module: nn.Module, leaf: Tensor = leaf) -> None:
            module(leaf).square().mean().backward()

        # In full precision: what a GPU's TF32 leaves out hides mistakes, and is more on one card than on another.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            difference = (infer(dense) - infer(plain)).abs().max().item()
        if difference > 1e-4:
            raise RuntimeError(f"the dense bi-ConvLSTM differs from the plain one by {difference} at {size}")
        macs = propagation_macs(dense, length, size)
        for name, call, factor in (("forward", infer, 1), ("forward and backward", learn, 3)):
            times = time_calls({"grouped": partial(call, dense), "plain": partial(call, plain)}, device, repeats)
            grouped, baseline = times["grouped"], times["plain"]
            results.append(
                {
                    "size": list(size), "frames": length, "pass": name, "difference": difference,
                    "grouped": grouped.describe(), "plain": baseline.describe(),
                    "speedup": baseline.median / grouped.median,
                    "speedup_least": baseline.least / grouped.least,
                    "speedup_processor": (
                        baseline.processor / grouped.processor if device.type == "cpu" else None
                    ),
                    "GMAC": factor * macs / 1e9,
                    "floor_milliseconds": 1e3 * factor * macs / rate,
                    "ratio_to_floor": _seconds(grouped, device) * rate / (factor * macs),
                }
            )  # fmt: skip
    return results
