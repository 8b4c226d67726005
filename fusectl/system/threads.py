"""Work on threads within a budget of bytes in flight, and the Progress that long work tells."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Protocol

from fusectl.system.memory import available_bytes


# A chunk that is larger than the budget is worked on alone, up to this much more; beyond, the budget is an error.
TOLERATED_EXCESS_BYTES = 224 << 20


# The most bytes in flight, unless told otherwise, where that is a small share of what is free.
_MOST_BYTES, _LEAST_BYTES = 256 << 20, 16 << 20
_SHARE = 16
# How long an interrupt waits for what is being written.
PATIENCE_S = 1.0


def default_max_memory_bytes() -> int:
    """The bytes in flight that a process allows itself: 256 MiB, or a sixteenth of the free memory if that is less."""
    return max(_LEAST_BYTES, min(_MOST_BYTES, available_bytes() // _SHARE))


class Progress(Protocol):
    """What long work tells while it goes on."""

    def start(self, what: str, total_bytes: int) -> None: ...

    def advance(self, tensor: str, done_bytes: int) -> None: ...


class Silent:
    """A Progress that nobody watches."""

    def start(self, what: str, total_bytes: int) -> None:
        pass

    def advance(self, tensor: str, done_bytes: int) -> None:
        pass


class Budget:
    """Bytes in flight: `take` blocks until so many are free. A request beyond the whole budget waits for all of it."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._free = limit_bytes
        self._changed = threading.Condition()

    def take(self, wanted_bytes: int) -> int:
        granted = min(wanted_bytes, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= granted)
            self._free -= granted
        return granted

    def give_back(self, granted_bytes: int) -> None:
        with self._changed:
            self._free += granted_bytes
            self._changed.notify_all()


def in_parallel(tasks: Iterable[tuple[int, Callable[[], None]]], *, budget_bytes: int, jobs: int) -> None:
    """Runs tasks, each with the bytes it holds, on `jobs` threads within the budget. The first failure ends it."""
    budget = Budget(budget_bytes)
    failures: list[BaseException] = []

    def run(task: Callable[[], None], granted: int) -> None:
        try:
            if not failures:
                task()
        except BaseException as error:  # noqa: BLE001
            failures.append(error)
        finally:
            budget.give_back(granted)

    submitted: list[Future[None]] = []
    with _pool(jobs, submitted) as pool:
        for cost, task in tasks:
            granted = budget.take(cost)
            if failures:
                break
            submitted.append(pool.submit(run, task, granted))
    if failures:
        raise failures[0]


def default_jobs() -> int:
    """One thread per core that this process may use, two at least: one reads while the other writes."""
    return max(2, len(os.sched_getaffinity(0)))


@contextmanager
def _pool(jobs: int, submitted: Sequence[Future[None]]) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="fusectl")
    try:
        yield pool
        pool.shutdown(wait=True)
    except BaseException as error:
        # An interrupt must not wait for the queue, and not for long for what is being written.
        is_interrupt = not isinstance(error, Exception)
        pool.shutdown(wait=not is_interrupt, cancel_futures=True)
        wait(submitted, PATIENCE_S)
        raise
