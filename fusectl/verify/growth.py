"""A checkpoint that was grown from one other: its tensors by a derivation of its own, its logits against the source's.

Which layer is made from which is worked out anew here, and the record's word is held against it. The planner's code has
no part in it; the families' tables do.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from fusectl.archs import Recognized
from fusectl.archs.table import Row, stack_of
from fusectl.errors import NotFound
from fusectl.formats import fingerprint, open_checkpoint
from fusectl.formats.tree import STEPS, Checkpoint, is_dropped
from fusectl.layout import Region, common_tile, shifted, size, tiles, whole
from fusectl.packed import unpacked
from fusectl.parallel import Progress, in_parallel
from fusectl.record import Growth
from fusectl.sources import own_family, recognized
from fusectl.transforms.optimizer import FIRST_MOMENTS, OptimizerState, find_state, is_state
from fusectl.verify.copies import count_differing
from fusectl.verify.report import WeightsResult


# Both sides, the cast one and a mask.
BYTES_PER_VALUE = 24


@dataclass(frozen=True)
class Grown:
    """A grown checkpoint and its source, each with its tree."""

    fused: Checkpoint
    tree: Recognized
    source: Checkpoint
    source_tree: Recognized
    growth: Growth

    @property
    def keeps_function(self) -> bool:
        """Whether it claims to compute what its source does."""
        return self.growth.keeps_function

    @cached_property
    def layers(self) -> Mapping[str, tuple[list[int], list[bool]]]:
        """For each stack the source's layer that each layer should be made from, and whether it should add nothing."""
        turn = max(1, len(self.tree.network.attending))
        for row in self.tree.rows.values():
            turn = int(np.lcm(turn, row.every))
        return {
            stack: _layers(self.growth.how, self.source_tree.depths[stack], then, turn)
            for stack, then in self.tree.depths.items()
        }

    def problems(self) -> Iterator[str]:
        """What the record says and is not so, and tensors that should be there and are not."""
        for stack, (layers, idle) in self.layers.items():
            said, said_idle = self.growth.layers.get(stack, ()), self.growth.idle.get(stack, ())
            if list(said) != layers or [i in said_idle for i in range(len(layers))] != idle:
                yield f"the record's layers of the {stack} are not those of --how {self.growth.how}"
        wanted = {self.tree.full(name) for name in self.tree.shapes}
        wanted |= {name for name, _, _ in self.slots()}
        here = {name for name in self.fused.leaves if name in wanted or is_state(name)}
        yield from (f"{name}: missing" for name in sorted(wanted - self.fused.leaves.keys()))
        if self.has_state:
            yield from (f"{name}: a slot of nothing" for name in sorted(here - wanted - self._counters))
        step = next((self.fused.read(name) for name in STEPS if name in self.fused.leaves), None)
        if self.fused.record is not None and self.fused.record.step is not None:
            if step is None or int(step) != self.fused.record.step:
                yield f"the step: {step}, expected {self.fused.record.step}"
        elif step is not None and self.source.step is not None and int(step) != self.source.step:
            yield f"the step: {step}, expected {self.source.step}"

    @cached_property
    def has_state(self) -> bool:
        """Whether the optimizer's state came along."""
        return self.fused.record is not None and self.fused.record.optimizer in {"carry", "reset"}

    @cached_property
    def _state(self) -> OptimizerState:
        drop = self.fused.record.drop if self.fused.record is not None else ()
        kept = {name: shape for name, shape in self.source.shapes.items() if not is_dropped(name, drop)}
        return find_state(kept, self.source_tree, self.source.path)

    @property
    def _counters(self) -> frozenset[str]:
        return frozenset(name for name in self._state.names if self._state.names_of(name)[0] is None)

    def slots(self) -> Iterator[tuple[str, str, str]]:
        """The full name of every slot that should be there, its parameter, and which moment it is."""
        if self.has_state and self._state.kind != "none":
            for parameter in self.tree.shapes:
                like = self.of(parameter, 0)[0]
                for moment in self._state.moments:
                    yield self._state.slot(like, moment).replace(like, parameter), parameter, moment

    def of(self, parameter: str, layer: int) -> tuple[str, int]:
        """The source's parameter that a layer of a parameter is made from, and the place in it."""
        row = self.tree.rows[parameter]
        place = (self.layers[stack_of(parameter)][0][layer] - row.first) // row.every
        alternative = row.alternative(parameter) or parameter
        return (parameter, place) if "layers" in row.spec.axes else (alternative.replace("#", str(place)), 0)

    def comparisons(self) -> Iterator[Comparison]:
        """Every region of every tensor, with the one of the source's that it should be equal to."""
        for parameter, row in self.tree.rows.items():
            nothing = -1.0 if row.is_norm and self.tree.network.norm_adds_one else 0.0
            name = self.tree.full(parameter)
            yield from self._of_tensor(parameter, name, row.spec.axes, None, nothing if row.writes_stream else None)
        reset = self.fused.record is not None and self.fused.record.optimizer == "reset"
        for name, parameter, moment in self.slots():
            row = self.tree.rows[parameter]
            kept = self._state.axes_of(moment, self.tree.shapes[parameter], row.spec)
            if kept is None or reset:
                yield Comparison(name, whole(self.fused.leaves[name].shape), None, (), 0.0)
            else:
                axes = tuple(row.spec.axes[axis] for axis in kept)
                yield from self._of_tensor(parameter, name, axes, moment, 0.0 if moment in FIRST_MOMENTS else None)
        if self.has_state:
            for name in self._counters & self.fused.leaves.keys():
                yield Comparison(name, (), None if reset else name, (), 0.0)

    def _of_tensor(
        self, parameter: str, name: str, axes: Sequence[str], moment: str | None, nothing: float | None
    ) -> Iterator[Comparison]:
        row, shape = self.tree.rows[parameter], self.fused.leaves[name].shape

        def theirs(source: str) -> str:
            return self.source_tree.full(source) if moment is None else self._state.slot(source, moment)

        if not _is_of_layers(row, parameter):
            yield Comparison(name, whole(shape), theirs(parameter), whole(shape), None)
            return
        idle = self.layers[stack_of(parameter)][1]
        for place, layer in enumerate(self.tree.layers_of(parameter)):
            source, there = self.of(parameter, layer)
            at, region = (
                tuple(range(i, i + 1) if axis == "layers" else range(n) for axis, n in zip(axes, shape, strict=True))
                for i in (place, there)
            )
            adds_nothing = idle[layer] and nothing is not None
            yield Comparison(name, at, None if adds_nothing else theirs(source), region, nothing or 0.0)


