"""T5's network in stages, for any tree of the T5 families; scanned layers are run one by one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from fusectl.families.recognized import Recognized
from fusectl.networks import t5_flax
from fusectl.networks.stages import Array, Part, Stage, State, Step, Tap, tapped
from fusectl.networks.t5_flax import (
    DecoderLayer,
    EncoderLayer,
    RelativePositionBias,
    RMSNorm,
    ScalableT5Config,
    T5Config,
    Transformer,
    contract,
    decoder_encoder_mask,
    decoder_mask,
    encoder_mask,
    tied_logits,
)
from fusectl.networks.tokens import Tokens


EMBEDDING = "token_embedder/embedding"
HEAD = "decoder/logits_dense/kernel"
# Attention to the encoder reads its keys and values at the encoder's positions.
_READS_ENCODER = re.compile(r"encoder/|.*encoder_decoder_attention/(key|value)/")


def config_of(
    tree: Recognized,
    norm_groups: tuple[int, ...],
    dtype: Any,
    *,
    stream_scales: tuple[float, ...] = (),
    accumulate: Any = None,
) -> T5Config:
    """The config of a tree's network. No tree names its activations: gated ones are taken to be T5 1.1's GELU."""
    sizes = tree.sizes
    scalable = "kv" in sizes
    gated = any(name.endswith("mlp/wi_0/kernel") for name in tree.shapes)
    return (partial(ScalableT5Config, scan_layers=False) if scalable else T5Config)(
        vocab_size=sizes["vocab"],
        dtype=np.dtype(dtype),
        emb_dim=sizes["embed"],
        num_heads=sizes["heads"],
        num_encoder_layers=tree.depths["encoder"],
        num_decoder_layers=tree.depths["decoder"],
        head_dim=sizes["kv"] if scalable else sizes["joined_kv"] // sizes["heads"],
        mlp_dim=sizes["mlp"],
        mlp_activations=("gelu", "linear") if gated else ("relu",),
        logits_via_embedding=HEAD not in tree.shapes,
        relpos_buckets=sizes["relpos_buckets"],
        norm_groups=norm_groups,
        norm_epsilons=tuple(t5_flax.EPSILON * scale**2 for scale in stream_scales),
        accumulate=None if accumulate is None else np.dtype(accumulate),
    )


def whole(tree: Recognized) -> list[Stage]:
    """The network as one stage."""

    def run(step: Step) -> tuple[State, list[Tap]]:
        variables = {"params": unflatten_dict(unstacked(tree, step.parameters), sep="/")}
        tokens = step.tokens
        batch = (tokens.encoder, tokens.decoder, tokens.targets, tokens.encoder_segments, tokens.target_segments)
        logits, taps = _transformer(step.config, variables, *batch)
        return {"logits": logits}, [_named(tree, "", tap) for tap in taps if tap.parameter != HEAD]

    return [Stage("all layers", tuple(Part(name) for name in tree.shapes), run)]


def logits(config: T5Config, tree: Recognized, parameters: Mapping[str, Array], tokens: Tokens) -> Array:
    """The logits (batch, length, vocab), traced by JAX: they can be differentiated by the parameters."""
    variables = {"params": unflatten_dict(unstacked(tree, parameters, jnp), sep="/")}
    batch = (tokens.encoder, tokens.decoder, tokens.targets, tokens.encoder_segments, tokens.target_segments)
    return Transformer(config).apply(variables, *batch, enable_dropout=False)


def layered(tree: Recognized, tokens: Tokens, head_tile: int) -> list[Stage]:
    """The network layer by layer, the embedding of these tokens only, the head in tiles of the vocab."""
    ids = np.unique(np.concatenate([tokens.encoder.reshape(-1), tokens.decoder.reshape(-1)]))
    stages = [_embedder(tree, ids)]
    for stack in ("encoder", "decoder"):
        if f"{stack}/relpos_bias/rel_embedding" in tree.shapes:
            stages.append(_relative_bias(tree, stack))
        stages += [_layer(tree, stack, i) for i in range(tree.depths[stack])]
        stages.append(_norm(tree, stack))
    vocab = tree.sizes["vocab"]
    name, run = (HEAD, _head) if HEAD in tree.shapes else (EMBEDDING, _tied_head)
    for start in range(0, vocab, head_tile):
        tile = range(start, min(start + head_tile, vocab))
        stages.append(Stage(f"{name}[{start}:{tile.stop}]", (Part(name, "vocab", tile),), run))
    return stages


def unstacked(tree: Recognized, parameters: Mapping[str, Array], xp: Any = np) -> dict[str, Array]:
    """The parameters with a tensor for each layer, encoder/layers_0/…, also where the tree stacks them.

    In numpy: JAX would compile a program for every shape. Where it is tracing, `xp` is jax.numpy.
    """
    flat: dict[str, Array] = {}
    for name, values in parameters.items():
        axes = tree.rows[name].spec.axes
        if "layers" not in axes:
            flat[name] = values
            continue
        stack, _, rest = name.split("/", 2)
        layers = xp.moveaxis(xp.asarray(values), axes.index("layers"), 0)
        flat |= {f"{stack}/layers_{i}/{rest}": layer for i, layer in enumerate(layers)}
    return flat


def _embedder(tree: Recognized, ids: Any) -> Stage:
    def run(step: Step) -> tuple[State, list[Tap]]:
        table = np.asarray(step.parameters[EMBEDDING])
        x, y = (table[np.searchsorted(ids, each)] for each in (step.tokens.encoder, step.tokens.decoder))
        return {"x": x, "decoder": y}, [_named(tree, "", Tap(EMBEDDING, None, each)) for each in (x, y)]

    return Stage("token_embedder", (Part(EMBEDDING, "vocab", tuple(map(int, ids))),), run)


def _relative_bias(tree: Recognized, stack: str) -> Stage:
    name = f"{stack}/relpos_bias/rel_embedding"

    def run(step: Step) -> tuple[State, list[Tap]]:
        variables = {"params": {"rel_embedding": step.parameters[name]}}
        bias = _bias(step.config, variables, step.state["x"].shape[1], stack == "encoder")
        return {**step.state, "bias": bias}, [_named(tree, "", Tap(name, None, bias))]

    return Stage(f"{stack}/relpos_bias", (Part(name),), run)


def _layer(tree: Recognized, stack: str, i: int) -> Stage:
    parts = []
    for name, row in tree.rows.items():
        if name.startswith(f"{stack}/{stack}/"):
            parts.append(Part(name, "layers", range(i, i + 1)))
        elif row.index(name) == i and name.startswith(f"{stack}/"):
            parts.append(Part(name))
    prefix = f"{stack}/layers_{i}/"

    def run(step: Step) -> tuple[State, list[Tap]]:
        # A slice of stacked layers comes out as layer 0 of a stack of one.
        local = {name.split("/", 2)[2]: values for name, values in unstacked(tree, step.parameters).items()}
        variables = {"params": unflatten_dict(local, sep="/")}
        state, tokens = step.state, step.tokens
        bias = state.get("bias")
        if stack == "encoder":
            x, taps = _encoder_layer(step.config, variables, state["x"], tokens.encoder, tokens.encoder_segments, bias)
        else:
            batch = (tokens.encoder, tokens.targets, tokens.encoder_segments, tokens.target_segments)
            x, taps = _decoder_layer(step.config, variables, state["x"], state["encoded"], *batch, bias)
        return {**state, "x": x}, [_named(tree, prefix, tap) for tap in taps]

    return Stage(prefix.rstrip("/"), tuple(parts), run)


def _norm(tree: Recognized, stack: str) -> Stage:
    name = f"{stack}/{stack}_norm/scale"

    def run(step: Step) -> tuple[State, list[Tap]]:
        state = step.state
        x = _final_norm(step.config, {"params": {"scale": step.parameters[name]}}, state["x"])
        taps = [_named(tree, "", Tap(name, state["x"], x))]
        return ({"x": state["decoder"], "encoded": x} if stack == "encoder" else {"x": x}), taps

    return Stage(name.rsplit("/", 1)[0], (Part(name),), run)


def _head(step: Step) -> tuple[State, list[Tap]]:
    return {**step.state, "logits": _untied(step.config, step.parameters[HEAD], step.state["x"])}, []


def _tied_head(step: Step) -> tuple[State, list[Tap]]:
    return {**step.state, "logits": _tied(step.config, step.parameters[EMBEDDING], step.state["x"])}, []


def _named(tree: Recognized, prefix: str, tap: Tap) -> Tap:
    """The tap of a module below `prefix`, with its full name, its row, and the positions that it is about."""
    name = prefix + tap.parameter
    stacked = re.sub(r"^(encoder|decoder)/layers_\d+/", r"\1/\1/", name)
    positions = "encoder" if _READS_ENCODER.match(name) else "decoder"
    if "relpos_bias" in name or name == EMBEDDING:
        positions = "batch" if name == EMBEDDING else ""
    return replace(tap, parameter=name, positions=positions, row=tree.rows.get(name) or tree.rows[stacked])


# Compiled once for all layers, and for all models of one config.


# Compiling is nearly all of the time that small models take: verifying one took 2.29 CPU seconds the first time, and
# 0.10 for another checkpoint of the same sizes.
@partial(jax.jit, static_argnums=0)
def _transformer(config: T5Config, variables: Any, *tokens: Any) -> Any:
    return tapped(Transformer(config), variables, *tokens, enable_dropout=False)


@partial(jax.jit, static_argnums=0)
def _encoder_layer(config: T5Config, variables: Any, x: Array, tokens: Array, segments: Array, bias: Array) -> Any:
    return tapped(EncoderLayer(config), variables, x, encoder_mask(tokens, segments), bias)


@partial(jax.jit, static_argnums=0)
def _decoder_layer(
    config: T5Config,
    variables: Any,
    x: Array,
    encoded: Array,
    tokens: Array,
    targets: Array,
    segments: Array,
    target_segments: Array,
    bias: Array,
) -> Any:
    mask = decoder_mask(targets, target_segments)
    cross_mask = decoder_encoder_mask(targets, tokens, target_segments, segments)
    return tapped(DecoderLayer(config), variables, x, encoded, mask, cross_mask, bias)


@partial(jax.jit, static_argnums=(0, 2, 3))
def _bias(config: T5Config, variables: Any, length: int, bidirectional: bool) -> Any:
    return RelativePositionBias(config).apply(variables, length, length, bidirectional=bidirectional)


@partial(jax.jit, static_argnums=0)
def _final_norm(config: T5Config, variables: Any, x: Array) -> Any:
    return RMSNorm(config).apply(variables, x)


@partial(jax.jit, static_argnums=0)
def _untied(config: T5Config, kernel: Array, x: Array) -> Any:
    return contract(config, "ble,ev->blv", jnp.asarray(x, config.wide), jnp.asarray(kernel, config.wide))


@partial(jax.jit, static_argnums=0)
def _tied(config: T5Config, embedding: Array, x: Array) -> Any:
    return tied_logits(config, x, embedding)
