"""A tree whose parameters are a family's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from fusectl.families.naming import Naming
from fusectl.families.settings import Network
from fusectl.families.table import Family, Row, stack_of
from fusectl.layout.axes import STACKED


# That of a tree which no table explains.
_NO_FAMILY = Family("", (), frozenset(), lambda _: "no family", trainer="")


@dataclass(frozen=True)
class Recognized:
    """A tree whose parameters are a family's: the rows they fall under, and the sizes that follow."""

    family: Family
    naming: Naming
    shapes: Mapping[str, tuple[int, ...]]
    evidence: str
    rows: Mapping[str, Row] = field(repr=False)
    # What its network computes, where it is told and not the family's default.
    told: Network | None = None

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The size of every axis that is no stack of kernels, in the order of the table."""
        return {name: n for row_name, row in self.rows.items() for name, n in self._named(row_name, row)}

    @cached_property
    def depths(self) -> dict[str, int]:
        """The number of layers of each stack: `{"encoder": 12, "decoder": 12}`."""
        depths: dict[str, int] = {}
        for name, row in self.rows.items():
            for layer in self.layers_of(name) if "#" in row.pattern or "layers" in row.spec.axes else ():
                stack = stack_of(name)
                depths[stack] = max(depths.get(stack, 0), layer + 1)
        return dict(sorted(depths.items(), reverse=True))

    def layers_of(self, name: str) -> range:
        """The layers of its stack that a tensor is, in the order in which they lie along its axis `layers`."""
        row = self.rows[name]
        first = row.first + row.every * (row.index(name) or 0)
        if row.behind:
            first += max(self.layers_of(other)[-1] + 1 for other, each in self.rows.items() if _before(each))
        places = self.shapes[name][row.spec.axes.index("layers")] if "layers" in row.spec.axes else 1
        return range(first, first + row.every * places, row.every)

    @cached_property
    def network(self) -> Network:
        """What the network computes, as far as the family's trees do not tell: by its config, else by default."""
        return self.told or self.family.network({**self.sizes, "layers": sum(self.depths.values())})

    @property
    def head_dim(self) -> int | None:
        """How many features a head has, also where an axis joins heads and features; None for models without heads."""
        if "joined_kv" in self.sizes:
            return self.sizes["joined_kv"] // self.sizes["heads"]
        return self.sizes.get("kv")

    @property
    def scanned(self) -> bool:
        """Whether its layers are stacked along an axis."""
        return any("layers" in row.spec.axes for row in self.rows.values())

    def resized(self, sizes: Mapping[str, int], depths: Mapping[str, int]) -> Recognized:
        """The tree of a model that has these sizes of axes and depths of stacks, and this one's where none is given.

        Depths are whole groups of layers, where layers are counted by groups; those behind them stay as many.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        own = self.depths
        for name, row in self.rows.items():
            stack = stack_of(name)
            places = depths.get(stack, own.get(stack, 0)) // row.every
            now = dict(sizes) if row.behind else {**sizes, "layers": places}
            shape = tuple(now.get(axis, n) for axis, n in zip(row.spec.axes, self.shapes[name], strict=True))
            alternative = row.alternative(name) or name
            if "#" in alternative and not row.behind:
                shapes |= {alternative.replace("#", str(i)): shape for i in range(places)}
            else:
                shapes[name] = shape
        rows = {name: each for name in shapes if (each := self.family.row_of(name)) is not None}
        return replace(self, shapes=shapes, rows=rows, evidence=self.family.evidence(shapes))

    def full(self, parameter: str) -> str:
        """The full name of a parameter in the whole tree."""
        return self.naming.full(parameter)

    def parameter_of(self, name: str) -> str | None:
        """The parameter that a full name is of; None for what is none."""
        bare = self.naming.bare(name)
        return bare if bare in self.shapes and self.full(bare) == name else None

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def _named(self, name: str, row: Row) -> Iterator[tuple[str, int]]:
        return ((a, n) for a, n in zip(row.spec.axes, self.shapes[name], strict=True) if a not in STACKED)


def _before(row: Row) -> bool:
    """Whether a row is about the layers that others stand behind."""
    return "layers" in row.spec.axes and not row.behind


UNKNOWN = Recognized(_NO_FAMILY, Naming(), {}, "", {})
