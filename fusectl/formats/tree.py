"""Trees of tensors: keys with their kinds, leaves with shape and dtype, and the checkpoint that holds them."""

from __future__ import annotations

import fnmatch
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorstore as ts

from fusectl.errors import Corrupt, FusectlError, NotEnoughSpace, StorageError
from fusectl.formats.encoding import BadChunk, Buffer, checksum
from fusectl.formats.objects import Place
from fusectl.formats.record import LEFT_OUT, UNREAD, Record, require_crc32
from fusectl.formats.store import Extent, Files, Spec, new_context, streamed, translate
from fusectl.formats.zarr import METADATA_FILE, ArrayMetadata, np_dtype, parse_metadata
from fusectl.layout.blocks import Region, intersect, places_in_grid, slices, whole
from fusectl.system.memory import available_bytes


# The kinds of key in Orbax's tree metadata: a position in a sequence, a key of a dictionary.
SEQUENCE, DICT = 1, 2
# And of a node without tensors. T5X's index tells these three, and takes empty lists and tuples for empty dictionaries.
NONE, EMPTY_DICT, STRING = "None", "Dict", "string"
_CARRIED = frozenset({NONE, EMPTY_DICT, STRING, "List", "Tuple", "NamedTuple"})

# Where trees keep the training step.
T5X_STEP = "state/step"
STEPS = (T5X_STEP, "step")

MOST_MISSING = 1000
# What a checkpoint may claim to have: a trillion parameters in chunks of 64 MiB are 60,000.
MOST_CHUNKS = 1_000_000
# From here on a chunk is worth asking whether there is memory for it.
HUGE_BYTES = 1 << 30
# The encoded bytes of large zstd chunks, such as Orbax writes for a tensor that is not sharded, are read as they are
# decoded.
STREAMED_FROM_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Key:
    """One step from the root of a tree to a leaf."""

    name: str
    kind: int = DICT


def dict_keys(name: str) -> tuple[Key, ...]:
    """The keys of a leaf in a tree of dictionaries whose keys hold no slash, as in T5X.

    >>> dict_keys("params/kernel")
    (Key(name='params', kind=2), Key(name='kernel', kind=2))
    """
    return tuple(Key(part) for part in name.split("/"))


def array_directory(keys: Sequence[Key], where: str) -> str:
    """The directory of a leaf's array relative to its item, as Orbax and T5X name it; keys may hold dots and slashes.

    Raises Corrupt for one that is not inside the item, or may not be.

    >>> array_directory(dict_keys("params/kernel"), "here")
    'params.kernel'
    """
    base = ".".join(key.name for key in keys)
    if any(part in {"", ".", ".."} for part in base.split("/")):
        raise Corrupt(f"{where}: keys that name no directory inside it", details=(repr([key.name for key in keys]),))
    return base


