"""Asking a long run to stop without losing work."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it; main.py's after SIGTERM too."""


class StopRequest:
    """Ctrl-C, SIGTERM or the end of the time given: noticed at once, obeyed where the run looks at ``wanted``.

    Use as a context manager; outside the main thread, where Python has no signals, only the time counts. A second
    Ctrl-C, a second or more after the first, interrupts at once; sooner it is the first one, passed on by a launcher.
    """

    def __init__(self, max_minutes: float = 0) -> None:
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else math.inf
        self.signal: signal.Signals | None = None
        self._since = math.inf
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _: object) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), now
        elif number == signal.SIGINT and now > self._since + 1:
            raise KeyboardInterrupt

    @property
    def wanted(self) -> bool:
        """True from the moment that somebody, or the clock, asks to stop."""
        return self.signal is not None or time.monotonic() >= self.deadline


class Terminated(KeyboardInterrupt):
    """SIGTERM, the stop of SLURM, ``timeout`` and ``docker stop``, raised as Ctrl-C raises `KeyboardInterrupt`."""

    exit_code = 128 + signal.SIGTERM  # as shells have it


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM raises `Terminated` in the block, so that what it began is put away; else Python would end on the spot
    and leave its worker processes behind. Outside the main thread, where Python has no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> NoReturn:
        # Senders repeat themselves (`timeout` signals its child and then the whole group); once is enough.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
