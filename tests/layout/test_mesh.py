"""Chunks for a mesh: its rules are Flax's, its shards JAX's, and Orbax reads each chunk once."""

import itertools
import math
import warnings

import numpy as np
import pytest
import tensorstore as ts
from cases import diagonals
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILY_NAMES, SIZES, WIDER, checkpoint, contents, state

from fusectl.errors import Incompatible, UsageError
from fusectl.families.recognition import recognize
from fusectl.families.registry import family_named
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.sink import save
from fusectl.layout.blocks import Block, Layout, Term
from fusectl.layout.fill import Fill
from fusectl.layout.mesh import STANDARD_RULES, Mesh, fits, parse_mesh
from fusectl.operations.fuse import plan_fusion
from fusectl.operations.noise_fill import plan_noise_fill
from fusectl.optimizer.state import slot_axes
from fusectl.planning.chunking import SMALLEST_CHUNK_BYTES, choose_chunks
from fusectl.planning.options import Options
from fusectl.planning.plan import summary
from fusectl.writing.carrying_out import carry_out
from fusectl.writing.journal import digest_of, stamps_of


LAYERS = {"encoder": 1, "decoder": 1}
EVEN = {"vocab": 64, "embed": 16, "heads": 8, "kv": 8, "joined_kv": 64, "mlp": 48, "relpos_buckets": 32}
UNEVEN = {"vocab": 60, "embed": 20, "heads": 6, "kv": 5, "joined_kv": 30, "mlp": 42, "relpos_buckets": 32}
KERNEL = "target/encoder/layers_0/mlp/wi_0/kernel"
AXES = [axis for axis, _ in STANDARD_RULES]
# Counted once for each chunk that a read needs, in the cache or not; Orbax's cache holds nothing.
CHUNK_READS = "/tensorstore/cache/chunk_cache/reads"


def pair(at, sizes=EVEN, other=None, **kwargs):
    every = ((at / "a", 0, sizes), (at / "b", 1, other or sizes))
    return [checkpoint(path, seed=seed, sizes=own, layers=LAYERS, **kwargs) for path, seed, own in every]


def outputs(plan):
    return {output.name: output for output in plan.outputs}


def adam(seed, sizes):
    values = {n: x for n, x in state("t5-1.1", seed, sizes, LAYERS).items() if not n.startswith("state/param_states")}
    slots = {
        name.replace("target/", f"state/param_states/0/{moment}/"): np.square(x) if moment == "nu" else x
        for name, x in values.items()
        if name.startswith("target/")
        for moment in ("mu", "nu")
    }
    return {**values, **slots, "state/param_states/0/count": np.array(20_000, np.int32)}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(AXES), st.sampled_from(["data", "model", None])), max_size=9),
    st.lists(st.sampled_from(AXES), max_size=4, unique=True),
)
def test_axes_are_laid_over_the_mesh_as_flax_does_it(rules, axes):
    from flax.linen import logical_to_mesh_axes

    rules = (*rules, ("batch", "data"), ("length", "model"))

    found = Mesh({"data": 4, "model": 2}, rules).mesh_axes(axes)

    assert found == tuple(logical_to_mesh_axes(axes, rules))


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (None, (None, "model")),
        ("embed=data", ("data", "model")),
        ("embed=model", (None, "model")),
        ("embed=model,embed=data", ("data", "model")),
        ("mlp=", (None, None)),
        ("mlp=none,embed=model", ("model", None)),
    ],
)
def test_the_users_rules_replace_the_standard_ones_and_come_after_them(rules, expected):
    mesh = parse_mesh("data=8,model=4", rules)

    assert mesh.mesh_axes(("embed", "mlp")) == expected
    assert mesh.mesh_axes(("axis0", "axis1")) == (None, None)


