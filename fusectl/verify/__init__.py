"""Is the fused checkpoint what it should be? Four questions, each by a path of its own.

    files      is it all there?                          every chunk read, checksums, key set, shapes        files.py
    weights    is every block where it belongs?          numpy slices of the sources, by the family's table  weights.py
    algebra    does it compute the ensemble?             forward passes with a norm per source               function.py
    native     how far is the model that will train?     the same with the trainer's own norm                function.py

Blocks are re-derived without the planner and the executor (blocks.py). What is shared: the family's table, the noise
field (its values are pinned by a test) and the rule for the shapes of the optimizer's slots (held against T5X's by
another). All levels stream: none needs a model in memory. JAX is imported for the last two only.

    claim.py     what the checkpoint claims to be      report.py    what was found
    forward.py   models side by side, by stages        page.py      the report for people, the trace as a picture
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from fusectl.errors import UsageError
from fusectl.formats import open_checkpoint
from fusectl.formats.tree import Checkpoint
from fusectl.memory import peak_rss_bytes
from fusectl.parallel import Progress, Silent, default_jobs
from fusectl.tokens import DEFAULT_BATCH, DEFAULT_LENGTH, Tokens, random_tokens, read_tokens
from fusectl.verify.claim import Claim, Declared, make_claim, nothing_known
from fusectl.verify.files import check_files
from fusectl.verify.report import FILE_NAME, PAGE_NAME, Report
from fusectl.verify.weights import check_weights


__all__ = ["LEVELS", "Declared", "Report", "Settings", "verify", "verify_checkpoint", "write_report"]

LEVELS = ("files", "weights", "algebra", "native")
DEFAULT_READ_BYTES = 256 << 20
NOTHING_DECLARED = Declared()


@dataclass(frozen=True)
class Settings:
    """How to verify: which levels, in which precision, on which tokens, in how much memory.

    `tokens` is a file of them; without, `batch` rows of `length` random ones are drawn from `seed`. `max_memory_bytes`
    None is 256 MiB of values in flight for the first two levels and half of the free memory for the others. `layered`
    None runs models whole where they fit.
    """

    levels: tuple[str, ...] = LEVELS
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

    def __post_init__(self) -> None:
        unknown = [level for level in self.levels if level not in LEVELS]
        if unknown:
            raise UsageError(f"no level is called {unknown[0]!r}", hint=f"levels: {', '.join(LEVELS)}")
        limit = self.max_native_rms
        if limit is not None and ("native" not in self.levels or not limit >= 0.0):
            raise UsageError("--max-native-rms: a distance, and the level native to hold to it")
        if self.trace and not self.runs_models:
            raise UsageError("--trace: of forward passes; it needs the level algebra or native")

    @property
    def runs_models(self) -> bool:
        return bool({"algebra", "native"} & set(self.levels))

    @property
    def read_bytes(self) -> int:
        return self.max_memory_bytes or DEFAULT_READ_BYTES


def verify(
    path: str, declared: Declared = NOTHING_DECLARED, settings: Settings = Settings(), progress: Progress | None = None
) -> Report:
    """The Report on a fused checkpoint, against the sources of its record or the ones that the caller names.

    Raises UsageError when nobody says what it was fused from, NotFound when a source has gone.
    """
    return verify_checkpoint(open_checkpoint(path), declared, settings, progress)


def verify_checkpoint(
    fused: Checkpoint,
    declared: Declared = NOTHING_DECLARED,
    settings: Settings = Settings(),
    progress: Progress | None = None,
) -> Report:
    """The Report on an opened checkpoint."""
    watched, jobs = progress or Silent(), settings.jobs or default_jobs()
    report = Report(fused.path, fused.record or nothing_known(), notes=fused.location.notes, versions=_versions())
    if "files" in settings.levels:
        started = time.monotonic()
        files = check_files(fused, budget_bytes=settings.read_bytes, jobs=jobs, progress=watched)
        report = replace(report, files=replace(files, seconds=time.monotonic() - started))
    if settings.levels == ("files",):
        return replace(report, peak_rss_bytes=peak_rss_bytes())
    claim = make_claim(fused, declared)
    report = replace(report, record=claim.record, notes=(*report.notes, *claim.changed))
    if report.files is not None and not report.files.passed:
        # Damaged bytes would only be reported a second time, less clearly.
        return replace(report, notes=(*report.notes, "the other levels were not run on damaged files"))
    tokens = _tokens(claim, settings) if settings.runs_models else None
    if "weights" in settings.levels:
        started = time.monotonic()
        weights = check_weights(claim, budget_bytes=settings.read_bytes, jobs=jobs, progress=watched)
        report = replace(report, weights=replace(weights, seconds=time.monotonic() - started))
    if tokens is not None:
        report = _run_models(claim, tokens, settings, jobs, watched, report)
    return replace(report, peak_rss_bytes=peak_rss_bytes())


def write_report(report: Report, home: Path) -> None:
    """Writes fusectl-verify.json and fusectl-verify.md into a checkpoint's directory."""
    from fusectl.formats.sink import storage_errors
    from fusectl.verify.page import page

    with storage_errors(home):
        (home / FILE_NAME).write_bytes(report.to_json())
        (home / PAGE_NAME).write_text(page(report))


def _run_models(
    claim: Claim, tokens: Tokens, settings: Settings, jobs: int, progress: Progress, report: Report
) -> Report:
    from fusectl.verify.function import FunctionSettings, check_function

    started = time.monotonic()
    how = FunctionSettings(
        algebra="algebra" in settings.levels,
        native="native" in settings.levels,
        precision="float64" if settings.x64 else "float32",
        jobs=jobs,
        budget_bytes=settings.max_memory_bytes,
        layered=settings.layered,
        trace=settings.trace,
        max_native_rms=settings.max_native_rms,
    )
    found = check_function(claim, tokens, how, progress)
    return replace(
        report,
        precision=how.precision,
        tokens=tokens.says,
        passes=found.passes,
        algebra=found.algebra,
        native=found.native,
        trace=found.trace,
        function_seconds=time.monotonic() - started,
        versions=_versions("jax", "flax"),
    )


def _tokens(claim: Claim, settings: Settings) -> Tokens:
    vocab = claim.tree.sizes["vocab"]
    if settings.tokens is not None:
        return read_tokens(settings.tokens, vocab, settings.batch, settings.length)
    return random_tokens(vocab, settings.batch or DEFAULT_BATCH, settings.length or DEFAULT_LENGTH, settings.seed)


def _versions(*imported: str) -> dict[str, str]:
    """The versions of what took part."""
    import platform
    from importlib.metadata import version

    import fusectl

    packages = ("numpy", "tensorstore", *imported)
    return {
        "fusectl": fusectl.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
