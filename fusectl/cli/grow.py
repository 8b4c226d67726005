"""The command grow: which operations lead to larger sizes, and running one of them."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from fusectl.cli.operations import command_called
from fusectl.cli.options import (
    Arch,
    Common,
    DryRun,
    Force,
    Grouped,
    MaxMemory,
    Output,
    Source,
    Verify,
    path_of,
    spread,
)
from fusectl.errors import Incompatible, UsageError
from fusectl.verbs import VERBS


if TYPE_CHECKING:
    Way = str
else:
    # For the parser: the ways that rows name.
    Way = StrEnum("Way", {way: way for verb in VERBS.values() for way in verb.routes})

commands = typer.Typer()


@commands.command(
    cls=Grouped,
    short_help="Say which operator leads to larger sizes, and what it keeps.",
    epilog="Example: fusectl grow small/checkpoint_500000 --to emb=1024,heads=16,mlp=4096,layers=12",
)
@spread
def grow(
    source: Source = None,
    *,
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="NAME=N,...|FILE|CKPT", help="Sizes, a config (yml, json, gin), or another checkpoint."
        ),
    ] = None,
    how: Annotated[
        Way | None,
        typer.Option(help="Grow by this operator. [default: say what there is]"),
    ] = None,
    data: Annotated[str | None, typer.Option(help="For ligo: what to learn from.")] = None,
    output: Output = None,
    arch: Arch = None,
    max_memory: MaxMemory = None,
    force: Force = False,
    dry_run: DryRun = False,
    verify: Verify = False,
    common: Common,
) -> None:
    """Say which operators lead from a checkpoint to larger sizes and what each keeps; run the one that is asked for."""
    screen = common.screen("grow")
    with screen.errors():
        from fusectl.formats.opening import open_checkpoint
        from fusectl.operations.routes import routes
        from fusectl.operations.target import read_target
        from fusectl.sources.opened import recognized
        from fusectl.sources.packed_qkv import unpacked

        path = path_of(source)
        if to is None:
            raise UsageError("--to: what to grow to", hint="--to emb=1024,heads=16,mlp=4096,layers=12")
        checkpoint = unpacked(open_checkpoint(path))
        tree = recognized(checkpoint, arch)
        found = routes(tree, read_target(to, tree), path)
        if how is None:
            screen.routes(found, path)
            return
        route = next(each for each in found if each.how == how)
        if route.why_not:
            raise Incompatible(f"{path}: {how} does not lead there", details=(route.why_not,), hint="without --how")
        # The two would need a place for the checkpoint between them, which the pipe that is printed leaves to the user.
        if len(route.steps) > 1:
            raise UsageError(f"--how {how}: two steps, of which each writes a checkpoint", hint=route.command(path))
        ((name, given),) = route.steps
        options = {**given, "arch": arch, "output": output, "max_memory": max_memory}
        options |= {"force": force, "dry_run": dry_run, "verify": verify}
        if route.data is not None:
            options[route.data] = data
    # It prints what it has done, and its errors, itself.
    command_called(name)(path, **options, json=common.json, quiet=common.quiet, debug=common.debug)