@pytest.mark.parametrize(
    ("mesh", "rules", "message"),
    [
        ("4", None, "'4' is no NAME=VALUE"),
        ("", None, "'' is no NAME=VALUE"),
        ("data=8 model=4", None, "is no NAME=VALUE"),
        ("data=8,,model=4", None, "is no NAME=VALUE"),
        ("model=", None, "each axis once"),
        ("model=four", None, "each axis once"),
        ("model=-4", None, "is no NAME=VALUE"),
        ("model=4,model=2", None, "each axis once"),
        ("model=0", None, "size 1 or more"),
        ("modle=4", None, "no rule lays anything over 'modle'"),
        ("model=4", "mpl=model", "no axis is called 'mpl'"),
        ("model=4", "embed=fsdp", "has no axis 'fsdp'"),
        ("model=4", "embed", "'embed' is no NAME=VALUE"),
    ],
)
def test_what_makes_no_mesh_is_a_usage_error(mesh, rules, message):
    with pytest.raises(UsageError) as error:
        parse_mesh(mesh, rules)

    assert message in str(error.value)
    assert error.value.hint


def test_a_mesh_of_one_standard_axis_is_fine_and_so_is_one_of_other_names():
    assert parse_mesh("model=8").shard_shape(("embed", "mlp"), (16, 64)) == (16, 8)
    assert parse_mesh("fsdp=4", "embed=fsdp").shard_shape(("embed", "mlp"), (16, 64)) == (4, 64)


def test_every_axis_that_does_not_divide_is_said_once_with_the_nearest_sizes(tmp_path, fusectl):
    sources = pair(tmp_path, UNEVEN)
    arguments = ["fuse", *sources, "-o", tmp_path / "out", "--mesh", "data=16,model=8", "--axis-rules", "embed=data"]

    done = fusectl(*arguments, "--json")

    error = done.json["error"]
    assert (done.code, error["code"]) == (6, "incompatible")
    assert sorted(error["details"]) == [
        "axis 'embed' of 40 over data=16: data=10 or data=20 would divide",
        "axis 'heads' of 12 over model=8: model=6 or model=12 would divide",
        "axis 'joined_kv' of 60 over model=8: model=6 or model=10 would divide",
        "axis 'mlp' of 84 over model=8: model=7 or model=12 would divide",
        "axis 'vocab' of 60 over model=8: model=6 or model=10 would divide",
    ]
    assert error["hint"] == "--mesh data=10,model=6"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    arguments[arguments.index("data=16,model=8")] = "data=10,model=6"
    assert fusectl(*arguments, "--dry-run").code == 0


