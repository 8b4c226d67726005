"""Decoders of every block, layout and size: fused, proved, their states carried; and what cannot be fused."""

import json
import shutil
import warnings

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from cases import covered, first_soon, slow
from models import (
    DECODER_NAMES,
    DECODER_SIZES,
    WIDER_DECODER,
    checkpoint,
    covering,
    parts_of,
    state,
    wider_of,
    write_record,
)

from fusectl.errors import Incompatible
from fusectl.families.registry import family_named
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.record import FILE_NAME
from fusectl.formats.sink import save
from fusectl.layout.fill import Fill
from fusectl.operations.fuse import plan_fusion
from fusectl.operations.noise_fill import plan_noise_fill
from fusectl.optimizer.state import is_state
from fusectl.planning.options import Options
from fusectl.verification import Declared, Settings, verify
from fusectl.writing.carrying_out import carry_out


# One of most blocks and layouts; and, slow, as many as any two choices meet in. That each tensor of all of them is put
# where it belongs is shown on the plan: transforms/test_grow.py.
SOME = ["maxtext-llama-tied-scanned", "maxtext-qwen3-tied", "maxtext-gemma2-tied", "gemma-qkv-transposed", "gemma3"]
EVERY = first_soon(covering(DECODER_NAMES, SOME), len(SOME))
COPIED = [(family, 2 + i % 2) for i, family in enumerate(covering(DECODER_NAMES, SOME)[len(SOME) :])]
EXACT = Settings(levels=("weights", "algebra", "native"), x64=True, batch=2, length=8)


def write(at, family, seed, sizes=None, dtype=np.float64):
    """A random model in Orbax's layout, norms of queries and keys the same for every seed."""
    values = state(family, seed, sizes)
    rng = np.random.default_rng(0)
    values |= {n: rng.uniform(0.5, 1.5, v.shape) for n, v in values.items() if "query_norm" in n or "key_norm" in n}
    save(at, {name: v.astype(dtype) for name, v in values.items()}, "orbax", item=None)
    return str(at)


def fuse(paths, output, options=None, **kwargs):
    plan, opened = plan_fusion([str(path) for path in paths], options or Options(), **kwargs)
    carry_out(plan, opened, output)
    return plan


def values(path):
    opened = open_checkpoint(str(path))
    return {name: opened.read(name) for name in opened.leaves}


def restored(item):
    """What unmodified Orbax makes of an item."""
    with warnings.catch_warnings():
        # Of devices that are other ones now.
        warnings.filterwarnings("ignore", message="Sharding info not provided")
        return ocp.PyTreeCheckpointer().restore(item)


def bound(result):
    """What 1e-12 is relative to."""
    return 1e-12 * max(1.0, result.reference_max_abs)


@pytest.mark.parametrize(("family", "copies"), first_soon([*((family, 2) for family in SOME), *COPIED]))
def test_a_model_fused_with_itself_is_the_same_function(tmp_path, family, copies):
    path = write(tmp_path / "a", family, 1)
    fuse([path] * copies, tmp_path / "f", Options(fill=Fill("antisymmetric", 0.2, 3)))

    report = verify(str(tmp_path / "f"), settings=EXACT)

    assert report.passed, report.failures()
    # As it will train, with one norm, and the noise in place.
    assert report.native.max_abs <= bound(report.native)
    assert report.record.family == family


@pytest.mark.slow
@pytest.mark.parametrize("family", covered(EVERY, parts_of))
def test_models_of_unequal_widths_become_their_mean_with_a_norm_each(tmp_path, family):
    a, b, c = (
        write(tmp_path / "a", family, 1),
        write(tmp_path / "b", family, 2, wider_of(family_named(family))),
        tmp_path / "c",
    )
    fuse([a, b, write(c, family, 3)], tmp_path / "f", weights=[0.5, 0.3, 0.2])

    report = verify(str(tmp_path / "f"), settings=EXACT)

    assert report.passed, report.failures()
    assert report.algebra.max_abs <= bound(report.algebra)
    assert report.algebra.max_abs_as_stored is None or report.algebra.max_abs_as_stored <= bound(report.algebra)
    # One norm over all three is not exact: the control.
    assert report.native.max_abs > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["maxtext-llama-scanned", "gemma2-transposed"])
def test_in_float32_it_holds_to_rounding(tmp_path, family):
    a, b = (write(tmp_path / str(seed), family, seed, dtype=np.float32) for seed in (1, 2))
    fuse([a, b], tmp_path / "f")
    fuse([a, a], tmp_path / "s")

    for name in ("f", "s"):
        report = verify(str(tmp_path / name), settings=Settings(levels=("algebra",), batch=2, length=8))
        assert report.algebra.max_abs <= 5e-6 * max(1.0, report.algebra.reference_max_abs)


