"""One checkpoint in another format, dtype, or stacking of its layers: a plan of copies, carried out like any other.

A fusion stays the fusion that its record says it is. Of any other checkpoint the copy is recorded as the fusion of one,
so that verify can hold it against where it came from.
"""

from __future__ import annotations

from dataclasses import replace

import fusectl
from fusectl.archs import UNKNOWN
from fusectl.builder import Builder, Options, notes_on_mesh, plan_step, source_record, target_of
from fusectl.errors import Incompatible, UsageError
from fusectl.formats import open_checkpoint
from fusectl.formats.tree import STEPS, T5X_STEP, Checkpoint, EmptyNode, Key, is_dropped
from fusectl.formats.zarr import np_dtype
from fusectl.layout import Block, Layout, Term, whole
from fusectl.plan import Plan
from fusectl.record import LAYERS, Fill, Origin, Record
from fusectl.restack import restacked
from fusectl.sources import Opened, ready, require_chunks
from fusectl.transforms.grow import widths_of
from fusectl.transforms.optimizer import STATE, slot_axes


# Where T5X and Flax's training loops keep what --drop-optimizer leaves out.
_STATES_IN = (STATE, "opt_state/")
_STATES = tuple(f"{prefix}*" for prefix in _STATES_IN)


def plan_conversion(path: str, options: Options, layers: str | None = None) -> tuple[Plan, list[Checkpoint]]:
    """The plan that writes a checkpoint anew as the options say, and the opened checkpoint.

    With `layers` its layers are `scanned` or `unscanned`. A tree of no family that fusectl knows is copied as it is.
    Raises Incompatible where its parameters would have to be known for what is asked.
    """
    if layers not in {None, *LAYERS}:
        raise UsageError(f"layers {layers!r}: {' or '.join(LAYERS)}")
    if options.optimizer == "drop":
        options = replace(options, drop=(*options.drop, *_STATES))
    checkpoint = open_checkpoint(path)
    if layers is not None:
        # A quarter of the budget holds what the layers of one stack are cut from.
        cache_bytes = options.max_memory_bytes // 4
        checkpoint = restacked(checkpoint, layers, options.arch, options.drop, cache_bytes=cache_bytes)
        options = replace(options, max_memory_bytes=options.max_memory_bytes - cache_bytes)
    opened = _opened(checkpoint, options)
    on_mesh = notes_on_mesh(options.mesh, opened.tree, opened.tree.shapes)
    out_format, item, prefix = target_of(opened, options)
    to_t5x = out_format.name == "t5x"
    origin = checkpoint.record.origin if checkpoint.record is not None else None
    there = origin if origin is not None and not to_t5x else None
    builder = Builder([opened], options, out_format)
    if to_t5x and opened.tree is UNKNOWN:
        builder.notes.append("no tree that fusectl knows: T5X reads what is below target/ and state/")
    for name in checkpoint.leaves:
        if name in opened.dropped or name in STEPS:
            continue
        parameter = name.removeprefix(opened.tree.prefix)
        is_parameter = parameter in opened.tree.shapes
        to, keys = prefix + parameter if is_parameter else name, None
        if there is not None:
            keys = _keys(there.keys.get(name))
            to = "/".join(key.name for key in keys) if keys else name
        leaf = checkpoint.leaves[name]
        if is_parameter:
            axes = opened.tree.rows[parameter].spec.axes
            block = Block(whole(leaf.shape), (Term(0, name, whole(leaf.shape)),))
            layout = Layout(axes, leaf.shape, options.dtype or leaf.dtype, (block,))
            builder.add(to, layout, like=name, keys=keys)
        else:
            axes = slot_axes(name, leaf.shape, opened.tree, opened.tree.shapes)
            builder.copy(name, to, axes=axes, keys=keys)
    if there is not None and T5X_STEP not in there.keys and options.step is None:
        # T5X had to be given one.
        builder.used.add(T5X_STEP)
    else:
        plan_step(builder, opened, options, out_format, _keys(there.keys.get(T5X_STEP)) if there else None)
    empty = builder.empty()
    record = replace(_record(opened, options, layers, prefix), origin=origin if there is None else None)
    if to_t5x and origin is None:
        record = replace(record, origin=_origin(builder, checkpoint, empty))
    if there is not None:
        item = there.item
        empty = tuple(EmptyNode(keys, kind) for found, kind in there.empty if (keys := _keys(found)))
    notes = [*checkpoint.location.notes, *builder.notes, *on_mesh]
    return builder.plan(record, item, notes, empty), [checkpoint]