def test_the_command_line_says_what_a_device_reads(tmp_path, fusectl):
    fuse = ["fuse", *pair(tmp_path), "-o", tmp_path / "out", "--dry-run"]

    plain, told, without = (
        fusectl(*fuse, *words)
        for words in (["--mesh", "data=2,model=4"], ["--mesh", "model=4", "--json"], ["--axis-rules", "embed=data"])
    )

    assert "mesh         data=2,model=4: each device reads " in plain.out
    mesh = told.json["result"]["plan"]["mesh"]
    assert mesh["axes"] == {"model": 4}
    assert ["mlp", "model"] in mesh["rules"]
    assert mesh["bytes_per_device"] > 0
    assert (without.code, "of which mesh?" in without.err) == (2, True)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_chunks_divide_shards_for_any_shape_mesh_blocks_and_budget(data):
    rank = data.draw(st.integers(1, 3))
    devices = [data.draw(st.sampled_from([1, 2, 3, 4, 7, 8])) for _ in range(rank)]
    shard = [data.draw(st.sampled_from([1, 2, 12, 64, 127, 1000, 1021])) for _ in range(rank)]
    shape = tuple(s * d for s, d in zip(shard, devices))
    edges = [sorted(data.draw(st.sets(st.integers(0, n), max_size=3)) | {0, n}) for n in shape]
    parts = [[range(*two) for two in itertools.pairwise(each)] for each in edges]
    blocks = tuple(Block(at, (Term(0, "x", at),)) for at in zip(*parts))
    source = data.draw(st.none() | st.tuples(*(st.integers(1, 2 * n) for n in shape)))
    budget = data.draw(st.sampled_from([1, 1 << 24, 1 << 30]))

    chunks = choose_chunks(Layout(("a",) * rank, shape, "float32", blocks), source, budget, shard)

    assert all(s % c == 0 for s, c, d in zip(shard, chunks, devices) if d > 1)
    assert fits(chunks, shard, shape)
    assert math.prod(chunks) * 4 <= max(SMALLEST_CHUNK_BYTES, budget // 12)


def test_a_large_tensor_is_not_cut_into_slivers():
    """A shard of a prime length is kept whole, and the other axis is cut."""
    shape, shard = (4 * 8009, 1024), (8009, 1024)

    chunks = choose_chunks(Layout(("vocab", "embed"), shape, "float32", ()), (5000, 1024), 1 << 28, shard)

    assert chunks[0] == 8009
    assert chunks[1] >= 128


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("sizes", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_no_chunk_of_any_family_is_cut_by_two_shards(tmp_path, family, sizes):
    path = checkpoint(tmp_path / "a", family, sizes=sizes, layers=LAYERS)
    meshes = {"even": ["model=8", "data=4,model=2", "data=2,model=16"], "uneven": ["model=12", "data=8,model=4"]}
    ways = itertools.product([2, 4], meshes["even" if sizes is EVEN else "uneven"], [None, "embed=data"])
    for copies, mesh, rules in ways:
        if rules and "data" not in mesh:
            continue
        options = Options(arch=family, mesh=parse_mesh(mesh, rules), optimizer="reset")
        plan, (source, *_) = plan_fusion([path] * copies, options)

        tree = recognize(source.shapes, "", family)
        sizes_of = options.mesh.sizes
        for name, output in outputs(plan).items():
            parameter = name.removeprefix("target/")
            # By the table, and not by what the plan says.
            axes = tree.rows[parameter].spec.axes if parameter in tree.rows else ()
            if name.endswith("/v") and output.layout.shape != (1,):
                axes = tree.rows[name.removeprefix("state/param_states/").removesuffix("/v")].spec.axes
            over = {"embed": "data" if rules else "", "kv": "", "relpos_buckets": "", "layers": ""}
            for axis, n, chunk in zip(axes, output.layout.shape, output.chunks):
                devices = sizes_of.get(over.get(axis, "model"), 1)
                assert devices == 1 or n // devices % chunk == 0, (name, axis, n, chunk, devices)


@pytest.mark.slow
@pytest.mark.parametrize(("format", "fill"), [("t5x", Fill("gaussian", 0.1, 3)), ("orbax", Fill())])
def test_the_values_are_the_same_with_any_mesh(tmp_path, format, fill):
    """Sources of unequal widths: shards cut through blocks, and blocks through shards."""
    sources = pair(tmp_path, SIZES, WIDER)
    meshes = [
        None,
        parse_mesh("data=13,model=5", "embed=data,vocab=,mlp="),
        parse_mesh("model=3", "vocab=,heads=,joined_kv="),
    ]
    found, chunks = [], []
    for i, mesh in enumerate(meshes):
        plan, opened = plan_fusion(sources, Options(format=format, fill=fill, mesh=mesh))
        carry_out(plan, opened, tmp_path / f"out{i}")
        found.append(contents(tmp_path / f"out{i}"))
        chunks.append(outputs(plan)[KERNEL].chunks)

    assert found[0] == found[1] == found[2]
    assert len(set(chunks)) == 3
    assert (chunks[1][0], chunks[2][1]) == (2, 16)


def test_chunks_are_taken_over_where_they_fit_and_only_there(tmp_path):
    sources = pair(tmp_path)

    plain, fitting, cut = (
        outputs(plan_fusion(sources, Options(mesh=mesh))[0])[KERNEL]
        for mesh in (None, parse_mesh("data=2,model=2"), parse_mesh("data=2,model=4"))
    )

    assert plain.passed == fitting.passed
    assert plain.chunks == fitting.chunks == (16, 48)
    assert len(plain.passed) == 2
    assert (len(cut.passed), cut.chunks) == (0, (16, 24))


def test_a_plan_whose_chunks_are_cut_contradicts_itself(tmp_path):
    from dataclasses import replace

    plan, _ = plan_fusion(pair(tmp_path), Options())

    with pytest.raises(Incompatible) as error:
        replace(plan, mesh=parse_mesh("model=4")).check()

    assert any(line.startswith(f"{KERNEL}: chunks [16, 48] do not fit shards [32, 24]") for line in error.value.details)


@pytest.mark.parametrize("optimizer", ["carry", "reset"])
def test_slots_of_a_parameters_shape_are_cut_like_it_and_all_others_are_not(tmp_path, optimizer):
    for name in ("a", "b"):
        save(tmp_path / name, adam(0, EVEN), "orbax")
    mesh = parse_mesh("data=2,model=4", "embed=data")
    options = Options(mesh=mesh, optimizer=optimizer)

    plan, opened = plan_fusion([str(tmp_path / "a")] * 2, options)
    carry_out(plan, opened, tmp_path / "out")
    noisy, _ = plan_noise_fill(str(tmp_path / "out"), Options(mesh=mesh, fill=Fill("gaussian", 0.1, 0)))

    for found in (outputs(plan), outputs(noisy)):
        for moment in ("mu", "nu"):
            slot = found[KERNEL.replace("target/", f"state/param_states/0/{moment}/")]
            assert slot.layout.axes == ("embed", "mlp")
            assert 16 % slot.chunks[0] == 24 % slot.chunks[1] == 0
        assert found["state/param_states/0/count"].layout.axes == ()


def test_adafactors_rows_and_columns_have_no_names_that_a_rule_could_lay_over_a_mesh():
    family = family_named("t5-1.1")
    shapes = {n: x.shape for n, x in state(family.name, 0, EVEN, LAYERS).items() if n.startswith("target/")}
    tree = recognize(shapes, "", family.name)
    slot = KERNEL.replace("target/", "state/param_states/")

    assert slot_axes(f"{slot}/v", (16, 48), tree, tree.shapes) == ("embed", "mlp")
    assert slot_axes(f"{slot}/v_row", (16,), tree, tree.shapes) == ("axis0",)
    assert slot_axes(f"{slot}/v", (1,), tree, tree.shapes) == ("axis0",)
    assert slot_axes("state/param_states/0/count", (), tree, tree.shapes) == ()


def test_a_share_that_cuts_heads_is_said(tmp_path):
    sources = pair(tmp_path)

    notes = [plan_fusion(sources, Options(mesh=parse_mesh(f"model={n}", "heads=")))[0].notes for n in (16, 32)]

    said = "mesh model=32: a device's 4 of joined_kv are no whole heads of 8: JAX allows it"
    assert [said in each for each in notes] == [False, True]


def test_another_mesh_is_another_plan_to_resume(tmp_path):
    sources = pair(tmp_path)
    plans = [plan_fusion(sources, Options(mesh=mesh)) for mesh in (None, parse_mesh("data=2"), parse_mesh("data=4"))]

    assert len({tuple(output.chunks for output in plan.outputs) for plan, _ in plans}) == 1
    assert len({digest_of(plan, stamps_of(opened), allow_nonfinite=False) for plan, opened in plans}) == 3
    assert summary(plans[0][0])["mesh"] is None


def metric(name):
    return sum(value["value"] for found in ts.experimental_collect_matching_metrics(name) for value in found["values"])


def sharded(path, shape):
    """For every tensor, what JAX makes of T5X's rules: by the family's table, not by the plan."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    opened = open_checkpoint(path)
    tree = recognize(opened.shapes, path)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), ("data", "model"))

    def sharding(name):
        parameter = name.removeprefix("target/").removeprefix("state/param_states/")
        whole = parameter.removesuffix("/v") if opened.shapes[name] != (1,) else ""
        axes = tree.rows[whole].spec.axes if whole in tree.rows else ()
        spec = PartitionSpec(*(("model" if a in {"vocab", "mlp", "heads", "joined_kv"} else None) for a in axes))
        return NamedSharding(mesh, spec)

    return opened, {name: sharding(name) for name in opened.leaves}


def restored(path, shape):
    """How often unmodified Orbax reads a chunk when it restores a checkpoint onto a mesh, and how many there are."""
    import jax
    import orbax.checkpoint as ocp

    opened, shardings = sharded(path, shape)
    target: dict = {}
    for name, leaf in opened.leaves.items():
        node = target
        for key in leaf.keys[:-1]:
            node = node.setdefault(key.name, {})
        node[leaf.keys[-1].name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = metric(CHUNK_READS)
        tree = ocp.StandardCheckpointer().restore(f"{path}/state", target)
        reads = metric(CHUNK_READS) - before
    values = {"/".join(key.key for key in keys): x for keys, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
    assert values.keys() == opened.leaves.keys()
    for name, x in values.items():
        assert x.sharding == shardings[name]
        assert np.asarray(x).tobytes() == opened.read(name).tobytes()
    return reads, sum(math.prod(leaf.stored.grid) for leaf in opened.leaves.values())


# What Orbax reads of chunks that were not cut for the mesh, at least, as multiples of them.
WITHOUT = {(8, 1): 1.0, (4, 2): 1.0, (2, 4): 1.3, (1, 8): 2.5}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "shape"),
    diagonals(["orbax", "orbax-zarr3", "orbax-zarr2"], list(WITHOUT)),
)
def test_orbax_restores_it_onto_the_mesh_and_reads_every_chunk_once(tmp_path, format, shape):
    """Without --mesh what shards cut is read again for each of them; what is replicated Orbax reads once for all."""
    sources = pair(tmp_path, format=format)
    for name, mesh in (("plain", None), ("on", Mesh(dict(zip(("data", "model"), shape))))):
        plan, opened = plan_fusion(sources, Options(mesh=mesh))
        carry_out(plan, opened, tmp_path / name / "20")

    reads, chunks = restored(str(tmp_path / "on/20"), shape)
    reads_without, chunks_without = restored(str(tmp_path / "plain/20"), shape)

    assert reads == chunks
    assert reads_without >= WITHOUT[shape] * chunks_without


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 4), (1, 8), (8, 1)])
def test_each_device_reads_the_bytes_that_the_plan_says_and_no_others(tmp_path, shape):
    """Every device for itself, as on hosts of their own; uncompressed, so that bytes can be counted."""
    import jax

    mesh = Mesh(dict(zip(("data", "model"), shape)))
    sources = pair(tmp_path, format="orbax-zarr2")
    read = {}
    for name, on in (("on", mesh), ("plain", None)):
        plan, opened = plan_fusion(sources, Options(codec="none", mesh=on))
        carry_out(plan, opened, tmp_path / name / "20")
        found, shardings = sharded(str(tmp_path / name / "20"), shape)
        read[name] = []
        for device in jax.devices():
            arrays = {
                leaf: ts.open(
                    {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{tmp_path}/{name}/20/state/{at}"}},
                    context=ts.Context(),
                    read=True,
                ).result()
                for leaf, at in ((leaf, leaf.replace("/", ".")) for leaf in found.leaves)
            }
            before = metric("/tensorstore/kvstore/file/bytes_read")
            for leaf, array in arrays.items():
                array[shardings[leaf].devices_indices_map(array.shape)[device]].read().result()
            read[name].append(metric("/tensorstore/kvstore/file/bytes_read") - before)
        if on is not None:
            assert read["on"] == [plan.bytes_per_device] * 8

    assert all(a <= b for a, b in zip(read["on"], read["plain"]))
    assert shape == (8, 1) or sum(read["plain"]) > 1.5 * sum(read["on"])
