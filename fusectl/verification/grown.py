"""A checkpoint that was made from one other: both opened, and the report that its check fills.

What differs between stacked ones (stacked.py) and mapped ones (mapped.py) is how their tensors are weighed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from fusectl.errors import NotFound, UsageError
from fusectl.families.recognized import Recognized
from fusectl.formats.opening import fingerprint, open_checkpoint
from fusectl.formats.tree import Checkpoint
from fusectl.formats.zarr import epsilon
from fusectl.sources.opened import own_family, recognized
from fusectl.sources.packed_qkv import unpacked
from fusectl.system.threads import Progress
from fusectl.verbs import Mapped, Stacked
from fusectl.verification.claim import Declared
from fusectl.verification.report import Report, WeightsResult, versions
from fusectl.verification.settings import Settings, no_models, tokens_for


@dataclass(frozen=True)
class Grown:
    """A grown checkpoint and its source, each with its tree."""

    fused: Checkpoint
    tree: Recognized
    source: Checkpoint
    source_tree: Recognized
    made: Stacked | Mapped

    @property
    def keeps_function(self) -> bool:
        """Whether it claims to compute what its source does."""
        return self.made.keeps_function

    @property
    def narrowed(self) -> bool:
        """Whether parameters are kept in a narrower dtype than the source's."""
        now, then = (
            {each.leaves[tree.full(name)].dtype for name in tree.shapes}
            for each, tree in ((self.fused, self.tree), (self.source, self.source_tree))
        )
        return max(map(epsilon, now)) > min(map(epsilon, then))

    def changed(self) -> Iterator[str]:
        """That the source is another one than it was, if it is."""
        if fingerprint(self.source) != self.made.source.fingerprint:
            yield f"{self.source.path} has changed since it was grown"


G = TypeVar("G", bound=Grown)


def open_grown(kind: type[G], fused: Checkpoint, declared: Declared) -> G:
    """The grown checkpoint and its source, which the caller or its record names.

    Raises NotFound where the source has gone.
    """
    record = fused.record
    assert record is not None
    assert isinstance(record.made, Stacked | Mapped)
    path = declared.source or record.made.source.path
    fused = unpacked(fused)
    try:
        source = unpacked(open_checkpoint(path))
    except NotFound as error:
        hint = "--sources NAME says where it is now"
        raise NotFound(f"{path}, which it was grown from, is not there any more", hint=hint) from error
    arch = own_family(fused) or record.family
    tree, source_tree = (recognized(each, arch, record.drop) for each in (fused, source))
    # What a config has told of the network is in the record of what was grown.
    return kind(fused, tree, source, replace(source_tree, told=tree.network), record.made)


def require_no_trace(settings: Settings) -> None:
    """Raises UsageError where the streams of several sources are asked for."""
    if settings.trace:
        raise UsageError("--trace: of the streams of a fusion's sources; this one was grown from a single one")


def report_on(
    grown: Grown,
    weigh: Callable[[], WeightsResult],
    settings: Settings,
    progress: Progress,
    report: Report,
    notes: tuple[str, ...] = (),
) -> Report:
    """The report with the levels weights, by `weigh`, and native, by forward passes of both models."""
    family = grown.tree.family
    if settings.asks_for_models:
        family.require_twin()
    of_one = f"grown from {grown.source.path}: one model, not a mean of several; the level algebra has nothing to say"
    notes = (of_one, *notes)
    if settings.runs_native and family.twin is None:
        notes = (*notes, no_models(family))
    tokens = tokens_for(grown.tree, settings) if settings.runs_native and family.twin is not None else None
    # Of algebra alone nothing would be left.
    if settings.runs("weights") or tokens is None:
        started = time.monotonic()
        weights = weigh()
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
        versions=versions("jax", "flax"),
    )
