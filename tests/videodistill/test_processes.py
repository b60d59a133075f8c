"""Work in other processes: in order, not far ahead, and never waited for in vain."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool

import pytest

from videodistill.processes import map_in_processes


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_jobs_are_taken_as_needed(workers: int) -> None:
    taken = []

    def jobs() -> Iterator[int]:
        for number in range(40):
            taken.append(number)
            yield -number

    with map_in_processes(abs, jobs(), workers, os.getpid) as results:
        assert next(results) == 0
        assert len(taken) <= 1 + 4 * workers
        assert list(results) == list(range(1, 40))


def test_nothing_is_started_for_no_jobs() -> None:
    with map_in_processes(abs, [], 1, os._exit, 1) as results:
        assert list(results) == []


def test_a_killed_worker_is_noticed() -> None:
    with (
        pytest.raises(BrokenProcessPool),
        map_in_processes(os._exit, [9], 2, os.getpid) as results,
    ):
        list(results)
