"""What every benchmark needs: synchronised, interleaved timing, peak memory, and a description of the machine."""

from __future__ import annotations

import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from utils.memory import give_back_freed_memory
from utils.parallel import count_of_workers


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and least by the clock, and median of the process's processor time (all threads)."""

    median: float
    least: float
    processor: float
    repeats: int

    def describe(self, frames: int | None = None) -> dict[str, float]:
        """Plain numbers: of a call, or per frame where it is told how many a call takes."""
        numbers = {} if frames is None else {"frames_per_second": frames / self.median}
        frames = frames or 1
        return {
            **numbers,
            "milliseconds": 1e3 * self.median / frames,
            "milliseconds_least": 1e3 * self.least / frames,
            "processor_milliseconds": 1e3 * self.processor / frames,
            "repeats": self.repeats,
        }


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what earlier measurements have left of a GPU's memory, graphs' above all: `PeakMemory` would tell it as
    reserved by the next.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()


def time_calls(
    calls: dict[str, Callable[[], Any]], device: torch.device, repeats: int = 5, warmup: int = 1
) -> dict[str, Timing]:
    """Time several calls in turns (A B A B …), so that other work on the machine meets all of them alike.

    The device is synchronised before and after each call; `warmup` rounds are not counted.

    Raises:
        ValueError: fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"expected at least one repeat, got {repeats}")
    wall: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            synchronise(device)
            began, worked = time.perf_counter(), time.process_time()
            call()
            synchronise(device)
            if turn >= warmup:
                wall[name].append(time.perf_counter() - began)
                processor[name].append(time.process_time() - worked)
    return {
        name: Timing(statistics.median(wall[name]), min(wall[name]), statistics.median(processor[name]), repeats)
        for name in calls
    }


def resident_memory() -> int:
    """Bytes of this process in host memory now; of its peak where the system does not tell (not Linux)."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource
        import sys

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class PeakMemory:
    """Watches memory while a ``with`` block runs.

    Attributes, in bytes:
        host: the most beyond what the process had at the start, sampled every 10 ms.
        device: the most that tensors took on the GPU; 0 on a CPU.
        reserved: the most that PyTorch held of the GPU for them, with what CUDA graphs work in.
    """

    def __init__(self, device: torch.device) -> None:
        self.where = device
        self.host = self.device = self.reserved = 0
        self._ended = threading.Event()

    def __enter__(self) -> PeakMemory:
        if self.where.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.where)
        give_back_freed_memory()  # or what was kept from before would be used unseen
        self._start = resident_memory()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self.host = max(self.host, resident_memory() - self._start)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.host = max(self.host, resident_memory() - self._start)
        if self.where.type == "cuda":
            self.device = torch.cuda.max_memory_allocated(self.where)
            self.reserved = torch.cuda.max_memory_reserved(self.where)

    def describe(self) -> dict[str, float]:
        sizes = {"host_MiB_beyond_start": self.host, "device_MiB": self.device, "device_MiB_reserved": self.reserved}
        return {name: size / 2**20 for name, size in sizes.items()}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, GPU, versions and threads that a figure depends on."""
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            processor = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    facts: dict[str, Any] = {
        "device": str(device),
        "processor": processor,
        "cores": count_of_workers(None),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()}",
    }
    if hasattr(os, "getloadavg"):
        facts["load_at_start"] = round(os.getloadavg()[0], 2)  # other work on the machine makes every figure worse
    if device.type == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts
