"""The contract of every format: what is written is read back, by fusectl and by Orbax itself."""

import json
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from cases import diagonals, some_soon
from models import checkpoint, state

from fusectl.errors import Corrupt
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.registry import FORMATS
from fusectl.formats.sink import save
from fusectl.formats.store import directory, ocdbt
from fusectl.layout.blocks import tiles
from fusectl.operations.fuse import plan_fusion
from fusectl.planning.options import Options
from fusectl.writing.carrying_out import carry_out


ORBAX = [name for name in FORMATS if name != "t5x"]


def values_of(path):
    opened = open_checkpoint(str(path))
    return {name: opened.read(name) for name in opened.leaves}


def assert_equal(expected, found):
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        assert values.dtype == found[name].dtype, name
        assert np.array_equal(values, np.asarray(found[name])), name


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_read_back(tmp_path, name):
    expected = state("t5-1.1", 0)
    expected["target/half"] = expected.pop("target/token_embedder/embedding").astype(ml_dtypes.bfloat16)
    expected["target/double"] = np.linspace(0, 1, 7)

    save(tmp_path / "checkpoint_7", expected, name)

    assert_equal(expected, values_of(tmp_path / "checkpoint_7"))
    assert open_checkpoint(str(tmp_path / "checkpoint_7")).format == name


@pytest.mark.parametrize("name", FORMATS)
def test_regions_and_ragged_chunks_are_read_as_they_were_written(tmp_path, name):
    values = np.random.default_rng(0).normal(size=(7, 11)).astype(np.float32)
    save(tmp_path / "c", {"target/x": values}, name, chunks={"target/x": (3, 4)})
    opened = open_checkpoint(str(tmp_path / "c"))

    for region in tiles((7, 11), (5, 2)):
        assert np.array_equal(opened.read("target/x", region), values[tuple(slice(r.start, r.stop) for r in region)])
    assert opened.leaves["target/x"].chunks == (3, 4)


def lose_a_chunk(at, format):
    """Deletes chunk (1, 0) of target/x the way a lost object or a partial copy would."""
    base = at if format.name == "t5x" else at / "state"
    store = ts.KvStore.open(ocdbt(str(base)) if format.ocdbt else directory(str(base))).result()
    lost = next(key for key in store.list().result() if key in {b"target.x/1.0", b"target.x/c/1/0"})
    store.write(lost, None).result()


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_chunk_is_never_read_as_zeros(tmp_path, name):
    values = np.ones((6, 6), np.float32)
    save(tmp_path / "c", {"target/x": values, "target/y": values}, name, chunks={"target/x": (3, 3)})
    lose_a_chunk(tmp_path / "c", FORMATS[name])
    opened = open_checkpoint(str(tmp_path / "c"))

    assert len(opened.missing_chunks("target/x")) == 1
    assert opened.missing_chunks("target/y") == []
    with pytest.raises(Corrupt, match="target/x: data is missing"):
        opened.read("target/x")


@pytest.mark.parametrize(
    ("name", "made"),
    some_soon(
        diagonals(list(ORBAX), ["saved", "copied", "linked", "sparse"]),
        lambda case: case == ("orbax-ocdbt-zarr3", "copied"),
    ),
)
def test_orbax_restores_it_without_a_target_and_onto_eight_devices(tmp_path, name, made):
    import jax
    import orbax.checkpoint as ocp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    path = str(tmp_path / "root" / "20")
    if made == "saved":
        checkpoint(Path(path), format=name, sizes={**SIXTEENS}, seed=3)
    else:
        sources = [checkpoint(tmp_path / f"of{seed}", format=name, sizes=SIXTEENS, seed=seed) for seed in (3, 4)]
        plan, opened = plan_fusion(sources, Options(link=made == "linked", sparse=made == "sparse"))
        assert plan.passed_bytes > 0
        carry_out(plan, opened, Path(path))
    expected = values_of(path)
    assert len(jax.devices()) == 8
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))

    def sharded(x):
        divides = [axis if n % k == 0 else None for n, (axis, k) in zip(x.shape, (("data", 4), ("model", 2)))]
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*divides)))

    def check(tree):
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        assert_equal(expected, {"/".join(key.key for key in keys): value for keys, value in leaves})

    item = f"{path}/state"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = ocp.PyTreeCheckpointer().restore(item)
        check(plain)
        check(ocp.StandardCheckpointer().restore(item))
        target = jax.tree.map(sharded, plain)
        onto_mesh = ocp.StandardCheckpointer().restore(item, target)
        check(onto_mesh)
        assert len(onto_mesh["target"]["token_embedder"]["embedding"].sharding.device_set) == 8
        arguments = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape), target)
        check(ocp.PyTreeCheckpointer().restore(item, restore_args=arguments))
        with ocp.CheckpointManager(tmp_path / "root", item_names=("state",)) as manager:
            assert manager.latest_step() == 20
            restore = ocp.args.StandardRestore
            check(manager.restore(20, args=ocp.args.Composite(state=restore()))["state"])
            check(manager.restore(20, args=ocp.args.Composite(state=restore(target)))["state"])