def is_dropped(name: str, patterns: Iterable[str]) -> bool:
    """Whether a tensor's name matches one of the patterns of those to leave out.

    >>> is_dropped("opt_state/0/count", ["opt_state/*"])
    True
    """
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def kept_shapes(shapes: Mapping[str, tuple[int, ...]], patterns: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that no pattern of those to be left out matches.

    >>> kept_shapes({"a": (1,), "b": (2,)}, ["b"])
    {'a': (1,)}
    """
    return {name: shape for name, shape in shapes.items() if not is_dropped(name, patterns)}


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor of a checkpoint. `stored` says how it lies on disk; None for one kept inside the index, as `value`."""

    name: str
    keys: tuple[Key, ...]
    shape: tuple[int, ...]
    dtype: str
    stored: ArrayMetadata | None = None
    store: Spec | None = field(default=None, repr=False)
    # The leaf that this is a part of: reading it decodes that one's chunks.
    through: Leaf | None = field(default=None, repr=False)
    value: npt.NDArray[Any] | None = field(default=None, repr=False)
    # The generator that keys of random numbers are for, which Orbax restores as such; None for numbers.
    random_key: str | None = None

    @property
    def itemsize(self) -> int:
        return np_dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    @property
    def chunks(self) -> tuple[int, ...]:
        """The shape of the unit that is decoded at once."""
        return self.stored.chunks if self.stored else tuple(max(1, n) for n in self.shape)

    @property
    def reading_bytes(self) -> int:
        """The memory that reading a chunk takes: its values, and its encoded bytes unless they are these."""
        if self.through is not None:
            return self.through.reading_bytes
        if self.stored is None:
            return 0
        encoding = self.stored.storage.encoding
        plain = encoding is not None and encoding.compressor == "none"
        return math.prod(self.chunks) * self.itemsize * (1 if plain else 2)


@dataclass(frozen=True, slots=True)
class Node:
    """What stands in a tree and is no tensor: None, an empty dict, list or tuple, a string, which is `text`.

    One of any other type, such as a custom handler's, cannot be carried: nothing of it was read.
    """

    keys: tuple[Key, ...]
    value_type: str
    text: str | None = None

    @property
    def name(self) -> str:
        return "/".join(key.name for key in self.keys)

    @property
    def can_be_carried(self) -> bool:
        return self.value_type in _CARRIED

    @property
    def is_empty(self) -> bool:
        return self.can_be_carried and self.text is None


@dataclass(frozen=True, slots=True)
class Location:
    """Where a checkpoint is: the directory of its index, and `home`, which holds it with its markers and record."""

    index: Place
    home: Place
    kind: str
    item: str | None = None
    step: int | None = None
    notes: tuple[str, ...] = ()
    # Whether `home` alone leads here, or the item must be named.
    by_home: bool = True

    @property
    def path(self) -> Place:
        return self.home if self.by_home else self.index


@contextmanager
def told(fault: Callable[[FusectlError], None] | None) -> Iterator[None]:
    """Has `fault` told of what is Corrupt, and goes on; without it that is raised."""
    try:
        yield
    except Corrupt as error:
        if fault is None:
            raise
        fault(error)


def stored_arrays(
    files: Files,
    file_of: Mapping[str, str],
    zarr: int,
    record: Record | None,
    fault: Callable[[FusectlError], None] | None,
) -> dict[str, ArrayMetadata]:
    """What the arrays' own metadata says, by tensor.

    `fault` is told of those whose is missing, makes no sense, or is not what the record says; or the first is raised.
    So is, in any case, a grid of more chunks than a checkpoint may have.
    """
    paths = {name: f"{at}/{METADATA_FILE[zarr]}" for name, at in file_of.items()}
    there = files.metadata(paths.values()) if fault is None else {}
    found: dict[str, ArrayMetadata] = {}
    for name, path in paths.items():
        with told(fault):
            raw = there[path] if fault is None else files.metadata([path])[path]
            sums = record.tensors.get(name) if record else None
            if sums is not None and sums.metadata is not None:
                require_crc32(raw, sums.metadata, f"{files.where}/{path}")
            found[name] = parse_metadata(raw, f"{files.where}: {name}", zarr)
    chunks = sum(math.prod(map(_ceil, stored.shape, stored.chunks)) for stored in found.values())
    if chunks > MOST_CHUNKS:
        raise Corrupt(f"{files.where}: arrays of {chunks:,} chunks, more than {MOST_CHUNKS:,}")
    return found


def _ceil(n: int, chunk: int) -> int:
    return -(-n // chunk)


class Checkpoint:
    """A checkpoint opened for reading: all its metadata, and its tensors' values on demand.

    Reads are strict: a chunk that is missing or cannot be decoded raises Corrupt and names tensor and file.
    """

    def __init__(
        self,
        location: Location,
        format: str,
        leaves: Mapping[str, Leaf],
        *,
        files: Files,
        file_of: Mapping[str, str],
        nodes: tuple[Node, ...] = (),
        lenient: bool = False,
        record: Record | None = None,
        custom: Mapping[str, Any] | None = None,
    ) -> None:
        self.location = location
        self.format = format
        self.leaves = dict(leaves)
        # What the tree keeps beside its tensors.
        self.nodes = nodes
        self.record = record
        # What the trainer has noted of the step, such as MaxText's scan_layers.
        self.custom = dict(custom or {})
        self.lenient = lenient
        self.files = files
        # The directory of each array, relative to the checkpoint.
        self.file_of = file_of
        self._open: dict[str, ts.TensorStore] = {}
        self._zeros: dict[str, frozenset[str]] = {}
        self._context = new_context()
        self._lock = threading.Lock()

    def with_record(self, record: Record) -> Checkpoint:
        """The same checkpoint with another record."""
        other = copy(self)
        other.record = record
        return other

    @property
    def path(self) -> str:
        """The path to pass to find it again: the step, or the item where the step would lead to another."""
        return str(self.location.path)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: leaf.shape for name, leaf in self.leaves.items()}

    @cached_property
    def step(self) -> int | None:
        """The training step: the tree's own, else the directory's name."""
        for name in STEPS:
            leaf = self.leaves.get(name)
            if leaf is not None and not leaf.shape and np_dtype(leaf.dtype).kind in "iu":
                return int(self.read(name)[()])
        return self.location.step

    def encoded(self, name: str, index: tuple[int, ...]) -> Buffer:
        """The bytes of a stored chunk as they are."""
        with self._errors(name):
            return self.files.bytes_of(self.key(name, index))

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turns what the operating system says of a tensor's files into fusectl's errors."""
        try:
            with self.missing(name):
                yield
        except OSError as error:
            raise StorageError(f"{self.path}: {name}: storage refused", details=(str(error),)) from error

    @contextmanager
    def missing(self, name: str) -> Iterator[None]:
        """Turns the absence of a tensor's files into Corrupt."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, KeyError) as error:
            raise Corrupt(f"{self.path}: {name}: data is missing", details=(str(error),)) from error

    def is_left_out(self, name: str, index: tuple[int, ...]) -> bool:
        """Whether a stored chunk is not there, and stands for zeros."""
        key = self.key(name, index)
        return key not in self.files.names and (self._fills(name) or key in self._left_out(name))

    def can_be_taken(self, name: str) -> bool:
        """Whether a tensor's stored chunks say all of it: none is left out for a value, or in part within a shard."""
        stored = self.leaves[name].stored
        if stored is None or not self._fills(name):
            return stored is not None
        return stored.fills_with_zero and stored.storage.encoding is not None

    def key(self, name: str, index: tuple[int, ...]) -> str:
        """The path of a stored chunk inside the checkpoint."""
        stored = self.leaves[name].stored
        assert stored is not None
        return f"{self.file_of[name]}/{stored.chunk_key(index)}"

    def missing_chunks(self, name: str) -> list[str]:
        """The chunks of a tensor that should be on disk and are not, as paths inside the checkpoint."""
        leaf = self.leaves[name]
        if leaf.stored is None or self._fills(name):
            return []
        base, left_out = self.file_of[name], self._left_out(name)
        missing = (
            key
            for chunk in leaf.stored.chunk_keys()
            if (key := f"{base}/{chunk}") not in self.files.names and key not in left_out
        )
        # A grid may claim 10**18 chunks; the first of those that are missing say it all.
        return list(itertools.islice(missing, MOST_MISSING))

    def read(self, name: str, region: Region | None = None) -> npt.NDArray[Any]:
        """The values of a tensor's region, in C order and the stored dtype; they may be read-only."""
        leaf = self.leaves[name]
        wanted = whole(leaf.shape) if region is None else region
        if leaf.value is not None:
            return leaf.value[slices(wanted)]
        values = self._read_chunks(leaf, wanted)
        if values is not None:
            return values
        try:
            store = self._opened(leaf)
            return np.asarray(store[slices(wanted)].read(order="C").result())
        except ValueError as error:
            raise translate(error, f"{self.path}: {name}") from error

    def _read_chunks(self, leaf: Leaf, region: Region) -> npt.NDArray[Any] | None:
        """The values of a region from the whole chunks that it meets; None if only tensorstore can tell them."""
        stored = leaf.stored
        assert stored is not None
        if stored.storage.encoding is None or (self._fills(leaf.name) and not stored.fills_with_zero):
            return None
        out: npt.NDArray[Any] | None = None
        for at in places_in_grid(region, leaf.chunks):
            chunk = tuple(range(i * c, (i + 1) * c) for i, c in zip(at, leaf.chunks, strict=True))
            met = intersect(chunk, region)
            assert met is not None
            values = self._decoded(leaf, at)[slices(met, chunk)]
            if met == region:
                return np.asarray(values, order="C")
            if out is None:
                out = np.empty(tuple(map(len, region)), values.dtype)
            out[slices(met, region)] = values
        return out

    def _decoded(self, leaf: Leaf, index: tuple[int, ...]) -> npt.NDArray[Any]:
        """The values of a whole stored chunk, those beyond the tensor's edge included."""
        stored = leaf.stored
        assert stored is not None
        assert stored.storage.encoding is not None
        dtype = np_dtype(leaf.dtype)
        chunk_bytes = math.prod(leaf.chunks) * dtype.itemsize
        if chunk_bytes > HUGE_BYTES and chunk_bytes > available_bytes():
            raise NotEnoughSpace(
                f"{self.path}: {leaf.name}: a chunk of {chunk_bytes:,} bytes, more than there is memory"
            )
        if self.is_left_out(leaf.name, index):
            return np.zeros(leaf.chunks, dtype)
        key, encoding = self.key(leaf.name, index), stored.storage.encoding
        with self._errors(leaf.name):
            try:
                large = chunk_bytes >= STREAMED_FROM_BYTES and encoding.compressor == "zstd"
                place = self.files.place(key) if large else None
                if isinstance(place, Extent):
                    values = streamed(place, encoding, chunk_bytes)
                else:
                    values = encoding.decode(self.files.bytes_of(key), chunk_bytes)
            except BadChunk as error:
                details = (f"{key}: {error}",)
                raise Corrupt(f"{self.path}: {leaf.name}: cannot be decoded", details=details) from error
        decoded: npt.NDArray[Any] = np.frombuffer(values, dtype).reshape(leaf.chunks)
        written = self.recorded(leaf.name, index)
        if written != UNREAD:
            cut = decoded[tuple(slice(0, n - i * c) for n, i, c in zip(leaf.shape, index, leaf.chunks, strict=True))]
            found = (LEFT_OUT if not cut.any() else "") if written == LEFT_OUT else checksum(cut)
            if found != written:
                raise Corrupt(
                    f"{self.path}: {leaf.name}: the chunk {key} is not what was written",
                    details=(f"CRC-32 {checksum(cut)}, in its fusectl.json {written}",),
                )
        return decoded

    def recorded(self, name: str, index: tuple[int, ...]) -> str:
        """What the record says of a stored chunk: its values' CRC-32, LEFT_OUT, or UNREAD if it says nothing."""
        leaf, sums = self.leaves[name], self.record.tensors.get(name) if self.record else None
        if sums is None or sums.shape != leaf.shape or leaf.stored is None or sums.chunks != leaf.stored.storage.chunks:
            return UNREAD
        return sums.of(index)

    def _fills(self, name: str) -> bool:
        """Whether any missing chunk may legitimately stand for the fill value: nobody says which ones were left out."""
        stored = self.leaves[name].stored
        known = self.record is not None and name in self.record.tensors
        return self.lenient and stored is not None and stored.has_fill_value and not known

    def _left_out(self, name: str) -> frozenset[str]:
        """The chunks, as paths inside the checkpoint, that the record says were left out because they are zeros."""
        if name not in self._zeros:
            leaf, sums = self.leaves[name], self.record.tensors.get(name) if self.record else None
            stored, keys = leaf.stored, frozenset[str]()
            if sums is not None and stored is not None and sums.chunks == stored.storage.chunks:
                grid = itertools.product(*map(range, stored.grid))
                keys = frozenset(
                    self.key(name, at) for at, crc32 in zip(grid, sums.crc32, strict=False) if crc32 == LEFT_OUT
                )
            self._zeros[name] = keys
        return self._zeros[name]

    def _opened(self, leaf: Leaf) -> ts.TensorStore:
        store = self._open.get(leaf.name)
        if store is None:
            assert leaf.stored is not None
            spec = {
                "driver": "zarr3" if leaf.stored.storage.zarr == 3 else "zarr",
                "kvstore": leaf.store,
                "fill_missing_data_reads": self._fills(leaf.name) or bool(self._left_out(leaf.name)),
                "recheck_cached_metadata": False,
                "recheck_cached_data": False,
            }
            store = ts.open(spec, read=True, context=self._context).result()
            if tuple(store.shape) != leaf.shape:
                raise Corrupt(f"{self.path}: {leaf.name}: shape {list(leaf.shape)}, now {list(store.shape)}")
            with self._lock:
                self._open[leaf.name] = store
        return store


def keys_beside(keys: Sequence[Key], name: str) -> tuple[Key, ...]:
    """The keys of a tensor called `name` that lies where one with these keys does.

    They are of the same kinds, and hold as many slashes; where the names have not as many parts that is so as
    far as they begin alike.
    """
    parts, lengths = name.split("/"), [key.name.count("/") + 1 for key in keys]
    if len(parts) == sum(lengths):
        ends = list(itertools.accumulate(lengths))
        grouped = ("/".join(parts[end - n : end]) for end, n in zip(ends, lengths, strict=True))
        return tuple(replace(key, name=own) for key, own in zip(keys, grouped, strict=True))
    shared: tuple[Key, ...] = ()
    for key in keys:
        if not name.startswith("/".join(each.name for each in (*shared, key)) + "/"):
            break
        shared = (*shared, key)
    rest = name.removeprefix("".join(f"{key.name}/" for key in shared))
    return (*shared, *dict_keys(rest))


class View(Checkpoint):
    """A checkpoint seen with other tensors, some of which are made of `source`'s; the others are read as they are."""

    def __init__(self, source: Checkpoint, leaves: Mapping[str, Leaf]) -> None:
        super().__init__(
            source.location,
            source.format,
            leaves,
            files=source.files,
            file_of=source.file_of,
            nodes=source.nodes,
            lenient=source.lenient,
            record=source.record,
            custom=source.custom,
        )
        self.source = source
