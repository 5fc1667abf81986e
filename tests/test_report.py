"""The parts of the page of `--tools report`, and what it refuses; the row of tools that leads to it: test_tool.py."""

from __future__ import annotations

import pytest

pytest.importorskip("cv2")

from utils import report
from utils.report import Scores


def scores_of(frames: dict[str, dict[str, float]], dataset: str = "D") -> Scores:
    """J of some frames, by video."""
    means = {name: {"J_mean": sum(values.values()) / len(values)} for name, values in frames.items()}
    overall = {"J_mean": sum(row["J_mean"] for row in means.values()) / len(means)}
    parts = {"overall": {"": overall}, "sequences": {"": means}, "frames": {"": frames}, "protocols": {}}
    return Scores(dataset=dataset, key="J_mean", frame_key="J", **parts)


def test_one_of_a_thing_is_one() -> None:
    one, two = scores_of({"a": {"0": 0.5}}), scores_of({"a": {"0": 0.5, "1": 0.5}, "b": {"0": 0.5}})
    assert "<b>1</b>sequence of D<" in report._tiles(one) and "<b>2</b>sequences of D<" in report._tiles(two)
    assert "a, 1 frame<" in report._curves(one) and "a, 2 frames<" in report._curves(two)
