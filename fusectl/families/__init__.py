"""Model families as tables: which axis of which tensor is what. And the recognition of a checkpoint's family.

A family is a tuple of rows, one per kind of tensor, and nothing else that surgery needs to know: the fusion rule, the
noise, the optimizer's slots and the sizes follow from the axes' names. To add a family, imitate t5.py and name it in
`FAMILIES`; the tests run over that tuple.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from fusectl.errors import MOST_LISTED, Incompatible, shorten
from fusectl.families.config import Config
from fusectl.families.gemma import GEMMA_FAMILIES
from fusectl.families.maxtext import MAXTEXT_FAMILIES
from fusectl.families.naming import Naming, namings_of
from fusectl.families.settings import Network
from fusectl.families.t5 import T5_FAMILIES
from fusectl.families.table import Family, Row, stack_of, ways
from fusectl.families.unsupported import unsupported
from fusectl.layout.axes import STACKED


FAMILIES: tuple[Family, ...] = (*T5_FAMILIES, *MAXTEXT_FAMILIES, *GEMMA_FAMILIES)

# That of a tree which no table explains.
_NO_FAMILY = Family("", (), frozenset(), lambda _: "no family", trainer="")

# Of names that no family knows, how many are compared with its rows; and of tensors that are missing, counted.
MOST_COMPARED = 1000
MOST_MISSING = 10_000


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


def family_named(name: str) -> Family:
    """The family of this name or alias, or of the table in the file `name`, which ends with .toml.

    Raises Incompatible with the nearest names, NotFound where there is no such file, UsageError with all that is wrong
    in it.
    """
    if name.endswith(".toml"):
        from fusectl.families.userfile import read_family

        return read_family(Path(name))
    for family in FAMILIES:
        if name in (family.name, *family.aliases):
            return family
    known = [n for family in FAMILIES for n in (family.name, *family.aliases)]
    near = difflib.get_close_matches(name, known, n=3)
    plain = [n for n in known if not any(n != other and n.startswith(other) for other in known)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(plain)}, and their variants"
    raise Incompatible(f"no model family is called {name!r}", hint=hint)


def recognize(
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
    arch: str | Family | None = None,
    config: Config | None = None,
    *,
    before: str | None = None,
) -> Recognized:
    """The family that every parameter of a tree falls under, with the evidence.

    `shapes` maps full tensor names to shapes, optimizer state included; `arch` is the family or names it, `config` has
    told of the network. Of several families that fit it is the one called `before`, which a record may know. Raises
    Incompatible, listing what the nearest family's table does not explain, when none fits, when several do, when `arch`
    names one that does not, and when the config is of another network.
    """
    named = family_named(arch) if isinstance(arch, str) and arch else arch or None
    candidates = [named] if named else [f for f in FAMILIES if not f.by_name_only]
    namings = namings_of(shapes)
    fitting = next((found for naming in namings if (found := list(_fitting(candidates, naming, shapes)))), None)
    if fitting is None:
        raise _unrecognized(namings[0].parameters(shapes), candidates, named, where)
    tree = _one_of([each for each in fitting if each.family.name == before] or fitting, where)
    return tree if config is None else configured(tree, config, where)


def _fitting(
    candidates: Iterable[Family], naming: Naming, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Recognized]:
    """The tree as each of the families has it whose tables describe all of its parameters."""
    inside = naming.parameters(shapes)
    # Most families do not know one of the first names.
    explaining = [family for family in candidates if all(family.row_of(name) is not None for name in inside)]
    for family in explaining if inside else ():
        rows, problems = match(family, inside)
        if not problems:
            yield Recognized(family, naming, inside, family.evidence(inside), rows)


def _unrecognized(
    inside: Mapping[str, tuple[int, ...]], candidates: Sequence[Family], named: Family | None, where: str
) -> Incompatible:
    """What is wrong with parameters that no table describes, by that of the nearest of the families."""
    # Hundreds of thousands of names, of which none is a model's, tell no more.
    some = list(inside)[:: 1 + len(inside) // MOST_COMPARED]

    def off(family: Family) -> tuple[int, int]:
        # Names first: a transposed kernel contradicts its family in every layer. Of families that explain as many names
        # the one with fewer that are missing, or contradicted.
        strange = sum(family.row_of(name) is None for name in some)
        return strange + _absent(family, some), len(match(family, inside)[1]) if strange == 0 else 0

    family, problems = candidates[0], ["no tensors"]
    if inside:
        family = min(candidates, key=off)
        refused = None if named else unsupported(name for name in inside if family.row_of(name) is None)
        if refused is not None:
            return Incompatible(f"{where}: {refused.what}", details=refused.details, hint=refused.hint)
        _, problems = match(family, inside)
    title = f"does not have the tree of {named.name}" if named else "matches no model family that fusectl knows"
    return Incompatible(
        f"{where}: {title}",
        details=(*(() if named else (f"nearest: {family.name}",)), *shorten(problems)),
        hint="--arch NAME chooses a family; --drop PATTERN leaves tensors out on purpose",
    )


def _absent(family: Family, names: Collection[str]) -> int:
    """How many kinds of tensors of a family's there are none of."""
    there = {way for name in names for way in ways(name)}
    return sum(alternative not in there for row in family.rows if not row.optional for alternative in row.alternatives)


