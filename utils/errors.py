"""Errors that are a user's to mend: one line on stderr and exit code 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from datasets.errors import DataError
from models.errors import CheckpointError


class UserError(ValueError):
    """A wrong option, config key or file outside `datasets` and `models`.

    Says what, where, expected, and what to do.
    """


USER_ERRORS = (UserError, DataError, CheckpointError)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn any of `USER_ERRORS` raised inside into `error: …` on stderr and exit code 2."""
    try:
        yield
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
