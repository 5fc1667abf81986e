"""A network that gets its propagation, refinement and graph attention after a first stage without them."""

from __future__ import annotations

import copy

import pytest
import torch

from models import DBSNet, build_dbsnet
from models.dbsnet import STREAMS
from models.growth import PARTS, WEIGHTLESS, add_stream, adjust, grow, keep_stream, put_back, take_out

TINY = {"width": 16, "hidden": 4}
FULL = {"dilations": [1, 2], "depth": 1, "rounds": 2}


@pytest.fixture(scope="module")
def plain() -> DBSNet:
    torch.manual_seed(0)
    net = build_dbsnet("xxs", **TINY, dilations=[], depth=0, rounds=0)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.eval()


@pytest.mark.parametrize("part", [*FULL, "all"])
def test_a_grown_network_gives_what_it_gave_and_can_learn(plain: DBSNet, part: str) -> None:
    parts = FULL if part == "all" else {part: FULL[part]}
    grown = grow(plain, **parts)
    assert not grown.training
    assert grown.config == {**plain.config, **parts}
    frames, flows = torch.rand(2, 1, 3, 3, 64, 96).unbind()
    with torch.no_grad():
        torch.testing.assert_close(grown(frames, flows), plain(frames, flows))
    new = {name: p for name, p in grown.named_parameters() if name not in dict(plain.named_parameters())}
    assert new
    # A step along the gradient moves the new parts: the zeros are a beginning and not a dead end.
    optimizer = torch.optim.SGD(grown.parameters(), lr=1.0)
    before = {name: p.detach().clone() for name, p in new.items()}
    for _ in range(3):
        optimizer.zero_grad()
        grown(frames, flows).square().mean().backward()
        optimizer.step()
    stuck = [name for name, p in new.items() if torch.equal(p, before[name])]
    assert not stuck


@pytest.mark.parametrize("part", PARTS)
def test_a_part_taken_out_is_a_part_that_adds_nothing(part: str) -> None:
    torch.manual_seed(1)
    net = build_dbsnet("xxs", **TINY, **FULL).eval()
    for fusion in net.fusion:
        torch.nn.init.normal_(fusion.scale)  # or Co-DGA's messages would be silent already
    start, ends = {
        "propagation": ("propagation.", (".proj.weight", ".proj.bias")),
        "refinement": (
            "refinement.",
            tuple(f".{x}.{y}" for x in ("position", "out", "mlp.2") for y in ("weight", "bias")),
        ),
        "co_dga": ("fusion.", (".scale",)),
    }[part]
    silent = copy.deepcopy(net)
    for name, parameter in silent.named_parameters():
        if name.startswith(start) and name.endswith(ends):
            torch.nn.init.zeros_(parameter)
    frames, flows = torch.rand(2, 1, 3, 3, 64, 96).unbind()
    with torch.no_grad():
        before, rest = net(frames, flows), take_out(net, part)
        torch.testing.assert_close(rest(frames, flows), silent(frames, flows))
        assert (rest(frames, flows) - before).abs().max() > 1e-3
        assert torch.equal(net(frames, flows), before)  # it is left as it was
        # It can be given again, to begin anew.
        again = grow(rest, **{PARTS[part]: net.config[PARTS[part]]})
        assert again.config == net.config
        torch.testing.assert_close(again(frames, flows), rest(frames, flows))
    with pytest.raises(ValueError, match=PARTS[part]):
        take_out(rest, part)


def test_a_part_that_does_not_exist_is_not_taken_out(plain: DBSNet) -> None:
    with pytest.raises(ValueError, match="decoder.*propagation"):
        take_out(plain, "decoder")


def test_grown_graph_attention_learns_more_than_its_scale(plain: DBSNet) -> None:
    """With a scale of 0, as a network is built, no other weight of the messages has a gradient."""
    frames, flows = torch.rand(2, 1, 1, 3, 64, 96).unbind()
    learning = {}
    for name, net in (("built", build_dbsnet("xxs", **TINY, **FULL)), ("grown", grow(plain, **FULL))):
        net(frames, flows).square().sum().backward()
        fusion = net.fusion[0]
        learning[name] = [fusion.mix.weight.grad.abs().max() > 0, fusion.scale.grad.abs().max() > 0]
    assert learning == {"built": [False, True], "grown": [True, False]}


def test_what_cannot_be_grown_is_refused(plain: DBSNet) -> None:
    with pytest.raises(ValueError, match="width is no part"):
        grow(plain, width=32)
    with pytest.raises(ValueError, match="depth: the network has 1 already"):
        grow(grow(plain, depth=1), depth=2)
    with pytest.raises(ValueError, match="rounds: the network has 0 already and cannot be given 0"):
        grow(plain, rounds=0)


