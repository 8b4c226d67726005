"""What a growth operator is learned from and how, with the defaults: plain values, for which no JAX is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from fusectl.errors import UsageError


class Init(StrEnum):
    """What learning an operator starts from: the small model's function, its layers again, or LiGO's released start."""

    DUPLICATE = "duplicate"
    STACK = "stack"
    INTERPOLATE = "interpolate"
    RANDOM = "random"


@dataclass(frozen=True)
class Data:
    """What to learn from (examples.py), so many rows and tokens at a time.

    An encoder's rows have `length` tokens, and targets `target_length`: by default what spans of that length make.
    """

    path: str
    batch: int = 16
    length: int = 256
    target_length: int | None = None
    sentinel: int | None = None


@dataclass(frozen=True)
class Learning:
    """How an operator is learned: so many steps of one of optax's optimizers, at a constant rate, without dropout."""

    # More steps buy nothing in LiGO's Table 3: 100 of them save 44.7 % of the training, 10,000 save 38.9 %.
    steps: int = 100
    # Ten times as much is too large for small models, and the 2e-6 of LiGO's released schedule learns hardly anything.
    # A toy decoder started at a loss of 1.510, and 100 steps led to 1.484 at this rate, to 2.090 at ten times as much,
    # and to 1.506 on LiGO's schedule.
    learning_rate: float = 1e-3
    optimizer: str = "adam"

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0.0 < self.learning_rate < math.inf:
            raise UsageError(f"--steps {self.steps}, --learning-rate {self.learning_rate:g}: both are positive")
