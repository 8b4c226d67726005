"""The command that shows what there is: demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusectl.cli.options import Common, Grouped, spread
from fusectl.cli.process import stay_on_the_cpu
from fusectl.errors import VerificationFailed


commands = typer.Typer()


@commands.command(cls=Grouped, short_help="Make, fuse and verify small models.", epilog="Example: fusectl demo")
@spread
def demo(
    *,
    directory: Annotated[Path | None, typer.Option("-o", "--output", help="Keep the checkpoints here.")] = None,
    common: Common,
) -> None:
    """Make two small T5 checkpoints, fuse, self-fuse and noise-fill them, and verify the results."""
    screen = common.screen("demo")
    with screen.errors():
        stay_on_the_cpu()
        from fusectl.demo import demo as run_demo

        rows = run_demo(directory, screen.note)
        screen.demo(rows)
        # The demo is its own test: whoever installs fusectl sees at once whether its proofs hold there.
        if not all(row.report.passed for row in rows):
            raise VerificationFailed("the demo's own checkpoints failed", hint="please report it")