SIXTEENS = {"vocab": 64, "embed": 16, "heads": 4, "kv": 8, "joined_kv": 32, "mlp": 48, "relpos_buckets": 32}


@pytest.mark.parametrize("name", ["orbax", "orbax-zarr3"])
def test_unmodified_orbax_notices_a_flipped_bit_in_zarr_v3(tmp_path, name):
    import orbax.checkpoint as ocp

    rng = np.random.default_rng(0)
    save(tmp_path / "c", {"target/x": rng.normal(size=(64, 64)).astype(np.float32)}, name)
    data = max((p for p in (tmp_path / "c/state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception, match="DATA_LOSS|CRC|crc|[Dd]igest"):
            ocp.PyTreeCheckpointer().restore(tmp_path / "c/state")
    with pytest.raises(Corrupt, match="target/x: cannot be decoded"):
        open_checkpoint(str(tmp_path / "c")).read("target/x")


@pytest.mark.parametrize("saver", ["pytree", "standard", "manager"])
def test_what_orbax_itself_writes_is_read(tmp_path, saver):
    import orbax.checkpoint as ocp

    tree = {"params": {"a.b/c": np.arange(6.0).reshape(2, 3), "d": [np.ones(3), None, np.int32(4)]}, "empty": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if saver == "pytree":
            ocp.PyTreeCheckpointer().save(tmp_path / "c", tree)
        elif saver == "standard":
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "c", tree)
        else:
            with ocp.CheckpointManager(tmp_path / "root") as manager:
                manager.save(5, args=ocp.args.StandardSave(tree))
    opened = open_checkpoint(str(tmp_path / ("root/5" if saver == "manager" else "c")))

    assert opened.shapes == {"params/a.b/c": (2, 3), "params/d/0": (3,), "params/d/2": ()}
    assert np.array_equal(opened.read("params/a.b/c"), tree["params"]["a.b/c"])
    assert int(opened.read("params/d/2")[()]) == 4
    assert {tuple(key.name for key in node.keys) for node in opened.nodes} == {("params", "d", "1"), ("empty",)}
    assert [key.kind for key in opened.leaves["params/d/0"].keys] == [2, 2, 1]


def test_both_commit_markers_and_the_item_are_where_t5x_and_orbax_look(tmp_path):
    save(tmp_path / "20", state("t5-1.1", 0), "orbax")

    assert (tmp_path / "20/commit_success.txt").is_file()
    assert (tmp_path / "20/state/commit_success.txt").is_file()
    assert (tmp_path / "20/state/manifest.ocdbt").is_file()
    meta = json.loads((tmp_path / "20/_CHECKPOINT_METADATA").read_text())
    assert meta["item_handlers"]["state"].endswith("PyTreeCheckpointHandler")
    assert meta["commit_timestamp_nsecs"] >= meta["init_timestamp_nsecs"] > 0


def test_metadata_that_is_not_json_is_named(tmp_path):
    save(tmp_path / "20", state("t5-1.1", 0), "orbax")
    (tmp_path / "20/state/_METADATA").write_text("{")

    with pytest.raises(Corrupt, match="_METADATA: not JSON"):
        open_checkpoint(str(tmp_path / "20"))
