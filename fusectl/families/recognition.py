"""Which family a tree is of, and what contradicts that."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from fusectl.errors import MOST_LISTED, Incompatible, shorten
from fusectl.families.config import Config
from fusectl.families.naming import Naming, namings_of
from fusectl.families.recognized import Recognized
from fusectl.families.registry import FAMILIES, family_named
from fusectl.families.table import Family, Row, stack_of, ways
from fusectl.families.unsupported import unsupported


# Of names that no family knows, how many are compared with its rows; and of tensors that are missing, counted.
MOST_COMPARED = 1000
MOST_MISSING = 10_000


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
