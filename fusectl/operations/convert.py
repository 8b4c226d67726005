"""One checkpoint in another format, dtype, or stacking of its layers: a plan of copies, carried out like any other.

Its record is the source's own, so that a fusion stays one, and says what it is a copy of: verify holds every tensor
against that. What T5X's index cannot tell of a tree (lists, empty tuples, keys with slashes) is in the record, too, for
the way back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from fusectl.errors import Incompatible, UsageError
from fusectl.families.naming import Naming
from fusectl.families.recognized import UNKNOWN, Recognized
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.record import Origin, Record
from fusectl.formats.registry import format_named
from fusectl.formats.tree import DICT, T5X_STEP, Checkpoint, Key, Node, dict_keys, is_dropped, kept_shapes
from fusectl.layout.blocks import Block, Layout, Term, whole
from fusectl.layout.fill import Fill, FillKind
from fusectl.optimizer.kinds import OnState
from fusectl.optimizer.state import STATES, slot_axes
from fusectl.planning.builder import Builder
from fusectl.planning.notes import notes_on_items, notes_on_mesh
from fusectl.planning.options import Options
from fusectl.planning.places import target_of
from fusectl.planning.plan import Plan
from fusectl.planning.records import own_record, source_record
from fusectl.planning.resources import resources_of
from fusectl.planning.step import plan_step, step_of
from fusectl.sources.opened import Opened, ready, recognized, require_chunks
from fusectl.sources.scan import restacked
from fusectl.verbs import Converted, Fused, Original, Scan


Keys = tuple[Key, ...]

# What MaxText notes of a step.
SCAN_LAYERS = "scan_layers"


def plan_conversion(
    path: str, options: Options, layers: str | None = None, *, drop_optimizer: bool = False
) -> tuple[Plan, list[Checkpoint]]:
    """The plan that writes a checkpoint anew as the options say, and the opened checkpoint.

    `layers` says how its layers are to stand (verbs.Scan). A tree of no family that fusectl knows is copied as it is.
    Raises Incompatible where its parameters would have to be known for what is asked.
    """
    if layers not in {None, *Scan}:
        raise UsageError(f"layers {layers!r}: {' or '.join(Scan)}")
    if drop_optimizer or options.optimizer == OnState.DROP:
        options = replace(options, optimizer=OnState.DROP, drop=(*options.drop, *(f"{root}*" for root in STATES)))
    source = open_checkpoint(path)
    # For the chunks that several layers are cut from.
    cache_bytes = 0 if layers is None else options.max_memory_bytes // 4
    # Restacking is a view of the source, so the plan that follows only makes copies, like any other.
    seen: Checkpoint = source
    if layers is not None:
        seen = restacked(source, layers, options.arch, options.drop, cache_bytes=cache_bytes)
    opened = _opened(seen, options)
    on_mesh = notes_on_mesh(options.mesh, opened.tree, opened.tree.shapes)
    out_format, item, naming = target_of(opened, options)
    to_t5x = not out_format.keeps_tree
    origin = source.record.origin if source.record is not None else None
    places = _places(opened, None if to_t5x else origin, naming if to_t5x else None)
    resources = resources_of(options.max_memory_bytes, out_format, cache=cache_bytes)
    builder = Builder([opened], options, out_format, resources)
    _plan_tensors(builder, opened, places, options)
    stored = step_of(opened)
    if stored in places or to_t5x or options.step is not None:
        plan_step(builder, opened, options, out_format, places.get(stored or ""))
    elif stored is not None:
        # T5X had to be given it.
        builder.used.add(stored)
    nodes = builder.nodes()
    if to_t5x:
        # A copy of a copy keeps the first tree: what T5X's index could not tell then it cannot tell now.
        origin = _origin(seen, places, nodes) if origin is None else origin
        origin = None if origin is None else _changed(origin, options)
    elif origin is not None:
        item, nodes = origin.item, _nodes(origin, options)
    own = _record(opened, options, layers)
    record = replace(
        own,
        parameters=_prefix(places, opened.tree),
        made=Converted(
            source_record(opened),
            options.dtype,
            None if layers is None else Scan(layers),
            options.drop,
            options.step,
            _of(own, layers),
        ),
        origin=origin if to_t5x else None,
    )
    notes = [*source.location.notes, *builder.notes, *_notes(source, opened, options, layers, to_t5x=to_t5x), *on_mesh]
    dropped = tuple(name for name in source.leaves if is_dropped(name, options.drop))
    custom = seen.custom
    if layers is not None and SCAN_LAYERS in custom:
        custom = {**custom, SCAN_LAYERS: layers == Scan.SCANNED}
    return builder.plan(record, item, notes, nodes=nodes, dropped=dropped, custom=custom), [seen]


def _plan_tensors(builder: Builder, opened: Opened, places: Mapping[str, Keys], options: Options) -> None:
    """Plans a copy of every tensor but the step; parameters are cast where that is asked for."""
    tree, step = opened.tree, step_of(opened)
    for name, keys in places.items():
        leaf, to = opened.checkpoint.leaves[name], "/".join(key.name for key in keys)
        parameter = tree.parameter_of(name)
        if parameter is not None:
            block = Block(whole(leaf.shape), (Term(0, name, whole(leaf.shape)),))
            layout = Layout(tree.rows[parameter].spec.axes, leaf.shape, options.dtype or leaf.dtype, (block,))
            builder.add(to, layout, like=name, keys=keys)
        elif name != step:
            builder.copy(name, to, axes=slot_axes(name, leaf.shape, tree, tree.shapes), keys=keys)


def _notes(source: Checkpoint, opened: Opened, options: Options, layers: str | None, *, to_t5x: bool) -> Iterator[str]:
    """What is lost on the way, or may be thought to come along."""
    fill = source.record.fill if source.record is not None else Fill()
    if layers is not None and fill.seed is not None and fill.kind is not FillKind.ZEROS:
        yield "noise is laid out by a tensor's shape, which is another now: its seed is forgotten"
    if layers is not None and source.record is not None and source.record.sources:
        yield "what it was fused from has its layers in the other layout: the record names those no more"
    if options.dtype is not None and fill.kind is FillKind.ANTISYMMETRIC:
        yield "antisymmetric noise that is cast cancels only up to rounding"
    if to_t5x and opened.tree is UNKNOWN:
        yield "no tree that fusectl knows: T5X reads what is below target/ and state/"
    yield from notes_on_items(source)


def _opened(checkpoint: Checkpoint, options: Options) -> Opened:
    """The checkpoint as a source; of no known family where nothing that is asked for depends on it."""
    kept = kept_shapes(checkpoint.shapes, options.drop)
    try:
        recognized(checkpoint, options.arch, options.drop)
    # Trees of no family are copied by their names. A dtype, a mesh or a family that was asked for needs to know which
    # tensors are parameters and what their axes are.
    except Incompatible:
        if options.arch is not None or options.dtype is not None or options.mesh is not None:
            raise
        require_chunks(checkpoint, kept)
        return Opened(checkpoint, UNKNOWN, tuple(checkpoint.leaves.keys() - kept.keys()))
    return ready(checkpoint, options.arch, options.drop)


def _places(opened: Opened, origin: Origin | None, naming: Naming | None) -> Mapping[str, Keys]:
    """The keys in the output of every tensor that goes there.

    `naming` is that of parameters in T5X's trees, None for other formats; `origin` is the tree to be restored.
    """
    tree, leaves, step = opened.tree, opened.checkpoint.leaves, step_of(opened)
    places: dict[str, Keys] = {}
    home = _home(tree, origin)
    for name, leaf in leaves.items():
        if name in opened.dropped:
            continue
        parameter = tree.parameter_of(name)
        if naming is not None:
            to = naming.full(parameter) if parameter is not None else T5X_STEP if name == step else name
            places[name] = dict_keys(to)
        elif origin is None:
            places[name] = leaf.keys
        elif (keys := _keys(origin, name)) is not None:
            places[name] = keys
        elif parameter is not None and home is not None:
            before, behind = home
            places[name] = (*before, *dict_keys(parameter), *behind)
        elif name != T5X_STEP:
            places[name] = leaf.keys
    return places


def _home(tree: Recognized, origin: Origin | None) -> tuple[Keys, Keys] | None:
    """The keys before those of every parameter, and behind them, in the tree that is to be restored.

    Parameters whose layers were stacked or not since are not in it by name; they lie where the others do.
    """
    for name in tree.shapes:
        keys = _keys(origin, tree.full(name))
        if keys is not None:
            end = len(keys) if keys[-1].name == name.rsplit("/", 1)[-1] else len(keys) - 1
            return keys[: end - len(dict_keys(name))], keys[end:]
    return None


def _keys(origin: Origin | None, name: str) -> Keys | None:
    found = origin.keys.get(name) if origin is not None else None
    return None if found is None else tuple(Key(*pair) for pair in found)


def _origin(seen: Checkpoint, places: Mapping[str, Keys], nodes: tuple[Node, ...]) -> Origin | None:
    """What T5X's index cannot tell of a tree; None for one that came in that format."""

    def pairs(keys: Keys) -> tuple[tuple[str, int], ...]:
        return tuple((key.name, key.kind) for key in keys)

    if not format_named(seen.format).keeps_tree:
        return None
    there = {"/".join(key.name for key in to): seen.leaves[name] for name, to in places.items()}
    return Origin(
        seen.location.item,
        {name: pairs(leaf.keys) for name, leaf in there.items()},
        tuple((pairs(node.keys), node.value_type, node.text) for node in nodes),
    )


