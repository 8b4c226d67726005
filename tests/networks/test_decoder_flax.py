"""The decoder's network against the logits of the gemma package, and what every one of its features does."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow
from flax.traverse_util import flatten_dict, unflatten_dict

from fusectl.families.settings import Attending
from fusectl.formats.opening import open_checkpoint
from fusectl.networks.decoder_flax import Decoder, DecoderConfig, rotated, seen


# The fixture's config.json, and what the package does with it.
GEMMA = DecoderConfig(
    vocab_size=64,
    emb_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_layers=2,
    attending=(Attending(10_000, window=16), Attending(1_000_000)),
    mlp_activation="gelu",
    query_scale=8**-0.5,
    norm_adds_one=True,
    norms_behind=True,
    logits_via_embedding=True,
    embedding_scale=4.0,
)
FUSED = replace(GEMMA, emb_dim=32, num_heads=8, num_kv_heads=4, mlp_dim=64, embedding_scale=32**0.5)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def gemma(decoders):
    """The package's tokens and logits, and the two models' parameters under the network's names."""
    home = decoders / "gemma-written/gemma2_like"
    return np.load(home / "logits.npz"), {name: renamed(home / name) for name in "AB"}


def renamed(path):
    opened = open_checkpoint(str(path))
    values = {name: opened.read(name) for name in opened.leaves}
    out = {
        "token_embedder/embedding": values["embedder/input_embedding"],
        "decoder_norm/scale": values["final_norm/scale"],
    }
    for i in range(2):
        there, here = f"layer_{i}", f"layers_{i}"
        key, value = values[f"{there}/attn/kv_einsum/w"].transpose(0, 2, 1, 3)
        gate, up = values[f"{there}/mlp/gating_einsum"].transpose(0, 2, 1)
        out |= {
            f"{here}/attention/query/kernel": values[f"{there}/attn/q_einsum/w"].transpose(1, 0, 2),
            f"{here}/attention/key/kernel": key,
            f"{here}/attention/value/kernel": value,
            f"{here}/attention/out/kernel": values[f"{there}/attn/attn_vec_einsum/w"],
            f"{here}/mlp/wi_0/kernel": gate,
            f"{here}/mlp/wi_1/kernel": up,
            f"{here}/mlp/wo/kernel": values[f"{there}/mlp/linear"],
        }
        for place in ("pre", "post"):
            out[f"{here}/{place}_attention_norm/scale"] = values[f"{there}/{place}_attention_norm/scale"]
            out[f"{here}/{place}_mlp_norm/scale"] = values[f"{there}/{place}_ffw_norm/scale"]
    return out


def logits(config, parameters, tokens):
    parameters = unflatten_dict({name: jnp.asarray(v, config.dtype) for name, v in parameters.items()}, sep="/")
    return np.asarray(Decoder(config).apply({"params": parameters}, tokens))


def off(found, expected):
    return float(np.abs(found - expected).max())


def diagonal(a, b):
    """A block diagonal of the first axis by the second, side by side along all others' places."""
    out = np.zeros((a.shape[0] + b.shape[0], a.shape[1] + b.shape[1], *a.shape[2:]), a.dtype)
    out[: a.shape[0], : a.shape[1]], out[a.shape[0] :, a.shape[1] :] = a, b
    return out


def fused(a, b):
    """Two of these models side by side, as growth.md's rules for Gemma have it, written down by hand."""
    out = {}
    for name, one in a.items():
        two = b[name]
        if name == "token_embedder/embedding":
            out[name] = np.concatenate([one, two], 1) / 2**0.5
        elif name == "decoder_norm/scale":
            out[name] = (1 + np.concatenate([one, two])) / 2**0.5 - 1
        elif name.endswith("scale"):
            out[name] = np.concatenate([one, two])
        elif name.endswith("out/kernel"):
            # (heads, head_dim, embed)
            out[name] = diagonal(one.swapaxes(1, 2), two.swapaxes(1, 2)).swapaxes(1, 2)
        else:
            out[name] = diagonal(one, two)
    return out


@pytest.mark.slow
def test_its_logits_are_those_of_the_gemma_package(gemma):
    theirs, models = gemma
    for name in "AB":
        assert off(logits(GEMMA, models[name], theirs["tokens"]), theirs[name]) < TOLERANCE
    same, pair = fused(models["A"], models["A"]), fused(models["A"], models["B"])
    assert off(logits(FUSED, same, theirs["tokens"]), theirs["fused_self"]) < TOLERANCE
    assert off(logits(FUSED, pair, theirs["tokens"]), theirs["fused_plain"]) < TOLERANCE
    grouped = replace(FUSED, norm_groups=(16, 16))
    assert off(logits(grouped, pair, theirs["tokens"]), theirs["fused_grouped"]) < TOLERANCE
    # And that is the mean of the two models' logits, which one norm over both is not.
    mean = (theirs["A"] + theirs["B"]) / 2
    assert off(theirs["fused_grouped"], mean) < TOLERANCE
    assert off(theirs["fused_plain"], mean) > 0.1


