"""Writing a checkpoint: into a temporary sibling, arrays first, index and markers last, then one rename.

A killed run leaves at most a directory whose name ends with .fusectl-tmp, which no trainer takes for a checkpoint. The
next run to the same output goes on with it if it is told to, and replaces it if not.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.errors import Corrupt, FusectlError, NotEnoughSpace, OutputExists, StorageError
from fusectl.formats import Format, format_named
from fusectl.formats.encoding import ZSTD_LEVEL, BadChunk, Buffer, Encoding, checksum
from fusectl.formats.locate import COMMITTED, ORBAX_INDEX, STEP_METADATA, T5X_INDEX, TEMPORARY_SUFFIX
from fusectl.formats.orbax import Form, item_metadata, marker, step_metadata
from fusectl.formats.store import translate
from fusectl.formats.t5x import kept_in_index, new_index
from fusectl.formats.target import Database, Directories, Target
from fusectl.formats.tree import Checkpoint, EmptyNode, Key, Leaf, Location, dict_keys
from fusectl.formats.zarr import (
    METADATA_FILE,
    Storage,
    encode,
    new_metadata,
    new_storage,
    np_dtype,
    parse_metadata,
    zero_chunk,
)
from fusectl.layout import Region, place_in_grid, slices, tiles, whole
from fusectl.record import FILE_NAME, Record, crc32_of


# What tells that a staging directory can be gone on with; removed once it has appeared under its own name.
JOURNAL = "fusectl-journal.jsonl"
REMOVALS = 200
FLUSHES_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written."""

    name: str
    keys: tuple[Key, ...]
    shape: tuple[int, ...]
    dtype: str
    storage: Storage


@dataclass(frozen=True, slots=True)
class Manner:
    """How a checkpoint is written: chunks of zeros left out or not, sources' files linked or copied."""

    sparse: bool = False
    links: bool = False
    # How many bytes of an OCDBT database are committed at once.
    commit_bytes: int = 32 << 20


