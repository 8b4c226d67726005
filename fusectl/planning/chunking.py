"""How the tensors of an output are cut and stored: their chunks, codecs, and the units of work.

Chunks that can be taken over from a source as they are decide; all others follow from the memory budget. None is larger
than what one device of a mesh holds, if there is one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce

from fusectl.formats.encoding import ZSTD_LEVEL, Encoding
from fusectl.formats.format import Format
from fusectl.formats.registry import format_named
from fusectl.formats.tree import Leaf
from fusectl.formats.zarr import Storage, new_storage, np_dtype
from fusectl.layout.blocks import (
    Block,
    Layout,
    Region,
    Term,
    intersect,
    is_computed,
    places_in_grid,
    recurring_noise,
    size,
)
from fusectl.layout.fill import FillKind
from fusectl.layout.mesh import divisors, fits
from fusectl.planning.options import Options
from fusectl.planning.resources import Resources
from fusectl.system.threads import TOLERATED_EXCESS_BYTES


# T5X's limit for a chunk; readers of larger ones need memory for a whole one at once.
LARGEST_CHUNK_BYTES = 64 << 20
# And below this a chunk costs more to handle than to hold.
SMALLEST_CHUNK_BYTES = 64 << 10
# A chunk that goes into an OCDBT database by value is put together in one piece; the transactions have memory of their
# own.
OCDBT_COPIES = 1
# The chunks of the output, with those that are read for one, that must fit into the budget twice, so that two threads
# have work.
CHUNKS_AT_ONCE = 6
# Larger ones are not written into an OCDBT database in one piece: it takes four times their size.
LARGEST_VALUE_BYTES = 32 << 20


def storing_for(out_format: Format, options: Options, resources: Resources, sources: Sequence[str]) -> Storing:
    """How a plan's tensors are stored in a format; `sources` are the formats of its sources."""
    return Storing(
        zarr=out_format.zarr,
        codec=options.codec,
        budget_bytes=resources.units,
        ocdbt=out_format.ocdbt,
        sparse=out_format.reads_left_out if options.sparse is None else options.sparse,
        # With noise most of a source's data files would be of no use to the output.
        refers=all(format_named(name).ocdbt for name in sources) and options.fill.kind is FillKind.ZEROS,
        passthrough=options.passthrough,
    )


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
        self,
        layout: Layout,
        leaves: Mapping[Term, Leaf],
        like: Leaf | None,
        shard: tuple[int, ...] | None = None,
    ) -> tuple[Storage, frozenset[Block]]:
        """How a tensor is stored, and which blocks then consist of their sources' own chunks.

        Of the ways in which the sources are stored it is the one that takes over most bytes unread; if none takes over
        any, chunks like those of `like`, anew. `leaves` has the source tensor of each term. With `shard`, the shape of
        what a device holds, only ways and chunks whose chunks no two shards share.
        """
        shard = layout.shape if shard is None else shard
        noisy = any(term.is_random for block in layout.blocks for term in block.terms)
        # Noise does not compress, and a compressed source has to be decoded for it in any case.
        wanted = ("none" if noisy else None) if self.codec == "auto" else self.codec
        ways = dict.fromkeys(
            way
            for leaf in leaves.values()
            if (way := self._way(leaf, layout, wanted)) is not None and fits(way.chunks, shard, layout.shape)
        )
        best = max(
            ((way, self._passed(layout, leaves, way)) for way in ways),
            key=lambda found: sum(size(block.at) for block in found[1]),
            default=None,
        )
        if best is not None and best[1]:
            return best
        # What several layers are made from is kept chunk by chunk, that of all of them.
        layers = max((sum(term.is_kept for term in block.terms) for block in layout.blocks), default=0)
        budget_bytes = self.budget_bytes // max(1, layers)
        chunks = choose_chunks(layout, like.chunks if like else None, budget_bytes, shard)
        # Trained weights and noise lose a tenth of their size to zstd, and most of the speed of writing and restoring.
        # Zeros that are to be stored are another matter.
        codec = wanted or ("zstd" if layout.covered < math.prod(layout.shape) and not self.sparse else "none")
        encoding = Encoding(codec, ZSTD_LEVEL if codec == "zstd" else 0, crc32c=self.zarr == 3)
        return new_storage(self.zarr, chunks, layout.dtype, encoding), frozenset()

    def unit(
        self, layout: Layout, storage: Storage, leaves: Mapping[Term, Leaf], passed: Collection[Block]
    ) -> tuple[tuple[int, ...], int]:
        """The unit of work, and the memory that it takes.

        That is the whole tensor if the budget holds two of them, so that sources are read once; else whole output
        chunks, enough to read an aligned source chunk once, and for all its copies if the budget holds two of those;
        else, and where all chunks are taken over, one of them.
        """
        chunks = storage.chunks
        itemsize = np_dtype(layout.dtype).itemsize
        chunk_bytes = math.prod(chunks) * itemsize
        stored = chunk_bytes * (1 + OCDBT_COPIES * self.ocdbt)
        sources = [leaves[block.taken] for block in passed]
        taking = max((leaf.reading_bytes for leaf in sources), default=0)
        if len(passed) == len(layout.blocks):
            zeros_are_stored = layout.covered < math.prod(layout.shape) and not self.sparse
            by_value = self.ocdbt and not self.refers
            return chunks, max(taking, stored if zeros_are_stored or by_value else 0)
        plain = storage.encoding is not None and storage.encoding.compressor == "none"
        ragged = any(n % c for n, c in zip(layout.shape, chunks, strict=True))
        beside = max(taking, stored + chunk_bytes * (ragged + (not plain)))
        computed = [block for block in layout.blocks if block not in passed]

        @cache
        def cost(tile: tuple[int, ...]) -> int:
            # What is added here and taken off there is kept in between.
            noise = sum(map(size, recurring_noise(computed))) * itemsize if tile == layout.shape else 0
            reads = _reads(computed, leaves, tile, with_kernels=tile == layout.shape)
            working = max(beside, chunk_bytes + _mapping_bytes(computed, leaves, chunks))
            return max((max(reading, held + noise + working) for held, reading in reads), default=working)

        wide = chunks
        for leaf in leaves.values():
            wide = tuple(
                c * math.ceil(min(s, n) / c) if s > w else w
                for n, c, s, w in zip(layout.shape, chunks, leaf.chunks, wide, strict=True)
            )
        if any(term.is_kept for block in computed for term in block.terms):
            return chunks, cost(chunks)
        for tile in (layout.shape, _over_copies(computed, leaves, layout.shape, wide)):
            if cost(tile) <= self.budget_bytes // 2:
                return tile, cost(tile)
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
            for term in [block.taken]
            if term.adds and term in leaves
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