@pytest.mark.slow
@pytest.mark.parametrize("family", first_soon(["maxtext-qwen2-scanned-0", "maxtext-gemma3-tied-scanned", "gemma3"]))
def test_a_change_of_any_kind_of_tensor_is_noticed_by_the_forward_pass(tmp_path, family):
    """The control of the proofs above: what the weights level would see anyway, each in the function."""
    fuse([write(tmp_path / "a", family, 1)] * 2, tmp_path / "f")
    found = open_checkpoint(str(tmp_path / "f"))
    tree = values(tmp_path / "f")
    prefix = found.record.parameters
    rows = family_named(family)
    seen = set()
    for name in tree:
        row = rows.row_of(name.removeprefix(prefix))
        if row is None or row.pattern in seen:
            continue
        seen.add(row.pattern)
        changed = {**tree, name: tree[name] * 1.01 if "embed" not in row.axes.split()[-1] else tree[name] * 1.01 + 0.01}
        at = tmp_path / "changed"
        shutil.rmtree(at, ignore_errors=True)
        save(at, changed, "orbax", item=None)
        declared = Declared(sources=(str(tmp_path / "a"),) * 2)
        report = verify(str(at), declared, Settings(levels=("algebra",), x64=True, batch=2, length=8))
        assert report.algebra.passed is False, name
    assert len(seen) >= len({row.pattern for row in rows.rows if not row.optional})


def test_what_stands_in_the_tensors_of_gemma(tmp_path):
    """By hand: the embedding over sqrt(K), the last norm's 1 + scale over sqrt(K) less 1, all else as it was."""
    a = write(tmp_path / "a", "gemma2", 1)
    fuse([a, a, a], tmp_path / "f")
    one, three = values(a), values(tmp_path / "f")

    table, last = one["embedder/input_embedding"], one["final_norm/scale"]
    np.testing.assert_allclose(three["embedder/input_embedding"], np.tile(table, (1, 3)) / 3**0.5, rtol=1e-15)
    np.testing.assert_allclose(three["final_norm/scale"], np.tile((1 + last) / 3**0.5 - 1, 3), rtol=1e-14, atol=1e-15)
    norm, kv = "layer_0/post_ffw_norm/scale", "layer_1/attn/kv_einsum/w"
    np.testing.assert_array_equal(three[norm], np.tile(one[norm], 3))
    heads, width = DECODER_SIZES["kv_heads"], DECODER_SIZES["embed"]
    for i in range(3):
        for j in range(3):
            block = three[kv][:, i * heads : (i + 1) * heads, j * width : (j + 1) * width]
            np.testing.assert_array_equal(block, one[kv] if i == j else 0)


@pytest.mark.parametrize(
    ("told", "factor"),
    [({"normalize_embedding_logits": True}, 3**-0.5), slow({"normalize_embedding_logits": False}, 1 / 3)],
)
def test_the_factor_of_a_tied_head_goes_by_the_config(tmp_path, told, factor):
    a = write(tmp_path / "a", "maxtext-llama-tied", 1)
    (tmp_path / "model.json").write_text(json.dumps({"decoder_block": "llama2", **told}))
    fuse([a] * 3, tmp_path / "f", Options(configs=(str(tmp_path / "model.json"),)))

    name = "params/params/decoder/decoder_norm/scale"
    np.testing.assert_allclose(values(tmp_path / "f")[name], np.tile(values(a)[name], 3) * factor, rtol=1e-15)
    report = verify(str(tmp_path / "f"), settings=EXACT)
    assert report.passed
    assert report.record.network.told == {"tied_logits_power"}
    # Of the other kind it is another model.
    (tmp_path / "other.json").write_text(
        json.dumps({"decoder_block": "llama2", "normalize_embedding_logits": not told["normalize_embedding_logits"]})
    )
    other = verify(str(tmp_path / "f"), Declared(config=str(tmp_path / "other.json")), EXACT)
    assert other.algebra.passed is False


# --- heads and kv heads


