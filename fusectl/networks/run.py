"""Several models through their networks side by side, a stage at a time: no more than a stage of each is in memory.

    for every stage:  read its parameters from every checkpoint  →  for every batch, for every model: run it

The stages come from the family's twin: all layers at once where they fit, else one layer after the other.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from fusectl.errors import NotEnoughSpace
from fusectl.families.recognized import Recognized
from fusectl.formats.tree import Checkpoint
from fusectl.layout.blocks import whole
from fusectl.networks.stages import Part, Stage, State, Step, Tap, Twin
from fusectl.networks.tokens import Tokens
from fusectl.sources.opened import Opened
from fusectl.system.memory import available_bytes
from fusectl.system.threads import Progress


Array = npt.NDArray[Any]
Weights = tuple[Checkpoint, Recognized]

# What an element of a parameter takes while it is worked on: undoing its rounding holds it and its source in float64,
# and masks; XLA widens it to float64 while it multiplies, and another one at the same time.
WORKED_ON_BYTES = 6 * 8
# The share of the budget that the activations of one batch may take.
ACTIVATIONS_SHARE = 4
# The largest part of the output head that is worked on at once.
HEAD_BYTES = 128 << 20


@dataclass(frozen=True)
class Model:
    """A network to run: its config, and where its parameters come from. `tapped` if anybody looks at its modules."""

    name: str
    config: Any
    values: Callable[[Part], Array]
    tapped: bool = True


@dataclass(frozen=True)
class Outcome:
    """What one stage made of one batch, by the models' names; logits are those of a part of the vocab, or absent."""

    stage: Stage
    tokens: Tokens
    taps: Mapping[str, list[Tap]]
    logits: Mapping[str, Array]


@dataclass(frozen=True)
class Passes:
    """How forward passes fit into a budget of memory: the stages, the batches, and about what they take."""

    stages: list[Stage]
    batches: list[Tokens]
    layered: bool
    needed_bytes: int


class Shelf:
    """The parts of parameters that the current stage needs, each read once, whoever asks for it."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._parts: dict[tuple[int, Part], Array] = {}
        self._readers: dict[int, Callable[[Part], Array]] = {}

    def fetch(self, checkpoints: Sequence[Weights], parts: Sequence[Part]) -> None:
        """Reads these parts of these checkpoints, on all cores; what was on the shelf before goes."""
        self._parts.clear()
        wanted = [(checkpoint, tree, part) for checkpoint, tree in checkpoints for part in parts]
        with ThreadPoolExecutor(self._jobs, thread_name_prefix="fusectl") as pool:
            for (checkpoint, _, part), values in zip(wanted, pool.map(lambda w: read_part(*w), wanted), strict=True):
                self._parts[id(checkpoint), part] = values

    def of(self, checkpoint: Checkpoint) -> Callable[[Part], Array]:
        """The values of a checkpoint as they are stored: the same function whenever it is asked for."""
        # Each checkpoint has one function: run_stages converts the parameters once for all models that share it.
        return self._readers.setdefault(id(checkpoint), lambda part: self._parts[id(checkpoint), part])

    def clear(self) -> None:
        """Empties it."""
        self._parts.clear()


def twin_of(tree: Recognized) -> Twin:
    """The module that runs a family's networks; raises Incompatible where there is none."""
    return cast("Twin", importlib.import_module(tree.family.require_twin()))


