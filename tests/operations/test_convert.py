"""fusectl convert: what comes back is what went in, between all formats, kinds of key and layouts of the layers."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
from cases import first_soon
from models import SIZES, checkpoint, contents, ends_at, state, write_record
from written import FACTORED, restored, tree, written_by_orbax

import fusectl.planning.plan
from fusectl.errors import Incompatible, NotEnoughSpace, UsageError
from fusectl.families.recognition import recognize
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.record import crc32_of
from fusectl.formats.registry import FORMATS
from fusectl.formats.sink import save
from fusectl.formats.tree import Checkpoint, Key
from fusectl.layout.blocks import whole
from fusectl.layout.fill import Fill
from fusectl.operations.convert import plan_conversion
from fusectl.operations.fuse import plan_fusion
from fusectl.operations.noise_fill import plan_noise_fill
from fusectl.planning.options import Options
from fusectl.restart import restart
from fusectl.verification import Settings, verify
from fusectl.writing.carrying_out import carry_out


# Large enough for both layouts of the layers to factor the same kernels: T5X does so from 128 on, or by their axes.
SCANNED = ["scalable-t5-1.1-scanned", "scalable-t5-1.0-scanned"]


def convert(path, out, layers=None, **options):
    plan, sources = plan_conversion(str(path), Options(**options), layers)
    carry_out(plan, sources, Path(out))
    return out


def proved(path):
    """The report of the levels that compare values; they need no JAX."""
    return verify(path, settings=Settings(levels=("files", "weights")))


def odd_tree():
    """Tuples, lists, None, empty nodes, keys with slashes and dots, scalars, bfloat16: what trainers have in theirs."""
    rng = np.random.default_rng(5)

    def array(*shape, dtype=np.float32):
        return rng.normal(size=shape).astype(dtype)

    return {
        "params": {"params": {"a": array(7, 5), "b.c": array(3), "d/e": {"w": array(4, 4)}}},
        "opt_state": [{"count": np.array(3, np.int32), "mu": (array(2), array(3))}, None, {}, [], (array(1),)],
        "step": np.array(9, np.int32),
    }


# All pairs; in the suite itself those of the formats that T5X writes.
SOON = {("t5x", "orbax-ocdbt-zarr3"), ("orbax-zarr2", "t5x")}
PAIRS = [pytest.param(a, b, marks=() if (a, b) in SOON else pytest.mark.slow) for a in FORMATS for b in FORMATS]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_there_and_back_is_the_same_to_the_bit(tmp_path, a, b):
    source = checkpoint(tmp_path / "source", format=a, seed=1, layers={"encoder": 1, "decoder": 1})

    there = convert(source, tmp_path / "there", format=b)
    back = convert(there, tmp_path / "back", format=a)

    assert open_checkpoint(str(there)).format == b
    assert contents(there) == contents(source)
    assert contents(back) == contents(source)
    assert tree(back) == tree(source)


@pytest.mark.parametrize(("a", "b"), [pair for pair in PAIRS if pair.values[0] != "t5x"])
def test_keys_of_every_kind_come_back(tmp_path, a, b):
    import jax

    source = written_by_orbax(tmp_path / "source/20", odd_tree(), a)

    there = convert(source, tmp_path / "there", format=b)
    back = convert(there, tmp_path / "back", format=a)

    assert tree(back) == tree(source)
    item, leaves, empty = tree(source)
    assert len(leaves) == 8
    assert {kind for _, kind in empty} == {"None", "Dict", "List"}
    one, two = restored(source / item), restored(Path(back) / item)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(two)))


@pytest.mark.slow
def test_empty_nodes_of_a_t5x_index_are_kept(tmp_path):
    """Flax refuses to restore optax's chain without them."""
    source = checkpoint(tmp_path / "a")
    index = Path(source) / "checkpoint"
    packed = msgpack.unpackb(index.read_bytes(), strict_map_key=False)
    packed["optimizer"]["state"]["more"] = {"1": {}, "2": None}
    index.write_bytes(msgpack.packb(packed))

    for name, made in {
        "fused": plan_fusion([source, source], Options()),
        "converted": plan_conversion(source, Options()),
        "there": plan_conversion(source, Options(format="orbax")),
    }.items():
        carry_out(*made, tmp_path / name)
    convert(tmp_path / "there", tmp_path / "back", format="t5x")

    for name in ("fused", "converted", "back"):
        found = msgpack.unpackb((tmp_path / name / "checkpoint").read_bytes(), strict_map_key=False)
        assert found["optimizer"]["state"]["more"] == {"1": {}, "2": None}


