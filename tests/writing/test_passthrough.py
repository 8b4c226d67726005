"""Taking chunks over: whatever the formats, codecs and grids, the result is that of decoding and encoding them."""

import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from cases import diagonals, first_soon, some_soon
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import SIZES, WIDER, contents, state

from fusectl.errors import Corrupt
from fusectl.formats.encoding import Encoding
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.record import FILE_NAME, LEFT_OUT, UNREAD
from fusectl.formats.registry import FORMATS
from fusectl.formats.sink import save
from fusectl.formats.store import copy, directory, link, ocdbt
from fusectl.formats.zarr import METADATA_FILE
from fusectl.layout.fill import Fill
from fusectl.operations.fuse import plan_fusion
from fusectl.operations.noise_fill import plan_noise_fill
from fusectl.planning.options import Options
from fusectl.writing.carrying_out import carry_out


LAYERS = {"encoder": 1, "decoder": 1}
KERNEL = "target/encoder/layers_0/mlp/wi_0/kernel"
OCDBT = [name for name, form in FORMATS.items() if form.ocdbt]
NO_OCDBT = [name for name, form in FORMATS.items() if not form.ocdbt]


def encodings(format):
    crc32c = FORMATS[format].zarr == 3
    return [Encoding("none", crc32c=crc32c), Encoding("zstd", 1, crc32c=crc32c), Encoding("gzip", 1, crc32c=crc32c)]


def values(seed, sizes=SIZES):
    return {n: x for n, x in state("t5-1.1", seed, sizes, LAYERS).items() if not n.startswith("state/param_states")}


def source(at, seed=0, format="t5x", sizes=SIZES, encoding=None, chunks=None):
    save(at, values(seed, sizes), format, encoding=encoding, chunks=chunks)
    return str(at)


def fuse(paths, output, **options):
    plan, sources = plan_fusion([str(path) for path in paths], Options(**options))
    return plan, carry_out(plan, sources, Path(output), force=True)


def through_tensorstore(path, name, *, strict):
    """A tensor's values as tensorstore alone reads them, as T5X and Orbax do."""
    opened = open_checkpoint(str(path))
    leaf, index = opened.leaves[name], str(opened.location.index)
    base = ".".join(key.name for key in leaf.keys)
    store = ocdbt(index, base + "/") if FORMATS[opened.format].ocdbt else directory(f"{index}/{base}")
    spec = {"driver": "zarr3" if FORMATS[opened.format].zarr == 3 else "zarr", "kvstore": store}
    return ts.open({**spec, "fill_missing_data_reads": not strict}).result().read().result()


def assert_same(plan, path, plain):
    """What was taken over is what was computed, by fusectl's own reader and by tensorstore alone."""
    expected = contents(plain)
    assert contents(path) == expected
    for output in plan.outputs:
        if output.passed:
            found = through_tensorstore(path, output.name, strict=not plan.sparse)
            assert found.tobytes() == expected[output.name], output.name


# One into a database and one out of one; the other pairs are slow.
SOON = {("orbax-zarr3", "orbax-ocdbt-zarr3"), ("orbax-ocdbt-zarr2", "orbax-zarr2")}


