"""T5 as a Flax network, with norms over groups: the twin that verify runs, and what the fusion property trains with.

The same function as t5x/examples/t5/network.py, without dropout and decoding caches; parameters in the tree of minimal
T5. `norm_groups` is the one addition: with the widths of the fused models, each RMS norm divides every model's stretch
of the residual stream by that stretch's own root mean square, so that a fused layer computes the concatenation of its
sources' layers (Deep Fusion, section 3, option 1). With one group it is T5's own norm (the fusion rule, option 2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax.traverse_util import unflatten_dict

from fusectl.archs import Recognized


Array = Any

EPSILON = 1e-6
MASKED = -1e10
RELPOS_MAX_DISTANCE = 128


@dataclass(frozen=True)
class T5Config:
    """The sizes of a T5 network, named as in T5X's own config, and `norm_groups`: widths that sum up to `emb_dim`."""

    vocab_size: int
    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    logits_via_embedding: bool = False
    relpos_per_layer: bool = False
    relpos_buckets: int = 32
    norm_groups: tuple[int, ...] = ()
    dtype: Any = jnp.float32
    # In which dtype sums are accumulated before they are rounded to `dtype`; None leaves it to XLA.
    accumulate: Any = None


def contract(config: T5Config, equation: str, a: Array, b: Array) -> Array:
    """An einsum in the config's dtype, its sums accumulated as the config says."""
    return jnp.einsum(equation, a, b, preferred_element_type=config.accumulate).astype(config.dtype)


class RMSNorm(nn.Module):
    """T5's layer norm: x / rms(x) * scale, the root mean square taken over each group of features by itself."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), cfg.dtype)
        edges = np.cumsum(cfg.norm_groups or (x.shape[-1],))[:-1]
        normalized = []
        for group in jnp.split(x, edges, axis=-1):
            mean_square = jnp.mean(jax.lax.square(group), axis=-1, keepdims=True, dtype=cfg.accumulate)
            normalized.append(group * jax.lax.rsqrt(mean_square + EPSILON).astype(cfg.dtype))
        return jnp.concatenate(normalized, axis=-1) * scale


class Dense(nn.Module):
    """A matrix without bias: (…, inputs) to (…, features)."""

    config: T5Config
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        initializer = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        kernel = self.param("kernel", initializer, (x.shape[-1], self.features), self.config.dtype)
        return contract(self.config, "...i,io->...o", x, kernel)


class RelativePositionBias(nn.Module):
    """A learned bias per head and bucket of distance, wider buckets further away: (1, heads, queries, keys)."""

    config: T5Config

    @nn.compact
    def __call__(self, queries: int, keys: int, *, bidirectional: bool) -> Array:
        buckets = self.config.relpos_buckets
        shape = (self.config.num_heads, buckets)
        table = self.param("rel_embedding", nn.initializers.normal(1.0), shape, self.config.dtype)
        return table[:, relative_position_buckets(queries, keys, buckets, bidirectional=bidirectional)][None]


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
    """Multi-head attention; T5 does not divide by sqrt(head_dim)."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Array, context: Array, mask: Array, bias: Array | None = None) -> Array:
        cfg = self.config
        heads = (cfg.num_heads, cfg.head_dim)
        joined = cfg.num_heads * cfg.head_dim
        query = Dense(cfg, joined, name="query")(x).reshape(*x.shape[:-1], *heads)
        key = Dense(cfg, joined, name="key")(context).reshape(*context.shape[:-1], *heads)
        value = Dense(cfg, joined, name="value")(context).reshape(*context.shape[:-1], *heads)
        masked = jnp.where(mask, 0.0, MASKED).astype(cfg.dtype)
        # Mask and bias first: beside 1e10 the order decides what is left of the scores of a row that is masked whole.
        scores = contract(cfg, "bqhd,bkhd->bhqk", query, key) + (masked if bias is None else masked + bias)
        mixed = contract(cfg, "bhqk,bkhd->bqhd", _softmax(cfg, scores), value)
        return Dense(cfg, x.shape[-1], name="out")(mixed.reshape(*x.shape[:-1], joined))


