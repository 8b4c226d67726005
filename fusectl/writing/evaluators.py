"""What each kind of summand is over a part of its block, in float64. One function each, found by the kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fusectl.layout.blocks import (
    Block,
    Mapped,
    Mean,
    Noise,
    Product,
    Region,
    Summand,
    Term,
    shifted,
    slices,
    whole,
)
from fusectl.writing.work import read_finite


if TYPE_CHECKING:
    from fusectl.writing.unit import Unit

Array = npt.NDArray[Any]


def of_term(term: Term, block: Block, part: Region, unit: Unit) -> Array:
    """A region of a source, scaled."""
    return unit.source(term, shifted(part, block.at, term.region)).astype(np.float64) * term.scale


def of_noise(noise: Noise, block: Block, part: Region, unit: Unit) -> Array:
    """A region of the output's field of noise, rounded to the output's dtype."""
    out = np.empty(tuple(map(len, part)), np.float64)
    for at, values in unit.noise(noise, shifted(part, block.at, noise.region)):
        out[at] = values
    return out


def of_product(product: Product, block: Block, part: Region, unit: Unit) -> Array:
    """A product of means; of length one along axes where it is constant."""
    return _product(product, shifted(part, block.at, whole(tuple(map(len, block.at)))), unit.work.means)


def of_mapped(mapped: Mapped, block: Block, part: Region, unit: Unit) -> Array:
    """A kernel whose axes are expanded, scaled.

    What a layer is mapped to goes into many layers, each with a weight of its own: it is kept without that.
    """
    inside = shifted(part, block.at, whole(tuple(map(len, block.at))))
    key = (replace(mapped, term=replace(mapped.term, scale=1.0)), inside)
    values: Array = unit.work.mapped.get(key, partial(_expanded, mapped, block, part, unit))
    return values * mapped.term.scale


EVALUATORS: Mapping[type[Summand], Callable[[Any, Block, Region, Unit], Array]] = {
    Term: of_term,
    Noise: of_noise,
    Product: of_product,
    Mapped: of_mapped,
}


def _expanded(term: Mapped, block: Block, part: Region, unit: Unit) -> Array:
    """A kernel whose axes are expanded, over a part of a block, in float64 and not scaled."""
    values = read_finite(unit.work, term.term, term.read_for(part, block.at)).astype(np.float64)
    if term.added:
        values += term.added
    by_axis = {each.axis: each for each in term.expansions}
    for axis in term.order(part):
        first = block.at[axis].start
        rows = unit.work.matrices.of(by_axis[axis])[part[axis].start - first : part[axis].stop - first]
        values = np.moveaxis(np.tensordot(rows, values, (1, axis)), 0, axis)
    return values


def _product(product: Product, region: Region, means: Mapping[Mean, Array]) -> Array:
    """The values of a product in a region of its block, with an axis of length one where it is constant."""
    value = np.full((1,) * len(region), product.scale)
    for factor in product.factors:
        mean = means[factor.mean][slices(tuple(region[axis] for axis in factor.axes))]
        shape = [1] * len(region)
        for axis in factor.axes:
            shape[axis] = len(region[axis])
        powered = np.power(mean, factor.power, out=np.zeros(mean.shape), where=mean > 0) if factor.power != 1 else mean
        value = value * powered.reshape(shape)
    return value
