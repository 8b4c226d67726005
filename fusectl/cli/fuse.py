"""The command fuse."""

from __future__ import annotations

from typing import Annotated

import typer

from fusectl.cli.options import (
    Common,
    Described,
    EqualizeBy,
    Filling,
    Grouped,
    NormOption,
    Norms,
    OfMean,
    OnDisk,
    Running,
    State,
    Writing,
    numbers_of,
    options_of,
    parse_bytes,
    spread,
)
from fusectl.cli.process import stay_on_the_cpu
from fusectl.cli.writing import write
from fusectl.errors import UsageError
from fusectl.operations.kinds import Measure


commands = typer.Typer()


@commands.command(
    cls=Grouped,
    short_help="Fuse checkpoints into one that computes their mean.",
    epilog="Example: fusectl fuse a/checkpoint_1000000 b/checkpoint_1000000 -o fused/checkpoint_1000000",
)
@spread
def fuse(
    sources: Annotated[list[str], typer.Argument(metavar="A B [C ...]", help="The checkpoints to fuse.")],
    *,
    reading: Described,
    norms: Norms,
    weights: Annotated[str | None, typer.Option(help="Weights of the mean, such as 0.7,0.3. [default: equal]")] = None,
    norm: NormOption = None,
    of_mean: OfMean,
    filling: Filling,
    equalize: Annotated[
        bool, typer.Option("--equalize", help="Make the sources' residual streams equally large for the one norm.")
    ] = False,
    equalize_by: EqualizeBy = Measure.TRACE,
    tokens: Annotated[
        str | None, typer.Option(help="For --equalize: a .npz or .jsonl of tokens. [default: random ones]")
    ] = None,
    expand_kv: Annotated[
        bool, typer.Option("--expand-kv", help="Repeat kv heads where sources have others for as many heads.")
    ] = False,
    mean_shared: Annotated[
        bool,
        typer.Option(
            "--mean-shared", help="Average tensors that do not grow (norms of queries and keys); approximate."
        ),
    ] = False,
    state: State,
    disk: OnDisk,
    running: Running,
    writing: Writing,
    common: Common,
) -> None:
    """Fuse K checkpoints block-diagonally into one of their summed widths, which computes the mean of their logits."""
    screen = common.screen("fuse")
    with screen.errors():
        stay_on_the_cpu()
        from fusectl.operations.equalize import Equalize
        from fusectl.operations.fuse import plan_fusion

        if not equalize and (equalize_by is not Measure.TRACE or tokens is not None):
            raise UsageError("--equalize-by and --tokens say how to --equalize", hint="--equalize")
        own = {"norm": norm, "expand_kv": expand_kv, "mean_shared": mean_shared}
        options = options_of(reading, norms, of_mean, filling, state, disk, running, **own)
        shares = numbers_of(weights, "--weights")
        with screen.progress() as progress:
            budget_bytes = parse_bytes(running.max_memory, "--max-memory")
            how = Equalize(equalize_by, tokens, budget_bytes, running.jobs, progress) if equalize else None
            plan, opened = plan_fusion(sources, options, weights=shares, equalize=how)
        write(screen, plan, opened, running, writing, state.lr_table)
