"""The notation for the axes of a tensor: names in storage order, and an arrow in the direction of the data flow.

    embed -> mlp                    a kernel (embed, mlp) that reads embed and writes mlp
    embed layers -> heads kv        a scanned one: `layers` counts copies of the kernel and is on neither side
    heads <- relpos_buckets         stored output first
    -> embed                        a norm's scale: written onto embed, reads nothing

From the arrow follow the fusion rule (transforms/grow.py), the blocks that noise fills, and the optimizer's slots. A
pattern for paths names the tensors that a row of a family's table is about:

    {encoder,decoder}/layers_#/mlp/wo/kernel        braces list alternatives, # stands for a number
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import lru_cache


# Axes that count copies of a tensor instead of being part of its computation.
STACKED = frozenset({"layers"})

_AXIS = re.compile(r"[a-z][a-z0-9_]*")
_TOKEN = re.compile(r"->|<-|\S+")


class PatternError(ValueError):
    """A pattern that cannot be parsed; the message shows it with a caret under the offending place."""

    def __init__(self, pattern: str, at: int, what: str) -> None:
        super().__init__(f"{what}\n  {pattern}\n  {' ' * at}^")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The axes of a tensor in storage order, and those that its values are read from and written to."""

    axes: tuple[str, ...]
    inputs: frozenset[str]
    outputs: frozenset[str]

    @property
    def stacked_axis(self) -> int | None:
        """The position of the axis that counts copies of the tensor, or None."""
        return next((i for i, axis in enumerate(self.axes) if axis in STACKED), None)


@lru_cache(maxsize=1024)
def parse_axes(text: str) -> TensorSpec:
    """The TensorSpec of a line such as `embed layers -> mlp`.

    >>> parse_axes("heads <- relpos_buckets")
    TensorSpec(axes=('heads', 'relpos_buckets'), inputs=frozenset({'relpos_buckets'}), outputs=frozenset({'heads'}))

    Raises PatternError, with a caret, for a missing or second arrow, a repeated or malformed axis.
    """
    left: list[str] = []
    right: list[str] = []
    arrow = ""
    for token in _TOKEN.finditer(text):
        word, at = token.group(), token.start()
        if word in {"->", "<-"}:
            if arrow:
                raise PatternError(text, at, "a second arrow: one says which way the data flows")
            arrow = word
        elif not _AXIS.fullmatch(word):
            raise PatternError(text, at, f"{word!r} is no axis name: lower case letters, digits and _ only")
        elif word in left or word in right:
            raise PatternError(text, at, f"axis {word!r} stands twice")
        else:
            (right if arrow else left).append(word)
    if not arrow:
        raise PatternError(text, len(text), "no arrow: write `inputs -> outputs` or `outputs <- inputs`")
    inputs, outputs = (left, right) if arrow == "->" else (right, left)
    return TensorSpec((*left, *right), frozenset(inputs) - STACKED, frozenset(outputs) - STACKED)


def expand(pattern: str) -> tuple[str, ...]:
    """The pattern's alternatives without braces; `#` stays.

    >>> expand("mlp/wi_{0,1}/kernel")
    ('mlp/wi_0/kernel', 'mlp/wi_1/kernel')
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    stray = next((i for i in range(0, len(parts), 2) if set("{}") & set(parts[i])), None)
    if stray is not None:
        at = next(i for i, c in enumerate(pattern) if c in "{}")
        raise PatternError(pattern, at, "a brace without its partner")
    choices = [[part] if i % 2 == 0 else part.split(",") for i, part in enumerate(parts)]
    return tuple("".join(choice) for choice in itertools.product(*choices))


@lru_cache(maxsize=4096)
def compiled(alternative: str) -> re.Pattern[str]:
    """The regular expression of a brace-free pattern; its one group, if any, is the number at `#`."""
    return re.compile(re.escape(alternative).replace(r"\#", "(0|[1-9][0-9]*)"))
