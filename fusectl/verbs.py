"""The operations, a row each, and what a record says of a checkpoint that one of them has made.

To add one: its planner in operations/, its check in verification/ (a module that is called like the kind of its
record), and here the kind, if none of those there will do, and the row. Importing this costs nothing: records, checks,
the names of outputs and the command line are made from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from importlib import import_module
from typing import Annotated, Any

from fusectl.errors import UsageError
from fusectl.rules.kinds import How
from fusectl.system.jsontree import Tagged


class Scan(StrEnum):
    """Whether layers are stacked along an axis, or stand each for itself."""

    SCANNED = "scanned"
    UNSCANNED = "unscanned"


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """A checkpoint that went in. `fingerprint` covers its index, and the names and sizes of its files."""

    path: str
    format: str
    step: int | None
    fingerprint: str
    norm_groups: tuple[int, ...]


class OfOne(Tagged):
    """Made from one checkpoint."""

    __slots__ = ()
    source: SourceRecord

    @property
    def made_from(self) -> tuple[SourceRecord, ...]:
        """The checkpoints that the operation was given."""
        return (self.source,)


@dataclass(frozen=True, slots=True)
class Fused(Tagged):
    """Made by fusing `sources` side by side; empty where nobody knows them any more."""

    sources: tuple[SourceRecord, ...] = ()

    @property
    def made_from(self) -> tuple[SourceRecord, ...]:
        """The checkpoints that the operation was given."""
        return self.sources


@dataclass(frozen=True, slots=True)
class Stacked(OfOne):
    """Made deeper than `source`, by `how`.

    `layers` has for each layer of each stack the source's layer that it is made from; those of `idle` add nothing to
    the residual stream.
    """

    source: SourceRecord
    how: str
    layers: Mapping[str, tuple[int, ...]]
    idle: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        if not self.layers or self.layers.keys() != self.idle.keys():
            raise ValueError(f"layers of {', '.join(self.layers)}, and idle ones of {', '.join(self.idle)}")

    @property
    def keeps_function(self) -> bool:
        """Whether it computes what its source does."""
        return self.how == How.IDENTITY


@dataclass(frozen=True, slots=True)
class Mapped(OfOne):
    """Made from `source` by a linear operator, whose matrices came about by `how`."""

    source: SourceRecord
    how: str
    # The operator, a checkpoint: its path, and the digest of its files; None where it was not kept.
    operator: str | None
    operator_fingerprint: str | None
    # Whether it computes what its source does.
    keeps_function: bool


@dataclass(frozen=True, slots=True)
class Converted(OfOne):
    """A copy of `source`, which itself was made as `of` says, and what was changed on the way.

    `dtype` is the one that parameters were cast to, `layers` how they stand since, `step` the one that was set; None
    for as they were. `drop` are patterns of what was left out.
    """

    source: SourceRecord
    dtype: str | None
    layers: Scan | None
    drop: tuple[str, ...]
    step: int | None
    of: Original | None = None


# How a checkpoint came to be: the kinds of origin that a record knows. A copy's own is one of the others.
Original = Fused | Stacked | Mapped
Made = Original | Converted


# Classes have no more than an __init__ from here on: what else dataclasses make costs each a millisecond at a start.


class Group(StrEnum):
    """Options that several commands have; cli/options.py has a dataclass of each of these names."""

    READING = "Reading"
    DESCRIBED = "Described"
    NORMS = "Norms"
    OF_MEAN = "OfMean"
    FILLING = "Filling"
    NOISE = "Noise"
    STEP = "StepToWrite"
    STATE = "State"
    LAYERED_STATE = "LayeredState"


@dataclass(eq=False, repr=False)
class Option:
    """What an operation's own option says of itself in --help: a sentence, its names, and the least number."""

    help: str
    names: tuple[str, ...] = ()
    least: int | None = None


