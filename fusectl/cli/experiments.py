"""The command that puts the papers' claims to the test: reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fusectl.cli.options import Debug, Json, Quiet
from fusectl.render import Screen


commands = typer.Typer()


@commands.command(
    short_help="Run an experiment of the papers at a small size.",
    epilog="Example: fusectl reproduce table1 -o experiments",
)
def reproduce(
    experiment: Annotated[
        Literal["table1", "table2", "table4", "figure4", "figure5", "figure6", "starts", "finetune", "ligo"],
        typer.Argument(metavar="EXPERIMENT", help="table1, table2, table4, figure4, 5 or 6, starts, finetune or ligo."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where models and reports are kept.")],
    preset: Annotated[
        Literal["smoke", "cpu", "gpu"],
        typer.Option(help="How large: for a minute, for two cores, for a GPU."),
    ] = "cpu",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train, grow and train on small models as a paper has, and report it beside a baseline of the same compute.

    What has been trained in DIR is not trained again, so a run that was interrupted goes on.
    """
    screen = Screen("reproduce", json=json, quiet=quiet, debug=debug)
    with screen.errors():
        from fusectl.reproduce import reproduce as run_experiment

        screen.reproduced(run_experiment(experiment, preset, output, screen.note))
