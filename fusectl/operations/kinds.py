"""Closed sets about operations. Importing them costs nothing: options are made from them."""

from __future__ import annotations

from enum import StrEnum


class Measure(StrEnum):
    """How residual streams are measured: in forward passes, or estimated from the weights alone."""

    TRACE = "trace"
    WEIGHTS = "weights"
