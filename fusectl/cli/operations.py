"""The commands that are made of their rows in fusectl.verbs: each plans, and writes."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import typer

from fusectl.cli.options import Grouped, command_of, options_of, path_of
from fusectl.cli.writing import write
from fusectl.verbs import VERBS, Verb


commands = typer.Typer()


def _run(verb: Verb, *, source: str | None, own: Any = None, **groups: Any) -> None:
    screen = groups["common"].screen(verb.name)
    with screen.errors():
        # Nothing is read from a pipe for options that make no sense.
        given = {} if own is None else own.given()
        options = options_of(*(group for group in groups.values() if hasattr(group, "given")))
        plan, opened = verb.planner()(path_of(source), options, **given)
        state = groups.get("State")
        write(screen, plan, opened, groups["running"], groups["writing"], None if state is None else state.lr_table)


for _verb in VERBS.values():
    if _verb.about:
        commands.command(_verb.name, cls=Grouped, short_help=_verb.says, epilog=f"Example: {_verb.example}")(
            command_of(_verb, partial(_run, _verb))
        )


def command_called(name: str) -> Any:
    """The function that a command of operations runs, by the command's name."""
    module = "operations" if VERBS[name].about else name.replace("-", "_")
    found = import_module(f"fusectl.cli.{module}").commands.registered_commands
    return next(each.callback for each in found if each.callback.__name__ == name.replace("-", "_"))
