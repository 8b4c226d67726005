"""All that is wrong with a checkpoint, fusectl's own or not, and how far its format can tell.

index and arrays      entries without data, data without entries, shapes and dtypes that disagree
chunks                missing, cut, undecodable, of another checksum, NaN and Inf
commit                markers that are absent, OCDBT databases of writers that were not merged
optimizer             slots whose shapes do not fit their parameters
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusectl.errors import Corrupt, FusectlError, Incompatible, counted, shorten
from fusectl.formats.locate import locate, place
from fusectl.formats.names import ORBAX_INDEX
from fusectl.formats.objects import Place
from fusectl.formats.opening import open_location
from fusectl.formats.registry import format_of
from fusectl.formats.store import Extent
from fusectl.formats.tree import Checkpoint, Location
from fusectl.formats.zarr import METADATA_FILE
from fusectl.optimizer.registry import find_state, unlike_their_parameters
from fusectl.sources.opened import recognized
from fusectl.system.threads import Progress, Silent, default_jobs, default_max_memory_bytes
from fusectl.verification.files import check_files


# Files of an array that are no chunks.
_DESCRIBES = frozenset({*METADATA_FILE.values(), ".zattrs", ".zgroup"})
_CHUNK = re.compile(r"(.+?)/(?:c/)?\d+(?:[./]\d+)*")
# What Orbax keeps beside the arrays.
_OWN = re.compile(r"(d|array_metadatas|ocdbt\.[^/]+)/")
# How a flipped bit shows in a chunk, by what it is encoded with.
_TOLD = {
    "crc32c": "each has a CRC-32C, which every reader compares",
    "gzip": "each has gzip's CRC-32, which every reader compares",
    "zstd": "no checksum: a changed byte shows only if it can no longer be decoded",
    "none": "no checksum: a changed byte does not show",
    "other": "read by tensorstore, which knows whether it has a checksum",
}


@dataclass(frozen=True, slots=True)
class Fsck:
    """What was found: `problems`, in words; what has been read; and, by encoding, how far its chunks can tell."""

    path: str
    format: str | None
    problems: tuple[str, ...]
    tensors: int = 0
    bytes_read: int = 0
    told: Mapping[str, int] | None = None
    # The chunks, and the values kept in an index, that were compared with the checksums in fusectl.json.
    compared: int = 0
    notes: tuple[str, ...] = ()

    @property
    def limits(self) -> tuple[str, ...]:
        """How far the checkpoint's own format lets anybody notice a changed byte."""
        lines = [f"{n:,} chunks {kind}: {_TOLD[kind]}" for kind, n in (self.told or {}).items()]
        if self.compared:
            lines.append(f"{self.compared:,} chunks compared with the checksums in fusectl.json")
        return tuple(lines)

    def as_json(self) -> Mapping[str, Any]:
        """The finds as numbers, strings and lists."""
        return {
            "path": self.path,
            "format": self.format,
            "problems": list(self.problems),
            "tensors": self.tensors,
            "bytes_read": self.bytes_read,
            "chunks": dict(self.told or {}),
            "compared_chunks": self.compared,
            "limits": list(self.limits),
            "notes": list(self.notes),
        }


