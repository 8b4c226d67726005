"""The commands that look at a checkpoint and write none: inspect, plot, restart-config."""

from __future__ import annotations

from typing import Annotated

import typer

from fusectl.cli.options import (
    Arch,
    Common,
    Force,
    Grouped,
    Jobs,
    MaxMemory,
    Norms,
    Source,
    TrainerOption,
    parse_bytes,
    path_of,
    spread,
)
from fusectl.cli.screen import Screen
from fusectl.errors import Corrupt


commands = typer.Typer()


@commands.command(
    cls=Grouped,
    short_help="Show what a checkpoint is.",
    epilog="Example: fusectl inspect runs/a/latest --json | jq .result.sizes",
)
@spread
def inspect(
    source: Source = None,
    *,
    arch: Arch = None,
    norms: Norms,
    tree: Annotated[bool, typer.Option("--tree/--no-tree", help="List the tensors.")] = True,
    fsck: Annotated[
        bool, typer.Option("--fsck", help="Read all of it instead, and list everything that is wrong with it.")
    ] = False,
    max_memory: MaxMemory = None,
    jobs: Jobs = None,
    common: Common,
) -> None:
    """Show what a checkpoint is: format, family, step, sizes, optimizer, and every tensor.

    Reads metadata only, unless all of it is asked for.
    """
    screen = common.screen("inspect")
    with screen.errors():
        if fsck:
            _fsck(screen, path_of(source), arch, max_memory, jobs)
            return
        from fusectl.inspection.inspect import inspect as run_inspect

        seen = run_inspect(path_of(source), arch, norms.lineage())
        screen.inspection(seen, tree=tree, rows=arch is not None)
        # What was found is printed before its faults are raised: the tensors are what one needs to see why a tree is
        # refused.
        seen.require_recognized()
        seen.require_complete()


def _fsck(screen: Screen, path: str, arch: str | None, max_memory: str | None, jobs: int | None) -> None:
    from fusectl.inspection.fsck import fsck as run_fsck

    with screen.progress() as progress:
        budget_bytes = parse_bytes(max_memory, "--max-memory")
        found = run_fsck(path, arch, max_memory_bytes=budget_bytes, jobs=jobs, progress=progress)
    screen.fsck(found)
    if found.problems:
        n = len(found.problems)
        raise Corrupt(f"{found.path}: {n:,} problem{'s' if n > 1 else ''}", details=found.problems)


@commands.command(
    cls=Grouped,
    short_help="Draw a tensor, and how its zero blocks catch up.",
    epilog="Example: fusectl plot grown/checkpoint_1000 --tensor encoder/layers_0/mlp/wi_0/kernel -o wi.png",
)
@spread
def plot(
    tensor: Annotated[str, typer.Option(metavar="NAME", help="The parameter; `target/` may be left out.")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="The picture, such as out.png.")],
    source: Source = None,
    *,
    over_time: Annotated[
        list[str],
        typer.Option("--over-time", metavar="STEP1 STEP2 ...", help="More checkpoints of the run, to draw the ratio."),
    ] = [],  # noqa: B006
    layer: Annotated[int | None, typer.Option(help="Of a tensor that stacks layers, which one.", min=0)] = None,
    copies: Annotated[
        int | None, typer.Option("--copies", "-k", help="For a fusion without fusectl.json: its K.")
    ] = None,
    arch: Arch = None,
    max_memory: MaxMemory = None,
    jobs: Jobs = None,
    force: Force = False,
    common: Common,
) -> None:
    """Draw |W| of a kernel with the borders between its sources, and from step to step how its zero blocks catch up."""
    screen = common.screen("plot")
    with screen.errors():
        from fusectl.inspection.heatmap import measure
        from fusectl.research.pictures import draw_heat_map, new_picture

        # The file's place and its format are checked before the tensor is read.
        file = new_picture(output, force=force)
        with screen.progress() as progress:
            found = measure(
                [path_of(source), *over_time],
                tensor,
                layer=layer,
                copies=copies,
                arch=arch,
                max_memory_bytes=parse_bytes(max_memory, "--max-memory"),
                jobs=jobs,
                progress=progress,
            )
        draw_heat_map(found, file)
        screen.heat_map(found, file)


@commands.command(
    cls=Grouped,
    short_help="Print what a trainer has to be told.",
    epilog="Example: fusectl restart-config grown/checkpoint_1000000 > grown.gin",
)
@spread
def restart_config(
    source: Source = None,
    *,
    trainer: TrainerOption = None,
    lr_offset: Annotated[
        int,
        typer.Option(help="Steps by which T5X's schedule is ahead; negative ones hold the maximal rate for longer."),
    ] = 0,
    gin: Annotated[
        list[str],
        typer.Option(
            "--gin", metavar="FILE", help="A gin file of T5X's small model, to repeat its settings; may be given again."
        ),
    ] = [],  # noqa: B006
    norms: Norms,
    arch: Arch = None,
    common: Common,
) -> None:
    """Print what T5X (gin), MaxText (overrides) or Gemma (Python) goes on with: sizes, path, what is to be restored."""
    screen = common.screen("restart-config")
    with screen.errors():
        from fusectl.restart import restart

        path = path_of(source)
        screen.restart(restart(path, arch, trainer=trainer, lr_offset=lr_offset, gin=gin, lineage=norms.lineage()))
