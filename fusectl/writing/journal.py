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
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from fusectl.errors import Corrupt, Incompatible, StorageError, counted
from fusectl.formats.names import JOURNAL
from fusectl.formats.objects import ObjectPath, Place
from fusectl.formats.servercopy import generations
from fusectl.formats.staging import journal_head
from fusectl.formats.store import walk
from fusectl.formats.tree import Checkpoint
from fusectl.formats.upload import Parts, Staging
from fusectl.planning.plan import Plan, summary


SCHEMA = "fusectl/journal/1"
# What may differ between the first run and the one that goes on. A budget changes the chunks, which are compared.
_FREE = frozenset({"max_memory_bytes", "notes", "read_bytes"})

Index = tuple[int, ...]
# Of each directory that is read what tells its files from later ones of the same names; None where nobody can tell.
Stamps = Mapping[Place, Mapping[str, Sequence[Any]] | None]


class Journal:
    """The chunks that a staging directory holds, by tensor and place in its grid, each with its CRC-32."""

    def __init__(self, at: Staging, digest: str, *, names: Sequence[str] = (), resume: bool) -> None:
        """Starts a journal of what the digest tells; with `resume` opens the one that is there.

        `names` are those that will stand in the place that is written to.

        Raises Incompatible if that is of something else.
        """
        if resume:
            require_same_plan(at.home, digest)
        self.closed = False
        self._lock = threading.Lock()
        journal = at.home / JOURNAL
        self._lines: _Lines = _File(journal) if isinstance(journal, Path) else Parts(journal)
        self._done = dict(_entries(self._lines.read())) if resume else {}
        if not resume:
            self._lines.begin(_line({"schema": SCHEMA, "plan": digest, "names": sorted(names)}))
        at.begun = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._lock:
            self.closed = True
            self._lines.close(failing=kind is not None and issubclass(kind, StorageError))

    def done(self, tensor: str, place: Index) -> str | None:
        """The CRC-32 of a chunk that has been written, or None."""
        return self._done.get((tensor, place))

    def __len__(self) -> int:
        return len(self._done)

    def add(self, tensor: str, place: Index, crc32: str) -> None:
        """Notes that a chunk has been written; nothing once it is closed, which a thread may outlive."""
        with self._lock:
            if not self.closed:
                self._done[tensor, place] = crc32
                self._lines.append(_line([tensor, place, crc32]))


class _Lines(Protocol):
    """Where the lines of a journal are kept."""

    def read(self) -> bytes: ...

    def begin(self, line: bytes) -> None: ...

    def append(self, line: bytes) -> None: ...

    def close(self, *, failing: bool) -> None: ...


class _File:
    """The lines of a journal in a file."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)

    def read(self) -> bytes:
        with open(self._handle, "rb", closefd=False) as file:
            lines = file.read()
        # Behind a line that was cut off.
        os.write(self._handle, b"\n")
        return lines

    def begin(self, line: bytes) -> None:
        os.ftruncate(self._handle, 0)
        self.append(line)

    def append(self, line: bytes) -> None:
        # A line is one write, in append mode: a kill cuts off the last line at most, which _entries passes over.
        os.write(self._handle, line)

    def close(self, *, failing: bool) -> None:  # noqa: ARG002
        os.close(self._handle)


def _line(entry: object) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def require_same_plan(at: Place, digest: str) -> None:
    """Raises Incompatible unless the journal in `at` is of what the digest tells."""
    try:
        found = json.loads(journal_head(at))
        same = (found["schema"], found["plan"]) == (SCHEMA, digest)
    except (ValueError, LookupError, TypeError, RecursionError):
        same = False
    if not same:
        raise Incompatible(
            f"{at}: was begun with another plan: other sources, options, or another version",
            hint="without --resume it starts anew",
        )


def digest_of(plan: Plan, stamps: Stamps, *, allow_nonfinite: bool) -> str:
    """What tells whether two runs write the same bytes by the same names, from files that nobody has touched since."""
    told: list[Any] = [{key: value for key, value in summary(plan).items() if key not in _FREE}, allow_nonfinite]
    told += [plan.record.version, [source.fingerprint for source in plan.record.made_from]]
    told += [repr((output.layout, output.storage)) for output in plan.outputs]
    # What nobody can tell is another one each time.
    told += [uuid.uuid4().hex if files is None else sorted(files.items()) for files in stamps.values()]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def stamps_of(sources: Sequence[Checkpoint]) -> Stamps:
    """What changes when anybody writes to a source."""
    return {index: _stamp(index) for index in dict.fromkeys(source.location.index for source in sources)}


def require_untouched(before: Stamps) -> None:
    """Raises Corrupt if a file of the sources is not what it was: what has been read may be of two checkpoints."""
    for index, was in before.items():
        now = _stamp(index)
        if was is None or now is None:
            continue
        touched = sorted(name for name, stamp in was.items() if now.get(name) != stamp)
        if touched:
            raise Corrupt(
                f"{index}: changed while it was being read",
                details=(f"{counted(len(touched), 'file')} not what they were, such as {touched[0]}",),
                hint="run it again when nobody writes there",
            )


def _stamp(index: Place) -> Mapping[str, Sequence[Any]] | None:
    """Inode and time of each file, in a bucket the generation; None where nobody can tell."""
    if isinstance(index, ObjectPath):
        found = generations(index)
        return None if found is None else {name: [generation] for name, generation in found.items()}
    try:
        files = [entry for entry in walk(str(index)) if not entry.is_dir()]
        return {file.path: [file.stat().st_ino, file.stat().st_mtime_ns] for file in files}
    except FileNotFoundError:
        return {}


def _entries(lines: bytes) -> Iterator[tuple[tuple[str, Index], str]]:
    """The chunks that a journal names, without lines that were cut off or make no sense."""
    for line in lines.split(b"\n"):
        try:
            name, place, crc32 = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            continue
        if isinstance(name, str) and isinstance(place, list) and all(isinstance(i, int) for i in place):
            yield (name, tuple(place)), str(crc32)
