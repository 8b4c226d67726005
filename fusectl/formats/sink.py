"""Writing a checkpoint: its arrays first, then the record, the index and the markers, in this order."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.errors import Corrupt, StorageError
from fusectl.formats.encoding import ZSTD_LEVEL, BadChunk, Buffer, Encoding, checksum
from fusectl.formats.format import Format, Written
from fusectl.formats.names import JOURNAL
from fusectl.formats.objects import Place
from fusectl.formats.record import FILE_NAME, Record, crc32_of
from fusectl.formats.registry import format_named
from fusectl.formats.staging import remove_any, staged, storage_errors
from fusectl.formats.store import translate
from fusectl.formats.target import Database, Directories, Objects, Target
from fusectl.formats.tree import Checkpoint, Key, Leaf, Location, Node, array_directory, dict_keys
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
from fusectl.layout.blocks import Region, place_in_grid, slices, tiles, whole


# Put together in one piece, and once more by the client that sends it.
OBJECT_COPIES = 2


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written."""

    name: str
    keys: tuple[Key, ...]
    shape: tuple[int, ...]
    dtype: str
    storage: Storage
    # The generator of keys of random numbers, if it is made of them.
    random_key: str | None = None


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
        home: Place,
        final: Place,
        format: Format,
        item: str | None,
        manner: Manner | None = None,
        *,
        resumed: bool = False,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self._home = home
        self._guard = guard
        self._final = final
        self._resumed = resumed
        self._format = format
        self._manner = manner or Manner()
        self._item = item if format.keeps_tree else None
        self._index = home / self._item if self._item else home
        if isinstance(self._index, Path):
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
        self._target: Target
        if format.ocdbt:
            self._target = Database(self._index, links=links, commit_bytes=commit_bytes, resumed=resumed)
        elif isinstance(self._index, Path):
            self._target = Directories(self._index, links=links, resumed=resumed)
        else:
            self._target = Objects(self._index)

    @property
    def copies(self) -> int:
        """How often a chunk is in memory beside its values while it is handed over."""
        return OBJECT_COPIES if isinstance(self._target, Objects) else 0

    @property
    def location(self) -> Location:
        """Where it can be opened once it is finished."""
        home = self._home if isinstance(self._home, Path) else self._home.anew(self._home.held)
        index = home / self._item if self._item else home
        return Location(index, home, self._format.kind, self._item)

    def create(self, tensors: Iterable[NewTensor]) -> None:
        """Announces tensors, each chunk of which must then be written."""
        tensors = list(tensors)
        if self._resumed and isinstance(self._home, Path):
            self._sweep(self._home, {_base(tensor.keys) for tensor in tensors})
        for tensor in tensors:
            if self._format.keeps_in_index(tensor.name, tensor.shape):
                self._kept[tensor.name] = np.zeros(tensor.shape, np_dtype(tensor.dtype))
                continue
            raw = new_metadata(tensor.storage, tensor.shape, tensor.dtype, sparse=self._manner.sparse)
            stored = parse_metadata(raw, tensor.name)
            self._metadata[tensor.name] = crc32_of(raw)
            self._leaves[tensor.name] = Leaf(
                tensor.name, tensor.keys, tensor.shape, tensor.dtype, stored=stored, random_key=tensor.random_key
            )
            with self._errors(tensor.name):
                self._target.write(f"{_base(tensor.keys)}/{METADATA_FILE[self._format.zarr]}", [raw])

    def _sweep(self, home: Path, arrays: set[str]) -> None:
        """Removes what an interrupted run has left beside the arrays and the database: proofs, indexes, strangers."""
        index = home / self._item if self._item else home
        mine = {index, home / JOURNAL}
        for child in {*home.iterdir(), *index.iterdir()}:
            if child not in mine and child.name not in arrays and not self._target.owns(child.name):
                remove_any(child)

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

    def finish(
        self,
        record: Record | None = None,
        nodes: Iterable[Node] = (),
        custom: Mapping[str, Any] | None = None,
    ) -> None:
        """Commits what is pending, then writes the record, the index and the markers, in this order.

        `custom` is what the trainer has noted of the step.
        """
        with self._errors():
            self._target.finish()
        files = self._format.closing_files(
            Written(
                self._leaves,
                self._kept,
                tuple(nodes),
                custom or {},
                self._final,
                self._item,
                self._started_ns,
                self._manner.sparse,
            )
        )
        if record is not None:
            tensors = {name: replace(sums, metadata=self._metadata.get(name)) for name, sums in record.tensors.items()}
            sums = {name: crc32_of(raw) for name, raw in files.items()}
            files = {FILE_NAME: replace(record, tensors=tensors, files=sums).to_json(), **files}
        for name, raw in files.items():
            path = self._home / name
            if isinstance(path, Path):
                # What an interrupted run has left may have other names.
                path.unlink(missing_ok=True)
                path.parent.mkdir(exist_ok=True)
            path.write_bytes(raw)

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
                self._guard()
                yield
        except ValueError as error:
            # What an interrupted run has left may be damaged, and would be each time.
            raise translate(error, where, Corrupt if self._resumed else StorageError) from error


def names_written(keys: Iterable[Sequence[Key]], format: Format, item: str | None) -> set[str]:
    """The names that a checkpoint of arrays with these keys has in it, but for those that start with fusectl."""
    return format.names(set(map(_base, keys)), item)


def _base(keys: Sequence[Key]) -> str:
    return array_directory(keys, "the output")


def save(
    final: Path,
    values: Mapping[str, npt.NDArray[Any]],
    format: str,
    *,
    item: str | None = "state",
    chunks: Mapping[str, tuple[int, ...]] | None = None,
    encoding: Encoding | None = None,
    custom: Mapping[str, Any] | None = None,
    force: bool = False,
) -> None:
    """Writes tensors in memory as a checkpoint without a record, as a trainer would. `chunks` by tensor name."""
    with staged(final, force=force) as staging:
        form = format_named(format)
        sink = Sink(staging.home, final, form, item)
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
        sink.finish(custom=custom)
