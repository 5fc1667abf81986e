"""Trains DBSNet.

    # two GPUs (or, where there are none, two CPU processes)
    CUDA_VISIBLE_DEVICES=0,1 python -m torch.distributed.launch --nproc_per_node=2 main.py
    CUDA_VISIBLE_DEVICES=0,1 python -m torch.distributed.launch --nproc_per_node=2 main.py \\
        --finetune first_stage_weight_path
    torchrun --nproc-per-node=2 main.py
    # one process
    python main.py --data_dir data --datasets DAVIS-2016 --variant xxs --size 192 320

Options come from configs/stage1.yaml (configs/finetune.yaml with --finetune, or the file given by --config). A flag
below replaces the file's value of that option, also the whole of a mapping. An option in neither has its default.
The run's folder, --save_dir, gets config.yaml, log.jsonl, last.pt (to resume), best.pt (best J on val_sequences),
weights.safetensors (weights only, for tool.py --checkpoint) and panels (pictures). The same command again continues
from last.pt.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import utils  # noqa: F401 - before the packages of requirements.txt, as it says which of them is missing
from utils.stopping import INTERRUPTED, StopRequest, end_by_ctrl_c

if __name__ == "__main__":
    end_by_ctrl_c(at_once=True)  # importing PyTorch takes seconds, in which people think better of it

# isort: split
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from datasets.errors import DataError
from models import DBSNet
from models.convlstm import recurrence_in_planes
from models.losses import distillation_loss, segmentation_loss
from models.precision import AMP, autocast
from utils.distributed import Processes, run_as_program, set_batch_norm, start_processes, stop_processes, train_mode
from utils.errors import UserError, exit_on_user_error
from utils.files import FolderLock, write_text
from utils.training.config import TrainConfig, parse_args
from utils.training.data import build_clips, build_sequences, check_cache
from utils.training.ema import WeightAverage
from utils.training.loading import ClipOrder, build_loader, read_batches, rescale, stop_workers, to_device, to_floats
from utils.training.network import build_network, load_teacher
from utils.training.optimisation import build_optimizer, check_statistics, lr_factor, step_size
from utils.training.resuming import (
    claim_folder,
    find_checkpoint,
    forget_best,
    is_own,
    make_folder,
    position,
    restore,
    save,
    set_older_run_aside,
)
from utils.training.run import Run, diverged, going_on
from utils.training.runlog import RunLog
from utils.training.shared_memory import MachineMemory
from utils.training.validation import validate

# Options that say how this call runs, not what is trained: a resumed run may change them without a word.
CALL_OPTIONS = ("resume", "save_dir", "stop_after", "max_minutes", "workers", "cache", "device", "log_every")


# ---------------------------------------------------------------------------------------------------------- building


def distribute(config: TrainConfig, processes: Processes, net: DBSNet) -> nn.Module:
    """``net`` compiled and wrapped for the processes, sharing its parameters."""
    model: Any = torch.compile(net) if config.compile else net
    if processes.world_size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[processes.device.index] if processes.device.type == "cuda" else None,
        # With one frame there is no state to go on from: what a recurrence does with it gets no gradient.
        find_unused_parameters=config.clip_len == 1 and bool(net.config["dilations"]),
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
        try:
            parts = [batch for _, batch in zip(range(config.accumulate), batches)]
        except (DataError, UserError) as error:
            parts, run.failure = [], error  # for `finish`, once the others know and what was learned is saved
        if not parts and run.failure is None:
            break  # end of the epoch
        meter.waited += time.monotonic() - waiting
        labelled = sum(int(part["valid"].sum()) for part in parts)
        total_labelled, stopping = processes.reduce([labelled, float(run.stop.wanted or run.failure is not None)])
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

    The losses are this process's share: summed over the processes they are the means over all labelled frames, and the
    difference from the teacher, who needs no labels, is the mean over all frames.
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
        with autocast(processes.device, AMP[config.amp]):
            if run.teacher is None:
                logits, aux = run.model(batch["frames"], batch["flows"], return_aux=True)
            else:
                which = config.teacher_maps
                logits, aux, maps = run.model(batch["frames"], batch["flows"], return_maps=which)
                with torch.no_grad():
                    *_, lesson = run.teacher(batch["frames"], batch["flows"], return_maps=which)
        part_losses = segmentation_loss(
            logits,
            batch["masks"],
            batch["valid"],
            aux,
            multiple=run.net.multiple,
            aux_weight=config.aux_weight,
            edge_weight=config.edge_weight,
        )
        # Distributed gradients are averaged over the processes, hence the factor.
        objective = part_losses["total"] * (share * processes.world_size)
        shares = {name: value.detach() * share for name, value in part_losses.items()}
        if run.teacher is not None:
            difference = distillation_loss(maps, lesson)
            even = 1 / (len(parts) * processes.world_size)  # all parts have equally many frames
            objective = objective + difference * (config.teacher_weight * even * processes.world_size)
            shares["teacher"] = difference.detach() * even
            shares["total"] = shares["total"] + config.teacher_weight * shares["teacher"]
        run.scaler.scale(objective).backward()
        for name, value in shares.items():
            losses[name] = losses.get(name, 0.0) + value
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.net.parameters(), config.grad_clip or math.inf)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    if run.average is not None:
        run.average.update(run.net, run.step)
    return losses, norm, logits


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


def picture(batch: dict[str, Any], logits: Tensor) -> np.ndarray:
    """Frames, flow, masks and predictions of a batch's first clip; (H, W, 3) uint8."""
    from utils.visualise import clip_panel

    probability = logits[0].detach().float().sigmoid().cpu()
    frames, flows, masks, valid = (batch[name][0].cpu() for name in ("frames", "flows", "masks", "valid"))
    return clip_panel(frames, flows, masks, probability, valid)


