"""How the tensors of an output are cut and stored: their chunks, codecs, and the units of work.

Chunks that can be taken over from a source as they are decide; all others follow from the memory budget.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from fusectl.formats.encoding import ZSTD_LEVEL, Encoding
from fusectl.formats.tree import READ_COPIES, Leaf
from fusectl.formats.zarr import Storage, new_storage, np_dtype
from fusectl.layout import Block, Layout, Noise, Region, Term, is_computed, size


CODECS = ("auto", "zstd", "none")
# T5X's limit for a chunk; readers of larger ones need memory for a whole one at once.
LARGEST_CHUNK_BYTES = 64 << 20
# And below this a chunk costs more to handle than to hold.
SMALLEST_CHUNK_BYTES = 64 << 10
# What a chunk of the output takes while it is written: itself and its encoded bytes, and for an OCDBT database those
# once more in one piece and once in a transaction.
WRITE_COPIES, OCDBT_COPIES = 2, 2
# With those that are read for it, the chunks that must fit into the budget twice, so that two threads have work.
CHUNKS_AT_ONCE = WRITE_COPIES + 2 * READ_COPIES
# Larger ones are not written into an OCDBT database in one piece: it takes four times their size.
LARGEST_VALUE_BYTES = 32 << 20
# A chunk that is larger than the budget is worked on alone, up to this much more; beyond, the budget is an error.
TOLERATED_EXCESS_BYTES = 224 << 20


@dataclass(frozen=True, slots=True)
class Storing:
    """What decides how tensors are stored: the target's layout, the codec that was asked for, the memory budget."""

    zarr: int
    codec: str
    budget_bytes: int
    ocdbt: bool = False
    sparse: bool = False
    # Whether chunks that are taken over are going to be references to the sources' data files.
    refers: bool = False
    passthrough: bool = True

    def choose(
        self, layout: Layout, leaves: Mapping[Term, Leaf], like: Leaf | None
    ) -> tuple[Storage, frozenset[Block]]:
        """How a tensor is stored, and which blocks then consist of their sources' own chunks.

        Of the ways in which the sources are stored it is the one that takes over most bytes unread; if none takes over
        any, chunks like those of `like`, anew. `leaves` has the source tensor of each term.
        """
        noisy = any(isinstance(term, Noise) for block in layout.blocks for term in block.terms)
        # Noise does not compress, and a compressed source has to be decoded for it in any case.
        wanted = ("none" if noisy else None) if self.codec == "auto" else self.codec
        ways = dict.fromkeys(way for leaf in leaves.values() if (way := self._way(leaf, layout, wanted)) is not None)
        best = max(
            ((way, self._passed(layout, leaves, way)) for way in ways),
            key=lambda found: sum(size(block.at) for block in found[1]),
            default=None,
        )
        if best is not None and best[1]:
            return best
        chunks = choose_chunks(layout, like.chunks if like else None, self.budget_bytes)
        # Trained weights and noise lose a tenth of their size to zstd, and most of the speed of writing and restoring.
        # Zeros that are to be stored are another matter.
        codec = wanted or ("zstd" if layout.covered < math.prod(layout.shape) and not self.sparse else "none")
        encoding = Encoding(codec, ZSTD_LEVEL if codec == "zstd" else 0, crc32c=self.zarr == 3)
        return new_storage(self.zarr, chunks, layout.dtype, encoding), frozenset()

    def unit(
        self, layout: Layout, chunks: tuple[int, ...], sources: Sequence[Leaf], passed: Collection[Block]
    ) -> tuple[tuple[int, ...], int]:
        """The unit of work, and the memory that it takes.

        That is the whole tensor if the budget holds two, so that sources are read once; else whole output chunks,
        enough to read an aligned source chunk once; else, and where all chunks are taken over, one of them. `sources`
        are the tensors that go in, each once.
        """
        chunk_bytes = math.prod(chunks) * np_dtype(layout.dtype).itemsize
        writing = chunk_bytes * (WRITE_COPIES + OCDBT_COPIES * self.ocdbt)
        if len(passed) == len(layout.blocks):
            zeros_are_written = layout.covered < math.prod(layout.shape) and not self.sparse
            by_value = self.ocdbt and not self.refers
            return chunks, writing if zeros_are_written or by_value else chunk_bytes * READ_COPIES * bool(passed)
        encoded = max((math.prod(s.chunks) * s.itemsize for s in sources), default=0)
        # A chunk that is taken over, of which one may be a shard of many, is read beside what is computed.
        encoded = max(encoded, chunk_bytes * READ_COPIES if passed else 0)
        at_once = sum(s.nbytes for s in sources) + encoded + writing
        if at_once <= self.budget_bytes // 2:
            return layout.shape, at_once
        wide = chunks
        for source in sources:
            wide = tuple(
                c * math.ceil(min(s, n) / c) if s > w else w
                for n, c, s, w in zip(layout.shape, chunks, source.chunks, wide, strict=True)
            )

        def cost(tile: tuple[int, ...]) -> int:
            reading = (_touched(tile, s.chunks, layout.shape) * s.itemsize for s in sources)
            return max(max(reading, default=0) * READ_COPIES, encoded) + writing

        tile = wide if cost(wide) <= self.budget_bytes + TOLERATED_EXCESS_BYTES else chunks
        return tile, cost(tile)

    def _way(self, leaf: Leaf, layout: Layout, compressor: str | None) -> Storage | None:
        """How the target would store a source's chunks as they are; None if it cannot, or if that is not wanted."""
        if not self.passthrough or leaf.stored is None or leaf.dtype != layout.dtype:
            return None
        if (
            self.ocdbt
            and not self.refers
            and math.prod(leaf.stored.storage.chunks) * leaf.itemsize > LARGEST_VALUE_BYTES
        ):
            return None
        way = leaf.stored.storage.in_zarr(self.zarr, leaf.dtype)
        if compressor is None or way is None:
            return way
        as_wanted = way.encoding is not None and way.encoding.like(Encoding(compressor, crc32c=self.zarr == 3))
        return way if as_wanted else None

    def _passed(self, layout: Layout, leaves: Mapping[Term, Leaf], way: Storage) -> frozenset[Block]:
        return frozenset(
            block
            for block in layout.blocks
            if not is_computed(block.terms)
            for term in block.terms
            if isinstance(term, Term) and not term.must_be_zero and term in leaves
            for leaf in [leaves[term]]
            for own in [self._way(leaf, layout, None)]
            if own is not None and own.like(way)
            if _same_grid(block.at, layout.shape, term.region, leaf.shape, way.chunks)
        )


