"""Which cases of a test run each time, and which in the slow stage only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest


slow = partial(pytest.param, marks=pytest.mark.slow)


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
