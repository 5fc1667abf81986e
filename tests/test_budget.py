"""The counter against published figures and hooks, the network against its budgets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import build_backbone, build_dbsnet, complexity
from models.complexity import BUDGET_CLIP, BUDGET_SIZE, BUDGETS, count_macs, count_parameters, macs_per_frame


# GMAC per frame and millions of parameters that docs/performance.md says the default networks have.
@pytest.mark.parametrize(("variant", "gmac", "millions"), [("s", 26.7, 13.2), ("xxs", 8.6, 3.19)])
def test_budgets_are_kept_and_costs_are_those_of_the_documentation(variant: str, gmac: float, millions: float) -> None:
    assert BUDGETS == {"s": (40e9, 16e6), "xxs": (9e9, 4e6)} and BUDGET_SIZE == (384, 640)
    macs, parameters = macs_per_frame(BUDGET_SIZE, BUDGET_CLIP, variant=variant)
    assert macs <= BUDGETS[variant][0]
    assert parameters <= BUDGETS[variant][1]
    assert macs / 1e9 == pytest.approx(gmac, abs=0.05) and parameters / 1e6 == pytest.approx(millions, abs=0.01)


# Millions of parameters and GMAC at 256x256 of timm's published results, classifier included.
@pytest.mark.parametrize(("variant", "published"), [("xxs", 0.42), ("xs", 1.05), ("s", 2.03)])
def test_backbones_cost_what_is_published(variant: str, published: float) -> None:
    with torch.device("meta"):
        net = build_backbone(f"mobilevit_{variant}").eval()
        macs = count_macs(lambda: net(torch.empty(1, 3, 256, 256)))
    assert macs / 1e9 == pytest.approx(published, rel=0.04)


def test_convolutions_and_attention_are_counted() -> None:
    with torch.device("meta"):
        conv = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4)
        assert count_macs(lambda: conv(torch.empty(2, 8, 10, 6))) == 2 * 12 * (5 * 3) * (8 // 4) * 9
    q, k, v = torch.rand(2, 3, 5, 4), torch.rand(2, 3, 7, 4), torch.rand(2, 3, 7, 4)
    for device in ("cpu", "meta"):
        q, k, v = (x.to(device) for x in (q, k, v))
        attend = nn.functional.scaled_dot_product_attention
        assert count_macs(lambda: attend(q, k, v)) == 2 * 3 * (5 * 7 * 4) * 2  # noqa: B023 - called at once


def test_the_whole_network_equals_a_count_by_hooks() -> None:
    """Convolutions and linear layers by hooks, products of attention and of the graph by their formulas."""
    size, length = (64, 128), 3
    net = build_dbsnet("xxs").eval()
    total = 0

    def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        elif not any(module is layer.input_conv for block in net.propagation for layer in block.layers):
            total += output.numel() * module.weight[0].numel()

    for module in net.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            module.register_forward_hook(hook)
    with torch.inference_mode():
        x = torch.rand(1, length, 3, *size)
        net(x, x)
    cells = {stride: size[0] * size[1] // stride**2 for stride in (8, 16, 32)}
    width, (d_a, d_b, d_c) = net.width, (64, 80, 96)  # the tokens of MobileViT-XXS
    for stride, block in zip((8, 16, 32), net.propagation):
        for layer in block.layers:  # the input projection is called as a function, unseen by hooks
            total += length * cells[stride] * layer.input_conv.weight.numel()
    for stride, dim, depth in ((8, d_a, 2), (16, d_b, 4), (32, d_c, 3)):  # 4 groups of cells/4 tokens; two streams
        total += 2 * length * depth * 2 * 4 * (cells[stride] // 4) ** 2 * dim
    for stride, pool in ((16, 2), (32, 1)):  # two streams, two layers, two products; keys and values pooled at 16
        seen = length * (size[0] // stride // pool) * (size[1] // stride // pool)
        total += 2 * 2 * 2 * (length * cells[stride]) * seen * width
    for stride, fusion in zip((8, 16, 32), net.fusion):
        keys = fusion.heads * fusion.key_dim
        neighbours = size[0] // stride + size[1] // stride  # the column's own cell is computed and masked
        total += length * fusion.rounds * 4 * cells[stride] * neighbours * (keys + width)
        # The distance biases, for all rounds: (own or other stream, heads) x (towards smaller, larger index) x length²
        total += 4 * 2 * sum((side // stride) ** 2 for side in size)
    assert macs_per_frame(size, length, variant="xxs") == (total // length, count_parameters(net))


def test_parameters_are_those_of_the_public_backbones_and_the_rest() -> None:
    net = build_dbsnet("s")
    backbones = 2 * 4_937_632
    assert count_parameters(net) == backbones + sum(p.numel() for p in net.head_parameters())


def test_the_table_says_which_budgets_are_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"s": (39.5e9, 13.2e6), "xs": (20e9, 7e6), "xxs": (8e9, 4.5e6)}
    monkeypatch.setattr(complexity, "macs_per_frame", lambda size, clip_len, variant, flavour: figures[variant])
    complexity.main([])
    _, head, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["variant", "parameters", "GMAC", "budget"]
    assert rows == [
        ["s", "13.20", "M", "39.50", "<=", "16", "M,", "<=", "40", "GMAC:", "kept"],
        ["xs", "7.00", "M", "20.00"],
        ["xxs", "4.50", "M", "8.00", "<=", "4", "M,", "<=", "9", "GMAC:", "EXCEEDED"],
    ]
    complexity.main(["--size", "64", "96"])  # the budgets are of another size
    assert "<=" not in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--size", "0", "64"], ["--clip_len", "0"]])
def test_the_command_says_what_it_cannot_count(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        complexity.main(words)
    assert caught.value.code == 2 and "above 0" in capsys.readouterr().err
