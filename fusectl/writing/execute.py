"""Carrying out a plan: tile by tile, on threads, within a budget of bytes in flight. The one place where bytes move.

    for every output tensor, for every tile of whole chunks, for every chunk:
        a source's own chunk   →  checked, then taken over as it is
        no block meets it      →  a chunk of zeros
        else                   →  read the source regions that meet the tile, place, scale, add noise, write

Sums are computed in float64 and rounded once; before noise is added, once more. Nothing depends on the order in which
tiles are worked on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.errors import Corrupt, Incompatible
from fusectl.formats.encoding import checksum
from fusectl.formats.record import LEFT_OUT, UNREAD, Checksums
from fusectl.formats.sink import NewTensor, Sink
from fusectl.formats.tree import Checkpoint
from fusectl.formats.zarr import nonfinite_at, np_dtype
from fusectl.layout.blocks import (
    Block,
    Mapped,
    Mean,
    Noise,
    Product,
    Region,
    Term,
    chunk_at,
    intersect,
    is_computed,
    place_in_grid,
    places_in_grid,
    recurring_noise,
    shifted,
    size,
    slices,
    tiles,
    tiles_in,
    whole,
)
from fusectl.layout.fill import Fill
from fusectl.layout.noise import Moments, lanes, tile_shape, unit_quantiles
from fusectl.planning.plan import Output, Plan, taken, taken_chunks
from fusectl.system.lru import Cache
from fusectl.system.threads import Progress, in_parallel
from fusectl.writing.axis_matrices import Matrices
from fusectl.writing.journal import Journal


Array = npt.NDArray[Any]
# Of values that a kernel's deviation is computed from at once: they stay in the processor's cache.
_PIECE = 1 << 16


@dataclass(frozen=True)
class Work:
    """What every tile needs: the sources, the fill, what may pass, and the kernels that were measured before."""

    sources: Sequence[Checkpoint]
    fill: Fill
    allow_nonfinite: bool = False
    # Whether chunks that are taken over are read, to notice what is corrupt or not finite.
    check: bool = True
    stds: Mapping[tuple[Term, int | None], Array] = field(default_factory=dict)
    # And the means that products are made of, in float64.
    means: Mapping[Mean, Array] = field(default_factory=dict)
    # The CRC-32 of the sources' chunks that have been checked: a self-fusion takes each several times.
    checked: dict[tuple[int, str, tuple[int, ...]], str] = field(default_factory=dict)
    # The matrices that axes are expanded with.
    matrices: Matrices = field(default_factory=lambda: Matrices((), 0))
    # And parts of kernels that were, for the layers that are made from the same ones.
    mapped: Cache = field(default_factory=lambda: Cache(0))


def execute(
    plan: Plan, work: Work, sink: Sink, *, jobs: int, progress: Progress, journal: Journal | None = None
) -> dict[str, Checksums]:
    """Writes every tensor of the plan to the sink; the checksums of what was written.

    What the journal says is there, and is, is not written again.
    """
    work = replace(
        work,
        stds=measure_kernels(plan, work, jobs=jobs, progress=progress),
        means=measure_means(plan, work, jobs=jobs, progress=progress),
    )
    sink.create(
        NewTensor(o.name, o.keys, o.layout.shape, o.layout.dtype, o.storage, o.random_key) for o in plan.outputs
    )
    sink.expect(
        (work.sources[term.source], term.tensor, index)
        for output in plan.outputs
        for term, index in taken_chunks(output)
        if not work.sources[term.source].is_left_out(term.tensor, index)
    )
    sums: dict[str, dict[Region, str]] = {output.name: {} for output in plan.outputs}

    def one(output: Output, tile: Region) -> None:
        unit = _Unit(output, tile, work)
        for chunk in tiles_in(tile, output.chunks):
            if journal is not None and journal.closed:
                # Nobody waits for it any more.
                return
            place = place_in_grid(chunk, output.chunks)
            crc32 = journal.done(output.name, place) if journal is not None else None
            if crc32 is None or not _holds(chunk, unit, sink, crc32):
                crc32 = _write(chunk, unit, sink)
                if journal is not None and crc32 not in {LEFT_OUT, UNREAD}:
                    journal.add(output.name, place, crc32)
            sums[output.name][chunk] = crc32
            progress.advance(output.name, size(chunk) * output.itemsize)

    progress.start("writing", plan.nbytes)
    in_parallel(
        (
            (output.cost_bytes + sink.copies * math.prod(output.chunks) * output.itemsize, partial(one, output, tile))
            for output, tile in _units(plan)
        ),
        budget_bytes=plan.resources.units,
        jobs=jobs,
    )
    return {output.name: _checksums(output, sums[output.name]) for output in plan.outputs}


def _units(plan: Plan) -> Iterator[tuple[Output, Region]]:
    """The units of work, the largest first: none is left to be worked on alone."""

    def beside(output: Output) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        return output.part_of or output.name, output.layout.shape, output.tile

    ordered = sorted(plan.outputs, key=lambda output: (-output.cost_bytes, beside(output)))
    for _, group in itertools.groupby(ordered, key=beside):
        parts = list(group)
        for place in zip(*(tiles(output.layout.shape, output.tile) for output in parts), strict=True):
            yield from zip(parts, place, strict=True)


def _holds(chunk: Region, unit: _Unit, sink: Sink, crc32: str) -> bool:
    """Whether a chunk with this CRC-32 stands in the output already."""
    found = taken(unit.output, chunk)
    origin = (unit.work.sources[found[0].source], found[0].tensor, found[1]) if found else None
    return sink.holds(unit.output.name, chunk, crc32, origin)


def _write(chunk: Region, unit: _Unit, sink: Sink) -> str:
    """Writes one chunk of an output tensor; its CRC-32, or what stands in place of it."""
    output, work = unit.output, unit.work
    found = taken(output, chunk)
    if found is not None:
        term, index = found
        source = work.sources[term.source]
        if not source.is_left_out(term.tensor, index):
            crc32 = _vouched_for(term, index, work)
            sink.take(output.name, chunk, source, term.tensor, index)
            return crc32
    elif unit.blocks_in(chunk):
        values = compute(chunk, unit)
        sink.write(output.name, chunk, values)
        return checksum(values)
    left_out = sink.write_zeros(output.name, chunk)
    return LEFT_OUT if left_out else _zeros_checksum(size(chunk) * output.itemsize)


@lru_cache(maxsize=64)
def _zeros_checksum(nbytes: int) -> str:
    return checksum(np.zeros(nbytes, np.uint8))


def _vouched_for(term: Term, index: tuple[int, ...], work: Work) -> str:
    """The CRC-32 of a source's stored chunk; raises Corrupt if the chunk is not what it was, or not finite.

    Unless chunks are to be checked it is what the source's record says, or UNREAD.
    """
    source = work.sources[term.source]
    leaf = source.leaves[term.tensor]
    assert leaf.stored is not None
    chunks = leaf.stored.storage.chunks
    if not work.check:
        return source.recorded(term.tensor, index)
    key = (id(source), term.tensor, index)
    if key not in work.checked:
        at = chunk_at(index, chunks, leaf.shape)
        found, recorded = checksum(read_finite(work, term, at)), source.recorded(term.tensor, index)
        if recorded not in {UNREAD, LEFT_OUT, found}:
            # A whole shard; chunks are compared where they are read.
            raise Corrupt(f"{source.path}: {term.tensor}: the chunk {source.key(term.tensor, index)} was changed")
        work.checked[key] = found
    return work.checked[key]


def source_chunk(sources: Sequence[Checkpoint], term: Term, index: tuple[int, ...]) -> Array:
    """The values of a source's stored chunk that is taken over, cut at the tensor's edge."""
    source = sources[term.source]
    leaf = source.leaves[term.tensor]
    assert leaf.stored is not None
    return source.read(term.tensor, chunk_at(index, leaf.stored.storage.chunks, leaf.shape))


class _Unit:
    """One tile of an output tensor: the source regions that it is computed from, each read once, and its noise."""

    def __init__(self, output: Output, tile: Region, work: Work) -> None:
        self.output = output
        self.work = work
        self.dtype = np_dtype(output.layout.dtype)
        self._computed = [
            (block, part)
            for block in output.layout.blocks
            if block not in output.passed and (part := intersect(block.at, tile)) is not None
        ]
        self._loaded: dict[Term, tuple[Region, Array]] | None = None
        self._tables: dict[tuple[Term, float], list[Array]] = {}
        self._stds: dict[tuple[int, float], Array] = {}
        self._recurring = recurring_noise(output.layout.blocks)
        self._kept: dict[tuple[Term, float, Region], Array] = {}
        self._blocks: dict[tuple[int, ...], list[Block]] = {}
        for block, part in self._computed:
            for index in places_in_grid(part, output.chunks):
                self._blocks.setdefault(index, []).append(block)

    def blocks_in(self, chunk: Region) -> list[Block]:
        """The blocks, of those that are not taken over, that meet a chunk."""
        return self._blocks.get(place_in_grid(chunk, self.output.chunks), [])

    def source(self, term: Term, region: Region) -> Array:
        """The values of a source region that lies within what the tile meets."""
        loaded, values = self._read()[term]
        return values[slices(region, loaded)]

    def noise(self, noise: Noise, region: Region) -> Iterator[tuple[tuple[slice, ...], Array]]:
        """The noise of a region in pieces, each with its place there, in the output's dtype.

        In a tensor that is one unit of work, what is added in one place and taken off in another is generated once.
        """
        kept = self.output.at_once and noise.region in self._recurring
        edge = tile_shape(self.output.layout.shape)
        for index in places_in_grid(region, edge):
            tile = tuple(range(i * e, (i + 1) * e) for i, e in zip(index, edge, strict=True))
            within = intersect(tile, noise.region if kept else region)
            assert within is not None
            key = (noise.like, abs(noise.scale), within)
            values = self._kept.get(key)
            if values is None:
                values = self._generated(noise, within)
                if kept:
                    self._kept[key] = values
            part = intersect(within, region)
            assert part is not None
            values = values[slices(part, within)]
            yield slices(part, region), -values if noise.scale < 0 else values

    def _generated(self, noise: Noise, region: Region) -> Array:
        """The noise of a region that lies in one tile of the field, as it is added."""
        output, axis, seed = self.output, noise.stacked_axis, self.work.fill.seed
        assert seed is not None
        tables = self._tables_of(noise)
        ((_, chosen),) = lanes(seed, output.noise_name, output.layout.shape, region)
        # Every lane is a valid index; "clip" only skips the check for it.
        if axis is None:
            return tables[0].take(chosen, mode="clip")
        layers = np.moveaxis(chosen, axis, 0)
        each = [tables[layer].take(lane, mode="clip") for layer, lane in zip(region[axis], layers, strict=True)]
        return np.stack(each, axis)

    def stored(self, values: Array) -> Array:
        """The values in the output's dtype and C order; raises Incompatible where they do not fit into it."""
        if values.dtype == self.dtype:
            return np.asarray(values, order="C")
        with np.errstate(over="ignore"):
            cast = np.asarray(values, self.dtype, order="C")
        self.require_finite(cast, values)
        return cast

    def require_finite(self, cast: Array, values: Array) -> None:
        """Raises Incompatible where values became infinite in the output's dtype."""
        at = None if self.work.allow_nonfinite else nonfinite_at(cast)
        if at is not None:
            raise Incompatible(f"{self.output.name}: {values[at]:g} does not fit into {self.dtype.name}")

    def _read(self) -> Mapping[Term, tuple[Region, Array]]:
        """What the tile is computed from. Copies of one source are read once."""
        if self._loaded is None:
            terms = [read for block, part in self._computed for read in block.reads(part)]
            if self.output.at_once:
                terms += [(noise.like, noise.like.region) for noise in _noises(self.output)]
            read: dict[tuple[int, str, Region], Array] = {}
            self._loaded = {}
            for term, region in dict(terms).items():
                source = self.work.sources[term.source]
                key = (id(source), term.tensor, region)
                if key not in read:
                    read[key] = read_finite(self.work, term, region)
                if term.must_be_zero:
                    _require_zero(read[key], term, region, self.work)
                self._loaded[term] = (region, read[key])
        return self._loaded

    def _tables_of(self, noise: Noise) -> Sequence[Array]:
        """The 65,536 values that a noise takes, for each kernel that is stacked in the tensor."""
        key = (noise.like, abs(noise.scale))
        if key not in self._tables:
            units = unit_quantiles().astype(np.float64)
            # Rounded to the output's dtype: what is taken off is exactly what is added.
            self._tables[key] = [self.stored(units * std) for std in self._measured(noise) * abs(noise.scale)]
        return self._tables[key]

    def _measured(self, noise: Noise) -> Array:
        """The standard deviation of each kernel that a noise is relative to; of copies of one source measured once."""
        known = self.work.stds.get((noise.like, noise.stacked_axis))
        if known is not None:
            return known
        kernel = self._read()[noise.like][1]
        key = (id(kernel), noise.like.scale)
        if key not in self._stds:
            count = 1 if noise.stacked_axis is None else kernel.shape[noise.stacked_axis]
            kept = self.dtype == kernel.dtype
            self._stds[key] = _std(lambda: _kernel_pieces(kernel, noise, kept=kept), count)
        return self._stds[key]


