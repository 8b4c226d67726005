"""The drop-in network: T5X's parameter trees, axes, logits and caches, and norms over groups."""

from dataclasses import make_dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import first_soon
from flax.traverse_util import flatten_dict, unflatten_dict

from fusectl.families.recognition import recognize
from fusectl.formats.opening import open_checkpoint
from fusectl.networks.t5_flax import (
    ScalableT5Config,
    T5Config,
    Transformer,
    relative_position_buckets,
    with_norm_groups,
)


CONFIGS = {
    "t5_1_1": T5Config(mlp_activations=["gelu", "linear"], vocab_size=128),
    "t5_1_0": T5Config(logits_via_embedding=True, vocab_size=128),
    "scalable_1_1": ScalableT5Config(mlp_activations=["gelu", "linear"], vocab_size=128),
}
SIZES = {"emb_dim": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 32, "num_encoder_layers": 2, "num_decoder_layers": 2}


def network(variant, **changes):
    from dataclasses import replace

    return Transformer(replace(CONFIGS[variant], **SIZES, **changes))


def opened(written, variant, number=0):
    checkpoint = open_checkpoint(str(written / variant / f"seed{number}/legacy/checkpoint_20"))
    return checkpoint, recognize(checkpoint.shapes, variant)


def parameters(written, variant):
    checkpoint, tree = opened(written, variant)
    return unflatten_dict({name: jnp.asarray(checkpoint.read(tree.full(name))) for name in tree.shapes}, sep="/")


def fresh(variant, **changes):
    ones, model = jnp.ones((2, 5), jnp.int32), network(variant, **changes)
    return jax.jit(lambda key: model.init(key, ones, ones, ones, enable_dropout=False))(jax.random.key(0))


def logits(model, variables, *tokens, **segments):
    """The network's logits without dropout, compiled: op by op takes ten times as long."""
    return jax.jit(partial(model.apply, enable_dropout=False))(variables, *tokens, **segments)


@pytest.mark.slow
@pytest.mark.parametrize("variant", CONFIGS)
def test_its_tree_is_the_one_that_t5x_wrote_and_its_axes_are_those_of_the_table(written, variant):
    _, tree = opened(written, variant)

    variables = fresh(variant)

    assert {n: v.shape for n, v in flatten_dict(variables["params"], sep="/").items()} == tree.shapes
    axes = flatten_dict(variables["params_axes"], sep="/")
    assert {n.removesuffix("_axes"): tuple(v.names) for n, v in axes.items()} == {
        name: row.spec.axes for name, row in tree.rows.items()
    }


@pytest.mark.parametrize("variant", first_soon(CONFIGS))
def test_it_computes_the_logits_of_t5xs_network(written, variant):
    expected = np.load(written / variant / "seed0/logits.npz")
    wanted = expected["tgt"] > 0
    variables = {"params": parameters(written, variant)}

    found = logits(network(variant), variables, expected["enc"], expected["dec"], expected["tgt"])

    np.testing.assert_allclose(found[wanted], expected["logits"][wanted], rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [(), (4, 12)])
@pytest.mark.parametrize("variant", first_soon(CONFIGS))
def test_decoding_with_a_cache_is_teacher_forcing(written, variant, groups):
    tokens = np.load(written / variant / "seed0/logits.npz")
    encoder, decoder = tokens["enc"], tokens["dec"]
    model, variables = network(variant, norm_groups=groups), {"params": parameters(written, variant)}
    everywhere = np.ones_like(decoder)
    expected = logits(model, variables, encoder, decoder, everywhere)
    ones = [jnp.ones_like(each) for each in (encoder, decoder, decoder)]
    empty = partial(model.apply, decode=True, enable_dropout=False, mutable=["cache"])
    _, cache = jax.jit(empty)(variables, *ones)
    encoded = jax.jit(partial(model.apply, enable_dropout=False, method=model.encode))(variables, encoder)
    length = decoder.shape[1]

    @jax.jit
    def step(cache, token):
        return model.apply(
            {**variables, **cache},
            encoded,
            encoder,
            token,
            token,
            enable_dropout=False,
            decode=True,
            max_decode_length=length,
            mutable=["cache"],
            method=model.decode,
        )

    found = []
    for t in range(length):
        next_logits, cache = step(cache, decoder[:, t : t + 1])
        found.append(next_logits[:, 0])

    np.testing.assert_allclose(np.stack(found, axis=1), expected, rtol=0, atol=5e-6)
    caches = flatten_dict(cache["cache"], sep="/")
    assert {n.rsplit("/", 1)[1] for n in caches} == {"cached_key", "cached_value", "cache_index"}
    assert all((v == length).all() for n, v in caches.items() if n.endswith("cache_index"))


