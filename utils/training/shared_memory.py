"""Memory that all training processes of a machine use together, for the frames of ``cache: ram``."""

from __future__ import annotations

import mmap
import os
import platform
from pathlib import Path

import torch

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

    def allocate(self, size: int) -> torch.Tensor:
        """(size,) uint8, the same bytes in all processes that share.

        It has no name, and is not of the file system for shared memory (/dev/shm), which is small in many containers:
        the first process makes it and the others open it from there. It is gone when the last of them is.

        Raises:
            UserError: the system does not let them.
        """
        file = -1
        if self.rank == 0 and self.count > 1:
            file = os.memfd_create("dbsnet frames")
            os.truncate(file, size)
        owners = self._processes.gather((os.getpid(), file))
        if self.count > 1 and self.rank > 0:
            owner, number = owners[self._members[0]]
            try:
                file = os.open(f"/proc/{owner}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                raise UserError(
                    f"cache: ram: processes of this machine cannot share memory here ({error}); give --cache none"
                ) from None
        self._processes.wait()  # until all have opened it
        if self.count == 1:
            return torch.empty(size, dtype=torch.uint8)
        whole = mmap.mmap(file, size)
        os.close(file)
        return torch.frombuffer(whole, dtype=torch.uint8)  # keeps what it maps

    def wait(self) -> None:
        self._processes.wait()


def _place() -> tuple[str, ...]:
    """What tells the processes that can open each other's files from the others; nothing where none can."""
    if not hasattr(os, "memfd_create"):
        return ()
    try:
        return platform.node(), _BOOT.read_text(), os.readlink(_PROCESS_IDS)
    except OSError:
        return ()
