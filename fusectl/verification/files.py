"""The files level: every chunk there, readable, and as its checksum says; the tree as the record says."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from functools import partial

from fusectl.errors import Corrupt, NotEnoughSpace
from fusectl.formats.encoding import checksum
from fusectl.formats.objects import read_small
from fusectl.formats.record import LEFT_OUT, UNREAD, Checksums, Record, require_crc32
from fusectl.formats.tree import Checkpoint, Leaf
from fusectl.formats.zarr import nonfinite_at
from fusectl.layout.blocks import Region, place_in_grid, size, tiles
from fusectl.system.memory import available_bytes
from fusectl.system.threads import TOLERATED_EXCESS_BYTES, Progress, in_parallel
from fusectl.verification.report import FilesResult


def check_files(
    checkpoint: Checkpoint, *, budget_bytes: int, jobs: int, progress: Progress, allow_nonfinite: bool = False
) -> FilesResult:
    """Reads every chunk of a checkpoint once, on all cores, and compares it with the record, where there is one."""
    record = checkpoint.record
    by_leaf: dict[str, dict[tuple[int, ...], str]] = {name: {} for name in checkpoint.leaves}
    lock = threading.Lock()
    bytes_read = compared = 0
    progress.start("reading files", sum(leaf.nbytes for leaf in checkpoint.leaves.values()))

    def check(leaf: Leaf, region: Region, sums: Checksums | None, i: int) -> None:
        problem = _problem(checkpoint, leaf, region, sums.crc32[i] if sums else None, allow_nonfinite=allow_nonfinite)
        if problem:
            with lock:
                by_leaf[leaf.name][tuple(r.start for r in region)] = problem
        progress.advance(leaf.name, size(region) * leaf.itemsize)

    def tasks() -> Iterator[tuple[int, partial[None]]]:
        nonlocal bytes_read, compared
        for leaf in checkpoint.leaves.values():
            missing = checkpoint.missing_chunks(leaf.name)
            if missing:
                by_leaf[leaf.name] = {
                    (k,): f"{leaf.name}: chunk {chunk} is missing" for k, chunk in enumerate(missing[:3])
                }
                continue
            sums = record.tensors.get(leaf.name) if record is not None else None
            if sums is not None and (sums.shape, sums.dtype) != (leaf.shape, leaf.dtype):
                sums = None
            bytes_read += leaf.nbytes
            compared += sum(crc32 != UNREAD for crc32 in sums.crc32) if sums is not None else 0
            if leaf.reading_bytes > budget_bytes + TOLERATED_EXCESS_BYTES:
                needed = f"--max-memory {math.ceil(leaf.reading_bytes / 2**20)}MiB"
                raise NotEnoughSpace(f"{checkpoint.path}: {leaf.name}: one chunk does not fit into memory", hint=needed)
            chunks = sums.chunks if sums is not None else leaf.chunks
            for i, region in enumerate(tiles(leaf.shape, chunks)):
                if sums is None and leaf.stored and checkpoint.is_left_out(leaf.name, place_in_grid(region, chunks)):
                    continue
                cost = size(region) * leaf.itemsize + leaf.reading_bytes
                yield cost, partial(check, leaf, region, sums, i)

    in_parallel(tasks(), budget_bytes=budget_bytes, jobs=jobs)
    problems = list(_tree_problems(checkpoint, record)) if record is not None and record.tensors else []
    problems += _metadata_problems(checkpoint, record) if record is not None else []
    problems += [found[at] for found in by_leaf.values() for at in sorted(found)]
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


def _metadata_problems(checkpoint: Checkpoint, record: Record) -> Iterator[str]:
    """The index and the markers, where they are not what was written; the arrays' own were compared at opening."""
    for name, crc32 in record.files.items():
        file = checkpoint.location.home / name
        if not file.exists():
            yield f"{name}: written, and gone"
            continue
        try:
            require_crc32(read_small(file, available_bytes() // 2), crc32, str(file))
        except Corrupt as error:
            yield error.message


def _problem(
    checkpoint: Checkpoint, leaf: Leaf, region: Region, crc32: str | None, *, allow_nonfinite: bool
) -> str | None:
    """What is wrong with a chunk, or None."""
    try:
        values = checkpoint.read(leaf.name, region)
    except (Corrupt, NotEnoughSpace) as error:
        return ": ".join([error.message, *error.details])
    at = [r.start for r in region]
    bad = None if allow_nonfinite else nonfinite_at(values)
    problems = []
    if crc32 == LEFT_OUT and values.any():
        problems.append(f"the chunk at {at} was zeros and left out, and is something else")
    # Others are compared where they are read.
    whole = leaf.stored is None or leaf.stored.storage.encoding is None
    if whole and crc32 not in {None, LEFT_OUT, UNREAD} and checksum(values) != crc32:
        problems.append(f"the chunk at {at} is not what was written (CRC-32)")
    if bad is not None:
        problems.append(f"{values[bad]} in the chunk at {at}")
    return f"{leaf.name}: {'; '.join(problems)}" if problems else None
