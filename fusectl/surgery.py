"""The library's verbs: plan a fusion or a noise-fill, and carry it out.

    plan, sources = plan_fusion(["a/checkpoint_20", "b/checkpoint_20"], Options(...))
    written = carry_out(plan, sources, output, ...)

Planning opens the sources and reads their metadata, and only to equalize them also their values; carrying out moves the
bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

import fusectl
from fusectl.archs import Recognized
from fusectl.chunks import CODECS, Storing
from fusectl.equalize import Equalize, residual_scales
from fusectl.errors import Corrupt, FusectlError, Incompatible, OutputExists, UsageError, counted, shorten
from fusectl.execute import Work, execute
from fusectl.formats import Format, fingerprint, format_named, open_checkpoint, open_location
from fusectl.formats.locate import is_checkpoint
from fusectl.formats.objects import ObjectPath, Place
from fusectl.formats.servercopy import missing_library
from fusectl.formats.sink import Manner, Sink, names_written
from fusectl.formats.staging import can_be_resumed, check_space, clear_journal, staged, staging_of, storage_errors
from fusectl.formats.t5x import kept_in_index
from fusectl.formats.tree import STEPS, T5X_STEP, Checkpoint, EmptyNode, Key, dict_keys, is_dropped
from fusectl.formats.upload import require_free
from fusectl.formats.zarr import np_dtype
from fusectl.journal import Journal, digest_of, require_same_plan
from fusectl.layout import Block, Layout, Product, Term, whole
from fusectl.mesh import Mesh
from fusectl.parallel import Progress, Silent, default_jobs, default_max_memory_bytes
from fusectl.plan import Output, Plan
from fusectl.record import LEFT_OUT, NORMS, Fill, Record, SourceRecord, mean_weights
from fusectl.sources import Opened, open_source
from fusectl.transforms.carry import Carry, same_models
from fusectl.transforms.grow import Fusion, check_fill, equal_widths, filled, fused, line_up
from fusectl.transforms.optimizer import (
    FIRST_MOMENTS,
    STATE,
    OptimizerState,
    factored_axes,
    find_state,
    fresh_slots,
    slot_axes,
    unnamed,
)
from fusectl.transforms.rates import in_words, rates, table


OPTIMIZERS = ("carry", "reset", "drop", "asymmetric")
# Above this, antisymmetric noise loses digits of the kernels that it is taken off from.
LARGE_NOISE_SCALE = 0.5
LARGEST_COMMIT_BYTES = 16 << 20
# Trainers keep it in an int32.
LARGEST_STEP = 2**31 - 1
# Below so many updates moments are far from unbiased: 0.999 to its power is 5e-5.
MOST_BIASED_COUNT = 10_000
# Threads, where most of their time is spent on waiting for a server.
REMOTE_JOBS = 16


@dataclass(frozen=True)
class Options:
    """What fuse, self-fuse and noise-fill have in common."""

    fill: Fill = field(default_factory=Fill)
    optimizer: str = "carry"
    format: str | None = None
    arch: str | None = None
    drop: tuple[str, ...] = ()
    dtype: str | None = None
    max_memory_bytes: int = field(default_factory=default_max_memory_bytes)
    # How chunks are compressed: `auto` keeps what the sources have wherever their chunks can be taken over.
    codec: str = "auto"
    # Whether chunks of zeros are left out; None where all readers of the format take that for zeros.
    sparse: bool | None = None
    # Hard links to the sources' files instead of copies.
    link: bool = False
    # Whether chunks that are taken over are read, to notice what is corrupt or not finite.
    check: bool = True
    # Whether chunks may be taken over at all.
    passthrough: bool = True
    # The devices that are going to restore it; chunks then fit their shards.
    mesh: Mesh | None = None
    # Which norm the fused model is going to be trained with: the fusion rule's, or the fusion property's.
    norm: str = "rule"
    # The training step to be written; None for the first source's.
    step: int | None = None

    def __post_init__(self) -> None:
        known = self.optimizer in OPTIMIZERS and self.norm in NORMS and self.codec in CODECS
        if self.step is not None and not 0 <= self.step <= LARGEST_STEP:
            raise UsageError(f"--step {self.step}: a training step is from 0 to {LARGEST_STEP:,}")
        if not known or self.max_memory_bytes < 1:
            raise UsageError(
                f"optimizer {self.optimizer!r}, norm {self.norm!r}, codec {self.codec!r}, "
                f"{self.max_memory_bytes} bytes of memory"
            )


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
    if equalize is not None and options.norm != "rule":
        raise UsageError("--equalize: for one norm over all sources; with a norm each there is nothing to equalize")
    if len(paths) < 2:
        raise UsageError("fusing takes two checkpoints or more", hint="fusectl self-fuse CKPT --copies 2 for one")
    shares = mean_weights(weights, len(paths))
    by_path = {path: open_source(path, options.arch, options.drop) for path in dict.fromkeys(paths)}
    opened = [by_path[path] for path in paths]
    first = opened[0]
    fusion = line_up([o.tree for o in opened], shares, [o.label for o in opened])
    _require_one_dtype(opened, options)
    check_fill(fusion, options.fill)
    on_mesh = notes_on_mesh(options.mesh, first.tree, {name: fusion.fused_shape(name) for name in first.tree.shapes})
    if equalize is not None:
        fusion = replace(fusion, residual_scales=residual_scales(opened, equalize))
    out_format, item, prefix = target_of(first, options)
    builder = Builder(opened, options, out_format)
    for parameter in first.tree.shapes:
        tensors = [o.full(parameter) for o in opened]
        stored = first.checkpoint.leaves[tensors[0]].dtype
        layout = fused(fusion, parameter, options.dtype or stored, options.fill, tensors)
        builder.add(prefix + parameter, layout, like=tensors[0], noise_name=parameter)
    optimizer, kind = _optimizer(builder, opened, fusion, options)
    plan_step(builder, first, options, out_format)
    record = Record(
        version=fusectl.__version__,
        command=command,
        family=first.tree.family.name,
        parameters=prefix,
        sources=tuple(source_record(o) for o in opened),
        weights=shares,
        widths=fusion.widths,
        norm_groups=tuple(group for o in opened for group in o.norm_groups),
        fill=options.fill,
        optimizer=optimizer,
        drop=options.drop,
        norm=options.norm,
        residual_scales=fusion.residual_scales,
        step=options.step,
    )
    # Between different models blocks do not move alike.
    found = rates(fusion) if record.self_fused else {}
    notes = [*builder.notes, *_notes_on(opened, options, record), *on_mesh]
    if kind is not None and (words := in_words(found, kind)):
        notes.append(f"at an unchanged rate it moves faster; {kind} goes on as before with {words} (--lr-table FILE)")
    return replace(builder.plan(record, item, notes), rates=found), [o.checkpoint for o in opened]


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
    fusion = Fusion(opened.tree, record.weights, record.widths, record.residual_scales)
    check_fill(fusion, options.fill)
    on_mesh = notes_on_mesh(options.mesh, opened.tree, opened.tree.shapes)
    out_format, item, prefix = target_of(opened, options)
    builder = Builder([opened], options, out_format)
    for parameter in opened.tree.shapes:
        tensor = opened.full(parameter)
        stored = opened.checkpoint.leaves[tensor].dtype
        layout = filled(fusion, parameter, options.dtype or stored, options.fill, tensor)
        builder.add(prefix + parameter, layout, like=tensor, noise_name=parameter)
    plan_step(builder, opened, options, out_format)
    for name in opened.checkpoint.leaves:
        if name not in builder.used and name not in opened.dropped:
            axes = slot_axes(name, opened.checkpoint.leaves[name].shape, opened.tree, opened.tree.shapes)
            builder.copy(name, axes=axes)
    kept = any(output.name.startswith(STATE) for output in builder.outputs)
    record = replace(
        record,
        version=fusectl.__version__,
        command="noise-fill",
        fill=options.fill,
        parameters=prefix,
        optimizer=record.optimizer if kept else "drop",
        step=record.step if options.step is None else options.step,
        tensors={},
        files={},
    )
    notes = [*opened.checkpoint.location.notes, *builder.notes, *_notes_on_fill(options.fill), *on_mesh]
    return builder.plan(record, item, notes), [opened.checkpoint]


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
    output is gone on with, and an output that such a run has completed is left as it is. `check` is given what was
    written before it appears; if it raises, nothing does. `note` is told what did not go as it was asked for, `kept` is
    called when the run fails and what it has done is kept to be resumed.

    Raises OutputExists; Incompatible where `resume` finds another plan; NotEnoughSpace and StorageError; Corrupt for a
    source that is.
    """
    if allow_nonfinite and plan.record.fill.kind != "zeros":
        raise UsageError("noise is relative to a kernel's deviation, which a NaN or Inf leaves undefined")
    if resume and is_complete(plan, output):
        # Left where a run was killed after its output had appeared.
        clear_journal(output)
        note(f"{output}: complete already")
        if check is not None:
            check(open_checkpoint(str(output)))
        return output
    check_output(output, sources, force=force)
    digest = digest_of(plan, sources, allow_nonfinite=allow_nonfinite)
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
    work = Work(sources, plan.record.fill, allow_nonfinite, plan.check_sources)
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
            progress, jobs = progress or Silent(), jobs or default_jobs()
            if any(isinstance(place, ObjectPath) for place in (output, *(s.location.home for s in sources))):
                jobs = max(jobs, REMOTE_JOBS)
            sums = execute(plan, work, sink, jobs=jobs, progress=progress, journal=journal)
        sink.finish(replace(plan.record, tensors=sums), plan.empty)
        written = open_location(sink.location)
        _check_written(plan, written)
        if check is not None:
            check(written)
        if sink.not_linked:
            note(
                f"{counted(sink.not_linked, 'chunk')} copied instead of linked: another layout, or another file system"
            )
    return output


