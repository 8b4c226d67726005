"""What the optimizer's slots of a fusion should hold, re-derived from the sources' slots without the planner.

The second moments of block (j, i), from the inputs of source j to the outputs of source i, are c_i^2 times

    nu_i[a, b]                                                               where both are one model
    mean_b(nu_j)[a] * mean_a(nu_i)[b] / sqrt(mean(nu_i) mean(nu_j))          where they are not

with c_i the weight of i over the factor that it is stored with. A slot without some of the axes is the mean over them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.formats.tree import kept_shapes
from fusectl.layout.blocks import Region, intersect, shifted, slices, tiles, whole
from fusectl.optimizer.kinds import OnState
from fusectl.optimizer.registry import find_state
from fusectl.optimizer.state import Axes, OptimizerState, Order
from fusectl.verification.claim import Claim


Array = npt.NDArray[Any]


class Slots:
    """The sources' states, and what follows from them for the fused model's."""

    def __init__(self, claim: Claim, fused: OptimizerState) -> None:
        """Raises Incompatible where a source has no state that could have been carried."""
        self._claim = claim
        self._states = [
            find_state(kept_shapes(source.shapes, claim.record.drop), tree, source.path)
            for source, tree in zip(claim.sources, claim.trees, strict=True)
        ]
        fused.require_known(claim.fused.path, "")
        self.fused = fused
        places = [source.location.index for source in claim.sources]
        self._models = [places.index(place) for place in places]
        self._means: dict[tuple[int, str, Axes], Array] = {}
        self._lock = threading.Lock()

    def kept(self, parameter: str, slot: str) -> Axes | None:
        """The axes of its parameter that a slot has; None for one that is not in use."""
        return self.fused.axes_of(slot, self._claim.tree.shapes[parameter], self._claim.tree.rows[parameter].spec)

    def expected(self, parameter: str, slot: str, kept: Axes, region: Region) -> Array:
        """The values of a region of a slot in float64."""
        if self._claim.blocks(self._claim.tree.rows[parameter]).shared:
            return self._of_shared(parameter, slot, kept, region)
        out = np.zeros(tuple(map(len, region)))
        first_only = self._claim.record.optimizer == OnState.ASYMMETRIC
        for reads, writes, cell in self._cells(parameter):
            place = tuple(cell[axis] for axis in kept)
            part = intersect(place, region)
            if part is None or (first_only and (reads or writes)):
                continue
            inside = shifted(part, place, whole(tuple(map(len, place))))
            at = slices(part, region)
            if self.fused.is_first(slot):
                if self._models[reads] == self._models[writes]:
                    scale = (
                        self._growth(parameter)
                        if self.fused.orders[slot] is Order.UPDATE
                        else self._gradient(parameter, writes)
                    )
                    out[at] += scale * self._read(writes, parameter, slot, inside)
                continue
            missing = [axis for axis in range(len(cell)) if axis not in kept]
            shape = self._claim.tree.shapes[parameter]
            # A slot without some of the axes is a mean over them, to which each block contributes by its part of their
            # length.
            share = math.prod(len(cell[axis]) / shape[axis] for axis in missing)
            out[at] += (
                share * self._gradient(parameter, writes) ** 2 * self._second(parameter, reads, writes, kept, inside)
            )
        return out

    def _of_shared(self, parameter: str, slot: str, kept: Axes, region: Region) -> Array:
        """A region of the slot of a parameter that does not grow, and gets the gradients of all sources."""
        weights = self._claim.record.weights
        if self.fused.is_first(slot):
            first = [w * self._read(i, parameter, slot, region) for i, w in enumerate(weights)]
            return np.asarray(sum(first))
        # The gradients of all copies add up. Roots of second moments stand for their sizes, as if they pointed the same
        # way.
        roots = [w * np.sqrt(self._mean(i, parameter, kept)[slices(region)]) for i, w in enumerate(weights)]
        return np.asarray(sum(roots) ** 2)

    def _cells(self, parameter: str) -> Iterator[tuple[int, int, Region]]:
        blocks = self._claim.blocks(self._claim.tree.rows[parameter])
        shape = self._claim.tree.shapes[parameter]
        for i in blocks.sources:
            yield i, i, tuple(range(n)[cut] for n, cut in zip(shape, blocks.own(i), strict=True))
        for writes, reads, at in blocks.gaps():
            yield reads, writes, tuple(range(n)[cut] for n, cut in zip(shape, at, strict=True))

    def _second(self, parameter: str, reads: int, writes: int, kept: Axes, inside: Region) -> Array:
        """The second moments of a block, in a region of the axes that are kept."""
        if self._models[reads] == self._models[writes]:
            slot, has = self._slot_with(writes, parameter, kept)
            if has == kept:
                return self._read(writes, parameter, slot, inside)
            return self._mean(writes, parameter, kept)[slices(inside)]
        spec = self._claim.tree.rows[parameter].spec
        inputs = tuple(a for a in kept if spec.axes[a] in spec.inputs)
        outputs = tuple(a for a in kept if spec.axes[a] in spec.outputs)
        stacked = tuple(a for a in kept if a not in inputs + outputs)
        by_input = self._spread(reads, parameter, inputs + stacked, kept, inside)
        by_output = self._spread(writes, parameter, outputs + stacked, kept, inside)
        both = self._spread(reads, parameter, stacked, kept, inside) * self._spread(
            writes, parameter, stacked, kept, inside
        )
        product = by_input * by_output
        # A layer that has never had a gradient has means of zero, and its mix is zero, too.
        mixed: Array = np.divide(product, np.sqrt(both), out=np.zeros_like(product), where=both > 0)
        return mixed

    def _spread(self, source: int, parameter: str, axes: Axes, kept: Axes, inside: Region) -> Array:
        """The mean over all axes but some, in a region, with the dimensions of the region."""
        axes = tuple(sorted(axes))
        mean = self._mean(source, parameter, axes)[slices(tuple(inside[kept.index(a)] for a in axes))]
        full = mean.reshape(tuple(len(inside[i]) if axis in axes else 1 for i, axis in enumerate(kept)))
        return np.broadcast_to(full, tuple(map(len, inside)))

    def _mean(self, source: int, parameter: str, kept: Axes) -> Array:
        """The mean of a source's second moments over all axes but these, in float64."""
        key = (self._models[source], parameter, kept)
        with self._lock:
            if key not in self._means:
                self._means[key] = self._averaged(*key)
            return self._means[key]

    def _averaged(self, source: int, parameter: str, kept: Axes) -> Array:
        slot, has = self._slot_with(source, parameter, kept)
        name = self._states[source].slot(parameter, slot)
        leaf = self._claim.sources[source].leaves[name]
        total = np.zeros(tuple(leaf.shape[has.index(a)] for a in kept))
        over = tuple(i for i, axis in enumerate(has) if axis not in kept)
        for tile in tiles(leaf.shape, leaf.chunks):
            values = self._claim.sources[source].read(name, tile).astype(np.float64)
            total[slices(tuple(tile[has.index(a)] for a in kept)) or ...] += values.sum(axis=over)
        return total / math.prod(leaf.shape[i] for i in over)

    def _slot_with(self, source: int, parameter: str, kept: Axes) -> tuple[str, Axes]:
        tree = self._claim.trees[source]
        return self._states[source].second_moments(parameter, kept, tree.shapes[parameter], tree.rows[parameter].spec)

    def _read(self, source: int, parameter: str, slot: str, region: Region) -> Array:
        name = self._states[source].slot(parameter, slot)
        return self._claim.sources[source].read(name, region).astype(np.float64)

    def _gradient(self, parameter: str, source: int) -> float:
        """What the source's gradients are multiplied with."""
        blocks = self._claim.blocks(self._claim.tree.rows[parameter])
        return self._claim.record.weights[source] / blocks.scale(source)

    def _growth(self, parameter: str) -> float:
        """The fused parameter's RMS over the source's, if all sources had one."""
        blocks = self._claim.blocks(self._claim.tree.rows[parameter])
        fused = math.prod(self._claim.tree.shapes[parameter])
        sizes = [math.prod(tree.shapes[parameter]) for tree in self._claim.trees]
        return math.sqrt(sum(blocks.scale(i) ** 2 * n / fused for i, n in enumerate(sizes)))
