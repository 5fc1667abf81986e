"""Dense bidirectional ConvLSTM: spatio-temporal feature propagation over all frames.

The abstract names "dense bidirectional ConvLSTM"; the README thanks DenseNet (arXiv:1608.06993) and ConvLSTM
(arXiv:1506.04214) and no code is public. Our reading: stacked bidirectional ConvLSTM layers with DenseNet's
concatenation and growing dilation (1, 2, 4, after PDB-ConvLSTM, ECCV 2018), one block per backbone level and stream.

Cost. The input projection of all frames is one convolution; only the hidden-to-hidden convolution is sequential, and
both directions and all streams run in one grouped convolution per time step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 8 << 20  # bytes; of the order of a processor's last-level cache per core
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

    def project(self, x: Tensor, direction: int | None = None) -> Tensor:
        """The gates' input part for all frames at once: (B, T, S*C, H, W) -> (B, T, S, 2, 4*h, H, W).

        With `direction` 0 (forward) or 1 (backward) only that one's: (B, T, S, 1, 4*h, H, W).
        """
        b, t = x.shape[:2]
        conv, s, gates = self.input_conv, self.streams, 4 * self.hidden
        weight, bias, directions = conv.weight, conv.bias, 2
        if direction is not None:
            # (S*2*4*h, …) -> (S, 2, 4*h, …) -> (S*4*h, …)
            weight = weight.unflatten(0, (s, 2, gates))[:, direction].flatten(0, 1)
            bias = bias.view(s, 2, gates)[:, direction].flatten()
            directions = 1
        # (B*T, S*C, H, W) -> (B*T, S*D*4*h, H, W)
        z = F.conv2d(x.flatten(0, 1), weight, bias, 1, conv.padding, conv.dilation, s)
        return z.view(b, t, s, directions, gates, *z.shape[-2:])

    def scan(self, z: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run both chains at once over projected gates (B, T, S, 2, 4*h, H, W) whose direction 1 is already reversed
        in time.

        Returns the hidden states in the order they were made, (B, T, S, 2, h, H, W), and the last state.
        """
        outputs, state = self._run(z.unbind(1), state)
        return torch.stack(outputs, 1), state

    def _run(self, steps: Iterable[Tensor], state: State | None) -> tuple[list[Tensor], State]:
        """Both chains over the gates' input parts, (B, S, 2, 4*h, H, W) a step.

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
                i, f, g, o = gates.unbind(2)  # each (B, S*2, h, H, W)
                new = torch.sigmoid(i) * torch.tanh(g)
                c = new if c is None else torch.addcmul(new, torch.sigmoid(f), c.view_as(new))
                output = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(output.view(b, s, 2, self.hidden, height, width))
            h = output.reshape(b, -1, height, width)  # -> (B, S*2*h, H, W)
        return outputs, (h, c.reshape(h.shape))

    def _by_frame(self, x: Tensor) -> bool:
        """Whether to project the frames one by one: a large map of all of them leaves a processor's cache.

        Not in training, where each convolution more is one more pass over the weight's gradient.
        """
        b, t, _, height, width = x.shape
        size = b * t * self.input_conv.out_channels * height * width * x.element_size()
        return x.device.type == "cpu" and not torch.is_grad_enabled() and size > LARGE

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """(B, T, S*C, H, W) -> hidden states by frame (B, T, S, 2*h, H, W), forward then backward, and the last state.

        With a carried `state`, a clip cut in two gives the same forward states as the whole (the backward chain of the
        first piece has, of course, not seen the second: `models.predictor` feeds mirrored pieces for that).
        """
        if x.is_cuda:  # in few and large copies, since each costs its launch
            z = self.project(x)
            # Direction 1 reads the frames from the last to the first.
            y, state = self.scan(torch.stack([z[:, :, :, 0], z[:, :, :, 1].flip(1)], 3), state)
            return torch.cat([y[:, :, :, 0], y[:, :, :, 1].flip(1)], 3), state
        last = x.shape[1] - 1
        if self._by_frame(x):
            z = [self.project(x[:, t : t + 1])[:, 0] for t in range(last + 1)]
        else:
            z = self.project(x).unbind(1)  # T of (B, S, 2, 4*h, H, W)
        # On a processor they are joined step by step, while they are in the cache, and taken apart by unbind, whose
        # gradient is one copy; that of an index is a map of zeros for each direction.
        z = [step.unbind(2) for step in z]
        outputs, state = self._run((torch.stack([z[t][0], z[last - t][1]], 2) for t in range(last + 1)), state)
        outputs = [step.unbind(2) for step in outputs]
        # T of (B, S, 2*h, H, W)
        frames = [torch.cat([outputs[t][0], outputs[last - t][1]], 2) for t in range(last + 1)]
        return torch.stack(frames, 1), state


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

    def merge(self, features: Tensor, dense: Tensor) -> Tensor:
        """F + proj([F, H_1 … H_L]): (N, S*d, H, W) and (N, S*(d+2hL), H, W) -> (N, S*d, H, W)."""
        return features + self.proj(dense)

    def forward(self, x: Tensor) -> Tensor:
        if not self.layers:
            return x
        b, t, _, h, w = x.shape
        dense = x.view(b, t, self.streams, self.channels, h, w)
        for layer in self.layers:
            states, _ = layer(dense.flatten(2, 3))  # (B, T, S, C_l, H, W) -> (B, T, S*C_l, H, W)
            dense = torch.cat([dense, states], 3)
        # (B, T, S, C, H, W) -> (B*T, S*C, H, W) -> (B, T, S*d, H, W)
        return self.merge(x.flatten(0, 1), dense.flatten(2, 3).flatten(0, 1)).view_as(x)
