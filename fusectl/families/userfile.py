"""A family of one's own, as a TOML file that stands wherever the name of a family does: --arch my.toml.

    name = "my-decoder"
    grown = ["embed", "heads", "kv_heads", "mlp"]        # axes whose sizes add up; these by default
    [network]                                            # what no tree tells; fields of network.Network
    norm_epsilon = 1e-5
    attending = [{ rope_base = 10000.0, window = 1024 }, { rope_base = 1e6 }]
    [[row]]                                              # one per kind of tensor; fields of table.Row
    path = "decoder/layers_#/attn/{k,v}/kernel"          # below what trainers put in front, such as params/
    axes = "embed -> kv_heads kv"                        # axes.py has the notation of both
    role = "key value"                                   # one for all that braces stand for, or one for each

What a row leaves out follows from the others:

    before_head  those of the roles final_norm and final_norm_bias, if there is one such norm
    writes       what is added to the residual stream: all that writes embed, but for out and down where norms stand
                 behind them, which do, and biases

All mistakes of a file are told at once, each with its line and a caret below the place.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusectl.errors import UsageError, shorten
from fusectl.families.roles import GROWN, ROLES, STEM, TWIN, lacking
from fusectl.families.settings import ACTIVATIONS, QUERY_SCALES, ROPE_TYPES, Attending, Network
from fusectl.families.table import ENCODER, LARGEST_TABLE, Family, Row, stack_of
from fusectl.layout.axes import STACKED, PatternError, expand, parse_axes
from fusectl.system.given import read_given


# A bias that is none of the attention's; and the last norm's, which carries a tied head's factor as its scale does.
BIAS = "bias"
FINAL_BIAS = "final_norm_bias"
_ROLES = (*ROLES, BIAS, FINAL_BIAS)
# Roles that rows read nothing for and that are added to the stream all the same.
_ADDED = frozenset({"post_attention_norm", "post_mlp_norm", BIAS})
# By the norm that stands behind a block the projection that is then not what writes the stream.
_NORMED = {"post_attention_norm": "out", "post_mlp_norm": "down"}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Of rows, and of mistakes whose places are looked for: a table may come from anywhere, inside of a checkpoint.
_MOST_ROWS = 1000
_MOST_PLACES = 100
# Python copies all of a dotted key for each of its parts, of which a table has two at most. Of the dots in a line most
# are those of numbers.
_MOST_PARTS = 10
_MOST_DOTS = 500
# What numbers may be: a float32, and what JAX counts with.
_LARGEST = 1e38
_MOST = 2**31 - 1
# Where trainers keep parameters: no part of their names in a table.
_IN_FRONT = ("target/", "params/")


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a value may be, in words and as a test."""

    says: str
    types: tuple[type, ...]
    least: float = -_LARGEST
    choices: tuple[str, ...] = ()

    def takes(self, value: object) -> bool:
        # A bool is an int.
        if not isinstance(value, self.types) or isinstance(value, bool) != (self.types == (bool,)):
            return False
        if self.choices and value not in self.choices:
            return False
        return not isinstance(value, int | float) or self.least <= value <= (_LARGEST if float in self.types else _MOST)


_TEXT = _Kind("a text", (str,))
_FLAG = _Kind("true or false", (bool,))
_NUMBER = _Kind("a number", (int, float))
_POSITIVE = _Kind("a positive number", (int, float), least=1 / _LARGEST)
_PLACE = _Kind("a number of layers, 0 or more", (int,), least=0)
_COUNT = _Kind("a number of 1 or more", (int,), least=1)
_LIST = _Kind("a list", (list,))
_TABLE = _Kind("a table", (dict,))


def _one_of(choices: tuple[str, ...]) -> _Kind:
    return _Kind(f"one of {', '.join(choices)}", (str,), choices=choices)


