"""The commands: parse, one library call, one render. surgery.py and verify/ do the work, render.py prints.

Imports that cost time live in the functions: --help and completion must not pay for numpy, tensorstore or JAX.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from fusectl.errors import (
    Corrupt,
    FusectlError,
    Incompatible,
    OutputExists,
    StorageError,
    UsageError,
    VerificationFailed,
)
from fusectl.memory import prepare_process
from fusectl.render import Screen, Terminated


if TYPE_CHECKING:
    from fusectl.builder import Options
    from fusectl.formats.objects import Place
    from fusectl.formats.tree import Checkpoint
    from fusectl.mesh import Mesh
    from fusectl.plan import Plan
    from fusectl.record import Fill


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
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[str | None, typer.Argument(metavar="[CKPT]", help="The checkpoint; read from a pipe if left out.")]
Output = Annotated[
    str | None, typer.Option("-o", "--output", help="The checkpoint to write. [default: a sibling of the source]")
]
# The choices are spelt out for the parser and for completion, which must not import what defines them; tests compare.
FillKind = Annotated[
    Literal["zeros", "gaussian", "antisymmetric"], typer.Option("--fill", help="What stands where no source does.")
]
NoiseScale = Annotated[
    float | None,
    typer.Option("--noise-scale", help="The noise's standard deviation relative to the kernel's own. [default: 0.1]"),
]
Seed = Annotated[int, typer.Option(help="The noise's seed.")]
Optimizer = Annotated[
    Literal["carry", "reset", "drop", "asymmetric"],
    typer.Option(help="The optimizer's state: carried over, zeros, none, or kept for the first copy only."),
]
Norm = Annotated[
    Literal["rule", "property"],
    typer.Option(help="What it will train with: the trainer's one norm, or a norm per source (fusectl.archs)."),
]
EqualizeBy = Annotated[
    Literal["trace", "weights"],
    typer.Option(help="Measure the streams in forward passes, or estimate them from the weights alone."),
]
FormatName = Annotated[
    Literal["t5x", "orbax", "orbax-ocdbt-zarr2", "orbax-zarr2", "orbax-zarr3"] | None,
    typer.Option("--format", help="The layout on disk. [default: the first source's]"),
]
TrainerName = Annotated[
    Literal["t5x", "maxtext", "gemma"] | None, typer.Option("--trainer", help="The trainer. [default: the family's]")
]
Arch = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE.toml",
        help="The model family, by name or by a table of it. [default: recognised from the tree]",
    ),
]
Configs = Annotated[
    list[str],
    typer.Option(
        "--config",
        metavar="FILE",
        help="A decoder's config, MaxText's model.yml or gemma's fields: for all sources, or repeated for each.",
    ),
]
Drop = Annotated[list[str], typer.Option(help="Leave out tensors whose names match this pattern; may be repeated.")]
Dtype = Annotated[
    Literal["float64", "float32", "bfloat16", "float16"] | None,
    typer.Option(help="Cast the parameters to this dtype. [default: as they are]"),
]
Codec = Annotated[
    Literal["auto", "zstd", "none"],
    typer.Option(help="How chunks are compressed; auto keeps the source's wherever its chunks are taken over."),
]
Sparse = Annotated[
    bool | None,
    typer.Option(
        "--sparse/--dense", help="Leave chunks of zeros out, or store them. [default: sparse for t5x, dense for Orbax]"
    ),
]
MeshSizes = Annotated[
    str | None,
    typer.Option("--mesh", metavar="AXIS=N,...", help="Devices to choose chunks for, such as data=8,model=4."),
]
AxisRules = Annotated[
    str | None,
    typer.Option(metavar="AXIS=MESH,...", help="With --mesh: such as embed=data. [default: T5X's standard rules]"),
]
Link = Annotated[
    bool, typer.Option("--link", help="Hard links to the sources' files instead of copies: never edit either then.")
]
Check = Annotated[
    bool,
    typer.Option("--check/--no-check", help="Read the chunks that are taken over, to notice what is corrupt in them."),
]
Sync = Annotated[bool, typer.Option("--sync/--no-sync", help="Flush it to the disk before it appears.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(help="The most bytes in flight, such as 64MiB. [default: 256MiB, less where little memory is free]"),
]
Jobs = Annotated[int | None, typer.Option("-j", "--jobs", help="Threads. [default: one per core, two at least]", min=1)]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with what an interrupted run of the same command has left.")
]
Step = Annotated[
    int | None, typer.Option(help="The training step to write, which schedules go by. [default: the first source's]")
]
LrTable = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Write the learning rates that continue the trajectory: as JSON, or as optimizers in *.py."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing; --equalize measures.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="Prove the checkpoint before it appears; if that fails, it does not.")
]
WithReport = Annotated[
    bool, typer.Option("--report/--no-report", help="With --verify: leave fusectl-verify.json and .md in it.")
]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Let NaN and Inf in the sources pass.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Nothing on standard error but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

Layers = Annotated[int | None, typer.Option("--layers", help="How many layers each stack is to have.", min=1)]
EncoderLayers = Annotated[
    int | None, typer.Option(help="How many layers the encoder is to have. [default: --layers, or as it is]", min=1)
]
DecoderLayers = Annotated[
    int | None, typer.Option(help="How many layers the decoder is to have. [default: --layers, or as it is]", min=1)
]

# Options that are followed by several values.
GATHERED = ("--sources", "--over-time")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        import fusectl

        print(f"fusectl {fusectl.__version__}")  # noqa: T201
        raise typer.Exit


@app.command(
    short_help="Fuse checkpoints into one that computes their mean.",
    epilog="Example: fusectl fuse a/checkpoint_1000000 b/checkpoint_1000000 -o fused/checkpoint_1000000",
)
def fuse(
    sources: Annotated[list[str], typer.Argument(metavar="A B [C ...]", help="The checkpoints to fuse.")],
    output: Output = None,
    weights: Annotated[str | None, typer.Option(help="Weights of the mean, such as 0.7,0.3. [default: equal]")] = None,
    norm: Norm = "rule",
    equalize: Annotated[
        bool, typer.Option("--equalize", help="Make the sources' residual streams equally large for the one norm.")
    ] = False,
    equalize_by: EqualizeBy = "trace",
    tokens: Annotated[
        str | None, typer.Option(help="For --equalize: a .npz or .jsonl of tokens. [default: random ones]")
    ] = None,
    fill: FillKind = "zeros",
    noise_scale: NoiseScale = None,
    seed: Seed = 0,
    optimizer: Optimizer = "carry",
    lr_table: LrTable = None,
    step: Step = None,
    format: FormatName = None,
    arch: Arch = None,
    config: Configs = [],  # noqa: B006
    expand_kv: Annotated[
        bool, typer.Option("--expand-kv", help="Repeat kv heads where sources have others for as many heads.")
    ] = False,
    mean_shared: Annotated[
        bool,
        typer.Option(
            "--mean-shared", help="Average tensors that do not grow (norms of queries and keys); approximate."
        ),
    ] = False,
    drop: Drop = [],  # noqa: B006
    dtype: Dtype = None,
    codec: Codec = "auto",
    sparse: Sparse = None,
    mesh: MeshSizes = None,
    axis_rules: AxisRules = None,
    link: Link = False,
    check: Check = True,
    sync: Sync = True,
    max_memory: MaxMemory = None,
    jobs: Jobs = None,
    force: Force = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    verify: Verify = False,
    report: WithReport = True,
    allow_nonfinite: AllowNonfinite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fuse K checkpoints block-diagonally into one of their summed widths, which computes the mean of their logits."""
    screen = Screen("fuse", json=json, quiet=quiet, debug=debug)
    with screen.errors():
        _stay_on_the_cpu()
        from fusectl.equalize import Equalize
        from fusectl.surgery import plan_fusion

        if not equalize and (equalize_by != "trace" or tokens is not None):
            raise UsageError("--equalize-by and --tokens say how to --equalize", hint="--equalize")
        stored = _Stored(codec, sparse, link, check, _mesh(mesh, axis_rules))
        options = _options(
            _fill(fill, noise_scale, seed), optimizer, format, arch, drop, dtype, stored, max_memory, step, norm
        )
        options = replace(options, configs=tuple(config), expand_kv=expand_kv, mean_shared=mean_shared)
        shares = _numbers(weights, "--weights")
        with screen.progress() as progress:
            budget_bytes = parse_bytes(max_memory, "--max-memory")
            how = Equalize(equalize_by, tokens, budget_bytes, jobs, progress) if equalize else None
            plan, opened = plan_fusion(sources, options, weights=shares, equalize=how)
        writing = _Writing(output, force, jobs, dry_run, allow_nonfinite, verify, report, max_memory, sync, resume)
        _write(screen, plan, opened, writing._replace(lr_table=lr_table))


