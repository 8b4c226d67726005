"""The weights level: every block of the fused tensors against the sources, re-derived with numpy slices.

It knows the family's table (which axis is which) and nothing of plans, layouts and the executor. Blocks that are copies
must be equal to the bit; scaled ones to the last bit of their dtype; what no source covers must be zero, or noise
of the mean and standard deviation that the record declares. All of it in pieces, on all cores, within a budget.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.errors import FusectlError
from fusectl.families.naming import is_stream
from fusectl.families.table import Row
from fusectl.formats.tree import STEPS, Checkpoint, kept_shapes
from fusectl.layout.blocks import Region, common_tile, shifted, size, slices, tiles, tiles_in, whole
from fusectl.layout.fill import FillKind
from fusectl.layout.noise import unit_noise
from fusectl.optimizer.kinds import OnState
from fusectl.optimizer.registry import find_state
from fusectl.optimizer.state import is_state
from fusectl.sources.packed_qkv import place_of
from fusectl.system.threads import Progress, in_parallel
from fusectl.verification.blocks import Slices, unit, within_rounding
from fusectl.verification.claim import Claim
from fusectl.verification.report import WeightsResult
from fusectl.verification.slots import Slots


Array = npt.NDArray[Any]
Task = tuple[int, Callable[[], None]]

# A sample of n normal values strays this many standard errors once in 500 million times.
STANDARD_ERRORS = 6.0
# Means of second moments are summed up in another order than the executor's, and rounded once more.
MEAN_TOLERANCE = 1e-12
_CARRIED = frozenset({OnState.CARRY, OnState.ASYMMETRIC})
# Sources whose orders are tried: 720 of them.
MOST_ORDERED = 6
# What a value takes while it is compared: both sides as they are stored, noise, a mask. What was computed is compared
# in float64, with differences and masks, a slab of so many values at a time.
BYTES_PER_VALUE = 20
SLAB = 1 << 18


def check_weights(claim: Claim, *, budget_bytes: int, jobs: int, progress: Progress) -> WeightsResult:
    """Compares every parameter, the optimizer's slots and the step with what the sources and the record say."""
    tensors = [_Tensor(claim, name, row, progress) for name, row in claim.tree.rows.items()]
    slots = [name for name in claim.fused.leaves if is_state(name)]
    read = sum(claim.fused.leaves[claim.tree.full(name)].nbytes for name in claim.tree.rows)
    slot_bytes = sum(claim.fused.leaves[name].nbytes for name in slots)
    sources = sum(
        claim.sources[i].leaves[claim.trees[i].full(name)].nbytes
        for i in claim.distinct
        for name in claim.trees[i].rows
    )
    progress.start("comparing weights", read + sources + slot_bytes)
    run = partial(in_parallel, budget_bytes=budget_bytes, jobs=jobs)
    run(task for tensor in tensors for task in tensor.comparisons(budget_bytes))
    # Noise is relative to its kernel, all of which has been seen by now.
    run(task for tensor in tensors for task in tensor.measurements())
    checked, unknown = _declared_slots(claim, slots, progress)
    run(task for slot in checked for task in slot.tasks())
    problems = [problem for tensor in tensors for problem in tensor.problems()]
    order = _other_order(claim) if problems else []
    problems += [*unknown, *_state_problems(claim, checked, slots)]
    if problems:
        problems = [*claim.changed, *order, *problems]
    noise = [each for tensor in tensors for each in tensor.noise_off()]
    return WeightsResult(
        passed=not problems,
        tensors=len(tensors),
        blocks=sum(len(tensor.blocks.sources) for tensor in tensors),
        noise_blocks=sum(len(tensor.blocks.gaps()) for tensor in tensors)
        if claim.record.fill.kind is not FillKind.ZEROS
        else 0,
        slots=len(slots),
        problems=tuple(problems),
        bytes_read=read + sources + (slot_bytes if checked else 0),
        noise_mean_off=max((mean for mean, _ in noise), default=None),
        noise_std_off=max((std for _, std in noise), default=None),
    )


