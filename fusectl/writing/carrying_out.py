"""Carrying out a Plan: what is there already, writing in staging, the last checks, one rename."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath

from fusectl.errors import Corrupt, OutputExists, UsageError, counted, shorten
from fusectl.formats.names import T5X_STEP
from fusectl.formats.objects import ObjectPath, Place
from fusectl.formats.opening import open_location
from fusectl.formats.registry import format_named
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
from fusectl.layout.fill import FillKind
from fusectl.optimizer.rates import module, table
from fusectl.planning.plan import Plan
from fusectl.system.lru import Cache
from fusectl.system.threads import Progress, Silent, default_jobs
from fusectl.verbs import VERBS
from fusectl.writing.axis_matrices import Matrices
from fusectl.writing.execute import execute
from fusectl.writing.finished import find_finished
from fusectl.writing.journal import Journal, digest_of, require_same_plan, require_untouched, stamps_of
from fusectl.writing.work import Work


# Threads, where most of their time is spent on waiting for a server.
REMOTE_JOBS = 16


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
    if allow_nonfinite and plan.record.fill.kind is not FillKind.ZEROS:
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
    # Stamps are taken before the first chunk of the output, and again after the last one: a source that is replaced in
    # between would leave a mixture of two checkpoints, each chunk of which is valid.
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
        matrices=Matrices(sources, plan.resources.matrices),
        mapped=Cache(plan.resources.mapped),
    )
    manner = Manner(plan.sparse, plan.links, plan.resources.commit)
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
        # What was written is opened as any reader would open it, so that the check sees what the plan does not know:
        # that files are there, under these names, with an index that can be parsed.
        written = open_location(sink.location)
        _check_written(plan, written)
        # A proof may take hours. What somebody deletes in staging meanwhile is looked for once more before the rename.
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
    stem, ending = (home.stem, ".ckpt") if home.suffix == ".ckpt" else (home.name, "")
    fill = plan.record.fill
    verb = VERBS.get(plan.record.command)
    suffix = "" if verb is None else verb.suffix
    if verb is not None and verb.suffix_elsewhere and plan.format != sources[0].format:
        suffix = verb.suffix_elsewhere
    suffix = suffix.format(sources=len(sources), format=plan.format)
    noisy = fill.kind is not FillKind.ZEROS and (verb is None or verb.tells_noise)
    noise = f".{fill.kind}-{fill.noise_scale:g}" if noisy else ""
    renamed = home.with_name(f"{stem}{suffix}{noise}{ending}")
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
