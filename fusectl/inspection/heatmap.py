"""|W| of one tensor on a canvas of cells, and how large its blocks are: what the heat maps of a grown model show.

Deep Fusion (Mazzawi et al., ICML 2024, section 5.4 and Figure 5) draws the first feed-forward kernel of a grown model:
the sources' kernels on the diagonal, and between them the blocks that began as zeros and catch up in training.

    inputs x outputs           canvas                        one pass, chunk by chunk, gives
    ┌──────┬─────┐             at most CELLS cells a side,   the sum of |W| in every cell,
    │  A   │  0  │    ──▶      none of which lies across     the sum of W² in every block
    ├──────┼─────┤             a border between sources
    │  0   │  B  │
    └──────┴─────┘

Heads and kv are flattened together, and of tensors that stack layers one is picked.
"""

from __future__ import annotations

import difflib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.errors import Incompatible, NotFound, UsageError
from fusectl.families.table import Row
from fusectl.formats.tree import Leaf
from fusectl.layout.blocks import Region, size, slices, tiles_in
from fusectl.rules.fusion import equal_widths
from fusectl.sources.opened import Opened, open_source
from fusectl.system.threads import Progress, Silent, default_jobs, default_max_memory_bytes, in_parallel


Array = npt.NDArray[Any]

# The most cells along a side of the canvas, give or take one for each source.
CELLS = 512
# Of more checkpoints than these, heat maps of some are kept; the blocks of all are measured.
MOST_MAPS = 8
# What a value takes while it is measured: |W| and W² in float64, and their sums along one axis.
BYTES_PER_VALUE = 32
# Larger chunks are measured piece by piece.
MOST_VALUES = 1 << 18


@dataclass(frozen=True)
class Side:
    """The inputs or the outputs of a kernel, flattened: their axes, and the width of each source (or the whole)."""

    axes: tuple[str, ...]
    widths: tuple[int, ...]
    # Where these axes are in the tensor, and their sizes.
    places: tuple[int, ...] = field(repr=False)
    shape: tuple[int, ...] = field(repr=False)

    @property
    def size(self) -> int:
        return sum(self.widths)

    @property
    def borders(self) -> tuple[int, ...]:
        """Where one source ends and the next begins."""
        return tuple(int(n) for n in np.cumsum(self.widths)[:-1])

    def as_json(self) -> Mapping[str, Any]:
        axes, widths, borders = map(list, (self.axes, self.widths, self.borders))
        return {"axes": axes, "size": self.size, "widths": widths, "borders": borders}

    def edges(self, cells: int) -> npt.NDArray[np.int64]:
        """The edges of at most about `cells` cells of nearly equal size; every border is one of them."""
        ends = [0, *self.borders, self.size]
        # Each source gets cells of its own, so that none lies across a border and mixes what was trained with what was
        # zero.
        counts = [min(width, max(1, round(cells * width / self.size))) for width in self.widths]
        parts = [np.arange(n) * w // n + a for n, w, a in zip(counts, self.widths, ends[:-1], strict=True)]
        return np.concatenate([*parts, [self.size]])

    def index(self, region: Region) -> npt.NDArray[np.int64]:
        """The flattened places of a region's axes on this side, in ascending order."""
        # Ascending places let _pooled sum up runs of a cell with reduceat, which goes over the values once.
        at = np.ix_(*(np.arange(region[i].start, region[i].stop) for i in self.places))
        return np.asarray(np.ravel_multi_index(at, self.shape)).ravel()


@dataclass(frozen=True)
class Heat:
    """One checkpoint's tensor, measured.

    `mean` (cells of inputs, cells of outputs) is the mean of |W| in each cell, not finite where a value is not; None
    where only the blocks were asked for. `rms` (sources along inputs, along outputs) is that of each block. `ratio` is
    the rms of all blocks off the diagonal by that of all on it; None without such blocks, NaN where both are zero.
    """

    path: str
    step: int | None
    rms: Array
    ratio: float | None
    nonfinite: int
    mean: Array | None = field(repr=False)


@dataclass(frozen=True)
class HeatMap:
    """A tensor of one checkpoint, or of several in the order of their steps. `edges` are those of the canvas' cells."""

    tensor: str
    layer: int | None
    shape: tuple[int, ...]
    inputs: Side
    outputs: Side
    edges: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] = field(repr=False)
    heats: tuple[Heat, ...]
    notes: tuple[str, ...]

    def as_json(self) -> Mapping[str, Any]:
        """What was measured, without the canvas, as numbers, strings and lists."""
        return {
            "tensor": self.tensor,
            "layer": self.layer,
            "shape": list(self.shape),
            "inputs": self.inputs.as_json(),
            "outputs": self.outputs.as_json(),
            "checkpoints": [
                {"path": h.path, "step": h.step, "rms": h.rms.tolist(), "ratio": h.ratio, "nonfinite": h.nonfinite}
                for h in self.heats
            ],
        }


