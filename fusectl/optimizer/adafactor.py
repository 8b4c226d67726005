"""T5X's Adafactor: second moments of large matrices as a row and a column. All four slots exist, unused ones are (1,).

What it factors, and which axes `v_row` and `v_col` index, follows from shapes and logical axes. Source:
t5x/adafactor.py, `HeuristicRule` and `standard_logical_factor_rules`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fusectl.families.recognized import Recognized
from fusectl.layout.axes import TensorSpec
from fusectl.optimizer.state import STATE, UNUSED, Axes, OptimizerState, Order, Steps


# T5X factors the second moments of a matrix only if both of its dimensions reach this.
FACTORED_FROM = 128
ROW = frozenset({"embed"})
COLUMN = frozenset({"vocab", "mlp", "heads", "kv", "joined_kv"})


@dataclass(frozen=True)
class Adafactor(OptimizerState):
    """The state of T5X's Adafactor; `m` averages updates, which are as large as the parameter's RMS."""

    kind: str = "adafactor"
    factored: bool = False
    momentum: bool = False
    # Whether nothing in it is large enough to tell if it is factored: then T5X's default is assumed.
    may_be_either: bool = False

    orders: ClassVar[Mapping[str, Order]] = {
        "m": Order.UPDATE,
        "v": Order.SQUARE,
        "v_row": Order.SQUARE,
        "v_col": Order.SQUARE,
    }
    steps: ClassVar[Steps | None] = Steps.ADAFACTOR

    @classmethod
    def find(cls, own: Mapping[str, tuple[int, ...]], tree: Recognized) -> tuple[Adafactor, list[str]] | None:
        """See OptimizerState."""
        moments = {name.rpartition("/")[2] for name in own}
        if not all(name.startswith(STATE) for name in own) or moments.isdisjoint(cls.orders):
            return None
        slots = {name.removeprefix(STATE): shape for name, shape in own.items()}
        momentum = any(name.endswith("/m") and shape != UNUSED for name, shape in slots.items())
        wrong_by = {f: _contradictions(slots, tree, factored=f, momentum=momentum) for f in (True, False)}
        fitting = [factored for factored, wrong in wrong_by.items() if not wrong]
        state = cls(tuple(own), factored=fitting[0] if fitting else False, momentum=momentum)
        return replace(state, may_be_either=len(fitting) > 1), [] if fitting else wrong_by[False]

    def axes_of(self, moment: str, shape: tuple[int, ...], spec: TensorSpec) -> Axes | None:
        """See OptimizerState."""
        return adafactor_axes(shape, spec, factored=self.factored, momentum=self.momentum)[moment]

    def slot(self, parameter: str, moment: str) -> str:
        """See OptimizerState."""
        return f"{STATE}{parameter}/{moment}"

    def slot_beside(self, like: str, parameter: str, moment: str) -> str:  # noqa: ARG002
        """See OptimizerState."""
        return self.slot(parameter, moment)

    def names_of(self, slot: str) -> tuple[str | None, str]:
        """See OptimizerState."""
        parameter, _, moment = slot.removeprefix(STATE).rpartition("/")
        return parameter, moment

    def fresh(self, tree: Recognized, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """See OptimizerState."""
        return {
            f"{STATE}{parameter}/{slot}": slot_shape
            for parameter, shape in shapes.items()
            for slot, slot_shape in adafactor_slots(
                shape, tree.rows[parameter].spec, factored=self.factored, momentum=self.momentum
            ).items()
        }

    def among(self, states: Sequence[OptimizerState]) -> OptimizerState:
        """See OptimizerState; T5X's default is factored."""
        told = [s.factored for s in states if isinstance(s, Adafactor) and not s.may_be_either]
        return replace(self, factored=next(iter(told), True)) if self.may_be_either else self

    def doubts(self, tree: Recognized, shapes: Mapping[str, tuple[int, ...]]) -> Sequence[str]:
        """See OptimizerState."""
        if self.may_be_either and any(factored_axes(shape, tree.rows[name].spec) for name, shape in shapes.items()):
            return ["too small a source to tell whether Adafactor is factored: taken for T5X's default, factored"]
        return []

    def __str__(self) -> str:
        return f"{self.kind}{', factored' * self.factored}{', with momentum' * self.momentum}"


def adafactor_slots(
    shape: tuple[int, ...], spec: TensorSpec, *, factored: bool, momentum: bool
) -> dict[str, tuple[int, ...]]:
    """The shapes of m, v, v_row and v_col that T5X's Adafactor creates for a parameter.

    >>> from fusectl.layout.axes import parse_axes
    >>> adafactor_slots((2048, 768), parse_axes("mlp -> embed"), factored=True, momentum=False)
    {'m': (1,), 'v': (1,), 'v_row': (768,), 'v_col': (2048,)}
    """
    axes_of = adafactor_axes(shape, spec, factored=factored, momentum=momentum)
    return {slot: UNUSED if axes is None else tuple(shape[axis] for axis in axes) for slot, axes in axes_of.items()}


def adafactor_axes(
    shape: tuple[int, ...], spec: TensorSpec, *, factored: bool, momentum: bool
) -> dict[str, Axes | None]:
    """The axes of a parameter that each slot of T5X's Adafactor has; None for those that are not in use.

    >>> from fusectl.layout.axes import parse_axes
    >>> adafactor_axes((2048, 768), parse_axes("mlp -> embed"), factored=True, momentum=False)
    {'m': None, 'v': None, 'v_row': (1,), 'v_col': (0,)}
    """
    every = tuple(range(len(shape)))
    m = every if momentum else None
    dropped = factored_axes(shape, spec) if factored else None
    if dropped is None:
        return {"m": m, "v": every, "v_row": None, "v_col": None}
    v_row, v_col = (tuple(axis for axis in every if axis not in axes) for axes in dropped)
    return {"m": m, "v": None, "v_row": v_row, "v_col": v_col}


def factored_axes(shape: tuple[int, ...], spec: TensorSpec) -> tuple[set[int], set[int]] | None:
    """The axes that v_row and v_col average over, or None where the second moments are not factored.

    >>> from fusectl.layout.axes import parse_axes
    >>> factored_axes((2048, 768), parse_axes("mlp -> embed")), factored_axes((2048, 100), parse_axes("mlp -> embed"))
    (({0}, {1}), None)
    """
    if len(shape) <= 2 and "layers" not in spec.axes:
        if len(shape) < 2:
            return None
        second, largest = sorted(range(len(shape)), key=shape.__getitem__)[-2:]
        return None if shape[second] < FACTORED_FROM else ({largest}, {second})
    rows = {axis for axis, name in enumerate(spec.axes) if name in ROW}
    columns = {axis for axis, name in enumerate(spec.axes) if name in COLUMN}
    return (columns, rows) if rows and columns else None


def _contradictions(
    slots: Mapping[str, tuple[int, ...]], tree: Recognized, *, factored: bool, momentum: bool
) -> list[str]:
    expected = {
        f"{parameter}/{slot}": shape
        for parameter, own in tree.shapes.items()
        for slot, shape in adafactor_slots(own, tree.rows[parameter].spec, factored=factored, momentum=momentum).items()
    }
    return [
        f"{STATE}{name}: shape {_shown(slots.get(name))}, expected {_shown(expected.get(name))}"
        for name in sorted(slots.keys() | expected.keys())
        if slots.get(name) != expected.get(name)
    ]


def _shown(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
