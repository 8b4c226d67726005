"""How to verify: which levels, in which precision, on which tokens, in how much memory."""

from __future__ import annotations

from dataclasses import dataclass

from fusectl.errors import UsageError
from fusectl.families.recognized import Recognized
from fusectl.families.table import Family
from fusectl.networks.tokens import DEFAULT_BATCH, DEFAULT_LENGTH, Tokens, random_tokens, read_tokens
from fusectl.system.threads import default_jobs, default_max_memory_bytes


LEVELS = ("files", "weights", "algebra", "native")


@dataclass(frozen=True)
class Settings:
    """`levels` None are all that can be run: those with forward passes only where fusectl has the family's network.

    `tokens` is a file of them; without, `batch` rows of `length` random ones are drawn from `seed`.

    `max_memory_bytes` None is 256 MiB of values in flight for the first two levels and half of the free memory for the
    others. `layered` None runs models whole where they fit. `named` are paths that the caller has named itself: a
    record leads into the buckets of these only. Raises UsageError for what makes no sense.
    """

    levels: tuple[str, ...] | None = None
    x64: bool = False
    tokens: str | None = None
    batch: int | None = None
    length: int | None = None
    seed: int = 0
    max_native_rms: float | None = None
    trace: bool = False
    layered: bool | None = None
    max_memory_bytes: int | None = None
    jobs: int | None = None
    named: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [level for level in self.levels or () if level not in LEVELS]
        if unknown:
            raise UsageError(f"no level is called {unknown[0]!r}", hint=f"levels: {', '.join(LEVELS)}")
        limit = self.max_native_rms
        if limit is not None and not (self.runs_native and limit >= 0.0):
            raise UsageError("--max-native-rms: a distance, and the level native to hold to it")
        if self.trace and not self.runs_models:
            raise UsageError("--trace: of forward passes; it needs the level algebra or native")

    def runs(self, level: str) -> bool:
        return level in (LEVELS if self.levels is None else self.levels)

    @property
    def runs_algebra(self) -> bool:
        return self.runs("algebra")

    @property
    def runs_native(self) -> bool:
        return self.runs("native")

    @property
    def runs_models(self) -> bool:
        return self.runs_algebra or self.runs_native

    @property
    def asks_for_models(self) -> bool:
        """Whether something was asked for that forward passes alone can tell, and not only all that can be told."""
        wanted = self.levels is not None or self.trace or self.max_native_rms is not None or self.tokens is not None
        return self.runs_models and wanted

    @property
    def precision(self) -> str:
        return "float64" if self.x64 else "float32"

    @property
    def read_bytes(self) -> int:
        """The budget of the levels that only read."""
        return self.max_memory_bytes or default_max_memory_bytes()

    @property
    def threads(self) -> int:
        return self.jobs or default_jobs()


def tokens_for(tree: Recognized, settings: Settings) -> Tokens:
    """The tokens that models are run on: those of a file, or random ones."""
    vocab = tree.sizes["vocab"]
    if settings.tokens is not None:
        return read_tokens(settings.tokens, vocab, settings.batch, settings.length)
    return random_tokens(vocab, settings.batch or DEFAULT_BATCH, settings.length or DEFAULT_LENGTH, settings.seed)


def no_models(family: Family) -> str:
    """Why the levels with forward passes were not run, in words."""
    return f"algebra and native were not run: fusectl has no network of {family.name} ({'; '.join(family.lacks)})"
