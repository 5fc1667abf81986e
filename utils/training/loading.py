"""Clips in an order that is a function of seed, epoch and step, so that a run can go on exactly where it stopped."""

from __future__ import annotations

import errno
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from datasets.clips import PICTURES, Item
from datasets.errors import DataError
from datasets.transforms import pack, resize, unpack
from utils.errors import UserError
from utils.memory import keep_freed_memory

GOES_ON = "the same command, with --resume auto as by default, goes on from the last checkpoint"


class ClipOrder(Sampler):
    """Which clips a process loads: their indices, one batch at a time.

    Step k takes the same clips, whatever the number of processes that share them. Set ``epoch`` and ``first_step``
    before iterating: an epoch may begin at any of its steps.

    Args:
        batch: clips that this process takes at one time.
        accumulate: batches of one step.
        steps: of an epoch.
    """

    def __init__(self, *, batch: int, accumulate: int, steps: int, rank: int, world_size: int, seed: int) -> None:
        self.batch, self.accumulate, self.steps = batch, accumulate, steps
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch, self.first_step = 0, 0

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        clips = self.steps * self.accumulate * self.world_size * self.batch
        order = np.random.default_rng([self.seed, self.epoch]).permutation(clips)
        for part in range(self.first_step * self.accumulate, self.steps * self.accumulate):
            start = (part * self.world_size + self.rank) * self.batch
            yield order[start : start + self.batch].tolist()


def build_loader(clips: Dataset, order: ClipOrder, *, workers: int, pin_memory: bool) -> DataLoader:
    """Batches of uint8 clips in the order of ``order``, made by ``workers`` processes (0: by this one)."""
    return DataLoader(
        clips,
        batch_sampler=order,
        num_workers=workers,
        persistent_workers=workers > 0,
        # So that workers share what is cached. From Python 3.14 on they would be given copies of it on Linux as well,
        # through shared memory, with a file held open for each video: more than a process may have.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        worker_init_fn=_start_worker,
        collate_fn=_collate,
        pin_memory=pin_memory,
        # Workers are seeded from this; without it each epoch would draw from the global generator.
        generator=torch.Generator().manual_seed(order.seed),
    )


def _collate(items: list[Item]) -> dict[str, Any]:
    """A batch; clips whose pictures the training device makes are no tensors of one size yet and stay a list."""
    if not any("raw" in item for item in items):
        return default_collate(items)
    return {"items": items, "valid": torch.stack([item["valid"] for item in items])}


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with frames, flows (B, T, 3, H, W) and masks (B, T, 1, H, W) uint8 on a device; those of deferred
    clips are made there. ``valid`` (B, T) stays where it is, to be counted without waiting for the device.
    """
    moved: Iterable[torch.Tensor]
    if "items" in batch:
        moved = (torch.stack(parts) for parts in zip(*(_pictures(item, device) for item in batch["items"])))
    else:
        moved = _pictures(batch, device)
    return {**dict(zip(PICTURES, moved)), "valid": batch["valid"]}


def _pictures(part: dict[str, Any], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Frames, flows and masks of a batch or of one item, on a device."""
    if "raw" in part:
        return part["raw"].finish(device)
    return tuple(part[name].to(device, non_blocking=True) for name in PICTURES)


def rescale(batch: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """A batch of `to_device` at another size (H, W), on the device that it is on; antialiased, masks stay {0, 1}."""
    frames, flows, masks = (batch[name] for name in PICTURES)
    if tuple(frames.shape[-2:]) == tuple(size):
        return batch
    count, length = frames.shape[:2]
    planes = resize(pack(*(part.flatten(0, 1) for part in (frames, flows, masks))), size)  # (B * T, 7, H, W)
    moved = (part.unflatten(0, (count, length)) for part in unpack(planes))
    return {**batch, **dict(zip(PICTURES, moved))}


def to_floats(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the network takes of a batch of `to_device`: frames and flows in [0, 1], masks 0/1, valid bool."""
    floats = {name: batch[name].float() for name in PICTURES}
    for name in ("frames", "flows"):
        floats[name].div_(255)
    return {**floats, "valid": batch["valid"].to(batch["masks"].device, non_blocking=True)}


def read_batches(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """The batches of an epoch. An error about the data that a worker met is raised here as it was there, and the end of
    a worker, which the system ends where memory is short, as a UserError; so is shared memory that is full from the
    start.

    PyTorch would hand it on with the worker's traceback as its message.
    """
    try:
        batches = iter(loader)
        _raise_in_turn()
        yield from batches
    except DataError as error:
        message = str(error).rstrip().rsplit(f"{DataError.__name__}: ", 1)[-1]
        raise DataError(message) from None
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        raise UserError(
            "shared memory (/dev/shm; docker's --shm-size), through which loader processes hand on batches, is full: "
            f"make room there, or give --workers 0; {GOES_ON}"
        ) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):  # not of a process that is gone
            raise
        raise UserError(
            f"a loader process was ended from outside ({str(error).splitlines()[0]}): memory, or shared memory "
            "(/dev/shm; docker's --shm-size), was not enough for it. Give fewer --workers (0: none) or --cache none; "
            f"{GOES_ON}"
        ) from None


def _raise_in_turn() -> None:
    """Leaves it to the loader to find that a worker has ended, which takes it five seconds of waiting for a batch.

    PyTorch's handler of SIGCHLD would raise it in the midst of whatever the process is at: of a step, whose run could
    then not be saved, or of saving itself.
    """
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def stop_workers(loader: DataLoader) -> None:
    """Ends the processes of a loader, in whatever state it is.

    Needed where an error ends the run: its traceback keeps the batches' iterator alive, so that PyTorch would not tell
    the workers, and the signal that Python sends them at the end is one that they ignore.
    """
    batches = loader._iterator  # kept by persistent workers; PyTorch has no public way to end them
    if batches is not None:
        batches._shutdown_workers()


def _start_worker(_: int) -> None:
    """A worker leaves signals to the training process and keeps to one thread."""
    # Ctrl-C reaches all processes, and so do the signals of schedulers (SLURM) and of pkill; the last steps still need
    # the workers. These end when the loader tells them to, or when they see that their parent is gone.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_freed_memory()
    # For libraries that draw from the global generator; our clips have generators of their own.
    np.random.seed(torch.initial_seed() % 2**32)  # noqa: NPY002
