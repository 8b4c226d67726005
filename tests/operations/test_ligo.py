"""LiGO: starts that keep the function, its special cases, the executor against JAX, learning, and what is refused."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import first_soon, slow, some_soon
from models import FAMILY_NAMES, LAYERS, SIZES, checkpoint, contents, ends_at, layers_of, sizes_of, state

from fusectl.cli import run
from fusectl.families.registry import family_named
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.sink import save
from fusectl.operations.learning import network
from fusectl.operations.ligo import begin_operator, plan_with_operator
from fusectl.planning.options import Options
from fusectl.sources.operator import CUSTOM, open_operator, save_operator
from fusectl.verification import Settings, verify
from fusectl.writing.carrying_out import carry_out


PROOF = Settings(levels=("files", "weights", "native"), x64=True)
DECODERS = [
    *("maxtext-llama", "maxtext-llama-tied", "maxtext-llama-scanned", "maxtext-gemma2-scanned"),
    *("gemma", "gemma2", "maxtext-qwen3"),
]
TWO_EACH = {"encoder": 2, "decoder": 2}
WHOLE, OTHER = "twice as large", "by no whole ratio"
# The one that is not slow, and two of the executor's: JAX compiles networks and operators for each.
QUICK = {("gemma2", OTHER), ("maxtext-gemma2-scanned", "pinv"), ("t5-1.1", "paper")}


def in_turn(one, other):
    """The families, every second one with one of two, and those that are quick."""
    turn = {(each, other if i % 2 else one) for i, each in enumerate((*FAMILY_NAMES, *DECODERS))}
    return sorted(turn | {(each, what) for each, what in QUICK if what in {one, other}})


def larger(family, ratio=OTHER):
    """Sizes and depths that a family's test model grows to."""
    if family_named(family).trainer == "t5x":
        wide = {"embed": 24, "heads": 6, "mlp": 44} if ratio == WHOLE else {"embed": 17, "heads": 5, "mlp": 31}
        return wide, {"encoder": 4, "decoder": 2} if ratio == WHOLE else {"encoder": 3, "decoder": 2}
    wide = {"embed": 24, "heads": 12, "mlp": 44} if ratio == WHOLE else {"embed": 17, "heads": 8, "mlp": 31}
    (now,) = layers_of(family_named(family)).values()
    # Gemma 2 and 3 grow by whole turns of their layers, and Gemma with them.
    return wide, {"decoder": 2 * now if "gemma" in family else now + 1}


def begin(path, sizes, depths, tie="pinv", init="duplicate", seed=0, **options):
    return begin_operator(str(path), sizes, None, depths, tie, init, seed, Options(**options))


def grown(path, out, sizes, depths, tie="pinv", init="duplicate", seed=0, change=lambda arrays: arrays, **options):
    """Grows a checkpoint with an operator's start, or with what `change` makes of it; its path."""
    growing, _, operator = begin(path, sizes, depths, tie, init, seed, arch=options.get("arch"))
    kept = Path(f"{out}.operator")
    if not kept.exists():
        save_operator(replace(operator, arrays=change(dict(operator.arrays))), growing, kept)
    return applied(path, kept, out, **options)


def applied(path, operator, out, *, jobs=None, resume=False, **options):
    plan, sources = plan_with_operator(str(path), open_operator(str(operator)), Options(**options))
    carry_out(plan, sources, Path(out), jobs=jobs, resume=resume)
    return str(out)


def parameters(path):
    opened = open_checkpoint(str(path))
    return {name.removeprefix("target/"): opened.read(name) for name in opened.leaves if "state" not in name}


# Starts.


@pytest.mark.parametrize(
    ("family", "ratio"),
    some_soon(in_turn(WHOLE, OTHER), QUICK.__contains__),
)
def test_a_duplicate_computes_what_the_small_model_does(tmp_path, family, ratio):
    path = checkpoint(tmp_path / "small", family)
    exact = grown(path, tmp_path / "grown64", *larger(family, ratio), arch=family, dtype="float64")
    rounded = applied(path, f"{exact}.operator", tmp_path / "grown32", arch=family)

    report = verify(exact, settings=PROOF)
    assert report.passed
    assert report.native.max_abs < 1e-12 * report.native.reference_max_abs
    report = verify(rounded, settings=replace(PROOF, x64=False))
    assert report.passed
    assert report.native.max_abs < 5e-6 * report.native.reference_max_abs


