"""The three public checkpoint formats, their keys written out here from the published key map, and strict loading."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import CheckpointError, build_backbone, build_dbsnet, load_pretrained
from models.mobilevit import MobileViT

STAGES = {"xxs": (16, 24, 48, 64, 80), "xs": (32, 48, 64, 80, 96), "s": (32, 64, 96, 128, 160)}
DIMS = {"xxs": (64, 80, 96), "xs": (96, 120, 144), "s": (144, 192, 240)}
DEPTHS = {3: 2, 4: 4, 5: 3}
EXPANSION = {"xxs": 2, "xs": 4, "s": 4}
FINAL = {"xxs": 320, "xs": 384, "s": 640}


def values(weight: tuple[int, ...], bias: bool = False) -> list[tuple[str, tuple[int, ...]]]:
    return [("weight", weight), *([("bias", (weight[0],))] if bias else [])]


def norm(channels: int) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, (channels,)) for name in ("weight", "bias", "running_mean", "running_var")] + [
        ("num_batches_tracked", ())
    ]


def layer_norm(channels: int) -> list[tuple[str, tuple[int, ...]]]:
    return [("weight", (channels,)), ("bias", (channels,))]


def entries(fmt: str, variant: str) -> Iterator[tuple[str, str, list[tuple[str, tuple[int, ...]]]]]:
    """(name in the format, our name, tensors) of every module, row by row as in the published key map.

    A format that has no such module gives none.
    """
    c, stem, e = STAGES[variant], 16, EXPANSION[variant]
    wilile = fmt == "wilile"

    def name(*names: str) -> str:
        return names[("wilile", "cvnets", "timm").index(fmt)]

    yield name("stem.0", "conv_1.block.conv", "stem.conv"), "stem.conv", values((stem, 3, 3, 3), wilile)
    if not wilile:
        yield name("", "conv_1.block.norm", "stem.bn"), "stem.norm", norm(stem)
    # Inverted residuals: (level, block, channels in, channels out)
    blocks = [(1, 0, stem, c[0]), (2, 0, c[0], c[1]), (2, 1, c[1], c[1]), (2, 2, c[1], c[1]),
              (3, 0, c[1], c[2]), (4, 0, c[2], c[3]), (5, 0, c[3], c[4])]  # fmt: skip
    for level, b, c_in, c_out in blocks:
        h = c_in * e
        theirs = name(
            "stem.1" if level == 1 else f"stage{level - 1}.{b}", f"layer_{level}.{b}.block", f"stages.{level - 1}.{b}"
        )
        ours = f"stages.{level - 1}.{b}"
        yield (
            theirs + name(".conv.0.conv", ".exp_1x1.block.conv", ".conv1_1x1.conv"),
            f"{ours}.expand.conv",
            values((h, c_in, 1, 1)),
        )
        yield (
            theirs + name(".conv.0.norm_layer", ".exp_1x1.block.norm", ".conv1_1x1.bn"),
            f"{ours}.expand.norm",
            norm(h),
        )
        yield (
            theirs + name(".conv.1.conv", ".conv_3x3.block.conv", ".conv2_kxk.conv"),
            f"{ours}.depthwise.conv",
            values((h, 1, 3, 3)),
        )
        yield (
            theirs + name(".conv.1.norm_layer", ".conv_3x3.block.norm", ".conv2_kxk.bn"),
            f"{ours}.depthwise.norm",
            norm(h),
        )
        yield (
            theirs + name(".conv.2", ".red_1x1.block.conv", ".conv3_1x1.conv"),
            f"{ours}.project.conv",
            values((c_out, h, 1, 1)),
        )
        yield theirs + name(".conv.3", ".red_1x1.block.norm", ".conv3_1x1.bn"), f"{ours}.project.norm", norm(c_out)
    for level in (3, 4, 5):
        n, d = c[level - 1], DIMS[variant][level - 3]
        theirs, ours = name(f"stage{level - 1}.1", f"layer_{level}.1", f"stages.{level - 1}.1"), f"stages.{level - 1}.1"
        yield (theirs + name(".local_representation.0.conv", ".local_rep.conv_3x3.block.conv", ".conv_kxk.conv"),
               f"{ours}.local.conv", values((n, n, 3, 3)))  # fmt: skip
        yield (theirs + name(".local_representation.0.norm_layer", ".local_rep.conv_3x3.block.norm", ".conv_kxk.bn"),
               f"{ours}.local.norm", norm(n))  # fmt: skip
        yield (theirs + name(".local_representation.1.conv", ".local_rep.conv_1x1.block.conv", ".conv_1x1"),
               f"{ours}.embed.conv" if wilile else f"{ours}.embed", values((d, n, 1, 1)))  # fmt: skip
        if wilile:
            yield f"{theirs}.local_representation.1.norm_layer", f"{ours}.embed.norm", norm(d)
        inner = 32 if wilile else d
        hidden = d * (4 if wilile and level > 3 else 2)
        for k in range(DEPTHS[level]):
            encoder, layer = (
                theirs + name(f".transformer.layers.{k}", f".global_rep.{k}", f".transformer.{k}"),
                f"{ours}.layers.{k}",
            )
            yield encoder + name(".0.norm", ".pre_norm_mha.0", ".norm1"), f"{layer}.norm1", layer_norm(d)
            yield (encoder + name(".0.fn.to_qvk", ".pre_norm_mha.1.qkv_proj", ".attn.qkv"),
                   f"{layer}.attention.qkv", values((3 * inner, d), not wilile))  # fmt: skip
            yield (encoder + name(".0.fn.w_out", ".pre_norm_mha.1.out_proj", ".attn.proj"),
                   f"{layer}.attention.out", values((d, inner), not wilile))  # fmt: skip
            yield encoder + name(".1.norm", ".pre_norm_ffn.0", ".norm2"), f"{layer}.norm2", layer_norm(d)
            yield (
                encoder + name(".1.fn.net.0", ".pre_norm_ffn.1", ".mlp.fc1"),
                f"{layer}.mlp.0",
                values((hidden, d), True),
            )
            yield (
                encoder + name(".1.fn.net.3", ".pre_norm_ffn.4", ".mlp.fc2"),
                f"{layer}.mlp.2",
                values((d, hidden), True),
            )
        if not wilile:
            yield theirs + name("", f".global_rep.{DEPTHS[level]}", ".norm"), f"{ours}.norm", layer_norm(d)
        yield (theirs + name(".fusion_block1", ".conv_proj.block.conv", ".conv_proj.conv"),
               f"{ours}.project.conv", values((n, d, 1, 1), wilile))  # fmt: skip
        yield (theirs + name(".fusion_block2", ".fusion.block.conv", ".conv_fusion.conv"),
               f"{ours}.fuse.conv", values((n, 2 * n, 3, 3), wilile))  # fmt: skip
        if not wilile:
            yield theirs + name("", ".conv_proj.block.norm", ".conv_proj.bn"), f"{ours}.project.norm", norm(n)
            yield theirs + name("", ".fusion.block.norm", ".conv_fusion.bn"), f"{ours}.fuse.norm", norm(n)
    yield (name("stage4.2", "conv_1x1_exp.block.conv", "final_conv.conv"), "final.conv",
           values((FINAL[variant], c[4], 1, 1), wilile))  # fmt: skip
    if not wilile:
        yield name("", "conv_1x1_exp.block.norm", "final_conv.bn"), "final.norm", norm(FINAL[variant])


def make_state(fmt: str, variant: str, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A random checkpoint of a format, classifier included, and the same tensors under our names, as given."""
    generator = torch.Generator().manual_seed(seed)
    theirs, ours = {}, {}
    for foreign, own, tensors in entries(fmt, variant):
        for suffix, shape in tensors:
            noise = torch.randn(shape, generator=generator)
            if suffix == "num_batches_tracked":
                value = torch.tensor(7)
            elif suffix == "running_var":
                value = 0.5 + torch.rand(shape, generator=generator)
            elif len(shape) == 1:
                value = 0.1 * noise + (suffix == "weight")
            else:
                value = noise / math.sqrt(math.prod(shape[1:]))
            theirs[f"{foreign}.{suffix}"] = ours[f"{own}.{suffix}"] = value
    classifier = {"wilile": "fc", "cvnets": "classifier.fc", "timm": "head.fc"}[fmt]
    theirs[f"{classifier}.weight"] = torch.randn(1000, FINAL[variant], generator=generator)
    theirs[f"{classifier}.bias"] = torch.zeros(1000)
    return theirs, ours


