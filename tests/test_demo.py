"""The demo: every step of the way, from drawn videos to a page; and in its full length it learns."""

from __future__ import annotations

import importlib.util
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("cv2")

import tool
from models import build_dbsnet, load_dbsnet
from models.weights import save_weights
from utils import demo
from utils.distributed import Processes
from utils.training.config import CONFIGS, load_config


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with hardly any video."""
    monkeypatch.setattr(demo, "TRAIN_VIDEOS", {"videos": 2, "frames": 3, "seed": 0})
    monkeypatch.setattr(demo, "VAL_VIDEOS", {"videos": 2, "frames": 3, "seed": 1})
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def masks(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) > 0 for path in sorted(folder.rglob("*.png"))]


def test_every_step_leaves_its_results(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--tools",
        "demo",
        "--demo_dir",
        str(tmp_path / "d"),
        "--demo_steps",
        "2",
        "--device",
        "cpu",
        "--demo_scratch",
    ]
    assert tool.main(words) == 0
    out = capsys.readouterr().out
    # The commands are shown, and are those of the real thing.
    for part in ("python tool.py --tools flow --flow_method dis", "python main.py --config", "--tools test"):
        assert f"$ {part}" in out or f" {part}" in out
    truth = masks(tmp_path / "d/data/demo-val/Annotations/480p")
    found = masks(tmp_path / "d/results/binary/demo-val")
    assert len(truth) == len(found) == 6
    # J as printed, from the files: mean over frames, then over videos, which are of one length.
    scores = [(a & b).sum() / max(1, (a | b).sum()) for a, b in zip(truth, found)]
    printed = float(re.search(r"demo: J (\d\.\d+)", out)[1])
    assert printed == pytest.approx(np.mean(scores), abs=6e-4)
    page = (tmp_path / "d" / "report.html").read_text()
    assert f"<b>{100 * printed:.1f}</b>J" in page and "DIS" in page and "random weights" in page
    assert str(tmp_path / "d" / "report.html") in out

    # Once more: nothing is trained or made again.
    weights = (tmp_path / "d/trained/weights.safetensors").stat().st_mtime_ns
    flows = {path: path.stat().st_mtime_ns for path in (tmp_path / "d/data").rglob("Flows/**/*.png")}
    assert tool.main(words) == 0 and len(flows) == 12
    assert (tmp_path / "d/trained/weights.safetensors").stat().st_mtime_ns == weights
    assert all(path.stat().st_mtime_ns == when for path, when in flows.items())

    # Where pydensecrf is not installed, as on Python 3.13, all but the CRF is done, and that is told.
    shutil.rmtree(tmp_path / "d/results")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pydensecrf" else find(name))
    capsys.readouterr()
    assert tool.main(words) == 0
    out, page = capsys.readouterr().out, (tmp_path / "d" / "report.html").read_text()
    assert f"demo: J {printed:.3f}" in out and "; no CRF, since pydensecrf is not installed" in out
    assert "The CRF was left out" in page and "after the CRF" not in page and " crf " not in out


def test_train_and_test_videos_differ() -> None:
    assert demo.TRAIN_VIDEOS["seed"] != demo.VAL_VIDEOS["seed"]
    assert load_config(CONFIGS / "demo.yaml").size == tuple(int(side) for side in demo.INPUT_SIZE)


def test_it_starts_from_the_published_weights(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "published.safetensors"
    save_weights(weights, build_dbsnet("xxs", depth=1, dilations=[1]))
    monkeypatch.setattr("utils.inference.weights.PUBLISHED_WEIGHTS", weights)
    words = ["--tools", "demo", "--demo_dir", str(tmp_path / "d"), "--demo_steps", "1", "--device", "cpu"]
    assert tool.main(words) == 0
    assert f"--finetune {weights}" in capsys.readouterr().out
    assert "the published weights" in (tmp_path / "d" / "report.html").read_text()
    assert load_dbsnet(tmp_path / "d/finetuned/weights.safetensors").config["depth"] == 1


def test_other_steps_name_the_options_of_the_demo(
    short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tools", "demo", "--demo_dir", str(tmp_path / "d"), "--device", "cpu", "--demo_scratch", "--demo_steps"]
    assert tool.main([*words, "1"]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*")}
    for steps, advice in (
        ("2", ("trains for 1 step,", "--demo_steps 1", "--demo_dir DIR", "--overwrite")),
        ("0", ("--demo_steps 0",)),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            tool.main([*words, steps])
        assert caught.value.code == 2
        shown = capsys.readouterr()
        assert all(part in shown.err for part in advice) and "--finetune" not in shown.err + shown.out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*")} == before
    assert tool.main([*words, "2", "--overwrite"]) == 0
    assert "1 -> 2" not in capsys.readouterr().out  # trained anew, not gone on with
    assert (tmp_path / "d/trained/previous-1/last.pt").is_file()


@pytest.mark.parametrize(
    "words",
    [["--save_dir", "mine"], ["--checkpoint", "w.pt"], ["--data_dir", "mine"], ["--datasets", "FBMS"]],
    ids=lambda words: words[0],
)
def test_options_that_it_would_pass_over_are_refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []
    monkeypatch.setattr(tool, "TOOLS", {name: lambda *_, name=name: ran.append(name) for name in tool.TOOLS})
    with pytest.raises(SystemExit) as caught:
        tool.main(["--tools", "demo", "--device", "cpu", *words])
    assert caught.value.code == 2 and ran == []
    shown = capsys.readouterr().err
    assert f"error: {words[0]} has no effect" in shown and "--demo_dir" in shown
    # A tool after it may need them.
    assert tool.main(["--tools", "demo", "flow", "--device", "cpu", *words]) == 0 and ran == ["demo", "flow"]


def test_a_file_in_the_place_of_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The advice names an option that the demo takes."""
    (tmp_path / "d").write_text("")
    with pytest.raises(SystemExit) as caught:
        tool.main(["--tools", "demo", "--demo_dir", str(tmp_path / "d"), "--device", "cpu", "--demo_scratch"])
    assert caught.value.code == 2 and "for the demo --demo_dir" in capsys.readouterr().err


