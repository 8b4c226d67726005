"""Arrays on disk: what a `.zarray` or `zarr.json` says, which chunks must exist, the metadata of new arrays.

And what is asked of values that come from there: their dtype by name, whether they are finite.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import tensorstore as ts

from fusectl.errors import Corrupt, Incompatible
from fusectl.formats.encoding import ZSTD_LEVEL, Buffer, Encoding
from fusectl.layout.blocks import tiles


METADATA_FILE = {2: ".zarray", 3: "zarr.json"}
DRIVER = {2: "zarr", 3: "zarr3"}


def epsilon(dtype: str) -> float:
    """The distance from 1 to the next number of a dtype.

    >>> epsilon("float16"), epsilon("bfloat16")
    (0.0009765625, 0.0078125)
    """
    return float(ml_dtypes.finfo(np_dtype(dtype)).eps)


def np_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of this name, bfloat16 and its relatives included.

    >>> np_dtype("bfloat16").itemsize
    2
    """
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def is_float(name: str) -> bool:
    """Whether the dtype of this name holds real floating point numbers.

    >>> is_float("bfloat16"), is_float("int32")
    (True, False)
    """
    return np_dtype(name).kind == "f" or (hasattr(ml_dtypes, name) and "int" not in name)


@dataclass(frozen=True, slots=True)
class Storage:
    """How an array's chunks are stored: two arrays with the same one can share chunks byte for byte.

    `codecs` is the part of the metadata that says so, as JSON: compressor, dtype and order of zarr v2, the chain of
    codecs of v3. `encoding` is what fusectl makes of it, None for what only tensorstore encodes and decodes.
    """

    zarr: int
    chunks: tuple[int, ...]
    codecs: str
    encoding: Encoding | None

    def like(self, other: Storage) -> bool:
        """Whether a chunk stored in this way may stand in an array that is stored in the other."""
        if self.encoding is None or other.encoding is None:
            return self == other
        return (self.zarr, self.chunks) == (other.zarr, other.chunks) and self.encoding.like(other.encoding)

    def in_zarr(self, zarr: int, dtype: str) -> Storage | None:
        """The same bytes in the other version of zarr, but for the CRC-32C that v3 has behind them; None if none."""
        if zarr == self.zarr:
            return self
        if self.encoding is None:
            return None
        return new_storage(zarr, self.chunks, dtype, replace(self.encoding, crc32c=zarr == 3))


@dataclass(frozen=True)
class ArrayMetadata:
    """What an array's metadata file says, in one form for zarr v2 and v3."""

    shape: tuple[int, ...]
    dtype: str
    # The unit that is decoded at once; a stored one, a shard, may hold several.
    chunks: tuple[int, ...]
    storage: Storage
    codec: str
    separator: str
    prefix: str
    # zarr v2 with "fill_value": null has no value that a left-out chunk could stand for.
    has_fill_value: bool
    fills_with_zero: bool

    @property
    def grid(self) -> tuple[int, ...]:
        """The number of stored chunks along every axis."""
        return tuple(math.ceil(n / c) for n, c in zip(self.shape, self.storage.chunks, strict=True))

    def chunk_key(self, index: tuple[int, ...]) -> str:
        """The key of the stored chunk at this place of the grid, relative to the array."""
        if not index:
            return self.prefix.rstrip(self.separator) or "0"
        return self.prefix + self.separator.join(map(str, index))

    def chunk_keys(self) -> Iterator[str]:
        """The keys of all stored chunks, relative to the array, in C order of the grid."""
        # Lazily: itertools.product would first hold every axis, and a hostile grid has 10**9 chunks on one.
        for index in tiles(self.grid, (1,) * len(self.grid)):
            yield self.chunk_key(tuple(at.start for at in index))


