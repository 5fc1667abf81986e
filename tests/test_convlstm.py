"""Dense bi-ConvLSTM against one convolution per step, direction, stream and gate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models.convlstm
from models.convlstm import BiConvLSTM, DenseBiConvLSTM, recurrence_in_planes


def plain_layer(layer: BiConvLSTM, x: Tensor, streams: int, hidden: int, dilation: int) -> Tensor:
    """(B, T, S, C, H, W) -> (B, T, S, 2*h, H, W), by the definition, gates i, f, g, o, from the layer's weights."""
    w_in = layer.input_conv.weight.view(streams, 2, 4, hidden, -1, 3, 3)
    bias = layer.input_conv.bias.view(streams, 2, 4, hidden)
    w_state = layer.recurrent_conv.weight.view(streams, 2, 4, hidden, hidden, 3, 3)
    per_stream = []
    for s in range(streams):
        both = []
        for direction in range(2):
            order = range(x.shape[1]) if direction == 0 else reversed(range(x.shape[1]))
            h = c = x.new_zeros(x.shape[0], hidden, *x.shape[-2:])
            states = {}
            for t in order:
                i, f, g, o = (
                    F.conv2d(
                        x[:, t, s], w_in[s, direction, k], bias[s, direction, k], padding=dilation, dilation=dilation
                    )
                    + F.conv2d(h, w_state[s, direction, k], padding=dilation, dilation=dilation)
                    for k in range(4)
                )
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
                states[t] = h
            both.append(torch.stack([states[t] for t in range(x.shape[1])], 1))
        per_stream.append(torch.cat(both, 2))
    return torch.stack(per_stream, 2)


@pytest.mark.parametrize("large", [0, 1 << 40])
@pytest.mark.parametrize(("streams", "dilation", "length", "size"), [
    (2, 1, 4, (5, 7)), (2, 4, 3, (6, 3)), (1, 2, 1, (1, 1)), (1, 1, 2, (4, 1)),
])  # fmt: skip
def test_layer_equals_the_plain_loop_in_values_and_gradients(
    streams: int, dilation: int, length: int, size: tuple, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.convlstm, "LARGE", large)  # 0: chain by chain
    torch.manual_seed(0)
    layer = BiConvLSTM(3, 2, streams=streams, dilation=dilation).double()
    x = torch.randn(2, length, streams, 3, *size, dtype=torch.double, requires_grad=True)
    weight = torch.randn(2, length, streams, 4, *size, dtype=torch.double)
    tensors = [x, *layer.parameters()]
    mine, _ = layer(x.flatten(2, 3))
    plain = plain_layer(layer, x, streams, 2, dilation)
    torch.testing.assert_close(mine, plain)
    for a, b in zip(torch.autograd.grad((mine * weight).sum(), tensors, allow_unused=length == 1),
                    torch.autograd.grad((plain * weight).sum(), tensors)):  # fmt: skip
        torch.testing.assert_close(
            torch.zeros_like(b) if a is None else a, b
        )  # one frame: the recurrence plays no part


def test_forget_bias_starts_at_one_and_the_others_at_zero() -> None:
    bias = BiConvLSTM(5, 3, streams=2).input_conv.bias.view(2, 2, 4, 3)
    assert (bias[:, :, 1] == 1).all()
    assert (bias[:, :, [0, 2, 3]] == 0).all()


def test_each_gate_does_its_part() -> None:
    """Gates driven to their ends by the bias alone: i, f, g, o in this order."""
    layer = BiConvLSTM(1, 1, streams=1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    on, off = 50.0, -50.0

    def run(i: float, f: float, g: float, o: float) -> list[float]:
        with torch.no_grad():
            layer.input_conv.bias.copy_(torch.tensor([i, f, g, o] * 2))
            return layer(torch.zeros(1, 3, 1, 1, 1))[0][0, :, 0, 0, 0, 0].tolist()

    count = [torch.tensor(float(n)).tanh().item() for n in (1, 2, 3)]
    assert run(on, on, on, on) == pytest.approx(count)  # the cell adds 1 a frame
    assert run(off, on, on, on) == pytest.approx([0, 0, 0])  # nothing comes in
    assert run(on, off, on, on) == pytest.approx([count[0]] * 3)  # nothing is kept
    assert run(on, on, off, on) == pytest.approx([-n for n in count])  # g is a tanh, the others sigmoids
    assert run(on, on, on, off) == pytest.approx([0, 0, 0])  # nothing goes out


@pytest.mark.parametrize("large", [0, 1 << 40])
def test_a_carried_state_gives_the_whole_clips_forward_states(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.convlstm, "LARGE", large)
    torch.manual_seed(1)
    layer = BiConvLSTM(3, 2, streams=2).double()
    x = torch.randn(1, 7, 6, 4, 5, dtype=torch.double)
    whole, last = layer(x)
    first, state = layer(x[:, :3])
    second, end = layer(x[:, 3:], state)
    torch.testing.assert_close(torch.cat([first, second], 1)[:, :, :, :2], whole[:, :, :, :2])
    # The forward half of the last state too: (B, S*2*h, H, W), streams, then directions.
    for a, b in zip(end, last):
        torch.testing.assert_close(a.unflatten(1, (2, 2, 2))[:, :, 0], b.unflatten(1, (2, 2, 2))[:, :, 0])


def test_gradients_in_bfloat16_after_a_channels_last_conversion() -> None:
    torch.manual_seed(0)
    net = DenseBiConvLSTM(16, 8, streams=2).to(memory_format=torch.channels_last)
    recurrence_in_planes(net)
    # Not every processor gets the gradients wrong, and this one may not.
    assert all(p.is_contiguous() for layer in net.layers for p in layer.parameters())
    x = torch.rand(1, 2, 32, 32, 56)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        net.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = net(x)
        y.float().square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in net.named_parameters()})
    for name, plain in gradients[0].items():
        assert float((gradients[1][name] - plain).norm() / plain.norm()) < 0.05, name


