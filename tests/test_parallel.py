"""Jobs on several processes: order, laziness, errors."""

from __future__ import annotations

import operator
import os

import pytest

from utils.errors import UserError
from utils.parallel import IN_FLIGHT_PER_WORKER, default_workers, parallel_map


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
    with pytest.raises(UserError, match="--workers -1"):
        list(parallel_map(pow, [], -1))


def test_a_killed_process_is_reported():
    with pytest.raises(UserError, match="was killed"):
        list(parallel_map(os._exit, [(1,)] * 4, 2))


def test_default_is_the_processors_at_hand():
    assert 1 <= default_workers() <= (os.cpu_count() or 1)
