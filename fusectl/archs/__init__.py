"""Model families as tables: which axis of which tensor is what. And the recognition of a checkpoint's family.

A family is a tuple of rows, one per kind of tensor, and nothing else that surgery needs to know: the fusion rule, the
noise, the optimizer's slots and the sizes follow from the axes' names. To add a family, imitate t5.py and name it in
`FAMILIES`; the tests run over that tuple.
"""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from fusectl.archs.t5 import T5_FAMILIES
from fusectl.archs.table import Family, Row
from fusectl.errors import Incompatible, shorten


FAMILIES: tuple[Family, ...] = (*T5_FAMILIES,)

# That of a tree which no table explains.
_NO_FAMILY = Family("", (), frozenset(), lambda _: "no family")

# Where trainers keep the parameters in their trees: T5X, MaxText, Flax, and a bare tree.
PARAMETER_PREFIXES = ("target/", "params/params/", "params/", "")


@dataclass(frozen=True)
class Recognized:
    """A tree whose parameters are a family's: the rows they fall under, and the sizes that follow."""

    family: Family
    prefix: str
    shapes: Mapping[str, tuple[int, ...]]
    evidence: str
    rows: Mapping[str, Row] = field(repr=False)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The size of every axis, `layers` aside, in the order of the table."""
        return {name: n for row_name, row in self.rows.items() for name, n in self._named(row_name, row)}

    @cached_property
    def depths(self) -> dict[str, int]:
        """The number of layers of each stack: `{"encoder": 12, "decoder": 12}`."""
        depths: dict[str, int] = {}
        for name, row in self.rows.items():
            stack = name.split("/", 1)[0]
            number = row.index(name)
            if number is not None:
                depths[stack] = max(depths.get(stack, 0), number + 1)
            elif "layers" in row.spec.axes:
                depths[stack] = self.shapes[name][row.spec.axes.index("layers")]
        return dict(sorted(depths.items(), reverse=True))

    @property
    def scanned(self) -> bool:
        """Whether its layers are stacked along an axis."""
        return any("layers" in row.spec.axes for row in self.rows.values())

    def full(self, parameter: str) -> str:
        """The full name of a parameter in the whole tree."""
        return self.prefix + parameter

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def _named(self, name: str, row: Row) -> Iterator[tuple[str, int]]:
        return ((a, n) for a, n in zip(row.spec.axes, self.shapes[name], strict=True) if a != "layers")


UNKNOWN = Recognized(_NO_FAMILY, "", {}, "", {})


def family_named(name: str) -> Family:
    """The family of this name or alias; raises Incompatible with the nearest names."""
    for family in FAMILIES:
        if name in (family.name, *family.aliases):
            return family
    known = [n for family in FAMILIES for n in (family.name, *family.aliases)]
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    raise Incompatible(f"no model family is called {name!r}", hint=hint)


def recognize(shapes: Mapping[str, tuple[int, ...]], where: str, arch: str | None = None) -> Recognized:
    """The family that every parameter of a tree falls under, with the evidence.

    `shapes` maps full tensor names to shapes, optimizer state included. Raises Incompatible, listing what the nearest
    family's table does not explain, when none fits, or when `arch` names one that does not.
    """
    candidates = [family_named(arch)] if arch else [f for f in FAMILIES if not f.by_name_only]
    failures: list[tuple[int, Family, list[str]]] = []
    for prefix in PARAMETER_PREFIXES:
        inside = {name.removeprefix(prefix): s for name, s in shapes.items() if name.startswith(prefix)}
        if not inside:
            continue
        for family in candidates:
            rows, problems = match(family, inside)
            if not problems:
                return Recognized(family, prefix, inside, family.evidence(inside), rows)
            failures.append((len(problems) - len(rows), family, problems))
        if prefix:
            # A tree with `target/` is T5X's: its optimizer state must not be mistaken for parameters.
            break
    _, nearest, problems = min(failures, key=lambda failure: failure[0], default=(0, candidates[0], ["no tensors"]))
    title = f"does not have the tree of {arch}" if arch else "matches no model family that fusectl knows"
    raise Incompatible(
        f"{where}: {title}",
        details=(*(() if arch else (f"nearest: {nearest.name}",)), *shorten(problems)),
        hint="--arch NAME chooses a family; --drop PATTERN leaves tensors out on purpose",
    )


def match(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Row], list[str]]:
    """The row of every tensor, and everything that contradicts the table: unknown, missing, mis-shaped tensors."""
    rows: dict[str, Row] = {}
    problems: list[str] = []
    for name in shapes:
        row = family.row_of(name)
        if row is None:
            problems.append(f"{name}: no row for it; nearest: {_nearest(family, name)}")
        else:
            rows[name] = row
    problems += _missing(family, rows)
    problems += _sizes_that_disagree(rows, shapes)
    return rows, problems


def _nearest(family: Family, name: str) -> str:
    generic = "/".join("layers_#" if part.startswith("layers_") else part for part in name.split("/"))
    alternatives = [a for row in family.rows for a in row.alternatives]
    near = difflib.get_close_matches(generic, alternatives, n=1, cutoff=0.0)
    return near[0] if near else "none"


def _missing(family: Family, rows: Mapping[str, Row]) -> Iterator[str]:
    """Tensors that the table demands: each alternative once, or once per layer of its stack."""
    depth: dict[str, int] = defaultdict(int)
    for name, row in rows.items():
        number = row.index(name)
        if number is not None:
            stack = name.split("/", 1)[0]
            depth[stack] = max(depth[stack], number + 1)
    for row in family.rows:
        for alternative in row.alternatives:
            stack = alternative.split("/", 1)[0]
            numbers: Iterable[int | None] = range(depth[stack] or 1) if "#" in alternative else [None]
            for number in numbers:
                wanted = alternative.replace("#", str(number))
                if wanted not in rows:
                    yield f"{wanted}: missing"


def _sizes_that_disagree(rows: Mapping[str, Row], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Wrong ranks, and axes that two tensors give different sizes."""
    first: dict[str, tuple[int, str]] = {}
    for name, row in rows.items():
        shape, axes = shapes[name], row.spec.axes
        if len(shape) != len(axes):
            yield f"{name}: shape {shape} has {len(shape)} axes, the table has {len(axes)} ({' '.join(axes)})"
            continue
        for axis, n in zip(axes, shape, strict=True):
            # The encoder and the decoder may have different depths.
            key = f"{axis} of {name.split('/', 1)[0]}" if axis == "layers" else axis
            seen, elsewhere = first.setdefault(key, (n, name))
            if seen != n:
                yield f"{name}: axis {axis!r} is {n} here and {seen} in {elsewhere}"
