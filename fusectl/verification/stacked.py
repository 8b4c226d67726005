"""A checkpoint that was made deeper: its tensors by a derivation of its own.

Which layer is made from which is worked out anew here, and the record's word is held against it. The planner's code has
no part in it; the families' tables do.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.families.naming import is_stream
from fusectl.families.table import DECODER, stack_of
from fusectl.formats.record import Record
from fusectl.formats.registry import format_named
from fusectl.formats.tree import STEPS, Checkpoint, kept_shapes
from fusectl.layout.blocks import Region, common_tile, shifted, size, tiles, whole
from fusectl.optimizer.kinds import OnState
from fusectl.optimizer.registry import find_state
from fusectl.optimizer.state import UNUSED, OptimizerState, is_state
from fusectl.rules.kinds import How
from fusectl.system.threads import Progress, in_parallel
from fusectl.verbs import Stacked
from fusectl.verification.claim import Declared
from fusectl.verification.compared import BYTES_PER_VALUE, count_differing, of_another_model
from fusectl.verification.grown import Grown, open_grown, report_on, require_no_trace
from fusectl.verification.report import Report, WeightsResult
from fusectl.verification.settings import Settings


# How the modules begin that MaxText's streams of random numbers are in.
_LAYERS = "decoder/layers"


@dataclass(frozen=True)
class Deeper(Grown):
    """A stacked checkpoint and its source."""

    made: Stacked

    @cached_property
    def layers(self) -> Mapping[str, tuple[list[int], list[bool]]]:
        """For each stack the source's layer that each layer should be made from, and whether it should add nothing."""
        turn = max(1, len(self.tree.network.attending))
        for row in self.tree.rows.values():
            turn = int(np.lcm(turn, row.every))
        return {
            stack: _layers(self.made.how, self.source_tree.depths[stack], then, turn)
            for stack, then in self.tree.depths.items()
        }

    def problems(self) -> Iterator[str]:
        """What the record says and is not so, tensors that should be there and are not, and others."""
        if self.made.how not in set(How):
            yield f"the record says stacked by {self.made.how}, which fusectl does not know"
            return
        for what in ("sizes", "depths"):
            now, then = getattr(self.tree, what), getattr(self.source_tree, what)
            if (what == "sizes" and now != then) or now.keys() != then.keys() or any(now[k] < then[k] for k in now):
                yield f"{what}: {now}, grown from {then}"
                return
        for stack, (layers, idle) in self.layers.items():
            said, said_idle = self.made.layers.get(stack, ()), self.made.idle.get(stack, ())
            if list(said) != layers or [i in said_idle for i in range(len(layers))] != idle:
                yield f"the record's layers of the {stack} are not those of --how {self.made.how}"
        yield from of_another_model(self._record, self.source)
        yield from self._tensor_problems()
        yield from self._step_problems()

    @property
    def _record(self) -> Record:
        assert self.fused.record is not None
        return self.fused.record

    def _tensor_problems(self) -> Iterator[str]:
        """Tensors that are missing, of no use, or of another shape or dtype."""
        known = set(STEPS)
        for name, like, shape in self._expected():
            known.add(name)
            found = self.fused.leaves.get(name)
            if found is None:
                yield f"{name}: missing"
            elif like not in self.source.leaves:
                yield f"{name}: {like} is not in {self.source.path}"
            elif found.shape != shape:
                yield f"{name}: shape {list(found.shape)}, expected {list(shape)}"
            elif found.dtype != self.source.leaves[like].dtype and name not in self._cast:
                yield f"{name}: {found.dtype}, {self.source.leaves[like].dtype} in the source"
        yield from (f"{name}: no part of what was grown" for name in sorted(self.fused.leaves.keys() - known))

    @cached_property
    def _cast(self) -> frozenset[str]:
        """The parameters, if all of them may have been cast to one dtype."""
        parameters = frozenset(map(self.tree.full, self.tree.shapes))
        dtypes = {self.fused.leaves[name].dtype for name in parameters}
        return parameters if len(dtypes) == 1 else frozenset()

    def _expected(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Every tensor but the step that should be there: its name, that of the source's like it, and its shape."""
        for parameter, shape in self.tree.shapes.items():
            yield self.tree.full(parameter), self.source_tree.full(self.like(parameter)), shape
        for name, parameter, moment in self.slots():
            kept = self._state.axes_of(moment, self.tree.shapes[parameter], self.tree.rows[parameter].spec)
            shape = UNUSED if kept is None else tuple(self.tree.shapes[parameter][axis] for axis in kept)
            yield name, self._state.slot(self.like(parameter), moment), shape
        yield from ((name, name, self._state.beside[name]) for name in self._beside)
        for name, like, places in self._streams():
            shape = self.source.leaves[like].shape
            yield name, like, (shape if places is None else (len(places), *shape[1:]))

    def _step_problems(self) -> Iterator[str]:
        now, then = (
            next((each.read(name) for name in STEPS if name in each.leaves), None) for each in (self.fused, self.source)
        )
        wanted = self._record.step if self._record.step is not None else then
        if wanted is None and format_named(self.fused.format).needs_step:
            # T5X had to be given one.
            wanted = self.source.step or 0
        if wanted is not None and (now is None or int(now) != int(wanted)):
            yield f"the step: {now}, expected {wanted}"

    @cached_property
    def has_state(self) -> bool:
        """Whether the optimizer's state came along."""
        return self._record.optimizer in {OnState.CARRY, OnState.RESET}

    @cached_property
    def _state(self) -> OptimizerState:
        kept = kept_shapes(self.source.shapes, self._record.drop)
        return find_state(kept, self.source_tree, self.source.path)

    @property
    def _beside(self) -> tuple[str, ...]:
        """What of the state is no parameter's."""
        return tuple(self._state.beside) if self.has_state else ()

    def slots(self) -> Iterator[tuple[str, str, str]]:
        """The full name of every slot that should be there, its parameter, and which moment it is."""
        if self.has_state:
            for parameter in self.tree.shapes:
                like = self.like(parameter)
                for moment in self._state.moments(like):
                    yield self._state.slot_beside(like, parameter, moment), parameter, moment

    def like(self, parameter: str) -> str:
        """The source's parameter that the first layer of a parameter is made from."""
        if not self.tree.rows[parameter].is_of_layers(parameter):
            return parameter
        return self._of(parameter, self.tree.layers_of(parameter)[0])[0]

    def _of(self, parameter: str, layer: int) -> tuple[str, int]:
        """The source's parameter that a layer of a parameter is made from, and the place in it."""
        row, stack = self.tree.rows[parameter], stack_of(parameter)
        first = row.first
        if row.behind:
            depth, group = self.source_tree.depths[stack], max(each.every for each in self.tree.rows.values())
            first += depth // group * group
        place = (self.layers[stack][0][layer] - first) // row.every
        alternative = row.alternative(parameter) or parameter
        return (parameter, place) if "layers" in row.spec.axes else (alternative.replace("#", str(place)), 0)

    def _streams(self) -> Iterator[tuple[str, str, list[int] | None]]:
        """MaxText's streams of random numbers: name, the one of the source it is from, and its places, or None.

        Each layer has that of the one it is made from; those that not all layers have stay where they are.
        """
        shapes = kept_shapes(self.source.shapes, self._record.drop)
        here = {name: shape for name, shape in shapes.items() if is_stream(name) and not is_state(name)}
        if not here:
            return
        group = max(row.every for row in self.tree.rows.values())
        now, then = (tree.depths.get(DECODER, 0) // group for tree in (self.source_tree, self.tree))
        places = [self.layers[DECODER][0][i * group] // group for i in range(then)]
        for name, shape in here.items():
            head, layers, tail = name.partition(_LAYERS)
            number = re.match(r"_(\d+)/", tail)
            of_all = number and all(f"{head}{layers}_{i}/{tail[number.end() :]}" in here for i in range(now))
            if number and of_all:
                rest = tail[number.end() :]
                for i, place in enumerate(places):
                    if place == int(number[1]):
                        yield f"{head}{layers}_{i}/{rest}", name, None
            elif tail.startswith("/") and shape[:1] == (now,):
                yield name, name, places
            else:
                yield name, name, None

    def comparisons(self) -> Iterator[Comparison]:
        """Every region of every tensor, with what it should be equal to."""
        for parameter, row in self.tree.rows.items():
            nothing = -1.0 if row.is_norm and self.tree.network.norm_adds_one else 0.0
            name = self.tree.full(parameter)
            yield from self._of_tensor(parameter, name, row.spec.axes, None, nothing if row.writes_stream else None)
        reset = self._record.optimizer == OnState.RESET
        for name, parameter, moment in self.slots():
            row = self.tree.rows[parameter]
            kept = self._state.axes_of(moment, self.tree.shapes[parameter], row.spec)
            if kept is None or reset:
                yield Comparison(name, whole(self.fused.leaves[name].shape), None)
            else:
                axes = tuple(row.spec.axes[axis] for axis in kept)
                yield from self._of_tensor(parameter, name, axes, moment, 0.0 if self._state.is_first(moment) else None)
        for name in self._beside:
            anew = reset or name in self._state.anew
            yield Comparison(name, whole(self._state.beside[name]), None if anew else name)
        for name, like, places in self._streams():
            at = whole(self.fused.leaves[name].shape)
            if places is None:
                yield Comparison(name, at, like)
                continue
            for run in _runs(places):
                yield Comparison(name, (run, *at[1:]), like, 0, tuple(places[i] for i in run))

    def _of_tensor(
        self, parameter: str, name: str, axes: Sequence[str], moment: str | None, nothing: float | None
    ) -> Iterator[Comparison]:
        row, at = self.tree.rows[parameter], whole(self.fused.leaves[name].shape)

        def theirs(source: str) -> str:
            return self.source_tree.full(source) if moment is None else self._state.slot(source, moment)

        if not row.is_of_layers(parameter):
            yield Comparison(name, at, theirs(parameter))
            return
        layers = self.tree.layers_of(parameter)
        found = [self._of(parameter, layer) for layer in layers]
        idle = [nothing is not None and self.layers[stack_of(parameter)][1][layer] for layer in layers]
        if "layers" not in axes:
            yield Comparison(name, at, None if idle[0] else theirs(found[0][0]), value=nothing or 0.0)
            return
        axis, places = axes.index("layers"), [place for _, place in found]
        for run in _runs(places):
            region = (*at[:axis], run, *at[axis + 1 :])
            of_run = tuple(places[i] for i in run)
            adds_nothing = tuple(i for i in range(len(run)) if idle[run[i]])
            yield Comparison(name, region, theirs(found[0][0]), axis, of_run, adds_nothing, nothing or 0.0)


@dataclass(frozen=True)
class Comparison:
    """A region of a tensor, and the source's tensor that it should be equal to; for None it is `value` everywhere.

    Along `axis` it has the source's `places`, all of them where there are none, and `value` at those `valued`, which
    are counted from the region's first.
    """

    name: str
    at: Region
    source: str | None
    axis: int = 0
    places: tuple[int, ...] = ()
    valued: tuple[int, ...] = ()
    value: float = 0.0

    def expected(self, source: Checkpoint, at: Region, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """What should stand in a region `at` of this one."""
        if self.source is None:
            return np.full(tuple(map(len, at)), self.value, dtype)
        if not self.places:
            values = source.read(self.source, at)
        else:
            first = self.at[self.axis].start
            inside = range(at[self.axis].start - first, at[self.axis].stop - first)
            places = [self.places[i] for i in inside]
            there = (*at[: self.axis], range(places[0], places[-1] + 1), *at[self.axis + 1 :])
            values = source.read(self.source, there).take([place - places[0] for place in places], self.axis)
        with np.errstate(over="ignore"):
            expected = np.array(values.astype(dtype, copy=False), order="C")
        for i in self.valued:
            if self.places and i in inside:
                expected[(slice(None),) * self.axis + (i - inside.start,)] = self.value
        return expected


def _runs(places: Sequence[int]) -> Iterator[range]:
    """Where places go up by one at most: what is read for a run is no more than the run."""
    first = 0
    for i in range(1, len(places) + 1):
        if i == len(places) or not 0 <= places[i] - places[i - 1] <= 1:
            yield range(first, i)
            first = i


def check(fused: Checkpoint, declared: Declared, settings: Settings, progress: Progress, report: Report) -> Report:
    """The report on a checkpoint that was made deeper."""
    if report.damaged:
        return report
    require_no_trace(settings)
    grown = open_grown(Deeper, fused, declared)
    weigh = partial(check_layers, grown, budget_bytes=settings.read_bytes, jobs=settings.threads, progress=progress)
    return report_on(grown, weigh, settings, progress, report)


def check_layers(grown: Deeper, *, budget_bytes: int, jobs: int, progress: Progress) -> WeightsResult:
    """Compares all of a grown checkpoint with what it should be made of, bit for bit, after a cast if there was one."""
    problems = list(grown.problems())
    if problems:
        problems = [*grown.changed(), *problems]
        return WeightsResult(passed=False, tensors=0, blocks=0, noise_blocks=0, slots=0, problems=tuple(problems))
    comparisons = list(grown.comparisons())
    wrong: dict[str, int] = {}
    lock = threading.Lock()
    read = sum(size(each.at) * grown.fused.leaves[each.name].itemsize * 2 for each in comparisons)
    progress.start("comparing", read)

    def compare(each: Comparison, at: Region) -> None:
        found = grown.fused.read(each.name, at)
        if differing := count_differing(found, each.expected(grown.source, at, found.dtype)):
            with lock:
                wrong[each.name] = wrong.get(each.name, 0) + differing
        progress.advance(each.name, 2 * found.nbytes)

    def tasks() -> Iterator[tuple[int, partial[None]]]:
        for each in comparisons:
            leaf = grown.fused.leaves[each.name]
            source = leaf if each.source is None else grown.source.leaves[each.source]
            shape = tuple(map(len, each.at))
            for tile in tiles(shape, common_tile(shape, [leaf.chunks, source.chunks], budget_bytes // BYTES_PER_VALUE)):
                at = shifted(tile, whole(shape), each.at)
                reading = leaf.reading_bytes + source.reading_bytes
                yield size(at) * BYTES_PER_VALUE + reading, partial(compare, each, at)

    in_parallel(tasks(), budget_bytes=budget_bytes, jobs=jobs)
    found = [f"{name}: {n:,} values are not what they should be made of" for name, n in sorted(wrong.items())]
    found = [*grown.changed(), *found] if found else []
    slots = sum(1 for _ in grown.slots())
    return WeightsResult(not found, len(grown.tree.shapes), 0, 0, slots, tuple(found), bytes_read=read)


def _layers(how: str, now: int, then: int, turn: int) -> tuple[list[int], list[bool]]:
    """The source's layer for each of `then` layers, and whether it should add nothing, layer by layer."""
    # A loop over layers stands here in place of rules/depth.py's formula, so that a slip in either one shows.
    layers, idle, last = [], [], -1
    turns, new_turns = now // turn, then // turn
    for layer in range(then):
        number, place = layer // turn, layer % turn
        if number == new_turns:
            layers.append(now - (then - layer))
            idle.append(False)
            continue
        source = number % turns if how == How.STACK else (number * turns) // new_turns
        idle.append(how == How.IDENTITY and source == last)
        layers.append(source * turn + place)
        if place == turn - 1:
            last = source
    return layers, idle
