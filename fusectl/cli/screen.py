"""Everything that is printed. Results go to standard output, all else to standard error; Rich only on a terminal.

Whatever is printed for people may hold names from a checkpoint: it is made visible here, line by line, cell by cell.
"""

from __future__ import annotations

import json as json_module
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from fusectl.errors import FusectlError, NotEnoughSpace, StorageError, UsageError, shorten
from fusectl.families.kinds import Norm
from fusectl.layout.fill import FillKind
from fusectl.system.escape import visible, word
from fusectl.system.memory import peak_rss_bytes


if TYPE_CHECKING:
    from rich.console import Console

    from fusectl.demo import DemoRow
    from fusectl.formats.objects import Place
    from fusectl.inspection.diff import Diff
    from fusectl.inspection.fsck import Fsck
    from fusectl.inspection.heatmap import HeatMap
    from fusectl.inspection.inspect import Inspection
    from fusectl.layout.fill import Fill
    from fusectl.operations.routes import Route
    from fusectl.planning.exactness import Exactness
    from fusectl.planning.plan import Plan
    from fusectl.research.reproduce import Reproduced
    from fusectl.research.theory.fusion import Lemma, Theory
    from fusectl.research.theory.symmetry import Symmetry
    from fusectl.research.when import Advice, Fit
    from fusectl.restart import Restart
    from fusectl.system.threads import Progress
    from fusectl.verbs import Stacked
    from fusectl.verification import Report


SCHEMA = "fusectl/1"
# An error then has six lines, what is wrong before the details and a hint after them, and one more where a run can be
# resumed; what is wrong with a command line is shown whole.
MOST_DETAILS = 4
# A log shows that a job is alive by a line every half minute, and stays short over hours.
HEARTBEAT_S = 30.0
# In a file or a pipe a row is a line, however long.
PLAIN_WIDTH = 1000