@pytest.mark.slow
@pytest.mark.parametrize("depths", [{}, {"decoder": 13}])
def test_layers_that_remain_behind_groups_go_along(tmp_path, depths):
    path = checkpoint(tmp_path / "small", "maxtext-gemma3-scanned")
    out = grown(path, tmp_path / "grown", {"embed": 17, "heads": 8, "mlp": 31}, depths, dtype="float64")

    report = verify(out, settings=PROOF)
    assert report.passed
    assert report.native.max_abs < 1e-12 * report.native.reference_max_abs


@pytest.mark.slow
def test_the_paper_s_tie_is_not_exact(tmp_path):
    path = checkpoint(tmp_path / "small", "t5-1.1")
    out = grown(path, tmp_path / "grown", *larger("t5-1.1"), tie="paper", dtype="float64")

    report = verify(out, settings=PROOF)

    assert report.weights.passed
    assert report.native.passed is None
    assert report.native.max_abs > 1e-3 * report.native.reference_max_abs


@pytest.mark.parametrize("matrix", first_soon(["decoder/mlp", "embed", "norm", "encoder/query", "decoder/depth/up"], 2))
def test_verify_notices_what_another_operator_made(tmp_path, matrix):
    path = checkpoint(tmp_path / "small", "t5-1.1")
    out = grown(path, tmp_path / "grown", *larger("t5-1.1"), dtype="float64")
    growing, _, operator = begin(path, *larger("t5-1.1"))
    values = operator.arrays[matrix].copy()
    values.flat[0] += 1e-6
    arrays = {**operator.arrays, matrix: values}
    save_operator(replace(operator, arrays=arrays), growing, Path(f"{out}.operator"), force=True)

    report = verify(out, settings=Settings(levels=("weights",)))

    assert not report.weights.passed
    # The control: that its files have changed is not all that is said.
    assert any("values are not" in problem for problem in report.weights.problems)


# LiGO's proposition 1, and Net2Net.


def layer(values, stack, index):
    """The tensors of one layer by their names in it."""
    start = f"{stack}/layers_{index}/"
    return {name.removeprefix(start): each for name, each in values.items() if name.startswith(start)}