@pytest.mark.slow
def test_the_first_token_of_a_cache_is_not_the_last(written):
    """The control: without the cache, a token alone has other logits."""
    tokens = np.load(written / "t5_1_1/seed0/logits.npz")
    model, variables = network("t5_1_1"), {"params": parameters(written, "t5_1_1")}
    last = tokens["dec"][:, -1:]

    whole = logits(model, variables, tokens["enc"], tokens["dec"], np.ones_like(tokens["dec"]))
    alone = logits(model, variables, tokens["enc"], last, np.ones_like(last))

    assert np.abs(whole[:, -1] - alone[:, 0]).max() > 1e-3


@pytest.mark.slow
def test_packed_examples_do_not_see_each_other(written):
    model, variables = network("t5_1_1"), {"params": parameters(written, "t5_1_1")}
    rng = np.random.default_rng(0)
    encoder, targets = rng.integers(1, 128, (1, 10)), rng.integers(1, 128, (1, 8))
    encoder_segments, target_segments = np.repeat([[1, 2]], 5, 1), np.repeat([[1, 2]], 4, 1)
    decoder = np.concatenate([np.zeros((1, 1), int), targets[:, :-1]], 1)
    decoder[0, 4] = 0

    segments = {"encoder_segment_ids": encoder_segments, "decoder_segment_ids": target_segments}
    packed = logits(model, variables, encoder, decoder, targets, **segments)
    unpacked = logits(model, variables, encoder, decoder, targets)

    for part in range(2):
        e, d = slice(5 * part, 5 * part + 5), slice(4 * part, 4 * part + 4)
        alone = logits(model, variables, encoder[:, e], decoder[:, d], targets[:, d])
        np.testing.assert_allclose(packed[:, d], alone, rtol=0, atol=2e-6)
    assert np.abs(packed - unpacked).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("variant", first_soon(CONFIGS))
def test_norm_groups_normalise_each_stretch_by_itself(variant):
    grouped, plain = (fresh(variant, norm_groups=groups)["params"] for groups in ((4, 12), ()))
    tokens = np.arange(1, 11).reshape(2, 5)

    assert jax.tree.all(jax.tree.map(np.array_equal, grouped, plain))
    one, two = (
        logits(network(variant, norm_groups=groups), {"params": plain}, tokens, tokens, tokens)
        for groups in ((4, 12), (16,))
    )
    assert np.abs(one - two).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"dtype": jnp.bfloat16, "float32_attention_logits": True},
        pytest.param({"remat_policy": "minimal"}, marks=pytest.mark.slow),
    ],
)
def test_it_trains_with_dropout_in_every_dtype_and_rematerialised(changes):
    variant = "scalable_1_1" if "remat_policy" in changes else "t5_1_1"
    model, variables = network(variant, **changes), fresh(variant, **changes)
    tokens = np.arange(1, 11).reshape(2, 5)

    @jax.jit
    @jax.value_and_grad
    def loss(parameters, key):
        found = model.apply({"params": parameters}, tokens, tokens, tokens, rngs={"dropout": key})
        assert found.dtype == jnp.float32
        return -jax.nn.log_softmax(found)[..., 0].mean()

    (first, gradients), (second, _) = (loss(variables["params"], jax.random.key(i)) for i in (0, 1))

    assert first != second
    assert all(np.isfinite(g).all() and g.any() for g in jax.tree.leaves(gradients))


