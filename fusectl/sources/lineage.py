"""What was fused, for a checkpoint that a trainer has saved since: trainers keep no fusectl.json.

--fused-from CKPT takes it from the record of the fusion that was trained on, --norm-groups 512,512 says the widths that
its norms are taken over. Without either a checkpoint is taken for one with a single norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fusectl.errors import Incompatible, UsageError
from fusectl.families.kinds import Norm
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.record import FILE_NAME, Record
from fusectl.formats.tree import Checkpoint


# In place of either for a source that is no fusion.
NONE = "none"


@dataclass(frozen=True, slots=True)
class Lineage:
    """What the caller says that a checkpoint was trained on from: a fusion's path, or the widths of its norm groups."""

    fused_from: str | None = None
    norm_groups: tuple[int, ...] = ()


def lineages(fused_from: Sequence[str], norm_groups: Sequence[str]) -> tuple[Lineage | None, ...]:
    """What two options say, one for all sources or one for each; None for a source that is no fusion.

    Raises UsageError for both together, and for what are no widths.
    """
    if fused_from and norm_groups:
        raise UsageError("--fused-from and --norm-groups: one or the other")
    paths = tuple(None if path == NONE else Lineage(path) for path in fused_from)
    return paths or tuple(None if text == NONE else Lineage(None, _widths(text)) for text in norm_groups)


def _widths(text: str) -> tuple[int, ...]:
    try:
        widths = tuple(int(part) for part in text.split(",") if len(part) < 10)
    except ValueError:
        widths = ()
    if not widths or min(widths) < 1 or len(widths) != len(text.split(",")):
        raise UsageError(f"--norm-groups {text}: no widths with commas between them", hint="--norm-groups 512,512")
    return widths


def for_each(given: Sequence[Lineage | None], count: int) -> list[Lineage | None]:
    """The lineage of each of `count` sources; raises UsageError for another number of them."""
    if len(given) > 1 and len(given) != count:
        raise UsageError(
            f"{len(given)} lineages for {count} sources",
            hint=f"give --fused-from or --norm-groups once for all, or once for each; {NONE} for one that is no fusion",
        )
    return list(given) if len(given) == count else [given[0] if given else None] * count


def remembered(checkpoint: Checkpoint, lineage: Lineage | None) -> Checkpoint:
    """The checkpoint with a record that says what it was trained on from; the same one without a lineage.

    Raises UsageError where its own record says it, or where there is none to take it from.
    """
    if lineage is None:
        return checkpoint
    own = checkpoint.record
    if is_told(own):
        raise UsageError(
            f"{checkpoint.path}: its {FILE_NAME} says what was fused", hint="leave out --fused-from and --norm-groups"
        )
    before = _record_of(lineage)
    # A fusion that has been trained with one norm is one group from now on: its record still lists a width for each
    # source, but its network divides by the whole of them.
    groups = before.norm_groups if before.norm == Norm.PROPERTY else (sum(before.norm_groups),)
    if own is not None:
        return checkpoint.with_record(replace(own, norm=before.norm, norm_groups=groups))
    return checkpoint.with_record(replace(before, norm_groups=groups))


def is_told(record: Record | None) -> bool:
    """Whether a checkpoint's record, if it has one, says over which widths norms are taken."""
    return record is not None and record.tells_norms


def require_groups(checkpoint: Checkpoint, width: int) -> None:
    """Raises Incompatible unless the norm groups of a checkpoint's record add up to its width."""
    record = checkpoint.record
    if record is not None and record.norm_groups and sum(record.norm_groups) != width:
        says = " + ".join(map(str, record.norm_groups))
        raise Incompatible(f"{checkpoint.path}: norm groups {says}, and a width of {width}")


def _record_of(lineage: Lineage) -> Record:
    """What is known of the fusion before it was trained on: nothing of its values, nor of its optimizer."""
    if lineage.fused_from is None:
        norm = Norm.PROPERTY if len(lineage.norm_groups) > 1 else Norm.RULE
        return Record(norm_groups=lineage.norm_groups, norm=norm)
    record = open_checkpoint(lineage.fused_from).record
    if record is None:
        raise UsageError(
            f"--fused-from {lineage.fused_from}: it has no {FILE_NAME}", hint="--norm-groups says the widths"
        )
    if not record.tells_norms:
        raise UsageError(f"--fused-from {lineage.fused_from}: no fusion, by its {FILE_NAME}", hint="name the fusion")
    # T5X saved a fusion with a norm per source without saying so, and self-fusing it for one norm passed its
    # verification while the logits were off by 0.56. What outlives training is the network; sums of bytes and the step
    # do not.
    return replace(record, made=None, optimizer="kept", tensors={}, files={}, origin=None, step=None)