# -------------------------------------------------------------------------------------------------------- validation


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


# -------------------------------------------------------------------------------------------------------------- main


def train(config: TrainConfig, processes: Processes) -> int:
    """A whole run, or the part of it that this call has time for; returns the exit code."""
    notice = "the run stops after this step and saves; Ctrl-C again ends it at once" if processes.is_main else ""
    with StopRequest(config.max_minutes, notice) as stop, FolderLock(config.save_dir) as lock:
        run, loader, order = build_run(config, processes, stop, lock)
        had_work = run.has_work
        try:
            finished = not run.pending_validation or validate_and_save(run)
            while finished and run.step < run.total_steps:
                finished = train_one_epoch(run, loader, order)
                if finished and (not config.val_every or run.step == run.total_steps):
                    finished = validate_and_save(run)
                elif finished:
                    save(run)
            return finish(run, finished, had_work)
        finally:
            stop_workers(loader)
            run.log.close()


def build_run(
    config: TrainConfig, processes: Processes, stop: StopRequest, lock: FolderLock
) -> tuple[Run, DataLoader, ClipOrder]:
    """All parts of a run, put where its checkpoint was made if there is one, and announced."""
    check_machine(config, processes)
    claim_folder(lock, Path(config.save_dir), processes)
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
    memory = MachineMemory(processes)
    check_cache(config, training, processes, memory)
    clips, steps_per_epoch = build_clips(config, training, clips_per_step, memory, show=processes.is_main)
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
    if checkpoint is not None:
        restore(run, checkpoint)
    run.first_step = run.step
    # Only now is anything in the run's folder changed: a call that is refused leaves it as it was.
    make_folder(lock, run.folder, processes)
    stop.listen()
    notes = [set_older_run_aside(run, checkpoint)]
    if checkpoint is not None:
        notes.append(forget_best(run, checkpoint))
    if run.has_work:
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
    if run.has_work:  # else it is that of the run, not ours
        write_text(run.folder / "config.yaml", text)
    run.log.say(text.rstrip())
    parameters = sum(parameter.numel() for parameter in run.net.parameters())
    machine = f"CPU with {torch.get_num_threads()} threads"
    if processes.device.type == "cuda":
        machine = torch.cuda.get_device_name()
    run.log.say(f"PyTorch {torch.__version__}, {processes.world_size} x {machine}; {parameters:,} parameters")
    run.log.say("network: " + ", ".join(f"{key} {value}" for key, value in run.net.config.items()))
    if checkpoint is None:
        start = config.finetune or (config.pretrained and f"{config.pretrained} in the encoders")
        run.log.say(f"starting from {start or 'random weights (--pretrained FILE: trained encoders)'}")
    sizes = ", ".join(f"{name} {count} sequences" for name, count in sequences.items())
    run.log.say(f"{sizes + '; ' if sizes else ''}{len(run.validation)} sequences held out for validation")
    clips = position(run)["clips_per_step"]
    run.log.say(f"{clips} clips per step, {run.steps_per_epoch} steps per epoch, {run.total_steps} steps in all")
    if config.warmup_steps >= run.total_steps:
        reached = config.lr * lr_factor(config, run.total_steps - 1, run.total_steps, run.steps_per_epoch)
        run.log.say(f"warmup_steps {config.warmup_steps} are the whole run: lr rises to {reached:.2e} in its last step")
    for idle, options, why in (
        (not sequences, ("flow_drop", "frame_drop"), "it is of clips of videos, and there are synthetic ones alone"),
        (config.clip_len == 1, ("frame_faults",), "a clip of one frame has no neighbours to make it good"),
    ):
        for name in options:
            if idle and getattr(config, name):
                run.log.say(f"{name} {getattr(config, name):g} has no effect: {why}")
    if checkpoint is not None:
        run.log.say(f"resuming {config.resume_path} at step {run.step}")
        # What older runs had no choice about.
        before = {**TrainConfig().to_dict(), "rotation_flow": "ignore", **checkpoint["config"]}
        for key, value in config.to_dict().items():
            if key not in CALL_OPTIONS and before.get(key) != value:
                run.log.say(f"changed since: {key} {before.get(key)} -> {value}")


