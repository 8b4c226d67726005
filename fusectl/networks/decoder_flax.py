"""Decoder-only networks in Flax, for verify: LLaMA's, Mistral's, Qwen's and Gemma's, by their features.

One network with a switch for each of them: RMSNorm by scale or 1 + scale, a norm per source (`norm_groups`), norms
behind the blocks, grouped-query attention, biases and norms of queries and keys, rotary positions, sliding windows,
soft caps, a gated MLP, a tied or an untied head, and factors of the embedding. Sources, with whose logits it is
compared: the gemma package, gemma/gm/nn/{_modules,_layers}.py and gemma/gm/math/_positional_embeddings.py; MaxText,
maxtext/models/*.py and maxtext/layers/{attentions,attention_op,embeddings,normalizations}.py.

    token_embedder/embedding                        vocab -> embed
    layers_#/pre_attention_norm/scale               embed           (and behind attention, and both of mlp)
    layers_#/attention/{query,key,value}/kernel     embed -> heads or kv_heads, head_dim    (and bias)
    layers_#/attention/{query_norm,key_norm}/scale  head_dim
    layers_#/attention/out/kernel                   heads head_dim -> embed
    layers_#/mlp/{wi_0,wi_1}/kernel, wo/kernel      embed -> mlp, mlp -> embed
    decoder_norm/scale                              embed
    logits_dense/kernel                             embed -> vocab  (untied)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fusectl.families.settings import ROPE_TYPES, Attending
from fusectl.networks.layers_flax import contract, normalized, require_groups


Array = Any

# The gemma package's number, 0.7 of the lowest float32: it is finite, so that a row that is masked whole gives equal
# weights and no NaN.
MASKED = -2.3819763e38
ACTIVATIONS = {"gelu": partial(nn.gelu, approximate=True), "silu": nn.silu, "relu": nn.relu}


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes and features of a decoder. Raises ValueError for those that contradict each other."""

    vocab_size: int
    emb_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    num_layers: int
    # In turn for the layers: the second of two is that of layers 1, 3, …
    attending: tuple[Attending, ...] = (Attending(),)
    dtype: Any = jnp.float32
    mlp_activation: str = "silu"
    # What queries are multiplied with.
    query_scale: float = 1.0
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None
    norm_epsilon: float = 1e-6
    # Of the last norm, and of those of queries and keys.
    final_norm_epsilon: float = 1e-6
    norm_adds_one: bool = False
    query_key_norms: bool = False
    attention_biases: bool = False
    rope_type: str = "default"
    norms_behind: bool = False
    logits_via_embedding: bool = False
    # What embedded tokens are multiplied with, and what the logits of a tied head are.
    embedding_scale: float = 1.0
    tied_logits_scale: float = 1.0
    # The widths that norms are taken over, one for each source, and what the residual stream of each was multiplied
    # with; empty for all of emb_dim, and for 1.
    norm_groups: tuple[int, ...] = ()
    stream_scales: tuple[float, ...] = ()
    # The dtype in which sums are accumulated before they are rounded, None leaving it to XLA.
    accumulate: Any = None

    def __post_init__(self) -> None:
        require_groups(self.norm_groups, self.emb_dim, self.stream_scales, "stream scales")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads do not share {self.num_kv_heads} kv heads evenly")
        if self.mlp_activation not in ACTIVATIONS:
            raise ValueError(f"no activation is called {self.mlp_activation!r}: {', '.join(ACTIVATIONS)}")
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"no rotary positions are called {self.rope_type!r}: {', '.join(ROPE_TYPES)}")

    def attending_at(self, layer: int) -> Attending:
        """How the layer of this number attends."""
        return self.attending[layer % len(self.attending)]