def test_groups_that_do_not_sum_up_are_refused():
    with pytest.raises(ValueError, match=r"norm groups \[4, 8\] do not sum up to emb_dim 16"):
        network("t5_1_1", norm_groups=(4, 8))


# Configs such as T5X's own, which are not fusectl's classes.
MINIMAL = [("vocab_size", int), ("emb_dim", int), ("dtype", str), ("float32_attention_logits", bool)]
SCALABLE = [*MINIMAL[:3], ("scan_layers", bool), ("remat_policy", str)]
FORK = [*MINIMAL, ("use_bias", bool)]


@pytest.mark.parametrize(("fields", "kind"), [(MINIMAL, T5Config), (SCALABLE, ScalableT5Config), (FORK, TypeError)])
def test_norms_per_source_leave_the_other_settings_as_they_are(fields, kind):
    values = {"vocab_size": 50, "emb_dim": 12, "dtype": "bfloat16", "scan_layers": False, "remat_policy": "minimal"}
    values |= {"float32_attention_logits": True, "use_bias": True}
    config = make_dataclass("T5Config", fields)(**{name: values[name] for name, _ in fields})

    if kind is TypeError:
        with pytest.raises(TypeError, match="use_bias"):
            with_norm_groups(config, [4, 8])
        return
    found = with_norm_groups(config, [4, 8])

    assert type(found) is kind
    assert found.norm_groups == (4, 8)
    assert {name: getattr(found, name) for name, _ in fields} == vars(config)
    with pytest.raises(ValueError, match="do not sum up to emb_dim 12"):
        with_norm_groups(config, [4, 4])


def test_configs_are_changed_and_checked_as_t5xs_are():
    config = CONFIGS["t5_1_1"].replace(mlp_activations=(jax.nn.gelu, "linear"))

    assert Transformer(config.replace(**SIZES, dropout_rate=0.0)).config.dropout_rate == 0.0
    with pytest.raises(TypeError, match="a sequence"):
        config.replace(mlp_activations="relu")
    with pytest.raises(ValueError, match="1 norm epsilons for 2 norm groups"):
        config.replace(emb_dim=8, norm_groups=(4, 4), norm_epsilons=(1e-6,))


@pytest.mark.slow
def test_segments_of_one_side_only_are_refused():
    """Targets would see other examples' inputs."""
    ones = jnp.ones((1, 3), jnp.int32)
    with pytest.raises(ValueError, match="belong together"):
        network("t5_1_1").apply(fresh("t5_1_1"), ones, ones, ones, encoder_segment_ids=ones, enable_dropout=False)


@pytest.mark.slow
def test_activations_may_be_functions(written):
    variables, tokens = {"params": parameters(written, "t5_1_1")}, np.arange(1, 11).reshape(2, 5)

    named, given = (
        logits(network("t5_1_1", mlp_activations=activations), variables, tokens, tokens, tokens)
        for activations in (("gelu", "linear"), (jax.nn.gelu, lambda x: x))
    )

    np.testing.assert_array_equal(named, given)


@pytest.mark.slow
def test_packed_examples_cannot_be_decoded():
    ones = jnp.ones((1, 3), jnp.int32)
    with pytest.raises(ValueError, match="packed examples cannot be decoded"):
        network("t5_1_1").apply(
            fresh("t5_1_1"),
            ones,
            ones,
            ones,
            encoder_segment_ids=ones,
            decode=True,
            enable_dropout=False,
            mutable=["cache"],
        )


def test_distant_positions_share_buckets_as_in_t5():
    buckets = relative_position_buckets(1, 200, 32, bidirectional=True)[0]
    causal = relative_position_buckets(200, 1, 32, bidirectional=False)[:, 0]

    assert buckets[:8].tolist() == [0, 17, 18, 19, 20, 21, 22, 23]
    assert buckets[-1] == 31
    assert causal[:16].tolist() == list(range(16))
    assert causal[-1] == 31
