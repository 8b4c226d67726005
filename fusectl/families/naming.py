"""Where trainers keep a model's parameters in their trees, and what stands among them that is none.

    target/decoder/…/kernel                 T5X
    params/params/decoder/…/kernel          MaxText's training states; params/… Flax's
    [base/]decoder/…/kernel/value           MaxText's post-training: a state of NNX as Tunix's checkpoint manager saves
                                            it (tunix/sft/checkpoint_manager.py), `base` under reinforcement learning
    decoder/…/kernel                        a bare tree

NNX keeps streams of random numbers among a module's parameters: decoder/layers/mlp/dropout/rngs/params/key. MaxText's
training states have them, and whatever else of a module is no parameter, below nnx_aux/.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


_VALUE = "/value"
_BASE = "base/"
_STREAM = re.compile(r"(?:.+/)?rngs/.+")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Naming:
    """What stands before and behind a parameter's name in the names of a tree."""

    prefix: str = ""
    suffix: str = ""

    def full(self, parameter: str) -> str:
        """The full name of a parameter.

        >>> Naming("base/", "/value").full("decoder/decoder_norm/scale")
        'base/decoder/decoder_norm/scale/value'
        """
        return self.prefix + parameter + self.suffix

    def bare(self, name: str) -> str:
        """A full name without what stands around the parameter's; what is not named so as it is."""
        inside = name.startswith(self.prefix) and name.endswith(self.suffix)
        return name.removeprefix(self.prefix).removesuffix(self.suffix) if inside else name

    def parameters(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """The shapes of all that may be parameters, by their bare names: streams of random numbers are none."""
        return {
            self.bare(name): shape
            for name, shape in shapes.items()
            if name.startswith(self.prefix) and name.endswith(self.suffix) and not is_stream(name)
        }


T5X = Naming("target/")
MAXTEXT = Naming("params/params/")
_PREFIXED = (T5X, MAXTEXT, Naming("params/"))


def namings_of(names: Iterable[str]) -> tuple[Naming, ...]:
    """The ways in which a tree may name its parameters, the likeliest first: at least one.

    A tree with `target/` is T5X's: its optimizer state must not be mistaken for parameters.

    >>> namings_of(["target/decoder/kernel"])
    (Naming(prefix='target/', suffix=''),)
    """
    every = list(names)
    prefixed = next((each for each in _PREFIXED if any(name.startswith(each.prefix) for name in every)), None)
    if prefixed is not None:
        return (prefixed,)
    if every and all(name.endswith(_VALUE) for name in every):
        of_base = any(name.startswith(_BASE) for name in every)
        # A table of one's own may have that in its patterns.
        return Naming(_BASE if of_base else "", _VALUE), Naming()
    return (Naming(),)


def is_stream(name: str) -> bool:
    """Whether a tensor is part of a stream of random numbers: its key, or how many were drawn.

    >>> is_stream("nnx_aux/model/decoder/rngs/aqt/count"), is_stream("nnx_aux/model/decoder/layers/gate/bias")
    (True, False)
    """
    return _STREAM.fullmatch(name) is not None