def _changed(origin: Origin, options: Options) -> Origin:
    """The tree to be restored without what is left out here, and with a step if one is set here."""
    keys = {
        name: found
        for name, found in origin.keys.items()
        if not any(is_dropped(each, options.drop) for each in (name, _joined(found)))
    }
    if options.step is not None:
        keys.setdefault(T5X_STEP, (("step", DICT),))
    nodes = tuple(node for node in origin.nodes if not is_dropped(_joined(node[0]), options.drop))
    return replace(origin, keys=keys, nodes=nodes)


def _joined(pairs: tuple[tuple[str, int], ...]) -> str:
    return "/".join(name for name, _ in pairs)


def _nodes(origin: Origin, options: Options) -> tuple[Node, ...]:
    """The nodes without tensors of the tree that is restored."""
    kept = _changed(origin, options).nodes
    return tuple(Node(tuple(Key(*pair) for pair in keys), kind, text) for keys, kind, text in kept)


def _prefix(places: Mapping[str, Keys], tree: Recognized) -> str:
    """The prefix that the parameters have in the output."""
    name = next(iter(tree.shapes), None)
    return "" if name is None else "/".join(key.name for key in places[tree.full(name)]).rpartition(name)[0]


def _record(opened: Opened, options: Options, layers: str | None) -> Record:
    """What the record says of the model: what the source's own does, or that it is no fusion."""
    own = own_record(opened, "convert")
    moves_noise = own.fill.kind is not FillKind.ZEROS and layers is not None
    return replace(
        own,
        fill=replace(own.fill, seed=None) if moves_noise else own.fill,
        optimizer=OnState.DROP if options.optimizer == OnState.DROP and own.optimizer != "none" else own.optimizer,
        step=own.step if options.step is None else options.step,
    )


def _of(own: Record, layers: str | None) -> Original | None:
    """How the source itself was made; of a fusion nothing where its layers stand in the other layout now."""
    # A copy of a copy records how the original was made. A restacked fusion records nothing, since verify would compare
    # its blocks with sources whose layers are stacked differently.
    of = own.made.of if isinstance(own.made, Converted) else own.made
    return None if layers is not None and isinstance(of, Fused) else of
