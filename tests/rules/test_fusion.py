"""The fusion rule by its properties, and against numpy's own block matrices."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import ALL_NAMES, FAMILY_NAMES, LAYERS, SIZES, sizes_of, state, wider_of

from fusectl.errors import Incompatible
from fusectl.families.recognition import recognize
from fusectl.families.registry import FAMILIES, family_named
from fusectl.layout.blocks import Noise, Product, Term
from fusectl.layout.fill import Fill
from fusectl.rules.fusion import carrier, check_fill, fused, line_up


widths = st.integers(1, 9)


def tree(family, *, embed, heads, mlp, layers=LAYERS, **sizes):
    own = {**SIZES, "embed": embed, "heads": heads, "joined_kv": 5 * heads, "mlp": mlp, **sizes}
    names = {n: v.shape for n, v in state(family, 0, own, layers).items()}
    return recognize(names, "here", family)


def evaluate(layout, sources):
    """The layout's values, without the executor: only for layouts of source terms and constants."""
    out = np.zeros(layout.shape)
    for block in layout.blocks:
        at = tuple(slice(r.start, r.stop) for r in block.at)
        for term in block.terms:
            if isinstance(term, Product):
                assert term.factors == ()
                out[at] += term.scale
                continue
            assert isinstance(term, Term)
            out[at] += term.scale * sources[term.source][tuple(slice(r.start, r.stop) for r in term.region)]
    return out


@given(
    family=st.sampled_from(FAMILY_NAMES),
    models=st.lists(st.tuples(widths, widths, widths), min_size=2, max_size=4),
    fill=st.sampled_from([Fill(), Fill("gaussian", 0.1, 0)]),
)
def test_blocks_are_disjoint_and_with_noise_they_cover_every_kernel(family, models, fill):
    trees = [tree(family, embed=e, heads=h, mlp=m, layers={"encoder": 1, "decoder": 1}) for e, h, m in models]
    fusion = line_up(trees, [1 / len(trees)] * len(trees), [str(i) for i in range(len(trees))])

    for name, row in trees[0].rows.items():
        layout = fused(fusion, name, "float32", fill, [f"target/{name}"] * len(trees))

        assert list(layout.problems()) == []
        grown_sides = [side & fusion.widths.keys() for side in (row.spec.inputs, row.spec.outputs)]
        if fill.kind != "zeros" or not all(grown_sides):
            assert layout.covered == math.prod(layout.shape), name


@given(models=st.lists(st.tuples(widths, widths, widths), min_size=2, max_size=4), data=st.data())
def test_kernels_become_the_block_matrix_that_numpy_makes(models, data):
    trees = [tree("t5-1.1", embed=e, heads=h, mlp=m, layers={"encoder": 1, "decoder": 1}) for e, h, m in models]
    weights = np.array([data.draw(st.floats(0.1, 1)) for _ in trees])
    weights /= weights.sum()
    rng = np.random.default_rng(0)

    def check(name, expected, factor_in=None):
        fusion = line_up(trees, list(weights), [str(i) for i in range(len(trees))], factor_in)
        values = [rng.normal(size=t.shapes[name]) for t in trees]
        layout = fused(fusion, name, "float64", Fill(), [name] * len(trees))
        assert np.array_equal(evaluate(layout, values), expected(values)), name

    def blocks(values):
        zero = lambda i, j: np.zeros((values[i].shape[0], values[j].shape[1]))
        n = range(len(values))
        return np.block([[values[i] if i == j else zero(i, j) for j in n] for i in n])

    check("encoder/layers_0/mlp/wi_0/kernel", blocks)
    check("decoder/layers_0/self_attention/out/kernel", blocks)
    check("token_embedder/embedding", np.hstack)
    check("encoder/relpos_bias/rel_embedding", np.vstack)
    weighted = lambda v: np.concatenate([w * x for w, x in zip(weights, v)])
    check("decoder/decoder_norm/scale", weighted)
    check("decoder/logits_dense/kernel", np.vstack)
    check("encoder/encoder_norm/scale", np.concatenate)
    check("decoder/decoder_norm/scale", np.concatenate, "head")
    check("decoder/logits_dense/kernel", weighted, "head")


