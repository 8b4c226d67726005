"""What an output tensor is made of: blocks of scaled source regions and noise, and zeros elsewhere.

    out[block.at] = sum of the block's terms          a Term takes a region of a source tensor,
    out[elsewhere] = 0                                a Noise a region of the output's own noise field,
                                                      a Product means of source tensors over some of their axes
                                                      a Mapped a region of a source tensor, its axes expanded

Everything here is integers and names: no arrays, no paths. Regions are tuples of ranges, one per axis:

    fused kernel (embed, mlp) of A (2, 3) and B (4, 5)

             mlp 0..3   mlp 3..8
    embed   ┌─────────┬────────────┐      Block((range(0, 2), range(0, 3)), (Term(0, name, A's all),))
     0..2   │    A    │            │      Block((range(2, 6), range(3, 8)), (Term(1, name, B's all),))
            ├─────────┼────────────┤
     2..6   │         │     B      │
            └─────────┴────────────┘
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self


Region = tuple[range, ...]


def whole(shape: tuple[int, ...]) -> Region:
    """The region that covers a tensor of this shape.

    >>> whole((2, 3))
    (range(0, 2), range(0, 3))
    """
    return tuple(range(n) for n in shape)


def size(region: Region) -> int:
    """The number of elements in a region.

    >>> size((range(2, 5), range(4)))
    12
    """
    return math.prod(len(r) for r in region)


def slices(region: Region, within: Region | None = None) -> tuple[slice, ...]:
    """A region as the index of an array; of an array that holds `within`, counted from there.

    >>> slices((range(5, 7),), (range(4, 9),))
    (slice(1, 3, None),)
    """
    if within is None:
        return tuple(slice(r.start, r.stop) for r in region)
    return tuple(slice(r.start - w.start, r.stop - w.start) for r, w in zip(region, within, strict=True))


def intersect(a: Region, b: Region) -> Region | None:
    """What two regions share, or None.

    >>> intersect((range(0, 5),), (range(3, 9),)), intersect((range(0, 3),), (range(3, 9),))
    ((range(3, 5),), None)
    """
    both = tuple(range(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True))
    # Scalars have no axis along which they could miss each other.
    return both if all(both) or not both else None


def shifted(region: Region, by: Region, to: Region) -> Region:
    """`region`, which lies in `by`, moved to where `by` is laid onto `to` (equal shapes).

    >>> shifted((range(5, 7),), (range(4, 9),), (range(0, 5),))
    (range(1, 3),)
    """
    return tuple(
        range(r.start - x.start + y.start, r.stop - x.start + y.start) for r, x, y in zip(region, by, to, strict=True)
    )


def tiles(shape: tuple[int, ...], tile: tuple[int, ...]) -> Iterator[Region]:
    """The regions of a grid of `tile`s over `shape` in C order, the last ones cut at the edge.

    >>> list(tiles((5,), (3,)))
    [(range(0, 3),), (range(3, 5),)]
    """

    def along(axis: int) -> Iterator[Region]:
        if axis == len(shape):
            yield ()
            return
        for start in range(0, shape[axis], tile[axis]):
            head = range(start, min(start + tile[axis], shape[axis]))
            for rest in along(axis + 1):
                yield (head, *rest)

    return along(0)


def tiles_in(region: Region, tile: tuple[int, ...]) -> Iterator[Region]:
    """The regions of a grid of `tile`s that starts with `region`, the last ones cut at its edge.

    >>> list(tiles_in((range(4, 9),), (3,)))
    [(range(4, 7),), (range(7, 9),)]
    """
    for inner in tiles(tuple(map(len, region)), tile):
        yield tuple(range(r.start + i.start, r.start + i.stop) for r, i in zip(region, inner, strict=True))


def place_in_grid(chunk: Region, chunks: tuple[int, ...]) -> tuple[int, ...]:
    """The place in the grid of the chunk that a region is, or starts in.

    >>> place_in_grid((range(6, 9), range(0, 2)), (3, 2))
    (2, 0)
    """
    return tuple(r.start // c for r, c in zip(chunk, chunks, strict=True))


def places_in_grid(region: Region, chunks: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The places in the grid of all chunks that a region meets.

    >>> list(places_in_grid((range(4, 9),), (3,)))
    [(1,), (2,)]
    """
    return itertools.product(*(range(r.start // c, -(-r.stop // c)) for r, c in zip(region, chunks, strict=True)))


def chunk_at(index: tuple[int, ...], chunks: tuple[int, ...], shape: tuple[int, ...]) -> Region:
    """The region of the chunk at a place in the grid, cut at the tensor's edge.

    >>> chunk_at((1,), (3,), (5,))
    (range(3, 5),)
    """
    return tuple(range(i * c, min((i + 1) * c, n)) for i, c, n in zip(index, chunks, shape, strict=True))


def common_tile(shape: tuple[int, ...], grids: Sequence[tuple[int, ...]], most: int) -> tuple[int, ...]:
    """The tile that holds whole chunks of all grids over `shape`, so that each is decoded about once.

    Grids that cut across each other may need more than `most` elements for that; then it is the first grid's chunk.

    >>> common_tile((8, 8), [(8, 2), (4, 4)], 32), common_tile((8, 8), [(8, 1), (1, 8)], 32)
    ((8, 4), (8, 1))
    """
    tile = tuple(max(1, min(n, max(edges))) for n, *edges in zip(shape, *grids, strict=True))
    if math.prod(tile) <= most:
        return tile
    return tuple(max(1, min(n, edge)) for n, edge in zip(shape, grids[0], strict=True))


class Summand:
    """What the values of a block are a sum of. It answers what it reads and holds; evaluators compute it.

    To add one, write a subclass here, and an evaluator in writing/evaluators.py; testing/evaluate.py has another, which
    the first one is held against. What it reads is there when it is evaluated if it is `copied`; what `is_kept` reads
    itself, within the memory that it says.
    """

    __slots__ = ()
    # Sums in float64 depend on their order: summands are added in that of this number.
    rank: ClassVar[int] = 0
    # Whether it is noise, which is rounded to the output's dtype before it is added, as what it is added to.
    is_random: ClassVar[bool] = False
    # Whether it is computed for a whole chunk at once, and kept for other layers.
    is_kept: ClassVar[bool] = False

    @property
    def adds(self) -> bool:
        """Whether it changes the sum."""
        return True

    @property
    def copied(self) -> Term | None:
        """The Term that it is, if it is values of a source as they are or scaled."""
        return None

    @property
    def sources(self) -> tuple[Term, ...]:
        """The terms that it reads, as they are or mapped."""
        return ()

    @property
    def kernels(self) -> tuple[tuple[Term, int | None], ...]:
        """The kernels that are measured for it, each with the axis along which several are stacked in it."""
        return ()

    @property
    def means(self) -> tuple[Mean, ...]:
        """The means that are computed for it."""
        return ()

    def held(self, part: Region, at: Region) -> int:  # noqa: ARG002
        """The elements in float64 that are in memory while a part of the block `at` is made of it, next to its sum."""
        return 0

    def read_for(self, part: Region, at: Region) -> Region:  # noqa: ARG002
        """The region of its source's tensor that is read for a part of the block `at` while that is made."""
        return ()

    def has_shape(self, at: Region) -> bool:  # noqa: ARG002
        """Whether its values have the shape of the block `at`, as far as it tells."""
        return True

    def moved(self, axis: int, by: int) -> Self:  # noqa: ARG002
        """The same where the output's tensor stands later along an axis of a larger one."""
        return self


@dataclass(frozen=True, slots=True)
class Term(Summand):
    """`scale * sources[source][tensor][region]`; with `must_be_zero`, a region that is only checked to hold zeros."""

    source: int
    tensor: str
    region: Region
    scale: float = 1.0
    must_be_zero: bool = False

    @property
    def adds(self) -> bool:
        """See Summand."""
        return not self.must_be_zero

    @property
    def copied(self) -> Term | None:
        """See Summand."""
        return self

    @property
    def sources(self) -> tuple[Term, ...]:
        """See Summand."""
        return (self,)

    def has_shape(self, at: Region) -> bool:
        """See Summand."""
        return tuple(map(len, self.region)) == tuple(map(len, at))


@dataclass(frozen=True, slots=True)
class Noise(Summand):
    """`scale * std(like) * field[region]`, from the output tensor's field of unit normal noise (noise.py).

    `like` is the kernel whose standard deviation the noise is relative to. Where the tensor stacks kernels along an
    axis, `stacked_axis`, each of them has its own.
    """

    region: Region
    like: Term
    scale: float
    stacked_axis: int | None = None

    rank: ClassVar[int] = 1
    # Noise is a summand and not a fill of what no block covers: so antisymmetric noise, which is taken off a source's
    # own block, and noise-fill, which adds to a finished fusion, need no mechanism of their own.
    is_random: ClassVar[bool] = True

    @property
    def kernels(self) -> tuple[tuple[Term, int | None], ...]:
        """See Summand."""
        return ((self.like, self.stacked_axis),)

    def has_shape(self, at: Region) -> bool:
        """See Summand."""
        return tuple(map(len, self.region)) == tuple(map(len, at))

    def moved(self, axis: int, by: int) -> Self:
        """See Summand: it is another region of the larger tensor's field."""
        own = self.region[axis]
        region = (*self.region[:axis], range(own.start + by, own.stop + by), *self.region[axis + 1 :])
        return replace(self, region=region)


@dataclass(frozen=True, slots=True)
class Expansion:
    """A matrix (large, small) that an axis is multiplied with, kept in a tensor of the source `source`.

    Of a tensor of several it is the one at `index`. Each of its entries stands for so many neighbours, `repeat`, each
    of which is mapped to its like: heads to heads, their features kept. Inputs are multiplied with `inverse`: the
    transposed pseudo-inverse of what outputs are multiplied with.
    """

    axis: int
    source: int
    tensor: str
    index: int | None = None
    repeat: int = 1
    inverse: bool = False


@dataclass(frozen=True, slots=True)
class Mapped(Summand):
    """A Term whose values, `added` to each of them, are multiplied with a matrix along each of some axes.

    The block is as long as the matrix there; along all other axes as the term's region.
    """

    term: Term
    expansions: tuple[Expansion, ...]
    added: float = 0.0

    is_kept: ClassVar[bool] = True

    @property
    def sources(self) -> tuple[Term, ...]:
        """See Summand."""
        return (self.term,)

    def read_for(self, part: Region, at: Region) -> Region:
        """See Summand."""
        mapped = {each.axis for each in self.expansions}
        return tuple(
            theirs if axis in mapped else range(r.start - own.start + theirs.start, r.stop - own.start + theirs.start)
            for axis, (r, own, theirs) in enumerate(zip(part, at, self.term.region, strict=True))
        )

    def held(self, part: Region, at: Region) -> int:
        """See Summand: what is read, on its way, and the sum."""
        sizes = [len(r) for r in self.read_for(part, at)]
        held = largest = math.prod(sizes)
        for axis in self.order(part):
            sizes[axis] = len(part[axis])
            largest = max(largest, held + math.prod(sizes))
            held = math.prod(sizes)
        return largest + size(part)

    def order(self, part: Region) -> list[int]:
        """The axes in the order in which they are multiplied: those that grow least come first."""
        # What grows little leaves the array small for the products that follow, in memory and in operations.
        axes = [each.axis for each in self.expansions]
        return sorted(axes, key=lambda axis: len(part[axis]) / len(self.term.region[axis]))


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of a source's tensor over the axes `over`; it has the others, in their order."""

    source: int
    tensor: str
    over: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Factor:
    """A Mean to a power. Its own axes lie along the axes `axes` of the output tensor."""

    mean: Mean
    axes: tuple[int, ...]
    power: float


@dataclass(frozen=True, slots=True)
class Product(Summand):
    """`scale` times a product of factors, each of which starts where its block does.

    It is zero where a factor would be divided by zero.
    """

    factors: tuple[Factor, ...]
    scale: float

    rank: ClassVar[int] = 2

    @property
    def means(self) -> tuple[Mean, ...]:
        """See Summand."""
        return tuple(factor.mean for factor in self.factors)


def is_computed(terms: Sequence[Summand]) -> bool:
    """Whether a sum of terms is anything but one source region as it is.

    >>> term = Term(0, "w", whole((2,)))
    >>> is_computed([term]), is_computed([term, term])
    (False, True)
    """
    return len(terms) != 1 or (copied := terms[0].copied) is None or copied.scale != 1.0


@dataclass(frozen=True, slots=True)
class Block:
    """The rectangle `at` of an output tensor and the terms whose sum stands there."""

    at: Region
    terms: tuple[Summand, ...]

    def reads(self, part: Region) -> Iterator[tuple[Term, Region]]:
        """The terms that a part of the block is made of as they are, and the regions of their tensors that it needs."""
        copied = (term.copied for term in self.terms)
        return ((term, shifted(part, self.at, term.region)) for term in copied if term is not None)

    @property
    def taken(self) -> Term:
        """The Term that it is, of a block that is one source region as it is."""
        (summand,) = self.terms
        term = summand.copied
        assert term is not None
        return term

    @property
    def sources(self) -> Iterator[Term]:
        """The terms that read a source, as it is or mapped."""
        for summand in self.terms:
            yield from summand.sources


def recurring_noise(blocks: Sequence[Block]) -> frozenset[Region]:
    """The regions of noise that stand in more than one place: added in one, taken off in another."""
    times = Counter(term.region for block in blocks for term in block.terms if isinstance(term, Noise))
    return frozenset(region for region, n in times.items() if n > 1)


@dataclass(frozen=True, slots=True)
class Layout:
    """One output tensor: its axes' names, shape and dtype, and its disjoint blocks. What no block covers is zero."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    blocks: tuple[Block, ...]

    @property
    def covered(self) -> int:
        """The number of elements that some block covers."""
        return sum(size(block.at) for block in self.blocks)

    def problems(self) -> Iterator[str]:
        """What is wrong with it: blocks outside the tensor, overlapping blocks, terms of another shape."""
        edge = whole(self.shape)
        for block in self.blocks:
            if len(block.at) != len(edge) or any(r.start < 0 or r.stop > e.stop for r, e in zip(block.at, edge)):  # noqa: B905
                yield f"block {block.at} leaves the tensor of shape {self.shape}"
            for term in block.terms:
                if not term.has_shape(block.at):
                    yield f"block {block.at} is given a region of another shape: {term}"
        for a, b in _neighbours(self.blocks):
            if intersect(a.at, b.at):
                yield f"blocks {a.at} and {b.at} overlap"


def _neighbours(blocks: tuple[Block, ...]) -> Iterator[tuple[Block, Block]]:
    """The pairs of blocks that meet along the first axis: all that can overlap."""
    # Blocks are compared along a sweep: a fusion of K sources with noise has K**2 of them in a tensor, and a deep model
    # hundreds of tensors, so that comparing all pairs would cost K**4 for each.
    reaching: list[Block] = []
    for block in sorted(blocks, key=lambda b: b.at[0].start if b.at else 0):
        reaching = [other for other in reaching if not block.at or other.at[0].stop > block.at[0].start]
        for other in reaching:
            yield other, block
        reaching.append(block)
