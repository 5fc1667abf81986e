"""The whole way of a video: read, flow, network, CRF, write; each stage alone, one after the other, and overlapped."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from datasets.flow_colour import flow_to_image
from datasets.images import LazyImages, load_frame
from models import Predictor
from utils.benchmark.network import warm_up_frames
from utils.benchmark.timing import PeakMemory
from utils.files import write_png
from utils.flow.estimation import dis_flow
from utils.inference.segment import WRITERS
from utils.inference.videos import READERS
from utils.parallel import NICENESS, start_pool


def flow_of(paths: Sequence[Path], index: int) -> np.ndarray:
    """The flow picture of one frame by DIS, from the files of it and its partner; (H, W, 3) uint8."""
    partner = index + 1 if index + 1 < len(paths) else max(index - 1, 0)
    return flow_to_image(dis_flow(load_frame(paths[index]), load_frame(paths[partner])))


class FlowAhead(Sequence[np.ndarray]):
    """Flow pictures made on other processes, `ahead` of the frame asked for; each is asked for once, by any thread."""

    def __init__(self, paths: Sequence[Path], pool: Executor, ahead: int) -> None:
        self.paths, self.pool, self.ahead = paths, pool, ahead
        self.made: dict[int, Future] = {}
        self.next = 0
        self.turns = threading.Lock()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        if not 0 <= index < len(self.paths):
            raise IndexError(f"flow of frame {index} of a video of {len(self.paths)} frames")
        with self.turns:
            while self.next <= min(index + self.ahead, len(self.paths) - 1):
                self.made[self.next] = self.pool.submit(flow_of, self.paths, self.next)
                self.next += 1
            made = self.made.pop(index)
        return made.result()


def refine_and_write(frame: Path | None, probability: np.ndarray, target: Path) -> None:
    """The CRF with the frame, where one is given; then the mask as PNG."""
    if frame is not None:
        from utils.crf import refine

        probability = refine(load_frame(frame), probability) / np.float32(255)
    write_png(target, np.where(probability * 255 > 127, np.uint8(255), np.uint8(0)))


def bench_pipeline(predictor: Predictor, paths: Sequence[Path], *, workers: int, crf: bool) -> dict[str, Any]:
    """Seconds of each stage alone on frames in files, of all one after the other, and overlapped.

    Overlapped: flow on `workers` processes and CRF on as many others, reading ahead and the network in this one, frames
    read and PNGs written (without the CRF) by threads, as many as `--tools test` has. The mask is resized to the
    frame's size by the network's stage.

    Flow and CRF have processes of their own: in one queue the next frames' flow would wait behind all the CRF's work,
    and the network for the flow.
    """
    count = len(paths)
    stages: dict[str, float] = {}

    def measure(name: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = call()
        stages[name] = time.perf_counter() - began
        return result

    with (
        tempfile.TemporaryDirectory(prefix="dbsnet-bench-") as folder,
        start_pool(workers, NICENESS) as pool,
        start_pool(workers, NICENESS) as crf_pool,
        ThreadPoolExecutor(WRITERS) as threads,
        ThreadPoolExecutor(READERS) as readers,
    ):
        target = Path(folder)
        predictor.readers = READERS
        frames = LazyImages(paths, load_frame)
        for each in (pool, crf_pool) if crf else (pool,):  # the processes import their libraries now
            list(each.map(flow_of, [paths] * workers, [0] * workers))
        still = [frames[0]] * warm_up_frames(predictor, count)
        list(predictor(still, still))

        pictures = measure("read", lambda: list(readers.map(frames.__getitem__, range(count))))
        flows = measure("flow", lambda: list(pool.map(flow_of, [paths] * count, range(count))))
        maps = measure("network and resize", lambda: [p for _, p in predictor(pictures, flows)])
        jobs = [(paths[i] if crf else None, maps[i], target / f"{i:05d}.png") for i in range(count)]
        after = "crf and write" if crf else "write"
        measure(after, lambda: _finish(crf_pool if crf else threads, jobs))
        alone = dict(stages)

        def overlapped() -> None:
            made = predictor(frames, FlowAhead(paths, pool, 4 * workers))
            jobs = ((paths[i] if crf else None, p, target / f"{i:05d}.png") for i, p in made)
            _finish(crf_pool if crf else threads, jobs)

        with PeakMemory(predictor.device) as memory:
            measure("overlapped", overlapped)
        seconds = stages["overlapped"]
    slowest = max(alone, key=alone.__getitem__)
    return {
        "frames": count,
        "workers": workers,
        "frames_per_second": {name: count / value for name, value in stages.items()},
        "seconds": {**stages, "one after the other": sum(alone.values())},
        "slowest_stage": slowest,
        "overlapped_over_slowest": seconds / alone[slowest],
        "overlapped_over_sequence": seconds / sum(alone.values()),
        "memory": memory.describe(),
    }


def _finish(pool: Executor, jobs: Iterable[tuple[Path | None, np.ndarray, Path]]) -> None:
    """Hand out the last stage's jobs, a bounded number ahead."""
    waiting: deque[Future] = deque()
    for job in jobs:
        waiting.append(pool.submit(refine_and_write, *job))
        if len(waiting) > 32:
            waiting.popleft().result()
    for future in waiting:
        future.result()
