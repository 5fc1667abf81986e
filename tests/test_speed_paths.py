"""Each fast path gives what the plain one gives: folded, channels-last, grouped, in pieces, spilled, compiled, half."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models.convlstm
from models import Predictor, build_dbsnet
from models.convlstm import DenseBiConvLSTM
from models.dbsnet import DBSNet
from models.fold import fold_batch_norm, lower_weights
from models.mobilevit import ConvNormAct
from utils.benchmark.propagation import PlainPropagation, propagation_macs

SIZE = (64, 96)


def stir(net: nn.Module) -> nn.Module:
    """Batch norms with statistics and weights of a trained network's kind, and a Co-DGA that sends messages."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
        for name, parameter in net.named_parameters():
            if name.startswith("fusion") and name.endswith("scale"):
                parameter.fill_(0.5)
    return net.eval()


def make_net(flavour: str = "reference") -> DBSNet:
    torch.manual_seed(0)
    return stir(build_dbsnet("xxs", flavour, dilations=(1, 2), depth=1, rounds=1))


@pytest.fixture(scope="module")
def net() -> DBSNet:
    return make_net()


@pytest.fixture(scope="module")
def clip() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.rand(2, 1, 3, 3, *SIZE, generator=generator))


@pytest.fixture(scope="module")
def expected(net: DBSNet, clip: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return net(*clip)


@pytest.mark.parametrize("flavour", ["reference", "wilile"])
def test_folded_network(flavour: str) -> None:
    net = make_net(flavour)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    folded = fold_batch_norm(net)
    frames = torch.rand(1, 2, 3, 64, 128)
    with torch.inference_mode():
        logits, aux = net(frames, frames.flip(1), return_aux=True)
        other, other_aux = folded(frames, frames.flip(1), return_aux=True)
    torch.testing.assert_close(other, logits, rtol=1e-4, atol=1e-5)
    for one, two in zip(aux, other_aux):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    # The network itself is as it was, and is still trained.
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not any(parameter.requires_grad for parameter in folded.parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_folding_is_the_formula(bias: bool) -> None:
    block = stir(ConvNormAct(4, 6, 3, groups=2)).double()
    if bias:  # as some networks of timm have it
        block.conv.bias = nn.Parameter(torch.randn(6, dtype=torch.float64))
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    conv = torch.nn.functional.conv2d(x, block.conv.weight, block.conv.bias, 1, 1, 1, 2)
    norm = block.norm
    y = (conv - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
    y = y * norm.weight[:, None, None] + norm.bias[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(fold_batch_norm(block)(x), y * y.sigmoid(), rtol=1e-10, atol=1e-12)


def test_folding_rounds_the_result_alone() -> None:
    block = stir(ConvNormAct(16, 16, 3))
    folded, exact = fold_batch_norm(block), fold_batch_norm(copy.deepcopy(block).double())
    assert folded.conv.weight.dtype == torch.float32
    assert torch.equal(folded.conv.weight, exact.conv.weight.float())
    assert torch.equal(folded.conv.bias, exact.conv.bias.float())


def test_a_lone_batch_norm_is_not_passed_over() -> None:
    with pytest.raises(ValueError, match="stand alone: 1"):
        fold_batch_norm(nn.Sequential(ConvNormAct(3, 4), nn.BatchNorm2d(4)))


def test_channels_last(net: DBSNet, clip: tuple[torch.Tensor, torch.Tensor], expected: torch.Tensor) -> None:
    folded = fold_batch_norm(net)
    folded.encoders.to(memory_format=torch.channels_last)
    frames, flows = (x[0].contiguous(memory_format=torch.channels_last)[None] for x in clip)
    with torch.inference_mode():
        torch.testing.assert_close(folded(frames, flows), expected, rtol=1e-4, atol=1e-5)
        levels, _ = folded.encode(frames[0], flows[0])
    assert all(level.is_contiguous() for level in levels)


@pytest.mark.parametrize("streams, dilations, length", [(2, (1, 2, 4), 5), (1, (1, 3), 2), (2, (1,), 1)])
@pytest.mark.parametrize("large", [0, 1 << 40])
@pytest.mark.parametrize("avx2", [False, True])
def test_grouped_propagation(
    streams: int, dilations: tuple[int, ...], length: int, large: int, avx2: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, input gradient and every weight's gradient equal those of loops over streams, directions and frames."""
    monkeypatch.setattr(models.convlstm, "LARGE", large)  # 0: chain by chain
    monkeypatch.setattr(models.convlstm, "AVX2", avx2)
    torch.manual_seed(3)
    dense = DenseBiConvLSTM(6, 4, dilations=dilations, streams=streams).double()
    plain = PlainPropagation(dense).double()
    x = torch.randn(2, length, streams * 6, 7, 9, dtype=torch.float64)
    channels_last, convolve = [], F.conv2d

    def watched(x: torch.Tensor, *others: object) -> torch.Tensor:
        channels_last.append(x.is_contiguous(memory_format=torch.channels_last))
        return convolve(x, *others)

    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(F, "conv2d", watched)
        torch.testing.assert_close(dense(x), plain(x), rtol=1e-10, atol=1e-12)
    assert any(channels_last) == (avx2 and max(dilations) >= models.convlstm.WIDE)
    results = []
    for module in (dense, plain):
        leaf = x.clone().requires_grad_()
        weight = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
        (module(leaf) * weight).sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)
    for s in range(streams):
        for index, layer in enumerate(dense.layers):
            shape = (streams, 2, 4 * layer.hidden)
            for direction in (0, 1):
                cell = plain.cells[s][index][direction]
                inputs = layer.input_conv.weight.grad.unflatten(0, shape)[s, direction]
                recurrent = layer.recurrent_conv.weight.grad
                recurrent = torch.zeros_like(layer.recurrent_conv.weight) if recurrent is None else recurrent
                both = torch.cat([inputs, recurrent.unflatten(0, shape)[s, direction]], 1)
                torch.testing.assert_close(both, cell.weight.grad, rtol=1e-9, atol=1e-11)
                bias = layer.input_conv.bias.grad.view(shape)[s, direction]
                torch.testing.assert_close(bias, cell.bias.grad, rtol=1e-9, atol=1e-11)


def test_arithmetic_of_the_propagation_is_counted() -> None:
    from models.complexity import count_macs

    dense = DenseBiConvLSTM(8, 4)
    x = torch.rand(1, 3, 16, 5, 6)
    assert propagation_macs(dense, 3, (5, 6)) == count_macs(lambda: dense(x))


def video(length: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    random = np.random.default_rng(4)
    return tuple([random.integers(0, 256, (*SIZE, 3), np.uint8) for _ in range(length)] for _ in range(2))


def predict(net: DBSNet, length: int = 7, **options) -> np.ndarray:
    pairs = list(Predictor(net, **options)(*video(length)))
    assert [index for index, _ in pairs] == list(range(length))
    return np.stack([probability for _, probability in pairs])


PLAIN = {"fold": False, "channels_last": False, "store_dtype": torch.float32}


@pytest.mark.parametrize(
    "options, tolerance",
    [
        ({"fold": True, "channels_last": False, "store_dtype": torch.float32}, 1e-5),
        ({"fold": False, "channels_last": True, "store_dtype": torch.float32}, 1e-5),
        ({"fold": True, "channels_last": True, "store_dtype": torch.float32}, 1e-5),
        ({**PLAIN, "batch_size": 1, "piece": 2}, 1e-5),
        ({**PLAIN, "batch_size": 7, "piece": 100}, 1e-5),
        ({**PLAIN, "host_memory": 0}, 1e-5),  # all features in the temporary file
        ({**PLAIN, "host_memory": 200_000}, 1e-5),  # some of them
        ({}, 2e-3),  # as users have it: half-precision store
    ],
)
def test_predictor_paths(net: DBSNet, options: dict, tolerance: float) -> None:
    assert np.abs(predict(net, **options) - predict(net, **PLAIN)).max() < tolerance


def test_predictor_is_the_network_on_a_short_video(net: DBSNet) -> None:
    frames, flows = (torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2)[None] / 255 for x in video(3))
    with torch.inference_mode():
        expected = net(frames, flows).sigmoid()[0, :, 0].numpy()
    assert np.abs(predict(net, 3, **PLAIN) - expected).max() < 1e-5


def test_a_network_trained_on_between_two_videos_is_folded_anew() -> None:
    net = make_net()
    predictor = Predictor(net)
    frames, flows = video(2)
    before = np.stack([p for _, p in predictor(frames, flows)])
    with torch.no_grad():
        net.decoder.head.bias.add_(1)
    after = np.stack([p for _, p in predictor(frames, flows)])
    assert (after > before).all()


def test_compiled_parts(net: DBSNet) -> None:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 3, 2 * net.width, 4, 6, generator=generator)
    for part, value in ((net.propagation[0], x), (net.fusion[0], x[0])):
        compiled: Callable = torch.compile(part, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(value), part(value), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_network(
    backend: str, net: DBSNet, clip: tuple[torch.Tensor, torch.Tensor], expected: torch.Tensor
) -> None:
    torch._dynamo.reset()
    compiled: Callable = torch.compile(net, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*clip), expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_bf16(net: DBSNet, clip: tuple[torch.Tensor, torch.Tensor], expected: torch.Tensor) -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = net(*clip)
    # bfloat16 has 8 bits: a few per cent of the logits' range after some fifty layers.
    assert (logits.float() - expected).abs().max() < 0.05 * (expected.max() - expected.min())


def test_lower_weights_are_those_of_autocast(net: DBSNet, clip: tuple[torch.Tensor, torch.Tensor]) -> None:
    net = copy.deepcopy(net)
    norms = [module for module in net.modules() if isinstance(module, nn.LayerNorm)]
    for norm in norms:  # ones and zeros would stay what they are
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    assert norms
    lower = copy.deepcopy(net)
    lower_weights(lower, torch.bfloat16)
    assert lower.decoder.head.weight.dtype == torch.bfloat16
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lower(*clip), net(*clip))


@pytest.mark.gpu
@pytest.mark.parametrize("amp, tolerance", [(None, 2e-3), ("bf16", 0.1), ("fp16", 0.02)])
def test_on_a_gpu(net: DBSNet, amp: str | None, tolerance: float) -> None:
    plain = predict(net, **PLAIN)
    on_gpu = predict(make_net(), device="cuda", amp=amp)
    assert np.abs(on_gpu - plain).max() < tolerance
    spilled = predict(make_net(), device="cuda", amp=amp, device_memory=0)  # features in host memory
    assert np.abs(spilled - on_gpu).max() < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("planes", [True, False])
def test_propagation_learns_the_same_on_a_gpu(planes: bool) -> None:
    torch.manual_seed(0)
    dense = DenseBiConvLSTM(16, 8).double()
    copied = copy.deepcopy(dense).cuda()
    if not planes:
        copied = copied.to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 32, 12, 20, dtype=torch.double)
    leaves = x.clone().requires_grad_(), x.cuda().requires_grad_()
    for module, leaf in zip((dense, copied), leaves):
        module(leaf).square().mean().backward()
    torch.testing.assert_close(leaves[1].grad.cpu(), leaves[0].grad)
    for ours, theirs in zip(copied.parameters(), dense.parameters()):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad)


@pytest.mark.gpu
def test_grouped_propagation_on_a_gpu() -> None:
    torch.manual_seed(0)
    dense = DenseBiConvLSTM(64, 16).cuda()
    x = torch.randn(1, 8, 128, 12, 20, device="cuda")
    with torch.inference_mode():
        torch.testing.assert_close(dense(x), PlainPropagation(dense).cuda()(x), rtol=1e-2, atol=1e-2)  # TF32