@dataclass(eq=False, repr=False)
class OwnOptions:
    """What an operation has for itself: fields that are Annotated with an Option each."""

    def given(self) -> dict[str, Any]:
        """What the planner is given, by the names of its parameters; raises UsageError for what makes no sense."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(eq=False, repr=False)
class Verb:
    """An operation.

    `plan` is `module:function` of fusectl.operations: from a path, planning.options.Options, and what `options` gives
    by name, to a Plan and the opened sources. Where a planner takes more, or its command does more than plan and write,
    that has a module of its own in cli/; all others are made of `groups` and `options`.
    """

    name: str
    made: type[Made]
    plan: str
    # Of the default output's name: {sources} is how many there are.
    suffix: str
    # The same where the output's format is another one than the source's; {format} is that.
    suffix_elsewhere: str = ""
    # Whether that name tells noise.
    tells_noise: bool = True
    # What --help says in the list, and of the command; a line that shows it.
    says: str = ""
    about: str = ""
    example: str = ""
    groups: Sequence[Group] = ()
    options: type[OwnOptions] | None = None
    # The ways of `fusectl grow` that it is, and the function of each, as in `plan`: from operations.routes.Larger to a
    # Route.
    routes: Mapping[str, str] = field(default_factory=dict)

    def planner(self) -> Any:
        """The function that plans it."""
        return operation(self.plan)


def operation(name: str) -> Any:
    """A `module:function` of fusectl.operations, imported now."""
    module, _, function = name.partition(":")
    return getattr(import_module(f"fusectl.operations.{module}"), function)


@dataclass(eq=False, repr=False)
class Copies(OwnOptions):
    """Of self-fuse."""

    copies: Annotated[int, Option("How many copies stand side by side.", ("--copies", "-k"))] = 2

    def given(self) -> dict[str, Any]:
        """See OwnOptions."""
        if self.copies < 2:
            raise UsageError(f"--copies {self.copies}: fusing takes two or more")
        return super().given()


@dataclass(eq=False, repr=False)
class KnownCopies(OwnOptions):
    """Of noise-fill."""

    copies: Annotated[int | None, Option("For a fusion without fusectl.json: its K.", ("--copies", "-k"))] = None


@dataclass(eq=False, repr=False)
class Rewriting(OwnOptions):
    """Of convert."""

    scan: Annotated[
        bool | None, Option("Stack the layers along an axis, or each for itself.", ("--scan/--unscan",))
    ] = None
    drop_optimizer: Annotated[bool, Option("Leave the optimizer's state out.", ("--drop-optimizer",))] = False

    def given(self) -> dict[str, Any]:
        """What the planner is given."""
        layers = None if self.scan is None else Scan.SCANNED if self.scan else Scan.UNSCANNED
        return {"layers": layers, "drop_optimizer": self.drop_optimizer}


@dataclass(eq=False, repr=False)
class LayerCounts(OwnOptions):
    """How deep a model is to become."""

    layers: Annotated[int | None, Option("How many layers each stack is to have.", ("--layers",), 1)] = None
    encoder_layers: Annotated[
        int | None, Option("How many layers the encoder is to have. [default: --layers, or as it is]", least=1)
    ] = None
    decoder_layers: Annotated[
        int | None, Option("How many layers the decoder is to have. [default: --layers, or as it is]", least=1)
    ] = None


@dataclass(eq=False, repr=False)
class Deepening(LayerCounts):
    """Of stack."""

    how: Annotated[How, Option("The whole stack again, each layer again, or new layers that add nothing at first.")] = (
        How.STACK
    )


VERBS = {
    each.name: each
    for each in (
        Verb("fuse", Fused, "fuse:plan_fusion", ".fused-{sources}x"),
        Verb(
            "self-fuse",
            Fused,
            "fuse:plan_self_fusion",
            ".self-fused-{sources}x",
            says="Fuse a checkpoint with itself, the function kept.",
            about="Fuse a checkpoint with itself: K times as wide, the same function.",
            example="fusectl self-fuse small/checkpoint_500000 --copies 2 --fill antisymmetric",
            groups=(Group.DESCRIBED, Group.NORMS, Group.OF_MEAN, Group.FILLING, Group.STATE),
            options=Copies,
            routes={"self-fuse": "fuse:route"},
        ),
        Verb(
            "noise-fill",
            Fused,
            "noise_fill:plan_noise_fill",
            "",
            says="Fill the zero blocks of a fusion with noise.",
            about="Fill the zero blocks of a fused checkpoint with low-variance noise.",
            example="fusectl fuse a b | fusectl noise-fill --noise-scale 0.1 | fusectl verify",
            groups=(Group.READING, Group.NOISE, Group.STEP),
            options=KnownCopies,
        ),
        Verb(
            "convert",
            Converted,
            "convert:plan_conversion",
            ".converted",
            ".{format}",
            tells_noise=False,
            says="Write a checkpoint in another format.",
            about=(
                "Write a checkpoint in another format or dtype, with its layers stacked or not, the optimizer's state "
                "included."
            ),
            example="fusectl convert runs/a/checkpoint_1000000 --format orbax -o runs/b/1000000",
            groups=(Group.READING, Group.STEP),
            options=Rewriting,
        ),
        Verb(
            "stack",
            Stacked,
            "stack:plan_stack",
            ".stacked",
            says="Make a checkpoint deeper, without data.",
            about=(
                "Make a checkpoint deeper: its layers again, or new ones that keep the function, the optimizer's state "
                "along."
            ),
            example="fusectl stack small/checkpoint_500000 --layers 24 --how identity",
            groups=(Group.DESCRIBED, Group.LAYERED_STATE),
            options=Deepening,
            routes={"stack": "stack:route"},
        ),
        Verb(
            "ligo",
            Mapped,
            "ligo:plan_with_operator",
            ".ligo",
            routes={"duplicate": "ligo:route_without_data", "ligo": "ligo:route_with_data"},
        ),
    )
}