class MLP(nn.Module):
    """The feed-forward block: the product of its activations' branches, back to the residual stream."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        hidden: Array = 1
        for i, activation in enumerate(cfg.mlp_activations):
            name = "wi" if len(cfg.mlp_activations) == 1 else f"wi_{i}"
            branch = Dense(cfg, cfg.mlp_dim, name=name)(x)
            hidden = hidden * (branch if activation == "linear" else getattr(nn, activation)(branch))
        return Dense(cfg, x.shape[-1], name="wo")(hidden)


class EncoderLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x: Array, mask: Array, bias: Array | None) -> Array:
        cfg = self.config
        if cfg.relpos_per_layer:
            bias = RelativePositionBias(cfg, name="relpos_bias")(x.shape[1], x.shape[1], bidirectional=True)
        y = RMSNorm(cfg, name="pre_attention_layer_norm")(x)
        x = x + Attention(cfg, name="attention")(y, y, mask, bias)
        return x + MLP(cfg, name="mlp")(RMSNorm(cfg, name="pre_mlp_layer_norm")(x))


class DecoderLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x: Array, encoded: Array, mask: Array, cross_mask: Array, bias: Array | None) -> Array:
        cfg = self.config
        if cfg.relpos_per_layer:
            bias = RelativePositionBias(cfg, name="relpos_bias")(x.shape[1], x.shape[1], bidirectional=False)
        y = RMSNorm(cfg, name="pre_self_attention_layer_norm")(x)
        x = x + Attention(cfg, name="self_attention")(y, y, mask, bias)
        y = RMSNorm(cfg, name="pre_cross_attention_layer_norm")(x)
        x = x + Attention(cfg, name="encoder_decoder_attention")(y, encoded, cross_mask)
        return x + MLP(cfg, name="mlp")(RMSNorm(cfg, name="pre_mlp_layer_norm")(x))


class Encoder(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        cfg = self.config
        bias = None
        if not cfg.relpos_per_layer:
            bias = RelativePositionBias(cfg, name="relpos_bias")(x.shape[1], x.shape[1], bidirectional=True)
        for i in range(cfg.num_encoder_layers):
            x = EncoderLayer(cfg, name=f"layers_{i}")(x, mask, bias)
        return RMSNorm(cfg, name="encoder_norm")(x)


class Decoder(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x: Array, encoded: Array, mask: Array, cross_mask: Array, embedding: Array) -> Array:
        cfg = self.config
        bias = None
        if not cfg.relpos_per_layer:
            bias = RelativePositionBias(cfg, name="relpos_bias")(x.shape[1], x.shape[1], bidirectional=False)
        for i in range(cfg.num_decoder_layers):
            x = DecoderLayer(cfg, name=f"layers_{i}")(x, encoded, mask, cross_mask, bias)
        x = RMSNorm(cfg, name="decoder_norm")(x)
        if cfg.logits_via_embedding:
            return contract(cfg, "...e,ve->...v", x, embedding) / math.sqrt(cfg.emb_dim)
        return Dense(cfg, cfg.vocab_size, name="logits_dense")(x)


class Embedder(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self) -> Array:
        shape = (self.config.vocab_size, self.config.emb_dim)
        return self.param("embedding", nn.initializers.normal(1.0), shape, self.config.dtype)


class Transformer(nn.Module):
    """The whole network: tokens (batch, length), 0 being padding, to logits (batch, length, vocab)."""

    config: T5Config

    def setup(self) -> None:
        self.token_embedder = Embedder(self.config)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def __call__(self, encoder_tokens: Array, decoder_tokens: Array, targets: Array) -> Array:
        embedding = self.token_embedder()
        seen, wanted = encoder_tokens > 0, targets > 0
        encoded = self.encoder(embedding[encoder_tokens], _pairs(seen, seen))
        causal = jnp.tril(jnp.ones((targets.shape[1],) * 2, bool))
        return self.decoder(
            embedding[decoder_tokens], encoded, _pairs(wanted, wanted) & causal, _pairs(wanted, seen), embedding
        )


def _softmax(config: T5Config, scores: Array) -> Array:
    wide = scores if config.accumulate is None else scores.astype(config.accumulate)
    return jax.nn.softmax(wide).astype(config.dtype)


def _pairs(queries: Array, keys: Array) -> Array:
    return (queries[:, None, :, None] & keys[:, None, None, :]).astype(bool)


def config_of(tree: Recognized, norm_groups: tuple[int, ...], dtype: Any, accumulate: Any = None) -> T5Config:
    """The config of a tree's network. No tree names its activations: gated ones are taken to be T5 1.1's GELU."""
    sizes = tree.sizes
    gated = any(name.endswith("mlp/wi_0/kernel") for name in tree.shapes)
    return T5Config(
        vocab_size=sizes["vocab"],
        emb_dim=sizes["embed"],
        num_heads=sizes["heads"],
        head_dim=sizes["kv"] if "kv" in sizes else sizes["joined_kv"] // sizes["heads"],
        mlp_dim=sizes["mlp"],
        num_encoder_layers=tree.depths["encoder"],
        num_decoder_layers=tree.depths["decoder"],
        mlp_activations=("gelu", "linear") if gated else ("relu",),
        logits_via_embedding="decoder/logits_dense/kernel" not in tree.shapes,
        relpos_buckets=sizes["relpos_buckets"],
        relpos_per_layer="encoder/relpos_bias/rel_embedding" not in tree.shapes,
        norm_groups=norm_groups,
        dtype=dtype,
        accumulate=accumulate,
    )


def minimal_tree(tree: Recognized, parameters: Mapping[str, npt.NDArray[Any]]) -> Any:
    """Parameters of any T5 tree as minimal T5's: layers unstacked, attention kernels of heads x kv joined."""
    flat: dict[str, npt.NDArray[Any]] = {}
    for name, values in parameters.items():
        spec = tree.rows[name].spec
        if "layers" not in spec.axes:
            flat[name] = _joined(values, spec.axes)
            continue
        axis = spec.axes.index("layers")
        axes = tuple(a for a in spec.axes if a != "layers")
        stack, _, rest = name.split("/", 2)
        for i in range(values.shape[axis]):
            flat[f"{stack}/layers_{i}/{rest}"] = _joined(values.take(i, axis=axis), axes)
    return unflatten_dict(flat, sep="/")


