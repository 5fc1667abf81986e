"""Asking a long run to stop without losing work."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it; main.py's after SIGTERM too."""


_PARENT = os.getppid()  # at the start, since who is left alone later gets another


class StopRequest:
    """Ctrl-C, SIGTERM, the end of the time given or of the launcher: noticed at once, obeyed where the run looks at
    ``wanted``.

    Use as a context manager. Signals end the program as ever until `listen` is called, while there is nothing to lose;
    outside the main thread, where Python has no signals, they always do. A second Ctrl-C, a second or more after the
    first, interrupts at once; sooner it is the first one, passed on by a launcher.

    Args:
        max_minutes: from now on; 0: no end.
        notice: to be written to stderr when the first signal comes, since obeying it may take a while.
    """

    def __init__(self, max_minutes: float = 0, notice: str = "") -> None:
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else math.inf
        self.signal: signal.Signals | None = None
        self._notice = notice
        self._since = math.inf
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """From here on signals are requests."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _: object) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), now
            if self._notice:
                with suppress(OSError):  # a closed stderr; and not print, which a signal may have interrupted
                    os.write(2, f"{self.signal.name}: {self._notice}\n".encode())
        elif number == signal.SIGINT and now > self._since + 1:
            raise KeyboardInterrupt

    @property
    def cause(self) -> str | None:
        """What asks to stop: a signal's name, or a launcher that was killed and has left its processes behind, unseen
        and with nobody to end them; None for the clock or for nothing.
        """
        if self.signal is not None:
            return self.signal.name
        launched = "TORCHELASTIC_RUN_ID" in os.environ  # not by a shell, which may be left (nohup)
        return "the launcher has ended" if launched and os.getppid() != _PARENT else None

    @property
    def wanted(self) -> bool:
        """True from the moment that somebody, or the clock, asks to stop."""
        return self.cause is not None or time.monotonic() >= self.deadline


def end_by_ctrl_c(*, at_once: bool) -> None:
    """Has Ctrl-C end the program on the spot, by a word, or raise KeyboardInterrupt as ever; ignored, it stays so.

    At once is for the seconds in which a program imports what it needs and has nothing to lose: NumPy makes an
    ImportError of many lines out of a KeyboardInterrupt, or forgets it.
    """
    before, after = signal.default_int_handler, _end_at_once
    if not at_once:
        before, after = after, before
    if signal.getsignal(signal.SIGINT) is before:
        signal.signal(signal.SIGINT, after)


def _end_at_once(*_: object) -> NoReturn:
    with suppress(OSError):  # a closed stderr
        os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


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
