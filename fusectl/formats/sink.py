"""Writing a checkpoint: into a temporary sibling, arrays first, index and markers last, then one rename.

A killed run leaves at most a directory whose name ends with .fusectl-tmp, which no trainer takes for a checkpoint and
which the next run to the same output replaces.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorstore as ts

from fusectl.errors import FusectlError, NotEnoughSpace, OutputExists, StorageError
from fusectl.formats import Format, format_named
from fusectl.formats.locate import T5X_INDEX, TEMPORARY_SUFFIX
from fusectl.formats.orbax import mark_committed, write_metadata, write_step_metadata
from fusectl.formats.store import Spec, directory, new_context, ocdbt, translate
from fusectl.formats.t5x import kept_in_index, write_index
from fusectl.formats.tree import EmptyNode, Key, Leaf, Location, dict_keys
from fusectl.formats.zarr import new_metadata, np_dtype, parse_metadata
from fusectl.layout import Region, whole
from fusectl.record import FILE_NAME, Record


REMOVALS = 200


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written."""

    name: str
    keys: tuple[Key, ...]
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]


class Sink:
    """A checkpoint being written below `home`. Tensors are announced with `create`, filled by `write` from any thread,
    and become a checkpoint with `finish`.
    """

    def __init__(
        self,
        home: Path,
        final: Path,
        format: Format,
        item: str | None,
        commit_bytes: int = 32 << 20,
    ) -> None:
        self._home = home
        self._final = final
        self._format = format
        self._item = None if format.name == "t5x" else item
        self._index = home / self._item if self._item else home
        self._index.mkdir(parents=True, exist_ok=True)
        self._started_ns = time.time_ns()
        self._leaves: dict[str, Leaf] = {}
        self._arrays: dict[str, ts.TensorStore] = {}
        self._kept: dict[str, npt.NDArray[Any]] = {}
        self._commits = _Commits(commit_bytes) if format.ocdbt else None

    @property
    def location(self) -> Location:
        """Where it can be opened once it is finished."""
        return Location(self._index, self._home, "t5x" if self._format.name == "t5x" else "orbax", self._item)

    def create(self, tensors: Iterable[NewTensor]) -> None:
        """Announces tensors; `write` must then cover each of them."""
        pending: dict[str, Any] = {}
        context = new_context()
        # Each commit of an OCDBT database costs milliseconds and a file: all new arrays share one.
        transaction = ts.Transaction() if self._format.ocdbt else None
        for tensor in tensors:
            if self._format.name == "t5x" and kept_in_index(tensor.name, tensor.shape):
                self._kept[tensor.name] = np.zeros(tensor.shape, np_dtype(tensor.dtype))
                continue
            metadata = new_metadata(self._format.zarr, tensor.shape, tensor.chunks, tensor.dtype)
            spec = {
                "driver": "zarr3" if self._format.zarr == 3 else "zarr",
                "kvstore": self._store(".".join(key.name for key in tensor.keys)),
                "metadata": metadata,
                "store_data_equal_to_fill_value": True,
                "recheck_cached_metadata": False,
                "recheck_cached_data": False,
            }
            stored = parse_metadata(_as_json(metadata), tensor.name)
            self._leaves[tensor.name] = Leaf(tensor.name, tensor.keys, tensor.shape, tensor.dtype, stored=stored)
            pending[tensor.name] = ts.open(spec, create=True, context=context, transaction=transaction)
        try:
            opened = {name: future.result() for name, future in pending.items()}
            if transaction is not None:
                transaction.commit_sync()
        except ValueError as error:
            _settle(pending.values())
            raise translate(error, str(self._final), StorageError) from error
        except BaseException:
            _settle(pending.values())
            raise
        self._arrays = {name: array.with_transaction(None) for name, array in opened.items()}

    def write(self, name: str, region: Region, values: npt.NDArray[Any]) -> None:
        """Writes the values of a region, which must consist of whole chunks; they are on disk after `finish`."""
        at = tuple(slice(r.start, r.stop) for r in region)
        array = self._arrays.get(name)
        if array is None:
            self._kept[name][at] = values
            return
        try:
            if self._commits is None:
                array[at].write(values).result()
            else:
                with self._commits.joined(values.nbytes) as transaction:
                    array.with_transaction(transaction)[at].write(values).result()
        except ValueError as error:
            raise translate(error, f"{self._final}: {name}", StorageError) from error

    def finish(self, record: Record | None = None, empty: Iterable[EmptyNode] = ()) -> None:
        """Commits what is pending, then writes the record, the index and the markers, in this order."""
        if self._commits is not None:
            try:
                self._commits.finish()
            except ValueError as error:
                raise translate(error, str(self._final), StorageError) from error
        if record is not None:
            (self._home / FILE_NAME).write_bytes(record.to_json())
        if self._format.name == "t5x":
            values: dict[str, Leaf | npt.NDArray[Any]] = {**self._leaves, **self._kept}
            codec = new_metadata(2, (), (), "float32")["compressor"]
            write_index(self._home / T5X_INDEX, values, codec)
            return
        write_metadata(self._index, self._leaves.values(), empty, zarr=self._format.zarr, in_ocdbt=self._format.ocdbt)
        if self._item:
            mark_committed(self._index, self._final / self._item)
        write_step_metadata(self._home, self._item, self._started_ns)
        mark_committed(self._home, self._final)

    def _store(self, base: str) -> Spec:
        at = str(self._index)
        return ocdbt(at, base + "/") if self._format.ocdbt else directory(f"{at}/{base}")