@pytest.mark.slow
@pytest.mark.parametrize("format", ["t5x", "orbax"])
@pytest.mark.parametrize("family", SCANNED)
def test_layers_are_unstacked_and_stacked_again(tmp_path, family, format):
    source = checkpoint(tmp_path / "source", family, sizes=FACTORED, format=format)

    apart = convert(source, tmp_path / "apart", "unscanned")
    back = convert(apart, tmp_path / "back", "scanned")

    assert contents(back) == contents(source)
    assert tree(back) == tree(source)
    stacked, layers = open_checkpoint(source), open_checkpoint(str(apart))
    for prefix, suffix in (("target/", ""), ("state/param_states/", "/v_row"), ("state/param_states/", "/v_col")):
        # (embed, layers, mlp); the rows are (embed, layers), the columns (layers, mlp).
        whole = stacked.read(f"{prefix}encoder/encoder/mlp/wo/kernel{suffix}")
        axis = {"": 1, "/v_row": 0, "/v_col": 1}[suffix]
        for i in range(2):
            one = layers.read(f"{prefix}encoder/layers_{i}/mlp/wo/kernel{suffix}")
            np.testing.assert_array_equal(one, whole.take(i, axis))


def adam(family, seed):
    values = {k: v for k, v in state(family, seed, FACTORED).items() if not k.startswith("state/param_states/")}
    rng = np.random.default_rng(seed)
    for name in [name for name in values if name.startswith("target/")]:
        for moment in ("mu", "nu"):
            slot = name.replace("target/", f"state/param_states/0/{moment}/")
            values[slot] = rng.uniform(1e-6, 1e-4, values[name].shape).astype(np.float32)
    values["state/param_states/0/count"] = np.array(7, np.int32)
    return values


@pytest.mark.slow
def test_adams_moments_go_along(tmp_path):
    values = adam("scalable-t5-1.1-scanned", 0)
    save(tmp_path / "a", values, "t5x")

    apart = convert(tmp_path / "a", tmp_path / "apart", "unscanned")
    back = convert(apart, tmp_path / "back", "scanned")

    assert contents(back) == contents(tmp_path / "a")
    mu = values["state/param_states/0/mu/encoder/encoder/mlp/wi_0/kernel"]
    found = open_checkpoint(str(apart)).read("state/param_states/0/mu/encoder/layers_1/mlp/wi_0/kernel")
    np.testing.assert_array_equal(found, mu[:, 1])
    assert proved(str(apart)).passed


@pytest.mark.slow
def test_fusing_and_restacking_commute(tmp_path):
    sources = [checkpoint(tmp_path / f"{i}", SCANNED[0], seed=i, sizes=FACTORED) for i in range(2)]
    carry_out(*plan_fusion(sources, Options()), tmp_path / "fused")

    one = convert(tmp_path / "fused", tmp_path / "one", "unscanned")
    apart = [convert(source, f"{source}.apart", "unscanned") for source in sources]
    carry_out(*plan_fusion(apart, Options()), tmp_path / "two")

    assert contents(one) == contents(tmp_path / "two")


