"""The notation for the axes of a tensor: names in storage order, and an arrow in the direction of the data flow.

    embed -> mlp                    a kernel (embed, mlp) that reads embed and writes mlp
    embed layers -> heads kv        a scanned one: `layers` counts copies of the kernel and is on neither side
    heads <- relpos_buckets         stored output first
    heads <- embed -> kv            or between outputs
    -> embed                        a norm's scale: written onto embed, reads nothing

From the arrow follow the fusion rule (rules/fusion.py), the blocks that noise fills, and the optimizer's slots. A
pattern for paths names the tensors that a row of a family's table is about:

    {encoder,decoder}/layers_#/mlp/wo/kernel        braces list alternatives, # stands for a number
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from functools import lru_cache


# Axes that count copies of a tensor instead of being part of its computation: the layers that are scanned over, and
# projections that are kept in one tensor, such as those of keys and values.
STACKED = ("layers", "stack")
# What a pattern with braces may stand for.
MOST_ALTERNATIVES = 100

_AXIS = re.compile(r"[a-z][a-z0-9_]*")
_TOKEN = re.compile(r"->|<-|\S+")
_BRACES = re.compile(r"\{([^{}]*)\}")


class PatternError(ValueError):
    """A pattern that cannot be parsed; the message shows it with a caret under the offending place."""

    def __init__(self, pattern: str, at: int, what: str) -> None:
        super().__init__(f"{what}\n  {pattern}\n  {' ' * at}^")
        self.at = at
        self.what = what


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The axes of a tensor in storage order, and those that its values are read from and written to."""

    axes: tuple[str, ...]
    inputs: frozenset[str]
    outputs: frozenset[str]

    @property
    def stacked_axis(self) -> int | None:
        """The position of the axis that counts layers, or None: each of them is a tensor of its own elsewhere."""
        return self.axes.index("layers") if "layers" in self.axes else None


@lru_cache(maxsize=1024)
def parse_axes(text: str) -> TensorSpec:
    """The TensorSpec of a line such as `embed layers -> mlp`.

    >>> parse_axes("heads <- relpos_buckets")
    TensorSpec(axes=('heads', 'relpos_buckets'), inputs=frozenset({'relpos_buckets'}), outputs=frozenset({'heads'}))

    Raises PatternError, with a caret, for missing or too many arrows, a repeated or malformed axis.
    """
    # Between the arrows.
    parts: list[list[str]] = [[]]
    arrows: list[str] = []
    for token in _TOKEN.finditer(text):
        word, at = token.group(), token.start()
        if word in {"->", "<-"}:
            # Two arrows are for outputs on both sides of the inputs: the gemma package stores queries as (heads, embed,
            # kv).
            if arrows and (*arrows, word) != ("<-", "->"):
                raise PatternError(text, at, "a second arrow: the data flows from inputs to outputs, or `<- inputs ->`")
            arrows.append(word)
            parts.append([])
        elif not _AXIS.fullmatch(word):
            raise PatternError(text, at, f"{word!r} is no axis name: lower case letters, digits and _ only")
        elif any(word in part for part in parts):
            raise PatternError(text, at, f"axis {word!r} stands twice")
        else:
            parts[-1].append(word)
    if not arrows:
        raise PatternError(text, len(text), "no arrow: write `inputs -> outputs` or `outputs <- inputs`")
    inputs = parts[1] if arrows[0] == "<-" else parts[0]
    outputs = [axis for part in parts if part is not inputs for axis in part]
    axes = tuple(axis for part in parts for axis in part)
    return TensorSpec(axes, frozenset(inputs) - set(STACKED), frozenset(outputs) - set(STACKED))


def expand(pattern: str) -> tuple[str, ...]:
    """The pattern's alternatives without braces; `#` stays.

    >>> expand("mlp/wi_{0,1}/kernel")
    ('mlp/wi_0/kernel', 'mlp/wi_1/kernel')

    Raises PatternError, with a caret, for a brace without its partner, too many alternatives, and a second number in
    one of them.
    """
    stray = re.search(r"[{}]", _BRACES.sub(lambda pair: "_" * len(pair.group()), pattern))
    if stray is not None:
        raise PatternError(pattern, stray.start(), "a brace without its partner")
    choices = [[part] if i % 2 == 0 else part.split(",") for i, part in enumerate(_BRACES.split(pattern))]
    if math.prod(map(len, choices)) > MOST_ALTERNATIVES:
        raise PatternError(pattern, pattern.index("{"), f"braces that stand for more than {MOST_ALTERNATIVES} names")
    alternatives = tuple("".join(choice) for choice in itertools.product(*choices))
    if any(alternative.count("#") > 1 for alternative in alternatives):
        raise PatternError(pattern, pattern.rindex("#"), "a second #: a name has one number of a layer")
    return alternatives


@lru_cache(maxsize=4096)
def compiled(alternative: str) -> re.Pattern[str]:
    """The regular expression of a brace-free pattern; its one group, if any, is the number at `#`."""
    # The number has no leading zeros, which would make layers_01 a second name of layer 1.
    return re.compile(re.escape(alternative).replace(r"\#", "(0|[1-9][0-9]*)"))
