"""Encodings: what is encoded is decoded, by tensorstore as well; what is damaged is noticed; bombs stay small."""

import gzip
import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fusectl.formats.encoding import BadChunk, Encoding, checksum
from fusectl.formats.zarr import METADATA_FILE, encode, new_metadata, new_storage, parse_metadata, zero_chunk


COMPRESSORS = ["none", "zstd", "gzip"]
ENCODINGS = [Encoding(name, 1, crc32c=crc32c) for name in COMPRESSORS for crc32c in (False, True)]
VALUES = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_what_is_encoded_is_decoded(encoding):
    raw = b"".join(encoding.encode(VALUES))

    assert bytes(encoding.decode(raw, VALUES.nbytes)) == VALUES.tobytes()


# zarr v2 has no CRC-32C.
@pytest.mark.parametrize(("zarr", "encoding"), [(z, e) for z in (2, 3) for e in ENCODINGS if z == 3 or not e.crc32c])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_tensorstore_reads_what_is_encoded(tmp_path, encoding, zarr, dtype):
    values = (VALUES > 0 if dtype == "bool" else VALUES * 100).astype(getattr(ml_dtypes, dtype, dtype))
    storage = new_storage(zarr, values.shape, dtype, encoding)
    metadata = new_metadata(storage, values.shape, dtype, sparse=False)
    (tmp_path / METADATA_FILE[zarr]).write_bytes(metadata)
    chunk = tmp_path / parse_metadata(metadata, "x").chunk_key((0, 0))
    chunk.parent.mkdir(parents=True, exist_ok=True)
    chunk.write_bytes(b"".join(encode(values, storage)))

    spec = {"driver": "zarr3" if zarr == 3 else "zarr", "kvstore": {"driver": "file", "path": f"{tmp_path}/"}}
    found = ts.open({**spec, "fill_missing_data_reads": False}).result().read().result()

    assert found.dtype == values.dtype
    assert found.tobytes() == values.tobytes()


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_what_is_cut_longer_or_empty_is_no_chunk(encoding):
    raw = b"".join(encoding.encode(VALUES))

    for damaged in (raw[:-1], raw + b"\0", b"", raw[1:]):
        with pytest.raises(BadChunk):
            encoding.decode(damaged, VALUES.nbytes)


@pytest.mark.parametrize("encoding", [e for e in ENCODINGS if e.crc32c or e.compressor == "gzip"], ids=str)
@given(bit=st.integers(0, 1 << 20))
def test_a_flipped_bit_never_becomes_another_value_where_there_is_a_checksum(encoding, bit):
    few = (np.arange(2000) * 7919 % 97).astype(np.float32)
    zipped = encoding == Encoding("gzip", 1)
    raw = bytearray(gzip.compress(few.tobytes(), 1) if zipped else b"".join(encoding.encode(few)))
    raw[bit // 8 % len(raw)] ^= 1 << bit % 8

    try:
        assert bytes(encoding.decode(bytes(raw), few.nbytes)) == few.tobytes()
        # gzip has bits that nobody reads: a time stamp, padding.
        assert zipped
    except BadChunk:
        pass


def test_without_a_checksum_a_flipped_bit_is_another_value():
    """The control: nothing in the bytes could tell."""
    raw = bytearray(VALUES.tobytes())
    raw[0] ^= 1

    assert bytes(Encoding("none").decode(bytes(raw), VALUES.nbytes)) != VALUES.tobytes()


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [(Encoding("zstd"), zstandard.compress), (Encoding("gzip"), gzip.compress)],
    ids=COMPRESSORS[1:],
)
def test_a_bomb_is_refused_before_it_is_unpacked(encoding, compress):
    bomb = compress(bytes(200 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(BadChunk):
            encoding.decode(bomb, 4096)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_crc32c_is_appended_and_taken_off_again(compressor):
    without, with_it = Encoding(compressor, 1), Encoding(compressor, 1, crc32c=True)
    raw = b"".join(without.encode(VALUES))

    longer = b"".join(without.converted(raw, with_it))

    assert longer == b"".join(with_it.encode(VALUES))
    assert b"".join(with_it.converted(longer, without)) == raw
    with pytest.raises(BadChunk):
        with_it.converted(longer[:-1] + bytes([longer[-1] ^ 1]), without)


def test_gzip_frames_without_compressing():
    noise = np.random.default_rng(0).bytes(1 << 20)

    raw = b"".join(Encoding("gzip", 1).encode(np.frombuffer(noise, np.uint8)))

    assert len(noise) < len(raw) < len(noise) + 200
    assert gzip.decompress(raw) == noise


@pytest.mark.parametrize("zarr", [2, 3])
def test_a_chunk_of_zeros_is_small_and_zero(zarr):
    storage = new_storage(zarr, (512, 512), "float32", Encoding("zstd", 1, crc32c=zarr == 3))

    raw = zero_chunk(storage, "float32")

    assert len(raw) < 200
    assert not any(storage.encoding.decode(raw, 512 * 512 * 4))


def test_chunks_of_other_kinds_are_encoded_by_tensorstore(tmp_path):
    """Sharded, as Orbax writes zarr v3, and blosc, tensorstore's own default of zarr v2."""
    inner = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd", "configuration": {"level": 3}}]
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [6, 5], "codecs": inner, "index_codecs": index, "index_location": "end"}
    for driver, extra in (
        ("zarr3", {"codecs": [{"name": "sharding_indexed", "configuration": sharding}]}),
        ("zarr", {"compressor": {"id": "blosc"}}),
    ):
        at = tmp_path / driver
        metadata = {"shape": [6, 5], **({"data_type": "float32"} if driver == "zarr3" else {"dtype": "<f4"}), **extra}
        spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{at}/"}, "metadata": metadata}
        array = ts.open(spec, create=True).result()
        array.write(np.zeros((6, 5), np.float32)).result()
        stored = parse_metadata((at / METADATA_FILE[3 if driver == "zarr3" else 2]).read_bytes(), driver)
        assert stored.storage.encoding is None

        chunk = at / stored.chunk_key((0, 0))
        chunk.parent.mkdir(parents=True, exist_ok=True)
        chunk.write_bytes(b"".join(encode(VALUES, stored.storage)))

        again = ts.open({"driver": driver, "kvstore": {"driver": "file", "path": f"{at}/"}}).result()
        assert np.array_equal(again.read().result(), VALUES)
        assert json.loads(stored.storage.codecs)


def test_the_checksum_is_that_of_zip():
    assert checksum(np.frombuffer(b"123456789", np.uint8)) == "cbf43926"