@pytest.mark.parametrize("format", first_soon(["t5x", "orbax"]))
@pytest.mark.parametrize(
    "name", ["target/decoder/layers_0/mlp/wo/kernel", "state/param_states/decoder/decoder_norm/scale/v", "state/step"]
)
def test_a_conversion_is_held_against_its_source(tmp_path, format, name):
    source = checkpoint(tmp_path / "a", format="t5x")
    out = convert(source, tmp_path / "out", format=format)
    assert verify(str(out)).passed

    values = state("t5-1.1", 0)
    # As little as can be.
    values[name].reshape(-1).view(np.uint8)[0] ^= 1
    save(Path(source), values, "t5x", force=True)

    problems = list(verify(str(out)).failures())
    assert any(f"{name}: 1 values are not those of" in problem for problem in problems), problems


TAMPERED = {
    "nodes of the index": (
        "t5x",
        lambda at, record: changed_index(at, lambda state: state["opt_state"].pop("1")),
    ),
    "a node more": ("t5x", lambda at, record: changed_index(at, lambda state: state.update(more={}))),
    "no origin": ("t5x", lambda at, record: record.update(origin=None)),
    "another item": ("t5x", lambda at, record: record["origin"].update(item="other")),
    "lists as dicts": (
        "orbax",
        lambda at, record: changed_metadata(at, lambda text: text.replace('"key_type": 1', '"key_type": 2')),
    ),
    "other weights": ("orbax", lambda at, record: record.update(norm="property")),
    "another fill": ("orbax", lambda at, record: record["fill"].update(kind="gaussian", noise_scale=0.1)),
}


def changed_index(at, change):
    index = msgpack.unpackb((at / "checkpoint").read_bytes(), strict_map_key=False)
    change(index["optimizer"])
    (at / "checkpoint").write_bytes(msgpack.packb(index))


def changed_metadata(at, change):
    (at / "items/_METADATA").write_text(change((at / "items/_METADATA").read_text()))


@pytest.mark.parametrize("what", TAMPERED)
def test_a_copy_that_was_tampered_with_fails(tmp_path, what):
    """With checksums that fit: only the source tells."""
    format, change = TAMPERED[what]
    out = convert(written_by_orbax(tmp_path / "source/20", odd_tree(), "orbax"), tmp_path / "out", format=format)
    assert proved(str(out)).passed

    record = json.loads((out / "fusectl.json").read_bytes())
    change(out, record)
    index = "checkpoint" if format == "t5x" else "items/_METADATA"
    record["files"][index] = crc32_of((out / index).read_bytes())
    write_record(out, record)

    assert not proved(str(out)).passed
    assert not verify(str(out), settings=Settings(levels=("algebra",))).passed


@pytest.mark.parametrize("change", ["lost", "more", "keys", "empty"])
def test_what_is_no_tensor_of_the_family_is_compared_too(tmp_path, change):
    """By the record's own checksums nothing is wrong: the other tree is its source's."""
    values = odd_tree()
    source = written_by_orbax(tmp_path / "source/20", values, "orbax")
    out = convert(source, tmp_path / "out", format="orbax-zarr2")
    assert proved(str(out)).passed

    if change == "lost":
        del values["params"]["params"]["a"]
    elif change == "more":
        values["more"] = np.ones(3)
    elif change == "keys":
        values["opt_state"] = (*tuple(values["opt_state"][:1]), None, {}, [], [np.ones(1, np.float32)])
    else:
        values["opt_state"][1] = {}
    shutil.rmtree(tmp_path / "source")
    written_by_orbax(tmp_path / "source/20", values, "orbax")

    assert not proved(str(out)).passed


