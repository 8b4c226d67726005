"""Carrying out a plan: tile by tile, on threads, within a budget of bytes in flight. The one place where bytes move.

    for every output tensor, for every tile of whole chunks:
        read the source regions that meet the tile  →  place, scale, add noise  →  write the tile

Sums are computed in float64 and rounded once; before noise is added, once more. Nothing depends on the order in which
tiles are worked on.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.errors import Corrupt, Incompatible
from fusectl.fill import Moments, unit_noise
from fusectl.formats.sink import NewTensor, Sink
from fusectl.formats.tree import Checkpoint
from fusectl.formats.zarr import checksum, nonfinite_at, np_dtype
from fusectl.layout import Block, Noise, Region, Term, intersect, shifted, size, tiles
from fusectl.parallel import Progress, in_parallel
from fusectl.plan import COMPUTED_COPIES, Output, Plan, is_computed
from fusectl.record import Checksums, Fill


Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Work:
    """What every tile needs: the sources, the measured kernels, the fill, and whether NaN and Inf may pass."""

    sources: Sequence[Checkpoint]
    fill: Fill
    allow_nonfinite: bool = False
    stds: Mapping[tuple[Term, int | None], Array] = field(default_factory=dict)


def execute(plan: Plan, work: Work, sink: Sink, *, jobs: int, progress: Progress) -> dict[str, Checksums]:
    """Writes every tensor of the plan to the sink; the checksums of what was written."""
    work = Work(
        work.sources, work.fill, work.allow_nonfinite, measure_kernels(plan, work, jobs=jobs, progress=progress)
    )
    sink.create(NewTensor(o.name, o.keys, o.layout.shape, o.layout.dtype, o.chunks) for o in plan.outputs)
    sums: dict[str, dict[Region, str]] = {output.name: {} for output in plan.outputs}

    def one(output: Output, tile: Region) -> None:
        reader = _Reader(output, tile, work)
        for inner in tiles(tuple(map(len, tile)), output.chunks):
            chunk = tuple(range(t.start + r.start, t.start + r.stop) for t, r in zip(tile, inner, strict=True))
            values = compute(chunk, reader)
            sink.write(output.name, chunk, values)
            sums[output.name][chunk] = checksum(values)
            progress.advance(output.name, values.nbytes)

    progress.start("writing", plan.nbytes)
    in_parallel(
        (
            (output.cost_bytes, partial(one, output, tile))
            for output in plan.outputs
            for tile in tiles(output.layout.shape, output.tile)
        ),
        budget_bytes=plan.budget_bytes,
        jobs=jobs,
    )
    return {output.name: _checksums(output, sums[output.name]) for output in plan.outputs}


class _Reader:
    """The source regions that meet a tile, each read once, and the noise of its output tensor."""

    def __init__(self, output: Output, tile: Region, work: Work) -> None:
        self._output = output
        self._work = work
        self.dtype = np_dtype(output.layout.dtype)
        self.met = [(block, part) for block in output.layout.blocks if (part := intersect(block.at, tile)) is not None]
        self._values: dict[Term, tuple[Region, Array]] = {}
        for block, part in self.met:
            for term in block.terms:
                if isinstance(term, Term):
                    region = shifted(part, block.at, term.region)
                    self._values[term] = (region, self._read(term, region))

    def source(self, term: Term, region: Region) -> Array:
        """The values of a source region that lies within what the tile meets."""
        loaded, values = self._values[term]
        return values[tuple(slice(r.start - a.start, r.stop - a.start) for r, a in zip(region, loaded, strict=True))]

    def noise(self, noise: Noise, region: Region) -> Array:
        """The noise of a term in float64, rounded to the output's dtype: what is taken off is exactly what is added."""
        std = self._work.stds[noise.like, noise.stacked_axis] * abs(noise.scale)
        if noise.stacked_axis is not None:
            own = region[noise.stacked_axis]
            std = std[own.start : own.stop].reshape([-1 if a == noise.stacked_axis else 1 for a in range(len(region))])
        assert self._work.fill.seed is not None
        field = unit_noise(self._work.fill.seed, self._output.noise_name, self._output.layout.shape, region)
        return self.stored(field * std).astype(np.float64) * math.copysign(1.0, noise.scale)

    def stored(self, values: Array) -> Array:
        """The values in the output's dtype and C order; raises Incompatible where they do not fit into it."""
        if values.dtype == self.dtype:
            return np.asarray(values, order="C")
        with np.errstate(over="ignore"):
            cast = np.asarray(values, self.dtype, order="C")
        if not self._work.allow_nonfinite:
            at = nonfinite_at(cast)
            if at is not None:
                raise Incompatible(f"{self._output.name}: {values[at]:g} does not fit into {self.dtype.name}")
        return cast

    def _read(self, term: Term, region: Region) -> Array:
        values = read_finite(self._work, term, region)
        if term.must_be_zero:
            _require_zero(values, term, region, self._work)
        return values