@pytest.mark.parametrize(
    ("init", "of"), [("stack", lambda i, now, then: i % now), ("interpolate", lambda i, now, then: i // (then // now))]
)
def test_layers_again_are_the_operators_of_proposition_1(tmp_path, init, of):
    depths = {"encoder": 3, "decoder": 2}
    path = checkpoint(tmp_path / "small", "t5-1.1", layers=depths)
    out = grown(path, tmp_path / "grown", {}, {"encoder": 9, "decoder": 4}, init=init)
    small, large = parameters(path), parameters(out)

    for stack, now, then in (("encoder", 3, 9), ("decoder", 2, 4)):
        for i in range(then):
            found, expected = layer(large, stack, i), layer(small, stack, of(i, now, then))
            assert found.keys() == expected.keys()
            assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_net2net_is_an_operator(tmp_path):
    """Units again at random; what reads them is divided by how often each of them is there."""
    path = checkpoint(tmp_path / "small", "t5-1.1")
    rng = np.random.default_rng(0)

    def duplicated(shape):
        *count, large, small = shape
        chosen = [np.r_[:small, rng.integers(small, size=large - small)] for _ in range(*count or [1])]
        return np.reshape([np.eye(small)[each] for each in chosen], shape)

    net2net = {}

    def change(arrays):
        net2net.update({name: duplicated(each.shape) for name, each in arrays.items()})
        net2net["encoder/relpos"] = net2net["encoder/query"][0]
        return net2net

    sizes = {"embed": 20, "heads": 7, "mlp": 50}
    out = grown(path, tmp_path / "grown", sizes, {}, change=change, dtype="float64")
    small, large = parameters(path), parameters(out)

    def writes(name, i, repeat=1):
        return np.kron(net2net[name] if i is None else net2net[name][i], np.eye(repeat))

    def reads(name, i, repeat=1):
        matrix = writes(name, i, repeat)
        return matrix / matrix.sum(axis=0)

    embed, dual = writes("embed", None), reads("embed", None)
    for stack in ("encoder", "decoder"):
        for i in range(LAYERS[stack]):
            own, all_of = layer(small, stack, i), layer(large, stack, i)
            for name, found in all_of.items():
                if name.endswith("scale"):
                    expected = writes("norm", None) @ own[name]
                elif name.startswith("mlp/wi"):
                    expected = dual @ own[name] @ writes(f"{stack}/mlp", i).T
                elif name.startswith("mlp/wo"):
                    expected = reads(f"{stack}/mlp", i) @ own[name] @ embed.T
                else:
                    module, part, _ = name.split("/")
                    cross = "cross_" if module == "encoder_decoder_attention" else ""
                    if part == "out":
                        expected = reads(f"{stack}/{cross}value", i, 5) @ own[name] @ embed.T
                    else:
                        expected = dual @ own[name] @ writes(f"{stack}/{cross}{part}", i, 5).T
                np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13, err_msg=name)
    np.testing.assert_allclose(large["decoder/logits_dense/kernel"], dual @ small["decoder/logits_dense/kernel"])
    np.testing.assert_allclose(large["token_embedder/embedding"], small["token_embedder/embedding"] @ embed.T)


# The executor against JAX.


def same_as_jax(path, kept, out, family=None):
    """How far what an operator has made is from what JAX makes of it, relative to a tensor's largest value."""
    opened, operator = open_checkpoint(str(path)), open_operator(str(kept))
    growing, _, _ = begin(path, *map(dict, _sizes(operator)), tie=operator.about["tie"], arch=family)
    with jax.enable_x64(True):
        small = {n: jnp.asarray(opened.read(growing.tree.full(n)), jnp.float64) for n in growing.tree.shapes}
        arrays = {n: jnp.asarray(operator.checkpoint.read(n), jnp.float64) for n in operator.shapes}
        made = {n: np.asarray(each) for n, each in network.grow(growing, small, arrays).items()}
    found = open_checkpoint(str(out))
    off = {}
    for name, expected in made.items():
        values = found.read(found.record.parameters + name)
        assert values.shape == expected.shape, name
        off[name] = np.abs(values - expected).max() / np.abs(expected).max()
    return max(off.values())


def _sizes(operator):
    for key in ("sizes", "depths"):
        yield {name: then for name, (now, then) in operator.about[key].items() if now != then or key == "depths"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tie"),
    in_turn("pinv", "paper"),
)
def test_the_executor_computes_what_jax_learns(tmp_path, family, tie):
    # Weights of one layer alone would all be 1.
    t5 = family in FAMILY_NAMES
    sizes, depths = larger(family)
    path = checkpoint(tmp_path / "small", family, layers=TWO_EACH if t5 else None)
    depths = {"encoder": 3, "decoder": 3} if t5 else depths
    out = grown(path, tmp_path / "grown", sizes, depths, tie=tie, init="random", dtype="float64", arch=family)

    assert same_as_jax(path, f"{out}.operator", out, family) < 1e-14
    assert verify(out, settings=Settings(levels=("files", "weights"))).passed


@pytest.mark.slow
@pytest.mark.parametrize("format", ["t5x", "orbax-ocdbt-zarr3"])
def test_small_chunks_and_budgets_change_nothing(tmp_path, format):
    path = checkpoint(tmp_path / "small", "scalable-t5-1.1-scanned", layers=TWO_EACH, format=format)
    sizes = {"embed": 40, "heads": 9, "mlp": 60}
    out = grown(path, tmp_path / "grown", sizes, {"decoder": 3}, init="random", dtype="float64", jobs=1)
    kept = f"{out}.operator"
    again = applied(path, kept, tmp_path / "again", dtype="float64", max_memory_bytes=1 << 20, jobs=4)
    stored = [each for each in open_checkpoint(again).leaves.values() if each.stored is not None]

    assert open_checkpoint(out).format == format
    assert any(each.stored.storage.chunks != each.shape for each in stored)
    assert same_as_jax(path, kept, out) < 1e-14
    assert same_as_jax(path, kept, again) < 1e-14


@pytest.mark.slow
def test_threads_and_interruptions_change_nothing(tmp_path, monkeypatch):
    path = checkpoint(tmp_path / "small", "t5-1.1")
    whole = grown(path, tmp_path / "whole", *larger("t5-1.1"), init="random", jobs=1)
    kept = f"{whole}.operator"
    applied(path, kept, tmp_path / "threads", jobs=4)
    with monkeypatch.context() as patch:
        ends_at(60, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            applied(path, kept, tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()
    applied(path, kept, tmp_path / "out", resume=True)

    assert contents(tmp_path / "threads") == contents(whole)
    assert contents(tmp_path / "out") == contents(whole)


# Kept operators.


@pytest.mark.slow
def test_an_operator_is_for_every_checkpoint_of_its_sizes_scanned_or_not(tmp_path, fusectl):
    paths = [checkpoint(tmp_path / name, "scalable-t5-1.1", seed) for seed, name in enumerate("ab")]
    scanned = str(tmp_path / "scanned")
    assert fusectl("convert", paths[1], "--scan", "--drop-optimizer", "-o", scanned).code == 0
    grown(paths[0], tmp_path / "first", *larger("scalable-t5-1.1"), init="random")
    kept = f"{tmp_path / 'first'}.operator"
    for path, out in ((paths[1], "second"), (scanned, "third")):
        done = fusectl("ligo", path, "--operator", kept, "-o", tmp_path / out, "--dtype", "float64", "-q")
        assert done.code == 0, done.err
        assert fusectl("verify", tmp_path / out, "--levels", "files,weights", "-q").code == 0
    assert fusectl("convert", tmp_path / "third", "--unscan", "-o", tmp_path / "fourth").code == 0

    second, fourth = parameters(tmp_path / "second"), parameters(tmp_path / "fourth")
    assert second.keys() == fourth.keys()
    assert all(np.array_equal(second[name], fourth[name]) for name in second)


def spoilt(kept, at, name, change):
    """A copy of an operator with another tensor."""
    opened = open_checkpoint(str(kept))
    arrays = {each: opened.read(each).copy() for each in opened.leaves}
    change(arrays[name])
    save(Path(at), arrays, "orbax", item=None, custom=opened.custom)
    return str(at)


def twin_columns(matrix):
    matrix[:, 1] = matrix[:, 0]


def nan(matrix):
    matrix.flat[3] = np.nan


@pytest.mark.slow
def test_an_operator_is_refused_for_what_it_is_not_for(tmp_path, fusectl):
    sizes, depths = larger("t5-1.1")
    path = checkpoint(tmp_path / "small")
    grown(path, tmp_path / "grown", sizes, depths)
    kept = tmp_path / "grown.operator"
    others = {
        "size": checkpoint(tmp_path / "size", sizes={**SIZES, "mlp": 24}),
        "depth": checkpoint(tmp_path / "depth", layers={"encoder": 1, "decoder": 1}),
        "family": checkpoint(tmp_path / "family", "maxtext-llama"),
    }
    for source, operator, code, says in (
        (others["size"], kept, 6, "axis mlp: 24"),
        (others["depth"], kept, 6, "layers of the encoder: 1"),
        (others["family"], kept, 6, "another model"),
        (path, path, 6, "no growth operator"),
        (path, tmp_path / "nowhere", 4, "nowhere"),
        (path, spoilt(kept, tmp_path / "nan", "encoder/mlp", nan), 5, "NaN"),
        (path, spoilt(kept, tmp_path / "singular", "embed", twin_columns), 6, "not independent"),
    ):
        done = fusectl("ligo", source, "--operator", operator, "-o", tmp_path / "out")
        assert (done.code, says in done.err) == (code, True), done.err
        assert not (tmp_path / "out").exists()


# Learning.


TEXT = json.__file__
SMALL = {**SIZES, "vocab": 300}
LEARN = ["--batch", 4, "--length", 48, "--data", TEXT]


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory):
    """A small random model that bytes fit into."""
    return checkpoint(tmp_path_factory.mktemp("bytes_model") / "small", "t5-1.1", sizes=SMALL)


def about(path):
    return open_checkpoint(str(path)).custom[CUSTOM]


WIDER = ["--emb", 17, "--heads", 5, "--mlp", 31, "--encoder-layers", 4]


SEED = 3


def learn(path, out, seed):
    """Ten steps of learning."""
    words = ["ligo", path, *WIDER, *LEARN, "--steps", 10, "--seed", seed, "--learning-rate", 1e-2, "-q", "-o", out]
    assert run([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def learned(bytes_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("learned")
    learn(bytes_model, root / "a", SEED)
    return root


@pytest.mark.slow
def test_learning_lowers_the_loss_on_what_was_held_out(learned):
    found = about(learned / "a.operator")

    held = found["held_out"]
    assert held["operator"] < held["duplicate start"]
    assert held["operator"] < held["random start"]
    # The start keeps the function.
    assert held["duplicate start"] == pytest.approx(held["small model"], rel=1e-5)
    assert found["learned"] == len(found["losses"]) == 10
    assert found["losses"][-1] < found["losses"][0]
    assert (found["seed"], found["optimizer"], found["learning_rate"]) == (SEED, "adam", 1e-2)
    assert verify(str(learned / "a"), settings=Settings(levels=("files", "weights"))).passed
    assert not open_checkpoint(str(learned / "a")).record.made.keeps_function


@pytest.mark.slow
def test_a_seed_decides_what_is_learned(bytes_model, learned):
    learn(bytes_model, learned / "again", SEED)
    learn(bytes_model, learned / "other", SEED + 1)

    assert contents(learned / "again") == contents(learned / "a")
    assert about(learned / "again.operator") == about(learned / "a.operator")
    assert contents(learned / "other") != contents(learned / "a")
    assert about(learned / "other.operator")["losses"] != about(learned / "a.operator")["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["maxtext-llama-tied-scanned", "gemma2"])
def test_decoders_learn_by_the_next_token(tmp_path, family, fusectl):
    sizes = {**sizes_of(family_named(family)), "vocab": 300}
    path = checkpoint(tmp_path / "small", family, sizes=sizes, layers={"decoder": 2}, format="orbax")
    words = ["--emb", 17, "--heads", 8, "--mlp", 31, "--layers", 4, *LEARN, "--steps", 4, "--learning-rate", 1e-2]
    done = fusectl("ligo", path, *words, "--arch", family, "-o", tmp_path / "out")

    assert done.code == 0, done.err
    held = about(tmp_path / "out.operator")["held_out"]
    assert held["duplicate start"] == pytest.approx(held["small model"], rel=1e-5)
    assert held["operator"] < held["duplicate start"]
    assert verify(str(tmp_path / "out"), settings=Settings(levels=("files", "weights"))).passed


@pytest.mark.slow
def test_without_a_rate_worth_the_name_nothing_is_learned(bytes_model, tmp_path, fusectl):
    words = [*WIDER, *LEARN, "--steps", 2, "--learning-rate", 1e-12]
    done = fusectl("ligo", bytes_model, *words, "-o", tmp_path / "out")

    assert done.code == 0
    held = about(tmp_path / "out.operator")["held_out"]
    assert held["operator"] == pytest.approx(held["duplicate start"], rel=1e-6)


@pytest.mark.slow
def test_learning_ends_where_the_loss_is_no_number(bytes_model, tmp_path, fusectl):
    words = [*WIDER, *LEARN, "--steps", 20, "--learning-rate", 1e9, "--learner", "sgd"]
    done = fusectl("ligo", bytes_model, *words, "-o", tmp_path / "out")

    assert done.code == 6
    assert "learning ended: step " in done.err
    assert "--learning-rate" in done.err
    assert not (tmp_path / "out").exists()
    found = about(tmp_path / "out.operator")
    assert found["learned"] == len(found["losses"]) < 20
    assert all(np.isfinite(found["losses"]))
    opened = open_checkpoint(str(tmp_path / "out.operator"))
    assert all(np.isfinite(opened.read(name)).all() for name in opened.leaves)
    # What is left can be applied.
    assert fusectl("ligo", bytes_model, "--operator", tmp_path / "out.operator", "-o", tmp_path / "late").code in {0, 6}


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--learner", "no_such"], 2, "no such optimizer"),
        slow(["--learner", "tree"], 2, "no such optimizer"),
        slow(["--learner", "lbfgs"], 2, "wants more"),
        (["--learning-rate", "nan"], 2, "positive"),
        slow(["--learning-rate", "0"], 2, "positive"),
        (["--batch", 100_000], 6, "too little"),
        (["--sentinel", 400], 2, "sentinel"),
        (["--data", "empty.txt"], 5, "empty"),
        (["--data", "missing.txt"], 4, "missing.txt"),
        (["--data", "large.npz"], 6, "not in the vocabulary"),
        (["--data", "ligo_data:missing"], 2, "no missing"),
        (["--data", "no_such_module:f"], 2, "no_such_module"),
        (["--data", "ligo_data:fails"], 5, "the function failed"),
    ],
)
def test_lessons_that_make_no_sense(bytes_model, tmp_path, fusectl, monkeypatch, words, code, says):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    np.savez("large.npz", tokens=np.full(9000, 300))
    Path("ligo_data.py").write_text("def fails():\n    raise OSError('gone')\n")
    done = fusectl("ligo", bytes_model, *WIDER, *LEARN, "--steps", 2, *words, "-o", "out")

    assert (done.code, says in done.err) == (code, True), done.err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_a_function_gives_the_data(bytes_model, tmp_path, fusectl, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ligo_gives.py").write_text(
        "import numpy as np\n\n\ndef rows():\n    rng = np.random.default_rng(0)\n    for _ in range(40):\n"
        "        yield {'inputs': rng.integers(3, 290, 40), 'targets': rng.integers(3, 290, 9)}\n"
    )
    words = ["--batch", 4, "--length", 48, "--data", "ligo_gives:rows", "--steps", 2]
    done = fusectl("ligo", bytes_model, "--emb", 14, *words, "-o", "out")

    assert done.code == 0, done.err
    assert "ligo_gives:rows" in about("out.operator")["data"]


def test_the_derivative_of_the_inverse_is_that_of_differences():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(2, 9, 5))
    weights = rng.normal(size=(2, 9, 5))
    with jax.enable_x64(True):
        of = lambda b: jnp.sum(jnp.asarray(weights) * network.dual(b))
        found = jax.grad(of)(jnp.asarray(matrix))
        step = 1e-6
        for at in [(0, 0, 0), (1, 3, 2), (1, 8, 4)]:
            moved = np.zeros_like(matrix)
            moved[at] = step
            expected = (of(jnp.asarray(matrix + moved)) - of(jnp.asarray(matrix - moved))) / (2 * step)
            assert float(found[at]) == pytest.approx(float(expected), rel=1e-7)
        np.testing.assert_allclose(network.dual(jnp.asarray(matrix)), np.linalg.pinv(matrix).swapaxes(1, 2), rtol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("condition", [1e3, 1e6, 1e12, np.inf, np.nan])
def test_the_inverse_of_anything_ends(condition, dtype):
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    gram = (q @ np.diag(np.r_[np.ones(7), 1 / condition]) @ q.T).astype(dtype)
    with jax.enable_x64(True):
        found = np.asarray(network.inverse(jnp.asarray(gram)), np.float64)

    # In float32 a worse condition leaves no digits.
    if condition <= (1e3 if dtype == "float32" else 1e6):
        # What A^T B is, transposed.
        assert np.abs(gram @ found - np.eye(8)).max() < 10 * np.finfo(dtype).eps * condition


# What cannot be grown to.


@pytest.mark.parametrize(
    ("family", "words", "code", "says"),
    [
        ("t5-1.1", ["--emb", 8], 6, "never shrink"),
        ("t5-1.1", ["--encoder-layers", 1], 6, "never taken away"),
        ("t5-1.1", ["--emb", 12], 2, "as large as that already"),
        ("t5-1.1", [], 2, "as large as that already"),
        ("t5-1.1", ["--kv-heads", 6], 6, "no axis kv_heads"),
        ("t5-1.1", ["--emb", 14, "--steps", 5], 2, "--data"),
        ("maxtext-llama", ["--heads", 7], 6, "heads for each kv head"),
        ("maxtext-llama", ["--kv-heads", 6], 6, "heads for each kv head"),
        ("maxtext-llama", ["--encoder-layers", 6], 6, "no encoder"),
        ("maxtext-gemma2-scanned", ["--layers", 5], 6, "turns of 2"),
        ("t5-1.1", ["--operator", "x", "--emb", 14], 2, "--operator"),
        ("t5-1.1", ["--operator", "x", "--layers", 5], 2, "--operator"),
        ("t5-1.1", ["--operator", "x", "--data", "y"], 2, "--operator"),
    ],
)
def test_sizes_that_make_no_sense(tmp_path, fusectl, family, words, code, says):
    path = checkpoint(tmp_path / "small", family)
    steps = [] if "--steps" in words else ["--steps", 0]
    done = fusectl("ligo", path, *words, *steps, "-o", tmp_path / "out")

    assert (done.code, says in done.err) == (code, True), done.err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_what_is_there_is_not_written_over(tmp_path, fusectl):
    path = checkpoint(tmp_path / "small")
    words = ["ligo", path, "--emb", 14, "--steps", 0, "-o", tmp_path / "out"]
    assert fusectl(*words, "--dry-run").code == 0
    assert not list(tmp_path.glob("out*"))
    done = fusectl(*words, "--json")
    assert done.code == 0
    assert json.dumps(done.json)
    before = contents(tmp_path / "out")
    assert fusectl(*words).code == 7
    assert fusectl(*words, "--force").code == 0
    assert contents(tmp_path / "out") == before
    # An operator alone is kept, too.
    done = fusectl(*words[:-1], tmp_path / "elsewhere", "--operator-out", tmp_path / "out.operator")
    assert done.code == 7
    assert not (tmp_path / "elsewhere").exists()
    done = fusectl(*words[:-1], tmp_path / "elsewhere", "--operator-out", tmp_path / "elsewhere/operator")
    assert done.code == 2
    assert not (tmp_path / "elsewhere").exists()
    done = fusectl(*words[:-1], tmp_path / "elsewhere", "--operator-out", path)
    assert done.code == 7


@pytest.mark.slow
def test_a_run_is_not_resumed_with_another_s_operator(tmp_path, fusectl):
    path = checkpoint(tmp_path / "small")
    words = ["ligo", path, "--steps", 0, "-o", tmp_path / "out", "--resume"]
    assert fusectl(*words, "--emb", 14).code == 0
    assert fusectl(*words, "--emb", 14).code == 0
    for other in (["--emb", 16], ["--emb", 14, "--tie", "paper"], ["--emb", 14, "--init", "random"]):
        done = fusectl(*words, *other)
        assert done.code == 6, (other, done.err)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_corrupt_source_is_refused(tmp_path, fusectl, steps):
    values = state("t5-1.1", 0, SMALL)
    values["target/encoder/layers_0/mlp/wi_0/kernel"][3, 3] = np.nan
    save(tmp_path / "small", values, "t5x")
    done = fusectl("ligo", tmp_path / "small", "--emb", 14, "--steps", steps, *LEARN, "-o", tmp_path / "out")

    assert done.code == 5, done.err
    assert "is nan" in done.err
    assert not (tmp_path / "out").exists()


# Memory.


MEASURE = """
import sys
from fusectl.cli import run
from fusectl.errors import Incompatible
from fusectl.system.memory import peak_rss_bytes
code = run(sys.argv[1:])
print(peak_rss_bytes(), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.alone
@pytest.mark.slow
def test_an_operator_is_applied_within_the_budget(tmp_path):
    """A model of 150 MB to one of 600 MB, deeper and by dense matrices; in 64 MiB."""
    sizes = {**SIZES, "vocab": 8000, "embed": 512, "heads": 8, "joined_kv": 512, "mlp": 1024}
    path = checkpoint(tmp_path / "small", "t5-1.1", 0, sizes, {"encoder": 6, "decoder": 6})
    growing, _, operator = begin(path, {"embed": 768, "heads": 12, "mlp": 2048}, {"encoder": 9}, init="random")
    save_operator(operator, growing, tmp_path / "operator")
    words = ["ligo", path, "--operator", tmp_path / "operator", "-o", tmp_path / "out", "--max-memory", "64MiB", "-q"]
    command = [sys.executable, "-c", MEASURE, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)

    assert sum(leaf.nbytes for leaf in open_checkpoint(str(tmp_path / "out")).leaves.values()) > 300e6
    assert int(done.stderr.split()[-1]) < 64 * 2**20 + 250e6


@pytest.mark.slow
def test_a_config_tells_what_queries_are_scaled_by(tmp_path, fusectl):
    path = checkpoint(tmp_path / "small", "gemma2", layers={"decoder": 2}, format="orbax")
    config = tmp_path / "gemma.yml"
    config.write_text("embed_dim: 12\nquery_pre_attn_norm: BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS\n")
    words = ["ligo", path, "--arch", "gemma2", "--steps", 0, "--config", config]
    done = fusectl(*words, "--emb", 20, "-o", tmp_path / "other")

    assert done.code == 6
    assert "embed // heads, by which queries are scaled: 2 now, 3 then" in done.err
    done = fusectl(*words, "--emb", 24, "--heads", 12, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    report = verify(str(tmp_path / "out"), settings=replace(PROOF, x64=True))
    assert report.passed
    assert report.record.network.query_scale == "embed_over_heads"


@pytest.mark.slow
def test_a_stack_keeps_what_a_config_tells(tmp_path, fusectl):
    path = checkpoint(tmp_path / "small", "maxtext-llama", format="orbax")
    config = tmp_path / "llama.yml"
    config.write_text("rope_max_timescale: 500000\ndecoder_block: llama2\n")
    done = fusectl("stack", path, "--layers", 6, "--how", "identity", "--config", config, "-o", tmp_path / "out")

    assert done.code == 0, done.err
    assert open_checkpoint(str(tmp_path / "out")).record.network.attending[0].rope_base == 500_000
    assert verify(str(tmp_path / "out")).passed
    both = fusectl("stack", path, "--layers", 6, "--config", config, "--config", config, "-o", tmp_path / "two")
    assert both.code == 2


@pytest.mark.slow
def test_verify_says_the_losses(tmp_path, bytes_model, learned):
    tokens = tmp_path / "tokens.jsonl"
    tokens.write_text('{"inputs": [70, 71, 72, 1], "targets": [80, 81, 1]}\n')
    report = verify(str(learned / "a"), settings=Settings(tokens=str(tokens)))
    held = about(learned / "a.operator")["held_out"]

    assert report.passed
    assert any(f"operator {held['operator']:.4f}" in note for note in report.notes)
    (said,) = (note for note in report.notes if note.startswith("loss on these tokens"))
    # Of the source against itself, by the twin's logits.
    small = [float(word) for word in re.findall(r"\d+\.\d+", said)][1]
    out = applied(bytes_model, grown_start(bytes_model, tmp_path), tmp_path / "same")
    (same,) = (n for n in verify(out, settings=Settings(tokens=str(tokens))).notes if n.startswith("loss on these"))
    assert [float(word) for word in re.findall(r"\d+\.\d+", same)] == pytest.approx([small, small], abs=2e-4)


def grown_start(path, at):
    """The operator of the lossless start, as it is kept."""
    return f"{grown(path, at / 'start', *larger('t5-1.1'))}.operator"