def compute(chunk: Region, unit: _Unit) -> Array:
    """The values of one chunk of an output tensor, in its dtype and C order."""
    blocks = [(block, part) for block in unit.blocks_in(chunk) if (part := intersect(block.at, chunk)) is not None]
    if len(blocks) == 1 and blocks[0][1] == chunk and not is_computed(blocks[0][0].terms):
        return _plain(blocks[0][0], chunk, unit)
    covered = sum(size(part) for _, part in blocks) == size(chunk)
    out = (np.empty if covered else np.zeros)(tuple(map(len, chunk)), unit.dtype)
    for block, part in blocks:
        # The ellipsis keeps it a view, where the tensor has no axes, too.
        _sum(block, part, unit, out[slices(part, chunk) or ...])
    return out


def _plain(block: Block, part: Region, unit: _Unit) -> Array:
    """A part of a block that is one source region as it is."""
    (term,) = block.terms
    assert isinstance(term, Term)
    return unit.stored(unit.source(term, shifted(part, block.at, term.region)))


def _sum(block: Block, part: Region, unit: _Unit, out: Array) -> None:
    """Puts the sum of a block's terms over a part of it into `out`."""
    values: Array
    if not is_computed(block.terms):
        out[...] = _plain(block, part, unit)
        return
    terms = [term for term in block.terms if isinstance(term, Term) and not term.must_be_zero]
    noises = [term for term in block.terms if isinstance(term, Noise)]
    products = [term for term in block.terms if isinstance(term, Product)]
    mapped = [term for term in block.terms if isinstance(term, Mapped)]
    if mapped:
        out[...] = unit.stored(_mapped_sum(block, part, unit, mapped, products))
        return
    if not terms and not products and len(noises) == 1:
        for at, values in unit.noise(noises[0], shifted(part, block.at, noises[0].region)):
            out[at] = values
        return
    if len(terms) == 1 and not products and unit.dtype == np.float32:
        values = unit.source(terms[0], shifted(part, block.at, terms[0].region))
        scale = np.float32(terms[0].scale)
        # A product or a sum of two float32 is the same, whether it is rounded from float64 or computed in float32.
        if values.dtype == np.float32 and float(scale) == terms[0].scale and len(noises) + (scale != 1) <= 1:
            if not noises:
                with np.errstate(over="ignore"):
                    np.multiply(values, scale, out=out)
            for noise in noises:
                for at, added in unit.noise(noise, shifted(part, block.at, noise.region)):
                    np.add(values[at], added, out=out[at])
            unit.require_finite(out, values)
            return
    # Piece by piece, so that what is in float64 stays in the processor's cache.
    for piece in tiles_in(part, tile_shape(unit.output.layout.shape)):
        total = np.zeros(tuple(map(len, piece)), np.float64)
        for term in terms:
            values = unit.source(term, shifted(piece, block.at, term.region)).astype(np.float64) * term.scale
            # What noise is taken off is rounded before, too, as it is where the noise is filled in later.
            total += unit.stored(values).astype(np.float64) if noises else values
        for noise in noises:
            for at, values in unit.noise(noise, shifted(piece, block.at, noise.region)):
                total[at] += values.astype(np.float64)
        for product in products:
            total += _product(product, shifted(piece, block.at, whole(tuple(map(len, block.at)))), unit.work.means)
        out[slices(piece, part)] = unit.stored(total)


