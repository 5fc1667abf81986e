"""A training run: everything that it carries along."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datasets.sequences import VideoSequence
from models import DBSNet
from utils.distributed import Processes
from utils.stopping import StopRequest
from utils.training.config import TrainConfig
from utils.training.ema import WeightAverage
from utils.training.runlog import RunLog


@dataclass
class Run:
    """Everything that one training run carries along."""

    config: TrainConfig
    processes: Processes
    net: DBSNet  # the plain network, whose names the checkpoints have
    model: nn.Module  # the same, compiled and distributed
    average: WeightAverage[DBSNet] | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    log: RunLog
    stop: StopRequest
    validation: list[VideoSequence]
    steps_per_epoch: int
    total_steps: int
    step: int = 0  # optimiser steps done
    first_step: int = 0  # where this call began
    best: dict[str, Any] | None = None  # {"J": …, "step": …}
    teacher: DBSNet | None = None  # in evaluation mode, without gradients
    pending_validation: bool = False  # a validation that the last call had no time for
    failure: Exception | None = None  # of this process's data
    started: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        return Path(self.config.save_dir)

    @property
    def has_work(self) -> bool:
        """Whether there is anything left to do."""
        return self.step < self.total_steps or self.pending_validation

    @property
    def tested_net(self) -> DBSNet:
        """The network whose weights are validated and handed out."""
        return self.average.net if self.average else self.net


def going_on(config: TrainConfig) -> str:
    """What has to be added to a command for it to go on from what it has saved: nothing, most often."""
    return "" if config.resume == "auto" else " with --resume auto"


def diverged(run: Run, what: str) -> str:
    """What to tell of a run that has lost its numbers."""
    return (
        f"the {what} at step {run.step}. Try a lower lr, longer warmup_steps, grad_clip or amp none; with them the "
        f"same command{going_on(run.config)} goes on from {run.folder / 'last.pt'}, which is from before, or anew "
        "where there is none yet"
    )
