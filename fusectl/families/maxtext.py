"""MaxText's decoders: LLaMA, Mistral, Qwen 2 and 3, Gemma 1 to 3, their layers scanned along an axis or not.

A family for each combination of block, layers and head. Where gemma2 and gemma3 scan, or number, groups of layers, the
rows say which ones they are. Scales are stored as they are multiplied, Gemma's with their 1, its embedding times the
root of the width and its queries' kernels divided by that of head_dim (all by the converters). Sources:
maxtext/models/*.py, maxtext/layers/{attentions,linears,embeddings,decoders}.py, configs/base.yml.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from fusectl.families.kinds import Trainer
from fusectl.families.roles import GROWN, TWIN
from fusectl.families.settings import Attending, Network
from fusectl.families.table import Family, Row


STEM = Row("token_embedder/embedding", "vocab -> embed", "embedding")
FINAL_NORM = Row("decoder/decoder_norm/scale", "-> embed", "final_norm", before_head=True)
HEADS = {"": (FINAL_NORM, Row("decoder/logits_dense/kernel", "embed -> vocab", "head")), "-tied": (FINAL_NORM,)}
GATED = (Row("mlp/wi_0/kernel", "embed -> mlp", "gate"), Row("mlp/wi_1/kernel", "embed -> mlp", "up"))
DOWN = (Row("mlp/wo/kernel", "mlp -> embed", "down"),)
ATTENTION = (
    Row("self_attention/query/kernel", "embed -> heads kv", "query"),
    Row("self_attention/key/kernel", "embed -> kv_heads kv", "key"),
    Row("self_attention/value/kernel", "embed -> kv_heads kv", "value"),
    Row("self_attention/out/kernel", "heads kv -> embed", "out"),
)
BIASES = (
    Row("self_attention/query/bias", "-> heads kv", "query_bias"),
    Row("self_attention/key/bias", "-> kv_heads kv", "key_bias"),
    Row("self_attention/value/bias", "-> kv_heads kv", "value_bias"),
)
QUERY_KEY_NORMS = (
    Row("self_attention/query_norm/scale", "-> kv", "query_norm"),
    Row("self_attention/key_norm/scale", "-> kv", "key_norm"),
)
# LLaMA's second norm stands before the MLP, whatever it is called.
NORMS = (
    Row("pre_self_attention_layer_norm/scale", "-> embed", "pre_attention_norm"),
    Row("post_self_attention_layer_norm/scale", "-> embed", "pre_mlp_norm"),
)
GEMMA_NORMS = (
    Row("pre_self_attention_norm/scale", "-> embed", "pre_attention_norm"),
    Row("pre_ffw_norm/scale", "-> embed", "pre_mlp_norm"),
)
NORMS_BEHIND = (
    Row("post_self_attention_norm/scale", "-> embed", "post_attention_norm", writes=True),
    Row("post_ffw_norm/scale", "-> embed", "post_mlp_norm", writes=True),
)


def _normed_behind(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Kernels behind which a norm stands: that writes the residual stream, not they."""
    return tuple(replace(row, writes=False) for row in rows)


LLAMA_LAYER = (*NORMS, *ATTENTION, *GATED, *DOWN)
GEMMA_LAYER = (*GEMMA_NORMS, *ATTENTION, *GATED, *DOWN)
GEMMA2_LAYER = (*GEMMA_NORMS, *_normed_behind((*ATTENTION, *GATED, *DOWN)), *NORMS_BEHIND)
GEMMA3_LAYER = (*GEMMA2_LAYER, *QUERY_KEY_NORMS)

# The defaults of base.yml and of the public models.
_LLAMA = Network(norm_epsilon=1e-5, tied_logits_power=-0.5)
_QWEN = Network(query_scale="head_dim", attending=(Attending(1e6),))
_GEMMA = Network(activation="gelu", tied_logits_power=-0.5)
_GEMMA2 = replace(
    _GEMMA, attention_soft_cap=50.0, logits_soft_cap=30.0, attending=(Attending(window=4096), Attending())
)
_GEMMA3_LOCAL, _GEMMA3_GLOBAL = Attending(window=1024), Attending(1e6, 8.0)
_GEMMA3 = replace(_GEMMA, query_scale="head_dim", attending=(*(_GEMMA3_LOCAL,) * 5, _GEMMA3_GLOBAL))


def with_layers(axes: str, at: int) -> str:
    """The axes of a tensor that stacks those of all layers along one more at the place `at`, in the order of storage.

    >>> with_layers("heads kv -> embed", 1), with_layers("-> embed", 1)
    ('heads layers kv -> embed', '-> embed layers')
    """
    words, places = axes.split(), []
    for i, word in enumerate(words):
        if word not in {"->", "<-"}:
            places.append(i)
    before = places[at] if at == 0 else places[at - 1] + 1
    return " ".join((*words[:before], "layers", *words[before:]))


def _unscanned(layer: tuple[Row, ...]) -> Iterator[Row]:
    for row in layer:
        yield replace(row, pattern=f"decoder/layers_#/{row.pattern}")


