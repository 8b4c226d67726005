"""The theory of growth: lemmas, bracket, flow and symmetry, in float64 on an MLP and on twins, and what breaks them."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import exhaustive, first_soon
from models import SIZES, WIDER, checkpoint, state

from fusectl.errors import Incompatible, NotEnoughSpace
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.sink import save
from fusectl.layout.blocks import slices
from fusectl.layout.fill import Fill
from fusectl.networks.tokens import random_tokens
from fusectl.networks.training import batch_of
from fusectl.operations.fuse import open_sources
from fusectl.planning.options import Options
from fusectl.research.theory import field
from fusectl.research.theory.field import LARGEST_STEP, Losses, combined, convergence, derivatives, norm
from fusectl.research.theory.fusion import Batch, _arrays, _lemmas, theory
from fusectl.research.theory.space import Space
from fusectl.research.theory.symmetry import exchanged, of_checkpoint, of_fusion
from fusectl.rules.fusion import line_up
from fusectl.sources.opened import open_source
from fusectl.system.threads import Silent


SMALL = {"encoder": 1, "decoder": 1}
BATCH = Batch(rows=4, length=8)


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


# An MLP: sizes of layers, two of which grow; theta is the fused network, source k in its own cells.


def mlp(theta, x):
    *hidden, last = theta
    for kernel, bias in hidden:
        x = jnp.tanh(x @ kernel + bias)
    return x @ last[0] + last[1]


def entropy(logits, y):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1))


def mlp_losses(copies, alike):
    """The losses of a fused MLP 4-6-5-3, its point, and the cells of source k in every array."""
    rng = np.random.default_rng(0)
    sizes = ((4, 6), (6, 5), (5, 3))
    models = [
        [(rng.normal(size=(n, m)) / 2, rng.normal(size=m) / 4) for n, m in sizes] for _ in range(1 if alike else copies)
    ] * (copies if alike else 1)
    x, y = rng.normal(size=(16, 4)), rng.integers(0, 3, 16)

    def cell(i, k):
        # Inputs and logits do not grow: the first kernel has all rows, the last one all columns.
        n, m = sizes[i]
        rows = slice(k * n, (k + 1) * n) if i else slice(n)
        return rows, slice(k * m, (k + 1) * m) if i < 2 else slice(m)

    theta = []
    for i, (n, m) in enumerate(sizes):
        kernel = np.zeros((n * copies if i else n, m * copies if i < 2 else m))
        for k in range(copies):
            kernel[cell(i, k)] = models[k][i][0]
        theta.append((kernel, np.concatenate([models[k][i][1] for k in range(copies)])))

    def of(theta, k):
        widths = [m for _, m in sizes]
        return [(w[cell(i, k)], b[k * m : (k + 1) * m]) for i, (m, (w, b)) in enumerate(zip(widths, theta))]

    def small(theta):
        return sum(entropy(mlp(of(theta, k), x), y) for k in range(copies))

    def big(theta):
        *hidden, (kernel, bias) = theta
        # Stored, the head is divided by K.
        return entropy(mlp([*hidden, (kernel / copies, bias.reshape(copies, -1).mean(axis=0))], x), y)

    return Losses(small, big), jax.tree.map(jnp.asarray, theta), of


@pytest.mark.slow
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("copies", first_soon([2, 3]))
def test_two_steps_follow_the_flow_of_the_modified_field_on_an_mlp(copies, alike):
    losses, theta, of = mlp_losses(copies, alike)
    found = derivatives(losses, theta)
    series = convergence(losses, theta, LARGEST_STEP / found.curvature)

    assert series.slopes == (pytest.approx(3, abs=0.1), pytest.approx(2, abs=0.1), pytest.approx(2, abs=0.1))
    assert series.integration_error < 1e-3
    if alike:
        assert found.small_loss == pytest.approx(copies * found.big_loss, rel=1e-14)
        for k in range(copies):
            for x, y in zip(jax.tree.leaves(of(found.x, k)), jax.tree.leaves(of(found.y, k))):
                np.testing.assert_allclose(y, x / copies, atol=1e-15)
    of_sources = norm([of(found.bracket, k) for k in range(copies)])
    assert norm(found.bracket) > 1e-3
    assert of_sources < 1e-14 if alike else of_sources > 1e-3


@pytest.mark.slow
def test_the_bracket_is_that_of_the_hessians():
    losses, theta, _ = mlp_losses(2, alike=False)
    flat, unravel = jax.flatten_util.ravel_pytree(theta)
    (gs, hs), (gb, hb) = (
        jax.jit(lambda v, f=loss: (jax.grad(f)(v), jax.hessian(f)(v)))(flat)
        for loss in (lambda v: losses.small(unravel(v)), lambda v: losses.big(unravel(v)))
    )
    found = derivatives(losses, theta)

    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(found.bracket)[0], hb @ gs - hs @ gb, atol=1e-13)
    h, k = 0.1, 0.3
    expected = -h * gs - k * gb - h**2 / 2 * hs @ gs - k**2 / 2 * hb @ gb + h * k / 2 * (hb @ gs - hs @ gb)
    there = field.modified_field(losses, h, k)(theta)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(there)[0], expected, atol=1e-13)
    value = h * losses.small(theta) + k * losses.big(theta) + h**2 / 4 * gs @ gs + k**2 / 4 * gb @ gb
    assert found.modified_loss(h, k) == pytest.approx(float(value), rel=1e-14)


def test_steps_and_flow_of_fields_that_are_known():
    # X = -a, Y = -B theta: the bracket is H_B a = B a, a constant.
    a, b = jnp.array([1.0, -2.0]), jnp.diag(jnp.array([3.0, 0.5]))
    losses = Losses(lambda v: a @ v, lambda v: v @ b @ v / 2)
    theta, h = jnp.array([0.3, 0.7]), 0.01

    np.testing.assert_allclose(derivatives(losses, theta).bracket, b @ a, atol=1e-15)
    np.testing.assert_allclose(
        field.two_steps(losses, theta, h, 2 * h), -h * a - 2 * h * b @ (theta - h * a), atol=1e-15
    )
    # dtheta/dt = -theta for unit time, the error of RK4 being that of fourth order.
    off = [abs(float(field.flow(lambda v: -v, jnp.array([1.0]), n)[0]) - (np.exp(-1) - 1)) for n in (32, 64)]
    assert off[0] / off[1] == pytest.approx(16, rel=0.05)
    assert field.slope((1.0, 2.0, 4.0), (3.0, 24.0, 192.0)) == pytest.approx(3)
    assert np.isnan(field.slope((1.0, 2.0), (0.0, 1.0)))


def test_a_series_begins_where_no_kink_disturbs_the_integrator():
    def kinked(v):
        # The third coordinate crosses zero at a step of 1e-3 / 5 * 2.
        return jnp.sum(jnp.sin(v)) + 5 * jnp.maximum(v[2], 0.0) ** 1

    losses = Losses(lambda v: jnp.sum(jnp.cos(2 * v[:2])) + v[0] * v[1], kinked)
    theta = jnp.array([0.3, 0.7, 1e-3])
    found = convergence(losses, theta, 1e-2)
    smooth = convergence(losses, theta.at[2].set(1.0), 1e-2)

    assert smooth.steps[0] == 1e-2
    assert found.steps[0] < 1e-3
    assert found.integration_error <= field.NEGLIGIBLE
    assert found.slopes[0] == pytest.approx(3, abs=0.1)


# Checkpoints.


def options(**kwargs):
    return Options(**{"norm": "property", **kwargs})


def space_of(paths, norm="property"):
    opened = open_sources(paths, options())
    fusion = line_up([each.tree for each in opened], (1 / len(opened),) * len(opened), [o.label for o in opened])
    return Space(fusion, opened, norm, "float64")


CASES = [
    exhaustive("t5-1.1", 2, None),
    ("t5-1.0", 3, None),
    ("scalable-t5-1.1-scanned", 2, WIDER),
    exhaustive("t5-1.0", 2, WIDER),
    exhaustive("t5-1.1", 2, SIZES),
    ("t5-1.1", 3, SIZES),
    exhaustive("scalable-t5-1.0", 3, None),
    ("maxtext-qwen3", 2, None),
    exhaustive("maxtext-gemma", 3, None),
    ("gemma2", 2, None),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "copies", "other"), CASES)
def test_the_theory_of_a_fusion(tmp_path, family, copies, other):
    layers = SMALL if "t5" in family else {"decoder": 2 if family == "gemma2" else 1}
    paths = [checkpoint(tmp_path / "a", family, layers=layers)] * copies
    if other is not None:
        paths[1:] = [
            checkpoint(tmp_path / f"b{i}", family, seed=i, sizes=other, layers=layers) for i in range(1, copies)
        ]
    found = theory(paths, options(), BATCH)

    assert found.convergence.slopes == tuple(pytest.approx(slope, abs=0.1) for slope in (3, 2, 2))
    assert found.convergence.integration_error < 1e-3
    assert found.bracket_of_zeros > 1e-3
    first, result = found.modified_loss, found.as_json()
    if other is None:
        assert max(found.lemmas.errors) < 1e-12
        assert [result[f"lemma{i}"] for i in (1, 2, 3)] == list(found.lemmas.errors)
        assert found.bracket_of_copies < 1e-12 * found.bracket_of_zeros
        assert found.bracket_defect < 1e-12
        assert found.symmetry.defect == 0.0
        assert found.big_loss == pytest.approx(found.small_loss, rel=1e-13)
        # Theorem 1 with equality, its right side once more from the small model alone.
        assert first.value == pytest.approx(first.bound, rel=1e-13) == pytest.approx(first.of_small_model, rel=1e-13)
    else:
        assert found.lemmas is None
        assert result["lemma3"] is None
        assert found.bracket_of_copies > 1e-3
        assert first.value < first.bound
        assert first.of_small_model is None
        assert (found.symmetry is None) == (other == WIDER)
    assert found.bracket_norm == pytest.approx(np.hypot(found.bracket_of_copies, found.bracket_of_zeros))
    assert json.dumps(result)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The space of two copies of a T5 1.1, its point, and the derivatives there of a compiled program."""
    path = checkpoint(tmp_path_factory.mktemp("pair") / "a", layers=SMALL)
    with jax.enable_x64(True):
        space = space_of([path] * 2)
        losses = space.losses(batch_of(random_tokens(SIZES["vocab"], 4, 8, 0)))
        return space, losses, space.start()