@dataclass
class _Wrong:
    """The values of a block that are not what they should be: how many, and the first with both values."""

    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    count: int = 0
    first: tuple[tuple[int, ...], float, float] | None = None

    def add(self, wrong: npt.NDArray[np.bool_], at: Region, found: Array, expected: Array) -> None:
        """Counts in the wrong values of a piece that lies at a region of its block."""
        count = int(np.count_nonzero(wrong))
        if not count:
            return
        index = tuple(int(i) for i in np.unravel_index(int(wrong.argmax()), wrong.shape))
        place = tuple(r.start + i for r, i in zip(at, index, strict=True))
        with self.lock:
            self.count += count
            # The smallest place counts as the first one: threads come in any order, and a report must not depend on
            # that.
            if self.first is None or place < self.first[0]:
                self.first = (place, float(found[index]), float(expected[index]))


class _Sums:
    """Sums over the values of stacked kernels, from pieces in any order: for each its mean, deviation and maximum."""

    def __init__(self, kernels: int) -> None:
        self._lock = threading.Lock()
        self.count, self.total, self.squares, self.largest = (np.zeros(kernels) for _ in range(4))

    def add(self, values: Array, stacked: int | None, at: Region) -> None:
        """Counts in float64 values that lie at a region of the block; `stacked` is the axis of the layers."""
        rows = np.moveaxis(values, stacked, 0) if stacked is not None else values[None]
        rows = rows.reshape(len(rows), -1)
        layers = slice(at[stacked].start, at[stacked].stop) if stacked is not None else slice(0, 1)
        with self._lock:
            self.count[layers] += rows.shape[1]
            self.total[layers] += rows.sum(axis=1)
            self.squares[layers] += np.einsum("ij,ij->i", rows, rows)
            self.largest[layers] = np.maximum(self.largest[layers], np.abs(rows).max(axis=1, initial=0.0))

    @property
    def mean(self) -> Array:
        return np.asarray(self.total / np.maximum(self.count, 1))

    @property
    def std(self) -> Array:
        return np.asarray(np.sqrt(np.maximum(self.squares / np.maximum(self.count, 1) - self.mean**2, 0.0)))


