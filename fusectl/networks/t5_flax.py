"""T5 as a Flax network whose norms may be taken over groups: it trains, and verifies, with the fusion property.

A drop-in for T5X's networks. In gin, behind the files that bind `network.T5Config`:

    from t5x import models
    from t5x.examples.t5 import network
    from fusectl.networks import t5_flax
    models.EncoderDecoderModel.module = @t5_flax.Transformer()
    t5_flax.Transformer.config = @t5_flax.with_norm_groups()
    t5_flax.with_norm_groups.config = @network.T5Config()       # the config as before
    t5_flax.with_norm_groups.norm_groups = (512, 512)

T5Config is that of t5x/examples/t5 (minimal T5), ScalableT5Config that of t5x/examples/scalable_t5; parameter trees,
logical axes, caches and the computation are theirs, too. `norm_groups` is the addition: with the widths of the
fused models, each RMS norm divides every model's stretch of the residual stream by that stretch's own root mean
square, so that a fused layer computes the concatenation of its sources' layers (Deep Fusion, section 3, option 1).
With one group it is T5's own norm (the fusion rule, option 2).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax.linen import partitioning
from jax import lax

from fusectl.networks import layers_flax
from fusectl.networks.layers_flax import normalized, require_groups


Array = Any

EPSILON = 1e-6
# The number is T5X's. Scores next to it are rounded to multiples of 1,024 in float32, which decides what a row attends
# to that is masked whole.
MASKED = -1e10
RELPOS_MAX_DISTANCE = 128


@dataclass(frozen=True)
class T5Config:
    """The config of minimal T5, as in T5X, and `norm_groups`: widths that sum up to `emb_dim`; empty for one group.

    Raises ValueError for groups that do not sum up.
    """

    vocab_size: int
    # Of the activations. Parameters, norms and logits are float32 or wider.
    dtype: Any = jnp.float32
    emb_dim: int = 512
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    head_dim: int = 64
    mlp_dim: int = 2048
    # Names of functions in flax.linen, "linear", or functions.
    mlp_activations: Sequence[str | Callable[[Array], Array]] = ("relu",)
    dropout_rate: float = 0.1
    logits_via_embedding: bool = False
    float32_attention_logits: bool = False
    norm_groups: Sequence[int] = ()
    # The rest is verify's. T5X has 32 buckets; the epsilon of each group, where residual streams were rescaled; and the
    # dtype in which sums are accumulated before they are rounded, None leaving it to XLA.
    relpos_buckets: int = 32
    norm_epsilons: Sequence[float] = ()
    accumulate: Any = None

    # Whether kernels have an axis for each of heads and kv, and layers a relative bias of their own.
    scalable = False
    scan_layers = False
    remat_policy = "none"

    def __post_init__(self) -> None:
        if isinstance(self.mlp_activations, str):
            raise TypeError(f"mlp_activations {self.mlp_activations!r}: a sequence, such as ('gelu', 'linear')")
        # gin hands over lists; a config must be hashable.
        for name in ("mlp_activations", "norm_groups", "norm_epsilons"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        require_groups(self.norm_groups, self.emb_dim, self.norm_epsilons, "norm epsilons")

    def replace(self, **changes: Any) -> T5Config:
        """The config with these fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def wide(self) -> Any:
        """The dtype of norms and logits: float32 for narrower activations."""
        return jnp.promote_types(self.dtype, jnp.float32)


@dataclass(frozen=True)
class ScalableT5Config(T5Config):
    """The config of scalable T5, as in T5X."""

    remat_policy: str = "none"
    scan_layers: bool = True
    param_scan_axis: int = 1

    scalable = True


def with_norm_groups(config: Any, norm_groups: Sequence[int]) -> T5Config:
    """The config of this network, of the same settings as a config of T5X's own and with these groups.

    `config` is a T5Config of t5x/examples/t5 or of t5x/examples/scalable_t5, which alone has scan_layers; groups are
    widths. Raises ValueError for groups that do not sum up to its emb_dim, and TypeError for a config with a setting
    that this network does not have, such as that of a fork.
    """
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    kind = ScalableT5Config if "scan_layers" in settings else T5Config
    return kind(**{**settings, "norm_groups": norm_groups})