def measure(
    paths: Sequence[str],
    tensor: str,
    *,
    layer: int | None = None,
    copies: int | None = None,
    arch: str | None = None,
    cells: int = CELLS,
    max_memory_bytes: int | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> HeatMap:
    """The HeatMap of a parameter in one checkpoint, or in several of one run, streaming.

    The widths of the sources stand in the fusectl.json that one of them has; without one, `copies` of equal width are
    taken, or none. Raises NotFound for no such parameter, with the nearest names; UsageError for one that is no matrix,
    for a `layer` that is missing or out of range, and for several checkpoints of a tensor without zero blocks;
    Incompatible where the checkpoints are not of one run, or `copies` does not divide the widths.
    """
    opened = [open_source(path, arch) for path in paths]
    parameter = _parameter(opened[0], tensor)
    row, shape = opened[0].tree.rows[parameter], opened[0].tree.shapes[parameter]
    for other in opened[1:]:
        if other.tree.shapes.get(parameter) != shape:
            says = f"{list(shape)} in {opened[0].label}, {list(other.tree.shapes.get(parameter, ()))} in {other.label}"
            raise Incompatible(f"{parameter}: not of one run", details=(says,))
    widths = _widths(opened, copies)
    inputs, outputs = (_side(row, shape, axes, widths) for axes in (row.spec.inputs, row.spec.outputs))
    if not (inputs.axes and outputs.axes):
        raise UsageError(f"{parameter} has no inputs and outputs ({row.axes}): nothing to draw as a matrix")
    if len(opened) > 1:
        if min(len(inputs.widths), len(outputs.widths)) < 2:
            why = f"only kernels between grown axes have them, this one is {row.axes}"
            hint = None if widths else "--copies K for a fusion of K equal widths without fusectl.json"
            raise UsageError(f"--over-time: {parameter} has no zero blocks", details=(why,) * bool(widths), hint=hint)
        unknown = [each.label for each in opened if each.checkpoint.step is None]
        if unknown:
            raise Incompatible("--over-time: checkpoints without a step", details=unknown)
        opened.sort(key=lambda each: each.checkpoint.step or 0)
    region = _region(parameter, row, shape, layer)
    kept = set(np.linspace(0, len(opened) - 1, min(len(opened), MOST_MAPS)).round().astype(int).tolist())
    budget_bytes, threads = max_memory_bytes or default_max_memory_bytes(), jobs or default_jobs()
    watched = progress or Silent()
    watched.start("measuring", sum(size(region) * _leaf(each, parameter).itemsize for each in opened))
    heats = []
    for i, each in enumerate(opened):
        canvas = _Canvas(inputs, outputs, cells if i in kept else 1)
        _fill(canvas, each, parameter, region, budget_bytes, threads, watched)
        heats.append(canvas.heat(each, keep=i in kept))
    notes = [note for each in opened for note in each.checkpoint.location.notes]
    notes += [f"{h.path}: {h.nonfinite:,} values of {parameter} are NaN or Inf" for h in heats if h.nonfinite]
    if not widths:
        notes.append(f"{opened[0].label}: no fusectl.json, so no borders; --copies K for a fusion of K equal widths")
    edges = (inputs.edges(cells), outputs.edges(cells))
    return HeatMap(opened[0].full(parameter), layer, shape, inputs, outputs, edges, tuple(heats), tuple(notes))


class _Canvas:
    """The sums of one tensor, from pieces in any order and on any thread."""

    def __init__(self, inputs: Side, outputs: Side, cells: int) -> None:
        self._sides = (inputs, outputs)
        self._cells = [side.edges(cells) for side in self._sides]
        self._blocks = [np.array([0, *side.borders, side.size]) for side in self._sides]
        self._sums = np.zeros([len(edges) - 1 for edges in self._cells])
        self._squares = np.zeros([len(edges) - 1 for edges in self._blocks])
        self._nonfinite = 0
        self._lock = threading.Lock()

    def add(self, values: Array, region: Region) -> None:
        """Adds a region of the tensor."""
        at = [side.index(region) for side in self._sides]
        order = [*self._sides[0].places, *self._sides[1].places]
        order += [i for i in range(values.ndim) if i not in order]
        matrix = np.abs(values.astype(np.float64).transpose(order).reshape([len(each) for each in at]))
        with np.errstate(over="ignore", invalid="ignore"):
            # The pooling happens outside of the lock: it is nearly all of the work, and threads would wait for each
            # other.
            cells, sums = _pooled(matrix, at, self._cells)
            nonfinite = int(np.count_nonzero(~np.isfinite(matrix)))
            blocks, squares = _pooled(np.square(matrix, out=matrix), at, self._blocks)
            with self._lock:
                self._sums[cells] += sums
                self._squares[blocks] += squares
                self._nonfinite += nonfinite

    def heat(self, opened: Opened, *, keep: bool) -> Heat:
        sizes = [np.multiply.outer(np.diff(a), np.diff(b)) for a, b in (self._cells, self._blocks)]
        ratio = None
        if min(self._squares.shape) > 1:
            own = np.eye(len(self._squares), dtype=bool)
            with np.errstate(divide="ignore", invalid="ignore"):
                # Sums are divided by numbers of values, so that sources of different widths count by their sizes.
                means = [self._squares[where].sum() / sizes[1][where].sum() for where in (~own, own)]
                ratio = float(np.sqrt(means[0] / means[1]))
        rms = np.sqrt(self._squares / sizes[1])
        mean = self._sums / sizes[0] if keep else None
        return Heat(opened.label, opened.checkpoint.step, rms, ratio, self._nonfinite, mean)


def _pooled(matrix: Array, at: Sequence[Array], edges: Sequence[Array]) -> tuple[tuple[Array, ...], Array]:
    """Which cells between `edges` a matrix meets, and its sums in them; `at` are the places of its rows and columns."""
    places = []
    for axis in (1, 0):
        cells = np.searchsorted(edges[axis], at[axis], "right") - 1
        starts = np.flatnonzero(np.diff(cells, prepend=-1))
        matrix = np.add.reduceat(matrix, starts, axis=axis)
        places.append(cells[starts])
    return np.ix_(places[1], places[0]), matrix


def _fill(
    canvas: _Canvas, opened: Opened, parameter: str, region: Region, budget_bytes: int, jobs: int, progress: Progress
) -> None:
    """Adds a region of a tensor to a canvas: each chunk is decoded once, and measured in pieces of its own."""
    leaf = _leaf(opened, parameter)
    most = max(1, min(MOST_VALUES, budget_bytes // jobs // BYTES_PER_VALUE))

    def add(tile: Region) -> None:
        values = opened.checkpoint.read(leaf.name, tile)
        for piece in tiles_in(tile, _cut(tuple(map(len, tile)), most)):
            canvas.add(values[slices(piece, tile)], piece)
        progress.advance(leaf.name, size(tile) * leaf.itemsize)

    def tasks() -> Iterator[tuple[int, partial[None]]]:
        for tile in tiles_in(region, tuple(max(1, chunk) for chunk in leaf.chunks)):
            yield leaf.reading_bytes + min(size(tile), most) * BYTES_PER_VALUE, partial(add, tile)

    in_parallel(tasks(), budget_bytes=budget_bytes, jobs=jobs)


def _cut(shape: tuple[int, ...], most: int) -> tuple[int, ...]:
    """A tile of at most `most` values, with the last axes as long as can be."""
    tile = list(shape)
    for axis, n in enumerate(shape):
        tile[axis] = max(1, min(n, most // math.prod(shape[axis + 1 :])))
    return tuple(tile)


def _leaf(opened: Opened, parameter: str) -> Leaf:
    return opened.checkpoint.leaves[opened.full(parameter)]


def _parameter(opened: Opened, tensor: str) -> str:
    """The parameter that is meant, with or without what the tree puts around its name."""
    shapes, name = opened.tree.shapes, tensor.strip("/")
    if name in shapes:
        return name
    bare = opened.tree.naming.bare(name)
    if bare in shapes:
        return bare
    if name in opened.checkpoint.leaves:
        raise UsageError(f"{name} is no parameter: what its axes are is not known")
    near = difflib.get_close_matches(bare, shapes, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "fusectl inspect lists the tensors"
    raise NotFound(f"{opened.label}: no parameter is called {tensor}", hint=hint)


def _widths(opened: Sequence[Opened], copies: int | None) -> Mapping[str, tuple[int, ...]]:
    """Per grown axis, the size that each source brought; nothing where nobody says so."""
    if copies is not None and copies < 2:
        raise UsageError(f"--copies {copies}: a fusion has two or more")
    records = [(each.label, each.checkpoint.record) for each in opened]
    known = [(label, dict(record.widths)) for label, record in records if record is not None and record.fused]
    if not known:
        return {} if copies is None else equal_widths(opened[0].tree, copies, opened[0].label)
    label, widths = known[0]
    for other, theirs in known[1:]:
        if theirs != widths:
            raise Incompatible(f"{other} and {label}: fusions of other widths, so not of one run")
    count = len(next(iter(widths.values())))
    if copies not in {None, count}:
        raise UsageError(f"--copies {copies}, but {label} is a fusion of {count}")
    return widths


def _side(row: Row, shape: tuple[int, ...], names: frozenset[str], widths: Mapping[str, tuple[int, ...]]) -> Side:
    places = tuple(i for i, axis in enumerate(row.spec.axes) if axis in names)
    axes, sizes = tuple(row.spec.axes[i] for i in places), tuple(shape[i] for i in places)
    grown = [axis for axis in axes if axis in widths]
    # Flattened, a source's part is one piece only if no axis stands before the grown one.
    assert grown in ([], list(axes[:1])), f"{row.axes}: {grown} grown"
    spans = widths[grown[0]] if grown else sizes[:1]
    return Side(axes, tuple(span * math.prod(sizes[1:]) for span in spans), places, sizes)


def _region(parameter: str, row: Row, shape: tuple[int, ...], layer: int | None) -> Region:
    """The whole tensor, or the layer of it."""
    region, stacked = [range(n) for n in shape], row.spec.stacked_axis
    if stacked is None:
        if layer is not None:
            raise UsageError(f"--layer {layer}: {parameter} stacks no layers ({row.axes})")
        return tuple(region)
    if layer is None:
        raise UsageError(f"{parameter} stacks {shape[stacked]} layers: which one?", hint="--layer 0")
    if not 0 <= layer < shape[stacked]:
        raise UsageError(f"--layer {layer}: {parameter} stacks {shape[stacked]} layers, counted from 0")
    region[stacked] = range(layer, layer + 1)
    return tuple(region)
