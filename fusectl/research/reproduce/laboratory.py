"""Models that are trained and grown, each kept on disk by what it is, so that whatever has been done is not done again.

    runs/<what>/run.json            what it is, its curve, the compute of a step
    runs/<what>/checkpoint_<step>   the states that were asked for, as T5X keeps them
    grown/<what>/checkpoint_<step>  what fusectl's own commands made of them

A run has no length: T5's schedule has no end, so to train on is to continue, and the shorter run is part of the longer.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fusectl.demo import parameter_shapes
from fusectl.errors import Corrupt, FusectlError, UsageError
from fusectl.families.kinds import Norm
from fusectl.families.recognition import recognize
from fusectl.families.recognized import Recognized
from fusectl.families.registry import family_named
from fusectl.formats.kinds import FormatName
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.sink import save
from fusectl.networks.examples import Examples, read_examples, window_of
from fusectl.networks.tokens import Tokens
from fusectl.networks.training import Recipe, State, Trainer, random_parameters
from fusectl.research.reproduce.presets import VOCAB, Preset
from fusectl.research.reproduce.texts import task, write_start, write_text
from fusectl.sources.opened import open_source


FAMILY = "t5-1.1"
PRETRAINING = "text"
# What each growth adds to the seed of the data: more than seeds of models that are fused differ by.
# A grown model that went on with the batches of its source would see again what its source has learned from.
_AFTER_GROWTH = 1000
# Batches that no model learns from: every other one chooses rates, those between are what is reported.
HELD_OUT = 32
# Of batches of one seed.
KEPT_BYTES = 256 << 20


@dataclass(frozen=True)
class Growth:
    """How a model comes from trained ones: fusectl's commands, one after the other.

    In their words {0}, {1} … stand for the sources, {between} for what a command leaves to the next one, {out} for what
    the last one makes, {text} for the text without what is held out. Without commands the source itself is trained on.
    """

    name: str
    sources: tuple[Model, ...]
    commands: tuple[tuple[str, ...], ...] = ()
    # Steps that growing takes itself, charged as steps of the grown model.
    steps: int = 0


@dataclass(frozen=True)
class Model:
    """A model after so many steps: from a random start of the seed, or grown from others."""

    size: str
    seed: int
    base: float
    steps: int
    growth: Growth | None = None
    offset: int = 0
    data: str = PRETRAINING

    @property
    def key(self) -> str:
        """What its directory is called: a run is the same for any number of steps."""
        start = "scratch" if self.growth is None else self.growth.name
        return f"{self.size}-{slug(start)}-{self.data}-{self.seed}-{self.base:g}-{digest(replace(self, steps=0))}"


@dataclass(frozen=True)
class Point:
    """What was measured after a step of a run: on test data, and the validation loss that rates are chosen by."""

    step: int
    loss: float
    accuracy: float
    validation: float


@dataclass(frozen=True)
class Run:
    """A trained model: its curve to its last step, its checkpoint, and the FLOPs of a step."""

    model: Model
    path: Path
    curve: tuple[Point, ...]
    flops_per_step: float

    @property
    def start(self) -> Point:
        """Before the first step."""
        return self.curve[0]

    @property
    def end(self) -> Point:
        """After the last one."""
        return self.curve[-1]


class Laboratory:
    """Trains and grows models in a directory, several at once; `note` is told of each run."""

    def __init__(self, out: Path, preset: Preset, note: Callable[[str], None], jobs: int) -> None:
        # Its paths are words of commands, where one that begins with a dash would be an option.
        self.out = out.resolve()
        self.preset, self._note, self._jobs = preset, note, jobs
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._locks_lock = threading.Lock()
        self._trainers: dict[Any, Trainer] = {}
        self._streams: dict[Any, _Stream] = {}
        if out.exists() and not out.is_dir():
            raise UsageError(f"{out}: not a directory")
        self.out.mkdir(parents=True, exist_ok=True)
        self._require_same_preset()
        self.text = write_text(self.out / "text.txt", preset.text_bytes)

    def run(self, model: Model) -> Run:
        """The run of a model, trained as far as it is not yet."""
        with self._locked(model.key):
            return self._run(model)

    def all(self, models: Sequence[Model]) -> list[Run]:
        """The runs of several models, which are trained side by side."""
        pool = ThreadPoolExecutor(self._jobs)
        try:
            return list(pool.map(self.run, models))
        finally:
            # Where one has failed, what has not begun does not begin.
            pool.shutdown(cancel_futures=True)

    def charged_flops(self, model: Model) -> float:
        """What training it has cost, its sources included, each once however often it was used."""
        return sum(each * self.run(m).flops_per_step for m, each in _steps_of(model).items())

    def grown(self, growth: Growth) -> Path:
        """The checkpoint that fusectl's commands make."""
        if not growth.commands:
            return self.run(growth.sources[0]).path
        home = self.out / "grown" / f"{slug(growth.name)}-{digest(growth)}"
        sources = [self.run(each).path for each in growth.sources]
        out = home / sources[0].name
        with self._locked(str(home)):
            if not out.exists():
                places = {"out": str(out), "between": str(home / "between_1"), "text": str(self._text_to_learn())}
                shutil.rmtree(home, ignore_errors=True)
                home.mkdir(parents=True)
                for words in growth.commands:
                    self.fusectl([word.format(*sources, **places) for word in words])
                shutil.rmtree(places["between"], ignore_errors=True)
        return out

    def examples(self, model: Model) -> Examples:
        """What a model is trained on and measured with."""
        with self._locked("data"):
            text = self.text if model.data == PRETRAINING else task(model.data, self.out)
        return read_examples(
            str(text),
            vocab=VOCAB,
            objective="span_corruption",
            batch=self.preset.batch,
            lengths=self.preset.lengths,
            seed=_data_seed(model),
            most_held_out=HELD_OUT,
        )

    def _text_to_learn(self) -> Path:
        """The text before what is held out, written once: of several threads that ask for it the first one does."""
        file = self.out / "learned.txt"
        with self._locked("learned"):
            if not file.exists():
                held = len(self.examples(Model("small", 0, 0.0, 0)).held_out) * self.preset.batch
                write_start(self.text, file, window_of(*self.preset.lengths), held)
        return file

    def _stream(self, model: Model, examples: Examples) -> _Stream:
        """The batches of a model's data and seed, which all runs of these have in common."""
        with self._locked("streams"):
            return self._streams.setdefault((model.data, _data_seed(model)), _Stream(examples.batches))

    def _run(self, model: Model) -> Run:
        home = self.out / "runs" / model.key
        file = home / "run.json"
        kept = _read(file) if file.exists() else {"curve": []}
        path = home / f"checkpoint_{model.steps}"
        # Who is interrupted between the two has a checkpoint without its part of the curve.
        trained = path.exists() and model.steps in (step for step, *_ in kept["curve"])
        if not trained:
            kept = self._train(model, home, kept["curve"])
            _write(file, kept)
        curve = tuple(Point(*each) for each in kept["curve"] if each[0] <= model.steps)
        if not trained:
            self._note(f"{model.key}: {curve[-1].loss:.4f} after {model.steps:,} steps")
        return Run(model, path, curve, kept["flops_per_step"])

    def _train(self, model: Model, home: Path, known: Sequence[Sequence[float]]) -> dict[str, Any]:
        """What run.json says after training from the last state whose curve is known."""
        examples = self.examples(model)
        start = None if model.growth is None else self.grown(model.growth)
        trainer = self._trainer(model.size, self._norm_groups(model))
        curve = {int(step): (step, *rest) for step, *rest in known}
        # A run goes on from the last of its states, since T5's schedule has no end: what was trained for 1,000 steps is
        # the beginning of what is trained for 2,000.
        begun = max((n for n in _stored(home) if n <= model.steps and n in curve), default=None)
        if begun is not None:
            state = self._restored(trainer, home / f"checkpoint_{begun}")
        elif start is not None:
            state = self._restored(trainer, start)
        else:
            state = trainer.begin(random_parameters(trainer.tree, model.seed))
        made = begun or 0
        first = state.step - made
        validation, test = held_out_of(examples)

        def measured(step: int, now: State) -> None:
            at = step - first
            if at == model.steps or at % self.preset.measure_every == 0:
                chosen_by = trainer.measure(now.parameters, validation).loss
                curve[at] = (at, *trainer.measure(now.parameters, test), chosen_by)

        if made == 0:
            measured(first, state)
        recipe = Recipe(model.base, self.preset.warmup, model.offset)
        state = trainer.train(
            state, self._stream(model, examples).following(made), recipe, model.steps - made, measured
        )
        self._save(trainer, state, home / f"checkpoint_{model.steps}")
        return {
            "model": asdict(model),
            "data": examples.says,
            "flops_per_step": trainer.flops_per_step(state, examples.held_out[0]),
            "curve": [curve[step] for step in sorted(curve)],
        }

    def _norm_groups(self, model: Model) -> tuple[int, ...]:
        """The groups that a model's norms are over, as its record says; none are over the whole width."""
        if model.growth is None:
            return ()
        if not model.growth.commands:
            return self._norm_groups(model.growth.sources[0])
        opened = open_source(str(self.grown(model.growth)))
        record = opened.checkpoint.record
        return opened.norm_groups if record is not None and record.norm == Norm.PROPERTY else ()

    def _trainer(self, size: str, groups: tuple[int, ...]) -> Trainer:
        with self._locked(f"{size} {groups}"):
            if (size, groups) not in self._trainers:
                tree = tree_of(self.preset, size)
                self._trainers[size, groups] = Trainer(tree, groups, self.preset.dtype)
            return self._trainers[size, groups]

    def _restored(self, trainer: Trainer, path: Path) -> State:
        checkpoint = open_checkpoint(str(path))
        return trainer.restored(checkpoint.read, checkpoint.shapes)

    def _save(self, trainer: Trainer, state: State, path: Path) -> None:
        beside = path.with_name(f"{path.name}.part")
        for old in (beside, path):
            shutil.rmtree(old, ignore_errors=True)
        beside.parent.mkdir(parents=True, exist_ok=True)
        save(beside, trainer.stored(state), FormatName.T5X)
        beside.rename(path)

    def fusectl(self, words: Sequence[str]) -> None:
        """Runs a command of fusectl in a process of its own, as a user does."""
        program = [sys.executable, "-m", "fusectl", *words, "-q"]
        done = subprocess.run(program, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise FusectlError(f"fusectl {' '.join(words)}: exit code {done.returncode}", details=(done.stderr,))

    def _require_same_preset(self) -> None:
        file, mine = self.out / "preset.json", json.loads(json.dumps(asdict(self.preset)))
        if file.exists() and _read(file) != mine:
            raise UsageError(f"{file}: another preset has been run here", hint="another -o")
        _write(file, mine)

    def _locked(self, name: str) -> threading.Lock:
        with self._locks_lock:
            return self._locks[name]


class _Stream:
    """Batches in the order in which they are learned from; the first ones are made once and kept."""

    def __init__(self, batches: Callable[[], Iterator[Tokens]]) -> None:
        self._begin, self._more, self._lock = batches, batches(), threading.Lock()
        self._made = [next(self._more)]
        batch_bytes = sum(each.nbytes for each in vars(self._made[0]).values() if isinstance(each, np.ndarray))
        self._most = max(1, KEPT_BYTES // batch_bytes)

    def following(self, count: int) -> Iterator[Tokens]:
        """The batches behind the first so many."""
        for i in range(count, self._most):
            with self._lock:
                while len(self._made) <= i:
                    self._made.append(next(self._more))
            yield self._made[i]
        yield from itertools.islice(self._begin(), max(count, self._most), None)


def tree_of(preset: Preset, size: str) -> Recognized:
    """The tree of a T5 1.1 of one of the preset's sizes."""
    named = parameter_shapes(family_named(FAMILY), preset.sizes(size), preset.depths(size))
    return recognize({f"target/{name}": shape for name, _, shape in named}, f"a {size} model", FAMILY)


def held_out_of(examples: Examples) -> tuple[Sequence[Tokens], Sequence[Tokens]]:
    """The batches that rates are chosen by, and those that are reported; they are the same where there is only one."""
    return examples.held_out[::2], examples.held_out[1::2] or examples.held_out


def digest(what: Any) -> str:
    """Eight hexadecimal digits of a model or a growth."""
    return hashlib.sha256(json.dumps(asdict(what), sort_keys=True).encode()).hexdigest()[:8]


def slug(name: str) -> str:
    """A name as part of a path.

    >>> slug("(2) S + S to M")
    '2-S-S-to-M'
    """
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def _data_seed(model: Model) -> int:
    """What the order of a model's batches comes from: grown models see others than any of their sources did.

    A task has one order for all models, whatever they come from.
    """
    return model.seed + (_AFTER_GROWTH * _generation(model) if model.data == PRETRAINING else 0)


def _generation(model: Model) -> int:
    """How often a model has been grown, its sources included."""
    return 0 if model.growth is None else 1 + max(map(_generation, model.growth.sources))


def _steps_of(model: Model) -> dict[Model, int]:
    """The runs that a model takes, and how many steps of each: of what is used twice the longest."""
    found: dict[str, tuple[Model, int]] = {}
    for each in _with_sources(model):
        steps = each.steps + (each.growth.steps if each.growth else 0)
        # Two arms that grow from one small model have trained it once, and an arm that uses it twice has, too.
        if each.key not in found or found[each.key][1] < steps:
            found[each.key] = each, steps
    return dict(found.values())


def _with_sources(model: Model) -> Iterator[Model]:
    yield model
    for source in model.growth.sources if model.growth else ():
        yield from _with_sources(source)


def _stored(home: Path) -> list[int]:
    """The steps of which a run has kept its state."""
    return [int(each.name.partition("_")[2]) for each in home.glob("checkpoint_*") if each.suffix != ".part"]


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise Corrupt(
            f"{file}: not what was written", details=(str(error),), hint="remove it, or another -o"
        ) from error


def _write(file: Path, values: Any) -> None:
    beside = file.with_name(f"{file.name}.part")
    beside.write_text(json.dumps(values, indent=1))
    beside.replace(file)
