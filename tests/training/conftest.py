"""Fixtures of the tests of training."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import main
from datasets.synthetic import write_dataset
from tests.training.runs import TINY


@pytest.fixture(autouse=True)
def at_the_checkout(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """Folder of a run of four steps, epochs of three, in one go."""
    folder = tmp_path_factory.mktemp("finished")
    before = os.getcwd()
    os.chdir(repository)
    try:
        assert main.main([*TINY, "--save_dir", str(folder)]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of three synthetic videos in DAVIS's layout, all in its train split."""
    return write_dataset(tmp_path_factory.mktemp("data"), videos=3, frames=5, size=(48, 80), seed=1, validation=0)
