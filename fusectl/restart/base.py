"""What the trainers' restarts have in common: their type, and what is to be said of any checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusectl.errors import Incompatible, UsageError
from fusectl.families.kinds import Norm, Trainer
from fusectl.formats.record import Record
from fusectl.formats.registry import format_named, orbax_for
from fusectl.formats.tree import Checkpoint
from fusectl.optimizer.kinds import OnState
from fusectl.sources.lineage import is_told
from fusectl.system.escape import visible


class NotRead(Incompatible):
    """A checkpoint that the trainer of its family cannot restore as it lies on disk."""


@dataclass(frozen=True)
class Restart:
    """What a trainer has to be told to go on with the checkpoint at `path`."""

    trainer: Trainer
    path: str
    notes: tuple[str, ...]
    # In the trainer's own language; comments in all of them begin with #.
    lines: tuple[str, ...]
    # The same for programs, by what it is about.
    values: Mapping[str, Any]
    # Where the lines go, if they are not to be added to something; and what is to be done before they work.
    place: str = ""
    before: tuple[str, ...] = ()

    @property
    def trainer_name(self) -> str:
        """What the trainer is called."""
        return self.trainer.called

    @property
    def settings(self) -> tuple[str, ...]:
        """The lines without the comments."""
        return tuple(line for line in self.lines if not line.startswith("#"))

    def text(self) -> str:
        """The notes as comments, and the lines."""
        comments = (f"# {visible(comment)}" for comment in (self.path, *self.before, *self.notes))
        return "\n".join([*comments, *self.lines]) + "\n"

    def as_json(self) -> Mapping[str, Any]:
        """The settings as JSON, and the text."""
        return {
            "path": self.path,
            "trainer": self.trainer,
            **self.values,
            "notes": [*self.before, *self.notes],
            self.trainer.language: self.text(),
        }


def require_no_gin(trainer: Trainer, lr_offset: int, gin: Sequence[str]) -> None:
    """Raises UsageError for what only T5X has: an offset of the schedule, gin files."""
    if lr_offset:
        raise UsageError(f"--lr-offset {lr_offset}: {trainer.called}'s schedules have none", hint="it is for T5X")
    if gin:
        raise UsageError(f"--gin {gin[0]}: {trainer.called} has no gin files", hint="it is for T5X")


def notes_on_history(record: Record | None) -> Iterator[str]:
    """What a fusion's record says of the first updates, and of the learning rate."""
    # With second moments of zero and a step count of thousands, Adam's bias correction is over and its first update is
    # (1 - b1) / sqrt(1 - b2) times the rate: 3.2 times for b2 = 0.999.
    if record is not None and record.optimizer in {OnState.RESET, OnState.ASYMMETRIC}:
        yield "optimizer state that starts from zeros, in part at least: its first updates need a warm-up"
    if record is not None and record.self_fused:
        yield "learning rates as before move it faster: fusectl self-fuse --lr-table says by how much"


def notes_on_lineage(record: Record | None) -> Iterator[str]:
    """That one norm is assumed where nothing says otherwise: trainers keep no fusectl.json."""
    # Trainers drop fusectl.json at their first save. When T5X had trained on a fusion with a norm per source for three
    # steps, it was printed for T5X's own network, whose logits were off by 0.56.
    if not is_told(record):
        yield (
            "no fusectl.json of a fusion: one norm over the whole width is assumed; if it was trained on from a fusion "
            "with a norm per source, --fused-from or --norm-groups says so"
        )


def notes_on_norm(record: Record | None, trainer: Trainer) -> Iterator[str]:
    """That a norm per source, if the record wants it, is not to be had from a decoder's trainer."""
    if record is not None and record.norm == Norm.PROPERTY:
        groups = ", ".join(map(str, record.norm_groups))
        yield (
            f"meant for a norm per source, which {trainer.called} does not have: one norm over the whole width "
            f"deviates; fusectl.networks.decoder_flax has it, norm_groups = ({groups})"
        )


def require_read(checkpoint: Checkpoint, trainer: Trainer) -> None:
    """Raises NotRead for a checkpoint in a layout that the trainer does not restore."""
    layout = format_named(checkpoint.format)
    if not layout.is_read_by(trainer):
        raise not_read(checkpoint, trainer, f"{layout.name} ({layout.says})", orbax_for(trainer).name)


def not_read(checkpoint: Checkpoint, trainer: Trainer, what: str, instead: str) -> NotRead:
    """The NotRead of what a checkpoint is, with the command that makes it what the trainer restores."""
    mended = f"fusectl convert {shlex.quote(checkpoint.path)} --format {instead}"
    return NotRead(f"{checkpoint.path}: {trainer.called} does not read {what}", hint=mended)
