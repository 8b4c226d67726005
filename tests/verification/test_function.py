"""The twin against the real T5X network, and the fused models against their ensembles, at the issue's tolerances."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import diagonals, first_soon, slow, some_soon
from models import WIDER, checkpoint, state

from fusectl.errors import NotEnoughSpace
from fusectl.families.recognition import recognize
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.sink import save
from fusectl.layout.fill import Fill
from fusectl.networks import t5_stages as t5_twin
from fusectl.networks.run import read_part
from fusectl.networks.stages import Part, Step
from fusectl.networks.tokens import Tokens
from fusectl.operations.fuse import plan_fusion
from fusectl.operations.noise_fill import plan_noise_fill
from fusectl.planning.options import Options
from fusectl.verification import Declared, Settings, verify
from fusectl.verification.logits import LogitsComparison
from fusectl.writing.carrying_out import carry_out


VARIANTS = ["t5_1_1", "t5_1_0", "scalable_1_1"]
TOLERANCE = {"float32": 5e-6, "float64": 1e-12}
# Precisions, and whether the models run layer by layer.
RUNS = [("float32", False), ("float32", True), ("float64", True)]
FUNCTION_ONLY = ("algebra", "native")


def seed(written, variant, number):
    return str(written / variant / f"seed{number}/legacy/checkpoint_20")


def fuse(paths, output, fill=Fill(), **options):
    plan, sources = plan_fusion(
        paths, Options(fill=fill, **options), command="self-fuse" if len(set(paths)) == 1 else "fuse"
    )
    return str(carry_out(plan, sources, Path(output), force=True))


def logits(path, tokens, groups=None, precision="float32", layered=False):
    opened = open_checkpoint(path)
    tree = recognize(opened.shapes, path)
    batch = Tokens(tokens["enc"], tokens["dec"], tokens["tgt"])
    stages = t5_twin.layered(tree, batch, 50) if layered else t5_twin.whole(tree)
    state, parts = {}, []
    with jax.enable_x64(True):
        config = t5_twin.config_of(tree, groups or (tree.sizes["embed"],), precision, accumulate="float64")
        for stage in stages:
            values = {part.name: np.asarray(read_part(opened, tree, part), precision) for part in stage.parts}
            state, _ = stage.run(Step(config, values, batch, state))
            if "logits" in state:
                parts.append(np.asarray(state.pop("logits")))
    return np.concatenate(parts, axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("precision", "suffix", "tolerance"), [("float32", "", 1e-5), ("float64", "_f64", 1e-12)])
def test_the_twin_is_t5xs_network(written, variant, precision, suffix, tolerance):
    for number in (0, 1):
        expected = np.load(written / variant / f"seed{number}/logits{suffix}.npz")
        wanted = expected["tgt"] > 0
        found = logits(seed(written, variant, number), expected, precision=precision, layered=number == 1)

        assert found.dtype == precision
        np.testing.assert_allclose(found[wanted], expected["logits"][wanted], rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant", first_soon(VARIANTS))
@pytest.mark.parametrize(("precision", "units"), [slow("float32", 4), ("float64", 16)])
def test_whole_and_layer_by_layer_are_the_same_to_rounding(written, variant, precision, units):
    tokens = np.load(written / variant / "seed0/logits.npz")
    wanted = tokens["tgt"] > 0

    whole, layered = (
        logits(seed(written, variant, 0), tokens, precision=precision, layered=how)[wanted] for how in (False, True)
    )

    assert np.abs(whole - layered).max() <= units * np.finfo(precision).eps * np.abs(whole).max()


def test_rows_that_are_picked_are_those_of_the_tensor(tmp_path):
    """Gathered from chunks that some of them share and that others do not touch."""
    values = {"target/token_embedder/embedding": np.arange(41 * 12, dtype=np.float32).reshape(41, 12)}
    whole_state = {**state("t5-1.1", 0), **values}
    save(tmp_path / "a", whole_state, "t5x", chunks={"target/token_embedder/embedding": (7, 5)})
    opened = open_checkpoint(str(tmp_path / "a"))
    ids = (0, 3, 6, 7, 29, 40)

    picked = read_part(opened, recognize(opened.shapes, "a"), Part("token_embedder/embedding", "vocab", ids))

    np.testing.assert_array_equal(picked, values["target/token_embedder/embedding"][list(ids)])


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_models_compute_what_t5x_computes_with_them(written, tmp_path, variant):
    """Real T5X logits of the K = 2 fusion: of seed 0 with itself, and of two seeds with either norm."""
    expected = np.load(written / variant / "fused2_logits.npz")
    wanted = expected["tgt"] > 0
    two = fuse([seed(written, variant, 0), seed(written, variant, 1)], tmp_path / "two")
    twice = fuse([seed(written, variant, 0)] * 2, tmp_path / "twice")

    for path, groups, key in ((two, (16, 16), "grouped"), (two, (32,), "plain"), (twice, (32,), "self")):
        np.testing.assert_allclose(logits(path, expected, groups)[wanted], expected[key][wanted], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "copies"), some_soon(diagonals(VARIANTS, [2, 3, 4]), lambda case: case == ("t5_1_1", 2))
)
def test_self_fusion_keeps_the_logits(written, tmp_path, variant, copies):
    source = seed(written, variant, 0)
    expected = np.load(written / variant / "seed0/logits.npz")
    wanted = expected["tgt"] > 0
    path = fuse([source] * copies, tmp_path / "out")

    # Whole once, layer by layer always.
    runs = RUNS if copies == 2 else RUNS[1:]
    kept, grown = (logits(each, expected, layered=copies > 2)[wanted] for each in (source, path))

    assert np.abs(grown - kept).max() <= TOLERANCE["float32"]
    for precision, layered in runs:
        report = verify(path, settings=Settings(FUNCTION_ONLY, x64=precision == "float64", layered=layered))
        assert report.passed
        assert report.algebra.max_abs <= TOLERANCE[precision]
        assert report.native.max_abs <= TOLERANCE["float32"]


@pytest.mark.parametrize("variant", first_soon(VARIANTS))
def test_two_sources_compute_their_mean_with_a_norm_each(written, tmp_path, variant):
    path = fuse([seed(written, variant, 0), seed(written, variant, 1)], tmp_path / "out")

    for precision, layered in RUNS:
        report = verify(path, settings=Settings(FUNCTION_ONLY, x64=precision == "float64", layered=layered))
        assert report.passes.startswith("layer by layer" if layered else "all layers at once")
        assert report.passed
        assert report.algebra.max_abs <= TOLERANCE[precision]
        # One norm over both is another function; it is reported, not held to anything.
        assert report.native.passed is None
        assert report.native.rms > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", first_soon(["t5-1.1", "t5-1.0", "scalable-t5-1.1", "scalable-t5-1.0", "scalable-t5-1.0-scanned"], 2)
)
def test_unequal_widths_and_weights_compute_the_weighted_mean(tmp_path, family):
    a = checkpoint(tmp_path / "a", family, 0, layers={"encoder": 2, "decoder": 1})
    b = checkpoint(tmp_path / "b", family, 1, WIDER, layers={"encoder": 2, "decoder": 1})
    plan, sources = plan_fusion([a, b], Options(), weights=(0.7, 0.3))
    path = str(carry_out(plan, sources, tmp_path / "out"))

    report = verify(path, settings=Settings(("weights", "algebra"), x64=True))

    assert report.passed
    assert report.algebra.max_abs <= 1e-12 * max(1.0, report.algebra.reference_max_abs)


@pytest.mark.slow
def test_antisymmetric_noise_keeps_a_self_fused_function_and_breaks_its_symmetry(written, tmp_path):
    source = seed(written, "t5_1_1", 0)
    path = fuse([source] * 2, tmp_path / "out", Fill("antisymmetric", 0.3, 1))

    report = verify(path, settings=Settings(("weights", *FUNCTION_ONLY), x64=True))

    assert report.passed
    assert report.weights.noise_blocks > 0
    assert report.algebra.max_abs <= 1e-12
    assert report.native.max_abs <= 5e-6
    kernel = open_checkpoint(path).read("target/encoder/layers_0/mlp/wi_0/kernel")
    assert not np.allclose(kernel[:16, :32], kernel[16:, 32:])


def test_gaussian_noise_shifts_native_and_not_the_algebra(written, tmp_path):
    sources = [seed(written, "t5_1_1", 0)] * 2
    zeros = verify(fuse(sources, tmp_path / "zeros"), settings=Settings(FUNCTION_ONLY))
    noisy = verify(fuse(sources, tmp_path / "noisy", Fill("gaussian", 0.1, 1)), settings=Settings(FUNCTION_ONLY))

    assert noisy.passed
    assert noisy.algebra.max_abs <= 5e-6
    assert zeros.native.max_abs <= 5e-6
    assert noisy.native.rms > 1e-3
    assert noisy.native.passed is None
    # Noise is no rounding: what is stored computes the ensemble but for the noise.
    half = verify(
        fuse(sources, tmp_path / "half", Fill("gaussian", 0.1, 1), dtype="bfloat16"), settings=Settings(FUNCTION_ONLY)
    )
    assert half.passed
    assert half.algebra.max_abs_as_stored < 0.02 < half.native.max_abs


@pytest.mark.slow
def test_noise_fill_of_a_fusion_is_the_fusion_with_noise(written, tmp_path):
    sources = [seed(written, "t5_1_1", 0)] * 3
    for fill in (Fill("gaussian", 0.1, 4), Fill("antisymmetric", 0.2, 4)):
        at_once = open_checkpoint(fuse(sources, tmp_path / f"once-{fill.kind}", fill))
        plan, opened = plan_noise_fill(fuse(sources, tmp_path / "zeros"), Options(fill=fill))
        later = open_checkpoint(str(carry_out(plan, opened, tmp_path / f"later-{fill.kind}")))

        for name in at_once.leaves:
            assert at_once.read(name).tobytes() == later.read(name).tobytes(), name
        assert later.record.sources == at_once.record.sources


@pytest.mark.slow
def test_staged_fusion_tracks_its_norm_groups(written, tmp_path):
    """T5-S to T5-M to T5-L: a fusion of two models, fused with itself, has four groups and the same logits."""
    medium = fuse([seed(written, "t5_1_0", 0), seed(written, "t5_1_0", 1)], tmp_path / "medium")
    large = fuse([medium] * 2, tmp_path / "large")

    assert open_checkpoint(large).record.norm_groups == (16, 16, 16, 16)
    report = verify(large, settings=Settings(("weights", *FUNCTION_ONLY), x64=True))
    assert report.passed
    assert report.algebra.max_abs <= 1e-12
    # With one norm it is the same model as the medium one with one norm: copies do not mix.
    assert report.native.max_abs <= 5e-6


@pytest.mark.slow
@pytest.mark.parametrize(("copies", "variant"), diagonals([4, 2, 3], ["t5_1_0", "t5_1_1"]))
def test_what_storing_in_bfloat16_costs_is_undone_in_the_algebra_and_said(written, tmp_path, variant, copies):
    """Before a tied head scale / sqrt(K) is stored, before an untied one scale / K: bfloat16 rounds both by up to 2**-9
    unless K is a power of 4 or of 2.
    """
    opened = open_checkpoint(seed(written, variant, 0))
    stored = {n: opened.read(n).astype("bfloat16" if n.startswith("target/") else "float32") for n in opened.leaves}
    stored["state/step"] = opened.read("state/step")
    save(tmp_path / "source", stored, "t5x")
    path = fuse([str(tmp_path / "source")] * copies, tmp_path / "out")

    for layered in (False, True):
        report = verify(path, settings=Settings(("weights", *FUNCTION_ONLY), layered=layered))

        assert report.passed
        assert report.algebra.max_abs <= 5e-6
        if copies == 4 or (copies == 2 and variant == "t5_1_1"):
            assert report.algebra.max_abs_as_stored is None
            assert report.native.max_abs <= 5e-6
        else:
            assert 1e-4 < report.algebra.max_abs_as_stored < 5e-3
            assert 1e-4 < report.native.max_abs <= report.native.tolerance
            assert "bfloat16 as stored" in report.native.tolerance_says


@pytest.mark.slow
def test_a_threshold_makes_the_native_distance_a_claim(written, tmp_path):
    path = fuse([seed(written, "t5_1_1", 0), seed(written, "t5_1_1", 1)], tmp_path / "out")
    distance = verify(path, settings=Settings(FUNCTION_ONLY)).native.rms

    assert verify(path, settings=Settings(FUNCTION_ONLY, max_native_rms=2 * distance)).passed
    report = verify(path, settings=Settings(FUNCTION_ONLY, max_native_rms=distance / 2))
    assert not report.passed
    assert f"at most {distance / 2:g} allowed" in report.failures()[0]


@pytest.mark.slow
def test_how_the_models_run_follows_from_the_memory(written, tmp_path):
    path = fuse([seed(written, "t5_1_1", 0)] * 2, tmp_path / "out")

    def passes(budget, layered=None):
        settings = Settings(FUNCTION_ONLY, max_memory_bytes=budget, layered=layered)
        return verify(path, settings=settings).passes

    assert passes(1 << 30).startswith("all layers at once")
    assert passes(1_000_000).startswith("layer by layer")
    with pytest.raises(NotEnoughSpace, match="hold one layer of all models in memory"):
        passes(1000)
    with pytest.raises(NotEnoughSpace, match="hold all models in memory"):
        passes(1_000_000, layered=False)


@pytest.mark.slow
def test_batches_that_do_not_fit_are_cut_into_several(written, tmp_path):
    """The same numbers, whatever the memory: sums over rows and over parts of the vocab."""
    path = fuse([seed(written, "t5_1_1", 0), seed(written, "t5_1_1", 1)], tmp_path / "out")
    small = Settings(FUNCTION_ONLY, batch=7, max_memory_bytes=1_000_000, trace=True)

    pieces, at_once = (verify(path, settings=s) for s in (small, replace(small, max_memory_bytes=None)))

    assert "7 batches" in pieces.passes
    assert "batches" not in at_once.passes
    for one, two in ((pieces.algebra, at_once.algebra), (pieces.native, at_once.native)):
        assert one.tokens == two.tokens
        assert one.top1_agreement == two.top1_agreement
        for key in ("rms", "kl", "max_abs", "reference_rms", "reference_max_abs"):
            assert getattr(one, key) == pytest.approx(getattr(two, key), rel=1e-4, abs=1e-6), key
    for one, two in zip(pieces.trace, at_once.trace, strict=True):
        assert one.norm == two.norm
        assert one.rms == pytest.approx(two.rms, rel=1e-5)
        assert one.deviation == pytest.approx(two.deviation, rel=1e-4, abs=1e-6)


def test_the_comparison_in_parts_of_the_vocab_is_the_comparison(written):
    rng = np.random.default_rng(0)
    reference = rng.normal(0, 3, (5, 64))
    got = reference + rng.normal(0, 0.3, (5, 64))
    one = np.ones((1, 5), np.int32)
    tokens = Tokens(one, one, one)

    parts = LogitsComparison("head")
    for start in range(0, 64, 10):
        parts.add(tokens, got[:, start : start + 10], reference[:, start : start + 10])
    found = parts.result(None, "", "", None, None)

    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (reference, got))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    assert found.kl == pytest.approx(np.mean(np.sum(p * np.log(p / q), -1)))
    assert found.max_abs == np.abs(got - reference).max()
    assert found.rms == pytest.approx(np.sqrt(np.mean((got - reference) ** 2)))
    assert found.relative_rms == pytest.approx(found.rms / np.sqrt(np.mean(reference**2)))
    assert found.top1_agreement == np.mean(got.argmax(-1) == reference.argmax(-1))
    assert found.tokens == 5


def test_a_nan_among_the_logits_never_passes_and_is_where_they_differ():
    comparison = LogitsComparison("decoder/logits_dense/kernel")
    logits = np.zeros((2, 8))
    logits[1, 3] = np.nan
    two = np.ones((1, 2), np.int32)
    tokens = Tokens(two, two, two, first_row=5)

    comparison.add(tokens, logits, np.zeros((2, 8)))
    comparison.add(tokens, np.full((2, 8), 9.0), np.zeros((2, 8)))

    assert comparison.result(1e3, "", "", None, None).passed is False
    assert comparison.result(None, "", "", None, 1e3).passed is False
    assert comparison.result(None, "", "", None, None).passed is None
    assert comparison.worst.position == (5, 1, 3)
    assert "decoder/logits_dense: nan at [5, 1, 3], 0 expected" in str(comparison.worst)


@pytest.mark.slow
def test_the_trace_tells_how_much_one_norm_mixes(written, tmp_path):
    path = fuse([seed(written, "t5_1_1", 0), seed(written, "t5_1_1", 1)], tmp_path / "out")

    for layered in (False, True):
        rows = verify(path, settings=Settings(("native",), trace=True, layered=layered)).trace

        assert [row.norm for row in rows[:3]] == [
            "encoder/layers_0/pre_attention_layer_norm",
            "encoder/layers_0/pre_mlp_layer_norm",
            "encoder/layers_1/pre_attention_layer_norm",
        ]
        assert len(rows) == 2 * 2 + 1 + 2 * 3 + 1
        # Nothing has been normalised before the first norm.
        assert rows[0].deviation < 1e-6
        assert rows[-1].deviation > 0.01
        for row in rows:
            # Of tokens of equal ratio it would be sqrt(2 / (1 + r**2)); their mean is near.
            ratio = row.rms[1] / row.rms[0]
            assert row.mixing[0] == pytest.approx(np.sqrt(2 / (1 + ratio**2)), rel=0.05)
            assert row.mixing[1] == pytest.approx(np.sqrt(2 / (1 + ratio**-2)), rel=0.05)
            assert row.fused_rms == pytest.approx(np.sqrt(np.mean(np.square(row.rms))), rel=0.3)


@pytest.mark.slow
def test_the_trace_of_copies_shows_that_nothing_mixes(written, tmp_path):
    path = fuse([seed(written, "t5_1_0", 0)] * 3, tmp_path / "out")

    for row in verify(path, settings=Settings(FUNCTION_ONLY, trace=True)).trace:
        assert row.mixing == pytest.approx((1.0,) * 3)
        assert row.deviation < 1e-6
        assert row.algebra_deviation < 1e-6


@pytest.mark.slow
def test_a_model_with_a_norm_per_source_trains_as_the_ensemble(written, tmp_path):
    path = fuse([seed(written, "t5_1_1", 0), seed(written, "t5_1_1", 1)], tmp_path / "out", norm="property")

    report = verify(path, settings=Settings(FUNCTION_ONLY))

    assert report.native.passed
    assert report.native.max_abs <= 5e-6


@pytest.mark.slow
def test_declared_sources_stand_in_for_a_record(written, tmp_path):
    paths = [seed(written, "t5_1_1", 0), seed(written, "t5_1_1", 1)]
    path = fuse(paths, tmp_path / "out")
    (tmp_path / "out/fusectl.json").unlink()

    report = verify(path, Declared(sources=tuple(paths)), Settings(("files", "weights", "algebra")))

    assert report.passed
    assert report.files.checksums == 0
