"""The assembled network: gradients, sizes, lengths, ablations, configuration."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from models import DBSNet, build_dbsnet

SMALL = {"variant": "xxs", "width": 16, "hidden": 4, "dilations": (1, 2), "depth": 1, "window": 4}


def small(**options) -> DBSNet:
    torch.manual_seed(0)
    return build_dbsnet(**{**SMALL, **options})


def clip(b: int = 1, t: int = 2, height: int = 64, width: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(b, t, 3, height, width, generator=generator) for _ in range(2))


@pytest.mark.parametrize("flavour", ["reference", "wilile"])
def test_every_parameter_gets_a_gradient(flavour: str) -> None:
    net = small(flavour=flavour).train()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith("fusion.") and (name.endswith("scale") or name.endswith("distance")):
                parameter.normal_()  # they start at 0 and stop what is behind them
    # 128 pixels: each transformer then sees more than one patch, without which attention has nothing to weigh.
    frames, flows = clip(2, 3, 128, 128)
    logits, aux = net(frames, flows, return_aux=True)
    generator = torch.Generator().manual_seed(1)
    sum((y * torch.randn(y.shape, generator=generator)).sum() for y in (logits, *aux)).backward()
    absent = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    zero = [
        name for name, parameter in net.named_parameters() if parameter.grad is not None and not parameter.grad.any()
    ]
    assert not absent and not zero
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_a_fresh_network_leaves_no_parameter_without_a_gradient() -> None:
    """DistributedDataParallel waits for ever for a parameter that takes no part."""
    net = small().train()
    logits, aux = net(*clip(1, 2), return_aux=True)
    (logits.mean() + sum(y.mean() for y in aux)).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("flavour", ["reference", "wilile"])
@pytest.mark.parametrize(
    ("length", "height", "width"), [(1, 64, 64), (3, 50, 70), (2, 33, 129), (1, 1, 1), (6, 32, 64)]
)
def test_any_length_and_size(flavour: str, length: int, height: int, width: int) -> None:
    net = small(flavour=flavour).eval()
    with torch.inference_mode():
        logits, aux = net(*clip(2, length, height, width), return_aux=True)
    assert logits.shape == (2, length, 1, height, width)
    assert logits.isfinite().all()
    padded = [-(-side // net.multiple) * net.multiple for side in (height, width)]
    assert [tuple(y.shape) for y in aux] == [(2, length, 1, padded[0] // s, padded[1] // s) for s in (8, 16, 32)]


def test_other_sizes_are_padded_by_their_border_and_cropped_never_stretched() -> None:
    net = small().eval()
    frames, flows = clip(1, 2, 50, 70)

    def extend(x: Tensor) -> Tensor:
        rows = torch.arange(64).clamp(max=49)
        columns = torch.arange(96).clamp(max=69)
        return x[..., rows, :][..., columns]

    with torch.inference_mode():
        torch.testing.assert_close(net(frames, flows), net(extend(frames), extend(flows))[..., :50, :70])


def test_the_network_is_its_parts_in_the_order_of_the_abstract() -> None:
    """Each part is tested by itself; here they are put together once more, by the diagram in README.md."""
    net = small(window=8).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith("fusion.") and name.endswith(("scale", "distance")):
                parameter.normal_()  # they start at 0, and messages change nothing then
    frames, flows = clip(1, 3, 64, 96)
    with torch.inference_mode():
        maps = {"appearance": net.encoders["appearance"](frames[0]), "motion": net.encoders["motion"](flows[0])}
        fused = []
        for level in range(3):  # strides 8, 16, 32; of the encoders' maps the first is that at stride 4
            streams = [net.laterals[stream][level](maps[stream][level + 1]) for stream in ("appearance", "motion")]
            x = net.propagation[level](torch.cat(streams, 1)[None])
            if level > 0:
                parts = zip(("appearance", "motion"), x.split(16, 2))
                x = torch.cat([net.refinement[stream][level - 1](part) for stream, part in parts], 2)
            fused.append(net.fusion[level](x[0]))
        skip = net.skip(torch.cat([maps["appearance"][0], maps["motion"][0]], 1))
        path = [net.decoder.blocks[0](fused[2])]
        for block, finer in zip(net.decoder.blocks[1:], (fused[1], fused[0], skip)):
            path.append(block(finer + nn.functional.interpolate(path[-1], scale_factor=2, mode="bilinear")))
        expected = nn.functional.interpolate(net.decoder.head(path[3]), scale_factor=4, mode="bilinear")
        logits, aux, given = net(frames, flows, return_maps="decoder")
        torch.testing.assert_close(logits[0], expected)
        for found, stride in zip(aux, (8, 16, 32), strict=True):  # each head on the map of the path at its stride
            (on,) = (x for x in path if x.shape[-1] == 96 // stride)
            torch.testing.assert_close(found[0], net.decoder.aux_heads[(8, 16, 32).index(stride)](on))
        for found, wanted in zip(given, path, strict=True):
            torch.testing.assert_close(found, wanted)
        *_, given = net(frames, flows, return_maps="encoders")
        levels = [
            torch.cat([net.laterals[s][level](maps[s][level + 1]) for s in ("appearance", "motion")], 1)
            for level in range(3)
        ]
        for found, wanted in zip(given, [*levels, skip], strict=True):  # before propagation
            torch.testing.assert_close(found, wanted)
        # At stride 16 attention looks at 2 x 2 positions together, at 32, where a quarter as many are, at each.
        for stream in ("appearance", "motion"):
            assert [[layer.pool for layer in part.layers] for part in net.refinement[stream]] == [[2], [1]]


def test_clips_of_a_batch_are_independent() -> None:
    net = small().eval()
    frames, flows = clip(3, 2)
    with torch.inference_mode():
        together = net(frames, flows)
        for b in range(3):
            torch.testing.assert_close(
                net(frames[b : b + 1], flows[b : b + 1]), together[b : b + 1], rtol=1e-4, atol=1e-5
            )


def test_information_flows_both_ways_in_time_and_between_streams() -> None:
    net = small().eval()
    frames, flows = clip(1, 6)  # longer than the Transformer's window of 4: the recurrence must carry it
    with torch.inference_mode():
        y = net(frames, flows)
        for which in (frames, flows):
            for t in (0, 5):
                kept = which[:, t].clone()
                which[:, t] = 1 - kept
                assert ((net(frames, flows) - y).abs().amax((0, 2, 3, 4)) > 0).all()
                which[:, t] = kept


@pytest.mark.parametrize("options", [
    {"streams": ("appearance",)}, {"streams": ("motion",)}, {"dilations": ()}, {"depth": 0}, {"rounds": 0},
    {"streams": ("motion",), "dilations": (), "depth": 0, "rounds": 0},
])  # fmt: skip
def test_ablations_run_and_train(options: dict) -> None:
    net = small(**options).train()
    frames, flows = clip(1, 2)
    logits, aux = net(frames, flows, return_aux=True)
    (logits.mean() + sum(y.mean() for y in aux)).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    if options.get("streams") == ("appearance",):
        assert torch.equal(net.eval()(frames, flows), net(frames, 1 - flows))
    if options.get("streams") == ("motion",):
        assert torch.equal(net.eval()(frames, flows), net(1 - frames, flows))


def test_without_propagation_and_refinement_frames_are_independent() -> None:
    net = small(dilations=(), depth=0).eval()
    frames, flows = clip(1, 3)
    with torch.inference_mode():
        alone = torch.cat([net(frames[:, t : t + 1], flows[:, t : t + 1]) for t in range(3)], 1)
        torch.testing.assert_close(net(frames, flows), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"streams": ("motion",), "dilations": (), "dropout": 0.1, "flavour": "wilile"}]
)
def test_config_is_json_and_rebuilds_the_network(options: dict) -> None:
    net = small(**options)
    config = json.loads(json.dumps(net.config))
    given = json.loads(json.dumps({**SMALL, **options}))
    assert {key: config[key] for key in given} == given
    again = build_dbsnet(**config)
    assert again.config == net.config
    for encoder in again.encoders.values():
        rates = {module.p for module in encoder.modules() if isinstance(module, nn.Dropout)}
        assert rates == ({options["dropout"]} if "dropout" in options else set())
    again.load_state_dict(net.state_dict())
    frames, flows = clip()
    with torch.inference_mode():
        assert torch.equal(again.eval()(frames, flows), net.eval()(frames, flows))


def test_a_network_for_which_nothing_is_said_is_the_one_described() -> None:
    """In README.md and in the files of its parts; another would be trained without a word, and fit the same weights."""
    assert build_dbsnet("xxs").config == {
        "variant": "xxs", "flavour": "reference", "width": 48, "hidden": 8, "dilations": [1, 2, 4], "depth": 2,
        "window": 8, "pool": 2, "rounds": 2, "streams": ["appearance", "motion"], "dropout": 0.0,
        "encoder": "mobilevit",
    }  # fmt: skip


def test_encoder_and_head_parameters_are_a_partition() -> None:
    net = small()
    encoder, head = list(net.encoder_parameters()), list(net.head_parameters())
    everything = {id(parameter) for parameter in net.parameters()}
    assert {id(p) for p in encoder} | {id(p) for p in head} == everything
    assert len(encoder) + len(head) == len(everything)
    assert sum(p.numel() for p in encoder) == 2 * 951_024


def test_bad_input_and_bad_options_are_refused() -> None:
    net = small()
    frames, flows = clip()
    for a, b in ((frames[0], flows[0]), (frames, flows[:, :1]), (frames[:, :0], flows[:, :0]), (frames[:, :, :1],) * 2):
        with pytest.raises(ValueError, match=r"\(B, T, 3, H, W\)"):
            net(a, b)
    with pytest.raises(ValueError, match="unknown variant 'm'"):
        build_dbsnet("m")
    with pytest.raises(ValueError, match="streams"):
        small(streams=())
    with pytest.raises(ValueError, match="streams"):
        small(streams=("appearance", "sound"))
    with pytest.raises(ValueError, match="streams"):
        small(streams=("motion", "motion"))
    with pytest.raises(ValueError, match="flavour"):
        small(flavour="apple")
    with pytest.raises(TypeError):
        small(unknown=1)


@pytest.mark.parametrize("options", [
    {"width": -16}, {"width": "16"}, {"width": 16.5}, {"hidden": 0}, {"dilations": (1, 0)}, {"dilations": (1.0,)},
    {"dilations": 3}, {"depth": -1}, {"depth": True}, {"window": 0}, {"window": 2.5}, {"window": None}, {"pool": 0},
    {"rounds": -1}, {"rounds": "2"}, {"streams": "motion"},
])  # fmt: skip
def test_numbers_that_no_network_has_are_refused_when_it_is_built(options: dict) -> None:
    """A window of 0 frames, for one, would be looked for without end when the first video comes."""
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}.* must be (a whole number|lists)"):
        small(**options)


@pytest.mark.parametrize("encoder", [None, 3, ["mobilevit"], {"appearance": "mobilevit", "motion": None}])
def test_encoders_are_named(encoder: object) -> None:
    with pytest.raises(ValueError, match="encoder must be one name"):
        small(encoder=encoder)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.25), (torch.float16, 0.04)])
def test_autocast_stays_near_single_precision(dtype: torch.dtype, most: float) -> None:
    net = small().eval()
    frames, flows = (x.repeat_interleave(16, 3).repeat_interleave(16, 4) for x in clip(height=4, width=6))
    with torch.inference_mode():
        net.decoder.head.weight /= net(frames, flows).std()  # else all answers are alike, whatever the precision
        exact = net(frames, flows)
        with torch.autocast("cpu", dtype=dtype):
            difference = (net(frames, flows) - exact).abs()
    assert exact.std() == pytest.approx(1, rel=1e-3)
    assert 1e-4 < difference.max() < most and difference.mean() < most / 4


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
@pytest.mark.parametrize("encoder", ["mobilevit", "tf_efficientnet_lite0", "resnet18"])
def test_frozen_encoders_are_what_the_map_at_a_stride_depends_on(encoder: str, stride: int) -> None:
    if encoder != "mobilevit":
        pytest.importorskip("timm")
    net = small(encoder=encoder, streams=("appearance",))
    only = net.encoders["appearance"]
    named = dict(net.named_parameters())
    generator = torch.Generator().manual_seed(0)
    maps = only(torch.rand(2, 3, 128, 128, generator=generator))
    maps = maps[: only.reductions.index(stride) + 1]
    gradients = torch.autograd.grad(sum(x.sum() for x in maps), list(named.values()), allow_unused=True)
    feeding = {name for name, gradient in zip(named, gradients) if gradient is not None}
    net.freeze_encoders(stride)
    assert {name for name, parameter in named.items() if not parameter.requires_grad} == feeding
    assert feeding and (stride == 32) == (feeding == {name for name in named if name.startswith("encoders.")})
    net.freeze_encoders(stride)  # again: nothing more
    assert {name for name, parameter in named.items() if not parameter.requires_grad} == feeding


def test_bytes_are_no_pictures() -> None:
    images = torch.zeros(1, 1, 3, 64, 64, dtype=torch.uint8)
    with pytest.raises(TypeError, match="floating point in .0, 1., got torch.uint8"):
        small()(images, images)
