"""One or several training processes: start, agree, gather, and batch norm over all of them.

Without a launcher there is one process and no process group, and every function here is then a plain local one.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from utils.errors import UserError
from utils.memory import keep_freed_memory
from utils.progress import progress_bar

Net = TypeVar("Net", bound=nn.Module)

# How long a process waits for the others where they agree. One may have hours of flow or of a long video left when the
# rest is done, which is no fault; one that dies ends the others through the launcher, long before this.
PATIENCE = timedelta(days=7)
# How long it looks for them at the start, where nothing but a launcher that is gone can keep them away.
JOINING = timedelta(minutes=10)


@dataclass(frozen=True)
class Processes:
    """The processes of this run as one of them sees it."""

    rank: int
    world_size: int
    device: torch.device
    # Host-side agreement goes through gloo even where gradients go through nccl, so that it never waits for the GPU.
    control: Any = None

    @property
    def is_main(self) -> bool:
        """True for the one process that writes files and talks."""
        return self.rank == 0

    def reduce(self, values: Sequence[float], operation: Literal["sum", "max"] = "sum") -> list[float]:
        """Sum or maximum of each value over the processes, the same in all of them (float64)."""
        if self.world_size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, in all of them."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world_size > 1:
            dist.barrier(group=self.control)


def share(lengths: Sequence[int], rank: int, world_size: int) -> list[int]:
    """Which videos, by index, are this process's: the longest first, each to whoever has the least to do so far."""
    loads = [0] * world_size
    mine = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        who = loads.index(min(loads))
        loads[who] += lengths[index]
        if who == rank:
            mine.append(index)
    return sorted(mine)


def share_out(
    processes: Processes, lengths: Sequence[int], pending: Callable[[int], Collection[str]], name: str
) -> dict[int, Collection[str]]:
    """What of some videos is still to be done, and by which process: this one's, by index.

    Every process looks at its part of the videos, then what was found pending is shared out: so a run that goes on
    keeps all processes busy, however much of it was done before.

    Args:
        lengths: of the videos, the same in all processes.
        pending: the frames of a video that are to be done; none leaves it out.
        name: of the work, for the progress bar of the look.
    """
    rank, world_size = processes.rank, processes.world_size
    with progress_bar(
        share(lengths, rank, world_size), desc=f"{name}: what is there", unit="video", leave=False, disable=rank != 0
    ) as look:
        looked = {index: pending(index) for index in look}
    found = {index: frames for part in processes.gather(looked) for index, frames in part.items() if frames}
    order = sorted(found)
    return {order[k]: found[order[k]] for k in share([len(found[index]) for index in order], rank, world_size)}


def start_processes(device: str = "auto", local_rank: int = 0) -> Processes:
    """Joins the launcher's process group (nccl on CUDA, gloo on the CPU), or stays alone where there is no launcher.

    Args:
        device: "auto" (CUDA where there is one), "cuda" or "cpu".
        local_rank: number of this process on its machine; picks its GPU.

    Raises:
        UserError: no CUDA though asked for, more processes on this machine than GPUs, or no launcher to meet at.
    """
    world_size, rank = environment_number("WORLD_SIZE", 1), environment_number("RANK", 0)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device cpu or auto")
    if device == "cpu" or not torch.cuda.is_available():
        where = torch.device("cpu")
        keep_freed_memory()
    else:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} visible; start at most "
                "that many (--nproc_per_node), or widen CUDA_VISIBLE_DEVICES, or use --device cpu"
            )
        where = torch.device("cuda", local_rank)
        torch.cuda.set_device(where)
    if world_size == 1:
        return Processes(0, 1, where)
    backend = "nccl" if where.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=_meeting_place(),
        rank=rank,
        world_size=world_size,
        timeout=None if where.type == "cuda" else PATIENCE,
    )
    control = dist.new_group(backend="gloo", timeout=PATIENCE) if where.type == "cuda" else dist.group.WORLD
    return Processes(rank, world_size, where, control)


def _meeting_place() -> dist.Store:
    """The launcher's key-value store, in which the processes find each other's addresses.

    Raises:
        UserError: the launcher does not say where it is, or nobody answers there within `JOINING`.
    """
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"environment variable WORLD_SIZE {os.environ['WORLD_SIZE']} asks for several processes, but "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set; start them by torchrun, or unset "
            "WORLD_SIZE for one"
        )
    host, port = os.environ["MASTER_ADDR"], environment_number("MASTER_PORT", 0)
    try:
        store, _, _ = next(rendezvous("env://", timeout=JOINING))
    except dist.DistError:
        raise UserError(
            f"the processes of this run do not meet at {host}:{port} (MASTER_ADDR, MASTER_PORT): the launcher has "
            "ended, the port is taken, or the address is another machine's; start all again, with another "
            "--master_port where it is taken"
        ) from None
    attempt = environment_number("TORCHELASTIC_RESTART_COUNT", 0)
    if attempt and environment_number("GROUP_WORLD_SIZE", 1) == 1:
        # A restart finds the addresses of the dead processes in the launcher's store, so it gets keys of its own. With
        # several machines the count may differ between them; their line in docs/training.md has another remedy.
        return dist.PrefixStore(f"attempt-{attempt}", store)
    return store


