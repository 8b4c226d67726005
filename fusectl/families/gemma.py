"""Gemma as its own package stores it: nested as `model.init` has it, or flat, with keys that hold slashes.

Scales are stored without the 1 that is added to them; embedded tokens are multiplied with the root of the width. Which
model it is follows from its norms, and with it what the package's configs say. Sources: gemma/gm/nn/_modules.py,
gemma/gm/nn/_gemma.py, gemma/gm/ckpts/_checkpoint.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

from fusectl.families.kinds import Trainer
from fusectl.families.roles import GROWN, TWIN
from fusectl.families.settings import Attending, Network
from fusectl.families.table import Family, Row


STEM = Row("embedder/input_embedding", "vocab -> embed", "embedding")
FINAL_NORM = Row("final_norm/scale", "-> embed", "final_norm", before_head=True)

# Queries apart from keys and values, or, with as many heads of both, all in one.
ATTENTIONS = {
    "": (
        Row("attn/q_einsum/w", "heads <- embed -> kv", "query"),
        Row("attn/kv_einsum/w", "stack kv_heads <- embed -> kv", "key value"),
        Row("attn/attn_vec_einsum/w", "heads kv -> embed", "out"),
    ),
    "-qkv": (
        Row("attn/qkv_einsum/w", "stack heads <- embed -> kv", "query key value"),
        Row("attn/attn_vec_einsum/w", "heads kv -> embed", "out"),
    ),
}
GATINGS = {"": "stack embed -> mlp", "-transposed": "stack mlp <- embed"}
NORMS = (
    Row("pre_attention_norm/scale", "-> embed", "pre_attention_norm"),
    Row("pre_ffw_norm/scale", "-> embed", "pre_mlp_norm"),
)
NORMS_BEHIND = (
    Row("post_attention_norm/scale", "-> embed", "post_attention_norm", writes=True),
    Row("post_ffw_norm/scale", "-> embed", "post_mlp_norm", writes=True),
)
QUERY_KEY_NORMS = (
    Row("attn/_query_norm/scale", "-> kv", "query_norm"),
    Row("attn/_key_norm/scale", "-> kv", "key_norm"),
)

_GEMMA = Network(norm_adds_one=True, embedding_power=0.5, activation="gelu", query_scale="head_dim")


def _gemma(_: Mapping[str, int]) -> Network:
    return _GEMMA


def _gemma2(sizes: Mapping[str, int]) -> Network:
    """Gemma 2's: of 27B, and of its fusions, the queries are scaled by embed // heads, which there is not head_dim."""
    of_27b = sizes["kv"] == 128 and sizes["embed"] // sizes["heads"] == 144
    return replace(
        _GEMMA,
        query_scale="embed_over_heads" if of_27b else "head_dim",
        attention_soft_cap=50.0,
        logits_soft_cap=30.0,
        attending=(Attending(window=4096), Attending()),
    )


def _gemma3(sizes: Mapping[str, int]) -> Network:
    """Gemma 3's: windows of 512 up to 1B, of 1024 and stretched positions beyond; 27B's queries as Gemma 2's."""
    small = sizes["layers"] <= 26
    of_27b = sizes["kv"] == 128 and sizes["embed"] // sizes["heads"] == 168
    local = Attending(window=512 if small else 1024)
    around = Attending(1_000_000.0, 1.0 if small else 8.0)
    scale = "embed_over_heads" if of_27b else "head_dim"
    return replace(_GEMMA, query_scale=scale, attending=(*(local,) * 5, around))


KINDS = {
    "gemma": (NORMS, _gemma, "norms before the blocks"),
    "gemma2": ((*NORMS, *NORMS_BEHIND), _gemma2, "norms behind the blocks"),
    "gemma3": ((*NORMS, *NORMS_BEHIND, *QUERY_KEY_NORMS), _gemma3, "norms behind the blocks and of queries and keys"),
}


def _rows(kind: str, attention: str, gating: str, *, flat: bool) -> Iterator[Row]:
    prefix = "transformer/" if flat else ""
    # The flat layout has the MLP's kernels one level deeper.
    leaf = "/w" if flat else ""
    behind = kind != "gemma"
    yield replace(STEM, pattern=prefix + STEM.pattern)
    yield replace(FINAL_NORM, pattern=prefix + FINAL_NORM.pattern)
    mlp = (
        Row(f"mlp/gating_einsum{leaf}", GATINGS[gating], "gate up"),
        Row(f"mlp/linear{leaf}", "mlp -> embed", "down"),
    )
    for row in (*ATTENTIONS[attention], *mlp):
        yield replace(row, pattern=f"{prefix}layer_#/{row.pattern}", writes=False if behind else None)
    for row in KINDS[kind][0]:
        yield replace(row, pattern=f"{prefix}layer_#/{row.pattern}")


def _evidence(shapes: Mapping[str, tuple[int, ...]], *, says: str) -> str:
    (vocab, _), *_ = (shape for name, shape in shapes.items() if name.endswith("embedder/input_embedding"))
    return f"{says}, vocabulary of {vocab}"


def _families() -> Iterator[Family]:
    for kind, (_, network, says) in KINDS.items():
        for attention in ATTENTIONS:
            for gating in GATINGS:
                for flat in ("", "-flat"):
                    parts = [
                        says,
                        "queries, keys and values in one" if attention else "queries apart from keys and values",
                        "gating (2, mlp, embed)" if gating else "gating (2, embed, mlp)",
                        "keys with slashes" if flat else "nested keys",
                    ]
                    yield Family(
                        name=f"{kind}{attention}{gating}{flat}",
                        rows=tuple(_rows(kind, attention, gating, flat=bool(flat))),
                        grown=GROWN,
                        evidence=partial(_evidence, says=", ".join(parts)),
                        twin=TWIN,
                        network=network,
                        trainer=Trainer.GEMMA,
                    )


GEMMA_FAMILIES = tuple(_families())
