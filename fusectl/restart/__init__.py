"""What a trainer has to be told to go on with a checkpoint: T5X, MaxText, or the gemma package.

The sizes are those of the tree itself. What no tree tells (dropout, the dtype of activations, the schedule) stays as it
was.

To add a trainer, write a module with a `restart_of` as gemma.py has it, and name the trainer in families.kinds.Trainer.

base.py   Restart, and the notes that are the same for all     maxtext.py   overrides for the command line
t5x.py    gin bindings                                         gemma.py     a TransformerConfig in Python
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from fusectl.errors import Incompatible
from fusectl.families.kinds import Trainer
from fusectl.families.recognized import Recognized
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.tree import Checkpoint
from fusectl.restart.base import NotRead, Restart
from fusectl.sources.lineage import Lineage, remembered
from fusectl.sources.opened import recognized
from fusectl.sources.packed_qkv import unpacked


__all__ = ["NotRead", "Restart", "restart", "restart_of"]


def restart(
    path: str,
    arch: str | None = None,
    *,
    trainer: str | None = None,
    lr_offset: int = 0,
    gin: Sequence[str] = (),
    lineage: Lineage | None = None,
) -> Restart:
    """The Restart of a checkpoint, for its family's trainer, which `trainer` may name.

    With `lr_offset` T5X's schedule goes on as if so many more steps had been made; fewer if it is negative, which holds
    the maximal rate for longer (Deep Fusion, section 5.4). `gin` are the files that T5X trained the small model with,
    whose settings are repeated where its network is replaced; `lineage` says what it was trained on from.

    Raises Incompatible for a tree of no known family, for another trainer than the family's, and for gin files of
    another model; NotRead, one of its kind, for what the trainer does not restore; UsageError for an offset that leads
    to before the schedule's first step, and for either with another trainer.
    """
    checkpoint = remembered(open_checkpoint(path), lineage)
    tree = recognized(unpacked(checkpoint), arch)
    return restart_of(checkpoint, tree, trainer=trainer, lr_offset=lr_offset, gin=gin)


def restart_of(
    checkpoint: Checkpoint,
    tree: Recognized,
    *,
    trainer: str | None = None,
    lr_offset: int = 0,
    gin: Sequence[str] = (),
) -> Restart:
    """The Restart of an opened checkpoint whose tree is recognised, as `restart` has it."""
    if tree.family.trainer not in set(Trainer):
        raise Incompatible(
            f"{checkpoint.path}: no trainer is known for the family {tree.family.name}",
            hint="fusectl inspect shows the sizes that it has to be told",
        )
    own = Trainer(tree.family.trainer)
    if trainer not in {None, own}:
        raise Incompatible(
            f"{checkpoint.path}: {tree.family.name} is of {own.called}, and not to be trained with {trainer}",
            hint=f"--trainer {own}, or none",
        )
    found: Restart = import_module(f"{__name__}.{own}").restart_of(checkpoint, tree, lr_offset, gin)
    return found
