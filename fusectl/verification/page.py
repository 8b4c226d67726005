"""The report for people: a page of Markdown that ships with the checkpoint, and the trace as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from fusectl.formats.staging import storage_errors
from fusectl.layout.fill import FillKind
from fusectl.system.escape import caption, code, markdown
from fusectl.verification.report import FilesResult, FunctionResult, Report, TraceRow, WeightsResult


def page(report: Report) -> str:
    """The report as Markdown."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    record = report.record
    yield f"# Verification of {code(report.path)}"
    yield ""
    verdict = report.verdict if report.verdict.isupper() else report.verdict[0].upper() + report.verdict[1:]
    yield f"**{verdict}.** {_what_was_run(report)}"
    yield ""
    yield "| level | result | what was checked |"
    yield "|---|---|---|"
    for name, result in report.levels().items():
        yield f"| {name} | {outcome(result)} | {markdown(says(report, name))} |"
    if report.failures():
        yield ""
        yield "## What failed"
        yield ""
        yield from (f"- {markdown(line)}" for line in report.failures()[:100])
    yield ""
    yield "## What it was checked against"
    yield ""
    yield "| source | weight | step | norm groups | digest of its files | residual stream times |"
    yield "|---|---|---|---|---|---|"
    sources = record.sources or record.made_from
    shares = (record.weights, record.residual_scales) if record.sources else ((1.0,), (1.0,))
    for source, weight, scale in zip(sources, *shares, strict=False):
        groups = " + ".join(map(str, source.norm_groups))
        step = "none" if source.step is None else f"{source.step:,}"
        digest = code(source.fingerprint)
        yield f"| {code(source.path)} | {weight:g} | {step} | {groups} | {digest} | {scale:.9g} |"
    yield ""
    seed = (
        "" if record.fill.kind is FillKind.ZEROS else f" of scale {record.fill.noise_scale:g}, seed {record.fill.seed}"
    )
    yield f"Between the sources: {record.fill.kind}{seed}. Norm of the trainer: the fusion {record.norm}."
    for level, result in (("Algebra", report.algebra), ("Native", report.native)):
        if result is not None and result.tolerance is not None:
            yield f"{level}: tolerance {result.tolerance:.2e} = {markdown(result.tolerance_says)}."
    if report.notes:
        yield ""
        yield from (f"- {markdown(note)}" for note in report.notes)
    if report.trace:
        yield ""
        yield "## Layer by layer"
        yield ""
        yield "| " + " | ".join(trace_header(report.trace)) + " |"
        yield "|---" * len(trace_header(report.trace)) + "|"
        yield from ("| " + " | ".join(map(markdown, cells)) + " |" for cells in trace_cells(report.trace))
    yield ""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    yield f"{versions}; peak memory {report.peak_rss_bytes / 2**20:,.0f} MiB."


def _what_was_run(report: Report) -> str:
    if not report.passes:
        return "No model was run."
    return f"Forward passes in {report.precision}, {report.passes}; tokens: {markdown(report.tokens)}."


def outcome(result: FilesResult | WeightsResult | FunctionResult | None) -> str:
    """Whether a level passed, in a word."""
    return "not run" if result is None else {True: "ok", False: "FAILED", None: "reported"}[result.passed]


def says(report: Report, level: str) -> str:
    """What a level checked, in a line."""
    files, weights = report.files, report.weights
    if level == "files" and files is not None:
        sums = f"{files.checksums:,} chunks as their checksums say" if files.checksums else "no checksums to compare"
        return f"{files.tensors:,} tensors, {files.bytes_read / 2**20:,.1f} MiB read, {sums}"
    if level == "weights" and weights is not None:
        noise = f", {weights.noise_blocks:,} blocks of noise measured" if weights.noise_blocks else ", zeros elsewhere"
        slots = f", {weights.slots:,} optimizer slots" if weights.slots else ""
        if not weights.blocks:
            return f"{weights.tensors:,} tensors compared with those of the source{slots}"
        return f"{weights.blocks:,} blocks of {weights.tensors:,} tensors{noise}{slots}"
    result = report.levels()[level]
    return _function(result) if isinstance(result, FunctionResult) else ""


def _function(result: FunctionResult) -> str:
    limit = "" if result.tolerance is None else f" (tolerance {result.tolerance:.1e})"
    stored = "" if result.max_abs_as_stored is None else f", as stored {result.max_abs_as_stored:.1e}"
    return (
        f"max |Δlogit| {result.max_abs:.1e}{limit}{stored}, rms {result.rms:.1e} of {result.reference_rms:.2g}, "
        f"KL {result.kl:.1e}, top-1 {result.top1_agreement:.1%} of {result.tokens:,} tokens; {result.says}"
    )


def trace_header(trace: Sequence[TraceRow]) -> list[str]:
    """The headings of a trace's columns: the norms' groups, numbered, are those of the sources."""
    groups = range(len(trace[0].rms))
    return [
        "norm",
        *(f"rms {i}" for i in groups),
        "rms fused",
        *(f"mixing {i}" for i in groups),
        "deviation",
        *(["with a norm each"] if _has_algebra(trace) else []),
    ]


def trace_cells(trace: Sequence[TraceRow]) -> Iterator[list[str]]:
    """The cells of a trace, a row for every norm."""
    for row in trace:
        yield [
            row.norm,
            *(f"{x:.4g}" for x in row.rms),
            f"{row.fused_rms:.4g}",
            *(f"{x:.3f}" for x in row.mixing),
            f"{row.deviation:.1e}",
            *([f"{row.algebra_deviation:.1e}"] if _has_algebra(trace) else []),
        ]


def _has_algebra(trace: Sequence[TraceRow]) -> bool:
    return not math.isnan(trace[0].algebra_deviation)


def draw(trace: Sequence[TraceRow], file: Path) -> None:
    """Draws a trace: the streams' rms, what one norm multiplies each with, and how far the fused model has come.

    The file's suffix chooses the format; see research/pictures.py.
    """
    # A Figure of its own, without pyplot, needs no display and leaves no state behind.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.0, 0.28 * len(trace)), 9.0), layout="constrained")
    streams, mixing, deviation = figure.subplots(3, 1, sharex=True)
    groups = range(len(trace[0].rms))
    # One line for each stack: the decoder does not go on where the encoder has ended.
    for first, stack in enumerate(dict.fromkeys(row.norm.split("/", 1)[0] for row in trace)):
        rows = [(i, row) for i, row in enumerate(trace) if row.norm.startswith(f"{stack}/")]
        places = [i for i, _ in rows]
        for i in groups:
            line = {"color": f"C{i}", "marker": "o", "markersize": 3, "label": None if first else f"group {i}"}
            streams.plot(places, [row.rms[i] for _, row in rows], **line)
            mixing.plot(places, [row.mixing[i] for _, row in rows], **line)
        fused = {"color": "black", "linestyle": ":", "label": None if first else "fused"}
        streams.plot(places, [row.fused_rms for _, row in rows], **fused)
        deviation.plot(places, [row.deviation for _, row in rows], color="black", marker="o", markersize=3)
    streams.set(title="rms of the residual stream", yscale="log")
    mixing.axhline(1.0, color="grey", linewidth=0.8)
    mixing.set(title="what one norm multiplies it with")
    deviation.set(title="deviation of the fused stream, relative")
    deviation.set_xticks(range(len(trace)), [caption(row.norm) for row in trace], rotation=90, fontsize=6)
    for axes in (streams, mixing):
        axes.legend(fontsize=8)
    with storage_errors(file):
        figure.savefig(file, dpi=120)