def as_jax(point):
    return jax.tree.map(jnp.asarray, point)


def lemmas(space, losses, point):
    found = derivatives(losses, as_jax(point))
    return _lemmas(space, found, _arrays(found.bracket))


def test_the_coordinates_are_the_sources_as_they_are(pair):
    space, _, point = pair
    tree, source = space.tree, space.sources[0]

    assert sum(values.size for values in point.values()) == space.size == tree.parameters
    for i in range(2):
        for name, values in space.of_source(point, i).items():
            np.testing.assert_array_equal(values, source.checkpoint.read(source.full(name)))
    stored = space.stored(as_jax(point))
    for name, times in (("decoder/logits_dense/kernel", 1), ("decoder/decoder_norm/scale", 0.5)):
        one = source.checkpoint.read(source.full(name))
        np.testing.assert_array_equal(stored[name], np.concatenate([one, one]) * times)
    kernel = point["encoder/layers_0/mlp/wi_0/kernel"]
    assert not any(kernel[slices(region)].any() for region in space.zeros("encoder/layers_0/mlp/wi_0/kernel"))
    assert len(space.zeros("encoder/layers_0/mlp/wi_0/kernel")) == 2
    assert space.zeros("token_embedder/embedding") == []


@pytest.mark.slow
def test_the_lemmas_hold_for_copies_beside_zeros_only(pair):
    space, losses, point = pair
    assert max(lemmas(space, losses, point).errors) < 1e-12

    # A wrong 1/K: the coordinates of the head's copies are not what is stored.
    halved = Space(replace(space.fusion, weights=(1.0, 1.0)), space.sources, "property", "float64")
    scaled = lemmas(halved, halved.losses(batch_of(random_tokens(SIZES["vocab"], 4, 8, 0))), point)
    assert scaled.gradient_of_copies.error > 0.1
    # A theta_0 that is not zero.
    filled = {each: values.copy() for each, values in point.items()}
    kernel = filled["encoder/layers_0/mlp/wo/kernel"]
    for region in space.zeros("encoder/layers_0/mlp/wo/kernel"):
        kernel[slices(region)] += 0.01 * np.random.default_rng(0).normal(size=kernel[slices(region)].shape)
    of_filled = lemmas(space, losses, filled)
    assert min(of_filled.errors) > 1e-4
    assert of_filled.bracket_of_copies.error > 1e-4
    # Copies that are not equal any more: not by what softmax would not see, one number for all of the vocab.
    moved = {each: values.copy() for each, values in point.items()}
    moved["decoder/logits_dense/kernel"][0, 0] += 0.01
    of_moved = lemmas(space, losses, moved)
    assert min(of_moved.errors) > 1e-6
    assert of_moved.bracket_of_copies.error > 1e-6


