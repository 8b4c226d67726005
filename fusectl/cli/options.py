"""The options that commands have in common, in groups, and what is made of their values.

A group is a dataclass of annotated fields. `spread` replaces a command's parameter of such a type with the group's
fields, so that no list of options stands twice; --help shows each group under its heading.

    @commands.command(...)
    @spread
    def fuse(sources: Annotated[list[str], ...], *, filling: Filling, disk: OnDisk, common: Common): ...

The commands of most operations are made whole of their rows in fusectl.verbs (`command_of`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cached_property
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_type_hints

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo

from fusectl.cli.process import ARGUMENTS
from fusectl.cli.screen import Screen
from fusectl.errors import UsageError
from fusectl.families.kinds import Norm, Trainer
from fusectl.formats.kinds import Codec, Dtype, FormatName
from fusectl.layout.fill import FillKind
from fusectl.operations.kinds import Measure
from fusectl.optimizer.kinds import OnState
from fusectl.verbs import Option, Verb


if TYPE_CHECKING:
    from fusectl.layout.fill import Fill
    from fusectl.layout.mesh import Mesh
    from fusectl.planning.options import Options
    from fusectl.sources.lineage import Lineage


Source = Annotated[str | None, typer.Argument(metavar="[CKPT]", help="The checkpoint; read from a pipe if left out.")]
FusedFrom = Annotated[
    list[str],
    typer.Option(
        "--fused-from",
        metavar="CKPT",
        help="The fusion that a source was trained on from: for all sources, or repeated for each.",
    ),
]
NormGroups = Annotated[
    list[str],
    typer.Option(
        "--norm-groups",
        metavar="N,N,...",
        help="The widths that a source's norms are taken over: for all sources, or repeated for each.",
    ),
]
Output = Annotated[
    str | None, typer.Option("-o", "--output", help="The checkpoint to write. [default: a sibling of the source]")
]
FillOption = Annotated[FillKind, typer.Option("--fill", help="What stands where no source does.")]
NoiseScale = Annotated[
    float | None,
    typer.Option("--noise-scale", help="The noise's standard deviation relative to the kernel's own. [default: 0.1]"),
]
Seed = Annotated[int, typer.Option(help="The noise's seed.")]
OptimizerOption = Annotated[
    OnState,
    typer.Option(help="The optimizer's state: carried over, zeros, none, or kept for the first copy only."),
]
LayeredOptimizer = Annotated[
    Literal[OnState.CARRY, OnState.RESET, OnState.DROP],
    typer.Option(help="The optimizer's state: along with the layers, zeros, or none."),
]
NormOption = Annotated[
    Norm | None,
    typer.Option(
        help="What it will train with: the trainer's one norm, or a norm per source (fusectl.networks). "
        "[default: rule; property if a source has it]"
    ),
]
EqualizeBy = Annotated[
    Measure,
    typer.Option(help="Measure the streams in forward passes, or estimate them from the weights alone."),
]
FormatOption = Annotated[
    FormatName | None,
    typer.Option("--format", help="The layout on disk. [default: the first source's]"),
]
TrainerOption = Annotated[Trainer | None, typer.Option("--trainer", help="The trainer. [default: the family's]")]
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
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(help="Cast the parameters to this dtype. [default: as they are]"),
]
CodecOption = Annotated[
    Codec,
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

# The headings of --help.
SOURCES, OPERATION, OPTIMIZER = "Sources", "Operation", "Optimizer"
ON_DISK, RUNNING, OUTPUT = "Layout on disk", "Running", "Output"


# Groups have no more than an __init__: what else dataclasses make costs each a millisecond at every start.


@dataclass(kw_only=True, eq=False, repr=False)
class Reading:
    """How sources are recognised."""

    heading: ClassVar[str] = SOURCES
    arch: Arch = None
    drop: Drop = field(default_factory=list)

    def given(self) -> dict[str, Any]:
        """What of planning.options.Options it says; each group of such options has this method."""
        return {"arch": self.arch, "drop": tuple(self.drop)}


@dataclass(kw_only=True, eq=False, repr=False)
class Described(Reading):
    """Sources that a config tells more of."""

    config: Configs = field(default_factory=list)

    def given(self) -> dict[str, Any]:
        """See Reading."""
        return {**super().given(), "configs": tuple(self.config)}


@dataclass(kw_only=True, eq=False, repr=False)
class Norms:
    """The widths that sources' norms are taken over."""

    heading: ClassVar[str] = SOURCES
    fused_from: FusedFrom = field(default_factory=list)
    norm_groups: NormGroups = field(default_factory=list)

    def lineages(self) -> tuple[Lineage | None, ...]:
        """One for all sources, or one for each."""
        from fusectl.sources.lineage import lineages

        return lineages(self.fused_from, self.norm_groups)

    def given(self) -> dict[str, Any]:
        """See Reading."""
        return {"lineages": self.lineages()}

    def lineage(self) -> Lineage | None:
        """That of a single source."""
        from fusectl.sources.lineage import for_each

        (lineage,) = for_each(self.lineages(), 1)
        return lineage


