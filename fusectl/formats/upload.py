"""Writing to a bucket. It knows no rename: objects go where they belong, and those that make a checkpoint of them last.

    gs://bucket/runs/fused/
      fusectl-lease.json            who is writing, renewed every few seconds
      fusectl-journal.jsonl[.N]     what has been written
      …                             arrays
      fusectl.json, checkpoint      held back until all of it is there and has been found as planned

Whoever finds a lease watches whether it is renewed. If not, its writer is gone, and the place can be taken. A writer
that could not renew its own for a while does so before it goes on, and stops where another one has taken the place.
Only what fusectl has written is ever removed: the journal names it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from fusectl.errors import FusectlError, NotEnoughSpace, OutputExists, StorageError
from fusectl.formats.locate import names_in, unfinished
from fusectl.formats.names import JOURNAL, LEASE
from fusectl.formats.objects import ObjectPath, Place
from fusectl.formats.registry import COMPLETING


BEAT_S = 5.0
# Nothing is written later than this after the lease was renewed. A request is repeated for 28 s at most.
FENCE_S = 10.0
# How long a lease is watched, and how often it is looked at: longer than its writer may still be writing.
PATIENCE_S = 40.0
LOOK_S = 1.0
# How much of a journal may be lost with its writer.
FLUSH_S = 1.0


@dataclass
class Staging:
    """A place that is being written to."""

    home: Place
    # In a bucket, raises OutputExists when another process has taken it over.
    guard: Callable[[], None] = field(default=lambda: None, repr=False)
    # Whether its journal has been begun, and there is something to go on with.
    begun: bool = False
    # Called right before it appears; raises Corrupt where something that was written has gone since.
    require_whole: Callable[[], None] = field(default=lambda: None, repr=False)


@contextmanager
def uploaded(
    final: ObjectPath,
    *,
    resume: bool,
    names: Collection[str],
    kept: Callable[[], None],
    note: Callable[[str], None],
) -> Iterator[Staging]:
    """`final` to be written to; `names` are those that will stand in it.

    Small files are held back until the body ends. When it fails, what it has written is removed, or kept as `staged`
    says. Raises OutputExists where something else is, or where another process is writing.
    """
    home = final.anew({})
    lease = Lease(home, note)
    staging = Staging(home, lease.guard)
    begun = published = False
    try:
        # Whose lease it was may have finished meanwhile.
        require_free(final)
        own = {*names, *_names_of_journal(final)}
        _require_only(final, own)
        if not resume:
            _clear(home, own)
        begun = True
        yield staging
        staging.require_whole()
        # A trainer knows no lease: it may have written there all the while.
        require_free(final)
        _require_only(final, own)
        _publish(home, lease)
        published = True
    except BaseException as error:
        if begun:
            _undo(home, lease, error, own, kept if staging.begun else None)
        else:
            lease.release()
        raise
    finally:
        if published:
            with suppress(StorageError):
                clear_journal(final)
                lease.release()
        lease.end()


def require_free(final: ObjectPath) -> None:
    """Raises OutputExists where there is anything but what an unfinished run of fusectl has left."""
    final = final.anew()
    hint = "choose another -o, or remove it: a bucket cannot replace a checkpoint in one step"
    if final.is_file():
        raise OutputExists(f"{final}: an object", hint=hint)
    names = names_in(final)
    if names and not unfinished(names):
        raise OutputExists(f"{final}: exists", hint=hint)
    for parent in final.parents:
        with suppress(StorageError):
            if (parent / LEASE).read()[0] is not None:
                raise OutputExists(f"{final}: lies inside {parent}, which is being written or was not finished")


def _require_only(final: ObjectPath, own: Collection[str]) -> None:
    """Raises OutputExists where there is what no run of fusectl has written."""
    strange = sorted(name for name in names_in(final.anew()) if name not in own and not name.startswith("fusectl"))
    if strange:
        more = f" and {len(strange) - 1} more" if strange[1:] else ""
        raise OutputExists(
            f"{final}: an unfinished run left it, and {strange[0]}{more}, which it has not written, is there"
        )


def _names_of_journal(final: ObjectPath) -> Collection[str]:
    """What the run that has left a journal was going to write."""
    try:
        return set(map(str, json.loads((final / JOURNAL).read_bytes())["names"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ()


def _publish(home: ObjectPath, lease: Lease) -> None:
    """Writes what was held back, last what makes a checkpoint of it."""
    held = home.held or {}
    last = {(home / name).key for name in COMPLETING}
    for key in sorted(held, key=last.__contains__):
        lease.renew()
        home.publish(key)
    lease.renew()


def _undo(
    home: ObjectPath, lease: Lease, error: BaseException, own: Collection[str], kept: Callable[[], None] | None
) -> None:
    """Leaves what can be gone on with, if there is a journal, and calls `kept`; else nothing.

    What may be another's is not touched.
    """
    if isinstance(error, StorageError):
        # It would have to answer now. The lease runs out without it.
        lease.end()
        if kept is not None:
            kept()
        return
    with suppress(StorageError, OutputExists):
        lease.renew()
        passing = not isinstance(error, Exception) or isinstance(error, NotEnoughSpace | OutputExists)
        if kept is not None and passing:
            lease.release()
            kept()
        else:
            with suppress(OutputExists):
                # What makes a checkpoint of it was held back: if it is there, it is another's.
                require_free(home)
                _clear(home, own)
            lease.release()


def _clear(home: ObjectPath, own: Collection[str]) -> None:
    """Removes what fusectl has written there, but for the journal and the lease; what makes a checkpoint first."""
    for child in sorted(home.anew().iterdir(), key=lambda child: child.name not in COMPLETING):
        mine = child.name in own or child.name.startswith("fusectl")
        if mine and not child.name.startswith((JOURNAL, LEASE)):
            child.remove()
    clear_journal(home)


def clear_journal(final: ObjectPath) -> None:
    """Removes the journal, its first line last."""
    for child in sorted(final.anew().iterdir(), key=str, reverse=True):
        if child.name.startswith(JOURNAL):
            child.remove()


def _now_s() -> float:
    """A clock that goes on while a machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """The right to write below a place in a bucket, which a thread renews until it ends."""

    def __init__(self, at: ObjectPath, note: Callable[[str], None]) -> None:
        """Takes the place; raises OutputExists where another process is writing."""
        self._where = str(at)
        self._object = (at / LEASE).anew()
        self._me = {"holder": uuid.uuid4().hex, "host": socket.gethostname(), "process": os.getpid()}
        self._beats = 0
        self._lost = False
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._generation = self._take(note)
        self._renewed_s = _now_s()
        threading.Thread(target=self._beat, name="fusectl-lease", daemon=True).start()

    def guard(self) -> None:
        """Returns if the place is certainly its holder's; raises OutputExists if another process has taken it."""
        if self._lost or _now_s() - self._renewed_s > FENCE_S:
            self.renew()

    def renew(self) -> None:
        """Says that its holder lives; raises OutputExists if the place was taken."""
        with self._lock:
            if not self._lost and not self._ended.is_set():
                generation = self._object.write_if(self._contents(), self._generation) or self._mine()
                self._lost = generation is None
                if generation is not None:
                    self._generation, self._renewed_s = generation, _now_s()
            if self._lost:
                self._ended.set()
                raise OutputExists(f"{self._where}: another process has taken it over")

    def release(self) -> None:
        """Gives the place back: the next one may take it at once."""
        with self._lock:
            if not self._lost and not self._ended.is_set():
                self._ended.set()
                with suppress(StorageError):
                    self._object.write_if(None, self._generation)

    def end(self) -> None:
        """Renews it no longer."""
        self._ended.set()

    def _mine(self) -> bytes | None:
        """The generation of the lease if it is its holder's: a store that answered too late was asked twice."""
        value, generation = self._object.read()
        return generation if _holder(value) == self._me["holder"] else None

    def _take(self, note: Callable[[str], None]) -> bytes:
        value, generation = self._object.read()
        if value is not None:
            note(f"{self._object}: watching for {PATIENCE_S:.0f} s whether its writer lives")
            generation = self._watch(generation)
        self._object.write_if(self._contents(), generation)
        # Not every store compares and writes in one step.
        taken = self._mine()
        if taken is None:
            raise OutputExists(f"{self._where}: another process is writing it")
        return taken

    def _watch(self, generation: bytes) -> bytes:
        renewed = False
        until = _now_s() + PATIENCE_S
        while _now_s() < until:
            time.sleep(LOOK_S)
            value, now = self._object.read()
            if value is None:
                return now
            if now == generation:
                continue
            if renewed:
                raise OutputExists(f"{self._where}: another process is writing it")
            # Once may be what a writer had sent before it was killed.
            renewed, generation, until = True, now, _now_s() + PATIENCE_S
        return generation

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with suppress(FusectlError):
                self.renew()

    def _contents(self) -> bytes:
        self._beats += 1
        return json.dumps({"schema": "fusectl/lease/1", **self._me, "beats": self._beats}).encode()


