"""Closed sets about families and their trainers. Importing them costs nothing: options are made from them."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class Trainer(StrEnum):
    """The trainers that fusectl knows the restart of: in restart/ each has a module of its name.

    With each stands what it is `called`, and the `language` of what it has to be told.
    """

    called: str
    language: str

    def __new__(cls, name: str, called: str = "", language: str = "") -> Self:
        found = str.__new__(cls, name)
        found._value_, found.called, found.language = name, called, language
        return found

    T5X = "t5x", "T5X", "gin"
    MAXTEXT = "maxtext", "MaxText", "shell"
    GEMMA = "gemma", "Gemma", "python"


class Norm(StrEnum):
    """Which norm a fused model is trained with (Deep Fusion, section 3).

    RULE is one norm over the whole width, as trainers have it; PROPERTY one per source, with which the fusion computes
    the mean exactly.
    """

    RULE = "rule"
    PROPERTY = "property"


class FactorIn(StrEnum):
    """Which tensor carries the weight of a source in the mean of the logits.

    NORM is the scale of the last norm, where nothing but the head reads what it multiplies; HEAD the head itself.
    """

    NORM = "norm"
    HEAD = "head"
