"""What ends a command with one line and exit code 2, and what stays an error of the program."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tool
from models.weights import network_of
from utils.errors import PLACES, UserError, exit_on_user_error, nearest
from utils.files import write_text
from utils.training.loading import read_batches


def test_names_are_told_where_they_are_of_help() -> None:
    assert nearest("bach_size", ["batch_size", "lr"], "--") == "did you mean --batch_size?"
    assert nearest("zzz", ["lr", "ema"]) == "the valid names are lr, ema"
    told = nearest("zzz", [f"{number:010x}" for number in range(3471)])  # the videos of YouTube-VOS
    assert told.endswith("0000000009 … (3471 in all)") and len(told) < 200


@pytest.mark.parametrize("number", PLACES)
def test_refusals_of_the_system_are_a_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        raise OSError(number, "refused", "some/place")
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: some/place: refused; {PLACES[number]}\n"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_read_only_data_can_have_their_flow_elsewhere(number: int) -> None:
    assert "--flow_dir" in PLACES[number]


@pytest.mark.parametrize("place", [None, tempfile.gettempdir()])
def test_what_fills_the_temporary_folder_is_told(place: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), exit_on_user_error():
        raise OSError(errno.ENOSPC, "refused", place)
    message = capsys.readouterr().err
    assert "TMPDIR" in message and "None" not in message


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, exist_ok: bool) -> None:
        os.symlink("/dev/full", path)

    monkeypatch.setattr(Path, "touch", full)  # weights have a writer of their own: tests/test_weights.py
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "file", "words")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "file"))
    assert not list(tmp_path.iterdir())


def test_names_are_counted_in_bytes_and_those_too_long_are_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longest = tmp_path / ("\N{GRINNING FACE}" * 62 + ".json")  # 253 bytes of the 255 that file systems take
    assert write_text(longest, "words").read_text() == "words"
    for place, words in ((tmp_path / ("a" * 256), "rename"), (tmp_path, "a folder lies")):
        with pytest.raises(SystemExit) as caught, exit_on_user_error():
            write_text(place, "words")
        message = capsys.readouterr().err
        assert caught.value.code == 2 and message.startswith(f"error: {place}: ") and words in message
    assert list(tmp_path.iterdir()) == [longest]


def test_a_process_that_others_have_left_says_so_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:14469.")
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("error: another process of this run has ended")


def test_a_gpu_without_enough_memory_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 34 GiB.\nMore lines")
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert message.startswith("error: CUDA out of memory. Tried to allocate 34 GiB. ") and "--flow_batch" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("make", [lambda: torch.empty(1 << 52), lambda: np.empty(1 << 52)], ids=["torch", "numpy"])
def test_a_machine_without_enough_memory_is_a_line(make: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        make()
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert message.startswith("error: this machine has not enough memory") and message.count("\n") == 1


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), RuntimeError("a defect"), ValueError("another")])
def test_defects_stay_defects(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, exit_on_user_error():
        raise error
    assert caught.value is error


def test_a_results_folder_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "frames").mkdir()

    Image.new("RGB", (64, 32)).save(tmp_path / "frames" / "0.png")
    words = ["--tools", "flow", "--frames", str(tmp_path / "frames"), "--save_dir", str(tmp_path / "file")]
    with pytest.raises(SystemExit) as caught:
        tool.main(words)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "error: " in message and "--save_dir" in message and "Traceback" not in message


def run_within(repository: Path, statement: str, shell: str = "{}", **environment: str) -> subprocess.CompletedProcess:
    """A Python of its own that runs a statement as main.py and tool.py run theirs, in a shell's line."""
    lines = f"from utils.errors import exit_on_user_error\nwith exit_on_user_error():\n    {statement}\n"
    return subprocess.run(
        ["bash", "-c", shell.format('"$0" -c "$1"'), sys.executable, lines],
        cwd=repository,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_ends_the_program_without_a_traceback(repository: Path, unbuffered: str) -> None:
    ended = run_within(
        repository, "print('x' * 100000); print('y')", "{} | true; exit ${{PIPESTATUS[0]}}", PYTHONUNBUFFERED=unbuffered
    )
    assert ended.returncode == 141
    assert ended.stderr == "ended: nobody reads the output any more; the same command goes on from here\n"


@pytest.mark.parametrize("pipe", ["2>&1 |", "2>&1 >/dev/null |"])
def test_a_reader_of_warnings_that_has_gone_ends_it_likewise(pipe: str, repository: Path) -> None:
    ended = run_within(
        repository, "import sys; print('x' * 100000, file=sys.stderr)", f"{{}} {pipe} true; exit ${{{{PIPESTATUS[0]}}}}"
    )
    assert ended.returncode == 141


def test_a_broken_pipe_of_another_kind_stays_a_defect(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BrokenPipeError), exit_on_user_error():
        raise BrokenPipeError(errno.EPIPE, "that of a worker process")


def test_letters_that_the_terminal_lacks_are_escaped(repository: Path) -> None:
    ended = run_within(repository, "print('S \\u2191')", PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stdout) == (0, "S \\u2191\n")


def test_closed_streams_are_no_reason_to_fail(repository: Path, tmp_path: Path) -> None:
    work = "import pathlib; from utils.progress import progress_bar; [print(i) for i in progress_bar(range(3))]"
    ended = run_within(repository, f"{work}; pathlib.Path({str(tmp_path / 'done')!r}).touch()", "{} >&- 2>&-")
    assert ended.returncode == 0 and (tmp_path / "done").exists()


def test_an_older_python_is_told(repository: Path) -> None:
    words = "import sys; sys.version_info = (3, 9, 2); sys.version = '3.9.2 (old)'; import utils"
    ended = subprocess.run([sys.executable, "-c", words], cwd=repository, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: DBSNet needs Python 3.10 or newer") and "is 3.9.2" in ended.stderr


@pytest.mark.parametrize("program", ["main.py", "tool.py"])
def test_where_the_requirements_are_not_installed_a_line_says_so(program: str, repository: Path) -> None:
    # -S: without site-packages, as in an environment into which nothing was installed.
    ended = subprocess.run([sys.executable, "-S", program, "--help"], cwd=repository, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "error: numpy is not installed; pip install -r requirements.txt\n"


def test_only_a_package_that_is_missing_altogether_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for name, package in (("cv2", "opencv-python-headless"), ("av", "av")):
        with pytest.raises(SystemExit) as caught, exit_on_user_error():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        assert caught.value.code == 2
        assert capsys.readouterr().err == f"error: {package} is not installed; pip install -r requirements.txt\n"
    for defect in (ModuleNotFoundError("x", name="torch.nowhere"), ImportError("broken", name="cv2")):
        with pytest.raises(ImportError) as caught, exit_on_user_error():
            raise defect
        assert caught.value is defect


def test_weights_with_an_encoder_of_a_package_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are not taken for weights of another version."""
    monkeypatch.setitem(sys.modules, "timm", None)
    checkpoint = {"config_model": {"variant": "xxs", "encoder": "tf_efficientnet_lite0"}, "model": {"a": torch.ones(1)}}
    with pytest.raises(SystemExit, match="2"), exit_on_user_error():
        network_of(checkpoint, "weights.pt")
    assert capsys.readouterr().err == "error: timm is not installed; pip install -r requirements.txt\n"


def test_full_shared_memory_is_not_taken_for_a_full_disk() -> None:
    class Loader:
        def __iter__(self) -> None:  # as the queue of the loader's processes cannot be made
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="/dev/shm.*--workers 0"):
        next(read_batches(Loader()))
