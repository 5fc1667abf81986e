"""Errors that are a user's to mend: one line on stderr and exit code 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from datasets.errors import DataError


class UserError(ValueError):
    """A wrong option, config key or file outside `datasets` and `models`.

    Says what, where, expected, and what to do.
    """


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError`, `DataError` or `CheckpointError` raised inside into `error: …` on stderr and exit code 2."""
    try:
        yield
    except ValueError as error:
        # Imported only now: `models` imports torch, which worker processes that need this module do without.
        from models.errors import CheckpointError

        if not isinstance(error, (UserError, DataError, CheckpointError)):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
