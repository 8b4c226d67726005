"""Writing to a bucket. It knows no rename: objects go where they belong, and those that make a checkpoint of them last.

    gs://bucket/runs/fused/
      fusectl-lease.json            who is writing, renewed every few seconds
      fusectl-journal.jsonl[.N]     what has been written
      …                             arrays
      fusectl.json, checkpoint      held back until all of it is there and has been found as planned

Whoever finds a lease watches whether it is renewed. If not, its writer is gone, and the place can be taken.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from fusectl.errors import Corrupt, NotEnoughSpace, OutputExists, StorageError
from fusectl.formats.locate import JOURNAL, LEASE, names_in, unfinished
from fusectl.formats.objects import ObjectPath


BEAT_S = 5.0
# How long a lease is watched, and how often it is looked at.
PATIENCE_S = 16.0
LOOK_S = 1.0
# How much of a journal may be lost with its writer.
FLUSH_S = 1.0
_RELEASED = b"{}"


@contextmanager
def uploaded(
    final: ObjectPath, *, resume: bool, kept: Callable[[], None], note: Callable[[str], None]
) -> Iterator[tuple[ObjectPath, Callable[[], None]]]:
    """`final` to be written to, and what raises when another process has taken it over.

    Small files are held back until the body ends. When it fails, what is there is removed, or kept as `staged` says.
    """
    home = final.anew({})
    lease = Lease(home, note)
    try:
        require_free(final.anew())
        if not resume:
            _clear(home)
        yield home, lease.require
        lease.renew()
        home.publish()
        lease.end()
        clear_unfinished(final)
    except BaseException as error:
        if not lease.lost:
            _undo(home, lease, error, kept)
        raise


def require_free(final: ObjectPath) -> None:
    """Raises OutputExists where there is anything but what an unfinished run has left."""
    names = names_in(final)
    if names and not unfinished(names):
        hint = "choose another -o, or remove it: a bucket cannot replace a checkpoint in one step"
        raise OutputExists(f"{final}: exists", hint=hint)


def _undo(home: ObjectPath, lease: Lease, error: BaseException, kept: Callable[[], None]) -> None:
    """Leaves what can be gone on with, or nothing."""
    if isinstance(error, StorageError):
        # It would have to answer now. The lease runs out without it.
        lease.end()
        kept()
        return
    with suppress(StorageError):
        if (not isinstance(error, Exception) or isinstance(error, NotEnoughSpace)) and (home / JOURNAL).read()[0]:
            lease.end(release=True)
            kept()
        else:
            _clear(home)
            lease.end()
            (home / LEASE).remove()


def _clear(home: ObjectPath) -> None:
    """Removes all but the lease."""
    for child in home.anew().iterdir():
        if child.name != LEASE:
            child.remove()


def clear_unfinished(final: ObjectPath) -> None:
    """Removes what tells that a checkpoint is not finished: the journal, then the lease."""
    for child in final.anew().iterdir():
        if child.name.startswith(JOURNAL):
            child.remove()
    (final / LEASE).remove()


class Lease:
    """The right to write below a place in a bucket, which a thread renews until it ends."""

    def __init__(self, at: ObjectPath, note: Callable[[str], None]) -> None:
        """Takes the place; raises OutputExists where another process is writing."""
        self.lost = False
        self._where = str(at)
        self._object = (at / LEASE).anew()
        self._me = {"holder": uuid.uuid4().hex, "host": socket.gethostname(), "process": os.getpid()}
        self._beats = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._generation = self._take(note)
        threading.Thread(target=self._beat, name="fusectl-lease", daemon=True).start()

    def require(self) -> None:
        """Raises OutputExists if another process has taken the place."""
        if self.lost:
            raise OutputExists(f"{self._where}: another process has taken it over")

    def renew(self) -> None:
        """Says that its holder lives; raises OutputExists if the place was taken."""
        with self._lock:
            if self._ended.is_set():
                return
            generation = self._object.write_if(self._contents(), self._generation)
            if generation is None:
                # A store that has answered too late was asked twice, and did it the first time.
                value, generation = self._object.read()
                self.lost = _holder(value) != self._me["holder"]
            self._generation = generation
        self.require()

    def end(self, *, release: bool = False) -> None:
        """Renews no longer; with `release` the next one may take the place at once."""
        self._ended.set()
        with self._lock:
            if release:
                self._object.write_if(_RELEASED, self._generation)

    def _take(self, note: Callable[[str], None]) -> bytes:
        value, generation = self._object.read()
        if value not in {None, _RELEASED}:
            note(f"{self._object}: watching for {PATIENCE_S:.0f} s whether its writer lives")
            generation = self._watch(generation)
        taken = self._object.write_if(self._contents(), generation)
        # Not every store compares and writes in one step.
        if taken is None or _holder(self._object.read()[0]) != self._me["holder"]:
            raise OutputExists(f"{self._where}: another process is writing it")
        return taken

    def _watch(self, generation: bytes) -> bytes:
        renewed = False
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            time.sleep(LOOK_S)
            value, now = self._object.read()
            if value in {None, _RELEASED}:
                return now
            if now == generation:
                continue
            if renewed:
                raise OutputExists(f"{self._where}: another process is writing it")
            # Once may be what a writer had sent before it was killed.
            renewed, generation, until = True, now, time.monotonic() + PATIENCE_S
        return generation

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with suppress(StorageError, OutputExists):
                self.renew()

    def _contents(self) -> bytes:
        self._beats += 1
        return json.dumps({"schema": "fusectl/lease/1", **self._me, "beats": self._beats}).encode()


def _holder(lease: bytes | None) -> object:
    try:
        found = json.loads(lease or b"{}")
    except ValueError as error:
        raise Corrupt("a lease that makes no sense") from error
    return found.get("holder") if isinstance(found, dict) else None


class Parts:
    """The lines of a journal in a bucket. Objects cannot be appended to: each part holds what came since the last."""

    def __init__(self, journal: ObjectPath, guard: Callable[[], None]) -> None:
        self._journal = journal.anew()
        self._guard = guard
        before = (p for p in self._journal.parent.iterdir() if p.name.startswith(f"{journal.name}."))
        self._parts = sorted(before, key=str)
        self._lines: list[bytes] = []
        self._flushed_s = time.monotonic()

    def read(self) -> bytes:
        """All lines that were written before."""
        return b"".join(part.read()[0] or b"" for part in self._parts)

    def begin(self, line: bytes) -> None:
        """Writes the first line."""
        self._journal.write_bytes(line)

    def append(self, line: bytes) -> None:
        self._guard()
        self._lines.append(line)
        if time.monotonic() - self._flushed_s >= FLUSH_S:
            self._flush()

    def close(self, *, failing: bool) -> None:
        """Writes what is left, unless storage is what has failed."""
        if self._lines and not failing:
            with suppress(StorageError):
                self._flush()

    def _flush(self) -> None:
        part = self._journal.with_name(f"{self._journal.name}.{len(self._parts):06}")
        part.write_bytes(b"".join(self._lines))
        self._parts.append(part)
        self._lines.clear()
        self._flushed_s = time.monotonic()
