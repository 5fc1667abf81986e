"""``cache: ram`` of several processes: frames are decoded once on a machine, and are the same in all of them."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from datasets.clip_frames import FrameReader
from datasets.clips import VideoClips
from datasets.sequences import VideoSequence, read_dataset
from datasets.synthetic import write_dataset
from datasets.transforms import Augment
from utils.distributed import Processes
from utils.errors import UserError
from utils.training import shared_memory
from utils.training.shared_memory import MachineMemory

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each process has its own memory")
SIZE = (48, 80)


def videos_of(folder: str | Path) -> list[VideoSequence]:
    return read_dataset("DAVIS-2016", folder, "train")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path, "DAVIS", videos=5, frames=3, size=(64, 96), validation=0)
    return tmp_path


def _decode_in_a_process(rank: int, folder: str, machines: list[str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(machines))
    processes = Processes(rank, len(machines), torch.device("cpu"), dist.group.WORLD)
    shared_memory.platform.node = lambda: machines[rank]
    read, decoded = FrameReader._read_frame, []
    FrameReader._read_frame = lambda *place: decoded.append(place[1].name) or read(*place)
    memory = MachineMemory(processes)
    clips = VideoClips(videos_of(folder), 2, SIZE, Augment(), "ram", memory=memory)
    kept = [planes.clone() for planes in clips._store]
    processes.wait()
    if rank == 0:
        clips._store[4].fill_(99)
    processes.wait()
    seen = bool((clips._store[4] == 99).all())
    torch.save((memory.rank, memory.count, decoded, kept, seen), f"{folder}/result{rank}.pt")
    dist.barrier()  # who leaves while the other still sends makes gloo abort
    dist.destroy_process_group()


@linux
def test_each_video_is_decoded_once_on_a_machine(folder: Path) -> None:
    machines = ["one", "other", "one"]
    mp.spawn(_decode_in_a_process, (str(folder), machines), nprocs=3)
    results = [torch.load(folder / f"result{rank}.pt") for rank in range(3)]
    assert [result[:2] for result in results] == [(0, 2), (0, 1), (1, 2)]
    videos = videos_of(folder)
    names = [video.name for video in videos]
    for result, own in zip(results, (names[::2], names, names[1::2])):
        assert sorted(result[2]) == sorted(name for name in own for _ in range(3))
    expected = [FrameReader(SIZE, Augment()).read(video, range(3)) for video in videos]
    for _, _, _, kept, _ in results:
        assert all(torch.equal(planes, right) for planes, right in zip(kept, expected)) and len(kept) == 5
    assert [result[4] for result in results] == [True, False, True]  # it is the same memory, on one machine


class Pair:
    """What two processes of a machine say to each other, of which this one is the second."""

    rank = 1

    def __init__(self, owner: int, file: int) -> None:
        self.owner = (owner, file)

    def gather(self, value: object) -> list[object]:
        return [value if isinstance(value[0], str) else self.owner, value]

    def wait(self) -> None:
        pass


def refuse(*_: object) -> None:
    """As a container's filter or a limit does."""
    raise PermissionError(errno.EPERM, "Operation not permitted")


@linux
@pytest.mark.parametrize("refused", ["open", "mmap"])
def test_memory_that_cannot_be_shared_is_told(refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = os.memfd_create("test")
    os.truncate(file, 30)
    memory = MachineMemory(Pair(os.getpid(), file))
    assert (memory.rank, memory.count) == (1, 2)
    assert [len(part) for part in memory.allocate([10, 20])] == [10, 20]
    if refused == "open":
        os.close(file)
    else:
        monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(UserError, match=r"cannot share memory here .*--cache none"):
        memory.allocate([10, 20])


@linux
def test_memory_that_cannot_be_made_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(0, 0)
    pair.rank = 0
    pair.gather = lambda value: [value, value]
    memory = MachineMemory(pair)
    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(UserError, match=r"cannot share memory here .*not permitted.*--cache none"):
        memory.allocate([10])


def test_where_nothing_tells_machines_apart_each_process_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_BOOT", Path("nothing/there"))
    pair = Pair(0, 0)
    pair.gather = lambda value: [value, value]
    memory = MachineMemory(pair)
    assert (memory.rank, memory.count) == (0, 1)
    one, other = (memory.allocate([10])[0] for _ in range(2))
    one.fill_(1), other.fill_(2)
    assert int(one.sum()) == 10 and one.dtype == torch.uint8
