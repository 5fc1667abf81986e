"""A run that is stopped goes on exactly where it was, and what it has is never lost or mixed with another run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import main
from models import load_dbsnet
from tests.training.runs import TINY, equal, fails, lines, read, seeded_network
from utils import stopping
from utils.distributed import Processes
from utils.errors import UserError
from utils.files import FolderLock, write_bytes
from utils.stopping import StopRequest, sigterm_raises
from utils.training import resuming
from utils.training.checkpoint import load_checkpoint
from utils.training.config import TrainConfig
from utils.training.run import Run


def test_a_resumed_run_equals_one_that_never_stopped(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY, "--save_dir", str(tmp_path)]
    for stop, more in ((2, "2"), (3, "1")):  # inside an epoch, and between two
        assert main.main([*arguments, "--stop_after", more]) == 0
        assert f"stopped at step {stop} of 4" in capsys.readouterr().out
        assert read(tmp_path)["step"] == stop
    assert main.main(arguments) == 0
    assert f"resuming {tmp_path / 'last.pt'} at step 3" in capsys.readouterr().out
    resumed, whole = read(tmp_path), read(finished)
    for key in ("model", "ema", "optimizer", "scheduler", "step", "epoch", "best", "rng"):
        equal(resumed[key], whole[key], key)
    exact = ("step", "epoch", "loss", "bce", "iou", "aux", "lr", "grad_norm")
    assert [[line[key] for key in exact] for line in lines(tmp_path)] == [
        [line[key] for key in exact] for line in lines(finished)
    ]


def test_a_finished_run_is_left_as_it_is(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "last.pt").read_bytes()
    assert main.main([*TINY, "--save_dir", str(finished)]) == 0
    assert "done: 4 steps" in capsys.readouterr().out
    assert (finished / "last.pt").read_bytes() == before
    assert len(lines(finished)) == 4


def test_going_on_with_an_older_run_tells_what_is_new(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = read(finished)
    del checkpoint["config"]["rotation_flow"]  # its colours of flow did not turn
    del checkpoint["config"]["freeze_stride"], checkpoint["pending_validation"]  # nor had it these
    torch.save(checkpoint, tmp_path / "last.pt")
    arguments = [*TINY, "--save_dir", str(tmp_path), "--max_steps", "5"]
    assert main.main(arguments) == 0
    told = capsys.readouterr().out
    assert "changed since: rotation_flow ignore -> exact" in told and "changed since: max_steps 4 -> 5" in told


def test_a_run_begun_on_a_gpu_goes_on_without_one(finished: Path, tmp_path: Path) -> None:
    """There AdamW is the fused one, and the optimiser's state says so."""
    arguments = [*TINY, "--save_dir", str(tmp_path)]
    assert main.main([*arguments, "--stop_after", "2"]) == 0
    checkpoint = read(tmp_path)
    for group in checkpoint["optimizer"]["param_groups"]:
        group["fused"] = True
    torch.save(checkpoint, tmp_path / "last.pt")
    assert main.main(arguments) == 0
    result = read(tmp_path)
    assert not any(group["fused"] for group in result["optimizer"]["param_groups"])
    for name, value in read(finished)["model"].items():
        assert torch.equal(result["model"][name], value), name


def test_the_optimiser_s_state_lies_in_memory_as_this_call_s_weights_do(tmp_path: Path) -> None:
    """The fused AdamW of a GPU refuses others."""
    arguments = [*TINY, "--save_dir", str(tmp_path)]
    assert main.main([*arguments, "--stop_after", "1", "--channels_last"]) == 0
    kept = [moment for state in read(tmp_path)["optimizer"]["state"].values() for moment in state.values()]
    assert not all(moment.is_contiguous() for moment in kept)
    assert main.main([*arguments, "--stop_after", "1"]) == 0
    states = read(tmp_path)["optimizer"]["state"].values()
    assert all(moment.is_contiguous() for state in states for moment in state.values())


