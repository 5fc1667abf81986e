"""Encoders of timm, for teachers: the maps are timm's own, and both formats of checkpoints give the same network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import build_dbsnet
from models.errors import CheckpointError
from models.fold import fold_batch_norm
from models.growth import add_stream
from models.timm_encoder import TimmEncoder, load_timm

timm = pytest.importorskip("timm")
NAME = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def whole() -> torch.nn.Module:
    """timm's classifier with random weights and statistics."""
    torch.manual_seed(0)
    net = timm.create_model(NAME, pretrained=False).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return net


def numbered_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names that EfficientNet codes with numbered-through blocks have; timm's state dict is in the same order."""
    blocks: list[str] = []
    renamed = {}
    for key, tensor in state.items():
        parts = key.split(".")
        if parts[0] == "blocks":
            place = ".".join(parts[1:3])
            if place not in blocks:
                blocks.append(place)
            first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
            later = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
                     "conv_pwl": "_project_conv", "bn3": "_bn2"}  # fmt: skip
            names = first if blocks.index(place) == 0 else later
            key = f"_blocks.{blocks.index(place)}.{names[parts[3]]}.{parts[4]}"
        else:
            names = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
            key = f"{names.get(parts[0], '_fc')}.{parts[1]}"
        renamed[key] = tensor
    return renamed


@pytest.mark.parametrize("naming", ["timm", "numbered"])
def test_the_maps_are_those_of_timm(whole: torch.nn.Module, tmp_path: Path, naming: str) -> None:
    state = whole.state_dict()
    if naming == "numbered":  # such files are old, and have no counters of batches
        state = {k: v for k, v in numbered_names(state).items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pth")
    encoder = TimmEncoder(NAME).eval()
    load_timm(encoder, tmp_path / "w.pth")
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        maps = encoder(image)
        expected = whole.forward_intermediates((image - 0.5) / 0.5, indices=(1, 2, 3, 4), intermediates_only=True)
    assert [x.shape[1] for x in maps] == list(encoder.channels)
    for own, theirs, stride in zip(maps, expected, encoder.reductions, strict=True):
        assert own.shape[-2:] == (64 // stride, 96 // stride)
        torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("resnet34", "resnet18"), ("tf_efficientnet_lite1", NAME), ("convnext_small", "convnext_tiny")],
)
def test_a_deeper_network_is_another_one(given: str, wanted: str, tmp_path: Path) -> None:
    """All that the shallower one asks for is there; its later blocks would read what they were never trained on."""
    torch.save(timm.create_model(given, pretrained=False).state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"does not fit timm's .*: \d+ unexpected"):
        load_timm(TimmEncoder(wanted), tmp_path / "w.pth")


def test_numbered_blocks_of_a_deeper_network_are_told(whole: torch.nn.Module, tmp_path: Path) -> None:
    state = numbered_names(whole.state_dict())
    more = {key.replace("_blocks.15.", "_blocks.16."): tensor for key, tensor in state.items() if "_blocks.15." in key}
    torch.save({**state, **more}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=f"{len(more)} unexpected"):
        load_timm(TimmEncoder(NAME), tmp_path / "w.pth")


def test_a_network_for_multiples_of_64_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="its maps are"):
        TimmEncoder("mobilevitv2_050")


def test_dropout_is_refused_where_no_encoder_has_it() -> None:
    with pytest.raises(ValueError, match="dropout is MobileViT's"):
        build_dbsnet("xxs", encoder="resnet18", dropout=0.5)
    both = build_dbsnet("xxs", encoder={"appearance": NAME, "motion": "mobilevit"}, dropout=0.5)
    assert any(isinstance(module, torch.nn.Dropout) and module.p == 0.5 for module in both.modules())


# Two families whose batch norms all follow a convolution, and one with pre-activation, where they read sums.
@pytest.mark.parametrize("name, left", [(NAME, 0), ("resnet18", 0), ("efficientnet_b0", 0), ("densenet121", 1)])
def test_batch_norms_of_such_an_encoder_are_folded(name: str, left: int) -> None:
    torch.manual_seed(0)
    options = {"width": 8, "dilations": [], "depth": 0, "rounds": 0, "streams": ["appearance"]}
    net = build_dbsnet("xxs", encoder=name, **options).eval()
    assert build_dbsnet(**net.config).config == net.config
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    frames, flows = torch.rand(2, 1, 1, 3, 64, 96).unbind()
    folded = fold_batch_norm(net)
    norms = [module for module in folded.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert bool(norms) == bool(left)
    with torch.no_grad():
        expected = net(frames, flows)
        torch.testing.assert_close(folded(frames, flows), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_batch_norms_are_folded_in_inference_mode_too() -> None:
    with torch.inference_mode():
        folded = fold_batch_norm(torch.nn.Sequential(TimmEncoder(NAME).eval()))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())


class Crooked(TimmEncoder):
    """Convolutions and batch norms as no network has them by halves: which of them may be folded is not plain."""

    def __init__(self, kind: str) -> None:
        torch.nn.Module.__init__(self)
        self.kind = kind
        self.first, self.second = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 3, padding=1)
        self.one = torch.nn.BatchNorm2d(4, affine=kind != "no weights", track_running_stats=kind != "no statistics")
        self.two, self.other = torch.nn.BatchNorm2d(4), torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = self.first(x)
        if self.kind == "a sum in place":
            y += x.mean()
        z = self.one(y).relu()
        if self.kind == "a norm of two convolutions":
            return [self.one(self.second(z))]
        if self.kind == "a convolution of two norms":
            return [self.two(self.first(x)) + z]
        if self.kind == "another reader":
            return [self.other(y) + self.two(self.second(z))]
        return [self.two(self.second(z))]