def _same_grid(
    at: Region, shape: Sequence[int], region: Region, source_shape: Sequence[int], chunks: Sequence[int]
) -> bool:
    """Whether the chunks of a tensor in the region `at` are those of a source in `region`.

    Both start with a chunk, and end with a whole one or with the one that is cut at the tensor's edge.
    """
    return all(
        a.start % c == 0 and r.start % c == 0 and (a.stop % c == 0 or (a.stop == n and r.stop == m))
        for a, n, r, m, c in zip(at, shape, region, source_shape, chunks, strict=True)
    )


def choose_chunks(layout: Layout, source_chunks: Sequence[int] | None, budget_bytes: int) -> tuple[int, ...]:
    """The chunk shape of a tensor that is encoded anew: the source's where the blocks' edges allow.

    Chunks stay below 64 MiB, and small enough for the budget to hold what two threads work on.
    """
    itemsize = np_dtype(layout.dtype).itemsize
    fitting = max(SMALLEST_CHUNK_BYTES, budget_bytes // (2 * CHUNKS_AT_ONCE))
    limit = max(1, min(LARGEST_CHUNK_BYTES, fitting) // itemsize)
    chunks = list(layout.shape if source_chunks is None or len(source_chunks) != len(layout.shape) else source_chunks)
    for axis, (n, edges) in enumerate(zip(layout.shape, _edges(layout), strict=True)):
        chunk = max(1, min(chunks[axis], n))
        common = reduce(math.gcd, edges, n)
        if common % chunk:
            fitting = max((d for d in _divisors(common) if d <= chunk), default=1)
            # Slivers of chunks cost more than chunks that straddle two blocks.
            chunk = fitting if fitting * 4 >= chunk else chunk
        chunks[axis] = chunk
    while math.prod(chunks) > limit:
        axis = max(range(len(chunks)), key=chunks.__getitem__)
        smaller = max((d for d in _divisors(chunks[axis]) if d < chunks[axis]), default=1)
        # A prime has no divisor worth having: then the last chunk is a ragged one.
        chunks[axis] = smaller if smaller * 4 >= chunks[axis] else math.ceil(chunks[axis] / 2)
    return tuple(chunks)


def _touched(tile: tuple[int, ...], source_chunks: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The number of elements in all source chunks that a tile may meet."""
    spans = (
        min(n, math.ceil(t / s) * s + (0 if t % s == 0 else s))
        for t, s, n in zip(tile, source_chunks, shape, strict=True)
    )
    return math.prod(spans)


def _edges(layout: Layout) -> Iterator[list[int]]:
    for axis in range(len(layout.shape)):
        yield sorted({e for block in layout.blocks for e in (block.at[axis].start, block.at[axis].stop)})


def _divisors(n: int) -> Iterator[int]:
    for d in range(1, math.isqrt(n) + 1):
        if n % d == 0:
            yield d
            yield n // d
