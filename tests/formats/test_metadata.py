"""What array metadata fusectl takes: those that tensorstore opens, and with it T5X and Orbax, and no others."""

import json

import numpy as np
import pytest
import tensorstore as ts

from fusectl.errors import Corrupt, FusectlError, Incompatible
from fusectl.formats.sink import save
from fusectl.formats.zarr import DRIVER, METADATA_FILE, parse_metadata
from fusectl.inspection.fsck import fsck


V2 = {
    "zarr_format": 2,
    "shape": [6, 4],
    "chunks": [3, 4],
    "dtype": "<f4",
    "compressor": {"id": "gzip", "level": 1},
    "fill_value": None,
    "order": "C",
    "filters": None,
    "dimension_separator": ".",
}
V3 = {
    "zarr_format": 3,
    "node_type": "array",
    "shape": [6, 4],
    "data_type": "float32",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [3, 4]}},
    "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    "codecs": [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "zstd", "configuration": {"level": 1}},
    ],
    "fill_value": 0.0,
}
BYTES = V3["codecs"][0]
CRC32C = {"name": "crc32c"}
GONE = object()


def codec(name, **configuration):
    return {"name": name, "configuration": configuration}


def sharded(chunk_shape=(3, 2), codecs=(BYTES,), **more):
    index = {"index_codecs": [BYTES, CRC32C], "index_location": "end"}
    return [codec("sharding_indexed", **{"chunk_shape": chunk_shape, "codecs": codecs, **index, **more})]


def grid(**changed):
    return {**V3["chunk_grid"], **changed}


def shaped(*chunk_shape, **more):
    return grid(configuration={"chunk_shape": chunk_shape, **more})