def flavour_of(fmt: str) -> str:
    return "wilile" if fmt == "wilile" else "reference"


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("fmt", ["wilile", "cvnets", "timm"])
@pytest.mark.parametrize("variant", ["xxs", "xs", "s"])
def test_every_tensor_arrives_where_the_key_map_says(fmt: str, variant: str, tmp_path: Path) -> None:
    theirs, ours = make_state(fmt, variant)
    assert len(theirs) == {"wilile": 270, "cvnets": 311, "timm": 311}[fmt]
    net = MobileViT(variant, flavour_of(fmt))
    assert load_pretrained(net, save(tmp_path / "weights.pt", theirs)) == fmt
    state = {key: value for key, value in net.state_dict().items() if key not in ("mean", "std")}
    assert state.keys() == ours.keys()
    for key, value in ours.items():
        if fmt == "cvnets" and key == "stem.conv.weight":
            value = value[:, [2, 1, 0]]  # trained on BGR
        assert torch.equal(state[key], value), key


def test_the_same_weights_in_both_reference_formats_give_the_same_features(tmp_path: Path) -> None:
    cvnets, _ = make_state("cvnets", "xxs")
    timm, _ = make_state("timm", "xxs")  # the same seed, so the same values
    a = build_backbone("mobilevit_xxs", checkpoint=save(tmp_path / "a.pt", cvnets)).eval()
    b = build_backbone("mobilevit_xxs", checkpoint=save(tmp_path / "b.pth", timm)).eval()
    x = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        for bgr, rgb in zip(a(x.flip(1)), b(x)):  # cvnets weights see BGR where timm's see RGB
            torch.testing.assert_close(bgr, rgb)
        assert not torch.allclose(a(x)[0], b(x)[0], atol=1e-3)