@pytest.mark.slow
def test_exchanging_the_copies_changes_neither_loss(pair):
    space, losses, point = pair
    rng = np.random.default_rng(0)
    at = {name: values + 0.1 * rng.normal(size=values.shape) for name, values in point.items()}
    moved = {name: exchanged(values, space.layouts[name].axes, space.fusion.widths) for name, values in at.items()}
    one, other = losses.at(as_jax(at)), losses.at(as_jax(moved))

    assert norm(combined((1.0, at), (-1.0, moved))) > 0.1
    assert float(other.big_loss) == pytest.approx(float(one.big_loss), rel=1e-13)
    assert float(other.small_loss) == pytest.approx(float(one.small_loss), rel=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("family", first_soon(["t5-1.0", "scalable-t5-1.1-scanned", "maxtext-gemma"]))
def test_the_defect_of_a_fill_is_that_of_what_is_written(tmp_path, fusectl, family, copies):
    path = checkpoint(tmp_path / "a", family)
    words = ("self-fuse", path, "--copies", copies, "--optimizer", "drop", "-q", "--force", "-o", tmp_path / "fused")
    for fill in ("zeros", "gaussian", "antisymmetric"):
        done = fusectl(*words, "--fill", fill)
        assert done.code == 0, done.err
        written = of_checkpoint(open_source(str(tmp_path / "fused")), None, Silent())
        sources = open_sources([path] * copies, options())
        fusion = line_up([each.tree for each in sources], (1 / copies,) * copies, [path] * copies)
        planned = of_fusion(fusion, sources, Fill(fill, 0.1, 0) if fill != "zeros" else Fill())

        assert written.copies == planned.copies == copies
        if fill == "zeros":
            assert written.defect == planned.defect == 0.0
            continue
        # Rounded to float32.
        assert written.defect == pytest.approx(planned.defect, rel=1e-5)
        assert 0.01 < written.defect < 0.5
        assert written.tensors == pytest.approx(planned.tensors, rel=1e-4)
        noisy = [name for name, defect in written.tensors.items() if defect]
        assert noisy
        assert all("norm" not in name for name in noisy)


@pytest.mark.slow
def test_the_program_reports_the_defect_of_a_fusion(tmp_path, fusectl):
    path = checkpoint(tmp_path / "a")
    assert fusectl("self-fuse", path, "--fill", "gaussian", "-q", "-o", tmp_path / "fused").code == 0
    done, plain = fusectl("theory", tmp_path / "fused", "--json"), fusectl("theory", tmp_path / "fused")

    assert done.code == plain.code == 0, done.err
    result = done.json["result"]
    assert result["symmetry_defect"] > 0.01
    opened = open_checkpoint(str(tmp_path / "fused"))
    name = "encoder/layers_0/mlp/wi_0/kernel"
    values = opened.read(f"target/{name}").astype(np.float64)
    off = np.roll(values, (12, 22), (0, 1)) - values
    assert result["symmetry"]["tensors"][name] == pytest.approx(np.linalg.norm(off) / np.linalg.norm(values))
    assert "2 copies" in plain.out

    # What a trainer wrote of it has no record.
    (tmp_path / "fused/fusectl.json").unlink()
    assert fusectl("theory", tmp_path / "fused", "--symmetry", "--json").code == 2
    again = fusectl("theory", tmp_path / "fused", "--symmetry", "--copies", 2, "--json")
    assert again.json["result"]["symmetry_defect"] == result["symmetry_defect"]
    assert fusectl("theory", path, "--symmetry", "--copies", 2).code == 6
    values = {name: opened.read(name) for name in opened.leaves}
    values[f"target/{name}"][1, 2] = np.nan
    save(tmp_path / "broken", values, "t5x")
    assert fusectl("theory", tmp_path / "broken", "--symmetry", "--copies", 2).code == 5


@pytest.mark.slow
def test_the_program_prints_and_draws_the_theory(tmp_path, fusectl):
    text = tmp_path / "text.txt"
    text.write_bytes(b"the same words again and again, " * 200)
    path = checkpoint(tmp_path / "a", sizes={**SIZES, "vocab": 384}, layers=SMALL)
    words = ("theory", path, "--copies", 2, "--fill", "antisymmetric", "--data", text, "--batch", 4, "--length", 16)
    done = fusectl(*words, "--plot", tmp_path / "t.png", "--json")

    assert done.code == 0, done.err
    result = done.json["result"]
    assert max(result[f"lemma{i}"] for i in (1, 2, 3)) < 1e-12
    assert result["slope_with_bracket"] == pytest.approx(3, abs=0.1)
    assert result["slope_without_bracket"] == pytest.approx(2, abs=0.1)
    assert result["slope_wrong_sign"] == pytest.approx(2, abs=0.1)
    assert result["bracket_norm"] > 0.0
    assert result["symmetry_defect"] > 0.01
    assert {"encoder/layers_0", "decoder/layers_0", "token_embedder"} <= {each["layer"] for each in result["layers"]}
    assert "text.txt" in result["tokens"]
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")

    plain = fusectl(*words, "--no-x64", "--plot", tmp_path / "n.svg")
    assert plain.code == 0, plain.err
    assert plain.out.count("holds: ") == 4
    assert "no measure of capacity" in plain.out
    assert "theorem 2: no series of steps in float32" in plain.out


def test_bad_requests_are_refused_before_anything_is_computed(tmp_path, fusectl):
    a, wide = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "wide", sizes=WIDER, seed=1)
    vocab = checkpoint(tmp_path / "vocab", sizes={**SIZES, "vocab": 50})
    tokens = tmp_path / "tokens.jsonl"
    tokens.write_text('{"inputs": [3, 70], "targets": [5, 1]}\n' * 40)
    for words, code, says in (
        ((a,), 2, "--copies 2"),
        ((a, "--copies", 1), 2, "two or more"),
        ((a, wide, "--copies", 2), 2, "of one checkpoint"),
        ((a, vocab), 6, "'vocab' is shared but differs"),
        ((a, wide, "--fill", "antisymmetric"), 6, "equal widths"),
        ((a, "--copies", 2, "--data", tokens), 6, "token 70 is not in the vocabulary of 41"),
        ((a, "--copies", 2, "--data", tmp_path / "none"), 4, "no file of tokens"),
        ((a, "--copies", 2, "--plot", tmp_path / "t.doc"), 2, "no format of pictures"),
        ((a, "--symmetry", "--copies", 2, "--plot", tmp_path / "t.png"), 2, "--symmetry"),
        ((tmp_path / "none", "--copies", 2), 4, "no such"),
    ):
        done = fusectl("theory", *words)
        assert done.code == code, (words, done.err)
        assert says in done.err


@pytest.mark.slow
def test_values_and_losses_that_are_no_numbers_are_refused(tmp_path, monkeypatch):
    values = state("t5-1.1", 0, layers=SMALL)
    name = "target/encoder/layers_0/mlp/wo/kernel"
    values[name] = values[name] * 1e300 * 1e8 if values[name].dtype == np.float64 else values[name]
    values[name][0, 0] = np.inf
    save(tmp_path / "inf", values, "t5x")
    with pytest.raises(Exception, match=r"wo/kernel\[0, 0\] is inf"):
        theory([str(tmp_path / "inf")] * 2, options(), BATCH)
    path = checkpoint(tmp_path / "a", layers=SMALL)
    with pytest.raises(NotEnoughSpace, match="does not fit into memory"):
        theory([path] * 2, options(), BATCH, budget_bytes=1 << 16)
    zeros = {key: np.zeros_like(each) for key, each in state("t5-1.1", 0, layers=SMALL).items()}
    save(tmp_path / "zeros", zeros, "t5x")
    with pytest.raises(Incompatible, match="gradient of zero"):
        theory([str(tmp_path / "zeros")] * 2, options(), BATCH)
