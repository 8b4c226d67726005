"""Growing one checkpoint otherwise than by fusing it: plans of copies, carried out like any other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from fusectl.errors import UsageError
from fusectl.families.config import read_config
from fusectl.families.kinds import Norm
from fusectl.families.recognized import Recognized
from fusectl.formats.record import Mapped, Origin, Record, Stacked
from fusectl.formats.registry import fingerprint
from fusectl.formats.tree import DICT, T5X_STEP, Checkpoint, Key, is_dropped, keys_beside
from fusectl.formats.zarr import epsilon
from fusectl.layout.blocks import Layout
from fusectl.layout.fill import Fill, FillKind
from fusectl.optimizer.kinds import OnState
from fusectl.optimizer.slots import STATES, is_state, unnamed
from fusectl.planning.builder import (
    Builder,
    Options,
    auxiliary,
    notes_on_items,
    notes_on_mesh,
    own_record,
    plan_step,
    source_record,
    target_of,
)
from fusectl.planning.exactness import APPROXIMATE, Exactness, least
from fusectl.planning.optimizer import DROPPED, plan_deeper_state
from fusectl.planning.plan import Plan
from fusectl.rules.depth import Deepening, deepen
from fusectl.rules.fusion import widths_of
from fusectl.rules.kinds import How
from fusectl.rules.linear import Application, Growing, growing_to
from fusectl.sources.opened import Opened, open_source
from fusectl.sources.operator import Kept, Operator, initial


# Matrices that are kept in memory: those of two kernels' sides.
MATRICES = 4


def plan_stack(
    path: str, how: str, layers: int | None, of_stack: Mapping[str, int | None], options: Options
) -> tuple[Plan, list[Checkpoint]]:
    """The plan that gives each stack of a checkpoint so many `layers`, or those `of_stack`, and the opened checkpoint.

    `how` is one of rules.kinds.How. Raises Incompatible where a stack cannot be as deep; UsageError where none
    would be deeper.
    """
    opened = _opened(path, options)
    tree = opened.tree
    depths = depths_wanted(tree, layers, of_stack)
    deepening = deepen(tree, how, depths, opened.label)
    grown = deepening.grown
    if grown.depths == tree.depths:
        now = ", ".join(f"{n} in the {stack}" for stack, n in tree.depths.items())
        raise UsageError(f"{opened.label}: it has that many layers already ({now})", hint="--layers N for more")
    on_mesh = notes_on_mesh(options.mesh, grown, grown.shapes)
    out_format, item, naming = target_of(opened, options)
    builder = Builder([opened], options, out_format)
    for parameter in grown.shapes:
        like = tree.full(next(deepening.pieces(parameter)).parameter)
        layout = deepening.layout(parameter, options.dtype or opened.checkpoint.leaves[like].dtype)
        builder.add(naming.full(parameter), layout, like=like)
    optimizer = plan_deeper_state(builder, opened, deepening, options)
    plan_step(builder, opened, options, out_format)
    leaves = opened.checkpoint.leaves
    for name, like, shape, blocks in deepening.streams({name: leaves[name].shape for name in auxiliary(opened)}):
        builder.add(name, Layout(unnamed(shape), shape, leaves[like].dtype, blocks), like=like)
    record = _record(opened, builder, options, _stacked(opened, deepening, how), optimizer)
    again = [] if how == How.IDENTITY else [Exactness(APPROXIMATE, (f"layers that come again ({how})",))]
    of_source = [*opened.checkpoint.location.notes, *notes_on_items(opened.checkpoint)]
    notes = [*of_source, *builder.notes, *_notes(deepening, how), *on_mesh]
    exactness = least([*again, *_rounding(opened, options)])
    return replace(builder.plan(record, item, notes), exactness=exactness), [opened.checkpoint]


def begin_operator(
    path: str,
    sizes: Mapping[str, int | None],
    layers: int | None,
    of_stack: Mapping[str, int | None],
    tie: str,
    init: str,
    seed: int,
    options: Options,
) -> tuple[Growing, Opened, Operator]:
    """What grows the checkpoint at a path to these sizes and depths, that checkpoint, and the operator's start.

    None are the sizes that it has. Raises Incompatible for what it cannot grow to, UsageError where nothing would grow.
    """
    opened = _opened(path, options)
    wanted = {axis: n for axis, n in sizes.items() if n is not None}
    growing = growing_to(opened.tree, wanted, depths_wanted(opened.tree, layers, of_stack), tie, opened.label)
    if not growing.shapes():
        raise UsageError(f"{opened.label}: it is as large as that already", hint="--emb, --heads, --mlp, --layers")
    return growing, opened, initial(growing, init, seed)


def _opened(path: str, options: Options) -> Opened:
    """The checkpoint to grow, with what a config tells of it."""
    if len(options.configs) > 1:
        raise UsageError(f"{len(options.configs)} configs for one checkpoint")
    config = read_config(options.configs[0]) if options.configs else None
    return open_source(path, options.arch, options.drop, config)


def depths_wanted(tree: Recognized, layers: int | None, of_stack: Mapping[str, int | None]) -> dict[str, int]:
    """The depths that are asked for: of all stacks, and of single ones."""
    depths = {} if layers is None else dict.fromkeys(tree.depths, layers)
    return depths | {stack: n for stack, n in of_stack.items() if n is not None}


def plan_with_operator(path: str, operator: Kept, options: Options) -> tuple[Plan, list[Checkpoint]]:
    """The plan that applies a growth operator to a checkpoint, and both opened: the checkpoint, and the operator's.

    The optimizer's state stays behind: a linear map of parameters says nothing of their moments. Raises Incompatible
    for a model that the operator is not for.
    """
    options = replace(options, optimizer=OnState.DROP)
    opened = _opened(path, options)
    growing = operator.growing(opened.tree, opened.label)
    grown, application = growing.grown, Application(growing, operator.depth)
    on_mesh = notes_on_mesh(options.mesh, grown, grown.shapes)
    out_format, item, naming = target_of(opened, options)
    # For the matrices of a layer, both as they are and inverted.
    matrix_bytes = min(options.max_memory_bytes // 4, 8 * MATRICES * _largest(growing))
    mapped_bytes = options.max_memory_bytes // 4
    builder = Builder([opened], options, out_format, reserved_bytes=matrix_bytes + mapped_bytes)
    for parameter in grown.shapes:
        like = application.like(parameter)
        layout = application.layout(parameter, options.dtype or opened.checkpoint.leaves[opened.full(like)].dtype)
        builder.add(naming.full(parameter), layout, like=opened.full(like), beside=like)
    with_state = any(is_state(name) and name not in opened.dropped for name in opened.checkpoint.leaves)
    builder.notes += [DROPPED] * with_state
    plan_step(builder, opened, options, out_format)
    # Streams of random numbers go with the state: a trainer begins both anew.
    builder.used.update(auxiliary(opened))
    own = operator.checkpoint
    made = Mapped(
        source_record(opened),
        operator.how,
        operator=None if own is None else own.path,
        operator_fingerprint=None if own is None else fingerprint(own),
        keeps_function=operator.keeps_function,
    )
    widths = widths_of([grown])
    record = replace(
        _record(opened, builder, options, made, OnState.DROP if with_state else "none"),
        # One model of one width, whatever the small one was made of.
        weights=(1.0,),
        widths=widths,
        norm=Norm.RULE,
        norm_groups=widths["embed"],
        fill=Fill(),
        residual_scales=(),
        kv_repeats=(),
    )
    because = f"a linear operator has made it ({operator.how}): its loss is for verify to tell"
    exactness = Exactness() if operator.keeps_function else Exactness(APPROXIMATE, (because,))
    notes = [*opened.checkpoint.location.notes, *notes_on_items(opened.checkpoint), *builder.notes, *on_mesh]
    plan = replace(builder.plan(record, item, notes), exactness=exactness)
    plan = replace(plan, matrix_bytes=matrix_bytes, mapped_bytes=mapped_bytes)
    return plan, [opened.checkpoint, *([] if own is None else [own])]


def _largest(growing: Growing) -> int:
    """The elements of the operator's largest matrix, as it is applied: its features counted."""
    sizes = growing.grown.sizes
    pairs = [(n, growing.tree.sizes[axis]) for axis, n in sizes.items() if axis in growing.tree.family.grown]
    return max((large * small for large, small in pairs), default=0)