FILE: Mapping[str, _Kind] = {"name": _TEXT, "grown": _LIST, "network": _TABLE, "row": _LIST}
ROW: Mapping[str, _Kind] = {
    "path": _TEXT,
    "axes": _TEXT,
    "role": _TEXT,
    "before_head": _FLAG,
    "writes": _FLAG,
    "every": _COUNT,
    "first": _PLACE,
    "optional": _FLAG,
}
NETWORK: Mapping[str, _Kind] = {
    "norm_adds_one": _FLAG,
    "embedding_power": _NUMBER,
    "tied_logits_power": _NUMBER,
    "activation": _one_of(ACTIVATIONS),
    "rope_type": _one_of(ROPE_TYPES),
    "norm_epsilon": _POSITIVE,
    "final_norm_epsilon": _POSITIVE,
    "query_scale": _one_of(QUERY_SCALES),
    "attention_soft_cap": _POSITIVE,
    "logits_soft_cap": _POSITIVE,
    "attending": _LIST,
}
ATTENDING: Mapping[str, _Kind] = {"rope_base": _POSITIVE, "rope_scale": _POSITIVE, "window": _COUNT}


def read_family(path: Path) -> Family:
    """The Family of a table in a file.

    Raises NotFound where there is no file, StorageError for one that cannot be read, UsageError with all that is wrong
    with its contents.
    """
    from fusectl.families.registry import FAMILIES

    raw = read_given(path, LARGEST_TABLE, "a family's table")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not TOML", details=(str(error),)) from error
    taken = {name for family in FAMILIES for name in (family.name, *family.aliases)}
    return parse_family(text, str(path), taken)


def parse_family(text: str, where: str, taken: Collection[str] = ()) -> Family:
    """The Family of a table's text; it may not have one of the names that are `taken`.

    Raises UsageError with all that is wrong with it.
    """
    try:
        tree = tomllib.loads(_with_short_keys(text))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not TOML", details=(_not_toml(text, error),)) from error
    draft = _Draft(text, tree)
    family = draft.family(where, taken)
    if family is None:
        n = len(draft.mistakes)
        # In the order of the lines; what has none last.
        told = [mistake for _, mistake in sorted(draft.mistakes, key=lambda each: each[0] or math.inf)]
        title = f"{where}: {n} mistake{'s' if n > 1 else ''} in the table of a family"
        raise UsageError(title, details=shorten(told))
    return family