@pytest.mark.slow
def test_kv_heads_are_repeated_where_that_is_asked_for(tmp_path, fusectl):
    a = write(tmp_path / "a", "maxtext-llama-scanned", 1)
    few = {**DECODER_SIZES, "kv_heads": 1}
    b = write(tmp_path / "b", "maxtext-llama-scanned", 2, few)

    with pytest.raises(Incompatible) as error:
        plan_fusion([a, b], Options())
    assert list(error.value.details) == [f"heads for each kv head: 2 in {a}, 6 in {b}"]
    assert "--expand-kv" in error.value.hint

    outcome = fusectl("fuse", a, b, "--expand-kv", "-o", tmp_path / "f", "--verify")
    assert outcome.code == 0, outcome.err
    report = verify(str(tmp_path / "f"), settings=EXACT)
    assert report.passed, report.failures()
    assert report.record.kv_repeats == (1, 3)
    key = "params/params/decoder/layers/self_attention/key/kernel"
    one, both = values(b)[key], values(tmp_path / "f")[key]
    np.testing.assert_array_equal(both[12:, :, 3:], np.repeat(one, 3, axis=2))
    # Side by side as they are, heads would read kv heads of the other model: the control.
    assert both.shape[2] == 6


@pytest.mark.slow
def test_a_state_is_not_carried_to_repeated_kv_heads(tmp_path, decoders):
    a = str(decoders / "maxtext-written/llama2_scanned/seed1")
    sizes = {"vocab": 64, "embed": 16, "heads": 4, "kv_heads": 1, "kv": 8, "mlp": 32}
    parameters = state("maxtext-llama-scanned", 2, sizes, {"decoder": 2})
    moments = {
        f"opt_state/0/{moment}/{name.removeprefix('params/')}": np.zeros_like(v)
        for name, v in parameters.items()
        for moment in ("mu", "nu")
    }
    count = {"opt_state/0/count": np.array(3, np.int32), "step": np.array(3, np.int32)}
    save(tmp_path / "b", {**parameters, **moments, **count}, "orbax", item=None)

    with pytest.raises(Incompatible, match="moments of each of the twins are not known"):
        plan_fusion([a, str(tmp_path / "b")], Options(expand_kv=True))
    plan, opened = plan_fusion([a, str(tmp_path / "b")], Options(expand_kv=True, optimizer="reset"))
    carry_out(plan, opened, tmp_path / "f")
    assert verify(str(tmp_path / "f"), settings=EXACT).passed


@pytest.mark.slow
def test_one_kv_head_becomes_one_for_each_model(tmp_path):
    a = write(tmp_path / "a", "gemma", 1, {**DECODER_SIZES, "kv_heads": 1})
    plan = fuse([a, a], tmp_path / "f")
    assert plan.record.widths["kv_heads"] == (1, 1)
    assert verify(str(tmp_path / "f"), settings=EXACT).passed


# --- norms that all heads share


@pytest.mark.slow
def test_shared_norms_must_be_equal_or_are_averaged_which_is_said(tmp_path, fusectl):
    family = "maxtext-qwen3"
    for seed in (1, 2):
        save(tmp_path / str(seed), state(family, seed), "orbax", item=None)
    a, b = str(tmp_path / "1"), str(tmp_path / "2")

    outcome = fusectl("fuse", a, b, "-o", tmp_path / "f")
    assert outcome.code == 6
    assert "that all heads share" in outcome.err
    assert "--mean-shared" in outcome.err
    fuse([a, a], tmp_path / "same")
    assert verify(str(tmp_path / "same"), settings=EXACT).passed

    outcome = fusectl("fuse", a, b, "--mean-shared", "-o", tmp_path / "f")
    assert outcome.code == 0, outcome.err
    assert "approximate" in outcome.err
    report = verify(str(tmp_path / "f"), settings=EXACT)
    assert report.weights.passed
    assert report.algebra.passed is None
    assert report.algebra.max_abs > 1e-4
    norm = "params/params/decoder/layers_0/self_attention/key_norm/scale"
    np.testing.assert_allclose(values(tmp_path / "f")[norm], (values(a)[norm] + values(b)[norm]) / 2, rtol=1e-6)


# --- caps


@pytest.mark.slow
def test_the_last_cap_makes_a_mean_of_capped_logits_a_capped_mean(tmp_path):
    family = "gemma2-transposed"
    a, b = write(tmp_path / "a", family, 1), write(tmp_path / "b", family, 2)
    (tmp_path / "c.json").write_text(json.dumps({"embed_dim": 12, "num_heads": 6, "final_logit_softcap": 2.0}))
    options = Options(configs=(str(tmp_path / "c.json"),), norm="property")
    fuse([a, b], tmp_path / "f", options)
    fuse([a, a], tmp_path / "s", options)

    different, same = (verify(str(tmp_path / name), settings=EXACT) for name in "fs")
    assert different.algebra.passed
    # With a norm for each, so that nothing but the cap is left.
    assert different.native.passed is None
    assert different.native.max_abs > 1e-3
    assert same.native.passed


# --- what a config tells


