"""A checkpoint seen with its layers stacked along an axis, as scan_layers has them, or each for itself.

    encoder/layers_0/mlp/wo/kernel  (mlp, embed)  ┐
    encoder/layers_1/mlp/wo/kernel  (mlp, embed)  ┘ ⇄  encoder/encoder/mlp/wo/kernel  (mlp, layers, embed)

Which tensors belong together, and where their layers go, follows from the tables of two families: they are the same but
for the axis `layers`. The optimizer's slots go along by the axes that they have. No value is changed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.archs import FAMILIES, Recognized
from fusectl.archs.table import Family, Row, stack_of
from fusectl.cache import Cache
from fusectl.errors import Incompatible
from fusectl.formats.tree import Checkpoint, Leaf, View, dict_keys, kept_shapes, keys_beside
from fusectl.formats.zarr import np_dtype
from fusectl.layout import Region, chunk_at, intersect, places_in_grid, slices, whole
from fusectl.sources import recognized
from fusectl.transforms.optimizer import FIRST_MOMENTS, UNUSED, OptimizerState, find_state


Array = npt.NDArray[Any]
# What is kept of decoded chunks: from one that holds all layers each of them takes its part.
CACHE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class _Stack:
    """A tensor whose layers, along `axis`, are tensors of the source."""

    tensors: tuple[str, ...]
    axis: int

    def read(self, source: Checkpoint, region: Region, _: _Chunks) -> Array:
        inside = (*region[: self.axis], *region[self.axis + 1 :])
        out = np.empty(tuple(map(len, region)), np_dtype(source.leaves[self.tensors[0]].dtype))
        for place, layer in enumerate(region[self.axis]):
            out[(slice(None),) * self.axis + (place,)] = source.read(self.tensors[layer], inside)
        return out


@dataclass(frozen=True, slots=True)
class _Layer:
    """A tensor that is one layer, along `axis`, of one of the source's."""

    tensors: tuple[str]
    axis: int
    index: int

    def read(self, _: Checkpoint, region: Region, chunks: _Chunks) -> Array:
        there = (*region[: self.axis], range(self.index, self.index + 1), *region[self.axis :])
        return np.ascontiguousarray(chunks.read(*self.tensors, there).squeeze(self.axis))


class Restacked(View):
    """A checkpoint whose tensors have the names and shapes that another stacking of its layers gives them."""

    def __init__(
        self, source: Checkpoint, leaves: Mapping[str, Leaf], parts: Mapping[str, _Stack | _Layer], cache_bytes: int
    ) -> None:
        super().__init__(source, leaves)
        self._parts = parts
        self._chunks = _Chunks(source, cache_bytes)

    def read(self, name: str, region: Region | None = None) -> Array:
        if name not in self._parts:
            return super().read(name, region)
        return self._parts[name].read(self.source, region or whole(self.leaves[name].shape), self._chunks)

    def can_be_taken(self, name: str) -> bool:
        # The bytes would be the same where a chunk is one layer; its key is not.
        return name not in self._parts and super().can_be_taken(name)

    def missing_chunks(self, name: str) -> list[str]:
        if name not in self._parts:
            return super().missing_chunks(name)
        return [chunk for tensor in self._parts[name].tensors for chunk in self.source.missing_chunks(tensor)]


