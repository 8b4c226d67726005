"""Closed sets about families and their trainers. Importing them costs nothing: options are made from them."""

from __future__ import annotations

from enum import StrEnum


class Trainer(StrEnum):
    """The trainers that fusectl knows the restart of."""

    T5X = "t5x"
    MAXTEXT = "maxtext"
    GEMMA = "gemma"

    @property
    def called(self) -> str:
        """What the trainer is called."""
        return {Trainer.T5X: "T5X", Trainer.MAXTEXT: "MaxText", Trainer.GEMMA: "Gemma"}[self]


class Norm(StrEnum):
    """Which norm a fused model is trained with (Deep Fusion, section 3).

    RULE is one norm over the whole width, as trainers have it; PROPERTY one per source, with which the fusion computes
    the mean exactly.
    """

    RULE = "rule"
    PROPERTY = "property"
