"""Whether an output is there already that a plan would write: by its record, then chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fusectl.errors import Corrupt, FusectlError
from fusectl.formats.locate import names_in, unfinished
from fusectl.formats.objects import ObjectPath, Place, read_small
from fusectl.formats.opening import LARGEST_RECORD_BYTES, open_checkpoint
from fusectl.formats.record import FILE_NAME, LEFT_OUT, UNREAD, Record
from fusectl.formats.tree import Checkpoint
from fusectl.layout.blocks import tiles
from fusectl.planning.plan import Plan, taken
from fusectl.system.threads import Progress
from fusectl.writing.work import source_chunk


def find_finished(
    plan: Plan, sources: Sequence[Checkpoint], output: Place, *, jobs: int, allow_nonfinite: bool, progress: Progress
) -> Checkpoint | None:
    """The checkpoint at `output` if it is what the plan would write, each chunk of it read; None if it is another.

    Raises Corrupt for one that was, by its record, and is damaged.
    """
    if not _is_claimed(plan, output):
        return None
    # With all of verify's levels, which few runs need.
    from fusectl.verification.files import check_files

    try:
        found = open_checkpoint(str(output))
    except Corrupt as error:
        raise _damaged(output, [error.message, *error.details]) from error
    leaves = ((found.leaves.get(o.name), o.storage) for o in plan.outputs)
    alike = all(leaf is None or leaf.stored is None or leaf.stored.storage.like(own) for leaf, own in leaves)
    if found.format != plan.format or not alike:
        return None
    read = check_files(
        found, budget_bytes=plan.resources.budget, jobs=jobs, allow_nonfinite=allow_nonfinite, progress=progress
    )
    problems = [*read.problems, *_unlike_their_sources(plan, sources, found)]
    if problems:
        raise _damaged(output, problems)
    return found


def _is_claimed(plan: Plan, output: Place) -> bool:
    """Whether the record at `output` says that it is what the plan would write; raises Corrupt for a broken one."""
    # Whatever has been listed before.
    at = output.anew() if isinstance(output, ObjectPath) else output
    try:
        if not at.is_dir() or unfinished(names_in(at)) or not (at / FILE_NAME).is_file():
            return False
        record = Record.from_json(read_small(at / FILE_NAME, LARGEST_RECORD_BYTES), str(at / FILE_NAME))
    except Corrupt as error:
        raise Corrupt(error.message, details=error.details, hint=_HINT) from error
    except (FusectlError, OSError):
        return False
    planned = {o.name: (o.layout.shape, o.layout.dtype, o.chunks) for o in plan.outputs}
    written = {name: (sums.shape, sums.dtype, sums.chunks) for name, sums in record.tensors.items()}
    left_out = any(LEFT_OUT in sums.crc32 for sums in record.tensors.values())
    # Chunks that are left out are zeros for T5X and an error for Orbax's v1 API: an output without them is not the
    # dense one that was asked for.
    same = planned == written and (plan.sparse or not left_out)
    return same and replace(record, tensors={}, files={}) == plan.record


def _unlike_their_sources(plan: Plan, sources: Sequence[Checkpoint], found: Checkpoint) -> Iterator[str]:
    """Chunks that were taken over unread, of which no checksum tells, and that are not the sources' any more."""
    assert found.record is not None
    for output in plan.outputs:
        crc32 = found.record.tensors[output.name].crc32
        for chunk, said in zip(tiles(output.layout.shape, output.chunks), crc32, strict=True):
            origin = taken(output, chunk) if said == UNREAD else None
            if origin is None:
                continue
            expected = source_chunk(sources, *origin)
            if found.read(output.name, chunk).tobytes() != expected.tobytes():
                yield f"{output.name}: the chunk at {[r.start for r in chunk]} is not the source's"


def _damaged(output: Place, problems: Sequence[str]) -> Corrupt:
    return Corrupt(f"{output}: it was complete, and is damaged", details=problems, hint=_HINT)


_HINT = "--force writes it anew, whole"
