"""T5X's own format: its index in all the forms that are about, and what is wrong with broken ones."""

import msgpack
import numpy as np
import pytest
import tensorstore as ts
from cases import first_soon
from models import state

from fusectl.errors import Corrupt, Incompatible, NotFound
from fusectl.formats.encoding import Encoding
from fusectl.formats.flaxpack import to_ext
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.registry import FORMATS
from fusectl.formats.sink import save
from fusectl.operations.fuse import plan_fusion
from fusectl.planning.options import Options
from fusectl.writing.carrying_out import carry_out


@pytest.fixture
def legacy(tmp_path):
    save(
        tmp_path / "checkpoint_7",
        {"target/x": np.arange(12.0).reshape(3, 4), "state/step": np.array(7, np.int32)},
        "t5x",
    )
    return tmp_path / "checkpoint_7"


def edit(path, change):
    """Rewrites the index after `change` has had the whole tree, extensions left as they are."""
    index = path / "checkpoint"
    tree = msgpack.unpackb(index.read_bytes(), strict_map_key=False)
    change(tree)
    index.write_bytes(msgpack.packb(tree))
    return str(path)


def spec(tree):
    return tree["optimizer"]["target"]["x"]


@pytest.mark.slow
def test_both_formats_of_one_training_run_hold_the_same(written):
    legacy, orbax = (
        open_checkpoint(str(written / "t5_1_1/seed0" / kind / "checkpoint_20")) for kind in ("legacy", "orbax")
    )

    assert (legacy.format, orbax.format) == ("t5x", "orbax-ocdbt-zarr2")
    assert legacy.shapes == orbax.shapes
    assert legacy.step == orbax.step == 20
    for name in legacy.leaves:
        assert np.array_equal(legacy.read(name), orbax.read(name)), name


@pytest.mark.parametrize("driver", ["file", "gfile", "gcs"])
def test_the_spec_driver_does_not_matter(legacy, driver):
    def change(tree):
        spec(tree)["kvstore"]["driver"] = driver
        if driver == "gcs":
            spec(tree)["kvstore"]["bucket"] = "t5x-dummy-bucket"

    assert open_checkpoint(edit(legacy, change)).read("target/x").sum() == 66


def test_the_path_may_stand_at_the_top_as_before_tensorstore_0_1_14(legacy):
    def change(tree):
        spec(tree)["path"] = spec(tree)["kvstore"].pop("path")

    assert open_checkpoint(edit(legacy, change)).read("target/x").sum() == 66


@pytest.mark.parametrize("compressor", [{"id": "gzip", "level": 1}, {"id": "zstd", "level": 1}, None])
def test_all_codecs_that_t5x_writes_are_read(legacy, compressor):
    at = legacy / "target.x"
    for file in at.iterdir():
        file.unlink()
    metadata = {"shape": [3, 4], "chunks": [3, 2], "dtype": "<f8", "compressor": compressor, "fill_value": None}
    store = ts.open({"driver": "zarr", "kvstore": f"file://{at}/", "metadata": metadata}, create=True).result()
    store.write(np.arange(12.0).reshape(3, 4)).result()

    assert open_checkpoint(str(legacy)).read("target/x").sum() == 66


def test_arrays_inside_the_index_are_read(legacy):
    """T5X's own test data keep everything there, bfloat16 and chunked arrays of Flax included."""

    def change(tree):
        target = tree["optimizer"]["target"]
        target["inlined"] = to_ext(np.arange(5, dtype=np.float32))
        target["scalar"] = msgpack.ExtType(3, to_ext(np.array(2.5, np.float32)).data)
        halves = {"0": to_ext(np.arange(3.0)), "1": to_ext(np.arange(3.0, 6.0))}
        target["big"] = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 3}, "chunks": halves}

    opened = open_checkpoint(edit(legacy, change))

    assert opened.read("target/inlined").tolist() == [0, 1, 2, 3, 4]
    assert opened.read("target/scalar")[()] == 2.5
    assert opened.read("target/big").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_t5x_finds_the_keys_that_it_deletes_on_restore(legacy):
    tree = msgpack.unpackb((legacy / "checkpoint").read_bytes())

    assert tree["version"] == 3
    assert spec(tree)["metadata"]["chunks"] == [3, 4]
    assert spec(tree)["metadata"]["compressor"] == {"id": "zstd", "level": 1}
    assert spec(tree)["kvstore"] == {"driver": "file", "path": "target.x/"}


