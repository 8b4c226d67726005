"""The roles that tensors have in a decoder: what its twin needs of each, and whether a table has all that it needs.

No JAX here: tables are read without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fusectl.families.table import ENCODER, Row, stack_of


# The axes of decoders whose sizes add up, and the module that runs them.
GROWN = frozenset({"embed", "mlp", "heads", "kv_heads"})
TWIN = "fusectl.networks.decoder_stages"

# By role, the module's parameter and its axes.
STEM: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "embedding": ("token_embedder/embedding", ("vocab", "embed")),
    "final_norm": ("decoder_norm/scale", ("embed",)),
    "head": ("logits_dense/kernel", ("embed", "vocab")),
}
LAYER: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "pre_attention_norm": ("pre_attention_norm/scale", ("embed",)),
    "post_attention_norm": ("post_attention_norm/scale", ("embed",)),
    "pre_mlp_norm": ("pre_mlp_norm/scale", ("embed",)),
    "post_mlp_norm": ("post_mlp_norm/scale", ("embed",)),
    "query": ("attention/query/kernel", ("embed", "heads", "kv")),
    "key": ("attention/key/kernel", ("embed", "kv_heads", "kv")),
    "value": ("attention/value/kernel", ("embed", "kv_heads", "kv")),
    "out": ("attention/out/kernel", ("heads", "kv", "embed")),
    "query_bias": ("attention/query/bias", ("heads", "kv")),
    "key_bias": ("attention/key/bias", ("kv_heads", "kv")),
    "value_bias": ("attention/value/bias", ("kv_heads", "kv")),
    "query_norm": ("attention/query_norm/scale", ("kv",)),
    "key_norm": ("attention/key_norm/scale", ("kv",)),
    "gate": ("mlp/wi_0/kernel", ("embed", "mlp")),
    "up": ("mlp/wi_1/kernel", ("embed", "mlp")),
    "down": ("mlp/wo/kernel", ("mlp", "embed")),
}
ROLES = {**STEM, **LAYER}
# What every decoder has, but for a head, which may be the embedding; and what it has all of or nothing.
NEEDED = frozenset(
    {*STEM, "pre_attention_norm", "pre_mlp_norm", "query", "key", "value", "out", "gate", "up", "down"} - {"head"}
)
TOGETHER = (
    ("post_attention_norm", "post_mlp_norm"),
    ("query_norm", "key_norm"),
    ("query_bias", "key_bias", "value_bias"),
)


def lacking(rows: Sequence[Row]) -> Iterator[str]:
    """What the decoder's twin lacks in a table, in words; nothing where it can run the table's networks."""
    without = [row.pattern for row in rows if not row.roles]
    roles = {role for row in rows for role in row.roles}
    if without:
        yield f"rows without a role: {', '.join(without)}"
    if roles - ROLES.keys():
        yield f"a role that its network does not have: {', '.join(sorted(roles - ROLES.keys()))}"
    if NEEDED - roles:
        yield f"no row with the role {', '.join(role for role in ROLES if role in NEEDED - roles)}"
    for group in TOGETHER:
        absent = [role for role in group if role not in roles]
        if len(absent) < len(group) and absent:
            yield f"no row with the role {', '.join(absent)} beside {next(r for r in group if r in roles)}"
    if any(stack_of(alternative) == ENCODER for row in rows for alternative in row.alternatives):
        yield "an encoder"
