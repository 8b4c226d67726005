"""The T5 family as T5X stores it: minimal (2-D kernels) and scalable (3-D kernels, a relative bias per layer).

Sources: t5x/examples/t5/{network,layers}.py and t5x/examples/scalable_t5/, logical axes as in `param_with_axes` there.
joined_kv is heads-major, so that concatenating along it concatenates heads. Flaxformer's T5 trees are the minimal ones.
"""

from __future__ import annotations

from collections.abc import Mapping

from fusectl.families.table import Family, Row


GROWN = frozenset({"embed", "mlp", "heads", "joined_kv"})
TWIN = "fusectl.networks.t5_stages"

STEM = (
    Row("token_embedder/embedding", "vocab -> embed", "embedding"),
    Row("encoder/encoder_norm/scale", "-> embed", "final_norm"),
)
TIED_HEAD = (Row("decoder/decoder_norm/scale", "-> embed", "final_norm", before_head=True),)
UNTIED_HEAD = (
    *TIED_HEAD,
    Row("decoder/logits_dense/kernel", "embed -> vocab", "head"),
)

# The modules of attention, and what the roles of their kernels begin with.
ATTENTIONS = (
    ("encoder", "attention", ""),
    ("decoder", "self_attention", ""),
    ("decoder", "encoder_decoder_attention", "cross_"),
)
STACKS = ("encoder", "decoder")
NORMS = (
    ("encoder", "pre_attention_layer_norm", "pre_attention_norm"),
    ("encoder", "pre_mlp_layer_norm", "pre_mlp_norm"),
    ("decoder", "pre_self_attention_layer_norm", "pre_attention_norm"),
    ("decoder", "pre_cross_attention_layer_norm", "pre_cross_attention_norm"),
    ("decoder", "pre_mlp_layer_norm", "pre_mlp_norm"),
)
# The kernels that read the stream in the MLP, by the names of their tensors.
GATED, PLAIN = (("wi_0", "gate"), ("wi_1", "up")), (("wi", "up"),)
Inputs = tuple[tuple[str, str], ...]


def _minimal(wi: Inputs, head: tuple[Row, ...]) -> tuple[Row, ...]:
    relpos = Row("{encoder,decoder}/relpos_bias/rel_embedding", "heads <- relpos_buckets", "relpos")
    return (*STEM, relpos, *_layers(wi, "joined_kv"), *head)


def _scalable(wi: Inputs, head: tuple[Row, ...]) -> tuple[Row, ...]:
    relpos = Row("{encoder,decoder}/layers_#/relpos_bias/rel_embedding", "heads <- relpos_buckets", "relpos")
    return (*STEM, relpos, *_layers(wi, "heads kv"), *head)


def _layers(wi: Inputs, heads: str) -> tuple[Row, ...]:
    """One tensor for each layer; `heads` are the axes that the attention kernels have for them."""
    return (
        *(
            Row(f"{stack}/layers_#/{attention}/{part}/kernel", f"embed -> {heads}", f"{of}{part}")
            for stack, attention, of in ATTENTIONS
            for part in ("query", "key", "value")
        ),
        *(
            Row(f"{stack}/layers_#/{attention}/out/kernel", f"{heads} -> embed", f"{of}out")
            for stack, attention, of in ATTENTIONS
        ),
        *(Row(f"{stack}/layers_#/mlp/{name}/kernel", "embed -> mlp", role) for stack in STACKS for name, role in wi),
        Row("{encoder,decoder}/layers_#/mlp/wo/kernel", "mlp -> embed", "down"),
        *(Row(f"{stack}/layers_#/{norm}/scale", "-> embed", role) for stack, norm, role in NORMS),
    )


def _scanned(wi: Inputs, head: tuple[Row, ...]) -> tuple[Row, ...]:
    return (
        *STEM,
        *(
            Row(f"{stack}/{stack}/relpos_bias/rel_embedding", "heads layers <- relpos_buckets", "relpos")
            for stack in STACKS
        ),
        *(
            Row(f"{stack}/{stack}/{attention}/{part}/kernel", "embed layers -> heads kv", f"{of}{part}")
            for stack, attention, of in ATTENTIONS
            for part in ("query", "key", "value")
        ),
        *(
            Row(f"{stack}/{stack}/{attention}/out/kernel", "heads layers kv -> embed", f"{of}out")
            for stack, attention, of in ATTENTIONS
        ),
        *(
            Row(f"{stack}/{stack}/mlp/{name}/kernel", "embed layers -> mlp", role)
            for stack in STACKS
            for name, role in wi
        ),
        *(Row(f"{stack}/{stack}/mlp/wo/kernel", "mlp layers -> embed", "down") for stack in STACKS),
        *(Row(f"{stack}/{stack}/{norm}/scale", "-> embed layers", role) for stack, norm, role in NORMS),
        *head,
    )


def _evidence(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What tells this tree from its relatives, and which public model has its vocabulary."""
    tied = "decoder/logits_dense/kernel" not in shapes
    gated = any(name.endswith("/mlp/wi_0/kernel") for name in shapes)
    scanned = "encoder/encoder/mlp/wo/kernel" in shapes
    kernels_3d = scanned or any(name.endswith("query/kernel") and len(s) == 3 for name, s in shapes.items())
    vocab = shapes["token_embedder/embedding"][0]
    public = {250112: " (mT5's)", 256384: " (umT5's)", 384: " (byT5's)", 32128: " (T5's)"}.get(vocab, "")
    return ", ".join(
        [
            "no decoder/logits_dense: tied head" if tied else "decoder/logits_dense: untied head",
            "mlp/wi_0 and wi_1: gated" if gated else "mlp/wi: not gated",
            "encoder/encoder: scanned layers" if scanned else "layers_N: one tensor per layer",
            "attention kernels of heads x kv" if kernels_3d else "attention kernels of joined_kv",
            f"vocabulary of {vocab}{public}",
        ]
    )


def _family(name: str, rows: tuple[Row, ...], *aliases: str, by_name_only: bool = False) -> Family:
    return Family(name, rows, GROWN, _evidence, aliases, by_name_only, TWIN)


T5_FAMILIES = (
    _family("t5-1.1", _minimal(GATED, UNTIED_HEAD), "mt5", "byt5", "flan-t5"),
    _family("t5-1.0", _minimal(PLAIN, TIED_HEAD)),
    # T5 1.1 with logits_via_embedding: the same tree as T5 1.1 after it has lost its logits_dense.
    _family("t5-1.1-tied", _minimal(GATED, TIED_HEAD), by_name_only=True),
    _family("scalable-t5-1.1", _scalable(GATED, UNTIED_HEAD)),
    _family("scalable-t5-1.0", _scalable(PLAIN, TIED_HEAD)),
    _family("scalable-t5-1.1-scanned", _scanned(GATED, UNTIED_HEAD), "umt5"),
    _family("scalable-t5-1.0-scanned", _scanned(PLAIN, TIED_HEAD)),
)
