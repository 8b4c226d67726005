"""Is the fused checkpoint what it should be? Four questions, each by a path of its own.

    files      is it all there?                          every chunk read, checksums, key set, shapes    files.py
    weights    is every block where it belongs?          numpy slices of the sources, by the family's table  weights.py
    algebra    does it compute the ensemble?             forward passes with a norm per source            function.py
    native     how far is the model that will train?     the same with the trainer's own norm             function.py

Blocks are re-derived without the planner and the executor. What is shared: the family's table, the noise field (its
values are pinned by a test) and the rule for the shapes of the optimizer's slots (held against T5X's by another).
JAX is imported for the last two levels only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import fusectl
from fusectl.archs import Recognized, recognize
from fusectl.errors import Incompatible, NotFound, UsageError
from fusectl.formats import fingerprint, open_checkpoint
from fusectl.formats.tree import Checkpoint, is_dropped
from fusectl.record import Fill, Record, SourceRecord, mean_weights, norm_groups
from fusectl.transforms.grow import require_widths, widths_of
from fusectl.verify.files import FilesResult, check_files
from fusectl.verify.weights import WeightsResult, check_weights


LEVELS = ("files", "weights", "algebra", "native")


@dataclass(frozen=True)
class Claim:
    """What a fused checkpoint claims to be, and the models to hold it against. Full names are `prefix + parameter`."""

    fused: Checkpoint
    tree: Recognized
    sources: tuple[Checkpoint, ...]
    trees: tuple[Recognized, ...]
    record: Record

    @property
    def source_groups(self) -> tuple[tuple[int, ...], ...]:
        """The norm groups of each source, as its own record has them."""
        return tuple(s.norm_groups for s in self.record.sources)


@dataclass(frozen=True)
class FunctionResult:
    """Logits of the fused model against the weighted mean of its sources' logits, where targets are not padding.

    `passed` is None where the numbers are a distance to report, not a claim to hold.
    """

    passed: bool | None
    max_abs: float
    rms: float
    kl: float
    top1_agreement: float
    tolerance: float | None
    reference_rms: float
    reference_max_abs: float
    tokens: int
    says: str
    # With the values as they are stored, where `max_abs` undoes the rounding that storing them cost.
    max_abs_as_stored: float | None = None


@dataclass(frozen=True)
class Report:
    """The outcome of a verification: the levels that ran, and notes."""

    path: str
    record: Record
    precision: str
    files: FilesResult | None = None
    weights: WeightsResult | None = None
    algebra: FunctionResult | None = None
    native: FunctionResult | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether no level that ran failed."""
        return all(result is None or result.passed is not False for result in self.levels().values())

    def levels(self) -> dict[str, FilesResult | WeightsResult | FunctionResult | None]:
        """Every level's result by its name, None for those that were not run."""
        return {"files": self.files, "weights": self.weights, "algebra": self.algebra, "native": self.native}

    def failures(self) -> tuple[str, ...]:
        """What failed, a line each, the first level first."""
        lines: list[str] = []
        for name, result in self.levels().items():
            if isinstance(result, FilesResult | WeightsResult):
                lines += [f"{name}: {problem}" for problem in result.problems]
            elif result is not None and result.passed is False:
                limit = "" if result.tolerance is None else f", tolerance {result.tolerance:.1e}"
                lines.append(f"{name}: logits are off by {result.max_abs:.2e} (rms {result.rms:.2e}){limit}")
        return tuple(lines)


@dataclass(frozen=True)
class Settings:
    """How to verify: which levels, in which precision, on how many random tokens."""

    levels: tuple[str, ...] = LEVELS
    x64: bool = False
    batch: int = 4
    length: int = 16
    seed: int = 0
    max_native_rms: float | None = None


@dataclass(frozen=True)
class Declared:
    """What the caller says of a checkpoint; it stands in for, or overrides, what fusectl.json says."""

    sources: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None
    fill: Fill | None = None
    arch: str | None = None