def test_configs_are_compared_and_every_difference_is_listed(tmp_path, fusectl):
    a, b = write(tmp_path / "a", "maxtext-llama", 1), write(tmp_path / "b", "maxtext-llama", 2, WIDER_DECODER)
    for name, sizes, more in (
        ("a", DECODER_SIZES, {"rope_max_timescale": 500_000, "normalization_layer_epsilon": "1e-5"}),
        ("b", WIDER_DECODER, {"rope_max_timescale": 10_000, "normalization_layer_epsilon": 1e-6}),
    ):
        own = {"base_emb_dim": sizes["embed"], "base_num_query_heads": sizes["heads"], **more}
        (tmp_path / f"{name}.yml").write_text("".join(f"{key}: {value}\n" for key, value in own.items()))
    outcome = fusectl(
        "fuse", a, b, "--config", tmp_path / "a.yml", "--config", tmp_path / "b.yml", "-o", tmp_path / "f"
    )
    assert outcome.code == 6
    assert f"norm_epsilon: 1e-05 in {a}, 1e-06 in {b}" in outcome.err
    assert f"attending: rope 500000 in {a}, rope 10000 in {b}" in outcome.err

    outcome = fusectl("fuse", a, b, "--config", tmp_path / "a.yml", "-o", tmp_path / "f")
    assert outcome.code == 6
    assert f"base_emb_dim: 12 in {tmp_path / 'a.yml'}, 14 in {b}" in outcome.err
    outcome = fusectl("fuse", a, a, a, *["--config", tmp_path / "a.yml"] * 2, "-o", tmp_path / "f")
    assert outcome.code == 2
    assert "one for all of them, or one for each" in outcome.err
    assert fusectl("fuse", a, a, "--config", tmp_path / "a.yml", "-o", tmp_path / "f").code == 0
    network = open_checkpoint(str(tmp_path / "f")).record.network
    assert (network.norm_epsilon, network.attending[0].rope_base) == (1e-5, 500_000)


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        (None, 4, "no file of a model's config"),
        ("- a\n- b\n", 2, "no config of a model"),
        ("a: [", 2, "cannot be read as YAML or JSON"),
        ("base_emb_dim: 12\nmlp_activations: 3\n", 2, "a value that cannot be"),
        ("base_emb_dim: 12\nmlp_activations: []\n", 2, "a gated MLP has one and linear"),
        ("base_emb_dim: 12\nmlp_activations: [swish, linear]\n", 2, "activation 'swish'"),
        ("base_emb_dim: 12\nrope_type: yarn\n", 2, "rope_type 'yarn'"),
        ("base_emb_dim: 12\nrope_max_timescale: 0\n", 2, "rotary positions of base 0"),
        ("base_emb_dim: 12\nrope_max_timescale: .nan\n", 2, "rotary positions of base nan"),
        ("base_emb_dim: 12\nnormalization_layer_epsilon: -1\n", 2, "norm_epsilon -1"),
        ("base_emb_dim: 12\nnormalize_embedding_logits: 'False'\n", 2, "true or false"),
        ("embed_dim: 12\n", 6, "a config of gemma"),
        ("base_emb_dim: 13\n", 6, "base_emb_dim: 13 in"),
        ("base_emb_dim: 12\nglobal_parameter_scale: 2\n", 6, "multiplies all sizes"),
        ("base_emb_dim: 12\ndecoder_block: gemma2\n", 6, "decoder_block: gemma2 in"),
        ("base_emb_dim: !!python/object/apply:os.getcwd []\n", 2, "cannot be read as YAML or JSON"),
    ],
)
def test_configs_that_are_none_or_of_another_model_are_refused(tmp_path, fusectl, text, code, says):
    a = write(tmp_path / "a", "maxtext-llama", 1)
    config = tmp_path / "model.yml"
    if text is not None:
        config.write_text(text)
    outcome = fusectl("self-fuse", a, "--config", config, "-o", tmp_path / "f")
    assert outcome.code == code, outcome.err
    assert says in outcome.err
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        ({"attention_types": ["GLOBAL"] * 7}, 6, "attention_types: 7 in"),
        ({"attention_types": ["LOCAL_SLIDING"] * 2, "sliding_window_size": None}, 2, "without a sliding_window_size"),
        ({"attention_types": ["NEITHER"] * 2}, 2, "attention types neither"),
        ({"use_qk_norm": True}, 6, "use_qk_norm: True in"),
        ({"query_pre_attn_norm": "BY_EMBED_DIM_DIV_NUM_HEADS"}, 2, "query_pre_attn_norm BY_EMBED_DIM_DIV_NUM_HEADS"),
        ({"sliding_window_size": 0}, 2, "a window of 0 tokens"),
    ],
)
def test_configs_of_gemma_are_held_against_its_tree(tmp_path, fusectl, fields, code, says):
    a = write(tmp_path / "a", "gemma2", 1)
    (tmp_path / "c.json").write_text(json.dumps({"embed_dim": 12, **fields}))
    outcome = fusectl("self-fuse", a, "--config", tmp_path / "c.json", "-o", tmp_path / "f")
    assert (outcome.code, says in outcome.err) == (code, True), outcome.err


