"""MobileViT: published parameter counts, and timm's implementation with the same random weights."""

from __future__ import annotations

import pytest
import torch

from models import build_backbone, load_pretrained
from models.mobilevit import MobileViT, TransformerLayer

# Without the classifier: (reference, wilile); counted on the public implementations.
COUNTS = {"xxs": (951_024, 1_010_016), "xs": (1_932_848, 1_996_960), "s": (4_937_632, 4_993_520)}
CHANNELS = {"xxs": (24, 48, 64, 320), "xs": (48, 64, 80, 384), "s": (64, 96, 128, 640)}
# The classifier (1000 classes, with a bias) on the last map makes the rest of the published totals.
TOTALS = {"xxs": (1_272_024, 1_331_016), "xs": (2_317_848, 2_381_960), "s": (5_578_632, 5_634_520)}


@pytest.mark.parametrize("variant", COUNTS)
@pytest.mark.parametrize("flavour", ["reference", "wilile"])
def test_parameter_counts_to_the_digit(variant: str, flavour: str) -> None:
    net = build_backbone(f"mobilevit_{variant}", flavour=flavour)
    count = sum(parameter.numel() for parameter in net.parameters())
    column = flavour == "wilile"
    assert count == COUNTS[variant][column]
    assert count + 1000 * net.channels[-1] + 1000 == TOTALS[variant][column]
    # Entries of the public state dicts, less the classifier's two; ours has the normalisation's two beside them.
    assert len(net.state_dict()) - 2 == {"reference": 311, "wilile": 270}[flavour] - 2


@pytest.mark.parametrize("variant", COUNTS)
@pytest.mark.parametrize("flavour", ["reference", "wilile"])
def test_maps_have_the_promised_channels_and_strides(variant: str, flavour: str) -> None:
    net = build_backbone(f"mobilevit_{variant}", flavour=flavour).eval()
    assert net.channels == CHANNELS[variant]
    assert net.reductions == (4, 8, 16, 32)
    with torch.inference_mode():
        maps = net(torch.rand(2, 3, 64, 128))
    shapes = [(2, c, 64 // r, 128 // r) for c, r in zip(net.channels, net.reductions)]
    assert [tuple(x.shape) for x in maps] == shapes


def randomise(net: torch.nn.Module, seed: int) -> None:
    """Weights that keep the signal's scale, and norms whose statistics are not the initial 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif tensor.ndim == 1 and name.endswith("weight"):
            tensor.copy_(1 + 0.1 * noise)
        elif tensor.ndim == 1:
            tensor.copy_(0.1 * noise)
        else:
            tensor.copy_(noise * tensor[0].numel() ** -0.5)


@pytest.mark.parametrize("variant", ["xxs", "xs", "s"])
def test_features_equal_timms(variant: str, tmp_path) -> None:
    timm = pytest.importorskip("timm")
    full = timm.create_model(f"mobilevit_{variant}", pretrained=False).eval()
    assert len(full.state_dict()) == 311
    randomise(full, seed=3)
    path = tmp_path / "timm.pth"
    torch.save(full.state_dict(), path)
    # The plain model's own stages give the maps; the 1x1 convolution at the end is the last one.
    ours = build_backbone(f"mobilevit_{variant}", checkpoint=path).eval()
    assert ours.mean.tolist() == [0, 0, 0] and ours.std.tolist() == [1, 1, 1]
    for height, width in ((256, 256), (288, 224), (480, 864)):
        x = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height))
        with torch.inference_mode():
            y, expected = full.stem(x), []
            for stage in full.stages:
                y = stage(y)
                expected.append(y)
            expected = [*expected[1:4], full.final_conv(y)]
            maps = ours(x)
        for stride, theirs, mine in zip(ours.reductions, expected, maps):
            assert theirs.std() > 0.01, "the comparison needs features that are alive"
            error = (theirs - mine).abs().max() / theirs.abs().max()
            assert error < 1e-5, f"{variant} {height}x{width} stride {stride}: {error:.2e}"


def test_timm_safetensors_file(tmp_path) -> None:
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    full = timm.create_model("mobilevit_xxs", pretrained=False).eval()
    randomise(full, seed=4)
    save_file(full.state_dict(), str(tmp_path / "model.safetensors"))
    ours = MobileViT("xxs").eval()
    assert load_pretrained(ours, tmp_path / "model.safetensors") == "timm"
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x)[-1], full.forward_features(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("flavour", "good", "bad", "padded"), [
    ("reference", (96, 160), (96, 150), "96x160"), ("wilile", (64, 128), (96, 128), "128x128"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(flavour: str, good: tuple, bad: tuple, padded: str) -> None:
    net = MobileViT("xxs", flavour).eval()
    with torch.inference_mode():
        net(torch.rand(1, 3, *good))
        with pytest.raises(ValueError, match=padded):
            net(torch.rand(1, 3, *bad))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'m'.*s, xs, xxs"):
        MobileViT("m")
    with pytest.raises(ValueError, match="'apple'.*reference, wilile"):
        MobileViT("s", "apple")
    with pytest.raises(ValueError, match="resnet50"):
        build_backbone("resnet50")


def test_normalisation_is_applied_to_rgb() -> None:
    net = MobileViT("xxs").eval()
    x = torch.rand(1, 3, 64, 64)
    mean, std = (0.1, 0.5, 0.8), (0.2, 0.3, 0.4)
    with torch.inference_mode():
        expected = net((x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1))
        net.set_normalisation(mean, std)
        for mine, theirs in zip(net(x), expected):
            torch.testing.assert_close(mine, theirs)
    assert {"mean", "std"} <= net.state_dict().keys()
    # Before anything is loaded: as the public weights of each flavour want it.
    assert MobileViT("xxs").mean.tolist() == [0, 0, 0] and MobileViT("xxs").std.tolist() == [1, 1, 1]
    other = MobileViT("xxs", "wilile")
    torch.testing.assert_close(other.mean, torch.tensor([0.485, 0.456, 0.406]))
    torch.testing.assert_close(other.std, torch.tensor([0.229, 0.224, 0.225]))


def test_dropout_only_in_training() -> None:
    net = MobileViT("xxs", dropout=0.5)
    plain = MobileViT("xxs")
    plain.load_state_dict(net.state_dict())
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(net.eval()(x)[-1], plain.eval()(x)[-1])
        assert not torch.equal(net.train()(x)[-1], net.train()(x)[-1])


@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_dropout_is_after_attention_and_after_the_mlp(branch: str) -> None:
    layer = TransformerLayer(8, heads=2, head_dim=4, scale=0.5, bias=True, mlp_ratio=2, dropout=1.0)  # of everything
    last = layer.mlp[-1] if branch == "attention" else layer.attention.out
    for parameter in last.parameters():  # the other branch
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 5, 8)
    with torch.inference_mode():
        assert torch.equal(layer.train()(x), x)
        assert not torch.allclose(layer.eval()(x), x, atol=1e-2)
