"""Trains DBSNet.

    # two GPUs (or, where there are none, two CPU processes)
    CUDA_VISIBLE_DEVICES=0,1 python -m torch.distributed.launch --nproc_per_node=2 main.py
    CUDA_VISIBLE_DEVICES=0,1 python -m torch.distributed.launch --nproc_per_node=2 main.py \\
        --finetune first_stage_weight_path
    torchrun --nproc-per-node=2 main.py
    # one process
    python main.py --data_dir data --datasets DAVIS-2016 --variant xxs --size 192 320

Options come from configs/stage1.yaml (configs/finetune.yaml with --finetune, or the file given by --config), then
from the flags below. The run's folder, --save_dir, gets config.yaml, log.jsonl, last.pt (to resume), best.pt (best J
on val_sequences) and weights.safetensors (weights only, for tool.py --checkpoint). The same command again goes on
from last.pt.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from datasets.images import LazyImages, load_flow_image, load_frame, load_mask, require_size
from datasets.sequences import VideoSequence
from models import Predictor
from models.convlstm import recurrence_in_planes
from models.losses import distillation_loss, segmentation_loss
from models.state_dicts import load_state
from models.weights import save_weights
from utils.distributed import (
    Processes,
    broadcast_buffers,
    environment_number,
    set_batch_norm,
    start_processes,
    stop_processes,
    train_mode,
)
from utils.errors import UserError, exit_on_user_error
from utils.evaluation.metrics import jaccard
from utils.files import write_text
from utils.stopping import INTERRUPTED, StopRequest
from utils.training.checkpoint import load_checkpoint, save_checkpoint
from utils.training.config import TrainConfig, parse_args
from utils.training.data import build_clips, build_sequences
from utils.training.ema import WeightAverage
from utils.training.loading import ClipOrder, build_loader, read_batches, rescale, stop_workers, to_device, to_floats
from utils.training.network import build_network, load_teacher
from utils.training.runlog import RunLog

RUN_FILES = ("last.pt", "best.pt", "weights.safetensors", "log.jsonl", "config.yaml", "panels")
# Options that say what J is of: scores under others of these are not to be compared.
VALIDATION_OPTIONS = ("val_datasets", "val_sequences", "val_frames", "val_size")
# Options that say how this call runs, not what is trained: a resumed run may change them without a word.
CALL_OPTIONS = ("resume", "save_dir", "stop_after", "max_minutes", "workers", "cache", "device", "log_every")


@dataclass
class Run:
    """Everything that one training run carries along."""

    config: TrainConfig
    processes: Processes
    net: nn.Module  # the plain network, whose names the checkpoints have
    model: nn.Module  # the same, compiled and distributed
    average: WeightAverage | None
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
    teacher: nn.Module | None = None  # in evaluation mode, without gradients
    pending_validation: bool = False  # a validation that the last call had no time for
    started: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        return Path(self.config.save_dir)

    @property
    def has_work(self) -> bool:
        """Whether there is anything left to do."""
        return self.step < self.total_steps or self.pending_validation

    @property
    def tested_net(self) -> nn.Module:
        """The network whose weights are validated and handed out."""
        return self.average.net if self.average else self.net


# ---------------------------------------------------------------------------------------------------------- building


def build_optimizer(config: TrainConfig, net: nn.Module) -> torch.optim.Optimizer:
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
    positions = math.prod(math.ceil(side / multiple) * multiple // 32 for side in (height, width))
    values = positions * config.clip_len * config.batch_size * (processes.world_size if config.bn == "sync" else 1)
    if config.bn != "frozen" and values == 1:
        raise UserError(
            f"size: clips of {height}x{width} pixels with clip_len 1 and batch_size 1 leave batch norms a single value "
            "at stride 32, which has no statistics; give a larger --size, --batch_size or --clip_len, or --bn frozen"
        )


def distribute(config: TrainConfig, processes: Processes, net: nn.Module) -> nn.Module:
    """``net`` compiled and wrapped for the processes, sharing its parameters."""
    model: Any = torch.compile(net) if config.compile else net
    if processes.world_size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[processes.device.index] if processes.device.type == "cuda" else None,
        # Without their loss the auxiliary heads get no gradient; with one frame neither does a recurrence.
        find_unused_parameters=config.aux_weight == 0 or (config.clip_len == 1 and bool(net.config["dilations"])),
    )


# ---------------------------------------------------------------------------------------------------------- training


def train_one_epoch(run: Run, loader: DataLoader, order: ClipOrder) -> bool:
    """Steps to the end of the epoch, or of training; False if asked to stop before."""
    config, processes = run.config, run.processes
    train_mode(run.net, config.bn)
    order.epoch, order.first_step = divmod(run.step, run.steps_per_epoch)
    loader.dataset.set_epoch(order.epoch)
    meter = Meter(run)
    batches = read_batches(loader)
    while run.step < run.total_steps:
        waiting = time.monotonic()
        parts = [batch for _, batch in zip(range(config.accumulate), batches)]
        if not parts:
            break  # end of the epoch
        meter.waited += time.monotonic() - waiting
        labelled = sum(int(part["valid"].sum()) for part in parts)
        total_labelled, stopping = processes.reduce([labelled, float(run.stop.wanted)])
        if stopping:
            return False
        size = step_size(config, run.step)
        parts = [rescale(to_device(part, processes.device), size) for part in parts]
        losses, norm, logits = train_step(run, parts, total_labelled)
        meter.add(losses, norm)
        run.log.advance()
        last = run.step == run.total_steps
        if run.step % config.log_every == 0 or last:
            meter.report()
        if config.panels_every and run.step % config.panels_every == 0 and processes.is_main:
            run.log.picture("train", picture(parts[-1], logits), run.step)
        if config.val_every and run.step % config.val_every == 0 and not last:
            if not validate_and_save(run):
                return False
            meter = Meter(run)
        elif config.save_every and run.step % config.save_every == 0 and not last:
            save(run)
        if config.stop_after and run.step - run.first_step >= config.stop_after and not last:
            if not config.val_every and run.step % run.steps_per_epoch == 0:
                run.pending_validation = bool(run.validation)  # what an epoch ends with is the next call's
            return False
    return True


def train_step(
    run: Run, parts: list[dict[str, Any]], total_labelled: float
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """One optimiser step on the batches ``parts`` (of `to_device`); returns losses, gradient norm and the last batch's
    logits.

    The losses are this process's share: summed over the processes they are the means over all labelled frames.
    """
    config, processes = run.config, run.processes
    # Dropout and the like are a function of the step, too: nothing but the step has to be kept to go on exactly.
    torch.manual_seed(_seed(config.seed, run.step, processes.rank))
    factor = lr_factor(config, run.step, run.total_steps, run.steps_per_epoch)
    for group in run.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    losses: dict[str, Tensor] = {}
    logits = torch.empty(0)
    for number, part in enumerate(parts):
        batch = to_floats(part)
        # Mean over the labelled frames of all parts and processes, however they are spread.
        share = int(part["valid"].sum()) / max(1.0, total_labelled)
        if isinstance(run.model, DistributedDataParallel):
            run.model.require_backward_grad_sync = number == len(parts) - 1  # once a step is enough
        with autocast(config, processes.device):
            if run.teacher is None:
                logits, aux = run.model(batch["frames"], batch["flows"], return_aux=True)
            else:
                logits, aux, path = run.model(batch["frames"], batch["flows"], return_path=True)
                with torch.no_grad():
                    *_, lesson = run.teacher(batch["frames"], batch["flows"], return_path=True)
        part_losses = segmentation_loss(
            logits,
            batch["masks"],
            batch["valid"],
            aux,
            multiple=run.net.multiple,
            aux_weight=config.aux_weight,
            edge_weight=config.edge_weight,
        )
        if run.teacher is not None:
            part_losses["teacher"] = distillation_loss(path, lesson)
            part_losses["total"] = part_losses["total"] + config.teacher_weight * part_losses["teacher"]
        # Distributed gradients are averaged over the processes, hence the factor.
        run.scaler.scale(part_losses["total"] * (share * processes.world_size)).backward()
        for name, value in part_losses.items():
            losses[name] = losses.get(name, 0.0) + value.detach() * share
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.net.parameters(), config.grad_clip or math.inf)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    if run.average is not None:
        run.average.update(run.net, run.step)
    return losses, norm, logits


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """Mixed precision as the options ask for it."""
    dtype = torch.float16 if config.amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=config.amp != "none")


def _seed(*words: int) -> int:
    """One well mixed seed from several numbers."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Meter:
    """Sums up the steps between two lines of the log; numbers stay on the device until then."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._reset()

    def _reset(self) -> None:
        self.losses: dict[str, Tensor] = {}
        self.norm = torch.zeros(())
        self.steps, self.waited, self.since = 0, 0.0, time.monotonic()

    def add(self, losses: dict[str, Tensor], norm: Tensor) -> None:
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value
        self.norm, self.steps = norm, self.steps + 1

    def report(self) -> None:
        """Writes a line; raises UserError if the loss is no longer a number."""
        run, config = self.run, self.run.config
        names = list(self.losses)
        values = run.processes.reduce([float(self.losses[name]) / self.steps for name in names])
        losses = dict(zip(names, values))
        elapsed = max(1e-9, time.monotonic() - self.since)
        frames = self.steps * config.batch_size * config.accumulate * run.processes.world_size * config.clip_len
        line = {
            "step": run.step,
            "epoch": (run.step - 1) // run.steps_per_epoch,
            "loss": losses.pop("total"),
            **losses,
            "lr": run.optimizer.param_groups[-1]["lr"],
            "grad_norm": float(self.norm),
            "frames_per_s": frames / elapsed,
            "data_wait": self.waited / elapsed,
            "minutes": (time.monotonic() - run.started) / 60,
        }
        run.log.record("train", line)
        left = (run.total_steps - run.step) * elapsed / self.steps / 60
        run.log.say(
            f"step {run.step}/{run.total_steps} epoch {line['epoch']} loss {line['loss']:.4f} "
            + " ".join(f"{name} {value:.4f}" for name, value in losses.items())
            + f" lr {line['lr']:.2e} norm {line['grad_norm']:.2f} {line['frames_per_s']:.1f} frames/s "
            f"wait {line['data_wait']:.0%} left {left:.0f} min"
        )
        if not math.isfinite(line["loss"]):
            raise UserError(diverged(run, f"loss is {line['loss']}"))
        self._reset()


def diverged(run: Run, what: str) -> str:
    """What to tell of a run that has lost its numbers."""
    return (
        f"the {what} at step {run.step}. Try a lower lr, longer warmup_steps, grad_clip or amp none; with them the "
        f"same command goes on from {run.folder / 'last.pt'}, which is from before, or anew where there is none yet"
    )


def picture(batch: dict[str, Any], logits: Tensor) -> np.ndarray:
    """Frames, flow, masks and predictions of a batch's first clip; (H, W, 3) uint8."""
    from utils.visualise import clip_panel

    probability = logits[0].detach().float().sigmoid().cpu()
    frames, flows, masks, valid = (batch[name][0].cpu() for name in ("frames", "flows", "masks", "valid"))
    return clip_panel(frames, flows, masks, probability, valid)