def _settle(futures: Iterable[Any]) -> None:
    """Waits for operations whose results nobody wants any more: they must not go on beside the cleaning up."""
    for future in futures:
        future.cancel()
    for future in futures:
        with suppress(ValueError, asyncio.CancelledError):
            future.result()


def save(
    final: Path,
    values: Mapping[str, npt.NDArray[Any]],
    format: str,
    *,
    item: str | None = "state",
    chunks: Mapping[str, tuple[int, ...]] | None = None,
    force: bool = False,
) -> None:
    """Writes tensors in memory as a checkpoint without a record, as a trainer would. `chunks` by tensor name."""
    with staged(final, force=force) as temporary:
        sink = Sink(temporary, final, format_named(format), item)
        shapes = {name: (chunks or {}).get(name, array.shape) for name, array in values.items()}
        sink.create(NewTensor(n, dict_keys(n), a.shape, a.dtype.name, shapes[n]) for n, a in values.items())
        for name, array in values.items():
            sink.write(name, whole(array.shape), array)
        sink.finish()


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


@contextmanager
def staged(final: Path, *, force: bool) -> Iterator[Path]:
    """A temporary sibling of `final`, which becomes `final` when the body ends and is removed when the body fails.

    Raises OutputExists when `final` exists and `force` is not given, or when another process is writing it.
    """
    if os.path.lexists(final) and not force:
        raise OutputExists(f"{final}: exists", hint="choose another -o, or --force to replace it")
    temporary = final.with_name(final.name + TEMPORARY_SUFFIX)
    with storage_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(exist_ok=True)
        lock = os.open(temporary, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputExists(f"{final}: another process is writing it") from error
        if (final.exists() and not force) or not _is_open_as(temporary, lock):
            raise OutputExists(f"{final}: another process has just written it")
        try:
            with storage_errors(final):
                _empty(temporary)
                yield temporary
                _sync(temporary)
                with undisturbed():
                    _publish(temporary, final)
        except BaseException:
            with undisturbed():
                _remove(temporary)
            raise
    finally:
        os.close(lock)


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


def _as_json(metadata: Mapping[str, Any]) -> bytes:

    meta = dict(metadata)
    if "data_type" in meta:
        meta["zarr_format"] = 3
    return json.dumps(meta).encode()


def _empty(at: Path) -> None:
    for child in at.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _sync(at: Path) -> None:
    """Flushes what Python wrote (the index, the markers) and the directories; tensorstore has synced its own files."""
    for parent, _, names in os.walk(at):
        for name in names:
            path = Path(parent, name)
            if path.suffix == ".json" or path.name.startswith("_") or path.name in {T5X_INDEX, "commit_success.txt"}:
                _fsync(path)
        _fsync(Path(parent))


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