def _mapped_sum(
    block: Block, part: Region, unit: _Unit, mapped: Sequence[Mapped], products: Sequence[Product]
) -> Array:
    """The sum of kernels whose axes are expanded, and of products, over a part of a block, in float64."""
    total = np.zeros(tuple(map(len, part)), np.float64)
    inside = shifted(part, block.at, whole(tuple(map(len, block.at))))
    for term in mapped:
        # What a layer is mapped to goes into many layers, each with a weight of its own.
        key = (replace(term, term=replace(term.term, scale=1.0)), inside)
        total += unit.work.mapped.get(key, partial(_mapped, term, block, part, unit)) * term.term.scale
    for product in products:
        total += _product(product, inside, unit.work.means)
    return total


def _mapped(term: Mapped, block: Block, part: Region, unit: _Unit) -> Array:
    """A kernel whose axes are expanded, over a part of a block, in float64 and not scaled."""
    values = read_finite(unit.work, term.term, term.reads(part, block.at)).astype(np.float64)
    if term.added:
        values += term.added
    by_axis = {each.axis: each for each in term.expansions}
    for axis in term.order(part):
        first = block.at[axis].start
        rows = unit.work.matrices.of(by_axis[axis])[part[axis].start - first : part[axis].stop - first]
        values = np.moveaxis(np.tensordot(rows, values, (1, axis)), 0, axis)
    return values


