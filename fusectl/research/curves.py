"""Loss curves as trainers leave them: a .csv, lines of JSON, or TensorBoard's event files.

    step,loss                 {"step": 100, "loss": 4.31}            events.out.tfevents.*, or a directory of them
    100,4.31                  {"step": 200, "loss": 3.97}

Rows that say nothing of the loss are passed over: logs hold lines of other things. All else that is no curve is an
error, since a point that is misread moves the fit.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.errors import Corrupt, NotFound, StorageError, UsageError, shorten
from fusectl.formats.locate import local
from fusectl.networks.tokens import json_lines
from fusectl.system.given import read_given


Array = npt.NDArray[np.float64]

STEP, LOSS = "step", "loss"
EVENTS = "tfevents"
# Of a file, of its values, and of the points in event files, which are read one by one.
LARGEST_BYTES = 64 << 20
MOST_ENTRIES = 4_000_000


@dataclass(frozen=True)
class Curve:
    """A loss curve: `steps` (points,), which rise, and `losses` (points,), in the unit that the trainer logs."""

    path: str
    steps: Array = field(repr=False)
    losses: Array = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def last_step(self) -> float:
        """The last step that there is a loss of."""
        return float(self.steps[-1])


def read_curve(path: str, *, step_column: str | None = None, loss_column: str | None = None) -> Curve:
    """The loss curve in a .csv or .jsonl file, or in TensorBoard's event files, where `loss_column` is a tag.

    Columns are called `step` and `loss`, in any case, where nothing else is said. Raises NotFound without a file,
    UsageError for columns that it does not have, with those that it has, and where TensorBoard's reader is not
    installed; Corrupt for losses that are no numbers, steps that do not rise, and files that hold no point.
    """
    at = local(path)
    if not at.exists():
        raise NotFound(f"{path}: no such file")
    notes: list[str] = []
    try:
        if at.is_dir() or EVENTS in at.name:
            if step_column is not None:
                raise UsageError(f"{path}: TensorBoard's events have one step", hint="without --step-column")
            steps, losses = _of_events(at, path, loss_column, notes)
        else:
            rows = _of_csv(at, path) if at.suffix.lower() == ".csv" else _of_lines(at, path)
            steps, losses = _of_rows(list(rows), path, step_column, loss_column)
    except UnicodeDecodeError as error:
        raise Corrupt(f"{path}: no text", hint="a .csv, a .jsonl, or TensorBoard's events") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read", details=(str(error),)) from error
    for i in range(1, len(steps)):
        if steps[i] <= steps[i - 1]:
            raise Corrupt(
                f"{path}: steps do not rise",
                details=(f"step {steps[i - 1]:g} is followed by step {steps[i]:g}",),
                hint="one run in one curve: of a run that was restarted only what counts",
            )
    return Curve(path, np.array(steps), np.array(losses), tuple(notes))


# A row, with what an error calls its place.
_Row = tuple[str, Mapping[str, Any]]


def _read(at: Path, path: str) -> bytes:
    """The contents of a file of points; raises UsageError for one with more of them than any fit needs."""
    raw = read_given(at, LARGEST_BYTES, "a loss curve")
    # Commas and line ends are counted before anything is parsed, since a value takes far more memory than its text.
    entries = raw.count(b",") + raw.count(b"\n")
    if entries > MOST_ENTRIES:
        hint = "every tenth line is enough"
        raise UsageError(f"{path}: {entries:,} values, more than {MOST_ENTRIES:,}", hint=hint)
    return raw


def _of_csv(at: Path, path: str) -> Iterator[_Row]:
    reader = csv.DictReader(io.StringIO(_read(at, path).decode("utf-8-sig")))
    try:
        for row in reader:
            yield f"line {reader.line_num}", {str(name).strip(): value for name, value in row.items()}
    except csv.Error as error:
        raise Corrupt(f"{path}: no table of values", details=(f"line {reader.line_num}: {error}",)) from error


def _of_lines(at: Path, path: str) -> Iterator[_Row]:
    try:
        for number, row in json_lines(_read(at, path)):
            yield f"line {number}", row
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        hint = 'a .csv, or lines such as {"step": 100, "loss": 4.31}'
        raise Corrupt(f"{path}: no lines of JSON", details=(str(error),), hint=hint) from error


def _of_rows(
    rows: Sequence[_Row], path: str, step_column: str | None, loss_column: str | None
) -> tuple[list[float], list[float]]:
    """The steps and the losses of rows that have both."""
    if not rows:
        raise Corrupt(f"{path}: no points in it")
    there = list(dict.fromkeys(name for _, row in rows for name in row))
    step_name = _named(there, step_column, STEP, path, "--step-column")
    loss_name = _named(there, loss_column, LOSS, path, "--loss-column")
    points = [
        (_number(row.get(step_name), step_name, place, path), _number(row[loss_name], loss_name, place, path))
        for place, row in rows
        if row.get(loss_name) not in (None, "")
    ]
    if not points:
        raise Corrupt(f"{path}: no points in it", details=(f"no row has a {loss_name}",))
    return [step for step, _ in points], [loss for _, loss in points]


def _named(there: Iterable[str], wanted: str | None, default: str, path: str, option: str) -> str:
    """The column or tag that is meant: what was asked for, or the one that has the default's name in any case."""
    fitting = [name for name in there if (name == wanted if wanted is not None else name.lower() == default)]
    if len(fitting) != 1:
        raise UsageError(
            f"{path}: {'no' if not fitting else 'more than one'} column {wanted or default!r}",
            details=(f"there are {', '.join(shorten(map(repr, there)))}",),
            hint=f"{option} NAME",
        )
    return fitting[0]


