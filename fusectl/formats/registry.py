"""The formats that fusectl writes, by name. Each is in the module that kinds.FormatName names with it."""

from __future__ import annotations

from importlib import import_module

from fusectl.errors import UsageError
from fusectl.formats.format import Format
from fusectl.formats.kinds import FormatName
from fusectl.formats.tree import Location


_MODULES = dict.fromkeys(name.module for name in FormatName if name.module)
FORMATS: dict[str, Format] = {
    format.name: format for module in _MODULES for format in import_module(f"fusectl.formats.{module}").FORMATS
}
# Not a layout but a choice of one: that of the database which the family's trainer reads, as `orbax_for` has it.
ORBAX = FormatName.ORBAX
# The files that complete a checkpoint: fusectl writes them last.
COMPLETING = frozenset(name for format in FORMATS.values() for name in format.completing)


def format_named(name: str) -> Format:
    """The Format of this name, `orbax` being Orbax's own default for trees of no trainer; raises UsageError with the
    known names.

    >>> format_named("orbax-zarr3").zarr
    3
    """
    if name == ORBAX:
        return FORMATS[FormatName.ORBAX_OCDBT_ZARR3]
    if name not in FORMATS:
        raise UsageError(f"no format is called {name!r}", hint=f"formats: {', '.join([ORBAX, *FORMATS])}")
    return FORMATS[name]


def format_of(location: Location) -> Format:
    """A format of the kind that a location is of."""
    return next(each for each in FORMATS.values() if each.kind == location.kind)


def orbax_for(trainer: str, zarr: int = 3) -> Format:
    """The Orbax layout that a trainer (families.kinds.Trainer) writes and restores; of a tree without a trainer that in
    which arrays keep their version of zarr.

    >>> orbax_for("t5x").name
    <FormatName.ORBAX_OCDBT_ZARR2: 'orbax-ocdbt-zarr2'>
    """
    return next(
        each for each in FORMATS.values() if each.ocdbt and (each.is_read_by(trainer) if trainer else each.zarr == zarr)
    )