class RMSNorm(nn.Module):
    """x / rms(x) * scale, or 1 + scale, over each group of features by itself.

    A norm of the residual stream, which may have been multiplied with a constant for each group, has its epsilon
    multiplied with the square of that.
    """

    config: DecoderConfig
    epsilon: float
    groups: tuple[int, ...] = ()
    of_stream: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        groups = self.groups or (x.shape[-1],)
        scales = cfg.stream_scales if self.of_stream and cfg.stream_scales else (1.0,) * len(groups)
        scale = self.param("scale", nn.initializers.zeros if cfg.norm_adds_one else nn.initializers.ones, x.shape[-1:])
        # c x / sqrt(c**2 ms + e) is x / sqrt(ms + e) only with c**2 e in place of e: a stream that was multiplied with
        # c keeps its function exactly if the epsilon goes along.
        y = normalized(x, groups, [self.epsilon * each**2 for each in scales], cfg.accumulate)
        scale = jnp.asarray(scale, x.dtype)
        return y * (1 + scale if cfg.norm_adds_one else scale)


class Kernel(nn.Module):
    """A tensor called kernel, contracted with the input by an einsum, and a bias added to the result."""

    config: DecoderConfig
    equation: str
    shape: tuple[int, ...]
    # The axes of the kernel that a bias has.
    bias: slice | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.normal(1 / math.sqrt(self.shape[0])), self.shape)
        y = contract(self.equation, x, jnp.asarray(kernel, x.dtype), self.config.accumulate)
        if self.bias is None:
            return y
        return y + jnp.asarray(self.param("bias", nn.initializers.zeros, self.shape[self.bias]), x.dtype)


def rotated(x: Array, attending: Attending, rope_type: str = "default") -> Array:
    """Queries or keys, (batch, length, heads, head_dim), turned by their positions, in planes of two features.

    Those are the same place of both halves, or, for llama3.1, neighbours; its slow planes turn more slowly still. The
    angles are computed in float32, also for float64, as the trainers do.
    """
    length, head_dim = x.shape[1], x.shape[-1]
    exponents = np.arange(head_dim // 2, dtype=np.float32) * np.float32(2.0 / head_dim)
    periods = jnp.float32(attending.rope_base) ** exponents
    if rope_type == "llama3.1":
        periods = _stretched(periods)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None, None] / periods / jnp.float32(attending.rope_scale)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    if rope_type == "llama3.1":
        first, second = x[..., ::2], x[..., 1::2]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return turned.reshape(x.shape)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _stretched(periods: Array) -> Array:
    """LLaMA 3.1's periods: those of 8192 tokens and more, over 2 pi, 8 times as long, in between ever less."""
    factor, low, high, trained = 8.0, 1.0, 4.0, 8192.0
    turns = trained / (2 * np.pi * periods)
    share = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - share) / (factor * periods) + share / periods)


def seen(length: int, window: int | None) -> Array:
    """Which token sees which, (length, length): none a later one, and none further back than the window."""
    back = np.arange(length)[:, None] - np.arange(length)[None, :]
    return jnp.asarray((back >= 0) & (back < (length if window is None else window)))


def visible(tokens: Array, segments: Array | None, window: int | None) -> Array:
    """Which token sees which, (batch or 1, length, length), those of another segment never."""
    mask = seen(tokens.shape[1], window)[None]
    return mask if segments is None else mask & (segments[:, :, None] == segments[:, None, :])


def capped(x: Array, cap: float | None) -> Array:
    """Values drawn into (-cap, cap) by tanh; as they are for None."""
    return x if cap is None else jnp.tanh(x / cap) * cap


