"""The journal of a write: which chunks stand in the staging directory, so that an interrupted one can go on.

    {"schema": "fusectl/journal/1", "plan": "5f0c…"}
    ["target/decoder/logits_dense/kernel", [0, 1], "9ae0daaf"]

It is a claim, not a proof: whoever resumes reads each chunk again and compares its CRC-32, since after a power loss a
file may be named here whose bytes never reached the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fusectl.errors import Incompatible
from fusectl.formats.sink import JOURNAL
from fusectl.formats.store import walk
from fusectl.formats.tree import Checkpoint
from fusectl.plan import Plan, summary


SCHEMA = "fusectl/journal/1"
# What may differ between the first run and the one that goes on. A budget changes the chunks, which are compared.
_FREE = frozenset({"max_memory_bytes", "notes", "read_bytes"})

Place = tuple[int, ...]


class Journal:
    """The chunks that a staging directory holds, by tensor and place in its grid, each with its CRC-32."""

    def __init__(self, at: Path, digest: str, *, resume: bool) -> None:
        """Starts a journal in `at`, of what the digest tells; with `resume` opens the one that is there.

        Raises Incompatible if that is of something else.
        """
        if resume:
            require_same_plan(at, digest)
        self.closed = False
        self._lock = threading.Lock()
        self._done: dict[tuple[str, Place], str] = {}
        if resume:
            self._done.update(_entries(at))
        mode = os.O_APPEND if resume else os.O_TRUNC
        self._handle = os.open(at / JOURNAL, os.O_WRONLY | os.O_CREAT | mode, 0o666)
        if resume:
            # Behind a line that was cut off.
            os.write(self._handle, b"\n")
        else:
            self._write({"schema": SCHEMA, "plan": digest})

    def done(self, tensor: str, place: Place) -> str | None:
        """The CRC-32 of a chunk that has been written, or None."""
        return self._done.get((tensor, place))

    def __len__(self) -> int:
        return len(self._done)

    def add(self, tensor: str, place: Place, crc32: str) -> None:
        """Notes that a chunk has been written; nothing after `close`, which a thread may outlive."""
        with self._lock:
            if not self.closed:
                self._done[tensor, place] = crc32
                self._write([tensor, place, crc32])

    def close(self) -> None:
        with self._lock:
            self.closed = True
            os.close(self._handle)

    def _write(self, entry: object) -> None:
        os.write(self._handle, json.dumps(entry).encode() + b"\n")


def require_same_plan(at: Path, digest: str) -> None:
    """Raises Incompatible unless the journal in `at` is of what the digest tells."""
    with (at / JOURNAL).open("rb") as journal:
        first = journal.readline()
    if first != json.dumps({"schema": SCHEMA, "plan": digest}).encode() + b"\n":
        raise Incompatible(
            f"{at}: was begun with another plan: other sources, options, or another version",
            hint="without --resume it starts anew",
        )


def digest_of(plan: Plan, sources: Sequence[Checkpoint], *, allow_nonfinite: bool) -> str:
    """What tells whether two runs write the same bytes by the same names, from files that nobody has touched since."""
    told: list[Any] = [{key: value for key, value in summary(plan).items() if key not in _FREE}, allow_nonfinite]
    told += [plan.record.version, [source.fingerprint for source in plan.record.sources]]
    told += [repr((output.layout, output.storage)) for output in plan.outputs]
    for index in dict.fromkeys(source.location.index for source in sources):
        if isinstance(index, Path):
            files = (entry for entry in walk(str(index)) if not entry.is_dir())
            told.append(sorted((file.path, file.stat().st_ino, file.stat().st_mtime_ns) for file in files))
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _entries(at: Path) -> Iterator[tuple[tuple[str, Place], str]]:
    """The chunks that the journal in `at` names, without lines that were cut off or make no sense."""
    for line in (at / JOURNAL).read_bytes().split(b"\n")[1:]:
        try:
            name, place, crc32 = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            continue
        if isinstance(name, str) and isinstance(place, list) and all(isinstance(i, int) for i in place):
            yield (name, tuple(place)), str(crc32)
