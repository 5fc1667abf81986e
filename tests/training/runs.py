"""Short training runs and what they left, for the tests of training."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from models import build_dbsnet
from utils.training.config import TrainConfig

SMALL = ["streams:[appearance]", "depth:0", "dilations:[1]", "rounds:1"]  # --network, to be quick
OPTIONS = {"streams": ["appearance"], "depth": 0, "dilations": [1], "rounds": 1}
TINY = [
    *"--config configs/demo.yaml --variant xxs --size 32 64 --clip_len 2 --batch_size 2 --max_steps 4".split(),
    *"--steps_per_epoch 3 --workers 0 --log_every 1 --panels_every 0 --no-tensorboard --device cpu".split(),
    *"--warmup_steps 2 --network".split(),
    *SMALL,
]


def read(folder: Path, name: str = "last.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


def lines(folder: Path, kind: str = "train") -> list[dict]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] == kind]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a call that ends with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main.main(arguments)
    assert caught.value.code == 2
    bar, start, message = capsys.readouterr().err.partition("error: ")
    # Nothing comes before it, but bars of frames that were cached: finished, each on a line of its own.
    assert start and re.fullmatch(r"((\rcache: ram:[^\r\n]*)+\n)*", bar) and "Traceback" not in message
    return start + message


def equal(one: object, other: object, path: str = "") -> None:
    """Asserts that two nested structures hold the same tensors and numbers, to the last bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            equal(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for number, (a, b) in enumerate(zip(one, other)):
            equal(a, b, f"{path}/{number}")
    else:
        assert one == other, path


def load_image(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def run_script(script: str, repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program of its own that calls main.py with these arguments."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=repository, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )  # fmt: skip


def seeded_network() -> torch.nn.Module:
    torch.manual_seed(TrainConfig().seed)
    return build_dbsnet("xxs", **OPTIONS)
