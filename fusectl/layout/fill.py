"""What stands where no source does."""

from __future__ import annotations

import math
from dataclasses import dataclass


DEFAULT_NOISE_SCALE = 0.1
FILLS = ("zeros", "gaussian", "antisymmetric")


@dataclass(frozen=True, slots=True)
class Fill:
    """What stands where no source does: `zeros`, `gaussian` or `antisymmetric` noise.

    `noise_scale` is the noise's standard deviation relative to that of the kernel whose outputs it disturbs.
    """

    kind: str = "zeros"
    noise_scale: float = 0.0
    # None for noise from elsewhere, whose seed nobody knows.
    seed: int | None = 0

    def __post_init__(self) -> None:
        if self.kind not in FILLS:
            raise ValueError(f"no fill is called {self.kind!r}; there are {', '.join(FILLS)}")
        if self.kind != "zeros" and not 0.0 < self.noise_scale < math.inf:
            raise ValueError(f"noise of scale {self.noise_scale}")