class Terminated(BaseException):
    """A signal that ends the process arrived: SIGTERM, or SIGHUP when a terminal closes."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


class Screen:
    """One run of a command as people and programs see it: notes, progress, one result, at most one error."""

    def __init__(self, command: str, *, json: bool, quiet: bool, debug: bool) -> None:
        self._command = command
        self._json = json
        self._quiet = quiet
        self._debug = debug
        self._result: Mapping[str, Any] | None = None
        # The command that goes on where this one ends.
        self._resume: str | None = None

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Prints the error that ends the body, or the JSON object of its result, and exits with the right code."""
        try:
            yield
        # These are not the command's own errors: run() gives them their codes.
        except (typer.Exit, typer.TyperException, BrokenPipeError):
            raise
        except (KeyboardInterrupt, Terminated) as error:
            raise typer.Exit(self._stopped(error)) from error
        except Exception as error:
            # A signal in the middle of an import comes out as an ImportError.
            cause = error.__cause__ or error.__context__
            if isinstance(error, ImportError) and isinstance(cause, KeyboardInterrupt | Terminated):
                raise typer.Exit(self._stopped(cause)) from error
            raise typer.Exit(self._error(error)) from error
        self._emit("ok", 0, None)

    def resumable(self, arguments: Sequence[str]) -> None:
        """Has the error that ends the command say the line that goes on with it."""
        words = [*arguments, *([] if "--resume" in arguments else ["--resume"])]
        self._resume = " ".join(map(word, ["fusectl", *words]))

    def usage_error(self, error: typer.TyperException) -> int:
        """Prints what is wrong with the command line; the exit code."""
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "fusectl"
        message, hint = error.format_message(), f"{command} --help"
        # Without any argument the message is the help itself.
        self._say(*message.split("\n") if "Usage:" in message else (f"error: {message}", f"  hint: {hint}"))
        self._emit("error", 2, {"code": "usage_error", "message": message, "details": [], "hint": hint})
        return 2

    def note(self, text: str) -> None:
        """Tells something that is neither result nor error."""
        if not self._quiet:
            self._say(f"note: {text}")

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A progress bar on a terminal, a line every half minute elsewhere, nothing when quiet."""
        from fusectl.system.threads import Silent

        if self._quiet:
            yield Silent()
        elif sys.stderr.isatty():
            yield from _bar(self._console(sys.stderr))
        else:
            yield _Heartbeat()

    def plan(self, plan: Plan, output: Place) -> None:
        """Prints the plan of a dry run."""
        from fusectl.planning.plan import summary

        self._result = {"path": str(output), "dry_run": True, "plan": summary(plan)}
        if not self._json:
            _print_plan(self._console(sys.stdout), plan, output)

    def written(self, plan: Plan, output: Place) -> None:
        """Prints the path of the checkpoint that was written."""
        self._result = {
            "path": str(output),
            "dry_run": False,
            "tensors": len(plan.outputs),
            "bytes": plan.nbytes,
            "notes": list(plan.notes),
            "peak_rss_bytes": peak_rss_bytes(),
            **(self._result or {}),
        }
        if not self._json:
            _print_path(output)

    def inspection(self, seen: Inspection, *, tree: bool, rows: bool = False) -> None:
        """Prints what a checkpoint is: with `tree` every tensor, with `rows` also the row of the table that took it."""
        # Of thousands of tensors it takes its time.
        self._result = seen.as_json() if self._json else None
        for note in seen.checkpoint.location.notes:
            self.note(note)
        if not self._json:
            _print_inspection(self._console(sys.stdout), seen, tree=tree, rows=rows)

    def restart(self, found: Restart) -> None:
        """Prints what a trainer has to be told."""
        self._result = found.as_json()
        if not self._json:
            print(found.text(), end="")  # noqa: T201

    @property
    def is_silent(self) -> bool:
        """Whether nobody wants to be told anything but the result."""
        return self._quiet or self._json

    def restart_lines(self, found: Restart) -> None:
        """Tells what a trainer has to be told, beside the result."""
        for note in found.before:
            self.note(note)
        more = f"{found.trainer_name} goes on with{found.place} (more: fusectl restart-config {found.path}):"
        self._say(more, *found.settings)

    def fsck(self, found: Fsck) -> None:
        """Prints what is wrong with a checkpoint, all of it, and what nobody could have noticed."""
        self._result = found.as_json()
        for note in found.notes:
            self.note(note)
        if not self._json:
            _print_fsck(self._console(sys.stdout), found)

    def report(self, report: Report) -> None:
        """Prints a verification."""
        self._result = report.as_json()
        for note in report.notes:
            self.note(note)
        if not self._json:
            _print_report(self._console(sys.stdout), report)

    def verified(self, report: Report) -> None:
        """Prints the verification of what is being written: not the result, so to standard error."""
        self._result = {"verification": report.as_json()}
        for note in report.notes:
            self.note(note)
        if not self._quiet:
            _print_report(self._console(sys.stderr), report)

    def diff(self, found: Diff) -> None:
        """Prints what two checkpoints differ in."""
        self._result = found.as_json()
        if not self._json:
            _print_diff(self._console(sys.stdout), found)

    def routes(self, found: Sequence[Route], path: str) -> None:
        """Prints which operators lead to larger sizes, and why others do not."""
        self._result = {
            "path": path,
            "routes": [
                {
                    "how": route.how,
                    "keeps": route.keeps,
                    "command": route.command(path) if route.steps else None,
                    "why_not": route.why_not or None,
                }
                for route in found
            ],
        }
        if not self._json:
            facts = [(route.how, line) for route in found for line in _route(route, path)]
            shown = [("" if i and facts[i - 1][0] == name else name, line) for i, (name, line) in enumerate(facts)]
            _print_facts(self._console(sys.stdout), shown)

    def heat_map(self, found: HeatMap, file: Path) -> None:
        """Prints the path of a picture; as JSON also what was measured."""
        self._result = {"path": str(file), **found.as_json(), "notes": list(found.notes)}
        for note in found.notes:
            self.note(note)
        if not self._json:
            _print_path(file)

    def advice(self, found: Advice, picture: Path | None) -> None:
        """Prints when to fuse, and what the answer rests on."""
        self._result = {**found.as_json(), "picture": None if picture is None else str(picture)}
        for note in found.notes:
            self.note(note)
        if not self._json:
            _print_advice(self._console(sys.stdout), found)

    def theory(self, found: Theory) -> None:
        """Prints what the theory says of a fusion, and how far it is true."""
        self._result = found.as_json()
        for note in found.notes:
            self.note(note)
        if not self._json:
            _print_theory(self._console(sys.stdout), found)

    def symmetry(self, found: Symmetry) -> None:
        """Prints how far the copies in a model are from being exchangeable, and in which tensors most."""
        self._result = {**found.as_json(), "notes": list(found.notes)}
        for note in found.notes:
            self.note(note)
        if not self._json:
            _print_symmetry(self._console(sys.stdout), found)

    def demo(self, rows: Sequence[DemoRow]) -> None:
        """Prints the demo's table."""
        self._result = {
            "rows": [{"what": r.what, "path": str(r.path), "seconds": r.seconds, **r.report.as_json()} for r in rows]
        }
        if not self._json:
            _print_demo(self._console(sys.stdout), rows)

    def reproduced(self, found: Reproduced) -> None:
        """Prints what an experiment has found, and where its report is."""
        files = [str(file) for file in found.files]
        self._result = {"experiment": found.experiment, "found": list(found.found), "files": files}
        if not self._json:
            print(*map(visible, [*found.found, "", *files]), sep="\n")  # noqa: T201

    def _error(self, error: Exception) -> int:
        if self._debug:
            self._say(*traceback.format_exc().rstrip().split("\n"))
        # An allocation that fails is a matter of --max-memory for whoever reads it, and gets that exit code.
        if isinstance(error, MemoryError):
            error = NotEnoughSpace("out of memory", hint="a smaller --max-memory")
        elif isinstance(error, OSError):
            error = StorageError(str(error))
        if isinstance(error, FusectlError):
            message, details, hint, code, name = error.message, error.details, error.hint, error.exit_code, error.code
        else:
            message, details, code, name = f"unexpected {type(error).__name__}: {error}", (), 1, "unexpected"
            hint = "--debug shows where; please report it"
        if isinstance(error, UsageError):
            # What somebody has to change is shown as it was written, all of it, with a caret below the place.
            shown = [line for detail in details for line in detail.split("\n")]
        else:
            # The line that counts what is left out takes the place of a detail, so that it never stands for one alone.
            left_out = len(details) - MOST_DETAILS + 1
            shown = [_one_line(detail) for detail in details[: MOST_DETAILS - (left_out > 1)]]
            shown += [f"... {left_out} more; --json lists them"] * (left_out > 1)
        lines = [f"error: {message}", *(f"  {line}" for line in shown)]
        lines += [f"  hint: {hint}"] if hint else []
        lines += [f"  to go on: {self._resume}"] if self._resume else []
        self._say(*lines)
        failed = code == 3
        self._emit(
            "failed" if failed else "error",
            code,
            {"code": name, "message": message, "details": list(details), "hint": hint, "resume": self._resume},
        )
        return code

    def _stopped(self, by: KeyboardInterrupt | Terminated) -> int:
        code, how = (by.exit_code, "terminated") if isinstance(by, Terminated) else (130, "interrupted")
        ended = "what is done is kept" if self._resume else "nothing was written"
        self._say(f"fusectl: {how}; {ended}", *([f"  to go on: {self._resume}"] if self._resume else []))
        self._emit("error", code, {"code": how, "message": how, "details": [], "hint": None, "resume": self._resume})
        return code

    def _emit(self, status: str, code: int, error: Mapping[str, Any] | None) -> None:
        if not self._json:
            return
        # Every command ends with one object of this shape, errors included, so that a script parses before it asks what
        # happened.
        whole = {
            "schema": SCHEMA,
            "command": self._command,
            "status": status,
            "exit_code": code,
            "result": self._result,
        }
        if error is not None:
            whole["error"] = error
        from fusectl.system.jsontree import finite

        # Python would print NaN, which is no JSON: some parsers refuse it, and jq makes null of it.
        print(json_module.dumps(finite(whole), allow_nan=False, indent=2))  # noqa: T201

    def _say(self, *lines: str) -> None:
        # Names come from checkpoints of others: an escape sequence in one could print a line that says ok, or fill the
        # clipboard.
        print("\n".join(map(visible, lines)), file=sys.stderr, flush=True)  # noqa: T201

    def _console(self, stream: TextIO) -> Console:
        from rich.console import Console

        class Quietly(Console):
            def on_broken_pipe(self) -> None:
                # Rich would exit with 1; `| head` is no failure.
                raise BrokenPipeError

        return Quietly(
            file=stream, highlight=False, markup=False, emoji=False, width=None if stream.isatty() else PLAIN_WIDTH
        )


