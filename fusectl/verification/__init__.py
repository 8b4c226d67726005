"""Is the fused checkpoint what it should be? Four questions, each by a path of its own.

    files      is it all there?                          every chunk read, checksums, key set, shapes        files.py
    weights    is every block where it belongs?          numpy slices of the sources, by the family's table  weights.py
    algebra    does it compute the ensemble?             forward passes with a norm per source               function.py
    native     how far is the model that will train?     the same with the trainer's own norm                function.py

Blocks are re-derived without the planner and the executor (blocks.py). What is shared: the family's table, the noise
field (its values are pinned by a test) and the rule for the shapes of the optimizer's slots (held against T5X's by
another). All levels stream: none needs a model in memory. JAX is imported for the last two only.

    settings.py   how to verify                          report.py   what was found
    claim.py      what the checkpoint claims to be       page.py     the report for people, the trace as a picture
"""

from __future__ import annotations

import platform
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import assert_never

import fusectl
from fusectl.errors import UsageError
from fusectl.families.recognized import Recognized
from fusectl.families.table import Family
from fusectl.formats.objects import Place
from fusectl.formats.record import Converted, Fused, Mapped, Stacked
from fusectl.formats.registry import open_checkpoint
from fusectl.formats.staging import storage_errors
from fusectl.formats.tree import Checkpoint
from fusectl.networks.tokens import DEFAULT_BATCH, DEFAULT_LENGTH, Tokens, random_tokens, read_tokens
from fusectl.system.memory import peak_rss_bytes
from fusectl.system.threads import Progress, Silent
from fusectl.verification.claim import Claim, Declared, make_claim, nothing_known, require_named
from fusectl.verification.copies import check_copy
from fusectl.verification.files import check_files
from fusectl.verification.growth import check_grown, open_grown
from fusectl.verification.linear import check_linear, find_operator, held_out
from fusectl.verification.page import page
from fusectl.verification.report import FILE_NAME, PAGE_NAME, Report
from fusectl.verification.settings import LEVELS, Settings
from fusectl.verification.weights import check_weights


__all__ = ["LEVELS", "Declared", "Report", "Settings", "verify", "verify_checkpoint", "write_report"]


