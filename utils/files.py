"""Files that are either complete or not there: written beside their place, then moved into it."""

from __future__ import annotations

import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Writes ``data`` to ``path`` atomically and returns the path; parent folders are made.

    The temporary file lies in the same folder, since ``os.replace`` is atomic only within one file system. An
    interrupted write leaves the old file as it was.
    """
    path = Path(path)
    try:
        _write(path, data)
    except OSError as error:
        if error.errno is not None and (error.filename is None or Path(error.filename).suffix == ".tmp"):
            # What a full disk refuses has no name, and that of the temporary file tells nobody anything.
            error.filename = str(path)
        raise
    return path


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=temporary_prefix(path), suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # mkstemp makes files that only the owner may read; a result should have the permissions of any other file.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def temporary_prefix(path: Path) -> str:
    """How the name of a temporary file for this path begins: file systems count a name's bytes, 255 at most."""
    return f".{os.fsencode(path.name)[:64].decode(errors='ignore')}."


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Writes ``text`` as UTF-8 with ``\\n`` line ends, atomically."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], obj: Any) -> Path:
    """Writes ``obj`` as indented JSON, atomically. NaN and infinities raise ValueError: they are no JSON."""
    return write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_png(path: str | os.PathLike[str], array: np.ndarray) -> Path:
    """Writes a uint8 image, ``(H, W)`` grey or ``(H, W, 3)`` RGB, as PNG, atomically.

    Raises:
        ValueError: another dtype or shape; a float image is not rounded silently.
    """
    from PIL import Image

    array = np.asarray(array)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise ValueError(
            f"{path}: expected a uint8 image of shape (H, W) or (H, W, 3), got {array.dtype} of shape {array.shape}"
        )
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, format="PNG")
    return write_bytes(path, buffer.getvalue())


def _umask() -> int:
    """The process's umask; it can only be read by setting it. Read once, before any thread could notice."""
    return _UMASK


_UMASK = os.umask(0)
os.umask(_UMASK)
