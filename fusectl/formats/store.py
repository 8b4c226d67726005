"""Files of a checkpoint through tensorstore's key-value stores, and its error texts turned into fusectl's errors.

Where a file's bytes lie on this machine, be it a file of its own or a piece of an OCDBT data file, they are read and
copied by the operating system: three to five times as fast as through a store.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import tensorstore as ts

from fusectl.errors import Corrupt, FusectlError, NotEnoughSpace, StorageError
from fusectl.formats.encoding import CRC32C_BYTES, Buffer, Encoding, crc32c, require_crc32c
from fusectl.formats.objects import CONTEXT, URL, bucket_spec, store_error


Spec = dict[str, Any]

MANIFEST = "manifest.ocdbt"
# Larger than the metadata of any array: what claims to be one is not read.
LARGEST_METADATA_BYTES = 1 << 20
# And larger than that of all arrays of a checkpoint together.
MOST_METADATA_BYTES = 64 << 20
_BUFFER_BYTES = 1 << 20


def new_context(*, sync: bool = True) -> ts.Context:
    """A context for the stores of one checkpoint: no chunk cache, since every chunk is read once.

    One for all would remember the metadata of a checkpoint that has been replaced. Without `sync`, what is written is
    not flushed to the disk at once.
    """
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": sync, **CONTEXT})


def directory(path: str) -> Spec:
    """The store of a directory, or of what is below a gs:// or s3:// URL."""
    url = URL.fullmatch(path)
    if url:
        return bucket_spec(url.group(1), url.group(2), (url.group(3) or "").strip("/"))
    return {"driver": "file", "path": path.rstrip("/") + "/"}


def ocdbt(path: str, inside: str = "") -> Spec:
    """The store of an OCDBT database in a directory."""
    return {"driver": "ocdbt", "base": directory(path), "path": inside}


def new_ocdbt(path: str) -> Spec:
    """The store of a new OCDBT database, with the settings that Orbax writes with."""
    return {**ocdbt(path), "config": {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000}}


# What tensorstore says of storage, and not of what is stored.
_REFUSALS = frozenset(
    {"PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED"}
)


def translate(error: Exception, where: str, otherwise: type[FusectlError] = Corrupt) -> FusectlError:
    """The fusectl error for a tensorstore error met at `where`; of the class `otherwise` if its text tells no more."""
    text = str(error).split(" [")[0]
    status = text.split(":", 1)[0]
    if "http" in str(error).lower() or "ExpiredToken" in text:
        return store_error(error, where, otherwise)
    if "No space left" in text or "File too large" in text or "quota" in text.lower():
        return NotEnoughSpace(f"{where}: the disk is full", details=(text,))
    if status in _REFUSALS or "Read-only" in text:
        return StorageError(f"{where}: storage refused", details=(text,))
    if status == "NOT_FOUND" and otherwise is Corrupt:
        return Corrupt(f"{where}: data is missing", details=(text,))
    return otherwise(f"{where}: cannot be {'decoded' if otherwise is Corrupt else 'written'}", details=(text,))


@dataclass(frozen=True, slots=True)
class Extent:
    """A piece of a local file, or all of it."""

    path: str
    offset: int
    nbytes: int

    def read(self) -> bytes:
        """Its bytes; raises OSError, or Corrupt where the file ends before."""
        pieces: list[bytes] = []
        handle = os.open(self.path, os.O_RDONLY)
        try:
            done = 0
            while done < self.nbytes:
                # Linux reads 2 GiB at most; what fits is not copied once more.
                pieces.append(os.pread(handle, self.nbytes - done, self.offset + done))
                if not pieces[-1]:
                    raise Corrupt(f"{self.path}: ends at {self.offset + done:,}, before {self.offset + self.nbytes:,}")
                done += len(pieces[-1])
        finally:
            os.close(handle)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class Stream(io.RawIOBase):
    """The bytes of an extent but for its last ones, as a file; `crc32c` is that of what has been read."""

    def __init__(self, extent: Extent, without: int = 0) -> None:
        self.crc32c = 0
        self._extent = extent
        self._tail = without
        self._left = extent.nbytes - without
        self._handle = os.open(extent.path, os.O_RDONLY)

    def readable(self) -> bool:
        return True

    def readinto(self, out: Any) -> int:
        view = memoryview(out)[: max(0, self._left)]
        end = self._extent.offset + self._extent.nbytes
        got = os.preadv(self._handle, [view], end - self._tail - self._left) if view else 0
        self._left -= got
        self.crc32c = crc32c(view[:got], self.crc32c)
        return got

    def close(self) -> None:
        if not self.closed:
            os.close(self._handle)
        super().close()