class Attention(nn.Module):
    """Causal attention; query head n reads kv head n // (heads / kv_heads)."""

    config: DecoderConfig
    attending: Attending

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        cfg = self.config
        bias = slice(1, None) if cfg.attention_biases else None
        heads, kv_heads, head_dim = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        query = Kernel(cfg, "bld,dnh->blnh", (cfg.emb_dim, heads, head_dim), bias, name="query")(x)
        key, value = (
            Kernel(cfg, "bld,dkh->blkh", (cfg.emb_dim, kv_heads, head_dim), bias, name=name)(x)
            for name in ("key", "value")
        )
        if cfg.query_key_norms:
            norm = partial(RMSNorm, cfg, cfg.final_norm_epsilon)
            query, key = norm(name="query_norm")(query), norm(name="key_norm")(key)
        query, key = (rotated(each, self.attending, cfg.rope_type) for each in (query, key))
        query = query * jnp.asarray(cfg.query_scale, x.dtype)
        query = query.reshape(*query.shape[:2], kv_heads, heads // kv_heads, head_dim)
        scores = capped(contract("bqkgh,bskh->bkgqs", query, key, cfg.accumulate), cfg.attention_soft_cap)
        # The mask comes after the cap: before it, tanh would bring masked scores back to -cap.
        scores = jnp.where(mask[:, None, None], scores, MASKED)
        if cfg.accumulate is not None:
            scores = scores.astype(cfg.accumulate)
        weights = jax.nn.softmax(scores).astype(x.dtype)
        mixed = contract("bkgqs,bskh->bqkgh", weights, value, cfg.accumulate).reshape(*x.shape[:2], heads, head_dim)
        return Kernel(cfg, "blnh,nhd->bld", (heads, head_dim, cfg.emb_dim), name="out")(mixed)


class MLP(nn.Module):
    """The gated feed-forward block."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        gate, up = (Kernel(cfg, "bld,df->blf", (cfg.emb_dim, cfg.mlp_dim), name=f"wi_{i}")(x) for i in range(2))
        hidden = ACTIVATIONS[cfg.mlp_activation](gate) * up
        return Kernel(cfg, "blf,fd->bld", (cfg.mlp_dim, cfg.emb_dim), name="wo")(hidden)


class Layer(nn.Module):
    """Attention and MLP, each behind a norm, before one as well where the config says so."""

    config: DecoderConfig
    attending: Attending

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        cfg = self.config
        behind = partial(RMSNorm, cfg, cfg.norm_epsilon, cfg.norm_groups)
        before = partial(behind, of_stream=True)
        attended = Attention(cfg, self.attending, name="attention")(before(name="pre_attention_norm")(x), mask)
        x = x + (behind(name="post_attention_norm")(attended) if cfg.norms_behind else attended)
        transformed = MLP(cfg, name="mlp")(before(name="pre_mlp_norm")(x))
        return x + (behind(name="post_mlp_norm")(transformed) if cfg.norms_behind else transformed)


class Decoder(nn.Module):
    """The whole network: tokens (batch, length) to logits (batch, length, vocab), which see no later token, and none of
    another segment.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens: Array, segments: Array | None = None) -> Array:
        cfg = self.config
        table = self.param(
            "token_embedder", lambda key: {"embedding": nn.initializers.normal(1.0)(key, (cfg.vocab_size, cfg.emb_dim))}
        )["embedding"]
        table = jnp.asarray(table, cfg.dtype)
        x = embedded(cfg, table[tokens])
        for i in range(cfg.num_layers):
            attending = cfg.attending_at(i)
            x = Layer(cfg, attending, name=f"layers_{i}")(x, visible(tokens, segments, attending.window))
        x = final_norm(cfg, name="decoder_norm")(x)
        if cfg.logits_via_embedding:
            logits = tied_logits(cfg, x, table)
        else:
            logits = Kernel(cfg, "bld,dv->blv", (cfg.emb_dim, cfg.vocab_size), name="logits_dense")(x)
        return capped(logits, cfg.logits_soft_cap)


def embedded(config: DecoderConfig, rows: Array) -> Array:
    """The residual stream that rows of the embedding begin."""
    return jnp.asarray(rows, config.dtype) * jnp.asarray(config.embedding_scale, config.dtype)


def final_norm(config: DecoderConfig, **kwargs: Any) -> RMSNorm:
    """The norm before the head."""
    return RMSNorm(config, config.final_norm_epsilon, config.norm_groups, of_stream=True, **kwargs)


def tied_logits(config: DecoderConfig, x: Array, table: Array) -> Array:
    """The logits (batch, length, vocab) of an embedding (vocab, embed), not yet capped."""
    logits = contract("bld,vd->blv", x, jnp.asarray(table, x.dtype), config.accumulate)
    return logits * jnp.asarray(config.tied_logits_scale, x.dtype)
