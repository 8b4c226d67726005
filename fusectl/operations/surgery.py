"""The library's verbs: plan a fusion or a noise-fill, and carry it out.

    plan, sources = plan_fusion(["a/checkpoint_20", "b/checkpoint_20"], Options(...))
    written = carry_out(plan, sources, output, ...)

Planning opens the sources and reads their metadata, and only to equalize them also their values; carrying out moves the
bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath

import numpy as np

import fusectl
from fusectl.errors import Corrupt, Incompatible, OutputExists, UsageError, counted, shorten
from fusectl.families import Recognized
from fusectl.families.config import read_config
from fusectl.families.naming import Naming
from fusectl.formats import format_named, open_location
from fusectl.formats.locate import T5X_STEP
from fusectl.formats.objects import ObjectPath, Place
from fusectl.formats.record import Fill, Record, mean_weights
from fusectl.formats.servercopy import missing_library
from fusectl.formats.sink import Manner, Sink, names_written
from fusectl.formats.staging import (
    can_be_resumed,
    check_space,
    clear_journal,
    require_replaceable,
    staged,
    staging_of,
    storage_errors,
)
from fusectl.formats.tree import Checkpoint, Location
from fusectl.formats.upload import require_free
from fusectl.formats.zarr import epsilon, np_dtype
from fusectl.operations.equalize import Equalize, residual_scales
from fusectl.optimizer.rates import CLIPPED, in_words, module, rates, table
from fusectl.optimizer.slots import is_state, slot_axes
from fusectl.planning.builder import (
    Builder,
    Options,
    notes_on_items,
    notes_on_mesh,
    plan_auxiliary,
    plan_step,
    source_record,
    target_of,
)
from fusectl.planning.exactness import Exactness, least, of_model, of_tensor
from fusectl.planning.optimizer import plan_state
from fusectl.planning.plan import Plan
from fusectl.rules.fusion import Fusion, check_fill, equal_widths, filled, fused, line_up
from fusectl.sources.kv_heads import expanded, repeats
from fusectl.sources.lineage import for_each, is_told
from fusectl.sources.opened import Opened, open_source
from fusectl.sources.packed_qkv import packed_name
from fusectl.system.lru import Cache
from fusectl.system.threads import Progress, Silent, default_jobs
from fusectl.writing.axis_matrices import Matrices
from fusectl.writing.execute import Work, execute
from fusectl.writing.finished import find_finished
from fusectl.writing.journal import Journal, digest_of, require_same_plan, require_untouched, stamps_of


# Above this, antisymmetric noise loses digits of the kernels that it is taken off from.
LARGE_NOISE_SCALE = 0.5
# Threads, where most of their time is spent on waiting for a server.
REMOTE_JOBS = 16


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
    if equalize is not None and norm != "rule":
        raise UsageError("--equalize: for one norm over all sources; with a norm each there is nothing to equalize")
    kv_repeats = repeats([o.tree for o in opened]) if options.expand_kv else (1,) * len(opened)
    by_place = {(o, times): expanded(o, times) for o, times in zip(opened, kv_repeats, strict=True)}
    opened = [by_place[o, times] for o, times in zip(opened, kv_repeats, strict=True)]
    first = opened[0]
    fusion = line_up([o.tree for o in opened], shares, [o.label for o in opened])
    _require_one_dtype(opened, options)
    _require_state_to_carry(opened, kv_repeats, options)
    fusion = replace(fusion, means_shared=shared_differ(opened, fusion, options))
    check_fill(fusion, options.fill)
    on_mesh = notes_on_mesh(options.mesh, first.tree, {name: fusion.fused_shape(name) for name in first.tree.shapes})
    if equalize is not None:
        fusion = replace(fusion, residual_scales=residual_scales(opened, equalize))
    out_format, item, naming = target_of(first, options)
    builder = Builder(opened, options, out_format)
    for parameter in first.tree.shapes:
        tensors = [o.full(parameter) for o in opened]
        stored = first.checkpoint.leaves[tensors[0]].dtype
        layout = fused(fusion, parameter, options.dtype or stored, options.fill, tensors)
        builder.add(naming.full(parameter), layout, like=tensors[0], noise_name=parameter)
    optimizer, kind = plan_state(builder, opened, fusion, options)
    plan_step(builder, first, options, out_format)
    plan_auxiliary(builder, opened)
    record = Record(
        version=fusectl.__version__,
        command=command,
        family=first.tree.family.name,
        parameters=naming.prefix,
        sources=tuple(source_record(o) for o in opened),
        weights=shares,
        widths=fusion.widths,
        norm_groups=tuple(group for o in opened for group in o.norm_groups),
        fill=options.fill,
        optimizer=optimizer,
        drop=options.drop,
        norm=norm,
        residual_scales=fusion.residual_scales,
        step=options.step,
        network=first.tree.network,
        kv_repeats=kv_repeats,
        means_shared=fusion.means_shared,
        table=first.tree.family.table,
    )
    # Between different models blocks do not move alike.
    found = rates(fusion) if record.self_fused else {}
    notes = [*builder.notes, *_notes_on(opened, options, record), *on_mesh]
    if kind is not None and (words := in_words(found, kind)):
        notes.append(f"at an unchanged rate it moves faster; {kind} goes on as before with {words} (--lr-table FILE)")
        notes.append(f"not so where gradients are {CLIPPED}")
    plan = replace(builder.plan(record, item, notes), rates=found)
    return _with_exactness(plan, naming, fusion, opened), [o.checkpoint for o in opened]


def plan_noise_fill(path: str, options: Options, *, copies: int | None = None) -> tuple[Plan, list[Checkpoint]]:
    """The plan that fills the zero blocks of an already fused checkpoint with noise, and the opened checkpoint.

    Its record says how it was fused; `copies` (of equal width) says it for a checkpoint without one.
    """
    if copies is not None and copies < 2:
        raise UsageError(f"--copies {copies}: a fusion has two or more")
    opened = open_source(path, options.arch, options.drop)
    own = opened.checkpoint.record
    record = own if own is not None and own.fused else _record_for(opened, copies)
    if record.fill.kind != "zeros":
        raise Incompatible(
            f"{opened.label}: filled already with {record.fill.kind} noise of scale {record.fill.noise_scale:g}",
            hint="fill the fusion with zeros instead",
        )
    if copies not in {None, len(record.weights)}:
        raise UsageError(f"--copies {copies}, but {opened.label} is a fusion of {len(record.weights)}")
    _refuse_widening(opened, options)
    fusion = Fusion(opened.tree, record.weights, record.widths, record.residual_scales, record.means_shared)
    check_fill(fusion, options.fill)
    on_mesh = notes_on_mesh(options.mesh, opened.tree, opened.tree.shapes)
    out_format, item, naming = target_of(opened, options)
    builder = Builder([opened], options, out_format)
    for parameter in opened.tree.shapes:
        tensor = opened.full(parameter)
        stored = opened.checkpoint.leaves[tensor].dtype
        layout = filled(fusion, parameter, options.dtype or stored, options.fill, tensor)
        builder.add(naming.full(parameter), layout, like=tensor, noise_name=parameter)
    plan_step(builder, opened, options, out_format)
    for name in opened.checkpoint.leaves:
        if name not in builder.used and name not in opened.dropped:
            axes = slot_axes(name, opened.checkpoint.leaves[name].shape, opened.tree, opened.tree.shapes)
            builder.copy(name, axes=axes)
    kept = any(is_state(output.name) for output in builder.outputs)
    record = replace(
        record,
        version=fusectl.__version__,
        command="noise-fill",
        family=opened.tree.family.name,
        table=opened.tree.family.table,
        fill=options.fill,
        parameters=naming.prefix,
        optimizer=record.optimizer if kept else "drop",
        step=record.step if options.step is None else options.step,
        copy=None,
        growth=None,
        origin=record.origin if out_format.name == "t5x" else None,
        tensors={},
        files={},
    )
    of_items = notes_on_items(opened.checkpoint)
    notes = [*opened.checkpoint.location.notes, *of_items, *builder.notes, *_notes_on_fill(options.fill), *on_mesh]
    return _with_exactness(builder.plan(record, item, notes), naming, fusion, [opened]), [opened.checkpoint]


def _with_exactness(plan: Plan, naming: Naming, fusion: Fusion, opened: Sequence[Opened]) -> Plan:
    """The plan with what each parameter, and all of them, do for the mean of the logits."""
    dtypes = {output.name: output.layout.dtype for output in plan.outputs}
    found: dict[str, Exactness] = {}
    for parameter in fusion.tree.rows:
        name = naming.full(parameter)
        # Of those that are packed again.
        name = name if name in dtypes else packed_name(name)
        stored = [epsilon(o.checkpoint.leaves[o.full(parameter)].dtype) for o in opened]
        dtype = dtypes[name]
        narrowed = epsilon(dtype) > min(stored)
        found[name] = least((found.get(name), of_tensor(fusion, plan.record, parameter, dtype, narrowed=narrowed)))
    outputs = tuple(replace(output, exactness=found.get(output.name)) for output in plan.outputs)
    return replace(plan, outputs=outputs, exactness=of_model(list(found.values()), plan.record))


def carry_out(
    plan: Plan,
    sources: Sequence[Checkpoint],
    output: Place,
    *,
    force: bool = False,
    jobs: int | None = None,
    allow_nonfinite: bool = False,
    sync: bool = True,
    resume: bool = False,
    progress: Progress | None = None,
    check: Callable[[Checkpoint], None] | None = None,
    note: Callable[[str], None] = lambda _: None,
    kept: Callable[[], None] = lambda: None,
) -> Place:
    """Writes the planned checkpoint to `output`, which appears once it is complete and was found as planned.

    With `sync` it is on the disk before it appears. With `resume` an interrupted run of the same plan to the same
    output is gone on with, and an output that such a run has completed is read, each chunk of it, and left as it is.
    `check` is given what was written before it appears; if it raises, nothing does. `note` is told what did not go as
    it was asked for, `kept` is called when the run fails and what it has done is kept to be resumed.

    Raises OutputExists; Incompatible where `resume` finds another plan; NotEnoughSpace and StorageError; Corrupt for a
    source that is, and for an output that was complete and is damaged since, unless `force` has it written anew.
    """
    if allow_nonfinite and plan.record.fill.kind != "zeros":
        raise UsageError("noise is relative to a kernel's deviation, which a NaN or Inf leaves undefined")
    progress, jobs = progress or Silent(), jobs or default_jobs()
    finished = None
    if resume:
        try:
            finished = find_finished(
                plan, sources, output, jobs=jobs, allow_nonfinite=allow_nonfinite, progress=progress
            )
        except Corrupt as error:
            if not force:
                raise
            note(f"{error.message}; it is written anew")
    if finished is not None:
        # Left where a run was killed after its output had appeared.
        clear_journal(output)
        note(f"{output}: complete already, each chunk read and compared")
        if check is not None:
            check(finished)
        return output
    check_output(output, sources, force=force)
    stamps = stamps_of(sources)
    digest = digest_of(plan, stamps, allow_nonfinite=allow_nonfinite)
    left = can_be_resumed(output)
    resume = resume and left
    if resume:
        # Before anything is touched: it belongs to another run, which may still want it.
        require_same_plan(staging_of(output), digest)
        note(f"going on with {staging_of(output)}")
    elif left:
        note(f"starting anew: {staging_of(output)} was left by an interrupted run; --resume would go on with it")
    if isinstance(output, ObjectPath) and plan.passed_bytes and not format_named(plan.format).ocdbt:
        extra = missing_library(output.scheme)
        if extra and any(str(source.location.home).startswith(f"{output.scheme}://") for source in sources):
            note(f"what is taken over goes through this machine; with fusectl[{extra}] it is copied by the store")
    work = Work(
        sources,
        plan.record.fill,
        allow_nonfinite,
        plan.check_sources,
        matrices=Matrices(sources, plan.matrix_bytes),
        mapped=Cache(plan.mapped_bytes),
    )
    manner = Manner(plan.sparse, plan.links, plan.commit_bytes)
    out_format = format_named(plan.format)
    names = names_written((o.keys for o in plan.outputs), out_format, plan.item)
    with staged(output, force=force, sync=sync, resume=resume, names=names, kept=kept, note=note) as staging:
        if not resume and isinstance(output, Path):
            check_space(output, plan.nonzero_bytes - plan.passed_bytes * plan.links)
        with Journal(staging, digest, names=list(names), resume=resume) as journal:
            if resume:
                note(f"{counted(len(journal), 'chunk')} said to be there; each is read and compared with its checksum")
            sink = Sink(staging.home, output, out_format, plan.item, manner, resumed=resume, guard=staging.guard)
            if any(isinstance(place, ObjectPath) for place in (output, *(s.location.home for s in sources))):
                jobs = max(jobs, REMOTE_JOBS)
            sums = execute(plan, work, sink, jobs=jobs, progress=progress, journal=journal)
        require_untouched(stamps)
        sink.finish(replace(plan.record, tensors=sums), plan.nodes, plan.custom)
        written = open_location(sink.location)
        _check_written(plan, written)
        staging.require_whole = partial(_require_whole, sink.location)
        if check is not None:
            check(written)
        if sink.not_linked:
            note(
                f"{counted(sink.not_linked, 'chunk')} copied instead of linked: another layout, or another file system"
            )
    return output


def default_output(sources: Sequence[Checkpoint], plan: Plan) -> Place:
    """A sibling of the first source whose name says what it is: 20 becomes 20.fused-2x.

    checkpoint_20 becomes checkpoint_20.fused-2x/checkpoint_20: T5X restores only from directories of such names.
    """
    home = sources[0].location.home
    stem, suffix = (home.stem, ".ckpt") if home.suffix == ".ckpt" else (home.name, "")
    fill = plan.record.fill
    noisy = fill.kind != "zeros" and plan.record.copy is None
    noise = f".{fill.kind}-{fill.noise_scale:g}" if noisy else ""
    fused_name = {
        "fuse": f".fused-{len(sources)}x",
        "self-fuse": f".self-fused-{len(sources)}x",
        "stack": ".stacked",
        "ligo": ".ligo",
        "convert": ".converted" if plan.format == sources[0].format else f".{plan.format}",
    }.get(plan.record.command, "")
    renamed = home.with_name(f"{stem}{fused_name}{noise}{suffix}")
    return renamed / home.name if T5X_STEP.fullmatch(home.name) else renamed


def check_table(plan: Plan, to: Path, *, force: bool, resume: bool) -> None:
    """Raises OutputExists for a file in the table's place, unless it may be replaced, or a run that is resumed has left
    it: the table of this very plan.
    """
    with storage_errors(to):
        if not os.path.lexists(to) or (force and to.is_file()):
            return
        text = _table(plan, to).encode()
        if not (resume and to.is_file() and to.stat().st_size == len(text) and to.read_bytes() == text):
            raise OutputExists(f"{to}: exists", hint="another file, or --force to replace it")


def write_table(plan: Plan, to: Path, *, force: bool = False, resume: bool = False) -> None:
    """Writes the learning rates that continue the trajectory, as a module for *.py, else as JSON.

    Raises OutputExists as `check_table` does.
    """
    check_table(plan, to, force=force, resume=resume)
    with storage_errors(to):
        to.write_text(_table(plan, to))


def _table(plan: Plan, to: Path) -> str:
    return module(plan.rates) if to.suffix == ".py" else json.dumps(table(plan.rates), indent=1) + "\n"


def check_output(output: Place, sources: Sequence[Checkpoint], *, force: bool) -> None:
    """Raises OutputExists when the output is, contains, or lies inside a source, or exists and may not be replaced."""
    with storage_errors(output):
        real = _real(output)
        for source in sources:
            home = _real(source.location.home)
            if real == home or home in real.parents or real in home.parents:
                relation = "is" if real == home else "lies inside" if home in real.parents else "contains"
                raise OutputExists(f"{output}: {relation} the source {source.path}", hint="choose another -o")
        if isinstance(output, ObjectPath):
            require_free(output.anew())
            return
        if not os.path.lexists(output):
            return
        if not force:
            raise OutputExists(f"{output}: exists", hint="choose another -o, or --force to replace it")
        require_replaceable(output)


def _real(at: Place) -> PurePath:
    """The place without symbolic links; of one in a bucket what compares like a path."""
    return Path(os.path.realpath(at)) if isinstance(at, Path) else PurePath(at.scheme, at.bucket, at.key)


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


def norm_of(opened: Sequence[Opened], options: Options) -> str:
    """The norm that the fusion is to be trained with: as the options say, else a norm per source if a source has it."""
    return options.norm or ("property" if any(o.trains_in_groups for o in opened) else "rule")


def _require_state_to_carry(opened: Sequence[Opened], kv_repeats: Sequence[int], options: Options) -> None:
    """Raises Incompatible where the moments of repeated kv heads would have to be known."""
    if set(kv_repeats) == {1} or options.optimizer in {"reset", "drop"}:
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
    if fill.kind == "antisymmetric" and fill.noise_scale > LARGE_NOISE_SCALE:
        return ["so much noise cancels only up to rounding, which grows with every layer: verify says how far"]
    return []


def _notes_on(opened: Sequence[Opened], options: Options, record: Record) -> list[str]:
    notes = [note for o in dict.fromkeys(opened) for note in o.checkpoint.location.notes]
    notes += notes_on_items(opened[0].checkpoint)
    steps = [o.checkpoint.step for o in opened]
    if len(set(steps)) > 1:
        notes.append(f"the sources are at steps {', '.join(map(str, steps))}; the output keeps {steps[0]}")
    if record.self_fused and options.fill.kind == "zeros":
        notes.append(
            "zeros keep the copies equal until dropout parts them, or float32's rounding after some ten steps "
            "(Adafactor: defect 2e-8 at step 2, 1.9e-3 at 13, 3e-2 at 60); --fill antisymmetric parts them at once"
        )
    if any(o.tree.family.norms_in_groups and not is_told(o.checkpoint.record) for o in opened):
        notes.append("sources without a fusion's fusectl.json are taken for models with one norm (--fused-from)")
    if record.norm == "rule" and any(o.trains_in_groups for o in opened):
        notes.append("a source has a norm per source of its own: with one norm the result computes another function")
    if not record.self_fused and options.fill.kind == "antisymmetric":
        notes.append("antisymmetric noise cancels between equal copies only; these sources' function changes")
    if record.norm == "property":
        groups = ", ".join(map(str, record.norm_groups))
        network = "t5_flax" if opened[0].tree.family.trainer == "t5x" else "decoder_flax"
        notes.append(f"to be trained with a norm per source: fusectl.families.{network}, norm_groups = ({groups})")
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
    if tree.family.trainer == "t5x":
        return ""
    # What gemma's configs tell; MaxText's tell more.
    settings = {"attending": "rotary positions and windows", "attention_soft_cap": "soft caps"}
    if tree.family.trainer == "maxtext":
        settings |= {"norm_epsilon": "epsilon", "activation": "the activation"}
    if alone:
        settings.clear()
    if tree.family.trainer == "maxtext" and tree.family.tied:
        settings["tied_logits_power"] = "normalize_embedding_logits"
    return ", ".join(words for setting, words in settings.items() if setting not in tree.network.told)


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
        sources=(),
        weights=(1.0 / copies,) * copies,
        widths=widths,
        norm_groups=widths["embed"],
        fill=Fill(),
        optimizer="kept",
        network=opened.tree.network,
    )


def _require_whole(location: Location) -> None:
    """Raises Corrupt where a file of what has been written is gone again: nobody has read it since."""
    written = open_location(location)
    lost = [*(chunk for name in written.leaves for chunk in written.missing_chunks(name)), *written.files.lost()]
    if lost:
        raise Corrupt(
            f"{written.path}: {counted(len(lost), 'file')} gone that had been written",
            details=shorten(lost, 5),
            hint="run it again when nobody deletes there",
        )


def _check_written(plan: Plan, written: Checkpoint) -> None:
    """Raises Corrupt unless the output, opened anew, has exactly the planned tensors."""
    planned: Mapping[str, tuple[tuple[int, ...], str]] = {
        o.name: (o.layout.shape, o.layout.dtype) for o in plan.outputs
    }
    found = {name: (leaf.shape, leaf.dtype) for name, leaf in written.leaves.items()}
    wrong = sorted(name for name in planned.keys() | found.keys() if planned.get(name) != found.get(name))
    if wrong:
        raise Corrupt(f"{written.path}: written, but not as planned", details=shorten(wrong, 5))
