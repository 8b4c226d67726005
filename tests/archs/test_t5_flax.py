"""The drop-in network: T5X's parameter trees, axes, logits and caches, and norms over groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from fusectl.archs import recognize
from fusectl.archs.t5_flax import ScalableT5Config, T5Config, Transformer, relative_position_buckets
from fusectl.formats import open_checkpoint


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


def fresh(variant, seed=0, **changes):
    ones = jnp.ones((2, 5), jnp.int32)
    return network(variant, **changes).init(jax.random.key(seed), ones, ones, ones, enable_dropout=False)


@pytest.mark.parametrize("variant", CONFIGS)
def test_its_tree_is_the_one_that_t5x_wrote_and_its_axes_are_those_of_the_table(written, variant):
    _, tree = opened(written, variant)

    variables = fresh(variant)

    assert {n: v.shape for n, v in flatten_dict(variables["params"], sep="/").items()} == tree.shapes
    axes = flatten_dict(variables["params_axes"], sep="/")
    assert {n.removesuffix("_axes"): tuple(v.names) for n, v in axes.items()} == {
        name: row.spec.axes for name, row in tree.rows.items()
    }


@pytest.mark.parametrize("variant", CONFIGS)
def test_it_computes_the_logits_of_t5xs_network(written, variant):
    expected = np.load(written / variant / "seed0/logits.npz")
    wanted = expected["tgt"] > 0
    variables = {"params": parameters(written, variant)}

    found = network(variant).apply(variables, expected["enc"], expected["dec"], expected["tgt"], enable_dropout=False)

    np.testing.assert_allclose(found[wanted], expected["logits"][wanted], rtol=0, atol=2e-6)


@pytest.mark.parametrize("groups", [(), (4, 12)])
@pytest.mark.parametrize("variant", CONFIGS)
def test_decoding_with_a_cache_is_teacher_forcing(written, variant, groups):
    tokens = np.load(written / variant / "seed0/logits.npz")
    encoder, decoder = tokens["enc"], tokens["dec"]
    model, variables = network(variant, norm_groups=groups), {"params": parameters(written, variant)}
    everywhere = np.ones_like(decoder)
    expected = model.apply(variables, encoder, decoder, everywhere, enable_dropout=False)
    ones = [jnp.ones_like(each) for each in (encoder, decoder, decoder)]
    _, cache = model.apply(variables, *ones, decode=True, enable_dropout=False, mutable=["cache"])
    encoded = model.apply(variables, encoder, enable_dropout=False, method=model.encode)
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
        logits, cache = step(cache, decoder[:, t : t + 1])
        found.append(logits[:, 0])

    np.testing.assert_allclose(np.stack(found, axis=1), expected, rtol=0, atol=5e-6)
    caches = flatten_dict(cache["cache"], sep="/")
    assert {n.rsplit("/", 1)[1] for n in caches} == {"cached_key", "cached_value", "cache_index"}
    assert all((v == length).all() for n, v in caches.items() if n.endswith("cache_index"))


def test_the_first_token_of_a_cache_is_not_the_last(written):
    """The control: without the cache, a token alone has other logits."""
    tokens = np.load(written / "t5_1_1/seed0/logits.npz")
    model, variables = network("t5_1_1"), {"params": parameters(written, "t5_1_1")}
    last = tokens["dec"][:, -1:]

    whole = model.apply(variables, tokens["enc"], tokens["dec"], np.ones_like(tokens["dec"]), enable_dropout=False)
    alone = model.apply(variables, tokens["enc"], last, np.ones_like(last), enable_dropout=False)

    assert np.abs(whole[:, -1] - alone[:, 0]).max() > 1e-3


def test_packed_examples_do_not_see_each_other(written):
    model, variables = network("t5_1_1"), {"params": parameters(written, "t5_1_1")}
    rng = np.random.default_rng(0)
    encoder, targets = rng.integers(1, 128, (1, 10)), rng.integers(1, 128, (1, 8))
    encoder_segments, target_segments = np.repeat([[1, 2]], 5, 1), np.repeat([[1, 2]], 4, 1)
    decoder = np.concatenate([np.zeros((1, 1), int), targets[:, :-1]], 1)
    decoder[0, 4] = 0

    packed = model.apply(
        variables,
        encoder,
        decoder,
        targets,
        encoder_segment_ids=encoder_segments,
        decoder_segment_ids=target_segments,
        enable_dropout=False,
    )
    unpacked = model.apply(variables, encoder, decoder, targets, enable_dropout=False)

    for part in range(2):
        e, d = slice(5 * part, 5 * part + 5), slice(4 * part, 4 * part + 4)
        alone = model.apply(variables, encoder[:, e], decoder[:, d], targets[:, d], enable_dropout=False)
        np.testing.assert_allclose(packed[:, d], alone, rtol=0, atol=2e-6)
    assert np.abs(packed - unpacked).max() > 1e-3


@pytest.mark.parametrize("variant", CONFIGS)
def test_norm_groups_normalise_each_stretch_by_itself(variant):
    grouped, plain = (fresh(variant, norm_groups=groups)["params"] for groups in ((4, 12), ()))
    tokens = np.arange(1, 11).reshape(2, 5)

    assert jax.tree.all(jax.tree.map(np.array_equal, grouped, plain))
    one, two = (
        network(variant, norm_groups=groups).apply({"params": plain}, tokens, tokens, tokens, enable_dropout=False)
        for groups in ((4, 12), (16,))
    )
    assert np.abs(one - two).max() > 1e-3


@pytest.mark.parametrize(
    "changes", [{}, {"dtype": jnp.bfloat16, "float32_attention_logits": True}, {"remat_policy": "minimal"}]
)
def test_it_trains_with_dropout_in_every_dtype_and_rematerialised(changes):
    variant = "scalable_1_1" if "remat_policy" in changes else "t5_1_1"
    model, variables = network(variant, **changes), fresh(variant, **changes)
    tokens = np.arange(1, 11).reshape(2, 5)

    def loss(parameters, key):
        logits = model.apply({"params": parameters}, tokens, tokens, tokens, rngs={"dropout": jax.random.key(key)})
        assert logits.dtype == jnp.float32
        return -jax.nn.log_softmax(logits)[..., 0].mean()

    first, second = (loss(variables["params"], key) for key in (0, 1))
    gradients = jax.grad(loss)(variables["params"], 0)

    assert first != second
    assert all(np.isfinite(g).all() and g.any() for g in jax.tree.leaves(gradients))


def test_groups_that_do_not_sum_up_are_refused():
    with pytest.raises(ValueError, match=r"norm groups \[4, 8\] do not sum up to emb_dim 16"):
        network("t5_1_1", norm_groups=(4, 8))


def test_configs_are_changed_and_checked_as_t5xs_are():
    config = CONFIGS["t5_1_1"].replace(mlp_activations=(jax.nn.gelu, "linear"))

    assert Transformer(config.replace(**SIZES, dropout_rate=0.0)).config.dropout_rate == 0.0
    with pytest.raises(TypeError, match="a sequence"):
        config.replace(mlp_activations="relu")
    with pytest.raises(ValueError, match="1 norm epsilons for 2 norm groups"):
        config.replace(emb_dim=8, norm_groups=(4, 4), norm_epsilons=(1e-6,))


def test_segments_of_one_side_only_are_refused():
    """Targets would see other examples' inputs."""
    ones = jnp.ones((1, 3), jnp.int32)
    with pytest.raises(ValueError, match="belong together"):
        network("t5_1_1").apply(fresh("t5_1_1"), ones, ones, ones, encoder_segment_ids=ones, enable_dropout=False)


def test_activations_may_be_functions(written):
    variables, tokens = {"params": parameters(written, "t5_1_1")}, np.arange(1, 11).reshape(2, 5)

    named, given = (
        network("t5_1_1", mlp_activations=activations).apply(variables, tokens, tokens, tokens, enable_dropout=False)
        for activations in (("gelu", "linear"), (jax.nn.gelu, lambda x: x))
    )

    np.testing.assert_array_equal(named, given)


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
