"""Planning a fusion, and the noise that fills one.

    plan, sources = plan_fusion(["a/checkpoint_20", "b/checkpoint_20"], Options(...))
    written = carry_out(plan, sources, output, ...)

Planning opens the sources and reads their metadata, and only to equalize them also their values; writing/ carries out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

import fusectl
from fusectl.errors import Incompatible, UsageError, shorten
from fusectl.families.config import read_config
from fusectl.families.kinds import Norm
from fusectl.families.recognized import Recognized
from fusectl.families.settings import TIED_LOGITS
from fusectl.formats.record import Record, mean_weights
from fusectl.formats.tree import Checkpoint
from fusectl.formats.zarr import epsilon
from fusectl.layout.fill import FillKind
from fusectl.operations.equalize import Equalize, residual_scales
from fusectl.operations.routes import Larger, Route, Step
from fusectl.optimizer.kinds import OnState
from fusectl.optimizer.rates import CLIPPED, in_words, rates
from fusectl.optimizer.state import is_state
from fusectl.planning.builder import Builder
from fusectl.planning.exactness import Exactness, of_model, of_tensor
from fusectl.planning.notes import notes_on_items, notes_on_mesh
from fusectl.planning.optimizer import plan_state
from fusectl.planning.options import Options
from fusectl.planning.places import target_of
from fusectl.planning.plan import Plan
from fusectl.planning.records import source_record
from fusectl.planning.step import plan_auxiliary, plan_step
from fusectl.rules.fusion import Fusion, check_fill, fused, line_up
from fusectl.sources.kv_heads import expanded, repeats
from fusectl.sources.lineage import for_each, is_told
from fusectl.sources.opened import Opened, open_source
from fusectl.verbs import Fused


def plan_fusion(
    paths: Sequence[str],
    options: Options,
    *,
    weights: Sequence[float] | None = None,
    equalize: Equalize | None = None,
    command: str = "fuse",
) -> tuple[Plan, list[Checkpoint]]:
    """The plan that fuses K >= 2 checkpoints block-diagonally, and the opened sources.

    The same path K times is self-fusion. `weights` are those of the mean of the logits, 1/K each by default. `equalize`
    measures the sources' residual streams, which reads them, and has all but the first one rescaled.
    """
    if len(paths) < 2:
        raise UsageError("fusing takes two checkpoints or more", hint="fusectl self-fuse CKPT --copies 2 for one")
    shares = mean_weights(weights, len(paths))
    opened = open_sources(paths, options)
    norm = norm_of(opened, options)
    options = replace(options, norm=norm)
    if equalize is not None and norm != Norm.RULE:
        raise UsageError("--equalize: for one norm over all sources; with a norm each there is nothing to equalize")
    kv_repeats = repeats([o.tree for o in opened]) if options.expand_kv else (1,) * len(opened)
    # Copies of one source stay one object: the executor reads what is the same object once.
    by_place = {(o, times): expanded(o, times) for o, times in zip(opened, kv_repeats, strict=True)}
    opened = [by_place[o, times] for o, times in zip(opened, kv_repeats, strict=True)]
    first = opened[0]
    # Of the checks here those of names, shapes and dtypes come first, then the few tensors that do not grow, and last,
    # for --equalize, whole models; the optimizer's follow where its slots are planned.
    fusion = line_up([o.tree for o in opened], shares, [o.label for o in opened], options.factor_in)
    _require_one_dtype(opened, options)
    _require_state_to_carry(opened, kv_repeats, options)
    fusion = replace(fusion, means_shared=shared_differ(opened, fusion, options))
    check_fill(fusion, options.fill)
    on_mesh = notes_on_mesh(options.mesh, first.tree, {name: fusion.fused_shape(name) for name in first.tree.shapes})
    if equalize is not None:
        fusion = replace(fusion, residual_scales=residual_scales(opened, equalize))
    out_format, item, naming = target_of(first, options)
    record = Record(
        version=fusectl.__version__,
        command=command,
        family=first.tree.family.name,
        parameters=naming.prefix,
        made=Fused(tuple(source_record(o) for o in opened)),
        weights=shares,
        widths=fusion.widths,
        norm_groups=tuple(group for o in opened for group in o.norm_groups),
        fill=options.fill,
        drop=options.drop,
        norm=norm,
        residual_scales=fusion.residual_scales,
        step=options.step,
        network=first.tree.network,
        kv_repeats=kv_repeats,
        means_shared=fusion.means_shared,
        factor_in=fusion.factor_in,
        table=first.tree.family.table,
    )
    builder = Builder(opened, options, out_format)
    for parameter in first.tree.shapes:
        tensors = [o.full(parameter) for o in opened]
        stored = first.checkpoint.leaves[tensors[0]].dtype
        layout = fused(fusion, parameter, options.dtype or stored, options.fill, tensors)
        exact = exactness_in(fusion, record, parameter, layout.dtype, opened)
        builder.add(naming.full(parameter), layout, like=tensors[0], noise_name=parameter, exactness=exact)
    optimizer, state = plan_state(builder, opened, fusion, options)
    plan_step(builder, first, options, out_format)
    plan_auxiliary(builder, opened)
    # Between different models blocks do not move alike.
    found = rates(fusion) if record.self_fused else {}
    notes = [*builder.notes, *_notes_on(opened, options, record), *on_mesh]
    if words := in_words(found, state.steps):
        notes.append(
            f"at an unchanged rate it moves faster; {state.kind} goes on as before with {words} (--lr-table FILE)"
        )
        notes.append(f"not so where gradients are {CLIPPED}")
    record = replace(record, optimizer=optimizer)
    plan = builder.plan(record, item, notes, exactness=of_model(builder.exactness, record), rates=found)
    return plan, [o.checkpoint for o in opened]


def plan_self_fusion(path: str, options: Options, *, copies: int = 2) -> tuple[Plan, list[Checkpoint]]:
    """The plan that fuses a checkpoint with itself, and the opened checkpoint, as often as it is a source."""
    return plan_fusion([path] * copies, options, command="self-fuse")


def route(larger: Larger) -> Route:
    """Whether self-fusion leads to larger sizes, and how."""
    copies = min(larger.ratios.values())
    keeps = "the function, exactly; the optimizer's state, exactly"
    if set(larger.ratios.values()) != {copies} or copies < 2 or copies % 1:
        said = ", ".join(f"{axis} x {ratio:g}" for axis, ratio in larger.ratios.items())
        return Route(keeps, why_not=f"all widths have to be the same whole number of times larger: {said}")
    step: Step = ("self-fuse", {"copies": int(copies), "fill": "antisymmetric"})
    if not larger.deeper:
        return Route(keeps, (step,))
    stacked: Step = ("stack", {**larger.layer_options, "how": "identity"})
    return Route(f"{keeps}; new layers add nothing at first", (step, stacked))


def exactness_in(fusion: Fusion, record: Record, parameter: str, dtype: str, opened: Sequence[Opened]) -> Exactness:
    """What a parameter, stored in a dtype, does for the mean of the logits."""
    stored = [epsilon(o.checkpoint.leaves[o.full(parameter)].dtype) for o in opened]
    return of_tensor(fusion, record, parameter, dtype, narrowed=epsilon(dtype) > min(stored))


def open_sources(paths: Sequence[str], options: Options) -> list[Opened]:
    """The sources, one that is named several times opened once, with the configs that tell of them."""
    configs = [read_config(path) for path in options.configs]
    if len(configs) > 1 and len(configs) != len(paths):
        raise UsageError(
            f"{len(configs)} configs for {len(paths)} sources", hint="one for all of them, or one for each"
        )
    each = [*configs, *[configs[0] if configs else None] * (len(paths) - len(configs))]
    keys = list(zip(paths, each, for_each(options.lineages, len(paths)), strict=True))
    found = {
        (path, config, lineage): open_source(path, options.arch, options.drop, config, lineage)
        for path, config, lineage in dict.fromkeys(keys)
    }
    return [found[key] for key in keys]


def norm_of(opened: Sequence[Opened], options: Options) -> Norm:
    """The norm that the fusion is to be trained with: as the options say, else a norm per source if a source has it."""
    return options.norm or (Norm.PROPERTY if any(o.trains_in_groups for o in opened) else Norm.RULE)


def _require_state_to_carry(opened: Sequence[Opened], kv_repeats: Sequence[int], options: Options) -> None:
    """Raises Incompatible where the moments of repeated kv heads would have to be known."""
    # The gradients of twins add up to the one of the head that they repeat; how it splits between them depends on
    # queries that no optimizer state keeps.
    if set(kv_repeats) == {1} or options.optimizer in {OnState.RESET, OnState.DROP}:
        return
    if any(is_state(name) and name not in o.dropped for o in opened for name in o.checkpoint.leaves):
        raise Incompatible(
            "kv heads are repeated, and the moments of each of the twins are not known",
            hint="--optimizer reset, or --optimizer drop",
        )


def shared_differ(opened: Sequence[Opened], fusion: Fusion, options: Options) -> bool:
    """Whether sources differ in a tensor that does not grow, of which a fused model has one for all of them.

    Raises Incompatible where they do and nobody has said that the mean will do.
    """
    distinct = list(dict.fromkeys(opened))
    shared = [name for name in fusion.tree.shapes if fusion.is_shared(name)]
    differ = [
        f"{name}: {first.label} and {other.label}, by up to {off:.3g}"
        for first, *others in [distinct]
        for other in others
        for name in shared
        if (off := _furthest(first, other, name))
    ]
    if differ and not options.mean_shared:
        raise Incompatible(
            "a parameter that all heads share, and that is different in the sources",
            details=shorten(differ),
            hint="--mean-shared takes the mean, which is approximate; a model fused with itself has one of them only",
        )
    return bool(differ)


def _furthest(one: Opened, other: Opened, name: str) -> float:
    """How far apart two sources' values of a tensor are, at most."""
    a, b = (each.checkpoint.read(each.full(name)).astype(np.float64) for each in (one, other))
    off = np.abs(a - b)
    return math.inf if np.isnan(off).any() else float(off.max(initial=0.0))