def finish(run: Run, finished: bool, had_work: bool) -> int:
    """Says how it ended, saves if it ended early; returns the exit code. Raises what kept a process from going on."""
    if finished:
        weights = run.folder / "weights.safetensors"
        if not had_work and not (is_own(run) and weights.exists()):
            run.log.say(f"{run.config.resume_path} has its {run.step} steps already; nothing was done or written here")
            return 0
        score = f", best J {run.best['J']:.4f} at step {run.best['step']}" if run.best else ""
        run.log.say(f"done: {run.step} steps{score}; weights to test with: {weights}")
        return 0
    failures = run.processes.gather(None if run.failure is None else str(run.failure))
    if any(failures):
        if run.step > run.first_step:
            save(run)
            run.log.say(f"stopped at step {run.step} of {run.total_steps}; saved {run.folder / 'last.pt'}")
        run.processes.wait()  # whoever ends first has the launcher end the others
        raise run.failure or UserError(f"another process cannot go on: {next(filter(None, failures))}")
    save(run)
    caught = [cause for cause in run.processes.gather(run.stop.cause) if cause]
    why = caught[0] if caught else "as asked by max_minutes or stop_after"
    run.log.say(
        f"stopped at step {run.step} of {run.total_steps} ({why}); saved {run.folder / 'last.pt'}; "
        f"to go on, run the same command again{going_on(run.config)}"
    )
    return INTERRUPTED if caught else 0


def main(arguments: Sequence[str] | None = None) -> int:
    with exit_on_user_error():
        try:
            config, local_rank = parse_args(arguments, __doc__ or "")
            code = train(config, start_processes(config.device, local_rank))
        except KeyboardInterrupt:
            print("interrupted at once; what was not in last.pt yet is lost", file=sys.stderr)
            return INTERRUPTED
        # Not where this one alone has failed: NCCL's end is one that all processes come to, so it would wait for those
        # that wait for it, with its error still to be told and nothing for the launcher to see.
        stop_processes()
        return code


if __name__ == "__main__":
    end_by_ctrl_c(at_once=False)
    run_as_program(main)
