"""The T5 family as T5X stores it: minimal (2-D kernels) and scalable (3-D kernels, a relative bias per layer).

Sources: t5x/examples/t5/{network,layers}.py and t5x/examples/scalable_t5/, logical axes as in `param_with_axes` there.
joined_kv is heads-major, so that concatenating along it concatenates heads. Flaxformer's T5 trees are the minimal ones.
"""

from __future__ import annotations

from collections.abc import Mapping

from fusectl.archs.table import Family, Row


GROWN = frozenset({"embed", "mlp", "heads", "joined_kv"})
TWIN = "fusectl.archs.t5_twin"

STEM = (
    Row("token_embedder/embedding", "vocab -> embed"),
    Row("encoder/encoder_norm/scale", "-> embed"),
)
TIED_HEAD = (Row("decoder/decoder_norm/scale", "-> embed", tied_head=True),)
UNTIED_HEAD = (
    Row("decoder/decoder_norm/scale", "-> embed"),
    Row("decoder/logits_dense/kernel", "embed -> vocab"),
)

ENCODER_NORMS = "pre_{attention,mlp}_layer_norm/scale"
DECODER_NORMS = "pre_{self_attention,cross_attention,mlp}_layer_norm/scale"
READ = "{query,key,value}/kernel"
ATTENTIONS = (("encoder", "attention"), ("decoder", "{self_attention,encoder_decoder_attention}"))


def _minimal(wi: str, head: tuple[Row, ...]) -> tuple[Row, ...]:
    relpos = Row("{encoder,decoder}/relpos_bias/rel_embedding", "heads <- relpos_buckets")
    return (*STEM, relpos, *_layers(wi, "joined_kv"), *head)


def _scalable(wi: str, head: tuple[Row, ...]) -> tuple[Row, ...]:
    relpos = Row("{encoder,decoder}/layers_#/relpos_bias/rel_embedding", "heads <- relpos_buckets")
    return (*STEM, relpos, *_layers(wi, "heads kv"), *head)


def _layers(wi: str, heads: str) -> tuple[Row, ...]:
    """One tensor for each layer; `heads` are the axes that the attention kernels have for them."""
    return (
        *(Row(f"{stack}/layers_#/{attention}/{READ}", f"embed -> {heads}") for stack, attention in ATTENTIONS),
        *(Row(f"{stack}/layers_#/{attention}/out/kernel", f"{heads} -> embed") for stack, attention in ATTENTIONS),
        Row(f"{{encoder,decoder}}/layers_#/mlp/{wi}/kernel", "embed -> mlp"),
        Row("{encoder,decoder}/layers_#/mlp/wo/kernel", "mlp -> embed"),
        Row(f"encoder/layers_#/{ENCODER_NORMS}", "-> embed"),
        Row(f"decoder/layers_#/{DECODER_NORMS}", "-> embed"),
    )


def _scanned(wi: str, head: tuple[Row, ...]) -> tuple[Row, ...]:
    return (
        *STEM,
        *(
            Row(f"{stack}/{stack}/relpos_bias/rel_embedding", "heads layers <- relpos_buckets")
            for stack in ("encoder", "decoder")
        ),
        *(Row(f"{stack}/{stack}/{attention}/{READ}", "embed layers -> heads kv") for stack, attention in ATTENTIONS),
        *(
            Row(f"{stack}/{stack}/{attention}/out/kernel", "heads layers kv -> embed")
            for stack, attention in ATTENTIONS
        ),
        *(Row(f"{stack}/{stack}/mlp/{wi}/kernel", "embed layers -> mlp") for stack in ("encoder", "decoder")),
        *(Row(f"{stack}/{stack}/mlp/wo/kernel", "mlp layers -> embed") for stack in ("encoder", "decoder")),
        Row(f"encoder/encoder/{ENCODER_NORMS}", "-> embed layers"),
        Row(f"decoder/decoder/{DECODER_NORMS}", "-> embed layers"),
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
    _family("t5-1.1", _minimal("wi_{0,1}", UNTIED_HEAD), "mt5", "byt5", "flan-t5"),
    _family("t5-1.0", _minimal("wi", TIED_HEAD)),
    # T5 1.1 with logits_via_embedding: the same tree as T5 1.1 after it has lost its logits_dense.
    _family("t5-1.1-tied", _minimal("wi_{0,1}", TIED_HEAD), by_name_only=True),
    _family("scalable-t5-1.1", _scalable("wi_{0,1}", UNTIED_HEAD)),
    _family("scalable-t5-1.0", _scalable("wi", TIED_HEAD)),
    _family("scalable-t5-1.1-scanned", _scanned("wi_{0,1}", UNTIED_HEAD), "umt5"),
    _family("scalable-t5-1.0-scanned", _scanned("wi", TIED_HEAD)),
)
