"""A copy: every tensor, key and other node against the one that it is a copy of.

It knows how trees are renamed on the way to T5X and back, and nothing of plans.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from fusectl.errors import Incompatible, NotFound
from fusectl.families.recognized import UNKNOWN
from fusectl.families.table import Family
from fusectl.formats.opening import fingerprint, open_checkpoint
from fusectl.formats.record import Origin
from fusectl.formats.registry import format_named
from fusectl.formats.tree import NONE, STEPS, T5X_STEP, Checkpoint, Key, dict_keys, is_dropped
from fusectl.layout.blocks import Region, common_tile, size, tiles
from fusectl.optimizer.state import is_state
from fusectl.sources.opened import own_family, recognized
from fusectl.sources.scan import restacked
from fusectl.system.threads import Progress, in_parallel
from fusectl.verbs import Converted
from fusectl.verification.claim import Declared
from fusectl.verification.compared import BYTES_PER_VALUE, count_differing, of_another_model
from fusectl.verification.report import Report, WeightsResult
from fusectl.verification.settings import Settings


Pairs = tuple[tuple[str, int], ...]


def check(fused: Checkpoint, declared: Declared, settings: Settings, progress: Progress, report: Report) -> Report:
    """The report on a copy: as every tensor is its source's, so is what it computes."""
    if report.damaged:
        return report
    path = declared.source or converted_of(fused).source.path
    started = time.monotonic()
    weights = check_copy(fused, path, budget_bytes=settings.read_bytes, jobs=settings.threads, progress=progress)
    notes = [f"a copy of {path}: compared tensor by tensor, no model was run"]
    if report.record.fused:
        notes.append("--sources A B holds it against what was fused instead")
    weights = replace(weights, seconds=time.monotonic() - started)
    return replace(report, weights=weights, notes=(*report.notes, *notes))


def converted_of(fused: Checkpoint) -> Converted:
    """How a copy came about, by its record."""
    assert fused.record is not None
    assert isinstance(fused.record.made, Converted)
    return fused.record.made


