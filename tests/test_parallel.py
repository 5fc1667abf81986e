"""Jobs on several processes: order, laziness, errors."""

from __future__ import annotations

import multiprocessing
import operator
import os
import signal
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.parallel import IN_FLIGHT_PER_WORKER, Background, count_of_workers, end_workers, parallel_map, start_pool


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_results_come_in_the_order_of_the_tasks(workers: int):
    assert list(parallel_map(pow, ((i, 2) for i in range(30)), workers)) == [i * i for i in range(30)]
    assert list(parallel_map(pow, [], workers)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_tasks_are_drawn_only_a_little_ahead(workers: int):
    drawn = []

    def tasks():
        for i in range(100):
            drawn.append(i)
            yield i, 1

    results = parallel_map(pow, tasks(), workers)
    assert drawn == []
    for i in range(5):
        assert next(results) == i
        assert len(drawn) <= i + 1 + IN_FLIGHT_PER_WORKER * workers
    results.close()


def test_errors_arrive_with_their_type():
    for workers in (0, 2):
        results = parallel_map(operator.floordiv, [(6, 3), (1, 0), (4, 2)], workers)
        with pytest.raises(ZeroDivisionError):
            assert list(results)


def test_a_killed_process_is_reported():
    with pytest.raises(UserError, match="was killed"):
        list(parallel_map(os._exit, [(1,)] * 4, 2))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="looks for processes in /proc")
def test_ctrl_c_does_not_reach_processes_that_are_starting():
    """From a terminal it reaches all of them; what imports still would end by a traceback."""

    def blocked(process: int) -> bool:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        masks = {
            line.split(":")[0]: int(line.split()[1], 16) for line in lines if line.startswith(("SigBlk", "SigIgn"))
        }
        return bool((masks["SigBlk"] | masks["SigIgn"]) >> (signal.SIGINT - 1) & 1)

    with start_pool(2) as pool:
        jobs = [pool.submit(pow, 2, 3) for _ in range(2)]
        assert all(blocked(process.pid) for process in multiprocessing.active_children())
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])  # here it is only put off
        assert [job.result() for job in jobs] == [8, 8]


def test_workers_that_an_interruption_has_left_are_ended():
    pool = start_pool(1)
    assert pool.submit(pow, 2, 3).result() == 8
    (left,) = multiprocessing.active_children()
    end_workers()
    left.join(30)
    assert left.exitcode == 128 + signal.SIGTERM
    pool.shutdown()


def test_default_is_the_processors_at_hand():
    assert 1 <= count_of_workers(None) <= (os.cpu_count() or 1)


def test_jobs_in_the_background_are_done_at_the_end_of_the_block(tmp_path: Path):
    with Background(os.mkdir, 2, "folders") as background:
        for number in range(20):
            background.submit(tmp_path / str(number))
    assert len(list(tmp_path.iterdir())) == 20
    with Background(os.mkdir, 1, "none"):
        pass


def test_errors_in_the_background_arrive_and_stop_it(tmp_path: Path):
    with pytest.raises(FileExistsError), Background(os.mkdir, 1, "folders") as background:
        background.submit(tmp_path)
    with pytest.raises(UserError, match="was killed"), Background(os._exit, 2, "exits") as background:
        background.submit(1)
    # An error of this process's own drops what has not begun.
    with pytest.raises(ZeroDivisionError), Background(os.mkdir, 1, "folders") as background:
        for number in range(1000):
            background.submit(tmp_path / str(number))
        operator.floordiv(1, 0)
    assert len(list(tmp_path.iterdir())) < 1000


def test_an_error_in_the_background_is_raised_by_a_later_job(tmp_path: Path):
    with pytest.raises(FileExistsError), Background(os.mkdir, 1, "folders") as background:
        background.submit(tmp_path)
        while True:  # for ever, if it were not raised
            background.submit(tmp_path / "other" if not (tmp_path / "other").exists() else tmp_path)
