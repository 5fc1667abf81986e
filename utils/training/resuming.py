"""A run's folder: what is saved there, going on from it, and what of another run may lie there already."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from models.errors import CheckpointError
from models.state_dicts import load_state
from models.weights import save_weights
from utils.distributed import Processes, environment_number
from utils.errors import UserError
from utils.files import FolderLock, remove_temporaries
from utils.training.checkpoint import load_checkpoint, save_checkpoint
from utils.training.config import TrainConfig
from utils.training.run import Run, diverged

RUN_FILES = ("last.pt", "best.pt", "weights.safetensors", "log.jsonl", "config.yaml", "panels")
WAIT_FOR_FOLDER = 10.0  # seconds: loader processes of a killed run take five to notice that they are alone
# Options that say what J is of: scores under others of these are not to be compared.
VALIDATION_OPTIONS = ("val_datasets", "val_sequences", "val_frames", "val_size")


def save(run: Run, best: bool = False) -> None:
    """Writes best.pt if this is the best, the weights to test with, and last.pt.

    Raises:
        UserError: weights or statistics that are no numbers any more, in all processes; what is on disk stays as it is.
    """
    # Here and not only where losses are reported: between two lines of the log a run could save what it has lost. Batch
    # norms may lose their statistics alone: fp16's scaler passes over the step of numbers too large, which they have
    # seen by then.
    kinds = {"weights": run.net.parameters(), "statistics of batch norms": run.net.buffers()}
    lost = [name for name, kind in kinds.items() if not all(bool(torch.isfinite(tensor).all()) for tensor in kind)]
    if lost := run.processes.gather(lost)[0]:  # others may have statistics of their own, which nobody keeps
        raise UserError(diverged(run, f"{lost[0]} are not finite any more"))
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
            "trained_on": ", ".join(run.config.datasets),
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


def claim_folder(lock: FolderLock, folder: Path, processes: Processes) -> None:
    """Makes this call the only one that writes in the run's folder, if there is one. To be done before a checkpoint is
    read: the run that is to be gone on with may be about to save its last one.

    Raises:
        UserError: another run is writing there, in all processes.
    """
    free = True
    if processes.is_main and folder.is_dir():
        free = lock.take(WAIT_FOR_FOLDER)
    if not processes.gather(free)[0]:
        raise UserError(
            f"{folder}: another run is writing there, and each would take the other's files for its own. Give this "
            "one another --save_dir, or wait for (or end) that one to go on from its last.pt"
        )


def make_folder(lock: FolderLock, folder: Path, processes: Processes) -> None:
    """Makes and claims the run's folder where there was none; removes what killed runs left half written."""
    if processes.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    claim_folder(lock, folder, processes)
    if lock.held:
        for name in RUN_FILES:
            remove_temporaries(folder / name)


def set_older_run_aside(run: Run, checkpoint: dict[str, Any] | None) -> str | None:
    """Moves the files of another run out of the way, into ``previous-N/``, where this call would write over them: it
    begins anew, or goes on from another folder's checkpoint. Returns what to tell.
    """
    config, folder = run.config, run.folder
    if checkpoint is not None and (is_own(run) or not run.has_work):
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


def is_own(run: Run) -> bool:
    """Whether the checkpoint to go on from, which may be a link, lies in the run's own folder."""
    path = run.config.resume_path
    return run.folder.resolve() in (path.parent.resolve(), path.resolve().parent)


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
    # Where a call before had channels_last otherwise, or another device, which the fused AdamW would refuse.
    for parameter, state in run.optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim > 1:
                state[name] = torch.empty_like(parameter).copy_(value)
    if checkpoint["scaler"] and run.scaler.is_enabled():
        run.scaler.load_state_dict(checkpoint["scaler"])
    run.step, run.best = checkpoint["step"], checkpoint["best"]
    run.pending_validation = checkpoint.get("pending_validation", False)


def forget_best(run: Run, checkpoint: dict[str, Any]) -> str | None:
    """Begins the search for the best weights anew where those of the checkpoint are not at hand, or were found by
    another validation or one that there is no more: their J would keep all that follow from being handed out. Returns
    what to tell.
    """
    if run.best is None or not run.has_work:
        return None
    if not run.validation:
        found, run.best = run.best, None
        return (
            f"the best so far, J {found['J']:.4f} at step {found['step']}, is left in {run.folder / 'best.pt'}; as "
            "nothing is validated from here on, the last weights are the ones to test with"
        )
    before, now = checkpoint["config"], run.config.to_dict()
    changed = [key for key in VALIDATION_OPTIONS if key in before and before[key] != now[key]]
    kept, path = None, run.folder / "best.pt"
    if run.processes.is_main and path.is_file():
        # Who goes back to an earlier checkpoint of the folder finds the best weights of what came after it there.
        try:
            kept = load_checkpoint(path)["step"]
        except CheckpointError:
            pass  # a damaged file holds no weights: as if there were none
    kept = run.processes.gather(kept)[0]
    if kept == run.step and run.pending_validation:
        return None  # written just before the last call was cut short: the validation comes again
    if kept != run.best["step"]:
        why = f"is not in {path}" + (f", which is of step {kept}" if kept is not None else "")
    elif changed:
        why = f"was of another validation ({', '.join(changed)})"
    else:
        return None
    found, run.best = run.best, None
    return f"the best so far, J {found['J']:.4f} at step {found['step']}, {why}: the best from here on is kept"
