"""Several models through their network side by side, a stage at a time: no more than a stage of each is in memory.

    for every stage:  read its parameters from every checkpoint  →  for every model, for every batch: run it

The stages come from the family's twin: all layers at once where they fit, else one layer after the other.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from fusectl.archs import Recognized
from fusectl.archs.twin import Part, Stage, State, Step, Tap, Twin
from fusectl.formats.tree import Checkpoint
from fusectl.formats.zarr import np_dtype
from fusectl.layout import whole
from fusectl.memory import available_bytes
from fusectl.parallel import Progress
from fusectl.tokens import Tokens


Array = npt.NDArray[Any]

# What a parameter takes, per element, while it is worked on: undoing its rounding holds it and its source in float64, with
# masks; XLA widens it to float64 while it multiplies, and another one at the same time.
WORKED_ON_BYTES = 6 * 8
# The share of the budget that the activations of one batch may take.
ACTIVATIONS_SHARE = 4
# The largest part of the output head that is worked on at once.
HEAD_BYTES = 128 << 20


@dataclass(frozen=True)
class Model:
    """A network to run: its config, and where its parameters come from."""

    name: str
    config: Any
    values: Callable[[Part], Array]


@dataclass(frozen=True)
class Outcome:
    """What one stage made of one batch, by the models' names; logits are those of a part of the vocab, or absent."""

    stage: Stage
    batch: int
    taps: Mapping[str, list[Tap]]
    logits: Mapping[str, Array]


def twin_of(tree: Recognized) -> Twin:
    """The module that runs a family's networks."""
    assert tree.family.twin is not None
    return cast("Twin", importlib.import_module(tree.family.twin))


class Shelf:
    """The parts of parameters that the current stage needs, each read once, whoever asks for it."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._parts: dict[tuple[int, Part], Array] = {}

    def fetch(self, checkpoints: Sequence[tuple[Checkpoint, Recognized]], parts: Sequence[Part]) -> None:
        """Reads these parts of these checkpoints, on all cores; what was on the shelf before goes."""
        self._parts.clear()
        wanted = [(checkpoint, tree, part) for checkpoint, tree in checkpoints for part in parts]
        with ThreadPoolExecutor(self._jobs, thread_name_prefix="fusectl") as pool:
            for (checkpoint, _, part), values in zip(wanted, pool.map(lambda w: read_part(*w), wanted), strict=True):
                self._parts[id(checkpoint), part] = values

    def of(self, checkpoint: Checkpoint) -> Callable[[Part], Array]:
        """The values of a checkpoint as they are stored."""
        return lambda part: self._parts[id(checkpoint), part]

    def clear(self) -> None:
        self._parts.clear()


def read_part(checkpoint: Checkpoint, tree: Recognized, part: Part) -> Array:
    """The values of a part of a parameter, in the stored dtype; rows that are picked are gathered chunk by chunk."""
    name = tree.prefix + part.name
    region = list(whole(checkpoint.leaves[name].shape))
    if part.axis is None:
        return checkpoint.read(name, tuple(region))
    axis = tree.rows[part.name].spec.axes.index(part.axis)
    if isinstance(part.at, range):
        region[axis] = part.at
        return checkpoint.read(name, tuple(region))
    picked = np.array(part.at)
    edge = checkpoint.leaves[name].chunks[axis]
    pieces = []
    for start in np.unique(picked // edge) * edge:
        region[axis] = range(int(start), min(int(start) + edge, checkpoint.leaves[name].shape[axis]))
        inside = picked[(picked >= start) & (picked < start + edge)] - start
        pieces.append(checkpoint.read(name, tuple(region)).take(inside, axis=axis))
    return np.concatenate(pieces, axis=axis)


def run_stages(
    stages: Sequence[Stage],
    models: Sequence[Model],
    checkpoints: Sequence[tuple[Checkpoint, Recognized]],
    batches: Sequence[Tokens],
    shelf: Shelf,
    precision: str,
    progress: Progress,
) -> Iterator[Outcome]:
    """Runs every model through every stage; an Outcome for each stage and batch, in order."""
    states: dict[str, list[State]] = {model.name: [{} for _ in batches] for model in models}
    done = {stage.name: stage_bytes(stage, checkpoints) for stage in stages}
    progress.start("running models", sum(done.values()))
    for stage in stages:
        shelf.fetch(checkpoints, stage.parts)
        taps: list[dict[str, list[Tap]]] = [{} for _ in batches]
        logits: list[dict[str, Array]] = [{} for _ in batches]
        for model in models:
            parameters = {part.name: jnp.asarray(model.values(part), precision) for part in stage.parts}
            for i, tokens in enumerate(batches):
                state, taps[i][model.name] = stage.run(Step(model.config, parameters, tokens, states[model.name][i]))
                if "logits" in state:
                    logits[i][model.name] = np.asarray(state.pop("logits"), np.float64)
                states[model.name][i] = state
            del parameters
        for i in range(len(batches)):
            yield Outcome(stage, i, taps[i], logits[i])
        progress.advance(stage.name, done[stage.name])
    shelf.clear()


def stage_bytes(stage: Stage, checkpoints: Sequence[tuple[Checkpoint, Recognized]]) -> int:
    """The bytes that a stage's parameters take in these checkpoints, as they are stored."""
    return sum(
        _part_elements(tree, part) * np_dtype(checkpoint.leaves[tree.full(part.name)].dtype).itemsize
        for checkpoint, tree in checkpoints
        for part in stage.parts
    )