def test_a_window_alone_changes_the_layers_that_have_one(tmp_path):
    a = write(tmp_path / "a", "gemma3", 1)
    (tmp_path / "c.json").write_text(json.dumps({"embed_dim": 12, "sliding_window_size": 77}))
    plan, _ = plan_fusion([a] * 2, Options(configs=(str(tmp_path / "c.json"),)))
    assert [each.window for each in plan.record.network.attending] == [77] * 5 + [None]


def test_a_config_of_another_trainer_or_against_a_record_is_refused(tmp_path, fusectl):
    """What it decides is what is stored: a wrong one would be proved with itself."""
    gemma, maxtext = write(tmp_path / "a", "gemma", 1), write(tmp_path / "b", "maxtext-llama-tied", 1)
    t5 = checkpoint(tmp_path / "t5")
    for divides in (True, False):
        text = f"decoder_block: llama2\nnormalize_embedding_logits: {str(divides).lower()}\n"
        (tmp_path / f"{divides}.yml").write_text(text)
    (tmp_path / "rope.yml").write_text("decoder_block: llama2\nrope_max_timescale: 500000\n")
    for path in (gemma, t5):
        outcome = fusectl("self-fuse", path, "--config", tmp_path / "True.yml", "-o", tmp_path / "x")
        assert (outcome.code, "a config of maxtext" in outcome.err) == (6, True), outcome.err

    assert fusectl("self-fuse", maxtext, "--config", tmp_path / "False.yml", "-o", tmp_path / "f").code == 0
    outcome = fusectl("self-fuse", tmp_path / "f", "--config", tmp_path / "True.yml", "-o", tmp_path / "x")
    assert (outcome.code, "tied_logits_power: -0.5 by" in outcome.err) == (6, True), outcome.err
    # What it tells of other settings comes on top of what the record has told.
    plan, _ = plan_fusion([str(tmp_path / "f")] * 2, Options(configs=(str(tmp_path / "rope.yml"),)))
    assert plan.record.network.tied_logits_power == 0.0
    assert plan.record.network.attending[0].rope_base == 500_000


def test_heads_that_scale_queries_by_the_width_must_agree_in_it(tmp_path):
    a, b = write(tmp_path / "a", "gemma2", 1), write(tmp_path / "b", "gemma2", 1, {**DECODER_SIZES, "embed": 24})
    text = json.dumps({"query_pre_attn_norm": "BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS", "num_embed": 41})
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(Incompatible) as error:
        plan_fusion([a, b], Options(configs=(str(tmp_path / "c.json"),)))
    assert list(error.value.details) == [f"embed // heads, by which queries are scaled: 2 in {a}, 4 in {b}"]


@pytest.mark.parametrize(
    ("sizes", "says"),
    [({"heads": 6, "kv_heads": 4}, "6 heads do not share 4 kv heads"), ({"kv": 5}, "head_dim 5 is odd")],
)
def test_heads_that_no_network_has_are_refused(tmp_path, sizes, says):
    a = write(tmp_path / "a", "maxtext-llama", 1, {**DECODER_SIZES, **sizes})
    with pytest.raises(Incompatible) as error:
        plan_fusion([a, a], Options())
    assert says in error.value.details[0]


@pytest.mark.slow
@pytest.mark.parametrize("copies", [2, 4])
def test_gemma_in_bfloat16_is_proved(tmp_path, copies):
    """Its last norm's 1 + scale, less 1, is rounded, for factors that are powers of two as well."""
    a = write(tmp_path / "a", "gemma2", 1, dtype=ml_dtypes.bfloat16)
    plan = fuse([a] * copies, tmp_path / "f")
    assert plan.exactness.kind == "approximate"
    report = verify(str(tmp_path / "f"), settings=EXACT)
    assert report.passed, report.failures()


def test_nothing_to_compare_is_no_pass(tmp_path):
    nothing = {name: 0 * v for name, v in state("maxtext-llama", 1).items()}
    save(tmp_path / "a", nothing, "orbax", item=None)
    fuse([tmp_path / "a"] * 2, tmp_path / "f")
    report = verify(str(tmp_path / "f"), settings=Settings(levels=("algebra",)))
    assert report.algebra.passed is False


