"""What may become of an optimizer's state. Importing it costs nothing: options are made from it."""

from __future__ import annotations

from enum import StrEnum


class OnState(StrEnum):
    """What becomes of the optimizer's state.

    CARRY puts it where the parameters go, RESET makes it zeros, DROP leaves it out, ASYMMETRIC keeps that of the first
    copy alone.
    """

    CARRY = "carry"
    RESET = "reset"
    DROP = "drop"
    ASYMMETRIC = "asymmetric"