# -------------------------------------------------------------------------------------------------------- validation


def validate(run: Run) -> dict[str, float] | None:
    """Mean J of each sequence by the DAVIS rule (first and last frame dropped, > 127 of uint8); None if stopped.

    The processes share the sequences.
    """
    config, processes = run.config, run.processes
    net = run.tested_net.eval()
    broadcast_buffers(net, processes)  # or batch norms without sync would be each process's own, and rank 0's are saved
    amp = None if config.amp == "none" else config.amp
    predictor = Predictor(net, device=processes.device, size=config.val_size or config.size, amp=amp)
    mine: dict[str, float] | None = {}
    # Two data sets may each have a sequence of one name, DAVIS-2016 and DAVIS-2017 for instance.
    shared = Counter(sequence.name for sequence in run.validation)
    names = {
        id(sequence): f"{sequence.dataset}/{sequence.name}" if shared[sequence.name] > 1 else sequence.name
        for sequence in run.validation
    }
    for sequence in run.validation[processes.rank :: processes.world_size]:
        stems = sequence.stems[: config.val_frames or None]
        frames = LazyImages(sequence.frames[: len(stems)], load_frame)
        flows = LazyImages([sequence.flow_path(stem) for stem in stems], load_flow_image)
        scores = []
        for index, probability in predictor(frames, flows):
            if run.stop.wanted:
                mine = None
                break
            if 0 < index < len(stems) - 1 and stems[index] in sequence.masks:
                path = sequence.masks[stems[index]]
                truth = load_mask(path, sequence.mask_rule)
                require_size(path, truth.shape, probability.shape, sequence.frames[index])
                scores.append(jaccard(np.rint(probability * 255) > 127, truth > 0))
        if mine is None:
            break
        mine[names[id(sequence)]] = float(np.mean(scores))
    shares = processes.gather(mine)
    if any(share is None for share in shares):
        return None
    return {name: score for share in shares for name, score in sorted(share.items())}


