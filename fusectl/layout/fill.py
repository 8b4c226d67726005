"""What stands where no source does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


DEFAULT_NOISE_SCALE = 0.1


class FillKind(StrEnum):
    """What stands where no source does; ANTISYMMETRIC noise cancels between the copies of a self-fusion."""

    ZEROS = "zeros"
    GAUSSIAN = "gaussian"
    ANTISYMMETRIC = "antisymmetric"


@dataclass(frozen=True, slots=True)
class Fill:
    """What stands where no source does.

    `noise_scale` is the noise's standard deviation relative to that of the kernel whose outputs it disturbs.
    """

    kind: FillKind = FillKind.ZEROS
    noise_scale: float = 0.0
    # None for noise from elsewhere, whose seed nobody knows.
    seed: int | None = 0

    def __post_init__(self) -> None:
        # Records and callers may name it in words.
        object.__setattr__(self, "kind", FillKind(self.kind))
        if self.kind is not FillKind.ZEROS and not 0.0 < self.noise_scale < math.inf:
            raise ValueError(f"noise of scale {self.noise_scale}")