def streamed(extent: Extent, encoding: Encoding, nbytes: int) -> Buffer:
    """The `nbytes` bytes that an extent of zstd holds; raises BadChunk, as Encoding.decode does."""
    behind = CRC32C_BYTES if encoding.crc32c else 0
    with Stream(extent, behind) as stream:
        values = encoding.decode_stream(io.BufferedReader(stream, _BUFFER_BYTES), nbytes)
        if behind:
            end = Extent(extent.path, extent.offset + extent.nbytes - behind, behind)
            require_crc32c(stream.crc32c, end.read())
    return values


def _missing(where: str) -> Corrupt:
    return Corrupt(f"{where}: missing", hint="dotfiles get lost in copies; copy it again whole")


@dataclass(frozen=True)
class Database:
    """What an OCDBT database's tree holds: for every key the extent of its value, or the value that the tree holds.

    `nodes` are the extents of the tree itself.
    """

    values: Mapping[str, Extent | bytes]
    nodes: Sequence[Extent]


class Files:
    """A read-only view of all files under a store: which there are, where they lie, and their contents."""

    def __init__(self, spec: Spec, where: str) -> None:
        self.where = where
        self.spec = spec
        base = spec["base"] if spec["driver"] == "ocdbt" else spec
        self.is_local = base["driver"] == "file"
        if self.is_local:
            require_contained(base["path"])
        try:
            self._store = ts.KvStore.open(spec, context=new_context()).result()
            self.names = frozenset(key.decode() for key in self._store.list().result())
        except ValueError as error:
            raise translate(error, where) from error

    @cached_property
    def database(self) -> Database | None:
        """The tree of an OCDBT database, or None for other stores, and for a tree that is not understood."""
        if self.spec["driver"] != "ocdbt" or not self.is_local:
            return None
        root = self.spec["base"]["path"]
        try:
            nodes: list[Extent] = []
            found = Database(dict(_walk(root, nodes)), nodes)
        except (ValueError, LookupError, TypeError):
            return None
        return found if found.values.keys() == self.names else None

    def lost(self) -> list[str]:
        """The data files of a database on this machine that are gone, or end before what refers to them does."""
        ends: dict[str, int] = {}
        for extent in self.database.values.values() if self.database else ():
            if isinstance(extent, Extent):
                ends[extent.path] = max(ends.get(extent.path, 0), extent.offset + extent.nbytes)
        return [path for path, end in ends.items() if not Path(path).is_file() or Path(path).stat().st_size < end]

    def place(self, name: str) -> Extent | bytes | None:
        """Where a file's bytes lie; they themselves where a database's tree holds them; None if nobody knows.

        Raises OSError or KeyError for one that is not there.
        """
        if self.spec["driver"] == "file":
            path = self.spec["path"] + name
            return Extent(path, 0, Path(path).stat().st_size)
        return self.database.values[name] if self.database else None

    def bytes_of(self, name: str) -> Buffer:
        """The contents of one file; raises OSError, KeyError or Corrupt for one that is not there."""
        place = self.place(name)
        if isinstance(place, Extent):
            return place.read()
        return place if place is not None else self.read([name])[name]

    def metadata(self, names: Iterable[str]) -> Mapping[str, bytes]:
        """The contents of these files, each the metadata of an array; raises Corrupt for those that cannot be."""
        wanted, total = list(names), 0
        for name in wanted:
            if name not in self.names:
                raise _missing(f"{self.where}/{name}")
            place = self.place(name)
            nbytes = place.nbytes if isinstance(place, Extent) else 0
            total += nbytes
            if nbytes > LARGEST_METADATA_BYTES or total > MOST_METADATA_BYTES:
                raise Corrupt(f"{self.where}/{name}: {nbytes:,} bytes, too many for the metadata of an array")
        return self.read(wanted)

    def read(self, names: Iterable[str]) -> Mapping[str, bytes]:
        """The contents of these files, read concurrently; a missing one is an error that names it."""
        futures = {name: self._store.read(name) for name in names}
        contents: dict[str, bytes] = {}
        for name, future in futures.items():
            try:
                result = future.result()
            except ValueError as error:
                raise translate(error, f"{self.where}/{name}") from error
            if result.state != "value":
                raise _missing(f"{self.where}/{name}")
            contents[name] = result.value
        return contents