@pytest.mark.parametrize("options", [{}, {"link": True}, {"sparse": False}, {"codec": "none"}])
@pytest.mark.parametrize("compressor", first_soon(["gzip", "zstd"]))
def test_t5x_restores_a_fusion_whose_chunks_were_taken_over(tmp_path, options, compressor):
    """As t5x/checkpoints.py does it: the index's spec, chunks and compressor deleted, the path made absolute."""
    values = {n: x for n, x in state("t5-1.1", 0).items() if not n.startswith("state/param_states")}
    save(tmp_path / "a", values, "t5x", encoding=Encoding(compressor, 1))
    plan, opened = plan_fusion([str(tmp_path / "a")] * 2, Options(**options))
    out = carry_out(plan, opened, tmp_path / "out")
    tree = msgpack.unpackb((out / "checkpoint").read_bytes())["optimizer"]["target"]
    expected = open_checkpoint(str(out))
    assert (plan.passed_bytes > 0) == (options.get("codec") is None)

    def restore(node, name):
        if "driver" not in node:
            for key, child in node.items():
                restore(child, f"{name}/{key}")
            return
        del node["metadata"]["chunks"], node["metadata"]["compressor"]
        node["kvstore"]["path"] = f"{out}/{node['kvstore']['path']}"
        found = ts.open(node, open=True).result().read().result()
        assert np.array_equal(found, expected.read(name)), name

    restore(tree, "target")


def test_what_t5x_keeps_in_its_index(written):
    tree = msgpack.unpackb((written / "scalable_1_1/seed0/legacy/checkpoint_20/checkpoint").read_bytes())
    opened = open_checkpoint(str(written / "scalable_1_1/seed0/legacy/checkpoint_20"))
    assert tree["version"] == 3

    for name, leaf in opened.leaves.items():
        assert FORMATS["t5x"].keeps_in_index(name, leaf.shape) == (leaf.value is not None), name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.update(version=1), Incompatible, "version 1 of T5X's format"),
        (lambda t: t.pop("version"), Corrupt, "an array's spec of T5X's, in an index without its version"),
        (lambda t: t.update(version=1), Incompatible, "version 1"),
        (lambda t: t.pop("optimizer"), NotFound, "not the index of a T5X checkpoint"),
        (lambda t: spec(t)["kvstore"].update(path="../../elsewhere"), Corrupt, "its path leaves the checkpoint"),
        (lambda t: spec(t)["kvstore"].update(path="/etc"), Corrupt, "its path leaves the checkpoint"),
        (lambda t: spec(t).pop("kvstore"), Corrupt, "names no path"),
        (
            lambda t: spec(t)["metadata"].update(shape=[4, 3]),
            Corrupt,
            r"shape \[4, 3\] in the index, \[3, 4\] in its .zarray",
        ),
        (lambda t: spec(t).update(dtype="float32"), Corrupt, "dtype float32 in the index, float64 in its .zarray"),
        (lambda t: t["optimizer"]["state"].update(step={"__msgpack_chunked_array__": True}), Corrupt, "fit together"),
    ],
)
def test_an_index_that_makes_no_sense_is_refused(legacy, change, error, message):
    with pytest.raises(error, match=message):
        open_checkpoint(edit(legacy, change))


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"not msgpack at all", b"\x81" * 100])
def test_an_index_of_other_bytes_is_refused(legacy, raw):
    (legacy / "checkpoint").write_bytes(raw)

    with pytest.raises((Corrupt, NotFound), match="index|not a tree in msgpack"):
        open_checkpoint(str(legacy))


def test_what_msgpack_holds_itself_is_read(legacy):
    """T5X writes none of it; flax.serialization allows it."""
    more = {"step": 7, "rate": 0.5, "on": True, "name": "a run", "list": [1, 2.0], "none": None, "empty": {}}
    opened = open_checkpoint(edit(legacy, lambda tree: tree["optimizer"]["state"].update(more)))

    assert {name: opened.read(f"state/{name}").item() for name in ("step", "rate", "on", "list/0", "list/1")} == {
        "step": 7,
        "rate": 0.5,
        "on": True,
        "list/0": 1,
        "list/1": 2.0,
    }
    assert {(node.name, node.value_type, node.text) for node in opened.nodes} >= {
        ("state/name", "string", "a run"),
        ("state/none", "None", None),
        ("state/empty", "Dict", None),
    }


def test_a_lost_zarray_is_named_with_its_likely_cause(legacy):
    (legacy / "target.x/.zarray").unlink()

    with pytest.raises(Corrupt, match="target.x/.zarray: missing") as error:
        open_checkpoint(str(legacy))

    assert "dotfiles" in error.value.hint


def test_zarray_that_is_no_json_is_refused(legacy):
    (legacy / "target.x/.zarray").write_text("{]")

    with pytest.raises(Corrupt, match="target/x: not the metadata of an array"):
        open_checkpoint(str(legacy))


def test_the_random_state_of_the_tests_has_t5xs_slots():
    assert {n.rsplit("/", 1)[-1] for n in state("t5-1.1", 0) if n.startswith("state/param")} == {
        "m",
        "v",
        "v_row",
        "v_col",
    }
