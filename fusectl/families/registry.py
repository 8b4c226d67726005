"""The families that fusectl brings along, and finding one by its name."""

from __future__ import annotations

import difflib
from pathlib import Path

from fusectl.errors import Incompatible
from fusectl.families.gemma import GEMMA_FAMILIES
from fusectl.families.maxtext import MAXTEXT_FAMILIES
from fusectl.families.t5 import T5_FAMILIES
from fusectl.families.table import Family


FAMILIES: tuple[Family, ...] = (*T5_FAMILIES, *MAXTEXT_FAMILIES, *GEMMA_FAMILIES)


def family_named(name: str) -> Family:
    """The family of this name or alias, or of the table in the file `name`, which ends with .toml.

    Raises Incompatible with the nearest names, NotFound where there is no such file, UsageError with all that is wrong
    in it.

    >>> family_named("mt5").name
    't5-1.1'
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
