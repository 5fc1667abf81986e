"""docs/extending.md: its snippets run as they stand, one after the other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import build_dbsnet, save_weights


def test_the_snippets_run(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("pydensecrf")
    save_weights(tmp_path / "small.safetensors", build_dbsnet("xxs", depth=1, dilations=[1], rounds=1))
    rng = np.random.default_rng(0)
    logged = [{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "val", "step": 2, "J": 0.5}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    names: dict[str, Any] = {
        "__name__": __name__,
        "weights": tmp_path / "small.safetensors",
        "frames": list(rng.integers(0, 256, (4, 50, 70, 3), dtype=np.uint8)),
        "truths": list(rng.random((4, 50, 70)) > 0.5),
        "run": tmp_path,
    }
    text = (repository / "docs" / "extending.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 4
    for snippet in snippets:
        exec(compile(snippet, "docs/extending.md", "exec"), names)
    assert [one.shape for one in (names["maps"][3], names["refined"][3], names["picture"])] == [
        (50, 70), (50, 70), (50, 70, 3),
    ]  # fmt: skip
    assert set(names["J"]) == set(names["F"]) == {"mean", "recall", "decay"}
    assert names["seen"]["stride_32"].shape == (2, 3, 2 * 48, 2, 3) and names["path"][-1].shape == (6, 48, 16, 24)
    assert names["clips"].grad.abs().sum() > 0 and names["encoded"]["motion"][3].shape[2:] == (2, 3)
    assert names["macs"] > 0 and names["parameters"] == sum(p.numel() for p in names["net"].parameters())
    assert names["own"].encoders["appearance"].channels == (8, 16, 24, 32)
    assert names["own"](names["clips"], names["motion"]).shape == (2, 3, 1, 64, 96)
    assert names["curve"] == [(2, 0.5)]


def test_the_files_it_names_are_there(repository: Path) -> None:
    text = (repository / "docs" / "extending.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| (.+) \|$", text, re.MULTILINE)
    named = {path for row in rows for path in re.findall(r"`(\w+/[\w/]+\.py)`", row)}
    assert len(named) >= 9
    for path in named:
        assert (repository / path).is_file(), path
    code = "".join((repository / path).read_text(encoding="utf-8") for path in named)
    for word in ("segmentation_loss", "lr_factor", "TrainConfig", "Augment", "draw", "apply", "build_augment"):
        assert re.search(rf"^(?:def|class) {word}\b", code, re.MULTILINE) and f"`{word}`" in text
