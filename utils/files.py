"""Files that are either complete or not there: written beside their place, then moved into it; and what tells one
from another.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

import numpy as np

PNG_END = b"IEND\xae\x42\x60\x82"  # the name of the last chunk, which is empty, and its checksum


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Writes ``data`` to ``path`` atomically and returns the path; parent folders are made."""
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return path


@contextmanager
def replacing(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """A temporary file, empty, that takes the place of ``path`` at the end; parent folders are made.

    It lies in the same folder, since ``os.replace`` is atomic only within one file system. An error, or an
    interruption, leaves the old file as it was. What the system refuses is said of ``path``: a full disk gives no name,
    and that of the temporary file tells nobody anything.

    Args:
        suffix: of the temporary file, for programs that go by it.
    """
    prefix = _temporary_prefix(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Made as any new file is: one of `tempfile` only its owner may read. Absolute, since a program may take what
        # comes before a colon for a protocol.
        temporary = path.parent.absolute() / f"{prefix}{secrets.token_hex(4)}{suffix}"
        try:
            temporary.touch(exist_ok=False)
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is not None and (error.filename is None or Path(error.filename).name.startswith(prefix)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _temporary_prefix(path: Path) -> str:
    """How the name of a temporary file for this path begins: file systems count a name's bytes, 255 at most."""
    return f".{os.fsencode(path.name)[:64].decode(errors='ignore')}."


class FolderLock:
    """A folder for one process at a time, as long as it lives: the system gives it back however a process ends.

    A context manager, which gives it back at the end; `take` takes it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = folder
        self.held = False  # stays so where folders cannot be locked (Windows, some network file systems)
        self._handle = -1

    def take(self, seconds: float) -> bool:
        """Takes the folder, which has to be there, if it is not held yet; False if another process still has it after
        so many seconds.
        """
        if fcntl is None:
            return True
        if self._handle < 0:
            self._handle = os.open(self.folder, os.O_RDONLY)
        deadline = time.monotonic() + seconds
        while not self.held:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.held = True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.2)
            except OSError:  # no locks of folders here
                break
        return True

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle >= 0:
            os.close(self._handle)


def remove_temporaries(path: Path) -> None:
    """Removes what killed writers of ``path`` have left beside it. For who knows that nobody writes it now."""
    left = re.compile(re.escape(_temporary_prefix(path)) + r"[a-z0-9_]{8}(\.tmp)?")  # models.weights' as well
    for file in path.parent.iterdir():
        if left.fullmatch(file.name):
            file.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Writes ``text`` as UTF-8 with ``\\n`` line ends, atomically."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], obj: Any) -> Path:
    """Writes ``obj`` as indented JSON, atomically. NaN and infinities raise ValueError: they are no JSON."""
    return write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_png(
    path: str | os.PathLike[str], array: np.ndarray, note: tuple[str, Any] | None = None, compress_level: int = 6
) -> Path:
    """Writes a uint8 image, ``(H, W)`` grey or ``(H, W, 3)`` RGB, as PNG, atomically.

    Args:
        note: name and content of a text field, written as JSON.
        compress_level: zlib's.

    Raises:
        ValueError: another dtype or shape; a float image is not rounded silently.
    """
    from PIL import Image, PngImagePlugin

    array = np.asarray(array)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise ValueError(
            f"{path}: expected a uint8 image of shape (H, W) or (H, W, 3), got {array.dtype} of shape {array.shape}"
        )
    text = PngImagePlugin.PngInfo()
    if note is not None:
        text.add_text(note[0], json.dumps(note[1]))
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, format="PNG", pnginfo=text, compress_level=compress_level)
    return write_bytes(path, buffer.getvalue())


def is_whole_png(path: Path) -> bool:
    """Whether a PNG is there and ends as one does. A machine that stops at once can leave a file that had been moved
    into its place empty, cut short or with zeros for an end.
    """
    try:
        with path.open("rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:  # not there, or shorter than that
        return False


def short_sha256(path: Path) -> str:
    """The first 16 digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
