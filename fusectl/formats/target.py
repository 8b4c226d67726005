"""Where the files of a new checkpoint go: directories, a bucket, or an OCDBT database. Written from any thread.

What a source has already is not read but taken over: its files copied by the kernel or linked, and of an OCDBT database
its data files, to which the new one refers, as Orbax does when it merges the databases of several writers.
"""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import tensorstore as ts

from fusectl.errors import Corrupt, FusectlError
from fusectl.formats.encoding import Buffer
from fusectl.formats.objects import ObjectPath, Place
from fusectl.formats.servercopy import Copy, copier
from fusectl.formats.store import (
    MANIFEST,
    Extent,
    Files,
    copy,
    directory,
    link,
    new_context,
    new_ocdbt,
    ocdbt,
    read_history,
    write,
)


# A source's data file is taken over if at least this share of it is needed: with Adam's state reset it is a third.
SMALLEST_SHARE = 0.25
# The next one of these, which fusectl makes inside a new database, holds a source's data files.
_TAKEN = "ocdbt.source_"
# And its own, as tensorstore names it.
_DATA = "d"
_THE_KEY_ITSELF = ts.KvStore.KeyRange("", "\0")


class Target(Protocol):
    """The files of a new checkpoint, by their path in it."""

    def expect(self, chunks: Iterable[tuple[Files, str]]) -> None:
        """Announces which files of sources are going to be taken over."""

    def write(self, key: str, pieces: Iterable[Buffer]) -> None:
        """Writes a file."""

    def write_zeros(self, key: str, nbytes: int, behind: bytes) -> None:
        """Writes a file of so many zeros and what stands behind them, without storing them each time."""

    def take(self, key: str, files: Files, name: str) -> bool:
        """Makes a file of a source's, byte for byte; whether it is linked."""

    def written(self, key: str, origin: tuple[Files, str] | None) -> Buffer | None:
        """The contents of a file that an interrupted run has left, or None.

        `origin` is the source's file that it is, byte for byte, if it is one.
        """

    def keep(self, key: str, origin: tuple[Files, str] | None) -> None:
        """Takes such a file for written."""

    def owns(self, name: str) -> bool:
        """Whether an entry of the directory is the target's own, of whatever run."""

    def finish(self) -> None:
        """Makes all of it readable."""


class _OneByOne:
    """What needs nothing to be announced, and is readable as soon as it is written: each chunk is a file of its own."""

    def expect(self, chunks: Iterable[tuple[Files, str]]) -> None:
        pass

    def keep(self, key: str, origin: tuple[Files, str] | None) -> None:
        pass

    def owns(self, name: str) -> bool:  # noqa: ARG002
        return False

    def finish(self) -> None:
        pass


class Directories(_OneByOne):
    """Plain files below a directory."""

    def __init__(self, at: Path, *, links: bool, resumed: bool = False) -> None:
        self._at = at
        self._links = links
        self._resumed = resumed
        self._made: set[Path] = set()

    def write(self, key: str, pieces: Iterable[Buffer]) -> None:
        write(pieces, self._path(key))

    def write_zeros(self, key: str, nbytes: int, behind: bytes) -> None:
        # A hole, which takes no blocks of the disk.
        with self._path(key).open("xb") as file:
            file.truncate(nbytes)
            file.seek(nbytes)
            file.write(behind)

    def take(self, key: str, files: Files, name: str) -> bool:
        place = files.place(name)
        if not isinstance(place, Extent):
            self.write(key, [files.bytes_of(name)])
            return False
        if self._links and link(place, self._path(key)):
            return True
        copy(place, self._path(key))
        return False

    def written(self, key: str, origin: tuple[Files, str] | None) -> Buffer | None:  # noqa: ARG002
        try:
            return (self._at / key).read_bytes()
        except FileNotFoundError:
            return None

    def _path(self, key: str) -> Path:
        """Where a new file goes."""
        path = self._at / key
        if path.parent not in self._made:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._made.add(path.parent)
        if self._resumed:
            # It may be another name of a source's file, which must not be written into.
            path.unlink(missing_ok=True)
        return path


