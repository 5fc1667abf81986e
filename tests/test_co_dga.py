"""Co-DGA against a loop over pixels, and what must hold of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.co_dga import CoDGA, CoordinateGate


def make(channels: int = 4, *, streams: int = 2, heads: int = 2, rounds: int = 1, seed: int = 0, **options) -> CoDGA:
    torch.manual_seed(seed)
    net = CoDGA(channels, streams=streams, heads=heads, rounds=rounds, **options).double().eval()
    with torch.no_grad():
        net.distance.normal_()
        net.scale.normal_()
    return net


def plain_messages(net: CoDGA, x: Tensor) -> Tensor:
    """One round on (S, C, H, W), a node at a time."""
    s, c, height, width = x.shape
    n, d = net.heads, net.key_dim
    edges = net.edges.weight.view(s, 2, 2, n, d, c)  # query or key; row or column
    edges_bias = net.edges.bias.view(s, 2, 2, n, d)
    values, values_bias = net.values.weight.view(s, n, c // n, c), net.values.bias.view(s, n, c // n)
    gate, gate_bias = net.gate.weight.view(s, c, (1 + s) * c), net.gate.bias.view(s, c)
    mix, mix_bias = net.mix.weight.view(s, c, s * c), net.mix.bias.view(s, c)
    out = x.clone()
    for target in range(s):
        for i in range(height):
            for j in range(width):
                node = x[target, :, i, j]
                messages = []
                for source in [target, *(other for other in range(s) if other != target)]:
                    own = int(source != target)
                    # (direction, row, column, signed distance): the whole row, and the column without the node itself
                    places = [(0, i, q, q - j) for q in range(width)] + [
                        (1, q, j, q - i) for q in range(height) if q != i
                    ]
                    heads = []
                    for h in range(n):
                        logits, content = [], []
                        for direction, y, z, offset in places:
                            other = x[source, :, y, z]
                            query = edges[target, 0, direction, h] @ node + edges_bias[target, 0, direction, h]
                            key = edges[source, 1, direction, h] @ other + edges_bias[source, 1, direction, h]
                            slope = net.distance[own, direction, int(offset > 0), h] * abs(offset) / 16
                            logits.append(query @ key / d**0.5 + slope)
                            content.append(values[source, h] @ other + values_bias[source, h])
                        weights = torch.softmax(torch.stack(logits), 0)
                        heads.append((weights[:, None] * torch.stack(content)).sum(0))
                    messages.append(torch.cat(heads))
                amount = torch.sigmoid(gate[target] @ torch.cat([node, *messages]) + gate_bias[target])
                mixed = mix[target] @ torch.cat(messages) + mix_bias[target]
                out[target, :, i, j] = node + net.scale.view(s, c)[target] * amount * mixed
    return out


@pytest.mark.parametrize(
    ("streams", "heads", "size"), [(2, 2, (3, 4)), (1, 1, (4, 2)), (2, 1, (1, 3)), (1, 2, (3, 1)), (2, 2, (1, 1))]
)
def test_messages_equal_the_loop_over_pixels(streams: int, heads: int, size: tuple[int, int]) -> None:
    net = make(streams=streams, heads=heads)
    x = torch.randn(2, streams, 4, *size, dtype=torch.double)
    with torch.no_grad():
        y = net.messages(x.flatten(1, 2))
        for b in range(2):
            torch.testing.assert_close(y[b].view(streams, 4, *size), plain_messages(net, x[b]))


def test_rounds_share_weights_and_the_readout_comes_last() -> None:
    net = make(rounds=3)
    x = torch.randn(1, 8, 3, 3, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(net(x), net.readout(net.messages(net.messages(net.messages(x)))))
        assert net(x).shape == (1, 4, 3, 3)


def test_without_scale_messages_change_nothing() -> None:
    net = CoDGA(8)
    x = torch.randn(1, 16, 4, 5)
    with torch.no_grad():
        assert torch.equal(net.messages(x), x)
        assert not any(bias[bias.isfinite()].any() for bias in net.biases(4, 5))  # near and far alike at first
        none = CoDGA(8, rounds=0)
        none.readout.load_state_dict(net.readout.state_dict())
        torch.testing.assert_close(net.eval()(x), none.eval()(x))


def test_one_round_stays_on_row_and_column_and_two_reach_everything() -> None:
    net = make()
    x = torch.randn(1, 8, 4, 5, dtype=torch.double)
    changed = x.clone()
    changed[:, 4:, 1, 3] += 1  # one node of the second stream
    with torch.no_grad():
        once = (net.messages(changed) - net.messages(x)).abs().view(2, 4, 4, 5).amax(1) > 1e-12
        twice = (net.messages(net.messages(changed)) - net.messages(net.messages(x))).abs().view(2, 4, 4, 5).amax(
            1
        ) > 1e-12
    cross = torch.zeros(4, 5, dtype=torch.bool)
    cross[1, :] = cross[:, 3] = True
    assert torch.equal(once[0], cross) and torch.equal(once[1], cross)
    assert twice.all()


def test_transposing_the_image_with_row_and_column_weights_tied() -> None:
    net = make(seed=1)
    x = torch.randn(2, 8, 3, 5, dtype=torch.double)
    with torch.no_grad():
        assert not torch.allclose(net.messages(x.transpose(2, 3)).transpose(2, 3), net.messages(x), atol=1e-3)
        for parameter in (net.edges.weight, net.edges.bias):
            directions = parameter.unflatten(
                0, (2, 2, 2, -1)
            )  # ((stream, query or key, direction, heads * key_dim), …)
            directions[:, :, 1] = directions[:, :, 0]
        net.distance[:, 1] = net.distance[:, 0]
        torch.testing.assert_close(net.messages(x.transpose(2, 3)).transpose(2, 3), net.messages(x))


def test_directions_are_told_apart() -> None:
    """Left and right have their own slopes: mirroring the image is not mirroring the messages."""
    net = make(seed=2)
    x = torch.randn(1, 8, 3, 5, dtype=torch.double)
    with torch.no_grad():
        assert not torch.allclose(net.messages(x.flip(3)).flip(3), net.messages(x), atol=1e-3)
        net.distance[:, :, 0] = net.distance[:, :, 1]
        torch.testing.assert_close(net.messages(x.flip(3)).flip(3), net.messages(x))


def test_swapping_the_streams_with_tied_weights_swaps_the_output() -> None:
    net = make(seed=3)
    x = torch.randn(2, 2, 4, 3, 4, dtype=torch.double)
    with torch.no_grad():
        shared = [net.scale]
        for module in (net.edges, net.values, net.gate, net.mix):
            shared += [module.weight, module.bias]
        for parameter in shared:
            halves = parameter.unflatten(0, (2, -1))
            halves[1] = halves[0]
        y = net.messages(x.flatten(1, 2)).view_as(x)
        swapped = net.messages(x.flip(1).flatten(1, 2)).view_as(x)
    torch.testing.assert_close(swapped.flip(1), y)


def test_the_streams_do_exchange_messages() -> None:
    net = make(seed=4)
    x = torch.randn(1, 8, 3, 3, dtype=torch.double)
    changed = x.clone()
    changed[:, 4:] = 0
    with torch.no_grad():
        assert not torch.allclose(net.messages(changed)[:, :4], net.messages(x)[:, :4], atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 1), (9, 7)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
def test_finite_in_half_precision_and_on_thin_maps(size: tuple[int, int], dtype: torch.dtype | None) -> None:
    net = make(16, rounds=2).float()
    x = (10 * torch.randn(1, 32, *size)).requires_grad_()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        y = net(x)
    assert y.isfinite().all()
    y.float().sum().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in net.parameters())


def test_very_large_logits_do_not_overflow() -> None:
    net = make(seed=5).float()
    x = 1e4 * torch.randn(1, 8, 3, 4)
    with torch.no_grad():
        assert net.messages(x).isfinite().all()


def test_coordinate_gate() -> None:
    torch.manual_seed(6)
    gate = CoordinateGate(4).double()
    x = torch.randn(2, 4, 3, 5, dtype=torch.double)
    expected = torch.empty_like(x)

    def squeeze(vector: Tensor, conv: torch.nn.Conv1d) -> Tensor:
        first = gate.squeeze[0]
        hidden = first.weight[:, :, 0] @ vector + first.bias
        return torch.sigmoid(conv.weight[:, :, 0] @ (hidden * torch.sigmoid(hidden)) + conv.bias)

    with torch.no_grad():
        for b in range(2):
            for i in range(3):
                for j in range(5):
                    row, column = squeeze(x[b, :, i].mean(1), gate.row), squeeze(x[b, :, :, j].mean(1), gate.column)
                    expected[b, :, i, j] = x[b, :, i, j] * (1 + row * column)
        torch.testing.assert_close(gate(x), expected)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="7 and 2"):
        CoDGA(7)
