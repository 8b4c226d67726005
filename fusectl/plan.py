"""The Plan: one Layout for every tensor of the output, with its chunks, checked before a byte is written.

A plan is integers and names. `--dry-run` prints it, execute.py carries it out; they cannot differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from fusectl.errors import Incompatible, NotEnoughSpace
from fusectl.formats.tree import READ_COPIES, EmptyNode, Key
from fusectl.formats.zarr import np_dtype
from fusectl.layout import Layout, Noise, Term, size
from fusectl.record import Record


# T5X's limit for a chunk; readers of larger ones need memory for a whole one at once.
LARGEST_CHUNK_BYTES = 64 << 20
# And below this a chunk costs more to handle than to hold.
SMALLEST_CHUNK_BYTES = 64 << 10
# What a chunk of the output takes while it is written: itself and its encoded bytes; computed ones are float64 before,
# twice while a term is added.
COPIED_COPIES = 2
FLOAT64_BYTES = 16
# Of float32, six times in all: the share of the budget that a chunk may have follows from it.
COMPUTED_COPIES = 6
# A chunk that is larger than the budget is worked on alone, up to this much more; beyond, the budget is an error.
TOLERATED_EXCESS_BYTES = 224 << 20


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the output: its place in the tree, its layout, its chunks, and the tile that is written at once."""

    name: str
    keys: tuple[Key, ...]
    layout: Layout
    chunks: tuple[int, ...]
    tile: tuple[int, ...]
    # The memory that one tile takes while it is worked on.
    cost_bytes: int
    # The name under which the noise field knows the tensor: the same in every format.
    noise_name: str

    @property
    def itemsize(self) -> int:
        return np_dtype(self.layout.dtype).itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.layout.shape) * self.itemsize

    @property
    def nonzero_bytes(self) -> int:
        return self.layout.covered * self.itemsize


def is_computed(terms: Sequence[Term | Noise]) -> bool:
    """Whether a sum of terms is anything but one source region as it is."""
    return len(terms) != 1 or not isinstance(terms[0], Term) or terms[0].scale != 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a writing command is going to do."""

    outputs: tuple[Output, ...]
    empty: tuple[EmptyNode, ...]
    format: str
    item: str | None
    record: Record
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    budget_bytes: int

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors of the output, uncompressed."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def nonzero_bytes(self) -> int:
        """The bytes that are not known to be zero: about what the output takes on disk at most."""
        return sum(output.nonzero_bytes for output in self.outputs)

    @property
    def read_bytes(self) -> int:
        """The bytes of source regions that are read, uncompressed."""
        return sum(
            size(term.region) * output.itemsize
            for output in self.outputs
            for block in output.layout.blocks
            for term in block.terms
            if isinstance(term, Term)
        )

    def check(self) -> None:
        """Raises if the plan contradicts itself, or if a unit of work is larger than the memory budget."""
        problems = [f"{o.name}: {problem}" for o in self.outputs for problem in o.layout.problems()]
        names = [output.name for output in self.outputs]
        problems += [f"{name}: planned twice" for name in sorted({n for n in names if names.count(n) > 1})]
        if problems:
            raise Incompatible("a plan that contradicts itself; please report it with this text", details=problems)
        largest = max(self.outputs, key=lambda output: output.cost_bytes, default=None)
        if largest is not None and largest.cost_bytes > self.budget_bytes + TOLERATED_EXCESS_BYTES:
            raise NotEnoughSpace(
                f"{largest.name}: one chunk of it does not fit into the memory budget",
                details=(f"{largest.cost_bytes:,} bytes needed, --max-memory is {self.budget_bytes:,}",),
                hint=f"--max-memory {math.ceil(largest.cost_bytes / 2**20)}MiB",
            )


def choose_chunks(layout: Layout, source_chunks: Sequence[int] | None, budget_bytes: int) -> tuple[int, ...]:
    """The chunk shape of an output tensor: the source's where the blocks' edges allow, so that chunks stay as they are.

    Chunks stay below 64 MiB, and small enough for the budget to hold two.
    """
    itemsize = np_dtype(layout.dtype).itemsize
    fitting = max(SMALLEST_CHUNK_BYTES, budget_bytes // (2 * COMPUTED_COPIES))
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


def choose_tile(
    layout: Layout, chunks: tuple[int, ...], sources: Sequence[tuple[tuple[int, ...], int]], budget_bytes: int
) -> tuple[tuple[int, ...], int]:
    """The unit of work and the memory that it takes: whole output chunks, enough to read an aligned source chunk once.

    `sources` are the chunk shape and the itemsize of every source tensor that goes in. Where the memory does not
    suffice, the unit is one output chunk, and source chunks are decoded several times.
    """
    computed = any(is_computed(block.terms) for block in layout.blocks)
    per_element = np_dtype(layout.dtype).itemsize * COPIED_COPIES + (FLOAT64_BYTES if computed else 0)
    writing = math.prod(chunks) * per_element
    wide = chunks
    for source, _ in sources:
        wide = tuple(
            c * math.ceil(min(s, n) / c) if s > w else w
            for n, c, s, w in zip(layout.shape, chunks, source, wide, strict=True)
        )

    def cost(tile: tuple[int, ...]) -> int:
        reading = (_touched(tile, source, layout.shape) * itemsize for source, itemsize in sources)
        return max(reading, default=0) * READ_COPIES + writing

    tile = wide if cost(wide) <= budget_bytes + TOLERATED_EXCESS_BYTES else chunks
    return tile, cost(tile)


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


def summary(plan: Plan) -> Mapping[str, object]:
    """The plan as JSON: sizes, and every tensor with its blocks counted."""
    return {
        "command": plan.record.command,
        "family": plan.record.family,
        "format": plan.format,
        "item": plan.item,
        "sources": [{"path": s.path, "format": s.format, "step": s.step} for s in plan.record.sources],
        "weights": list(plan.record.weights),
        "widths": {axis: list(sizes) for axis, sizes in plan.record.widths.items()},
        "norm": plan.record.norm,
        "norm_groups": list(plan.record.norm_groups),
        "residual_scales": list(plan.record.residual_scales),
        "fill": {
            "kind": plan.record.fill.kind,
            "noise_scale": plan.record.fill.noise_scale,
            "seed": plan.record.fill.seed,
        },
        "optimizer": plan.record.optimizer,
        "tensors": len(plan.outputs),
        "bytes": plan.nbytes,
        "nonzero_bytes": plan.nonzero_bytes,
        "read_bytes": plan.read_bytes,
        "max_memory_bytes": plan.budget_bytes,
        "dropped": list(plan.dropped),
        "notes": list(plan.notes),
        "outputs": [
            {
                "name": o.name,
                "axes": list(o.layout.axes),
                "shape": list(o.layout.shape),
                "dtype": o.layout.dtype,
                "chunks": list(o.chunks),
                "blocks": len(o.layout.blocks),
            }
            for o in plan.outputs
        ],
    }