@pytest.mark.slow
def test_a_fusion_stays_a_fusion(tmp_path):
    sources = [checkpoint(tmp_path / f"{i}", SCANNED[0], seed=i, sizes=FACTORED) for i in range(2)]
    options = Options(fill=Fill("gaussian", 0.1, 3), norm="property", dtype="bfloat16", optimizer="reset")
    carry_out(*plan_fusion(sources, options), tmp_path / "fused")
    fused = open_checkpoint(str(tmp_path / "fused")).record

    other = convert(tmp_path / "fused", tmp_path / "other", format="orbax", step=77, dtype="float32")
    apart = convert(tmp_path / "fused", tmp_path / "apart", "unscanned")
    back = convert(apart, tmp_path / "back", "scanned")

    for out, layers in ((other, None), (apart, "unscanned"), (back, "scanned")):
        record = open_checkpoint(str(out)).record
        assert (record.command, record.made.layers) == ("convert", layers)
        for what in ("weights", "widths", "norm", "norm_groups", "residual_scales", "optimizer"):
            assert getattr(record, what) == getattr(fused, what), what
        # Those have their layers in the other layout.
        assert record.sources == (() if layers else fused.sources)
        # The field of noise is laid out by a tensor's shape.
        assert record.fill == replace(fused.fill, seed=None if layers else 3)
        assert "norm_groups = (128, 128)" in restart(str(out)).text()
        assert proved(str(out)).passed
    assert open_checkpoint(str(other)).step == 77


@pytest.mark.slow
@pytest.mark.parametrize("drop", first_soon([False, True]))
@pytest.mark.parametrize("layers", [None, "unscanned"])
@pytest.mark.parametrize("optimizer", ["carry", "reset", "drop", "asymmetric", "none"])
def test_any_source_is_converted_and_proved(tmp_path, optimizer, layers, drop):
    """Widths of 64, which T5X factors only once they are fused, but for the scanned ones."""
    sources = [checkpoint(tmp_path / f"{i}", SCANNED[0], seed=i, sizes=FACTORED) for i in range(2)]
    path = sources[0]
    if optimizer != "none":
        carry_out(*plan_fusion(sources, Options(optimizer=optimizer)), tmp_path / "fused")
        path = tmp_path / "fused"

    out = convert(path, tmp_path / "out", layers, optimizer="drop" if drop else "carry")

    assert proved(str(out)).passed
    opened = open_checkpoint(str(out))
    has_state = any(name.startswith("state/param_states/") for name in opened.leaves)
    assert has_state == (not drop and optimizer != "drop")
    assert opened.record.optimizer == ("drop" if not has_state else "kept" if optimizer == "none" else optimizer)


def test_parameters_are_cast_and_nothing_else(tmp_path):
    source = checkpoint(tmp_path / "a")

    out = convert(source, tmp_path / "out", dtype="bfloat16")

    before, after = open_checkpoint(source), open_checkpoint(str(out))
    assert {leaf.dtype for name, leaf in after.leaves.items() if name.startswith("target/")} == {"bfloat16"}
    rest = [name for name in before.leaves if not name.startswith("target/")]
    values, kept = contents(source), contents(out)
    assert all(values[name] == kept[name] for name in rest)
    kernel = "target/encoder/layers_0/mlp/wo/kernel"
    np.testing.assert_array_equal(after.read(kernel), before.read(kernel).astype(after.read(kernel).dtype))
    assert proved(str(out)).passed


def test_the_optimizer_and_the_step(tmp_path):
    source = checkpoint(tmp_path / "a")

    out = convert(source, tmp_path / "out", optimizer="drop", step=0)

    opened = open_checkpoint(str(out))
    assert opened.step == 0
    assert not [name for name in opened.leaves if name.startswith("state/param_states/")]
    assert proved(str(out)).passed
    index = msgpack.unpackb((tmp_path / "out/checkpoint").read_bytes(), strict_map_key=False)
    assert "param_states" not in index["optimizer"]["state"]