@pytest.mark.parametrize("wrap", [
    lambda state: {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()},
                   "best_acc1": 61.9,                   "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    lambda state: {f"module.{key}": value for key, value in state.items()},
    lambda state: {"model": {f"_orig_mod.{key}": value for key, value in state.items()}},
    lambda state: {"state_dict": state},
], ids=["wilile's", "module.", "compiled", "state_dict"])  # fmt: skip
def test_containers(wrap: Callable, tmp_path: Path) -> None:
    theirs, ours = make_state("wilile", "xxs")
    net = MobileViT("xxs", "wilile")
    load_pretrained(net, save(tmp_path / "MobileViT_XXS_model_best.pth.tar", wrap(theirs)))
    assert torch.equal(net.state_dict()["final.conv.bias"], ours["final.conv.bias"])


def test_normalisation_belongs_to_the_format(tmp_path: Path) -> None:
    for fmt, mean, std in (("wilile", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ("cvnets", (0, 0, 0), (1, 1, 1)),
                           ("timm", (0, 0, 0), (1, 1, 1))):  # fmt: skip
        net = MobileViT("xxs", flavour_of(fmt))
        net.set_normalisation((9, 9, 9), (9, 9, 9))
        load_pretrained(net, save(tmp_path / f"{fmt}.pt", make_state(fmt, "xxs")[0]))
        assert torch.equal(net.mean, torch.tensor(mean, dtype=torch.float32))
        assert torch.equal(net.std, torch.tensor(std, dtype=torch.float32))


FINAL_CONV = {"wilile": "stage4.2.weight", "cvnets": "conv_1x1_exp.block.conv.weight", "timm": "final_conv.conv.weight"}


@pytest.mark.parametrize("fmt", ["wilile", "cvnets", "timm"])
def test_what_does_not_fit_is_counted_and_named(fmt: str, tmp_path: Path) -> None:
    key = FINAL_CONV[fmt]
    for change, message in (
        (lambda s: s.pop(key), f"1 missing (first: {key})"),
        (lambda s: s.update({"aux.weight": torch.zeros(2)}), "1 unexpected (first: aux.weight)"),
        (
            lambda s: s.update({key: torch.zeros(2, 3)}),
            f"1 of another shape (first: {key}: expected (320, 80, 1, 1), got (2, 3))",
        ),
    ):
        state, _ = make_state(fmt, "xxs")
        change(state)
        net = MobileViT("xxs", flavour_of(fmt))
        before = {name: value.clone() for name, value in net.state_dict().items()}
        path = save(tmp_path / "broken.pt", state)
        with pytest.raises(CheckpointError) as caught:
            load_pretrained(net, path)
        assert message in str(caught.value) and str(path) in str(caught.value)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()), "left half loaded"