class Sink:
    """A checkpoint being written below `home`. Tensors are announced with `create`, their chunks come from any thread
    with `write`, `write_zeros` and `take`, and they become a checkpoint with `finish`.
    """

    def __init__(
        self,
        home: Path,
        final: Path,
        format: Format,
        item: str | None,
        manner: Manner | None = None,
        *,
        resumed: bool = False,
    ) -> None:
        self._home = home
        self._final = final
        self._resumed = resumed
        self._format = format
        self._manner = manner or Manner()
        self._item = None if format.name == "t5x" else item
        self._index = home / self._item if self._item else home
        self._index.mkdir(parents=True, exist_ok=True)
        self._started_ns = time.time_ns()
        self._leaves: dict[str, Leaf] = {}
        self._kept: dict[str, npt.NDArray[Any]] = {}
        # The CRC-32 of each array's own metadata.
        self._metadata: dict[str, str] = {}
        self._lock = threading.Lock()
        # How many chunks were copied although links were asked for.
        self.not_linked = 0
        links, commit_bytes = self._manner.links, self._manner.commit_bytes
        self._target: Target = (
            Database(self._index, links=links, commit_bytes=commit_bytes, resumed=resumed)
            if format.ocdbt
            else Directories(self._index, links=links, resumed=resumed)
        )

    @property
    def location(self) -> Location:
        """Where it can be opened once it is finished."""
        return Location(self._index, self._home, "t5x" if self._format.name == "t5x" else "orbax", self._item)

    def create(self, tensors: Iterable[NewTensor]) -> None:
        """Announces tensors, each chunk of which must then be written."""
        tensors = list(tensors)
        if self._resumed:
            self._sweep({_base(tensor.keys) for tensor in tensors})
        for tensor in tensors:
            if self._format.name == "t5x" and kept_in_index(tensor.name, tensor.shape):
                self._kept[tensor.name] = np.zeros(tensor.shape, np_dtype(tensor.dtype))
                continue
            raw = new_metadata(tensor.storage, tensor.shape, tensor.dtype, sparse=self._manner.sparse)
            stored = parse_metadata(raw, tensor.name)
            self._metadata[tensor.name] = crc32_of(raw)
            self._leaves[tensor.name] = Leaf(tensor.name, tensor.keys, tensor.shape, tensor.dtype, stored=stored)
            with self._errors(tensor.name):
                self._target.write(f"{_base(tensor.keys)}/{METADATA_FILE[self._format.zarr]}", [raw])

    def _sweep(self, arrays: set[str]) -> None:
        """Removes what an interrupted run has left beside the arrays and the database: proofs, indexes, strangers."""
        mine = {self._index, self._home / JOURNAL}
        for child in {*self._home.iterdir(), *self._index.iterdir()}:
            if child not in mine and child.name not in arrays and not self._target.owns(child.name):
                _remove_any(child)

    def expect(self, chunks: Iterable[tuple[Checkpoint, str, tuple[int, ...]]]) -> None:
        """Announces the stored chunks of sources that are going to be taken over."""
        self._target.expect((source.files, source.key(tensor, index)) for source, tensor, index in chunks)

    def holds(
        self, name: str, chunk: Region, crc32: str, taken: tuple[Checkpoint, str, tuple[int, ...]] | None
    ) -> bool:
        """Whether an interrupted run has left a chunk with this CRC-32; if so, it need not be written again.

        `taken` is the source's chunk that it was made of, if it was.
        """
        if name in self._kept:
            return False
        leaf, storage, key = self._leaves[name], self._storage(name), self._key(name, chunk)
        origin = None
        if taken is not None:
            source, tensor, index = taken
            theirs = source.leaves[tensor].stored
            if theirs is not None and theirs.storage.like(storage):
                origin = (source.files, source.key(tensor, index))
        raw = self._target.written(key, origin)
        if raw is None or storage.encoding is None:
            return False
        dtype = np_dtype(leaf.dtype)
        try:
            values = storage.encoding.decode(raw, math.prod(storage.chunks) * dtype.itemsize)
        except BadChunk:
            return False
        cut = np.frombuffer(values, dtype).reshape(storage.chunks)[slices(tuple(range(len(r)) for r in chunk))]
        if checksum(cut) != crc32:
            return False
        self._target.keep(key, origin)
        return True

    def write(self, name: str, chunk: Region, values: npt.NDArray[Any]) -> None:
        """Writes the values of a chunk, cut at the tensor's edge."""
        kept = self._kept.get(name)
        if kept is not None:
            kept[slices(chunk)] = values
            return
        storage = self._storage(name)
        if values.shape != storage.chunks:
            padded = np.zeros(storage.chunks, values.dtype)
            padded[slices(whole(values.shape))] = values
            values = padded
        self._write(name, chunk, encode(values, storage))

    def write_zeros(self, name: str, chunk: Region) -> bool:
        """Makes a chunk one of zeros; whether it was left out for that."""
        if name in self._kept:
            return False
        if self._manner.sparse:
            return True
        storage, leaf = self._storage(name), self._leaves[name]
        with self._errors(name):
            if storage.encoding is not None and storage.encoding.compressor == "none":
                nbytes = math.prod(storage.chunks) * leaf.itemsize
                self._target.write_zeros(self._key(name, chunk), nbytes, storage.encoding.behind_zeros(nbytes))
            else:
                self._target.write(self._key(name, chunk), [zero_chunk(storage, leaf.dtype)])
        return False

    def take(self, name: str, chunk: Region, source: Checkpoint, tensor: str, index: tuple[int, ...]) -> None:
        """Makes a chunk of a source's stored one, which must be like it but for its CRC-32C."""
        theirs, ours = source.leaves[tensor].stored, self._storage(name)
        assert theirs is not None
        if theirs.storage.like(ours):
            with self._errors(name), source.missing(tensor):
                linked = self._target.take(self._key(name, chunk), source.files, source.key(tensor, index))
            self._count(linked=linked)
            return
        self._count(linked=False)
        assert theirs.storage.encoding is not None
        assert ours.encoding is not None
        try:
            pieces = theirs.storage.encoding.converted(source.encoded(tensor, index), ours.encoding)
        except BadChunk as error:
            raise Corrupt(f"{source.path}: {tensor}: cannot be decoded", details=(str(error),)) from error
        self._write(name, chunk, pieces)

    def finish(self, record: Record | None = None, empty: Iterable[EmptyNode] = ()) -> None:
        """Commits what is pending, then writes the record, the index and the markers, in this order."""
        with self._errors():
            self._target.finish()
        files = self._closing_files(empty)
        if record is not None:
            tensors = {name: replace(sums, metadata=self._metadata.get(name)) for name, sums in record.tensors.items()}
            sums = {name: crc32_of(raw) for name, raw in files.items()}
            files = {FILE_NAME: replace(record, tensors=tensors, files=sums).to_json(), **files}
        for name, raw in files.items():
            # What an interrupted run has left may have other names.
            (self._home / name).unlink(missing_ok=True)
            (self._home / name).write_bytes(raw)

    def _closing_files(self, empty: Iterable[EmptyNode]) -> dict[str, bytes]:
        """The files that make a checkpoint of what has been written, by their path in it, in the order of writing."""
        if self._format.name == "t5x":
            return {T5X_INDEX: new_index({**self._leaves, **self._kept})}
        form = Form(self._format.zarr, in_ocdbt=self._format.ocdbt, sparse=self._manner.sparse)
        below = f"{self._item}/" if self._item else ""
        files = {f"{below}{ORBAX_INDEX}": item_metadata(self._leaves.values(), empty, form)}
        if self._item:
            files[f"{below}{COMMITTED}"] = marker(self._final / self._item)
        files[STEP_METADATA] = step_metadata(self._item, self._started_ns)
        files[COMMITTED] = marker(self._final)
        return files

    def _count(self, *, linked: bool) -> None:
        with self._lock:
            self.not_linked += self._manner.links and not linked

    def _write(self, name: str, chunk: Region, pieces: Iterable[Buffer]) -> None:
        with self._errors(name):
            self._target.write(self._key(name, chunk), pieces)

    def _storage(self, name: str) -> Storage:
        stored = self._leaves[name].stored
        assert stored is not None
        return stored.storage

    def _key(self, name: str, chunk: Region) -> str:
        leaf = self._leaves[name]
        assert leaf.stored is not None
        return f"{_base(leaf.keys)}/{leaf.stored.chunk_key(place_in_grid(chunk, leaf.stored.storage.chunks))}"

    @contextmanager
    def _errors(self, name: str = "") -> Iterator[None]:
        """Turns what stores and the operating system raise into fusectl's errors."""
        where = f"{self._final}: {name}" if name else str(self._final)
        try:
            with storage_errors(self._final):
                yield
        except ValueError as error:
            # What an interrupted run has left may be damaged, and would be each time.
            raise translate(error, where, Corrupt if self._resumed else StorageError) from error


