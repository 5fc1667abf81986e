"""What becomes of memory that this process has freed."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

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