def check_copy(fused: Checkpoint, path: str, *, budget_bytes: int, jobs: int, progress: Progress) -> WeightsResult:
    """Compares all of a copy with the checkpoint at `path`, tensors bit for bit, after a cast where there was one.

    Raises NotFound where that has gone.
    """
    pair = _Pair(fused, _opened(fused, path, budget_bytes))
    problems = list(pair.problems())
    wrong: dict[str, int] = {}
    lock = threading.Lock()
    compared = {name: to for name, to in pair.names.items() if pair.comparable(name)}
    read = sum(fused.leaves[to].nbytes + pair.source.leaves[name].nbytes for name, to in compared.items())
    progress.start("comparing", read)

    def compare(name: str, to: str, region: Region) -> None:
        found, expected = fused.read(to, region), pair.source.read(name, region)
        with np.errstate(over="ignore"):
            cast = np.ascontiguousarray(expected.astype(found.dtype, copy=False))
        if differing := count_differing(found, cast):
            with lock:
                wrong[to] = wrong.get(to, 0) + differing
        progress.advance(to, found.nbytes + expected.nbytes)

    def tasks() -> Iterator[tuple[int, partial[None]]]:
        for name, to in compared.items():
            one, other = fused.leaves[to], pair.source.leaves[name]
            tile = common_tile(one.shape, [one.chunks, other.chunks], budget_bytes // BYTES_PER_VALUE)
            for region in tiles(one.shape, tile):
                yield size(region) * BYTES_PER_VALUE + other.reading_bytes, partial(compare, name, to, region)

    in_parallel(tasks(), budget_bytes=budget_bytes, jobs=jobs)
    problems += [f"{to}: {n:,} values are not those of {path}" for to, n in sorted(wrong.items())]
    # A source that was trained on since is the likelier reason for all the differences below, and comes first.
    if problems and fingerprint(pair.source) != pair.copy.source.fingerprint:
        problems.insert(0, f"{path} has changed since it was converted")
    slots = sum(map(is_state, compared.values()))
    return WeightsResult(not problems, len(compared), 0, 0, slots, tuple(problems), bytes_read=read)


def _opened(fused: Checkpoint, path: str, budget_bytes: int) -> Checkpoint:
    """The checkpoint that it was copied from, its layers as they are in the copy."""
    copy = converted_of(fused)
    try:
        source = open_checkpoint(path)
    except NotFound as error:
        hint = "--sources NAME says where it is now"
        raise NotFound(f"{path}, which it was converted from, is not there any more", hint=hint) from error
    if not copy.layers:
        return source
    return restacked(source, copy.layers, None, copy.drop, cache_bytes=budget_bytes // 4)


@dataclass
class _Pair:
    """A copy and its source."""

    fused: Checkpoint
    source: Checkpoint

    def __post_init__(self) -> None:
        assert self.fused.record is not None
        self.record, self.copy = self.fused.record, converted_of(self.fused)
        self.kept = [name for name in self.source.leaves if not is_dropped(name, self.copy.drop)]
        self.step = next((name for name in STEPS if name in self.kept), None)
        self.theirs = self.source.record.origin if self.source.record is not None else None
        self.to_t5x, self.from_t5x = (not format_named(each.format).keeps_tree for each in (self.fused, self.source))
        # For every tensor that was not left out its keys in the copy.
        self.keys = self._keys()
        self.names = {name: "/".join(key for key, _ in keys) for name, keys in self.keys.items()}

    def comparable(self, name: str) -> bool:
        """Whether the values of a tensor of the source should be those in the copy, and can be compared."""
        found = self.fused.leaves.get(self.names[name])
        is_set = name == self.step and self.copy.step is not None
        return found is not None and found.shape == self.source.leaves[name].shape and not is_set

    def problems(self) -> Iterator[str]:
        """What is wrong with names, keys, shapes, dtypes, the step, other nodes and the record."""
        parameters = _parameters(self.source, self.copy, own_family(self.fused) or self.record.family)
        for name, to in self.names.items():
            found, like = self.fused.leaves.get(to), self.source.leaves[name]
            if found is None:
                yield f"{to}: missing"
                continue
            if tuple((key.name, key.kind) for key in found.keys) != self.keys[name]:
                yield f"{to}: keys of other kinds"
            if name == self.step and self.copy.step is not None:
                continue
            if found.shape != like.shape:
                yield f"{to}: shape {list(found.shape)}, {list(like.shape)} in the source"
            dtype = (self.copy.dtype if name in parameters else None) or like.dtype
            if found.dtype != dtype:
                yield f"{to}: {found.dtype}, expected {dtype}"
        may_be = set() if self.step else {T5X_STEP, "step"}
        extra = self.fused.leaves.keys() - set(self.names.values()) - may_be
        yield from (f"{name}: no part of {self.source.path}" for name in sorted(extra))
        yield from self._step_problems()
        differ = self._nodes() ^ self._expected_nodes()
        yield from sorted({f"{name}: a node without tensors, or a string, that differs" for name, *_ in differ})
        yield from self._random_key_problems()
        yield from self._record_problems()

    def _keys(self) -> dict[str, Pairs]:
        own = {name: _pairs(self.source.leaves[name].keys) for name in self.kept}
        if not self.to_t5x:
            return own if self.theirs is None else _back(self.kept, own, self.theirs)
        ours = self.record.origin
        if self.from_t5x or ours is None:
            return {name: _plain(T5X_STEP if name == self.step else name) for name in self.kept}
        by_keys = {keys: name for name, keys in ours.keys.items()}
        return {name: _plain(by_keys.get(own[name], f"{name} (nowhere)")) for name in self.kept}

    def _step_problems(self) -> Iterator[str]:
        now = next((self.fused.read(name) for name in STEPS if name in self.fused.leaves), None)
        wanted = self.copy.step
        if wanted is None and self.step is None and self.to_t5x:
            # T5X restores no tree without a step, so that a copy in its format has one even where the source has none.
            wanted = self.source.location.step or 0
        if wanted is not None and (now is None or int(now) != wanted):
            yield f"the step: {now}, expected {wanted}"

    def _random_key_problems(self) -> Iterator[str]:
        for name, to in self.names.items():
            now = self.fused.leaves[to].random_key if to in self.fused.leaves else None
            if now != self.source.leaves[name].random_key:
                yield f"{to}: keys of {now or 'no generator'}, expected {self.source.leaves[name].random_key or 'none'}"

    def _nodes(self) -> set[tuple[str, object]]:
        return {self._node(_pairs(node.keys), node.value_type, node.text) for node in self.fused.nodes}

    def _expected_nodes(self) -> set[tuple[str, object]]:
        if self.theirs is not None and not self.to_t5x:
            nodes = list(self.theirs.nodes)
        else:
            nodes = [(_pairs(node.keys), node.value_type, node.text) for node in self.source.nodes]
        return {self._node(*node) for node in nodes if not is_dropped(_joined(node[0]), self.copy.drop)}

    def _node(self, keys: Pairs, kind: str, text: str | None) -> tuple[str, object]:
        """A name, and what the format can tell of a node without tensors."""
        return _joined(keys), (kind == NONE, text) if self.to_t5x else (keys, kind, text)

    def _record_problems(self) -> Iterator[str]:
        yield from of_another_model(self.record, self.source)
        if self.to_t5x and not self.from_t5x:
            ours = self.record.origin
            own = {_pairs(self.source.leaves[name].keys) for name in self.kept}
            if ours is None or ours.item != self.source.location.item or not own <= set(ours.keys.values()):
                yield "the record does not tell the tree that it came from"


def _pairs(keys: Sequence[Key]) -> Pairs:
    return tuple((key.name, key.kind) for key in keys)


def _joined(keys: Pairs) -> str:
    return "/".join(name for name, _ in keys)


def _plain(name: str) -> Pairs:
    return _pairs(dict_keys(name))


def _back(kept: Sequence[str], own: Mapping[str, Pairs], origin: Origin) -> dict[str, Pairs]:
    """The keys in the tree that a copy in T5X's format came from."""
    # Parameters that were stacked or not since lie where the others do.
    moved = ((keys, name.removeprefix("target/")) for name, keys in origin.keys.items() if name.startswith("target/"))
    home = next((_around(keys, name) for keys, name in moved), None)
    found = {}
    for name in kept:
        if name in origin.keys:
            found[name] = origin.keys[name]
        elif name.startswith("target/") and home is not None:
            found[name] = (*home[0], *_plain(name.removeprefix("target/")), *home[1])
        elif name != T5X_STEP:
            # T5X had to be given that one.
            found[name] = own[name]
    return found


def _around(keys: Pairs, parameter: str) -> tuple[Pairs, Pairs]:
    """What of a parameter's keys stands before its own name, and behind it: that is one key at most."""
    behind = int(keys[-1][0] != parameter.rpartition("/")[-1])
    own = len(keys) - behind
    return keys[: own - len(_plain(parameter))], keys[own:]


def _parameters(source: Checkpoint, copy: Converted, family: Family | str) -> frozenset[str]:
    """The full names of the source's parameters, where they were cast."""
    if copy.dtype is None:
        return frozenset()
    try:
        tree = recognized(source, None, copy.drop)
    except Incompatible:
        tree = recognized(source, family, copy.drop) if family else UNKNOWN
    return frozenset(map(tree.full, tree.shapes))