def _record(opened: Opened, builder: Builder, options: Options, made: Stacked | Mapped, optimizer: str) -> Record:
    """The record of a model that was grown from a source: what that one's own says, but for what it was made from."""
    own = own_record(opened, "stack" if isinstance(made, Stacked) else "ligo")
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


def _rounding(opened: Opened, options: Options) -> Iterator[Exactness]:
    """What a cast to a narrower dtype does to the function."""
    stored = {opened.checkpoint.leaves[opened.full(name)].dtype for name in opened.tree.shapes}
    if options.dtype is not None and epsilon(options.dtype) > min(map(epsilon, stored)):
        yield Exactness(APPROXIMATE, (f"parameters are rounded to {options.dtype}",))


def _stacked(opened: Opened, deepening: Deepening, how: str) -> Stacked:
    """What the record says of it."""
    layers = {stack: depth.layers for stack, depth in deepening.depths.items()}
    idle = {stack: tuple(sorted(depth.idle)) for stack, depth in deepening.depths.items()}
    return Stacked(source_record(opened), how, layers, idle)


def _notes(deepening: Deepening, how: str) -> Iterator[str]:
    for stack, depth in deepening.depths.items():
        now = deepening.tree.depths[stack]
        if len(depth.layers) != now:
            added = f", {len(depth.idle)} of them add nothing yet" if depth.idle else ""
            yield f"{stack}: {now} layers become {len(depth.layers)}{added}"
    if how != How.IDENTITY:
        yield "the function is another one: the loss starts higher, and --how identity keeps it"