@dataclass(kw_only=True, eq=False, repr=False)
class Filling:
    """What stands where no source does."""

    heading: ClassVar[str] = OPERATION
    fill: FillOption = FillKind.ZEROS
    noise_scale: NoiseScale = None
    seed: Seed = 0

    def value(self) -> Fill:
        """The library's Fill; raises UsageError for a scale of no noise, or that is no scale."""
        return fill_of(self.fill, self.noise_scale, self.seed)

    def given(self) -> dict[str, Any]:
        """See Reading."""
        return {"fill": self.value()}


@dataclass(kw_only=True, eq=False, repr=False)
class Noise(Filling):
    """The same, where there are zeros already."""

    fill: FillOption = FillKind.GAUSSIAN


@dataclass(kw_only=True, eq=False, repr=False)
class StepToWrite:
    """The step of the output."""

    heading: ClassVar[str] = OPTIMIZER
    step: Step = None

    def given(self) -> dict[str, Any]:
        """See Reading."""
        return {"step": self.step}


@dataclass(kw_only=True, eq=False, repr=False)
class State(StepToWrite):
    """What becomes of the optimizer's state."""

    optimizer: OptimizerOption = OnState.CARRY
    lr_table: LrTable = None

    def given(self) -> dict[str, Any]:
        """See Reading."""
        return {**super().given(), "optimizer": self.optimizer}


@dataclass(kw_only=True, eq=False, repr=False)
class LayeredState(StepToWrite):
    """What becomes of the optimizer's state where layers move as wholes."""

    optimizer: LayeredOptimizer = OnState.CARRY

    def given(self) -> dict[str, Any]:
        """See Reading."""
        return {**super().given(), "optimizer": self.optimizer}


@dataclass(kw_only=True, eq=False, repr=False)
class Copied:
    """How the output is stored, where chunks are put together anew."""

    heading: ClassVar[str] = ON_DISK
    format: FormatOption = None
    dtype: DtypeOption = None
    codec: CodecOption = Codec.AUTO
    sparse: Sparse = None
    mesh: MeshSizes = None
    axis_rules: AxisRules = None
    check: Check = True

    def given(self) -> dict[str, Any]:
        """See Reading."""
        return {
            "format": self.format,
            "dtype": self.dtype,
            "codec": self.codec,
            "sparse": self.sparse,
            "check": self.check,
            "mesh": mesh_of(self.mesh, self.axis_rules),
        }


@dataclass(kw_only=True, eq=False, repr=False)
class OnDisk(Copied):
    """How the output is stored, where sources' chunks can be linked."""

    link: Link = False

    def given(self) -> dict[str, Any]:
        """See Reading."""
        return {**super().given(), "link": self.link}


@dataclass(kw_only=True, eq=False, repr=False)
class Proven:
    """How a plan is carried out, and proved."""

    heading: ClassVar[str] = RUNNING
    dry_run: DryRun = False
    verify: Verify = False
    report: WithReport = True
    resume: Resume = False
    max_memory: MaxMemory = None
    jobs: Jobs = None

    @property
    def lets_nonfinite_pass(self) -> bool:
        """Never where values are computed with."""
        return False

    def given(self) -> dict[str, Any]:
        """See Reading."""
        most = parse_bytes(self.max_memory, "--max-memory")
        return {} if most is None else {"max_memory_bytes": most}


