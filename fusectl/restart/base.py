"""What the trainers' restarts have in common: their type, and what is to be said of any checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fusectl.errors import Incompatible
from fusectl.escape import visible
from fusectl.formats.tree import Checkpoint
from fusectl.record import Record


# By the names of the option, what they are called.
TRAINERS = {"t5x": "T5X", "maxtext": "MaxText", "gemma": "Gemma"}
# What the text for each is; JSON has it under this key.
_LANGUAGES = {"t5x": "gin", "maxtext": "shell", "gemma": "python"}


@dataclass(frozen=True)
class Restart:
    """What one of TRAINERS has to be told to go on with the checkpoint at `path`."""

    trainer: str
    path: str
    notes: tuple[str, ...]
    # In the trainer's own language; comments in all of them begin with #.
    lines: tuple[str, ...]
    # The same for programs, by what it is about.
    values: Mapping[str, Any]

    @property
    def trainer_name(self) -> str:
        """What the trainer is called."""
        return TRAINERS[self.trainer]

    @property
    def settings(self) -> tuple[str, ...]:
        """The lines without the comments."""
        return tuple(line for line in self.lines if not line.startswith("#"))

    def text(self) -> str:
        """The notes as comments, and the lines."""
        comments = (f"# {visible(comment)}" for comment in (self.path, *self.notes))
        return "\n".join([*comments, *self.lines]) + "\n"

    def as_json(self) -> Mapping[str, Any]:
        """The settings as JSON, and the text."""
        return {
            "path": self.path,
            "trainer": self.trainer,
            **self.values,
            "notes": list(self.notes),
            _LANGUAGES[self.trainer]: self.text(),
        }


def notes_on_history(record: Record | None) -> Iterator[str]:
    """What a fusion's record says of the first updates, and of the learning rate."""
    if record is not None and record.optimizer in {"reset", "asymmetric"}:
        yield "optimizer state that starts from zeros, in part at least: its first updates need a warm-up"
    if record is not None and record.self_fused:
        yield "learning rates as before move it faster: fusectl self-fuse --lr-table says by how much"


def notes_on_norm(record: Record | None, trainer: str) -> Iterator[str]:
    """That a norm per source, if the record wants it, is not to be had from a decoder's trainer."""
    if record is not None and record.norm == "property":
        groups = ", ".join(map(str, record.norm_groups))
        yield (
            f"meant for a norm per source, which {TRAINERS[trainer]} does not have: one norm over the whole width "
            f"deviates; fusectl.archs.decoder_flax has it, norm_groups = ({groups})"
        )


def require_orbax(checkpoint: Checkpoint, trainer: str) -> None:
    """Raises Incompatible for a checkpoint in T5X's format, which none of the other trainers reads."""
    if checkpoint.format == "t5x":
        raise Incompatible(
            f"{checkpoint.path}: in T5X's format, which {TRAINERS[trainer]} does not read",
            hint=f"fusectl convert {checkpoint.path} --format orbax",
        )