@app.command(
    short_help="Fuse a checkpoint with itself, the function kept.",
    epilog="Example: fusectl self-fuse small/checkpoint_500000 --copies 2 --fill antisymmetric",
)
def self_fuse(
    source: Source = None,
    copies: Annotated[int, typer.Option("--copies", "-k", help="How many copies stand side by side.")] = 2,
    output: Output = None,
    fill: FillKind = "zeros",
    noise_scale: NoiseScale = None,
    seed: Seed = 0,
    optimizer: Optimizer = "carry",
    lr_table: LrTable = None,
    step: Step = None,
    format: FormatName = None,
    arch: Arch = None,
    config: Configs = [],  # noqa: B006
    drop: Drop = [],  # noqa: B006
    dtype: Dtype = None,
    codec: Codec = "auto",
    sparse: Sparse = None,
    mesh: MeshSizes = None,
    axis_rules: AxisRules = None,
    link: Link = False,
    check: Check = True,
    sync: Sync = True,
    max_memory: MaxMemory = None,
    jobs: Jobs = None,
    force: Force = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    verify: Verify = False,
    report: WithReport = True,
    allow_nonfinite: AllowNonfinite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fuse a checkpoint with itself: K times as wide, the same function."""
    screen = Screen("self-fuse", json=json, quiet=quiet, debug=debug)
    with screen.errors():
        from fusectl.surgery import plan_fusion

        if copies < 2:
            raise UsageError(f"--copies {copies}: fusing takes two or more")
        stored = _Stored(codec, sparse, link, check, _mesh(mesh, axis_rules))
        options = _options(
            _fill(fill, noise_scale, seed), optimizer, format, arch, drop, dtype, stored, max_memory, step
        )
        options = replace(options, configs=tuple(config))
        plan, opened = plan_fusion([_path(source)] * copies, options, command="self-fuse")
        writing = _Writing(output, force, jobs, dry_run, allow_nonfinite, verify, report, max_memory, sync, resume)
        _write(screen, plan, opened, writing._replace(lr_table=lr_table))


@app.command(
    short_help="Fill the zero blocks of a fusion with noise.",
    epilog="Example: fusectl fuse a b | fusectl noise-fill --noise-scale 0.1 | fusectl verify",
)
def noise_fill(
    source: Source = None,
    copies: Annotated[
        int | None, typer.Option("--copies", "-k", help="For a fusion without fusectl.json: its K.")
    ] = None,
    output: Output = None,
    fill: FillKind = "gaussian",
    noise_scale: NoiseScale = None,
    seed: Seed = 0,
    step: Step = None,
    format: FormatName = None,
    arch: Arch = None,
    drop: Drop = [],  # noqa: B006
    dtype: Dtype = None,
    codec: Codec = "auto",
    sparse: Sparse = None,
    mesh: MeshSizes = None,
    axis_rules: AxisRules = None,
    link: Link = False,
    check: Check = True,
    sync: Sync = True,
    max_memory: MaxMemory = None,
    jobs: Jobs = None,
    force: Force = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    verify: Verify = False,
    report: WithReport = True,
    allow_nonfinite: AllowNonfinite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fill the zero blocks of a fused checkpoint with low-variance noise."""
    screen = Screen("noise-fill", json=json, quiet=quiet, debug=debug)
    with screen.errors():
        from fusectl.surgery import plan_noise_fill

        if fill == "zeros":
            raise UsageError("--fill zeros: there are zeros already", hint="--fill gaussian or antisymmetric")
        stored = _Stored(codec, sparse, link, check, _mesh(mesh, axis_rules))
        options = _options(_fill(fill, noise_scale, seed), "reset", format, arch, drop, dtype, stored, max_memory, step)
        plan, opened = plan_noise_fill(_path(source), options, copies=copies)
        writing = _Writing(output, force, jobs, dry_run, allow_nonfinite, verify, report, max_memory, sync, resume)
        _write(screen, plan, opened, writing)


@app.command(
    short_help="Write a checkpoint in another format.",
    epilog="Example: fusectl convert runs/a/checkpoint_1000000 --format orbax -o runs/b/1000000",
)
def convert(
    source: Source = None,
    output: Output = None,
    format: FormatName = None,
    dtype: Dtype = None,
    drop_optimizer: Annotated[bool, typer.Option("--drop-optimizer", help="Leave the optimizer's state out.")] = False,
    scan: Annotated[
        bool | None, typer.Option("--scan/--unscan", help="Stack the layers along an axis, or each for itself.")
    ] = None,
    step: Step = None,
    arch: Arch = None,
    drop: Drop = [],  # noqa: B006
    codec: Codec = "auto",
    sparse: Sparse = None,
    mesh: MeshSizes = None,
    axis_rules: AxisRules = None,
    link: Link = False,
    check: Check = True,
    sync: Sync = True,
    max_memory: MaxMemory = None,
    jobs: Jobs = None,
    force: Force = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    verify: Verify = False,
    report: WithReport = True,
    allow_nonfinite: AllowNonfinite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint in another format or dtype, with its layers stacked or not, the optimizer's state included."""
    screen = Screen("convert", json=json, quiet=quiet, debug=debug)
    with screen.errors():
        from fusectl.conversion import plan_conversion
        from fusectl.record import Fill

        stored = _Stored(codec, sparse, link, check, _mesh(mesh, axis_rules))
        optimizer = "drop" if drop_optimizer else "carry"
        options = _options(Fill(), optimizer, format, arch, drop, dtype, stored, max_memory, step)
        layers = None if scan is None else "scanned" if scan else "unscanned"
        plan, opened = plan_conversion(_path(source), options, layers)
        writing = _Writing(output, force, jobs, dry_run, allow_nonfinite, verify, report, max_memory, sync, resume)
        _write(screen, plan, opened, writing)


@app.command(
    short_help="Make a checkpoint deeper, without data.",
    epilog="Example: fusectl stack small/checkpoint_500000 --layers 24 --how identity",
)
def stack(
    source: Source = None,
    layers: Layers = None,
    encoder_layers: EncoderLayers = None,
    decoder_layers: DecoderLayers = None,
    how: Annotated[
        Literal["stack", "interleave", "identity"],
        typer.Option(help="The whole stack again, each layer again, or new layers that add nothing at first."),
    ] = "stack",
    output: Output = None,
    optimizer: Annotated[
        Literal["carry", "reset", "drop"],
        typer.Option(help="The optimizer's state: along with the layers, zeros, or none."),
    ] = "carry",
    step: Step = None,
    format: FormatName = None,
    arch: Arch = None,
    config: Configs = [],  # noqa: B006
    drop: Drop = [],  # noqa: B006
    dtype: Dtype = None,
    codec: Codec = "auto",
    sparse: Sparse = None,
    mesh: MeshSizes = None,
    axis_rules: AxisRules = None,
    link: Link = False,
    check: Check = True,
    sync: Sync = True,
    max_memory: MaxMemory = None,
    jobs: Jobs = None,
    force: Force = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    verify: Verify = False,
    report: WithReport = True,
    allow_nonfinite: AllowNonfinite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make a checkpoint deeper: its layers again, or new ones that keep the function, the optimizer's state along."""
    screen = Screen("stack", json=json, quiet=quiet, debug=debug)
    with screen.errors():
        from fusectl.growth import plan_stack
        from fusectl.record import Fill

        stored = _Stored(codec, sparse, link, check, _mesh(mesh, axis_rules))
        options = _options(Fill(), optimizer, format, arch, drop, dtype, stored, max_memory, step)
        options = replace(options, configs=tuple(config))
        depths = {"encoder": encoder_layers, "decoder": decoder_layers}
        plan, opened = plan_stack(_path(source), how, layers, depths, options)
        writing = _Writing(output, force, jobs, dry_run, allow_nonfinite, verify, report, max_memory, sync, resume)
        _write(screen, plan, opened, writing)


@app.command(
    short_help="Learn a linear growth operator, and grow with it.",
    epilog="Example: fusectl ligo small/checkpoint_500000 --emb 1024 --heads 16 --mlp 4096 --data corpus.txt",
)
def ligo(
    source: Source = None,
    emb: Annotated[int | None, typer.Option("--emb", help="The width to grow to. [default: as it is]", min=1)] = None,
    heads: Annotated[int | None, typer.Option(help="Heads, of as many features as now.", min=1)] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Kv heads. [default: as many for a head as now]", min=1)] = None,
    mlp: Annotated[int | None, typer.Option(help="The width of the MLP.", min=1)] = None,
    layers: Layers = None,
    encoder_layers: EncoderLayers = None,
    decoder_layers: DecoderLayers = None,
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
        Literal["pinv", "paper"] | None,
        typer.Option(help="Inputs' matrices: the duals of outputs', or the same. [default: pinv]"),
    ] = None,
    init: Annotated[
        Literal["duplicate", "stack", "interpolate", "random"] | None,
        typer.Option(
            help="The start: the small model's function; layers again; or LiGO's released one. [default: duplicate]"
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of learning; 0 applies the start as it is. [default: 100]", min=0)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the operator, constant, without warm-up. [default: 0.001]")
    ] = None,
    learner: Annotated[
        str | None, typer.Option(help="The optimizer that learns it, by its name in optax. [default: adam]")
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows of a batch.", min=1)] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a row.", min=4)] = 256,
    target_length: Annotated[
        int | None, typer.Option(help="Tokens of a row of targets. [default: as the spans of --length make]", min=4)
    ] = None,
    sentinel: Annotated[
        int | None, typer.Option(help="The token that stands for the first span. [default: by the vocabulary]", min=0)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the start and of the order of the data.", min=0)] = 0,
    output: Output = None,
    step: Step = None,
    format: FormatName = None,
    arch: Arch = None,
    config: Configs = [],  # noqa: B006
    drop: Drop = [],  # noqa: B006
    dtype: Dtype = None,
    codec: Codec = "auto",
    sparse: Sparse = None,
    mesh: MeshSizes = None,
    axis_rules: AxisRules = None,
    check: Check = True,
    sync: Sync = True,
    max_memory: MaxMemory = None,
    jobs: Jobs = None,
    force: Force = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    verify: Verify = False,
    report: WithReport = True,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Grow a checkpoint to any larger sizes by a linear operator that is learned in some hundred steps (LiGO)."""
    screen = Screen("ligo", json=json, quiet=quiet, debug=debug)
    with screen.errors():
        from fusectl.growth import begin_operator, plan_with_operator
        from fusectl.ligo.operator import kept, open_operator
        from fusectl.record import Fill

        stored = _Stored(codec, sparse, link=False, check=check, mesh=_mesh(mesh, axis_rules))
        options = _options(Fill(), "drop", format, arch, drop, dtype, stored, max_memory, step)
        options = replace(options, configs=tuple(config))
        path = _path(source)
        writing = _Writing(output, force, jobs, dry_run, False, verify, report, max_memory, sync, resume)
        sizes = {"embed": emb, "heads": heads, "kv_heads": kv_heads, "mlp": mlp}
        depths = {"encoder": encoder_layers, "decoder": decoder_layers}
        of_learning = (data, operator_out, tie, init, steps, learning_rate, learner, target_length, sentinel)
        if operator is not None and any(
            each is not None for each in (*sizes.values(), *depths.values(), layers, *of_learning)
        ):
            raise UsageError(
                "--operator says what to grow to, and nothing is learned",
                hint="without sizes, and without what is about learning",
            )
        if operator is None:
            steps = 100 if steps is None else steps
            if steps and data is None:
                raise UsageError("--data: what to learn the operator from", hint="--steps 0 applies the start as it is")
            growing, opened, start = begin_operator(
                path, sizes, layers, depths, tie or "pinv", init or "duplicate", seed, options
            )
            plan, _ = plan_with_operator(path, kept(start, growing), options)
            if dry_run:
                _write(screen, plan, [opened.checkpoint], writing)
                return
            lesson = None
            if data is not None and steps:
                rate = 1e-3 if learning_rate is None else learning_rate
                lesson = _Lesson(data, steps, rate, learner or "adam", batch, length, target_length, sentinel)
            final = _final(output, [opened.checkpoint], plan)
            operator = _learned(screen, (growing, opened.checkpoint, start), lesson, final, operator_out, writing)
        plan, sources = plan_with_operator(path, open_operator(operator), options)
        _write(screen, plan, sources, writing)


@app.command(
    short_help="Say which operator leads to larger sizes, and what it keeps.",
    epilog="Example: fusectl grow small/checkpoint_500000 --to emb=1024,heads=16,mlp=4096,layers=12",
)
def grow(
    source: Source = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="NAME=N,...|FILE|CKPT", help="Sizes, a config (yml, json, gin), or another checkpoint."
        ),
    ] = None,
    how: Annotated[
        Literal["self-fuse", "stack", "duplicate", "ligo"] | None,
        typer.Option(help="Grow by this operator. [default: say what there is]"),
    ] = None,
    data: Annotated[str | None, typer.Option(help="For ligo: what to learn from.")] = None,
    output: Output = None,
    arch: Arch = None,
    max_memory: MaxMemory = None,
    force: Force = False,
    dry_run: DryRun = False,
    verify: Verify = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say which operators lead from a checkpoint to larger sizes and what each keeps; run the one that is asked for."""
    screen = Screen("grow", json=json, quiet=quiet, debug=debug)
    with screen.errors():
        from fusectl.formats import open_checkpoint
        from fusectl.packed import unpacked
        from fusectl.routes import read_target, routes
        from fusectl.sources import recognized

        path = _path(source)
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
        if len(route.steps) > 1:
            raise UsageError(f"--how {how}: two steps, of which each writes a checkpoint", hint=route.command(path))
        ((name, given),) = route.steps
        options = {**given, **({"data": data} if how == "ligo" else {}), "arch": arch, "output": output}
        options |= {"max_memory": max_memory, "force": force, "dry_run": dry_run, "verify": verify}
    # It prints what it has done, and its errors, itself.
    commands: dict[str, Any] = {"self-fuse": self_fuse, "stack": stack, "ligo": ligo}
    commands[name](path, **options, json=json, quiet=quiet, debug=debug)


@app.command(
    short_help="Prove that a fusion is what it should be.",
    epilog="Example: fusectl verify fused/checkpoint_1000000 --x64",
)
def verify(
    fused: Source = None,
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
    fill: Annotated[
        Literal["zeros", "gaussian", "antisymmetric"] | None,
        typer.Option(help="What stands where no source does. [default: as in fusectl.json]"),
    ] = None,
    noise_scale: Annotated[
        float | None, typer.Option(help="The noise's scale. [default: as in fusectl.json; 0.1 for another --fill]")
    ] = None,
    arch: Arch = None,
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
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prove a fused checkpoint: files, weights, the ensemble's function, and how far the trainer's model is from it."""
    screen = Screen("verify", json=json, quiet=quiet, debug=debug)
    with screen.errors():
        _stay_on_the_cpu()
        from fusectl.formats import open_checkpoint
        from fusectl.verify import Declared, Settings, verify_checkpoint, write_report

        if plot is not None:
            from fusectl.picture import require_picture

            require_picture(plot, "--plot")
        if noise_scale is not None:
            _require_scale(noise_scale)
        declared = Declared(tuple(sources), _numbers(weights, "--weights"), fill, noise_scale, arch, config)
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
        opened = open_checkpoint(_path(fused))
        with screen.progress() as progress:
            found = verify_checkpoint(opened, declared, settings, progress)
        screen.report(found)
        try:
            if report:
                write_report(found, opened.location.home)
            if plot is not None and found.trace:
                from fusectl.verify.page import draw

                draw(found.trace, plot)
        except FusectlError as error:
            # The verdict is the more important news.
            if found.passed:
                raise
            screen.note(error.message)
        if not found.passed:
            raise VerificationFailed(f"{found.path}: verification failed", details=found.failures())


@app.command(
    short_help="Show what two checkpoints differ in.",
    epilog="Example: fusectl diff runs/a/checkpoint_1000 runs/b/latest",
)
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The one to compare it with, of any format.")],
    atol: Annotated[float, typer.Option(help="Values no further apart than this are equal.")] = 0.0,
    max_memory: MaxMemory = None,
    jobs: Jobs = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare two checkpoints tensor by tensor: names, shapes, dtypes, steps, values. Exit code 3 if they differ."""
    screen = Screen("diff", json=json, quiet=quiet, debug=debug)
    with screen.errors():
        from fusectl.diff import diff as run_diff

        budget_bytes = parse_bytes(max_memory, "--max-memory")
        with screen.progress() as progress:
            found = run_diff(a, b, atol=atol, max_memory_bytes=budget_bytes, jobs=jobs, progress=progress)
        screen.diff(found)
        if not found.same:
            raise VerificationFailed(f"{found.a} and {found.b} differ")


@app.command(
    short_help="Show what a checkpoint is.", epilog="Example: fusectl inspect runs/a/latest --json | jq .result.sizes"
)
def inspect(
    source: Source = None,
    arch: Arch = None,
    tree: Annotated[bool, typer.Option("--tree/--no-tree", help="List the tensors.")] = True,
    fsck: Annotated[
        bool, typer.Option("--fsck", help="Read all of it instead, and list everything that is wrong with it.")
    ] = False,
    max_memory: MaxMemory = None,
    jobs: Jobs = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint is: format, family, step, sizes, optimizer, and every tensor.

    Reads metadata only, unless all of it is asked for.
    """
    screen = Screen("inspect", json=json, quiet=quiet, debug=debug)
    with screen.errors():
        if fsck:
            _fsck(screen, _path(source), arch, max_memory, jobs)
            return
        from fusectl.inspection import inspect as run_inspect

        seen = run_inspect(_path(source), arch)
        screen.inspection(seen, tree=tree, rows=arch is not None)
        seen.require_recognized()
        seen.require_complete()


@app.command(
    short_help="Draw a tensor, and how its zero blocks catch up.",
    epilog="Example: fusectl plot grown/checkpoint_1000 --tensor encoder/layers_0/mlp/wi_0/kernel -o wi.png",
)
def plot(
    tensor: Annotated[str, typer.Option(metavar="NAME", help="The parameter; `target/` may be left out.")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="The picture, such as out.png.")],
    source: Source = None,
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
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw |W| of a kernel with the borders between its sources, and from step to step how its zero blocks catch up."""
    screen = Screen("plot", json=json, quiet=quiet, debug=debug)
    with screen.errors():
        from fusectl.heatmap import measure
        from fusectl.picture import draw_heat_map, new_picture

        file = new_picture(output, force=force)
        with screen.progress() as progress:
            found = measure(
                [_path(source), *over_time],
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


@app.command(
    short_help="Print what a trainer has to be told.",
    epilog="Example: fusectl restart-config grown/checkpoint_1000000 > grown.gin",
)
def restart_config(
    source: Source = None,
    trainer: TrainerName = None,
    lr_offset: Annotated[
        int,
        typer.Option(help="Steps by which T5X's schedule is ahead; negative ones hold the maximal rate for longer."),
    ] = 0,
    arch: Arch = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print what T5X (gin), MaxText (overrides) or Gemma (Python) goes on with: sizes, path, what is to be restored."""
    screen = Screen("restart-config", json=json, quiet=quiet, debug=debug)
    with screen.errors():
        from fusectl.restart import restart

        screen.restart(restart(_path(source), arch, trainer=trainer, lr_offset=lr_offset))


def _fsck(screen: Screen, path: str, arch: str | None, max_memory: str | None, jobs: int | None) -> None:
    from fusectl.fsck import fsck as run_fsck

    with screen.progress() as progress:
        budget_bytes = parse_bytes(max_memory, "--max-memory")
        found = run_fsck(path, arch, max_memory_bytes=budget_bytes, jobs=jobs, progress=progress)
    screen.fsck(found)
    if found.problems:
        n = len(found.problems)
        raise Corrupt(f"{found.path}: {n:,} problem{'s' if n > 1 else ''}", details=found.problems)


@app.command(
    short_help="Measure what growth does to training.",
    epilog="Example: fusectl theory small/checkpoint_500000 --copies 2 --data corpus.txt --plot theory.png",
)
def theory(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CKPT [B ...]]", help="The checkpoint, or several; read from a pipe if left out."),
    ] = None,
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
    norm: Norm = "property",
    fill: FillKind = "zeros",
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
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure Deep Fusion's theory on a fusion of one's own: gradients, lemmas, the Lie bracket, the modified flow.

    Of a checkpoint that is a fusion by its record, how far its copies are from being exchangeable.
    """
    screen = Screen("theory", json=json, quiet=quiet, debug=debug)
    with screen.errors():
        _stay_on_the_cpu()
        from fusectl.builder import Options
        from fusectl.theory.fusion import Batch, is_fusion, paths_of
        from fusectl.theory.fusion import symmetry as run_symmetry
        from fusectl.theory.fusion import theory as run_theory

        if plot is not None:
            from fusectl.picture import draw_theory, require_picture

            require_picture(plot, "--plot")
        paths = sources or [_path(None)]
        options = Options(fill=_fill(fill, noise_scale, seed), arch=arch, drop=tuple(drop), norm=norm)
        options = replace(options, configs=tuple(config))
        if symmetry or (len(paths) == 1 and copies is None and is_fusion(paths[0])):
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


@app.command(short_help="Make, fuse and verify small models.", epilog="Example: fusectl demo")
def demo(
    directory: Annotated[Path | None, typer.Option("-o", "--output", help="Keep the checkpoints here.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make two small T5 checkpoints, fuse, self-fuse and noise-fill them, and verify the results."""
    screen = Screen("demo", json=json, quiet=quiet, debug=debug)
    with screen.errors():
        _stay_on_the_cpu()
        from fusectl.demo import demo as run_demo

        rows = run_demo(directory, screen.note)
        screen.demo(rows)
        if not all(row.report.passed for row in rows):
            raise VerificationFailed("the demo's own checkpoints failed", hint="please report it")


# What the program was called with: the line that resumes it says it again.
_ARGUMENTS: list[str] = []
_TIMERS: list[threading.Timer] = []


def run(arguments: Sequence[str]) -> int:
    """Runs the command line; its exit code."""
    prepare_process()
    _prepare_streams()
    _ARGUMENTS[:] = arguments
    argv = gather(list(arguments), *GATHERED)
    command = next((word for word in argv if not word.startswith("-")), "fusectl")
    screen = Screen(command, json="--json" in argv, quiet=False, debug="--debug" in argv)
    # What nohup, or a shell for its background jobs, has set to be ignored stays ignored.
    for number, handler in ((signal.SIGINT, _interrupted), (signal.SIGTERM, _terminated), (signal.SIGHUP, _terminated)):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        code = _with_only(command)(args=argv, prog_name="fusectl", standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        return screen.usage_error(error)
    except (BrokenPipeError, SystemExit):
        # Typer turns a broken pipe into an exit. Python flushes once more at its own, and would complain.
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
        for timer in _TIMERS:
            timer.cancel()
    return int(code or 0)


def _with_only(command: str) -> typer.Typer:
    """The program with the command asked for alone, if it is one: Typer reads the signature of each that it has."""
    found = [
        each
        for each in app.registered_commands
        if each.callback is not None and typer.main.get_command_name(each.callback.__name__) == command
    ]
    only = copy(app)
    only.registered_commands = found or app.registered_commands
    return only


def _prepare_streams() -> None:
    """Makes standard streams that are closed or know few characters harmless."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _interrupted(_: int, frame: FrameType | None) -> None:
    _end_soon(130, at_once=_importing(frame))
    raise KeyboardInterrupt


def _terminated(number: int, frame: FrameType | None) -> None:
    error = Terminated(number)
    _end_soon(error.exit_code, at_once=_importing(frame))
    raise error


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: an exception then crashes some that are written in C++."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _end_soon(code: int, *, at_once: bool) -> None:
    """Ends the process even if the exception is lost in a callback from C, or a library does not let go.

    What is written is kept in any case, and --resume goes on with it.
    """

    def end() -> None:
        what = b"interrupted" if code == 130 else b"terminated"
        os.write(2, b"fusectl: " + what + b"; --resume goes on with what is done\n")
        os._exit(code)

    if at_once:
        end()
    timer = threading.Timer(LAST_MOMENT_S, end)
    timer.daemon = True
    timer.start()
    _TIMERS.append(timer)


def gather(argv: list[str], *options: str) -> list[str]:
    """The arguments with `option A B` written as `option A option B`, for each of the options.

    That is what the parser takes.

    >>> gather(["verify", "F", "--sources", "A", "B", "--x64"], "--sources")
    ['verify', 'F', '--sources', 'A', '--sources', 'B', '--x64']
    """
    out: list[str] = []
    gathering: str | None = None
    for i, word in enumerate(argv):
        if word in options:
            gathering = word
            if i + 1 == len(argv) or argv[i + 1].startswith("-"):
                # An empty path is refused where paths are; the parser would take the next option for the value.
                out.append(f"{word}=")
        elif word.startswith("-"):
            gathering = None
            out.append(word)
        else:
            out += [gathering, word] if gathering else [word]
    return out


def _path(given: str | None) -> str:
    """The checkpoint's path: the argument, or the first line of a pipe."""
    if given is not None:
        return given
    if sys.stdin is None or sys.stdin.isatty():
        hint = "name it, or pipe its path in; with --sources or --over-time, name it before them"
        raise UsageError("which checkpoint?", hint=hint)
    line = sys.stdin.readline().strip()
    if not line:
        raise UsageError("no path came through the pipe", hint="did the command before it fail?")
    _ARGUMENTS.append(line)
    return line


def _options(
    fill: Fill,
    optimizer: str,
    format: str | None,
    arch: str | None,
    drop: list[str],
    dtype: str | None,
    stored: _Stored,
    max_memory: str | None,
    step: int | None,
    norm: str = "rule",
) -> Options:
    from fusectl.builder import Options
    from fusectl.parallel import default_max_memory_bytes

    return Options(
        fill=fill,
        optimizer=optimizer,
        format=format,
        arch=arch,
        drop=tuple(drop),
        dtype=dtype,
        max_memory_bytes=parse_bytes(max_memory, "--max-memory") or default_max_memory_bytes(),
        norm=norm,
        step=step,
        **stored._asdict(),
    )


class _Stored(NamedTuple):
    """The options that say how what is written is stored."""

    codec: str
    sparse: bool | None
    link: bool
    check: bool
    mesh: Mesh | None = None


def _mesh(sizes: str | None, rules: str | None) -> Mesh | None:
    from fusectl.mesh import parse_mesh

    if sizes is None and rules is not None:
        raise UsageError("--axis-rules: of which mesh?", hint="--mesh data=8,model=4")
    return None if sizes is None else parse_mesh(sizes, rules)


def _stay_on_the_cpu() -> None:
    """What runs beside a training job must not claim its accelerators. To be called before JAX is imported."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _fill(kind: str, noise_scale: float | None, seed: int | None) -> Fill:
    from fusectl.record import DEFAULT_NOISE_SCALE, Fill

    if kind == "zeros":
        if noise_scale is not None:
            raise UsageError("--noise-scale without noise", hint="--fill gaussian or antisymmetric")
        return Fill()
    scale = DEFAULT_NOISE_SCALE if noise_scale is None else noise_scale
    _require_scale(scale)
    return Fill(kind, scale, seed)


def _require_scale(noise_scale: float) -> None:
    if not 0.0 < noise_scale < float("inf"):
        raise UsageError(f"--noise-scale {noise_scale:g}: a positive number")


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} {text}: numbers with commas between them", hint=f"{option} 0.7,0.3") from error


# After a signal; what it was doing has half of that to come to an end.
LAST_MOMENT_S = 1.8
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(text: str | None, option: str) -> int | None:
    """A number of bytes; None where none is given.

    >>> parse_bytes("64MiB", "--max-memory")
    67108864
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip().lower())
    size = int(float(found.group(1)) * _UNITS[found.group(2) or ""]) if found else 0
    if size <= 0:
        raise UsageError(f"{option} {text}: a number of bytes", hint=f"{option} 256MiB")
    return size


class _Lesson(NamedTuple):
    """What an operator is learned from, and how."""

    data: str
    steps: int
    learning_rate: float
    optimizer: str
    batch: int
    length: int
    target_length: int | None
    sentinel: int | None


def _learned(
    screen: Screen, start: Any, lesson: _Lesson | None, final: Place, operator_out: str | None, how: _Writing
) -> str:
    """Learns an operator, or keeps the start where there is no lesson; the path that it is at.

    One that an interrupted run has left is taken when it is resumed.
    """
    from fusectl.formats.locate import local
    from fusectl.ligo.operator import open_operator, require_same_run, save_operator
    from fusectl.surgery import check_output

    growing, checkpoint, operator = start
    if not isinstance(final, Path) and operator_out is None:
        raise UsageError("--operator-out: where to keep the operator, which is no part of what goes into the bucket")
    at = local(operator_out or f"{final}.operator")
    if isinstance(final, Path) and final.absolute() in (at.absolute(), *at.absolute().parents):
        raise UsageError(f"--operator-out {at}: inside the output, which is to appear at once")
    if how.resume and at.exists():
        wanted: dict[str, Any] = {"learned": 0}
        if lesson is not None:
            wanted = {"learned": lesson.steps, "optimizer": lesson.optimizer, "learning_rate": lesson.learning_rate}
        require_same_run(open_operator(str(at)), operator, growing, wanted)
        return str(at)
    for place in (final, at):
        check_output(place, [checkpoint], force=how.force)
    stopped = None
    if lesson is not None:
        from fusectl.ligo.learn import Data, Learning, learn

        learning = Learning(lesson.steps, lesson.learning_rate, lesson.optimizer)
        data = Data(lesson.data, lesson.batch, lesson.length, lesson.target_length, lesson.sentinel)
        examples = data.examples(growing.tree, operator.seed)
        screen.note(f"learning from {examples.says}")
        learned = learn(growing, checkpoint, operator, examples, learning, screen.note)
        operator, stopped = learned.operator, learned.stopped
        said = ", ".join(f"{name} {value:.4f}" for name, value in learned.held_out.items())
        screen.note(f"held-out loss in nats for a token: {said}")
    save_operator(operator, growing, at, force=how.force)
    if stopped is not None:
        raise Incompatible(
            f"learning ended: {stopped}",
            details=(f"the operator of step {operator.learned}, the last one whose loss is a number, is in {at}",),
            hint="a smaller --learning-rate",
        )
    return str(at)


class _Writing(NamedTuple):
    """The options that every writing command ends with."""

    output: str | None
    force: bool
    jobs: int | None
    dry_run: bool
    allow_nonfinite: bool
    verify: bool
    report: bool
    max_memory: str | None
    sync: bool
    resume: bool
    lr_table: str | None = None


def _final(output: str | None, opened: Sequence[Any], plan: Plan) -> Place:
    """Where the output is going to be."""
    from fusectl.formats.locate import place
    from fusectl.surgery import default_output

    return default_output(opened, plan) if output is None else place(output)


def _write(screen: Screen, plan: Plan, opened: Sequence[Any], how: _Writing) -> None:
    """What every writing command ends with: the plan shown, or carried out and the output's path printed."""
    from fusectl.formats.locate import local
    from fusectl.surgery import carry_out, check_output, write_table

    if how.verify and how.allow_nonfinite:
        raise UsageError("--verify proves nothing about NaN and Inf", hint="without --allow-nonfinite or --verify")
    if how.verify and not plan.record.made_from:
        raise UsageError(
            "--verify: nobody says what it was fused from", hint="without it, then fusectl verify OUT --sources A B"
        )
    if not (how.verify or how.report):
        raise UsageError("--no-report: of a proof that was not asked for", hint="--verify --no-report")
    if how.lr_table is not None and not plan.rates:
        raise UsageError("--lr-table: for copies of one model with equal weights; between others no rate fits all")
    final = _final(how.output, opened, plan)
    if not how.resume:
        check_output(final, opened, force=how.force)
    for note in plan.notes:
        screen.note(note)
    table = None if how.lr_table is None or how.dry_run else local(how.lr_table)
    if table is not None and table.exists() and not (how.force or how.resume):
        raise OutputExists(f"{table}: exists", hint="another file, or --force to replace it")
    if how.dry_run:
        screen.plan(plan, final)
        return
    with screen.progress() as progress:

        def check(written: Checkpoint) -> None:
            _stay_on_the_cpu()
            from fusectl.verify import Settings, verify_checkpoint, write_report

            # Where it is going to appear, not where it has been staged.
            settings = Settings(jobs=how.jobs, max_memory_bytes=parse_bytes(how.max_memory, "--max-memory"))
            found = replace(verify_checkpoint(written, settings=settings, progress=progress), path=str(final))
            screen.verified(found)
            if not found.passed:
                raise VerificationFailed(f"{final}: verification failed, nothing was kept", details=found.failures())
            if how.report:
                write_report(found, written.location.home)

        # The free memory may be another when it goes on, and the chunks with it.
        budget = [] if how.max_memory else ["--max-memory", str(plan.budget_bytes)]
        carry_out(
            plan,
            opened,
            final,
            force=how.force,
            jobs=how.jobs,
            allow_nonfinite=how.allow_nonfinite,
            sync=how.sync,
            resume=how.resume,
            progress=progress,
            check=check if how.verify else None,
            note=screen.note,
            kept=lambda: screen.resumable([*_ARGUMENTS, *budget]),
        )
    if table is not None:
        write_table(plan, table)
    screen.written(plan, final)
    if plan.record.copy is None and not screen.is_silent:
        from fusectl.restart import restart

        # The command after it in a pipe may have moved it.
        with suppress(FusectlError):
            screen.restart_lines(restart(str(final), plan.record.family))