@pytest.mark.parametrize("fmt", ["wilile", "cvnets", "timm"])
def test_another_size_is_refused(fmt: str, tmp_path: Path) -> None:
    path = save(tmp_path / "s.pt", make_state(fmt, "s")[0])
    with pytest.raises(
        CheckpointError, match="fit MobileViT-XXS: .* a MobileViT-S .main.py --variant s., .*of another shape"
    ):
        load_pretrained(MobileViT("xxs", flavour_of(fmt)), path)


def test_classifier_may_be_absent(tmp_path: Path) -> None:
    state, _ = make_state("timm", "xxs")
    trunk = {key: value for key, value in state.items() if not key.startswith("head.")}
    assert load_pretrained(MobileViT("xxs"), save(tmp_path / "trunk.pth", trunk)) == "timm"


def test_the_other_flavour_is_refused(tmp_path: Path) -> None:
    wilile = save(tmp_path / "w.pth.tar", make_state("wilile", "xxs")[0])
    with pytest.raises(CheckpointError, match="flavour='wilile' .*main.py --flavour wilile"):
        load_pretrained(MobileViT("xxs"), wilile)
    timm = save(tmp_path / "t.pth", make_state("timm", "xxs")[0])
    with pytest.raises(CheckpointError, match="flavour='reference'"):
        load_pretrained(MobileViT("xxs", "wilile"), timm)