def _opened(checkpoint: Checkpoint, options: Options) -> Opened:
    """The checkpoint as a source; of no known family where nothing that is asked for depends on it."""
    try:
        return ready(checkpoint, options.arch, options.drop)
    except Incompatible:
        if options.arch is not None or options.dtype is not None:
            raise
    dropped = tuple(name for name in checkpoint.leaves if is_dropped(name, options.drop))
    require_chunks(checkpoint, (name for name in checkpoint.leaves if name not in dropped))
    return Opened(checkpoint, UNKNOWN, dropped)


def _keys(pairs: tuple[tuple[str, int], ...] | None) -> tuple[Key, ...] | None:
    return None if pairs is None else tuple(Key(name, kind) for name, kind in pairs)


def _origin(builder: Builder, checkpoint: Checkpoint, empty: tuple[EmptyNode, ...]) -> Origin | None:
    """What T5X's index cannot tell of a tree, if there is any such thing."""

    def pairs(keys: tuple[Key, ...]) -> tuple[tuple[str, int], ...]:
        return tuple((key.name, key.kind) for key in keys)

    if checkpoint.format == "t5x":
        return None
    keys = {
        output.name: pairs(checkpoint.leaves[term.tensor].keys)
        for output in builder.outputs
        for block in output.layout.blocks
        for term in block.terms
        if isinstance(term, Term)
    }
    return Origin(checkpoint.location.item, keys, tuple((pairs(node.keys), node.value_type) for node in empty))


def _record(opened: Opened, options: Options, layers: str | None, prefix: str) -> Record:
    """The record of the copy: the source's own, if it is a fusion, else that of a fusion of one."""
    own, tree = opened.checkpoint.record, opened.tree
    has_state = any(name.startswith(_STATES_IN) and name not in opened.dropped for name in opened.checkpoint.leaves)
    had_state = any(name.startswith(_STATES_IN) for name in opened.checkpoint.leaves)
    if own is not None and own.fused and tree is not UNKNOWN and not _widens(opened, options):
        fill = own.fill
        if layers is not None and fill.kind != "zeros":
            # The field of noise is laid out by a tensor's shape, which is another now.
            fill = replace(fill, seed=None)
        return replace(
            own,
            version=fusectl.__version__,
            command="convert",
            family=tree.family.name,
            parameters=prefix,
            fill=fill,
            optimizer=own.optimizer if has_state or not had_state else "drop",
            drop=(*own.drop, *options.drop),
            step=own.step if options.step is None else options.step,
            layers=_seen_as(own, layers),
            tensors={},
            files={},
        )
    optimizer = ("drop" if had_state else "none") if not has_state else "carry"
    return Record(
        version=fusectl.__version__,
        command="convert",
        family=tree.family.name,
        parameters=prefix,
        sources=(source_record(opened),),
        weights=(1.0,),
        widths=widths_of([tree]),
        norm_groups=opened.norm_groups,
        fill=Fill(),
        optimizer=optimizer,
        drop=options.drop,
        step=options.step,
        layers=layers or "",
    )


def _seen_as(own: Record, layers: str | None) -> str:
    """How the layers of a fusion's sources are stored in it: those that were restacked before may be as they were."""
    return own.layers if layers is None else "" if own.layers else layers


def _widens(opened: Opened, options: Options) -> bool:
    """Whether the parameters are cast to a wider dtype: what the fusion's sources hold is not in them."""
    if options.dtype is None:
        return False
    names = (opened.full(name) for name in opened.tree.shapes)
    sizes = {np_dtype(opened.checkpoint.leaves[name].dtype).itemsize for name in names}
    return min(sizes) < np_dtype(options.dtype).itemsize