@given(models=st.lists(st.tuples(widths, widths, widths), min_size=2, max_size=4))
def test_the_tied_head_makes_the_divided_logits_their_mean(models):
    """T5 1.0: logits = (norm * scale) @ E.T / sqrt(width), so the factors must satisfy the mean exactly."""
    trees = [tree("t5-1.0", embed=e, heads=h, mlp=m, layers={"encoder": 1, "decoder": 1}) for e, h, m in models]
    fusion = line_up(trees, [1 / len(trees)] * len(trees), [str(i) for i in range(len(trees))])
    layout = fused(fusion, "decoder/decoder_norm/scale", "float64", Fill(), ["s"] * len(trees))
    rng = np.random.default_rng(0)
    hidden = [rng.normal(size=e) for e, _, _ in models]
    tables = [rng.normal(size=(11, e)) for e, _, _ in models]
    total = sum(e for e, _, _ in models)

    mean = sum(table @ h / math.sqrt(len(h)) for h, table in zip(hidden, tables)) / len(models)
    scale = evaluate(layout, [np.ones(e) for e, _, _ in models])
    logits = np.hstack(tables) @ (np.concatenate(hidden) * scale) / math.sqrt(total)

    np.testing.assert_allclose(logits, mean, rtol=1e-12, atol=1e-14)


def factor(tree, name, weight, part, factor_in):
    """What a source's values are multiplied with, as its network needs it; `part` is its share of the width.

    The gemma package multiplies what it embeds with the square root of the width; T5 1.0 and MaxText, but for Qwen,
    divide a tied head's logits by it. A tied head is the embedding, so the norm before it has to make up for both;
    with another head either of the two takes the weight.
    """
    row = tree.rows[name]
    tied = not any("head" in each.roles for each in tree.rows.values())
    embedded = part**0.5 if tree.family.name.startswith("gemma") else 1.0
    divided = not tree.family.name.startswith(("gemma", "maxtext-qwen"))
    logits = part**-0.5 if divided else 1.0
    if row.role == "embedding":
        return embedded
    if row.role == "head":
        return weight if factor_in == "head" else 1.0
    if row.role == "final_norm" and not name.startswith("encoder"):
        return weight * logits / embedded if tied else weight if factor_in == "norm" else 1.0
    return 1.0


UNTIED = [name for name in ALL_NAMES if not family_named(name).tied]
PLACES = [*((family, "norm") for family in ALL_NAMES), *((family, "head") for family in UNTIED)]


@pytest.mark.parametrize(("family", "factor_in"), PLACES)
def test_every_tensor_of_every_family_stands_where_its_axes_say(family, factor_in):
    """Three models, one of them wider: each tensor against a loop over its entries' places."""
    usual, wide = sizes_of(family_named(family)), wider_of(family_named(family))
    weights, sources = (0.5, 0.3, 0.2), [state(family, seed, each) for seed, each in enumerate((usual, wide, usual))]
    found = [recognize({n: v.shape for n, v in each.items()}, "here", family) for each in sources]
    fusion = line_up(found, weights, ["a", "b", "c"], factor_in)
    full = {name.removeprefix("target/").removeprefix("params/params/"): name for name in sources[0]}
    total = 2 * usual["embed"] + wide["embed"]

    for name, row in found[0].rows.items():
        values = [each[full[name]].astype(np.float64) for each in sources]
        got = evaluate(fused(fusion, name, "float64", Fill(), [full[name]] * 3), values)

        wider = [len({v.shape[i] for v in values}) > 1 for i in range(values[0].ndim)]
        if not any(wider):
            np.testing.assert_array_equal(got, values[0], err_msg=name)
            continue
        expected = np.zeros([sum(v.shape[i] for v in values) if w else values[0].shape[i] for i, w in enumerate(wider)])
        ends = np.zeros(len(wider), int)
        for value, weight, tree in zip(values, weights, found):
            at = tuple(slice(e, e + n) if w else slice(n) for e, n, w in zip(ends, value.shape, wider))
            times = factor(tree, name, weight, tree.sizes["embed"] / total, factor_in)
            # The gemma package's norms multiply with 1 + scale.
            one = 1.0 if family.startswith("gemma") and row.is_norm else 0.0
            expected[at] = times * (value + one) - one
            ends += value.shape
        np.testing.assert_allclose(got, expected, rtol=1e-15, atol=1e-15, err_msg=name)


