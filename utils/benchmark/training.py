"""Training: steps against the loader's limit, and one process against two."""

from __future__ import annotations

import math
import os
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from datasets.synthetic import SyntheticClips
from models import build_dbsnet
from models.losses import segmentation_loss
from models.precision import AMP, autocast
from utils.benchmark.timing import PeakMemory, synchronise
from utils.distributed import leave
from utils.memory import keep_freed_memory
from utils.training.loading import ClipOrder, build_loader, stop_workers, to_device, to_floats


class Step:
    """One optimiser step of a network on a batch of uint8 clips, as main.py does it.

    config: what `build_dbsnet` makes the network of; its weights are random.
    """

    def __init__(self, config: dict[str, Any], device: torch.device, amp: str, *, distributed: bool = False) -> None:
        torch.manual_seed(0)
        self.net = build_dbsnet(**config).to(device).train()
        self.model = DistributedDataParallel(self.net) if distributed else self.net
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4, fused=device.type == "cuda")
        self.device, self.amp = device, amp

    def __call__(self, batch: dict[str, Any]) -> None:
        clips = to_floats(to_device(batch, self.device))
        with autocast(self.device, AMP[self.amp]):
            logits, aux = self.model(clips["frames"], clips["flows"], return_aux=True)
        segmentation_loss(logits, clips["masks"], clips["valid"], aux, multiple=self.net.multiple)["total"].backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def bench_training(
    config: dict[str, Any], device: torch.device, size: tuple[int, int], *, length: int, batch: int, amp: str,
    workers: int, steps: int, processes: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Frames per second of the loader alone (procedural clips), of the step alone, and of both together.

    steps: timed; of those with the loader as many more as give each of its workers the same number of batches.

    `augment_on_device` has them for clips that the loader leaves to the device to render (main.py --augment_on device).
    With `processes` 2 or more also of that many gloo processes on the CPU, one thread each, against one alone.
    """
    pinned = device.type == "cuda"
    step = Step(config, device, amp)
    first: dict[str, Any] = {}
    # Each worker makes two batches ahead, and theirs come nearly at once: what is timed begins after those, ends with
    # as many more under way, and is as many of each worker, two at least.
    ahead = 2 * workers
    timed = max(2, math.ceil(steps / workers)) * workers if workers else steps
    last = 2 + ahead + timed
    order = ClipOrder(batch=batch, accumulate=1, steps=last + ahead, rank=0, world_size=1, seed=0)

    def epoch(learn: bool, defer: bool) -> float:
        """Frames per second of the batches that are timed."""
        clips = SyntheticClips(None, batch * order.steps, length, size, seed=0, defer=defer)
        loader = build_loader(clips, order, workers=workers, pin_memory=pinned)
        began = 0.0
        try:
            for number, loaded in zip(range(1, last + 1), loader):
                if learn:
                    step(loaded)
                first.setdefault("batch", loaded)
                if number == last - timed:
                    synchronise(device)
                    began = time.perf_counter()
            synchronise(device)
            return timed * batch * length / (time.perf_counter() - began)
        finally:
            stop_workers(loader)  # they would go on beside what is timed next

    with PeakMemory(device) as memory:
        loading = epoch(learn=False, defer=False)
        step(first["batch"])
        synchronise(device)
        began = time.perf_counter()
        for _ in range(steps):
            step(first["batch"])
        synchronise(device)
        learning = time.perf_counter() - began
        together = epoch(learn=True, defer=False)
        deferred = {"loader": epoch(learn=False, defer=True), "together": epoch(learn=True, defer=True)}
    rates = {"loader": loading, "step": steps * batch * length / learning, "together": together}
    result = {
        "clip_len": length, "batch_size": batch, "workers": workers,
        "frames_per_second": rates, "together_over_slowest": rates["together"] / min(rates["loader"], rates["step"]),
        "augment_on_device": {"frames_per_second": deferred},
        "memory": memory.describe(),
    }  # fmt: skip
    if processes > 1:
        result["scaling"] = bench_scaling(config, size, length=length, batch=batch, steps=steps, processes=processes)
    return result


def bench_scaling(
    config: dict[str, Any], size: tuple[int, int], *, length: int, batch: int, steps: int, processes: int
) -> dict[str, Any]:
    """One and several gloo processes, one thread and one batch each, in float32; perfect scaling has efficiency 1."""
    rates = {}
    for world in (1, processes):
        with tempfile.TemporaryDirectory(prefix="dbsnet-bench-") as folder:
            mp.spawn(_steps_in_a_process, (world, folder, config, size, length, batch, steps), nprocs=world)
            seconds = float(torch.load(os.path.join(folder, "seconds.pt"), weights_only=True))
        rates[world] = world * steps * batch * length / seconds
    return {
        "dtype": "float32",
        "frames_per_second": {str(world): rate for world, rate in rates.items()},
        "efficiency": rates[processes] / (processes * rates[1]),
    }


def _steps_in_a_process(
    rank: int,
    world: int,
    folder: str,
    config: dict[str, Any],
    size: tuple[int, int],
    length: int,
    batch: int,
    steps: int,
) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as in training's own processes
    device = torch.device("cpu")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    step = Step(config, device, "none", distributed=world > 1)
    clips: dict[str, Tensor] = {
        name: torch.randint(0, 256, (batch, length, 3, *size), dtype=torch.uint8) for name in ("frames", "flows")
    }
    clips["masks"] = torch.randint(0, 2, (batch, length, 1, *size), dtype=torch.uint8)
    clips["valid"] = torch.ones(batch, length, dtype=torch.bool)
    step(clips)
    dist.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        step(clips)
    dist.barrier()
    if rank == 0:
        torch.save(torch.tensor(time.perf_counter() - began), os.path.join(folder, "seconds.pt"))
    dist.destroy_process_group()
    leave(0)
