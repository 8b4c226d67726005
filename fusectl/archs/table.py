"""The types of a family's table: a Row for each kind of tensor, and the Family that they make up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from fusectl.axes import TensorSpec, compiled, expand, parse_axes


@dataclass(frozen=True)
class Row:
    """One kind of tensor: where its instances are in the tree (axes.py has the notation) and what their axes are.

    `tied_head` marks the norm in front of a tied output head: the embedding cannot carry the head's factor, so this
    scale does.
    """

    pattern: str
    axes: str
    tied_head: bool = False

    @cached_property
    def spec(self) -> TensorSpec:
        return parse_axes(self.axes)

    @cached_property
    def alternatives(self) -> tuple[str, ...]:
        return expand(self.pattern)

    @property
    def writes_stream(self) -> bool:
        """Whether what it computes is added to the residual stream: all that writes embed, but for the norms."""
        return "embed" in self.spec.outputs and bool(self.spec.inputs)

    def matches(self, name: str) -> bool:
        return any(compiled(alternative).fullmatch(name) for alternative in self.alternatives)

    def index(self, name: str) -> int | None:
        """The number that stands at `#` in a name that this row matches; None where the pattern has none."""
        for alternative in self.alternatives:
            found = compiled(alternative).fullmatch(name)
            if found:
                return int(found.group(1)) if found.groups() else None
        return None


@dataclass(frozen=True)
class Family:
    """A model family: its table, and what the table cannot say."""

    name: str
    rows: tuple[Row, ...]
    # Axes whose sizes add up under fusion; all others must be equal in every source.
    grown: frozenset[str]
    # What the tree was recognised by, in words, from the shapes.
    evidence: Callable[[Mapping[str, tuple[int, ...]]], str] = field(repr=False)
    aliases: tuple[str, ...] = ()
    # Not recognised, only chosen with --arch: a damaged tree of a commoner family would look the same.
    by_name_only: bool = False
    # The module that runs the family's networks for verify (twin.py); a string, so that tables never import JAX.
    twin: str | None = None

    def row_of(self, name: str) -> Row | None:
        """The one row that matches a parameter's name, or None."""
        found = [row for row in self.rows if row.matches(name)]
        assert len(found) <= 1, f"{self.name}: {name} is matched by {[row.pattern for row in found]}"
        return found[0] if found else None
