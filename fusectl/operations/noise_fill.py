"""Filling the zero blocks of a fusion with noise."""

from __future__ import annotations

from dataclasses import replace

import fusectl
from fusectl.errors import Incompatible, UsageError
from fusectl.formats.record import Record
from fusectl.formats.tree import Checkpoint
from fusectl.formats.zarr import np_dtype
from fusectl.layout.fill import Fill, FillKind
from fusectl.operations.fuse import exactness_in
from fusectl.optimizer.kinds import OnState
from fusectl.optimizer.state import is_state, slot_axes
from fusectl.planning.builder import Builder
from fusectl.planning.exactness import of_model
from fusectl.planning.notes import notes_on_items, notes_on_mesh
from fusectl.planning.options import Options
from fusectl.planning.places import target_of
from fusectl.planning.plan import Plan
from fusectl.planning.step import plan_step
from fusectl.rules.fusion import Fusion, check_fill, equal_widths, filled
from fusectl.sources.opened import Opened, open_source
from fusectl.verbs import Fused


# Above this, antisymmetric noise loses digits of the kernels that it is taken off from.
LARGE_NOISE_SCALE = 0.5


def plan_noise_fill(path: str, options: Options, *, copies: int | None = None) -> tuple[Plan, list[Checkpoint]]:
    """The plan that fills the zero blocks of an already fused checkpoint with noise, and the opened checkpoint.

    Its record says how it was fused; `copies` (of equal width) says it for a checkpoint without one.
    """
    if copies is not None and copies < 2:
        raise UsageError(f"--copies {copies}: a fusion has two or more")
    if options.fill.kind is FillKind.ZEROS:
        raise UsageError("--fill zeros: there are zeros already", hint="--fill gaussian or antisymmetric")
    opened = open_source(path, options.arch, options.drop)
    own = opened.checkpoint.record
    record = own if own is not None and own.fused else _record_for(opened, copies)
    # A record of noise is enough to refuse; zeros that have been trained since are found when the blocks are read.
    if record.fill.kind is not FillKind.ZEROS:
        raise Incompatible(
            f"{opened.label}: filled already with {record.fill.kind} noise of scale {record.fill.noise_scale:g}",
            hint="fill the fusion with zeros instead",
        )
    if copies not in {None, len(record.weights)}:
        raise UsageError(f"--copies {copies}, but {opened.label} is a fusion of {len(record.weights)}")
    _refuse_widening(opened, options)
    fusion = Fusion(
        opened.tree,
        record.weights,
        record.widths,
        record.residual_scales,
        factor_in=record.factor_in,
        means_shared=record.means_shared,
    )
    check_fill(fusion, options.fill)
    on_mesh = notes_on_mesh(options.mesh, opened.tree, opened.tree.shapes)
    out_format, item, naming = target_of(opened, options)
    record = replace(
        record,
        version=fusectl.__version__,
        command="noise-fill",
        family=opened.tree.family.name,
        table=opened.tree.family.table,
        fill=options.fill,
        parameters=naming.prefix,
        step=record.step if options.step is None else options.step,
        made=Fused(record.sources),
        origin=None if out_format.keeps_tree else record.origin,
        tensors={},
        files={},
    )
    builder = Builder([opened], options, out_format)
    for parameter in opened.tree.shapes:
        tensor = opened.full(parameter)
        stored = opened.checkpoint.leaves[tensor].dtype
        # The noise is that of --fill at once, bit for bit, unless a cast lies between: both measure the kernel as it is
        # stored in the output.
        layout = filled(fusion, parameter, options.dtype or stored, options.fill, tensor)
        exact = exactness_in(fusion, record, parameter, layout.dtype, [opened])
        builder.add(naming.full(parameter), layout, like=tensor, noise_name=parameter, exactness=exact)
    plan_step(builder, opened, options, out_format)
    # The optimizer's state stays as it is: its moments are those of gradients so far, which noise does not change.
    for name in opened.checkpoint.leaves:
        if name not in builder.used and name not in opened.dropped:
            axes = slot_axes(name, opened.checkpoint.leaves[name].shape, opened.tree, opened.tree.shapes)
            builder.copy(name, axes=axes)
    kept = any(is_state(output.name) for output in builder.outputs)
    record = replace(record, optimizer=record.optimizer if kept else OnState.DROP)
    of_items = notes_on_items(opened.checkpoint)
    notes = [*opened.checkpoint.location.notes, *of_items, *builder.notes, *_notes_on_fill(options.fill), *on_mesh]
    plan = builder.plan(record, item, notes, exactness=of_model(builder.exactness, record))
    return plan, [opened.checkpoint]


def _refuse_widening(opened: Opened, options: Options) -> None:
    """Raises Incompatible when a fusion would be cast to a wider dtype: no wider source stands behind its values."""
    if options.dtype is None:
        return
    dtypes = {opened.checkpoint.leaves[opened.full(name)].dtype for name in opened.tree.shapes}
    narrower = [dtype for dtype in sorted(dtypes) if np_dtype(dtype).itemsize < np_dtype(options.dtype).itemsize]
    if narrower:
        raise Incompatible(
            f"{opened.label}: {narrower[0]} cast to {options.dtype}, which its sources may hold and it does not",
            hint=f"fuse with --dtype {options.dtype} and --fill at once",
        )


def _notes_on_fill(fill: Fill) -> list[str]:
    if fill.kind is FillKind.ANTISYMMETRIC and fill.noise_scale > LARGE_NOISE_SCALE:
        return ["so much noise cancels only up to rounding, which grows with every layer: verify says how far"]
    return []


def _record_for(opened: Opened, copies: int | None) -> Record:
    """What fusectl.json would say of a checkpoint that was fused elsewhere from `copies` models of equal width."""
    if copies is None:
        raise UsageError(
            f"{opened.label}: no fusectl.json that says how it was fused", hint="--copies K for K equal widths"
        )
    widths = equal_widths(opened.tree, copies, opened.label)
    return Record(
        version=fusectl.__version__,
        command="noise-fill",
        family=opened.tree.family.name,
        parameters=opened.tree.naming.prefix,
        made=Fused(),
        weights=(1.0 / copies,) * copies,
        widths=widths,
        factor_in=opened.tree.family.factor_in,
        norm_groups=widths["embed"],
        network=opened.tree.network,
    )
