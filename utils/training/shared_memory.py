"""Memory that all training processes of a machine use together, for the frames of ``cache: ram``."""

from __future__ import annotations

import mmap
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from datasets.clip_frames import OwnMemory
from utils.distributed import Processes
from utils.errors import UserError

_BOOT, _PROCESS_IDS = Path("/proc/sys/kernel/random/boot_id"), "/proc/self/ns/pid"


class MachineMemory:
    """A `datasets.clip_frames.CacheMemory` of the processes of a run that are on this machine.

    Where they cannot share memory (other systems than Linux, a container for each), each has its own. To be made by all
    processes together.

    rank, count: the number of this process among those that share, and how many these are.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        here = _place()
        places = processes.gather(here)
        self._members = [r for r, place in enumerate(places) if place == here] if here else [processes.rank]
        self.rank = self._members.index(processes.rank)
        self.count = len(self._members)

    def allocate(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """(size,) uint8 of each size, the same bytes in all processes that share.

        They have no name, and are not of the file system for shared memory (/dev/shm), which is small in many
        containers: the first process makes a file in memory and the others open it from there. It is gone when the last
        of them is.

        Raises:
            UserError: the system does not let them.
        """
        file = -1
        with _refusals():
            if self.rank == 0 and self.count > 1:
                file = os.memfd_create("dbsnet frames")
                os.truncate(file, sum(sizes))
        owners = self._processes.gather((os.getpid(), file))
        with _refusals():
            if self.rank > 0:
                owner, number = owners[self._members[0]]
                file = os.open(f"/proc/{owner}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        self._processes.wait()  # until all have opened it
        if self.count == 1:
            return OwnMemory().allocate(sizes)
        with _refusals():
            whole = mmap.mmap(file, sum(sizes))
        os.close(file)
        return list(torch.frombuffer(whole, dtype=torch.uint8).split(list(sizes)))  # these keep what they lie in

    def wait(self) -> None:
        self._processes.wait()


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cache: ram: the processes of this machine cannot share memory here ({error}); give --cache none"
        ) from None


def _place() -> tuple[str, ...]:
    """What tells the processes that can open each other's files from the others; nothing where none can."""
    if not hasattr(os, "memfd_create"):
        return ()
    try:
        return platform.node(), _BOOT.read_text(), os.readlink(_PROCESS_IDS)
    except OSError:
        return ()
