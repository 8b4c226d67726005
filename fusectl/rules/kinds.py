"""Closed sets about growth rules. Importing them costs nothing: options are made from them."""

from __future__ import annotations

from enum import StrEnum


class How(StrEnum):
    """How a stack of layers is made deeper.

    STACK has the whole stack again (StackBERT), INTERLEAVE each layer again, IDENTITY new layers that add nothing to
    the residual stream at first.
    """

    STACK = "stack"
    INTERLEAVE = "interleave"
    IDENTITY = "identity"


class Tie(StrEnum):
    """How an operator maps a kernel's inputs: by the duals of the outputs' matrices, or by the same ones (LiGO)."""

    PINV = "pinv"
    PAPER = "paper"
