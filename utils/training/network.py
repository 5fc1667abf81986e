"""The network that a training run begins with, built and loaded as the options of `main.py` say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from models import DBSNet, build_dbsnet, load_dbsnet
from models.dbsnet import STREAMS
from models.errors import CheckpointError
from models.growth import ABSENT, WEIGHTLESS, add_stream, adjust, grow, is_growth, keep_stream
from models.state_dicts import load_state
from utils.errors import UserError, nearest
from utils.training.config import NETWORK_KEYS, TrainConfig


def build_network(config: TrainConfig, checkpoint: dict[str, Any] | None) -> DBSNet:
    """The network with the weights it starts from: a checkpoint's, ``--finetune``'s, ``--pretrained``'s or random ones.

    Raises:
        CheckpointError: weights of another network, or an unreadable file.
        UserError: an option of ``network`` that `DBSNet` does not have, or a value that it does not take.
    """
    for key in config.network:
        if key in ("variant", "flavour"):
            raise UserError(f"network: {key} is an option of its own; give --{key} {config.network[key]}")
        if key not in NETWORK_KEYS:  # also where a checkpoint says what to build, and nothing else would look at it
            raise UserError(f"network: unknown key {key!r}; {nearest(key, NETWORK_KEYS)}")
    torch.manual_seed(config.seed)
    asked = {"variant": config.variant, "flavour": config.flavour, **config.network}
    if checkpoint is not None:
        path = config.resume_path
        try:
            net = build_dbsnet(**checkpoint["config_model"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: its configuration does not describe a network of this version ({error}); go on with the "
                "version that wrote it, or give another --save_dir"
            ) from None
        load_state(net, checkpoint["model"], path)
    elif config.finetune is not None:
        path = Path(config.finetune)
        net = load_dbsnet(path)
        if config.keep_stream is not None:
            try:
                net = keep_stream(net, config.keep_stream)
            except ValueError as error:
                raise CheckpointError(f"{path}: keep_stream: {error}") from None
        if config.add_stream is not None:
            try:
                net = add_stream(net, load_dbsnet(config.add_stream))
            except ValueError as error:
                raise CheckpointError(f"{config.add_stream} cannot be added to {path}: {error}") from None
        # A first stage may have gone without some parts; they begin here.
        parts = {key: asked[key] for key in ABSENT if key in asked and is_growth(net.config[key], asked[key])}
        with user_network():
            net = grow(net, **parts) if parts else net
            changed = {key: asked[key] for key in WEIGHTLESS if asked.get(key, net.config[key]) != net.config[key]}
            net = adjust(net, **changed) if changed else net
    else:
        with user_network():
            net = build_dbsnet(**asked)
        if config.pretrained is not None:
            net.load_backbones(config.pretrained)
        return net
    other = {key: net.config[key] for key in asked if key in net.config and net.config[key] != asked[key]}
    if other:
        words = ", ".join(f"{key} {value}, not {asked[key]}" for key, value in other.items())
        flags = [f"--{key} {value}" for key, value in other.items() if key in ("variant", "flavour")]
        if "streams" in other and checkpoint is None:
            flags += [f"--keep_stream {stream}" for stream in net.streams if asked["streams"] == [stream]]
            if asked["streams"] == list(STREAMS):
                flags.append("--add_stream FILE (of the other stream)")
        raise CheckpointError(
            f"{path}: weights of another network ({words}); "
            + (f"give {' '.join(flags)}, or " if flags else "give ")
            + ("another --save_dir, or --resume none" if checkpoint is not None else "another checkpoint")
        )
    return net


def load_teacher(config: TrainConfig, net: DBSNet, device: torch.device) -> DBSNet | None:
    """The network that ``--teacher`` names, beside ``net`` and as it is, or where ``--teacher_maps`` are those of the
    encoders, ``net``'s stream of it; None without one.

    Raises:
        CheckpointError: unreadable, or a network whose maps are of another width or of other streams.
    """
    if config.teacher is None:
        return None
    teacher = load_dbsnet(config.teacher)
    if config.teacher_maps == "encoders" and teacher.streams != net.streams:
        if len(net.streams) > 1 or net.streams[0] not in teacher.streams:
            raise CheckpointError(
                f"{config.teacher} cannot teach this network's encoders: it has {' and '.join(teacher.streams)}, "
                f"expected {' and '.join(net.streams)}"
            )
        teacher = keep_stream(teacher, net.streams[0])
    for key, value in (("width", net.width), ("multiple", net.multiple)):
        if getattr(teacher, key) != value:
            raise CheckpointError(
                f"{config.teacher} cannot teach this network: {key} {getattr(teacher, key)}, expected {value}"
            )
    teacher = teacher.requires_grad_(False).to(device)
    return teacher.to(memory_format=torch.channels_last) if config.channels_last else teacher


@contextmanager
def user_network() -> Iterator[None]:
    """Says of options that build no network that they are the user's ``network``."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UserError(f"network: {error}; the valid keys and values are those of models.DBSNet") from None