def default_output(sources: Sequence[Checkpoint], plan: Plan) -> Place:
    """A sibling of the first source whose name says what it is: checkpoint_20 becomes checkpoint_20.fused-2x."""
    home = sources[0].location.home
    stem, suffix = (home.stem, ".ckpt") if home.suffix == ".ckpt" else (home.name, "")
    fill = plan.record.fill
    noise = f".{fill.kind}-{fill.noise_scale:g}" if fill.kind != "zeros" else ""
    fused_name = {
        "fuse": f".fused-{len(sources)}x",
        "self-fuse": f".self-fused-{len(sources)}x",
        "convert": ".converted" if plan.format == sources[0].format else f".{plan.format}",
    }.get(plan.record.command, "")
    if plan.record.command == "convert":
        noise = ""
    return home.with_name(f"{stem}{fused_name}{noise}{suffix}")


def write_table(plan: Plan, to: Path) -> None:
    """Writes the learning rates that continue the trajectory as a file of JSON, over one that is there already."""
    with storage_errors(to):
        to.write_text(json.dumps(table(plan.rates), indent=1) + "\n")


def is_complete(plan: Plan, output: Place) -> bool:
    """Whether a checkpoint at `output` is what the plan would write, as far as its record tells."""
    try:
        found = open_checkpoint(str(output))
    except FusectlError:
        return False
    if found.record is None or found.format != plan.format:
        return False
    planned = {o.name: (o.layout.shape, o.layout.dtype, o.chunks) for o in plan.outputs}
    written = {name: (sums.shape, sums.dtype, sums.chunks) for name, sums in found.record.tensors.items()}
    leaves = ((found.leaves.get(o.name), o.storage) for o in plan.outputs)
    alike = all(leaf is None or leaf.stored is None or leaf.stored.storage.like(own) for leaf, own in leaves)
    left_out = any(LEFT_OUT in sums.crc32 for sums in found.record.tensors.values())
    same = planned == written and alike and (plan.sparse or not left_out)
    return same and replace(found.record, tensors={}, files={}) == plan.record


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
        if output.is_symlink() or not output.is_dir() or not (is_checkpoint(output) or not any(output.iterdir())):
            raise OutputExists(f"{output}: exists and is no checkpoint; --force replaces nothing else")


