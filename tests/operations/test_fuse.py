"""Edges of the verbs: items, drops, steps, records, small budgets, outputs that must not be replaced."""

import json
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from models import LAYERS, SIZES, checkpoint, state, write_record

from fusectl.demo import random_parameters
from fusectl.errors import Corrupt, Incompatible, OutputExists, UsageError
from fusectl.families.registry import family_named
from fusectl.formats.encoding import Encoding
from fusectl.formats.opening import fingerprint, open_checkpoint
from fusectl.formats.record import FILE_NAME, Record
from fusectl.formats.sink import save
from fusectl.formats.tree import Leaf
from fusectl.formats.zarr import new_storage
from fusectl.layout.blocks import Block, Layout, Term, whole
from fusectl.layout.fill import Fill
from fusectl.operations.fuse import plan_fusion, plan_self_fusion
from fusectl.operations.noise_fill import plan_noise_fill
from fusectl.planning.chunking import Storing, choose_chunks
from fusectl.planning.options import Options
from fusectl.writing.carrying_out import carry_out


def parameters(seed, **changes):
    values = random_parameters(family_named("t5-1.1"), SIZES, LAYERS, seed)
    return {**values, **changes}


def fuse(fusectl, *arguments):
    done = fusectl("fuse", *arguments, "-q")
    assert done.code == 0, done.err
    return done.out.strip()


@pytest.mark.parametrize(("first", "then"), [("head", "norm"), ("norm", "head")])
def test_fusions_whose_factor_is_elsewhere_are_fused_and_proved(pair, tmp_path, fusectl, first, then):
    one = fuse(fusectl, *pair, "--weights", "0.7,0.3", "--factor-in", first, "-o", tmp_path / "one")
    other = fuse(fusectl, *pair, "--weights", "0.7,0.3", "--factor-in", then, "-o", tmp_path / "other")
    both = fuse(fusectl, one, other, "--norm", "property", "-o", tmp_path / "both")

    assert [open_checkpoint(path).record.factor_in for path in (one, other, both)] == [first, then, "norm"]
    for path in (one, other, both):
        assert fusectl("verify", path, "--levels", "files,weights").code == 0
    # Without a record it has to be told: the default is the norm.
    Path(one, FILE_NAME).unlink()
    told = ("verify", one, "--sources", *pair, "--weights", "0.7,0.3", "--levels", "weights")
    assert fusectl(*told).code == (3 if first == "head" else 0)
    assert fusectl(*told, "--factor-in", first).code == 0
    assert fusectl(*told, "--factor-in", then).code == 3


@pytest.fixture
def pair(tmp_path):
    return checkpoint(tmp_path / "a", seed=0), checkpoint(tmp_path / "b", seed=1)


def test_an_item_that_is_not_the_steps_first_choice_is_found_again(tmp_path, fusectl):
    """A step with the items `state` and `ema`: a fusion of `ema` must be verified against `ema`."""
    for name, seed in (("a", 0), ("b", 1)):
        save(tmp_path / name / "3", parameters(seed), "orbax", item="state")
        save(tmp_path / f"{name}-ema", parameters(seed + 10), "orbax", item="ema")
        (tmp_path / f"{name}-ema/ema").rename(tmp_path / name / "3/ema")

    path = fuse(fusectl, tmp_path / "a/3/ema", tmp_path / "b/3/ema", "-o", tmp_path / "out")

    record = open_checkpoint(path).record
    assert [source.path for source in record.sources] == [str(tmp_path / "a/3/ema"), str(tmp_path / "b/3/ema")]
    assert fusectl("verify", path, "--levels", "files,weights").code == 0
    two = plan_fusion([str(tmp_path / "a/3/state"), str(tmp_path / "a/3/ema")], Options())[0]
    assert not two.record.self_fused


