"""An optimizer's state in a checkpoint: what every optimizer answers of its slots.

    state/param_states/<parameter>/{m,v,v_row,v_col}      T5X's Adafactor                       adafactor.py
    state/param_states/<n>/{mu,nu}/<parameter>            optax's Adam inside T5X               adam.py
    opt_state/<n>/{mu,nu}/params/<parameter>              and in a state of Flax or MaxText     adam.py
    opt_state/inner_states/muon/…/mu/params/<parameter>   others, which can only be reset       unknown.py

Slot shapes are a function of the parameter's shape and axes, never of the source's slots: growing can turn `v` into
`v_row` and `v_col`, or swap what they index.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Self

from fusectl.errors import Incompatible, shorten
from fusectl.families.recognized import Recognized
from fusectl.layout.axes import TensorSpec


# Where T5X keeps it, and Flax's training loops.
STATE = "state/param_states/"
FLAX_STATE = "opt_state/"
STATES = (STATE, FLAX_STATE)
# The shape of a slot that is not in use.
UNUSED = (1,)

Axes = tuple[int, ...]


class Order(StrEnum):
    """What a moment averages, by which it scales: gradients, their squares, or updates that were made of them."""

    GRADIENT = "gradient"
    SQUARE = "square"
    UPDATE = "update"


class Steps(StrEnum):
    """How an optimizer's steps scale, as the columns of a table of learning rates are called (rates.py)."""

    SGD = "sgd"
    ADAM = "adam"
    ADAFACTOR = "adafactor"


@dataclass(frozen=True)
class OptimizerState(ABC):
    """The state of an optimizer in a checkpoint, or what another model of the same optimizer would have.

    To add an optimizer, subclass this in a file of its own and name it in registry.py.
    """

    # The full names of all slots.
    names: tuple[str, ...] = ()
    kind: str = ""
    # The shapes of what is no parameter's, and of it what another model begins anew, and what no model changes.
    beside: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)
    anew: frozenset[str] = frozenset()
    settings: frozenset[str] = frozenset()
    # Why it cannot be carried.
    problems: tuple[str, ...] = ()

    # What each moment that it may have averages.
    orders: ClassVar[Mapping[str, Order]] = {}
    # None where no factor of the learning rate is known.
    steps: ClassVar[Steps | None] = None

    @classmethod
    @abstractmethod
    def find(cls, own: Mapping[str, tuple[int, ...]], tree: Recognized) -> tuple[Self, list[str]] | None:
        """The state that slots of these names and shapes are, and what contradicts it; None for names of another's."""

    def moments(self, parameter: str) -> Sequence[str]:  # noqa: ARG002
        """The moments that a parameter has slots of, those not in use among them."""
        return tuple(self.orders)

    def axes_of(self, moment: str, shape: tuple[int, ...], spec: TensorSpec) -> Axes | None:  # noqa: ARG002
        """The axes of a parameter of this shape that a slot has; None for one that is not in use."""
        return tuple(range(len(shape)))

    @abstractmethod
    def slot(self, parameter: str, moment: str) -> str:
        """The full name of a parameter's slot."""

    def slot_beside(self, like: str, parameter: str, moment: str) -> str:
        """The full name of a slot of a parameter that is not there yet, where that of the one `like` it is."""
        return self.slot(like, moment).removesuffix(like) + parameter

    @abstractmethod
    def names_of(self, slot: str) -> tuple[str | None, str]:
        """The parameter and the moment that a full name says; no parameter for what is none's."""

    def fresh(self, tree: Recognized, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:  # noqa: ARG002
        """The names and shapes of the slots that the optimizer creates for parameters of these shapes, but settings."""
        parameters = {name: self.names_of(name)[0] for name in self.names if name not in self.settings}
        return {name: self.beside[name] if p is None else shapes[p] for name, p in parameters.items()}

    def among(self, states: Sequence[OptimizerState]) -> OptimizerState:  # noqa: ARG002
        """The state as others of one fusion tell it to be, where it does not tell itself."""
        return self

    def doubts(self, tree: Recognized, shapes: Mapping[str, tuple[int, ...]]) -> Sequence[str]:  # noqa: ARG002
        """What was assumed, and matters for a model of these shapes, in sentences."""
        return ()

    def is_first(self, moment: str) -> bool:
        """Whether a moment is zero where nothing has moved yet: of an order that has a sign."""
        return self.orders.get(moment) in {Order.GRADIENT, Order.UPDATE}

    def second_moments(self, parameter: str, kept: Axes, shape: tuple[int, ...], spec: TensorSpec) -> tuple[str, Axes]:
        """The moment of squares that has these axes of a parameter, and all of its axes: perhaps more."""
        has = {moment: self.axes_of(moment, shape, spec) for moment in self.moments(parameter)}
        return next(
            (moment, axes)
            for moment, axes in has.items()
            if self.orders[moment] is Order.SQUARE and axes is not None and set(kept) <= set(axes)
        )

    def require_known(self, where: str, hint: str) -> None:
        """Raises Incompatible where it is of an optimizer that fusectl does not know, so that it cannot be carried."""
        if self.problems:
            raise not_known(where, self.problems, hint)

    def __str__(self) -> str:
        return self.kind


def is_state(name: str) -> bool:
    """Whether a tensor is part of the optimizer's state.

    >>> is_state("state/param_states/0/count"), is_state("target/kernel")
    (True, False)
    """
    return name.startswith(STATES)


def without_root(name: str) -> str:
    """The name of a slot below the node that all of the optimizer's state is in.

    >>> without_root("opt_state/0/mu/params/kernel")
    '0/mu/params/kernel'
    """
    root = next((root for root in STATES if name.startswith(root)), "")
    return name.removeprefix(root)


def not_known(where: str, wrong: Sequence[str], hint: str) -> Incompatible:
    """The error for a state that no optimizer has that fusectl knows."""
    return Incompatible(
        f"{where}: optimizer state that does not fit its parameters, or of an optimizer that fusectl does not know",
        details=shorten(wrong, 5),
        hint=hint,
    )


def slot_axes(
    name: str, shape: tuple[int, ...], tree: Recognized, parameters: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """The names of the axes of a slot: its parameter's, if it has that one's whole shape among `parameters`.

    All others have none (`unnamed`): T5X replicates them, v_row and v_col among them (t5x/adafactor.py,
    `derive_logical_axes`). Slots of optimizers that fusectl does not know are told by their names, too.
    """
    parts = without_root(name).split("/")
    within = ("/".join(parts[i:j]) for i in range(len(parts)) for j in range(len(parts), i, -1))
    parameter = next((part for part in within if part in parameters), None)
    if parameter is None or parameters[parameter] != shape:
        return unnamed(shape)
    return tree.rows[parameter].spec.axes


def unnamed(shape: tuple[int, ...]) -> tuple[str, ...]:
    """Names for the axes of a tensor of which nothing is known; no rule lays them over a mesh.

    >>> unnamed((2, 3))
    ('axis0', 'axis1')
    """
    return tuple(f"axis{i}" for i in range(len(shape)))