class RMSNorm(nn.Module):
    """T5's layer norm: x / rms(x) * scale, the root mean square taken over each group of features by itself."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        # T5X hard-codes float32 in its norms and logits; here it is float32 at least, so that float64 stays float64.
        x = jnp.asarray(x, cfg.wide)
        groups = cfg.norm_groups or (x.shape[-1],)
        epsilons = cfg.norm_epsilons or (EPSILON,) * len(groups)
        y = normalized(x, groups, epsilons, cfg.accumulate).astype(cfg.dtype)
        scale = partitioning.param_with_axes(
            "scale", nn.initializers.ones, (x.shape[-1],), jnp.float32, axes=("embed",)
        )
        return y * jnp.asarray(scale, cfg.dtype)


class Dense(nn.Module):
    """A linear map without bias from the last axes of its input, `reads`, to new ones, `writes`, of sizes `features`.

    Minimal T5 stores every kernel as a matrix, and calls heads and kv together joined_kv.
    """

    config: T5Config
    features: tuple[int, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    # variance_scaling's distribution, and what the values are divided by.
    distribution: str = "truncated_normal"
    divisor: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg, n = self.config, len(self.reads)
        dtype = self.dtype or cfg.dtype
        reads, writes, axes = x.shape[-n:], self.features, (*self.reads, *self.writes)
        if not cfg.scalable:
            reads, writes = (math.prod(reads),), (math.prod(writes),)
            axes = tuple("joined_kv" if name == "heads" else name for name in axes if name != "kv")
        init = self._initializer(len(reads), len(reads) + len(writes))
        kernel = partitioning.param_with_axes("kernel", init, (*reads, *writes), jnp.float32, axes=axes)
        kernel = jnp.asarray(kernel, dtype).reshape(*x.shape[-n:], *self.features)
        contracted = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
        x = jnp.asarray(x, dtype)
        return lax.dot_general(x, kernel, (contracted, ((), ())), preferred_element_type=cfg.accumulate).astype(dtype)

    def _initializer(self, reads: int, rank: int) -> Any:
        scaled = nn.initializers.variance_scaling(
            1.0, "fan_in", self.distribution, in_axis=tuple(range(reads)), out_axis=tuple(range(reads, rank))
        )
        return lambda *args: scaled(*args) / self.divisor


class RelativePositionBias(nn.Module):
    """A learned bias per head and bucket of distance, wider buckets further away: (1, heads, queries, keys)."""

    config: T5Config

    @nn.compact
    def __call__(self, queries: int, keys: int, *, bidirectional: bool) -> Array:
        cfg = self.config
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        shape = (cfg.num_heads, cfg.relpos_buckets)
        table = partitioning.param_with_axes(
            "rel_embedding", init, shape, jnp.float32, axes=("heads", "relpos_buckets")
        )
        buckets = relative_position_buckets(queries, keys, cfg.relpos_buckets, bidirectional=bidirectional)
        # A product with one-hot vectors, which TPUs do faster than they gather.
        one_hot = jax.nn.one_hot(buckets, cfg.relpos_buckets, axis=0, dtype=cfg.dtype)
        return contract(cfg, "hb,bqk->hqk", jnp.asarray(table, cfg.dtype), one_hot)[None]


def relative_position_buckets(queries: int, keys: int, buckets: int, *, bidirectional: bool) -> npt.NDArray[np.int32]:
    """The bucket of every (query, key): exact distances up to half of the buckets, then logarithmic up to 128.

    Computed in float32 as T5X does, also under float64: a distance on the border must not change its bucket.
    """
    distance = np.arange(queries, dtype=np.int32)[:, None] - np.arange(keys, dtype=np.int32)[None, :]
    offset = np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = np.where(distance < 0, buckets, 0).astype(np.int32)
        distance = np.abs(distance)
    distance = np.maximum(distance, 0)
    exact = buckets // 2
    far = np.log(distance.astype(np.float32) / exact + np.finfo(np.float32).eps) / np.log(RELPOS_MAX_DISTANCE / exact)
    logarithmic = np.minimum(exact + (far * (buckets - exact)).astype(np.int32), buckets - 1)
    return np.asarray(offset + np.where(distance < exact, distance, logarithmic), np.int32)


class Attention(nn.Module):
    """Multi-head attention; T5 does not divide by sqrt(head_dim) but initialises its queries smaller.

    `mask` is (batch, 1, queries, keys), True where a query sees a key; `bias` (1, heads, queries, keys). With `decode`,
    keys and values are kept in the collection `cache`, laid out as in T5X, and one query is asked at a time.
    """

    config: T5Config

    @nn.compact
    def __call__(
        self,
        x: Array,
        context: Array,
        mask: Array | None,
        bias: Array | None = None,
        *,
        deterministic: bool = True,
        decode: bool = False,
    ) -> Array:
        cfg = self.config
        project = partial(Dense, cfg, (cfg.num_heads, cfg.head_dim), ("embed",), ("heads", "kv"), distribution="normal")
        query = project(divisor=math.sqrt(cfg.head_dim), name="query")(x)
        key, value = project(name="key")(context), project(name="value")(context)
        query, key, value = (
            partitioning.with_sharding_constraint(part, ("batch", "length", "heads", "kv"))
            for part in (query, key, value)
        )
        if decode:
            key, value, mask, bias = self._cached(key, value, mask, bias)
        offset = None if mask is None else jnp.where(mask, 0.0, MASKED).astype(cfg.dtype)
        if bias is not None:
            # Mask and bias first: beside 1e10 the order decides what is left of the scores of a row that is masked
            # whole.
            offset = bias if offset is None else offset + bias
        weights = self._dropped(self._weights(query, key, offset), deterministic)
        mixed = contract(cfg, "bhqk,bkhd->bqhd", weights, value)
        out = Dense(cfg, (x.shape[-1],), ("heads", "kv"), ("embed",), distribution="normal", name="out")
        return out(mixed)

    def _weights(self, query: Array, key: Array, offset: Array | None) -> Array:
        cfg = self.config
        if cfg.float32_attention_logits:
            query, key = jnp.asarray(query, cfg.wide), jnp.asarray(key, cfg.wide)
        scores = contract(cfg, "bqhd,bkhd->bhqk", query, key)
        if offset is not None:
            scores = scores + offset.astype(scores.dtype)
        if cfg.accumulate is not None:
            scores = scores.astype(cfg.accumulate)
        return jax.nn.softmax(scores).astype(cfg.dtype)

    def _dropped(self, weights: Array, deterministic: bool) -> Array:
        """Dropout that is the same for all queries, as in T5X."""
        drop = nn.Dropout(self.config.dropout_rate, broadcast_dims=(-2,), name="dropout")
        return drop(weights, deterministic=deterministic)

    def _cached(
        self, key: Array, value: Array, mask: Array | None, bias: Array | None
    ) -> tuple[Array, Array, Array | None, Array | None]:
        """One position's key and value joined to those before it; before the cache exists, an empty one is made."""
        ready = self.has_variable("cache", "cached_key")

        # (batch, heads, kv, length), in which order TPUs like it.
        def lengths_last(part: Array) -> Array:
            return jnp.moveaxis(part, -3, -1)

        keys, values = (
            self.variable("cache", name, jnp.zeros, lengths_last(part).shape, part.dtype)
            for name, part in (("cached_key", key), ("cached_value", value))
        )
        index = self.variable("cache", "cache_index", lambda: jnp.array(0, jnp.int32))
        if not ready:
            return key, value, mask, bias
        if key.shape[1] != 1:
            raise ValueError(f"decoding asks one position at a time, not {key.shape[1]}")
        at, length = index.value, keys.value.shape[-1]
        here = jax.nn.one_hot(at, length, dtype=key.dtype)
        keys.value = keys.value + lengths_last(key) * here
        values.value = values.value + lengths_last(value) * here
        index.value = at + 1
        seen = (jnp.arange(length) <= at)[None, None, None, :]
        mask = seen if mask is None else jnp.logical_and(mask, seen)
        if bias is not None:
            bias = lax.dynamic_slice_in_dim(bias, at, 1, axis=-2)
        return jnp.moveaxis(keys.value, -1, -3), jnp.moveaxis(values.value, -1, -3), mask, bias


