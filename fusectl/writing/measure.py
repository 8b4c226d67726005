"""What has to be known of whole tensors before any part of an output can be computed: deviations, and means."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.layout.blocks import Mean, Term, size, slices, tiles_in, whole
from fusectl.layout.noise import Moments
from fusectl.planning.plan import Output, Plan
from fusectl.system.threads import Progress, in_parallel
from fusectl.writing.work import Work, read_finite


Array = npt.NDArray[Any]
# Of values that a kernel's deviation is computed from at once: they stay in the processor's cache.
_PIECE = 1 << 16


def measure_kernels(plan: Plan, work: Work, *, jobs: int, progress: Progress) -> dict[tuple[Term, int | None], Array]:
    """The standard deviation of every kernel that noise is relative to and that is too large to be read at once.

    For each of them one value, or one per stacked kernel. The others are measured where they are used.
    """
    wanted = {
        kernel: output
        for output in plan.outputs
        if not output.at_once
        for block in output.layout.blocks
        for summand in block.terms
        for kernel in summand.kernels
    }
    if not wanted:
        return {}
    leaves = {kernel: work.sources[kernel.source].leaves[kernel.tensor] for kernel, _ in wanted}
    progress.start("measuring kernels", sum(2 * size(k.region) * leaf.itemsize for k, leaf in leaves.items()))
    found: dict[tuple[Term, int | None], Array] = {}

    def measure(kernel: Term, axis: int | None, output: Output) -> None:
        leaf = leaves[kernel]
        shape = tuple(map(len, kernel.region))
        edge = tuple(min(c, n) for c, n in zip(leaf.chunks, shape, strict=True))

        def pieces() -> Iterator[tuple[int, Array]]:
            for region in tiles_in(kernel.region, edge):
                values = read_finite(work, kernel, region)
                progress.advance(kernel.tensor, values.nbytes)
                first = region[axis].start - kernel.region[axis].start if axis is not None else 0
                for layer, piece in kernel_pieces(values, kernel.scale, axis, kept=output.layout.dtype == leaf.dtype):
                    yield first + layer, piece

        found[kernel, axis] = deviations(pieces, 1 if axis is None else shape[axis])

    tasks = (
        (2 * leaves[kernel].reading_bytes, partial(measure, kernel, axis, output))
        for (kernel, axis), output in wanted.items()
    )
    in_parallel(tasks, budget_bytes=plan.resources.budget, jobs=jobs)
    return found


def measure_means(plan: Plan, work: Work, *, jobs: int, progress: Progress) -> dict[Mean, Array]:
    """Every mean that the plan's products are made of, in float64."""
    wanted = dict.fromkeys(
        mean
        for output in plan.outputs
        for block in output.layout.blocks
        for summand in block.terms
        for mean in summand.means
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


def kernel_pieces(values: Array, scale: float, stacked_axis: int | None, *, kept: bool) -> Iterator[tuple[int, Array]]:
    """The values of a kernel, or of several that are stacked, in small pieces, each with its place among them.

    They are as they will stand in the output, if that keeps (`kept`) the source's dtype: filling it later measures the
    same.
    """
    kernels = values[None] if stacked_axis is None else np.moveaxis(values, stacked_axis, 0)
    for i, kernel in enumerate(kernels):
        flat = kernel.reshape(-1)
        for start in range(0, flat.size, _PIECE):
            piece = flat[start : start + _PIECE]
            if scale != 1.0:
                scaled = piece.astype(np.float64) * scale
                piece = scaled.astype(values.dtype) if kept else scaled
            yield i, piece


def deviations(pieces: Callable[[], Iterable[tuple[int, Array]]], count: int) -> Array:
    """The standard deviations of `count` kernels, from their pieces in any order, which are passed twice."""
    # The first pass finds the unit that the second one rounds to. A unit that grew on the way would make the integers,
    # and with them the noise, depend on the order of the pieces.
    largest = np.zeros(count)
    for i, piece in pieces():
        largest[i] = max(largest[i], float(piece.max()), -float(piece.min()))
    moments = [Moments(float(value)) for value in largest]
    for i, piece in pieces():
        moments[i].add(piece.astype(np.float64))
    return np.array([m.std for m in moments])
