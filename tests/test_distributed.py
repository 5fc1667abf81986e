"""Several processes give what one process gives: batch norm, losses, and the launchers' command lines."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from models.timm_encoder import TimmEncoder
from utils import distributed
from utils.distributed import Processes, SyncBatchNorm2d, broadcast_buffers, set_batch_norm, start_processes
from utils.errors import UserError
from utils.training.loading import ClipOrder

TINY = (
    "--config configs/demo.yaml --variant xxs --network depth:1 dilations:[1] --size 32 64 --clip_len 2 --max_steps 3 "
    "--steps_per_epoch 2 --workers 0 --log_every 1 --panels_every 0 --no-tensorboard --warmup_steps 2 --lr 1e-4 "
    "--device cpu"
).split()


def launch(repository: Path, *words: str, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=repository, env=environment, capture_output=True, text=True, timeout=timeout
    )


def launch_script(repository: Path, text: str, path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Two processes of a program of its own that calls main.py; the launcher needs it as a file, ``path``."""
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(repository))
        line = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(path), *words)
        return launch(repository, *line)


def losses(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def _norm_in_a_process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    data = torch.load(f"{folder}/data.pt")
    net = set_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), "sync", Processes(rank, 2, torch.device("cpu")))
    assert type(net[0]) is SyncBatchNorm2d
    net.double().load_state_dict(data["state"])
    # Unequal shares: two pictures here, three there.
    own = slice(0, 2) if rank == 0 else slice(2, 5)
    x = data["x"][own].clone().requires_grad_()
    y = net(x)
    (y * data["weight"][own]).sum().backward()
    results = [y.detach(), x.grad, net[0].weight.grad, net[0].bias.grad, *net.state_dict().values()]
    torch.save(results, f"{folder}/result{rank}.pt")
    net.eval()
    assert torch.equal(net(x), nn.functional.batch_norm(x, *[net.state_dict()[f"0.{key}"] for key in _KEYS]))
    dist.barrier()  # who leaves while the other still sends makes gloo abort
    dist.destroy_process_group()


_KEYS = ("running_mean", "running_var", "weight", "bias")


def test_batch_norm_over_processes_is_batch_norm_of_the_whole_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    norm = nn.Sequential(nn.BatchNorm2d(3)).double()
    with torch.no_grad():
        norm[0].weight.uniform_(0.5, 2)
        norm[0].bias.normal_()
    x = (torch.randn(5, 3, 4, 6, dtype=torch.float64) * 3 + 100).requires_grad_()  # a mean far off: nothing may cancel
    weight = torch.randn(5, 3, 4, 6, dtype=torch.float64)
    torch.save({"state": norm.state_dict(), "x": x.detach(), "weight": weight}, tmp_path / "data.pt")
    mp.spawn(_norm_in_a_process, (str(tmp_path),), nprocs=2)
    y = norm(x)
    (y * weight).sum().backward()
    first, second = (torch.load(tmp_path / f"result{rank}.pt") for rank in range(2))
    assert torch.allclose(torch.cat([first[0], second[0]]), y, atol=1e-12)
    assert torch.allclose(torch.cat([first[1], second[1]]), x.grad, atol=1e-12)
    assert torch.allclose(first[2] + second[2], norm[0].weight.grad, atol=1e-12)
    assert torch.allclose(first[3] + second[3], norm[0].bias.grad, atol=1e-12)
    for one, other, expected in zip(first[4:], second[4:], norm.state_dict().values()):
        assert torch.equal(one, other)
        assert torch.allclose(one.double(), expected.double(), atol=1e-12)


def _timm_norm_in_a_process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    processes = Processes(rank, 2, torch.device("cpu"))
    torch.manual_seed(0)
    net = set_batch_norm(TimmEncoder("tf_efficientnet_lite0"), "sync", processes).train()
    maps = net(torch.load(f"{folder}/x.pt")[2 * rank : 2 * rank + 2])
    torch.save([[y.detach() for y in maps], net.state_dict()], f"{folder}/result{rank}.pt")
    if rank:
        for buffer in net.buffers():
            buffer.zero_()
    broadcast_buffers(net, processes)
    assert min(float(value.abs().max()) for key, value in net.named_buffers() if "running" in key) > 0
    dist.barrier()  # who leaves while the other still sends makes gloo abort
    dist.destroy_process_group()


def test_batch_norm_with_an_activation_inside_is_shared_too(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    x = torch.rand(4, 3, 64, 96)
    torch.save(x, tmp_path / "x.pt")
    mp.spawn(_timm_norm_in_a_process, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    net = TimmEncoder("tf_efficientnet_lite0").train()
    maps = net(x)
    (first, state), (second, _) = (torch.load(tmp_path / f"result{rank}.pt") for rank in range(2))
    for one, other, expected in zip(first, second, maps):
        torch.testing.assert_close(torch.cat([one, other]), expected, rtol=1e-3, atol=1e-3)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-4)


def test_batch_norms_synchronised_on_gpus_keep_their_activations() -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    net = TimmEncoder("tf_efficientnet_lite0").eval()
    x = torch.rand(1, 3, 64, 96)
    before = net(x)
    net = set_batch_norm(net, "sync", Processes(0, 2, torch.device("cuda", 0)))  # converted, not run, on a GPU
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in net.modules()) > 40
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    for one, other in zip(net(x), before):
        assert torch.equal(one, other)


