"""Errors that are a user's to mend: one line on stderr and exit code 2, no traceback."""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from datasets.errors import DataError


class UserError(ValueError):
    """A wrong option, config key or file outside `datasets` and `models`.

    Says what, where, expected, and what to do.
    """


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """``did you mean …`` with the nearest names, or all names where none is near."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(prefix + name for name in near) + "?"
    return "the valid names are " + ", ".join(prefix + name for name in known)


PLACES = {
    errno.ENOSPC: "make room there. The features of a long video go to a temporary file (TMPDIR says where; "
    "--clip_len N needs none)",
    errno.EACCES: "it cannot be read or written by this user; give another place, for results --save_dir, for flow "
    "--flow_dir",
    errno.EPERM: "it cannot be read or written by this user; give another place, for results --save_dir, for flow "
    "--flow_dir",
    errno.EROFS: "flow is kept beside its data set, where --flow_dir gives it no other place, and results in "
    "--save_dir; both have to be places to write to",
    errno.ENOTDIR: "a file lies where a folder is expected; give another place, for results --save_dir",
    errno.EEXIST: "a file lies where a folder is expected; give another place, for results --save_dir",
}
"""Refusals of the system that are the user's to mend, and what to do."""

MEMORY = (
    "The GPU has not enough memory: give a smaller --batch_size or --size, in flow a smaller --flow_batch (RAFT needs "
    "memory by the fourth power of a frame's side; --flow_size limits it), or --device cpu"
)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError`, `DataError` or `CheckpointError` raised inside into `error: …` on stderr and exit code 2.

    So it does with what the system refuses for a reason that is the user's to mend (`PLACES`), and with a GPU that has
    not enough memory.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in PLACES:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}; {PLACES[error.errno]}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; torch itself need not have been imported here
            raise
        print(f"error: {str(error).splitlines()[0]} {MEMORY}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except ValueError as error:
        # Imported only now: `models` imports torch, which worker processes that need this module do without.
        from models.errors import CheckpointError

        if not isinstance(error, (UserError, DataError, CheckpointError)):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
