"""optax's Adam, in T5X, Flax or MaxText: a first and a second moment of every parameter's shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from fusectl.families.recognized import Recognized
from fusectl.optimizer.state import OptimizerState, Order, Steps, without_root
from fusectl.optimizer.trees import COLLECTION, COUNT, MOMENTS, WINDOW, moment_of, windows


@dataclass(frozen=True)
class Adam(OptimizerState):
    """The state of optax's Adam."""

    kind: str = "adam"
    # What stands before a parameter's name below mu and nu.
    inside: str = ""

    orders: ClassVar[Mapping[str, Order]] = {"mu": Order.GRADIENT, "nu": Order.SQUARE}
    steps: ClassVar[Steps | None] = Steps.ADAM

    @classmethod
    def find(cls, own: Mapping[str, tuple[int, ...]], tree: Recognized) -> tuple[Adam, list[str]] | None:
        """See OptimizerState; counts alone are taken for its state, too."""
        short = [without_root(name) for name in own]
        if not all(MOMENTS.fullmatch(name) or COUNT.fullmatch(name) or WINDOW.fullmatch(name) for name in short):
            return None
        collections = (moment[0] for name in own if (moment := moment_of(name, COLLECTION)))
        inside = COLLECTION if any(parameter in tree.shapes for parameter in collections) else ""
        moments = {name: moment_of(name, inside) for name in own}
        wrong = [
            f"{name}: shape {list(shape)}"
            for name, shape in own.items()
            if not WINDOW.fullmatch(without_root(name))
            and shape != (() if COUNT.fullmatch(without_root(name)) else _shape_of(moments[name], tree))
        ]
        times = Counter((pair[1], pair[0]) for pair in moments.values() if pair)
        wrong += [
            f"{parameter}: {times[moment, parameter] or 'no'} slots {moment}, expected one"
            for parameter in tree.shapes
            for moment in cls.orders
            if times[moment, parameter] != 1
        ]
        beside = {name: own[name] for name, moment in moments.items() if moment is None}
        return cls(tuple(own), inside=inside, beside=beside, anew=windows(own)), wrong

    def slot(self, parameter: str, moment: str) -> str:
        """See OptimizerState."""
        return self._by_moment[moment, parameter]

    def names_of(self, slot: str) -> tuple[str | None, str]:
        """See OptimizerState."""
        return (None if slot in self.beside else moment_of(slot, self.inside)) or (None, without_root(slot))

    @cached_property
    def _by_moment(self) -> Mapping[tuple[str, str], str]:
        found = ((moment_of(name, self.inside), name) for name in self.names)
        return {(pair[1], pair[0]): name for pair, name in found if pair}


def _shape_of(moment: tuple[str, str] | None, tree: Recognized) -> tuple[int, ...] | None:
    """The shape that a slot has to have: that of its parameter; None where there is no such parameter."""
    return None if moment is None else tree.shapes.get(moment[0])
