"""Learning a growth operator: the small model's weights are frozen, the operator's matrices are trained."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fusectl.errors import UsageError
from fusectl.families.recognized import Recognized
from fusectl.families.table import ENCODER
from fusectl.formats.tree import Checkpoint
from fusectl.networks.examples import Examples, full_target_length, read_examples
from fusectl.networks.tokens import Tokens
from fusectl.networks.training import batch_of, loss_of, mean_loss, random_parameters
from fusectl.operations.learning.network import grow
from fusectl.rules.linear import Growing
from fusectl.sources.lesson import Data, Learning
from fusectl.sources.opened import read_finite
from fusectl.sources.operator import Operator, initial


Array = Any

# Steps between two lines of progress.
TOLD_EVERY = 10
# What losses on held-out data are of.
SMALL, LEARNED, DUPLICATE, RANDOM = "small model", "operator", "duplicate start", "random start"


def examples_of(data: Data, tree: Recognized, seed: int) -> Examples:
    """What to learn from: span corruption for an encoder-decoder, the next token for a decoder."""
    if ENCODER not in tree.depths:
        lengths = (1, data.target_length or data.length)
    else:
        lengths = (data.length, data.target_length or full_target_length(data.length))
    return read_examples(
        data.path,
        vocab=tree.sizes["vocab"],
        objective="span_corruption" if ENCODER in tree.depths else "next_token",
        batch=data.batch,
        lengths=lengths,
        seed=seed,
        sentinel=data.sentinel,
    )


def _transformation(how: Learning) -> optax.GradientTransformation:
    """The optimizer; raises UsageError for a name that optax has none of, and for one that wants more than a rate and
    gradients.
    """
    made, hint = getattr(optax, how.optimizer, None), "adam, adamw, sgd, lion, …"
    if not callable(made) or "learning_rate" not in inspect.signature(made).parameters:
        raise UsageError(f"--learner {how.optimizer}: optax has no such optimizer", hint=hint)
    try:
        found: optax.GradientTransformation = made(learning_rate=how.learning_rate)
        probe = {"matrix": jnp.zeros((1, 1))}
        found.update(probe, found.init(probe), probe)
    except Exception as error:
        says = f"--learner {how.optimizer}: it wants more than a learning rate and gradients"
        raise UsageError(says, details=(f"{type(error).__name__}: {error}",), hint=hint) from error
    return found


@dataclass(frozen=True)
class Learned:
    """The operator after learning, and the losses on held-out data, in nats for a token, by what they are of.

    `stopped` says why learning ended before its last step.
    """

    operator: Operator
    held_out: Mapping[str, float]
    stopped: str | None = None


def learn(
    growing: Growing,
    checkpoint: Checkpoint,
    start: Operator,
    examples: Examples,
    how: Learning,
    note: Callable[[str], None],
) -> Learned:
    """Trains an operator's matrices on examples; `note` is told of the loss now and then.

    Selections of heads for the tables of relative positions stay as they are. Where a loss or a gradient is no number
    it ends, with the last operator whose loss was one.
    """
    small = read_parameters(checkpoint, growing.tree)
    learned = {name: jnp.asarray(each, jnp.float32) for name, each in start.arrays.items()}
    fixed = {name: learned.pop(name) for name in start.arrays if name.endswith("/relpos")}
    if not learned:
        raise UsageError("nothing to learn: the model grows by heads alone", hint="fusectl grow, or larger sizes")
    optimizer = _transformation(how)
    state = optimizer.init(learned)

    # The small model's weights are an argument and no closure: JAX would compile what a closure holds into the program,
    # as constants, and fold what can be computed of them.
    def of_matrices(matrices: Mapping[str, Array], frozen: Mapping[str, Array], batch: Mapping[str, Array]) -> Array:
        parameters = grow(growing, frozen, {**fixed, **matrices})
        return loss_of(growing.grown, parameters, batch)

    def update(matrices: Any, moments: Any, frozen: Any, batch: Any) -> Any:
        value, gradient = jax.value_and_grad(of_matrices)(matrices, frozen, batch)
        updates, moments = optimizer.update(gradient, moments, matrices)
        norm = jnp.sqrt(sum(jnp.sum(each**2) for each in gradient.values()))
        return value, norm, optax.apply_updates(matrices, updates), moments

    step = jax.jit(update)
    # `good` has led to a loss that is a number; the one behind it is not known yet.
    losses: list[float] = []
    batches = examples.batches()
    good, stopped = learned, None
    for i in range(how.steps):
        value, norm, after, state = step(learned, state, small, batch_of(next(batches)))
        # A gradient may overflow while the loss that it belongs to is still a number.
        if not (math.isfinite(value) and math.isfinite(norm)):
            stopped = f"step {i}: the loss is {float(value):g}, its gradient's norm {float(norm):g}"
            break
        losses.append(float(value))
        good, learned = learned, after
        if i % TOLD_EVERY == 0 or i == how.steps - 1:
            note(f"step {i}: loss {float(value):.4f}")
    found = _with(start, {**fixed, **learned}, losses)
    held = None if stopped else held_out_losses(growing, small, found, examples.held_out)
    if held is not None and not math.isfinite(held[LEARNED]):
        stopped = f"step {how.steps}: the loss on held-out data is {held[LEARNED]:g}"
    if stopped is not None:
        found = _with(start, {**fixed, **good}, losses[:-1])
        held = held_out_losses(growing, small, found, examples.held_out)
    assert held is not None
    about = {"data": examples.says, "optimizer": how.optimizer, "learning_rate": how.learning_rate, "held_out": held}
    return Learned(replace(found, about=about), held, stopped)


def _with(start: Operator, matrices: Mapping[str, Array], losses: Sequence[float]) -> Operator:
    arrays = {name: np.asarray(each) for name, each in matrices.items()}
    return replace(start, arrays=arrays, learned=len(losses), losses=tuple(losses))


def held_out_losses(
    growing: Growing, small: Mapping[str, Array], operator: Operator, batches: Sequence[Tokens]
) -> dict[str, float]:
    """The mean losses on batches, in nats for a token: of the small model, of what the operator makes of it, of what
    the start `duplicate` with `pinv` would, and of a random start of the grown size.
    """
    tree, grown = growing.tree, growing.grown
    # The start that keeps the function is the one to beat, since it needs no data: what ends above the small model's
    # own loss was not worth learning.
    lossless = initial(replace(growing, tie="pinv"), "duplicate", 0)
    makers: dict[str, tuple[Recognized, Callable[[], Mapping[str, Array]]]] = {
        SMALL: (tree, lambda: small),
        LEARNED: (grown, lambda: _grown(growing, small, operator)),
        DUPLICATE: (grown, lambda: _grown(replace(growing, tie="pinv"), small, lossless)),
        RANDOM: (grown, lambda: random_parameters(grown, operator.seed)),
    }
    found = {}
    for name, (own, made) in makers.items():
        found[name] = mean_loss(jax.jit(partial(loss_of, own)), made(), batches)
    return found


def _grown(growing: Growing, small: Mapping[str, Array], operator: Operator) -> Mapping[str, Array]:
    matrices = {name: jnp.asarray(each, jnp.float32) for name, each in operator.arrays.items()}
    made: Mapping[str, Array] = jax.jit(partial(grow, growing))(small, matrices)
    return made


def read_parameters(checkpoint: Checkpoint, tree: Recognized) -> dict[str, Array]:
    """The parameters of a checkpoint in float32, by their names in the family's table.

    Raises Corrupt for a NaN or Inf: no loss of it would be a number.
    """
    return {name: jnp.asarray(read_finite(checkpoint, tree.full(name)), jnp.float32) for name in tree.shapes}