@pytest.mark.slow
def test_the_step_of_a_fusion_is_set(tmp_path, fusectl):
    source = checkpoint(tmp_path / "a")
    for words in (["fuse", source, source], ["self-fuse", source]):
        done = fusectl(*words, "-o", tmp_path / words[0], "--step", "500000")
        assert done.code == 0
        assert open_checkpoint(str(tmp_path / words[0])).step == 500_000
    assert proved(str(tmp_path / "self-fuse")).passed
    filled = plan_noise_fill(str(tmp_path / "self-fuse"), Options(fill=Fill("gaussian", 0.1, 0)))
    carry_out(*filled, tmp_path / "filled")
    assert open_checkpoint(str(tmp_path / "filled")).step == 500_000
    assert proved(str(tmp_path / "filled")).passed


def test_what_cannot_be_converted_is_refused_before_a_byte_is_written(tmp_path, fusectl):
    minimal, scanned = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b", SCANNED[0])
    odd = written_by_orbax(tmp_path / "odd/20", odd_tree(), "orbax")
    for words, code, says in (
        ((minimal, "--scan"), 6, "has one layout of its layers only"),
        ((minimal, "--unscan"), 6, "unscanned already"),
        ((scanned, "--scan"), 6, "scanned already"),
        # Of 12 and 22: factored with its layers, and without them not.
        ((scanned, "--unscan"), 6, "Adafactor factors it in one layout"),
        ((odd, "--dtype", "bfloat16"), 6, "matches no model family"),
        ((odd, "--scan"), 6, "matches no model family"),
        ((minimal, "--step", "-1"), 2, "a training step"),
        ((minimal, "--step", "3000000000"), 2, "a training step"),
        ((minimal, "--format", "hdf5"), 2, "hdf5"),
        ((odd, "--mesh", "model=7"), 6, "matches no model family"),
    ):
        done = fusectl("convert", *words, "-o", tmp_path / "out")
        assert (done.code, says in done.err) == (code, True), done.err
        assert not (tmp_path / "out").exists()
    assert fusectl("convert", scanned, "--unscan", "--drop-optimizer", "-o", tmp_path / "out").code == 0


@pytest.mark.slow
def test_a_conversion_has_no_zero_blocks_to_fill(tmp_path):
    out = convert(checkpoint(tmp_path / "a"), tmp_path / "out")
    with pytest.raises(UsageError, match="no fusectl.json that says how it was fused"):
        plan_noise_fill(str(out), Options(fill=Fill("gaussian", 0.1, 0)))
    sizes = {**SIZES, "heads": 4, "joined_kv": 20}
    even = convert(checkpoint(tmp_path / "b", sizes=sizes), tmp_path / "even")
    with pytest.raises(Incompatible, match="not zero"):
        carry_out(*plan_noise_fill(str(even), Options(fill=Fill("gaussian", 0.1, 0)), copies=2), tmp_path / "filled")


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--unscan"]])
def test_an_interrupted_conversion_is_gone_on_with_by_the_line_that_it_prints(tmp_path, fusectl, monkeypatch, words):
    source = checkpoint(tmp_path / "a", SCANNED[0], sizes=FACTORED)
    command = ["convert", source, "--format", "orbax", *words, "-o", tmp_path / "out"]
    with monkeypatch.context() as patch:
        ends_at(20, KeyboardInterrupt(), patch)
        done = fusectl(*command)
    assert done.code == 130, done.err
    budget = re.search(r"--max-memory (\d+)", done.err)

    again = fusectl(*command, "--resume", "--max-memory", budget.group(1))

    assert again.code == 0, again.err
    assert "note: going on with " in again.err
    assert fusectl(*command[:-1], tmp_path / "whole").code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_stack_of_layers_is_decoded_once_and_within_the_budget(tmp_path, monkeypatch):
    sizes = {**FACTORED, "embed": 256, "mlp": 1024}
    source = checkpoint(tmp_path / "a", SCANNED[0], sizes=sizes, layers={"encoder": 8, "decoder": 2})
    name = "target/encoder/encoder/mlp/wi_0/kernel"
    chunk = open_checkpoint(source).leaves[name].nbytes
    times = Counter()
    read = Checkpoint.read

    def counted(self, name, region=None):
        if type(self) is Checkpoint:
            times[name, str(region)] += 1
        return read(self, name, region)

    monkeypatch.setattr(Checkpoint, "read", counted)
    budget = 5 * chunk
    plan, sources = plan_conversion(source, Options(max_memory_bytes=budget), "unscanned")
    carry_out(plan, sources, tmp_path / "out", jobs=2)

    assert times[name, str(whole((256, 8, 1024)))] == 1
    # A unit that decodes a stack pays for all of it.
    layer = next(o for o in plan.outputs if o.name == "target/encoder/layers_3/mlp/wi_0/kernel")
    assert chunk < layer.cost_bytes <= budget
    monkeypatch.setattr(fusectl.planning.plan, "TOLERATED_EXCESS_BYTES", 0)
    with pytest.raises(NotEnoughSpace, match="does not fit into the memory budget"):
        plan_conversion(source, Options(max_memory_bytes=chunk), "unscanned")