@pytest.mark.slow
def test_dropping_a_list_drops_its_empty_nodes_and_orbax_restores_the_rest(tmp_path, fusectl):
    import orbax.checkpoint as ocp

    for name, seed in (("a", 0), ("b", 1)):
        tree: dict = {"opt_state": [{"mu": np.ones(3, np.float32)}, None, np.int32(4)]}
        for path, values in parameters(seed).items():
            node = tree.setdefault("params", {})
            *parents, last = path.split("/")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = values
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ocp.PyTreeCheckpointer().save(tmp_path / name, tree)

    refused = fusectl("fuse", tmp_path / "a", tmp_path / "b")
    assert (refused.code, "opt_state" in refused.err) == (6, True)
    path = fuse(fusectl, tmp_path / "a", tmp_path / "b", "--drop", "opt_state*", "-o", tmp_path / "out")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        restored = ocp.PyTreeCheckpointer().restore(Path(path))
    assert restored.keys() == {"params"}
    assert restored["params"]["encoder"]["encoder_norm"]["scale"].shape == (24,)
    # What was dropped is in the record, so that the sources are still recognised.
    assert fusectl("verify", path, "--levels", "files,weights").code == 0


@pytest.mark.slow
def test_dropped_tensors_of_the_sources_are_remembered_by_verify(tmp_path, fusectl):
    for name, seed in (("a", 0), ("b", 1)):
        values = state("t5-1.1", seed)
        values["target/adapter/kernel"] = np.ones((2, 2), np.float32)
        save(tmp_path / name, values, "t5x")

    path = fuse(fusectl, tmp_path / "a", tmp_path / "b", "--drop", "*adapter*", "--optimizer", "drop")

    assert fusectl("verify", path, "--levels", "files,weights").code == 0


@pytest.mark.slow
def test_noise_fill_that_drops_the_slots_says_so(pair, fusectl):
    filled = fusectl("noise-fill", fuse(fusectl, *pair), "--drop", "state/param_states*", "-q").out.strip()

    assert open_checkpoint(filled).record.optimizer == "drop"
    assert fusectl("verify", filled, "--levels", "files,weights").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("step", [{"step": np.array(70, np.int32)}, {}])
def test_t5x_gets_its_step_under_its_own_name(tmp_path, fusectl, step):
    for name, seed in (("a", 0), ("b", 1)):
        values = {f"params/{n}": v for n, v in parameters(seed).items()}
        save(tmp_path / name, {**values, **step}, "orbax", item=None)
    fused = fuse(fusectl, tmp_path / "a", tmp_path / "b", "-o", tmp_path / "fused")

    direct = fuse(fusectl, tmp_path / "a", tmp_path / "b", "-o", tmp_path / "t5x", "--format", "t5x")
    filled = fusectl("noise-fill", fused, "--format", "t5x", "-o", tmp_path / "filled", "-q").out.strip()

    for path in (direct, filled):
        opened = open_checkpoint(path)
        assert opened.step == (70 if step else 0)
        assert "state/step" in opened.leaves
        assert "target/decoder/logits_dense/kernel" in opened.leaves


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(fill=Fill("gaussian", 1e39, 0)), "does not fit into float32"),
        (Options(dtype="float16"), "does not fit into float16"),
    ],
)
def test_values_that_overflow_their_dtype_are_refused(tmp_path, options, message):
    values = state("t5-1.1", 0)
    values["target/decoder/layers_0/mlp/wo/kernel"][0, 0] = 1e5
    save(tmp_path / "a", values, "t5x")
    plan, sources = plan_fusion([str(tmp_path / "a")] * 2, options)

    with pytest.raises(Incompatible, match=message):
        carry_out(plan, sources, tmp_path / "out")

    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_parameters_that_are_integers_are_refused(tmp_path):
    values = state("t5-1.1", 0)
    values["target/encoder/encoder_norm/scale"] = np.ones(12, np.int32)
    save(tmp_path / "a", values, "t5x")

    with pytest.raises(Incompatible, match="no real numbers"):
        plan_fusion([str(tmp_path / "a")] * 2, Options())


def test_a_root_of_steps_that_were_saved_without_items_is_a_root(tmp_path):
    for step in (3, 12):
        save(tmp_path / "root" / str(step), parameters(step), "orbax", item=None)

    opened = open_checkpoint(str(tmp_path / "root"))

    assert (opened.location.step, opened.location.item) == (12, None)


def test_steps_that_contain_each_other_end(tmp_path):
    (tmp_path / "root/20").mkdir(parents=True)
    for name in ("20", "21", "22"):
        (tmp_path / "root/20" / name).symlink_to(".")
    started = time.monotonic()

    with pytest.raises(Exception, match="no committed step"):
        open_checkpoint(str(tmp_path / "root"))

    assert time.monotonic() - started < 2


