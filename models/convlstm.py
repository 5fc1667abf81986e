"""Dense bidirectional ConvLSTM: spatio-temporal feature propagation over all frames.

The abstract names "dense bidirectional ConvLSTM"; the README thanks DenseNet (arXiv:1608.06993) and ConvLSTM
(arXiv:1506.04214) and no code is public. Our reading: stacked bidirectional ConvLSTM layers with DenseNet's
concatenation and growing dilation (1, 2, 4, after PDB-ConvLSTM, ECCV 2018), one block per backbone level and stream.

Cost. The input projection of all frames is one convolution; only the hidden-to-hidden convolution is sequential, and
both directions and all streams run in one grouped convolution per time step. On a processor that is so for maps whose
gates stay in its cache; beyond that the chains run one by one, which takes the same arithmetic and fetches less.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 3 << 19  # bytes of the gates of one frame; of the order of a processor core's second-level cache
WIDE = 4  # dilation from which a processor with AVX2 alone convolves channels-last faster, the copy included
AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"  # no AVX-512, where this was not measured
State = tuple[Tensor, Tensor]  # hidden and cell state, each (B, S*2*h, H, W): streams, then directions, then channels


class BiConvLSTM(nn.Module):
    """One bidirectional ConvLSTM layer for S streams that share a size but no weights.

    Gates in the order i, f, g, o, each from a convolution of the input plus one of the hidden state, without
    peepholes; the forget gate's bias starts at 1; the state starts at zero and is made for whatever size arrives.

    Args:
        channels: input channels per stream.
        hidden: hidden channels per stream and direction.
        streams: how many streams (appearance and motion: 2).
        dilation: of both convolutions.
    """

    def __init__(self, channels: int, hidden: int, *, streams: int = 2, dilation: int = 1) -> None:
        super().__init__()
        self.hidden, self.streams = hidden, streams
        gates = streams * 2 * 4 * hidden  # (stream, direction, gate, channel), the order of every map below
        self.input_conv = nn.Conv2d(streams * channels, gates, 3, padding=dilation, dilation=dilation, groups=streams)
        self.recurrent_conv = nn.Conv2d(streams * 2 * hidden, gates, 3, padding=dilation, dilation=dilation,
                                        groups=streams * 2, bias=False)  # fmt: skip
        with torch.no_grad():
            self.input_conv.bias.zero_()
            self.input_conv.bias.view(streams, 2, 4, hidden)[:, :, 1] = 1.0

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """(B, T, S*C, H, W) -> hidden states by frame (B, T, S, 2*h, H, W), forward then backward, and the last state.

        With a carried `state`, a clip cut in two gives the same forward states as the whole (the backward chain of the
        first piece has, of course, not seen the second: `models.video_propagation` gives `chains` mirrored pieces for
        that).
        """
        parts = [x.unflatten(2, (self.streams, -1))]  # (B, T, S*C, H, W) -> (B, T, S, C, H, W)
        forward, backward, state = self.chains(parts, None, state)
        return torch.cat([forward, backward], 3), state

    def chains(
        self, forward: Sequence[Tensor], backward: Sequence[Tensor] | None, state: State | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """The forward chain over the frames of `forward`, the backward chain over those of `backward`, last to first.

        None for `backward`: those of `forward` (not told by `is`, which PyTorch 2.4 cannot compile of two lists).
        Each is a list of maps (B, T, S, C_i, H, W) in the order of time, whose channels one after the other are the
        input's. Returns the hidden states of each chain, (B, T, S, h, H, W) in the order of time, and the last state.
        """
        if self.apart(forward[0]):
            return self._one_by_one(forward, backward, state)
        z: Sequence[Tensor]  # the gates' input part of either direction
        if backward is None:
            z = self._project(forward).unbind(3)  # 2 of (B, T, S, 4*h, H, W); the gradient of unbind is one copy
        else:
            z = [self._project(parts, direction).squeeze(3) for direction, parts in enumerate((forward, backward))]
        # As few copies as can be, and large ones, since on a GPU each costs its launch.
        outputs, state = self._run(torch.stack([z[0], z[1].flip(1)], 3).unbind(1), state)
        first, second = torch.stack(outputs, 1).unbind(3)
        return first, second.flip(1), state

    def _project(self, parts: Sequence[Tensor], direction: int | None = None) -> Tensor:
        """The gates' input part for all frames at once: maps (B, T, S, C_i, H, W) -> (B, T, S, 2, 4*h, H, W).

        With `direction` 0 (forward) or 1 (backward) only that one's: (B, T, S, 1, 4*h, H, W).
        """
        x = _join(parts, 3)
        b, t = x.shape[:2]
        conv, s, gates = self.input_conv, self.streams, 4 * self.hidden
        weight, bias, directions = conv.weight, conv.bias, 2
        if direction is not None:
            # (S*2*4*h, …) -> (S, 2, 4*h, …) -> (S*4*h, …)
            weight = weight.unflatten(0, (s, 2, gates))[:, direction].flatten(0, 1)
            bias = bias.view(s, 2, gates)[:, direction].flatten()
            directions = 1
        # (B, T, S, C, H, W) -> (B*T, S*C, H, W) -> (B*T, S*D*4*h, H, W)
        z = self._convolve(x.flatten(2, 3).flatten(0, 1), weight, bias, s)
        return z.view(b, t, s, directions, gates, *z.shape[-2:])

    def _run(self, steps: Iterable[Tensor], state: State | None) -> tuple[list[Tensor], State]:
        """Both chains at once over the gates' input parts, (B, S, 2, 4*h, H, W) a step.

        Returns the hidden states, (B, S, 2, h, H, W) a step, and the last state.
        """
        h, c = state if state is not None else (None, None)
        outputs = []
        for step in steps:
            b, s, _, _, height, width = step.shape
            recurrent = None if h is None else self.recurrent_conv(h)
            if step.is_cuda and not torch.compiler.is_compiling():  # what compiles fuses it itself
                output, c = _fused_cell(step, recurrent, c)
            else:
                gates = step.reshape(b, s * 2, 4, self.hidden, height, width)
                if recurrent is not None:
                    gates = recurrent.view(gates.shape).add_(gates)  # a convolution's result is nobody else's
                output, c = _cell(gates, c if c is None else c.view(b, s * 2, self.hidden, height, width))
            outputs.append(output.view(b, s, 2, self.hidden, height, width))
            h = output.reshape(b, -1, height, width)  # -> (B, S*2*h, H, W)
        return outputs, (h, c.reshape(h.shape))

    def apart(self, x: Tensor) -> bool:
        """Whether to run the chains one by one: on a processor, where the gates of all at one step leave its cache."""
        size = x.shape[0] * self.input_conv.out_channels * x.shape[-2] * x.shape[-1] * x.element_size()
        return x.device.type == "cpu" and size > LARGE

    def _one_by_one(
        self, forward: Sequence[Tensor], backward: Sequence[Tensor] | None, state: State | None
    ) -> tuple[Tensor, Tensor, State]:
        """`chains`, one stream, direction and frame after the other."""
        s, length = self.streams, forward[0].shape[1]
        weights = self.input_conv.weight.chunk(s)  # of one stream: (2*4*h, C, 3, 3), and of one chain: (4*h, h, 3, 3)
        biases, recurrent = self.input_conv.bias.chunk(s), self.recurrent_conv.weight.chunk(s * 2)
        before: list[Any] = [(None, None)] * (s * 2)
        if state is not None:
            before = list(zip(*(part.chunk(s * 2, 1) for part in state)))
        made: dict[tuple[int, int, int], Tensor] = {}  # of direction, frame and stream: hidden state (B, h, H, W)
        after: list[State] = []
        ahead = _frames(forward)
        back = None if backward is None else _frames(backward)
        for stream in range(s):
            z: Sequence[Sequence[Tensor]]  # of each frame that of either direction
            if back is None:  # one convolution of a frame for both directions
                whole = (weights[stream], biases[stream])
                z = [self._convolve(_join(ahead[t * s + stream], 1), *whole).chunk(2, 1) for t in range(length)]
            else:
                ways = list(zip((ahead, back), weights[stream].chunk(2), biases[stream].chunk(2)))
                z = [
                    [self._convolve(_join(frames[t * s + stream], 1), *way) for frames, *way in ways]
                    for t in range(length)
                ]
            for direction in (0, 1):
                chain = stream * 2 + direction
                h, c = before[chain]
                for t in range(length) if direction == 0 else reversed(range(length)):
                    gates = z[t][direction]
                    if h is not None:
                        gates = self._convolve(h, recurrent[chain]).add_(gates)
                    h, c = _cell(gates.unflatten(1, (4, -1)), c)  # (B, 4*h, H, W) -> (B, 4, h, H, W)
                    made[direction, t, stream] = h
                after.append((h, c))
        first, second = (
            # (B, T*S, h, H, W) -> (B, T, S, h, H, W)
            torch.stack([made[way, t, i] for t in range(length) for i in range(s)], 1).unflatten(1, (length, s))
            for way in (0, 1)
        )
        hidden, cell = (torch.cat(part, 1) for part in zip(*after))
        return first, second, (hidden, cell)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
        """(N, C, H, W) -> (N, gates, H, W), in either layout."""
        padding, dilation = self.input_conv.padding, self.input_conv.dilation
        # Not in training, which gains nothing by it.
        if AVX2 and dilation[0] >= WIDE and x.device.type == "cpu" and not torch.is_grad_enabled():
            x = x.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, bias, 1, padding, dilation, groups)


def _join(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _frames(parts: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Maps (B, T, S, C_i, H, W) -> for each frame and stream the list of their (B, C_i, H, W).

    By unbind, whose gradient is one copy; that of an index is a map of zeros for each.
    """
    return list(zip(*(part.flatten(1, 2).unbind(1) for part in parts)))


