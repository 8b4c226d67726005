"""Arrays on disk: what a `.zarray` or `zarr.json` says, which chunks must exist, the metadata of new arrays.

And what is asked of values that come from there: their dtype by name, whether they are finite, their checksum.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fusectl.errors import Corrupt
from fusectl.layout import tiles


METADATA_FILE = {2: ".zarray", 3: "zarr.json"}

# Where chunks are computed anew: gzip, which T5X writes, costs twenty times as much to encode.
ZSTD_LEVEL = 1


def np_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of this name, bfloat16 and its relatives included.

    >>> np_dtype("bfloat16").itemsize
    2
    """
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def is_float(name: str) -> bool:
    """Whether the dtype of this name holds real floating point numbers."""
    return np_dtype(name).kind == "f" or (hasattr(ml_dtypes, name) and "int" not in name)


@dataclass(frozen=True)
class ArrayMetadata:
    """What an array's metadata file says, in one form for zarr v2 and v3."""

    zarr: int
    shape: tuple[int, ...]
    dtype: str
    # The unit that is decoded at once, and the one that is stored under one key: a shard may hold several chunks.
    chunks: tuple[int, ...]
    stored_chunks: tuple[int, ...]
    codec: str
    separator: str
    prefix: str
    # zarr v2 with "fill_value": null has no value that a left-out chunk could stand for.
    has_fill_value: bool

    def chunk_keys(self) -> Iterator[str]:
        """The keys of all chunks, relative to the array, in C order of the grid."""
        counts = tuple(math.ceil(n / c) for n, c in zip(self.shape, self.stored_chunks, strict=True))
        if not counts:
            yield self.prefix.rstrip(self.separator) if self.zarr == 3 else "0"
            return
        # Lazily: itertools.product would first hold every axis, and a hostile grid has 10**9 chunks on one.
        for index in tiles(counts, (1,) * len(counts)):
            yield self.prefix + self.separator.join(str(at.start) for at in index)


def parse_metadata(raw: bytes, where: str) -> ArrayMetadata:
    """The ArrayMetadata of a `.zarray` or `zarr.json`; raises Corrupt when it makes no sense."""
    try:
        meta = json.loads(raw)
        parsed = _parse_v3(meta) if meta["zarr_format"] == 3 else _parse_v2(meta)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise Corrupt(
            f"{where}: not the metadata of an array", details=(f"{type(error).__name__}: {error}",)
        ) from error
    rank = len(parsed.shape)
    if len(parsed.chunks) != rank or len(parsed.stored_chunks) != rank or min((*parsed.chunks, 1)) < 1:
        raise Corrupt(f"{where}: chunks {list(parsed.chunks)} do not fit shape {list(parsed.shape)}")
    return parsed


def _parse_v2(meta: dict[str, Any]) -> ArrayMetadata:
    compressor = meta["compressor"]
    codec = "none" if compressor is None else str(compressor["id"])
    chunks = tuple(int(n) for n in meta["chunks"])
    return ArrayMetadata(
        zarr=2,
        shape=tuple(int(n) for n in meta["shape"]),
        dtype=np_dtype(meta["dtype"]).name,
        chunks=chunks,
        stored_chunks=chunks,
        codec=codec,
        separator=str(meta.get("dimension_separator") or "."),
        prefix="",
        has_fill_value=meta.get("fill_value") is not None,
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
        zarr=3,
        shape=tuple(int(n) for n in meta["shape"]),
        dtype=np_dtype(meta["data_type"]).name,
        chunks=chunks,
        stored_chunks=stored,
        codec="+".join(names) or "none",
        separator=separator,
        prefix=f"c{separator}" if encoding["name"] == "default" else "",
        has_fill_value=True,
    )


def new_metadata(zarr: int, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """The metadata, as tensorstore takes it, of a new array that is compressed with zstd.

    zarr v3 ends its codecs with crc32c, so that every reader notices a flipped bit; zarr v2 has no such codec.
    """
    if zarr == 3:
        return {
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
            "chunk_key_encoding": {"name": "default"},
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "zstd", "configuration": {"level": ZSTD_LEVEL}},
                {"name": "crc32c"},
            ],
            "fill_value": False if dtype == "bool" else 0,
        }
    kind = np_dtype(dtype)
    return {
        "zarr_format": 2,
        "shape": list(shape),
        "chunks": list(chunks),
        "dtype": dtype if hasattr(ml_dtypes, dtype) else kind.newbyteorder("<").str,
        "compressor": {"id": "zstd", "level": ZSTD_LEVEL},
        "fill_value": None,
        "filters": None,
        "order": "C",
        "dimension_separator": ".",
    }


def nonfinite_at(values: npt.NDArray[Any]) -> tuple[int, ...] | None:
    """The index of the first NaN or Inf, or None. Integers are always finite."""
    if not is_float(values.dtype.name) or not values.size:
        return None
    # The extremes say it without an array of booleans: NaN and Inf propagate into them.
    with np.errstate(invalid="ignore"):
        if np.isfinite(values.min()) and np.isfinite(values.max()):
            return None
    return tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])


def checksum(values: npt.NDArray[Any]) -> str:
    """The CRC-32 of an array's bytes in C order, as eight hexadecimal digits."""
    flat: Any = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return f"{zlib.crc32(flat):08x}"
