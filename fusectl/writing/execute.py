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
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np

from fusectl.errors import Corrupt
from fusectl.formats.encoding import checksum
from fusectl.formats.record import LEFT_OUT, UNREAD, Checksums
from fusectl.formats.sink import NewTensor, Sink
from fusectl.layout.blocks import Region, Term, chunk_at, place_in_grid, size, tiles, tiles_in
from fusectl.planning.plan import Output, Plan, taken, taken_chunks
from fusectl.system.threads import Progress, in_parallel
from fusectl.writing.journal import Journal
from fusectl.writing.measure import measure_kernels, measure_means
from fusectl.writing.unit import Unit, compute
from fusectl.writing.work import Work, read_finite


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
        unit = Unit(output, tile, work)
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
    # Threads with blocking calls were measured against asyncio: for the same output 7.5 s and 136 MB against 17 s and
    # 224 MB, because the interpreter was the limit and not the disk.
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

    # Parts of one source tensor are worked on side by side, so that its chunks are decoded once, and so that what an
    # operator makes of a layer is met again while it is still kept: keeping it made LiGO four times as fast.
    ordered = sorted(plan.outputs, key=lambda output: (-output.cost_bytes, beside(output)))
    for _, group in itertools.groupby(ordered, key=beside):
        parts = list(group)
        for place in zip(*(tiles(output.layout.shape, output.tile) for output in parts), strict=True):
            yield from zip(parts, place, strict=True)


def _holds(chunk: Region, unit: Unit, sink: Sink, crc32: str) -> bool:
    """Whether a chunk with this CRC-32 stands in the output already."""
    found = taken(unit.output, chunk)
    origin = (unit.work.sources[found[0].source], found[0].tensor, found[1]) if found else None
    return sink.holds(unit.output.name, chunk, crc32, origin)


def _write(chunk: Region, unit: Unit, sink: Sink) -> str:
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


def _checksums(output: Output, sums: Mapping[Region, str]) -> Checksums:
    layout = output.layout
    crc32 = tuple(sums[chunk] for chunk in tiles(layout.shape, output.chunks))
    return Checksums(layout.shape, layout.dtype, output.chunks, crc32)
