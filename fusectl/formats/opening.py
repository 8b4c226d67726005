"""Opening a checkpoint of any format, and a digest to know its files by."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from fusectl.errors import Corrupt, FusectlError, NotFound
from fusectl.formats.locate import locate
from fusectl.formats.names import T5X_INDEX
from fusectl.formats.objects import ObjectPath, read_small
from fusectl.formats.record import FILE_NAME, Record, require_crc32
from fusectl.formats.registry import format_of
from fusectl.formats.store import MANIFEST, walk
from fusectl.formats.tree import Checkpoint, Location, told
from fusectl.system.memory import available_bytes


# A record has about twelve bytes for each chunk. What JSON can hide in a byte takes thirty in memory.
LARGEST_RECORD_BYTES = 32 << 20

_MALFORMED = (AttributeError, TypeError, ValueError, LookupError, RecursionError)


def open_checkpoint(path: str) -> Checkpoint:
    """The checkpoint at a path (a step, an item, a root of steps, `root/latest`); only its metadata is read."""
    return open_location(locate(path))


def open_location(location: Location, fault: Callable[[FusectlError], None] | None = None) -> Checkpoint:
    """The checkpoint at a place that is known.

    Tensors whose metadata is missing or makes no sense, and such a record, are left out with `fault`, which is called
    with each error. Without it the first error is raised.
    """
    file, record = location.home / FILE_NAME, None
    with told(fault):
        if file.is_file():
            record = Record.from_json(read_small(file, LARGEST_RECORD_BYTES), str(file))
    with told(fault):
        _require_index(location, record)
    try:
        opened = format_of(location).open(location, record, fault)
    except _MALFORMED as error:
        # Whatever an index may hold in place of what it should.
        raise Corrupt(
            f"{location.index}: an index that makes no sense", details=(f"{type(error).__name__}: {error}",)
        ) from error
    if fault is None and not opened.leaves:
        raise NotFound(f"{location.path}: no tensors", details=("its index names none, or only empty nodes",))
    return opened


def _require_index(location: Location, record: Record | None) -> None:
    """Raises Corrupt if the index is not the one that the record was written with."""
    file = location.index / format_of(location).index
    below = "" if location.index == location.home else f"{location.index.name}/"
    crc32 = record.files.get(below + file.name) if record else None
    if crc32 is not None:
        hint = "it was changed since, or its fusectl.json belongs to another checkpoint"
        require_crc32(read_small(file, available_bytes() // 2), crc32, str(file), hint=hint)


def fingerprint(checkpoint: Checkpoint) -> str:
    """A digest of a checkpoint's files: their names, their sizes where they are local, and the contents of its index.

    It detects that a checkpoint was rewritten (OCDBT names its files at random, compressed chunks change their size)
    without reading all of it; verify's weights level compares the values.
    """
    digest = hashlib.sha256()
    index = checkpoint.location.index
    files: dict[str, int | None] = {}
    if isinstance(index, ObjectPath):
        # Listing them does not tell their sizes.
        files = dict.fromkeys(index.files())
    else:
        for entry in walk(str(index)):
            if entry.is_file():
                files[entry.path.removeprefix(f"{index}/")] = entry.stat().st_size
    for name in sorted(files, key=lambda name: name.split("/")):
        last = name.rpartition("/")[2]
        if last.startswith("fusectl"):
            continue
        digest.update(f"{name} {files[name]}\n".encode())
        if last in {T5X_INDEX, MANIFEST}:
            digest.update((index / name).read_bytes())
    return digest.hexdigest()[:16]
