"""The Plan: one Layout for every tensor of the output, with its chunks, checked before a byte is written.

A plan is integers and names. `--dry-run` prints it, execute.py carries it out; they cannot differ.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

from fusectl.errors import Incompatible, NotEnoughSpace
from fusectl.formats.record import Record
from fusectl.formats.tree import Key, Node
from fusectl.formats.zarr import Storage, np_dtype
from fusectl.layout.blocks import Block, Layout, Region, Term, place_in_grid, shifted, size, tiles_in
from fusectl.layout.mesh import Mesh, bytes_read, fits
from fusectl.optimizer.rates import Rate
from fusectl.planning.exactness import Exactness
from fusectl.planning.resources import Resources
from fusectl.system.threads import TOLERATED_EXCESS_BYTES
from fusectl.verbs import Mapped, Stacked


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the output: its place in the tree, its layout, its chunks, and the tile that is written at once."""

    name: str
    keys: tuple[Key, ...]
    layout: Layout
    storage: Storage
    # The blocks whose chunks are a source's, byte for byte but for a CRC-32C behind them.
    passed: frozenset[Block]
    tile: tuple[int, ...]
    # The memory that one tile takes while it is worked on.
    cost_bytes: int
    # The name under which the noise field knows the tensor: the same in every format.
    noise_name: str
    # The tensor of the source that it is a part of: its parts are worked on side by side, to decode its chunks once.
    part_of: str | None = None
    # The generator of keys of random numbers, if it is made of them.
    random_key: str | None = None
    # How exactly a parameter of a fusion does its part; None for what is no such parameter.
    exactness: Exactness | None = None

    @property
    def chunks(self) -> tuple[int, ...]:
        """The shape of a stored chunk."""
        return self.storage.chunks

    @property
    def codec(self) -> str:
        """What its chunks are compressed with, and whether a CRC-32C follows."""
        return str(self.storage.encoding or "as in the source")

    @property
    def passed_bytes(self) -> int:
        """The bytes of chunks that are taken over as they are, uncompressed."""
        return sum(size(block.at) for block in self.passed) * self.itemsize

    @property
    def at_once(self) -> bool:
        """Whether the whole tensor is one unit of work."""
        return self.tile == self.layout.shape

    @property
    def itemsize(self) -> int:
        return np_dtype(self.layout.dtype).itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.layout.shape) * self.itemsize

    @property
    def nonzero_bytes(self) -> int:
        return self.layout.covered * self.itemsize


@dataclass(frozen=True, slots=True)
class Plan:
    """What a writing command is going to do."""

    outputs: tuple[Output, ...]
    nodes: tuple[Node, ...]
    format: str
    item: str | None
    record: Record
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    resources: Resources
    # Whether chunks of zeros are left out, whether the sources' files are linked where they are taken over, and whether
    # they are read then.
    sparse: bool = False
    links: bool = False
    check_sources: bool = True
    # The devices that are going to restore it: no chunk is needed by two different shards.
    mesh: Mesh | None = None
    # How exactly it is going to compute the mean of its sources' logits; None where nothing is fused.
    exactness: Exactness | None = None
    # What the trainer has noted of the step.
    custom: Mapping[str, object] = field(default_factory=dict, repr=False)
    # The learning rates that continue the trajectory, by parameter.
    rates: Mapping[str, Rate] = field(default_factory=dict, repr=False)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors of the output, uncompressed."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def nonzero_bytes(self) -> int:
        """The bytes that are not known to be zero: about what the output takes on disk at most."""
        return sum(output.nonzero_bytes for output in self.outputs)

    @property
    def passed_bytes(self) -> int:
        """The bytes of all chunks that are taken over from the sources as they are, uncompressed."""
        return sum(output.passed_bytes for output in self.outputs)

    @property
    def read_bytes(self) -> int:
        """The bytes of source regions that are decoded, uncompressed."""
        return sum(
            size(term.region) * output.itemsize
            for output in self.outputs
            for block in output.layout.blocks
            if self.check_sources or block not in output.passed
            for term in block.sources
        )

    @property
    def bytes_per_device(self) -> int | None:
        """The bytes of the chunks that each device of the mesh needs, uncompressed; None without a mesh.

        A host reads for all its devices, and what they share once: between this and the number of its devices times
        this.
        """
        if self.mesh is None:
            return None
        return sum(
            bytes_read(o.chunks, self.mesh.shard_shape(o.layout.axes, o.layout.shape), o.itemsize) for o in self.outputs
        )

    def check(self) -> None:
        """Raises if the plan contradicts itself, or if a unit of work is larger than the memory budget."""
        problems = [f"{o.name}: {problem}" for o in self.outputs for problem in o.layout.problems()]
        if self.mesh is not None:
            problems += [
                f"{o.name}: chunks {list(o.chunks)} do not fit shards {list(shard)} of {list(o.layout.shape)}"
                for o in self.outputs
                for shard in [self.mesh.shard_shape(o.layout.axes, o.layout.shape)]
                if not fits(o.chunks, shard, o.layout.shape)
            ]
        times = Counter(output.name for output in self.outputs)
        problems += [f"{name}: planned twice" for name, n in sorted(times.items()) if n > 1]
        if problems:
            raise Incompatible("a plan that contradicts itself; please report it with this text", details=problems)
        largest = max(self.outputs, key=lambda output: output.cost_bytes, default=None)
        if largest is not None and largest.cost_bytes > self.resources.budget + TOLERATED_EXCESS_BYTES:
            raise NotEnoughSpace(
                f"{largest.name}: one chunk of it does not fit into the memory budget",
                details=(f"{largest.cost_bytes:,} bytes needed, --max-memory is {self.resources.budget:,}",),
                hint=f"--max-memory {math.ceil(largest.cost_bytes / 2**20)}MiB",
            )


