"""The files level: every chunk there, readable, and as its checksum says; the tree as the record says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fusectl.errors import Corrupt
from fusectl.formats.tree import Checkpoint, Leaf
from fusectl.formats.zarr import checksum, nonfinite_at
from fusectl.layout import tiles
from fusectl.record import Checksums, Record


@dataclass(frozen=True)
class FilesResult:
    """What the files level found. `checksums` counts the chunks that were compared; 0 when there is no record."""

    passed: bool
    tensors: int
    bytes_read: int
    checksums: int
    problems: tuple[str, ...]


def check_files(checkpoint: Checkpoint) -> FilesResult:
    """Reads every chunk of a checkpoint once and compares it with the record, where there is one."""
    record = checkpoint.record
    problems: list[str] = []
    bytes_read = compared = 0
    if record is not None and record.tensors:
        problems += _tree_problems(checkpoint, record)
    for leaf in checkpoint.leaves.values():
        sums = record.tensors.get(leaf.name) if record is not None else None
        if sums is not None and (sums.shape, sums.dtype) != (leaf.shape, leaf.dtype):
            sums = None
        missing = checkpoint.missing_chunks(leaf.name)
        if missing:
            problems += [f"{leaf.name}: chunk {chunk} is missing" for chunk in missing[:3]]
            continue
        found = list(_value_problems(checkpoint, leaf, sums))
        problems += found
        bytes_read += leaf.nbytes
        compared += len(sums.crc32) if sums is not None else 0
    return FilesResult(not problems, len(checkpoint.leaves), bytes_read, compared, tuple(problems))


def _tree_problems(checkpoint: Checkpoint, record: Record) -> Iterator[str]:
    for name in sorted(checkpoint.leaves.keys() - record.tensors.keys()):
        yield f"{name}: not among the tensors that were written"
    for name in sorted(record.tensors.keys() - checkpoint.leaves.keys()):
        yield f"{name}: written, and gone"
    for name in sorted(record.tensors.keys() & checkpoint.leaves.keys()):
        leaf, sums = checkpoint.leaves[name], record.tensors[name]
        if (leaf.shape, leaf.dtype) != (sums.shape, sums.dtype):
            yield f"{name}: {leaf.dtype}{list(leaf.shape)}, written as {sums.dtype}{list(sums.shape)}"


def _value_problems(checkpoint: Checkpoint, leaf: Leaf, sums: Checksums | None) -> Iterator[str]:
    chunks = sums.chunks if sums is not None else leaf.chunks
    for i, region in enumerate(tiles(leaf.shape, chunks)):
        try:
            values = checkpoint.read(leaf.name, region)
        except Corrupt as error:
            yield f"{error.message}: {'; '.join(error.details)}"
            continue
        at = [r.start for r in region]
        if sums is not None and checksum(values) != sums.crc32[i]:
            yield f"{leaf.name}: the chunk at {at} is not what was written (CRC-32)"
        bad = nonfinite_at(values)
        if bad is not None:
            yield f"{leaf.name}: {values[bad]} in the chunk at {at}"
