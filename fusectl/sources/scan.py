"""A checkpoint seen with its layers stacked along an axis, as scan_layers has them, or each for itself.

    encoder/layers_0/mlp/wo/kernel  (mlp, embed)  ┐
    encoder/layers_1/mlp/wo/kernel  (mlp, embed)  ┘ ⇄  encoder/encoder/mlp/wo/kernel  (mlp, layers, embed)

Which tensors belong together, and where their layers go, follows from the tables of two families: they are the same but
for the axis `layers`. The optimizer's slots go along by the axes that they have. No value is changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fusectl.errors import Incompatible
from fusectl.families.naming import is_stream
from fusectl.families.recognized import Recognized
from fusectl.families.registry import FAMILIES
from fusectl.families.table import Family, Row, stack_of
from fusectl.formats.tree import Checkpoint, Leaf, View, dict_keys, kept_shapes, keys_beside
from fusectl.formats.zarr import np_dtype
from fusectl.layout.blocks import Region, chunk_at, intersect, places_in_grid, slices, whole
from fusectl.optimizer.registry import find_state
from fusectl.optimizer.state import UNUSED, OptimizerState, is_state
from fusectl.sources.opened import recognized
from fusectl.system.lru import Cache


Array = npt.NDArray[Any]
# A kind of tensor that every layer has: what stands before its module, the stack, and what stands behind.
_Kind = tuple[str, str, str]
# What is kept of decoded chunks: from one that holds all layers each of them takes its part.
CACHE_BYTES = 64 << 20


class _Part(Protocol):
    """What a tensor as it is seen is made of: tensors of the source's."""

    @property
    def tensors(self) -> tuple[str, ...]: ...

    def seen(self, source: Checkpoint, name: str) -> Leaf:
        """The leaf as it is seen."""

    def read(self, source: Checkpoint, region: Region, chunks: _Chunks) -> Array:
        """The values of a region of it."""


@dataclass(frozen=True, slots=True)
class _Stack:
    """A tensor whose layers, along `axis`, are tensors of the source."""

    tensors: tuple[str, ...]
    axis: int

    def seen(self, source: Checkpoint, name: str) -> Leaf:
        dtypes = sorted({source.leaves[tensor].dtype for tensor in self.tensors})
        if len(dtypes) > 1:
            raise Incompatible(f"{source.path}: {name}: layers of {' and '.join(dtypes)}", hint="--dtype")
        return _seen(source.leaves[self.tensors[0]], name, self.axis, len(self.tensors))

    def read(self, source: Checkpoint, region: Region, _: _Chunks) -> Array:
        inside = (*region[: self.axis], *region[self.axis + 1 :])
        out = np.empty(tuple(map(len, region)), np_dtype(source.leaves[self.tensors[0]].dtype))
        for place, layer in enumerate(region[self.axis]):
            out[(slice(None),) * self.axis + (place,)] = source.read(self.tensors[layer], inside)
        return out


@dataclass(frozen=True, slots=True)
class _Layer:
    """A tensor that is one layer, along `axis`, of one of the source's."""

    tensors: tuple[str, ...]
    axis: int
    index: int

    def seen(self, source: Checkpoint, name: str) -> Leaf:
        return _seen(source.leaves[self.tensors[0]], name, self.axis, 0)

    def read(self, _: Checkpoint, region: Region, chunks: _Chunks) -> Array:
        there = (*region[: self.axis], range(self.index, self.index + 1), *region[self.axis :])
        return np.asarray(chunks.read(self.tensors[0], there).squeeze(self.axis), order="C")


@dataclass(frozen=True, slots=True)
class _Same:
    """A tensor of the source under another name."""

    tensors: tuple[str, ...]

    def seen(self, source: Checkpoint, name: str) -> Leaf:
        leaf = source.leaves[self.tensors[0]]
        return replace(leaf, name=name, keys=keys_beside(leaf.keys, name))

    def read(self, source: Checkpoint, region: Region, _: _Chunks) -> Array:
        return source.read(self.tensors[0], region)


