"""Which cases of a test run each time, and which in the slow stage only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

import pytest


ParameterSet = type(pytest.param())
slow = partial(pytest.param, marks=pytest.mark.slow)


# For whole products of which CI's slow stage runs a part.
exhaustive = partial(pytest.param, marks=[pytest.mark.slow, pytest.mark.exhaustive])


def diagonals(one: Sequence[Any], other: Sequence[Any]) -> list[Any]:
    """All pairs, exhaustive but for every third diagonal, or second one: every value of both is in one of those."""
    step = min(3, len(one), len(other))
    pairs = [(i + j, a, b) for i, a in enumerate(one) for j, b in enumerate(other)]
    return [exhaustive(a, b) if place % step else (a, b) for place, a, b in pairs]


def thinned(cases: Iterable[Any], every: int = 2, mark: Callable[..., Any] = exhaustive) -> list[Any]:
    """All cases, marked but for every second one, or so."""
    return [case if i % every == 0 else _marked(mark, case) for i, case in enumerate(cases)]


def covered(cases: Iterable[Any], parts: Callable[[Any], Collection[Any]]) -> list[Any]:
    """All cases, exhaustive but for those that have a part which none before them has: every part is in one of them."""
    seen: set[Any] = set()
    found = []
    for case in cases:
        own = set(parts(_values(case)))
        found.append(_marked(exhaustive, case) if own <= seen else case)
        seen |= own
    return found


def some_soon(cases: Iterable[Any], chosen: Callable[[Any], bool]) -> list[Any]:
    """All cases, slow but for those chosen. What is marked already and not chosen stays so."""
    return [
        _values(case) if chosen(_values(case)) else case if isinstance(case, ParameterSet) else _marked(slow, case)
        for case in cases
    ]


def _values(case: Any) -> Any:
    """What a case gives a test, without its marks: a tuple of several values, or the only one."""
    values = case.values if isinstance(case, ParameterSet) else case
    return values[0] if isinstance(values, tuple) and len(values) == 1 else values


def _marked(mark: Callable[..., Any], case: Any) -> Any:
    values = _values(case)
    return mark(*values) if isinstance(values, tuple) else mark(values)


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
