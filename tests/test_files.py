"""Files that are complete or not there: what `replacing` leaves, and whom it says the system's refusals of."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from utils.files import replacing, write_bytes


def refused(path: Path, error: BaseException) -> BaseException:
    """What comes of an error that is raised while a file is written; nothing else may come of it."""
    path.write_bytes(b"older")
    with pytest.raises(type(error)) as caught, replacing(path) as temporary:
        assert temporary.parent == path.parent and temporary.read_bytes() == b""
        temporary.write_bytes(b"half of the n")
        raise error
    assert path.read_bytes() == b"older" and list(path.parent.iterdir()) == [path]
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        RuntimeError("a defect"),
        OSError("a fault of a library's, without a number"),
        FileNotFoundError(errno.ENOENT, "No such file", "frames/00001.png"),  # of a frame that is to be drawn
    ],
)
def test_what_is_no_refusal_of_this_file_stays_what_it_is(error: BaseException, tmp_path: Path) -> None:
    before = error.args, getattr(error, "filename", None)
    assert refused(tmp_path / "file", error) is error
    assert (error.args, getattr(error, "filename", None)) == before


def test_what_the_system_refuses_is_said_of_the_file(tmp_path: Path) -> None:
    for name in (None, str(tmp_path / ".file.x1y2z3.tmp")):
        found = refused(tmp_path / "file", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name))
        assert (found.errno, found.strerror, found.filename) == (
            errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "file"),
        )  # fmt: skip


def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "folder" / "within").mkdir(parents=True)
    with pytest.raises(IsADirectoryError) as caught:
        write_bytes(tmp_path / "folder", b"new")
    assert caught.value.filename == str(tmp_path / "folder")
    write_bytes(tmp_path / "file", b"older")
    for path in (tmp_path / "file" / "new", tmp_path / "file" / "deeper" / "new"):
        with pytest.raises((FileExistsError, NotADirectoryError)) as caught:
            write_bytes(path, b"new")
        assert caught.value.filename == str(path.parent)  # what cannot be made is that
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "within"]
    assert write_bytes(tmp_path / "made" / "deeper" / "new", b"new").read_bytes() == b"new"


@pytest.mark.parametrize("suffix", ["", ".mp4"])
def test_others_may_read_a_file_as_far_as_the_umask_lets_them(suffix: str, repository: Path, tmp_path: Path) -> None:
    work = f"from utils.files import *; t = replacing(Path({str(tmp_path / 'new')!r}), **dict(suffix={suffix!r}))\n"
    work += "with t as temporary: print(temporary.name); temporary.write_bytes(b'new')"
    for umask, mode in ((0o022, 0o644), (0o027, 0o640), (0o002, 0o664)):
        ended = subprocess.run(
            [sys.executable, "-c", work],
            cwd=repository,
            capture_output=True,
            text=True,
            check=True,
            preexec_fn=lambda mask=umask: os.umask(mask),
        )
        assert (tmp_path / "new").stat().st_mode & 0o777 == mode
        assert re.fullmatch(rf"\.new\.\w+{re.escape(suffix)}", ended.stdout.strip())