def taken(output: Output, chunk: Region) -> tuple[Term, tuple[int, ...]] | None:
    """The term and the place in its tensor's grid of the stored chunk that a chunk is; None if it is not taken over."""
    for block in output.passed:
        if all(c.start >= a.start and c.stop <= a.stop for c, a in zip(chunk, block.at, strict=True)):
            return _stored(block, chunk, output)
    return None


def taken_chunks(output: Output) -> Iterator[tuple[Term, tuple[int, ...]]]:
    """The term and the place in its tensor's grid of every stored chunk that is taken over."""
    for block in output.passed:
        for chunk in tiles_in(block.at, output.chunks):
            yield _stored(block, chunk, output)


def _stored(block: Block, chunk: Region, output: Output) -> tuple[Term, tuple[int, ...]]:
    term = block.taken
    return term, place_in_grid(shifted(chunk, block.at, term.region), output.chunks)


def summary(plan: Plan) -> Mapping[str, object]:
    """The plan as JSON: sizes, and every tensor with its blocks counted."""
    return {
        "command": plan.record.command,
        "family": plan.record.family,
        "format": plan.format,
        "item": plan.item,
        "sources": [{"path": s.path, "format": s.format, "step": s.step} for s in plan.record.made_from],
        "growth": asdict(made) if isinstance(made := plan.record.made, Stacked | Mapped) else None,
        "weights": list(plan.record.weights),
        "widths": {axis: list(sizes) for axis, sizes in plan.record.widths.items()},
        "norm": plan.record.norm,
        "norm_groups": list(plan.record.norm_groups),
        "residual_scales": list(plan.record.residual_scales),
        "factor_in": plan.record.factor_in,
        "fill": {
            "kind": plan.record.fill.kind,
            "noise_scale": plan.record.fill.noise_scale,
            "seed": plan.record.fill.seed,
        },
        "optimizer": plan.record.optimizer,
        "exactness": _as_json(plan.exactness),
        "tensors": len(plan.outputs),
        "bytes": plan.nbytes,
        "nonzero_bytes": plan.nonzero_bytes,
        "passed_bytes": plan.passed_bytes,
        "read_bytes": plan.read_bytes,
        "max_memory_bytes": plan.resources.budget,
        "mesh": plan.mesh and {**plan.mesh.as_json(), "bytes_per_device": plan.bytes_per_device},
        "sparse": plan.sparse,
        "link": plan.links,
        "check": plan.check_sources,
        "dropped": list(plan.dropped),
        "notes": list(plan.notes),
        "outputs": [
            {
                "name": o.name,
                "axes": list(o.layout.axes),
                "shape": list(o.layout.shape),
                "dtype": o.layout.dtype,
                "chunks": list(o.chunks),
                "codec": o.codec,
                "blocks": len(o.layout.blocks),
                "passed_bytes": o.passed_bytes,
                "exactness": _as_json(o.exactness),
            }
            for o in plan.outputs
        ],
    }


def _as_json(exactness: Exactness | None) -> Mapping[str, object] | None:
    return None if exactness is None else {"kind": exactness.kind, "because": list(exactness.because)}