class MLP(nn.Module):
    """The feed-forward block: the product of its activations' branches, back to the residual stream."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool = True) -> Array:
        cfg = self.config
        branches = []
        for i, activation in enumerate(cfg.mlp_activations):
            name = "wi" if len(cfg.mlp_activations) == 1 else f"wi_{i}"
            branch = Dense(cfg, (cfg.mlp_dim,), ("embed",), ("mlp",), name=name)(x)
            branches.append(_activation(activation)(branch))
        hidden = functools.reduce(operator.mul, branches)
        hidden = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))(hidden, deterministic=deterministic)
        hidden = partitioning.with_sharding_constraint(hidden, ("batch", "length", "mlp"))
        return Dense(cfg, (x.shape[-1],), ("mlp",), ("embed",), name="wo")(hidden)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward block. `bias` is None where every layer has a relative bias of its own."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Array, mask: Array, bias: Array | None, deterministic: bool = True) -> Any:
        cfg, length = self.config, x.shape[1]
        if cfg.scalable:
            bias = RelativePositionBias(cfg, name="relpos_bias")(length, length, bidirectional=True)
        x = _sharded(cfg, x)
        y = _sharded(cfg, RMSNorm(cfg, name="pre_attention_layer_norm")(x))
        y = Attention(cfg, name="attention")(y, y, mask, bias, deterministic=deterministic)
        x = _sharded(cfg, _dropped(cfg, y, deterministic) + x)
        y = _sharded(cfg, RMSNorm(cfg, name="pre_mlp_layer_norm")(x))
        y = MLP(cfg, name="mlp")(y, deterministic=deterministic)
        x = _sharded(cfg, _dropped(cfg, y, deterministic) + x)
        return (x, None) if cfg.scan_layers else x


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder, and feed-forward block."""

    config: T5Config

    @nn.compact
    def __call__(
        self,
        x: Array,
        encoded: Array,
        mask: Array | None,
        cross_mask: Array,
        bias: Array | None,
        deterministic: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
    ) -> Any:
        cfg = self.config
        if cfg.scalable:
            bias = causal_bias(cfg, x.shape[1], decode, max_decode_length)
        x = _sharded(cfg, x)
        y = _sharded(cfg, RMSNorm(cfg, name="pre_self_attention_layer_norm")(x))
        attention = Attention(cfg, name="self_attention")
        y = attention(y, y, mask, bias, deterministic=deterministic, decode=decode)
        x = _sharded(cfg, _dropped(cfg, y, deterministic) + x)
        y = _sharded(cfg, RMSNorm(cfg, name="pre_cross_attention_layer_norm")(x))
        attention = Attention(cfg, name="encoder_decoder_attention")
        y = attention(y, encoded, cross_mask, deterministic=deterministic)
        x = _sharded(cfg, _dropped(cfg, y, deterministic) + x)
        y = _sharded(cfg, RMSNorm(cfg, name="pre_mlp_layer_norm")(x))
        y = MLP(cfg, name="mlp")(y, deterministic=deterministic)
        x = _sharded(cfg, _dropped(cfg, y, deterministic) + x)
        return (x, None) if cfg.scan_layers else x