def require_contained(root: str) -> None:
    """Raises Corrupt if a symbolic link below a directory leads out of it, to a directory that holds it, or nowhere."""
    home = os.path.realpath(root)
    for entry in walk(root):
        if not entry.is_symlink():
            if not entry.is_file(follow_symlinks=False) and not entry.is_dir(follow_symlinks=False):
                raise Corrupt(f"{entry.path}: neither a file nor a directory")
            continue
        real, holder = os.path.realpath(entry.path), os.path.realpath(os.path.dirname(entry.path))  # noqa: PTH120
        if not real.startswith(home + os.sep):
            raise Corrupt(
                f"{entry.path}: a symbolic link that leads out of the checkpoint",
                details=(real,),
                hint="cp -rL makes a copy with the files themselves",
            )
        if f"{holder}{os.sep}".startswith(real + os.sep) or not os.path.exists(real):  # noqa: PTH110
            raise Corrupt(f"{entry.path}: a symbolic link that leads nowhere", details=(real,))


def walk(directory: str) -> Iterator[os.DirEntry[str]]:
    """Everything below a directory, links to directories themselves but not what is behind them."""
    with os.scandir(directory) as entries:
        for entry in entries:
            yield entry
            if entry.is_dir(follow_symlinks=False):
                yield from walk(entry.path)


def _walk(root: str, nodes: list[Extent]) -> Iterator[tuple[str, Extent | bytes]]:
    """The keys and values of the newest version of the OCDBT database in `root`; notes the extents of its nodes."""
    base = ts.KvStore.open(directory(root), context=new_context()).result()

    def below(location: str, prefix: bytes) -> Iterator[tuple[str, Extent | bytes]]:
        nodes.append(_extent(root, location))
        for entry in ts.ocdbt.dump(base, location).result()["entries"]:
            if "location" in entry:
                yield from below(entry["location"], prefix + entry.get("subtree_common_prefix", b""))
            else:
                inline = entry.get("inline_value")
                value = _extent(root, entry["indirect_value"]) if inline is None else inline
                yield (prefix + entry["key"]).decode(), value

    newest = ts.ocdbt.dump(base).result()["versions"][-1]["root"]
    if "location" in newest:
        yield from below(newest["location"], b"")


def read_history(root: str) -> None:
    """Reads the nodes in which an OCDBT database lists its older versions, as whoever writes the next one may have to.

    Raises ValueError for those that cannot be read.
    """
    base = ts.KvStore.open(directory(root), context=new_context()).result()
    nodes = list(ts.ocdbt.dump(base).result()["version_tree_nodes"])
    while nodes:
        node = ts.ocdbt.dump(base, nodes.pop()["location"]).result()
        if node["height"]:
            nodes += node["entries"]


def _extent(root: str, location: str) -> Extent:
    """The extent that `kind:directory:file:offset:length` names, its parts percent-encoded."""
    _, below, file, offset, nbytes = location.split(":")
    inside = unquote(below) + unquote(file)
    if inside.startswith("/") or ".." in inside.split("/"):
        raise ValueError(f"{inside} leaves the database")
    return Extent(root + inside, int(offset), int(nbytes))


_NOT_THERE = frozenset({errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF})


def copy(source: Extent, to: Path, offset: int = 0) -> None:
    """Has the kernel copy an extent into a file, which need not exist; it shares the blocks where it can (reflink)."""
    reading = os.open(source.path, os.O_RDONLY)
    try:
        writing = os.open(to, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            done = 0
            while done < source.nbytes:
                left = source.nbytes - done
                got = _copied(reading, writing, left, source.offset + done, offset + done)
                if not got:
                    raise Corrupt(f"{source.path}: ends at {source.offset + done:,}")
                done += got
        finally:
            os.close(writing)
    finally:
        os.close(reading)


def _copied(reading: int, writing: int, nbytes: int, at: int, to: int) -> int:
    try:
        return os.copy_file_range(reading, writing, nbytes, at, to)
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
    os.lseek(writing, to, os.SEEK_SET)
    return os.sendfile(writing, reading, at, nbytes)


def link(source: Extent, to: Path) -> bool:
    """Makes `to` another name of the file, if the extent is all of it and the file system can; whether it did."""
    if source.offset or source.nbytes != Path(source.path).stat().st_size:
        return False
    try:
        # Not another name of a symbolic link, which would lead elsewhere from there.
        os.link(os.path.realpath(source.path), to)
    except OSError as error:
        if error.errno in {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES}:
            return False
        raise
    return True


def write(pieces: Iterable[Buffer], to: Path) -> None:
    """Writes a file that does not exist yet."""
    with open(to, "xb", buffering=0) as file:  # noqa: PTH123
        for piece in pieces:
            view = memoryview(piece).cast("B") if memoryview(piece).nbytes else memoryview(b"")
            while view:
                view = view[file.write(view) :]
