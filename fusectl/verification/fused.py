"""A fusion: its blocks against the sources' slices, and its function against the mean of theirs."""

from __future__ import annotations

import time
from dataclasses import replace

from fusectl.formats.tree import Checkpoint
from fusectl.networks.tokens import Tokens
from fusectl.system.threads import Progress
from fusectl.verification.claim import Claim, Declared, make_claim
from fusectl.verification.report import Report, versions
from fusectl.verification.settings import Settings, no_models, tokens_for
from fusectl.verification.weights import check_weights


def check(fused: Checkpoint, declared: Declared, settings: Settings, progress: Progress, report: Report) -> Report:
    """The report with the levels that need the sources."""
    claim = make_claim(fused, declared)
    report = replace(report, record=claim.record, notes=(*report.notes, *claim.notes))
    if report.damaged:
        # Damaged bytes would only be reported a second time, less clearly.
        return replace(report, notes=(*report.notes, "the other levels were not run on damaged files"))
    # Bad tokens, and networks that nobody has, are said before the hours of work.
    tokens = None
    if settings.asks_for_models or (settings.runs_models and claim.tree.family.twin is not None):
        claim.tree.family.require_twin()
        tokens = tokens_for(claim.tree, settings)
    elif settings.runs_models:
        report = replace(report, notes=(*report.notes, no_models(claim.tree.family)))
    if settings.runs("weights"):
        started = time.monotonic()
        weights = check_weights(claim, budget_bytes=settings.read_bytes, jobs=settings.threads, progress=progress)
        report = replace(report, weights=replace(weights, seconds=time.monotonic() - started))
    return report if tokens is None else _run_models(claim, tokens, settings, progress, report)


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
        versions=versions("jax", "flax"),
    )