def stop_processes() -> None:
    """Leaves the process group, if there is one: together, since with nccl each waits for the others here. A process
    that fails on its own just ends; that is what the launcher ends the others by.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Ends one of several processes with this exit code, without Python's taking itself down.

    A thread of gloo's that then wants Python's lock, to free a tensor, would abort the process, whose work is done, and
    `stop_processes` does not end these threads where DistributedDataParallel was used (seen with PyTorch 2.14).
    """
    atexit._run_exitfuncs()
    with suppress(OSError):  # nobody reads them any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def run_as_program(main: Callable[[], int]) -> NoReturn:
    """Runs what a program does and ends with its exit code; of several processes each by `leave`, failed or not."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(main())
    try:
        code = main()
    except SystemExit as end:  # of `exit_on_user_error` and argparse
        code = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    leave(code)


def environment_number(name: str, default: int) -> int:
    """The whole number that an environment variable holds; raises UserError for anything else."""
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"environment variable {name}: expected a whole number, got {text!r}") from None


class _SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over the processes; its gradient is the sum of theirs, since each one's loss depends on it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics are those of all processes' batches together; for the CPU, through gloo.

    PyTorch's own `SyncBatchNorm` is for GPUs only. In training mode the result and the gradients equal those of
    `BatchNorm2d` on the concatenated batch. Two passes (mean, then squared distance from it), so that nothing cancels.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        channels = x.shape[1]
        size = x.new_tensor([x.numel() / channels], dtype=torch.float64)
        dist.all_reduce(size)
        count = size.item()  # values of one channel over all processes; batches may differ in size
        values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean = _SumOverProcesses.apply(values.sum((0, 2, 3))) / count  # (C,)
        centred = values - mean[:, None, None]
        variance = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count  # (C,), biased
        self._update(mean.detach(), variance.detach(), count)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        result = centred * scale[:, None, None]
        if self.bias is not None:
            result = result + self.bias[:, None, None]
        return result.to(x.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: float) -> None:
        """Running statistics as `BatchNorm2d` keeps them: the variance unbiased."""
        if self.running_mean is None or self.running_var is None:
            return
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        unbiased = variance * (count / max(count - 1, 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


class SyncBatchNormAct2d(SyncBatchNorm2d):
    """The same of timm's ``BatchNormAct2d``: batch norm, dropout and activation in one module."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def set_batch_norm(net: Net, mode: str, processes: Processes) -> Net:
    """Makes the batch norms of ``net`` what ``mode`` says: "sync", "local" or "frozen" (see `train_mode`).

    Names of parameters and buffers stay, so checkpoints do not depend on the mode. With one process, "sync" is "local".

    Raises:
        UserError: "sync" for a kind of batch norm that is not known here, rather than without that one.
    """
    if mode != "sync" or processes.world_size == 1:
        return net
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    of_timm = [module for module in norms if _is_timms(module)]
    for module in norms:
        if type(module) is not nn.BatchNorm2d and not _is_timms(module):
            raise UserError(f"bn: sync cannot be had of the network's {type(module).__name__}; take frozen or local")
    if processes.device.type == "cuda":
        if of_timm:  # PyTorch's conversion would lose the activations that they contain
            from timm.layers import convert_sync_batchnorm

            modes = {name: module.training for name, module in net.named_modules()}
            net = convert_sync_batchnorm(net)
            for name, module in net.named_modules():
                module.training = modes[name]  # older versions of timm leave the new ones in training mode
            return net
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in norms:
        # The subclass adds no state, so the module itself can take its forward; no copy, no renamed key.
        module.__class__ = SyncBatchNormAct2d if _is_timms(module) else SyncBatchNorm2d
    return net


def _is_timms(module: nn.Module) -> bool:
    """Whether a batch norm is one of timm's, with an activation inside (told by name: timm need not be installed)."""
    return type(module).__name__ == "BatchNormAct2d" and type(module).__module__.startswith("timm.")


def broadcast_buffers(net: nn.Module, processes: Processes) -> None:
    """Gives every process the buffers of rank 0's ``net`` (running statistics of batch norms)."""
    if processes.world_size > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


def train_mode(net: nn.Module, bn: str) -> None:
    """``net.train()`` but for the batch norms that stay in evaluation mode, where running statistics are used and kept:
    with ``bn`` "frozen" all of them, whose scale and shift still train, and else those of frozen layers.
    """
    net.train()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            frozen = module.weight is not None and not module.weight.requires_grad
            if bn == "frozen" or frozen:
                module.eval()
