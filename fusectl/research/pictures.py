"""Pictures for people and papers: which formats there are, heat maps of grown tensors, when to fuse, the theory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusectl.errors import OutputExists, StorageError, UsageError
from fusectl.formats.locate import local
from fusectl.formats.staging import storage_errors
from fusectl.inspection.heatmap import HeatMap, Side
from fusectl.research.when import Advice
from fusectl.system.escape import caption


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    # It imports JAX.
    from fusectl.research.theory.fusion import Theory

# What matplotlib draws by itself.
PICTURES = (".png", ".svg", ".pdf", ".jpg")
# The colours reach so far below the largest value: noise of 0.1 of a kernel is one decade below it.
DECADES = 3
MOST_COLUMNS = 4
# From so many sources on their names and borders would cover each other.
MOST_NAMED = 6
MOST_TICKS = 10


def require_picture(file: Path, option: str) -> None:
    """Raises UsageError where matplotlib is not installed or knows no such format, before anything is computed."""
    try:
        import matplotlib  # noqa: F401, ICN001
    except ImportError as error:
        raise UsageError(f"{option} draws with matplotlib", hint="pip install 'fusectl[plot]'") from error
    if file.suffix.lower() not in PICTURES:
        raise UsageError(
            f"{option} {file}: no format of pictures", hint=f"{option} out.png, or {', '.join(PICTURES[1:])}"
        )


def new_picture(path: str, option: str = "-o", *, force: bool) -> Path:
    """The file to draw into; raises what require_picture does, OutputExists, and StorageError without a directory."""
    require_picture(Path(path), option)
    file = local(path)
    if file.exists() and not (force and file.is_file()):
        raise OutputExists(f"{file}: exists", hint="another file, or --force to replace it")
    if not file.parent.is_dir():
        raise StorageError(f"{file.parent}: no such directory")
    return file


def draw_heat_map(found: HeatMap, file: Path) -> None:
    """Draws |W| on one scale for all checkpoints, logarithmic, with zeros in white, and how the zero blocks catch up.

    The file's suffix chooses the format; see new_picture. Raises StorageError where it cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    shown = [(heat, heat.mean) for heat in found.heats if heat.mean is not None]
    over_time, rows = len(found.heats) > 1, -(-len(shown) // MOST_COLUMNS)
    columns = -(-len(shown) // rows)
    wide = 2.7 if over_time else 4.2
    high = wide * float(np.clip(found.inputs.size / found.outputs.size, 0.6, 1.5))
    figure = Figure(figsize=(wide * columns + 1.5, (high + 0.7) * rows + 0.7 + 2.4 * over_time), layout="constrained")
    grid = figure.add_gridspec(rows + over_time, columns, height_ratios=[high + 0.7] * rows + [2.2] * over_time)
    figure.suptitle(caption(found.tensor) + ("" if found.layer is None else f", layer {found.layer}"), fontsize=10)

    drawn = np.concatenate([mean[np.isfinite(mean) & (mean > 0)] for _, mean in shown])
    largest = float(drawn.max(initial=0.0)) or 1.0
    smallest = max(largest / 10**DECADES, min(float(drawn.min(initial=largest)), largest / 10))
    norm, colours = LogNorm(smallest, largest), colormaps["viridis_r"].with_extremes(under="white", bad="red")
    maps = []
    for i, (heat, mean) in enumerate(shown):
        axes = figure.add_subplot(grid[divmod(i, columns)])
        # What is small is drawn as the smallest; zeros lie below it, and what is not finite is masked.
        # A logarithmic scale has no place for zero, and zeros are what these pictures are about.
        values = np.where(mean > 0, np.maximum(mean, smallest), smallest / 2)
        cells = np.ma.masked_array(values, ~np.isfinite(mean))
        image = axes.pcolormesh(found.edges[1], found.edges[0], cells, norm=norm, cmap=colours, rasterized=True)
        step = "" if heat.step is None else f"step {heat.step:,}"
        axes.set_title(step, fontsize=9, pad=16 if _named(found.inputs, found.outputs) else 6)
        _frame(axes, found, first=i % columns == 0, last=i + columns >= len(shown))
        maps.append(axes)
    each = " x ".join(str(-(-side.size // (len(e) - 1))) for side, e in zip(_sides(found), found.edges, strict=True))
    label = "|W|" if each == "1 x 1" else f"mean |W| in cells of {each}"
    label += ", white: 0" if any((mean == 0).any() for _, mean in shown) else ""
    label += ", red: NaN or Inf" if any(heat.nonfinite for heat, _ in shown) else ""
    bar = figure.colorbar(image, ax=maps, pad=0.03, fraction=0.06)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    if over_time:
        _draw_ratios(figure.add_subplot(grid[rows, :]), found)
    _save(figure, file)


def draw_advice(found: Advice, file: Path) -> None:
    """Draws fitted losses over compute, in steps of the large model: of both, and of the grown one from the best step.

    The file's suffix chooses the format; see new_picture. Raises StorageError where it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    small, large, ratio = found.small, found.large, found.costs.ratio
    steps = np.geomspace(small.first_step, small.last_step, 400)
    axes.plot(steps / ratio, small.loss(steps), color="tab:blue", label="small")
    if large is not None and found.main is not None:
        n, best = found.main.budget_steps, found.main.best_step
        steps = np.geomspace(min(small.first_step / ratio, n / 2), n, 400)
        axes.plot(steps, large.loss(steps), color="tab:orange", label="large, from scratch")
        if found.grow:
            begin = float(large.steps_of(small.loss(np.array(best))))
            more = np.linspace(0.0, n - best / ratio, 400)
            axes.plot(best / ratio + more, large.loss(begin + more), color="tab:green", label="grown")
            axes.axvline(best / ratio, color="grey", linewidth=0.8, linestyle=":")
            axes.set_title(f"fuse at step {best:,.0f} of the small model: {found.main.saving:.1%} saved", fontsize=10)
    axes.set_xscale("log")
    axes.set_xlabel("compute, in steps of the large model", fontsize=8)
    axes.set_ylabel("loss, as fitted", fontsize=8)
    axes.tick_params(labelsize=7, which="both")
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    # The figure is drawn into memory first: only writing it can fail for want of storage, and an error in drawing
    # leaves no file.
    picture = io.BytesIO()
    figure.savefig(picture, format=file.suffix.lower()[1:], dpi=200)
    with storage_errors(file):
        file.write_bytes(picture.getvalue())


def _sides(found: HeatMap) -> tuple[Side, Side]:
    return found.inputs, found.outputs


def _named(*sides: Side) -> bool:
    return any(1 < len(side.widths) <= MOST_NAMED for side in sides)


def _frame(axes: Any, found: HeatMap, *, first: bool, last: bool) -> None:
    """Borders, the sources' names along them, and what the axes are, at the edges of the figure only."""
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.tick_params(axis="y", labelleft=first)
    axes.tick_params(axis="x", labelbottom=last)
    line = {"color": "black", "linewidth": 0.8}
    for border in found.inputs.borders:
        axes.axhline(border, **line)
    for border in found.outputs.borders:
        axes.axvline(border, **line)
    for side, axis in zip(_sides(found), (axes.yaxis, axes.xaxis), strict=True):
        if _named(side):
            ticks = [0, *side.borders, side.size]
            axis.set_ticks(ticks, [f"{n:,}" for n in ticks])
    if first:
        axes.set_ylabel(_says(found.inputs, "inputs"), fontsize=8)
    if last:
        axes.set_xlabel(_says(found.outputs, "outputs"), fontsize=8)
    names = {"ha": "center", "va": "center", "fontsize": 7, "color": "0.3", "textcoords": "offset points"}
    for side, along_x in ((found.outputs, True), (found.inputs, False)):
        for i, (start, width) in enumerate(zip([0, *side.borders], side.widths, strict=True) if _named(side) else ()):
            middle = (start + width / 2) / side.size
            at, off = ((middle, 1.0), (0, 7)) if along_x else ((1.0, 1.0 - middle), (7, 0))
            turned = 0 if along_x else 270
            axes.annotate(f"source {i}", at, off, xycoords="axes fraction", rotation=turned, **names)


def _says(side: Side, what: str) -> str:
    """A side's axes and sizes: `embed (inputs): 96 + 96 = 192`."""
    widths = [f"{width:,}" for width in side.widths]
    summed = f"{len(widths)} x {widths[0]}" if len(widths) > 2 and len(set(widths)) == 1 else " + ".join(widths)
    if len(widths) > MOST_NAMED and len(set(widths)) > 1:
        summed = f"{len(widths)} sources"
    return f"{' x '.join(side.axes)} ({what}): " + (f"{summed} = " if len(widths) > 1 else "") + f"{side.size:,}"


def _draw_ratios(axes: Any, found: HeatMap) -> None:
    """The ratio of the zero blocks to the sources' own, from step to step."""
    steps = [heat.step for heat in found.heats]
    ratios = [np.nan if heat.ratio is None else heat.ratio for heat in found.heats]
    axes.plot(steps, ratios, color="black", marker="o", markersize=3.5, clip_on=False)
    if len(steps) <= MOST_TICKS:
        axes.set_xticks(steps, [f"{step:,}" for step in steps])
        for step, ratio in zip(steps, ratios, strict=True):
            axes.annotate(f"{ratio:.2g}", (step, ratio), (0, 6), textcoords="offset points", ha="center", fontsize=7)
    if any(ratio > 0.5 for ratio in ratios):
        axes.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    axes.set_ylim(0, None)
    axes.margins(y=0.2)
    axes.tick_params(labelsize=7)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("rms of zero blocks / of sources", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw_theory(found: Theory, file: Path) -> None:
    """Draws how far the modified flow is from two real steps for each step size, and the bracket's norm in every layer.

    The file's suffix chooses the format; see require_picture. Raises StorageError where it cannot be written.
    """
    from matplotlib.figure import Figure

    rows = len(found.layers)
    figure = Figure(figsize=(12.0, max(4.5, 0.22 * rows + 1.5)), layout="constrained")
    errors, layers = figure.subplots(1, 2)
    series = found.convergence
    if series is None:
        errors.set_axis_off()
        errors.text(0.5, 0.5, "no series of steps in float32", ha="center")
    else:
        shown = (series.with_bracket, series.without_bracket, series.wrong_sign)
        names = ("with the bracket", "without it", "with its sign turned")
        for name, each, slope, marker in zip(names, shown, series.slopes, ("o", "s", "^"), strict=True):
            errors.loglog(series.steps, each, marker=marker, markersize=4, label=f"{name}: slope {slope:.2f}")
        errors.set(xlabel="step size, of both models", ylabel="|modified flow - two gradient steps|")
        errors.legend(fontsize=8)
    places = np.arange(rows)
    for i, (name, norms) in enumerate(
        (("copied parameters", [x.copies for x in found.layers]), ("zero blocks", [x.zeros for x in found.layers]))
    ):
        layers.barh(places + 0.4 * i - 0.2, norms, height=0.4, label=name, color=f"C{3 + i}")
    layers.set_yticks(places, [caption(layer.layer) for layer in found.layers], fontsize=7)
    layers.invert_yaxis()
    layers.set_xlabel("norm of the Lie bracket")
    layers.legend(fontsize=8)
    for axes in (errors, layers):
        axes.tick_params(which="both", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    with storage_errors(file):
        figure.savefig(file, dpi=150)
