"""A decoder's network in stages, for any tree of a family whose rows have roles, however its tensors are stored.

What the network needs of a tensor follows from its row: the layers and the kernels that it stacks, and from its role
the order of the axes. Taps are named as the network's modules, decoder/layers_3/attention/query/kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from fusectl.errors import Incompatible, shorten
from fusectl.families.recognized import Recognized
from fusectl.families.roles import LAYER, ROLES, STEM
from fusectl.families.table import DECODER, Row
from fusectl.networks.decoder_flax import (
    Decoder,
    DecoderConfig,
    Layer,
    capped,
    embedded,
    final_norm,
    tied_logits,
    visible,
)
from fusectl.networks.layers_flax import contract
from fusectl.networks.stages import Array, Part, Stage, State, Step, Tap, tapped
from fusectl.networks.tokens import Tokens


# Norms of the residual stream.
_OF_STREAM = frozenset({"pre_attention_norm", "pre_mlp_norm", "final_norm"})
_BY_PARAMETER = {parameter: role for role, (parameter, _) in ROLES.items()}


def config_of(
    tree: Recognized,
    norm_groups: tuple[int, ...],
    dtype: Any,
    *,
    stream_scales: tuple[float, ...] = (),
    accumulate: Any = None,
) -> DecoderConfig:
    """The config of a tree's network, but for the cap of its logits: what stands in them is compared before it.

    Raises Incompatible where a layer has not what the others have.
    """
    _require_equal_layers(tree)
    sizes, network = tree.sizes, tree.network
    roles = {role for row in tree.rows.values() for role in row.roles}
    width, heads, head_dim = sizes["embed"], sizes["heads"], sizes["kv"]
    queries_by = {"one": 1, "head_dim": head_dim, "embed_over_heads": width // heads}
    return DecoderConfig(
        vocab_size=sizes["vocab"],
        emb_dim=width,
        num_heads=heads,
        num_kv_heads=sizes.get("kv_heads", heads),
        head_dim=head_dim,
        mlp_dim=sizes["mlp"],
        num_layers=tree.depths[DECODER],
        attending=network.attending,
        dtype=np.dtype(dtype),
        mlp_activation=network.activation,
        query_scale=queries_by[network.query_scale] ** -0.5,
        attention_soft_cap=network.attention_soft_cap,
        norm_epsilon=network.norm_epsilon,
        final_norm_epsilon=network.final_norm_epsilon or network.norm_epsilon,
        norm_adds_one=network.norm_adds_one,
        query_key_norms="query_norm" in roles,
        attention_biases="query_bias" in roles,
        rope_type=network.rope_type,
        norms_behind="post_mlp_norm" in roles,
        logits_via_embedding="head" not in roles,
        embedding_scale=width**network.embedding_power,
        tied_logits_scale=width**network.tied_logits_power,
        norm_groups=norm_groups,
        stream_scales=stream_scales,
        accumulate=None if accumulate is None else np.dtype(accumulate),
    )


def _require_equal_layers(tree: Recognized) -> None:
    found = Counter(
        (role, layer)
        for name, row in tree.rows.items()
        for role in row.roles
        if role in LAYER
        for layer in tree.layers_of(name)
    )
    wrong = [
        f"layer {layer}: {found[role, layer] or 'no'} tensors with the role {role}"
        for layer in range(tree.depths[DECODER])
        for role in dict.fromkeys(role for role, _ in found)
        if found[role, layer] != 1
    ]
    if wrong:
        raise Incompatible(f"{tree.family.name}: layers that are not alike cannot be run", details=shorten(wrong))


def whole(tree: Recognized) -> list[Stage]:
    """The network as one stage."""

    def run(step: Step) -> tuple[State, list[Tap]]:
        variables = {"params": unflatten_dict(dict(_modules(tree, step.parameters)), sep="/")}
        logits, taps = _decoder(step.config, variables, step.tokens.decoder, step.tokens.target_segments)
        head = STEM["head"][0]
        return {"logits": logits}, [_named(tree, "", tap) for tap in taps if tap.parameter != head]

    return [Stage("all layers", tuple(Part(name) for name in tree.shapes), run)]


def logits(config: DecoderConfig, tree: Recognized, parameters: Mapping[str, Array], tokens: Tokens) -> Array:
    """The logits (batch, length, vocab), capped as the network has it, traced by JAX."""
    variables = {"params": unflatten_dict(dict(_modules(tree, parameters, xp=jnp)), sep="/")}
    found = Decoder(config).apply(variables, tokens.decoder, tokens.target_segments)
    return capped(found, tree.network.logits_soft_cap)


def layered(tree: Recognized, tokens: Tokens, head_tile: int) -> list[Stage]:
    """The network layer by layer, the embedding of these tokens only, the head in tiles of the vocab."""
    by_role = {role: name for name, row in tree.rows.items() for role in row.roles if role in STEM}
    ids = np.unique(tokens.decoder)
    stages = [_embedder(tree, by_role["embedding"], ids)]
    stages += [_layer(tree, i) for i in range(tree.depths[DECODER])]
    stages.append(_final_norm(tree, by_role["final_norm"]))
    vocab, name = tree.sizes["vocab"], by_role.get("head", by_role["embedding"])
    for start in range(0, vocab, head_tile):
        tile = range(start, min(start + head_tile, vocab))
        stages.append(
            Stage(
                f"{name}[{start}:{tile.stop}]",
                (Part(name, "vocab", tile),),
                _head(tree, name, tied="head" not in by_role),
            )
        )
    return stages


def _modules(
    tree: Recognized, parameters: Mapping[str, Array], layer: int | None = None, xp: Any = np
) -> Iterator[tuple[str, Array]]:
    """The parameters by the names of the network's modules: one for each layer, role and kernel, axes in their order.

    With `layer`, they are parts of that one, and the names those of its modules. In numpy: JAX would compile a program
    for every shape. Where it is tracing, `xp` is jax.numpy.
    """
    for name, values in parameters.items():
        row = tree.rows[name]
        axes = list(row.spec.axes)
        pieces = [xp.asarray(values)]
        layers = [layer] if layer is not None else list(tree.layers_of(name))
        if "layers" in axes:
            pieces = list(xp.moveaxis(pieces[0], axes.index("layers"), 0))
            axes.remove("layers")
        for number, piece in zip(layers, pieces, strict=True):
            yield from _kernels(row, axes, piece, "" if layer is not None else f"layers_{number}/", xp)


def _kernels(row: Row, axes: list[str], values: Array, prefix: str, xp: Any = np) -> Iterator[tuple[str, Array]]:
    kernels, inside = [values], axes
    if "stack" in axes:
        kernels = list(xp.moveaxis(values, axes.index("stack"), 0))
        inside = [axis for axis in axes if axis != "stack"]
    for role, kernel in zip(row.roles, kernels, strict=True):
        parameter, order = ROLES[role]
        # With as many heads of keys as of queries they are called heads.
        places = [inside.index(axis if axis in inside else "heads") for axis in order]
        yield (parameter if role in STEM else prefix + parameter), kernel.transpose(places)


def _embedder(tree: Recognized, name: str, ids: Any) -> Stage:
    def run(step: Step) -> tuple[State, list[Tap]]:
        table = np.asarray(step.parameters[name])
        if tree.rows[name].spec.axes[0] != "vocab":
            table = table.T
        return {"x": np.asarray(embedded(step.config, table[np.searchsorted(ids, step.tokens.decoder)]))}, []

    return Stage("token_embedder", (Part(name, "vocab", tuple(map(int, ids))),), run)


def _layer(tree: Recognized, i: int) -> Stage:
    parts = []
    for name, row in tree.rows.items():
        if row.roles[0] in STEM or i not in tree.layers_of(name):
            continue
        place = tree.layers_of(name).index(i)
        parts.append(Part(name, "layers", range(place, place + 1)) if "layers" in row.spec.axes else Part(name))

    def run(step: Step) -> tuple[State, list[Tap]]:
        variables = {"params": unflatten_dict(dict(_modules(tree, step.parameters, i)), sep="/")}
        attending, tokens = step.config.attending_at(i), step.tokens
        x, taps = _decoder_layer(
            step.config, attending, variables, step.state["x"], tokens.decoder, tokens.target_segments
        )
        return {**step.state, "x": x}, [_named(tree, f"layers_{i}/", tap) for tap in taps]

    return Stage(f"{DECODER}/layers_{i}", tuple(parts), run)


def _final_norm(tree: Recognized, name: str) -> Stage:
    def run(step: Step) -> tuple[State, list[Tap]]:
        x = _run_final_norm(step.config, {"params": {"scale": step.parameters[name]}}, step.state["x"])
        return {"x": x}, [_named(tree, "", Tap(STEM["final_norm"][0], step.state["x"], x))]

    return Stage(name.rsplit("/", 1)[0], (Part(name),), run)


def _head(tree: Recognized, name: str, *, tied: bool) -> Any:
    def run(step: Step) -> tuple[State, list[Tap]]:
        ((_, kernel),) = _kernels(
            tree.rows[name], list(tree.rows[name].spec.axes), np.asarray(step.parameters[name]), ""
        )
        return {**step.state, "logits": (_tied if tied else _untied)(step.config, kernel, step.state["x"])}, []

    return run


def _named(tree: Recognized, prefix: str, tap: Tap) -> Tap:
    """The tap of a module below `prefix`, with its full name, the row of its parameter, and its positions."""
    name = prefix + tap.parameter
    inside = name.split("/", 1)[1] if name.startswith("layers_") else name
    role = _BY_PARAMETER[inside]
    row = next(row for row in tree.rows.values() if role in row.roles)
    inputs = tap.inputs if role in _OF_STREAM else None
    return replace(tap, parameter=f"{DECODER}/{name}", positions=DECODER, row=row, inputs=inputs)


# Compiled once for all layers of a kind, and for all models of one config.


@partial(jax.jit, static_argnums=0)
def _decoder(config: DecoderConfig, variables: Any, tokens: Array, segments: Array) -> Any:
    return tapped(Decoder(config), variables, tokens, segments)


@partial(jax.jit, static_argnums=(0, 1))
def _decoder_layer(
    config: DecoderConfig, attending: Any, variables: Any, x: Array, tokens: Array, segments: Array
) -> Any:
    return tapped(Layer(config, attending), variables, x, visible(tokens, segments, attending.window))


@partial(jax.jit, static_argnums=0)
def _run_final_norm(config: DecoderConfig, variables: Any, x: Array) -> Any:
    return final_norm(config).apply(variables, x)


@partial(jax.jit, static_argnums=0)
def _untied(config: DecoderConfig, kernel: Array, x: Array) -> Any:
    return contract("bld,dv->blv", x, kernel, config.accumulate)


@partial(jax.jit, static_argnums=0)
def _tied(config: DecoderConfig, embedding: Array, x: Array) -> Any:
    return tied_logits(config, x, embedding)