def default_budget_bytes() -> int:
    """Half of the memory that the machine has free."""
    return available_bytes() // 2


@dataclass(frozen=True)
class Passes:
    """How forward passes fit into a budget of memory: the stages, the batches, and the memory of the largest stage."""

    stages: list[Stage]
    batches: list[Tokens]
    layered: bool
    needed_bytes: int


def plan_passes(
    widest: tuple[Checkpoint, Recognized],
    others: Sequence[tuple[Checkpoint, Recognized]],
    tokens: Tokens,
    *,
    precision: str,
    budget_bytes: int,
    layered: bool | None,
) -> Passes:
    """The Passes of models of one family: whole where that fits, unless `layered` says how."""
    checkpoint, tree = widest
    twin = twin_of(tree)
    everything, itemsize = [widest, *others], np.dtype(precision).itemsize

    def needed(stage: Stage) -> int:
        # All that is stored, one model's parameters in the computation's dtype, one parameter that is worked on.
        elements = [_part_elements(tree, part) for part in stage.parts]
        return stage_bytes(stage, everything) + itemsize * sum(elements) + WORKED_ON_BYTES * max(elements)

    fitting = max(1, budget_bytes // ACTIVATIONS_SHARE // _activation_bytes(tree, tokens))
    rows = min(fitting, len(tokens.targets))
    batches = list(tokens.rows(rows))
    stages = twin.whole(tree)
    needed_bytes = needed(stages[0]) + _logits_bytes(tree, tokens)
    if layered is False or (layered is None and needed_bytes <= budget_bytes and len(batches) == 1):
        return Passes(stages, batches, layered=False, needed_bytes=needed_bytes)
    stages = twin.layered(tree, tokens, _head_tile(checkpoint, tree, budget_bytes, rows * tokens.targets.shape[1]))
    return Passes(stages, batches, layered=True, needed_bytes=max(map(needed, stages)))


def _part_elements(tree: Recognized, part: Part) -> int:
    axes, shape = tree.rows[part.name].spec.axes, tree.shapes[part.name]
    return math.prod(len(part.at) if axis == part.axis else n for axis, n in zip(axes, shape, strict=True))


def _activation_bytes(tree: Recognized, tokens: Tokens) -> int:
    """About what one row of tokens takes on its way through a layer, in float64."""
    sizes = tree.sizes
    length: int = max(tokens.encoder.shape[1], tokens.targets.shape[1])
    joined = sizes.get("joined_kv", sizes["heads"] * sizes.get("kv", 1))
    return 8 * length * (8 * sizes["embed"] + 8 * joined + 6 * sizes["mlp"] + 6 * sizes["heads"] * length)


def _logits_bytes(tree: Recognized, tokens: Tokens) -> int:
    """What all logits take in float64, of a few models and their differences."""
    return 8 * 8 * tokens.targets.size * tree.sizes["vocab"]


def _head_tile(checkpoint: Checkpoint, tree: Recognized, budget_bytes: int, positions: int) -> int:
    """How many tokens of the vocab the head is asked for at once: whole chunks of the widest model's table."""
    tables = [name for name, row in tree.rows.items() if "vocab" in row.spec.axes]
    head = next((name for name in tables if "vocab" in tree.rows[name].spec.outputs), tables[0])
    leaf = checkpoint.leaves[tree.prefix + head]
    axis = tree.rows[head].spec.axes.index("vocab")
    vocab, chunk = leaf.shape[axis], min(leaf.chunks[axis], leaf.shape[axis])
    limit: int = min(HEAD_BYTES, budget_bytes // ACTIVATIONS_SHARE)
    # As many as the table's columns and the logits of all positions leave room for.
    room: int = max(1, min(limit // (4 * leaf.shape[1 - axis]), limit // (64 * positions)))
    return min(vocab, room // chunk * chunk if room >= chunk else room)