@dataclass(frozen=True)
class Comparison:
    """A region of a tensor, and that of the source's which it should be equal to; for None it is `value` everywhere."""

    name: str
    at: Region
    source: str | None
    region: Region
    value: float | None


def open_grown(fused: Checkpoint, path: str) -> Grown:
    """The grown checkpoint and its source at `path`; raises NotFound where that has gone."""
    record = fused.record
    assert record is not None
    assert record.growth is not None
    fused = unpacked(fused)
    try:
        source = unpacked(open_checkpoint(path))
    except NotFound as error:
        hint = "--sources NAME says where it is now"
        raise NotFound(f"{path}, which it was grown from, is not there any more", hint=hint) from error
    arch = own_family(fused) or record.family
    tree, source_tree = (recognized(each, arch, record.drop) for each in (fused, source))
    return Grown(fused, tree, source, source_tree, record.growth)


def check_grown(grown: Grown, *, budget_bytes: int, jobs: int, progress: Progress) -> WeightsResult:
    """Compares all of a grown checkpoint with what it should be made of, bit for bit, after a cast if there was one."""
    problems = list(grown.problems())
    if problems:
        return WeightsResult(passed=False, tensors=0, blocks=0, noise_blocks=0, slots=0, problems=tuple(problems))
    comparisons = list(grown.comparisons())
    wrong: dict[str, int] = {}
    lock = threading.Lock()
    read = sum(size(each.at) * grown.fused.leaves[each.name].itemsize * 2 for each in comparisons)
    progress.start("comparing", read)

    def compare(each: Comparison, at: Region) -> None:
        found = grown.fused.read(each.name, at)
        expected = np.full(found.shape, each.value or 0.0, found.dtype)
        if each.source is not None:
            values = grown.source.read(each.source, shifted(at, each.at, each.region))
            with np.errstate(over="ignore"):
                expected = np.ascontiguousarray(values.astype(found.dtype, copy=False))
        if differing := count_differing(found, expected):
            with lock:
                wrong[each.name] = wrong.get(each.name, 0) + differing
        progress.advance(each.name, 2 * found.nbytes)

    def tasks() -> Iterator[tuple[int, partial[None]]]:
        for each in comparisons:
            leaf = grown.fused.leaves[each.name]
            shape = tuple(map(len, each.at))
            for tile in tiles(shape, common_tile(shape, [leaf.chunks], budget_bytes // BYTES_PER_VALUE)):
                at = shifted(tile, whole(shape), each.at)
                yield size(at) * BYTES_PER_VALUE + 2 * leaf.reading_bytes, partial(compare, each, at)

    in_parallel(tasks(), budget_bytes=budget_bytes, jobs=jobs)
    found = [f"{name}: {n:,} values are not what they should be made of" for name, n in sorted(wrong.items())]
    if found and fingerprint(grown.source) != grown.growth.source.fingerprint:
        found.insert(0, f"{grown.source.path} has changed since it was grown")
    slots = sum(1 for _ in grown.slots())
    return WeightsResult(not found, len(grown.tree.shapes), len(comparisons), 0, slots, tuple(found), bytes_read=read)


def _layers(how: str, now: int, then: int, turn: int) -> tuple[list[int], list[bool]]:
    """The source's layer for each of `then` layers, and whether it should add nothing, layer by layer."""
    layers, idle, last = [], [], -1
    turns, new_turns = now // turn, then // turn
    for layer in range(then):
        number, place = layer // turn, layer % turn
        if number == new_turns:
            layers.append(now - (then - layer))
            idle.append(False)
            continue
        source = number % turns if how == "stack" else (number * turns) // new_turns
        idle.append(how == "identity" and source == last)
        layers.append(source * turn + place)
        if place == turn - 1:
            last = source
    return layers, idle


def _is_of_layers(row: Row, parameter: str) -> bool:
    return "layers" in row.spec.axes or row.index(parameter) is not None