def restacked(
    checkpoint: Checkpoint,
    layers: str,
    arch: str | None = None,
    drop: Collection[str] = (),
    *,
    cache_bytes: int = CACHE_BYTES,
) -> Restacked:
    """A checkpoint seen with its layers `scanned` or `unscanned`; tensors that match `drop` are left out.

    Raises Incompatible where they are already, where the family has no such layout, and for slots of Adafactor that are
    factored in one layout and not in the other.
    """
    shapes = kept_shapes(checkpoint.shapes, drop)
    tree = recognized(checkpoint, arch, drop)
    if tree.scanned == (layers == "scanned"):
        raise Incompatible(f"{checkpoint.path}: its layers are {layers} already")
    state = find_state(shapes, tree, checkpoint.path)
    pairs = list(_pairs(tree, checkpoint.path))
    gone = {name for pair in pairs for name in pair.names_of_sources(state)}
    leaves = {name: checkpoint.leaves[name] for name in shapes if name not in gone}
    parts: dict[str, _Stack | _Layer] = {}
    for pair in pairs:
        for here, there, axis in pair.moves(state, checkpoint.path):
            dtypes = sorted({checkpoint.leaves[name].dtype for name in there})
            if len(dtypes) > 1:
                raise Incompatible(f"{checkpoint.path}: {here[0]}: layers of {' and '.join(dtypes)}", hint="--dtype")
            for i, name in enumerate(here):
                if there:
                    parts[name] = _Layer((there[0],), axis, i) if tree.scanned else _Stack(there, axis)
                    leaves[name] = _seen(checkpoint.leaves[there[0]], name, axis, 0 if tree.scanned else len(there))
                else:
                    # As T5X's Adafactor creates it.
                    value = np.zeros(UNUSED, np.float32)
                    leaves[name] = Leaf(name, dict_keys(name), UNUSED, value.dtype.name, value=value)
    return Restacked(checkpoint, leaves, parts, cache_bytes)


@dataclass(frozen=True)
class _Pair:
    """A parameter that is one tensor where layers are stacked, and one for each layer where they are not."""

    tree: Recognized
    # Names of the parameter without the tree's prefix: in the source, and as it is to be seen.
    there: tuple[str, ...]
    here: tuple[str, ...]
    there_row: Row
    here_row: Row
    here_shape: tuple[int, ...]

    def names_of_sources(self, state: OptimizerState) -> Iterator[str]:
        """The full names of the parameter and its slots in the source."""
        for name in self.there:
            yield self.tree.full(name)
            yield from (state.slot(name, slot) for slot in self._slots(state))

    def moves(self, state: OptimizerState, where: str) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], int]]:
        """Full names as they are to be seen, those that they come from, and the place of the axis `layers`.

        A slot that is not in use comes from nothing.
        """
        full = self.tree.full
        axes = self.here_row.spec.axes if "layers" in self.here_row.spec.axes else self.there_row.spec.axes
        yield tuple(map(full, self.here)), tuple(map(full, self.there)), axes.index("layers")
        for slot in self._slots(state):
            # Where the source has the slot's name, with the parameter's other one in it.
            here = tuple(state.slot(self.there[0], slot).replace(self.there[0], name) for name in self.here)
            kept = _axes_of(state, slot, self.here_shape, self.here_row)
            if kept is None:
                yield here, (), 0
                continue
            other, theirs = self._like(state, slot, kept, where)
            stacked = kept if "layers" in kept else theirs
            yield here, tuple(state.slot(name, other) for name in self.there), stacked.index("layers")

    def _like(self, state: OptimizerState, slot: str, kept: tuple[str, ...], where: str) -> tuple[str, tuple[str, ...]]:
        """The source's slot that has the same axes but for the layers, whatever it is called, and its axes."""
        for other in self._slots(state):
            axes = _axes_of(state, other, self.tree.shapes[self.there[0]], self.there_row)
            of_one_kind = (other in FIRST_MOMENTS) == (slot in FIRST_MOMENTS)
            if of_one_kind and axes is not None and _without_layers(axes) == _without_layers(kept):
                return other, axes
        raise Incompatible(
            f"{where}: {self.there[0]}: Adafactor factors it in one layout of its layers and not in the other",
            hint="--drop-optimizer leaves the state out",
        )

    def _slots(self, state: OptimizerState) -> tuple[str, ...]:
        return state.moments if state.names else ()


def _axes_of(state: OptimizerState, slot: str, shape: tuple[int, ...], row: Row) -> tuple[str, ...] | None:
    """The names of the axes that a slot has of a parameter of this shape; None for one that is not in use."""
    axes = state.axes_of(slot, shape, row.spec)
    return None if axes is None else tuple(row.spec.axes[axis] for axis in axes)


def _without_layers(axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis != "layers")


