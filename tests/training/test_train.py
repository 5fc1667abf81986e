"""main.py: a run, its files, and the ends it can come to."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import main
from models import load_dbsnet
from tests.training.runs import TINY, equal, fails, lines, load_image, read, run_script
from utils.inference.weights import load_weights
from utils.training.config import load_config
from utils.training.run import Run
from utils.training.runlog import RunLog


def test_the_files_of_a_run(finished: Path) -> None:
    config = load_config(finished / "config.yaml")
    assert config.save_dir == str(finished) and config.max_steps == 4
    # The weights that are handed out are the averaged ones, and build their own network.
    net = load_dbsnet(finished / "weights.safetensors")
    assert net.config == read(finished)["config_model"]
    equal(dict(net.state_dict()), read(finished)["ema"])
    equal(dict(load_dbsnet(finished / "last.pt").state_dict()), read(finished)["ema"])
    weights = load_weights(finished / "weights.safetensors")
    notes = weights.notes
    assert (notes.pop("J"), notes.pop("size"), weights.size) == ("not validated", "32 64", (32, 64))
    assert notes == load_weights(finished / "last.pt").notes == {"step": "4", "trained_on": "synthetic"}


LIMITED = """
import resource, sys
import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
sys.exit(main.main(sys.argv[1:]))
"""


def test_a_checkpoint_that_there_is_no_room_for_is_named(tmp_path: Path, repository: Path) -> None:
    pytest.importorskip("resource")
    ended = run_script(LIMITED, repository, *TINY, "--save_dir", str(tmp_path))
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert f"error: {tmp_path / 'weights.safetensors'}: File too large; make room there" in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "log.jsonl"]


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Nothing is reported before the last step, and there would be a saving after each step and at the epoch's end.
    arguments = [*TINY, "--save_dir", str(tmp_path), "--schedule", "constant", "--log_every", "100"]
    assert main.main([*arguments, "--stop_after", "1"]) == 0
    message = fails([*arguments, "--lr", "1e30", "--warmup_steps", "0", "--save_every", "1"], capsys)
    assert "not finite" in message and "last.pt" in message
    for tensor in read(tmp_path)["model"].values():
        assert torch.isfinite(tensor).all()


def test_statistics_that_are_no_numbers_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In half precision a step with numbers too large for it is passed over, and batch norms have seen them."""
    arguments = [*TINY, "--save_dir", str(tmp_path), "--log_every", "100"]
    assert main.main([*arguments, "--stop_after", "1"]) == 0
    before = (tmp_path / "last.pt").read_bytes()
    step = main.train_step

    def overflowing(run: Run, *rest):
        result = step(run, *rest)
        next(value for name, value in run.net.named_buffers() if name.endswith("running_var"))[0] = torch.inf
        return result

    monkeypatch.setattr(main, "train_step", overflowing)
    message = fails([*arguments, "--stop_after", "1"], capsys)
    assert "statistics" in message and "not finite" in message and "last.pt" in message
    assert (tmp_path / "last.pt").read_bytes() == before


class Elsewhere:
    """A tensor of another device, as far as NumPy is concerned: it has to be fetched."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, index: int) -> Elsewhere:
        return Elsewhere(self.tensor[index])

    def __array__(self, *_: object, **__: object) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self) -> torch.Tensor:
        return self.tensor


def test_panels_of_a_batch_on_a_gpu() -> None:
    batch = {name: torch.randint(0, 256, (1, 2, 3, 32, 64), dtype=torch.uint8) for name in ("frames", "flows")}
    batch.update(masks=torch.ones(1, 2, 1, 32, 64, dtype=torch.uint8), valid=torch.ones(1, 2, dtype=torch.bool))
    logits = torch.randn(1, 2, 1, 32, 64)
    expected = main.picture(batch, logits)
    assert np.array_equal(main.picture({name: Elsewhere(value) for name, value in batch.items()}, logits), expected)


def test_tensorboard_and_panels(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = [*TINY, "--tensorboard", "--panels_every", "1", "--max_steps", "1", "--save_dir", str(tmp_path)]
    assert main.main(arguments) == 0
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([lines(tmp_path)[0]["loss"]])
    assert events.Images("train")
    picture = load_image(tmp_path / "panels" / "train_0000001.png")
    assert picture.ndim == 3 and picture.std() > 10


def test_on_a_terminal_lines_stand_above_a_bar_that_goes_on_where_the_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    log = RunLog(tmp_path, step=2, total=4, tensorboard=False)
    log.open()
    log.say("step 3/4 loss 0.5")
    log.advance()
    log.advance()
    log.close()
    told = capsys.readouterr()
    assert told.out == "step 3/4 loss 0.5\n"
    assert "2/4" in told.err and "4/4" in told.err.splitlines()[-1] and told.err.endswith("\n")


def test_tensorboard_that_is_not_installed_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(main, "train_step", None)
    message = fails([*TINY, "--tensorboard", "--save_dir", str(tmp_path)], capsys)
    assert "pip install tensorboard, or --no-tensorboard" in message


def test_a_log_that_there_is_no_room_for_is_named(tmp_path: Path) -> None:
    class Full:
        def add_scalar(self, *_: object) -> None:
            raise OSError(
                28, "No space left on device"
            )  # without a name, which would be taken for the temporary folder

    log = RunLog(tmp_path, step=0, total=1, tensorboard=False)
    log.open()
    log._board = Full()
    with pytest.raises(OSError) as caught:
        log.record("train", {"step": 1, "loss": 0.5})
    assert caught.value.filename == str(tmp_path / "events.out.tfevents")
    assert lines(tmp_path) == [{"kind": "train", "step": 1, "loss": 0.5}]


@pytest.mark.parametrize("left", [b'{"kind": "train", "st', bytes(40), b"\xff\xfe\x80"])
def test_a_log_goes_on_whatever_a_machine_left_at_its_end(left: bytes, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    entries = [json.dumps({"kind": "train", "step": step}).encode() + b"\n" for step in (1, 2, 3)]
    path.write_bytes(b"".join(entries) + left)
    log = RunLog(tmp_path, step=2, total=5, tensorboard=False)
    log.open()
    log.close()
    assert path.read_bytes() == b"".join(entries[:2])


@pytest.mark.slow
def test_it_compiles(tmp_path: Path) -> None:
    assert main.main([*TINY, "--compile", "--max_steps", "2", "--save_dir", str(tmp_path)]) == 0
    load_dbsnet(tmp_path / "weights.safetensors")  # no _orig_mod. in the names


@pytest.mark.slow
def test_it_learns_synthetic_clips(tmp_path: Path) -> None:
    # Both streams: a still picture does not say which of several things moves.
    arguments = [word for word in TINY if not word.startswith("streams:")] + ["--batch_size", "4"]
    arguments += ["--max_steps", "300", "--steps_per_epoch", "300", "--lr", "2e-3", "--log_every", "60"]
    assert main.main([*arguments, "--size", "64", "96", "--save_dir", str(tmp_path)]) == 0
    curve = [line["iou"] for line in lines(tmp_path)]
    assert curve[-1] < 0.75 * curve[0], curve
