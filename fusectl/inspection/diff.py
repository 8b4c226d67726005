"""Two checkpoints side by side: tensors that only one has, other shapes, dtypes or steps, and values that differ."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from fusectl.errors import UsageError
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.tree import STEPS, Checkpoint, Node
from fusectl.layout.blocks import Region, common_tile, size, tiles
from fusectl.system.threads import Progress, Silent, default_jobs, default_max_memory_bytes, in_parallel


# What a value takes while it is compared: both sides as they are stored, in float64, and their difference.
BYTES_PER_VALUE = 40


@dataclass(frozen=True)
class Metadata:
    """A tensor of another shape or dtype in B than in A, or the steps: both as text."""

    name: str
    what: str
    a: str
    b: str


@dataclass(frozen=True)
class Values:
    """A tensor whose values differ: in how many places, how far at most, and the rms of all differences."""

    name: str
    differing: int
    size: int
    max_abs: float
    rms: float
    # Relative to the rms of A's values; NaN where those are all zero.
    relative_rms: float


@dataclass(frozen=True)
class Diff:
    """What two checkpoints differ in. `equal` counts the tensors of the same values."""

    a: str
    b: str
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    metadata: tuple[Metadata, ...]
    values: tuple[Values, ...]
    equal: int

    @property
    def same(self) -> bool:
        return not (self.only_a or self.only_b or self.metadata or self.values)

    def as_json(self) -> Mapping[str, Any]:
        """The differences as numbers, strings and lists."""
        return {**asdict(self), "same": self.same}


def diff(
    a: str,
    b: str,
    *,
    atol: float = 0.0,
    max_memory_bytes: int | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Diff:
    """The Diff of two checkpoints of any formats, streaming. Values no further apart than `atol` are equal."""
    budget_bytes = max_memory_bytes or default_max_memory_bytes()
    if not 0.0 <= atol < math.inf:
        raise UsageError(f"--atol {atol:g}: a distance")
    first, second = open_checkpoint(a), open_checkpoint(b)
    common = [name for name in first.leaves if name in second.leaves]
    metadata = list(_metadata(first, second, common))
    reshaped = {each.name for each in metadata if each.what == "shape"}
    sums = {name: _Sums(atol) for name in common if name not in reshaped}
    watched = progress or Silent()
    watched.start("comparing", sum(first.leaves[name].nbytes + second.leaves[name].nbytes for name in sums))

    def tile(name: str) -> tuple[int, ...]:
        one, two = first.leaves[name], second.leaves[name]
        return common_tile(one.shape, [one.chunks, two.chunks], budget_bytes // BYTES_PER_VALUE)

    def compare(name: str, region: Region) -> None:
        sums[name].add(first.read(name, region), second.read(name, region))
        watched.advance(name, size(region) * (first.leaves[name].itemsize + second.leaves[name].itemsize))

    in_parallel(
        (
            (size(region) * BYTES_PER_VALUE, partial(compare, name, region))
            for name in sums
            for region in tiles(first.leaves[name].shape, tile(name))
        ),
        budget_bytes=budget_bytes,
        jobs=jobs or default_jobs(),
    )
    values = tuple(each.values(name) for name, each in sums.items() if each.differing)
    return Diff(
        a=first.path,
        b=second.path,
        only_a=tuple(name for name in first.leaves if name not in second.leaves),
        only_b=tuple(name for name in second.leaves if name not in first.leaves),
        metadata=tuple(metadata),
        values=values,
        equal=len(sums) - len(values),
    )


class _Sums:
    """The differences of one tensor, from pieces in any order."""

    def __init__(self, atol: float) -> None:
        self._atol = atol
        self._lock = threading.Lock()
        self.differing = 0
        self._size = 0
        self._largest = self._squares = self._a_squares = 0.0

    def add(self, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> None:
        wide = np.complex128 if "c" in a.dtype.kind + b.dtype.kind else np.float64
        one, two = a.astype(wide), b.astype(wide)
        # Integers are compared as such: float64 does not hold all of them.
        equal = (a == b if a.dtype == b.dtype else one == two) | (np.isnan(one) & np.isnan(two))
        with np.errstate(invalid="ignore", over="ignore"):
            # Infinities of one sign are equal, and so are NaNs.
            off = np.where(equal, 0.0, np.abs(one - two))
        # A NaN against a number is off by NaN, which is within no tolerance.
        near = equal if self._atol == 0.0 else off <= self._atol
        with self._lock:
            self.differing += int(np.count_nonzero(~near))
            self._size += off.size
            # np.maximum keeps a NaN, which max() would keep or lose depending on the order of its arguments.
            self._largest = float(np.maximum(self._largest, off.max(initial=0.0)))
            with np.errstate(over="ignore"):
                self._squares += float(np.sum(off**2))
                self._a_squares += float(np.sum(np.abs(one) ** 2))

    def values(self, name: str) -> Values:
        relative = math.sqrt(self._squares / self._a_squares) if self._a_squares else math.nan
        rms = math.sqrt(self._squares / self._size)
        return Values(name, self.differing, self._size, self._largest, rms, relative)


def _metadata(a: Checkpoint, b: Checkpoint, common: list[str]) -> Iterator[Metadata]:
    stored = any(name in common for name in STEPS)
    # A step that both keep as a tensor is compared as such.
    if a.step != b.step and not stored:
        yield Metadata("step", "step", str(a.step), str(b.step))
    for name in common:
        one, two = a.leaves[name], b.leaves[name]
        if one.shape != two.shape:
            yield Metadata(name, "shape", str(list(one.shape)), str(list(two.shape)))
        if one.dtype != two.dtype:
            yield Metadata(name, "dtype", one.dtype, two.dtype)
        if one.random_key != two.random_key:
            yield Metadata(name, "keys of", one.random_key or "no generator", two.random_key or "no generator")
    here, there = ({node.name: node for node in each.nodes} for each in (a, b))
    for name in sorted(here.keys() | there.keys()):
        # Formats tell empty nodes apart more or less well, strings all do.
        told = [
            node and (node.text if node.is_empty or node.text is not None else node.value_type)
            for node in (here.get(name), there.get(name))
        ]
        if told[0] != told[1] or (name in here) != (name in there):
            yield Metadata(name, "node", _node_in_words(here.get(name)), _node_in_words(there.get(name)))


def _node_in_words(node: Node | None) -> str:
    return "absent" if node is None else node.value_type if node.text is None else repr(node.text)
