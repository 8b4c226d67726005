"""States that cannot be carried: of no optimizer, and of optax's others, of which names and shapes alone are known."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fusectl.families.recognized import Recognized
from fusectl.optimizer.state import OptimizerState, without_root
from fusectl.optimizer.trees import COLLECTION, moment_of, windows


# Of any of optax's transformations: slots of a parameter's shape that begin as zeros, numbers that do, and settings.
_SLOT = re.compile(r"(?:[^/]+/)*?(mu|nu|trace|acc_grads)/(.+)")
_NUMBER = re.compile(r"(?:[^/]+/)*(count|gradient_step|mini_step)")
_SETTING = re.compile(r"(?:[^/]+/)*(ns_coeffs)")


@dataclass(frozen=True)
class NoState(OptimizerState):
    """Of a checkpoint without any."""

    kind: str = "none"

    @classmethod
    def find(cls, own: Mapping[str, tuple[int, ...]], tree: Recognized) -> tuple[NoState, list[str]] | None:  # noqa: ARG003
        """See OptimizerState."""
        return None if own else (cls(), [])

    def slot(self, parameter: str, moment: str) -> str:
        """There is none."""
        raise KeyError(parameter, moment)

    def names_of(self, slot: str) -> tuple[str | None, str]:
        """See OptimizerState."""
        return None, without_root(slot)


@dataclass(frozen=True)
class Unknown(NoState):
    """Of any of optax's optimizers, told by structure alone; or of a known one that lacks slots, and then called so."""

    kind: str = "unknown"
    inside: str = ""

    @classmethod
    def find(cls, own: Mapping[str, tuple[int, ...]], tree: Recognized) -> tuple[Unknown, list[str]]:
        """The state, and what of it cannot be told apart."""
        inside = COLLECTION if any(f"/{COLLECTION}" in name for name in own) else ""
        moments = {name: moment_of(name, inside, _SLOT) for name in own}
        settings = frozenset(name for name in own if _SETTING.fullmatch(without_root(name)))
        numbers = [name for name in own if own[name] == () and _NUMBER.fullmatch(without_root(name))]
        anew = windows(own)
        known = settings | anew | frozenset(numbers)
        strange = [
            f"{name}: no slot of a parameter, no count and no setting that fusectl knows"
            if moment is None or moment[0] not in tree.shapes
            else f"{name}: shape {list(own[name])}, its parameter is {list(tree.shapes[moment[0]])}"
            for name, moment in moments.items()
            if name not in known and own[name] != (None if moment is None else tree.shapes.get(moment[0]))
        ]
        beside = {name: own[name] for name in own if name in known}
        state = cls(tuple(own), inside=inside, beside=beside, anew=anew, settings=settings)
        parts = Counter(state.names_of(name)[1] for name in state.names if name not in state.beside)
        problems = tuple(f"{n} slots {moment}, which need not be Adam's" for moment, n in parts.items())
        return replace(state, problems=problems), strange

    def names_of(self, slot: str) -> tuple[str | None, str]:
        """See OptimizerState."""
        found = None if slot in self.beside else moment_of(slot, self.inside, _SLOT)
        return found or (None, without_root(slot))