@pytest.mark.filterwarnings("ignore:.*(TorchScript|torch.jit)")
def test_files_that_are_no_mobilevit(tmp_path: Path) -> None:
    net = MobileViT("xxs")
    with pytest.raises(CheckpointError, match="layer1.0.conv1.weight"):
        load_pretrained(net, save(tmp_path / "resnet.pth", {"layer1.0.conv1.weight": torch.zeros(1)}))
    nested = {f"encoder.{key}": value for key, value in make_state("cvnets", "xxs")[0].items()}
    with pytest.raises(CheckpointError, match="segmentation or detection network of cvnets: take the classification"):
        load_pretrained(net, save(tmp_path / "deeplab.pt", nested))
    with pytest.raises(CheckpointError, match="not a state dict"):
        load_pretrained(net, save(tmp_path / "numbers.pth", {"epoch": 3}))
    with pytest.raises(CheckpointError, match="Namespace"):
        load_pretrained(net, save(tmp_path / "objects.pth", {"args": argparse.Namespace(lr=1), "state_dict": {}}))
    with pytest.raises(CheckpointError, match="holds a list"):
        load_pretrained(net, save(tmp_path / "list.pth", [torch.zeros(1)]))
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load_pretrained(net, save(tmp_path / "empty.pth", {}))
    with pytest.raises(CheckpointError, match="1 names a tensor, expected names that are strings"):
        load_pretrained(net, save(tmp_path / "numbered.pth", {1: torch.zeros(1)}))
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 3), torch.zeros(1, 2)), tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="script.pt is a TorchScript archive, whose code is not run"):
        load_pretrained(net, tmp_path / "script.pt")
    (tmp_path / "page.pth").write_text("<html>quota exceeded</html>")
    with pytest.raises(CheckpointError, match="page.pth is not a readable torch file: copy"):
        load_pretrained(net, tmp_path / "page.pth")
    (tmp_path / "page.safetensors").write_text("<html>quota exceeded</html>")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_pretrained(net, tmp_path / "page.safetensors")
    whole = (tmp_path / "resnet.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cut.pth is not a readable torch file"):
        load_pretrained(net, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_pretrained(net, tmp_path / "absent.pth")


def test_a_backbone_has_the_dropout_asked_for() -> None:
    net = build_backbone("mobilevit_xxs", dropout=0.3)
    assert {module.p for module in net.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}


def test_load_backbones_fills_both_streams(tmp_path: Path) -> None:
    state, ours = make_state("cvnets", "xxs")
    net = build_dbsnet("xxs")
    net.load_backbones(save(tmp_path / "mobilevit_xxs.pt", state))
    for encoder in net.encoders.values():
        assert torch.equal(encoder.final.conv.weight, ours["final.conv.weight"])


# wilile's network written plainly over the checkpoint's own keys, as it is described.


def batch_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean, var = state[f"{name}.running_mean"].view(-1, 1, 1), state[f"{name}.running_var"].view(-1, 1, 1)
    return (x - mean) / (var + 1e-5).sqrt() * state[f"{name}.weight"].view(-1, 1, 1) + state[f"{name}.bias"].view(
        -1, 1, 1
    )


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def plain_residual(x: Tensor, s: dict[str, Tensor], name: str, stride: int) -> Tensor:
    y = batch_norm(F.conv2d(x, s[f"{name}.conv.0.conv.weight"]), s, f"{name}.conv.0.norm_layer")  # no activation here
    weight = s[f"{name}.conv.1.conv.weight"]
    y = silu(
        batch_norm(F.conv2d(y, weight, stride=stride, padding=1, groups=len(weight)), s, f"{name}.conv.1.norm_layer")
    )
    y = batch_norm(F.conv2d(y, s[f"{name}.conv.2.weight"]), s, f"{name}.conv.3")
    return x + y if x.shape == y.shape else y


def plain_layer_norm(x: Tensor, s: dict[str, Tensor], name: str) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * s[f"{name}.weight"] + s[f"{name}.bias"]


def plain_mobilevit_block(x: Tensor, s: dict[str, Tensor], name: str, depth: int) -> Tensor:
    y = silu(batch_norm(F.conv2d(x, s[f"{name}.local_representation.0.conv.weight"], padding=1), s,
                        f"{name}.local_representation.0.norm_layer"))  # fmt: skip
    y = silu(batch_norm(F.conv2d(y, s[f"{name}.local_representation.1.conv.weight"]), s,
                        f"{name}.local_representation.1.norm_layer"))  # fmt: skip
    out = torch.empty_like(y)
    for row in range(2):
        for column in range(2):  # the pixels at one position inside all 2x2 patches attend to each other
            part = y[:, :, row::2, column::2]
            tokens = part.flatten(2).transpose(1, 2)
            d = tokens.shape[-1]
            for k in range(depth):
                layer = f"{name}.transformer.layers.{k}"
                q, key, v = (plain_layer_norm(tokens, s, f"{layer}.0.norm") @ s[f"{layer}.0.fn.to_qvk.weight"].T).split(
                    32, -1
                )
                attention = torch.softmax(
                    q @ key.transpose(1, 2) / math.sqrt(d), -1
                )  # the whole width d, though heads have 32
                tokens = tokens + attention @ v @ s[f"{layer}.0.fn.w_out.weight"].T
                hidden = silu(plain_layer_norm(tokens, s, f"{layer}.1.norm") @ s[f"{layer}.1.fn.net.0.weight"].T
                              + s[f"{layer}.1.fn.net.0.bias"])  # fmt: skip
                tokens = tokens + hidden @ s[f"{layer}.1.fn.net.3.weight"].T + s[f"{layer}.1.fn.net.3.bias"]
            out[:, :, row::2, column::2] = tokens.transpose(1, 2).view_as(part)
    y = F.conv2d(out, s[f"{name}.fusion_block1.weight"], s[f"{name}.fusion_block1.bias"])
    return F.conv2d(torch.cat([x, y], 1), s[f"{name}.fusion_block2.weight"], s[f"{name}.fusion_block2.bias"], padding=1)


def plain_wilile(x: Tensor, s: dict[str, Tensor]) -> list[Tensor]:
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = F.conv2d((x - mean) / std, s["stem.0.weight"], s["stem.0.bias"], stride=2, padding=1)
    x = plain_residual(x, s, "stem.1", 1)
    for block, stride in enumerate((2, 1, 1)):
        x = plain_residual(x, s, f"stage1.{block}", stride)
    maps = [x]
    for stage, depth in ((2, 2), (3, 4), (4, 3)):
        x = plain_mobilevit_block(plain_residual(x, s, f"stage{stage}.0", 2), s, f"stage{stage}.1", depth)
        maps.append(x)
    maps[-1] = F.conv2d(x, s["stage4.2.weight"], s["stage4.2.bias"])
    return maps


@pytest.mark.parametrize("variant", ["xxs", "xs", "s"])
def test_wilile_equals_a_plain_network_over_its_own_keys(variant: str, tmp_path: Path) -> None:
    state, _ = make_state("wilile", variant, seed=5)
    net = build_backbone(
        f"mobilevit_{variant}", flavour="wilile", checkpoint=save(tmp_path / "w.pth.tar", state)
    ).eval()
    x = torch.rand(2, 3, 64, 128)
    with torch.inference_mode():
        for mine, theirs in zip(net(x), plain_wilile(x, state)):
            assert theirs.std() > 0.01
            assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()
