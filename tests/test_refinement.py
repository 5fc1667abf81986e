"""Spatio-temporal Transformer: windows, and attention against one query at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from models.refinement import RefinementLayer, SpatioTemporalTransformer, time_encoding
from models.windows import refinement_windows, temporal_windows


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 7, 8, 12])
def test_windows_keep_every_frame_once_with_a_margin(window: int) -> None:
    for length in range(1, 60):
        kept = []
        for start, stop, keep, until in temporal_windows(length, window):
            assert 0 <= start <= keep < until <= stop <= length
            assert stop - start == min(window, length)
            for frame in (keep, until - 1):
                assert start == 0 or frame - start >= window // 4
                assert stop == length or stop - 1 - frame >= window // 4
            kept += range(keep, until)
        assert kept == list(range(length))


def test_refinement_looks_at_an_eighth_on_each_side() -> None:
    for length in range(9, 60):
        kept = [frame for _, _, keep, until in refinement_windows(length, 8) for frame in range(keep, until)]
        assert kept == list(range(length))
        for start, stop, keep, until in refinement_windows(length, 8):
            assert stop - start == 8
            assert start == 0 or keep - start >= 1
            assert stop == length or stop - until >= 1
    assert len(list(refinement_windows(600, 8))) == pytest.approx(600 / 6, abs=1)  # a third more, not double
    # An eighth of fewer than eight frames is none, and not the quarter that clips overlap by.
    assert list(refinement_windows(12, 4)) == [(start, start + 4, start, start + 4) for start in (0, 4, 8)]


def test_a_short_video_is_one_window() -> None:
    for length in range(1, 9):
        assert list(temporal_windows(length, 8)) == [(0, length, 0, length)]


def plain_layer(layer: RefinementLayer, x: Tensor) -> Tensor:
    """(T, C, H, W) -> the same, token by token."""
    t, c, h, w = x.shape
    d = c // layer.heads
    weight, bias = layer.position.weight, layer.position.bias
    x = x + torch.cat([F.conv2d(x[:, i : i + 1], weight[i : i + 1], bias[i : i + 1], padding=1) for i in range(c)], 1)
    places = [(f, i, j) for f in range(t) for i in range(h) for j in range(w)]
    q, k, v = {}, {}, {}
    for place in places:
        frame, i, j = place
        time = frame - (t - 1) / 2
        code = [
            part
            for n in range(0, c, 2)
            for part in (math.sin(time * 1000 ** (-n / c)), math.cos(time * 1000 ** (-n / c)))
        ]
        token = F.layer_norm(x[frame, :, i, j], (c,), layer.norm1.weight, layer.norm1.bias)
        token = token + torch.tensor(code[:c], dtype=x.dtype)
        q[place], k[place], v[place] = (layer.qkv.weight @ token + layer.qkv.bias).split(c)
    # Keys and values are means over the pool x pool positions of a cell; a cell at the border has fewer.
    cells: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
    for frame, i, j in places:
        cells.setdefault((frame, i // layer.pool, j // layer.pool), []).append((frame, i, j))
    k = {cell: sum(k[place] for place in members) / len(members) for cell, members in cells.items()}
    v = {cell: sum(v[place] for place in members) / len(members) for cell, members in cells.items()}
    y = x.clone()
    for place in places:
        heads = []
        for n in range(layer.heads):
            part = slice(n * d, (n + 1) * d)
            weights = torch.softmax(torch.stack([q[place][part] @ k[other][part] for other in cells]) / math.sqrt(d), 0)
            heads.append(sum(weight * v[other][part] for weight, other in zip(weights, cells)))
        frame, i, j = place
        token = x[frame, :, i, j] + layer.out.weight @ torch.cat(heads) + layer.out.bias
        normed = F.layer_norm(token, (c,), layer.norm2.weight, layer.norm2.bias)
        hidden = F.gelu(layer.mlp[0].weight @ normed + layer.mlp[0].bias)
        y[frame, :, i, j] = token + layer.mlp[2].weight @ hidden + layer.mlp[2].bias
    return y


@pytest.mark.parametrize("pool", [1, 2, 3])
@pytest.mark.parametrize(("length", "height", "width"), [(3, 2, 3), (1, 1, 1), (2, 1, 4), (2, 5, 3)])
def test_layer_equals_the_plain_loop(length: int, height: int, width: int, pool: int) -> None:
    torch.manual_seed(0)
    layer = RefinementLayer(8, heads=2, mlp_ratio=2, pool=pool).double()
    for parameter in layer.parameters():  # norms and biases off their initial values too
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(2, length, 8, height, width, dtype=torch.double)
    with torch.no_grad():
        y = layer(x)
        for b in range(2):
            # The sinusoid is made in single precision.
            torch.testing.assert_close(y[b], plain_layer(layer, x[b]), rtol=1e-5, atol=1e-6)


def test_up_to_a_window_it_is_one_attention_and_beyond_it_is_windows() -> None:
    torch.manual_seed(1)
    net = SpatioTemporalTransformer(8, depth=2, heads=2, window=4).eval()
    x = torch.randn(1, 11, 8, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(net(x[:, :4]), net.layers(x[:, :4]))
        assert not torch.allclose(net(x), net.layers(x), atol=1e-4)
        y = net(x)
        assert y.shape == x.shape
        # Frame 5 is in the window of frames 4 … 7, and never sees a frame 4 away.
        near, far = x.clone(), x.clone()
        near[:, 6] += 1
        far[:, 9] += 1
        assert not torch.allclose(net(near)[:, 5], y[:, 5], atol=1e-4)
        assert torch.equal(net(far)[:, 5], y[:, 5])


def test_every_token_sees_every_frame_of_its_window() -> None:
    torch.manual_seed(2)
    net = SpatioTemporalTransformer(8, depth=1, heads=2, window=8).eval()
    x = torch.randn(1, 5, 8, 3, 3)
    changed = x.clone()
    changed[0, 4, :, 2, 2] += 1
    with torch.no_grad():
        difference = (net(changed) - net(x)).abs().sum(2)[0]  # (T, H, W)
    assert (difference > 0).all()


def test_clips_are_refined_independently_and_mirror_images_of_time_stay_so() -> None:
    torch.manual_seed(3)
    layer = RefinementLayer(8, heads=2, mlp_ratio=2).double().eval()
    x = torch.randn(2, 3, 8, 2, 2, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[1:], layer(x[1:]))
        # Reversing a clip changes the sign of the encoding's sines, and its cosines not at all.
        code = time_encoding(5, 8, x)
    torch.testing.assert_close(code[:, 0::2], -code.flip(0)[:, 0::2])
    torch.testing.assert_close(code[:, 1::2], code.flip(0)[:, 1::2])
    torch.testing.assert_close(time_encoding(9, 8, x)[2:7], code)  # longer clips share their middle
    assert code.dtype == x.dtype


def test_a_time_encoding_made_in_inference_serves_training() -> None:
    net = SpatioTemporalTransformer(24, depth=1, heads=2)
    x = torch.randn(1, 7, 24, 2, 2)  # a length and a width that no other test asks for
    with torch.inference_mode():
        expected = net(x)
    assert not time_encoding(7, 24, x).is_inference()  # the kept one; autograd refuses some uses of such
    y = net(x)
    torch.testing.assert_close(y, expected)
    y.square().mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_depth_0_is_the_identity_and_heads_must_divide() -> None:
    x = torch.randn(1, 2, 8, 2, 2)
    assert torch.equal(SpatioTemporalTransformer(8, depth=0)(x), x)
    with pytest.raises(ValueError, match="10 and 4"):
        SpatioTemporalTransformer(10)


def test_shapes_computed_without_numbers_leave_nothing_behind() -> None:
    """As tools do that estimate memory: what is made under FakeTensorMode has a shape and no numbers."""
    torch.manual_seed(0)
    length, dim = 13, 20  # of no other test
    layer = RefinementLayer(dim, heads=4, mlp_ratio=2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.rand(1, length, dim, 2, 3)).shape == (1, length, dim, 2, 3)
    with torch.no_grad():
        result = layer(torch.rand(1, length, dim, 2, 3))
    assert type(result) is Tensor and bool(result.isfinite().all())
    with FakeTensorMode():  # and the other way about: numbers that are kept are not for a network without
        assert RefinementLayer(dim, heads=4, mlp_ratio=2)(torch.rand(1, length, dim, 2, 3)).shape[1] == length