def causal_bias(config: T5Config, length: int, decode: bool, max_decode_length: int | None) -> Array:
    """The decoder's relative bias; called inside a module, of which it becomes the submodule relpos_bias."""
    length = max_decode_length if decode and max_decode_length else length
    return RelativePositionBias(config, name="relpos_bias")(length, length, bidirectional=False)


class Encoder(nn.Module):
    """A stack of encoder layers: embedded tokens (batch, length, embed) to the same, normalised."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, deterministic: bool = True) -> Array:
        cfg, length = self.config, x.shape[1]
        x = _dropped(cfg, x, deterministic)
        bias = None
        if not cfg.scalable:
            bias = RelativePositionBias(cfg, name="relpos_bias")(length, length, bidirectional=True)
        x = _stacked(self, EncoderLayer, "encoder", cfg.num_encoder_layers, (3,))(x, mask, bias, deterministic)
        x = RMSNorm(cfg, name="encoder_norm")(x)
        return nn.Dropout(cfg.dropout_rate)(x, deterministic=deterministic)


class Decoder(nn.Module):
    """A stack of decoder layers: embedded tokens to normalised (batch, length, embed), and the untied head's logits."""

    config: T5Config

    @nn.compact
    def __call__(
        self,
        x: Array,
        encoded: Array,
        mask: Array | None,
        cross_mask: Array,
        *,
        deterministic: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
    ) -> Array:
        cfg, length = self.config, x.shape[1]
        x = _dropped(cfg, x, deterministic)
        bias = None if cfg.scalable else causal_bias(cfg, length, decode, max_decode_length)
        layers = _stacked(self, DecoderLayer, "decoder", cfg.num_decoder_layers, (5, 6, 7))
        x = layers(x, encoded, mask, cross_mask, bias, deterministic, decode, max_decode_length)
        x = _dropped(cfg, RMSNorm(cfg, name="decoder_norm")(x), deterministic)
        if cfg.logits_via_embedding:
            return x
        return Dense(cfg, (cfg.vocab_size,), ("embed",), ("vocab",), dtype=cfg.wide, name="logits_dense")(x)