def _product(product: Product, region: Region, means: Mapping[Mean, Array]) -> Array:
    """The values of a product in a region of its block, with an axis of length one where it is constant."""
    value = np.full((1,) * len(region), product.scale)
    for factor in product.factors:
        mean = means[factor.mean][slices(tuple(region[axis] for axis in factor.axes))]
        shape = [1] * len(region)
        for axis in factor.axes:
            shape[axis] = len(region[axis])
        powered = np.power(mean, factor.power, out=np.zeros(mean.shape), where=mean > 0) if factor.power != 1 else mean
        value = value * powered.reshape(shape)
    return value


def read_finite(work: Work, term: Term, region: Region) -> Array:
    """The values of a source region; raises Corrupt for a NaN or Inf among them, unless they may pass."""
    source = work.sources[term.source]
    values = source.read(term.tensor, region)
    if not work.allow_nonfinite:
        at = nonfinite_at(values)
        if at is not None:
            index = [r.start + i for r, i in zip(region, at, strict=True)]
            raise Corrupt(
                f"{source.path}: {term.tensor}{index} is {values[at]}",
                details=("a NaN or Inf spreads through the zero blocks (0 * NaN is NaN) into every other source",),
                hint="--allow-nonfinite fuses it all the same",
            )
    return values


def _require_zero(values: Array, term: Term, region: Region, work: Work) -> None:
    if values.any():
        index = [r.start + int(i) for r, i in zip(region, np.argwhere(values)[0], strict=True)]
        raise Incompatible(
            f"{work.sources[term.source].path}: {term.tensor}{index} is not zero",
            details=("noise fills blocks of zeros; this one has been filled or trained already",),
        )