def _base(keys: Sequence[Key]) -> str:
    return ".".join(key.name for key in keys)


def save(
    final: Path,
    values: Mapping[str, npt.NDArray[Any]],
    format: str,
    *,
    item: str | None = "state",
    chunks: Mapping[str, tuple[int, ...]] | None = None,
    encoding: Encoding | None = None,
    force: bool = False,
) -> None:
    """Writes tensors in memory as a checkpoint without a record, as a trainer would. `chunks` by tensor name."""
    with staged(final, force=force) as temporary:
        form = format_named(format)
        sink = Sink(temporary, final, form, item)
        codec = encoding or Encoding("zstd", ZSTD_LEVEL, crc32c=form.zarr == 3)
        tensors = [
            NewTensor(name, dict_keys(name), array.shape, array.dtype.name, storage)
            for name, array in values.items()
            for storage in [new_storage(form.zarr, (chunks or {}).get(name, array.shape), array.dtype.name, codec)]
        ]
        sink.create(tensors)
        for tensor in tensors:
            for chunk in tiles(tensor.shape, tensor.storage.chunks):
                sink.write(tensor.name, chunk, values[tensor.name][slices(chunk)])
        sink.finish()


@contextmanager
def staged(
    final: Path, *, force: bool, sync: bool = True, resume: bool = False, kept: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """A temporary sibling of `final`, which becomes `final` when the body ends.

    When the body fails it is removed, unless it has a journal and the failure is one that may pass: an interrupt, a
    full disk, storage that refuses; then `kept` is called. With `resume` it begins with what such a run has left. With
    `sync` all of it is on the disk before it appears.

    Raises OutputExists when `final` exists and `force` is not given, or when another process is writing it.
    """
    if os.path.lexists(final) and not force:
        raise OutputExists(f"{final}: exists", hint="choose another -o, or --force to replace it")
    temporary = staging_of(final)
    if temporary.is_symlink():
        raise OutputExists(f"{temporary}: a symbolic link, where the checkpoint would be written first")
    with storage_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(exist_ok=True)
        lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputExists(f"{final}: another process is writing it") from error
        if (final.exists() and not force) or not _is_open_as(temporary, lock):
            raise OutputExists(f"{final}: another process has just written it")
        try:
            with storage_errors(final):
                if not resume:
                    _empty(temporary)
                yield temporary
                if sync:
                    _sync(temporary)
                with undisturbed():
                    _publish(temporary, final)
        except BaseException as error:
            may_pass = not isinstance(error, Exception) or isinstance(error, StorageError | NotEnoughSpace)
            if may_pass and can_be_resumed(final):
                kept()
            else:
                with undisturbed():
                    _remove(temporary)
            raise
    finally:
        os.close(lock)


def staging_of(final: Path) -> Path:
    """Where a checkpoint is written before it appears."""
    return final.with_name(final.name + TEMPORARY_SUFFIX)


def can_be_resumed(final: Path) -> bool:
    """Whether an interrupted run to this output has left something to go on with."""
    try:
        with (staging_of(final) / JOURNAL).open("rb") as journal:
            # Its first line says of which plan it is.
            return journal.readline().endswith(b"\n")
    except OSError:
        return False


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignores the signals that would end the process, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _remove(at: Path) -> None:
    """Removes a directory; a file that a thread was still creating must not keep it."""
    for _ in range(REMOVALS):
        shutil.rmtree(at, ignore_errors=True)
        if not at.exists():
            return
        time.sleep(0.01)


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turns the operating system's errors into fusectl's: a full disk, permissions, a read-only target."""
    try:
        yield
    except FusectlError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise NotEnoughSpace(f"{where}: the disk is full", details=(str(error),)) from error
        raise StorageError(f"{where}: cannot be written", details=(str(error),)) from error


def check_space(final: Path, needed_bytes: int) -> None:
    """Raises NotEnoughSpace when the file system of `final` has less than `needed_bytes` left."""
    existing = next(parent for parent in final.parents if parent.exists())
    total, _, free = shutil.disk_usage(existing)
    # A file system without a size of its own, such as /proc or some network ones, says nothing.
    if total and free < needed_bytes:
        raise NotEnoughSpace(
            f"{final}: not enough disk",
            details=(f"up to {needed_bytes:,} bytes needed, {free:,} bytes free in {existing}",),
        )


def _is_open_as(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _empty(at: Path) -> None:
    for child in at.iterdir():
        _remove_any(child)


def _remove_any(at: Path) -> None:
    if at.is_dir() and not at.is_symlink():
        shutil.rmtree(at)
    else:
        at.unlink()


def _sync(at: Path) -> None:
    """Flushes all files and directories to the disk; for those that are linked there is nothing left to do."""
    pool = ThreadPoolExecutor(FLUSHES_AT_ONCE)
    try:
        for parent, _, names in os.walk(at):
            flushed = pool.map(_fsync, [Path(parent, name) for name in names])
            list(flushed)
            _fsync(Path(parent))
    finally:
        # An interrupt waits for none of them.
        pool.shutdown(wait=False, cancel_futures=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(temporary: Path, final: Path) -> None:
    if final.exists():
        _exchange(temporary, final)
        shutil.rmtree(temporary)
    else:
        temporary.rename(final)
    (final / JOURNAL).unlink(missing_ok=True)
    _fsync(final.parent)


_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def _exchange(a: Path, b: Path) -> None:
    """Swaps two directories in one step where Linux can; elsewhere in two renames."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    paths = (_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b))
    if renameat2 is not None and renameat2(*paths, _RENAME_EXCHANGE) == 0:
        return
    aside = b.with_name(b.name + ".old" + TEMPORARY_SUFFIX)
    b.rename(aside)
    a.rename(b)
    aside.rename(a)


_FULL = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})
