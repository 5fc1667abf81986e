"""How much memory there is, and what becomes of that which this process has freed."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Lets this process keep what it frees for what it needs next, where glibc would give it back to the system.

    glibc fetches each block of more than 32 MiB from the system anew, which clears it page by page, and the maps of a
    few frames at a time are as large: a tenth of the processor's time for a video, more for a training step. The most
    memory that is used at a time hardly changes; it stays the process's to the end.

    For processes that compute on the CPU, a loader's among them. Does nothing with another C library, or where the
    environment has settings of one's own (``MALLOC_…``, ``GLIBC_TUNABLES``).
    """
    if any(name in os.environ for name in _SETTINGS):
        return
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never


def give_back_freed_memory() -> None:
    """Gives the system what this process has freed and kept, for whoever measures what comes next."""
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """One of its functions that other C libraries do not have."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take before the system ends it, as far as Linux tells; None where it does not.

    A container or a job of a scheduler may have a limit of its own (cgroup), of which the machine's figure knows
    nothing. What it has taken already is not deducted, since much of that are files that Linux would let go.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for group in groups:
        _, controllers, place = group.split(":", 2)
        if controllers in ("", "memory"):  # version 2, version 1
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            folder = root / "sys/fs/cgroup" / controllers / place.lstrip("/")
            for parent in (folder, *folder.parents):  # within a container the path may be that outside of it
                limit = parent / name
                if limit.is_file() and (text := limit.read_text().strip()).isdecimal():  # or "max"
                    found.append(int(text))
    return min(found, default=None)