class _Heartbeat:
    """A Progress that prints a line now and then, for logs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._what = ""
        self._total = self._done = 0
        self._last_s = time.monotonic()

    def start(self, what: str, total_bytes: int) -> None:
        with self._lock:
            self._what, self._total, self._done = what, total_bytes, 0

    def advance(self, tensor: str, done_bytes: int) -> None:
        with self._lock:
            self._done += done_bytes
            if time.monotonic() - self._last_s < HEARTBEAT_S:
                return
            self._last_s = time.monotonic()
            line = f"{self._what}: {human(self._done)} of {human(self._total)}, at {tensor}"
        print(visible(line), file=sys.stderr, flush=True)  # noqa: T201


def _bar(console: Console) -> Iterator[Progress]:
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=console, transient=True) as rich:

        class Bar:
            task: Any = None

            def start(self, what: str, total_bytes: int) -> None:
                if self.task is not None:
                    rich.remove_task(self.task)
                self.task = rich.add_task(what, total=total_bytes)

            def advance(self, tensor: str, done_bytes: int) -> None:  # noqa: ARG002
                rich.advance(self.task, done_bytes)

        yield Bar()


def human(n: float) -> str:
    """A number of bytes for people.

    >>> human(67108864)
    '64.0 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def _print_report(console: Console, report: Report) -> None:
    from rich.table import Table

    from fusectl.verification.page import outcome, says, trace_cells, trace_header

    table = Table("level", "", "what was checked", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name, result in report.levels().items():
        if result is not None:
            table.add_row(*map(visible, (name, outcome(result), says(report, name))))
    console.print(table)
    if report.trace:
        trace = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for heading in trace_header(report.trace):
            trace.add_column(heading, justify="left" if heading == "norm" else "right")
        for cells in trace_cells(report.trace):
            trace.add_row(*map(visible, cells))
        console.print(trace)
    precision = f", {report.precision}, {report.passes}" if report.precision else ""
    # A verdict of several words names what was not checked, and gets a line of its own.
    if report.verdict in {"passed", "FAILED"}:
        _print_line(console, f"{report.verdict}: {report.path}{precision}")
    else:
        _print_line(console, f"{report.path}{precision}")
        _print_line(console, report.verdict)


def _print_diff(console: Console, found: Diff) -> None:
    from rich.table import Table

    for where, names in (("only in A", found.only_a), ("only in B", found.only_b)):
        for name in names:
            _print_line(console, f"{where} {name}")
    for other in found.metadata:
        _print_line(console, f"{other.what:<9} {other.name}: {other.a} in A, {other.b} in B")
    if found.values:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for heading in ("tensor", "differing", "of", "max |Δ|", "rms Δ", "relative"):
            table.add_column(heading, justify="left" if heading == "tensor" else "right")
        for v in found.values:
            numbers = (f"{v.max_abs:.3e}", f"{v.rms:.3e}", f"{v.relative_rms:.1e}")
            table.add_row(visible(v.name), f"{v.differing:,}", f"{v.size:,}", *numbers)
        console.print(table)
    console.print(f"{found.equal:,} tensors are equal", soft_wrap=True)


def _exactness(found: Exactness) -> str:
    """How exactly the mean of the logits is computed, and why not more so."""
    return f"{found.kind}: {'; '.join(found.because)}" if found.because else found.kind


def _print_plan(console: Console, plan: Plan, output: Place) -> None:
    from fusectl.verbs import Stacked

    record = plan.record
    facts = [
        ("writes", f"{output}"),
        ("format", plan.format + (f", item {plan.item}" if plan.item else "")),
        ("family", record.family),
        *(
            (f"source {i}", f"{s.path} ({s.format}, step {s.step}){weight}")
            for i, s in enumerate(record.made_from)
            for weight in [f", weight {record.weights[i]:g}" if record.made_from == record.sources else ""]
        ),
        *([(f"{s} from", _layers(made, s)) for s in made.layers] if isinstance(made := record.made, Stacked) else []),
        (
            "widths",
            ", ".join(f"{axis} {_sum(sizes)}" for axis, sizes in record.widths.items()),
        ),
        *([("function", _exactness(plan.exactness))] if plan.exactness is not None else []),
        ("fill", _fill(record.fill)),
        ("optimizer", record.optimizer),
        ("tensors", f"{len(plan.outputs):,}, {human(plan.nbytes)}, of which {human(plan.nonzero_bytes)} not zero"),
        ("chunks", _passing(plan)),
        ("zeros", "left out" if plan.sparse else "stored"),
        *([] if plan.mesh is None else [("mesh", _per_device(plan))]),
        ("memory", f"at most {human(plan.resources.budget)} in flight"),
    ]
    _print_facts(console, facts)
    rows = [("tensor", "shape", "axes", "dtype", "chunks", "codec", "passed")]
    rows += [
        (
            o.name,
            _shape(o.layout.shape),
            " ".join(o.layout.axes),
            o.layout.dtype,
            _shape(o.chunks),
            o.codec,
            f"{o.passed_bytes / max(o.nonzero_bytes, 1):.0%}",
        )
        for o in plan.outputs
        # The optimizer's slots are most of the tensors and follow from their parameters.
        if not o.name.startswith("state/")
    ]
    console.print()
    _print_columns(console, rows)


def _route(route: Route, path: str) -> Iterator[str]:
    yield f"keeps {route.keeps}"
    yield f"not here: {route.why_not}" if route.why_not else route.command(path)


def _sum(sizes: Sequence[int]) -> str:
    """Sizes and what they add up to; of a single one nothing else."""
    return f"{' + '.join(map(str, sizes))} = {sum(sizes)}" if len(sizes) > 1 else str(*sizes)


def _layers(made: Stacked, stack: str) -> str:
    """The layers that each layer of a stack is made from; those that add nothing are in brackets."""
    idle = made.idle[stack]
    return " ".join(f"[{layer}]" if i in idle else str(layer) for i, layer in enumerate(made.layers[stack]))


def _print_columns(console: Console, rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of which there may be thousands: Rich's tables take a millisecond for each."""
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    console.file.write("\n".join(lines) + "\n")


def _passing(plan: Plan) -> str:
    share = plan.passed_bytes / max(plan.nonzero_bytes, 1)
    how = ("linked" if plan.links else "copied") + (", checked" if plan.check_sources else ", unread")
    return f"{human(plan.passed_bytes)} ({share:.0%}) taken over as they are, {how}; the rest is encoded anew"


def _per_device(plan: Plan) -> str:
    assert plan.bytes_per_device is not None
    read = f"{human(plan.bytes_per_device)} of {human(plan.nbytes)}"
    return f"{plan.mesh}: each device reads {read}; no two different shards share a chunk"


def _print_fsck(console: Console, found: Fsck) -> None:
    facts = [
        ("checkpoint", found.path),
        ("read", f"{found.tensors:,} tensors, {human(found.bytes_read)}"),
        *(("" if i else "can tell", line) for i, line in enumerate(found.limits)),
        *(("" if i else "problems", line) for i, line in enumerate(found.problems or ["none"])),
    ]
    _print_facts(console, facts)


def _print_inspection(console: Console, seen: Inspection, *, tree: bool, rows: bool) -> None:
    checkpoint, found = seen.checkpoint, seen.tree
    step = checkpoint.step
    facts = [
        ("checkpoint", checkpoint.path),
        ("format", seen.format_says + (f", item {checkpoint.location.item}" if checkpoint.location.item else "")),
        ("family", found.family.name if found else "unknown"),
        ("because", found.evidence if found else "; ".join(seen.unrecognized[:3])),
        ("step", "absent" if step is None else f"{step:,}"),
    ]
    if found:
        facts += [
            ("sizes", ", ".join(f"{axis} {n:,}" for axis, n in found.sizes.items())),
            ("layers", ", ".join(f"{stack} {n}" for stack, n in found.depths.items())),
            ("parameters", f"{found.parameters:,}"),
        ]
    slots = f", {len(seen.state.names):,} slots" if seen.state.names else ""
    facts += [("optimizer", seen.state.kind + slots), ("tensors", f"{len(checkpoint.leaves):,}, {human(seen.nbytes)}")]
    others = [f"{node.name} ({node.value_type})" for node in checkpoint.nodes if not node.is_empty]
    if others:
        facts.append(("other leaves", ", ".join(shorten(others, 4))))
    record = checkpoint.record
    if record is None and found and found.family.norms_in_groups:
        facts.append(("norm groups", f"{found.sizes['embed']} (assumed: no fusectl.json)"))
    if record is not None:
        sources = record.sources or record.made_from
        paths = ", ".join(dict.fromkeys(source.path for source in sources)) or "unknown"
        facts += [
            ("made by", f"fusectl {record.version} {record.command} of {len(sources) or len(record.weights)}: {paths}"),
            ("norm groups", " + ".join(map(str, record.norm_groups)) + ("" if record.tells_norms else " (assumed)")),
            ("fill", _fill(record.fill)),
        ]
    _print_facts(console, facts)
    if not tree:
        return
    lines = [("tensor", "shape", "axes", "dtype", "chunks", "codec", *(["row"] if rows else []))]
    for leaf in checkpoint.leaves.values():
        stored = leaf.stored
        axes = " ".join(seen.axes(leaf.name) or ())
        where = (_shape(stored.chunks), stored.codec) if stored else ("", "in the index")
        lines.append((leaf.name, _shape(leaf.shape), axes, leaf.dtype, *where, *([_row(seen, leaf.name)] * rows)))
    console.print()
    _print_columns(console, lines)


def _row(seen: Inspection, name: str) -> str:
    """The row that took a tensor, or the one that comes nearest to what should have been taken."""
    if name in seen.nearest:
        return f"none; nearest: {seen.nearest[name]}"
    return seen.rows[name].pattern if name in seen.rows else ""


def _fill(fill: Fill) -> str:
    if fill.kind is FillKind.ZEROS:
        return fill.kind
    seed = "unknown" if fill.seed is None else fill.seed
    return f"{fill.kind} noise, {fill.noise_scale:g} of each kernel's standard deviation, seed {seed}"


def _print_facts(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    for name, value in facts:
        _print_line(console, f"{name:<12} {value}")


def _print_line(console: Console, line: str) -> None:
    console.print(visible(line), soft_wrap=True, markup=False)


def _print_path(path: Place) -> None:
    """Prints the path that a command ends with: the next one in a pipe takes it as it is."""
    print(visible(str(path)) if sys.stdout.isatty() else path)  # noqa: T201


def _print_advice(console: Console, found: Advice) -> None:
    main, small = found.main, found.small
    costs = f"a step of the large model costs {found.costs.ratio:.3g} of the small one"
    if found.costs.small_flops is not None:
        costs += f": {found.costs.large_flops:.3g} and {found.costs.small_flops:.3g} operations"
    facts = [("costs", costs)]
    facts += [(name, _fit(each)) for name, each in (("small", small), ("large", found.large)) if each is not None]
    facts.append(
        ("small's end", f"{found.made_at_end:.1%} of what it can reach is made at step {small.last_step:,.0f}")
    )
    facts.append(("break-even", f"a grown step has to lower the loss by more than {found.break_even:.2e} there"))
    if main is None:
        facts.append(("best step", "cannot be told without the large model's curve; by how much lower it would end:"))
    elif not found.grow:
        facts.append(("best step", "none: do not grow, train the large model from scratch"))
    else:
        facts += list(_best(found))
    _print_facts(console, facts)
    rows = [(f"{gap:.3g}", each) for gap, each in found.gaps.items()]
    rows = rows or [(f"{each.budget_steps:,.0f}", each) for each in found.budgets]
    heading = "gap" if main is None else "budget, large steps"
    table = [
        (
            first,
            f"{each.best_step:,.0f}" + (" (all of it)" if each.small_alone else "") if each.best_step else "none",
            f"{each.saving:.1%}",
            f"{each.loss:.4f}",
            f"{each.scratch_loss:.4f}",
        )
        for first, each in rows
    ]
    console.print()
    _print_columns(console, [(heading, "best step", "saving", "loss, grown", "loss, from scratch"), *table])
    console.print()
    _print_facts(console, [("assumed" if not i else "", line) for i, line in enumerate(found.assumptions)])


def _best(found: Advice) -> Iterator[tuple[str, str]]:
    """The answer, how sure it is, and the paper's finding beside it."""
    main, finding, pays_until = found.main, found.finding, found.pays_until
    assert main is not None
    assert found.interval is not None
    assert found.nearly is not None
    assert finding is not None
    low, high = found.interval
    yield "best step", f"{main.best_step:,.0f} of the small model; {low:,.0f} to {high:,.0f} by the curves' noise"
    yield "saving", f"{main.saving:.1%} of {main.budget_steps:,.0f} large steps, to loss {main.scratch_loss:.4f}"
    yield "within 1 %", f"{found.nearly[0]:,.0f} to {found.nearly[1]:,.0f}"
    yield "pays until", "beyond what is looked at" if pays_until is None else f"step {pays_until:,.0f}"
    yield (
        "finding",
        (
            f"{'well' if finding.well_trained else 'not well'} trained there: {finding.made:.1%} of what it can reach; "
            f"{'not converged' if finding.not_converged else 'converged'}: {finding.left:.3g} left; "
            f"{'the same' if finding.independent_of_budget else 'not the same'} for all budgets that pay for it"
        ),
    )


def _fit(fit: Fit) -> str:
    from_to = f"steps {fit.first_step:,.0f} to {fit.last_step:,.0f}, residuals {fit.rms:.1e}"
    return f"{fit.limit:.4g} + {fit.scale:.4g} (step / {fit.last_step:,.0f})^-{fit.exponent:.3g}, {from_to}"


def _print_demo(console: Console, rows: Sequence[DemoRow]) -> None:
    from rich.table import Table

    from fusectl.verification.page import outcome

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in (
        "what",
        "files",
        "weights",
        "algebra max |Δlogit|",
        "tolerance",
        "native max |Δlogit|",
        "KL",
        "top-1",
        "seconds",
    ):
        table.add_column(heading, justify="left" if heading in {"what", "files", "weights"} else "right")
    for row in rows:
        report = row.report
        files, weights, algebra, native = report.files, report.weights, report.algebra, report.native
        assert files is not None
        assert weights is not None
        assert algebra is not None
        assert native is not None
        table.add_row(
            visible(row.what),
            outcome(files),
            outcome(weights),
            f"{algebra.max_abs:.1e}",
            f"{algebra.tolerance:.1e}",
            f"{native.max_abs:.1e}",
            f"{native.kl:.1e}",
            f"{native.top1_agreement:.0%}",
            f"{row.seconds:.1f}",
        )
    console.print(table)


def _print_theory(console: Console, found: Theory) -> None:
    from rich.table import Table

    copies, series, first = len(found.sources), found.convergence, found.modified_loss
    sources = f"{found.sources[0]}, {copies} times" if found.self_fused else ", ".join(found.sources)
    norm = "a norm per source" if found.norm == Norm.PROPERTY else "one norm"
    gradients = " and ".join(f"{each:.4g}" for each in dict.fromkeys(found.small_gradients))
    facts = [
        ("fusion", f"{sources}; {norm}, {found.parameters:,} parameters, {found.precision}"),
        ("tokens", found.tokens),
        ("loss", f"{found.small_loss:.6g} of the small models in the mean, {found.big_loss:.6g} fused"),
        ("gradient", f"norm {gradients} of the small models, {found.big_gradient:.4g} fused"),
    ]
    if found.lemmas is not None:
        held, tolerance = found.lemmas, found.lemmas.tolerance
        facts += [
            ("lemma 1", _lemma(held.gradient_of_copies, tolerance, "on a copy the gradient is 1/K of the small one's")),
            ("lemma 2", _lemma(held.gradient_of_zeros, tolerance, "and the same in every zero block beside it")),
            ("lemma 3", _lemma(held.bracket_of_copies, tolerance, "the bracket is zero on the copies")),
            ("", _lemma(held.bracket_of_zeros, tolerance, "and 1/K of H grad L in every zero block")),
        ]
    bound = "=" if found.self_fused else "<=" if first.value <= first.bound else ">"
    small = "" if first.of_small_model is None else f"; {first.of_small_model:.9g} from the small model alone"
    parts = f"{found.bracket_of_copies:.4g} on the copies, {found.bracket_of_zeros:.4g} in the zero blocks"
    facts += [
        (
            "theorem 1",
            f"at h {first.h:.3g}: modified loss {first.value:.9g} {bound} {first.bound:.9g}, its bound{small}",
        ),
        ("bracket", f"norm {found.bracket_norm:.4g}: {parts}"),
    ]
    if found.bracket_defect is not None and found.self_fused:
        same = f"it respects the copies' symmetry (its own defect: {found.bracket_defect:.1e})"
        facts.append(("", f"{same}, so it is no measure of capacity gained; the symmetry defect is"))
    if found.symmetry is not None:
        facts.append(("symmetry", f"defect {found.symmetry.defect:.4g} of {found.symmetry.says}"))
    _print_facts(console, facts)
    console.print()
    layers = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("bracket in", "copied parameters", "zero blocks"):
        layers.add_column(heading, justify="left" if heading == "bracket in" else "right")
    for layer in found.layers:
        layers.add_row(visible(layer.layer), f"{layer.copies:.3g}", f"{layer.zeros:.3g}")
    console.print(layers)
    console.print()
    if series is None:
        console.print("theorem 2: no series of steps in float32, whose rounding is all that would show", soft_wrap=True)
        return
    errors = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("step h", "flow - two steps", "without bracket", "wrong sign"):
        errors.add_column(heading, justify="right")
    for row in zip(series.steps, series.with_bracket, series.without_bracket, series.wrong_sign, strict=True):
        errors.add_row(*(f"{number:.3e}" for number in row))
    errors.add_row("slope", *(f"{slope:.3f}" for slope in series.slopes))
    console.print(errors)
    part = f"{series.integration_error:.0e} of what is measured"
    console.print(f"theorem 2: slopes 3, 2 and 2 are expected; the integrator adds {part}", soft_wrap=True)


def _lemma(found: Lemma, tolerance: float, says: str) -> str:
    held = "holds" if found.error <= tolerance else "DOES NOT HOLD"
    worst = f", worst in {found.tensor}" if found.tensor else ""
    return f"{held}: {says}; off by {found.error:.1e} of the tensor's largest entry at most{worst}"


# Of the tensors of a model, those that are listed.
MOST_TENSORS = 20


def _print_symmetry(console: Console, found: Symmetry) -> None:
    facts = [
        ("model", f"{found.says}, {found.copies} copies"),
        ("symmetry", f"defect |P theta - theta| / |theta| {found.defect:.4g}"),
    ]
    _print_facts(console, facts)
    console.print()
    worst = sorted(found.tensors.items(), key=lambda pair: -pair[1])
    _print_columns(console, [("tensor", "defect"), *((name, f"{each:.4g}") for name, each in worst[:MOST_TENSORS])])
    if len(worst) > MOST_TENSORS:
        console.print(f"... and {len(worst) - MOST_TENSORS} more, none larger; --json lists them", soft_wrap=True)


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _one_line(text: str) -> str:
    return " ".join(text.split())