def verify(
    path: str,
    declared: Declared | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Report:
    """The Report on a fused checkpoint, against the sources of its record or the ones that the caller names.

    Raises UsageError when nobody says what it was fused from, and when only its record says that it was from a bucket;
    NotFound when a source has gone.
    """
    return verify_checkpoint(open_checkpoint(path), declared, settings, progress)


def verify_checkpoint(
    fused: Checkpoint,
    declared: Declared | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Report:
    """The Report on an opened checkpoint."""
    how, watched = settings or Settings(), progress or Silent()
    report = Report(fused.path, fused.record or nothing_known(), notes=fused.location.notes, versions=_versions())
    record = fused.record
    named = declared.sources if declared else ()
    if how.levels != ("files",):
        require_named(fused, named, how.named)
    if how.runs("files"):
        started = time.monotonic()
        files = check_files(fused, budget_bytes=how.read_bytes, jobs=how.threads, progress=watched)
        report = replace(report, files=replace(files, seconds=time.monotonic() - started))
    # With two sources or more named it is held against those, whatever it was made from.
    made = record.made if record is not None and len(named) < 2 else None
    match made:
        case Converted(source):
            report = _against_original(fused, next(iter(named), source.path), how, watched, report)
        case Stacked(source) | Mapped(source):
            report = _against_smaller(fused, next(iter(named), source.path), how, watched, report)
        case Fused() | None:
            if how.levels != ("files",):
                report = _against_sources(make_claim(fused, declared or Declared()), how, watched, report)
        case _:
            assert_never(made)
    return replace(report, peak_rss_bytes=peak_rss_bytes())


def _against_original(fused: Checkpoint, path: str, settings: Settings, progress: Progress, report: Report) -> Report:
    """The report on a copy of the checkpoint at a path: as every tensor is its source's, so is what it computes."""
    if settings.levels == ("files",) or (report.files is not None and not report.files.passed):
        return report
    started = time.monotonic()
    weights = check_copy(fused, path, budget_bytes=settings.read_bytes, jobs=settings.threads, progress=progress)
    notes = [f"a copy of {path}: compared tensor by tensor, no model was run"]
    if report.record.fused:
        notes.append("--sources A B holds it against what was fused instead")
    weights = replace(weights, seconds=time.monotonic() - started)
    return replace(report, weights=weights, notes=(*report.notes, *notes))


def _against_smaller(fused: Checkpoint, path: str, settings: Settings, progress: Progress, report: Report) -> Report:
    """The report on a checkpoint that was grown from the one at a path."""
    if settings.levels == ("files",) or (report.files is not None and not report.files.passed):
        return report
    if settings.trace:
        raise UsageError("--trace: of the streams of a fusion's sources; this one was grown from a single one")
    grown = open_grown(fused, path)
    has_twin = grown.tree.family.twin is not None
    operator = find_operator(grown)
    learned = "" if operator is None else held_out(operator)
    if settings.asks_for_models:
        grown.tree.family.require_twin()
    notes = [f"grown from {path}: one model, not a mean of several; the level algebra has nothing to say"]
    notes += [learned] if learned else []
    if settings.runs_native and not has_twin:
        notes.append(_no_models(grown.tree.family))
    tokens = _tokens(grown.tree, settings) if settings.runs_native and has_twin else None
    # Of algebra alone nothing would be left.
    if settings.runs("weights") or tokens is None:
        started = time.monotonic()
        if isinstance(grown.made, Mapped):
            weights = check_linear(grown, operator, budget_bytes=settings.read_bytes, progress=progress)
        else:
            weights = check_grown(grown, budget_bytes=settings.read_bytes, jobs=settings.threads, progress=progress)
        report = replace(report, weights=replace(weights, seconds=time.monotonic() - started))
    report = replace(report, notes=(*report.notes, *notes))
    if tokens is None:
        return report
    from fusectl.verification.grown_function import check_grown_function

    started = time.monotonic()
    native, passes, said = check_grown_function(grown, report.record, tokens, settings, progress)
    return replace(
        report,
        precision=settings.precision,
        tokens=tokens.says,
        passes=passes,
        native=native,
        notes=(*report.notes, *said),
        function_seconds=time.monotonic() - started,
        versions=_versions("jax", "flax"),
    )


def _against_sources(claim: Claim, settings: Settings, progress: Progress, report: Report) -> Report:
    """The report with the levels that need the sources."""
    report = replace(report, record=claim.record, notes=(*report.notes, *claim.notes))
    if report.files is not None and not report.files.passed:
        # Damaged bytes would only be reported a second time, less clearly.
        return replace(report, notes=(*report.notes, "the other levels were not run on damaged files"))
    # Bad tokens, and networks that nobody has, are said before the hours of work.
    tokens = None
    if settings.asks_for_models or (settings.runs_models and claim.tree.family.twin is not None):
        claim.tree.family.require_twin()
        tokens = _tokens(claim.tree, settings)
    elif settings.runs_models:
        report = replace(report, notes=(*report.notes, _no_models(claim.tree.family)))
    if settings.runs("weights"):
        started = time.monotonic()
        weights = check_weights(claim, budget_bytes=settings.read_bytes, jobs=settings.threads, progress=progress)
        report = replace(report, weights=replace(weights, seconds=time.monotonic() - started))
    return report if tokens is None else _run_models(claim, tokens, settings, progress, report)


def _no_models(family: Family) -> str:
    """Why the levels with forward passes were not run, in words."""
    return f"algebra and native were not run: fusectl has no network of {family.name} ({'; '.join(family.lacks)})"


def _run_models(claim: Claim, tokens: Tokens, settings: Settings, progress: Progress, report: Report) -> Report:
    from fusectl.verification.function import check_function

    started = time.monotonic()
    found = check_function(claim, tokens, settings, progress)
    return replace(
        report,
        precision=settings.precision,
        tokens=tokens.says,
        passes=found.passes,
        algebra=found.algebra,
        native=found.native,
        trace=found.trace,
        function_seconds=time.monotonic() - started,
        versions=_versions("jax", "flax"),
    )


def write_report(report: Report, home: Place) -> None:
    """Writes fusectl-verify.json and fusectl-verify.md into a checkpoint's directory."""
    with storage_errors(home):
        for name, raw in ((FILE_NAME, report.to_json()), (PAGE_NAME, page(report).encode())):
            file = home / name
            if isinstance(file, Path):
                # In a checkpoint from elsewhere it may be a link to another file.
                file.unlink(missing_ok=True)
            file.write_bytes(raw)


def _tokens(tree: Recognized, settings: Settings) -> Tokens:
    vocab = tree.sizes["vocab"]
    if settings.tokens is not None:
        return read_tokens(settings.tokens, vocab, settings.batch, settings.length)
    return random_tokens(vocab, settings.batch or DEFAULT_BATCH, settings.length or DEFAULT_LENGTH, settings.seed)


def _versions(*imported: str) -> dict[str, str]:
    """The versions of what took part."""
    packages = ("numpy", "tensorstore", *imported)
    return {
        "fusectl": fusectl.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
