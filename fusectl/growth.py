"""Growing one checkpoint otherwise than by fusing it: plans of copies, carried out like any other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from fusectl.builder import (
    Builder,
    Options,
    auxiliary,
    notes_on_mesh,
    own_record,
    plan_step,
    source_record,
    target_of,
)
from fusectl.errors import UsageError
from fusectl.exactness import APPROXIMATE, Exactness, least
from fusectl.formats.tree import DICT, T5X_STEP, Checkpoint, Key, is_dropped, keys_beside
from fusectl.formats.zarr import epsilon
from fusectl.layout import Layout
from fusectl.plan import Plan
from fusectl.record import Growth, Origin
from fusectl.sources import Opened, open_source
from fusectl.state import plan_deeper_state
from fusectl.transforms.depth import Deepening, deepen
from fusectl.transforms.optimizer import STATES, unnamed


def plan_stack(
    path: str, how: str, layers: int | None, of_stack: Mapping[str, int | None], options: Options
) -> tuple[Plan, list[Checkpoint]]:
    """The plan that gives each stack of a checkpoint so many `layers`, or those `of_stack`, and the opened checkpoint.

    `how` is one of transforms.depth.HOWS. Raises Incompatible where a stack cannot be as deep; UsageError where none
    would be deeper.
    """
    opened = open_source(path, options.arch, options.drop)
    tree = opened.tree
    depths = {} if layers is None else dict.fromkeys(tree.depths, layers)
    depths |= {stack: n for stack, n in of_stack.items() if n is not None}
    deepening = deepen(tree, how, depths, opened.label)
    grown = deepening.grown
    if grown.depths == tree.depths:
        now = ", ".join(f"{n} in the {stack}" for stack, n in tree.depths.items())
        raise UsageError(f"{opened.label}: it has that many layers already ({now})", hint="--layers N for more")
    on_mesh = notes_on_mesh(options.mesh, grown, grown.shapes)
    out_format, item, prefix = target_of(opened, options)
    builder = Builder([opened], options, out_format)
    for parameter in grown.shapes:
        like = tree.full(next(deepening.pieces(parameter)).parameter)
        layout = deepening.layout(parameter, options.dtype or opened.checkpoint.leaves[like].dtype)
        builder.add(prefix + parameter, layout, like=like)
    optimizer = plan_deeper_state(builder, opened, deepening, options)
    plan_step(builder, opened, options, out_format)
    leaves = opened.checkpoint.leaves
    for name, like, shape, blocks in deepening.streams({name: leaves[name].shape for name in auxiliary(opened)}):
        builder.add(name, Layout(unnamed(shape), shape, leaves[like].dtype, blocks), like=like)
    own = own_record(opened, "stack")
    record = replace(
        own,
        parameters=prefix,
        # What stands there now is another field of noise, and another model than the sources' mean.
        fill=replace(own.fill, seed=None) if own.fill.kind != "zeros" else own.fill,
        sources=(),
        optimizer=optimizer,
        drop=options.drop,
        step=own.step if options.step is None else options.step,
        copy=None,
        growth=_growth(opened, deepening, how),
        origin=None if out_format.name != "t5x" or own.origin is None else _origin(own.origin, builder, options),
    )
    again = [] if how == "identity" else [Exactness(APPROXIMATE, (f"layers that come again ({how})",))]
    notes = [*opened.checkpoint.location.notes, *builder.notes, *_notes(deepening, how), *on_mesh]
    exactness = least([*again, *_rounding(opened, options)])
    return replace(builder.plan(record, item, notes), exactness=exactness), [opened.checkpoint]


def _origin(origin: Origin, builder: Builder, options: Options) -> Origin:
    """The tree that the source came from, with the layers that it has now."""
    keys = {}
    for name, like in builder.beside.items():
        if like in origin.keys:
            there = tuple(Key(*pair) for pair in origin.keys[like])
            keys[name] = tuple((key.name, key.kind) for key in _renamed(there, like, name))
    if options.step is not None:
        keys.setdefault(T5X_STEP, (("step", DICT),))
    drop = (*options.drop, *(f"{root}*" for root in STATES if options.optimizer == "drop"))
    empty = tuple(
        (node, kind) for node, kind in origin.empty if not is_dropped("/".join(part for part, _ in node), drop)
    )
    return Origin(origin.item, keys, empty)


def _renamed(keys: tuple[Key, ...], like: str, name: str) -> tuple[Key, ...]:
    """Keys of the tensor `like`, which may be called otherwise there, as those of `name`: other from some part on."""
    parts, others = like.split("/"), name.split("/")
    alike = next((i for i, pair in enumerate(zip(parts, others, strict=False)) if len(set(pair)) > 1), len(parts))
    joined = "/".join(key.name for key in keys)
    return keys_beside(keys, joined.removesuffix("/".join(parts[alike:])) + "/".join(others[alike:]))


def _rounding(opened: Opened, options: Options) -> Iterator[Exactness]:
    """What a cast to a narrower dtype does to the function."""
    stored = {opened.checkpoint.leaves[opened.full(name)].dtype for name in opened.tree.shapes}
    if options.dtype is not None and epsilon(options.dtype) > min(map(epsilon, stored)):
        yield Exactness(APPROXIMATE, (f"parameters are rounded to {options.dtype}",))


def _growth(opened: Opened, deepening: Deepening, how: str) -> Growth:
    """What the record says of it."""
    layers = {stack: depth.layers for stack, depth in deepening.depths.items()}
    idle = {stack: tuple(sorted(depth.idle)) for stack, depth in deepening.depths.items()}
    return Growth(how, source_record(opened), layers, idle)


def _notes(deepening: Deepening, how: str) -> Iterator[str]:
    for stack, depth in deepening.depths.items():
        now = deepening.tree.depths[stack]
        if len(depth.layers) != now:
            added = f", {len(depth.idle)} of them add nothing yet" if depth.idle else ""
            yield f"{stack}: {now} layers become {len(depth.layers)}{added}"
    if how != "identity":
        yield "the function is another one: the loss starts higher, and --how identity keeps it"
