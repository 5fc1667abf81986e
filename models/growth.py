"""Give a trained network what it was built without (the other stream, propagation, refinement, graph attention), or
take from it all but one stream, to train that on and put it back, or one of these parts, to see what that is worth; or
give it other values of options on which no weight depends.

Not of the paper, as far as the public record goes. Two streams trained together lean on the easier one, motion; each
trained alone must learn to do without the other (as FusionSeg did, arXiv:1701.05384). And single frames have nothing
that propagation or refinement could learn from, so that a first stage without them is time saved.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from models.co_dga import CoDGA
from models.convlstm import DenseBiConvLSTM
from models.dbsnet import STREAMS, DBSNet, build_dbsnet
from models.fold import affine
from models.refinement import RefinementLayer
from models.state_dicts import describe_mismatch

ABSENT: dict[str, Any] = {"dilations": [], "depth": 0, "rounds": 0}
"""Options of `DBSNet` that say how much of a part there is, and their values where it is absent."""

WEIGHTLESS = ("dropout", "window", "pool")
"""Options of `DBSNet` on which no weight depends."""

PARTS = {"propagation": "dilations", "refinement": "depth", "co_dga": "rounds"}
"""The parts, and the option that each is about."""


def is_growth(before: Any, after: Any) -> bool:
    """Whether the value of an option in `ABSENT` goes from absent to present."""
    return not before and bool(after)


def grow(net: DBSNet, **parts: Any) -> DBSNet:
    """A network with the weights of `net` and the parts that it lacks, which start as the identity.

    Every residual branch of a new part ends in weights of zero, so the grown network gives what `net` gives, and
    learns from there. Of Co-DGA that is the last convolution, and the messages' scale starts at 1. A network built with
    Co-DGA has it the other way about, but then nothing except the scale can learn while it is near 0, and in 1,510
    steps of `configs/lite2_finetune.yaml` and `lite2_refine.yaml` it stayed there (0.005 in the mean).

    Args:
        parts: ``dilations``, ``depth`` or ``rounds``, as in `DBSNet`; `net` must have none of that part yet.

    Raises:
        ValueError: an option that is no part, or a part that `net` has already.
    """
    for key, value in parts.items():
        if key not in ABSENT:
            raise ValueError(f"{key} is no part that a network can be given later; those are {', '.join(ABSENT)}")
        if not is_growth(net.config[key], value):
            raise ValueError(f"{key}: the network has {net.config[key]} already and cannot be given {value}")
    grown = build_dbsnet(**{**net.config, **parts})
    _begin_as_identity(grown, parts)
    state, old = grown.state_dict(), net.state_dict()
    # Strict but for the new parts: each tensor of the old network has its place.
    problem = describe_mismatch(
        {key: value.shape for key, value in state.items() if key in old},
        {key: value.shape for key, value in old.items()},
    )
    if problem:
        raise ValueError(f"the weights do not fit the grown network: {problem}")
    grown.load_state_dict({**state, **old})
    return grown.train(net.training)


def adjust(net: DBSNet, **options: Any) -> DBSNet:
    """A network with the weights of `net` and other values of options on which no weight depends.

    With another ``window`` or ``pool`` its results are others than those of `net`: the weights were trained with the
    values before.

    Args:
        options: some of `WEIGHTLESS`, as in `DBSNet`.

    Raises:
        ValueError: an option that is none of them, or a value that `DBSNet` does not take.
    """
    other = [key for key in options if key not in WEIGHTLESS]
    if other:
        raise ValueError(f"{other[0]} cannot be adjusted, since weights depend on it; {', '.join(WEIGHTLESS)} can")
    adjusted = build_dbsnet(**{**net.config, **options})
    adjusted.load_state_dict(net.state_dict())
    return adjusted.to(next(net.parameters()).device).train(net.training)


def take_out(net: DBSNet, part: str) -> DBSNet:
    """A network without one part, with the other weights of `net`: what does the part contribute?

    The rest of the network was trained with it, so this tells what is lost without it rather than what a network
    trained without it would reach. `grow` gives the part back, to begin anew.

    Args:
        part: ``propagation``, ``refinement`` or ``co_dga`` (its messages; the read-out that fuses the streams stays).

    Raises:
        ValueError: no such part, or a network that has none of it.
    """
    if part not in PARTS:
        raise ValueError(f"there is no part {part!r} to take out; those are {', '.join(PARTS)}")
    option = PARTS[part]
    if not net.config[option]:
        raise ValueError(f"the network has no {part} to take out ({option} {net.config[option]})")
    rest = build_dbsnet(**{**net.config, option: ABSENT[option]})
    own = net.state_dict()
    rest.load_state_dict({key: own[key] for key in rest.state_dict()})
    return rest.to(next(net.parameters()).device).train(net.training)


def add_stream(net: DBSNet, other: DBSNet) -> DBSNet:
    """A network of both streams from two that have one each.

    It gives what `net` gives, and learns from there: `other` contributes its encoder and lateral convolutions, and all
    that reads both streams has weights of zero for that one at first. Skip, read-out and decoder of `other` are left.

    Args:
        other: of the stream that `net` lacks, or of both, of which that one is taken.

    Raises:
        ValueError: the networks do not have one stream each and not the same one, are otherwise not alike, or have
            propagation, refinement or rounds of graph attention already.
    """
    if len(net.streams) == 1 and len(other.streams) == len(STREAMS):
        other = keep_stream(other, next(stream for stream in STREAMS if stream not in net.streams))
    for item in (net, other):
        present = [key for key in ABSENT if item.config[key]]
        if len(item.streams) != 1 or present:
            raise ValueError(
                f"expected networks of one stream with {', '.join(ABSENT)} empty, got streams {list(item.streams)}"
                + "".join(f", {key} {item.config[key]}" for key in present)
            )
    if net.streams == other.streams:
        raise ValueError(f"the two do not fit together: both are of the {net.streams[0]} stream")
    own = ("streams", "encoder")
    differing = [key for key in net.config if key not in own and net.config[key] != other.config[key]]
    if differing:
        words = ", ".join(f"{key} {net.config[key]} and {other.config[key]}" for key in differing)
        raise ValueError(f"the two do not fit together: {words}")
    names = {**net.encoder_names, **other.encoder_names}
    both = build_dbsnet(**{**net.config, "streams": list(STREAMS), "encoder": _encoder_option(names)})
    old, added = net.state_dict(), other.state_dict()
    theirs = _prefixes(other.streams[0])
    state = {}
    for key, place in both.state_dict().items():
        value = added[key] if key.startswith(theirs) else old[key]
        if value.shape != place.shape:  # a convolution that reads both: (C, c, k, k) of (C, c + c', k, k)
            zeros = place.new_zeros(len(place), place.shape[1] - value.shape[1], *place.shape[2:])
            value = torch.cat([value if stream in net.streams else zeros for stream in STREAMS], 1)
        state[key] = value
    both.load_state_dict(state)
    return both.train(net.training)


def keep_stream(net: DBSNet, stream: str) -> DBSNet:
    """One stream of a network of both, without propagation, refinement and rounds of graph attention.

    It is where that stream goes on being trained alone, before `add_stream` joins it with another. What read both
    streams keeps the weights for this one: with these absent, it gives what `net` gives where the other
    stream's maps are zero.

    Args:
        stream: ``appearance`` or ``motion``.

    Raises:
        ValueError: the network has not both streams, or there is no such stream.
    """
    if stream not in STREAMS:
        raise ValueError(f"there is no stream {stream!r}; the two are {' and '.join(STREAMS)}")
    if len(net.streams) != len(STREAMS):
        raise ValueError(f"expected a network of both streams, got one of {list(net.streams)}")
    one = build_dbsnet(**{**net.config, **ABSENT, "streams": [stream], "encoder": net.encoder_names[stream]})
    old, state = net.state_dict(), {}
    for key, place in one.state_dict().items():
        value = old[key]
        if value.shape != place.shape:  # a convolution that read both, in the order of the network's streams
            columns = place.shape[1]
            value = value[:, :columns] if stream == net.streams[0] else value[:, -columns:]
        state[key] = value
    one.load_state_dict(state)
    return one.train(net.training)


def put_back(net: DBSNet, one: DBSNet) -> DBSNet:
    """`net` with the stream of `one`, a network of one stream, in its place: encoder and lateral convolutions.

    For a stream that was taken out by `keep_stream` and trained on alone, where `net` has parts that `add_stream` would
    have to begin anew. What reads the stream's maps is still that of `net`, which was trained for others, so the
    result has to be trained on. `one` may have an encoder of another kind, best one that has learned the maps of the
    one it replaces (`main.py --teacher_maps encoders`); then what the skip reads of it comes from `one`, too.

    Raises:
        ValueError: `one` has not one stream, `net` has no such stream, or their variants or widths differ.
    """
    if len(one.streams) != 1 or one.streams[0] not in net.streams:
        raise ValueError(f"expected a network of one stream of {list(net.streams)}, got one of {list(one.streams)}")
    (stream,) = one.streams
    own = _prefixes(stream)
    names = {**net.encoder_names, **one.encoder_names}
    both = build_dbsnet(**{**net.config, "encoder": _encoder_option(names)})
    place, new = ({k: v for k, v in item.state_dict().items() if k.startswith(own)} for item in (both, one))
    problem = describe_mismatch(*({key: value.shape for key, value in state.items()} for state in (place, new)))
    if problem:
        raise ValueError(f"the {stream} streams do not fit: {problem}")
    rest = {key: value for key, value in net.state_dict().items() if not key.startswith(own)}
    if names != net.encoder_names:
        rest.update(_skip_of(net, one))
    both.load_state_dict({**rest, **new})
    return both.to(next(net.parameters()).device).train(net.training)


@torch.no_grad()
def _skip_of(net: DBSNet, one: DBSNet) -> dict[str, Tensor]:
    """Weights of `net`'s skip that give of the stream of `one` what the skip of `one` gives, and of the other stream
    what they gave. Each skip is a 1x1 convolution and a batch norm with running statistics, so it is affine.
    """
    (stream,) = one.streams
    scales, offsets = zip(*(affine(skip.norm) for skip in (net.skip, one.skip)))
    columns = net.skip.conv.weight.split([encoder.channels[0] for encoder in net.encoders.values()], 1)
    shares = dict(zip(net.streams, columns))
    # Where a channel's scale is 0 its batch norm hides whatever the convolution gives.
    shares[stream] = one.skip.conv.weight * (scales[1] / torch.where(scales[0] == 0, 1, scales[0])).view(-1, 1, 1, 1)
    return {
        "skip.conv.weight": torch.cat([shares[name] for name in net.streams], 1),
        "skip.norm.bias": net.skip.norm.bias + offsets[1] - offsets[0],
    }


def _encoder_option(names: dict[str, str]) -> str | dict[str, str]:
    """The encoders of each stream as `DBSNet` takes them: one name where they are of one kind."""
    kinds = set(names.values())
    return names if len(kinds) > 1 else kinds.pop()


def _prefixes(stream: str) -> tuple[str, ...]:
    """How the names of the weights begin that a stream has for itself: its encoder's and its lateral convolutions'."""
    return f"encoders.{stream}.", f"laterals.{stream}."


@torch.no_grad()
def _begin_as_identity(net: DBSNet, options: Collection[str]) -> None:
    """Zero what the residual branches of these parts (keys of `ABSENT`) end in."""
    for module in net.modules():
        ends: list[nn.Module] = []
        if isinstance(module, DenseBiConvLSTM) and "dilations" in options:
            ends = [module.proj]
        elif isinstance(module, RefinementLayer) and "depth" in options:
            ends = [module.position, module.out, module.mlp[-1]]
        elif isinstance(module, CoDGA) and "rounds" in options:
            ends = [module.mix]
            module.scale.fill_(1)
        for end in ends:
            for parameter in end.parameters():
                parameter.zero_()