def test_what_was_set_and_left_out_on_the_second_leg_is_so_on_the_way_back(tmp_path):
    source = written_by_orbax(tmp_path / "source/20", {k: v for k, v in odd_tree().items() if k != "step"}, "orbax")
    there = convert(source, tmp_path / "there", format="t5x")
    assert open_checkpoint(str(there)).step == 20
    second = convert(there, tmp_path / "second", step=99, optimizer="drop")
    back = convert(second, tmp_path / "back", format="orbax")

    opened = open_checkpoint(str(back))
    assert opened.step == 99
    assert {name.split("/")[0] for name in opened.leaves} == {"params", "step"}
    assert not opened.nodes
    for path in (there, second, back):
        assert proved(str(path)).passed


def test_layers_that_do_not_fit_together_are_not_stacked(tmp_path):
    values = state("scalable-t5-1.1", 0, FACTORED)
    name = "target/encoder/layers_1/mlp/wo/kernel"
    save(tmp_path / "a", {**values, name: values[name].astype(np.float16)}, "t5x")
    with pytest.raises(Incompatible, match="layers of float16 and float32"):
        plan_conversion(str(tmp_path / "a"), Options(), "scanned")
    slots = {n.replace("target/", "opt_state/0/mu/"): v for n, v in values.items() if n.startswith("target/")}
    trained = {n.replace("target/", "params/"): v for n, v in values.items() if n.startswith("target/")}
    save(tmp_path / "b", {**trained, **slots}, "orbax")
    # Half of a state: mu without nu.
    with pytest.raises(Incompatible, match="does not fit its parameters"):
        plan_conversion(str(tmp_path / "b"), Options(), "scanned")
    out = convert(tmp_path / "b", tmp_path / "out", "scanned", optimizer="drop")
    assert proved(str(out)).passed


@pytest.mark.slow
def test_a_copy_is_proved_where_its_source_has_moved_to(tmp_path, fusectl):
    source = checkpoint(tmp_path / "a")
    out = convert(source, tmp_path / "out", format="orbax")
    Path(source).rename(tmp_path / "moved")

    done = fusectl("verify", out)
    assert (done.code, "--sources NAME" in done.err) == (4, True)
    assert fusectl("verify", out, "--sources", tmp_path / "moved").code == 0
    save(tmp_path / "moved", state("t5-1.1", 1), "t5x", force=True)
    assert fusectl("verify", out, "--sources", tmp_path / "moved").code == 3


