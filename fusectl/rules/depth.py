"""Depth: which layer of a model each layer of a deeper one is made from.

    stack        0 1 2 0 1 2      layer l is layer l mod L1: the whole stack again (StackBERT; LiGO, proposition 1)
    interleave   0 0 1 1 2 2      layer l is layer floor(l L1 / L2): each layer again (interpolation, ibid.)
    identity     0 - 1 - 2 -      as interleave, but only the first of each run adds to the residual stream: what writes
                                  it is zero in the others, so that the function is kept, and they learn (LLaMA Pro)

Where layers attend in turns, by windows of their own, whole turns are one layer here; what remains stays at the end.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import assert_never

from fusectl.errors import Incompatible, UsageError, shorten
from fusectl.families.recognized import Recognized
from fusectl.families.table import stack_of
from fusectl.layout.blocks import Block, Layout, Product, Region, Term, whole
from fusectl.rules.kinds import How


@dataclass(frozen=True, slots=True)
class Depth:
    """For each layer of a stack the one that it is made from, and which of them add nothing to the residual stream."""

    layers: tuple[int, ...]
    idle: frozenset[int] = frozenset()


def arrangement(how: str, now: int, then: int, turn: int = 1) -> Depth:
    """The Depth of a stack that grows from `now` to `then` layers, `turn` of which attend in turn.

    Both have as many behind the last whole turn.

    >>> arrangement("stack", 2, 5).layers, arrangement("interleave", 2, 5).layers
    ((0, 1, 0, 1, 0), (0, 0, 0, 1, 1))
    >>> sorted(arrangement("identity", 2, 5).idle)
    [1, 2, 4]
    """
    old, new = now // turn, then // turn
    # Rounding down spreads new layers evenly: runs differ in length by one layer at most.
    in_order = [i * old // new for i in range(new)]
    again: set[int] = set()
    match How(how):
        case How.STACK:
            runs = [i % old for i in range(new)]
        case How.INTERLEAVE:
            runs = in_order
        case How.IDENTITY:
            runs = in_order
            # The first of a run is the one that stays: it sees the stream that its original saw. Zeroing only what
            # writes the stream is enough, and leaves the other kernels useful: the zeros get gradients at the first
            # step, since what they read is not zero, and a block of nothing but zeros would never get any.
            again = {i for i in range(1, new) if runs[i] == runs[i - 1]}
        case other:
            assert_never(other)
    # Gemma 3 of a depth that is no multiple of six has layers behind its last whole turn. They stay last, since the new
    # depth has as many, and the network attends by a layer's number.
    layers = (*(run * turn + k for run in runs for k in range(turn)), *range(old * turn, now))
    return Depth(layers, frozenset(i * turn + k for i in again for k in range(turn)))


def deepen(tree: Recognized, how: str, then: Mapping[str, int], where: str) -> Deepening:
    """The Deepening of a tree whose stacks become as deep as `then` says; raises Incompatible where they cannot."""
    if how not in set(How):
        raise UsageError(f"--how {how}: {', '.join(How)}")
    problems = problems_of_depths(tree, then)
    if problems:
        raise Incompatible(f"{where}: depths that it cannot grow to", details=problems)
    turn = turn_of(tree)
    depths = {stack: arrangement(how, n, then.get(stack, n), turn) for stack, n in tree.depths.items()}
    deepening = Deepening(tree, tree.resized({}, then), depths)
    without = list(deepening.without_source())
    if without:
        raise Incompatible(f"{where}: layers that do not have the same tensors", details=shorten(without))
    return deepening


def problems_of_depths(tree: Recognized, then: Mapping[str, int]) -> list[str]:
    """Why stacks cannot become as deep as `then` says, in words; nothing where they can."""
    unknown = sorted(then.keys() - tree.depths.keys())
    if unknown:
        return [f"{tree.family.name} has no {stack}" for stack in unknown]
    problems = []
    turn = turn_of(tree)
    for stack, n in then.items():
        now = tree.depths[stack]
        if n < now:
            problems.append(f"{stack}: {n} layers are fewer than its {now}; layers are added, never taken away")
        # A layer that moves to another place in the cycle would be given another window and other rotary frequencies
        # than those that it was trained with.
        elif (n - now) % turn or (n > now and now < turn):
            problems.append(f"{stack}: from {now} to {n} layers, which attend in turns of {turn}: by whole turns only")
    return problems


def turn_of(tree: Recognized) -> int:
    """After how many layers another one is like the first, by how they attend and how they are kept."""
    return math.lcm(len(tree.network.attending), *(row.every for row in tree.rows.values()))


@dataclass(frozen=True)
class Piece:
    """One layer of a tensor of the grown tree, at `place` along its axis `layers`, and the one that it is made from.

    Places are None where each layer is a tensor of its own, and in tensors that are of no layer.
    """

    place: int | None
    parameter: str
    source_place: int | None
    # Whether its layer adds nothing, and whether it is by this tensor that it does not.
    in_idle_layer: bool
    idle: bool


@dataclass(frozen=True)
class Deepening:
    """A tree, the deeper one, and how the layers of each of its stacks are arranged."""

    tree: Recognized
    grown: Recognized
    depths: Mapping[str, Depth]

    def pieces(self, parameter: str) -> Iterator[Piece]:
        """What a parameter of the grown tree is made from, in the order of its layers."""
        row = self.grown.rows[parameter]
        if not row.is_of_layers(parameter):
            yield Piece(None, parameter, None, in_idle_layer=False, idle=False)
            return
        depth = self.depths[stack_of(parameter)]
        for place, layer in enumerate(self.grown.layers_of(parameter)):
            name, source_place = self._where[row.alternative(parameter), depth.layers[layer]]
            idle = layer in depth.idle
            yield Piece(
                place if "layers" in row.spec.axes else None, name, source_place, idle, idle and row.writes_stream
            )

    def without_source(self) -> Iterator[str]:
        """The parameters of the grown tree of which a layer is made from one that has no such parameter."""
        for parameter, row in self.grown.rows.items():
            if row.is_of_layers(parameter):
                layers = self.depths[stack_of(parameter)].layers
                missing = [
                    layers[layer]
                    for layer in self.grown.layers_of(parameter)
                    if (row.alternative(parameter), layers[layer]) not in self._where
                ]
                yield from (f"{parameter}: none in layer {layer}" for layer in missing)

    @cached_property
    def _where(self) -> Mapping[tuple[str | None, int], tuple[str, int | None]]:
        """The parameter of the source that a layer of a kind is kept in, and the layer's place in it."""
        found = {}
        for name, row in self.tree.rows.items():
            if row.is_of_layers(name):
                stacked = "layers" in row.spec.axes
                for place, layer in enumerate(self.tree.layers_of(name)):
                    found[row.alternative(name), layer] = name, place if stacked else None
        return found

    def layout(self, parameter: str, dtype: str) -> Layout:
        """The Layout of a parameter of the grown tree."""
        row, shape = self.grown.rows[parameter], self.grown.shapes[parameter]
        # A norm that multiplies with 1 + scale adds nothing where that is zero.
        minus_one = (Product((), -1.0),) if row.is_norm and self.tree.network.norm_adds_one else ()
        pieces = list(self.pieces(parameter))
        idle = [
            Block(_at(_span(piece.place, piece.place), row.spec.axes, shape), minus_one)
            for piece in pieces
            if piece.idle and minus_one
        ]
        # Idle layers of other families need no block at all: what no block covers is zero.
        moved = blocks_of([piece for piece in pieces if not piece.idle], row.spec.axes, shape, self.tree.full)
        return Layout(row.spec.axes, shape, dtype, (*moved, *idle))

    def streams(
        self, shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, str, tuple[int, ...], tuple[Block, ...]]]:
        """Name, that of the source's that it is like, shape and blocks of the streams of random numbers.

        `shapes` are those of the source's. A layer's go along with it: by its number, or along the first axis. What
        not all layers have is what they share, and stays where it is.
        """
        modules = list(_modules(self.tree))
        for name, shape in shapes.items():
            module, found = next(((m, it) for m in modules if (it := m.pattern.fullmatch(name))), (None, None))
            as_it_is = name, name, shape, (_moved(name, whole(shape), whole(shape)),)
            if module is None or found is None:
                yield as_it_is
                continue
            now, then = (each.depths[module.stack] // module.every for each in (self.tree, self.grown))
            layers = [layer // module.every for layer in self.depths[module.stack].layers[:: module.every]][:then]
            if module.numbered:
                names = [f"{found['head']}{i}{found['tail']}" for i in range(max(now, then))]
                if not all(each in shapes for each in names[:now]):
                    yield as_it_is
                elif name == names[0]:
                    for to, layer in zip(names[:then], layers, strict=True):
                        yield to, names[layer], shape, (_moved(names[layer], whole(shape), whole(shape)),)
            elif shape[:1] == (now,):
                rest = whole(shape[1:])
                blocks = (_moved(name, (_one(i), *rest), (_one(layer), *rest)) for i, layer in enumerate(layers))
                yield name, name, (then, *shape[1:]), tuple(blocks)
            else:
                yield as_it_is


@dataclass(frozen=True)
class _Module:
    """A module that layers of a stack are in: each in one of its own, by its number, or all of them."""

    pattern: re.Pattern[str]
    numbered: bool
    stack: str
    # How many layers each of its places is.
    every: int


def _modules(tree: Recognized) -> Iterator[_Module]:
    """The modules that a tree's layers are in, but for those behind others, which stay as they are."""
    found: dict[tuple[bool, str, int], list[str]] = {}
    for row in dict.fromkeys(tree.rows.values()):
        for alternative in () if row.behind else row.alternatives:
            if "#" in alternative or "layers" in row.spec.axes:
                found.setdefault(("#" in alternative, stack_of(alternative), row.every), []).append(alternative)
    for (numbered, stack, every), alternatives in found.items():
        heads = {each.partition("#")[0] for each in alternatives} if numbered else {posixpath.commonpath(alternatives)}
        for head in heads:
            number = r"(?P<number>\d+)" if numbered else ""
            yield _Module(
                re.compile(rf"(?P<head>(?:.*/)?{re.escape(head)}){number}(?P<tail>/.*)"), numbered, stack, every
            )


def blocks_of(
    pieces: Sequence[Piece], axes: tuple[str, ...], shape: tuple[int, ...], full: Callable[[str], str]
) -> tuple[Block, ...]:
    """The blocks that pieces make in a tensor of these axes; neighbours that were neighbours are one."""
    # A chunk is taken over from a source only where one block holds all of it, and a chunk of scanned layers may hold
    # all of them. A block for each layer would have every such chunk decoded and put together again.
    runs: list[list[Piece]] = []
    for piece in pieces:
        last = runs[-1][-1] if runs else None
        if last is not None and _follows(piece, last):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return tuple(
        _moved(full(run[0].parameter), _at(_span(run[0].place, run[-1].place), axes, shape), there)
        for run in runs
        for there in [_at(_span(run[0].source_place, run[-1].source_place), axes, shape)]
    )


def _one(place: int) -> range:
    return range(place, place + 1)


def _moved(tensor: str, at: Region, region: Region) -> Block:
    """The block that is a region of a tensor of the source's."""
    return Block(at, (Term(0, tensor, region),))


def _follows(piece: Piece, last: Piece) -> bool:
    if piece.place is None or last.place is None or piece.source_place is None or last.source_place is None:
        return False
    return (piece.parameter, piece.place - last.place, piece.source_place - last.source_place) == (last.parameter, 1, 1)


def _span(first: int | None, last: int | None) -> range | None:
    return None if first is None or last is None else range(first, last + 1)


def _at(layers: range | None, axes: tuple[str, ...], shape: tuple[int, ...]) -> Region:
    """The region of these layers in a tensor of these axes; all of it where it has none."""
    return tuple(
        layers if axis == "layers" and layers is not None else range(n) for axis, n in zip(axes, shape, strict=True)
    )
