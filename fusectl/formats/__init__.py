"""Checkpoints on disk: opening those that T5X and Orbax wrote, and the layouts that fusectl writes.

locate.py   which directory is meant           tree.py      keys, leaves, Checkpoint
t5x.py      msgpack index + zarr v2            zarr.py      what array metadata says
orbax.py    JSON index + zarr, OCDBT or not    encoding.py  the bytes of a chunk
sink.py     writing: staging, arrays, commit   store.py     files through tensorstore and the operating system
                                               target.py    new files: directories, or an OCDBT database
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from fusectl.errors import Corrupt, UsageError
from fusectl.formats.locate import T5X_INDEX, locate
from fusectl.formats.orbax import open_orbax
from fusectl.formats.store import MANIFEST
from fusectl.formats.t5x import open_t5x
from fusectl.formats.tree import Checkpoint, Location
from fusectl.record import FILE_NAME, Record


@dataclass(frozen=True, slots=True)
class Format:
    """A layout on disk that fusectl writes."""

    name: str
    says: str
    zarr: int
    ocdbt: bool

    @property
    def reads_left_out(self) -> bool:
        """Whether all of its readers take a chunk that was left out for zeros: Orbax's newest API does not."""
        return self.name == "t5x"


_MALFORMED = (AttributeError, TypeError, ValueError, LookupError, RecursionError)

FORMATS = {
    format.name: format
    for format in (
        Format("t5x", "T5X legacy: msgpack index + zarr v2", 2, ocdbt=False),
        Format("orbax", "Orbax: OCDBT + zarr v3", 3, ocdbt=True),
        Format("orbax-ocdbt-zarr2", "Orbax: OCDBT + zarr v2, as T5X writes", 2, ocdbt=True),
        Format("orbax-zarr2", "Orbax: zarr v2 in plain directories", 2, ocdbt=False),
        Format("orbax-zarr3", "Orbax: zarr v3 in plain directories", 3, ocdbt=False),
    )
}


def format_named(name: str) -> Format:
    """The Format of this name; raises UsageError with the known ones."""
    if name not in FORMATS:
        raise UsageError(f"no format is called {name!r}", hint=f"formats: {', '.join(FORMATS)}")
    return FORMATS[name]


def open_checkpoint(path: str) -> Checkpoint:
    """The checkpoint at a path (a step, an item, a root of steps, `root/latest`); only its metadata is read."""
    return open_location(locate(path))


def open_location(location: Location) -> Checkpoint:
    """The checkpoint at a place that is known."""
    file = location.home / FILE_NAME
    record = Record.from_json(file.read_bytes(), str(file)) if file.is_file() else None
    try:
        return (open_t5x if location.kind == "t5x" else open_orbax)(location, record)
    except _MALFORMED as error:
        # Whatever an index may hold in place of what it should.
        raise Corrupt(
            f"{location.index}: an index that makes no sense", details=(f"{type(error).__name__}: {error}",)
        ) from error


def fingerprint(checkpoint: Checkpoint) -> str:
    """A digest of a checkpoint's files: their names and sizes, and the contents of its index.

    It tells a checkpoint that was written anew (OCDBT names its files at random, compressed chunks change their size)
    without reading all of it; verify's weights level compares the values.
    """
    digest = hashlib.sha256()
    index = checkpoint.location.index
    for name, nbytes in sorted(_files_below(str(index)), key=lambda file: file[0].split("/")):
        digest.update(f"{name} {nbytes}\n".encode())
        if name.rpartition("/")[2] in {T5X_INDEX, MANIFEST}:
            digest.update((index / name).read_bytes())
    return digest.hexdigest()[:16]


def _files_below(directory: str, prefix: str = "") -> Iterator[tuple[str, int]]:
    """The names and sizes of the files below a directory but fusectl's own."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files_below(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file() and not entry.name.startswith("fusectl"):
                yield prefix + entry.name, entry.stat().st_size
