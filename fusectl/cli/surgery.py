"""The commands of surgery: fuse, self-fuse, noise-fill, convert."""

from __future__ import annotations

from typing import Annotated

import typer

from fusectl.cli.options import (
    Common,
    Described,
    EqualizeBy,
    Filling,
    Grouped,
    Noise,
    NormOption,
    Norms,
    OnDisk,
    Reading,
    Running,
    Source,
    State,
    StepToWrite,
    Writing,
    numbers_of,
    options_of,
    parse_bytes,
    path_of,
    spread,
)
from fusectl.cli.process import stay_on_the_cpu
from fusectl.cli.writing import write
from fusectl.errors import UsageError
from fusectl.layout.fill import FillKind
from fusectl.operations.kinds import Measure
from fusectl.optimizer.kinds import OnState


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
        options = options_of(
            disk,
            running,
            reading,
            state,
            optimizer=state.optimizer,
            fill=filling.value(),
            norm=norm,
            expand_kv=expand_kv,
            mean_shared=mean_shared,
            lineages=norms.lineages(),
        )
        shares = numbers_of(weights, "--weights")
        with screen.progress() as progress:
            budget_bytes = parse_bytes(running.max_memory, "--max-memory")
            how = Equalize(equalize_by, tokens, budget_bytes, running.jobs, progress) if equalize else None
            plan, opened = plan_fusion(sources, options, weights=shares, equalize=how)
        write(screen, plan, opened, running, writing, state.lr_table)


@commands.command(
    cls=Grouped,
    short_help="Fuse a checkpoint with itself, the function kept.",
    epilog="Example: fusectl self-fuse small/checkpoint_500000 --copies 2 --fill antisymmetric",
)
@spread
def self_fuse(
    source: Source = None,
    *,
    reading: Described,
    norms: Norms,
    copies: Annotated[int, typer.Option("--copies", "-k", help="How many copies stand side by side.")] = 2,
    filling: Filling,
    state: State,
    disk: OnDisk,
    running: Running,
    writing: Writing,
    common: Common,
) -> None:
    """Fuse a checkpoint with itself: K times as wide, the same function."""
    screen = common.screen("self-fuse")
    with screen.errors():
        from fusectl.operations.fuse import plan_fusion

        if copies < 2:
            raise UsageError(f"--copies {copies}: fusing takes two or more")
        more = {"fill": filling.value(), "lineages": norms.lineages()}
        options = options_of(disk, running, reading, state, optimizer=state.optimizer, **more)
        plan, opened = plan_fusion([path_of(source)] * copies, options, command="self-fuse")
        write(screen, plan, opened, running, writing, state.lr_table)


@commands.command(
    cls=Grouped,
    short_help="Fill the zero blocks of a fusion with noise.",
    epilog="Example: fusectl fuse a b | fusectl noise-fill --noise-scale 0.1 | fusectl verify",
)
@spread
def noise_fill(
    source: Source = None,
    *,
    reading: Reading,
    copies: Annotated[
        int | None, typer.Option("--copies", "-k", help="For a fusion without fusectl.json: its K.")
    ] = None,
    noise: Noise,
    step: StepToWrite,
    disk: OnDisk,
    running: Running,
    writing: Writing,
    common: Common,
) -> None:
    """Fill the zero blocks of a fused checkpoint with low-variance noise."""
    screen = common.screen("noise-fill")
    with screen.errors():
        from fusectl.operations.noise_fill import plan_noise_fill

        if noise.fill == FillKind.ZEROS:
            raise UsageError("--fill zeros: there are zeros already", hint="--fill gaussian or antisymmetric")
        options = options_of(disk, running, reading, step, optimizer=OnState.RESET, fill=noise.value())
        plan, opened = plan_noise_fill(path_of(source), options, copies=copies)
        write(screen, plan, opened, running, writing)


@commands.command(
    cls=Grouped,
    short_help="Write a checkpoint in another format.",
    epilog="Example: fusectl convert runs/a/checkpoint_1000000 --format orbax -o runs/b/1000000",
)
@spread
def convert(
    source: Source = None,
    *,
    reading: Reading,
    scan: Annotated[
        bool | None, typer.Option("--scan/--unscan", help="Stack the layers along an axis, or each for itself.")
    ] = None,
    drop_optimizer: Annotated[bool, typer.Option("--drop-optimizer", help="Leave the optimizer's state out.")] = False,
    step: StepToWrite,
    disk: OnDisk,
    running: Running,
    writing: Writing,
    common: Common,
) -> None:
    """Write a checkpoint in another format or dtype, with its layers stacked or not, the optimizer's state included."""
    screen = common.screen("convert")
    with screen.errors():
        from fusectl.operations.convert import plan_conversion

        options = options_of(disk, running, reading, step, optimizer=OnState.DROP if drop_optimizer else OnState.CARRY)
        layers = None if scan is None else "scanned" if scan else "unscanned"
        plan, opened = plan_conversion(path_of(source), options, layers)
        write(screen, plan, opened, running, writing)