def verify(path: str, declared: Declared = Declared(), settings: Settings = Settings()) -> Report:
    """The Report on a fused checkpoint, against the sources of its record or the ones that the caller names.

    Raises UsageError when nobody says what it was fused from, NotFound when a source has gone.
    """
    unknown = [level for level in settings.levels if level not in LEVELS]
    if unknown:
        raise UsageError(f"no level is called {unknown[0]!r}", hint=f"levels: {', '.join(LEVELS)}")
    limit = settings.max_native_rms
    if limit is not None and ("native" not in settings.levels or not limit >= 0.0):
        raise UsageError("--max-native-rms: a distance, and the level native to hold to it")
    fused = open_checkpoint(path)
    files = check_files(fused) if "files" in settings.levels else None
    if settings.levels == ("files",):
        return Report(fused.path, fused.record or _nothing_known(), "", files=files)
    claim, notes = _claim(fused, declared)
    report = Report(fused.path, claim.record, "float64" if settings.x64 else "float32", files=files, notes=tuple(notes))
    if files is not None and not files.passed:
        # Damaged bytes would only be reported a second time, less clearly.
        return replace(report, notes=(*report.notes, "the other levels were not run on damaged files"))
    if "weights" in settings.levels:
        report = replace(report, weights=check_weights(claim))
    if {"algebra", "native"} & set(settings.levels):
        from fusectl.verify.function import check_function

        algebra, native = check_function(claim, settings)
        report = replace(report, algebra=algebra, native=native)
    return report


def _claim(fused: Checkpoint, declared: Declared) -> tuple[Claim, list[str]]:
    notes = list(fused.location.notes)
    record = fused.record
    if record is None and not declared.sources:
        raise UsageError(f"{fused.path}: no fusectl.json that names its sources", hint="--sources A B")
    if record is not None and not record.sources and not declared.sources:
        raise UsageError(f"{fused.path}: its fusectl.json names no sources", hint="--sources A B")
    paths = declared.sources or tuple(s.path for s in (record.sources if record else ()))
    by_path: dict[str, Checkpoint] = {}
    for path in paths:
        if path not in by_path:
            try:
                by_path[path] = open_checkpoint(path)
            except NotFound as error:
                raise NotFound(
                    f"source {path} is not there any more", hint="--sources A B names where it is now"
                ) from error
    sources = tuple(by_path[path] for path in paths)
    if len(sources) < 2:
        raise UsageError(
            f"{len(sources)} source: a fusion has two or more", hint="--sources A A for one fused with itself"
        )
    if record is not None and record.sources and len(sources) != len(record.sources):
        raise UsageError(f"{len(sources)} sources, but {fused.path} is a fusion of {len(record.sources)}")
    arch = declared.arch or (record.family if record else None)
    drop = record.drop if record else ()
    trees = {}
    for path, source in by_path.items():
        trees[path] = recognize({n: s for n, s in source.shapes.items() if not is_dropped(n, drop)}, path, arch)
    tree = recognize(fused.shapes, fused.path, arch)
    recorded = record.sources if record else ()
    record = _record(fused, record, sources, tuple(trees[p] for p in paths), declared)
    notes += [
        f"{source.path} has changed since it was fused"
        for source, entry in zip(sources, recorded)  # noqa: B905
        if entry.fingerprint != fingerprint(source)
    ]
    claim = Claim(fused, tree, sources, tuple(trees[p] for p in paths), record)
    require_widths(tree, record, fused.path)
    _require_depths(claim)
    return claim, list(dict.fromkeys(notes))


def _record(
    fused: Checkpoint,
    record: Record | None,
    sources: tuple[Checkpoint, ...],
    trees: tuple[Recognized, ...],
    declared: Declared,
) -> Record:
    """What to hold the checkpoint against: its own record, with what the caller declares put over it."""
    count = len(sources)
    groups = tuple(norm_groups(s.record, t.sizes["embed"]) for s, t in zip(sources, trees, strict=True))
    if record is None:
        record = replace(_nothing_known(), family=trees[0].family.name, weights=(1.0 / count,) * count)
    if declared.sources or not record.sources:
        entries = tuple(
            SourceRecord(s.path, s.format, s.step, fingerprint(s), g) for s, g in zip(sources, groups, strict=True)
        )
        record = replace(record, sources=entries)
    if not record.norm_groups:
        record = replace(record, norm_groups=tuple(w for g in groups for w in g))
    if declared.weights is not None:
        record = replace(record, weights=mean_weights(declared.weights, count))
    if declared.fill is not None:
        record = replace(record, fill=declared.fill)
    if len(record.weights) != count:
        raise UsageError(f"{len(record.weights)} weights for {count} sources of {fused.path}")
    # The widths are measured, never taken on trust.
    return replace(record, widths=widths_of(trees))


def _require_depths(claim: Claim) -> None:
    if claim.tree.depths != claim.trees[0].depths:
        differ = f"depth: {claim.tree.depths} in {claim.fused.path}, {claim.trees[0].depths} in the sources"
        raise Incompatible(f"{claim.fused.path} is no fusion of these {len(claim.sources)} sources", details=(differ,))


def _nothing_known() -> Record:
    return Record(
        version=fusectl.__version__,
        command="",
        family="",
        parameters="",
        sources=(),
        weights=(),
        widths={},
        norm_groups=(),
        fill=Fill(),
        optimizer="",
    )