def _require_one_dtype(opened: Sequence[Opened], options: Options) -> None:
    """Raises Incompatible when a source would be cast without anybody having asked for it."""
    if options.dtype is not None:
        return
    first = opened[0]
    differences = [
        f"{name}: {dtype} in {first.label}, {other} in {o.label}"
        for name in first.tree.shapes
        for dtype in [first.checkpoint.leaves[first.full(name)].dtype]
        for o in opened[1:]
        if (other := o.checkpoint.leaves[o.full(name)].dtype) != dtype
    ]
    if differences:
        raise Incompatible(
            "sources of different dtypes", details=shorten(differences), hint="--dtype float32 casts all of them"
        )


def _notes_on(opened: Sequence[Opened], options: Options, record: Record) -> list[str]:
    notes = [note for o in dict.fromkeys(opened) for note in o.checkpoint.location.notes]
    notes += notes_on_items(opened[0].checkpoint)
    steps = [o.checkpoint.step for o in opened]
    if len(set(steps)) > 1:
        notes.append(f"the sources are at steps {', '.join(map(str, steps))}; the output keeps {steps[0]}")
    if record.self_fused and options.fill.kind is FillKind.ZEROS:
        notes.append(
            "zeros keep the copies equal until dropout parts them, or float32's rounding after some ten steps "
            "(Adafactor: defect 2e-8 at step 2, 1.9e-3 at 13, 3e-2 at 60); --fill antisymmetric parts them at once"
        )
    if any(o.tree.family.norms_in_groups and not is_told(o.checkpoint.record) for o in opened):
        notes.append("sources without a fusion's fusectl.json are taken for models with one norm (--fused-from)")
    if record.norm == Norm.RULE and any(o.trains_in_groups for o in opened):
        notes.append("a source has a norm per source of its own: with one norm the result computes another function")
    if not record.self_fused and options.fill.kind is FillKind.ANTISYMMETRIC:
        notes.append("antisymmetric noise cancels between equal copies only; these sources' function changes")
    if record.norm == Norm.PROPERTY:
        groups = ", ".join(map(str, record.norm_groups))
        network = opened[0].tree.family.norm_group_network
        notes.append(f"to be trained with a norm per source: fusectl.networks.{network}, norm_groups = ({groups})")
    elif not record.self_fused:
        notes.append(
            "with a norm per source this is the mean of the logits; the trainer's one deviates: verify says how far"
        )
    if record.means_shared:
        notes.append("scales that all heads share differ, and become their mean: approximate, verify says how far")
    if not record.self_fused and record.network.logits_soft_cap is not None:
        notes.append("the logits are capped behind their mean: approximate, verify says how far")
    untold = _untold(opened[0].tree, alone=record.self_fused)
    if untold:
        notes.append(f"no checkpoint tells {untold}: taken as the family has it by default; --config FILE tells")
    if any(scale != 1.0 for scale in record.residual_scales):
        scales = ", ".join(f"{scale:.6g}" for scale in record.residual_scales)
        notes.append(f"the sources' residual streams are multiplied with {scales}")
    return notes


def _untold(tree: Recognized, *, alone: bool) -> str:
    """What of a decoder's network nobody has told and the fusion depends on, in words.

    A model that is fused with itself, `alone`, need not agree with another one.
    """
    settings = tree.family.untold_settings
    return ", ".join(
        words
        for setting, words in settings.items()
        if setting not in tree.network.told and (not alone or setting == TIED_LOGITS)
    )