def test_options_without_weights_can_be_adjusted_and_take_effect(plain: DBSNet) -> None:
    net = grow(plain, **FULL)
    with torch.no_grad():
        for parameter in net.refinement.parameters():  # grown as the identity, which is the same in any window
            parameter.normal_(std=0.5)
    assert {"dropout": 0.0, "window": 8, "pool": 2} == {key: net.config[key] for key in WEIGHTLESS}
    maps = torch.randn(1, 6, 32, 4, 6)
    with torch.no_grad():
        before = net.refine(1, maps)
        for key, value in (("window", 2), ("pool", 1)):
            other = adjust(net, **{key: value})
            assert other.config == {**net.config, key: value} and not other.training
            assert (other.refine(1, maps) - before).abs().mean() > 1e-2
            torch.testing.assert_close(adjust(other, **{key: net.config[key]}).refine(1, maps), before)
        frames, flows = torch.rand(2, 1, 2, 3, 64, 96).unbind()
        dropping = adjust(net, dropout=0.5)
        torch.testing.assert_close(dropping(frames, flows), net(frames, flows))
        assert not torch.allclose(dropping.train()(frames, flows), net.train()(frames, flows))
    with pytest.raises(ValueError, match="width cannot be adjusted, since weights depend on it; dropout, window, pool"):
        adjust(plain, width=32)
    with pytest.raises(ValueError, match="window must be a whole number of at least 1, got 0"):
        adjust(plain, window=0)


