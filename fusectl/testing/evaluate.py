"""The values that a Layout describes, from whole arrays in memory and in float64.

It shares nothing with the executor but the noise field, so that a fact about values can be shown on a plan, in
milliseconds, and the executor held against it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.formats.tree import Checkpoint
from fusectl.formats.zarr import np_dtype
from fusectl.layout.blocks import Expansion, Layout, Mapped, Noise, Product, Region, Summand, Term
from fusectl.layout.noise import unit_noise
from fusectl.planning.plan import Plan


Array = npt.NDArray[Any]
# The values of a tensor of a source: by the source's place among those of the plan, and the tensor's name.
Read = Callable[[int, str], Array]


def evaluate(
    layout: Layout, read: Read | Sequence[Mapping[str, Array]], *, noise_name: str = "", seed: int = 0
) -> Array:
    """The values of an output tensor, float64 of the layout's shape.

    `read` returns a source's tensor by the source's place and the tensor's full name, or is a mapping of tensors for
    each source. `noise_name` and `seed` choose the field of noise. Nothing is rounded to the layout's dtype. Raises
    ValueError where two blocks overlap, and where a region that has to be zero is not.

    >>> from fusectl.layout.blocks import Block, whole
    >>> kernel = np.array([[1.0, 2.0]])
    >>> blocks = [Block((range(i, i + 1), range(2 * i, 2 * i + 2)), (Term(i, "w", whole((1, 2))),)) for i in (0, 1)]
    >>> evaluate(Layout(("embed", "mlp"), (2, 4), "float32", tuple(blocks)), [{"w": kernel}, {"w": -kernel}])
    array([[ 1.,  2.,  0.,  0.],
           [ 0.,  0., -1., -2.]])
    """
    read_one: Read = read if callable(read) else lambda source, name: read[source][name]
    out = np.zeros(layout.shape)
    covered = np.zeros(layout.shape, bool)
    for block in layout.blocks:
        at = _index(block.at)
        # Blocks have no order: a value in two of them would be that of whichever is computed last.
        if covered[at].any():
            raise ValueError(f"block {block.at} overlaps another one")
        covered[at] = True
        for term in block.terms:
            out[at] += _values(term, layout, tuple(map(len, block.at)), read_one, noise_name, seed)
    return out


def _values(
    term: Summand, layout: Layout, shape: tuple[int, ...], read: Read, noise_name: str, seed: int
) -> Array | float:
    """What a summand adds to a block of this shape."""
    match term:
        case Term():
            values = _region(term, read)
            if not term.must_be_zero:
                return term.scale * values
            if values.any():
                raise ValueError(f"{term.tensor} is not zero at {term.region}")
            return 0.0
        case Noise():
            field = unit_noise(seed, noise_name, layout.shape, term.region).astype(np.float64)
            return term.scale * _deviation(term, read) * field
        case Product():
            return np.broadcast_to(_product(term, shape, read), shape)
        case Mapped():
            values = _region(term.term, read) + term.added
            for each in term.expansions:
                values = np.moveaxis(np.tensordot(_matrix(each, read), values, (1, each.axis)), 0, each.axis)
            return term.term.scale * values
        case _:
            raise TypeError(f"no evaluator for {type(term).__name__}")


def _index(region: Region) -> tuple[slice, ...]:
    return tuple(slice(r.start, r.stop) for r in region)


def _region(term: Term, read: Read) -> Array:
    return np.asarray(read(term.source, term.tensor), np.float64)[_index(term.region)]


def _deviation(noise: Noise, read: Read) -> Array | float:
    """The standard deviation of the kernel that noise is relative to; of stacked ones each of them has its own."""
    # numpy's own formula stands here, where the executor sums up integers, so that a fault of either one shows.
    kernel = noise.like.scale * _region(noise.like, read)
    if noise.stacked_axis is None:
        return float(kernel.std())
    others = tuple(axis for axis in range(kernel.ndim) if axis != noise.stacked_axis)
    return np.asarray(kernel.std(axis=others, keepdims=True))


def _product(product: Product, shape: tuple[int, ...], read: Read) -> Array:
    value = np.full(shape, product.scale)
    for factor in product.factors:
        mean = np.asarray(read(factor.mean.source, factor.mean.tensor), np.float64).mean(axis=factor.mean.over)
        with np.errstate(divide="ignore"):
            powered = mean if factor.power == 1 else np.where(mean > 0, np.power(mean, factor.power), 0.0)
        inside = powered[tuple(slice(0, shape[axis]) for axis in factor.axes)]
        value = value * inside.reshape([shape[axis] if axis in factor.axes else 1 for axis in range(len(shape))])
    return value


def _matrix(expansion: Expansion, read: Read) -> Array:
    """The matrix (large, small) that an axis is multiplied with, each entry for `repeat` neighbours."""
    found = np.asarray(read(expansion.source, expansion.tensor), np.float64)
    matrix = found if expansion.index is None else found[expansion.index]
    if expansion.inverse:
        # numpy goes by singular values, where the executor inverts B^T B; of independent columns both give B (B^T
        # B)^-1.
        matrix = np.linalg.pinv(matrix).T
    return np.kron(matrix, np.eye(expansion.repeat))


def evaluate_plan(plan: Plan, sources: Sequence[Checkpoint]) -> dict[str, Array]:
    """The values of every tensor that a plan writes, each in its dtype: what carrying it out must leave on disk.

    `sources` are the opened checkpoints that the planner returned with the plan. Raises ValueError as `evaluate` does.
    """

    @cache
    def read(source: int, name: str) -> Array:
        return sources[source].read(name)

    seed = plan.record.fill.seed or 0
    # What does not fit into a narrower dtype becomes infinite here; the executor refuses it.
    with np.errstate(over="ignore"):
        return {
            output.name: evaluate(output.layout, read, noise_name=output.noise_name, seed=seed).astype(
                np_dtype(output.layout.dtype)
            )
            for output in plan.outputs
        }
