"""Where the blocks of a fused tensor are, re-derived from the family's table and the record's widths alone.

Nothing of the planner is used: slices and factors for numpy, by which the weights level compares and the algebra level
computes. They fit a whole tensor and any part of it that is cut along an axis that does not grow.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fusectl.families.kinds import FactorIn
from fusectl.families.table import EMBEDDING, Row
from fusectl.formats.record import Record
from fusectl.formats.zarr import epsilon, np_dtype
from fusectl.layout.fill import FillKind


Array = npt.NDArray[Any]
Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Blocks:
    """The blocks of a kind of tensor in a fused model."""

    row: Row
    record: Record
    # Whether the head is the embedding.
    tied: bool

    @property
    def sources(self) -> range:
        return range(len(self.record.weights))

    def own(self, i: int) -> Slices:
        """Where source i is."""
        return self._at(dict.fromkeys(self.row.spec.axes, i))

    def gaps(self) -> list[tuple[int, int, Slices]]:
        """The blocks that no source covers: (output's source, input's source, where)."""
        spec, widths = self.row.spec, self.record.widths
        reads = [a for a in spec.axes if a in spec.inputs and a in widths]
        writes = [a for a in spec.axes if a in spec.outputs and a in widths]
        if not reads or not writes:
            return []
        return [
            (i, j, self._at({**dict.fromkeys(writes, i), **dict.fromkeys(reads, j)}))
            for i, j in itertools.permutations(self.sources, 2)
        ]

    def scale(self, i: int) -> float:
        """The factor that source i is stored with.

        It makes the sum of the heads the weighted mean of the logits, and the sources' residual streams equally large.
        """
        weight, stream = self.record.weights[i], self.record.residual_scales[i]
        network, embed = self.record.network, self.record.widths["embed"]
        if self.shared:
            # All sources use one.
            return weight if self.record.means_shared else 1.0
        part = embed[i] / sum(embed)
        # The fused model multiplies embedded tokens by more than the source did, and the logits of a tied head.
        embedded: float = part**network.embedding_power
        if self.row.role == EMBEDDING:
            return stream * embedded
        by_norm = self.record.factor_in == FactorIn.NORM
        if self.row.before_head and by_norm:
            if not self.tied:
                return weight
            divided: float = part**network.tied_logits_power
            return weight * divided / embedded / stream
        if self.row.writes_stream:
            return stream
        # The planner asks which rows read what grows and write what does not; here it is the head by its axes. The two
        # agree for every table that is accepted, and a table that slipped through would fail here.
        reads_stream = self.row.spec.inputs == {"embed"} and self.row.spec.outputs == {"vocab"}
        return weight if reads_stream and not by_norm else 1.0

    @property
    def shared(self) -> bool:
        """Whether the tensor does not grow: all sources use the same."""
        return not self.record.widths.keys() & set(self.row.spec.axes)

    def offset(self, i: int) -> float:
        """What is added to source i's scaled values: where a norm multiplies with 1 + scale, that 1 is scaled, too."""
        return self.scale(i) - 1.0 if self.row.is_norm and self.record.network.norm_adds_one else 0.0

    def takes_noise_off(self, i: int) -> list[Slices]:
        """The gaps whose noise was subtracted from source i's own block."""
        if self.record.fill.kind is not FillKind.ANTISYMMETRIC:
            return []
        return [at for output, _, at in self.gaps() if output == i]

    def exact(self, i: int, source: Array, taken_off: list[Array], dtype: np.dtype[Any]) -> Array:
        """What stands at source i's place before it was last rounded, in float64.

        It is the scaled source, less the noise that was taken off after it had been rounded to `dtype`.
        """
        values = source.astype(np.float64) * self.scale(i) + self.offset(i)
        if not taken_off:
            return values
        values = values.astype(dtype).astype(np.float64)
        # One after the other: in float64 their sum would be rounded differently.
        for noise in taken_off:
            values = values - noise.astype(np.float64)
        return values

    def _at(self, place: dict[str, int]) -> Slices:
        cut = []
        for axis in self.row.spec.axes:
            widths = self.record.widths.get(axis)
            start = sum(widths[: place[axis]]) if widths else 0
            cut.append(slice(start, start + widths[place[axis]]) if widths else slice(None))
        return tuple(cut)


def within_rounding(values: Array, exact: Array) -> npt.NDArray[np.bool_]:
    """Where `values` are what their dtype makes of `exact`: at most one unit in the last place away."""
    wide = values.astype(np.float64)
    return np.asarray(np.abs(wide - exact) <= unit(values.dtype.name, np.maximum(np.abs(wide), np.abs(exact))))


def unit(dtype: str, magnitude: Array) -> Array:
    """At most two units in the last place of numbers of this magnitude, one of the smallest numbers."""
    # epsilon times a number is one to two of its units in the last place, by its place between two powers of two. Among
    # subnormal numbers the unit shrinks no more.
    smallest = float(ml_dtypes.finfo(np_dtype(dtype)).smallest_subnormal)
    return np.asarray(np.maximum(epsilon(dtype) * magnitude, smallest))