def _number(value: object, column: str, place: str, path: str) -> float:
    """A finite number, as JSON or CSV has it."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise Corrupt(f"{path}: {place}: {column} is {value!r}", hint="a curve of finite numbers")
    return number


def _of_events(at: Path, path: str, tag: str | None, notes: list[str]) -> tuple[list[float], list[float]]:
    """The steps and the scalars of a tag; of a run that began again somewhere, what counted in the end."""
    files = [at] if at.is_file() else sorted(each for each in at.iterdir() if EVENTS in each.name)
    if not files:
        raise NotFound(f"{path}: no event files in it", hint="the directory that TensorBoard's files lie in")
    # By tag, the scalars of each file in turn: their names begin with the time that they were begun at.
    found: dict[str, list[list[tuple[int, float]]]] = {}
    count = 0
    for i, file in enumerate(files):
        if not file.is_file():
            raise UsageError(f"{file}: no file that ends: a pipe or a device")
        for name, step, value in _scalars(file, path):
            count += 1
            if count > MOST_ENTRIES:
                raise UsageError(f"{path}: more than {MOST_ENTRIES:,} points")
            parts = found.setdefault(name, [])
            parts += [[] for _ in range(i + 1 - len(parts))]
            parts[i].append((step, value))
    if not found:
        raise Corrupt(f"{path}: no scalars in it")
    points: list[tuple[int, float]] = []
    for part in found[_named(found, tag, LOSS, path, "--loss-column")]:
        before = len(points)
        # A run that goes on from a checkpoint writes the steps since that checkpoint once more, in a file of its own:
        # of those only the later ones belong to the model that there is.
        points = [point for point in points if not part or point[0] < part[0][0]]
        if len(points) < before:
            notes.append(f"the run began again at step {part[0][0]:,}: {before - len(points):,} points are left out")
        points += part
    values = [_number(value, "the loss", f"step {step}", path) for step, value in points]
    return [float(step) for step, _ in points], values


def _scalars(file: Path, path: str) -> Iterator[tuple[str, int, float]]:
    """The scalars of an event file: tag, step, value."""
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError as error:
        raise UsageError(
            f"{path}: event files are read with tensorboard's reader", hint="pip install 'fusectl[tensorboard]'"
        ) from error
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            # The reader brings scalars of all ages into one form.
            if value.metadata.plugin_data.plugin_name == "scalars" and not value.tensor.tensor_shape.dim:
                yield value.tag, event.step, float(make_ndarray(value.tensor).item())