@pytest.mark.parametrize(("of", "to"), some_soon(diagonals(list(FORMATS), list(FORMATS)), SOON.__contains__))
def test_every_pair_of_formats_gives_the_same_as_decoding(tmp_path, of, to):
    for i, encoding in enumerate(encodings(of)):
        a, b = (
            source(tmp_path / f"a{i}", 0, of, encoding=encoding),
            source(tmp_path / f"b{i}", 1, of, encoding=encoding),
        )

        plan, out = fuse([a, b], tmp_path / f"out{i}", format=to)

        plain, decoded = fuse([a, b], tmp_path / f"plain{i}", format=to, passthrough=False)
        assert_same(plan, out, decoded)
        assert plain.passed_bytes == 0
        # All but the head, which is scaled, and the relative biases, whose chunks are cut along their first axis.
        assert plan.passed_bytes > 0.5 * plan.nonzero_bytes


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_grids_it_is_the_same_as_decoding(tmp_path, data):
    """Two sources of equal or unequal widths, or one several times; any chunks, codecs, formats and fills."""
    to = data.draw(st.sampled_from(list(FORMATS)))
    copies = data.draw(st.integers(2, 4))
    itself = data.draw(st.booleans())
    grids = {
        name: tuple(data.draw(st.sampled_from([n, n, max(1, n // 2), max(1, n // 3), n + 1])) for n in x.shape)
        for name, x in values(0).items()
    }
    paths = []
    for i in range(1 if itself else 2):
        of = data.draw(st.sampled_from(list(FORMATS)))
        wider = i and data.draw(st.booleans())
        path = tmp_path / f"source{i}"
        save(
            path,
            values(i, WIDER if wider else SIZES),
            of,
            chunks=grids if data.draw(st.booleans()) else None,
            encoding=data.draw(st.sampled_from(encodings(of))),
            force=True,
        )
        paths.append(path)
    if itself:
        paths *= copies
    kind = data.draw(st.sampled_from(["zeros", "gaussian"]))
    options = {
        "format": to,
        "fill": Fill() if kind == "zeros" else Fill(kind, 0.1, 1),
        "sparse": data.draw(st.sampled_from([None, True, False])),
        "codec": data.draw(st.sampled_from(["auto", "zstd", "none"])),
        "link": data.draw(st.booleans()),
        "check": data.draw(st.booleans()),
        "max_memory_bytes": data.draw(st.sampled_from([1 << 28, 1 << 12])),
    }

    plan, out = fuse(paths, tmp_path / "out", **options)

    _, decoded = fuse(paths, tmp_path / "plain", **{**options, "passthrough": False, "sparse": False})
    assert_same(plan, out, decoded)


@pytest.mark.parametrize("format", first_soon(FORMATS, 2))
@pytest.mark.parametrize("links", [False, True])
def test_the_output_outlives_its_sources(tmp_path, format, links):
    a, b = source(tmp_path / "a", 0, format), source(tmp_path / "b", 1, format)
    _, decoded = fuse([a, b], tmp_path / "plain", passthrough=False)
    expected = contents(decoded)
    _, out = fuse([a, b], tmp_path / "out", link=links)

    shutil.rmtree(a)
    shutil.rmtree(b)

    assert contents(out) == expected


@pytest.mark.parametrize("format", NO_OCDBT)
def test_links_are_other_names_of_the_sources_files(tmp_path, format):
    a = source(tmp_path / "a", 0, format)

    _, out = fuse([a, a], tmp_path / "out", link=True)
    _, copied = fuse([a, a], tmp_path / "copied")

    def inodes(path):
        return {p.stat().st_ino for p in Path(path).rglob("*") if p.is_file()}

    metadata = METADATA_FILE.values()
    chunks = {p.stat().st_ino for p in Path(a).rglob("target.*/**/*") if p.is_file() and p.name not in metadata}
    # All but the head's, which are scaled, and those of the relative biases.
    assert len(inodes(out) & chunks) > len(chunks) - 4
    assert not inodes(copied) & inodes(a)


@pytest.mark.parametrize("links", [False, True])
def test_data_files_of_a_database_are_taken_whole(tmp_path, links):
    # Values of less than a kilobyte stand in the database's tree.
    sizes = {**SIZES, "embed": 48, "joined_kv": 60, "mlp": 88}
    a, b = source(tmp_path / "a", 0, "orbax", sizes), source(tmp_path / "b", 1, "orbax", sizes)

    plan, out = fuse([a, b], tmp_path / "out", link=links)

    taken = [p for p in Path(out).rglob("ocdbt.source_*/**/*") if p.is_file()]
    theirs = {p.stat().st_ino for at in (a, b) for p in Path(at).rglob("d/*")}
    assert taken
    assert all((p.stat().st_ino in theirs) == links for p in taken)
    # Neither their manifests nor their trees: what remains is data that the new tree refers to.
    assert all(p.parent.name == "d" for p in taken)
    assert plan.passed_bytes > 0


def test_a_link_across_file_systems_is_a_copy_and_a_note(tmp_path, monkeypatch):
    a = source(tmp_path / "a")
    told = []

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    plan, sources = plan_fusion([a, a], Options(link=True))
    out = carry_out(plan, sources, tmp_path / "out", note=told.append)

    monkeypatch.undo()
    _, decoded = fuse([a, a], tmp_path / "plain", passthrough=False)
    assert contents(out) == contents(decoded)
    assert "copied instead of linked" in told[0]


def test_where_the_kernel_cannot_copy_ranges_the_bytes_are_sent(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    a = source(tmp_path / "a")

    _, out = fuse([a, a], tmp_path / "out")

    monkeypatch.undo()
    _, decoded = fuse([a, a], tmp_path / "plain", passthrough=False)
    assert contents(out) == contents(decoded)


# --- zeros


@pytest.mark.parametrize("format", first_soon(FORMATS, 2))
@pytest.mark.parametrize("sparse", [True, False])
def test_zeros_are_left_out_or_stored(tmp_path, format, sparse):
    a, b = source(tmp_path / "a"), source(tmp_path / "b", 1)
    _, decoded = fuse([a, b], tmp_path / "plain", format=format, passthrough=False, sparse=False)

    _, out = fuse([a, b], tmp_path / "out", format=format, sparse=sparse)

    opened = open_checkpoint(str(out))
    assert opened.is_left_out(KERNEL, (0, 1)) == sparse
    assert not opened.is_left_out(KERNEL, (0, 0))
    assert opened.missing_chunks(KERNEL) == []
    assert (LEFT_OUT in opened.record.tensors[KERNEL].crc32) == sparse
    assert contents(out) == contents(decoded)


@pytest.mark.slow
def test_by_default_they_are_left_out_where_all_readers_know(tmp_path):
    a = source(tmp_path / "a")

    assert [fuse([a, a], tmp_path / name, format=name)[0].sparse for name in FORMATS] == [True] + [False] * 4


@pytest.mark.parametrize("format", FORMATS)
def test_a_lost_chunk_of_a_sparse_checkpoint_is_noticed(tmp_path, format):
    """The record tells it from one that was left out; without it the fill value must do."""
    a = source(tmp_path / "a")
    _, out = fuse([a, a], tmp_path / "out", format=format, sparse=True)
    opened = open_checkpoint(str(out))
    index = str(opened.location.index)
    store = ts.KvStore.open(ocdbt(index) if FORMATS[format].ocdbt else directory(index)).result()
    store.delete_range(ts.KvStore.KeyRange(opened.key(KERNEL, (0, 0)), opened.key(KERNEL, (0, 0)) + "\0")).result()

    assert open_checkpoint(str(out)).missing_chunks(KERNEL) == [opened.key(KERNEL, (0, 0))]
    with pytest.raises(Corrupt, match="data is missing"):
        open_checkpoint(str(out)).read(KERNEL)

    (out / FILE_NAME).unlink()
    assert open_checkpoint(str(out)).missing_chunks(KERNEL) == []
    assert not open_checkpoint(str(out)).read(KERNEL)[:12, :22].any()


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_noise_fills_what_was_left_out(tmp_path, format):
    a, fill = source(tmp_path / "a"), Fill("antisymmetric", 0.1, 3)
    _, at_once = fuse([a, a], tmp_path / "once", fill=fill)
    _, sparse = fuse([a, a], tmp_path / "sparse", format=format, sparse=True)
    planned, opened = plan_noise_fill(str(sparse), Options(fill=fill))

    later = carry_out(planned, opened, tmp_path / "later")

    assert contents(later) == contents(at_once)


@pytest.mark.slow
def test_a_fusion_of_sparse_fusions(tmp_path):
    a = source(tmp_path / "a")
    _, two = fuse([a, a], tmp_path / "two")

    plan, four = fuse([two, two], tmp_path / "four")

    _, decoded = fuse([a] * 4, tmp_path / "plain", passthrough=False)
    kernels = [name for name in contents(four) if name.endswith("/kernel") and "logits" not in name]
    assert plan.passed_bytes > 0
    assert {n: contents(four)[n] for n in kernels} == {n: contents(decoded)[n] for n in kernels}


# --- what is corrupt


def damage(path, name, change):
    """Rewrites the first stored chunk of a tensor."""
    opened = open_checkpoint(str(path))
    index = str(opened.location.index)
    store = ts.KvStore.open(ocdbt(index) if FORMATS[opened.format].ocdbt else directory(index)).result()
    key = opened.key(name, (0,) * len(opened.leaves[name].shape))
    store[key] = change(bytearray(store[key]))


def cut(raw):
    return bytes(raw[:-3])


def flip(raw):
    raw[len(raw) // 2] ^= 4
    return bytes(raw)


@pytest.mark.parametrize(("format", "change"), first_soon(itertools.product(FORMATS, [cut, flip]), 4))
def test_a_corrupt_chunk_is_noticed_although_it_is_not_decoded(tmp_path, format, change):
    # zarr v2 has no checksum but gzip's.
    encoding = Encoding("gzip", 1) if FORMATS[format].zarr == 2 else None
    a = source(tmp_path / "a", 0, format, encoding=encoding)
    damage(a, KERNEL, change)

    with pytest.raises(Corrupt, match=KERNEL):
        fuse([a, a], tmp_path / "out")

    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    plan, out = fuse([a, a], tmp_path / "out", check=False)
    assert UNREAD in open_checkpoint(str(out)).record.tensors[KERNEL].crc32
    assert plan.passed_bytes > 0


def test_a_sources_own_record_tells_values_that_decode_but_are_others(tmp_path):
    a = source(tmp_path / "a")
    _, two = fuse([a, a], tmp_path / "two", codec="none", passthrough=False)
    damage(two, KERNEL, flip)

    with pytest.raises(Corrupt, match="is not what was written"):
        fuse([two, two], tmp_path / "out")


def test_unread_chunks_keep_the_checksums_that_their_source_has(tmp_path):
    a = source(tmp_path / "a")
    _, two = fuse([a, a], tmp_path / "two")

    _, four = fuse([two, two], tmp_path / "four", check=False)

    ours, theirs = (open_checkpoint(str(p)).record.tensors[KERNEL] for p in (four, two))
    assert ours.of((0, 0)) == theirs.of((0, 0)) not in {UNREAD, LEFT_OUT}
    assert ours.of((2, 2)) == theirs.of((0, 0))


@pytest.mark.parametrize("check", [True, False])
def test_nan_is_noticed_where_chunks_are_read(tmp_path, check):
    bad = values(0)
    bad[KERNEL][1, 2] = np.nan
    save(tmp_path / "a", bad, "t5x")

    if not check:
        fuse([tmp_path / "a"] * 2, tmp_path / "out", check=False)
        return
    with pytest.raises(Corrupt, match=r"wi_0/kernel\[1, 2\] is nan"):
        fuse([tmp_path / "a"] * 2, tmp_path / "out")


# --- the plan


def test_the_plan_says_what_passes_through(tmp_path, fusectl):
    a = source(tmp_path / "a", encoding=Encoding("gzip", 1))

    shown = fusectl("self-fuse", a, "--dry-run", "--json", "-q").json["result"]["plan"]

    by_name = {output["name"]: output for output in shown["outputs"]}
    assert by_name[KERNEL]["passed_bytes"] == 2 * values(0)[KERNEL].nbytes
    assert by_name[KERNEL]["codec"] == "gzip"
    # Scaled, so encoded anew, and never in gzip.
    assert by_name["target/decoder/logits_dense/kernel"]["passed_bytes"] == 0
    assert by_name["target/decoder/logits_dense/kernel"]["codec"] == "none"
    assert shown["passed_bytes"] == sum(output["passed_bytes"] for output in by_name.values())
    assert "taken over as they are" in fusectl("self-fuse", a, "--dry-run").out


def test_of_different_grids_the_one_that_takes_over_most_is_chosen(tmp_path):
    chunks = {KERNEL: (6, 11)}
    small, large = source(tmp_path / "a", chunks=chunks), source(tmp_path / "b", 1, chunks={KERNEL: (4, 22)})

    plan, _ = fuse([small, large, large], tmp_path / "out")

    output = next(output for output in plan.outputs if output.name == KERNEL)
    assert output.chunks == (4, 22)
    assert output.passed_bytes == 2 * values(0)[KERNEL].nbytes


def test_noise_is_stored_uncompressed_unless_a_codec_is_asked_for(tmp_path):
    a = source(tmp_path / "a", encoding=Encoding("gzip", 1))
    fill = Fill("gaussian", 0.1, 0)

    def codec(**options):
        _, out = fuse([a, a], tmp_path / "out", fill=fill, **options)
        opened = open_checkpoint(str(out))
        metadata = json.loads((out / opened.key(KERNEL, (0, 0))).with_name(METADATA_FILE[2]).read_bytes())
        return metadata["compressor"], opened.leaves[KERNEL].stored.codec

    assert codec() == (None, "none")
    assert codec(codec="zstd") == ({"id": "zstd", "level": 1}, "zstd")


# --- files


def test_an_extent_is_copied_to_its_place(tmp_path):
    from fusectl.formats.store import Extent

    (tmp_path / "a").write_bytes(b"0123456789")

    copy(Extent(str(tmp_path / "a"), 2, 3), tmp_path / "b", 4)

    assert (tmp_path / "b").read_bytes() == b"\0\0\0\x00234"
    assert Extent(str(tmp_path / "a"), 2, 3).read() == b"234"
    with pytest.raises(Corrupt, match="ends at 10"):
        Extent(str(tmp_path / "a"), 8, 3).read()
    with pytest.raises(Corrupt, match="ends at 10"):
        copy(Extent(str(tmp_path / "a"), 8, 3), tmp_path / "c")
    assert not link(Extent(str(tmp_path / "a"), 2, 3), tmp_path / "d")


@pytest.mark.parametrize("crc32c", [False, True])
def test_large_chunks_are_decoded_as_they_are_read(tmp_path, crc32c):
    from fusectl.formats.encoding import BadChunk
    from fusectl.formats.store import Extent, streamed

    encoding = Encoding("zstd", 1, crc32c=crc32c)
    x = np.random.default_rng(0).normal(size=1 << 20).astype(np.float32)
    raw = b"".join(encoding.encode(x))

    def read(contents):
        (tmp_path / "file").write_bytes(b"before" + contents + b"behind")
        return bytes(streamed(Extent(str(tmp_path / "file"), 6, len(contents)), encoding, x.nbytes))

    assert read(raw) == x.tobytes()
    middle = len(raw) // 2
    for damaged in (raw[:-9], raw + b"12345", raw[4:], *[raw[:middle] + b"\0" + raw[middle + 1 :]] * crc32c):
        with pytest.raises(BadChunk):
            read(damaged)


# --- what is not taken over


def refill(path, name, value):
    """Gives an array a fill value, and leaves its first chunk to it."""
    opened = open_checkpoint(str(path))
    at = Path(path) / opened.key(name, (0, 0))
    metadata = json.loads((at.parent / ".zarray").read_bytes())
    (at.parent / ".zarray").write_text(json.dumps({**metadata, "fill_value": value}))
    at.unlink()


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_chunks_that_stand_for_another_value_than_zero_are_no_zeros(tmp_path, value):
    a = source(tmp_path / "a")
    refill(a, KERNEL, value)
    expected = open_checkpoint(a).read(KERNEL)
    assert (expected == value).all()

    _, out = fuse([a, a], tmp_path / "out")

    fused = open_checkpoint(str(out)).read(KERNEL)
    assert np.array_equal(fused[:12, :22], expected)
    assert np.array_equal(fused[12:, 22:], expected)
    assert not fused[:12, 22:].any()


@pytest.mark.slow
def test_a_shard_of_which_a_part_was_left_out_is_decoded(tmp_path):
    a = source(tmp_path / "a", 0, "orbax-zarr3")
    opened = open_checkpoint(a)
    at = opened.location.index / opened.key(KERNEL, (0, 0)).split("/", 1)[0]
    shutil.rmtree(at)
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {"chunk_shape": [6, 11], "codecs": [little], "index_codecs": [little, {"name": "crc32c"}]}
    metadata = {
        "shape": [12, 22],
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [12, 22]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "fill_value": 2.0,
    }
    array = ts.open({"driver": "zarr3", "kvstore": directory(str(at)), "metadata": metadata}, create=True).result()
    kernel = np.random.default_rng(0).normal(size=(12, 22)).astype(np.float32)
    kernel[:6, :11] = 2.0
    array.write(kernel).result()
    index = opened.location.index / "_METADATA"
    index.write_text(index.read_text().replace('fill_value": true', 'fill_value": false'))

    for sparse in (True, False):
        plan, out = fuse([a, a], tmp_path / f"out{sparse}", sparse=sparse)

        output = next(output for output in plan.outputs if output.name == KERNEL)
        assert not output.passed
        assert np.array_equal(through_tensorstore(out, KERNEL, strict=not sparse)[:12, :22], kernel)
    # The control: where all of it is stored, shards are taken over.
    array.write(kernel + 3).result()
    index.write_text(index.read_text().replace('fill_value": false', 'fill_value": true'))
    plan, out = fuse([a, a], tmp_path / "out")
    assert next(output for output in plan.outputs if output.name == KERNEL).passed
    assert np.array_equal(through_tensorstore(out, KERNEL, strict=True)[12:, 22:], kernel + 3)


@pytest.mark.parametrize("format", NO_OCDBT)
def test_a_link_to_a_symbolic_link_is_one_to_its_file(tmp_path, format):
    """As in caches that keep files by their digests, here within the checkpoint."""
    a = source(tmp_path / "a", 0, format)
    blobs = open_checkpoint(a).location.index / "blobs"
    files = [p for p in Path(a).rglob("*") if p.is_file()]
    blobs.mkdir()
    for i, path in enumerate(files):
        path.rename(blobs / str(i))
        path.symlink_to(os.path.relpath(blobs / str(i), path.parent))
    _, decoded = fuse([a, a], tmp_path / "plain", passthrough=False)

    _, out = fuse([a, a], tmp_path / "deeper/out", link=True)

    assert not [p for p in Path(out).rglob("*") if p.is_symlink()]
    assert contents(out) == contents(decoded)


def test_a_database_without_one_of_its_data_files_is_named(tmp_path):
    sizes = {**SIZES, "embed": 48, "joined_kv": 60, "mlp": 88}
    for options in ({}, {"check": False}, {"check": False, "link": True}):
        for cut in (False, True):
            a = source(tmp_path / "a", 0, "orbax", sizes)
            opened = open_checkpoint(a)
            chunk = opened.files.place(opened.key(KERNEL, (0, 0)))
            os.truncate(chunk.path, chunk.offset + chunk.nbytes - 1) if cut else Path(chunk.path).unlink()

            with pytest.raises(Corrupt, match=r"data is missing|ends at|cannot be"):
                fuse([a, a], tmp_path / "out", **options)

            assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
            shutil.rmtree(a)


@pytest.mark.parametrize("links", [False, True])
def test_databases_of_other_settings_and_with_deep_trees_are_taken_over(tmp_path, links):
    a = source(tmp_path / "a", 0, "orbax")
    old, new = f"{a}/state", tmp_path / "b/state"
    shutil.copytree(a, tmp_path / "b", ignore=shutil.ignore_patterns("d", "manifest.ocdbt"))
    config = {"max_inline_value_bytes": 100, "max_decoded_node_bytes": 3000}
    store = ts.KvStore.open({"driver": "ocdbt", "base": directory(str(new)), "config": config}).result()
    with ts.Transaction() as transaction:
        for key, value in _items(old):
            store.with_transaction(transaction)[key] = value
    tree = open_checkpoint(str(tmp_path / "b")).files.database
    assert len(tree.nodes) > 3

    plan, out = fuse([tmp_path / "b"] * 2, tmp_path / "out", link=links)

    _, decoded = fuse([a, a], tmp_path / "plain", passthrough=False)
    assert plan.passed_bytes > 0
    assert contents(out) == contents(decoded)


def _items(path):
    store = ts.KvStore.open(ocdbt(path)).result()
    return [(key, store[key]) for key in store.list().result()]


def test_links_that_another_layout_rules_out_are_told(tmp_path):
    a = source(tmp_path / "a")
    plan, sources = plan_fusion([a, a], Options(link=True, format="orbax"))
    told = []

    carry_out(plan, sources, tmp_path / "out", note=told.append)

    assert "copied instead of linked" in told[0]


def test_what_a_unit_of_work_takes_is_counted(tmp_path):
    """Shards, chunks that are written into a database by value, and zeros that are stored."""
    a = source(tmp_path / "a")
    chunk = values(0)[KERNEL].nbytes

    def cost(**options):
        plan, _ = plan_fusion([a, a], Options(**options))
        # What is given to a database stays with it until it is committed.
        assert (plan.resources.pending > 0) == FORMATS[plan.format].ocdbt
        return next(output.cost_bytes for output in plan.outputs if output.name == KERNEL)

    assert cost() == 2 * chunk
    assert cost(format="orbax-zarr2") == 2 * chunk
    assert cost(format="orbax") == 2 * chunk