@pytest.mark.parametrize("large", [0, 1 << 40])
def test_chains_over_two_pieces_in_parts(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chain reads its own piece, whatever the other one reads, and channels may come in several maps."""
    monkeypatch.setattr(models.convlstm, "LARGE", large)  # 0: chain by chain
    torch.manual_seed(4)
    layer = BiConvLSTM(5, 2, streams=2, dilation=2).double()
    torch.nn.init.normal_(layer.input_conv.bias)  # at first it is alike for both directions
    x, y = torch.randn(2, 2, 3, 2, 5, 6, 4, dtype=torch.double)
    expected = torch.cat([plain_layer(layer, x, 2, 2, 2)[:, :, :, :2], plain_layer(layer, y, 2, 2, 2)[:, :, :, 2:]], 3)
    forward, backward, state = layer.chains([x[:, :, :, :3], x[:, :, :, 3:]], list(y.split([1, 4], 3)))
    torch.testing.assert_close(torch.cat([forward, backward], 3), expected)
    # The last states: of the forward chain those of the last frame, of the backward chain those of the first.
    hidden = state[0].unflatten(1, (2, 2, 2))  # (B, S*2*h, H, W) -> (B, S, 2, h, H, W)
    torch.testing.assert_close(hidden[:, :, 0], expected[:, -1, :, :2])
    torch.testing.assert_close(hidden[:, :, 1], expected[:, 0, :, 2:])


def test_chains_run_apart_only_where_their_gates_are_large() -> None:
    layer = BiConvLSTM(3, 16, streams=2)  # 256 channels of gates
    assert layer.apart(torch.empty(1, 8, 2, 3, 48, 80, device="cpu"))  # 3.8 MiB a frame
    assert not layer.apart(torch.empty(1, 8, 2, 3, 24, 40))
    assert not layer.apart(torch.empty(1, 8, 2, 3, 48, 80, device="meta"))  # no processor


def test_reversed_clip_with_directions_swapped_gives_reversed_states() -> None:
    torch.manual_seed(2)
    layer, swapped = (BiConvLSTM(3, 2, streams=2).double() for _ in range(2))
    for a, b in zip(layer.parameters(), swapped.parameters()):
        b.data.copy_(a.data.unflatten(0, (2, 2, 8)).flip(1).flatten(0, 2))
    x = torch.randn(1, 5, 6, 3, 3, dtype=torch.double)
    y, z = layer(x)[0], swapped(x.flip(1))[0].flip(1)
    torch.testing.assert_close(torch.cat([z[:, :, :, 2:], z[:, :, :, :2]], 3), y)


def test_dense_block_equals_explicit_concatenation() -> None:
    torch.manual_seed(3)
    d, h, dilations = 4, 2, (1, 2, 4)
    block = DenseBiConvLSTM(d, h, dilations=dilations, streams=2).double()
    x = torch.randn(2, 3, 2 * d, 6, 5, dtype=torch.double)
    seen = x.view(2, 3, 2, d, 6, 5)
    for layer, dilation in zip(block.layers, dilations):
        seen = torch.cat([seen, plain_layer(layer, seen, 2, h, dilation)], 3)
    assert seen.shape[3] == d + 2 * h * 3
    weight = block.proj.weight.view(2, d, d + 2 * h * 3)
    bias = block.proj.bias.view(2, d)
    expected = [x.view_as(seen[:, :, :, :d])[:, :, s] + torch.einsum("btchw,oc->btohw", seen[:, :, s], weight[s])
                + bias[s].view(-1, 1, 1) for s in range(2)]  # fmt: skip
    torch.testing.assert_close(block(x), torch.cat(expected, 2))


def test_streams_do_not_mix() -> None:
    block = DenseBiConvLSTM(4, 2, streams=2)
    x = torch.randn(1, 3, 8, 4, 4)
    changed = x.clone()
    changed[:, :, 4:] += 1
    with torch.no_grad():
        assert torch.equal(block(x)[:, :, :4], block(changed)[:, :, :4])


def test_every_frame_reaches_every_frame() -> None:
    block = DenseBiConvLSTM(4, 2, dilations=(1,), streams=1)
    x = torch.randn(1, 6, 4, 3, 3)
    y = block(x)
    for t in (0, 5):
        changed = x.clone()
        changed[:, t] += 1
        assert ((block(changed) - y).abs().amax((0, 2, 3, 4)) > 0).all()


def test_without_dilations_it_is_the_identity() -> None:
    x = torch.randn(1, 2, 8, 3, 3)
    assert torch.equal(DenseBiConvLSTM(4, 2, dilations=(), streams=2)(x), x)
