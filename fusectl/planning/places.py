"""Where tensors go: the format and the item of the output, how parameters are named there, and every tensor's keys."""

from __future__ import annotations

from fusectl.families.naming import T5X, Naming
from fusectl.formats.format import Format
from fusectl.formats.registry import ORBAX, format_named, orbax_for
from fusectl.formats.tree import Key, Leaf, dict_keys, keys_beside
from fusectl.planning.options import Options
from fusectl.sources.opened import Opened


# The item that T5X's Orbax checkpoints have their tree in.
T5X_ITEM = "state"


def target_of(first: Opened, options: Options) -> tuple[Format, str | None, Naming]:
    """The format of the output, the item that its tree goes into, and how its parameters are named there."""
    own = format_named(first.checkpoint.format)
    if options.format == ORBAX:
        out_format = orbax_for(first.tree.family.trainer, own.zarr)
    else:
        out_format = format_named(options.format or own.name)
    if not out_format.keeps_tree:
        return out_format, None, T5X
    item = first.checkpoint.location.item if own.keeps_tree else T5X_ITEM
    return out_format, item, first.tree.naming


def keys_of(name: str, like: Leaf | None, out_format: Format) -> tuple[Key, ...]:
    """The keys of a tensor, of the kinds that those of the source's tensor `like` have where the format keeps kinds."""
    if like is None or not out_format.keeps_tree:
        return dict_keys(name)
    return keys_beside(like.keys, name)