def choose_chunks(
    layout: Layout,
    source_chunks: Sequence[int] | None,
    budget_bytes: int,
    shard: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """The chunk shape of a tensor that is encoded anew: the source's where the blocks' edges and shards allow.

    Chunks stay below 64 MiB, and small enough for the budget to hold what two threads work on. Along an axis that
    shards cut they divide `shard`, the shape of one.
    """
    shard = layout.shape if shard is None else shard
    itemsize = np_dtype(layout.dtype).itemsize
    fitting = max(SMALLEST_CHUNK_BYTES, budget_bytes // (2 * CHUNKS_AT_ONCE))
    limit = max(1, min(LARGEST_CHUNK_BYTES, fitting) // itemsize)
    chunks = list(layout.shape if source_chunks is None or len(source_chunks) != len(layout.shape) else source_chunks)
    for axis, (n, s, edges) in enumerate(zip(layout.shape, shard, _edges(layout), strict=True)):
        chunk = max(1, min(chunks[axis], s))
        common = reduce(math.gcd, edges, s)
        if common % chunk:
            fitting = max((d for d in divisors(common) if d <= chunk), default=1)
            if fitting * 4 >= chunk:
                chunk = fitting
            elif s != n:
                # Slivers of chunks cost more than chunks that straddle two blocks, but no chunk straddles two shards.
                # Of a shard whose length is a prime there is nothing between slivers and all of it.
                fitting = max(d for d in divisors(s) if d <= chunk)
                chunk = fitting if fitting * 4 >= chunk else s
        chunks[axis] = chunk
    while math.prod(chunks) > limit:
        smaller = [_smaller(chunk, ragged=s == n) for chunk, s, n in zip(chunks, shard, layout.shape, strict=True)]
        # Slivers are the last resort.
        axis = max(range(len(chunks)), key=lambda a: (chunks[a] > 1 and smaller[a] * 4 >= chunks[a], chunks[a]))
        chunks[axis] = smaller[axis]
    return tuple(chunks)


def _smaller(chunk: int, *, ragged: bool) -> int:
    """The next smaller length of a chunk: a divisor, or if there is none worth having and it may be ragged, half."""
    divisor = max((d for d in divisors(chunk) if d < chunk), default=1)
    return divisor if divisor * 4 >= chunk or not ragged else math.ceil(chunk / 2)


def _reads(
    blocks: Sequence[Block], leaves: Mapping[Term, Leaf], tile: tuple[int, ...], *, with_kernels: bool
) -> Iterator[tuple[int, int]]:
    """For every tile of a grid: the bytes of the source regions that it meets, and the most that reading them takes.

    Copies of one source are read once; so are the kernels that noise is relative to, where they are measured, too.
    """
    met: dict[tuple[int, ...], dict[tuple[int, Region], Leaf]] = {}
    for block in blocks:
        for place in places_in_grid(block.at, tile):
            part = intersect(block.at, tuple(range(i * t, (i + 1) * t) for i, t in zip(place, tile, strict=True)))
            assert part is not None
            regions = met.setdefault(place, {})
            regions.update(((id(leaves[term]), region), leaves[term]) for term, region in block.reads(part))
            for kernel, _ in (each for term in block.terms for each in term.kernels if with_kernels):
                regions[id(leaves[kernel]), kernel.region] = leaves[kernel]
    for regions in met.values():
        held = sum(size(region) * leaf.itemsize for (_, region), leaf in regions.items())
        yield held, max((held + _beside(leaf, region) for (_, region), leaf in regions.items()), default=0)


def _mapping_bytes(blocks: Sequence[Block], leaves: Mapping[Term, Leaf], chunks: tuple[int, ...]) -> int:
    """The memory that mapping kernels takes for a chunk, at most: one by one they are read and mapped, in float64."""
    held = []
    for block in blocks:
        part = tuple(range(r.start, min(r.stop, r.start + c)) for r, c in zip(block.at, chunks, strict=True))
        for term in block.terms:
            if term.is_kept:
                sources = [leaves[source] for source in term.sources]
                read = size(term.read_for(part, block.at)) * max(leaf.itemsize for leaf in sources)
                held.append(8 * term.held(part, block.at) + read + max(leaf.reading_bytes for leaf in sources))
    return max(held, default=0)


def _beside(leaf: Leaf, region: Region) -> int:
    """The memory that reading a region takes beside its values: none of the decoded ones if it is one whole chunk."""
    is_chunk = all(
        r.start % c == 0 and len(r) == min(c, n - r.start)
        for r, c, n in zip(region, leaf.chunks, leaf.shape, strict=True)
    )
    return leaf.reading_bytes - size(region) * leaf.itemsize if is_chunk else leaf.reading_bytes


def _over_copies(
    blocks: Sequence[Block], leaves: Mapping[Term, Leaf], shape: tuple[int, ...], tile: tuple[int, ...]
) -> tuple[int, ...]:
    """The tile, drawn out along the axes in which copies of a source stand beside each other."""
    first: dict[tuple[int, Region], Region] = {}
    out = list(tile)
    for block in blocks:
        for term, _ in block.reads(block.at):
            other = first.setdefault((id(leaves[term]), term.region), block.at)
            for axis, (one, two) in enumerate(zip(other, block.at, strict=True)):
                out[axis] = shape[axis] if one != two else out[axis]
    return tuple(out)


def _edges(layout: Layout) -> Iterator[list[int]]:
    for axis in range(len(layout.shape)):
        yield sorted({e for block in layout.blocks for e in (block.at[axis].start, block.at[axis].stop)})
