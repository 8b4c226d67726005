"""The formats that fusectl writes, by name; and opening any that it reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from fusectl.errors import Corrupt, FusectlError, NotFound, UsageError
from fusectl.families.kinds import Trainer
from fusectl.formats.kinds import FormatName
from fusectl.formats.locate import COMMITTED, ORBAX_INDEX, PACKED_INDEX, STEP_METADATA, STRINGS, T5X_INDEX, locate
from fusectl.formats.objects import ObjectPath, read_small
from fusectl.formats.orbax import open_orbax
from fusectl.formats.record import FILE_NAME, Record, require_crc32
from fusectl.formats.store import MANIFEST, walk
from fusectl.formats.t5x import kept_in_index, open_t5x
from fusectl.formats.tree import Checkpoint, Location, told
from fusectl.system.memory import available_bytes


# A record has about twelve bytes for each chunk. What JSON can hide in a byte takes thirty in memory.
LARGEST_RECORD_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Format:
    """A layout on disk that fusectl writes."""

    name: str
    says: str
    zarr: int
    ocdbt: bool
    # What it calls files of its own next to the arrays' directories.
    reserved: frozenset[str]

    @property
    def reads_left_out(self) -> bool:
        """Whether all of its readers take a chunk that was left out for zeros: Orbax's newest API does not."""
        return self.name == FormatName.T5X

    @property
    def keeps_tree(self) -> bool:
        """Whether its index tells items, the kinds of keys, nodes without tensors, and random keys' generators.

        T5X's trees are dictionaries whose keys hold no slash.
        """
        return self.name != FormatName.T5X

    @property
    def needs_step(self) -> bool:
        """Whether its readers refuse a tree without a step."""
        return self.name == FormatName.T5X

    def keeps_in_index(self, tensor: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor's values are in the index, and in no file of their own."""
        return self.name == FormatName.T5X and kept_in_index(tensor, shape)

    def is_read_by(self, trainer: str) -> bool:
        """Whether a trainer (families.kinds.Trainer) restores it: T5X opens zarr 2 only, others Orbax's layouts only.

        Measured with T5X of 2026-04 on Orbax 0.12.8, which stops at the missing `.zarray` of zarr 3.
        """
        return self.zarr == 2 if trainer == Trainer.T5X else self.name != FormatName.T5X


_MALFORMED = (AttributeError, TypeError, ValueError, LookupError, RecursionError)

# Arrays in a database have names that no file shares.
_IN_A_DATABASE = frozenset[str]()
_BESIDE_ARRAYS = frozenset(
    {ORBAX_INDEX, PACKED_INDEX, STRINGS, MANIFEST, COMMITTED, STEP_METADATA, "_sharding", "array_metadatas"}
)

FORMATS = {
    format.name: format
    for format in (
        Format(FormatName.T5X, "T5X legacy: msgpack index + zarr v2", 2, ocdbt=False, reserved=frozenset({T5X_INDEX})),
        Format(FormatName.ORBAX_OCDBT_ZARR3, "Orbax: OCDBT + zarr v3", 3, ocdbt=True, reserved=_IN_A_DATABASE),
        Format(FormatName.ORBAX_OCDBT_ZARR2, "Orbax: OCDBT + zarr v2", 2, ocdbt=True, reserved=_IN_A_DATABASE),
        Format(FormatName.ORBAX_ZARR2, "Orbax: zarr v2 in plain directories", 2, ocdbt=False, reserved=_BESIDE_ARRAYS),
        Format(FormatName.ORBAX_ZARR3, "Orbax: zarr v3 in plain directories", 3, ocdbt=False, reserved=_BESIDE_ARRAYS),
    )
}
# Not a layout but a choice of one: that of the database which the family's trainer reads, as `orbax_for` has it.
ORBAX = FormatName.ORBAX


def format_named(name: str) -> Format:
    """The Format of this name, `orbax` being Orbax's own default for trees of no trainer; raises UsageError with the
    known names.
    """
    if name == ORBAX:
        return FORMATS[FormatName.ORBAX_OCDBT_ZARR3]
    if name not in FORMATS:
        raise UsageError(f"no format is called {name!r}", hint=f"formats: {', '.join([ORBAX, *FORMATS])}")
    return FORMATS[name]


def orbax_for(trainer: str) -> Format:
    """The Orbax layout that a trainer (families.kinds.Trainer) writes and restores."""
    return next(each for each in FORMATS.values() if each.ocdbt and each.is_read_by(trainer))


def open_checkpoint(path: str) -> Checkpoint:
    """The checkpoint at a path (a step, an item, a root of steps, `root/latest`); only its metadata is read."""
    return open_location(locate(path))


def open_location(location: Location, fault: Callable[[FusectlError], None] | None = None) -> Checkpoint:
    """The checkpoint at a place that is known.

    With `fault` it is told of the tensors whose metadata is missing or makes no sense, and of such a record; they are
    left out then. Without it the first one is raised.
    """
    file, record = location.home / FILE_NAME, None
    with told(fault):
        if file.is_file():
            record = Record.from_json(read_small(file, LARGEST_RECORD_BYTES), str(file))
    with told(fault):
        _require_index(location, record)
    try:
        opened = (open_t5x if location.kind == FormatName.T5X else open_orbax)(location, record, fault)
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
    file = location.index / (T5X_INDEX if location.kind == FormatName.T5X else ORBAX_INDEX)
    below = "" if location.index == location.home else f"{location.index.name}/"
    crc32 = record.files.get(below + file.name) if record else None
    if crc32 is not None:
        hint = "it was changed since, or its fusectl.json belongs to another checkpoint"
        require_crc32(read_small(file, available_bytes() // 2), crc32, str(file), hint=hint)


def fingerprint(checkpoint: Checkpoint) -> str:
    """A digest of a checkpoint's files: their names, their sizes where they are local, and the contents of its index.

    It tells a checkpoint that was written anew (OCDBT names its files at random, compressed chunks change their size)
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