@dataclass(kw_only=True, eq=False, repr=False)
class Running(Proven):
    """The same, where NaN and Inf may be moved."""

    allow_nonfinite: AllowNonfinite = False

    @property
    def lets_nonfinite_pass(self) -> bool:
        """As the option says."""
        return self.allow_nonfinite


@dataclass(kw_only=True, eq=False, repr=False)
class Writing:
    """Where the output goes."""

    heading: ClassVar[str] = OUTPUT
    output: Output = None
    force: Force = False
    sync: Sync = True


@dataclass(kw_only=True, eq=False, repr=False)
class Common:
    """What every command has."""

    heading: ClassVar[str] = OUTPUT
    json: Json = False
    quiet: Quiet = False
    debug: Debug = False

    def screen(self, command: str) -> Screen:
        """The Screen of a command's run."""
        return Screen(command, json=self.json, quiet=self.quiet, debug=self.debug)


class Grouped(TyperCommand):
    """A command whose options stand under headings in plain text too; Typer has them on a terminal only."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the arguments, and the options by their headings."""
        if self.rich_markup_mode is not None:
            super().format_options(ctx, formatter)
            return
        # What Typer knows as panels is for Rich, whose help costs 80 ms: the same headings are put together here for
        # pipes.
        sections: dict[str, list[tuple[str, str]]] = {}
        for each in self.get_params(ctx):
            if (record := each.get_help_record(ctx)) is not None:
                own = "Arguments" if each.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(each, "rich_help_panel", None) or own, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class _Spread:
    """A command that takes the fields of its groups of options instead of the groups.

    Reading annotations takes 10 ms for each command, and --help lists all of them: its signature is made when it is
    asked for.
    """

    def __init__(self, command: Callable[..., None], name: str, text: str | None) -> None:
        self._command = command
        self.__name__, self.__doc__ = name, text

    @cached_property
    def _groups(self) -> dict[str, Any]:
        """The groups, by the names of the command's parameters."""
        return {name: hint for name, hint in self._hints.items() if is_dataclass(hint)}

    @cached_property
    def _hints(self) -> dict[str, Any]:
        return get_type_hints(self._command, include_extras=True)

    def _unspread(self) -> Iterable[Parameter]:
        """The command's own parameters, groups among them."""
        return signature(self._command).parameters.values()

    @cached_property
    def __signature__(self) -> Signature:
        heading = OPERATION if Writing in self._groups.values() else None
        parameters: list[Parameter] = []
        for parameter in self._unspread():
            name, hint = parameter.name, self._hints[parameter.name]
            if name not in self._groups:
                parameters.append(parameter.replace(annotation=_under(heading, hint)))
                continue
            own = get_type_hints(hint, include_extras=True)
            parameters += [
                Parameter(
                    each.name,
                    Parameter.KEYWORD_ONLY,
                    default=_default(each),
                    annotation=_under(getattr(hint, "heading", heading), own[each.name]),
                )
                for each in fields(hint)
            ]
        return Signature(parameters)

    @property
    def __annotations__(self) -> dict[str, Any]:  # type: ignore[override]
        return {each.name: each.annotation for each in self.__signature__.parameters.values()}

    def __call__(self, *args: Any, **values: Any) -> None:
        # Called from Python, as `grow` calls commands, it has the defaults that the parser would have filled in.
        bound = self.__signature__.bind(*args, **values)
        bound.apply_defaults()
        given = bound.arguments
        for name, group in self._groups.items():
            given[name] = group(**{each.name: given.pop(each.name) for each in fields(group)})
        self._command(**given)


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes the fields of its groups of options instead of the groups.

    In --help each group stands under its heading, and what a writing command has for itself under that of operations.
    """
    return _Spread(command, command.__name__, command.__doc__)


class _Operation(_Spread):
    """The command of an operation, made of its row."""

    def __init__(self, verb: Verb, command: Callable[..., None]) -> None:
        super().__init__(command, verb.name.replace("-", "_"), verb.about)
        self._verb = verb

    @cached_property
    def _hints(self) -> dict[str, Any]:
        # Rows name groups by their names, since importing the rows must cost nothing, and these classes import Typer.
        given = {each.value: globals()[each.value] for each in self._verb.groups}
        sources = {name: given.pop(name) for name in list(given) if given[name].heading == SOURCES}
        own = {} if self._verb.options is None else {"own": self._verb.options}
        of_all = {"disk": OnDisk, "running": Running, "writing": Writing, "common": Common}
        return {"source": Source, **sources, **own, **given, **of_all}

    def _unspread(self) -> Iterable[Parameter]:
        yield Parameter("source", Parameter.POSITIONAL_OR_KEYWORD, default=None)
        yield from (Parameter(name, Parameter.KEYWORD_ONLY) for name in self._hints if name != "source")


def command_of(verb: Verb, command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes the options of a row of fusectl.verbs.

    `command` is called with `source`, the groups by their names, `own`, and `disk`, `running`, `writing`, `common`.
    """
    return _Operation(verb, command)


