"""Threads within a budget of bytes in flight."""

import itertools
import threading
import time

import pytest

from fusectl.errors import Corrupt
from fusectl.system.threads import Budget, in_parallel


def test_the_budget_is_never_exceeded():
    budget, held, most = Budget(100), [], []

    def task(n):
        held.append(n)
        most.append(sum(held))
        time.sleep(0.001)
        held.remove(n)

    def worker(n):
        granted = budget.take(n)
        task(granted)
        budget.give_back(granted)

    threads = [
        threading.Thread(target=worker, args=(n,)) for n in itertools.islice(itertools.cycle([10, 40, 70, 250]), 60)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert max(most) <= 100
    assert len(most) == 60


def test_the_first_failure_ends_the_work_and_is_raised():
    done = []

    def tasks():
        for i in range(1000):
            yield 1, (lambda i=i: fail() if i == 3 else done.append(i))

    def fail():
        raise Corrupt("the third")

    with pytest.raises(Corrupt, match="the third"):
        in_parallel(tasks(), budget_bytes=4, jobs=2)

    assert len(done) < 100
