"""The bytes of a chunk: how values are encoded, decoded, and taken over from one zarr version into the other.

Three encodings cover what T5X and Orbax write: none, zstd and gzip, each with or without a CRC-32C behind. The
libraries called here are twice to five times as fast as tensorstore on whole chunks; all else goes through it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO

import deflate
import google_crc32c
import numpy as np
import numpy.typing as npt
import zstandard


# Where chunks are computed anew: gzip, which T5X writes, costs twenty times as much to encode.
ZSTD_LEVEL = 1
CRC32C_BYTES = 4
_GZIP_TRAILER_BYTES = 8
# Deflate's own limit is a factor of 1032.
_GZIP_MOST = 1040

Buffer = bytes | bytearray | memoryview


class BadChunk(ValueError):
    """The bytes of a chunk are not what its array's metadata says."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """Values in C order and little-endian, compressed or not, with a CRC-32C behind or not."""

    compressor: str = "none"
    level: int = 0
    crc32c: bool = False

    def __str__(self) -> str:
        return f"{self.compressor}+crc32c" if self.crc32c else self.compressor

    def like(self, other: Encoding) -> bool:
        """Whether the other decodes what this one encodes: compressors do it whatever their level."""
        return (self.compressor, self.crc32c) == (other.compressor, other.crc32c)

    def decode(self, raw: Buffer, nbytes: int) -> Buffer:
        """The `nbytes` bytes of a chunk's values; raises BadChunk if they are not, or if the CRC-32C is another."""
        view = memoryview(raw)
        if self.crc32c:
            view = _without_crc32c(view)
        values: Buffer
        try:
            if self.compressor == "zstd":
                values = _without_zstd(view, nbytes)
            elif self.compressor == "gzip":
                values = _without_gzip(view, nbytes)
            else:
                values = view
        except (zstandard.ZstdError, deflate.DeflateError, ValueError) as error:
            raise BadChunk(str(error)) from error
        if memoryview(values).nbytes != nbytes:
            raise BadChunk(f"{memoryview(values).nbytes:,} bytes of values, not {nbytes:,}")
        return values

    def decode_stream(self, stream: BinaryIO, nbytes: int) -> Buffer:
        """As `decode`, but of zstd's bytes as they come: a large chunk's need not be in memory beside its values.

        The stream ends before a CRC-32C.
        """
        assert self.compressor == "zstd"
        values = np.empty(nbytes, np.uint8).data
        done = 0
        try:
            # Across frames, so that bytes behind the end are an error.
            with zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True) as reader:
                while done < nbytes and (got := reader.readinto(values[done:])):
                    done += got
                if done < nbytes or reader.read(1):
                    raise BadChunk(f"not {nbytes:,} bytes of values")
        except zstandard.ZstdError as error:
            raise BadChunk(str(error)) from error
        return values

    def encode(self, values: npt.NDArray[Any]) -> list[Buffer]:
        """The bytes of a chunk, in pieces: those of the values themselves are not copied. gzip only frames them."""
        plain = memoryview(_flat(values).data)
        body: Buffer = plain
        if self.compressor == "zstd":
            body = zstandard.ZstdCompressor(level=self.level).compress(plain)
        elif self.compressor == "gzip":
            body = zlib.compress(plain, 0, wbits=31)
        return self._closed(body)

    def encode_zeros(self, nbytes: int) -> list[Buffer]:
        """The bytes of a chunk of so many bytes of zeros, which gzip, too, compresses."""
        if self.compressor != "gzip":
            return self.encode(np.zeros(nbytes, np.uint8))
        body = bytes(deflate.gzip_compress(bytes(nbytes), self.level or 1))
        return self._closed(body)

    def behind_zeros(self, nbytes: int) -> bytes:
        """What stands behind so many uncompressed bytes of zeros."""
        return _crc32c(bytes(nbytes)) if self.crc32c else b""

    def converted(self, raw: Buffer, to: Encoding) -> list[Buffer]:
        """The bytes of a chunk that differs in its CRC-32C only: with it, or checked and without it."""
        assert self.compressor == to.compressor
        view = memoryview(raw)
        if self.crc32c:
            view = _without_crc32c(view)
        return to._closed(view)

    def _closed(self, body: Buffer) -> list[Buffer]:
        return [body, _crc32c(body)] if self.crc32c else [body]


def checksum(values: npt.NDArray[Any]) -> str:
    """The CRC-32 of an array's bytes in C order, as eight hexadecimal digits.

    >>> checksum(np.frombuffer(b"123456789", np.uint8))
    'cbf43926'
    """
    return f"{deflate.crc32(_flat(values)):08x}"


def _flat(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    flat: npt.NDArray[np.uint8] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return flat


def _without_zstd(view: memoryview, nbytes: int) -> bytes:
    # The size in the frame's header would be allocated before a byte is decoded.
    if zstandard.frame_content_size(view) > nbytes:
        raise BadChunk(f"a frame of {zstandard.frame_content_size(view):,} bytes, not of {nbytes:,}")
    values: bytes = zstandard.ZstdDecompressor().decompress(view, max_output_size=nbytes, allow_extra_data=False)
    return values


def _without_gzip(view: memoryview, nbytes: int) -> bytearray:
    # What they may decode to is allocated before a byte is.
    if len(view) * _GZIP_MOST < nbytes:
        raise BadChunk(f"{len(view):,} bytes of gzip, too few for {nbytes:,}")
    values: bytearray = deflate.gzip_decompress(view, nbytes)
    # libdeflate has compared its own end of the stream; nothing may come behind it.
    if bytes(view[-_GZIP_TRAILER_BYTES:-4]) != deflate.crc32(values).to_bytes(4, "little"):
        raise BadChunk("bytes behind its end")
    return values


def crc32c(body: Buffer, before: int = 0) -> int:
    """The CRC-32C of bytes that stand behind others whose own it is given."""
    # google_crc32c refuses some read-only views, and takes any array.
    return int(google_crc32c.extend(before, np.frombuffer(body, np.uint8)))


def require_crc32c(computed: int, found: bytes) -> None:
    """Raises BadChunk unless the bytes behind a chunk are its CRC-32C."""
    if computed.to_bytes(CRC32C_BYTES, "little") != found:
        raise BadChunk("its CRC-32C is another one")


def _crc32c(body: Buffer) -> bytes:
    return crc32c(body).to_bytes(CRC32C_BYTES, "little")


def _without_crc32c(view: memoryview) -> memoryview:
    body = view[:-CRC32C_BYTES]
    require_crc32c(crc32c(body), bytes(view[-CRC32C_BYTES:]))
    return body