class Objects(_OneByOne):
    """Objects below a place in a bucket."""

    def __init__(self, at: ObjectPath) -> None:
        self._spec = directory(str(at))
        self._store = ts.KvStore.open(self._spec, context=new_context()).result()
        self._scheme = at.scheme
        self._zeros: dict[tuple[int, bytes], bytes] = {}
        self._lock = threading.Lock()

    def write(self, key: str, pieces: Iterable[Buffer]) -> None:
        self._store.write(key, _joined(pieces)).result()

    def write_zeros(self, key: str, nbytes: int, behind: bytes) -> None:
        with self._lock:
            zeros = self._zeros.setdefault((nbytes, behind), bytes(nbytes) + behind)
        self.write(key, [zeros])

    @cached_property
    def _copy(self) -> Copy | None:
        return copier(self._scheme)

    def take(self, key: str, files: Files, name: str) -> bool:
        ours, theirs = self._spec, files.spec
        if theirs["driver"] == ours["driver"] and self._copy is not None:
            self._copy(theirs["bucket"], theirs["path"] + name, ours["bucket"], ours["path"] + key)
        else:
            self.write(key, [files.bytes_of(name)])
        return False

    def written(self, key: str, origin: tuple[Files, str] | None) -> Buffer | None:  # noqa: ARG002
        found = self._store.read(key).result()
        return found.value if found.state == "value" else None