def test_an_unknown_kind_of_batch_norm_is_not_left_out() -> None:
    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(UserError, match="Own; take frozen or local"):
        set_batch_norm(nn.Sequential(Own(3)), "sync", Processes(0, 2, torch.device("cpu")))


def test_processes_share_the_clips_of_each_step() -> None:
    def order(rank: int, world_size: int, batch: int, accumulate: int = 1, first_step: int = 0, epoch: int = 2,
              seed: int = 3) -> list[list]:  # fmt: skip
        sampler = ClipOrder(
            batch=batch, accumulate=accumulate, steps=5, rank=rank, world_size=world_size, seed=seed
        )  # fmt: skip
        sampler.epoch, sampler.first_step = epoch, first_step
        batches = list(sampler)
        assert len(batches) == len(sampler)
        return batches

    alone = order(0, 1, 4)
    assert sorted(index for batch in alone for index in batch) == list(range(20))  # each clip once in an epoch
    for one, *shares in zip(alone, order(0, 2, 2), order(1, 2, 2)):
        assert one == [item for share in shares for item in share]
    # Two accumulated batches of each of two processes, likewise.
    parts = [order(rank, 2, 1, accumulate=2) for rank in range(2)]
    for step, one in enumerate(alone):
        assert one == [parts[rank][2 * step + part][0] for part in range(2) for rank in range(2)]
    assert order(0, 1, 4, first_step=3) == alone[3:]
    # Another epoch has another order, and so has a run of another seed.
    assert order(0, 1, 4, epoch=3) != alone and order(0, 1, 4, seed=4) != alone


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of videos whose labels are spread unevenly: three in one, one in each of the others."""
    from datasets.synthetic import write_dataset

    root = write_dataset(tmp_path_factory.mktemp("data"), videos=3, frames=3, size=(48, 80), seed=1, validation=0)
    for number, video in enumerate(sorted((root / "Annotations" / "480p").iterdir())):
        for mask in sorted(video.iterdir())[1 if number else 3 :]:
            mask.unlink()
    return ["--datasets", "DAVIS-2016", "--data_dir", str(root), "--strides", "1"]


@pytest.fixture(scope="module")
def two_processes(repository: Path, data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run on two processes, by the README's command line, of half a batch each."""
    folder = tmp_path_factory.mktemp("two")
    line = ["-m", "torch.distributed.launch", "--nproc_per_node=2", "main.py"]
    result = launch(repository, *line, *TINY, *data, "--batch_size", "1", "--save_dir", str(folder))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done: 3 steps") == 1  # one process talks
    return folder