class _Tensor:
    """One parameter of the fused model beside its sources', cut up by the axes' names."""

    def __init__(self, claim: Claim, name: str, row: Row, progress: Progress) -> None:
        self.name = name
        self.blocks = claim.blocks(row)
        self._claim = claim
        self._progress = progress
        self._fused = claim.tree.full(name)
        self._leaf = claim.fused.leaves[self._fused]
        self._stacked = row.spec.stacked_axis
        self._layers = 1 if self._stacked is None else self._leaf.shape[self._stacked]
        self._misplaced: list[str] = []
        self._own = [_Wrong() for _ in self.blocks.sources]
        self._kernels = [_Sums(self._layers) for _ in self.blocks.sources]
        self._gaps = [_Gap(i, j, self._region(at), self._layers) for i, j, at in self.blocks.gaps()]

    def comparisons(self, budget_bytes: int) -> Iterator[Task]:
        """Tasks that compare each source's own blocks, and the gaps with zeros where they are declared to be zero."""
        if self.blocks.shared and self.blocks.record.means_shared:
            yield self._leaf.nbytes * BYTES_PER_VALUE, self._compare_mean
            return
        # A source that is fused with itself is read once for all of its places.
        for i in self._claim.distinct:
            places = [k for k in self.blocks.sources if self._claim.sources[k] is self._claim.sources[i]]
            leaf = self._claim.sources[i].leaves[self._claim.trees[i].full(self.name)]
            regions = [self._region(self.blocks.own(k)) for k in places]
            if any(tuple(map(len, region)) != leaf.shape for region in regions):
                shape = [list(map(len, region)) for region in regions]
                self._misplaced.append(f"source {i} is {list(leaf.shape)}, its place is {shape[0]}")
                continue
            edges = common_tile(leaf.shape, [leaf.chunks, self._leaf.chunks], budget_bytes // BYTES_PER_VALUE)
            for tile in tiles(leaf.shape, edges):
                yield size(tile) * BYTES_PER_VALUE, partial(self._compare, i, places, regions, tile)
        if self.blocks.record.fill.kind is FillKind.ZEROS:
            for gap in self._gaps:
                for tile in gap.pieces(self._leaf.chunks):
                    yield size(tile) * BYTES_PER_VALUE, partial(self._expect_zero, gap, tile)

    def measurements(self) -> Iterator[Task]:
        """Tasks that compare the noise in the gaps with the declared one."""
        if self._noisy:
            for gap in self._gaps:
                for tile in gap.pieces(self._leaf.chunks):
                    yield size(tile) * BYTES_PER_VALUE, partial(self._measure, gap, tile)

    def problems(self) -> Iterator[str]:
        """Everything about the tensor that is not as declared."""
        yield from (f"{self.name}: {problem}" for problem in self._misplaced)
        for i, wrong in enumerate(self._own):
            if wrong.first is not None:
                at, found, expected = wrong.first
                total = math.prod(map(len, self._region(self.blocks.own(i))))
                yield (
                    f"{self.name}: source {i} differs in {wrong.count:,} of {total:,} values, "
                    f"first at {list(at)}: {found:.9g}, not {expected:.9g}"
                )
        for gap in self._gaps:
            yield from (
                f"{self.name}: the block from source {gap.reads} to source {gap.writes}{problem}"
                for problem in self._gap_problems(gap)
            )

    def noise_off(self) -> Iterator[tuple[float, float]]:
        """How many standard errors the mean and the deviation of each noise block are from the declared ones."""
        for gap in self._gaps:
            for k, std in enumerate(self._declared_std(gap)):
                if self.blocks.record.fill.kind is not FillKind.ZEROS and std > 0.0:
                    yield noise_off(gap.sums.mean[k], gap.sums.std[k], std, gap.sums.count[k])

    @property
    def _noisy(self) -> bool:
        return bool(self._gaps) and self.blocks.record.fill.kind is not FillKind.ZEROS

    def _compare_mean(self) -> None:
        """Compares a tensor that does not grow with the weighted mean of the sources'."""
        sources = [c.read(t.full(self.name)) for c, t in zip(self._claim.sources, self._claim.trees, strict=True)]
        weights = self.blocks.record.weights
        expected = np.asarray(sum(w * s.astype(np.float64) for w, s in zip(weights, sources, strict=True)))
        found = self._claim.fused.read(self._fused)
        self._own[0].add(~within_rounding(found, expected), whole(found.shape), found, expected)
        self._progress.advance(self.name, found.nbytes)

    def _compare(self, i: int, places: list[int], regions: list[Region], tile: Region) -> None:
        source = self._claim.sources[i].read(self._claim.trees[i].full(self.name), tile)
        for k, region in zip(places, regions, strict=True):
            found = self._read(region, tile)
            noise = [self._read(self._region(at), tile) for at in self.blocks.takes_noise_off(k)]
            for at, cut in _slabs(tile):
                self._compare_slab(k, at, source[cut], found[cut], [each[cut] for each in noise])
        self._progress.advance(self.name, source.nbytes * (1 + len(places)))

    def _compare_slab(self, k: int, at: Region, source: Array, found: Array, noise: list[Array]) -> None:
        scale = self.blocks.scale(k)
        if scale == 1.0 and not noise:  # and so no offset
            expected = source.astype(found.dtype, copy=False)
            self._own[k].add(found != expected, at, found, expected)
        else:
            expected = self.blocks.exact(k, source, noise, found.dtype)
            self._own[k].add(~within_rounding(found, expected), at, found, expected)
        if self._noisy:
            kernel = source.astype(np.float64) * scale
            # Noise is relative to the kernel as it stands there, where it has kept its dtype.
            kernel = kernel.astype(found.dtype).astype(np.float64) if found.dtype == source.dtype else kernel
            self._kernels[k].add(kernel, self._stacked, at)

    def _expect_zero(self, gap: _Gap, tile: Region) -> None:
        found = self._read(gap.region, tile)
        gap.wrong.add(found != 0, tile, found, np.zeros_like(found))
        self._progress.advance(self.name, found.nbytes)

    def _measure(self, gap: _Gap, tile: Region) -> None:
        found = self._read(gap.region, tile)
        for at, cut in _slabs(tile):
            self._measure_slab(gap, at, found[cut])
        self._progress.advance(self.name, found.nbytes)

    def _measure_slab(self, gap: _Gap, at: Region, found: Array) -> None:
        fill, values = self.blocks.record.fill, found.astype(np.float64)
        # Without a seed only mean and deviation can be compared, which say little of a small block; with it, every
        # value is.
        gap.sums.add(values, self._stacked, at)
        if fill.seed is None:
            return
        kernel = self._kernels[gap.writes]
        # Of what is packed, the noise is laid out over the pack.
        stored, shape, region = place_of(self._claim.fused, self._fused, _within(gap.region, at))
        name = self._claim.tree.naming.bare(stored)
        noise = unit_noise(fill.seed, name, shape, region).astype(np.float64) * fill.noise_scale
        expected = noise * self._by_layer(kernel.std, at)
        # The tool's own standard deviation is exact to 2**-18 of the largest magnitude.
        allowed = np.abs(noise) * self._by_layer(kernel.largest, at) * 2.0**-18
        wrong = ~(np.abs(values - expected) <= allowed + unit(found.dtype.name, np.abs(values)))
        gap.wrong.add(wrong, at, found, expected)

    def _gap_problems(self, gap: _Gap) -> Iterator[str]:
        fill, total = self.blocks.record.fill, math.prod(map(len, gap.region))
        if fill.kind is FillKind.ZEROS:
            if gap.wrong.count:
                yield f": {gap.wrong.count:,} of {total:,} values are not zero"
            return
        for k, std in enumerate(self._declared_std(gap)):
            layer = f", layer {k}" if self._stacked is not None else ""
            mean_off, std_off = noise_off(gap.sums.mean[k], gap.sums.std[k], std, gap.sums.count[k])
            if std == 0.0 and gap.sums.largest[k]:
                yield f"{layer}: noise beside a constant kernel, which has no standard deviation"
            elif not (mean_off <= STANDARD_ERRORS and std_off <= STANDARD_ERRORS):
                found = f"mean {gap.sums.mean[k]:.3g} and std {gap.sums.std[k]:.3g}"
                yield f"{layer}: noise of {found}, declared 0 and {std:.3g}"
        if gap.wrong.first is not None:
            at, found_value, expected = gap.wrong.first
            yield (
                f": {gap.wrong.count:,} of {total:,} values are not the noise of seed {fill.seed}, "
                f"first at {list(at)}: {found_value:.9g}, not {expected:.9g}"
            )

    def _declared_std(self, gap: _Gap) -> Array:
        return self._kernels[gap.writes].std * self.blocks.record.fill.noise_scale

    def _by_layer(self, values: Array, tile: Region) -> Array:
        """One value for each stacked kernel, shaped to be multiplied with a piece of the block."""
        if self._stacked is None:
            return values
        shape = [-1 if axis == self._stacked else 1 for axis in range(len(tile))]
        return values[tile[self._stacked].start : tile[self._stacked].stop].reshape(shape)

    def _region(self, at: Slices) -> Region:
        return tuple(range(n)[cut] for n, cut in zip(self._leaf.shape, at, strict=True))

    def _read(self, block: Region, tile: Region) -> Array:
        return self._claim.fused.read(self._fused, _within(block, tile))


class _Gap:
    """A block between two sources, and what was found there."""

    def __init__(self, writes: int, reads: int, region: Region, layers: int) -> None:
        self.writes, self.reads, self.region = writes, reads, region
        self.wrong = _Wrong()
        self.sums = _Sums(layers)

    def pieces(self, chunks: tuple[int, ...]) -> Iterator[Region]:
        """The regions, counted from the block's corner, that are worked on at once."""
        shape = tuple(map(len, self.region))
        return tiles(shape, common_tile(shape, [chunks], size(self.region)))


class _Slot:
    """A slot of the optimizer that was declared as reset."""

    def __init__(self, claim: Claim, name: str, progress: Progress) -> None:
        self.name = name
        self._fused: Checkpoint = claim.fused
        self._progress = progress
        self.wrong = _Wrong()

    def tasks(self) -> Iterator[Task]:
        leaf = self._fused.leaves[self.name]
        for tile in tiles(leaf.shape, leaf.chunks):
            yield size(tile) * leaf.itemsize * 2, partial(self._compare, tile)

    def says(self) -> str:
        return f"{self.name}: declared as reset, and not zero"

    def _compare(self, tile: Region) -> None:
        found = self._fused.read(self.name, tile)
        expected = self._expected(tile)
        self.wrong.add(self._differ(found, expected), tile, found, expected)
        self._progress.advance(self.name, found.nbytes)

    def _expected(self, tile: Region) -> Array:
        return np.zeros(tuple(map(len, tile)))

    def _differ(self, found: Array, expected: Array) -> npt.NDArray[np.bool_]:
        return np.asarray(found != expected)


class _KeptSlot(_Slot):
    """What of a state is as it is in the first source: a setting of the optimizer, or how many updates there were."""

    def __init__(self, claim: Claim, name: str, progress: Progress) -> None:
        super().__init__(claim, name, progress)
        self._first = claim.sources[0]

    def tasks(self) -> Iterator[Task]:
        leaf = self._fused.leaves[self.name]
        for tile in tiles(leaf.shape, leaf.chunks):
            # Both sides, their difference and what is allowed in float64, and what a source's chunk takes to be read.
            held = size(tile) * (leaf.itemsize + 7 * np.dtype(np.float64).itemsize)
            yield held + leaf.reading_bytes, partial(self._compare, tile)

    def says(self) -> str:
        assert self.wrong.first is not None
        at, found, expected = self.wrong.first
        return (
            f"{self.name}: {self.wrong.count:,} values are not what the sources' state makes, "
            f"first at {list(at)}: {found:.9g}, not {expected:.9g}"
        )

    def _expected(self, tile: Region) -> Array:
        return self._first.read(self.name, tile).astype(np.float64)


class _CarriedSlot(_KeptSlot):
    """A slot of a parameter's that was carried over from the sources', or of an asymmetric state."""

    def __init__(self, claim: Claim, name: str, progress: Progress, states: Slots) -> None:
        super().__init__(claim, name, progress)
        parameter, self._slot = states.fused.names_of(name)
        assert parameter is not None
        self._parameter = parameter
        self._states = states

    def _expected(self, tile: Region) -> Array:
        kept = self._states.kept(self._parameter, self._slot)
        if kept is None:
            return np.zeros(tuple(map(len, tile)))
        return self._states.expected(self._parameter, self._slot, kept, tile)

    def _differ(self, found: Array, expected: Array) -> npt.NDArray[np.bool_]:
        off = np.abs(found.astype(np.float64) - expected)
        allowed = np.maximum(unit(found.dtype.name, np.abs(expected)), MEAN_TOLERANCE * np.abs(expected))
        # A NaN is not within anything.
        return np.asarray(~(off <= allowed))


def _declared_slots(claim: Claim, slots: list[str], progress: Progress) -> tuple[list[_Slot], list[str]]:
    """The slots that can be compared with what they were declared as, and why the others cannot."""
    reset = claim.record.optimizer == OnState.RESET
    if not (reset or claim.record.optimizer in _CARRIED) or not slots:
        return [], []
    try:
        fused = find_state(claim.fused.shapes, claim.tree, claim.fused.path)
    except FusectlError:
        # Told where the state is looked at as a whole.
        return [_Slot(claim, name, progress) for name in slots if reset], []
    # A reset starts moments from zero and leaves settings alone; whatever was carried keeps its counters, on which
    # Adam's bias correction and Adafactor's decay depend.
    kept = fused.settings if reset else fused.beside.keys() - fused.anew
    zeros = fused.anew if not reset else frozenset(slots) - kept
    beside = [_KeptSlot(claim, name, progress) for name in kept] + [_Slot(claim, name, progress) for name in zeros]
    if reset:
        return beside, []
    try:
        states = Slots(claim, fused)
        own = (name for name in slots if name not in fused.beside)
        return [*beside, *(_CarriedSlot(claim, name, progress, states) for name in own)], []
    except FusectlError as error:
        return [], [f"the optimizer's state cannot be compared: {error.message}", *error.details]


def noise_off(mean: float, std: float, declared: float, count: float) -> tuple[float, float]:
    """How many standard errors a sample's mean is from 0, and its deviation from the declared one; 0 for no noise."""
    if declared == 0.0:
        return 0.0, 0.0
    return abs(mean) / (declared / math.sqrt(count)), abs(std / declared - 1.0) * math.sqrt(2.0 * count)


def _slabs(tile: Region) -> Iterator[tuple[Region, Slices]]:
    """A piece of a block cut into slabs: where each is in the block, and in the piece."""
    edge = [len(r) for r in tile]
    for axis, n in enumerate(edge):
        edge[axis] = max(1, min(n, n * SLAB // max(1, math.prod(edge))))
    for at in tiles_in(tile, tuple(edge)):
        yield at, slices(at, tile)


def _within(block: Region, tile: Region) -> Region:
    """A piece of a block as a region of the whole tensor."""
    return shifted(tile, whole(tuple(map(len, block))), block)


def _other_order(claim: Claim) -> list[str]:
    """Whether the sources are the right ones in another order, as their norms' scales tell."""
    if len(claim.distinct) < 2:
        return []
    # Scales of norms are small, different in every model, and mostly stored as they are, so that trying all orders is
    # cheap.
    norms = [
        name
        for name, row in claim.tree.rows.items()
        if not row.spec.inputs and not row.before_head and "stack" not in row.spec.axes and "embed" in row.spec.outputs
    ]
    scales = [[claim.sources[i].read(claim.trees[i].full(name)) for name in norms] for i in range(len(claim.sources))]
    fused = [claim.fused.read(claim.tree.full(name)) for name in norms]

    def fits(order: tuple[int, ...]) -> bool:
        return all(
            np.array_equal(np.concatenate([scales[i][k] for i in order], axis), values)
            for k, values in enumerate(fused)
            for axis in [claim.tree.rows[norms[k]].spec.axes.index("embed")]
        )

    given = tuple(range(len(claim.sources)))
    if len(given) > MOST_ORDERED or fits(given):
        return []
    for order in itertools.permutations(given):
        if fits(order):
            return [f"the sources stand in another order: {', '.join(claim.sources[i].path for i in order)}"]
    return []


def _state_problems(claim: Claim, checked: list[_Slot], slots: list[str]) -> Iterator[str]:
    """What is wrong with everything that is no parameter's value: dtypes, the step, slots, tensors of no use."""
    first = claim.sources[0]
    yield from _dtype_problems(claim)
    now, then = (next((c.read(name) for name in STEPS if name in c.leaves), None) for c in (claim.fused, first))
    if then is not None and now is None:
        yield "the step is gone"
    elif now is not None and then is not None:
        expected = then if claim.record.step is None else claim.record.step
        if now.dtype != then.dtype or now != expected:
            yield f"the step: {now} ({now.dtype}), {expected} ({then.dtype}) in the first source, or as it was set"
    known = {*map(claim.tree.full, claim.tree.rows), *slots, *STEPS}
    streams = _streams(claim)
    strange = [name for name in claim.fused.leaves if name not in known | streams.keys() and name not in first.leaves]
    yield from (f"{name}: no part of a fusion" for name in strange)
    yield from _stream_problems(claim, streams)
    if claim.record.optimizer == OnState.DROP and slots:
        yield "the optimizer's slots: declared as dropped, and there"
    if claim.record.optimizer not in {OnState.RESET, *_CARRIED}:
        return
    if not slots:
        yield "the optimizer's slots are gone"
        return
    try:
        find_state(claim.fused.shapes, claim.tree, claim.fused.path)
    except FusectlError as error:
        yield from (f"slot {detail}" for detail in error.details)
    for slot in checked:
        was, now_is = first.leaves.get(slot.name), claim.fused.leaves[slot.name]
        if was is not None and was.dtype != now_is.dtype:
            yield f"{slot.name}: {now_is.dtype}, {was.dtype} in the first source"
        if slot.wrong.count:
            yield slot.says()


def _streams(claim: Claim) -> Mapping[str, Checkpoint]:
    """The streams of random numbers that should have come along, each with the first source that has it."""
    found: dict[str, Checkpoint] = {}
    for source in claim.sources:
        for name in kept_shapes(source.shapes, claim.record.drop):
            if is_stream(name) and not is_state(name):
                found.setdefault(name, source)
    return found


def _stream_problems(claim: Claim, streams: Mapping[str, Checkpoint]) -> Iterator[str]:
    """Streams that a fusion of fusectl's has lost, or that are not those of their sources."""
    for name, source in streams.items() if claim.fused.record is not None else ():
        if name not in claim.fused.leaves:
            yield f"{name}: missing"
        elif claim.fused.read(name).tobytes() != source.read(name).tobytes():
            yield f"{name}: not that of {source.path}"


def _dtype_problems(claim: Claim) -> Iterator[str]:
    """Parameters keep the dtype of the first source's, or all of them have been cast to one."""
    now = {name: claim.fused.leaves[claim.tree.full(name)].dtype for name in claim.tree.rows}
    then = {name: claim.sources[0].leaves[claim.trees[0].full(name)].dtype for name in claim.tree.rows}
    odd = [name for name in now if now[name] != then[name]]
    if odd and len(set(now.values())) > 1:
        yield from (f"{name}: {now[name]}, {then[name]} in the first source" for name in odd)
