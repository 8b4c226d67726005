"""The commands that compare checkpoints: verify, diff."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fusectl.cli.options import (
    Arch,
    Common,
    Grouped,
    Jobs,
    MaxMemory,
    Norms,
    Source,
    numbers_of,
    parse_bytes,
    path_of,
    require_scale,
    spread,
)
from fusectl.cli.process import stay_on_the_cpu
from fusectl.errors import FusectlError, VerificationFailed
from fusectl.families.kinds import FactorIn
from fusectl.layout.fill import FillKind


commands = typer.Typer()


@commands.command(
    cls=Grouped,
    short_help="Prove that a fusion is what it should be.",
    epilog="Example: fusectl verify fused/checkpoint_1000000 --x64",
)
@spread
def verify(
    fused: Source = None,
    *,
    sources: Annotated[
        list[str],
        typer.Option("--sources", metavar="A B ...", help="What it was fused from. [default: as in fusectl.json]"),
    ] = [],  # noqa: B006
    levels: Annotated[
        str | None, typer.Option(help="Which of files, weights, algebra, native to run. [default: all]")
    ] = None,
    x64: Annotated[bool, typer.Option("--x64", help="Run the forward passes in float64.")] = False,
    tokens: Annotated[
        str | None, typer.Option(metavar="FILE", help="A .npz or .jsonl of tokens. [default: random ones]")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Rows of random tokens, or the most of FILE. [default: 4, or all]", min=1)
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens per row, or the most of FILE. [default: 16, or all]", min=4)
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed of random tokens.", min=0)] = 0,
    trace: Annotated[
        bool, typer.Option("--trace", help="Print what reaches every norm, and what one norm multiplies it with.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the trace, such as out.png; needs fusectl[plot].")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Leave fusectl-verify.json and fusectl-verify.md in the checkpoint.")
    ] = False,
    max_native_rms: Annotated[
        float | None, typer.Option(help="Fail if the native logits are further than this (rms) from the ensemble's.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="The weights of the mean. [default: as in fusectl.json]")] = None,
    factor_in: Annotated[
        FactorIn | None,
        typer.Option("--factor-in", help="What carries the weights of the mean. [default: as in fusectl.json]"),
    ] = None,
    fill: Annotated[
        FillKind | None,
        typer.Option(help="What stands where no source does. [default: as in fusectl.json]"),
    ] = None,
    noise_scale: Annotated[
        float | None, typer.Option(help="The noise's scale. [default: as in fusectl.json; 0.1 for another --fill]")
    ] = None,
    arch: Arch = None,
    norms: Norms,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="A decoder's config. [default: as in fusectl.json]")
    ] = None,
    layered: Annotated[
        bool | None,
        typer.Option(
            "--layered/--whole", help="Run models layer by layer, or all layers at once. [default: whole if it fits]"
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(help="The most bytes of values at a time. [default: 256MiB; half of the free memory for models]"),
    ] = None,
    jobs: Jobs = None,
    common: Common,
) -> None:
    """Prove a fused checkpoint: files, weights, the ensemble's function, and how far the trainer's model is from it."""
    screen = common.screen("verify")
    with screen.errors():
        stay_on_the_cpu()
        from fusectl.formats.opening import open_checkpoint
        from fusectl.verification import Declared, Settings, verify_checkpoint, write_report

        if plot is not None:
            from fusectl.research.pictures import require_picture

            require_picture(plot, "--plot")
        if noise_scale is not None:
            require_scale(noise_scale)
        declared = Declared(tuple(sources), numbers_of(weights, "--weights"), fill, noise_scale, arch, config)
        declared = replace(declared, lineages=norms.lineages(), factor_in=factor_in)
        settings = Settings(
            levels=None if levels is None else tuple(level.strip() for level in levels.split(",")),
            x64=x64,
            tokens=tokens,
            batch=batch,
            length=length,
            seed=seed,
            max_native_rms=max_native_rms,
            trace=trace or plot is not None,
            layered=layered,
            max_memory_bytes=parse_bytes(max_memory, "--max-memory"),
            jobs=jobs,
        )
        opened = open_checkpoint(path_of(fused))
        with screen.progress() as progress:
            found = verify_checkpoint(opened, declared, settings, progress)
        screen.report(found)
        try:
            if report:
                write_report(found, opened.location.home)
            if plot is not None and found.trace:
                from fusectl.verification.page import draw

                draw(found.trace, plot)
        except FusectlError as error:
            # The verdict is the more important news.
            if found.passed is not False:
                raise
            screen.note(error.message)
        if found.passed is False:
            raise VerificationFailed(f"{found.path}: verification failed", details=found.failures())


@commands.command(
    cls=Grouped,
    short_help="Show what two checkpoints differ in.",
    epilog="Example: fusectl diff runs/a/checkpoint_1000 runs/b/latest",
)
@spread
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The one to compare it with, of any format.")],
    *,
    atol: Annotated[float, typer.Option(help="Values no further apart than this are equal.")] = 0.0,
    max_memory: MaxMemory = None,
    jobs: Jobs = None,
    common: Common,
) -> None:
    """Compare two checkpoints tensor by tensor: names, shapes, dtypes, steps, values. Exit code 3 if they differ."""
    screen = common.screen("diff")
    with screen.errors():
        from fusectl.inspection.diff import diff as run_diff

        budget_bytes = parse_bytes(max_memory, "--max-memory")
        with screen.progress() as progress:
            found = run_diff(a, b, atol=atol, max_memory_bytes=budget_bytes, jobs=jobs, progress=progress)
        screen.diff(found)
        if not found.same:
            raise VerificationFailed(f"{found.a} and {found.b} differ")
