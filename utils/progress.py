"""Progress bars of long work."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

TERMINAL_SECONDS, FILE_SECONDS = 0.1, 30.0


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """A bar of tqdm on standard error, drawn ten times a second on a terminal and twice a minute into a log file.

    One that is given a name is for a ``with`` block, at whose end it is closed: else the traceback of an error keeps it
    open, and the error is told behind it, on its line.

    Args:
        options: as of tqdm.
    """
    seconds = TERMINAL_SECONDS if sys.stderr.isatty() else FILE_SECONDS
    # tqdm's own watcher redraws after maxinterval, whatever mininterval says.
    return tqdm(iterable, mininterval=seconds, maxinterval=max(10.0, seconds), dynamic_ncols=True, **options)
