"""Worker processes: work handed out and results taken, and their manners."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Job, Result = TypeVar("Job"), TypeVar("Result")

# Jobs handed out ahead of the result that is waited for: enough that no worker idles behind a slow
# job, few enough that finished results do not fill the memory.
_AHEAD = 4


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2


@contextmanager
def map_in_processes(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    workers: int,
    start: Callable[..., None],
    *arguments: object,
) -> Iterator[Iterator[Result]]:
    """Results of ``function`` on ``jobs``, in order, from processes that ``start`` prepared.

    Jobs are taken a few ahead of the results, and nothing is started before there is one. With one
    worker everything happens here: starting a process takes seconds of importing torch.

    Raises:
        BrokenProcessPool: While results are taken, when a process was killed.
    """
    if workers == 1:
        yield _map_here(function, jobs, start, arguments)
        return
    # Not multiprocessing.Pool: that waits for ever when one of its processes is killed.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, _start_process, (start, *arguments))
    try:
        yield _map_there(pool, function, jobs, _AHEAD * workers)
    finally:
        pool.shutdown(cancel_futures=True)


def _map_here(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    start: Callable[..., None],
    arguments: tuple[object, ...],
) -> Iterator[Result]:
    for number, job in enumerate(jobs):
        if number == 0:
            start(*arguments)
        yield function(job)


def _map_there(
    pool: ProcessPoolExecutor,
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    ahead: int,
) -> Iterator[Result]:
    waiting: deque[Future[Result]] = deque()
    for job in jobs:
        waiting.append(pool.submit(function, job))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _start_process(start: Callable[..., None], *arguments: object) -> None:
    # Ctrl-C ends a worker at once, without a traceback of its own: a job may take an hour.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    follow_parent()
    start(*arguments)


def follow_parent() -> None:
    """In a worker: end with the parent process, even when that is killed."""

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
