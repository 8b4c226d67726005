"""The matrices that axes are expanded with, as they are applied: for heads with their features, for inputs inverted.

outputs    B (large, small)                          W' = A W B^T of a kernel (inputs, outputs)
inputs     A = B (B^T B)^-1, so that A^T B = I        what B duplicates, A counts once (Net2Net; LiGO's A, tied)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.errors import Incompatible
from fusectl.formats.tree import Checkpoint
from fusectl.layout.blocks import Expansion, whole
from fusectl.system.lru import Cache


Array = npt.NDArray[Any]
# Of B^T B; above it, digits of the inverse are noise.
LARGEST_CONDITION = 1e12


class Matrices:
    """The matrices of an operator among `sources`, in float64, the last ones of which are kept: one at least."""

    def __init__(self, sources: Sequence[Checkpoint], most_bytes: int) -> None:
        self._sources = sources
        self._cache = Cache(most_bytes)

    def of(self, expansion: Expansion) -> Array:
        """The matrix (large, small) that an axis is multiplied with; raises Incompatible where it has no inverse."""
        # Whatever axis it is for.
        return self._cache.get(replace(expansion, axis=0), partial(self._made, expansion))

    def _made(self, expansion: Expansion) -> Array:
        source = self._sources[expansion.source]
        region = list(whole(source.leaves[expansion.tensor].shape))
        if expansion.index is not None:
            region[0] = range(expansion.index, expansion.index + 1)
        values = source.read(expansion.tensor, tuple(region)).astype(np.float64)
        matrix = values if expansion.index is None else values[0]
        if expansion.inverse:
            matrix = dual(matrix, f"{source.path}: {expansion.tensor}")
        return np.kron(matrix, np.eye(expansion.repeat)) if expansion.repeat > 1 else matrix


def dual(matrix: Array, where: str) -> Array:
    """B (B^T B)^-1 of a matrix B (large, small); raises Incompatible where B^T B has no inverse worth the name."""
    # B^T B is as small as the small model, so that inverting it costs little next to an SVD of B; it squares the
    # condition of B, which is why the limit is a limit of B^T B.
    gram = matrix.T @ matrix
    try:
        inverse = np.linalg.inv(gram)
    except np.linalg.LinAlgError:
        inverse = np.full(gram.shape, np.inf)
    condition = float(np.abs(gram).sum(axis=0).max() * np.abs(inverse).sum(axis=0).max())
    # A NaN is never below the limit.
    if not condition < LARGEST_CONDITION:
        raise Incompatible(
            f"{where}: its columns are not independent, so that nothing undoes it",
            details=(f"the condition of B^T B is {condition:.1e}",),
            hint="--tie paper needs no inverse",
        )
    return matrix @ inverse
