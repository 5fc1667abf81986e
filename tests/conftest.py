"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# The tests' tensors are small: more threads than one per test process only wait for each other. Set before torch is
# imported, and inherited by the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Root of the real data (DAVIS, DUTS-TR, weights, known_answers); the test is skipped where there is none."""
    candidates = [os.environ.get("DBSNET_DATA"), REPOSITORY.parent / "shared" / "data"]
    for candidate in candidates:
        if candidate and Path(candidate).is_dir():
            return Path(candidate)
    pytest.skip("needs the real data: set DBSNET_DATA to its folder (DAVIS, DUTS-TR, weights, known_answers)")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout under test."""
    return REPOSITORY
