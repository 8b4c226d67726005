"""Is the fused checkpoint what it should be? Four questions, each by a path of its own.

    files      is it all there?                          every chunk read, checksums, key set, shapes        files.py
    weights    is every block where it belongs?          numpy slices of the sources, by the family's table  weights.py
    algebra    does it compute the ensemble?             forward passes with a norm per source               function.py
    native     how far is the model that will train?     the same with the trainer's own norm                function.py

Blocks are re-derived without the planner and the executor (blocks.py). What is shared: the family's table, the noise
field (its values are pinned by a test) and the rule for the shapes of the optimizer's slots (held against T5X's by
another). All levels stream: none needs a model in memory. JAX is imported for the last two only.

A module for each kind of origin that a record may have holds a checkpoint against what it was made from; its function
`check` fills the report:

    fused.py      against the sources side by side       stacked.py  against one source, layer by layer
    converted.py  against the one that it is a copy of   mapped.py   against one source and the operator

    settings.py   how to verify                          report.py   what was found
    claim.py      what the checkpoint claims to be       page.py     the report for people, the trace as a picture
"""

from __future__ import annotations

import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Protocol

from fusectl.formats.objects import Place
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.staging import storage_errors
from fusectl.formats.tree import Checkpoint
from fusectl.system.jsontree import kind_of
from fusectl.system.memory import peak_rss_bytes
from fusectl.system.threads import Progress, Silent
from fusectl.verbs import Fused, Made
from fusectl.verification.claim import Declared, nothing_known, require_named
from fusectl.verification.files import check_files
from fusectl.verification.page import page
from fusectl.verification.report import FILE_NAME, PAGE_NAME, Report, versions
from fusectl.verification.settings import LEVELS, Settings


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
    report = Report(fused.path, fused.record or nothing_known(), notes=fused.location.notes, versions=versions())
    declared = declared or Declared()
    if how.levels != ("files",):
        require_named(fused, declared.sources, how.named)
    if how.runs("files"):
        started = time.monotonic()
        files = check_files(fused, budget_bytes=how.read_bytes, jobs=how.threads, progress=watched)
        report = replace(report, files=replace(files, seconds=time.monotonic() - started))
    if how.levels != ("files",):
        # With two sources or more named it is held against those, whatever it was made from.
        made = fused.record.made if fused.record is not None and len(declared.sources) < 2 else None
        report = check_of(made)(fused, declared, how, watched, report)
    return replace(report, peak_rss_bytes=peak_rss_bytes())


class Check(Protocol):
    """What holds a checkpoint that was made in one way against what it was made from."""

    def __call__(
        self, fused: Checkpoint, declared: Declared, settings: Settings, progress: Progress, report: Report, /
    ) -> Report:
        """The report with the levels that need the sources."""


def check_of(made: Made | None) -> Check:
    """The function `check` of the module that is called like the kind; of what nobody knows, that of fusions.

    >>> check_of(None).__module__
    'fusectl.verification.fused'
    """
    kind = Fused if made is None else type(made)
    check: Check = import_module(f"{__name__}.{kind_of(kind)}").check
    return check


def write_report(report: Report, home: Place) -> None:
    """Writes fusectl-verify.json and fusectl-verify.md into a checkpoint's directory."""
    with storage_errors(home):
        for name, raw in ((FILE_NAME, report.to_json()), (PAGE_NAME, page(report).encode())):
            file = home / name
            if isinstance(file, Path):
                # In a checkpoint from elsewhere it may be a link to another file.
                file.unlink(missing_ok=True)
            file.write_bytes(raw)