def test_two_processes_equal_one_with_the_doubled_batch(
    two_processes: Path, data: list[str], tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though one may have three times the labels of the other: the loss is the mean over all labelled frames."""
    import main

    labels, step = [], main.train_step

    def watched(run: main.Run, parts: list[dict], total: float):
        labels.append(parts[0]["valid"].sum(1).tolist())  # of the two clips, one of which each process has
        return step(run, parts, total)

    monkeypatch.setattr(main, "train_step", watched)
    monkeypatch.chdir(repository)
    assert main.main([*TINY, *data, "--batch_size", "2", "--save_dir", str(tmp_path)]) == 0
    assert any(one != other for one, other in labels), labels
    together, alone = losses(two_processes), losses(tmp_path)
    assert [line["step"] for line in together] == [1, 2, 3]
    for one, other in zip(together, alone):
        for name in ("loss", "bce", "iou", "aux"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    # The running statistics too: those of the whole batch, not of one share.
    ours, theirs = (torch.load(path / "last.pt", weights_only=True)["model"] for path in (two_processes, tmp_path))
    for name, value in ours.items():
        if "running" in name:
            assert torch.allclose(value, theirs[name], rtol=1e-3, atol=1e-4), name


def test_a_run_of_two_processes_goes_on_in_one(
    two_processes: Path, data: list[str], repository: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import main

    monkeypatch.chdir(repository)
    longer = [*TINY, *data, "--max_steps", "4", "--batch_size", "2", "--save_dir", str(two_processes)]
    assert main.main(longer) == 0
    assert "resuming" in capsys.readouterr().out
    assert [line["step"] for line in losses(two_processes)] == [1, 2, 3, 4]
    with pytest.raises(SystemExit) as caught:
        main.main([*longer, "--batch_size", "1"])
    assert caught.value.code == 2
    assert "2 clips per step" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torch.distributed.run", "torch.distributed.launch"])
def test_other_launch_lines(launcher: str, tmp_path: Path, repository: Path) -> None:
    line = ["-m", launcher, "--nproc-per-node=2", "main.py", *TINY, "--batch_size", "1"]
    first = launch(repository, *line, "--save_dir", str(tmp_path / "first"))
    assert first.returncode == 0, first.stderr
    weights = str(tmp_path / "first" / "last.pt")
    second = launch(repository, *line, "--save_dir", str(tmp_path / "second"), "--finetune", weights)
    assert second.returncode == 0, second.stderr
    assert [entry["step"] for entry in losses(tmp_path / "second")] == [1, 2, 3]


@pytest.mark.slow
def test_validation_is_shared_among_processes(tmp_path: Path, repository: Path) -> None:
    from datasets.synthetic import write_dataset

    root = write_dataset(tmp_path / "data", videos=4, frames=4, size=(32, 64), seed=1, validation=0)
    names = sorted(path.name for path in (root / "JPEGImages" / "480p").iterdir())
    options = ["--datasets", "DAVIS-2016", "--data_dir", str(root), "--val_sequences", *names[:3], "--epochs", "1"]
    line = ["-m", "torch.distributed.run", "--nproc-per-node=2", "main.py", *TINY, *options, "--batch_size", "1"]
    result = launch(repository, *line, "--save_dir", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    last = [entry for entry in losses(tmp_path / "run") if entry["kind"] == "val"][-1]
    assert sorted(last["sequences"]) == names[:3]
    assert last["J"] == pytest.approx(sum(last["sequences"].values()) / 3, rel=1e-6)


_FAILS_ALONE = """
import errno, os, sys, time
import torch.distributed as dist
import main

def as_nccl_does():  # ends once all processes come to it; here after a minute at most
    open(os.path.join(sys.argv[1], f"here-{rank}"), "w").close()
    began = time.monotonic()
    while len([name for name in os.listdir(sys.argv[1]) if name.startswith("here-")]) < 2:
        if time.monotonic() - began > 60:
            os._exit(9)
        time.sleep(0.1)

def full(run, best=False):
    if run.processes.is_main:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "last.pt")

rank, dist.destroy_process_group, main.save = os.environ["RANK"], as_nccl_does, full
main.run_as_program(lambda: main.main(sys.argv[2:]))
"""


def test_one_that_fails_does_not_wait_for_those_that_wait_for_it(tmp_path: Path, repository: Path) -> None:
    """NCCL's end is one that all processes come to: who has failed alone says why, and the launcher ends the rest."""
    arguments = [str(tmp_path), *TINY, "--save_every", "1", "--save_dir", str(tmp_path / "run")]
    result = launch_script(repository, _FAILS_ALONE, tmp_path / "run.py", *arguments)
    assert "error: last.pt: No space left on device" in result.stderr
    assert "exitcode: 9" not in result.stderr and result.returncode


_THREAD_THAT_OUTLIVES = """
import os, runpy, sys, threading, time
import torch
import torch.distributed as dist
import utils.distributed

def held(future):  # in a thread of gloo's
    began.set()
    ended = time.monotonic() + 10
    while time.monotonic() < ended:
        time.sleep(1e-3)

def leave_a_thread():
    if os.environ["RANK"] == "1":
        time.sleep(1)  # so that the other still waits, and its thread is the one to go on
    work = dist.all_reduce(torch.ones(1), async_op=True)
    began.set() if os.environ["RANK"] == "1" else work.get_future().then(held)
    began.wait()
    end()

began, end, utils.distributed.stop_processes = threading.Event(), utils.distributed.stop_processes, leave_a_thread
sys.argv[0] = "main.py"
runpy.run_path("main.py", run_name="__main__")
"""


def test_threads_of_gloo_do_not_abort_a_process_whose_work_is_done(tmp_path: Path, repository: Path) -> None:
    """One that still wants Python's lock while Python ends is thrown out of a place that allows no exception."""
    arguments = [*TINY, "--stop_after", "1", "--save_dir", str(tmp_path / "run")]
    result = launch_script(repository, _THREAD_THAT_OUTLIVES, tmp_path / "run.py", *arguments)
    assert "terminate called" not in result.stderr and result.returncode == 0
    assert "stopped at step 1 of 3" in result.stdout


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cpu"):
        start_processes("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="process 1 .* 1 visible"):
        start_processes("auto", local_rank=1)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE"):
        start_processes("cpu")


def test_processes_that_cannot_meet_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the launcher was killed while they started: without a limit they would look for it for `PATIENCE`."""
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "JOINING", timedelta(seconds=1))
    with pytest.raises(UserError, match="WORLD_SIZE 2 asks for several .* RANK, MASTER_ADDR, MASTER_PORT are not set"):
        start_processes("cpu")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and nobody listens
        port = unused.getsockname()[1]
        for name, value in (("RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port))):
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"do not meet at 127.0.0.1:{port}"):
            start_processes("cpu")