def _default(option: Field[Any]) -> object:
    return option.default if option.default_factory is MISSING else option.default_factory()


def _under(heading: str | None, hint: Any) -> Any:
    """The annotation with its option under a heading, unless it has one."""
    kind, *rest = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    if rest and isinstance(rest[0], Option):
        said = rest[0]
        rest = [typer.Option(*said.names, help=said.help, min=said.least)]
        hint = Annotated[kind, rest[0]]
    if not rest or not isinstance(rest[0], OptionInfo) or rest[0].rich_help_panel is not None:
        return hint
    option = copy(rest[0])
    option.rich_help_panel = heading
    return Annotated[kind, option]


def options_of(*groups: Any, **more: Any) -> Options:
    """The library's Options, as groups of options say; `more` are those of one command."""
    from fusectl.planning.options import Options

    return Options(**{name: value for group in groups for name, value in group.given().items()}, **more)


# Options that are followed by several values.
GATHERED = ("--sources", "--over-time")


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


# On Linux it is 4096 bytes; what comes through a pipe may have no line's end.
_LONGEST_PATH = 1 << 16


def path_of(given: str | None) -> str:
    """The checkpoint's path: the argument, or the first line of a pipe."""
    if given is not None:
        return given
    # On a terminal this would block for a line that the user does not know to type.
    if sys.stdin is None or sys.stdin.isatty():
        hint = "name it, or pipe its path in; with --sources or --over-time, name it before them"
        raise UsageError("which checkpoint?", hint=hint)
    line = sys.stdin.readline(_LONGEST_PATH).strip()
    if not line:
        raise UsageError("no path came through the pipe", hint="did the command before it fail?")
    # The line that resumes an interrupted run says the path: what came through the pipe will not come again.
    ARGUMENTS.append(line)
    return line


def numbers_of(text: str | None, option: str) -> tuple[float, ...] | None:
    """Numbers with commas between them; None where none are given. Raises UsageError for anything else."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} {text}: numbers with commas between them", hint=f"{option} 0.7,0.3") from error


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


def mesh_of(sizes: str | None, rules: str | None) -> Mesh | None:
    """The mesh that chunks are to suit; None where none is given."""
    from fusectl.layout.mesh import parse_mesh

    if sizes is None and rules is not None:
        raise UsageError("--axis-rules: of which mesh?", hint="--mesh data=8,model=4")
    return None if sizes is None else parse_mesh(sizes, rules)


def fill_of(kind: FillKind, noise_scale: float | None, seed: int | None) -> Fill:
    """What is to stand where no source does; raises UsageError for a scale of no noise, or that is no scale."""
    from fusectl.layout.fill import DEFAULT_NOISE_SCALE, Fill

    if kind == FillKind.ZEROS:
        if noise_scale is not None:
            raise UsageError("--noise-scale without noise", hint="--fill gaussian or antisymmetric")
        return Fill()
    scale = DEFAULT_NOISE_SCALE if noise_scale is None else noise_scale
    require_scale(scale)
    return Fill(kind, scale, seed)


def require_scale(noise_scale: float) -> None:
    """Raises UsageError for a noise scale that is not a positive number."""
    if not 0.0 < noise_scale < float("inf"):
        raise UsageError(f"--noise-scale {noise_scale:g}: a positive number")