def test_antisymmetric_noise_is_taken_off_where_it_is_added():
    one = tree("t5-1.1", embed=4, heads=2, mlp=6)
    fusion = line_up([one] * 3, [1 / 3] * 3, ["a"] * 3)

    layout = fused(fusion, "encoder/layers_0/mlp/wi_0/kernel", "float32", Fill("antisymmetric", 0.2, 0), ["k"] * 3)

    assert len(layout.blocks) == 9
    for i in range(3):
        own = next(b for b in layout.blocks if b.at == (range(4 * i, 4 * i + 4), range(6 * i, 6 * i + 6)))
        taken_off = {t.region for t in own.terms if isinstance(t, Noise)}
        added = {b.at for b in layout.blocks if isinstance(b.terms[0], Noise) and b.at[1] == range(6 * i, 6 * i + 6)}
        assert taken_off == added
        assert len(added) == 2


def test_antisymmetric_noise_between_unequal_widths_is_refused():
    pair = [tree("t5-1.1", embed=4, heads=2, mlp=6), tree("t5-1.1", embed=5, heads=2, mlp=6)]
    fusion = line_up(pair, [0.5, 0.5], ["a", "b"])

    with pytest.raises(Incompatible, match="equal widths"):
        check_fill(fusion, Fill("antisymmetric", 0.2, 0))


def test_scanned_and_unscanned_models_get_noise_relative_to_each_layers_kernel():
    one = tree("scalable-t5-1.1-scanned", embed=4, heads=2, mlp=6)
    fusion = line_up([one] * 2, [0.5] * 2, ["a"] * 2)

    layout = fused(fusion, "decoder/decoder/mlp/wo/kernel", "float32", Fill("gaussian", 0.2, 0), ["k"] * 2)

    assert {t.stacked_axis for b in layout.blocks for t in b.terms if isinstance(t, Noise)} == {1}


def test_all_differences_of_all_sources_are_listed_together():
    a = tree("t5-1.1", embed=4, heads=2, mlp=6)
    b = tree("t5-1.1", embed=4, heads=2, mlp=6, vocab=42, layers={"encoder": 4, "decoder": 1})
    c = tree("t5-1.1", embed=4, heads=2, mlp=6, joined_kv=14)
    assert family_named("t5-1.1") is a.family

    with pytest.raises(Incompatible) as error:
        line_up([a, b, c], [1 / 3] * 3, ["A", "B", "C"])

    assert list(error.value.details) == [
        "depth of the encoder: 2 layers in A, 4 in B",
        "axis 'vocab' is shared but differs: 41 in A, 42 in B",
        "head_dim (joined_kv / heads) is shared but differs: 5 in A, 7 in C",
    ]


@pytest.mark.parametrize(
    ("family", "factor_in", "says"),
    [("t5-1.0", "head", "its embedding, which writes the stream"), ("maxtext-qwen2-tied", "head", "is its embedding")],
)
def test_a_factor_that_has_no_place_is_refused(family, factor_in, says):
    with pytest.raises(Incompatible, match=says):
        carrier(family_named(family), factor_in)


def test_the_factor_is_in_the_norm_wherever_a_family_has_one():
    assert {family.factor_in for family in FAMILIES} == {"norm"}
    before = {name: [row.pattern for row in family_named(name).rows if row.before_head] for name in ALL_NAMES}
    assert {len(rows) for rows in before.values()} == {1}
