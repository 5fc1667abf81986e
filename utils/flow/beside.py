"""Flow made beside the network: of the next videos while it segments the first."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Generator, Mapping
from pathlib import Path
from types import TracebackType

from utils.flow.files import FlowFiles


class FlowBeside:
    """A thread that makes flow within the ``with`` block, for whoever can do with it one video after the other.

    Without an error all of it is made at the end of the block; after one the thread ends with the images that it is at.

    Args:
        written: makes flow, and yields folder and stem of each image that has been written.
        pending: the stems of those images, by folder.
        files: how they are stored.
    """

    def __init__(
        self,
        written: Generator[tuple[Path, str], None, None],
        pending: Mapping[Path, Collection[str]],
        files: FlowFiles,
    ) -> None:
        self.pending, self.files = {folder: frozenset(stems) for folder, stems in pending.items()}, files
        self._written = written
        self._left = Counter({folder: len(stems) for folder, stems in self.pending.items()})
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._unwanted = False
        self._thread = threading.Thread(target=self._make, name="flow", daemon=True)

    def _make(self) -> None:
        try:
            for folder, _ in self._written:
                with self._changed:
                    self._left[folder] -= 1
                    self._changed.notify_all()
                if self._unwanted:
                    break
        except BaseException as error:  # handed over and raised in the thread that waits
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            self._written.close()  # ends its processes

    def path(self, folder: Path, stem: str) -> Path | None:
        """Where the flow image of a frame is going to be; None of one that is not being made."""
        return self.files.path(folder, stem) if stem in self.pending.get(folder, ()) else None

    def wait(self, folder: Path) -> None:
        """Returns when all flow of a folder has been made. Raises what went wrong before that."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not self._left[folder])
            if self._left[folder]:
                raise self._error

    def __enter__(self) -> FlowBeside:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._unwanted = error is not None
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error
