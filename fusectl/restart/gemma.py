"""The gemma package's TransformerConfig, and where the parameters are, as a small module in Python.

Sources: gemma/gm/nn/{_config,config}.py for the fields, gemma/gm/ckpts/_checkpoint.py for what load_params reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fusectl.families.config import GEMMA_QUERY_SCALES, GEMMA_SIZES, counted_sizes
from fusectl.families.kinds import Trainer
from fusectl.families.recognized import Recognized
from fusectl.families.settings import Attending, Network
from fusectl.formats.tree import Checkpoint
from fusectl.restart.base import Restart, notes_on_history, notes_on_norm, require_no_gin, require_read


# The fields that no tree tells, by the setting that they follow from.
_UNTOLD = {
    "attending": ("attention_types", "sliding_window_size", "base frequencies", "scale factors"),
    "query_scale": ("query_pre_attn_norm",),
    "attention_soft_cap": ("attn_logits_soft_cap",),
    "logits_soft_cap": ("final_logit_softcap",),
}
_KINDS = "gm.nn.AttentionType"
_SCALES = "gm.nn.config.QueryPreAttentionNormalisation"


def restart_of(checkpoint: Checkpoint, tree: Recognized, lr_offset: int = 0, gin: Sequence[str] = ()) -> Restart:
    """The module for a checkpoint of one of Gemma's families; raises NotRead for one in T5X's format."""
    require_no_gin(Trainer.GEMMA, lr_offset, gin)
    require_read(checkpoint, Trainer.GEMMA)
    config, path = dict(_config(tree)), str(checkpoint.location.index)
    network = tree.network
    name = "Gemma3_4B" if any("query_norm" in row.roles for row in tree.rows.values()) else "Gemma2_9B"
    notes = [f"gm.nn.{name}(config=config), or another class of its kind: with that one's tokenizer"]
    assumed = [field for setting, fields in _UNTOLD.items() if setting not in network.told for field in fields]
    if assumed:
        notes.append(f"as the public models have it, since no --config has told it: {', '.join(assumed)}")
    if network.query_scale == "embed_over_heads":
        notes.append(f"{config['query_pre_attn_norm']} keeps its value: embed_dim and num_heads grow alike")
    notes += notes_on_norm(checkpoint.record, Trainer.GEMMA)
    notes += notes_on_history(checkpoint.record)
    lines = (
        "from gemma import gm",
        "config = gm.nn.config.TransformerConfig(",
        *_keywords(config),
        ")",
        f"params = gm.ckpts.load_params({path!r})",
    )
    return Restart(Trainer.GEMMA, checkpoint.path, tuple(notes), lines, {"config": config, "params": path})


def _config(tree: Recognized) -> Iterator[tuple[str, Any]]:
    """The fields of the config, those of enumerations by their names; the images' encoder is no part of the tree."""
    network = tree.network
    roles = {role for row in tree.rows.values() for role in row.roles}
    own = counted_sizes(tree.sizes, tree.depths, tree.family.blocks)
    yield from ((field, own[axis]) for axis, field in GEMMA_SIZES.items())
    yield "final_logit_softcap", network.logits_soft_cap
    yield "use_post_attn_norm", "post_attention_norm" in roles
    yield "use_post_ffw_norm", "post_mlp_norm" in roles
    yield "attention_types", _kinds(network, own["layers"])
    yield (
        "query_pre_attn_norm",
        next(name for name, scale in GEMMA_QUERY_SCALES.items() if scale == network.query_scale),
    )
    yield "attn_logits_soft_cap", network.attention_soft_cap
    # The config has one set of fields for local attention and one for global: the first layer of each kind stands for
    # all.
    local = next((each for each in network.attending if each.window is not None), Attending())
    around = next((each for each in network.attending if each.window is None), Attending())
    yield "sliding_window_size", local.window
    gating = next(row for row in tree.rows.values() if "gate" in row.roles)
    # The package keeps gating_einsum as (2, embed, mlp) or transposed, by this field; shapes alone would not tell where
    # both are of one length.
    yield "transpose_gating_einsum", gating.spec.axes.index("mlp") < gating.spec.axes.index("embed")
    yield "use_qk_norm", "query_norm" in roles
    yield "local_base_frequency", int(local.rope_base)
    yield "global_base_frequency", int(around.rope_base)
    yield "local_scale_factor", local.rope_scale
    yield "global_scale_factor", around.rope_scale


def _kinds(network: Network, layers: int) -> list[str]:
    """The kind of attention of each layer."""
    kinds = ["GLOBAL" if each.window is None else "LOCAL_SLIDING" for each in network.attending]
    return [kinds[layer % len(kinds)] for layer in range(layers)]


def _keywords(config: Mapping[str, Any]) -> Iterator[str]:
    """The fields as the lines of a call."""
    for field, value in config.items():
        if field == "attention_types":
            yield f"    {field}=gm.nn.config.make_attention_layers_types("
            yield "        ("
            yield from (f"            {_KINDS}.{kind}," for kind in repeated(value))
            yield "        ),"
            yield f"        num_layers={len(value)},"
            yield "    ),"
        else:
            yield f"    {field}={f'{_SCALES}.{value}' if field == 'query_pre_attn_norm' else repr(value)},"


def repeated(kinds: Sequence[str]) -> Sequence[str]:
    """The shortest pattern that gives these kinds when it is repeated, and cut where they end.

    >>> repeated(["a", "a", "b", "a", "a", "b", "a"])
    ['a', 'a', 'b']
    """
    sizes = range(1, len(kinds) + 1)
    return next(kinds[:n] for n in sizes if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