def _checksums(output: Output, sums: Mapping[Region, str]) -> Checksums:
    layout = output.layout
    crc32 = tuple(sums[chunk] for chunk in tiles(layout.shape, output.chunks))
    return Checksums(layout.shape, layout.dtype, output.chunks, crc32)


def _noises(output: Output) -> Iterator[Noise]:
    return (term for block in output.layout.blocks for term in block.terms if isinstance(term, Noise))


def measure_kernels(plan: Plan, work: Work, *, jobs: int, progress: Progress) -> dict[tuple[Term, int | None], Array]:
    """The standard deviation of every kernel that noise is relative to and that is too large to be read at once.

    For each of them one value, or one per stacked kernel. The others are measured where they are used.
    """
    wanted = {
        (noise.like, noise.stacked_axis): (noise, output)
        for output in plan.outputs
        if not output.at_once
        for noise in _noises(output)
    }
    if not wanted:
        return {}
    leaves = {noise.like: work.sources[noise.like.source].leaves[noise.like.tensor] for noise, _ in wanted.values()}
    progress.start("measuring kernels", sum(2 * size(k.region) * leaf.itemsize for k, leaf in leaves.items()))
    found: dict[tuple[Term, int | None], Array] = {}

    def measure(noise: Noise, output: Output) -> None:
        kernel, axis = noise.like, noise.stacked_axis
        leaf = leaves[kernel]
        shape = tuple(map(len, kernel.region))
        edge = tuple(min(c, n) for c, n in zip(leaf.chunks, shape, strict=True))

        def pieces() -> Iterator[tuple[int, Array]]:
            for region in tiles_in(kernel.region, edge):
                values = read_finite(work, kernel, region)
                progress.advance(kernel.tensor, values.nbytes)
                first = region[axis].start - kernel.region[axis].start if axis is not None else 0
                for layer, piece in _kernel_pieces(values, noise, kept=output.layout.dtype == leaf.dtype):
                    yield first + layer, piece

        found[kernel, axis] = _std(pieces, 1 if axis is None else shape[axis])

    tasks = (
        (2 * leaves[noise.like].reading_bytes, partial(measure, noise, output)) for noise, output in wanted.values()
    )
    in_parallel(tasks, budget_bytes=plan.resources.budget, jobs=jobs)
    return found


