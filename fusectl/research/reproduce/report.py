"""What an experiment reports: tables, curves, what was found; as Markdown, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusectl.research.papers import PaperTable
from fusectl.research.reproduce.arms import Curve, Judged, Result


Cell = str | float | int | None


@dataclass(frozen=True)
class Table:
    """A table of a report: a number may be missing."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @classmethod
    def of_paper(cls, paper: PaperTable) -> Table:
        """A table of a paper as it is kept."""
        columns = tuple(f"{each.name}, {each.unit}" if each.unit else each.name for each in paper.columns)
        rows = tuple(tuple(row.get(each.name) for each in paper.columns) for row in paper.rows)
        return cls(f"The paper: {paper.title} ({paper.source})", columns, rows)


@dataclass(frozen=True)
class Report:
    """What came out of an experiment. `pictures` are further files beside the report, by their titles."""

    experiment: str
    title: str
    tables: tuple[Table, ...]
    found: tuple[str, ...]
    curves: tuple[Curve, ...] = ()
    notes: tuple[str, ...] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)

    def markdown(self, circumstances: Sequence[str]) -> str:
        """The report as Markdown, with what it was made with."""
        lines = [f"# {self.title}", "", *(f"- {each}" for each in self.found), ""]
        for table in self.tables:
            lines += [f"## {table.title}", "", _row(table.columns), _row(["---"] * len(table.columns))]
            lines += [*(_row([shown(cell) for cell in row]) for row in table.rows), ""]
        if self.curves:
            lines += ["## Curves", "", f"![loss over steps and over compute]({self.experiment}.png)", ""]
        for title, file in self.pictures.items():
            lines += [f"![{title}]({file})", ""]
        lines += ["## How it was made", "", *(f"- {each}" for each in (*self.notes, *circumstances)), ""]
        return "\n".join(lines)

    def as_json(self) -> Mapping[str, Any]:
        """Everything in it, curves included."""
        return asdict(self)

    def write(self, directory: Path, circumstances: Sequence[str]) -> list[Path]:
        """Writes EXPERIMENT.md, .json and, where there are curves, .png."""
        directory.mkdir(parents=True, exist_ok=True)
        named = {suffix: directory / f"{self.experiment}.{suffix}" for suffix in ("md", "json", "png")}
        named["md"].write_text(self.markdown(circumstances))
        named["json"].write_text(json.dumps({**self.as_json(), "circumstances": list(circumstances)}, indent=1) + "\n")
        if not self.curves:
            return [named["md"], named["json"]]
        draw_curves(self.curves, named["png"])
        return list(named.values())


def comparison(title: str, found: Sequence[Judged]) -> Table:
    """A table of results beside baselines of the same compute."""
    columns = (
        "model",
        "rate",
        "loss at its start",
        "loss at its end",
        "accuracy, %",
        "GFLOP in all",
        "scratch at the same compute (rate)",
        "difference",
        "verdict",
        "compute saved, %",
        "its own steps saved, %",
    )
    return Table(title, columns, tuple(_compared(each) for each in found))


def _compared(one: Judged) -> tuple[Cell, ...]:
    result = one.result
    own_flops = result.charged_flops - result.before_flops
    return (
        result.arm.name,
        f"{result.base:g}",
        float(np.mean([run.start.loss for run in result.runs])),
        spread(result.losses),
        spread([100 * each for each in result.accuracies], digits=2),
        result.charged_flops / 1e9,
        f"{_between(one.scratch, 4)} ({one.scratch_base:g})",
        one.difference,
        one.verdict,
        _saved(result.charged_flops, one),
        _saved(own_flops, one),
    )


def _saved(flops: float, one: Judged) -> str:
    """How much less this is than what the baseline takes for the same loss."""
    if one.same_loss_flops is None:
        # Where the baseline never gets as low, the longest that it was trained for is a lower bound of what it would
        # take.
        return f"> {100 * (1 - flops / one.longest_flops):.0f}"
    return f"{100 * (1 - flops / one.same_loss_flops):.0f}"


def verdicts(found: Sequence[Judged], claim: str) -> list[str]:
    """A sentence about each result: whether a claim shows against the tuned baseline at equal compute, by how much."""
    sentences = []
    for one in found:
        by = f"{abs(one.difference):.4f} nats for a token {'above' if one.difference > 0 else 'below'} the baseline's"
        says = {"better": f"shows: {claim}", "worse": f"does not show: {claim}"}.get(one.verdict, f"is open: {claim}")
        sentences.append(f"**{one.result.arm.name}** {says}. At equal compute its loss is {by} ({one.verdict}).")
    return sentences


def sweeps(results: Sequence[Result], of: str = "") -> Table:
    """The validation losses of the first seed at each rate, of a training where there are several."""
    bases = sorted({base for each in results for base in each.swept})
    rows = tuple((each.arm.name, *(each.swept.get(base) for base in bases)) for each in results)
    title = "Validation loss at the end by the factor of the rate, first seed"
    return Table(f"{of}: {title.lower()}" if of else title, ("model", *(f"{b:g}" for b in bases)), rows)


def spread(values: Sequence[float], digits: int = 4) -> str:
    """The mean of several seeds, the least and the most."""
    return _between((float(np.mean(values)), min(values), max(values)), digits)


def _between(values: tuple[float, float, float], digits: int) -> str:
    mean, least, most = values
    return f"{mean:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def shown(cell: Cell) -> str:
    """A cell as text.

    >>> shown(1.23456789), shown(860_000), shown(None), shown("a")
    ('1.2346', '860,000', '', 'a')
    """
    if cell is None:
        return ""
    if isinstance(cell, str):
        return cell
    if float(cell).is_integer():
        return f"{int(cell):,}"
    return f"{cell:,.1f}" if abs(cell) >= 1000 else f"{cell:.5g}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw_curves(curves: Sequence[Curve], file: Path) -> None:
    """Draws losses over the steps of each model itself, and over all compute that it took."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    of_steps, of_flops = figure.subplots(1, 2, sharey=True)
    for i, curve in enumerate(curves):
        style = {"color": "black" if curve.name.startswith("scratch") else f"C{i % 10}", "linewidth": 1.2}
        for axes, at in ((of_steps, curve.steps), (of_flops, [each / 1e9 for each in curve.flops])):
            axes.plot(at[1:], curve.mean[1:], label=curve.name, **style)
            axes.fill_between(at[1:], curve.least[1:], curve.most[1:], color=style["color"], alpha=0.15, linewidth=0)
    of_steps.set(xlabel="steps of the model itself", ylabel="held-out loss, nats for a token")
    of_flops.set(xlabel="GFLOP, the small models' included")
    ends = [curve.mean[-1] for curve in curves]
    of_steps.set_ylim(min(ends) - 0.05, max(ends) + 0.75)
    of_steps.legend(fontsize=8)
    for axes in (of_steps, of_flops):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
