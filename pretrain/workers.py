"""Work on many shards: spread over processes, and over threads where it waits for a network."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

from pretrain.errors import InputError
from pretrain.progress import Progress

_SHARDS_A_PROCESS = 4  # fewer are not worth starting one
_POLL = 0.2  # seconds until a worker process looks whether the process that started it still exists and works
_SHARDS_A_THREAD = 2  # in a block: the slowest shard of a block keeps its other threads waiting

Job = TypeVar("Job")
Found = TypeVar("Found")
# Does one job; should end early once the event is set.
Work = Callable[[Job, threading.Event], Found]


def map_shards(
    work: Work[Job, Found],
    jobs: Sequence[Job],
    *,
    doing: str,
    workers: int | None = None,
    threads: int = 1,
) -> Generator[Found, None, None]:
    """The results of `work` for every job, in order, by `workers` processes of `threads` threads; shows progress.

    By default as many processes as cores, and fewer for few jobs; one means this process. A bounded number of results
    waits for its turn. The first exception in order ends the iteration, and InputError where a process is killed.
    Close the iterator if it is not read to its end.
    """
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(cores, -(-len(jobs) // max(threads, _SHARDS_A_PROCESS)))
    spread = _in_processes(work, jobs, threads, workers) if workers > 1 else in_threads(work, jobs, threads)
    with Progress(doing, "shards", len(jobs)) as progress, closing(spread) as results:
        for found in results:
            yield found
            progress.advance()


def in_threads(
    work: Work[Job, Found], jobs: Sequence[Job], threads: int, stop: threading.Event | None = None
) -> Generator[Found, None, None]:
    """The results of `work` for every job, in order, by that many threads. Ended early, it sets `stop`."""
    stop = stop or threading.Event()
    if threads == 1:
        yield from (work(job, stop) for job in jobs)
        return
    pool = ThreadPoolExecutor(threads)
    try:
        yield from _in_order(pool, partial(_call, work, stop), jobs, threads * _SHARDS_A_THREAD)
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _in_processes(
    work: Work[Job, Found], jobs: Sequence[Job], threads: int, workers: int
) -> Generator[Found, None, None]:
    size = min(threads * _SHARDS_A_THREAD, -(-len(jobs) // workers)) if threads > 1 else 1
    blocks = (jobs[at : at + size] for at in range(0, len(jobs), size))
    # Spawned, not forked: the caller may have threads. A scanning process imports nothing heavy.
    context = multiprocessing.get_context("spawn")
    stop = context.RawValue("b", 0)  # setting an Event waits for its waiters, also for killed ones
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_adopt, initargs=(stop, os.getpid()))
    try:
        for found in _in_order(pool, partial(_block, work, threads), blocks, 2 * workers):
            yield from found
    except BrokenProcessPool:
        raise InputError(
            f"one of {workers} worker processes was killed, as the system does where memory is short; fewer workers "
            "would be right (--workers 1 is this process alone)"
        ) from None
    finally:
        stop.value = 1
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: Executor, function: Callable[[Job], Found], jobs: Iterable[Job], most: int
) -> Generator[Found, None, None]:
    """The results of `function` for every job, in order; at most `most` are running or waiting to be taken."""
    pending: deque[Future[Found]] = deque()
    for job in jobs:
        if len(pending) == most:
            yield pending.popleft().result()
        pending.append(pool.submit(function, job))
    while pending:
        yield pending.popleft().result()


def _call(work: Work[Job, Found], stop: threading.Event, job: Job) -> Found:
    return work(job, stop)


_stop = threading.Event()  # of a worker process


def _adopt(stop: Any, parent: int) -> None:
    """In a worker process: set `_stop` when the process that started it gives up, and exit when that was killed."""

    def watch() -> None:
        while not stop.value:
            if os.getppid() != parent:
                os._exit(1)
            time.sleep(_POLL)
        _stop.set()

    threading.Thread(target=watch, daemon=True).start()


def _block(work: Work[Job, Found], threads: int, jobs: Sequence[Job]) -> list[Found]:
    return list(in_threads(work, jobs, threads, _stop))
