"""A checkpoint seen with each of its kv heads several times, so that it has as many for its heads as another one.

    8 heads, 2 kv heads: heads 0-3 read kv head 0      8 heads, 4 kv heads: 0-1 read kv head 0, 2-3 its twin

The network computes the same. The optimizer's moments of the twins are not known, only their sum is: what is seen of
them is good for its shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.families.recognized import Recognized
from fusectl.formats.tree import Checkpoint, Leaf, View
from fusectl.layout.blocks import Region, whole
from fusectl.optimizer.state import slot_axes
from fusectl.rules.fusion import query_groups
from fusectl.sources.opened import Opened


KV_HEADS = "kv_heads"


class Expanded(View):
    """A checkpoint whose tensors have each kv head `times` times, one after the other."""

    def __init__(self, source: Checkpoint, tree: Recognized, times: int) -> None:
        places = {}
        for name, leaf in source.leaves.items():
            parameter = tree.parameter_of(name)
            of_parameter = None if parameter is None else tree.rows[parameter].spec.axes
            axes = of_parameter or slot_axes(name, leaf.shape, tree, tree.shapes)
            if KV_HEADS in axes:
                places[name] = axes.index(KV_HEADS)
        seen = {name: _seen(source.leaves[name], axis, times) for name, axis in places.items()}
        super().__init__(source, {**source.leaves, **seen})
        self._places = places
        self._times = times

    def read(self, name: str, region: Region | None = None) -> npt.NDArray[Any]:
        if name not in self._places:
            return self.source.read(name, region)
        axis, times = self._places[name], self._times
        wanted = whole(self.leaves[name].shape) if region is None else region
        heads = wanted[axis]
        # Twins are neighbours (0 0 1 1, as np.repeat has them) and not a second round (0 1 0 1), since query head n
        # reads kv head n // (heads / kv_heads).
        there = range(heads.start // times, -(-heads.stop // times))
        values = self.source.read(name, (*wanted[:axis], there, *wanted[axis + 1 :]))
        return np.take(values, np.asarray(heads) // times - there.start, axis=axis)

    def can_be_taken(self, name: str) -> bool:
        return name not in self._places and self.source.can_be_taken(name)

    def missing_chunks(self, name: str) -> list[str]:
        return self.source.missing_chunks(name)


def _seen(leaf: Leaf, axis: int, times: int) -> Leaf:
    shape = _times(leaf.shape, axis, times)
    stored = leaf.stored
    if stored is not None:
        # Of the size that they have, so that no more is held than where they are not repeated.
        stored = replace(stored, shape=shape)
    return replace(leaf, shape=shape, stored=stored, through=leaf)


def _times(shape: tuple[int, ...], axis: int, times: int) -> tuple[int, ...]:
    return (*shape[:axis], shape[axis] * times, *shape[axis + 1 :])


def expanded(source: Opened, times: int) -> Opened:
    """A source seen with each of its kv heads `times` times; itself for once."""
    if times == 1:
        return source
    seen = Expanded(source.checkpoint, source.tree, times)
    shapes = {name: seen.leaves[source.full(name)].shape for name in source.tree.shapes}
    return Opened(seen, replace(source.tree, shapes=shapes), source.dropped)


def repeats(trees: Sequence[Recognized]) -> tuple[int, ...]:
    """How often each model's kv heads must be there for as many heads to share one in all of them."""
    groups = [query_groups(tree) for tree in trees]
    # Repeating a kv head can only make the groups that share one smaller. The greatest common divisor is therefore the
    # largest size that all models can reach: groups of 4 and of 6 heads both become groups of 2.
    common = math.gcd(*groups)
    return tuple(each // common for each in groups)