@pytest.mark.parametrize(
    "change",
    [
        {"attending": []},
        {"attending": [{"rope_base": "x", "rope_scale": 1.0, "window": None}]},
        {"activation": "foo"},
        {"embedding_power": 1e9},
        {"norm_adds_one": "no"},
        {"norm_epsilon": 1e300},
        {"final_norm_epsilon": "x"},
        "family",
    ],
)
def test_records_whose_networks_make_no_sense_are_corrupt(tmp_path, fusectl, change):
    fuse([write(tmp_path / "a", "gemma", 1)] * 2, tmp_path / "f")
    tree = json.loads((tmp_path / "f" / FILE_NAME).read_text())
    if change == "family":
        tree["family"] = "/etc/passwd.toml"
    else:
        tree["network"] |= change
    write_record(tmp_path / "f", tree)
    assert fusectl("verify", tmp_path / "f").code == 5


def test_a_fusion_of_an_ambiguous_tree_is_of_the_family_that_its_record_names(tmp_path, fusectl):
    a = write(tmp_path / "a", "gemma", 1, {**DECODER_SIZES, "mlp": 12})
    assert fusectl("self-fuse", a, "-o", tmp_path / "f").code == 6
    assert fusectl("self-fuse", a, "--arch", "gemma", "-o", tmp_path / "f").code == 0
    assert fusectl("noise-fill", tmp_path / "f", "--fill", "gaussian", "-o", tmp_path / "n").code == 0
    assert fusectl("restart-config", tmp_path / "n").code == 0


def test_all_differences_between_two_decoders_are_listed_at_once(tmp_path):
    a = write(tmp_path / "a", "maxtext-llama", 1)
    b = write(tmp_path / "b", "maxtext-qwen2-scanned", 2, {**DECODER_SIZES, "kv": 6, "kv_heads": 2, "vocab": 43})

    with pytest.raises(Incompatible) as error:
        plan_fusion([a, b], Options())

    said = "\n".join(error.value.details)
    for part in (
        f"family: maxtext-llama in {a}, maxtext-qwen2-scanned in {b}",
        "axis 'vocab' is shared but differs: 41 in",
        "axis 'kv' is shared but differs: 4 in",
        "heads for each kv head: 2 in",
    ):
        assert part in said, said


# --- the state of a training run


@pytest.mark.slow
def test_a_fused_state_has_the_tree_that_maxtext_restores(tmp_path, logits):
    """Lists, None, counts, keys of random numbers: the same structure, restored by unmodified Orbax."""
    source = logits / "maxtext-trained/llama2_unscan/checkpoints/2"
    fuse([source] * 2, tmp_path / "f")

    was, now = (restored(each / "items") for each in (source, tmp_path / "f"))

    assert jax.tree.structure(was) == jax.tree.structure(now)
    assert isinstance(now["opt_state"], list)
    assert now["opt_state"][1] is None
    assert int(now["opt_state"][0]["count"]) == int(now["opt_state"][2]["count"]) == 3
    assert int(now["step"]) == 3
    table = now["opt_state"][0]["nu"]["params"]["token_embedder"]["embedding"]
    assert table.shape == now["params"]["params"]["token_embedder"]["embedding"].shape == (64, 32)
    custom = [
        json.loads((each / "_CHECKPOINT_METADATA").read_text())["custom_metadata"] for each in (source, tmp_path / "f")
    ]
    assert custom[0] == custom[1] == {"scan_layers": False}


def test_keys_of_random_numbers_stay_keys(tmp_path, logits):
    source = logits / "maxtext-trained/gemma2_scan/checkpoints/2"
    fuse([source] * 2, tmp_path / "f")
    kind = jax.random.key(0, impl="unsafe_rbg").dtype
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    inside = {"params": {"key": jax.ShapeDtypeStruct((), kind, sharding=place)}}
    target = {"nnx_aux": {"model": {"decoder": {"rngs": inside}}}}

    found = []
    for each in (source, tmp_path / "f"):
        handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        arguments = ocp.args.PyTreeRestore(
            item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
        )
        restored = handler.restore(each / "items", args=arguments)
        found.append(restored["nnx_aux"]["model"]["decoder"]["rngs"]["params"]["key"])
    assert found[0].dtype == found[1].dtype == kind
    np.testing.assert_array_equal(*map(jax.random.key_data, found))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama2_unscan", "gemma2_scan"])