def _with_short_keys(text: str) -> str:
    """The text itself; raises ValueError for a key of so many parts that reading it would take hours."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > _MOST_DOTS or line.partition("=")[0].count(".") > _MOST_PARTS:
            raise ValueError(f"line {number}: a key of too many parts")
    return text


def _not_toml(text: str, error: Exception) -> str:
    said = str(error) or type(error).__name__
    at = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", said)
    if at is None:
        return said
    lines = text.replace("\r\n", "\n").split("\n")
    line, column = (int(at[2]), int(at[3]) - 1) if at[2] else (len(lines), len(lines[-1]))
    return _excerpt(lines, line, column, at[1])


def _excerpt(lines: Sequence[str], number: int, column: int, what: str) -> str:
    """A mistake with its line and a caret below the place."""
    return f"line {number}: {what}\n  {lines[number - 1].replace(chr(9), ' ')}\n  {' ' * column}^"


def _near(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=2)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"


class _Draft:
    """A table on its way to a Family, and the mistakes that are found on it, each with its line, if that is known."""

    def __init__(self, text: str, tree: Mapping[str, Any]) -> None:
        self._text = text
        self._lines = text.replace("\r\n", "\n").split("\n")
        self._tree = tree
        self.mistakes: list[tuple[int | None, str]] = []
        # The lines of each table with a header: of [[row]] in their order, of [network].
        self._whole = range(len(self._lines))
        self._rows = self._below(r"\[\[\s*row\s*\]\]")
        self._network = next(iter(self._below(r"\[\s*network\s*\]")), self._whole)
        # Of the rows that say whether the factor of a tied head is theirs, the paths.
        self._says_of_head: set[str] = set()

    def family(self, where: str, taken: Collection[str]) -> Family | None:
        """The Family, or None if there is any mistake."""
        found = self._check(self._tree, FILE, self._whole, "the file")
        name = found.get("name", "")
        if "name" not in self._tree:
            self._wrong("no name of the family", None)
        elif name in taken:
            self._wrong(f"{name!r} is the name of a family that fusectl knows", self._whole, "name", name)
        elif "name" in found and (not _NAME.fullmatch(name) or name.endswith(".toml")):
            self._wrong(f"{name!r} is no name: letters, digits, . _ and - only", self._whole, "name", name)
        network = self._read_network(found.get("network", {}))
        rows = self._read_rows(found.get("row", []))
        self._check_names(rows)
        self._check_roles(rows)
        if self.mistakes:
            # What the rows are together can only be said of rows that make sense.
            return None
        rows = self._settled(rows, network)
        grown = self._read_grown(found.get("grown"), rows)
        if not self.mistakes:
            self._check_flow(rows, grown)
            self._check_network(rows, network)
        if self.mistakes:
            return None
        plain = tuple(row for row, _ in rows)
        lacks = tuple(lacking(plain))
        return Family(
            name=name,
            rows=plain,
            grown=grown,
            evidence=lambda _: f"the table in {where}",
            twin=None if lacks else TWIN,
            lacks=lacks,
            network=lambda _: network,
            trainer="",
            table=self._text,
        )

    # What is read.

    def _read_network(self, given: Mapping[str, Any]) -> Network:
        where = self._network
        found = self._check(given, NETWORK, where, "[network]")
        attending = found.pop("attending", [{}])
        kinds = []
        for each in attending:
            if isinstance(each, dict):
                kinds.append(Attending(**self._check(each, ATTENDING, where, "attending")))
            else:
                self._wrong(f"attending: {each!r}, not a table", where, "attending", each)
        if not attending:
            self._wrong("attending: no layers attend", where, "attending", attending)
        try:
            # What was wrong above is told there.
            return Network(**found, attending=tuple(kinds) or (Attending(),))
        except ValueError as error:
            self._wrong(str(error), where, str(error).split(" ", 1)[0])
            return Network()

    def _read_rows(self, given: Sequence[Any]) -> list[tuple[Row, range]]:
        """The rows, each with the lines that it stands in; without those that make no sense at all."""
        if not self._tree.get("row", []):
            self._wrong("no [[row]]: a family has one for each kind of tensor", None)
        if len(given) > _MOST_ROWS:
            self._wrong(f"{len(given):,} rows: at most {_MOST_ROWS:,} can be", None)
            return []
        # Rows in one line have no headers.
        lines = self._rows if len(self._rows) == len(given) else [self._whole] * len(given)
        found: list[tuple[Row, range]] = []
        for each, at in zip(given, lines, strict=True):
            if isinstance(each, dict):
                found += ((row, at) for row in self._read_row(each, at))
            else:
                self._wrong(f"row: {each!r}, not a table", at, "row", each)
        return found

    def _read_row(self, given: Mapping[str, Any], at: range) -> list[Row]:
        values = self._check(given, ROW, at, "a row")
        for key in ("path", "axes"):
            if key not in given:
                self._wrong(f"a row without {key}", at)
        roles = values.get("role", "").split()
        for role in roles:
            if role not in _ROLES:
                self._wrong(f"there is no role {role!r}; {_near(role, _ROLES)}", at, "role", role)
        names = self._parsed(expand, values, "path", at)
        spec = self._parsed(parse_axes, values, "axes", at)
        if names is None or spec is None:
            return []
        path, axes = values["path"], values["axes"]
        front = next((each for each in _IN_FRONT if path.startswith(each)), None)
        if front is not None:
            self._wrong(f"{front} is what trainers put in front of parameters: leave it out", at, "path", path)
        elif any("" in name.split("/") for name in names) or not path.isprintable():
            self._wrong("a path with an empty or unprintable part", at, "path", path)
        if "#" in path and "layers" in spec.axes:
            self._wrong("layers by their numbers, and an axis layers: one or the other", at, "path", path, "#")
        if "stack" in spec.axes and not roles:
            self._wrong("an axis stack, and no roles of the kernels along it", at, "axes", axes, "stack")
        others = {key: value for key, value in values.items() if key not in {"path", "axes", "role"}}
        row = Row(path, axes, " ".join(roles), **others)
        if "before_head" in values:
            self._says_of_head |= set(names)
        if "stack" in spec.axes or len(roles) < 2:
            return [row]
        if len(roles) != len(names):
            says = f"{len(roles)} roles for {len(names)} name{'s' if len(names) > 1 else ''} and no axis stack"
            self._wrong(says, at, "role", values["role"])
            return [row]
        return [replace(row, pattern=name, role=role) for name, role in zip(names, roles, strict=True)]

    def _settled(self, rows: list[tuple[Row, range]], network: Network) -> list[tuple[Row, range]]:
        """The rows with what they leave out: the norm before the head, and what writes the residual stream."""
        plain = [row for row, _ in rows]
        roles = {role for row in plain for role in row.roles}
        marked = any(row.before_head for row in plain)
        tied = not any(row.is_head for row in plain)
        if tied and not marked and "final_norm" not in roles:
            says = 'no head: a row `embed -> vocab`, or one with role = "final_norm" or before_head = true, whose norm'
            self._wrong(f"{says} stands before a head that is the embedding; classes are a vocab, too", None)
        by_role = tied or self._is_alone(rows, network)
        if by_role or marked:
            self._check_before_head(rows, carries=by_role or marked, tied=tied)
        normed = {projection for norm, projection in _NORMED.items() if norm in roles}

        def settled(row: Row) -> Row:
            if row.role in {"final_norm", FINAL_BIAS} and by_role and not self._says_of_head & set(row.alternatives):
                row = replace(row, before_head=True)
            if row.writes is not None or "embed" not in row.spec.outputs:
                return row
            if row.role in normed:
                return replace(row, writes=False)
            return replace(row, writes=True) if row.role in _ADDED else row

        return [(settled(row), at) for row, at in rows]

    def _before_head(self, rows: Sequence[tuple[Row, range]]) -> list[tuple[Row, range]]:
        """The rows that say, or whose role says, that they are of the norm before the head."""
        return [
            (row, at)
            for row, at in rows
            if row.before_head
            or (row.role in {"final_norm", FINAL_BIAS} and not self._says_of_head & set(row.alternatives))
        ]

    def _scales(self, rows: Sequence[tuple[Row, range]]) -> int:
        """How many norms may be the one before the head."""
        return sum(len(row.alternatives) for row, _ in self._before_head(rows) if row.is_norm)

    def _is_alone(self, rows: Sequence[tuple[Row, range]], network: Network) -> bool:
        """Whether the roles tell that the last norm feeds an untied head and nothing else.

        That head can carry the factor itself, and does where a second one, a tensor without a role or another stack
        might read what the norm gives. A norm that multiplies with 1 + scale leaves it the factor, too: weight decay
        would pull it to 1, and bfloat16 rounds (1 + scale) / K - 1 even for K = 2.
        """
        plain = [row for row, _ in rows]
        names = [name for row in plain for name in row.alternatives]
        heads = [row for row in plain if row.is_head]
        return (
            len(heads) == 1
            and not _repeats(heads[0])
            and all(row.roles for row in plain)
            and not any(stack_of(name) == ENCODER for name in names)
            and not any(row.optional for row in plain if row.role == "final_norm")
            and not network.norm_adds_one
            and not self._unclear(rows)
            and self._scales(rows) == 1
        )

    def _unclear(self, rows: Sequence[tuple[Row, range]]) -> list[tuple[Row, range]]:
        """The rows that add to the stream once, and not in each layer, where no path tells whether before the head."""
        before = self._before_head(rows)
        stacks = {stack_of(name) for row, _ in before for name in row.alternatives}
        return [
            (row, at)
            for row, at in rows
            if not row.spec.inputs
            and row.spec.outputs == {"embed"}
            and not ("layers" in row.spec.axes or "#" in row.pattern)
            and row.role in {"", BIAS}
            and (row, at) not in before
            and not self._says_of_head >= set(row.alternatives)
            and stacks & set(map(stack_of, row.alternatives))
        ]

    def _check_before_head(self, rows: Sequence[tuple[Row, range]], *, carries: bool, tied: bool) -> None:
        """That the factor of the head is carried by the scale of one norm, and by all that this norm adds."""
        before = self._before_head(rows)
        scales = [(row, at) for row, at in before if row.is_norm]
        for row, at in rows if carries else ():
            if row.role in {"final_norm", FINAL_BIAS} and (row, at) not in before:
                head = "a head that is the embedding" if tied else "the head, whose factor it carries"
                self._wrong(f"before_head = false: of the norm before {head}", at, "path", row.pattern)
        heads = [(row, at) for row, at in rows if row.is_head]
        for row, at in heads[1:] if before else ():
            self._wrong("before_head in another row, and two heads read that norm", at, "path", row.pattern)
        for row, at in before:
            if _repeats(row) or row.optional:
                what = "optional" if row.optional else "one of each layer, or of several paths"
                self._wrong(f"before_head: of one tensor that is always there, not {what}", at, "path", row.pattern)
        for row, at in scales[1:]:
            says = f'before_head: of one norm, and another row has it; of that norm\'s bias with role = "{FINAL_BIAS}"'
            self._wrong(says, at, "path", row.pattern)
        if before and not scales:
            row, at = before[0]
            says = 'before_head: of no norm; its scale needs it, too, or the role "final_norm"'
            self._wrong(says, at, "path", row.pattern)
        for row, at in self._unclear(rows):
            says = (
                f'added before the head or elsewhere? role = "{FINAL_BIAS}" if it is the last norm\'s, '
                "before_head = false if not"
            )
            self._wrong(says, at, "path", row.pattern)

    def _read_grown(self, given: Sequence[Any] | None, rows: Sequence[tuple[Row, range]]) -> frozenset[str]:
        """The axes whose sizes add up."""
        there = sorted({axis for row, _ in rows for axis in row.spec.axes})
        for axis in given or ():
            if axis in (*STACKED, "vocab", "kv"):
                self._wrong(f"grown: {axis} is the same in every source", self._whole, "grown", axis)
            elif axis not in there:
                near = f"; {_near(axis, there)}" if isinstance(axis, str) else ""
                self._wrong(f"grown: no row has an axis {axis!r}{near}", self._whole, "grown", axis)
        grown = frozenset(axis for axis in there if axis in (GROWN if given is None else given))
        if "embed" not in grown:
            says = "no axis embed that grows: the width of the residual stream has that name"
            self._wrong(says, None if given is None else self._whole, "grown", given)
        return grown

    # What the rows are together.

    def _check_names(self, rows: Sequence[tuple[Row, range]]) -> None:
        first: dict[str, range] = {}
        for row, at in rows:
            for name in row.alternatives:
                if name in first:
                    line, _ = self._place(first[name], None, None)
                    of = f", as in the row at line {line}" if line is not None else ""
                    self._wrong(f"{name} a second time{of}", at, "path", row.pattern)
                else:
                    first[name] = at

    def _check_roles(self, rows: Sequence[tuple[Row, range]]) -> None:
        """That no layer has a role twice, and no tensor a role whose axes are others."""
        seen: dict[str, list[Row]] = {}
        for row, at in rows:
            numbered = "#" in row.pattern or "layers" in row.spec.axes
            if "stack" in row.spec.axes and len(set(row.roles)) < len(row.roles):
                self._wrong("a role that stands twice", at, "role", row.role)
            for role in dict.fromkeys(row.roles):
                if role not in ROLES:
                    continue
                if role in STEM and numbered:
                    self._wrong(f"role {role}: of one tensor, not one of each layer", at, "role", role)
                elif len(row.alternatives) > 1:
                    n = len(row.alternatives)
                    self._wrong(f"role {role}: may be there once, and the path stands for {n}", at, "role", role)
                elif any(role in STEM or _meet(row, other) for other in seen.get(role, ())):
                    self._wrong(f"role {role}: may be there once, and another row has it", at, "role", role)
                seen.setdefault(role, []).append(row)
                self._check_axes_of_role(row, role, at)

    def _check_axes_of_role(self, row: Row, role: str, at: range) -> None:
        wanted = ROLES[role][1]
        inside = [axis for axis in row.spec.axes if axis not in STACKED]
        heads = [axis if axis in inside else "heads" for axis in wanted]
        if Counter(inside) != Counter(heads):
            says = f"role {role}: of a tensor with the axes {', '.join(wanted)}, in any order, or without a role"
            self._wrong(says, at, "axes", row.axes)

    def _check_flow(self, rows: Sequence[tuple[Row, range]], grown: Collection[str]) -> None:
        """That streams of several sources meet in the head alone."""
        for row, at in rows:
            spec = row.spec
            if row.before_head and (spec.inputs or spec.outputs != {"embed"}):
                self._wrong("before_head: of the norm before the head, `-> embed`", at, "axes", row.axes)
            if row.writes and "embed" not in spec.outputs:
                self._wrong("writes: it does not write embed, the residual stream", at, "axes", row.axes)
            if spec.inputs & set(grown) and not spec.outputs & set(grown) and not row.is_head:
                shared = ", ".join(axis for axis in spec.axes if axis in spec.outputs) or "nothing"
                says = f"reads what grows and writes {shared}, which does not: the sources' values would be added up"
                hint = f"is {shared} to be in grown?" if shared != "nothing" else ""
                self._wrong("; ".join(filter(None, [says, hint])), at, "axes", row.axes)

    def _check_network(self, rows: Sequence[tuple[Row, range]], network: Network) -> None:
        at = self._network
        if network.embedding_power and not any(row.role == "embedding" for row, _ in rows):
            self._wrong("embedding_power: of the row with the role embedding, and there is none", at, "embedding_power")
        if network.tied_logits_power and any(row.is_head for row, _ in rows):
            self._wrong("tied_logits_power: of a tied head, and this one is not", at, "tied_logits_power")

    # How it is told.

    def _check(self, given: Mapping[str, Any], known: Mapping[str, _Kind], at: range, what: str) -> dict[str, Any]:
        """The values whose keys are known and whose types are right."""
        found: dict[str, Any] = {}
        for key, value in given.items():
            kind = known.get(key)
            if kind is None:
                self._wrong(f"{what} has no key {key!r}; {_near(key, known)}", at, key)
            elif not kind.takes(value):
                near = f"; {_near(value, kind.choices)}" if kind.choices and isinstance(value, str) else ""
                self._wrong(f"{key}: {value!r}, not {kind.says}{near}", at, key, value)
            else:
                found[key] = float(value) if float in kind.types else value
        return found

    def _parsed(self, parse: Any, values: Mapping[str, Any], key: str, at: range) -> Any:
        """What a pattern is parsed to; None where it is missing or makes no sense."""
        if key not in values:
            return None
        try:
            return parse(values[key])
        except PatternError as error:
            self._wrong(error.what, at, key, values[key], inside=error.at)
            return None

    def _wrong(
        self,
        what: str,
        at: range | None,
        key: str | None = None,
        value: object = None,
        part: str = "",
        *,
        inside: int = 0,
    ) -> None:
        """Notes a mistake: about the value of a key (or, without one, the key itself) in these lines.

        `part` of the value, or so many characters `inside` of it, is the place.
        """
        if at is None or len(self.mistakes) >= _MOST_PLACES:
            self.mistakes.append((None, what))
            return
        line, column = self._place(at, key, value)
        text = value if isinstance(value, str) else ""
        column += inside or (text.index(part) if part else 0)
        if line is None:
            self.mistakes.append((None, what))
        else:
            self.mistakes.append((line, _excerpt(self._lines, line, column, what)))

    def _place(self, at: range, key: str | None, value: object) -> tuple[int | None, int]:
        """The number of the line that a key stands in, and the column of its value, or of the key for no value.

        Of a row without that key it is the row's first line; unknown where the text tells no more than that.
        """
        if key is None:
            return (at.start + 1, 0) if at != self._whole else (None, 0)
        word = rf"[\"']?{re.escape(key)}[\"']?\s*"
        named = re.compile(rf"(?:^|[{{,\s]){word}=\s*|^\s*\[+\s*{word}\]+")
        found = None
        for number in at:
            line = self._lines[number]
            start = named.search(line)
            if start is None or line.lstrip().startswith("#"):
                continue
            column = start.start() + len(start.group()) - len(start.group().lstrip(" \t{,["))
            if value is None:
                return number + 1, column
            # Of a list, or of a text with several words, a part.
            inside = line.find(value, start.end()) if isinstance(value, str) else start.end()
            if inside >= 0:
                return number + 1, inside
            found = found or (number + 1, start.end())
        return found or (None, 0)

    def _below(self, header: str) -> list[range]:
        """The lines of every table with this header, the header included."""
        starts = [i for i, line in enumerate(self._lines) if re.match(r"\s*\[", line)]
        ends = [*starts[1:], len(self._lines)]
        return [
            range(start, end)
            for start, end in zip(starts, ends, strict=False)
            if re.match(rf"\s*{header}", self._lines[start])
        ]


def _repeats(row: Row) -> bool:
    """Whether a row stands for several tensors, or for those of several layers."""
    return len(row.alternatives) > 1 or "#" in row.pattern or any(axis in STACKED for axis in row.spec.axes)


def _meet(one: Row, other: Row) -> bool:
    """Whether two rows are about the same layer, of as many as there may be."""
    if one.alternatives == other.alternatives:
        return True
    off = one.first - other.first
    steps = [row.every if "#" in row.pattern or "layers" in row.spec.axes else 0 for row in (one, other)]
    if not any(steps):
        return off == 0
    if all(steps):
        return off % math.gcd(*steps) == 0
    # One of them is a single layer.
    later = off if steps[1] else -off
    return later >= 0 and later % max(steps) == 0
