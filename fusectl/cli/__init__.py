"""The command line: which commands there are, and running one of them.

operations                              the commands that are made of their rows in fusectl.verbs
fuse, ligo, grow, proof, looking,
experiments, demo                       the others: each parses, calls the library once, renders once
options                                 the options that they have in common, and what is made of their values
writing                                 what those end with that write a checkpoint
process                                 arguments, standard streams, signals

fusectl.operations, fusectl.verification and others do the work, screen.py prints. Imports that cost time live in the
functions: --help and completion must not pay for numpy, tensorstore or JAX.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from copy import copy
from importlib import import_module
from typing import Annotated

import typer
from typer.models import CommandInfo

from fusectl.cli.options import GATHERED, gather
from fusectl.cli.process import ARGUMENTS, handle_signals, let_end, prepare_streams
from fusectl.cli.screen import Screen, Terminated
from fusectl.errors import StorageError
from fusectl.system.memory import prepare_process
from fusectl.verbs import VERBS


# The module that each command is in, in the order of --help.
# The table stands here, and not where the commands are, so that a run imports the module of its own command alone.
MODULES = {
    "fuse": "fuse",
    **{name: "operations" for name, verb in VERBS.items() if verb.about},
    "ligo": "ligo",
    "grow": "grow",
    "verify": "proof",
    "diff": "proof",
    "inspect": "looking",
    "plot": "looking",
    "restart-config": "looking",
    "theory": "experiments",
    "when": "experiments",
    "reproduce": "experiments",
    "demo": "demo",
}

HELP = {"-h", "--help"}

app = typer.Typer(
    name="fusectl",
    help="Fuse trained T5X and Orbax checkpoints into one wider model, stream it, prove it.",
    epilog=(
        "Exit codes: 0 ok, 1 unexpected, 2 usage, 3 verification failed, 4 not found, 5 corrupt or incomplete, "
        "6 incompatible inputs, 7 output exists, 8 storage or permission, 9 not enough disk or memory, 130, 143."
    ),
    no_args_is_help=True,
    # Rich's help costs 80 ms and needs a terminal.
    rich_markup_mode="rich" if sys.stdout and sys.stdout.isatty() else None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": sorted(HELP)},
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        import fusectl

        print(f"fusectl {fusectl.__version__}")  # noqa: T201
        raise typer.Exit


def run(arguments: Sequence[str]) -> int:
    """Runs the command line; its exit code."""
    # The order matters: BLAS reads its number of threads when numpy is loaded, the allocator has to be set before
    # threads are started, and signals are handled before anything is imported that takes long.
    prepare_process()
    prepare_streams()
    ARGUMENTS[:] = arguments
    argv = gather(list(arguments), *GATHERED)
    command = next((word for word in argv if not word.startswith("-")), "fusectl")
    screen = Screen(command, json="--json" in argv, quiet=False, debug="--debug" in argv)
    handle_signals()
    try:
        # Completion needs the options of all commands; --help alone needs their names: reading no options brought it
        # from 140 to 88 ms of CPU.
        listed = "_FUSECTL_COMPLETE" not in os.environ and not {*argv} - HELP
        # Typer by itself would end with 1 where a pipe is closed.
        try:
            code = _with_only(command, listed=listed)(args=argv, prog_name="fusectl", standalone_mode=False)
        except SystemExit as error:
            # Typer exits for a broken pipe, and also once it has completed a word for a shell.
            if isinstance(error.__context__, OSError):
                raise
            code = error.code if isinstance(error.code, int) else error.code is not None
        sys.stdout.flush()
    except typer.TyperException as error:
        return screen.usage_error(error)
    except (BrokenPipeError, SystemExit):
        # Python flushes once more at its own exit, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # The result could not be printed: standard output is a full disk, say.
        print(f"error: standard output: {error}", file=sys.stderr)  # noqa: T201
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return StorageError.exit_code
    except Terminated as error:
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    finally:
        let_end()
    return int(code or 0)


def _with_only(command: str, *, listed: bool = False) -> typer.Typer:
    """The program with the command asked for alone, if it is one: Typer reads the signature of each that it has.

    Commands that are only `listed`, with their first sentences, are without their options: reading those of all of them
    takes half of the time of --help.
    """
    asked = {command: MODULES[command]} if command in MODULES else MODULES
    only = copy(app)
    only.registered_commands = [
        _without_options(each) if listed else each
        for module in dict.fromkeys(asked.values())
        for each in import_module(f"fusectl.cli.{module}").commands.registered_commands
        if each.callback is not None and typer.main.get_command_name(each.callback.__name__) in asked
    ]
    return only


def _without_options(command: CommandInfo) -> CommandInfo:
    """The command's name and text alone."""

    def listed() -> None:
        raise AssertionError

    assert command.callback is not None
    listed.__name__, listed.__doc__ = command.callback.__name__, command.callback.__doc__
    found = copy(command)
    found.callback = listed
    return found