def _holder(lease: bytes | None) -> object:
    try:
        found = json.loads(lease or b"{}")
    except (ValueError, RecursionError):
        return None
    return found.get("holder") if isinstance(found, dict) else None


class Parts:
    """The lines of a journal in a bucket. Objects cannot be appended to: each part holds what came since the last."""

    def __init__(self, journal: ObjectPath) -> None:
        self._journal = journal.anew()
        before = (p for p in self._journal.parent.iterdir() if p.name.startswith(f"{journal.name}."))
        self._parts = sorted(before, key=str)
        self._lines: list[bytes] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._flush_often, name="fusectl-journal", daemon=True).start()

    def read(self) -> bytes:
        """All lines that were written before."""
        return b"".join(part.read()[0] or b"" for part in self._parts)

    def begin(self, line: bytes) -> None:
        """Writes the first line."""
        self._journal.write_bytes(line)

    def append(self, line: bytes) -> None:
        self._lines.append(line)

    def close(self, *, failing: bool) -> None:
        """Writes what is left, unless storage is what has failed."""
        self._closed.set()
        if not failing:
            with suppress(StorageError):
                self._flush()

    def _flush_often(self) -> None:
        while not self._closed.wait(FLUSH_S):
            # What is not noted is done once more; storage that fails is told by what is written.
            with suppress(StorageError):
                self._flush()

    def _flush(self) -> None:
        with self._lock:
            lines = self._lines[:]
            if not lines:
                return
            part = self._journal.with_name(f"{self._journal.name}.{len(self._parts):06}")
            part.write_bytes(b"".join(lines))
            self._parts.append(part)
            del self._lines[: len(lines)]