def compute(chunk: Region, reader: _Reader) -> Array:
    """The values of one chunk of an output tensor, in its dtype and C order."""
    out: Array | None = None
    for block, met in reader.met:
        part = intersect(met, chunk)
        if part is None:
            continue
        values = _sum(block, part, reader)
        if part == chunk:
            return values
        if out is None:
            out = np.zeros(tuple(map(len, chunk)), reader.dtype)
        out[tuple(slice(p.start - c.start, p.stop - c.start) for p, c in zip(part, chunk, strict=True))] = values
    return np.zeros(tuple(map(len, chunk)), reader.dtype) if out is None else out


def _sum(block: Block, part: Region, reader: _Reader) -> Array:
    """The sum of a block's terms over a part of it; one region as it is stays in its own dtype."""
    if not is_computed(block.terms):
        (term,) = block.terms
        assert isinstance(term, Term)
        return reader.stored(reader.source(term, shifted(part, block.at, term.region)))
    total = np.zeros(tuple(map(len, part)), np.float64)
    noisy = any(isinstance(term, Noise) for term in block.terms)
    for term in block.terms:
        region = shifted(part, block.at, term.region)
        if isinstance(term, Noise):
            total += reader.noise(term, region)
        elif not term.must_be_zero:
            values = reader.source(term, region).astype(np.float64) * term.scale
            # What noise is taken off is rounded before, too, as it is where the noise is filled in later.
            total += reader.stored(values).astype(np.float64) if noisy else values
    return reader.stored(total)


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


def measure_kernels(plan: Plan, work: Work, *, jobs: int, progress: Progress) -> dict[tuple[Term, int | None], Array]:
    """The standard deviation of every kernel that noise is relative to: one value, or one per stacked kernel."""
    wanted = {
        (term.like, term.stacked_axis): output.layout.dtype
        for output in plan.outputs
        for block in output.layout.blocks
        for term in block.terms
        if isinstance(term, Noise)
    }
    if not wanted:
        return {}
    total = sum(2 * size(kernel.region) * _itemsize(work.sources[kernel.source], kernel) for kernel, _ in wanted)
    progress.start("measuring kernels", total)
    return {
        (kernel, stacked): _kernel_std(kernel, stacked, dtype, plan, work, jobs=jobs, progress=progress)
        for (kernel, stacked), dtype in wanted.items()
    }


def _kernel_std(
    kernel: Term, stacked: int | None, dtype: str, plan: Plan, work: Work, *, jobs: int, progress: Progress
) -> Array:
    leaf = work.sources[kernel.source].leaves[kernel.tensor]
    kept = dtype == leaf.dtype
    count = 1 if stacked is None else len(kernel.region[stacked])
    largest = np.zeros(count)
    moments: list[Moments] = []
    lock = threading.Lock()
    shape = tuple(map(len, kernel.region))

    def pieces(tile: Region) -> Iterator[tuple[int, Array]]:
        region = tuple(range(k.start + t.start, k.start + t.stop) for k, t in zip(kernel.region, tile, strict=True))
        values = read_finite(work, kernel, region)
        # As it will stand in the output, if that has the source's dtype: filling it later measures the same.
        scaled = values.astype(np.float64) * kernel.scale
        values = scaled.astype(values.dtype).astype(np.float64) if kept else scaled
        progress.advance(kernel.tensor, values.size * _itemsize(work.sources[kernel.source], kernel))
        if stacked is None:
            yield 0, values
        else:
            for i in range(values.shape[stacked]):
                yield tile[stacked].start + i, np.asarray(values.take(i, axis=stacked))

    def find_largest(tile: Region) -> None:
        for i, values in pieces(tile):
            magnitude = float(max(values.max(), -values.min()))
            with lock:
                largest[i] = max(largest[i], magnitude)

    def add(tile: Region) -> None:
        for i, values in pieces(tile):
            own = Moments(float(largest[i]))
            own.add(values)
            with lock:
                moments[i].merge(own)

    def over_tiles(visit: Callable[[Region], None]) -> None:
        edge = tuple(min(c, n) for c, n in zip(leaf.chunks, shape, strict=True))
        cost = int(np.prod(edge)) * 8 * COMPUTED_COPIES
        tasks = ((cost, partial(visit, tile)) for tile in tiles(shape, edge))
        in_parallel(tasks, budget_bytes=plan.budget_bytes, jobs=jobs)

    over_tiles(find_largest)
    moments = [Moments(float(value)) for value in largest]
    over_tiles(add)
    return np.array([m.std for m in moments])


def _itemsize(source: Checkpoint, kernel: Term) -> int:
    return np_dtype(source.leaves[kernel.tensor].dtype).itemsize