def parse_metadata(raw: bytes, where: str, zarr: int | None = None) -> ArrayMetadata:
    """The ArrayMetadata of a `.zarray` or `zarr.json`, which `zarr` says: any of them by default.

    Raises Corrupt for what tensorstore, and with it T5X and Orbax, refuses to open; Incompatible for the codecs and
    dtypes of other libraries, which it does not have.
    """
    try:
        parsed = _parsed(raw)
    except Incompatible as error:
        raise Incompatible(f"{where}: {error.message}", details=error.details, hint=error.hint) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise Corrupt(f"{where}: not the metadata of an array", details=(said,)) from error
    rank = len(parsed.shape)
    stored = parsed.storage.chunks
    if zarr not in {None, parsed.storage.zarr}:
        raise Corrupt(f"{where}: zarr_format {parsed.storage.zarr} in a {METADATA_FILE[zarr or 2]}")
    if not all(0 <= n < _LARGEST_EDGE for n in (*parsed.shape, *parsed.chunks, *parsed.storage.chunks)):
        raise Corrupt(f"{where}: shape {list(parsed.shape)} in chunks {list(parsed.chunks)}")
    if len(parsed.chunks) != rank or len(stored) != rank or min((*parsed.chunks, *stored, 1)) < 1:
        raise Corrupt(f"{where}: chunks {list(parsed.chunks)} do not fit shape {list(parsed.shape)}")
    return parsed


@lru_cache(maxsize=4096)
def _parsed(raw: bytes) -> ArrayMetadata:
    """A checkpoint has thousands of arrays, and its layers' are alike: each text is opened once, in 0.2 ms."""
    meta = json.loads(raw)
    zarr = 3 if meta["zarr_format"] == 3 else 2
    _require_known_dtype(meta.get("data_type" if zarr == 3 else "dtype"))
    found = _opened(raw, zarr, meta)
    parsed = _parse_v3(meta) if zarr == 3 else _parse_v2(meta)
    if (parsed.shape, parsed.dtype) != (tuple(found.shape), found.dtype.name):
        raise ValueError(f"{parsed.dtype}{list(parsed.shape)} is {found.dtype.name}{list(found.shape)} to tensorstore")
    return parsed


def _opened(raw: bytes, zarr: int, meta: Mapping[str, Any]) -> ts.TensorStore:
    """The array of these metadata, of which no chunk is there, as tensorstore opens it.

    Raises ValueError for what it refuses, Incompatible for codecs that it does not have.
    """
    context = ts.Context()
    memory = ts.KvStore.open({"driver": "memory"}, context=context).result()
    memory[METADATA_FILE[zarr]] = raw
    try:
        spec = {"driver": DRIVER[zarr], "kvstore": {"driver": "memory"}}
        return ts.open(spec, context=context, read=True).result()
    except ValueError as error:
        text = str(error).split(" [tensorstore_spec", 1)[0].rpartition(_READING.format(METADATA_FILE[zarr]))[2]
        lacking = _NOT_REGISTERED.findall(text)
        if _NO_FILTERS in text:
            lacking = [str(each["id"]) for each in meta["filters"]]
        if lacking:
            raise _foreign(f"encoded with {', '.join(lacking)}") from error
        raise ValueError(text) from error


# What stands in tensorstore's errors before, and in, what they say of metadata.
_READING = 'Error reading "{}": '
_NOT_REGISTERED = re.compile(r'"([^"]*)" is not registered')
_NO_FILTERS = '"filters": filters are not supported'
# numpy's texts, bytes, objects, dates and durations, raw bytes, and what has more than 8 bytes.
_FOREIGN_V2 = re.compile(r"[<>|=]([SUVOMm].*|[fiu]16|c32)")
_FOREIGN_V3 = re.compile(
    r"string|(fixed|variable)_length_\w+|null_terminated_\w+|raw_bytes|bytes|struct(ured)?|r\d+|numpy\..+"
)


