"""Growing a checkpoint by a linear operator (LiGO, ICLR 2023): where it starts, and applying it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fusectl.errors import UsageError
from fusectl.families.kinds import Norm
from fusectl.formats.opening import fingerprint
from fusectl.formats.tree import Checkpoint
from fusectl.layout.fill import Fill
from fusectl.operations.one_source import depths_wanted, grown_record, open_one
from fusectl.operations.routes import Larger, Route
from fusectl.operations.target import WORDS
from fusectl.optimizer.kinds import OnState
from fusectl.optimizer.state import is_state
from fusectl.planning.builder import Builder
from fusectl.planning.exactness import APPROXIMATE, Exactness
from fusectl.planning.notes import notes_on_items, notes_on_mesh
from fusectl.planning.optimizer import DROPPED
from fusectl.planning.options import Options
from fusectl.planning.places import target_of
from fusectl.planning.plan import Plan
from fusectl.planning.records import source_record
from fusectl.planning.resources import resources_of
from fusectl.planning.step import auxiliary, plan_step
from fusectl.rules.fusion import widths_of
from fusectl.rules.linear import Application, Growing, growing_to
from fusectl.sources.opened import Opened
from fusectl.sources.operator import Kept, Operator, initial
from fusectl.verbs import Mapped


# Matrices that are kept in memory: those of two kernels' sides.
MATRICES = 4


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
    opened = open_one(path, options)
    wanted = {axis: n for axis, n in sizes.items() if n is not None}
    growing = growing_to(opened.tree, wanted, depths_wanted(opened.tree, layers, of_stack), tie, opened.label)
    if not growing.shapes():
        raise UsageError(f"{opened.label}: it is as large as that already", hint="--emb, --heads, --mlp, --layers")
    return growing, opened, initial(growing, init, seed)


def plan_with_operator(path: str, operator: Kept, options: Options) -> tuple[Plan, list[Checkpoint]]:
    """The plan that applies a growth operator to a checkpoint, and both opened: the checkpoint, and the operator's.

    The optimizer's state stays behind: a linear map of parameters says nothing of their moments. Raises Incompatible
    for a model that the operator is not for.
    """
    # Rows with a single entry would map moments exactly, by the inverse matrices. Learned rows have several, whose
    # second moments do not follow from the small model's.
    options = replace(options, optimizer=OnState.DROP)
    opened = open_one(path, options)
    growing = operator.growing(opened.tree, opened.label)
    grown, application = growing.grown, Application(growing, operator.depth)
    on_mesh = notes_on_mesh(options.mesh, grown, grown.shapes)
    out_format, item, naming = target_of(opened, options)
    # For the matrices of a layer, both as they are and inverted.
    matrix_bytes = min(options.max_memory_bytes // 4, 8 * MATRICES * _largest(growing))
    mapped_bytes = options.max_memory_bytes // 4
    resources = resources_of(options.max_memory_bytes, out_format, matrices=matrix_bytes, mapped=mapped_bytes)
    builder = Builder([opened], options, out_format, resources)
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
        grown_record("ligo", opened, builder, options, made, OnState.DROP if with_state else "none"),
        # One model of one width, whatever the small one was made of.
        weights=(1.0,),
        widths=widths,
        norm=Norm.RULE,
        norm_groups=widths["embed"],
        fill=Fill(),
        residual_scales=(),
        kv_repeats=(),
        factor_in=grown.family.factor_in,
    )
    because = f"a linear operator has made it ({operator.how}): its loss is for verify to tell"
    exactness = Exactness() if operator.keeps_function else Exactness(APPROXIMATE, (because,))
    notes = [*opened.checkpoint.location.notes, *notes_on_items(opened.checkpoint), *builder.notes, *on_mesh]
    plan = builder.plan(record, item, notes, exactness=exactness)
    return plan, [opened.checkpoint, *([] if own is None else [own])]


def _largest(growing: Growing) -> int:
    """The elements of the operator's largest matrix, as it is applied: its features counted."""
    sizes = growing.grown.sizes
    pairs = [(n, growing.tree.sizes[axis]) for axis, n in sizes.items() if axis in growing.tree.family.grown]
    return max((large * small for large, small in pairs), default=0)


def route_without_data(larger: Larger) -> Route:
    """How the operator leads to larger sizes that keeps the function."""
    keeps = (
        "the function, exactly; copies of a unit stay equal until dropout, noise or rounding tells them apart; no state"
    )
    return Route(keeps, (("ligo", {**_sizes(larger), "steps": 0}),))


def route_with_data(larger: Larger) -> Route:
    """How an operator leads to larger sizes that is learned."""
    keeps = "neither function nor state; it starts from the small model's loss and learns from there"
    return Route(keeps, (("ligo", _sizes(larger)),), data="data")


def _sizes(larger: Larger) -> dict[str, int | str]:
    """The options that say how large."""
    tree, grown = larger.tree, larger.grown
    sizes = {
        word: grown.sizes[axis]
        for word, axis in WORDS.items()
        if axis in tree.family.grown and tree.sizes.get(axis) != grown.sizes.get(axis)
    }
    return {**sizes, **larger.layer_options}
