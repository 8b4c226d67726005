"""A small trainer on the twins: what experiments with growth need of one, on one machine.

Adam, a linear warm-up, a constant rate, and a linear decay over the last part: the same shape for every arm of a
comparison. Parameters are by their names in the family's table, in float32. Compute is what XLA counts of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fusectl.archs import Recognized
from fusectl.examples import Examples
from fusectl.forward import twin_of
from fusectl.tokens import Tokens


Array = Any
_BATCH = ("encoder", "decoder", "targets", "encoder_segments", "target_segments")
Parameters = Mapping[str, Array]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: its largest learning rate, the steps in all, those of warm-up, and the share of decay."""

    learning_rate: float
    steps: int
    warmup: int = 50
    decay: float = 0.4
    b2: float = 0.99

    def rate(self, step: Array) -> Array:
        """The learning rate at a step."""
        left = (self.steps - step) / max(1, round(self.decay * self.steps))
        return self.learning_rate * jnp.minimum(1.0, jnp.minimum((step + 1) / self.warmup, left))


@dataclass(frozen=True)
class Trained:
    """The parameters after training, and the losses on held-out data: pairs of a step and nats for a token."""

    parameters: Parameters
    curve: tuple[tuple[int, float], ...]
    # Of one step, forwards and backwards, floating point operations as XLA counts them.
    flops_per_step: float

    @property
    def final_loss(self) -> float:
        """The loss after the last step."""
        return self.curve[-1][1]


def train(
    tree: Recognized,
    parameters: Parameters,
    examples: Examples,
    recipe: Recipe,
    *,
    measure_every: int | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Trained:
    """Trains a model of a tree from these parameters; the loss on held-out data is measured now and then, and last.

    Raises FloatingPointError where a loss is no number.
    """
    optimizer = optax.adam(recipe.rate, b2=recipe.b2)
    # Copies: steps take over what they are given.
    now = {name: jnp.array(each, jnp.float32) for name, each in parameters.items()}
    state, batches = optimizer.init(now), examples.batches()

    def update(values: Parameters, moments: Any, batch: Mapping[str, Array]) -> Any:
        found, gradient = jax.value_and_grad(partial(loss_of, tree))(values, batch)
        updates, moments = optimizer.update(gradient, moments, values)
        return found, optax.apply_updates(values, updates), moments

    first = batch_of(next(examples.batches()))
    step = jax.jit(update, donate_argnums=(0, 1)).lower(now, state, first).compile()
    measured = jax.jit(partial(loss_of, tree))
    curve = [(0, mean_loss(measured, now, examples.held_out))]
    for i in range(recipe.steps):
        value, now, state = step(now, state, batch_of(next(batches)))
        last = i + 1 == recipe.steps
        if last or (measure_every is not None and (i + 1) % measure_every == 0):
            if not math.isfinite(value):
                raise FloatingPointError(f"step {i}: the loss is {float(value):g}")
            curve.append((i + 1, mean_loss(measured, now, examples.held_out)))
            note(f"step {i + 1}: {curve[-1][1]:.4f}")
    return Trained(now, tuple(curve), float(step.cost_analysis()["flops"]))


def loss(logits: Array, targets: Array) -> Array:
    """The cross-entropy in nats of a token, over the targets that are no padding; in float32 or wider."""
    wanted = targets > 0
    log = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    of_targets = jnp.take_along_axis(log, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(wanted, of_targets, 0.0)) / jnp.sum(wanted)


def batch_of(tokens: Tokens) -> dict[str, Array]:
    """What a step is given of a batch: arrays only, so that JAX compiles it once."""
    return {name: getattr(tokens, name) for name in _BATCH}


def loss_of(
    tree: Recognized,
    parameters: Parameters,
    batch: Mapping[str, Array],
    *,
    norm_groups: tuple[int, ...] = (),
    dtype: str = "float32",
) -> Array:
    """The cross-entropy of a batch, in nats for a token, without dropout; norms over these groups, or the whole width.

    Computed in `dtype`, float64 with jax.enable_x64.
    """
    twin = twin_of(tree)
    config = twin.config_of(tree, norm_groups or (tree.sizes["embed"],), dtype)
    return loss(twin.logits(config, tree, parameters, Tokens(**batch)), batch["targets"])


def mean_loss(measured: Callable[..., Array], parameters: Parameters, batches: Sequence[Tokens]) -> float:
    """The mean over batches of a loss that is compiled."""
    return float(np.mean([float(measured(parameters, batch_of(batch))) for batch in batches]))
