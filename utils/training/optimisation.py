"""The optimiser, and what changes from step to step: learning rate and size of the clips."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from models import DBSNet
from utils.distributed import Processes
from utils.errors import UserError
from utils.training.config import TrainConfig


def build_optimizer(config: TrainConfig, net: DBSNet) -> torch.optim.Optimizer:
    """Four groups: encoders and the rest, each with and without weight decay (norms, biases, all that is 1-d)."""
    groups: list[dict[str, Any]] = []
    for factor, parameters in (
        (config.backbone_lr_factor, list(net.encoder_parameters())),
        (1.0, list(net.head_parameters())),
    ):
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for decay, chosen in (
            (config.weight_decay, [parameter for parameter in trained if parameter.ndim > 1]),
            (0.0, [parameter for parameter in trained if parameter.ndim <= 1]),
        ):
            lr = config.lr * factor
            groups.append({"params": chosen, "lr": lr, "base_lr": lr, "weight_decay": decay})
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    # On a GPU in one kernel for many tensors: their updates one by one are some thousand launches.
    fused = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=config.lr, fused=fused)


def lr_factor(config: TrainConfig, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """Multiple of the base learning rate for the step after ``step`` finished ones."""
    # 1. Linear warm-up, from 1/n to 1.
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    # 2. Cosine from the end of the warm-up to 0 at the end of training.
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    # 3. Or a tenth every few epochs; or as it is.
    if config.schedule == "step":
        return 0.1 ** (step // (config.step_epochs * steps_per_epoch))
    return 1.0


def step_size(config: TrainConfig, step: int) -> tuple[int, int]:
    """Height and width of the clips of the step after ``step`` finished ones, in all processes: ``size`` or, with
    ``multi_scale``, one of its multiples, in whole positions of the coarsest maps (32 pixels). Multi-scale training as
    F3Net and its successors have it, so that what is learned holds for maps of several sizes.
    """
    if not config.multi_scale:
        return config.size
    sizes = step_sizes(config)
    return sizes[np.random.default_rng([config.seed, step, 32]).integers(len(sizes))]


def step_sizes(config: TrainConfig) -> list[tuple[int, int]]:
    """The sizes (H, W) that `step_size` draws from."""
    if not config.multi_scale:
        return [config.size]
    height, width = config.size
    return [
        (max(32, round(height * multiple / 32) * 32), max(32, round(width * multiple / 32) * 32))
        for multiple in config.multi_scale
    ]


def check_statistics(config: TrainConfig, processes: Processes, multiple: int) -> None:
    """Raises UserError where the coarsest maps, at stride 32, have one value for a batch norm to take statistics of.

    Args:
        multiple: what the network pads its input to.
    """
    height, width = min(step_sizes(config), key=math.prod)
    values = (
        coarsest_positions((height, width), multiple)
        * config.clip_len
        * config.batch_size
        * (processes.world_size if config.bn == "sync" else 1)
    )
    if config.bn != "frozen" and values == 1:
        raise UserError(
            f"size: clips of {height}x{width} pixels with clip_len 1 and batch_size 1 leave batch norms a single value "
            "at stride 32, which has no statistics; give a larger --size, --batch_size or --clip_len, or --bn frozen"
        )


def coarsest_positions(size: tuple[int, int], multiple: int) -> int:
    """Positions of a map at stride 32 of a frame of `size` (H, W), which the network pads to this multiple."""
    return math.prod(math.ceil(side / multiple) * multiple // 32 for side in size)