def test_a_finished_run_has_no_weights_to_offer_elsewhere(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([*TINY, "--resume", str(finished / "last.pt"), "--save_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "has its 4 steps already" in said and "weights to test with" not in said


def test_a_finished_run_changes_nothing_in_the_folder_of_another(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*TINY, "--tensorboard", "--save_dir", str(tmp_path)]
    assert main.main([*command, "--seed", "3", "--max_steps", "6"]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert main.main([*command, "--resume", str(finished / "last.pt")]) == 0
    said = capsys.readouterr().out
    assert "has its 4 steps already" in said and "weights to test with" not in said
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_link_to_a_run_s_own_checkpoint(tmp_path: Path) -> None:
    run, link = tmp_path / "run", tmp_path / "latest.pt"
    assert main.main([*TINY, "--save_dir", str(run), "--stop_after", "2"]) == 0
    link.symlink_to(run / "last.pt")
    assert main.main([*TINY, "--save_dir", str(run), "--resume", str(link)]) == 0
    assert not (run / "previous-1").exists() and [line["step"] for line in lines(run)] == [1, 2, 3, 4]


def test_a_damaged_file_of_the_best_keeps_nobody_from_going_on(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = min(path.name for path in (videos / "JPEGImages" / "480p").iterdir())
    arguments = [*TINY, "--datasets", "DAVIS-2016", "--data_dir", str(videos), "--val_sequences", name]
    arguments += ["--save_dir", str(tmp_path), "--steps_per_epoch", "1", "--max_steps"]
    scores = iter((0.9, 0.1))
    monkeypatch.setattr(main, "validate", lambda run: {name: next(scores)})
    assert main.main([*arguments, "1"]) == 0
    best = tmp_path / "best.pt"
    best.write_bytes(best.read_bytes()[:1000])
    assert main.main([*arguments, "2"]) == 0
    assert "J 0.9000 at step 1, is not in" in capsys.readouterr().out and read(tmp_path, "best.pt")["step"] == 2


def test_a_validation_that_was_left_over_is_told_where_it_was_made(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = min(path.name for path in (videos / "JPEGImages" / "480p").iterdir())
    data = ["--datasets", "DAVIS-2016", "--data_dir", str(videos), "--val_sequences", name]
    results = iter((None, {name: 0.5}))  # None: asked to stop meanwhile
    monkeypatch.setattr(main, "validate", lambda run: next(results))
    first, other = tmp_path / "first", tmp_path / "other"
    assert main.main([*TINY, *data, "--save_dir", str(first), "--max_steps", "2"]) == 0
    going_on = ["--resume", str(first / "last.pt"), "--save_dir", str(other), "--max_steps", "2"]
    assert main.main([*TINY, *data, *going_on]) == 0
    said = capsys.readouterr().out
    assert f"done: 2 steps, best J 0.5000 at step 2; weights to test with: {other / 'weights.safetensors'}" in said


def test_a_linked_checkpoint_is_the_run_s_own(tmp_path: Path) -> None:
    run, store = tmp_path / "run", tmp_path / "store"
    store.mkdir()
    assert main.main([*TINY, "--save_dir", str(run), "--stop_after", "2"]) == 0
    os.replace(run / "last.pt", store / "last.pt")
    (run / "last.pt").symlink_to(store / "last.pt")
    assert main.main([*TINY, "--save_dir", str(run)]) == 0
    assert not (run / "previous-1").exists() and [line["step"] for line in lines(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("first", [False, True])
def test_what_was_learned_before_a_file_cannot_be_read_is_saved(
    first: bool, processes: int, videos: Path, tmp_path: Path, repository: Path
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(videos, data)
    frame = sorted((data / "JPEGImages" / "480p").rglob("*.jpg"))[0]
    whole = frame.read_bytes()
    for path in frame.parent.parent.rglob("*.jpg") if first else [frame]:
        path.write_bytes(path.read_bytes()[:200])
    words = [*TINY, "--datasets", "DAVIS-2016", "--data_dir", str(data), "--save_dir", str(run)]
    words += ["--batch_size", str(2 // processes), "--steps_per_epoch", "40", "--max_steps", "40", "--cache", "none"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2"] if processes == 2 else []
    command = [sys.executable, *launcher, "main.py", *words]
    ended = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert ended.returncode == (2 if processes == 1 else 1), ended.stderr  # the launcher has a code of its own
    assert f"error: {frame if not first else ''}" in ended.stderr and (
        processes == 2 or "Traceback" not in ended.stderr
    )
    assert (run / "last.pt").exists() != first  # in its first step nothing was learned
    if not first:
        done = read(run)["step"]
        assert 0 < done < 40 and f"stopped at step {done} of 40; saved {run / 'last.pt'}" in ended.stdout
        frame.write_bytes(whole)
        again = [*command, "--stop_after", "1"]
        ended = subprocess.run(again, cwd=repository, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0 and read(run)["step"] == done + 1, ended.stderr


def test_resume_none_starts_anew_and_keeps_the_old_run(tmp_path: Path) -> None:
    arguments = [*TINY, "--save_dir", str(tmp_path), "--max_steps", "1", "--tensorboard"]
    assert main.main(arguments) == 0
    first = (tmp_path / "last.pt").read_bytes()
    assert main.main([*arguments, "--resume", "none", "--seed", "5"]) == 0
    assert (tmp_path / "previous-1" / "last.pt").read_bytes() == first
    assert len(list((tmp_path / "previous-1").glob("events*"))) == len(list(tmp_path.glob("events*"))) == 1
    assert len(lines(tmp_path)) == 1
    new, old = (read(folder)["model"] for folder in (tmp_path, tmp_path / "previous-1"))
    assert any(not torch.equal(new[name], old[name]) for name in new)
    second = (tmp_path / "last.pt").read_bytes()
    assert main.main([*arguments, "--resume", "none", "--seed", "6"]) == 0
    assert [(tmp_path / f"previous-{n}" / "last.pt").read_bytes() for n in (1, 2)] == [first, second]


def test_a_call_that_is_refused_leaves_the_folder_as_it_was(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    arguments = [*TINY, "--save_dir", str(folder)]
    assert main.main([*arguments, "--save_dir", str(tmp_path / "one"), "--stop_after", "1"]) == 0
    os.replace(tmp_path / "one" / "last.pt", folder / "one.pt")

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    before = content()
    fails([*arguments, "--resume", str(folder / "one.pt"), "--batch_size", "3"], capsys)
    fails([*arguments, "--resume", "none", "--datasets", "nowhere"], capsys)
    assert content() == before and not list(folder.glob("previous-*"))


def test_anew_from_the_weights_of_the_folder_itself(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "panels").mkdir()
    arguments = [*TINY, "--save_dir", str(folder), "--finetune", str(folder / "last.pt"), "--resume", "none"]
    assert main.main([*arguments, "--lr", "0", "--bn", "frozen", "--ema", "0", "--max_steps", "1"]) == 0
    equal(read(folder)["model"], read(finished)["ema"])
    assert (folder / "previous-1" / "panels").is_dir() and not (folder / "panels").exists()


def test_the_best_weights_of_a_run_without_its_last_checkpoint_are_kept(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = min(path.name for path in (videos / "JPEGImages" / "480p").iterdir())
    data = ["--datasets", "DAVIS-2016", "--data_dir", str(videos), "--val_sequences", name]
    arguments = [*TINY, *data, "--max_steps", "1", "--save_dir", str(tmp_path)]
    assert main.main(arguments) == 0
    best = (tmp_path / "best.pt").read_bytes()
    (tmp_path / "last.pt").unlink()
    capsys.readouterr()
    assert main.main([*arguments, "--seed", "4"]) == 0
    assert (tmp_path / "previous-1" / "best.pt").read_bytes() == best != (tmp_path / "best.pt").read_bytes()
    assert f"are in {tmp_path / 'previous-1'} now" in capsys.readouterr().out


def test_going_on_in_another_folder_keeps_its_run_and_hands_out_no_weights_of_others(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = min(path.name for path in (videos / "JPEGImages" / "480p").iterdir())
    data = ["--datasets", "DAVIS-2016", "--data_dir", str(videos), "--val_sequences", name]
    first, other = tmp_path / "first", tmp_path / "other"
    scores = iter((0.9, 0.1))
    monkeypatch.setattr(main, "validate", lambda run: {name: next(scores)})
    assert main.main([*TINY, *data, "--max_steps", "3", "--save_dir", str(first)]) == 0
    assert main.main([*TINY, "--seed", "3", "--save_dir", str(other)]) == 0
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    capsys.readouterr()
    going_on = [*TINY, *data, "--resume", str(first / "last.pt"), "--save_dir", str(other)]
    assert main.main(going_on) == 0
    said = capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (other / "previous-1").iterdir()} == before
    assert "J 0.9000 at step 3" in said and "best J 0.1000 at step 4" in said
    assert read(other, "best.pt")["step"] == 4
    equal(dict(load_dbsnet(other / "weights.safetensors").state_dict()), read(other)["ema"])


@pytest.mark.parametrize("how", ["--resume", "put back"])
def test_who_goes_back_to_an_earlier_checkpoint_gets_weights_of_what_comes_after_it(
    how: str, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = min(path.name for path in (videos / "JPEGImages" / "480p").iterdir())
    arguments = [*TINY, "--datasets", "DAVIS-2016", "--data_dir", str(videos), "--val_sequences", name]
    arguments += ["--save_dir", str(tmp_path), "--steps_per_epoch", "1", "--max_steps"]
    scores = iter((0.2, 0.9, 0.1))
    monkeypatch.setattr(main, "validate", lambda run: {name: next(scores)})
    assert main.main([*arguments, "1"]) == 0
    shutil.copy(tmp_path / "last.pt", tmp_path / "early.pt")
    assert main.main([*arguments, "2"]) == 0  # not what was wanted: back
    capsys.readouterr()
    going_back = ["2", "--lr", "1e-4", *(["--resume", str(tmp_path / "early.pt")] if how == "--resume" else [])]
    if how == "put back":
        os.replace(tmp_path / "early.pt", tmp_path / "last.pt")
    assert main.main([*arguments, *going_back]) == 0
    said = capsys.readouterr().out
    # Not "best J 0.2 at step 1" with the weights of the step that had 0.9.
    assert (
        "J 0.2000 at step 1, is not in" in said and "which is of step 2" in said and "best J 0.1000 at step 2" in said
    )
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert (file.metadata()["step"], file.metadata()["J"]) == ("2", "0.1000")


def test_a_launcher_that_starts_again_would_begin_anew_each_time(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    for resume in ("none", str(finished / "last.pt")):
        message = fails([*TINY, "--resume", resume, "--save_dir", str(tmp_path)], capsys)
        assert f"--resume {resume}" in message and "--max-restarts" in message and "--resume auto" in message
    assert main.main([*TINY, "--max_steps", "1", "--save_dir", str(tmp_path)]) == 0


def test_a_run_that_cannot_go_on_says_why(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [*TINY, "--save_dir", str(finished)]
    assert "2 clips per step" in fails([*run, "--batch_size", "3"], capsys)
    assert "3 steps per epoch" in fails([*run, "--steps_per_epoch", "4"], capsys)
    assert "--ema" in fails([*run, "--ema", "0"], capsys)
    assert "--optimizer adamw" in fails([*run, "--optimizer", "sgd"], capsys)
    # Weights that would not be read any more.
    assert "(pretrained)" in fails([*run, "--pretrained", "mobilevit.pt"], capsys)
    config = TrainConfig(save_dir=str(finished), keep_stream="motion")
    with pytest.raises(UserError, match="keep_stream none, not motion"):
        main.find_checkpoint(config, main.start_processes("cpu"))
    file = tmp_path / "file"
    file.write_text("")
    assert "give another" in fails([*TINY, "--resume", "none", "--save_dir", str(file)], capsys)
    assert "nowhere.pt" in fails([*TINY, "--save_dir", str(tmp_path), "--resume", "nowhere.pt"], capsys)
    # Also where a checkpoint says what to build and nothing else would look at it.
    for start in ([], ["--finetune", str(finished / "last.pt")]):
        message = fails([*TINY, "widht:3", "--save_dir", str(tmp_path), *start], capsys)
        assert "unknown key 'widht'; did you mean width" in message
    assert "width must be a whole number" in fails([*TINY, "width:-1", "--save_dir", str(tmp_path)], capsys)
    assert "clips (1000000000 steps of 2)" in fails([*run, "--steps_per_epoch", "1000000000"], capsys)
    checkpoint = read(finished)
    checkpoint["config_model"]["rounds"] = -1  # of a version that took it
    torch.save(checkpoint, tmp_path / "other.pt")
    message = fails([*TINY, "--save_dir", str(tmp_path / "x"), "--resume", str(tmp_path / "other.pt")], capsys)
    assert "other.pt: its configuration does not describe a network of this version (rounds" in message


def test_what_a_run_began_with_stays_on_record(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights.safetensors"
    checkpoint = read(finished)
    checkpoint["config"].update(finetune=str(weights), keep_stream="motion")
    torch.save(checkpoint, tmp_path / "last.pt")
    monkeypatch.chdir(tmp_path)
    for asked in (None, str(weights), weights.name):  # not said again, or from another folder
        config = TrainConfig(save_dir=str(tmp_path), finetune=asked)
        assert main.find_checkpoint(config, main.start_processes("cpu"))["step"] == 4
        assert (config.finetune, config.keep_stream) == (str(weights), "motion")


def test_a_folder_that_one_machine_alone_sees_is_refused(finished: Path, tmp_path: Path) -> None:
    class Elsewhere(Processes):
        """Of two, the other of which is on a machine with a folder of its own."""

        def gather(self, value: bool) -> list[bool]:
            return [value, not value]

    for folder in (finished, tmp_path):
        with pytest.raises(UserError, match="last.pt is there for some processes only"):
            main.find_checkpoint(TrainConfig(save_dir=str(folder)), Elsewhere(0, 2, torch.device("cpu")))


@pytest.mark.parametrize(("enabled", "scale"), [(True, 128.0), (False, 65536.0)])
def test_the_scale_of_fp16_goes_on_where_there_was_one(enabled: bool, scale: float, tmp_path: Path) -> None:
    def run_with(scaler: torch.amp.GradScaler) -> main.Run:
        config, net = TrainConfig(save_dir=str(tmp_path)), seeded_network()
        return main.Run(
            config=config, processes=main.start_processes("cpu"), net=net, model=net, average=None,
            optimizer=main.build_optimizer(config, net), scaler=scaler, log=None, stop=None, validation=[],
            steps_per_epoch=3, total_steps=4,
        )  # fmt: skip

    resuming.save(run_with(torch.amp.GradScaler("cpu", init_scale=128.0, enabled=enabled)))
    run = run_with(torch.amp.GradScaler("cpu"))
    resuming.restore(run, load_checkpoint(tmp_path / "last.pt"))
    assert run.scaler.get_scale() == scale


def test_a_resumed_run_takes_the_momentum_asked_for(tmp_path: Path) -> None:
    words = [*TINY, "--optimizer", "sgd", "--lr", "1e-4", "--save_dir", str(tmp_path)]
    assert main.main([*words, "--stop_after", "1"]) == 0
    assert main.main([*words, "--momentum", "0.1", "--weight_decay", "0.25"]) == 0
    groups = read(tmp_path)["optimizer"]["param_groups"]
    assert {group["momentum"] for group in groups} == {0.1}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.25}


def test_max_minutes_stops_with_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*TINY, "--save_dir", str(tmp_path), "--max_minutes", "1e-6"]) == 0
    assert "run the same command again" in capsys.readouterr().out
    assert read(tmp_path)["step"] == 0


# To the whole group, loader workers included, as a terminal sends the one and SLURM the other.
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_stops_with_a_checkpoint(number: signal.Signals, tmp_path: Path, repository: Path) -> None:
    arguments = [*TINY, "--workers", "1", "--max_steps", "100000", "--save_dir", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "main.py", *arguments],
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not ((tmp_path / "log.jsonl").is_file() and lines(tmp_path)):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.1)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    last = out.splitlines()[-1]
    assert last.startswith("stopped at step") and number.name in last and "run the same command again" in last
    assert read(tmp_path)["step"] == lines(tmp_path)[-1]["step"] >= 1
    main.main([*arguments, "--stop_after", "1"])
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))


def test_a_signal_while_a_run_is_loading_ends_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is lost yet, and a cache of all frames may take minutes more, where launchers wait for half of one."""
    loading = main.build_sequences

    def interrupted(config: TrainConfig):
        os.kill(os.getpid(), signal.SIGINT)
        return loading(config)

    monkeypatch.setattr(main, "build_sequences", interrupted)
    # As Python has it where the shell does not have SIGINT ignored, as it does for what it runs in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main.main([*TINY, "--save_dir", str(tmp_path / "run")]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted at once" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_first_signal_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    step = main.train_step

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(main, "train_step", interrupted)
    assert main.main([*TINY, "--save_dir", str(tmp_path)]) == 130
    told = capfd.readouterr()
    assert told.err.startswith("SIGINT: the run stops after this step") and "stopped at step 1 of 4" in told.out


def test_a_second_ctrl_c_ends_a_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A step may take minutes. One that comes at the heels of the first is the same one, passed on by a launcher."""
    told = []

    def interrupted(*arguments):
        for wait in (0, 0, 1.1):
            time.sleep(wait)
            os.kill(os.getpid(), signal.SIGINT)
            told.append(wait)
        raise AssertionError("it went on")

    monkeypatch.setattr(main, "train_step", interrupted)
    assert main.main([*TINY, "--save_dir", str(tmp_path)]) == 130
    assert told == [0, 0] and not (tmp_path / "last.pt").exists()
    assert capfd.readouterr().err.splitlines()[-1] == "interrupted at once; what was not in last.pt yet is lost"


def test_outside_the_main_thread_a_run_goes_without_signals() -> None:
    """Python has them there alone, and whoever calls main.py from a thread has handlers of their own."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def work() -> list[object]:
        with StopRequest() as stop, sigterm_raises():
            stop.listen()
            return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == before


def test_what_was_learned_outlives_a_folder_that_is_removed_meanwhile(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = main.train_step

    def removed(run: Run, *arguments):
        if run.step == 1:
            shutil.rmtree(run.folder)
        return step(run, *arguments)

    monkeypatch.setattr(main, "train_step", removed)
    assert main.main([*TINY, "--save_dir", str(tmp_path / "run")]) == 0
    equal(read(tmp_path / "run")["model"], read(finished)["model"])
    assert [line["step"] for line in lines(tmp_path / "run")] == [2, 3, 4]


def test_processes_that_a_killed_launcher_leaves_behind_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stopping, "_PARENT", os.getppid() + 1)  # as if it had been another at the start
    assert main.main([*TINY, "--max_steps", "1", "--save_dir", str(tmp_path / "nohup")]) == 0  # a shell that was left
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    capsys.readouterr()
    assert main.main([*TINY, "--save_dir", str(tmp_path / "torchrun")]) == 130
    assert "stopped at step 0 of 4 (the launcher has ended); saved" in capsys.readouterr().out


def test_two_runs_do_not_write_into_one_folder(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fcntl")
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    left = [folder / name for name in (".last.pt.ab0_xy12.tmp", ".weights.safetensors.ab0_xy12")]
    kept = [folder / name for name in (".last.pt.mine", "last.pt.ab0_xy12.tmp")]
    for path in (*left, *kept):
        path.write_bytes(b"half of it")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(resuming, "WAIT_FOR_FOLDER", 0.3)
    arguments = [*TINY, "--save_dir", str(folder), "--max_steps", "5"]
    with FolderLock(folder) as other:
        assert other.take(0)
        message = fails(arguments, capsys)
        assert f"{folder}: another run is writing there" in message and "--save_dir" in message
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    # When that one has ended, however it did: what it has left half written is put away.
    assert main.main(arguments) == 0
    assert not any(path.exists() for path in left) and all(path.exists() for path in kept)


def test_who_waits_for_a_run_to_end_goes_on_from_what_it_saves_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fcntl")
    folder = tmp_path / "run"
    arguments = [*TINY, "--save_dir", str(folder)]
    assert main.main([*arguments, "--stop_after", "1"]) == 0
    before = (folder / "last.pt").read_bytes()
    assert main.main([*arguments, "--stop_after", "1"]) == 0
    saved_last = (folder / "last.pt").read_bytes()
    (folder / "last.pt").write_bytes(before)
    other = FolderLock(folder)
    assert other.take(0)

    def end() -> None:
        write_bytes(folder / "last.pt", saved_last)
        other.__exit__()

    ending = threading.Timer(3, end)  # the one that was asked to stop, and is at its last step still
    ending.start()
    capsys.readouterr()
    assert main.main(arguments) == 0
    ending.join()
    assert f"resuming {folder / 'last.pt'} at step 2" in capsys.readouterr().out