def _stacked(stack: nn.Module, layer: type[nn.Module], name: str, count: int, static: tuple[int, ...]) -> Any:
    """A function that runs a stack of equal layers: one module each, or scanned over stacked parameters.

    `static` are the positions of the arguments that are no arrays, which rematerialisation must know.
    """
    cfg = stack.config
    if cfg.remat_policy not in {None, "none"}:
        dots = jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims
        policy = dots if cfg.remat_policy == "minimal" else None
        layer = partitioning.remat(layer, prevent_cse=not cfg.scan_layers, policy=policy, static_argnums=static)

    def run(x: Array, *rest: Any) -> Array:
        if not cfg.scan_layers:
            for i in range(count):
                x = layer(cfg, name=f"layers_{i}")(x, *rest)
            return x
        axis = cfg.param_scan_axis
        scanned = partitioning.scan_with_axes(
            layer,
            variable_axes={
                # As in scalable_t5's network, parameters come out of the scan only while they are made; applying it
                # takes them in alone.
                "params": axis if stack.is_mutable_collection("params") else partitioning.ScanIn(axis),
                "cache": 0,
            },
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast,) * len(rest),
            length=count,
            axis_name="layers",
        )
        x, _ = scanned(cfg, name=name)(x, *rest)
        return x

    return run


class Embedder(nn.Module):
    """The table of token embeddings, which a tied head reads again."""

    config: T5Config

    def setup(self) -> None:
        shape = (self.config.vocab_size, self.config.emb_dim)
        init = nn.initializers.normal(1.0)
        self.embedding = partitioning.param_with_axes("embedding", init, shape, jnp.float32, axes=("vocab", "embed"))

    def __call__(self, tokens: Array) -> Array:
        """(batch, length) to (batch, length, embed); a product with one-hot vectors, which shards along the vocab."""
        cfg = self.config
        one_hot = jax.nn.one_hot(tokens, cfg.vocab_size, dtype=cfg.dtype)
        return contract(cfg, "blv,ve->ble", one_hot, jnp.asarray(self.embedding, cfg.dtype))

    def attend(self, x: Array) -> Array:
        """Logits over the table's tokens, divided by sqrt(embed)."""
        return tied_logits(self.config, x, self.embedding)


def tied_logits(config: T5Config, x: Array, embedding: Array) -> Array:
    """The logits (…, vocab) of a tied head: products with rows of the embedding table, divided by sqrt(embed)."""
    table = jnp.asarray(embedding, config.wide).T
    logits = jnp.dot(jnp.asarray(x, config.wide), table, preferred_element_type=config.accumulate)
    return logits.astype(config.wide) / math.sqrt(config.emb_dim)


