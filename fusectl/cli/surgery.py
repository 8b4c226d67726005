"""The commands of surgery: fuse, self-fuse, noise-fill, convert."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from fusectl.cli.options import (
    AllowNonfinite,
    Arch,
    AxisRules,
    Check,
    Codec,
    Configs,
    Debug,
    Drop,
    DryRun,
    Dtype,
    EqualizeBy,
    FillKind,
    Force,
    FormatName,
    FusedFrom,
    Jobs,
    Json,
    Link,
    LrTable,
    MaxMemory,
    MeshSizes,
    NoiseScale,
    Norm,
    NormGroups,
    Optimizer,
    Output,
    Quiet,
    Resume,
    Seed,
    Source,
    Sparse,
    Step,
    Stored,
    Sync,
    Verify,
    WithReport,
    fill_of,
    mesh_of,
    numbers_of,
    options_of,
    parse_bytes,
    path_of,
)
from fusectl.cli.process import stay_on_the_cpu
from fusectl.cli.screen import Screen
from fusectl.cli.writing import Writing, write
from fusectl.errors import UsageError


commands = typer.Typer()


@commands.command(
    short_help="Fuse checkpoints into one that computes their mean.",
    epilog="Example: fusectl fuse a/checkpoint_1000000 b/checkpoint_1000000 -o fused/checkpoint_1000000",
)
def fuse(
    sources: Annotated[list[str], typer.Argument(metavar="A B [C ...]", help="The checkpoints to fuse.")],
    output: Output = None,
    weights: Annotated[str | None, typer.Option(help="Weights of the mean, such as 0.7,0.3. [default: equal]")] = None,
    norm: Norm = None,
    fused_from: FusedFrom = [],  # noqa: B006
    norm_groups: NormGroups = [],  # noqa: B006
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
        stay_on_the_cpu()
        from fusectl.operations.equalize import Equalize
        from fusectl.operations.fuse import plan_fusion
        from fusectl.sources.lineage import lineages

        if not equalize and (equalize_by != "trace" or tokens is not None):
            raise UsageError("--equalize-by and --tokens say how to --equalize", hint="--equalize")
        stored = Stored(codec, sparse, link, check, mesh_of(mesh, axis_rules))
        options = options_of(
            fill_of(fill, noise_scale, seed), optimizer, format, arch, drop, dtype, stored, max_memory, step, norm
        )
        options = replace(options, configs=tuple(config), expand_kv=expand_kv, mean_shared=mean_shared)
        options = replace(options, lineages=lineages(fused_from, norm_groups))
        shares = numbers_of(weights, "--weights")
        with screen.progress() as progress:
            budget_bytes = parse_bytes(max_memory, "--max-memory")
            how = Equalize(equalize_by, tokens, budget_bytes, jobs, progress) if equalize else None
            plan, opened = plan_fusion(sources, options, weights=shares, equalize=how)
        writing = Writing(output, force, jobs, dry_run, allow_nonfinite, verify, report, max_memory, sync, resume)
        write(screen, plan, opened, writing._replace(lr_table=lr_table))


@commands.command(
    short_help="Fuse a checkpoint with itself, the function kept.",
    epilog="Example: fusectl self-fuse small/checkpoint_500000 --copies 2 --fill antisymmetric",
)
def self_fuse(
    source: Source = None,
    copies: Annotated[int, typer.Option("--copies", "-k", help="How many copies stand side by side.")] = 2,
    fused_from: FusedFrom = [],  # noqa: B006
    norm_groups: NormGroups = [],  # noqa: B006
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
        from fusectl.operations.fuse import plan_fusion
        from fusectl.sources.lineage import lineages

        if copies < 2:
            raise UsageError(f"--copies {copies}: fusing takes two or more")
        stored = Stored(codec, sparse, link, check, mesh_of(mesh, axis_rules))
        options = options_of(
            fill_of(fill, noise_scale, seed), optimizer, format, arch, drop, dtype, stored, max_memory, step
        )
        options = replace(options, configs=tuple(config), lineages=lineages(fused_from, norm_groups))
        plan, opened = plan_fusion([path_of(source)] * copies, options, command="self-fuse")
        writing = Writing(output, force, jobs, dry_run, allow_nonfinite, verify, report, max_memory, sync, resume)
        write(screen, plan, opened, writing._replace(lr_table=lr_table))


@commands.command(
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
        from fusectl.operations.fuse import plan_noise_fill

        if fill == "zeros":
            raise UsageError("--fill zeros: there are zeros already", hint="--fill gaussian or antisymmetric")
        stored = Stored(codec, sparse, link, check, mesh_of(mesh, axis_rules))
        options = options_of(
            fill_of(fill, noise_scale, seed), "reset", format, arch, drop, dtype, stored, max_memory, step
        )
        plan, opened = plan_noise_fill(path_of(source), options, copies=copies)
        writing = Writing(output, force, jobs, dry_run, allow_nonfinite, verify, report, max_memory, sync, resume)
        write(screen, plan, opened, writing)


@commands.command(
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
        from fusectl.layout.fill import Fill
        from fusectl.operations.convert import plan_conversion

        stored = Stored(codec, sparse, link, check, mesh_of(mesh, axis_rules))
        optimizer = "drop" if drop_optimizer else "carry"
        options = options_of(Fill(), optimizer, format, arch, drop, dtype, stored, max_memory, step)
        layers = None if scan is None else "scanned" if scan else "unscanned"
        plan, opened = plan_conversion(path_of(source), options, layers)
        writing = Writing(output, force, jobs, dry_run, allow_nonfinite, verify, report, max_memory, sync, resume)
        write(screen, plan, opened, writing)
