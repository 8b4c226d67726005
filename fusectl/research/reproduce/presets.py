"""How large the experiments are: a smoke test, what two cores do in minutes, what a GPU does in an hour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


Sizes = Mapping[str, int]
VOCAB = 384


@dataclass(frozen=True)
class Preset:
    """Sizes of the models, and how long and how often each is trained."""

    name: str
    # small, medium, large: each twice as wide; deep: as wide as medium, with twice as many layers.
    width: int
    heads: int
    head_dim: int
    layers: int
    batch: int
    # Of the encoder and of the targets.
    lengths: tuple[int, int]
    warmup: int
    small_steps: int
    grown_steps: int
    # Of deep models, which take twice as long for a step.
    deep_steps: int
    # Of small, medium and large ones, where fusions follow on each other.
    staged_steps: tuple[int, int, int]
    ligo_steps: int
    tuned_steps: int
    # Factors of the learning rate that each arm is trained with on its first seed, and how many more may follow where
    # the best has no worse one beside it; and with how many seeds the best is repeated.
    bases: tuple[float, ...]
    more_bases: int
    seeds: int
    tuned_bases: tuple[float, ...] = (0.05, 0.1)
    dtype: str = "float32"
    # The first so many bytes of the text; all of them if it is None.
    text_bytes: int | None = None
    measure_every: int = field(default=100)

    def sizes(self, size: str) -> Sizes:
        """The sizes of the axes of a model: T5's MLP of twice the width, heads of one width."""
        times = {"small": 1, "medium": 2, "large": 4, "deep": 2}[size]
        return {
            "vocab": VOCAB,
            "embed": times * self.width,
            "heads": times * self.heads,
            "joined_kv": times * self.heads * self.head_dim,
            "mlp": 2 * times * self.width,
            "relpos_buckets": 32,
        }

    def depths(self, size: str) -> Mapping[str, int]:
        """How many layers each stack has."""
        layers = 2 * self.layers if size == "deep" else self.layers
        return {"encoder": layers, "decoder": layers}


PRESETS = {
    "smoke": Preset(
        name="smoke",
        width=8,
        heads=1,
        head_dim=8,
        layers=1,
        batch=8,
        lengths=(24, 8),
        warmup=4,
        small_steps=8,
        grown_steps=8,
        deep_steps=4,
        staged_steps=(8, 8, 4),
        ligo_steps=2,
        tuned_steps=4,
        bases=(1.0,),
        more_bases=0,
        tuned_bases=(0.1,),
        seeds=1,
        text_bytes=1 << 18,
        measure_every=4,
    ),
    # The reports at these sizes lie below the crossing of the small model's curve and the large one's, or at it, where
    # growing cannot be expected to save much: not growing did as well.
    "cpu": Preset(
        name="cpu",
        width=16,
        heads=1,
        head_dim=16,
        layers=2,
        batch=16,
        lengths=(64, 16),
        warmup=200,
        small_steps=2000,
        grown_steps=1500,
        deep_steps=1000,
        staged_steps=(1000, 800, 500),
        ligo_steps=100,
        tuned_steps=300,
        bases=(0.25, 0.5, 1.0),
        more_bases=3,
        seeds=3,
    ),
    "gpu": Preset(
        name="gpu",
        width=256,
        heads=4,
        head_dim=64,
        layers=4,
        batch=128,
        lengths=(256, 72),
        warmup=1000,
        small_steps=10_000,
        grown_steps=10_000,
        deep_steps=10_000,
        staged_steps=(10_000, 10_000, 5000),
        ligo_steps=100,
        tuned_steps=1000,
        bases=(0.25, 0.5, 1.0),
        more_bases=3,
        seeds=3,
        dtype="bfloat16",
        measure_every=500,
    ),
}
