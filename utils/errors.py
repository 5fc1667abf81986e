"""Errors that are a user's to mend: one line on stderr and exit code 2, no traceback."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import select
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO

from datasets.errors import DataError
from utils import PACKAGES, not_installed


class UserError(ValueError):
    """A wrong option, config key or file outside `datasets` and `models`.

    Says what, where, expected, and what to do.
    """


ONLY_IN_CHECKOUT = "which a checkout has and what pip install . copies has not (pip install -e . leaves it in use)"
"""Said of weights and configurations that are not there."""


class CommandLine(argparse.ArgumentParser):
    """A parser whose errors are lines like all others (`UserError`), without 60 lines of usage above them."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


MOST_NAMES = 100
"""More valid names than these are no help: YouTube-VOS has 3471 videos."""


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """``did you mean …`` with the nearest names, or all names where none is near, of very many the first."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(prefix + name for name in near) + "?"
    shown = known if len(known) <= MOST_NAMES else known[:10]
    more = f" … ({len(known)} in all)" if len(shown) < len(known) else ""
    return "the valid names are " + ", ".join(prefix + name for name in shown) + more


def unknown_argument(word: str, names: Iterable[str]) -> str:
    """What to tell of an option of the command line that there is not; ``names`` are the options without dashes."""
    word = word.split("=")[0]
    return f"unknown argument {word!r}; {nearest(word.lstrip('-').replace('-', '_'), names, '--')}"


def number_of(number: int, noun: str) -> str:
    """``1 frame``, ``2 frames``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def check_output(option: str, path: str | None, suffix: str) -> None:
    """Raises UserError where an option for a file to write, if given, names a folder or a file of another kind, which
    would be written over.
    """
    if path is not None and (os.path.isdir(path) or os.path.splitext(path)[1] != suffix):
        found = "a folder; " if os.path.isdir(path) else ""
        raise UserError(f"--{option} {path}: {found}expected the name of a {suffix} file to write")


NO_ROOM = "make room there, or give another place; the same command then goes on where it stopped"
OTHER_PLACE = "give another place, for results --save_dir, for flow --flow_dir, for the demo --demo_dir"
FORBIDDEN = f"it cannot be read or written by this user; {OTHER_PLACE}"
IN_THE_WAY = f"a file lies where a folder is expected; {OTHER_PLACE}"
PLACES = {
    errno.ENOSPC: NO_ROOM,
    errno.EDQUOT: NO_ROOM,
    errno.EFBIG: NO_ROOM,
    errno.EACCES: FORBIDDEN,
    errno.EPERM: FORBIDDEN,
    errno.EROFS: "flow is kept beside its data set unless --flow_dir gives it another place, and results in "
    "--save_dir; both places have to be writable",
    errno.ENOTDIR: IN_THE_WAY,
    errno.EEXIST: IN_THE_WAY,
    errno.EISDIR: "a folder lies where a file is expected; give the name of a file",
    errno.ENAMETOOLONG: "names of results are those of the video and its frames with a few letters more; "
    "rename these to something shorter",
}
"""Refusals of the system that are the user's to mend, and what to do."""

TEMPORARY = (
    ". The features of a long video are kept there for a while, by tool.py's test and main.py's validation (TMPDIR "
    "sets another place; with --clip_len N test needs none)"
)

MEMORY = (
    "The GPU has not enough memory: give a smaller --batch_size or --size, --no-cuda_graphs in test, in flow a smaller "
    "--flow_batch (RAFT needs memory by the fourth power of a frame's side; --flow_size limits it), or --device cpu"
)

HOST_MEMORY = "this machine has not enough memory: give smaller --size, --scales, --clip_len, --batch_size or --workers"


PEER_GONE = ("Connection closed by peer", "Connection reset by peer")
"""What gloo says in the processes that were waiting for one that ended."""


UNREAD = 128 + 13
"""The exit code where nobody reads the output any more, as shells have it of SIGPIPE."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError`, `DataError` or `CheckpointError` raised inside into `error: …` on stderr and exit code 2.

    So it does with what the system refuses for a reason that is the user's to mend (`PLACES`), with a GPU or a machine
    that has not enough memory, and where a package of requirements.txt is missing. A process that others have left
    alone says so in a line, too, so that theirs can be found. Where the output goes to is no reason to fail: see
    `_steady`; a reader that has gone (``| head -1``) ends the program without a traceback.
    """
    _steady()
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # or Python would find out only at its end that the reader has gone
    except BrokenPipeError:
        gone = [stream for stream in (sys.stdout, sys.stderr) if _unread(stream)]  # 2>&1 | head -1: both
        if not gone:
            raise
        for stream in gone:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for what is still written to them at the end
        print("ended: nobody reads the output any more; the same command goes on from here", file=sys.stderr)
        raise SystemExit(UNREAD) from None
    except OSError as error:
        if error.errno not in PLACES:
            raise
        where = f"{error.filename}: " if error.filename else ""
        remedy = PLACES[error.errno]
        if remedy == NO_ROOM and error.filename in (None, tempfile.gettempdir()):
            remedy += TEMPORARY
        _end(f"{where}{error.strerror}; {remedy}")
    except (RuntimeError, MemoryError) as error:
        if any(words in str(error) for words in PEER_GONE):
            _end("another process of this run has ended; its own message says why", code=1)
        if type(error).__name__ == "OutOfMemoryError":  # torch's; torch itself need not have been imported here
            _end(f"{str(error).splitlines()[0]} {MEMORY}")
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):  # NumPy's, and torch's on a CPU
            _end(HOST_MEMORY)
        raise
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:  # also a part of a package that is there, which is a defect of it or of ours
            raise
        print(not_installed(error.name), file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except ValueError as error:
        # Imported only now: `models` imports torch, which worker processes that need this module do without.
        from models.errors import CheckpointError

        if not isinstance(error, (UserError, DataError, CheckpointError)):
            raise
        _end(str(error))


def _end(message: str, code: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code) from None


def _steady() -> None:
    """Letters that the terminal or locale lacks are written as ``\\u2191``, and a closed stream is one to nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _unread(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose reader has gone."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on Windows; a stream that is no file
        return False