def _real(at: Place) -> PurePath:
    """The place without symbolic links; of one in a bucket what compares like a path."""
    return Path(os.path.realpath(at)) if isinstance(at, Path) else PurePath(at.scheme, at.bucket, at.key)


class Builder:
    """Collects the outputs of a plan, and which tensors of the sources they use."""

    def __init__(self, sources: Sequence[Opened], options: Options, out_format: Format) -> None:
        self._sources = sources
        self._options = options
        self._format = out_format
        self._sparse = out_format.reads_left_out if options.sparse is None else options.sparse
        self._commit_bytes = min(LARGEST_COMMIT_BYTES, options.max_memory_bytes // 8)
        # Two commits under way, each of which holds its bytes twice.
        self._pending_bytes = 4 * self._commit_bytes if out_format.ocdbt else 0
        self._storing = Storing(
            zarr=out_format.zarr,
            codec=options.codec,
            budget_bytes=options.max_memory_bytes - self._pending_bytes,
            ocdbt=out_format.ocdbt,
            sparse=self._sparse,
            # With noise most of a source's data files would be of no use to the output.
            refers=all(format_named(o.checkpoint.format).ocdbt for o in sources) and options.fill.kind == "zeros",
            passthrough=options.passthrough,
        )
        self.outputs: list[Output] = []
        self.used: set[str] = set()
        self.notes: list[str] = []

    def add(
        self,
        name: str,
        layout: Layout,
        *,
        like: str | None,
        noise_name: str | None = None,
        keys: tuple[Key, ...] | None = None,
    ) -> None:
        """A tensor of the output; `like` names the tensor of the first source whose keys and chunks it inherits."""
        leaf = self._sources[0].checkpoint.leaves[like] if like else None
        terms = [term for block in layout.blocks for term in block.terms if isinstance(term, Term)]
        leaves = {term: self._sources[term.source].checkpoint.leaves[term.tensor] for term in terms}
        # A slot that is reset may have nothing in common with the source's but its name.
        storing = self._storing
        if self._format.name == "t5x" and kept_in_index(name, layout.shape):
            storing = replace(storing, passthrough=False)
        whole_told = {t: s for t, s in leaves.items() if self._sources[t.source].checkpoint.can_be_taken(t.tensor)}
        mesh = self._options.mesh
        shard = None if mesh is None else mesh.shard_shape(layout.axes, layout.shape)
        storage, passed = storing.choose(layout, whole_told, leaf if terms else None, shard)
        tile, cost = storing.unit(layout, storage, leaves, passed)
        if keys is None:
            # T5X's trees are dictionaries, and their keys hold no slash.
            inherits = leaf is not None and leaf.name == name and self._format.name != "t5x"
            keys = leaf.keys if leaf is not None and inherits else dict_keys(name)
        self.outputs.append(Output(name, keys, layout, storage, passed, tile, cost, noise_name or name))
        self.used |= {term.tensor for term in terms}

    def copy(
        self,
        name: str,
        to: str | None = None,
        *,
        axes: tuple[str, ...] | None = None,
        keys: tuple[Key, ...] | None = None,
    ) -> None:
        """A tensor of the first source as it is, under the name `to`."""
        leaf = self._sources[0].checkpoint.leaves[name]
        block = Block(whole(leaf.shape), (Term(0, name, whole(leaf.shape)),))
        layout = Layout(axes or unnamed(leaf.shape), leaf.shape, leaf.dtype, (block,))
        self.add(to or name, layout, like=name, keys=keys)

    def empty(self) -> tuple[EmptyNode, ...]:
        """The empty nodes that the output keeps: a position of a list must not outlive its dropped neighbours."""
        drop = (*self._options.drop, *([f"{STATE}*"] if self._options.optimizer == "drop" else []))
        return tuple(node for node in self._sources[0].checkpoint.empty if not is_dropped(node.name, drop))

    def plan(
        self,
        record: Record,
        item: str | None,
        notes: Sequence[str],
        empty: tuple[EmptyNode, ...] | None = None,
    ) -> Plan:
        """The Plan, checked: every tensor of every source is used or dropped on purpose."""
        unknown = [
            f"{o.label}: {name}"
            for o in dict.fromkeys(self._sources)
            for name in o.checkpoint.leaves
            if name not in self.used and name not in o.dropped and not name.startswith(STATE) and name not in STEPS
        ]
        if unknown:
            raise Incompatible(
                f"{len(unknown)} tensors that fusectl does not know what to do with",
                details=shorten(unknown, 5),
                hint="--drop PATTERN leaves them out",
            )
        plan = Plan(
            outputs=tuple(self.outputs),
            empty=self.empty() if empty is None else empty,
            format=self._format.name,
            item=item,
            record=record,
            dropped=tuple(dict.fromkeys(name for o in self._sources for name in o.dropped)),
            notes=tuple(notes),
            budget_bytes=self._options.max_memory_bytes,
            commit_bytes=self._commit_bytes,
            pending_bytes=self._pending_bytes,
            sparse=self._sparse,
            links=self._options.link,
            mesh=self._options.mesh,
            check_sources=self._options.check,
        )
        plan.check()
        return plan


def target_of(first: Opened, options: Options) -> tuple[Format, str | None, str]:
    """The format of the output, the item that its tree goes into, and the prefix of its parameters."""
    out_format = format_named(options.format or first.checkpoint.format)
    if out_format.name == "t5x":
        return out_format, None, "target/"
    item = "state" if first.checkpoint.format == "t5x" else first.checkpoint.location.item
    return out_format, item, first.tree.prefix


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


def _optimizer(builder: Builder, opened: Sequence[Opened], fusion: Fusion, options: Options) -> tuple[str, str | None]:
    """Plans the optimizer's slots: carried over, zeros of the right shapes, or none.

    What was done, in a word, and which optimizer's slots there are.
    """
    first = opened[0]
    with_state = [any(n.startswith(STATE) and n not in o.dropped for n in o.checkpoint.leaves) for o in opened]
    if not any(with_state) or options.optimizer == "drop":
        if any(with_state):
            builder.notes.append("optimizer: dropped; the trainer begins a new one, whose first updates need a warm-up")
        return ("drop" if any(with_state) else "none"), None
    if not with_state[0] or (options.optimizer != "reset" and not all(with_state)):
        without = [o.label for o, has in zip(opened, with_state, strict=True) if not has]
        raise Incompatible(
            "sources with and without optimizer state",
            details=[f"none in {label}" for label in dict.fromkeys(without)],
            hint="--optimizer drop leaves it out, --optimizer reset makes zeros of that of the first source",
        )
    state = _state_of(first)
    slots: Iterable[tuple[str, tuple[int, ...], tuple[Block, ...]]]
    if options.optimizer == "reset":
        parameters = {name: fusion.fused_shape(name) for name in first.tree.shapes}
        slots = ((name, shape, ()) for name, shape in fresh_slots(state, first.tree, parameters).items())
        effect = "reset to zeros; the step is kept, so the first updates are of full size: warm up"
    else:
        carry = Carry(
            fusion,
            _one_optimizer([state, *map(_state_of, opened[1:])], opened),
            same_models([str(o.checkpoint.location.index) for o in opened]),
            only_first=options.optimizer == "asymmetric",
        )
        builder.notes += _notes_on_state(carry, opened)
        slots = carry.slots()
        effect = _effect(carry, options.norm)
    planned = set()
    fused_shapes = {name: fusion.fused_shape(name) for name in first.tree.shapes}
    for name, shape, blocks in slots:
        axes = slot_axes(name, shape, first.tree, fused_shapes)
        dtype = first.checkpoint.leaves[name].dtype
        if blocks and dtype == "float16" and state.names_of(name)[1] not in FIRST_MOMENTS:
            raise Incompatible(
                f"{name}: second moments in float16, which come to zero when they are scaled", hint="--optimizer reset"
            )
        builder.add(name, Layout(axes, shape, dtype, blocks), like=name)
        planned.add(name)
    if options.optimizer != "reset":
        for name in state.names:
            if name not in planned:
                builder.copy(name)
    builder.notes.append(f"optimizer: {state.kind}, {len(state.names)} slots {effect}")
    return options.optimizer, state.kind


def _state_of(opened: Opened) -> OptimizerState:
    shapes = {n: s for n, s in opened.checkpoint.shapes.items() if n not in opened.dropped}
    return find_state(shapes, opened.tree, opened.label)


def _one_optimizer(states: Sequence[OptimizerState], opened: Sequence[Opened]) -> list[OptimizerState]:
    """The states, each as what the others tell it to be.

    Raises Incompatible unless they are of one optimizer with one set of settings, and of one dtype for each slot.
    """
    told = next((s.factored for s in states if not s.may_be_either), True)
    states = [replace(s, factored=told) if s.may_be_either else s for s in states]
    said = [
        f"{s.kind}{', factored' * s.factored}{', with momentum' * s.momentum} in {o.label}"
        for s, o in zip(states, opened, strict=True)
    ]
    if len({(s.kind, s.factored, s.momentum) for s in states}) == 1:
        dtypes = [{o.checkpoint.leaves[name].dtype for name in s.names} for s, o in zip(states, opened, strict=True)]
        said = [f"{', '.join(sorted(found))} in {o.label}" for found, o in zip(dtypes, opened, strict=True)]
        if all(found == dtypes[0] for found in dtypes):
            return states
    raise Incompatible(
        "optimizer states that do not fit together",
        details=tuple(dict.fromkeys(said)),
        hint="--optimizer reset makes zeros of them, --optimizer drop leaves them out",
    )


def _notes_on_state(carry: Carry, opened: Sequence[Opened]) -> list[str]:
    """What the sources' states do not tell; raises Incompatible where one count of updates cannot stand for all."""
    notes = []
    state = carry.states[0]
    if state.may_be_either and any(
        factored_axes(carry.fusion.fused_shape(name), carry.fusion.tree.rows[name].spec)
        for name in carry.fusion.tree.shapes
    ):
        notes.append("too small a source to tell whether Adafactor is factored: taken for T5X's default, factored")
    counters = [[n for n in s.names if s.names_of(n)[0] is None] for s in carry.states]
    counts = [[int(o.checkpoint.read(n)) for n in names] for names, o in zip(counters, opened, strict=True)]
    if any(each != counts[0] for each in counts):
        said = ", ".join(str(max(each, default=0)) for each in counts)
        if min(min(each, default=0) for each in counts) < MOST_BIASED_COUNT:
            raise Incompatible(
                f"the sources have made {said} updates: one count cannot correct the bias of all their moments",
                hint="--optimizer reset, or train the younger one on",
            )
        notes.append(f"the sources have made {said} updates; the output counts on from the first one's")
    return notes


def _effect(carry: Carry, norm: str) -> str:
    """What carrying the state does to the first update, in words."""
    if carry.only_first:
        return "kept for the first copy, zero elsewhere: large first updates there, which set the copies apart"
    if len(set(carry.models)) > 1:
        return "carried; between different sources second moments are estimated (rank 1), first ones start from 0"
    if len(set(carry.fusion.weights)) > 1 and norm != "property":
        return "carried; estimated, since one norm couples copies of different weights"
    return "carried into every block: the first update is that of a fused model trained so far"


def plan_step(
    builder: Builder, first: Opened, options: Options, out_format: Format, keys: tuple[Key, ...] | None = None
) -> None:
    """Plans the step with these keys, or under the name that the format's readers look for; T5X must have one."""
    stored = next((name for name in STEPS if name in first.checkpoint.leaves and name not in first.dropped), None)
    of_t5x = out_format.name == "t5x" or (stored is None and first.tree.prefix == "target/")
    name = "/".join(key.name for key in keys) if keys else T5X_STEP if of_t5x else stored or "step"
    if options.step is not None:
        # A product of nothing, times the step.
        block = Block((), (Product((), options.step),))
        dtype = first.checkpoint.leaves[stored].dtype if stored else "int32"
        builder.add(name, Layout((), (), dtype, (block,)), like=stored, keys=keys)
        builder.used |= {stored} if stored else set()
        builder.notes.append(f"step {options.step:,} instead of {first.checkpoint.step}; the optimizer's counts stay")
    elif stored is not None:
        builder.copy(stored, to=name, keys=keys)
    elif out_format.name == "t5x":
        builder.notes.append("the source has no step; T5X gets step 0")
        builder.add(T5X_STEP, Layout((), (), "int32", ()), like=None)


def notes_on_mesh(mesh: Mesh | None, tree: Recognized, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What a mesh does to the parameters of these shapes that JAX allows; raises Incompatible for what it does not."""
    if mesh is None:
        return []
    mesh.require_division((tree.rows[name].spec.axes, shape) for name, shape in shapes.items())
    sizes = {a: n for name, shape in shapes.items() for a, n in zip(tree.rows[name].spec.axes, shape, strict=True)}
    joined, heads = sizes.get("joined_kv", 0), sizes.get("heads", 0)
    if not joined or not heads or joined % heads:
        return []
    (share,), head = mesh.shard_shape(("joined_kv",), (joined,)), joined // heads
    if share % head == 0:
        return []
    return [f"mesh {mesh}: a device's {share} of joined_kv are no whole heads of {head}: JAX allows it"]


def _notes_on_fill(fill: Fill) -> list[str]:
    if fill.kind == "antisymmetric" and fill.noise_scale > LARGE_NOISE_SCALE:
        return ["so much noise cancels only up to rounding, which grows with every layer: verify says how far"]
    return []


def _notes_on(opened: Sequence[Opened], options: Options, record: Record) -> list[str]:
    notes = [note for o in dict.fromkeys(opened) for note in o.checkpoint.location.notes]
    steps = [o.checkpoint.step for o in opened]
    if len(set(steps)) > 1:
        notes.append(f"the sources are at steps {', '.join(map(str, steps))}; the output keeps {steps[0]}")
    if record.self_fused and options.fill.kind == "zeros":
        notes.append("zeros keep the copies equal: without dropout nothing separates them; --fill antisymmetric does")
    if not record.self_fused and options.fill.kind == "antisymmetric":
        notes.append("antisymmetric noise cancels between equal copies only; these sources' function changes")
    if record.norm == "property":
        groups = ", ".join(map(str, record.norm_groups))
        notes.append(f"to be trained with a norm per source: fusectl.archs.t5_flax, norm_groups = ({groups})")
    elif not record.self_fused:
        notes.append(
            "with a norm per source this is the mean of the logits; T5's one norm deviates: verify says how far"
        )
    if any(scale != 1.0 for scale in record.residual_scales):
        scales = ", ".join(f"{scale:.6g}" for scale in record.residual_scales)
        notes.append(f"the sources' residual streams are multiplied with {scales}")
    return notes


def source_record(opened: Opened) -> SourceRecord:
    checkpoint = opened.checkpoint
    return SourceRecord(
        checkpoint.path, checkpoint.format, checkpoint.step, fingerprint(checkpoint), opened.norm_groups
    )


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
        parameters=opened.tree.prefix,
        sources=(),
        weights=(1.0 / copies,) * copies,
        widths=widths,
        norm_groups=widths["embed"],
        fill=Fill(),
        optimizer="kept",
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