def test_a_training_state_is_proved_filled_and_restacked_and_comes_back(tmp_path, fusectl, logits, case):
    source = logits / f"maxtext-trained/{case}/checkpoints/2"
    assert fusectl("self-fuse", source, "-o", tmp_path / "f", "--verify").code == 0
    assert fusectl("noise-fill", tmp_path / "f", "-o", tmp_path / "n", "--fill", "gaussian", "--verify").code == 0
    there, back = ("--unscan", "--scan") if case.split("_")[1] == "scan" else ("--scan", "--unscan")
    assert fusectl("convert", source, there, "-o", tmp_path / "x", "--verify").code == 0
    noted = json.loads((tmp_path / "x/_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert noted == {"scan_layers": there == "--scan"}
    assert fusectl("convert", tmp_path / "x", back, "-o", tmp_path / "y").code == 0
    assert fusectl("diff", source, tmp_path / "y").code == 0
    was, now = (restored(each / "items") for each in (source, tmp_path / "y"))
    assert jax.tree.structure(was) == jax.tree.structure(now)


@pytest.mark.slow
def test_a_restacked_fusion_wants_its_sources_restacked(tmp_path, fusectl, decoders):
    source = decoders / "maxtext-written/llama2_scanned/seed1"
    assert fusectl("self-fuse", source, "-o", tmp_path / "f").code == 0
    for path, to in ((tmp_path / "f", "fu"), (source, "u")):
        assert fusectl("convert", path, "--unscan", "-o", tmp_path / to).code == 0
    outcome = fusectl("verify", tmp_path / "fu", "--sources", source, source)
    assert (outcome.code, "name copies of its sources that are so, too" in outcome.err) == (6, True)
    assert fusectl("verify", tmp_path / "fu", "--sources", tmp_path / "u", tmp_path / "u").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("format", ["t5x", "orbax-zarr2", "orbax-ocdbt-zarr2", "orbax-zarr3"])
def test_a_decoder_goes_through_every_layout(tmp_path, fusectl, decoders, format):
    a, b = (decoders / f"maxtext-written/llama2_scanned/seed{i}" for i in (1, 2))
    assert fusectl("fuse", a, b, "--format", format, "-o", tmp_path / "f", "--verify").code == 0
    assert fusectl("convert", tmp_path / "f", "--format", "orbax", "-o", tmp_path / "o").code == 0
    fuse([a, b], tmp_path / "direct")
    direct, through = values(tmp_path / "direct"), values(tmp_path / "o")
    direct, through = (
        {n.removeprefix("params/params/").removeprefix("target/"): v for n, v in each.items()}
        for each in (direct, through)
    )
    for name in direct:
        if not is_state(name) and "step" not in name:
            np.testing.assert_array_equal(direct[name], through[name])


# --- noise


@pytest.mark.slow
def test_noise_stands_between_models_and_nowhere_else(tmp_path):
    a = write(tmp_path / "a", "gemma3-transposed", 1)
    fuse([a, a], tmp_path / "f")
    plan, opened = plan_noise_fill(str(tmp_path / "f"), Options(fill=Fill("gaussian", 0.1, 7)))
    carry_out(plan, opened, tmp_path / "n")
    at_once = Options(fill=Fill("gaussian", 0.1, 7))
    fuse([a, a], tmp_path / "g", at_once)

    filled, directly, zeros = values(tmp_path / "n"), values(tmp_path / "g"), values(tmp_path / "f")
    for name, found in filled.items():
        np.testing.assert_array_equal(found, directly[name])
        at_zeros = zeros[name] == 0
        np.testing.assert_array_equal(found[~at_zeros], zeros[name][~at_zeros])
        # Kernels that read and write the stream have gaps, all of which are filled.
        assert (found[at_zeros] != 0).all()
    assert verify(str(tmp_path / "n"), settings=EXACT).passed


@pytest.mark.slow
def test_streams_are_equalized_where_norms_stand_behind(tmp_path):
    """Gemma's blocks write through a norm: its 1 + scale is multiplied, and not the kernels."""
    for family in ("gemma2", "maxtext-llama"):
        a, b = write(tmp_path / f"{family}-a", family, 1), write(tmp_path / f"{family}-b", family, 2)
        from fusectl.operations.equalize import Equalize

        for by in ("trace", "weights"):
            plan = fuse([a, b], tmp_path / f"{family}-{by}", equalize=Equalize(by=by))
            assert plan.record.residual_scales[1] != 1.0
            report = verify(str(tmp_path / f"{family}-{by}"), settings=EXACT)
            assert report.passed, report.failures()
            assert report.algebra.max_abs <= bound(report.algebra)


# --- official sizes


OFFICIAL = {
    # From gemma/gm/nn/_gemma.py (and Gemma 1's report), maxtext/configs/models/llama3-8b.yml.
    "gemma": ({"vocab": 256128, "embed": 2048, "heads": 8, "kv_heads": 1, "kv": 256, "mlp": 16384}, 18, "bfloat16"),
    "gemma2-transposed": (
        {"vocab": 256128, "embed": 3584, "heads": 16, "kv_heads": 8, "kv": 256, "mlp": 14336},
        42,
        "bfloat16",
    ),
    "maxtext-llama-scanned": (
        {"vocab": 128256, "embed": 4096, "heads": 32, "kv_heads": 8, "kv": 128, "mlp": 14336},
        32,
        "float32",
    ),
}


@pytest.mark.parametrize("family", OFFICIAL)
def test_official_sizes_are_planned_from_metadata_alone(tmp_path, family):
    import time

    from models import metadata_only

    sizes, depth, dtype = OFFICIAL[family]
    path = metadata_only(tmp_path / "a", family, sizes, {"decoder": depth}, dtype)
    started = time.monotonic()
    plan, _ = plan_fusion([str(path)] * 2, Options())
    seconds = time.monotonic() - started

    assert seconds < 10
    embed, heads, kv_heads, kv, mlp = (sizes[axis] for axis in ("embed", "heads", "kv_heads", "kv", "mlp"))
    itemsize = 2 if dtype == "bfloat16" else 4
    # Twice as wide: kernels hold four times as much, the embedding, the head and the norms twice.
    kernels = depth * embed * (2 * heads * kv + 2 * kv_heads * kv + 3 * mlp)
    norms = embed * (1 + depth * {"gemma": 2, "gemma2-transposed": 4}.get(family, 2))
    tables = sizes["vocab"] * embed * (2 if family.startswith("maxtext") else 1)
    assert plan.nbytes == itemsize * (4 * kernels + 2 * norms + 2 * tables)
    assert plan.nonzero_bytes == itemsize * 2 * (kernels + norms + tables)
    assert max(output.cost_bytes for output in plan.outputs) <= plan.resources.budget + (1 << 20)
    by_name = {output.name: output.layout.shape for output in plan.outputs}
    if family == "maxtext-llama-scanned":
        assert by_name["params/params/decoder/layers/self_attention/key/kernel"] == (8192, 32, 16, 128)
    else:
        assert by_name["layer_7/attn/kv_einsum/w"] == (2, 2 * kv_heads, 2 * embed, kv)


# --- how exact a plan is


@pytest.mark.parametrize(
    ("family", "sources", "options", "kind", "because"),
    [
        ("maxtext-llama", (1, 1), {}, "exact", ""),
        ("maxtext-llama", (1, 1), {"fill": Fill("antisymmetric", 0.1, 0)}, "exact", ""),
        ("maxtext-llama", (1, 1), {"fill": Fill("gaussian", 0.1, 0)}, "approximate", "gaussian noise"),
        ("maxtext-llama", (1, 2), {}, "exact with a norm per source", "one norm over streams"),
        ("maxtext-llama", (1, 2), {"norm": "property"}, "exact", ""),
        ("maxtext-llama", (1, 1), {"dtype": "bfloat16"}, "approximate", "rounded to bfloat16"),
        ("gemma2", (1, 1), {}, "exact", ""),
        ("gemma2", (1, 2), {"norm": "property"}, "approximate", "capped at 30"),
        ("maxtext-qwen3", (1, 2), {"mean_shared": True}, "approximate", "scales that all heads share"),
        ("bfloat16 gemma", (1, 1), {}, "approximate", "--dtype float32 keeps them"),
        ("bfloat16 maxtext-llama", (1, 1), {}, "exact", ""),
    ],
)
def test_a_plan_says_how_exact_it_is_and_which_tensors_it_owes_that_to(
    tmp_path, family, sources, options, kind, because
):
    *dtype, family = family.split()
    for seed in set(sources):
        values = {n: v.astype(ml_dtypes.bfloat16) if dtype else v for n, v in state(family, seed).items()}
        save(tmp_path / str(seed), values, "orbax", item=None)
    plan, _ = plan_fusion([str(tmp_path / str(seed)) for seed in sources], Options(**options))

    assert plan.exactness.kind == kind
    assert because in "; ".join(plan.exactness.because)
    owing = {output.name.rsplit("/", 2)[1] for output in plan.outputs if output.exactness.kind != "exact"}
    expected = {
        "gaussian noise": {"query", "key", "value", "out", "wi_0", "wi_1", "wo"},
        "one norm over streams": {"pre_self_attention_layer_norm", "post_self_attention_layer_norm", "decoder_norm"},
        "scales that all heads share": {
            *("query_norm", "key_norm", "decoder_norm"),
            *("pre_self_attention_layer_norm", "post_self_attention_layer_norm"),
        },
    }
    if because in expected:
        assert owing == expected[because]
    elif kind == "exact":
        assert owing == set()