def validate_and_save(run: Run) -> bool:
    """Saves, validates, keeps the best; False if asked to stop meanwhile: the validation waits for the next call."""
    run.pending_validation = bool(run.validation)
    save(run)
    if not run.validation:
        return True
    began = time.monotonic()
    scores = validate(run)
    if scores is None:
        return False
    train_mode(run.net, run.config.bn)
    mean = float(np.mean(list(scores.values())))
    improved = run.best is None or mean > run.best["J"]
    if improved:
        run.best = {"J": mean, "step": run.step}
    run.pending_validation = False
    save(run, best=improved)
    values = {"step": run.step, "epoch": (run.step - 1) // run.steps_per_epoch, "J": mean, "best_J": run.best["J"]}
    run.log.record("val", {**values, "seconds": time.monotonic() - began, "sequences": scores})
    words = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
    run.log.say(f"validation at step {run.step}: J {mean:.4f}{' (best)' if improved else ''}: {words}")
    return True


# ------------------------------------------------------------------------------------------------ saving and resuming


def save(run: Run, best: bool = False) -> None:
    """Writes best.pt if this is the best, the weights to test with, and last.pt.

    Raises:
        UserError: weights that are no numbers any more, in all processes; what is on disk stays as it is.
    """
    # Here and not only where losses are reported: between two lines of the log a run could save what it has lost.
    if not all(bool(torch.isfinite(parameter).all()) for parameter in run.net.parameters()):
        raise UserError(diverged(run, "weights are not finite any more"))
    if not run.processes.is_main:
        return
    checkpoint = {
        "model": run.net.state_dict(),
        "ema": run.average.net.state_dict() if run.average else None,
        "config_model": run.net.config,
        "config": run.config.to_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": position(run),
        "scaler": run.scaler.state_dict(),
        "step": run.step,
        "epoch": run.step // run.steps_per_epoch,
        "best": run.best,
        # Each step draws from generators seeded by these and the rank, so they are all the random state there is.
        "rng": {"seed": run.config.seed, "step": run.step},
        "pending_validation": run.pending_validation,
    }
    # last.pt is the last: whoever dies in between goes on from the one before, and validates again.
    if best:
        save_checkpoint(run.folder / "best.pt", checkpoint)
    if best or run.best is None:  # without validation the last weights are the ones to test
        facts = {
            "step": str(run.step),
            "J": f"{run.best['J']:.4f}" if run.best else "not validated",
            "size": " ".join(map(str, run.config.size)),  # what tool.py tests at unless told otherwise
        }
        save_weights(run.folder / "weights.safetensors", run.tested_net, metadata=facts)
    save_checkpoint(run.folder / "last.pt", checkpoint)


def position(run: Run) -> dict[str, int]:
    """What the order of the data and the learning rate hang on."""
    clips = run.config.batch_size * run.config.accumulate * run.processes.world_size
    return {"clips_per_step": clips, "steps_per_epoch": run.steps_per_epoch, "total_steps": run.total_steps}


def find_checkpoint(config: TrainConfig, processes: Processes) -> dict[str, Any] | None:
    """The checkpoint to go on from, if any."""
    if config.resume != "auto" and environment_number("TORCHELASTIC_MAX_RESTARTS", 0):
        raise UserError(
            f"--resume {config.resume}: the launcher may start this command again (--max-restarts), and each time it "
            "would lose what was trained since; take --resume auto with a new --save_dir"
            + ("" if config.resume == "none" else f", and copy {config.resume} there as last.pt")
        )
    if config.resume == "none":
        return None
    path = config.resume_path
    present = processes.gather(path.is_file())
    if any(present) and not all(present):
        raise UserError(f"{path} is there for some processes only; save_dir must be a folder that all machines share")
    if config.resume == "auto" and not any(present):
        return None
    checkpoint = load_checkpoint(path)
    for key in ("pretrained", "finetune", "add_stream"):
        asked, started_from = getattr(config, key), checkpoint["config"].get(key)
        if asked and Path(asked).resolve() != Path(started_from or "").resolve():
            raise UserError(
                f"{path} is of a run that started from {started_from or 'no other weights'}, not from {asked} "
                f"({key}); give another --save_dir, or --resume none to start anew"
            )
        setattr(config, key, started_from)  # how the run began, whether or not this call says it again
    before = checkpoint["config"].get("keep_stream")
    if config.keep_stream and config.keep_stream != before:
        raise UserError(
            f"{path} is of a run that started with keep_stream {before or 'none'}, not {config.keep_stream}; give "
            "another --save_dir, or --resume none to start anew"
        )
    config.keep_stream = before
    return checkpoint


def set_older_run_aside(run: Run, checkpoint: dict[str, Any] | None) -> str | None:
    """Moves the files of another run out of the way, into ``previous-N/``, where this call would write over them: it
    begins anew, or goes on from another folder's checkpoint. Returns what to tell.
    """
    config, folder = run.config, run.folder
    if checkpoint is not None and (config.resume_path.resolve().parent == folder.resolve() or not run.has_work):
        return None  # it goes on with the run of this folder, or writes nothing
    # Without a checkpoint to go on from, weights are what is worth keeping.
    worth = RUN_FILES if config.resume != "auto" else ("best.pt", "weights.safetensors")
    run.processes.wait()  # until all have read the weights that they start from, which may lie there
    if not run.processes.is_main or not any((folder / name).exists() for name in worth):
        return None
    number = 1
    while (folder / f"previous-{number}").exists():
        number += 1
    aside = folder / f"previous-{number}"
    aside.mkdir()
    for path in [*(folder / name for name in RUN_FILES), *folder.glob("events.out.tfevents.*")]:
        if path.exists():
            os.replace(path, aside / path.name)
    return f"{folder} had the files of another run, which are in {aside} now"


def restore(run: Run, checkpoint: dict[str, Any]) -> None:
    """Puts the run where the checkpoint was made (its network has its weights already)."""
    path = run.config.resume_path
    saved, now = checkpoint["scheduler"], position(run)
    for name, words in (("clips_per_step", "clips per step (processes × batch_size × accumulate)"),
                        ("steps_per_epoch", "steps per epoch")):  # fmt: skip
        if saved[name] != now[name]:
            raise UserError(
                f"{path}: the run has {saved[name]} {words}, this call {now[name]}, so its data cannot go on in order; "
                f"make them equal, or start anew from the weights: --finetune {path} --save_dir another"
            )
    if (checkpoint["ema"] is None) != (run.average is None):
        raise UserError(f"{path}: the run was made with --ema {checkpoint['config']['ema']}; keep it on or off")
    if run.average is not None:
        load_state(run.average.net, checkpoint["ema"], path)
    # What the optimiser's state is of; older runs could freeze nothing.
    made = {"freeze_stride": 0, **checkpoint["config"]}
    for name in ("optimizer", "freeze_stride"):
        if made[name] != getattr(run.config, name):
            raise UserError(f"{path}: the run was made with --{name} {made[name]}; keep it")
    own = ("base_lr", "weight_decay", "momentum")  # those of this call, if they were changed
    asked = [{key: group[key] for key in own if key in group} for group in run.optimizer.param_groups]
    for group in checkpoint["optimizer"]["param_groups"]:
        if "fused" in group:  # as this call's device wants it: the step counters have to be where it looks for them
            group["fused"] = run.optimizer.param_groups[0]["fused"]
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    for group, options in zip(run.optimizer.param_groups, asked):
        group.update(options)
    if checkpoint["scaler"] and run.scaler.is_enabled():
        run.scaler.load_state_dict(checkpoint["scaler"])
    run.step, run.best = checkpoint["step"], checkpoint["best"]
    run.pending_validation = checkpoint.get("pending_validation", False)


def forget_best(run: Run, checkpoint: dict[str, Any]) -> str | None:
    """Begins the search for the best weights anew where those of the checkpoint are not at hand, or were found by
    another validation: their J would keep all that follow from being handed out. Returns what to tell.
    """
    if run.best is None or not run.validation or not run.has_work:
        return None
    before, now = checkpoint["config"], run.config.to_dict()
    changed = [key for key in VALIDATION_OPTIONS if key in before and before[key] != now[key]]
    kept, path = None, run.folder / "best.pt"
    if run.processes.is_main and path.is_file():
        # Who goes back to an earlier checkpoint of the folder finds the best weights of what came after it there.
        kept = run.best["step"] if run.config.resume == "auto" else load_checkpoint(path)["step"]
    kept = run.processes.gather(kept)[0]
    if kept != run.best["step"]:
        why = f"is not in {path}" + (f", which is of step {kept}" if kept is not None else "")
    elif changed:
        why = f"was of another validation ({', '.join(changed)})"
    else:
        return None
    found, run.best = run.best, None
    return f"the best so far, J {found['J']:.4f} at step {found['step']}, {why}: the best from here on is kept"


# -------------------------------------------------------------------------------------------------------------- main


def train(config: TrainConfig, processes: Processes) -> int:
    """A whole run, or the part of it that this call has time for; returns the exit code."""
    with StopRequest(config.max_minutes) as stop:
        run, loader, order = build_run(config, processes, stop)
        try:
            finished = not run.pending_validation or validate_and_save(run)
            while finished and run.step < run.total_steps:
                finished = train_one_epoch(run, loader, order)
                if finished and (not config.val_every or run.step == run.total_steps):
                    finished = validate_and_save(run)
                elif finished:
                    save(run)
            return finish(run, finished)
        finally:
            stop_workers(loader)
            run.log.close()


def build_run(config: TrainConfig, processes: Processes, stop: StopRequest) -> tuple[Run, DataLoader, ClipOrder]:
    """All parts of a run, put where its checkpoint was made if there is one, and announced."""
    check_machine(config, processes)
    checkpoint = find_checkpoint(config, processes)
    net = build_network(config, checkpoint).to(processes.device)
    if config.channels_last:
        net = net.to(memory_format=torch.channels_last)
        if processes.device.type == "cuda" or config.amp != "none":
            recurrence_in_planes(net)
    average = WeightAverage(net, config.ema) if config.ema else None
    teacher = load_teacher(config, net, processes.device)
    if config.freeze_stride:
        net.freeze_encoders(config.freeze_stride)
    check_statistics(config, processes, net.multiple)
    net = set_batch_norm(net, config.bn, processes)
    training, validation = build_sequences(config)
    clips_per_step = config.batch_size * config.accumulate * processes.world_size
    clips, steps_per_epoch = build_clips(config, training, clips_per_step)
    total_steps = config.max_steps or config.epochs * steps_per_epoch
    order = ClipOrder(
        batch=config.batch_size,
        accumulate=config.accumulate,
        steps=steps_per_epoch,
        rank=processes.rank,
        world_size=processes.world_size,
        seed=config.seed,
    )
    loader = build_loader(clips, order, workers=config.workers, pin_memory=processes.device.type == "cuda")
    log = RunLog(
        Path(config.save_dir),
        step=checkpoint["step"] if checkpoint else 0,
        total=total_steps,
        tensorboard=config.tensorboard,
        active=processes.is_main,
    )
    run = Run(
        config=config,
        processes=processes,
        net=net,
        model=distribute(config, processes, net),
        average=average,
        optimizer=build_optimizer(config, net),
        scaler=torch.amp.GradScaler(processes.device.type, enabled=config.amp == "fp16"),
        log=log,
        stop=stop,
        validation=validation,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        teacher=teacher,
    )
    notes = []
    if checkpoint is not None:
        restore(run, checkpoint)
    run.first_step = run.step
    # Only now is anything in the run's folder changed: a call that is refused leaves it as it was.
    notes.append(set_older_run_aside(run, checkpoint))
    if checkpoint is not None:
        notes.append(forget_best(run, checkpoint))
    log.open()
    for note in filter(None, notes):
        log.say(note)
    announce(run, checkpoint, {name: len(sequences) for name, sequences in training.items()})
    return run, loader, order


def check_machine(config: TrainConfig, processes: Processes) -> None:
    """Kernels as the options want them; raises UserError for what this machine cannot do."""
    if config.amp == "fp16" and processes.device.type != "cuda":
        raise UserError("amp: fp16 needs a GPU; use bf16 or none on the CPU")
    if config.amp == "bf16" and processes.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError(f"amp: {torch.cuda.get_device_name()} has no bf16; use fp16 or none")
    if config.deterministic:
        # cuBLAS reads this when it is first used, which is later than here.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    # cuDNN's search for the fastest kernels took 45 seconds on an H100, and training was no faster with them.
    torch.backends.cudnn.benchmark = False


def announce(run: Run, checkpoint: dict[str, Any] | None, sequences: dict[str, int]) -> None:
    """Prints and saves the resolved options, and prints the quantities that follow from them."""
    if not run.processes.is_main:
        return
    config, processes = run.config, run.processes
    text = config.to_yaml()
    if run.step < run.total_steps or not (run.folder / "config.yaml").exists():  # else it is that of the run, not ours
        write_text(run.folder / "config.yaml", text)
    run.log.say(text.rstrip())
    parameters = sum(parameter.numel() for parameter in run.net.parameters())
    machine = f"CPU with {torch.get_num_threads()} threads"
    if processes.device.type == "cuda":
        machine = torch.cuda.get_device_name()
    run.log.say(f"PyTorch {torch.__version__}, {processes.world_size} x {machine}; {parameters:,} parameters")
    sizes = ", ".join(f"{name} {count} sequences" for name, count in sequences.items())
    run.log.say(f"{sizes + '; ' if sizes else ''}{len(run.validation)} sequences held out for validation")
    clips = position(run)["clips_per_step"]
    run.log.say(f"{clips} clips per step, {run.steps_per_epoch} steps per epoch, {run.total_steps} steps in all")
    if config.warmup_steps >= run.total_steps:
        reached = config.lr * lr_factor(config, run.total_steps - 1, run.total_steps, run.steps_per_epoch)
        run.log.say(f"warmup_steps {config.warmup_steps} are the whole run: lr rises to {reached:.2e} in its last step")
    if checkpoint is not None:
        run.log.say(f"resuming {config.resume_path} at step {run.step}")
        before = checkpoint["config"]
        for key, value in config.to_dict().items():
            if key not in CALL_OPTIONS and before.get(key) != value:
                run.log.say(f"changed since: {key} {before.get(key)} -> {value}")


def finish(run: Run, finished: bool) -> int:
    """Says how it ended, saves if it ended early; returns the exit code."""
    if finished:
        weights = run.folder / "weights.safetensors"
        if run.first_step == run.step and not weights.exists():
            run.log.say(f"{run.config.resume_path} has its {run.step} steps already; nothing was done or written here")
            return 0
        score = f", best J {run.best['J']:.4f} at step {run.best['step']}" if run.best else ""
        run.log.say(f"done: {run.step} steps{score}; weights to test with: {weights}")
        return 0
    save(run)
    caught = [name for name in run.processes.gather(run.stop.signal and run.stop.signal.name) if name]
    why = caught[0] if caught else "as asked by max_minutes or stop_after"
    how = "" if run.config.resume == "auto" else " with --resume auto"
    run.log.say(
        f"stopped at step {run.step} of {run.total_steps} ({why}); saved {run.folder / 'last.pt'}; "
        f"to go on, run the same command again{how}"
    )
    return INTERRUPTED if caught else 0


def main(arguments: Sequence[str] | None = None) -> int:
    with exit_on_user_error():
        config, local_rank = parse_args(arguments, __doc__ or "")
        processes = start_processes(config.device, local_rank)
        try:
            return train(config, processes)
        except KeyboardInterrupt:
            print("interrupted at once; what was not in last.pt yet is lost", file=sys.stderr)
            return INTERRUPTED
        finally:
            stop_processes()


if __name__ == "__main__":
    sys.exit(main())
