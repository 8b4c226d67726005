"""What a family's twin offers to verify: its network as a list of stages, each of which needs a few parameters only.

    tokens ─▶ token_embedder ─▶ encoder/layers_0 ─▶ … ─▶ decoder/decoder_norm ─▶ a part of the head ─▶ logits

A network that fits into memory is one stage. Running a stage returns the state that the next one starts from, and a Tap
for every module with parameters of its own: what came out of it, in the order of computation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import flax.linen as nn
import jax

from fusectl.families.recognized import Recognized
from fusectl.families.table import Row
from fusectl.networks.tokens import Tokens


Array = Any
# Arrays by the names that the stages of one network agree on; `logits`, (batch, length, part of vocab), is the result.
State = dict[str, Array]


@dataclass(frozen=True)
class Part:
    """A parameter that a stage needs: all of it, or along `axis` what stands at the indices `at`, in rising order."""

    name: str
    axis: str | None = None
    at: range | tuple[int, ...] = ()


@dataclass(frozen=True)
class Tap:
    """What came out of the module that owns `parameter`, and what a norm was given.

    `positions` says which tokens of the batch the first two axes are about: those of the "encoder" or of the "decoder"
    without padding, the whole "batch", or "" for none.
    """

    # Layers numbered, though the checkpoint may stack them; `row` is the family's row for it.
    parameter: str
    inputs: Array | None
    outputs: Array
    positions: str = ""
    row: Row | None = None


jax.tree_util.register_dataclass(Tap, data_fields=("inputs", "outputs"), meta_fields=("parameter", "positions", "row"))


@dataclass(frozen=True)
class Step:
    """What a stage starts from: a network's config, the parameters of the stage's parts by their names in the family's
    table, the batch, and the state that the stage before has left.
    """

    config: Any
    parameters: Mapping[str, Array]
    tokens: Tokens
    state: State


@dataclass(frozen=True)
class Stage:
    """A part of a network: what it needs, and how to run it."""

    name: str
    parts: tuple[Part, ...]
    run: Callable[[Step], tuple[State, list[Tap]]]


class Twin(Protocol):
    """A module that runs the networks of a family."""

    def config_of(
        self,
        tree: Recognized,
        norm_groups: tuple[int, ...],
        dtype: Any,
        *,
        stream_scales: tuple[float, ...] = (),
        accumulate: Any = None,
    ) -> Any:
        """The network's config, with norms over these groups; sums are accumulated in the dtype `accumulate`.

        With `stream_scales`, what the residual stream of each group was multiplied with, norms of the stream add as
        much more before they divide: then they make the same of it. Logits are not capped.
        """

    def whole(self, tree: Recognized) -> list[Stage]:
        """The network as one stage."""

    def logits(self, config: Any, tree: Recognized, parameters: Mapping[str, Array], tokens: Tokens) -> Array:
        """The logits (batch, length, vocab), capped if the network caps them, as a function that JAX can trace.

        Parameters are by their names in the family's table, and may be tracers, like the batch.
        """

    def layered(self, tree: Recognized, tokens: Tokens, head_tile: int) -> list[Stage]:
        """The network layer by layer, the embedding of these tokens only, the head in tiles of the vocab."""


def tapped(network: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> tuple[Any, list[Tap]]:
    """What `network` returns for these variables and arguments, and the taps of its modules, named relative to it."""
    taps: list[Tap] = []

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        outputs = call(*args, **kwargs)
        if context.method_name == "__call__":
            for name, values in context.module.variables.get("params", {}).items():
                if not isinstance(values, Mapping):
                    parameter = "/".join((*context.module.path, name))
                    # Norms alone keep what they were given: it is the residual stream, which no module returns.
                    taps.append(Tap(parameter, args[0] if name == "scale" else None, outputs))
        return outputs

    with nn.intercept_methods(record):
        outputs = network.apply(variables, *args, **kwargs)
    return outputs, taps
