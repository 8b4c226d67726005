"""The states of optax's transformations: moments in trees like that of the parameters, counts next to them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fusectl.optimizer.state import without_root


# Below the states of the transformations that optax chains or wraps: by their places, or by their fields' names.
MOMENTS = re.compile(r"(?:(?:\d+|inner_state)/)*(mu|nu)/(.+)")
COUNT = re.compile(r"(?:(?:\d+|inner_state)/)*(count|gradient_step|mini_step)")
# The losses and norms of gradients that MaxText's skip_step_on_spikes keeps, with a count of its own (optimizers.py).
WINDOW = re.compile(r"((?:(?:\d+|inner_state)/)*)(losses|grad_norms|is_skipped)")
# Flax's collections are one level more in such trees.
COLLECTION = "params/"


def moment_of(slot: str, inside: str, pattern: re.Pattern[str] = MOMENTS) -> tuple[str, str] | None:
    """The parameter and the moment, such as mu or nu, that a full name says; None for others.

    `inside` stands before parameters' names.

    >>> moment_of("opt_state/0/mu/params/kernel", "params/")
    ('kernel', 'mu')
    """
    found = pattern.fullmatch(without_root(slot))
    if found is None or not found.group(2).startswith(inside):
        return None
    return found.group(2).removeprefix(inside), found.group(1)


def windows(names: Iterable[str]) -> frozenset[str]:
    """Of full names those of a window's parts, and of its count, which stands next to them.

    >>> sorted(windows(["opt_state/1/losses", "opt_state/1/count", "opt_state/0/count"]))
    ['opt_state/1/count', 'opt_state/1/losses']
    """
    names = list(names)
    found = [each for name in names if (each := WINDOW.fullmatch(without_root(name)))]
    parts = {name for each in found for name in (each.group(), f"{each.group(1)}count")}
    return frozenset(name for name in names if without_root(name) in parts)