class Transformer(nn.Module):
    """The whole network, with the interface of T5X's: tokens (batch, length), 0 being padding, to logits."""

    config: T5Config

    @property
    def scan_layers(self) -> bool:
        """Where T5X's models look for it."""
        return self.config.scan_layers

    def setup(self) -> None:
        self.token_embedder = Embedder(self.config)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode(
        self, encoder_input_tokens: Array, encoder_segment_ids: Array | None = None, enable_dropout: bool = True
    ) -> Array:
        """The encoder's output (batch, length, embed). Segments keep packed examples apart."""
        mask = encoder_mask(encoder_input_tokens, encoder_segment_ids)
        return self.encoder(self.token_embedder(encoder_input_tokens), mask, deterministic=not enable_dropout)

    def decode(
        self,
        encoded: Array,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
        decoder_positions: Array | None = None,  # noqa: ARG002
        enable_dropout: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
    ) -> Array:
        """The logits (batch, length, vocab) of the tokens that follow; the other tokens are looked at for masks only.

        With `decode`, one position at a time, from the collection `cache`. Raises ValueError for packed examples then.
        """
        if decode:
            if encoder_segment_ids is not None:
                raise ValueError("packed examples cannot be decoded: leave encoder_segment_ids out")
            everywhere = jnp.ones_like(decoder_target_tokens)
            mask, cross_mask = None, pairs(everywhere > 0, encoder_input_tokens > 0)
        else:
            mask = decoder_mask(decoder_target_tokens, decoder_segment_ids)
            cross_mask = decoder_encoder_mask(
                decoder_target_tokens, encoder_input_tokens, decoder_segment_ids, encoder_segment_ids
            )
        x = self.decoder(
            self.token_embedder(decoder_input_tokens),
            encoded,
            mask,
            cross_mask,
            deterministic=not enable_dropout,
            decode=decode,
            max_decode_length=max_decode_length,
        )
        return self.token_embedder.attend(x) if self.config.logits_via_embedding else x

    def __call__(
        self,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
        encoder_positions: Array | None = None,  # noqa: ARG002
        decoder_positions: Array | None = None,
        *,
        enable_dropout: bool = True,
        decode: bool = False,
    ) -> Array:
        """The logits (batch, length, vocab). `decoder_input_tokens` are the targets shifted right by one."""
        encoded = self.encode(encoder_input_tokens, encoder_segment_ids, enable_dropout)
        return self.decode(
            encoded,
            encoder_input_tokens,
            decoder_input_tokens,
            decoder_target_tokens,
            encoder_segment_ids,
            decoder_segment_ids,
            decoder_positions,
            enable_dropout,
            decode,
        )


def encoder_mask(tokens: Array, segments: Array | None) -> Array:
    """Which token sees which: (batch, 1, length, length). Padding is neither seen nor sees."""
    return _and_segments(pairs(tokens > 0, tokens > 0), segments, segments)


def decoder_mask(targets: Array, segments: Array | None) -> Array:
    """Which target sees which, none a later one: (batch, 1, length, length)."""
    causal = jnp.tril(jnp.ones((targets.shape[1],) * 2, bool))
    return _and_segments(pairs(targets > 0, targets > 0) & causal, segments, segments)


def decoder_encoder_mask(
    targets: Array, tokens: Array, target_segments: Array | None, token_segments: Array | None
) -> Array:
    """Which target sees which token of the encoder: (batch, 1, targets, tokens)."""
    return _and_segments(pairs(targets > 0, tokens > 0), target_segments, token_segments)


def pairs(queries: Array, keys: Array) -> Array:
    """(batch, queries) and (batch, keys) to (batch, 1, queries, keys): True where both are."""
    return (queries[:, None, :, None] & keys[:, None, None, :]).astype(bool)


def contract(config: T5Config, equation: str, a: Array, b: Array) -> Array:
    """An einsum in the arrays' dtype, its sums accumulated as the config says."""
    return layers_flax.contract(equation, a, b, config.accumulate)


def _and_segments(mask: Array, queries: Array | None, keys: Array | None) -> Array:
    if (queries is None) != (keys is None):
        raise ValueError("segments of the encoder's and the decoder's tokens belong together")
    if queries is None or keys is None:
        return mask
    return mask & (queries[:, None, :, None] == keys[:, None, None, :])


def _dropped(config: T5Config, x: Array, deterministic: bool) -> Array:
    """Dropout that is the same along the length; to be called inside a module."""
    dropped = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))(x, deterministic=deterministic)
    return dropped.astype(config.dtype)


def _sharded(config: T5Config, x: Array) -> Array:
    """The residual stream with its logical axes named, as scalable T5 does."""
    return partitioning.with_sharding_constraint(x, ("batch", "length", "embed")) if config.scalable else x


def _activation(named: str | Callable[[Array], Array]) -> Callable[[Array], Array]:
    """An activation function: itself, the identity for "linear", or flax.linen's of this name."""
    if callable(named):
        return named
    return (lambda x: x) if named == "linear" else getattr(nn, named)
