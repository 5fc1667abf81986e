"""A worker that dies: the launcher starts all again, and they go on from the last checkpoint to the same end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = 6
LINE = (
    "main.py --config configs/demo.yaml --variant xxs --network depth:0 dilations:[1] rounds:0 --size 32 64 "
    f"--clip_len 2 --max_steps {STEPS} --steps_per_epoch {STEPS} --save_every 2 --batch_size 1 --workers 0 "
    "--log_every 1 --panels_every 0 --no-tensorboard --warmup_steps 2 --device cpu"
).split()
TIMEOUT = 400


def start(repository: Path, folder: Path, restarts: int) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--max-restarts={restarts}", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder.with_suffix(".txt"), "wb") as output:
        return subprocess.Popen(
            [sys.executable, *launcher, *LINE, "--save_dir", str(folder)], cwd=repository, env=environment,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def end(process: subprocess.Popen) -> None:
    """Nothing of a test's processes outlives it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def workers_of(process: subprocess.Popen) -> dict[int, int]:
    """Ranks of the launcher's child processes: process id -> rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == process.pid:
                words = (entry / "environ").read_bytes().split(b"\0")
                ranks = [word.split(b"=")[1] for word in words if word.startswith(b"RANK=")]
                found.update({int(entry.name): int(rank) for rank in ranks})
        except (OSError, ValueError, IndexError):
            continue  # ended meanwhile
    return found


def steps(folder: Path) -> list[int]:
    """Steps in the log, in the order they were written."""
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [entry["step"] for entry in map(json.loads, lines) if entry["kind"] == "train"]


def wait_for(condition, process: subprocess.Popen, output: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, output.read_text()[-3000:]
        assert time.monotonic() < deadline, output.read_text()[-3000:]
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the workers in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_worker_is_started_again_and_the_run_completes(victim: int, tmp_path: Path, repository: Path) -> None:
    import torch

    folder = tmp_path / "run"
    process = start(repository, folder, restarts=1)
    output = folder.with_suffix(".txt")
    try:
        wait_for(lambda: (folder / "last.pt").is_file(), process, output)
        before = workers_of(process)
        assert sorted(before.values()) == [0, 1]
        os.kill(next(pid for pid, rank in before.items() if rank == victim), signal.SIGKILL)
        assert process.wait(TIMEOUT) == 0, output.read_text()[-3000:]
    finally:
        end(process)
    text = output.read_text()
    assert "resuming" in text
    assert f"done: {STEPS} steps" in text
    assert steps(folder)[-1] == STEPS
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == STEPS

    # The same run without an accident ends with the same weights.
    whole = tmp_path / "whole"
    process = start(repository, whole, restarts=0)
    try:
        assert process.wait(TIMEOUT) == 0, whole.with_suffix(".txt").read_text()[-3000:]
    finally:
        end(process)
    ours, theirs = (torch.load(path / "last.pt", weights_only=True)["model"] for path in (folder, whole))
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the workers in /proc")
def test_without_restarts_the_run_ends_with_an_error_and_can_be_repeated(tmp_path: Path, repository: Path) -> None:
    folder = tmp_path / "run"
    process = start(repository, folder, restarts=0)
    output = folder.with_suffix(".txt")
    try:
        wait_for(lambda: (folder / "last.pt").is_file(), process, output)
        os.kill(next(pid for pid, rank in workers_of(process).items() if rank == 1), signal.SIGKILL)
        assert process.wait(TIMEOUT) != 0
    finally:
        end(process)
    process = start(repository, folder, restarts=0)
    try:
        assert process.wait(TIMEOUT) == 0, output.read_text()[-3000:]
    finally:
        end(process)
    assert steps(folder)[-1] == STEPS