class Restacked(View):
    """A checkpoint whose tensors have the names and shapes that another stacking of its layers gives them."""

    def __init__(
        self, source: Checkpoint, leaves: Mapping[str, Leaf], parts: Mapping[str, _Part], cache_bytes: int
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
    state.require_known(checkpoint.path, "--drop-optimizer leaves it out")
    layouts = _other_layout(tree, checkpoint.path)
    if any(module.stacked and not module.units for module in layouts.here):
        raise Incompatible(f"{checkpoint.path}: its layers are fewer than {layouts.family.name} stacks in turn")
    made = list(_made(tree, layouts))
    parts = {name: part for each in made for name, part in each.parts(state, checkpoint.path)}
    parts |= dict(_streams(layouts, shapes))
    gone = {tensor for part in parts.values() if part is not None for tensor in part.tensors}
    gone |= {name for each in made for name in each.slots_of_sources(state)}
    leaves = {name: checkpoint.leaves[name] for name in shapes if name not in gone}
    for name, part in parts.items():
        leaves[name] = _unused(name) if part is None else part.seen(checkpoint, name)
    return Restacked(checkpoint, leaves, {n: part for n, part in parts.items() if part is not None}, cache_bytes)


def _unused(name: str) -> Leaf:
    """A slot that is not in use, as T5X's Adafactor creates it."""
    value = np.zeros(UNUSED, np.float32)
    return Leaf(name, dict_keys(name), UNUSED, value.dtype.name, value=value)


@dataclass(frozen=True)
class _Made:
    """A parameter as it is to be seen, and the layers that it is made from: the source's parameters, and their places.

    A place is None where the source's is one layer. Names are without what the tree puts around them.
    """

    tree: Recognized
    here: str
    here_row: Row
    here_shape: tuple[int, ...]
    there: tuple[tuple[str, int | None], ...]

    @property
    def there_row(self) -> Row:
        """The row of the source's parameters."""
        return self.tree.rows[self.there[0][0]]

    def parts(self, state: OptimizerState, where: str) -> Iterator[tuple[str, _Part | None]]:
        """The full names of the parameter and its slots, and what they are made of: nothing for one not in use."""
        axes = tuple(self.here_row.spec.axes), tuple(self.there_row.spec.axes)
        yield self.tree.full(self.here), self._part(self.tree.full, *axes)
        for slot in state.moments(self.there[0][0]):
            name = state.slot_beside(self.there[0][0], self.here, slot)
            kept = _axes_of(state, slot, self.here_shape, self.here_row)
            if kept is None:
                yield name, None
                continue
            other, theirs = self._like(state, slot, kept, where)
            yield name, self._part(partial(state.slot, moment=other), kept, theirs)

    def slots_of_sources(self, state: OptimizerState) -> Iterator[str]:
        """The full names of all slots of the source's parameters, those not in use among them."""
        return (state.slot(parameter, slot) for parameter, _ in self.there for slot in state.moments(parameter))

    def _part(self, full: Callable[[str], str], here: tuple[str, ...], there: tuple[str, ...]) -> _Part:
        """What a tensor with the axes `here` is made of, whose source's have the axes `there`."""
        tensors, (_, place) = tuple(full(name) for name, _ in self.there), self.there[0]
        if "layers" in here:
            return _Stack(tensors, here.index("layers"))
        if place is None:
            return _Same((tensors[0],))
        return _Layer((tensors[0],), there.index("layers"), place)

    def _like(self, state: OptimizerState, slot: str, kept: tuple[str, ...], where: str) -> tuple[str, tuple[str, ...]]:
        """The source's slot that has the same axes but for the layers, whatever it is called, and its axes."""
        there = self.there[0][0]
        for other in state.moments(there):
            axes = _axes_of(state, other, self.tree.shapes[there], self.there_row)
            of_one_kind = state.is_first(other) == state.is_first(slot)
            if of_one_kind and axes is not None and _without_layers(axes) == _without_layers(kept):
                return other, axes
        # T5X factors a scanned kernel by its logical axes, whatever its size, and a kernel of two axes only if both are
        # at least 128 long (t5x/adafactor.py). Of narrow models one layout then has v_row and v_col where the other has
        # v, and v cannot be told from its means.
        raise Incompatible(
            f"{where}: {there}: {state.kind.capitalize()} factors it in one layout of its layers and not in the other",
            hint="--drop-optimizer leaves the state out",
        )


def _axes_of(state: OptimizerState, slot: str, shape: tuple[int, ...], row: Row) -> tuple[str, ...] | None:
    """The names of the axes that a slot has of a parameter of this shape; None for one that is not in use."""
    axes = state.axes_of(slot, shape, row.spec)
    return None if axes is None else tuple(row.spec.axes[axis] for axis in axes)


def _without_layers(axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis != "layers")


@dataclass(frozen=True, slots=True)
class _Module:
    """A module that layers are in: all of its units stacked, or one of them in each of its numbers.

    A unit is what one module is where layers are not stacked: a layer, or a pair of them. `units` are those that the
    module holds, in the order of its places or numbers.
    """

    pattern: str
    units: range
    stacked: bool

    def names(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names of the module, and the units in each."""
        if not self.stacked:
            yield from ((self.pattern.replace("#", str(i)), (unit,)) for i, unit in enumerate(self.units))
        elif self.units:
            yield self.pattern, tuple(self.units)

    def pieces(self, name: str) -> Iterator[tuple[_Kind, int, int | None]]:
        """What a tensor in it is, and of which unit, with its place if it is one of several."""
        number = re.escape(self.pattern).replace(r"\#", r"(?P<number>\d+)")
        found = re.fullmatch(rf"(?P<head>(?:.*/)?){number}(?P<tail>.*)", name)
        if found is None:
            return
        kind = found["head"], stack_of(self.pattern), found["tail"]
        if self.stacked:
            yield from ((kind, unit, place) for place, unit in enumerate(self.units))
        elif int(found["number"]) < len(self.units):
            yield kind, self.units[int(found["number"])], None


@dataclass(frozen=True)
class _Layouts:
    """The modules of a tree's layers as they are, and as the family has them whose layers are stacked otherwise."""

    family: Family
    there: tuple[_Module, ...]
    here: tuple[_Module, ...]

    def made(self, names: Iterable[str]) -> Iterator[tuple[str, bool, tuple[tuple[str, int | None], ...]]]:
        """The names that tensors in these modules have in the other layout, if they are stacked, and their pieces.

        What not all layers have is left as it is.
        """
        kinds: dict[_Kind, dict[int, tuple[str, int | None]]] = {}
        for name in names:
            for module in self.there:
                for kind, unit, place in module.pieces(name):
                    kinds.setdefault(kind, {})[unit] = name, place
        for (head, stack, tail), pieces in kinds.items():
            modules = [module for module in self.here if stack_of(module.pattern) == stack]
            if len(pieces) == sum(len(module.units) for module in modules):
                for module in modules:
                    for name, units in module.names():
                        yield f"{head}{name}{tail}", module.stacked, tuple(pieces[unit] for unit in units)


def _made(tree: Recognized, layouts: _Layouts) -> Iterator[_Made]:
    """Every parameter that another stacking of a tree's layers moves, as it is to be seen."""
    for name, _, there in layouts.made(tree.shapes):
        row, (like, _) = layouts.family.row_of(name), there[0]
        assert row is not None
        sizes = dict(zip(tree.rows[like].spec.axes, tree.shapes[like], strict=True)) | {"layers": len(there)}
        yield _Made(tree, name, row, tuple(sizes[axis] for axis in row.spec.axes), there)


def _streams(layouts: _Layouts, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, _Part]]:
    """Every stream of random numbers of a layer's, as it is to be seen: they are stacked along the first axis."""
    names = [name for name in shapes if is_stream(name) and not is_state(name)]
    for name, stacked, there in layouts.made(names):
        tensors, (_, place) = tuple(tensor for tensor, _ in there), there[0]
        if len({shapes[tensor] for tensor in tensors}) == 1:
            alone = _Same(tensors) if place is None else _Layer(tensors, 0, place)
            yield name, _Stack(tensors, 0) if stacked else alone


def _other_layout(tree: Recognized, where: str) -> _Layouts:
    """The other layout of a tree's layers.

    Raises Incompatible where no family is the same but for the axis `layers`.
    """
    # A table that stands in a file tells of one layout only, even if it is that of a family here.
    for family in FAMILIES if tree.family.table is None else ():
        layered, stacked = (family, tree.family) if tree.scanned else (tree.family, family)
        tails = _counterparts(layered, stacked)
        if tails:
            there, here = (tuple(_modules(each, tails, layered, stacked, tree)) for each in (tree.family, family))
            return _Layouts(family, there, here)
    raise Incompatible(
        f"{where}: {tree.family.name} has one layout of its layers only",
        hint="both are known of MaxText's families and of T5X's scalable ones",
    )


def _modules(
    family: Family, tails: Mapping[str, str], layered: Family, stacked: Family, tree: Recognized
) -> Iterator[_Module]:
    """The modules of a tree's layers as one of two families has them."""
    unit, turn = min(row.every for row in layered.rows), max(row.every for row in stacked.rows)
    found: dict[str, _Module] = {}
    for row in family.rows:
        for alternative in (each for each in row.alternatives if each in tails):
            pattern, depth = alternative.removesuffix(tails[alternative]), tree.depths[stack_of(alternative)]
            whole_turns = depth // turn * turn
            if row.behind:
                layers = range(whole_turns, depth)
            elif "layers" in row.spec.axes:
                layers = range(row.first, whole_turns, row.every)
            else:
                layers = range(row.first, depth, row.every)
            units = range(layers.start // unit, -(-layers.stop // unit), max(1, layers.step // unit))
            found.setdefault(pattern, _Module(pattern, units, "layers" in row.spec.axes))
    return iter(found.values())


def _counterparts(layered: Family, stacked: Family) -> dict[str, str]:
    """For the patterns of two families' tensors of layers what of each is the tensor's own name within a layer.

    Nothing if any has no partner: the same of all layers, of every so many together, or of those that remain.
    """
    stacks = {alternative: row for row in stacked.rows for alternative in row.alternatives}
    tails: dict[str, str] = {}
    for row in layered.rows:
        for alternative in row.alternatives:
            head, _, tail = alternative.partition("/layers_#/")
            partner = re.compile(rf"{re.escape(head)}/(?:[^/]+/){{1,2}}{re.escape(tail)}" if tail else re.escape(head))
            found = [
                name for name, other in stacks.items() if partner.fullmatch(name) and _of_layers(other) == bool(tail)
            ]
            others = [stacks.pop(name) for name in found]
            # The scanned modules have to add up to what the layered row covers: two halves of Gemma 2's pairs, six
            # sixths of Gemma 3's. One partner too few would leave its layers behind without a word.
            share = sum(Fraction(1, other.every) for other in others if not other.behind)
            if share != Fraction(1, row.every) or any(_without_layers(o.spec.axes) != row.spec.axes for o in others):
                return {}
            tails |= dict.fromkeys([*found, alternative], tail) if tail else {}
    return {} if stacks else tails


def _of_layers(row: Row) -> bool:
    """Whether a row of a family whose layers are stacked is of layers: stacked ones, or those that remain."""
    return "layers" in row.spec.axes or row.behind


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
    keys, shape = keys_beside(leaf.keys, name), with_axis(leaf.shape, layers)
    seen = Leaf(name, keys, shape, leaf.dtype, stored=stored, random_key=leaf.random_key)
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
        # Whole chunks are read: one that holds all layers would otherwise be decoded once for each of them.
        for index in places_in_grid(region, leaf.chunks):
            chunk = chunk_at(index, leaf.chunks, leaf.shape)
            met = intersect(chunk, region)
            assert met is not None
            values = self._cache.get((tensor, index), partial(self._source.read, tensor, chunk))
            out[slices(met, region)] = values[slices(met, chunk)]
        return out
