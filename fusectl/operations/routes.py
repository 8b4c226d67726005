"""Which operations lead from a checkpoint to larger sizes, and what each of them keeps: the front door to all of them.

Each row of fusectl.verbs names the functions that answer for it; they are in the modules that plan the operations.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fusectl.errors import UsageError
from fusectl.families.recognized import Recognized
from fusectl.operations.target import Target
from fusectl.rules.linear import growing_to
from fusectl.verbs import VERBS, operation


# A command, and what it is given.
Step = tuple[str, Mapping[str, int | str]]


@dataclass(frozen=True)
class Larger:
    """A model, `tree`, and the same as large as it is to become, `grown`."""

    tree: Recognized
    grown: Recognized

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as large every axis becomes that an operation may grow."""
        tree, grown = self.tree, self.grown
        return {axis: grown.sizes[axis] / tree.sizes[axis] for axis in tree.sizes if axis in tree.family.grown}

    @property
    def wider(self) -> bool:
        """Whether any axis grows."""
        return any(ratio != 1 for ratio in self.ratios.values())

    @property
    def deeper(self) -> dict[str, int]:
        """The depths of the stacks that get more layers."""
        return {stack: n for stack, n in self.grown.depths.items() if n != self.tree.depths[stack]}

    @property
    def layer_options(self) -> dict[str, int | str]:
        """What commands call these depths."""
        return {f"{stack}_layers": n for stack, n in self.deeper.items()}


@dataclass(frozen=True)
class Route:
    """One way: what it keeps, in words, the commands that follow each other and what they are given; or why it does not
    lead there. `data` is the option that it needs data for, if it does.
    """

    keeps: str
    steps: tuple[Step, ...] = ()
    why_not: str = ""
    data: str | None = None
    how: str = ""

    def command(self, where: str) -> str:
        """The line that goes there."""
        lines = [
            " ".join(["fusectl", name, *([] if i else [shlex.quote(where)]), *map(_option, given.items())])
            for i, (name, given) in enumerate(self.steps)
        ]
        if self.data is not None:
            lines[-1] += f" --{self.data} FILE"
        return " | ".join(lines)


def _option(pair: tuple[str, int | str]) -> str:
    return f"--{pair[0].replace('_', '-')} {pair[1]}"


def routes(tree: Recognized, target: Target, where: str) -> list[Route]:
    """The Routes from a tree to a target, those that lead there first; raises Incompatible where none does."""
    larger = Larger(tree, growing_to(tree, target.sizes, target.depths, "pinv", where).grown)
    if not larger.wider and not larger.deeper:
        raise UsageError(f"{where}: it is as large as that already")
    ways = [(how, answer) for verb in VERBS.values() for how, answer in verb.routes.items()]
    found = [replace(operation(answer)(larger), how=how) for how, answer in ways]
    return sorted(found, key=lambda route: bool(route.why_not))
