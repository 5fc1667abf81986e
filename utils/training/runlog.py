"""What a training run tells: a JSONL file always, TensorBoard if wanted, and a progress bar or plain lines."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.files import write_png, write_text
from utils.progress import progress_bar


class RunLog:
    """The log of one run, for the main process; in the others (``active=False``) every method does nothing.

    Args:
        folder: of the run; holds ``log.jsonl``, ``panels/`` and TensorBoard's event files.
        step: where training begins. Lines of later steps, left by a run that went on after its last checkpoint,
            are removed, since those steps come again.
        total: last step.

    Nothing is written, and no line removed, before `open`.
    """

    def __init__(self, folder: Path, *, step: int, total: int, tensorboard: bool, active: bool = True) -> None:
        self.active = active
        self.path = folder / "log.jsonl"
        self._first, self._total, self._tensorboard = step, total, tensorboard
        self._board: Any = None
        self._bar: Any = None

    def open(self) -> None:
        """Makes the folder, and of a log that is there keeps what this run goes on from.

        Raises:
            UserError: ``tensorboard`` wanted but not installed. OSError: a folder that cannot be made.
        """
        if not self.active:
            return
        folder, step = self.path.parent, self._first
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            text = self.path.read_text(encoding="utf-8", errors="replace")  # what a machine left is not always text
            lines = [line for line in text.splitlines() if _step(line) <= step]
            write_text(self.path, "".join(line + "\n" for line in lines))
        if self._tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("tensorboard is not installed: pip install tensorboard, or --no-tensorboard") from None
            with self._named():
                self._board = SummaryWriter(str(folder), purge_step=step + 1)
        if sys.stderr.isatty():
            self._bar = progress_bar(total=self._total, initial=step, unit="step")

    def say(self, text: str) -> None:
        """One line for the person watching."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def advance(self) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update()

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """One line of the JSONL file; numbers also go to TensorBoard as ``kind/name``. ``values`` has a ``step``."""
        if not self.active:
            return
        line = json.dumps({"kind": kind, **_finite(values)}, allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)  # as all else that is written does, if somebody removed it
        with self._named(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(line)
        if self._board is not None:
            with self._named():
                for name, value in values.items():
                    if isinstance(value, (int, float)) and name != "step":
                        self._board.add_scalar(f"{kind}/{name}", value, values["step"])

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """An ``(H, W, 3)`` uint8 picture into ``panels/`` and TensorBoard."""
        if not self.active:
            return
        write_png(self.path.parent / "panels" / f"{name}_{step:07d}.png", image)
        if self._board is not None:
            with self._named():
                self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes what is pending."""
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            with self._named():
                self._board.close()

    @contextmanager
    def _named(self, path: Path | None = None) -> Iterator[None]:
        """Says which file (TensorBoard's by default) it was that a full disk refused, whose error has no name."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(path or self.path.parent / "events.out.tfevents")
            raise


def _step(line: str) -> float:
    """Step of a line of the log; a line cut off by a crash counts as later than any."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    """JSON has no NaN: such numbers become null."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, float):
        return float(f"{value:.8g}") if math.isfinite(value) else None
    return value