def read_part(checkpoint: Checkpoint, tree: Recognized, part: Part) -> Array:
    """The values of a part of a parameter, in the stored dtype; rows that are picked are gathered chunk by chunk.

    A chunk that holds more than the part is decoded whole: stacked layers, one by one, as often as there are layers.
    """
    leaf = checkpoint.leaves[tree.full(part.name)]
    region = list(whole(leaf.shape))
    if part.axis is None:
        return checkpoint.read(leaf.name, tuple(region))
    axis = tree.rows[part.name].spec.axes.index(part.axis)
    if isinstance(part.at, range):
        region[axis] = part.at
        return checkpoint.read(leaf.name, tuple(region))
    # A batch needs a few rows of an embedding that may be a large part of the model: chunk by chunk, the table is never
    # there whole.
    picked, edge = np.array(part.at), leaf.chunks[axis]
    pieces = []
    for start in np.unique(picked // edge) * edge:
        region[axis] = range(int(start), min(int(start) + edge, leaf.shape[axis]))
        inside = picked[(picked >= start) & (picked < start + edge)] - start
        pieces.append(checkpoint.read(leaf.name, tuple(region)).take(inside, axis=axis))
    return np.concatenate(pieces, axis=axis)


def run_stages(
    passes: Passes,
    models: Sequence[Model],
    checkpoints: Sequence[Weights],
    shelf: Shelf,
    precision: str,
    progress: Progress,
) -> Iterator[Outcome]:
    """Runs every model through every stage; an Outcome for each stage and batch, in order. Needs jax.enable_x64."""
    states: list[dict[str, State]] = [{model.name: {} for model in models} for _ in passes.batches]
    total = {stage.name: _stored_bytes(stage, checkpoints) for stage in passes.stages}
    progress.start("running models", sum(total.values()))
    for stage in passes.stages:
        shelf.fetch(checkpoints, stage.parts)
        parameters = {
            # Models that run the same values share them.
            values: {part.name: jnp.asarray(np.asarray(values(part), precision)) for part in stage.parts}
            for values in {model.values: None for model in models}
        }
        # The stored values go as soon as the converted ones are there, so that a stage is not in memory twice while it
        # runs.
        shelf.clear()
        for tokens, state in zip(passes.batches, states, strict=True):
            taps: dict[str, list[Tap]] = {}
            logits: dict[str, Array] = {}
            for model in models:
                step = Step(model.config, parameters[model.values], tokens, state[model.name])
                state[model.name], found = stage.run(step)
                if model.tapped:
                    taps[model.name] = found
                if "logits" in state[model.name]:
                    logits[model.name] = np.asarray(state[model.name].pop("logits"), np.float64)
            yield Outcome(stage, tokens, taps, logits)
        progress.advance(stage.name, total[stage.name])


def plan_passes(
    widest: Weights,
    others: Sequence[Weights],
    tokens: Tokens,
    *,
    models: int,
    precision: str,
    budget_bytes: int | None,
    layered: bool | None,
) -> Passes:
    """The Passes of `models` models of one family: whole where that fits, unless `layered` says how.

    The budget is half of the free memory if it is None. Raises NotEnoughSpace when not even a layer fits into it.
    """
    budget = available_bytes() // 2 if budget_bytes is None else budget_bytes
    twin, checkpoints = twin_of(widest[1]), [widest, *others]
    need = _Need(widest, checkpoints, tokens, models, np.dtype(precision).itemsize)
    stages = twin.whole(widest[1])
    needed = need.bytes(stages, len(tokens.targets), layers=1 + sum(widest[1].depths.values()))
    if layered is False or (layered is None and needed <= budget):
        return _fitting(Passes(stages, [tokens], layered=False, needed_bytes=needed), budget)
    rows = max(1, min(len(tokens.targets), budget // ACTIVATIONS_SHARE // need.activations(1)))
    stages = twin.layered(widest[1], tokens, _head_tile(widest, budget, rows * tokens.targets.shape[1]))
    needed = need.bytes(stages, rows, layers=1)
    return _fitting(Passes(stages, list(tokens.pieces(rows)), layered=True, needed_bytes=needed), budget)


def _fitting(passes: Passes, budget_bytes: int) -> Passes:
    if passes.needed_bytes > budget_bytes:
        raise NotEnoughSpace(
            f"the forward passes hold {'one layer of ' if passes.layered else ''}all models in memory",
            details=(f"about {passes.needed_bytes:,} bytes needed, {budget_bytes:,} given",),
            hint="a larger --max-memory",
        )
    return passes


@dataclass(frozen=True)
class _Need:
    """About what forward passes take."""

    widest: Weights
    checkpoints: Sequence[Weights]
    tokens: Tokens
    models: int
    itemsize: int

    def bytes(self, stages: Sequence[Stage], rows: int, layers: int) -> int:
        """The memory of the largest stage, of the activations of so many rows and layers, and of all rows' states."""
        states = 3 * self.models * self.itemsize * self.tokens.targets.size * self.widest[1].sizes["embed"]
        return max(map(self._stage, stages)) + layers * self.activations(rows) + states + self._logits(rows, layers)

    def activations(self, rows: int) -> int:
        """What so many rows of tokens take on their way through a layer, kept for all models."""
        sizes = self.widest[1].sizes
        length: int = max(self.tokens.encoder.shape[1], self.tokens.targets.shape[1])
        joined = sizes.get("joined_kv", sizes["heads"] * sizes.get("kv", 1))
        kept = 12 * sizes["embed"] + 8 * joined + 4 * sizes["mlp"]
        per_token = self.models * self.itemsize * kept + 3 * 8 * sizes["heads"] * length
        return int(rows * length * per_token)

    def _stage(self, stage: Stage) -> int:
        # As they are stored; in the computation's dtype, the widest model's twice; and one that is worked on, in its
        # chunks.
        elements = [[_elements(tree, part) for part in stage.parts] for _, tree in self.checkpoints]
        converted = self.itemsize * (sum(map(sum, elements)) + sum(elements[0]))
        chunks = max(
            math.prod(leaf.chunks) * leaf.itemsize
            for checkpoint, tree in self.checkpoints
            for leaf in (checkpoint.leaves[tree.full(part.name)] for part in stage.parts)
        )
        return _stored_bytes(stage, self.checkpoints) + converted + WORKED_ON_BYTES * max(elements[0]) + 2 * chunks

    def _logits(self, rows: int, layers: int) -> int:
        if layers == 1:
            # Counted with the tile of the head.
            return 0
        return int(8 * (self.models + 4) * rows * self.tokens.targets.shape[1] * self.widest[1].sizes["vocab"])


def _stored_bytes(stage: Stage, checkpoints: Sequence[Weights]) -> int:
    return sum(
        _elements(tree, part) * checkpoint.leaves[tree.full(part.name)].itemsize
        for checkpoint, tree in checkpoints
        for part in stage.parts
    )


def _elements(tree: Recognized, part: Part) -> int:
    axes, shape = tree.rows[part.name].spec.axes, tree.shapes[part.name]
    return math.prod(len(part.at) if axis == part.axis else n for axis, n in zip(axes, shape, strict=True))


def head_of(tree: Recognized) -> str:
    """The parameter that logits come from: what writes the vocab, or the embedding, which a tied head reads again."""
    tables = [name for name, row in tree.rows.items() if "vocab" in row.spec.axes]
    return next((name for name in tables if "vocab" in tree.rows[name].spec.outputs), tables[0])


def _head_tile(widest: Weights, budget_bytes: int, positions: int) -> int:
    """How many tokens of the vocab the head is asked for at once: whole chunks of the widest model's table."""
    checkpoint, tree = widest
    head = head_of(tree)
    leaf = checkpoint.leaves[tree.full(head)]
    axis = tree.rows[head].spec.axes.index("vocab")
    vocab, chunk = leaf.shape[axis], min(leaf.chunks[axis], leaf.shape[axis])
    limit: int = min(HEAD_BYTES, budget_bytes // (4 * ACTIVATIONS_SHARE))
    # As many as the table's columns and the logits of all positions leave room for.
    room = int(max(1, min(limit // (4 * leaf.shape[1 - axis]), limit // (64 * positions))))
    return min(vocab, room // chunk * chunk if room >= chunk else room)


def positions(tap: Tap, tokens: Tokens) -> npt.NDArray[np.bool_] | None:
    """Which positions of a tap are no padding, (batch, length); None where all are.

    Rounding alone decides what stands at the others: their attention is masked whole.
    """
    if tap.positions == "encoder":
        return np.asarray(tokens.encoder > 0)
    return tokens.compared if tap.positions == "decoder" else None


def stream_rms(
    sources: Sequence[Opened], tokens: Tokens, *, jobs: int, budget_bytes: int | None, progress: Progress
) -> list[dict[str, float]]:
    """For each model, with its norm groups, the rms of the residual stream that reaches each of its norms."""
    weights: list[Weights] = [(source.checkpoint, source.tree) for source in sources]
    widest = max(weights, key=lambda each: each[1].parameters)
    others = [each for each in weights if each is not widest]
    passes = plan_passes(
        widest, others, tokens, models=len(sources), precision="float32", budget_bytes=budget_bytes, layered=None
    )
    shelf = Shelf(jobs)
    squares: list[dict[str, list[Array]]] = [{} for _ in sources]
    with jax.enable_x64(True):
        models = [
            Model(
                str(i),
                twin_of(s.tree).config_of(s.tree, s.norm_groups, "float32", accumulate="float64"),
                shelf.of(s.checkpoint),
            )
            for i, s in enumerate(sources)
        ]
        for outcome in run_stages(passes, models, weights, shelf, "float32", progress):
            for model, found in zip(models, squares, strict=True):
                for tap in outcome.taps[model.name]:
                    if tap.inputs is not None:
                        stream = np.asarray(tap.inputs, np.float64)[positions(tap, outcome.tokens)]
                        found.setdefault(tap.parameter, []).append(np.mean(stream**2, axis=-1).reshape(-1))
    return [{name: float(np.sqrt(np.mean(np.concatenate(each)))) for name, each in found.items()} for found in squares]