def _scanned(layer: tuple[Row, ...], at: int) -> Iterator[Row]:
    for row in layer:
        yield replace(row, pattern=f"decoder/layers/{row.pattern}", axes=with_layers(row.axes, at))


def _pairs(layer: tuple[Row, ...]) -> tuple[Row, ...]:
    """Gemma 2's layers by pairs: one that sees a window, and one that sees all."""
    return tuple(
        replace(row, pattern=re.sub(r"^\w+", rf"\g<0>_{kind}", row.pattern), every=2, first=first)
        for first, kind in enumerate(("local", "global"))
        for row in layer
    )


def _by_six(layer: tuple[Row, ...], at: int) -> Iterator[Row]:
    """Gemma 3's layers, scanned over six at a time, and what remains of them."""
    for j in range(6):
        for row in layer:
            axes = with_layers(row.axes, at)
            yield replace(row, pattern=f"decoder/layers/layers_{j}/{row.pattern}", axes=axes, every=6, first=j)
    for row in layer:
        yield replace(row, pattern=f"decoder/layers_remainder/layers_#/{row.pattern}", behind=True, optional=True)


def _evidence(shapes: Mapping[str, tuple[int, ...]], *, says: str, scan: str) -> str:
    tied = "decoder/logits_dense/kernel" not in shapes
    head = "no decoder/logits_dense: tied head" if tied else "decoder/logits_dense: untied head"
    return f"{says}, {scan}, {head}, vocabulary of {shapes['token_embedder/embedding'][0]}"


@dataclass(frozen=True)
class Block:
    """A kind of layer: its rows, its networks' settings, and the decoder_blocks of MaxText's configs that have it."""

    name: str
    layer: tuple[Row, ...]
    network: Network
    says: str
    decoder_blocks: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    # Whether its layers are counted by pairs, or scanned over by sixes.
    grouped: str = ""


BLOCKS = (
    # Qwen 2 has LLaMA's tree, if its projections have no biases.
    Block("llama", LLAMA_LAYER, _LLAMA, "norms of LLaMA", ("llama2", "mistral", "qwen2"), ("llama3", "mistral")),
    Block("qwen2", (*LLAMA_LAYER, *BIASES), _QWEN, "biases of queries, keys and values", ("qwen2",)),
    Block("qwen3", (*LLAMA_LAYER, *QUERY_KEY_NORMS), _QWEN, "norms of queries and keys", ("qwen2", "qwen3")),
    Block("gemma", GEMMA_LAYER, _GEMMA, "pre_ffw_norm: norms of Gemma", ("gemma",)),
    Block("gemma2", GEMMA2_LAYER, _GEMMA2, "pairs of local and global layers", ("gemma2",), grouped="pairs"),
    Block("gemma3", GEMMA3_LAYER, _GEMMA3, "norms behind, and of queries and keys", ("gemma3",), grouped="six"),
)


def _families(block: Block, fused: str) -> Iterator[Family]:
    """The families of a block: layers one by one, scanned along axis 1 or 0; an untied or a tied head."""
    layer = _fused(block.layer) if fused else block.layer
    layer = _pairs(layer) if block.grouped == "pairs" else layer
    layouts = {"": (tuple(_unscanned(layer)), "layers_N: one tensor per layer")}
    for at, name in ((1, "-scanned"), (0, "-scanned-0")):
        scanned = _by_six(layer, at) if block.grouped == "six" else _scanned(layer, at)
        layouts[name] = (tuple(scanned), f"layers: scanned along axis {at}")
    for scan, (rows, scan_says) in layouts.items():
        for tied, head in HEADS.items():
            name, *aliases = (f"maxtext-{each}{fused}{tied}{scan}" for each in (block.name, *block.aliases))
            yield Family(
                name=name,
                rows=(STEM, *rows, *head),
                grown=GROWN,
                evidence=partial(_evidence, says=f"{block.says}{', mlp/wi in one' if fused else ''}", scan=scan_says),
                aliases=tuple(aliases),
                twin=TWIN,
                network=partial(_network, block.network),
                trainer=Trainer.MAXTEXT,
                blocks=block.decoder_blocks,
            )


def _network(network: Network, sizes: Mapping[str, int]) -> Network:
    """A block's settings; of Gemma 3's 27B, which has 168 features for a head, queries are scaled by that."""
    of_27b = network == _GEMMA3 and sizes["kv"] == 128 and sizes["embed"] // sizes["heads"] == 168
    return replace(network, query_scale="embed_over_heads") if of_27b else network


def _fused(layer: tuple[Row, ...]) -> tuple[Row, ...]:
    """A layer with MaxText's fused_mlp: the kernels of the gate and of what it gates in one tensor."""
    writes = next(row.writes for row in layer if row.role == "gate")
    in_one = Row("mlp/wi/kernel", "embed stack -> mlp", "gate up", writes=writes)
    return (*(row for row in layer if row.role not in {"gate", "up"}), in_one)


MAXTEXT_FAMILIES = tuple(
    family for fused in ("", "-fused-mlp") for block in BLOCKS for family in _families(block, fused)
)
