"""A small trainer on the twins: what experiments with growth need of one.

T5's recipe: Adafactor with the rate relative to a parameter's own size, which falls by the root of the step after a
warm-up and has no end, so that a shorter training is the beginning of a longer one. States are those that T5X keeps,
by its names and shapes. Parameters are float32; batches lie over all devices that there are.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from fusectl.families.recognized import Recognized
from fusectl.families.table import EMBEDDING
from fusectl.networks.run import twin_of
from fusectl.networks.tokens import Tokens
from fusectl.optimizer.adafactor import FACTORED_FROM
from fusectl.optimizer.state import STATE, UNUSED


Array = Any
Parameters = Mapping[str, Array]
_BATCH = ("encoder", "decoder", "targets", "encoder_segments", "target_segments")
_STEP = "state/step"


@dataclass(frozen=True)
class Recipe:
    """How fast a model is trained: the rate is `base` / sqrt(max(step + offset, warmup)).

    T5X's `rsqrt_decay`, whose `step_offset` counts the other way (t5x/utils.py, create_learning_rate_scheduler). A
    negative offset keeps the largest rate for longer, a positive one begins with a smaller rate.
    """

    base: float = 1.0
    warmup: int = 10_000
    offset: int = 0

    def rate(self, step: int) -> float:
        """The learning rate at a step, relative to the root mean square of each parameter."""
        return self.base / math.sqrt(max(step + self.offset, self.warmup))


class State(NamedTuple):
    """A model in training: parameters by their names in the family's table, Adafactor's moments, the steps made."""

    parameters: Parameters
    moments: Any
    step: int


class Measured(NamedTuple):
    """What a model makes of held-out data: nats for a token, and the share of targets that it finds."""

    loss: float
    accuracy: float


class Trainer:
    """Trains models of one tree, with norms over these groups of its width; compiled once for each shape of batches."""

    def __init__(self, tree: Recognized, norm_groups: Sequence[int] = (), dtype: str = "float32") -> None:
        self.tree = tree
        self._scores = partial(scores, tree, norm_groups=tuple(norm_groups), dtype=dtype)
        self._optimizer = optax.chain(
            # T5X's defaults: t5x/adafactor.py, and t5x/examples/t5/t5_1_1/base.gin. The rate is multiplied last.
            optax.scale_by_factored_rms(min_dim_size_to_factor=FACTORED_FROM),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
            optax.scale(-1.0),
        )
        self._measure = jax.jit(self._scores)
        self._update = jax.jit(self._one_step, donate_argnums=(0, 1))
        self._steps: dict[Any, Any] = {}
        self._compiling = threading.Lock()
        devices = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
        self._rows = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("data"))
        self._everywhere = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec())

    def begin(self, parameters: Parameters, step: int = 0) -> State:
        """A state without moments."""
        placed = self._place(parameters)
        return State(placed, self._optimizer.init(placed), step)

    def train(
        self,
        state: State,
        batches: Iterator[Tokens],
        recipe: Recipe,
        steps: int,
        note: Callable[[int, State], None] = lambda *_: None,
    ) -> State:
        """The state after so many steps more, on these batches; `note` is told of each step made and its state."""
        parameters, moments, step = state
        for batch in (self._split(next(batches)) for _ in range(steps)):
            rate = np.float32(recipe.rate(step))
            parameters, moments = self._compiled(parameters, moments, batch, rate)(parameters, moments, batch, rate)
            step += 1
            note(step, State(parameters, moments, step))
        return State(parameters, moments, step)

    def measure(self, parameters: Parameters, batches: Sequence[Tokens]) -> Measured:
        """The mean over batches; a loss that is no number, of a training that has diverged, is infinite."""
        found = [self._measure(parameters, self._split(batch)) for batch in batches]
        loss, accuracy = (float(np.mean([each[i] for each in found])) for i in range(2))
        # When rates are compared, an infinite loss sorts after every other one; a NaN would stay wherever it was found.
        return Measured(loss if math.isfinite(loss) else math.inf, accuracy)

    def flops_per_step(self, state: State, batch: Tokens) -> float:
        """Floating point operations of a step, forwards, backwards and the update, as XLA counts them."""
        compiled = self._compiled(state.parameters, state.moments, self._split(batch), np.float32(0.0))
        return float(compiled.cost_analysis()["flops"])

    def stored(self, state: State) -> dict[str, npt.NDArray[Any]]:
        """The state as T5X keeps it, by full names."""
        factored = state.moments[0]
        found = {self.tree.full(name): np.asarray(each) for name, each in state.parameters.items()}
        for name in state.parameters:
            slots = {"m": np.zeros(UNUSED, np.float32)}
            slots |= {slot: np.asarray(getattr(factored, slot)[name]) for slot in ("v", "v_row", "v_col")}
            found |= {f"{STATE}{name}/{slot}": values for slot, values in slots.items()}
        found[_STEP] = np.array(state.step, np.int32)
        return found

    def restored(self, read: Callable[[str], npt.NDArray[Any]], names: Mapping[str, Any]) -> State:
        """The state of a checkpoint that has tensors of these names; without moments where it has none."""
        step = int(read(_STEP)) if _STEP in names else 0
        state = self.begin({name: read(self.tree.full(name)) for name in self.tree.shapes}, step)
        if not any(name.startswith(STATE) for name in names):
            return state
        factored = state.moments[0]._replace(
            # Adafactor weighs its moments with 1 - t**-0.8: at a count of 0 the first update would forget all that were
            # restored.
            count=self._place(np.array(step, np.int32)),
            **{
                slot: self._place({name: read(f"{STATE}{name}/{slot}") for name in self.tree.shapes})
                for slot in ("v", "v_row", "v_col")
            },
        )
        return state._replace(moments=(factored, *state.moments[1:]))

    def _compiled(self, parameters: Parameters, moments: Any, batch: Mapping[str, Array], rate: Any) -> Any:
        """The step for batches of this shape, compiled the first time."""
        shapes = tuple((name, each.shape) for name, each in batch.items() if each is not None)
        with self._compiling:
            if shapes not in self._steps:
                self._steps[shapes] = self._update.lower(parameters, moments, batch, rate).compile()
            return self._steps[shapes]

    def _one_step(self, parameters: Parameters, moments: Any, batch: Mapping[str, Array], rate: Array) -> Any:
        def of_parameters(values: Parameters) -> Array:
            return self._scores(values, batch)[0]

        gradient = jax.grad(of_parameters)(parameters)
        updates, moments = self._optimizer.update(gradient, moments, parameters)
        scaled = jax.tree.map(lambda each: rate * each, updates)
        return optax.apply_updates(parameters, scaled), moments

    def _place(self, values: Any) -> Any:
        # Copies: steps take over what they are given.
        return jax.device_put(jax.tree.map(partial(jnp.array, dtype=None), values), self._everywhere)

    def _split(self, batch: Tokens) -> dict[str, Array]:
        placed: dict[str, Array] = jax.device_put(batch_of(batch), self._rows)
        return placed


def scores(
    tree: Recognized,
    parameters: Parameters,
    batch: Mapping[str, Array],
    *,
    norm_groups: tuple[int, ...] = (),
    dtype: str = "float32",
) -> tuple[Array, Array]:
    """The cross-entropy of a batch in nats for a token, without dropout, and the share of targets that are found.

    Both over the targets that are no padding; norms are over groups of the width, over all of it by default.
    """
    twin = twin_of(tree)
    config = twin.config_of(tree, norm_groups or (tree.sizes["embed"],), dtype)
    targets = batch["targets"]
    logits = twin.logits(config, tree, parameters, Tokens(**batch))
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    wanted = targets > 0
    log = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    found = jnp.argmax(logits, axis=-1) == targets
    count = jnp.sum(wanted)
    return -jnp.sum(jnp.where(wanted, log, 0.0)) / count, jnp.sum(wanted & found) / count


def loss_of(
    tree: Recognized,
    parameters: Parameters,
    batch: Mapping[str, Array],
    *,
    norm_groups: tuple[int, ...] = (),
    dtype: str = "float32",
) -> Array:
    """The cross-entropy of a batch, as in `scores`."""
    return scores(tree, parameters, batch, norm_groups=norm_groups, dtype=dtype)[0]


def batch_of(tokens: Tokens) -> dict[str, Array]:
    """What a step is given of a batch: arrays only, so that JAX compiles it once."""
    return {name: getattr(tokens, name) for name in _BATCH}


def mean_loss(measured: Callable[..., Array], parameters: Parameters, batches: Sequence[Tokens]) -> float:
    """The mean over batches of a loss that is compiled."""
    return float(np.mean([float(measured(parameters, batch_of(batch))) for batch in batches]))


def random_parameters(tree: Recognized, seed: int) -> dict[str, Array]:
    """A random start as trainers draw it: kernels by their fan-in, norms at 1, embedded tokens of deviation 1.

    T5 draws queries smaller by the root of head_dim, since it does not divide by that (t5x/examples/t5/layers.py).
    """
    rng, found = np.random.default_rng(seed), {}
    for name, row in tree.rows.items():
        shape, axes = tree.shapes[name], row.spec.axes
        reads = math.prod(n for axis, n in zip(axes, shape, strict=True) if axis in row.spec.inputs)
        deviation = 1.0 if row.roles[0] == EMBEDDING else reads**-0.5
        if tree.head_dim and tree.family.scales_queries_at_first and row.roles[0].endswith("query"):
            deviation *= tree.head_dim**-0.5
        values = rng.normal(0.0, deviation, shape)
        if row.is_norm:
            values = np.full(shape, 0.0 if tree.network.norm_adds_one else 1.0)
        elif not row.spec.inputs:
            values = np.zeros(shape)
        found[name] = jnp.asarray(values, jnp.float32)
    return found