@pytest.mark.parametrize(
    "change",
    [
        {"attending": (Attending(10_000), Attending(1_000_000))},
        slow({"attending": (Attending(10_000, window=16), Attending(10_000))}),
        {"attending": (Attending(10_000, window=16), Attending(1_000_000, rope_scale=8.0))},
        {"mlp_activation": "silu"},
        {"query_scale": 1.0},
        {"attention_soft_cap": 1.0},
        {"logits_soft_cap": 3.0},
        {"norm_epsilon": 1e-1},
        slow({"final_norm_epsilon": 1e-1}),
        {"norm_adds_one": False},
        {"norms_behind": False},
        slow({"embedding_scale": 1.0}),
        {"tied_logits_scale": 0.5},
        slow({"norm_groups": (8, 8)}),
        {"norm_groups": (8, 8), "stream_scales": (1.0, 1e3)},
    ],
)
def test_every_feature_makes_a_difference(gemma, change):
    """The control of the comparison above."""
    theirs, models = gemma
    assert off(logits(replace(GEMMA, **change), models["A"], theirs["tokens"]), theirs["A"]) > 1e-3


@pytest.mark.slow
def test_accumulating_in_float64_changes_the_rounding_only(gemma):
    theirs, models = gemma
    with jax.enable_x64(True):
        wide = logits(replace(GEMMA, dtype=jnp.float64, accumulate=jnp.float64), models["A"], theirs["tokens"])
        mixed = logits(replace(GEMMA, accumulate=jnp.float64), models["A"], theirs["tokens"])
    assert (wide.dtype, mixed.dtype) == (np.float64, np.float32)
    assert 0 < off(wide, theirs["A"]) < TOLERANCE
    assert 0 < off(mixed, wide) < TOLERANCE


def test_no_token_sees_a_later_one_nor_one_beyond_the_window(gemma):
    theirs, models = gemma
    config = replace(GEMMA, attending=(Attending(window=3),))
    tokens = theirs["tokens"]
    before = logits(config, models["A"], tokens)
    changed = tokens.copy()
    changed[:, 10] = (changed[:, 10] + 7) % 64
    differ = np.abs(logits(config, models["A"], changed) - before).max(axis=(0, 2)) > 0
    # Two layers that look back two tokens each.
    assert differ.tolist() == [10 <= i <= 14 for i in range(tokens.shape[1])]
    np.testing.assert_array_equal(seen(4, 2), np.tril(np.ones((4, 4))) - np.tril(np.ones((4, 4)), -2))


@pytest.mark.slow
def test_an_untied_head_and_norms_of_queries_and_keys_are_parameters_of_their_own(gemma):
    config = replace(GEMMA, logits_via_embedding=False, query_key_norms=True, norms_behind=False, norm_adds_one=False)
    tokens = gemma[0]["tokens"]
    parameters = flatten_dict(Decoder(config).init(jax.random.key(0), tokens)["params"], sep="/")

    assert parameters["logits_dense/kernel"].shape == (16, 64)
    assert parameters["layers_1/attention/key_norm/scale"].shape == (8,)
    assert not [name for name in parameters if "post_" in name]
    before = logits(config, parameters, tokens)
    for name in ("logits_dense/kernel", "layers_1/attention/key_norm/scale", "layers_0/attention/query_norm/scale"):
        assert off(logits(config, {**parameters, name: 2 * parameters[name]}, tokens), before) > 1e-3


def test_rotation_keeps_lengths_and_depends_on_distances_only():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 1, 1, 8)).repeat(9, axis=1), jnp.float32)
    turned = np.asarray(rotated(x, Attending(100.0)))[0, :, 0]
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x[0, 0, 0]), rtol=1e-5)
    products = turned @ turned.T
    for distance in range(1, 4):
        np.testing.assert_allclose(np.diagonal(products, distance), products[0, distance], rtol=1e-4)
    assert abs(products[0, 1] - products[0, 0]) > 1e-2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"norm_groups": (8, 4)}, "do not sum up"),
        ({"norm_groups": (8, 8), "stream_scales": (1.0,)}, "1 stream scales for 2"),
        ({"num_kv_heads": 3}, "do not share"),
        ({"mlp_activation": "mish"}, "no activation"),
    ],
)
def test_features_that_contradict_each_other_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        replace(GEMMA, **change)
