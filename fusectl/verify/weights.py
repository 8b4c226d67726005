"""The weights level: every block of the fused tensors against the sources, re-derived with numpy slices.

It knows the family's table (which axis is which) and nothing of plans, layouts and the executor. Blocks that are copies
must be equal to the bit; scaled ones to the last bit of their dtype; what no source covers must be zero, or noise
of the mean and standard deviation that the record declares.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fusectl.archs.table import Row
from fusectl.errors import FusectlError
from fusectl.fill import unit_noise
from fusectl.formats.tree import STEPS
from fusectl.formats.zarr import np_dtype
from fusectl.record import Record
from fusectl.transforms.optimizer import STATE, find_state


if TYPE_CHECKING:
    from fusectl.verify import Claim


Array = npt.NDArray[Any]

# A sample of n normal values strays this many standard errors once in 500 million times.
STANDARD_ERRORS = 6.0


@dataclass(frozen=True)
class WeightsResult:
    """What the weights level found. `noise_blocks` counts the blocks whose noise was measured."""

    passed: bool
    tensors: int
    blocks: int
    noise_blocks: int
    slots: int
    problems: tuple[str, ...]


def check_weights(claim: Claim) -> WeightsResult:
    """Compares every parameter, the optimizer's slots and the step with what the sources and the record say."""
    problems: list[str] = []
    blocks = noise_blocks = 0
    for name, row in claim.tree.rows.items():
        fused = claim.fused.read(claim.tree.prefix + name)
        sources = [s.read(t.prefix + name) for s, t in zip(claim.sources, claim.trees, strict=True)]
        view = FusedTensor(name, row, fused, sources, claim.record)
        problems += view.problems()
        blocks += len(sources)
        noise_blocks += len(view.gaps()) if claim.record.fill.kind != "zeros" else 0
    slots = [name for name in claim.fused.leaves if name.startswith(STATE)]
    problems += _slot_problems(claim, slots)
    return WeightsResult(not problems, len(claim.tree.rows), blocks, noise_blocks, len(slots), tuple(problems))


@dataclass(frozen=True)
class FusedTensor:
    """A fused tensor beside its sources', cut up by the axes' names."""

    name: str
    row: Row
    fused: Array
    sources: list[Array]
    record: Record

    def own(self, i: int) -> tuple[slice, ...]:
        """Where source i is."""
        return self._at(dict.fromkeys(self.row.spec.axes, i))

    def gaps(self) -> list[tuple[int, int, tuple[slice, ...]]]:
        """The blocks that no source covers: (output's source, input's source, where)."""
        spec, widths = self.row.spec, self.record.widths
        reads = [a for a in spec.axes if a in spec.inputs and a in widths]
        writes = [a for a in spec.axes if a in spec.outputs and a in widths]
        if not reads or not writes:
            return []
        return [
            (i, j, self._at({**dict.fromkeys(writes, i), **dict.fromkeys(reads, j)}))
            for i, j in itertools.permutations(range(len(self.sources)), 2)
        ]

    def scale(self, i: int) -> float:
        """The factor that source i was stored with, so that the sum of the heads is the weighted mean of the logits."""
        weight = self.record.weights[i]
        if self.row.tied_head:
            embed = self.record.widths["embed"]
            return weight * math.sqrt(sum(embed) / embed[i])
        return weight if self.row.spec.inputs == {"embed"} and self.row.spec.outputs == {"vocab"} else 1.0

    def exact(self, i: int) -> Array:
        """What stands at source i's place before rounding: the scaled source, less what antisymmetric noise takes."""
        values = self.sources[i].astype(np.float64) * self.scale(i)
        if self.record.fill.kind == "antisymmetric":
            for output, _, at in self.gaps():
                if output == i:
                    values = values - self.fused[at].astype(np.float64)
        return values

    def problems(self) -> Iterator[str]:
        """Everything about the tensor that is not as declared."""
        for i in range(len(self.sources)):
            yield from self._own_problems(i)
        fill = self.record.fill
        for i, j, at in self.gaps():
            if fill.kind == "zeros":
                count = int(np.count_nonzero(self.fused[at]))
                found = [f": {count:,} of {self.fused[at].size:,} values are not zero"] if count else []
            else:
                found = list(self._noise_problems(at, self.sources[i]))
            yield from (f"{self.name}: the block from source {j} to source {i}{problem}" for problem in found)

    def _noise_problems(self, at: tuple[slice, ...], kernel: Array) -> Iterator[str]:
        """Noise of another mean or deviation than declared; and, where the seed is known, other noise than its own."""
        block, fill = self.fused[at].astype(np.float64), self.record.fill
        field: Array | None = None
        if fill.seed is not None:
            region = tuple(range(n)[cut] for n, cut in zip(self.fused.shape, at, strict=True))
            field = unit_noise(fill.seed, self.name, self.fused.shape, region)
        for layer, pick in self._layers():
            values, own = pick(block), pick(kernel).astype(np.float64)
            problem = noise_problem(values, own, fill.noise_scale)
            if problem:
                yield f"{layer}: {problem}"
            elif field is not None:
                # The tool's own standard deviation is exact to 2**-18 of the largest magnitude.
                off = np.abs(values - pick(field) * fill.noise_scale * own.std())
                allowed = np.abs(pick(field)) * fill.noise_scale * np.abs(own).max() * 2.0**-18
                wrong = int(np.count_nonzero(off > allowed + _epsilon(self.fused.dtype.name) * np.abs(values)))
                if wrong:
                    yield f"{layer}: {wrong:,} of {values.size:,} values are not the noise of seed {fill.seed}"

    def _own_problems(self, i: int) -> Iterator[str]:
        values, exact = self.fused[self.own(i)], self.exact(i)
        if values.shape != exact.shape:
            yield f"{self.name}: source {i} is {list(exact.shape)}, its place is {list(values.shape)}"
            return
        copied = self.scale(i) == 1.0 and not (self.record.fill.kind == "antisymmetric" and self.gaps())
        wrong = values != exact.astype(values.dtype) if copied else ~within_rounding(values, exact)
        if wrong.any():
            at = tuple(int(k) for k in np.argwhere(wrong)[0])
            yield (
                f"{self.name}: source {i} differs in {int(wrong.sum()):,} of {wrong.size:,} values, "
                f"first at {list(at)}: {values[at]:.9g}, not {exact[at]:.9g}"
            )

    def _layers(self) -> Iterator[tuple[str, Callable[[Array], Array]]]:
        """Kernels that are stacked along `layers` have noise of their own standard deviation each."""
        if "layers" not in self.row.spec.axes:
            yield "", lambda values: values
            return
        axis = self.row.spec.axes.index("layers")
        for k in range(self.fused.shape[axis]):
            yield f", layer {k}", partial(_layer, axis=axis, k=k)

    def _at(self, place: dict[str, int]) -> tuple[slice, ...]:
        cut = []
        for axis in self.row.spec.axes:
            widths = self.record.widths.get(axis)
            start = sum(widths[: place[axis]]) if widths else 0
            cut.append(slice(start, start + widths[place[axis]]) if widths else slice(None))
        return tuple(cut)