def fsck(
    path: str,
    arch: str | None = None,
    *,
    max_memory_bytes: int | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Fsck:
    """Reads all of a checkpoint and lists what is wrong with it.

    Of a step all items are looked into, of an item that is named only that one. Raises NotFound where there is none,
    and Incompatible for one of a kind that fusectl does not read; of one that cannot even be opened the reason is the
    only problem.
    """
    given: list[str] = []
    try:
        location = locate(path)
    except Corrupt as error:
        return Fsck(path, None, (_in_words(error),))

    def look(at: Location) -> Fsck:
        budget_bytes = max_memory_bytes or default_max_memory_bytes()
        return _of_item(at, arch, budget_bytes, jobs or default_jobs(), progress or Silent())

    found = [look(location)]
    # An item that fusectl cannot read is not a fault of the step: it becomes a note, and the other items are read.
    for each in _siblings(location, given) if place(path) != location.index else ():
        try:
            found.append(look(each))
        except Incompatible as error:
            given.append(f"not looked into: {_in_words(error)}")
    told = sum((Counter(each.told) for each in found), Counter[str]())
    return Fsck(
        found[0].path,
        found[0].format,
        tuple(dict.fromkeys(problem for each in found for problem in each.problems)),
        tensors=sum(each.tensors for each in found),
        bytes_read=sum(each.bytes_read for each in found),
        told=told,
        compared=sum(each.compared for each in found),
        notes=tuple(dict.fromkeys([*(note for each in found for note in each.notes), *given])),
    )


def _in_words(error: FusectlError) -> str:
    return "; ".join([error.message, *error.details])


def _siblings(location: Location, notes: list[str]) -> Iterator[Location]:
    """The other items of a step that was named as a whole; notes those that are no arrays."""
    if location.item is None:
        return
    items: list[Place] = sorted(location.home.iterdir(), key=str)
    for at in items:
        if not at.is_dir() or at.name == location.item:
            continue
        if (at / ORBAX_INDEX).is_file():
            yield replace(location, index=at, item=at.name, by_home=False, notes=())
        else:
            notes.append(f"{at.name}: an item without arrays, not looked into")


def _of_item(location: Location, arch: str | None, budget_bytes: int, jobs: int, progress: Progress) -> Fsck:
    """What is wrong with one item of a step, or with a checkpoint that is no step of items."""
    problems: list[str] = []

    def fault(error: FusectlError) -> None:
        problems.append(_in_words(error))

    try:
        checkpoint = open_location(location, fault)
    except Corrupt as error:
        fault(error)
        return Fsck(str(location.path), None, tuple(problems))
    if not checkpoint.leaves and not problems:
        problems.append(f"{checkpoint.location.index}: an index without tensors")
    problems += _strays(checkpoint)
    notes: list[str] = [*checkpoint.location.notes, *_unread(checkpoint)]
    problems += format_of(checkpoint.location).problems(checkpoint, notes)
    problems += _slot_problems(checkpoint, arch, notes)
    notes += _dead_bytes(checkpoint)
    notes += _larger_chunks(checkpoint)
    read = check_files(checkpoint, budget_bytes=budget_bytes, jobs=jobs, progress=progress)
    told: Counter[str] = Counter()
    for leaf in checkpoint.leaves.values():
        if leaf.stored is not None:
            encoding = leaf.stored.storage.encoding
            kind = "other" if encoding is None else "crc32c" if encoding.crc32c else encoding.compressor
            told[kind] += math.prod(leaf.stored.grid)
    return Fsck(
        checkpoint.path,
        checkpoint.format,
        (*problems, *read.problems),
        tensors=len(checkpoint.leaves),
        bytes_read=read.bytes_read,
        told=told,
        compared=read.checksums,
        notes=tuple(notes),
    )


def _unread(checkpoint: Checkpoint) -> Iterator[str]:
    """What stands in the tree and was not looked at."""
    # A verdict of no problems would be taken to cover these leaves, too.
    for node in checkpoint.nodes:
        if not node.can_be_carried:
            yield f"{node.name}: a leaf of type {node.value_type}, not looked at"


def _strays(checkpoint: Checkpoint) -> Iterator[str]:
    """Data without an entry: arrays that no leaf of the index names, chunks outside of an array's grid."""
    named = set(checkpoint.file_of.values())
    arrays = {
        at: checkpoint.leaves[name].stored for name, at in checkpoint.file_of.items() if name in checkpoint.leaves
    }
    unnamed: set[str] = set()
    for file in sorted(checkpoint.files.names):
        at, _, last = file.rpartition("/")
        if last in _DESCRIBES:
            if at and at not in named:
                yield f"{at}: an array that the index does not name"
            continue
        at, rest = _array_of(file, arrays)
        stored = arrays[at] if at else None
        if stored is None:
            lost = _CHUNK.fullmatch(file)
            if not at and lost and lost.group(1) not in {*named, *unnamed} and not _OWN.match(file):
                unnamed.add(lost.group(1))
                yield f"{lost.group(1)}: chunks of an array that the index does not name"
            continue
        # The last numbers of a key are the chunk's place, however zarr writes it: 0.1, 0/1, c/0/1. Digits are bounded
        # because names come from outside, and int() raises for more than 4,300 of them.
        index = tuple(map(int, re.findall(r"\d{1,18}", rest)))[-len(stored.shape) :] if stored.shape else ()
        inside = len(index) == len(stored.grid) and all(i < n for i, n in zip(index, stored.grid, strict=True))
        if not inside or stored.chunk_key(index) != rest:
            yield f"{file}: no chunk of its array"


def _array_of(file: str, arrays: Mapping[str, Any]) -> tuple[str, str]:
    """The array whose directory a file lies in, and the rest of its path."""
    at, rest = file, ""
    while at:
        at, _, last = at.rpartition("/")
        rest = f"{last}/{rest}" if rest else last
        if at in arrays:
            return at, rest
    return "", file


def _dead_bytes(checkpoint: Checkpoint) -> Iterator[str]:
    """How much of a database's data files its newest version does not refer to: nobody reads it, nor is it checked."""
    tree = checkpoint.files.database
    if tree is None:
        return
    extents = {each for each in (*tree.nodes, *tree.values.values()) if isinstance(each, Extent)}
    files = {each.path for each in extents}
    dead_bytes = sum(Path(file).stat().st_size for file in files) - sum(each.nbytes for each in extents)
    if dead_bytes > 0:
        yield f"{dead_bytes:,} bytes of the database's data files are of older versions: nobody reads them"


def _larger_chunks(checkpoint: Checkpoint) -> Iterator[str]:
    """Arrays that are smaller than one of their chunks: such as one whose metadata were changed."""
    # Readers crop such a chunk silently. A parameter of 24 x 40 whose zarr.json said 12 x 40 was read and converted
    # with half of its values, and passed every check.
    larger = [
        f"{name}, {list(leaf.shape)} in chunks of {list(leaf.chunks)}"
        for name, leaf in checkpoint.leaves.items()
        if 0 not in leaf.shape and any(n < chunk for n, chunk in zip(leaf.shape, leaf.chunks, strict=True))
    ]
    if larger:
        yield f"{counted(len(larger), 'array')} smaller than a chunk, as T5X and Orbax write none: {larger[0]}"


def _slot_problems(checkpoint: Checkpoint, arch: str | None, notes: list[str]) -> Iterator[str]:
    try:
        tree = recognized(checkpoint, arch)
    except Incompatible as error:
        # Names are enough to see that a slot has another shape than its parameter, also in trees of no family.
        notes.append(f"the optimizer's slots were compared with their parameters by name only: {error.message}")
        yield from unlike_their_parameters(checkpoint.shapes)
        return
    try:
        state = find_state(checkpoint.shapes, tree, checkpoint.path)
    except Incompatible as error:
        yield from error.details
        return
    if state.kind == "unknown":
        notes.append("the optimizer is none that fusectl knows: whether it lacks slots cannot be told")
    else:
        yield from shorten(state.problems, 5)
