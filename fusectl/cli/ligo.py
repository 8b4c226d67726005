"""The command ligo: learning an operator, and applying it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusectl.cli.options import (
    Common,
    Copied,
    Described,
    Grouped,
    Proven,
    Source,
    StepToWrite,
    Writing,
    options_of,
    path_of,
    spread,
)
from fusectl.cli.screen import Screen
from fusectl.cli.writing import final_place, write
from fusectl.errors import Incompatible, UsageError
from fusectl.optimizer.kinds import OnState
from fusectl.rules.kinds import Tie
from fusectl.sources.lesson import Data, Init, Learning
from fusectl.verbs import LayerCounts


if TYPE_CHECKING:
    from fusectl.formats.objects import Place

commands = typer.Typer()


@commands.command(
    cls=Grouped,
    short_help="Learn a linear growth operator, and grow with it.",
    epilog="Example: fusectl ligo small/checkpoint_500000 --emb 1024 --heads 16 --mlp 4096 --data corpus.txt",
)
@spread
def ligo(
    source: Source = None,
    *,
    reading: Described,
    emb: Annotated[int | None, typer.Option("--emb", help="The width to grow to. [default: as it is]", min=1)] = None,
    heads: Annotated[int | None, typer.Option(help="Heads, of as many features as now.", min=1)] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Kv heads. [default: as many for a head as now]", min=1)] = None,
    mlp: Annotated[int | None, typer.Option(help="The width of the MLP.", min=1)] = None,
    depth: LayerCounts,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|MODULE:FUNCTION",
            help="What to learn from: text, a .npz or .jsonl of tokens, or a function that returns batches.",
        ),
    ] = None,
    operator: Annotated[
        str | None, typer.Option(metavar="PATH", help="Apply this operator instead of learning one.")
    ] = None,
    operator_out: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where to keep what is learned. [default: OUTPUT.operator]")
    ] = None,
    tie: Annotated[
        Tie | None,
        typer.Option(help="Inputs' matrices: the duals of outputs', or the same. [default: pinv]"),
    ] = None,
    init: Annotated[
        Init | None,
        typer.Option(
            help="The start: the small model's function; layers again; or LiGO's released one. [default: duplicate]"
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help=f"Steps of learning; 0 applies the start as it is. [default: {Learning.steps}]", min=0),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help=f"Of the operator, constant, without warm-up. [default: {Learning.learning_rate}]"),
    ] = None,
    learner: Annotated[
        str | None,
        typer.Option(help=f"The optimizer that learns it, by its name in optax. [default: {Learning.optimizer}]"),
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows of a batch.", min=1)] = Data.batch,
    length: Annotated[int, typer.Option(help="Tokens of a row.", min=4)] = Data.length,
    target_length: Annotated[
        int | None, typer.Option(help="Tokens of a row of targets. [default: as the spans of --length make]", min=4)
    ] = None,
    sentinel: Annotated[
        int | None, typer.Option(help="The token that stands for the first span. [default: by the vocabulary]", min=0)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the start and of the order of the data.", min=0)] = 0,
    step: StepToWrite,
    disk: Copied,
    running: Proven,
    writing: Writing,
    common: Common,
) -> None:
    """Grow a checkpoint to any larger sizes by a linear operator that is learned in some hundred steps (LiGO)."""
    screen = common.screen("ligo")
    with screen.errors():
        from fusectl.operations.ligo import begin_operator, plan_with_operator
        from fusectl.sources.operator import kept, open_operator

        options = options_of(reading, step, disk, running, optimizer=OnState.DROP)
        path = path_of(source)
        sizes = {"embed": emb, "heads": heads, "kv_heads": kv_heads, "mlp": mlp}
        layers, depths = depth.layers, {"encoder": depth.encoder_layers, "decoder": depth.decoder_layers}
        # None tells what was not given: with --operator any of these contradicts it, even with the value of its
        # default.
        of_learning = (data, operator_out, tie, init, steps, learning_rate, learner, target_length, sentinel)
        if operator is not None and any(
            each is not None for each in (*sizes.values(), *depths.values(), layers, *of_learning)
        ):
            raise UsageError(
                "--operator says what to grow to, and nothing is learned",
                hint="without sizes, and without what is about learning",
            )
        if operator is None:
            steps = Learning.steps if steps is None else steps
            if steps and data is None:
                raise UsageError("--data: what to learn the operator from", hint="--steps 0 applies the start as it is")
            growing, opened, start = begin_operator(
                path, sizes, layers, depths, tie or Tie.PINV, init or Init.DUPLICATE, seed, options
            )
            plan, _ = plan_with_operator(path, kept(start, growing), options)
            # A dry run plans with the operator's start, whose sizes are those of what would be learned.
            if running.dry_run:
                write(screen, plan, [opened.checkpoint], running, writing)
                return
            lesson = None
            if data is not None and steps:
                rate = Learning.learning_rate if learning_rate is None else learning_rate
                learning = Learning(steps, rate, learner or Learning.optimizer)
                lesson = Data(data, batch, length, target_length, sentinel), learning
            final = final_place(writing.output, [opened.checkpoint], plan)
            begun = growing, opened.checkpoint, start
            operator = _learned(screen, begun, lesson, final, operator_out, resume=running.resume, force=writing.force)
        # Planning starts over from the saved operator, since its layer weights decide which layers are read.
        plan, sources = plan_with_operator(path, open_operator(operator), options)
        write(screen, plan, sources, running, writing)


def _learned(
    screen: Screen,
    start: Any,
    lesson: tuple[Data, Learning] | None,
    final: Place,
    operator_out: str | None,
    *,
    resume: bool,
    force: bool,
) -> str:
    """Learns an operator, or keeps the start where there is no lesson; the path that it is at.

    One that an interrupted run has left is taken when it is resumed.
    """
    from fusectl.formats.locate import local
    from fusectl.sources.operator import open_operator, require_same_run, save_operator
    from fusectl.writing.carrying_out import check_output

    growing, checkpoint, operator = start
    if not isinstance(final, Path) and operator_out is None:
        raise UsageError("--operator-out: where to keep the operator, which is no part of what goes into the bucket")
    at = local(operator_out or f"{final}.operator")
    if isinstance(final, Path) and final.absolute() in (at.absolute(), *at.absolute().parents):
        raise UsageError(f"--operator-out {at}: inside the output, which is to appear at once")
    if resume and at.exists():
        learning = None if lesson is None else lesson[1]
        require_same_run(open_operator(str(at)), operator, growing, learning)
        return str(at)
    for place in (final, at):
        check_output(place, [checkpoint], force=force)
    stopped = None
    if lesson is not None:
        from fusectl.operations.learning.learn import examples_of, learn

        data, learning = lesson
        examples = examples_of(data, growing.tree, operator.seed)
        screen.note(f"learning from {examples.says}")
        learned = learn(growing, checkpoint, operator, examples, learning, screen.note)
        operator, stopped = learned.operator, learned.stopped
        said = ", ".join(f"{name} {value:.4f}" for name, value in learned.held_out.items())
        screen.note(f"held-out loss in nats for a token: {said}")
    # Learning takes the longest, so that its result is kept before anything is written, and --resume begins with it.
    save_operator(operator, growing, at, force=force)
    if stopped is not None:
        raise Incompatible(
            f"learning ended: {stopped}",
            details=(f"the operator of step {operator.learned}, the last one whose loss is a number, is in {at}",),
            hint="a smaller --learning-rate",
        )
    return str(at)