def measure_means(plan: Plan, work: Work, *, jobs: int, progress: Progress) -> dict[Mean, Array]:
    """Every mean that the plan's products are made of, in float64."""
    wanted = dict.fromkeys(
        factor.mean
        for output in plan.outputs
        for block in output.layout.blocks
        for term in block.terms
        if isinstance(term, Product)
        for factor in term.factors
    )
    if not wanted:
        return {}
    leaves = {mean: work.sources[mean.source].leaves[mean.tensor] for mean in wanted}
    progress.start("averaging", sum(leaf.nbytes for leaf in leaves.values()))
    found: dict[Mean, Array] = {}

    def measure(mean: Mean) -> None:
        leaf = leaves[mean]
        everything = whole(leaf.shape)
        # The first of the axes is summed up value by value, in its order: whatever the chunks are, it is the same sum.
        first, others = (mean.over[0], tuple(axis - 1 for axis in mean.over[1:])) if mean.over else (None, ())
        total = np.zeros(tuple(n for axis, n in enumerate(leaf.shape) if axis != first))
        for region in tiles_in(everything, leaf.chunks):
            values = read_finite(work, Term(mean.source, mean.tensor, everything), region)
            progress.advance(mean.tensor, values.nbytes)
            at = slices(tuple(r for axis, r in enumerate(region) if axis != first))
            if first is None:
                total[at] = values
                continue
            for each in np.ascontiguousarray(np.moveaxis(values, first, 0)):
                total[at] += each
        # The others, from the sums.
        found[mean] = total.sum(axis=others) / math.prod(leaf.shape[axis] for axis in mean.over)

    def sums_bytes(mean: Mean) -> int:
        return 8 * math.prod(n for axis, n in enumerate(leaves[mean].shape) if axis not in mean.over[:1])

    in_parallel(
        ((2 * leaf.reading_bytes + sums_bytes(mean), partial(measure, mean)) for mean, leaf in leaves.items()),
        budget_bytes=plan.resources.budget,
        jobs=jobs,
    )
    return found


def _kernel_pieces(values: Array, noise: Noise, *, kept: bool) -> Iterator[tuple[int, Array]]:
    """The values of a kernel, or of several that are stacked, in small pieces, each with its place among them.

    They are as they will stand in the output, if that keeps (`kept`) the source's dtype: filling it later measures the
    same.
    """
    scale = noise.like.scale
    kernels = values[None] if noise.stacked_axis is None else np.moveaxis(values, noise.stacked_axis, 0)
    for i, kernel in enumerate(kernels):
        flat = kernel.reshape(-1)
        for start in range(0, flat.size, _PIECE):
            piece = flat[start : start + _PIECE]
            if scale != 1.0:
                scaled = piece.astype(np.float64) * scale
                piece = scaled.astype(values.dtype) if kept else scaled
            yield i, piece


def _std(pieces: Callable[[], Iterable[tuple[int, Array]]], count: int) -> Array:
    """The standard deviations of `count` kernels, from their pieces in any order, which are passed twice."""
    largest = np.zeros(count)
    for i, piece in pieces():
        largest[i] = max(largest[i], float(piece.max()), -float(piece.min()))
    moments = [Moments(float(value)) for value in largest]
    for i, piece in pieces():
        moments[i].add(piece.astype(np.float64))
    return np.array([m.std for m in moments])
