"""Many small independent jobs on several processes, in order, with a bounded number in flight."""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, NoReturn

from utils.errors import UserError
from utils.memory import keep_freed_memory
from utils.progress import progress_bar

NICENESS = 10
"""By how much processes step back that work beside a network: on a CPU they share the processors with it."""

# Tasks handed out before their results are collected, per process: enough to keep every process busy while the
# parent reads the next inputs, few enough that a long video is never in memory.
IN_FLIGHT_PER_WORKER = 3


def count_of_workers(workers: int | None) -> int:
    """Those of ``--workers``; where it was not given (None), one per processor that this process may use."""
    if workers is not None:
        return workers
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_of_workers(workers: int | None, world_size: int) -> int:
    """Of `count_of_workers` those of one of several processes on a machine; one at least."""
    return max(1, count_of_workers(workers) // world_size)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--workers`` and ``--overwrite``, which several tools share."""
    parser.add_argument(
        "--workers",
        type=int,
        default=None,
        metavar="N",
        help="processes for flow, crf, eval and bench, threads of check; default: one per processor",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="make results again that exist already, instead of going on from them"
    )


def start_worker(niceness: int = 0) -> None:
    """The processes share out the processors; more threads in each would only get in each other's way.

    niceness: by how much they step back behind a network that computes on the same processors.
    """
    # Ctrl-C reaches all processes, and what to do then is the parent's to say. SIGTERM comes from it, or as Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    if niceness and hasattr(os, "nice"):
        os.nice(niceness)
    keep_freed_memory()  # fetched anew for every image, memory costs a fifth of a scoring process's time
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for a torch that is imported later
    if importlib.util.find_spec("cv2") is not None:
        import cv2

        cv2.setNumThreads(1)


class _Job:
    """What a worker process is at; it ends after its job, not in the midst of a file."""

    running = False
    last = False


def _run_job(function: Callable[..., Any], *task: Any) -> Any:
    _Job.running = True
    try:
        return function(*task)
    finally:
        _Job.running = False
        if _Job.last:
            _end()


def _leave(*_: object) -> None:
    _Job.last = True
    if not _Job.running:
        _end()


def _leave_with_parent() -> None:
    """A parent that was killed outright tells nobody, and its workers would wait for jobs for ever."""
    wait([multiprocessing.parent_process().sentinel])
    _leave()


def _end() -> NoReturn:
    os._exit(128 + signal.SIGTERM)  # at once: the pool's loop would catch an exception of a job and go on


def end_workers() -> None:
    """Ends the worker processes that an interruption has left: one that came while a pool was starting them."""
    for process in multiprocessing.active_children():
        process.terminate()


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Ctrl-C waits until the end of the block, and for ever in processes that are started in it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # now, as its start lets Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Pool(ProcessPoolExecutor):
    """Starts a process with a job, where one is needed. It imports for a second before `start_worker` can say that
    Ctrl-C is not for it, and would end by a traceback.
    """

    def submit(self, function: Callable[..., Any], /, *task: Any) -> Future:
        with _ctrl_c_later():
            return super().submit(function, *task)


def start_pool(workers: int, niceness: int = 0) -> ProcessPoolExecutor:
    """Processes that `start_worker` prepares."""
    # "spawn", since forking a process in which torch or OpenCV already runs threads can deadlock.
    context = multiprocessing.get_context("spawn")
    return _Pool(workers, mp_context=context, initializer=start_worker, initargs=(niceness,))


def cpu_seconds() -> tuple[float, float]:
    """Processor time of this process, and of those that it started and that have ended.

    The second is told in hundredths; so is the first by `os.times`, where a short computation takes none at all.
    """
    spent = os.times()
    return time.process_time(), spent.children_user + spent.children_system


def parallel_map(
    function: Callable[..., Any], tasks: Iterable[tuple], workers: int | None = None, niceness: int = 0
) -> Iterator[Any]:
    """Yields ``function(*task)`` for every task, in the order of the tasks.

    Args:
        function: a function at the top level of a module, since it is sent to other processes by name.
        tasks: tuples of arguments that can be pickled; drawn from lazily, never more than a few per process ahead.
        workers: processes; 0 or 1 runs in this one. Default: one per processor.
        niceness: as in `start_worker`.

    An exception of a job is raised here, with its type, and no further job starts.

    Raises:
        UserError: a process that was killed.
    """
    workers = count_of_workers(workers)
    if workers <= 1:
        for task in tasks:
            yield function(*task)
        return

    pool = start_pool(workers, niceness)
    waiting: deque[Future] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(_run_job, function, *task))
            if len(waiting) >= IN_FLIGHT_PER_WORKER * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise _killed(workers) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Background:
    """Jobs on other processes while this one computes. At the end of the ``with`` block all of them are done; after an
    exception those that have not begun are dropped.

    Args:
        function: at the top level of a module; called with the arguments of each `submit`. Its results are dropped.
        workers: processes, 1 or more.
        name: what the progress bar of the jobs that are left at the end says.
    """

    def __init__(self, function: Callable[..., Any], workers: int, name: str) -> None:
        self.function, self.workers, self.name = function, workers, name
        self._pool = start_pool(workers, NICENESS)
        self._waiting: deque[Future] = deque()

    def submit(self, *task: Any) -> None:
        """Hand out one job. An exception of an earlier one that is done is raised here, with its type."""
        try:
            while self._waiting and self._waiting[0].done():
                self._waiting.popleft().result()
            self._waiting.append(self._pool.submit(_run_job, self.function, *task))
        except BrokenProcessPool:
            raise _killed(self.workers) from None

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                for job in progress_bar(self._waiting, desc=f"{self.name} (the rest)", unit="frame"):
                    job.result()
        except BrokenProcessPool:
            raise _killed(self.workers) from None
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _killed(workers: int) -> Exception:
    return UserError(
        f"one of {workers} worker processes was killed, most often for want of memory: try a smaller --workers"
    )
