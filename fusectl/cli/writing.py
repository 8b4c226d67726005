"""What every writing command ends with: the plan shown, or carried out and proven."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fusectl.cli.options import Proven, Writing, parse_bytes
from fusectl.cli.process import ARGUMENTS, stay_on_the_cpu
from fusectl.cli.screen import Screen
from fusectl.errors import FusectlError, UsageError, VerificationFailed


if TYPE_CHECKING:
    from fusectl.formats.objects import Place
    from fusectl.formats.tree import Checkpoint
    from fusectl.planning.plan import Plan


def final_place(output: str | None, opened: Sequence[Any], plan: Plan) -> Place:
    """Where the output is going to be."""
    from fusectl.formats.locate import place
    from fusectl.writing.carrying_out import default_output

    return default_output(opened, plan) if output is None else place(output)


def write(
    screen: Screen, plan: Plan, opened: Sequence[Any], running: Proven, writing: Writing, lr_table: str | None = None
) -> None:
    """What every writing command ends with: the plan shown, or carried out and the output's path printed."""
    from fusectl.formats.locate import local
    from fusectl.writing.carrying_out import carry_out, check_output, check_table, write_table

    if running.verify and running.lets_nonfinite_pass:
        raise UsageError("--verify proves nothing about NaN and Inf", hint="without --allow-nonfinite or --verify")
    if running.verify and not plan.record.made_from:
        raise UsageError(
            "--verify: nobody says what it was fused from", hint="without it, then fusectl verify OUT --sources A B"
        )
    if not (running.verify or running.report):
        raise UsageError("--no-report: of a proof that was not asked for", hint="--verify --no-report")
    if lr_table is not None and not plan.rates:
        raise UsageError("--lr-table: for copies of one model with equal weights; between others no rate fits all")
    final = final_place(writing.output, opened, plan)
    # With --resume the output path may hold the finished output of this very plan; carry_out reads it to find out.
    if not running.resume:
        check_output(final, opened, force=writing.force)
    for note in plan.notes:
        screen.note(note)
    # The table is looked for before hours of writing, and written after them.
    table = None if lr_table is None or running.dry_run else local(lr_table)
    if table is not None:
        check_table(plan, table, force=writing.force, resume=running.resume)
    if running.dry_run:
        screen.plan(plan, final)
        return
    with screen.progress() as progress:

        def check(written: Checkpoint) -> None:
            stay_on_the_cpu()
            from fusectl.verification import Settings, verify_checkpoint, write_report

            # Where it is going to appear, not where it has been staged.
            budget_bytes = parse_bytes(running.max_memory, "--max-memory")
            named = tuple(source.path for source in opened)
            settings = Settings(jobs=running.jobs, max_memory_bytes=budget_bytes, named=named)
            found = replace(verify_checkpoint(written, settings=settings, progress=progress), path=str(final))
            screen.verified(found)
            if not found.passed:
                raise VerificationFailed(f"{final}: verification failed, nothing was kept", details=found.failures())
            if running.report:
                write_report(found, written.location.home)

        # The free memory may be another when it goes on, and the chunks with it.
        budget = [] if running.max_memory else ["--max-memory", str(plan.resources.budget)]
        carry_out(
            plan,
            opened,
            final,
            force=writing.force,
            jobs=running.jobs,
            allow_nonfinite=running.lets_nonfinite_pass,
            sync=writing.sync,
            resume=running.resume,
            progress=progress,
            # The proof runs between the last byte and the rename, so that what fails never appears under its name.
            check=check if running.verify else None,
            note=screen.note,
            kept=lambda: screen.resumable([*ARGUMENTS, *budget]),
        )
    if table is not None:
        write_table(plan, table, force=writing.force, resume=running.resume)
    screen.written(plan, final)
    # The lines for the trainer go to standard error: standard output is the path alone, for the next command in a pipe.
    if not screen.is_silent:
        _say_how_to_go_on(screen, plan, final)


def _say_how_to_go_on(screen: Screen, plan: Plan, final: Place) -> None:
    """Prints what the trainer has to be told; of a copy only if it does not restore it."""
    from fusectl.restart import NotRead, restart
    from fusectl.verbs import Converted

    # The command after it in a pipe may have moved it.
    with suppress(FusectlError):
        try:
            found = restart(str(final), plan.record.family)
        except NotRead as error:
            screen.note(f"{error.message}; {error.hint}")
            return
        if not isinstance(plan.record.made, Converted):
            screen.restart_lines(found)