class Database:
    """An OCDBT database in a directory, or in a bucket."""

    def __init__(self, at: Place, *, links: bool, commit_bytes: int, resumed: bool = False) -> None:
        self._at = at
        self._links = links
        # Databases share references only within one context.
        self._context = new_context(sync=False)
        # In a bucket an object is there whole or not at all.
        if resumed and isinstance(at, Path) and not _is_sound(at):
            (at / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(at / _DATA, ignore_errors=True)
        self._store = ts.KvStore.open(new_ocdbt(str(at)), context=self._context).result()
        self._commits = _Commits(commit_bytes)
        self._taken: dict[int, _Taken] = {}
        # The first file of so many zeros, and those that are the same and refer to it.
        self._zeros: dict[tuple[int, bytes], str] = {}
        self._same: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def expect(self, chunks: Iterable[tuple[Files, str]]) -> None:
        if not isinstance(self._at, Path):
            return
        wanted: dict[int, tuple[Files, set[Extent]]] = {}
        for files, name in chunks:
            place = files.place(name) if files.database else None
            if isinstance(place, Extent):
                wanted.setdefault(id(files), (files, set()))[1].add(place)
        for key, (files, extents) in wanted.items():
            used = Counter[str]()
            for extent in extents:
                used[extent.path] += extent.nbytes
            worthy = {path for path, nbytes in used.items() if nbytes >= SMALLEST_SHARE * _size(path, extents)}
            if worthy:
                at = self._at / f"{_TAKEN}{len(self._taken)}"
                self._taken[key] = _Taken(files, at, links=self._links, paths=worthy)

    def write(self, key: str, pieces: Iterable[Buffer]) -> None:
        value = _joined(pieces)
        with self._commits.joined(len(value)) as transaction:
            self._store.with_transaction(transaction).write(key, value).result()

    def write_zeros(self, key: str, nbytes: int, behind: bytes) -> None:
        with self._lock:
            first = self._zeros.setdefault((nbytes, behind), key)
            if first != key:
                self._same.append((first, key))
        if first == key:
            self.write(key, [bytes(nbytes), behind])

    def take(self, key: str, files: Files, name: str) -> bool:
        brought = self._brought(files, name)
        if brought is None:
            self.write(key, [files.bytes_of(name)])
            return False
        taken, place = brought
        linked = taken.bring(place)
        with self._lock:
            taken.keys.append((name, key))
        return linked

    def _brought(self, files: Files, name: str) -> tuple[_Taken, Extent] | None:
        """The source's database and the extent of one of its files, if the data file that it lies in is brought."""
        taken = self._taken.get(id(files))
        place = files.place(name) if taken else None
        return (taken, place) if taken and isinstance(place, Extent) and place.path in taken.paths else None

    def written(self, key: str, origin: tuple[Files, str] | None) -> Buffer | None:
        brought = self._brought(*origin) if origin else None
        if brought:
            taken, place = brought
            return taken.read(place)
        try:
            found = self._store.read(key).result()
        except ValueError:
            return None
        return found.value if found.state == "value" else None

    def keep(self, key: str, origin: tuple[Files, str] | None) -> None:
        brought = self._brought(*origin) if origin else None
        if brought and origin:
            taken, place = brought
            taken.keep(place)
            with self._lock:
                taken.keys.append((origin[1], key))

    def owns(self, name: str) -> bool:
        return name in {MANIFEST, _DATA} or name.startswith(_TAKEN)

    def finish(self) -> None:
        self._commits.finish()
        for taken in self._taken.values():
            # From a database that has the source's data files at hand.
            with taken.opened(self._context) as source:
                self._refer(source, taken.keys)
        self._refer(self._store, self._same)

    def _refer(self, source: ts.KvStore, keys: Iterable[tuple[str, str]]) -> None:
        """Makes keys of the database from those of another one below it, or its own, by reference."""
        with ts.Transaction() as transaction:
            target = self._store.with_transaction(transaction)
            copies = [(source / old).experimental_copy_range_to(target / new, _THE_KEY_ITSELF) for old, new in keys]
            for copied in copies:
                copied.result()


def _size(path: str, extents: Iterable[Extent]) -> int:
    """The size of a data file; raises Corrupt where one of the extents leaves it."""
    try:
        size = Path(path).stat().st_size
    except FileNotFoundError as error:
        raise Corrupt(f"{path}: data is missing", hint="copy the checkpoint again whole") from error
    end = max(extent.offset + extent.nbytes for extent in extents if extent.path == path)
    if size < end:
        raise Corrupt(f"{path}: ends at {size:,}, before {end:,}", hint="copy the checkpoint again whole")
    return size


def _is_sound(at: Path) -> bool:
    """Whether a database that an interrupted run has left can be read and written on: its tree and its history."""
    try:
        read_history(str(at))
        return Files(ocdbt(str(at)), str(at)).database is not None
    except (FusectlError, OSError, ValueError):
        return False


def _joined(pieces: Iterable[Buffer]) -> bytes:
    first, *others = pieces
    return first if isinstance(first, bytes) and not others else b"".join([first, *others])


class _Taken:
    """A source's database inside a new one: its data files, whole or with holes where nothing is needed."""

    def __init__(self, files: Files, at: Path, *, links: bool, paths: set[str]) -> None:
        self.paths = paths
        self.keys: list[tuple[str, str]] = []
        self._at = at
        self._root = files.spec["base"]["path"]
        self._nodes = files.database.nodes if files.database else ()
        self._brought: set[Extent] = set()
        self._linked = {path: links and self._link(path) for path in paths}
        self._lock = threading.Lock()

    def read(self, extent: Extent) -> bytes | None:
        """The bytes of an extent that has been brought by an interrupted run, or None."""
        try:
            return Extent(str(self._place(extent.path)), extent.offset, extent.nbytes).read()
        except (FileNotFoundError, Corrupt):
            return None

    def keep(self, extent: Extent) -> None:
        """Takes an extent for brought."""
        with self._lock:
            self._brought.add(extent)

    def bring(self, extent: Extent) -> bool:
        """Copies an extent to where it is in the source's own files; whether the file is linked instead."""
        if self._linked.get(extent.path):
            return True
        with self._lock:
            if extent in self._brought:
                return False
            self._brought.add(extent)
        copy(extent, self._place(extent.path), extent.offset)
        return False

    @contextmanager
    def opened(self, context: ts.Context) -> Iterator[ts.KvStore]:
        """The database, opened; afterwards only the data files remain."""
        for node in self._nodes:
            self.bring(node)
        manifest = self._at / MANIFEST
        shutil.copyfile(self._root + MANIFEST, manifest)
        yield ts.KvStore.open(ocdbt(str(self._at)), context=context).result()
        manifest.unlink()
        for path in {node.path for node in self._nodes} - self.paths:
            self._place(path).unlink()

    def _link(self, path: str) -> bool:
        self._place(path).unlink(missing_ok=True)
        return link(Extent(path, 0, Path(path).stat().st_size), self._place(path))

    def _place(self, path: str) -> Path:
        place = self._at / path.removeprefix(self._root)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place


class _Commits:
    """Transactions that many writes share: one commit for every few megabytes instead of one for every chunk."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._current = _Group(ts.Transaction())

    @contextmanager
    def joined(self, nbytes: int) -> Iterator[ts.Transaction]:
        """The transaction to write `nbytes` in. The last writer of a full one commits it before going on."""
        with self._lock:
            group = self._current
            group.writers += 1
            group.nbytes += nbytes
            if group.nbytes >= self._limit_bytes:
                group.full = True
                self._current = _Group(ts.Transaction())
        try:
            yield group.transaction
        finally:
            with self._lock:
                group.writers -= 1
                last = group.full and not group.writers
        if last:
            group.transaction.commit_sync()

    def finish(self) -> None:
        self._current.transaction.commit_sync()


@dataclass
class _Group:
    transaction: ts.Transaction
    writers: int = 0
    nbytes: int = 0
    full: bool = False