@pytest.mark.parametrize("first", STREAMS)
def test_a_network_with_a_stream_added_gives_what_it_gave_and_uses_both(first: str) -> None:
    second = next(stream for stream in STREAMS if stream != first)
    none = {"dilations": [], "depth": 0, "rounds": 0}
    torch.manual_seed(1)
    nets = {stream: build_dbsnet("xxs", **TINY, **none, streams=[stream]).eval() for stream in STREAMS}
    both = add_stream(nets[first], nets[second])
    assert both.config == {**nets[first].config, "streams": list(STREAMS)} and not both.training
    frames, flows = torch.rand(2, 1, 2, 3, 64, 96).unbind()
    with torch.no_grad():
        torch.testing.assert_close(both(frames, flows), nets[first](frames, flows))
        # The added encoder is the other network's, not a new one.
        for stream, inputs in (("appearance", frames), ("motion", flows)):
            for given, expected in zip(both.encoders[stream](inputs[0]), nets[stream].encoders[stream](inputs[0])):
                torch.testing.assert_close(given, expected)
    optimizer = torch.optim.SGD(both.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        both(frames, flows).square().mean().backward()
        optimizer.step()
    unused = [
        name
        for name, parameter in both.named_parameters()
        if name.startswith(f"encoders.{second}") and parameter.ndim == 4 and not parameter.grad.abs().sum() > 0
    ]
    assert not unused


def test_streams_that_do_not_fit_are_refused(plain: DBSNet) -> None:
    none = {"dilations": [], "depth": 0, "rounds": 0}
    motion = build_dbsnet("xxs", **TINY, **none, streams=["motion"])
    with pytest.raises(ValueError, match="both are of the motion stream"):
        add_stream(motion, motion)
    with pytest.raises(ValueError, match="width 16 and 32"):
        add_stream(motion, build_dbsnet("xxs", width=32, hidden=4, **none, streams=["appearance"]))
    with pytest.raises(ValueError, match=r"got streams \['appearance', 'motion'\]"):
        add_stream(plain, motion)
    with pytest.raises(ValueError, match="depth 1"):
        add_stream(motion, build_dbsnet("xxs", **TINY, **{**none, "depth": 1}, streams=["appearance"]))


@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_kept_gives_what_the_network_gave_with_the_other_silent(plain: DBSNet, stream: str) -> None:
    whole = grow(plain, **FULL)  # the parts begin as the identity, so leaving them out changes nothing
    kept = keep_stream(whole, stream)
    other = next(name for name in STREAMS if name != stream)
    assert kept.config == {**plain.config, "streams": [stream]} and not kept.training
    frames, flows = torch.rand(2, 1, 2, 3, 64, 96).unbind()
    silent = keep_all_but_maps(whole, other)
    with torch.no_grad():
        expected = silent(frames, flows)
        torch.testing.assert_close(kept(frames, flows), expected)
        assert not torch.allclose(whole(frames, flows), expected)
    # And it is one that the other can be added to again.
    again = add_stream(kept, keep_stream(whole, other))
    assert again.config == plain.config
    # The other may as well come within a network of both.
    for key, value in add_stream(kept, whole).state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_is_kept_of_a_network_that_has_motion_first(stream: str) -> None:
    torch.manual_seed(2)
    whole = build_dbsnet("xxs", **TINY, dilations=[], depth=0, rounds=0, streams=["motion", "appearance"]).eval()
    frames, flows = torch.rand(2, 1, 1, 3, 64, 96).unbind()
    silent = keep_all_but_maps(whole, next(name for name in STREAMS if name != stream))
    with torch.no_grad():
        torch.testing.assert_close(keep_stream(whole, stream)(frames, flows), silent(frames, flows))


@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_put_back_changes_that_stream_alone(plain: DBSNet, stream: str) -> None:
    torch.manual_seed(3)
    whole = grow(plain, **FULL)
    one = keep_stream(whole, stream)
    for key, value in put_back(whole, one).state_dict().items():  # as it was taken out
        assert torch.equal(value, whole.state_dict()[key]), key
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    both = put_back(whole, one)
    assert both.config == whole.config and not both.training
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        for name, expected in ((stream, one), (next(n for n in STREAMS if n != stream), whole)):
            maps, theirs = (net.encoders[name](x) for net in (both, expected))
            for lateral, other, y, z in zip(both.laterals[name], expected.laterals[name], maps[1:], theirs[1:]):
                assert torch.equal(y, z) and torch.equal(lateral(y), other(z))
    left = {k: v for k, v in both.state_dict().items() if not k.startswith(("encoders.", "laterals."))}
    assert left and all(torch.equal(value, whole.state_dict()[key]) for key, value in left.items())


@pytest.mark.parametrize("streams", [STREAMS, STREAMS[::-1]])
def test_a_stream_can_be_put_into_the_place_of_one_with_another_encoder(streams: tuple[str, ...]) -> None:
    torch.manual_seed(4)
    kinds = {"appearance": "tf_efficientnet_lite0", "motion": "mobilevit"}
    whole = build_dbsnet("xxs", **TINY, **FULL, streams=list(streams), encoder=kinds).eval()
    one = build_dbsnet("xxs", **TINY, dilations=[], depth=0, rounds=0, streams=["appearance"]).eval()
    for net in (whole, one):
        net.skip.norm.running_mean.normal_()
        net.skip.norm.running_var.uniform_(0.5, 2)
        with torch.no_grad():
            net.skip.norm.weight.uniform_(-2, 2)
            net.skip.norm.bias.normal_()
    both = put_back(whole, one)
    assert both.encoder_names == dict.fromkeys(streams, "mobilevit") and both.config["encoder"] == "mobilevit"
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        # Its stream gives what it gave where the other's maps are zero, ...
        for found, expected in zip(keep_stream(both, "appearance").encode(x, x)[0], one.encode(x, x)[0], strict=True):
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(keep_stream(both, "appearance").encode(x, x)[1], one.encode(x, x)[1])
        # ... and the other adds to the skip what it added before.
        added = []
        for net in (whole, both):
            silent = {s: [torch.zeros_like(y) for y in maps] for s, maps in net.encoder_maps(x, x).items()}
            moving = {**silent, "motion": net.encoder_maps(x, x)["motion"]}
            values = [net.skip.norm(net.skip.conv(torch.cat([maps[s][0] for s in net.streams], 1)))
                      for maps in (moving, silent)]  # fmt: skip
            added.append(values[0] - values[1])
        torch.testing.assert_close(*added)
    own = ("encoders.appearance", "laterals.appearance", "skip.")
    left = {key: value for key, value in both.state_dict().items() if not key.startswith(own)}
    assert left and all(torch.equal(value, whole.state_dict()[key]) for key, value in left.items())


def test_a_network_in_training_stays_in_it(plain: DBSNet) -> None:
    whole = grow(copy.deepcopy(plain).train(), **FULL)
    motion, appearance = (keep_stream(whole, stream) for stream in ("motion", "appearance"))
    made = whole, motion, put_back(whole, motion), take_out(whole, "refinement"), add_stream(motion, appearance)
    assert all(net.training for net in made)


def test_streams_that_cannot_be_put_back_are_refused(plain: DBSNet) -> None:
    motion = keep_stream(plain, "motion")
    with pytest.raises(ValueError, match=r"one stream of \['appearance', 'motion'\], got one of \['appearance', 'mot"):
        put_back(plain, plain)
    with pytest.raises(ValueError, match=r"one stream of \['appearance'\], got one of \['motion'\]"):
        put_back(keep_stream(plain, "appearance"), motion)
    wider = build_dbsnet("xxs", width=32, hidden=4, dilations=[], depth=0, rounds=0, streams=["motion"])
    with pytest.raises(ValueError, match="the motion streams do not fit: .*expected .16, .* got .32, "):
        put_back(plain, wider)


def keep_all_but_maps(net: DBSNet, stream: str) -> DBSNet:
    """A copy of `net` whose encoder of that stream gives maps of zeros, before and after the lateral convolutions."""
    silent = copy.deepcopy(net)
    silent.encoders[stream].register_forward_hook(lambda module, inputs, maps: [torch.zeros_like(x) for x in maps])
    for lateral in silent.laterals[stream]:
        lateral.register_forward_hook(lambda module, inputs, x: torch.zeros_like(x))
    return silent


def test_a_stream_that_is_not_there_is_not_kept(plain: DBSNet) -> None:
    with pytest.raises(ValueError, match="no stream 'sound'"):
        keep_stream(plain, "sound")
    with pytest.raises(ValueError, match=r"got one of \['motion'\]"):
        keep_stream(keep_stream(plain, "motion"), "motion")
