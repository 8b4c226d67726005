"""The commands that say what growing is worth: theory, when, reproduce."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fusectl.cli.options import (
    Arch,
    Common,
    Configs,
    Drop,
    FillOption,
    Force,
    Grouped,
    NoiseScale,
    NormOption,
    Norms,
    fill_of,
    parse_bytes,
    path_of,
    spread,
)
from fusectl.cli.process import stay_on_the_cpu
from fusectl.errors import UsageError
from fusectl.families.kinds import Norm
from fusectl.layout.fill import FillKind
from fusectl.research.kinds import Experiment, PresetName


commands = typer.Typer()


@commands.command(
    cls=Grouped,
    short_help="Measure what growth does to training.",
    epilog="Example: fusectl theory small/checkpoint_500000 --copies 2 --data corpus.txt --plot theory.png",
)
@spread
def theory(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CKPT [B ...]]", help="The checkpoint, or several; read from a pipe if left out."),
    ] = None,
    *,
    copies: Annotated[
        int | None, typer.Option("--copies", "-k", help="Of a single checkpoint, how many stand side by side.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Text, tokens, or module:function for the losses. [default: random tokens]"),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of the batch. [default: 4; 8 of --data]", min=1)] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per row. [default: 16; 64 of --data]", min=4)] = None,
    target_length: Annotated[
        int | None,
        typer.Option(help="With --data: the targets' length. [default: what spans make]", min=1),
    ] = None,
    sentinel: Annotated[
        int | None, typer.Option(help="With --data: the first span's token. [default: the vocabulary's]")
    ] = None,
    norm: NormOption = Norm.PROPERTY,
    norms: Norms,
    fill: FillOption = FillKind.ZEROS,
    noise_scale: NoiseScale = None,
    seed: Annotated[
        int, typer.Option(help="The seed of random tokens, of the order of data, and of noise.", min=0)
    ] = 0,
    x64: Annotated[
        bool, typer.Option("--x64/--no-x64", help="Compute in float64, or in float32 without Theorem 2.")
    ] = True,
    symmetry: Annotated[
        bool,
        typer.Option("--symmetry", help="Only the symmetry defect of what is a fusion already, of --copies."),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it, such as out.png; needs fusectl[plot].")
    ] = None,
    arch: Arch = None,
    config: Configs = [],  # noqa: B006
    drop: Drop = [],  # noqa: B006
    max_memory: Annotated[
        str | None, typer.Option(help="The most bytes that the models may take. [default: half of the free memory]")
    ] = None,
    common: Common,
) -> None:
    """Measure Deep Fusion's theory on a fusion of one's own: gradients, lemmas, the Lie bracket, the modified flow.

    Of a checkpoint that is a fusion by its record, how far its copies are from being exchangeable.
    """
    screen = common.screen("theory")
    with screen.errors():
        stay_on_the_cpu()
        from fusectl.planning.options import Options
        from fusectl.research.theory.fusion import Batch, is_fusion, paths_of
        from fusectl.research.theory.fusion import symmetry as run_symmetry
        from fusectl.research.theory.fusion import theory as run_theory

        if plot is not None:
            from fusectl.research.pictures import draw_theory, require_picture

            require_picture(plot, "--plot")
        paths = sources or [path_of(None)]
        options = Options(fill=fill_of(fill, noise_scale, seed), arch=arch, drop=tuple(drop), norm=norm)
        options = replace(options, configs=tuple(config), lineages=norms.lineages())
        # A fusion named alone is asked for its own symmetry; fusing it once more would need --copies.
        if symmetry or (len(paths) == 1 and copies is None and is_fusion(paths[0], options)):
            if len(paths) > 1 or plot is not None or data is not None:
                raise UsageError("--symmetry: of one checkpoint, without --data and --plot")
            with screen.progress() as progress:
                screen.symmetry(run_symmetry(paths[0], options, copies, progress))
            return
        examples = Batch(data, batch, length, target_length, sentinel, seed)
        budget_bytes = parse_bytes(max_memory, "--max-memory")
        found = run_theory(
            paths_of(paths, copies), options, examples, x64=x64, budget_bytes=budget_bytes, note=screen.note
        )
        screen.theory(found)
        if plot is not None:
            draw_theory(found, plot)


@commands.command(
    cls=Grouped,
    short_help="Say at which step to fuse, from loss curves and costs.",
    epilog="Example: fusectl when small.csv --large-curve large.csv --small small/checkpoint_500000 --copies 2",
)
@spread
def when(
    curve: Annotated[str, typer.Argument(metavar="CURVE", help="The small model's losses: .csv, .jsonl, event files.")],
    *,
    large_curve: Annotated[
        str | None, typer.Option(metavar="CURVE", help="The large model's losses, trained from scratch.")
    ] = None,
    gap: Annotated[
        float | None,
        typer.Option(metavar="LOSS", help="Without --large-curve: assume that the large one ends lower by so much."),
    ] = None,
    cost_ratio: Annotated[
        float | None, typer.Option(help="How many of the small model's steps one of the large model costs.")
    ] = None,
    small_flops: Annotated[float | None, typer.Option(help="Operations of a step of the small model.")] = None,
    large_flops: Annotated[float | None, typer.Option(help="Operations of a step of the large model.")] = None,
    small: Annotated[
        str | None, typer.Option(metavar="CKPT", help="A checkpoint of the small model, whose steps are counted.")
    ] = None,
    copies: Annotated[
        int | None, typer.Option("--copies", "-k", help="With --small: the large one is this many of it.", min=2)
    ] = None,
    large: Annotated[
        str | None,
        typer.Option(metavar="NAME=N,...|FILE|CKPT", help="With --small: the large one's sizes, as for grow --to."),
    ] = None,
    batch: Annotated[int, typer.Option(help="With --small: rows of a batch.", min=1)] = 128,
    length: Annotated[int, typer.Option(help="With --small: tokens of a row.", min=1)] = 512,
    target_length: Annotated[
        int | None,
        typer.Option(help="With --small: tokens of a row of targets. [default: as the spans of --length make]", min=1),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(metavar="STEPS", help="All compute, in steps of the large model. [default: as many as its curve]"),
    ] = None,
    budget_flops: Annotated[float | None, typer.Option(metavar="FLOPS", help="The same in operations.")] = None,
    fit_from: Annotated[
        float | None,
        typer.Option(metavar="STEP", help="Leave out what is before. [default: a twentieth of each curve]"),
    ] = None,
    step_column: Annotated[str | None, typer.Option(metavar="NAME", help="The steps' column. [default: step]")] = None,
    loss_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The losses' column, or tag. [default: loss]")
    ] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="Draw it, such as when.png.")] = None,
    arch: Arch = None,
    force: Force = False,
    common: Common,
) -> None:
    """Say at which step of the small model fusing it with itself saves most compute, how much, by what assumptions."""
    screen = common.screen("when")
    with screen.errors():
        from fusectl.research.curves import read_curve
        from fusectl.research.pictures import draw_advice, new_picture
        from fusectl.research.when import advise, budget_of, costs_of

        picture = None if plot is None else new_picture(plot, "--plot", force=force)
        counted = (small, copies, large, arch, batch, length, target_length)
        costs = costs_of(cost_ratio, small_flops, large_flops, *counted)
        curves = [
            None if path is None else read_curve(path, step_column=step_column, loss_column=loss_column)
            for path in (curve, large_curve)
        ]
        assert curves[0] is not None
        found = advise(
            curves[0],
            costs,
            large=curves[1],
            gap=gap,
            budget_steps=budget_of(budget, budget_flops, costs),
            fit_from=fit_from,
        )
        if picture is not None:
            draw_advice(found, picture)
        screen.advice(found, picture)


@commands.command(
    cls=Grouped,
    short_help="Run an experiment of the papers at a small size.",
    epilog="Example: fusectl reproduce table1 -o experiments",
)
@spread
def reproduce(
    experiment: Annotated[
        Experiment,
        typer.Argument(metavar="EXPERIMENT", help="table1, table2, table4, figure4, 5 or 6, starts, finetune or ligo."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where models and reports are kept.")],
    *,
    preset: Annotated[
        PresetName,
        typer.Option(help="How large: for a minute, for two cores, for a GPU."),
    ] = PresetName.CPU,
    common: Common,
) -> None:
    """Train, grow and train on small models as a paper has, and report it beside a baseline of the same compute.

    What has been trained in DIR is not trained again, so a run that was interrupted goes on.
    """
    screen = common.screen("reproduce")
    with screen.errors():
        from fusectl.research.reproduce import reproduce as run_experiment

        screen.reproduced(run_experiment(experiment, preset, output, screen.note))