@pytest.mark.slow
def test_noise_in_a_restacked_fusion_says_that_its_sources_are_to_be_named(tmp_path, fusectl):
    source = checkpoint(tmp_path / "a", SCANNED[0], sizes=FACTORED)
    carry_out(*plan_fusion([source, source], Options()), tmp_path / "fused")
    convert(tmp_path / "fused", tmp_path / "apart", "unscanned")
    convert(source, tmp_path / "a-apart", "unscanned")

    assert fusectl("noise-fill", tmp_path / "apart", "-o", tmp_path / "filled").code == 0

    done = fusectl("verify", tmp_path / "filled", "--levels", "files,weights")
    assert (done.code, "--sources" in done.err) == (2, True)
    words = ("verify", tmp_path / "filled", "--levels", "files,weights", "--sources")
    assert fusectl(*words, tmp_path / "a-apart", tmp_path / "a-apart").code == 0


def test_the_step_that_was_set_on_the_way_comes_back(tmp_path):
    for values in (odd_tree(), {k: v for k, v in odd_tree().items() if k != "step"}):
        source = written_by_orbax(tmp_path / f"{len(values)}/20", values, "orbax")
        there = convert(source, tmp_path / f"there{len(values)}", format="t5x", step=77)
        back = convert(there, tmp_path / f"back{len(values)}", format="orbax")
        assert open_checkpoint(str(there)).step == open_checkpoint(str(back)).step == 77
        assert open_checkpoint(str(back)).leaves["step"].keys == (Key("step"),)
        assert proved(str(there)).passed
        assert proved(str(back)).passed


@pytest.mark.parametrize("format", ["orbax-zarr2", "orbax-zarr3", "t5x"])
@pytest.mark.parametrize("key", ["../../outside", "..", "/tmp/outside", "a//b", ""])
def test_keys_that_lead_out_of_the_checkpoint_are_refused(tmp_path, fusectl, key, format):
    source = written_by_orbax(tmp_path / "deep/source/20", {"w": np.ones(3, np.float32)}, "orbax")
    index = source / "items/_METADATA"
    text = index.read_text().replace('"key": "w"', f'"key": "{key}"')
    assert key in text
    index.write_text(text)

    done = fusectl("convert", source, "--format", format, "-o", tmp_path / "deep/out")

    assert (done.code, "keys that name no directory inside it" in done.err) == (5, True), done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("tree", "format", "drop", "says"),
    [
        ({"x": 1.0, "manifest.ocdbt": 2.0}, "orbax-zarr2", (), "a name of the format's own"),
        ({"checkpoint": 2.0}, "t5x", (), "a name of the format's own"),
        ({"_METADATA/x": 1.0}, "orbax-zarr3", (), "a name of the format's own"),
        ({"fusectl-verify.json": 1.0}, "t5x", (), "a name of the format's own"),
        ({"x": [1.0, 2.0, 3.0]}, "orbax", ("x/1",), "without some of its elements"),
        ({"x/y": 1.0, "x": {"z": 2.0, "z/0": 2.0}}, "orbax-zarr2", (), "inside the array"),
        ({"x": None, "x/y": 1.0}, "t5x", (), "a leaf and a node"),
        ({"x": {}, "x/y": 1.0}, "t5x", (), "a leaf and a node"),
        ({"x": {"driver": 1.0, "metadata": 2.0}}, "t5x", (), "tell an array"),
        ({"x" * 300: 1.0}, "t5x", (), "no name for a directory"),
    ],
)
def test_trees_that_a_format_cannot_hold_are_refused_before_a_byte_is_written(tmp_path, tree, format, drop, says):
    import jax

    arrays = jax.tree.map(np.float32, tree)
    source = written_by_orbax(tmp_path / "source/20", arrays, "orbax")

    with pytest.raises(Incompatible, match="cannot hold") as caught:
        plan_conversion(str(source), Options(format=format, drop=drop))

    assert says in str(caught.value.details)