LEVELS = (-131_073, -131_072, -5, -1, 0, 1, 1.0, 1.5, 9, 10, 22, 23, 1000, "1", True, None, GONE)
# By member, what stands there instead; tensorstore is asked what is right.
OF_V2 = {
    "zarr_format": (1, 2.0, 3, "2", True, None),
    "shape": (["6", "4"], [6.0, 4.0], [32.5, 4], [True, 4], [-1, 4], [0, 4], [], None, "64", 6, [6], [6, 4, 1]),
    "chunks": (["3", "4"], [3.0, 4.0], [3.5, 4], [0, 4], [-1, 4], [3], [3, 4, 1], None, [7, 4], [99, 99], [True, 4]),
    "dtype": (
        *("=f4", "float32", "f", "f4", ">f4", "|f4", "<f2", "<f8", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int4"),
        *("|b1", "<b1", "|i1", "<i1", "|u1", "<u2", "<i8", ">i8", "<c8", "<c16", "", "<i3", "uint4", None, 4, "int2"),
    ),
    "compressor": (
        *(None, {}, "gzip", [], {"id": 5}, {"level": 1}, {"id": "gzip", "level": 1, "foo": 1}),
        *(
            {"id": id, **({} if level is GONE else {"level": level})}
            for id in ("gzip", "zstd", "zlib")
            for level in LEVELS
        ),
        *({"id": "zstd", "level": 1, "checksum": checksum} for checksum in (True, False, "x")),
        *(
            {"id": "blosc", **more}
            for more in ({}, {"cname": "lz4", "clevel": 5, "shuffle": 1}, {"clevel": 10}, {"cname": 5})
        ),
        *({"id": "bz2", **more} for more in ({}, {"level": 0}, {"level": 1})),
    ),
    "fill_value": (0, 0.0, -0.0, 1, 1.5, "NaN", "Infinity", "abc", True, [0, 0], "", {}),
    "order": ("F", "A", None, "c", 1),
    "filters": ([], {}, "x", False),
    "dimension_separator": ("/", "-", None, "", 1),
    "attributes": ({},),
    "node_type": ("array",),
}
OF_V3 = {
    "zarr_format": (2, 3.0, 4, "3", True),
    "node_type": ("group", "Array", None, 1),
    "shape": (["6", "4"], [6.0, 4.0], [6.5, 4], [0, 4], [-1, 4], [6], [True, 4], None),
    "data_type": (
        *("float16", "bfloat16", "float64", "int4", "uint8", "int64", "bool", "complex64", "float8_e4m3fn", "int2"),
        *("float32x", "<f4", None, 5, {"name": "float32"}, "char", "datetime64"),
    ),
    "fill_value": (0, 1, "abc", "NaN", "Infinity", "0x00000000", "0x0", None, True, [0, 0], [1.0], {}, "1"),
    "chunk_grid": (
        *(grid(name="rectilinear"), grid(foo=1), {"name": "regular"}, "regular", None, grid(must_understand=False)),
        *(shaped(3), shaped(0, 4), shaped(3.0, 4), shaped(3.5, 4), shaped("3", 4), shaped(7, 4), shaped(3, 4, x=1)),
    ),
    "chunk_key_encoding": (
        *({"name": "default"}, {"name": "v2"}, {"name": "v3"}, "default", "v2", None, {"name": "default", "x": 1}),
        *(codec(name, separator=separator) for name in ("default", "v2") for separator in (".", "/", "-", None)),
    ),
    "attributes": ({}, {"a": 1}, None, 5),
    "dimension_names": (["a", "b"], ["a"], ["a", None], None, ["a", "a"], [1, 2], "ab", ["a", "b", "c"]),
    "storage_transformers": ([], [{"name": "foo"}], None, {}),
    "foo": (1, {"must_understand": False}, {"must_understand": True}, {"name": "x"}, None),
    "codecs": (
        *([], None, "bytes", {"name": "bytes"}, [None], [{"name": None}], [BYTES, "zstd"], [BYTES], [BYTES, BYTES]),
        *([{"name": "bytes"}], [codec("bytes")], [codec("bytes", endian="big")], [codec("bytes", endian="middle")]),
        *(
            [codec("bytes", endian="little", x=1)],
            [{**BYTES, "x": 1}],
            [codec("zstd", level=1)],
            [V3["codecs"][1], BYTES],
        ),
        *([BYTES, codec(n, **({} if v is GONE else {"level": v}))] for n in ("gzip", "zstd") for v in LEVELS),
        *([BYTES, codec("zstd", level=1, checksum=checksum)] for checksum in (True, False, "x")),
        *([BYTES, {"name": name}] for name in ("gzip", "zstd", "crc32c", "blosc")),
        *(
            [BYTES, codec("crc32c")],
            [BYTES, codec("crc32c", x=1)],
            [BYTES, CRC32C, CRC32C],
            [BYTES, CRC32C, codec("gzip", level=1)],
        ),
        *([BYTES, codec("blosc", cname="zstd", clevel=1, shuffle="noshuffle", typesize=4, blocksize=0)],),
        *([codec("transpose", order=order), BYTES] for order in ([1, 0], "F", "C", [0, 0], [0])),
        *(
            sharded(),
            sharded((2, 2)),
            sharded(codecs=({"name": "bytes"},)),
            sharded(codecs=(BYTES, codec("gzip", level=10))),
        ),
        *(sharded(index_location="start"), sharded(codecs=sharded((3, 1)))),
    ),
}
VARIANTS = [
    (zarr, name, value)
    for zarr, base, others in ((2, V2, OF_V2), (3, V3, OF_V3))
    for name in {**base, **others}
    for value in (GONE, *others.get(name, ()))
]


def changed(zarr, name, value):
    meta = {**(V2 if zarr == 2 else V3), name: value}
    return json.dumps({key: each for key, each in meta.items() if each is not GONE}).encode()


def opens(at, zarr, raw):
    """Whether tensorstore opens an array of these metadata."""
    (at / METADATA_FILE[zarr]).write_bytes(raw)
    try:
        ts.open(
            {"driver": DRIVER[zarr], "kvstore": {"driver": "file", "path": f"{at}/"}}, context=ts.Context()
        ).result()
    except ValueError:
        return False
    return True


def test_what_tensorstore_opens_is_taken_and_nothing_else(tmp_path):
    right, wrong = [], []
    for zarr, name, value in VARIANTS:
        raw = changed(zarr, name, value)
        sound = opens(tmp_path, zarr, raw)
        try:
            parsed = parse_metadata(raw, "here", zarr)
        except Corrupt:
            taken = False
        else:
            taken = True
            assert parsed.storage.zarr == zarr
        right += [(name, value)] * sound
        wrong += [(name, value, sound)] * (taken != sound)
    assert not wrong
    assert 100 < len(right) < len(VARIANTS) - 150, "the control: both kinds are among them"


def test_what_is_wrong_with_a_level_is_said():
    with pytest.raises(Corrupt) as caught:
        parse_metadata(changed(2, "compressor", {"id": "gzip", "level": 10}), "here")
    assert "in the range [0, 9], but received: 10" in caught.value.details[0]


FOREIGN = [
    *((2, "compressor", {"id": name}, name) for name in ("lz4", "lzma", "snappy")),
    *((2, "filters", [{"id": name}], name) for name in ("delta", "shuffle", "fixedscaleoffset", "crc32")),
    *((3, "codecs", [BYTES, codec(name)], name) for name in ("numcodecs.bz2", "numcodecs.lz4", "vlen-utf8")),
    (3, "codecs", [codec("numcodecs.delta"), BYTES], "numcodecs.delta"),
    *((2, "dtype", dtype, dtype) for dtype in ("<M8[ns]", "<m8[s]", "|S5", "|V4", "<U4", "|O", "<f16")),
    (2, "dtype", [["a", "<f4"], ["b", "<i4"]], '"b", "<i4"'),
    *((3, "data_type", name, name) for name in ("string", "variable_length_bytes", "r16")),
    (3, "data_type", {"name": "numpy.datetime64", "configuration": {"unit": "ns"}}, "numpy.datetime64"),
    (3, "data_type", codec("fixed_length_utf32", length_bytes=8), "fixed_length_utf32"),
]


@pytest.mark.parametrize(("zarr", "name", "value", "says"), FOREIGN)
def test_codecs_and_dtypes_of_other_libraries_are_named_and_are_no_damage(zarr, name, value, says):
    with pytest.raises(Incompatible) as caught:
        parse_metadata(changed(zarr, name, value), "here")
    assert says in caught.value.message
    assert caught.value.hint


def test_metadata_of_the_other_version_are_not_taken(tmp_path):
    for zarr, raw in ((2, json.dumps(V3).encode()), (3, json.dumps(V2).encode())):
        assert not opens(tmp_path, zarr, raw)
        with pytest.raises(FusectlError):
            parse_metadata(raw, "here", zarr)


def test_a_checkpoint_with_metadata_of_the_other_version_has_a_fault(tmp_path):
    save(tmp_path / "a", {"target/w": np.ones((6, 4), np.float32)}, "t5x")
    (tmp_path / "a/target.w/.zarray").write_text(json.dumps(V3))

    assert any("zarr_format 3 in a .zarray" in problem for problem in fsck(str(tmp_path / "a")).problems)


def test_a_fill_value_of_minus_zero_is_not_zero():
    """Chunks that were left out for it are read by tensorstore, which knows it."""
    for value, zero in ((0, True), (0.0, True), (-0.0, False), (1.0, False), (None, False)):
        assert parse_metadata(changed(2, "fill_value", value), "here").fills_with_zero == zero