def _layer(values: Array, axis: int, k: int) -> Array:
    return np.asarray(values.take(k, axis=axis))


def within_rounding(values: Array, exact: Array) -> npt.NDArray[np.bool_]:
    """Where `values` are what their dtype makes of `exact`: at most one unit in the last place away."""
    spacing = _epsilon(values.dtype.name) * np.maximum(np.abs(values.astype(np.float64)), np.abs(exact))
    return np.asarray(np.abs(values.astype(np.float64) - exact) <= spacing)


def noise_problem(values: Array, kernel: Array, noise_scale: float) -> str | None:
    """What is wrong with the mean and deviation of noise that is relative to a kernel's, or None."""
    std = noise_scale * float(kernel.std())
    if std == 0.0:
        return "noise beside a constant kernel, which has no standard deviation" if values.any() else None
    mean_off = abs(values.mean()) / (std / math.sqrt(values.size))
    std_off = abs(values.std() / std - 1.0) * math.sqrt(2.0 * values.size)
    if mean_off > STANDARD_ERRORS or std_off > STANDARD_ERRORS:
        return f"noise of mean {values.mean():.3g} and std {values.std():.3g}, declared 0 and {std:.3g}"
    return None


def _epsilon(dtype: str) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(np_dtype(dtype)).eps)


def _slot_problems(claim: Claim, slots: list[str]) -> Iterator[str]:
    first = claim.sources[0]
    steps = [next((c.read(name) for name in STEPS if name in c.leaves), None) for c in (claim.fused, first)]
    now, then = steps
    if now is not None and then is not None and (now.dtype != then.dtype or now != then):
        yield f"the step: {now} ({now.dtype}), {then} ({then.dtype}) in the first source"
    if claim.record.optimizer == "drop" and slots:
        yield f"{slots[0]}: declared as dropped, and there"
    if claim.record.optimizer != "reset":
        return
    if not slots:
        yield "the optimizer's slots are gone"
        return
    try:
        find_state(claim.fused.shapes, claim.tree, claim.fused.path)
    except FusectlError as error:
        yield from (f"slot {detail}" for detail in error.details)
    for name in slots:
        if claim.fused.read(name).any():
            yield f"{name}: declared as reset, and not zero"
