"""What stands where no source does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


# Deep Fusion fills with noise of little variance (section 5.1) and gives no number. In a small decoder that starts at a
# loss of 1.468 and ends at 1.392 with zeros after 500 steps, plain noise of 0.1 started at 1.554 and ended at 1.381, of
# 0.3 at 2.231 and 1.386, and of 1.0 at 4.353 and 1.738. Antisymmetric noise of 0.1 started at 1.468 and ended at 1.376.
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
