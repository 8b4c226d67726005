"""The paper's coordinates of a fused model, and the losses of the small models and of the large one on them.

    theta = (theta_1 … theta_K, theta_0)      the small models' parameters as they are, and the zero blocks between them

A tensor of theta has the fused shape: source k in its own cell, theta_0 in the others. What is stored may be a multiple
of it: the norm before the head of K models, or that head, is divided by K, the norm before a tied one by less. Here
stored = scale * theta, and so one gradient rule holds for all tensors (the lemmas). A point is the dict of its tensors,
by their names.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from fusectl.families.kinds import Norm
from fusectl.families.recognized import Recognized
from fusectl.layout.blocks import Block, Layout, Product, Region, Term, slices, whole
from fusectl.layout.fill import Fill
from fusectl.networks.training import loss_of
from fusectl.research.theory.field import Losses
from fusectl.rules.fusion import Fusion, fused, noisy
from fusectl.sources.opened import Opened, read_finite


Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Space:
    """The coordinates of a fusion of these sources; `norm` is the fused model's, as in Record."""

    fusion: Fusion
    sources: Sequence[Opened]
    norm: str
    dtype: str

    @cached_property
    def layouts(self) -> Mapping[str, Layout]:
        """What every fused parameter is made of, with zeros between the sources."""
        return {
            name: fused(self.fusion, name, self.dtype, Fill(), [source.full(name) for source in self.sources])
            for name in self.fusion.tree.shapes
        }

    @cached_property
    def tree(self) -> Recognized:
        """The fused model's tree."""
        return replace(self.fusion.tree, shapes={name: layout.shape for name, layout in self.layouts.items()})

    @property
    def size(self) -> int:
        """The number of coordinates."""
        return self.tree.parameters

    @property
    def alike(self) -> bool:
        """Whether all sources have the same widths, so that they can be exchanged for each other."""
        return all(len(set(widths)) == 1 for widths in self.fusion.widths.values())

    @property
    def self_fused(self) -> bool:
        """Whether the sources are copies of one model."""
        return len(set(self.sources)) == 1

    def own(self, name: str) -> list[Region]:
        """For each source the region of a tensor that is its own; of one that all of them share, all of it, once."""
        if self.fusion.is_shared(name):
            return [whole(self.layouts[name].shape)]
        return self.fusion.cells(name)

    def zeros(self, name: str) -> list[Region]:
        """The zero blocks of a tensor, from each source's inputs to each other one's outputs."""
        row = self.tree.rows[name]
        if not noisy(self.fusion, row):
            return []
        return [
            self.fusion.cell(name, {**dict.fromkeys(row.spec.inputs, j), **dict.fromkeys(row.spec.outputs, i)})
            for i, j in itertools.permutations(range(self.fusion.copies), 2)
        ]

    def start(self) -> dict[str, Array]:
        """The point right after the fusion, theta_0 = 0; raises Corrupt for a NaN or Inf in a source."""
        # The point is filled with the sources' values and not with what is stored: in these coordinates a copy's
        # gradient is 1/K of the small model's for every tensor, the norm before the head included, and the lemmas need
        # no exceptions.
        point = {name: np.zeros(layout.shape, self.dtype) for name, layout in self.layouts.items()}
        for name, tensor in point.items():
            read: dict[Opened, Array] = {}
            for source, region in zip(self.sources, self.own(name), strict=False):
                if source not in read:
                    read[source] = read_finite(source.checkpoint, source.full(name))
                tensor[slices(region)] = read[source]
        return point

    def stored(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of the fused model, as they would be stored, traced by JAX."""
        tensors = dict(point)
        for name, layout in self.layouts.items():
            for block in layout.blocks:
                scale, offset = _scaled(block)
                if (scale, offset) != (1.0, 0.0):
                    at = slices(block.at)
                    tensors[name] = tensors[name].at[at].set(scale * tensors[name][at] + offset)
        return tensors

    def of_source(self, point: Mapping[str, Any], source: int) -> dict[str, Any]:
        """The parameters of a source, traced by JAX."""
        found = {}
        for name, tensor in point.items():
            own = self.own(name)
            # A tensor that does not grow is one point for all sources: each of their losses has a gradient there.
            found[name] = tensor[slices(own[source if len(own) > 1 else 0])]
        return found

    def losses(self, batch: Mapping[str, Any]) -> Losses:
        """L_S, the sum of the small models' losses, and L_B, the large one's, on a batch (Eq. 8 and 9)."""
        groups = [source.norm_groups if self.norm == Norm.PROPERTY else () for source in self.sources]
        kinds: dict[Any, list[int]] = {}
        for i, source in enumerate(self.sources):
            kinds.setdefault((tuple(source.tree.shapes.items()), groups[i]), []).append(i)

        def small(point: Mapping[str, Any]) -> Any:
            total = 0.0
            # Models of one shape side by side: they are compiled once.
            for members in kinds.values():
                each = [self.of_source(point, i) for i in members]
                stacked = {name: jnp.stack([parameters[name] for parameters in each]) for name in each[0]}
                tree, own = self.sources[members[0]].tree, groups[members[0]]
                total += jax.vmap(lambda p: loss_of(tree, p, batch, norm_groups=own, dtype=self.dtype))(stacked).sum()  # noqa: B023
            return total

        def big(point: Mapping[str, Any]) -> Any:
            together = tuple(group for own in groups for group in own)
            return loss_of(self.tree, self.stored(point), batch, norm_groups=together, dtype=self.dtype)

        return Losses(small, big)


def _scaled(block: Block) -> tuple[float, float]:
    """What the values of a source are multiplied with in a block of zeros' fusion, and what is added."""
    (scale,) = (term.scale for term in block.terms if isinstance(term, Term))
    return scale, sum(term.scale for term in block.terms if isinstance(term, Product))
