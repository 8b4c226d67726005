"""Which cases of a test run each time, and which in the slow stage only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pytest


slow = partial(pytest.param, marks=pytest.mark.slow)


# For whole products of which the slow stage runs a part that every value of every factor occurs in.
exhaustive = partial(pytest.param, marks=[pytest.mark.slow, pytest.mark.exhaustive])


def diagonals(one: Sequence[Any], other: Sequence[Any]) -> list[Any]:
    """All pairs, exhaustive but for every third diagonal, or second one: every value of both is in one of those."""
    step = min(3, len(one), len(other))
    pairs = [(i + j, a, b) for i, a in enumerate(one) for j, b in enumerate(other)]
    return [exhaustive(a, b) if place % step else (a, b) for place, a, b in pairs]


def some_soon(cases: Iterable[Any], chosen: Callable[[Any], bool]) -> list[Any]:
    """All cases, slow but for those chosen."""
    return [case if chosen(case) else slow(*case) if isinstance(case, tuple) else slow(case) for case in cases]


def first_soon(cases: Iterable[Any], count: int = 1) -> list[Any]:
    """All cases, slow but for the first few."""
    listed = list(cases)
    return [*listed[:count], *some_soon(listed[count:], lambda _: False)]


COMMANDS = [
    "fuse",
    "self-fuse",
    "noise-fill",
    "convert",
    "stack",
    "ligo",
    "grow",
    "verify",
    "diff",
    "inspect",
    "plot",
    "restart-config",
    "theory",
    "when",
    "reproduce",
    "demo",
]
