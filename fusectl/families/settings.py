"""What a network computes and its tree does not tell: factors, activations, positions, caps. Tables have its defaults.

Two of these decide what a fusion stores. A network multiplies embedded tokens with width ** embedding_power, and the
logits of a tied head with width ** tied_logits_power; of a model that grows from width d to D the embedding is stored
times (d / D) ** embedding_power, and the norm before a tied head makes up for both. All others must agree between the
sources, since one config is going to serve for all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


# What queries are multiplied with: nothing, head_dim ** -0.5, (embed // heads) ** -0.5.
QUERY_SCALES = ("one", "head_dim", "embed_over_heads")
# The settings by which it is decided what is stored.
TIED_LOGITS = "tied_logits_power"
STORED = frozenset({"norm_adds_one", "embedding_power", TIED_LOGITS})
ACTIVATIONS = ("gelu", "silu", "relu")
# Planes of the two halves of head_dim, or of neighbours whose slow ones are stretched.
ROPE_TYPES = ("default", "llama3.1")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: object) -> bool:
    return _number(value) and value > 0  # type: ignore[operator]


@dataclass(frozen=True, slots=True)
class Attending:
    """How the layers of one kind attend: the base of the rotary frequencies, what positions are divided by, and how far
    a token looks back, itself included; None for all the way.
    """

    rope_base: float = 10_000.0
    rope_scale: float = 1.0
    window: int | None = None

    def __post_init__(self) -> None:
        if not (_positive(self.rope_base) and _positive(self.rope_scale)):
            raise ValueError(f"rotary positions of base {self.rope_base} and scale {self.rope_scale}")
        if self.window is not None and not (isinstance(self.window, int) and self.window >= 1):
            raise ValueError(f"a window of {self.window} tokens")


@dataclass(frozen=True, slots=True)
class Network:
    """The settings of a network. `told` names those that a config has told; the others are the family's defaults.

    Raises ValueError or TypeError for settings that no network has, or none that fusectl knows.
    """

    norm_adds_one: bool = False
    embedding_power: float = 0.0
    tied_logits_power: float = 0.0
    activation: str = "silu"
    rope_type: str = "default"
    norm_epsilon: float = 1e-6
    # Of the last norm and those of queries and keys, where that is another one.
    final_norm_epsilon: float | None = None
    query_scale: str = "one"
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None
    # In turn for the layers: the second of two is that of layers 1, 3, …
    attending: tuple[Attending, ...] = (Attending(),)
    told: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for setting, known in (
            ("query_scale", QUERY_SCALES),
            ("activation", ACTIVATIONS),
            ("rope_type", ROPE_TYPES),
        ):
            if getattr(self, setting) not in known:
                raise ValueError(f"{setting} {getattr(self, setting)!r}: fusectl knows {', '.join(known)}")
        for setting in ("norm_epsilon", "final_norm_epsilon", "attention_soft_cap", "logits_soft_cap"):
            value = getattr(self, setting)
            if not _positive(value) and (value is not None or setting == "norm_epsilon"):
                raise ValueError(f"{setting} {value}")
            if setting.endswith("epsilon") and value is not None and value >= 1:
                raise ValueError(f"{setting} {value}, which leaves nothing of what is normalised")
        if not isinstance(self.norm_adds_one, bool):
            raise TypeError(f"norm_adds_one {self.norm_adds_one!r}")
        if not all(_number(power) and abs(power) <= 1 for power in (self.embedding_power, self.tied_logits_power)):
            raise ValueError(f"powers of the width {self.embedding_power} and {self.tied_logits_power}")
        if not self.attending:
            raise ValueError("no layer attends in any way")

    def differences(self, other: Network) -> Iterator[tuple[str, Any, Any]]:
        """The settings that are not the same, each with both values."""
        for each in dataclasses.fields(self):
            one, two = getattr(self, each.name), getattr(other, each.name)
            if each.name != "told" and one != two:
                yield each.name, one, two


# T5's, all of whose other settings its twin knows: logits of a tied head are divided by the root of the width
# (t5x/examples/t5/network.py).
T5 = Network(tied_logits_power=-0.5)