def test_several_processes_are_refused_before_any_tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []
    monkeypatch.setattr(tool, "TOOLS", {name: lambda *_: ran.append("a tool") for name in tool.TOOLS})
    two = Processes(rank=1, world_size=2, device=torch.device("cpu"))
    monkeypatch.setattr("utils.distributed.start_processes", lambda *_: two)
    with pytest.raises(SystemExit) as caught:
        tool.main(["--tools", "flow", "demo"])
    assert caught.value.code == 2 and ran == []
    assert "--tools demo runs in one process" in capsys.readouterr().err


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_is_told_once_and_keeps_its_exit_code(
    sent: signal.Signals, code: int, short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A command of the demo says that it was stopped, and so by its exit code; main.py answers 130 to either signal."""
    monkeypatch.setattr(demo, "write_dataset", lambda *_, **__: None)
    words = ["--tools", "demo", "--demo_dir", str(tmp_path / "d"), "--device", "cpu", "--demo_scratch"]

    def train(_: object) -> int:
        print("stopped at step 3; to go on, run the same command again")
        return 130

    # Shells start what runs in the background with SIGINT ignored.
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
            patch.setitem(tool.TOOLS, "flow", lambda *_: signal.raise_signal(sent))
            tool.main(words)
        shown = capsys.readouterr()
        assert caught.value.code == code and shown.err.count("the same command") == 1 and "error" not in shown.err
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
            patch.setitem(tool.TOOLS, "flow", lambda *_: 0)
            patch.setattr("main.main", train)
            tool.main(words)
        shown = capsys.readouterr()
        assert caught.value.code == 130 and (shown.out + shown.err).count("the same command") == 1
        # Where the demo itself is at work, nobody else says it.
        monkeypatch.setattr(demo, "write_dataset", lambda *_, **__: signal.raise_signal(sent))
        assert tool.main(words) == code
        assert capsys.readouterr().err.count("the same command") == 1
    finally:
        signal.signal(signal.SIGINT, kept)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.parametrize("start", [[], ["--demo_scratch"]], ids=["as it is", "from random weights"])
def test_it_learns(start: list[str], tmp_path: Path, repository: Path) -> None:
    """J on videos that it was not trained on, as a user starts it."""
    command = [sys.executable, "tool.py", "--tools", "demo", "--demo_dir", str(tmp_path / "d"), "--device", "cpu"]
    command += start
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"demo: J (\d\.\d+)", done.stdout)[1]) >= 0.75, done.stdout