def _one_of(fitting: list[Recognized], where: str) -> Recognized:
    """The one tree that fits; raises Incompatible where several do."""
    if len(fitting) > 1:
        raise Incompatible(
            f"{where}: a tree of several families",
            details=[f"{each.family.name}: {each.evidence}" for each in fitting],
            hint="--arch NAME says which",
        )
    (tree,) = fitting
    return tree


def configured(tree: Recognized, config: Config, where: str) -> Recognized:
    """A tree with what a config tells of its network; raises Incompatible where it is of another one."""
    config.require_fit(tree, where)
    return replace(tree, told=config.applied(tree.network, tied=tree.family.tied))


def match(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Row], list[str]]:
    """The row of every tensor, and everything that contradicts the table: unknown, missing, mis-shaped tensors."""
    rows: dict[str, Row] = {}
    problems: list[str] = []
    for name in shapes:
        row = family.row_of(name)
        if row is None:
            # No more of them are ever shown.
            nearest = f"; nearest: {nearest_row(family, name)}" if len(problems) < MOST_LISTED else ""
            problems.append(f"{name}: no row for it{nearest}")
        else:
            rows[name] = row
    problems += itertools.islice(_missing(family, rows), MOST_MISSING)
    problems += _sizes_that_disagree(rows, shapes)
    return rows, problems


def nearest_row(family: Family, name: str) -> str:
    """The pattern of a family's, without braces, that comes nearest to a name which no row is about."""
    generic = re.sub(r"(layers?_)\d+", r"\1#", name)
    alternatives = [a for row in family.rows for a in row.alternatives]
    near = difflib.get_close_matches(generic, alternatives, n=1, cutoff=0.0)
    return near[0] if near else "none"


def _missing(family: Family, rows: Mapping[str, Row]) -> Iterator[str]:
    """Tensors that the table demands: each alternative once, or once per layer of its stack."""
    depth: dict[tuple[str, bool], int] = {}
    for name, row in rows.items():
        number = row.index(name)
        if number is not None:
            of = stack_of(name), row.optional
            depth[of] = max(depth.get(of, 0), number + 1)
    for row in family.rows:
        for alternative in row.alternatives:
            least = 0 if row.optional else 1
            there = depth.get((stack_of(alternative), row.optional), least)
            numbers: Iterable[int | None] = range(there) if "#" in alternative else [None] * least
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
            if axis == "stack":
                if n != len(row.roles):
                    yield f"{name}: {n} kernels in one, expected those of {', '.join(row.roles)}"
                continue
            # The encoder and the decoder may have different depths.
            key = f"{axis} of the {stack_of(name)}" if axis == "layers" else axis
            seen, elsewhere = first.setdefault(key, (n, name))
            if seen != n:
                yield f"{name}: axis {axis!r} is {n} here and {seen} in {elsewhere}"
