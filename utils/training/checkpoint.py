"""Training checkpoints: plain dicts of tensors, numbers and strings; written atomically, read without running code."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from models.errors import CheckpointError
from models.state_dicts import UNREADABLE
from utils.errors import UserError
from utils.files import write_bytes

TRAINING_KEYS = (
    "model", "ema", "config_model", "config", "optimizer", "scheduler", "scaler", "step", "epoch", "best", "rng",
)  # fmt: skip


REMEDY = (
    "expected a last.pt or best.pt of main.py. Copy it again, go on from the other of the two (--resume FILE), or "
    "start anew (--resume none)"
)


def save_checkpoint(path: str | os.PathLike[str], checkpoint: dict[str, Any]) -> Path:
    """Writes a checkpoint; an interrupted write leaves the old file whole."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return write_bytes(path, buffer.getvalue())


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a training checkpoint of `main.py` onto the CPU.

    Raises:
        UserError: no such file.
        CheckpointError: damaged, not readable with ``weights_only=True``, or a file without the training state.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder, expected a checkpoint to resume from; give {path / 'last.pt'}")
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint to resume from; --resume none starts anew")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        damaged = _damaged_part(path)
    except (*UNREADABLE, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: not a readable training checkpoint ({reason}); {REMEDY}") from None
    if damaged is not None:
        raise CheckpointError(f"{path}: not a readable training checkpoint ({damaged} of it is damaged); {REMEDY}")
    missing = [key for key in TRAINING_KEYS if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise CheckpointError(
            f"{path}: no training state ({', '.join(missing)} missing), so training cannot go on from it; "
            "to start from its weights use --finetune"
        )
    return checkpoint


def _damaged_part(path: Path) -> str | None:
    """The first part of a checkpoint whose checksum is not that of its content, which PyTorch does not look at."""
    if not zipfile.is_zipfile(path):
        return None  # PyTorch's older format, which has no checksums
    with zipfile.ZipFile(path) as file:
        return file.testzip()
