"""Making a checkpoint deeper: its layers again, or new ones that add nothing, the optimizer's state along."""

from __future__ import annotations

from collections.abc import Iterator

from fusectl.errors import UsageError
from fusectl.families.table import DECODER, ENCODER
from fusectl.formats.tree import Checkpoint
from fusectl.formats.zarr import epsilon
from fusectl.layout.blocks import Layout
from fusectl.operations.one_source import depths_wanted, grown_record, open_one
from fusectl.operations.routes import Larger, Route
from fusectl.optimizer.state import unnamed
from fusectl.planning.builder import Builder
from fusectl.planning.exactness import APPROXIMATE, Exactness, least
from fusectl.planning.notes import notes_on_items, notes_on_mesh
from fusectl.planning.optimizer import plan_deeper_state
from fusectl.planning.options import Options
from fusectl.planning.places import target_of
from fusectl.planning.plan import Plan
from fusectl.planning.records import source_record
from fusectl.planning.step import auxiliary, plan_step
from fusectl.rules.depth import Deepening, deepen
from fusectl.rules.kinds import How
from fusectl.sources.opened import Opened
from fusectl.verbs import Stacked


def plan_stack(
    path: str,
    options: Options,
    *,
    how: str = How.STACK,
    layers: int | None = None,
    encoder_layers: int | None = None,
    decoder_layers: int | None = None,
) -> tuple[Plan, list[Checkpoint]]:
    """The plan that gives each stack of a checkpoint so many `layers`, or its own number, and the opened checkpoint.

    `how` is one of rules.kinds.How. Raises Incompatible where a stack cannot be as deep; UsageError where none
    would be deeper.
    """
    opened = open_one(path, options)
    tree = opened.tree
    depths = depths_wanted(tree, layers, {ENCODER: encoder_layers, DECODER: decoder_layers})
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
    # MaxText stacks its streams of random numbers along with the layers: left at the old depth they would not fit the
    # tree that it restores.
    for name, like, shape, blocks in deepening.streams({name: leaves[name].shape for name in auxiliary(opened)}):
        builder.add(name, Layout(unnamed(shape), shape, leaves[like].dtype, blocks), like=like)
    record = grown_record("stack", opened, builder, options, _stacked(opened, deepening, how), optimizer)
    # Layers that come again are approximate whatever their values: they read a stream that they were not trained on.
    again = [] if how == How.IDENTITY else [Exactness(APPROXIMATE, (f"layers that come again ({how})",))]
    of_source = [*opened.checkpoint.location.notes, *notes_on_items(opened.checkpoint)]
    notes = [*of_source, *builder.notes, *_notes(deepening, how), *on_mesh]
    exactness = least([*again, *_rounding(opened, options)])
    return builder.plan(record, item, notes, exactness=exactness), [opened.checkpoint]


def route(larger: Larger) -> Route:
    """Whether more layers lead to larger sizes, and how."""
    keeps = "the function, exactly (other --how do not); the optimizer's state of the layers that were there"
    if larger.wider:
        return Route(keeps, why_not="widths change, not only the number of layers")
    return Route(keeps, (("stack", {**larger.layer_options, "how": "identity"}),))


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