def test_a_grid_of_absurdly_many_chunks_is_refused(tmp_path):
    save(tmp_path / "c", {"target/x": np.ones((4, 4), np.float32)}, "t5x")
    zarray = tmp_path / "c/target.x/.zarray"
    zarray.write_text(json.dumps({**json.loads(zarray.read_text()), "shape": [10**9, 10**9], "chunks": [1, 1]}))
    index = (tmp_path / "c/checkpoint").read_bytes()
    assert b"\xa5shape\x92\x04\x04" in index
    (tmp_path / "c/checkpoint").write_bytes(index.replace(b"\xa5shape\x92\x04\x04", b"\xa5shape\xc0"))

    with pytest.raises(Corrupt, match="chunks, more than"):
        open_checkpoint(str(tmp_path / "c"))


def test_a_tiny_budget_makes_no_tiny_chunks(pair):
    plan, _ = plan_fusion(pair, Options(max_memory_bytes=1))

    chunks = {output.name: output.chunks for output in plan.outputs}
    assert chunks["target/decoder/layers_0/mlp/wo/kernel"] == (22, 12)


def test_slots_that_growing_factors_do_not_inherit_the_chunks_of_unused_ones(tmp_path):
    """96 x 140 is not factored, 192 x 280 is: v_row grows from an unused (1,) to (192,)."""
    sizes = {**SIZES, "embed": 96, "mlp": 140}
    options = Options(format="orbax", optimizer="reset")
    plan, _ = plan_fusion([checkpoint(tmp_path / "a", sizes=sizes)] * 2, options)

    slots = {o.name: o for o in plan.outputs if o.name.startswith("state/param_states/")}
    v_row = slots["state/param_states/encoder/layers_0/mlp/wi_0/kernel/v_row"]
    assert v_row.layout.shape == v_row.chunks == (192,)
    assert all(o.chunks == o.layout.shape for o in slots.values())


@pytest.mark.slow
def test_many_copies_are_planned_in_no_time(pair):
    started = time.monotonic()

    plan_fusion([pair[0]] * 300, Options(optimizer="reset"))
    # Every block of a slot is written: K x K of them.
    plan_fusion([pair[0]] * 16, Options())

    assert time.monotonic() - started < 20


