"""LiGO: starts that keep the function, its special cases, the executor against JAX, learning, and what is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import FAMILY_NAMES, LAYERS, SIZES, checkpoint, contents, ends_at, layers_of, sizes_of, state

from fusectl.archs import family_named
from fusectl.builder import Options
from fusectl.errors import Corrupt, FusectlError, Incompatible, UsageError
from fusectl.formats import open_checkpoint
from fusectl.formats.sink import save
from fusectl.growth import begin_operator, plan_with_operator
from fusectl.ligo import network
from fusectl.ligo.operator import CUSTOM, Operator, open_operator, save_operator
from fusectl.surgery import carry_out
from fusectl.verify import Settings, verify


PROOF = Settings(levels=("files", "weights", "native"), x64=True)
DECODERS = [
    *("maxtext-llama", "maxtext-llama-tied", "maxtext-llama-scanned", "maxtext-gemma2-scanned"),
    *("gemma", "gemma2", "maxtext-qwen3"),
]
WHOLE, OTHER = "twice as large", "by no whole ratio"


def larger(family, ratio=OTHER):
    """Sizes and depths that a family's test model grows to."""
    if family_named(family).trainer == "t5x":
        wide = {"embed": 24, "heads": 6, "mlp": 44} if ratio == WHOLE else {"embed": 17, "heads": 5, "mlp": 31}
        return wide, {"encoder": 6, "decoder": 4} if ratio == WHOLE else {"encoder": 4, "decoder": 3}
    wide = {"embed": 24, "heads": 12, "mlp": 44} if ratio == WHOLE else {"embed": 17, "heads": 8, "mlp": 31}
    (now,) = layers_of(family_named(family)).values()
    # By whole turns of gemma2's layers.
    return wide, {"decoder": 2 * now if now != 3 else 5}


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


@pytest.mark.parametrize("ratio", [WHOLE, OTHER])
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(each, marks=[] if each in {"t5-1.0", "t5-1.1", "gemma2"} else pytest.mark.slow)
        for each in (*FAMILY_NAMES, *DECODERS)
    ],
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


def test_the_paper_s_tie_is_not_exact(tmp_path):
    path = checkpoint(tmp_path / "small", "t5-1.1")
    out = grown(path, tmp_path / "grown", *larger("t5-1.1"), tie="paper", dtype="float64")

    report = verify(out, settings=PROOF)

    assert report.weights.passed
    assert report.native.passed is None
    assert report.native.max_abs > 1e-3 * report.native.reference_max_abs


@pytest.mark.parametrize("matrix", ["embed", "norm", "encoder/query", "decoder/mlp", "decoder/depth/up"])
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
    path = checkpoint(tmp_path / "small", "t5-1.1")
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


@pytest.mark.parametrize("tie", ["pinv", "paper"])
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(each, marks=[] if each in {"t5-1.0", "maxtext-gemma2-scanned"} else pytest.mark.slow)
        for each in (*FAMILY_NAMES, *DECODERS)
    ],
)
def test_the_executor_computes_what_jax_learns(tmp_path, family, tie):
    path = checkpoint(tmp_path / "small", family)
    out = grown(path, tmp_path / "grown", *larger(family), tie=tie, init="random", dtype="float64", arch=family)

    assert same_as_jax(path, f"{out}.operator", out, family) < 1e-14
    assert verify(out, settings=Settings(levels=("files", "weights"))).passed