def _pairs(tree: Recognized, where: str) -> Iterator[_Pair]:
    """Every parameter of a tree that another stacking of its layers moves."""
    for layer, layer_row, stack, stack_row in _other_layout(tree, where):
        depth = tree.depths[stack_of(stack)] // layer_row.every
        layers = tuple(layer.replace("#", str(i)) for i in range(depth))
        axis = stack_row.spec.axes.index("layers")
        if tree.scanned:
            shape = tree.shapes[stack]
            yield _Pair(tree, (stack,), layers, stack_row, layer_row, (*shape[:axis], *shape[axis + 1 :]))
        else:
            shape = tree.shapes[layers[0]]
            yield _Pair(tree, layers, (stack,), layer_row, stack_row, (*shape[:axis], depth, *shape[axis:]))


def _other_layout(tree: Recognized, where: str) -> list[tuple[str, Row, str, Row]]:
    """For every tensor of a layer its pattern and row, and those of the stack of all layers.

    Raises Incompatible where no family is the same but for the axis `layers`.
    """
    # A table that stands in a file tells of one layout only, even if it is that of a family here.
    for family in FAMILIES if tree.family.table is None else ():
        layered, stacked = (family, tree.family) if tree.scanned else (tree.family, family)
        found = _counterparts(layered, stacked)
        if found:
            return found
    known = sorted({f.name for f in FAMILIES for g in FAMILIES if _counterparts(f, g) or _counterparts(g, f)})
    raise Incompatible(
        f"{where}: {tree.family.name} has one layout of its layers only", hint=f"both are known of {', '.join(known)}"
    )


def _counterparts(layered: Family, stacked: Family) -> list[tuple[str, Row, str, Row]]:
    """The rows of two families that say the same of a layer and of the stack of all; none if any has no partner."""
    stacks = {alternative: row for row in stacked.rows for alternative in row.alternatives}
    found = []
    for row in layered.rows:
        for alternative in row.alternatives:
            head, _, tail = alternative.partition("/layers_#/")
            partner = re.compile(f"{re.escape(head)}/[^/]+/{re.escape(tail)}" if tail else re.escape(alternative))
            names = [
                name
                for name in stacks
                if partner.fullmatch(name) and ("layers" in stacks[name].spec.axes) == bool(tail)
            ]
            if len(names) != 1 or _without_layers(stacks[names[0]].spec.axes) != row.spec.axes:
                return []
            other = stacks.pop(names[0])
            if tail:
                found.append((alternative, row, names[0], other))
    return [] if stacks else found


def _seen(leaf: Leaf, name: str, axis: int, layers: int) -> Leaf:
    """A leaf with an axis of `layers` more, each in a chunk of its own; without that axis for none."""

    def with_axis(shape: tuple[int, ...], n: int) -> tuple[int, ...]:
        return (*shape[:axis], n, *shape[axis:]) if layers else (*shape[:axis], *shape[axis + 1 :])

    stored = leaf.stored
    if stored is not None:
        storage = replace(stored.storage, chunks=with_axis(stored.storage.chunks, 1))
        stored = replace(
            stored, shape=with_axis(stored.shape, layers), chunks=with_axis(stored.chunks, 1), storage=storage
        )
    seen = Leaf(name, keys_beside(leaf.keys, name), with_axis(leaf.shape, layers), leaf.dtype, stored=stored)
    # One layer of a stack is read from chunks that may hold all of them.
    return seen if layers else replace(seen, through=leaf)


class _Chunks:
    """A checkpoint's decoded chunks, the last ones of which are kept: one at least."""

    def __init__(self, source: Checkpoint, most_bytes: int) -> None:
        self._source = source
        self._cache = Cache(most_bytes)

    def read(self, tensor: str, region: Region) -> Array:
        """The values of a region."""
        leaf = self._source.leaves[tensor]
        out = np.empty(tuple(map(len, region)), np_dtype(leaf.dtype))
        for index in places_in_grid(region, leaf.chunks):
            chunk = chunk_at(index, leaf.chunks, leaf.shape)
            met = intersect(chunk, region)
            assert met is not None
            values = self._cache.get((tensor, index), partial(self._source.read, tensor, chunk))
            out[slices(met, region)] = values[slices(met, chunk)]
        return out
