"""What the papers report, as data: their tables with units and sources, to stand beside one's own numbers.

A TOML file for each paper holds its tables row by row, each with where it stands in the paper. Notes say what a table
leaves open, and where our text of it is garbled.

    >>> table("table1").row("self-fusion")["accuracy"]
    67.2
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources


Value = str | float


@dataclass(frozen=True)
class Column:
    """A column of a table: its name, its unit (empty where it has none), and what it is."""

    name: str
    meaning: str
    unit: str = ""


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper.

    `rows` are by the names of `columns`; a row lacks what the paper does not give. `source` is the paper, the table and
    the section, `notes` what has to be known to read it.
    """

    name: str
    title: str
    source: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Value], ...]
    notes: tuple[str, ...] = ()

    def row(self, label: str) -> Mapping[str, Value]:
        """The one row whose first column says this. Raises KeyError where none or several do."""
        found = [row for row in self.rows if row[self.columns[0].name] == label]
        if len(found) != 1:
            raise KeyError(f"{self.name}: {len(found)} rows of {label!r}")
        return found[0]


@dataclass(frozen=True)
class Paper:
    """A paper, and the names of its tables here."""

    title: str
    authors: str
    venue: str
    arxiv: str
    tables: tuple[str, ...]


def _read(paper: str) -> tuple[Paper, tuple[PaperTable, ...]]:
    """A paper's file."""
    kept = tomllib.loads(resources.files(__name__).joinpath(f"{paper}.toml").read_text(encoding="utf-8"))
    tables = tuple(
        PaperTable(
            each["name"],
            each["title"],
            f"{kept['authors'].split(',')[0]} et al., {kept['venue']}, {each['source']}",
            tuple(Column(**column) for column in each["columns"]),
            tuple(each["rows"]),
            tuple(each.get("notes", ())),
        )
        for each in kept.pop("tables")
    )
    return Paper(**kept, tables=tuple(each.name for each in tables)), tables


_FILES = tuple(_read(paper) for paper in ("deep_fusion", "ligo"))
_TABLES: Mapping[str, PaperTable] = {each.name: each for _, tables in _FILES for each in tables}
PAPERS = tuple(paper for paper, _ in _FILES)


def names() -> tuple[str, ...]:
    """The names of all tables, in the papers' order."""
    return tuple(_TABLES)


def table(name: str) -> PaperTable:
    """A table by its name. Raises KeyError, naming those that there are."""
    if name not in _TABLES:
        raise KeyError(f"{name}: no table; there are {', '.join(names())}")
    return _TABLES[name]
