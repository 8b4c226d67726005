"""Growing one checkpoint otherwise than by fusing it: plans of copies, carried out like any other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from fusectl.builder import (
    Builder,
    Options,
    notes_on_mesh,
    own_record,
    plan_auxiliary,
    plan_step,
    source_record,
    target_of,
)
from fusectl.errors import UsageError
from fusectl.exactness import APPROXIMATE, Exactness
from fusectl.formats.tree import Checkpoint
from fusectl.plan import Plan
from fusectl.record import Growth
from fusectl.sources import Opened, open_source
from fusectl.state import plan_deeper_state
from fusectl.transforms.depth import Deepening, deepen


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
    plan_auxiliary(builder, opened)
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
        origin=own.origin if out_format.name == "t5x" else None,
    )
    kept = Exactness() if how == "identity" else Exactness(APPROXIMATE, (f"layers that come again ({how})",))
    notes = [*opened.checkpoint.location.notes, *builder.notes, *_notes(deepening, how), *on_mesh]
    return replace(builder.plan(record, item, notes), exactness=kept), [opened.checkpoint]


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