def test_two_steps_are_two_tensors_and_a_step_is_what_it_can_be(tmp_path):
    state = {"step": np.array(5, np.int32)}
    tree = {"state": state, "step": np.array(7, np.int8), "c": np.full(4, 1 + 2j, np.complex64)}
    source = written_by_orbax(tmp_path / "source/20", tree, "orbax")
    for format in ("orbax", "orbax-zarr3", "t5x"):
        out = convert(source, tmp_path / format, format=format)
        assert contents(out).keys() == contents(source).keys()
        assert proved(str(out)).passed
        if format != "t5x":
            np.testing.assert_array_equal(restored(Path(out) / "items")["c"], tree["c"])
    small = written_by_orbax(tmp_path / "small/20", {"state": {"step": np.array(7, np.int8)}}, "orbax")
    with pytest.raises(UsageError, match="more than state/step"):
        plan_conversion(str(small), Options(step=300))


def test_t5x_gets_the_step_that_the_directory_is_named_after(tmp_path):
    source = written_by_orbax(tmp_path / "source/20", {"w": np.ones(3, np.float32)}, "orbax")
    out = convert(source, tmp_path / "out", format="t5x")
    assert open_checkpoint(str(out)).step == 20
    assert proved(str(out)).passed


def test_the_way_back_leaves_out_what_is_asked_for(tmp_path):
    source = written_by_orbax(tmp_path / "source/20", odd_tree(), "orbax")
    there = convert(source, tmp_path / "there", format="t5x")

    back = convert(there, tmp_path / "back", format="orbax", optimizer="drop")

    opened = open_checkpoint(str(back))
    assert not [name for name in (*opened.leaves, *(node.name for node in opened.nodes)) if name.startswith("opt_")]
    assert proved(str(back)).passed


@pytest.mark.slow
def test_restacked_on_the_way_back_it_is_the_tree_that_it_was(tmp_path):
    values = {n.replace("target/", "params/"): v for n, v in state(SCANNED[0], 0, FACTORED).items()}
    values = {n: v for n, v in values.items() if not n.startswith("state/")}
    save(tmp_path / "a", {**values, "step": np.array(3, np.int32)}, "orbax", item="items")

    ways = [("t5x", None), ("orbax", "unscanned")], [("t5x", "unscanned"), ("orbax", None)]
    (there, back), (other, same) = (
        [convert(tmp_path / "a", tmp_path / f"{i}", way[0][1], format="t5x"), tmp_path / f"{i}b"]
        for i, way in enumerate(ways)
    )
    convert(there, back, "unscanned", format="orbax")
    convert(other, same, format="orbax")

    assert contents(back) == contents(same)
    opened = open_checkpoint(str(back))
    assert all(name.startswith("params/") for name in opened.leaves if name != "step")
    assert recognize(opened.shapes, "back").family.name == "scalable-t5-1.1"
    assert opened.record.parameters == "params/"
    assert proved(str(back)).passed


@pytest.mark.slow
def test_a_copy_that_was_made_without_the_family_s_name_is_used_with_it(tmp_path):
    source = checkpoint(tmp_path / "a", "t5-1.1-tied")

    out = convert(source, tmp_path / "out")

    assert proved(str(out)).passed
    carry_out(*plan_fusion([str(out)] * 2, Options(arch="t5-1.1-tied")), tmp_path / "fused")
    assert open_checkpoint(str(tmp_path / "fused")).record.widths["embed"] == (12, 12)


def test_chunks_are_taken_over_where_nothing_changes(tmp_path):
    source = checkpoint(tmp_path / "a")

    plan, _ = plan_conversion(source, Options(format="orbax-zarr2"))

    # What T5X keeps in its index has no chunks to be taken.
    assert plan.passed_bytes > 0.9 * plan.nbytes


def test_the_record_of_a_tree_tells_what_t5x_cannot(tmp_path):
    source = written_by_orbax(tmp_path / "source/20", odd_tree(), "orbax")
    convert(source, tmp_path / "out", format="t5x")

    record = json.loads((tmp_path / "out/fusectl.json").read_bytes())

    assert record["origin"]["item"] == "items"
    assert [["opt_state", 2], ["4", 1], ["0", 1]] in record["origin"]["keys"].values()