def _cell(gates: Tensor, cell: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gates (…, 4, h, H, W) in the order i, f, g, o and the cell state (…, h, H, W), None at the start -> output and
    cell state.
    """
    i, f, g, o = gates.unbind(-4)
    new = torch.sigmoid(i) * torch.tanh(g)
    cell = new if cell is None else torch.addcmul(new, torch.sigmoid(f), cell)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _fused_cell(inputs: Tensor, recurrent: Tensor | None, cell: Tensor | None) -> tuple[Tensor, Tensor]:
    """An LSTM cell on a GPU in one kernel, PyTorch's own for `nn.LSTM`, in place of ten that a small map is done with
    before the next is launched. Gates (B, S, 2, 4*h, H, W) and (B, S*2*4*h, H, W), cell state of B*S*2*h*H*W numbers
    -> output and cell state, each (B*S*2, h*H*W). At the start there is neither a state nor what it gives.
    """
    # i, f, g, o one after the other in a row: the order that the kernel has, too.
    inputs = inputs.flatten(0, 2).flatten(1)  # (B, S, 2, 4*h, H, W) -> (B*S*2, 4*h*H*W)
    recurrent = torch.zeros_like(inputs) if recurrent is None else recurrent.reshape(inputs.shape)
    rows, gates = inputs.shape
    cell = inputs.new_zeros(rows, gates // 4) if cell is None else cell.reshape(rows, -1)
    output, cell, _ = torch.ops.aten._thnn_fused_lstm_cell(inputs, recurrent, cell)
    return output, cell


def recurrence_in_planes(net: nn.Module) -> None:
    """Lay the weights of every `BiConvLSTM` within `net` out in planes, also where the rest is channels-last.

    For GPUs, whose cell reads the gates one after the other. And for training in bfloat16 on a CPU: there the weight
    gradient of a grouped and dilated channels-last convolution is wrong or NaN on some processors (PyTorch 2.14,
    oneDNN, AVX-512 with bf16: by 64 % at dilation 2, NaN at dilation 4).
    """
    for module in net.modules():
        if isinstance(module, BiConvLSTM):
            module.to(memory_format=torch.contiguous_format)


class DenseBiConvLSTM(nn.Module):
    """Stacked bidirectional ConvLSTMs, densely connected: layer l reads ``[F, H_1 … H_{l-1}]``; F + proj([F, H_1 …
    H_L]) comes out.

    Args:
        channels: feature width d of each stream.
        hidden: hidden channels per direction (DenseNet's growth is twice that).
        dilations: one layer for each.
        streams: how many streams run side by side, each with its own weights.

    Input and output: (B, T, S*d, H, W), any T >= 1, any size. No dilations: the identity.
    """

    def __init__(self, channels: int, hidden: int, *, dilations: tuple[int, ...] = (1, 2, 4), streams: int = 2) -> None:
        super().__init__()
        self.channels, self.streams = channels, streams
        self.layers = nn.ModuleList(
            BiConvLSTM(channels + 2 * hidden * index, hidden, streams=streams, dilation=dilation)
            for index, dilation in enumerate(dilations)
        )
        total = channels + 2 * hidden * len(dilations)
        self.proj = nn.Conv2d(streams * total, streams * channels, 1, groups=streams) if dilations else None

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """F + proj([F, H_1 … H_L]): the features and the states of every layer, each (B, T, S, C_i, H, W) -> (B, T,
        S*d, H, W).
        """
        if self.layers[0].apart(parts[0]):  # frame by frame, while it is in the cache
            frames = zip(*(part.unbind(1) for part in parts))  # T of [(B, S, C_i, H, W), …]
            return torch.stack([self._merge([part[:, None] for part in frame])[:, 0] for frame in frames], 1)
        return self._merge(parts)

    def _merge(self, parts: Sequence[Tensor]) -> Tensor:
        # (B, T, S, C, H, W) -> (B*T, S*C, H, W) -> (B*T, S*d, H, W)
        y = self.proj(_join(parts, 3).flatten(2, 3).flatten(0, 1))
        return parts[0].flatten(2, 3) + y.unflatten(0, parts[0].shape[:2])

    def forward(self, x: Tensor) -> Tensor:
        if not self.layers:
            return x
        parts = [x.unflatten(2, (self.streams, -1))]  # (B, T, S*d, H, W) -> (B, T, S, d, H, W)
        for layer in self.layers:
            forward, backward, _ = layer.chains(parts, None)
            parts = [*parts, forward, backward]
        return self.merge(parts)