def _require_known_dtype(dtype: Any) -> None:
    """Raises Incompatible for a dtype of other libraries, by its name: no tensor of a trainer has it."""
    name = dtype.get("name") if isinstance(dtype, Mapping) else dtype
    if isinstance(name, list) or (
        isinstance(name, str) and (_FOREIGN_V2.fullmatch(name) or _FOREIGN_V3.fullmatch(name))
    ):
        raise _foreign(f"of dtype {json.dumps(name)}")


def _foreign(what: str) -> Incompatible:
    return Incompatible(
        f"an array {what}, which T5X and Orbax do not read",
        hint="write it again with the library that wrote it, in a dtype and with codecs that tensorstore has",
    )


_LARGEST_EDGE = 1 << 48


def _text(codecs: Any) -> str:
    return json.dumps(codecs, sort_keys=True)


def _parse_v2(meta: dict[str, Any]) -> ArrayMetadata:
    compressor = meta["compressor"]
    codec = "none" if compressor is None else str(compressor["id"])
    chunks = tuple(int(n) for n in meta["chunks"])
    codecs = {key: meta.get(key) for key in ("compressor", "dtype", "filters", "order")}
    plain = meta.get("order", "C") == "C" and not meta.get("filters") and str(meta["dtype"])[0] != ">"
    known = plain and codec in _COMPRESSORS
    return ArrayMetadata(
        shape=tuple(int(n) for n in meta["shape"]),
        dtype=np_dtype(np_dtype(meta["dtype"]).name).name,
        chunks=chunks,
        storage=Storage(2, chunks, _text(codecs), Encoding(codec, _level(compressor)) if known else None),
        codec=codec,
        separator=str(meta.get("dimension_separator") or "."),
        prefix="",
        has_fill_value=meta.get("fill_value") is not None,
        fills_with_zero=_is_zero(meta["fill_value"]),
    )


def _parse_v3(meta: dict[str, Any]) -> ArrayMetadata:
    stored = tuple(int(n) for n in meta["chunk_grid"]["configuration"]["chunk_shape"])
    codecs = meta["codecs"]
    chunks = stored
    if codecs[0]["name"] == "sharding_indexed":
        chunks = tuple(int(n) for n in codecs[0]["configuration"]["chunk_shape"])
        codecs = codecs[0]["configuration"]["codecs"]
    names = [c["name"] for c in codecs if c["name"] not in {"bytes", "transpose"}]
    encoding = meta.get("chunk_key_encoding", {"name": "default"})
    default = "/" if encoding["name"] == "default" else "."
    separator = encoding.get("configuration", {}).get("separator", default)
    return ArrayMetadata(
        shape=tuple(int(n) for n in meta["shape"]),
        dtype=np_dtype(meta["data_type"]).name,
        chunks=chunks,
        storage=Storage(3, stored, _text(meta["codecs"]), _encoding_v3(meta["codecs"])),
        codec="+".join(names) or "none",
        separator=separator,
        prefix=f"c{separator}" if encoding["name"] == "default" else "",
        has_fill_value=True,
        fills_with_zero=_is_zero(meta["fill_value"]),
    )


def _is_zero(fill_value: Any) -> bool:
    """Whether a fill value is zero, and not -0.0."""
    parts = fill_value if isinstance(fill_value, list) else [fill_value]
    return all(isinstance(part, int | float) and part == 0 and math.copysign(1.0, part) > 0 for part in parts)


_COMPRESSORS = {"none": 0, "zstd": ZSTD_LEVEL, "gzip": 1}


def _level(configuration: Mapping[str, Any] | None) -> int:
    return int((configuration or {}).get("level", 1))


def _encoding_v3(codecs: list[dict[str, Any]]) -> Encoding | None:
    """The Encoding of a chain of codecs: bytes, at most one compressor, at most a CRC-32C; None for another chain."""
    first, *rest = codecs
    if first["name"] != "bytes" or first.get("configuration", {}).get("endian", "little") != "little":
        return None
    crc32c = bool(rest) and rest[-1]["name"] == "crc32c"
    compressors = rest[:-1] if crc32c else rest
    if not compressors:
        return Encoding(crc32c=crc32c)
    name = compressors[0]["name"]
    if len(compressors) > 1 or name not in _COMPRESSORS:
        return None
    return Encoding(name, _level(compressors[0].get("configuration")), crc32c)