@pytest.mark.parametrize(("kind", "left"), [
    ("plain", 0), ("a norm of two convolutions", 1), ("a convolution of two norms", 2), ("another reader", 1),
    ("no weights", 1), ("no statistics", 1), ("a sum in place", 1),
])  # fmt: skip
def test_what_cannot_be_folded_stays_as_it_is(kind: str, left: int) -> None:
    torch.manual_seed(0)
    encoder = Crooked(kind).eval()
    for norm in (encoder.one, encoder.two):
        for name, tensor in norm.state_dict().items():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2) if name.endswith("var") else tensor.normal_(0.5)
    (folded,) = fold_batch_norm(torch.nn.Sequential(encoder))
    used = (folded.one,) if kind == "a norm of two convolutions" else (folded.one, folded.two)
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in used) == left
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(folded(x)[0], encoder(x)[0], rtol=1e-4, atol=1e-5)


def test_streams_of_two_kinds_are_joined() -> None:
    torch.manual_seed(0)
    options = {"width": 8, "dilations": [], "depth": 0, "rounds": 0}
    appearance = build_dbsnet("xxs", encoder=NAME, **options, streams=["appearance"]).eval()
    motion = build_dbsnet("xxs", **options, streams=["motion"]).eval()
    named = build_dbsnet("xxs", **options, streams=["motion"], encoder={"motion": "mobilevit"}).eval()
    named.load_state_dict(motion.state_dict())
    for first, second in ((appearance, motion), (motion, appearance), (named, appearance)):
        both = add_stream(first, second)
        assert both.config["encoder"] == {"appearance": NAME, "motion": "mobilevit"}
        assert build_dbsnet(**both.config).state_dict().keys() == both.state_dict().keys()
        frames, flows = torch.rand(2, 1, 1, 3, 64, 96).unbind()
        with torch.no_grad():
            torch.testing.assert_close(both(frames, flows), first(frames, flows))
    # Padded to what the more demanding of the two needs.
    wilile = build_dbsnet("xxs", "wilile", **options, encoder={"appearance": NAME, "motion": "mobilevit"}).eval()
    assert wilile.multiple == 64
    with torch.no_grad():
        assert wilile(*torch.rand(2, 1, 1, 3, 32, 96)).shape == (1, 1, 1, 32, 96)
    with pytest.raises(ValueError, match="encoder must be one name or one for each"):
        build_dbsnet("xxs", encoder={"appearance": NAME})


def test_a_network_of_four_stages_is_an_encoder_too() -> None:
    encoder = TimmEncoder("convnext_atto")
    maps = encoder(torch.rand(1, 3, 64, 96))
    assert [tuple(y.shape[1:]) for y in maps] == [
        (channels, 64 // stride, 96 // stride) for channels, stride in zip(encoder.channels, encoder.reductions)
    ]


@pytest.mark.parametrize("name", ["convnext_atto", "mobilevit_xxs"])
def test_a_checkpoint_of_the_whole_network_has_other_names(name: str, tmp_path: Path) -> None:
    """Where timm takes the maps from a list of the network's parts."""
    torch.manual_seed(0)
    whole = timm.create_model(name, pretrained=False, num_classes=0, global_pool="").eval()
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    encoder = TimmEncoder(name).eval()
    load_timm(encoder, tmp_path / "whole.pth")
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        last = whole.forward_features((x - encoder.mean.view(3, 1, 1)) / encoder.std.view(3, 1, 1))
        torch.testing.assert_close(encoder(x)[3], last)


@pytest.mark.parametrize("name", [NAME, "hrnet_w18_small", "convnext_atto", "mobileone_s0"])
def test_what_maps_up_to_a_stride_are_made_by_is_frozen(name: str) -> None:
    encoder = TimmEncoder(name).train()
    x = torch.rand(1, 3, 64, 96)
    for place, stride in enumerate(encoder.reductions[:3]):
        for parameter in encoder.parameters_to(stride):
            parameter.requires_grad_(False)
        assert encoder.net.training
        assert [y.requires_grad for y in encoder(x)] == [False] * (place + 1) + [True] * (3 - place)
    assert any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("key", ["bn1.running_var", "blocks.0.0.conv_pw.weight"])
def test_a_checkpoint_without_one_tensor_is_refused(whole: torch.nn.Module, tmp_path: Path, key: str) -> None:
    torch.save({k: v for k, v in whole.state_dict().items() if k != key}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=f"1 missing .first: {key}"):
        load_timm(TimmEncoder(NAME), tmp_path / "w.pth")


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="timm has no network 'tf_efficientnet_lite9'"):
        build_dbsnet("xxs", encoder="tf_efficientnet_lite9")
    with pytest.raises(ValueError, match="strides"):
        TimmEncoder("vit_tiny_patch16_224")
    # Of three stages.
    with pytest.raises(ValueError, match="timm's levit_128s cannot be an encoder: (feature|list) index"):
        TimmEncoder("levit_128s")
    # timm 1.0.3 refuses it by itself.
    refusals = r"( of any size of picture: .*224|: features_only not implemented)"
    with pytest.raises(ValueError, match="coat_tiny cannot be an encoder" + refusals):
        TimmEncoder("coat_tiny")
    with pytest.raises(ValueError, match="maxvit_pico_rw_256 cannot be an encoder of any size of picture"):
        TimmEncoder("maxvit_pico_rw_256")
    torch.save({"conv_stem.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "some.pth")
    with pytest.raises(CheckpointError, match=r"some.pth does not fit timm's tf_efficientnet_lite0: \d+ missing"):
        load_timm(TimmEncoder(NAME), tmp_path / "some.pth")
