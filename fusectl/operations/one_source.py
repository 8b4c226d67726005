"""What operations on one checkpoint have in common: opening it, the depths that are wanted, and the record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fusectl.errors import UsageError
from fusectl.families.config import read_config
from fusectl.families.recognized import Recognized
from fusectl.formats.record import Origin, Record
from fusectl.formats.tree import DICT, T5X_STEP, Key, is_dropped, keys_beside
from fusectl.layout.fill import FillKind
from fusectl.optimizer.kinds import OnState
from fusectl.optimizer.state import STATES
from fusectl.planning.builder import Builder
from fusectl.planning.options import Options
from fusectl.planning.places import target_of
from fusectl.planning.records import own_record
from fusectl.sources.opened import Opened, open_source
from fusectl.verbs import Mapped, Stacked


def open_one(path: str, options: Options) -> Opened:
    """The checkpoint to grow, with what a config tells of it."""
    if len(options.configs) > 1:
        raise UsageError(f"{len(options.configs)} configs for one checkpoint")
    config = read_config(options.configs[0]) if options.configs else None
    return open_source(path, options.arch, options.drop, config)


def depths_wanted(tree: Recognized, layers: int | None, of_stack: Mapping[str, int | None]) -> dict[str, int]:
    """The depths that are asked for: of all stacks, and of single ones."""
    depths = {} if layers is None else dict.fromkeys(tree.depths, layers)
    return depths | {stack: n for stack, n in of_stack.items() if n is not None}


def grown_record(
    command: str, opened: Opened, builder: Builder, options: Options, made: Stacked | Mapped, optimizer: str
) -> Record:
    """The record of a model that was grown from a source: what that one's own says, but for what it was made from."""
    own = own_record(opened, command)
    out_format, _, naming = target_of(opened, options)
    return replace(
        own,
        parameters=naming.prefix,
        # What stands there now is another field of noise, and another model than the sources' mean.
        fill=replace(own.fill, seed=None) if own.fill.kind is not FillKind.ZEROS else own.fill,
        made=made,
        optimizer=optimizer,
        drop=options.drop,
        step=own.step if options.step is None else options.step,
        origin=None if out_format.keeps_tree or own.origin is None else _origin(own.origin, builder, options),
    )


def _origin(origin: Origin, builder: Builder, options: Options) -> Origin:
    """The tree that the source came from, with the layers that it has now."""
    keys = {}
    for name, like in builder.beside.items():
        if like in origin.keys:
            there = tuple(Key(*pair) for pair in origin.keys[like])
            keys[name] = tuple((key.name, key.kind) for key in _renamed(there, like, name))
    if options.step is not None:
        keys.setdefault(T5X_STEP, (("step", DICT),))
    drop = (*options.drop, *(f"{root}*" for root in STATES if options.optimizer == OnState.DROP))
    nodes = tuple(node for node in origin.nodes if not is_dropped("/".join(part for part, _ in node[0]), drop))
    return Origin(origin.item, keys, nodes)


def _renamed(keys: tuple[Key, ...], like: str, name: str) -> tuple[Key, ...]:
    """Keys of the tensor `like`, which may be called otherwise there, as those of `name`: other from some part on."""
    parts, others = like.split("/"), name.split("/")
    alike = next((i for i, pair in enumerate(zip(parts, others, strict=False)) if len(set(pair)) > 1), len(parts))
    joined = "/".join(key.name for key in keys)
    return keys_beside(keys, joined.removesuffix("/".join(parts[alike:])) + "/".join(others[alike:]))