def new_storage(zarr: int, chunks: tuple[int, ...], dtype: str, encoding: Encoding) -> Storage:
    """The Storage of an array that is written anew."""
    compressor = {"id": encoding.compressor, "level": encoding.level} if encoding.compressor != "none" else None
    if zarr == 2:
        kind = np_dtype(dtype)
        name = dtype if hasattr(ml_dtypes, dtype) else kind.newbyteorder("<").str
        codecs: Any = {"compressor": compressor, "dtype": name, "filters": None, "order": "C"}
        return Storage(zarr, chunks, _text(codecs), encoding)
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if compressor:
        codecs.append({"name": encoding.compressor, "configuration": {"level": encoding.level}})
    if encoding.crc32c:
        codecs.append({"name": "crc32c"})
    return Storage(zarr, chunks, _text(codecs), encoding)


def new_metadata(storage: Storage, shape: tuple[int, ...], dtype: str, *, sparse: bool) -> bytes:
    """The contents of the metadata file of a new array. With `sparse`, chunks that are left out are zeros."""
    zero: Any = False if dtype == "bool" else 0.0 if is_float(dtype) else 0
    if np_dtype(dtype).kind == "c":
        zero = [0.0, 0.0]
    if storage.zarr == 2:
        meta = {
            "zarr_format": 2,
            "shape": shape,
            "chunks": storage.chunks,
            **json.loads(storage.codecs),
            # As T5X has it; readers other than tensorstore take null for "whatever was in memory".
            "fill_value": zero if sparse else None,
            "dimension_separator": ".",
        }
    else:
        meta = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": storage.chunks}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": json.loads(storage.codecs),
            "fill_value": zero,
        }
    return json.dumps(meta).encode()


def encode(values: npt.NDArray[Any], storage: Storage) -> list[Buffer]:
    """The bytes of one whole stored chunk, in pieces."""
    if storage.encoding is not None:
        return storage.encoding.encode(values)
    raw = new_metadata(storage, values.shape, values.dtype.name, sparse=False)
    metadata = {k: v for k, v in json.loads(raw).items() if k not in {"zarr_format", "node_type"}}
    spec = {
        "driver": DRIVER[storage.zarr],
        "kvstore": {"driver": "memory"},
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,
    }
    array = ts.open(spec, create=True, context=ts.Context()).result()
    array.write(values).result()
    key = parse_metadata(raw, "a new array").chunk_key((0,) * values.ndim)
    memory = array.kvstore
    assert memory is not None
    return [memory[key]]


@lru_cache(maxsize=256)
def zero_chunk(storage: Storage, dtype: str) -> bytes:
    """The bytes of a stored chunk of zeros, compressed."""
    if storage.encoding is not None:
        return b"".join(storage.encoding.encode_zeros(math.prod(storage.chunks) * np_dtype(dtype).itemsize))
    return b"".join(encode(np.zeros(storage.chunks, np_dtype(dtype)), storage))


def nonfinite_at(values: npt.NDArray[Any]) -> tuple[int, ...] | None:
    """The index of the first NaN or Inf, or None. Integers are always finite."""
    if values.dtype.kind == "c":
        parts = (nonfinite_at(values.real), nonfinite_at(values.imag))
        return next((at for at in parts if at is not None), None)
    if not is_float(values.dtype.name) or not values.size:
        return None
    # The extremes say it without an array of booleans: NaN and Inf propagate into them.
    with np.errstate(invalid="ignore"):
        if np.isfinite(values.min()) and np.isfinite(values.max()):
            return None
    return tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