OBSTACLES = {
    "a file": lambda path: path.write_text("x"),
    "a link": lambda path: path.symlink_to("a"),
    "work of somebody": lambda path: (path / "notes").mkdir(parents=True),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_force_replaces_nothing_but_checkpoints(tmp_path, obstacle):
    source = checkpoint(tmp_path / "a")
    OBSTACLES[obstacle](tmp_path / "out")
    plan, sources = plan_fusion([source] * 2, Options())

    with pytest.raises(OutputExists, match="is no checkpoint|is the source"):
        carry_out(plan, sources, tmp_path / "out", force=True)


def copied(made):
    return {
        "kind": "converted",
        "source": made.get("source", {"path": "a", "format": "t5x", "step": 1, "fingerprint": "", "norm_groups": [12]}),
        "dtype": None,
        "layers": "",
        "drop": [],
        "step": None,
        "of": made,
    }


RECORD_FAULTS = {
    "not json": lambda r: "{",
    "deep": lambda r: "[" * 100_000,
    "another schema": lambda r: {**r, "schema": "fusectl/record/99"},
    "the schema before": lambda r: {**r, "schema": "fusectl/record/3"},
    "a family that is a number": lambda r: {**r, "family": 5},
    "a path that is a number": lambda r: {
        **r,
        "made": {**r["made"], "sources": [{**s, "path": 5} for s in r["made"]["sources"]]},
    },
    "an unknown operation": lambda r: {**r, "made": {**r["made"], "kind": "melted"}},
    "no operation": lambda r: {key: value for key, value in r.items() if key != "made"},
    "a copy of a copy": lambda r: {**r, "made": copied(copied(r["made"]))},
    "a step that is true": lambda r: {**r, "step": True},
    "a weight that no float holds": lambda r: {**r, "weights": [10**400, 0.5]},
    "a size that no float holds": lambda r: {
        **r,
        "tensors": {n: {**t, "shape": [10**400] * len(t["shape"])} for n, t in r["tensors"].items()},
    },
    "a path in place of a list": lambda r: {**r, "norm_groups": "1" * 10**6},
    "a step in words": lambda r: {**r, "step": "5"},
    "a file outside": lambda r: {**r, "files": {"../checkpoint": "00000000"}},
    "a family in a file": lambda r: {**r, "family": "own.toml"},
    "one weight for two": lambda r: {**r, "weights": [1.0]},
    "no widths": lambda r: {**r, "widths": {}},
    "groups that do not sum up": lambda r: {**r, "norm_groups": [7]},
    "an unknown fill": lambda r: {**r, "fill": {**r["fill"], "kind": "sand"}},
    "too few checksums": lambda r: {**r, "tensors": {n: {**t, "crc32": []} for n, t in r["tensors"].items()}},
    "chunks of nothing": lambda r: {**r, "tensors": {n: {**t, "chunks": [0]} for n, t in r["tensors"].items()}},
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    at = tmp_path_factory.mktemp("recorded")
    plan, sources = plan_fusion([checkpoint(at / "a")] * 2, Options())
    return carry_out(plan, sources, at / "out", sync=False), (at / "out" / FILE_NAME).read_text()


@pytest.mark.parametrize("fault", RECORD_FAULTS)
def test_a_record_that_makes_no_sense_is_refused(recorded, fault):
    path, text = recorded
    changed = RECORD_FAULTS[fault](json.loads(text))
    if isinstance(changed, str):
        (path / FILE_NAME).write_text(changed)
    else:
        write_record(path, changed)

    with pytest.raises(Corrupt, match="not a record of fusectl") as error:
        open_checkpoint(str(path))
    assert len("".join(error.value.details)) < 1000


def test_a_record_of_a_later_version_is_read(pair, tmp_path):
    plan, sources = plan_fusion(pair, Options())
    path = carry_out(plan, sources, tmp_path / "out")
    write_record(path, {**json.loads((path / FILE_NAME).read_text()), "news": 1})

    record = Record.from_json((path / FILE_NAME).read_bytes(), "here")

    assert Record.from_json(record.to_json(), "here") == record == open_checkpoint(str(path)).record


@pytest.mark.slow
def test_a_record_of_other_widths_than_the_tree_is_refused(pair, tmp_path):
    plan, sources = plan_fusion(pair, Options())
    path = carry_out(plan, sources, tmp_path / "out")
    record = json.loads((path / FILE_NAME).read_text())
    record["widths"]["mlp"] = [20, 22]
    write_record(path, record)

    with pytest.raises(Incompatible, match="is no fusion of these 2 sources"):
        plan_noise_fill(str(path), Options(fill=Fill("gaussian", 0.1, 0)))


def test_every_tensor_is_planned_once_and_the_source_is_used_up(pair):
    plan, sources = plan_fusion(pair, Options())

    names = [output.name for output in plan.outputs]
    assert sorted(names) == sorted(sources[0].leaves)
    assert len(set(names)) == len(names)


def test_a_source_with_the_record_of_another_checkpoint_is_refused(pair, tmp_path):
    """A fusectl.json that was copied along with a directory would give the fusion norm groups that are not its own."""
    plan, sources = plan_fusion(pair, Options())
    fused = carry_out(plan, sources, tmp_path / "fused")
    (Path(pair[0]) / FILE_NAME).write_bytes((fused / FILE_NAME).read_bytes())

    with pytest.raises(Corrupt, match="not what was written") as error:
        plan_fusion(pair, Options())

    assert "belongs to another checkpoint" in error.value.hint


def test_an_output_that_is_not_as_planned_never_gets_its_name(pair, tmp_path, monkeypatch):
    from fusectl.writing import carrying_out

    plan, sources = plan_fusion(pair, Options())
    forget = dict(list(sources[0].leaves.items())[1:])
    opened = carrying_out.open_location

    def without_one(location):
        checkpoint = opened(location)
        checkpoint.leaves = {name: checkpoint.leaves[name] for name in forget}
        return checkpoint

    monkeypatch.setattr(carrying_out, "open_location", without_one)
    with pytest.raises(Corrupt, match="written, but not as planned"):
        carry_out(plan, sources, tmp_path / "out")

    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_noise_relative_to_a_kernel_that_is_not_finite_is_refused(pair, tmp_path):
    plan, sources = plan_fusion(pair, Options(fill=Fill("gaussian", 0.1, 0)))

    with pytest.raises(UsageError, match="undefined"):
        carry_out(plan, sources, tmp_path / "out", allow_nonfinite=True)


@pytest.mark.parametrize("format", ["t5x", "orbax", "orbax-zarr3"])
def test_the_fingerprint_tells_a_checkpoint_that_was_written_anew(tmp_path, format):
    paths = [checkpoint(tmp_path / str(i), seed=i, format=format) for i in range(2)]

    a, b = (fingerprint(open_checkpoint(path)) for path in paths)

    assert a != b
    assert a == fingerprint(open_checkpoint(paths[0]))


def test_a_prime_axis_is_cut_into_a_few_ragged_chunks():
    layout = Layout(("vocab", "embed"), (32003, 1024), "float32", ())

    chunks = choose_chunks(layout, None, 1 << 30)

    assert chunks[1] == 1024
    assert 2 <= -(-32003 // chunks[0]) <= 4


def test_a_narrowing_cast_counts_the_sources_bytes():
    shape = (4096, 4096)
    layout = Layout(("a", "b"), shape, "bfloat16", (Block(whole(shape), (Term(0, "x", whole(shape)),)),))

    source = Leaf("x", (), shape, "float32")
    storage = new_storage(2, (512, 4096), "bfloat16", Encoding())

    _, cost = Storing(2, "auto", 1 << 30).unit(layout, storage, {layout.blocks[0].terms[0]: source}, ())

    assert cost >= 4 * 4096 * 4096


@pytest.mark.parametrize("options", [{"optimizer": "tile"}, {"max_memory_bytes": 0}])
def test_options_that_make_no_sense_are_refused_by_the_library_too(options):
    with pytest.raises(UsageError):
        Options(**options)


def test_the_demo_overwrites_nothing(tmp_path, fusectl):
    (tmp_path / "notes").write_text("mine")

    done = fusectl("demo", "-o", tmp_path)

    assert (done.code, "not empty" in done.err) == (7, True)
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]


def test_paths_with_brackets_are_printed_as_they_are(tmp_path, fusectl):
    path = checkpoint(tmp_path / "[red]a[/x]")

    assert path in fusectl("inspect", path).out


@pytest.mark.slow
def test_nohup_is_honoured(pair, tmp_path):
    import signal
    import subprocess
    import sys

    command = f"trap '' HUP; exec {sys.executable} -m fusectl fuse {pair[0]} {pair[1]} -o {tmp_path}/out"
    running = subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out.fusectl-tmp").exists() and running.poll() is None:
        time.sleep(0.005)
    running.send_signal(signal.SIGHUP)
    running.communicate(timeout=60)

    assert running.returncode == 0
    assert (tmp_path / "out/fusectl.json").is_file()


@pytest.mark.parametrize("budget", [1 << 13, 1 << 20], ids=["in pieces", "whole"])
def test_noise_is_not_written_over_one_value_that_was_trained(tmp_path, budget):
    """Also where kernels are measured before, so that a tile of noise alone needs nothing of its tensor."""
    fused = carry_out(*plan_self_fusion(checkpoint(tmp_path / "a"), Options()), tmp_path / "fused", sync=False)
    opened = open_checkpoint(str(fused))
    values = {name: opened.read(name) for name in opened.leaves}
    name = "target/encoder/layers_0/mlp/wi_0/kernel"
    values[name] = values[name].copy()
    values[name][0, -1] = 5.0
    save(tmp_path / "trained", values, "t5x", chunks={name: (6, 11)})
    options = Options(fill=Fill("gaussian", 0.1, 0), max_memory_bytes=budget)
    plan, sources = plan_noise_fill(str(tmp_path / "trained"), options, copies=2)

    (output,) = (each for each in plan.outputs if each.name == name)
    assert output.at_once == (budget == 1 << 20)
    with pytest.raises(Incompatible, match=r"wi_0/kernel\[0, 43\] is not zero"):
        carry_out(plan, sources, tmp_path / "out", sync=False)
    assert not (tmp_path / "out").exists()
