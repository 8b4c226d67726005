"""Decoder-only networks in Flax, for verify: LLaMA's, Mistral's, Qwen's and Gemma's, by their features.

One network with a switch for each of them: RMSNorm by scale or 1 + scale, a norm per source (`norm_groups`), norms
behind the blocks, grouped-query attention, norms of queries and keys, rotary positions, sliding windows, soft caps, a
gated MLP, a tied or an untied head, and factors of the embedding. No family uses it yet. Sources: the gemma package,
gemma/gm/nn/{_modules,_layers}.py and gemma/gm/math/_positional_embeddings.py, with whose logits it is compared.

    token_embedder/embedding                        vocab -> embed
    layers_#/pre_attention_norm/scale               embed           (and behind attention, and both of mlp)
    layers_#/attention/{query,key,value}/kernel     embed -> heads or kv_heads, head_dim
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
from jax import lax


Array = Any

MASKED = -2.3819763e38
ACTIVATIONS = {"gelu": partial(nn.gelu, approximate=True), "silu": nn.silu, "relu": nn.relu}


@dataclass(frozen=True)
class Attending:
    """How the layers of one kind attend: the base of the rotary frequencies, what positions are divided by, and how far
    a token looks back, itself included; None for all the way.
    """

    rope_base: float = 10_000.0
    rope_scale: float = 1.0
    window: int | None = None


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
    norm_adds_one: bool = False
    query_key_norms: bool = False
    norms_behind: bool = False
    logits_via_embedding: bool = False
    # What embedded tokens are multiplied with, and what the logits of a tied head are.
    embedding_scale: float = 1.0
    tied_logits_scale: float = 1.0
    # The widths that norms are taken over, one for each source, and the epsilon of each; empty for all of emb_dim.
    norm_groups: tuple[int, ...] = ()
    norm_epsilons: tuple[float, ...] = ()
    # The dtype in which sums are accumulated before they are rounded, None leaving it to XLA.
    accumulate: Any = None

    def __post_init__(self) -> None:
        if self.norm_groups and sum(self.norm_groups) != self.emb_dim:
            raise ValueError(f"norm groups {list(self.norm_groups)} do not sum up to emb_dim {self.emb_dim}")
        if self.norm_epsilons and len(self.norm_epsilons) != len(self.norm_groups):
            raise ValueError(f"{len(self.norm_epsilons)} norm epsilons for {len(self.norm_groups)} norm groups")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads do not share {self.num_kv_heads} kv heads evenly")
        if self.mlp_activation not in ACTIVATIONS:
            raise ValueError(f"no activation is called {self.mlp_activation!r}: {', '.join(ACTIVATIONS)}")

    def attending_at(self, layer: int) -> Attending:
        """How the layer of this number attends."""
        return self.attending[layer % len(self.attending)]


def contract(config: DecoderConfig, equation: str, a: Array, b: Array) -> Array:
    """An einsum in the arrays' dtype, its sums accumulated as the config says."""
    return jnp.einsum(equation, a, b, preferred_element_type=config.accumulate).astype(a.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, or 1 + scale, over each group of features by itself."""

    config: DecoderConfig
    groups: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        groups = self.groups or (x.shape[-1],)
        epsilons = cfg.norm_epsilons if self.groups and cfg.norm_epsilons else (cfg.norm_epsilon,) * len(groups)
        scale = self.param("scale", nn.initializers.zeros if cfg.norm_adds_one else nn.initializers.ones, x.shape[-1:])
        normalized = []
        for group, epsilon in zip(jnp.split(x, np.cumsum(groups)[:-1], axis=-1), epsilons, strict=True):
            mean_square = jnp.mean(lax.square(group), axis=-1, keepdims=True, dtype=cfg.accumulate)
            normalized.append(group * lax.rsqrt(mean_square + epsilon).astype(x.dtype))
        scale = jnp.asarray(scale, x.dtype)
        return jnp.concatenate(normalized, axis=-1) * (1 + scale if cfg.norm_adds_one else scale)


class Kernel(nn.Module):
    """A tensor called kernel, contracted with the input by an einsum."""

    config: DecoderConfig
    equation: str
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.normal(1 / math.sqrt(self.shape[0])), self.shape)
        return contract(self.config, self.equation, x, jnp.asarray(kernel, x.dtype))


def rotated(x: Array, attending: Attending) -> Array:
    """Queries or keys, (batch, length, heads, head_dim), turned by their positions: halves of head_dim are the planes.

    The angles are computed in float32, also for float64, as the trainers do.
    """
    length, head_dim = x.shape[1], x.shape[-1]
    exponents = np.arange(head_dim // 2, dtype=np.float32) * np.float32(2.0 / head_dim)
    periods = jnp.float32(attending.rope_base) ** exponents
    angles = jnp.arange(length, dtype=jnp.float32)[:, None, None] / periods / jnp.float32(attending.rope_scale)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def seen(length: int, window: int | None) -> Array:
    """Which token sees which, (length, length): none a later one, and none further back than the window."""
    back = np.arange(length)[:, None] - np.arange(length)[None, :]
    return jnp.asarray((back >= 0) & (back < (length if window is None else window)))


def capped(x: Array, cap: float | None) -> Array:
    """Values drawn into (-cap, cap) by tanh; as they are for None."""
    return x if cap is None else jnp.tanh(x / cap) * cap


class Attention(nn.Module):
    """Causal attention; query head n reads kv head n // (heads / kv_heads)."""

    config: DecoderConfig
    attending: Attending

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        heads, kv_heads, head_dim = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        query = Kernel(cfg, "bld,dnh->blnh", (cfg.emb_dim, heads, head_dim), name="query")(x)
        key, value = (
            Kernel(cfg, "bld,dkh->blkh", (cfg.emb_dim, kv_heads, head_dim), name=name)(x) for name in ("key", "value")
        )
        if cfg.query_key_norms:
            query, key = RMSNorm(cfg, name="query_norm")(query), RMSNorm(cfg, name="key_norm")(key)
        query, key = rotated(query, self.attending) * cfg.query_scale, rotated(key, self.attending)
        query = query.reshape(*query.shape[:2], kv_heads, heads // kv_heads, head_dim)
        scores = capped(contract(cfg, "bqkgh,bskh->bkgqs", query, key), cfg.attention_soft_cap)
        scores = jnp.where(seen(x.shape[1], self.attending.window), scores, MASKED)
        if cfg.accumulate is not None:
            scores = scores.astype(cfg.accumulate)
        weights = jax.nn.softmax(scores).astype(x.dtype)
        mixed = contract(cfg, "bkgqs,bskh->bqkgh", weights, value).reshape(*x.shape[:2], heads, head_dim)
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
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        norm = partial(RMSNorm, cfg, cfg.norm_groups)
        attended = Attention(cfg, self.attending, name="attention")(norm(name="pre_attention_norm")(x))
        x = x + (norm(name="post_attention_norm")(attended) if cfg.norms_behind else attended)
        transformed = MLP(cfg, name="mlp")(norm(name="pre_mlp_norm")(x))
        return x + (norm(name="post_mlp_norm")(transformed) if cfg.norms_behind else transformed)


class Decoder(nn.Module):
    """The whole network: tokens (batch, length) to logits (batch, length, vocab), which see no later token."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        cfg = self.config
        table = self.param(
            "token_embedder", lambda key: {"embedding": nn.initializers.normal(1.0)(key, (cfg.vocab_size, cfg.emb_dim))}
        )["embedding"]
        table = jnp.asarray(table, cfg.dtype)
        x = table[tokens] * jnp.asarray(cfg.embedding_scale, cfg.dtype)
        for i in range(cfg.num_layers):
            x = Layer(cfg, cfg.attending_at(i), name=f"layers_{i}")(x)
        x = RMSNorm(cfg, cfg.norm_groups, name="decoder_norm")(x)
        if cfg.logits_via_embedding:
            logits = contract(cfg, "bld,vd->blv", x, table) * jnp.asarray(cfg.tied_logits_scale, x.dtype)
        else:
            logits = Kernel(cfg, "bld,dv->blv", (cfg.emb_dim, cfg.vocab_size), name="logits_dense")(x)
        return capped(logits, cfg.logits_soft_cap)