def _joined(values: npt.NDArray[Any], axes: tuple[str, ...]) -> npt.NDArray[Any]:
    if "kv" not in axes:
        return values
    at = axes.index("kv")
    shape = values.shape
    return values.reshape(*shape[: at - 1], shape[at - 1] * shape[at], *shape[at + 1 :])


@partial(jax.jit, static_argnums=0)
def _apply(network: Transformer, variables: Any, encoder_tokens: Array, decoder_tokens: Array, targets: Array) -> Array:
    """One compilation for all models of the same config."""
    return network.apply(variables, encoder_tokens, decoder_tokens, targets)


def build(
    tree: Recognized, parameters: Mapping[str, npt.NDArray[Any]], norm_groups: tuple[int, ...], dtype: npt.DTypeLike
) -> Any:
    """The twin of a checkpoint: a function (encoder tokens, decoder tokens, targets) -> logits, all numpy arrays.

    Sums are accumulated in float64 (which must be enabled): widening a model changes the order of summation, and the
    order must not show in the difference of two models.
    """
    network = Transformer(config_of(tree, norm_groups, np.dtype(dtype), accumulate=np.dtype("float64")))
    variables = {"params": minimal_tree(tree, {name: np.asarray(values, dtype) for name, values in parameters.items()})}

    def logits(encoder_tokens: Any, decoder_tokens: Any, targets: Any) -> npt.NDArray[Any]:
        return np.asarray(_apply(network, variables, encoder_tokens, decoder_tokens, targets))

    return logits
