"""The weights level of a converted checkpoint: every tensor, key and empty node against the one that it is a copy of.

It knows how trees are renamed on the way to T5X and back, and nothing of plans.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import numpy as np

from fusectl.archs import UNKNOWN, recognize
from fusectl.errors import Incompatible, NotFound
from fusectl.formats import fingerprint, open_checkpoint
from fusectl.formats.tree import STEPS, T5X_STEP, Checkpoint, Leaf, is_dropped
from fusectl.layout import Region, common_tile, size, tiles
from fusectl.parallel import Progress, in_parallel
from fusectl.record import Copy, Origin
from fusectl.restack import restacked
from fusectl.verify.report import WeightsResult


# Both sides, the cast one and a mask.
BYTES_PER_VALUE = 24


def check_copy(fused: Checkpoint, *, budget_bytes: int, jobs: int, progress: Progress) -> WeightsResult:
    """Compares every tensor with that of the checkpoint that this one's record calls its source, bit for bit.

    Parameters that were cast are compared after the same cast. Raises NotFound where the source has gone.
    """
    assert fused.record is not None
    copy = fused.record.copy
    assert copy is not None
    source = _opened(copy, fused.record.family, budget_bytes)
    problems = list(_tree_problems(fused, source, copy))
    pairs = {to: name for name, to in _places(fused, source, copy).items() if to in fused.leaves}
    wrong: dict[str, int] = {}
    lock = threading.Lock()
    read = sum(fused.leaves[to].nbytes + source.leaves[name].nbytes for to, name in pairs.items())
    progress.start("comparing", read)

    def compare(to: str, name: str, region: Region) -> None:
        found, expected = fused.read(to, region), source.read(name, region)
        with np.errstate(over="ignore"):
            cast = np.ascontiguousarray(expected.astype(found.dtype, copy=False))
        # As bytes: a NaN is the same NaN, and -0 is not 0.
        one, other = (np.ascontiguousarray(each).reshape(-1).view(np.uint8) for each in (found, cast))
        differing = (one != other).reshape(found.size, -1).any(axis=1)
        if differing.any():
            with lock:
                wrong[to] = wrong.get(to, 0) + int(np.count_nonzero(differing))
        progress.advance(to, found.nbytes + expected.nbytes)

    def tasks() -> Iterator[tuple[int, partial[None]]]:
        for to, name in pairs.items():
            one, other = fused.leaves[to], source.leaves[name]
            if one.shape != other.shape or (name in STEPS and copy.step is not None):
                continue
            tile = common_tile(one.shape, [one.chunks, other.chunks], budget_bytes // BYTES_PER_VALUE)
            for region in tiles(one.shape, tile):
                yield size(region) * BYTES_PER_VALUE + other.reading_bytes, partial(compare, to, name, region)

    in_parallel(tasks(), budget_bytes=budget_bytes, jobs=jobs)
    problems += [f"{to}: {n:,} values are not those of {source.path}" for to, n in sorted(wrong.items())]
    if problems and fingerprint(source) != copy.source.fingerprint:
        problems.insert(0, f"{source.path} has changed since it was converted")
    slots = sum(to.startswith(("state/param_states/", "opt_state/")) for to in pairs)
    return WeightsResult(not problems, len(pairs), 0, 0, slots, tuple(problems), bytes_read=read)


def _opened(copy: Copy, family: str, budget_bytes: int) -> Checkpoint:
    try:
        source = open_checkpoint(copy.source.path)
    except NotFound as error:
        raise NotFound(f"{copy.source.path}, which it was converted from, is not there any more") from error
    if not copy.layers:
        return source
    arch = None
    try:
        recognize(source.shapes, source.path)
    except Incompatible:
        arch = family
    return restacked(source, copy.layers, arch, copy.drop, cache_bytes=budget_bytes // 4)


def _places(fused: Checkpoint, source: Checkpoint, copy: Copy) -> dict[str, str]:
    """For every tensor of the source that was not left out the name that it should have."""
    kept = [name for name in source.leaves if not is_dropped(name, copy.drop)]
    theirs = source.record.origin if source.record is not None else None
    ours = fused.record.origin if fused.record is not None else None
    if fused.format != "t5x":
        return _back(kept, theirs)
    if source.format == "t5x" or ours is None:
        step = next((name for name in STEPS if name in kept), None)
        return {name: T5X_STEP if name == step else name for name in kept}
    by_keys = {keys: name for name, keys in ours.keys.items()}
    return {
        name: by_keys.get(tuple((key.name, key.kind) for key in source.leaves[name].keys), "nowhere") for name in kept
    }


def _back(kept: list[str], origin: Origin | None) -> dict[str, str]:
    """The names in the tree that a copy in T5X's format came from."""
    if origin is None:
        return {name: name for name in kept}
    to = {name: "/".join(key for key, _ in keys) for name, keys in origin.keys.items()}
    # Parameters that were stacked or not since lie where the others do.
    home = next(
        (n.removesuffix(m.removeprefix("target/")) for m, n in to.items() if m.startswith("target/")), "target/"
    )
    return {
        name: to.get(name, home + name.removeprefix("target/") if name.startswith("target/") else name)
        for name in kept
        # One that T5X had to be given.
        if name != T5X_STEP or name in to
    }


def _tree_problems(fused: Checkpoint, source: Checkpoint, copy: Copy) -> Iterator[str]:
    """Names, shapes, dtypes, the step and empty nodes that are not as they should be."""
    places = _places(fused, source, copy)
    parameters = _parameters(source, copy)
    for name, to in places.items():
        if to not in fused.leaves:
            yield f"{to}: missing"
            continue
        yield from _leaf_problems(fused.leaves[to], source.leaves[name], copy.dtype if name in parameters else None)
    extra = fused.leaves.keys() - set(places.values())
    had_step = any(name in STEPS for name in places)
    may_be = set() if had_step else {T5X_STEP, "step"}
    yield from (f"{name}: no part of {source.path}" for name in sorted(extra - may_be))
    now = next((fused.read(name) for name in STEPS if name in fused.leaves), None)
    if copy.step is not None and (now is None or int(now) != copy.step):
        yield f"the step: {now}, set to {copy.step}"
    if fused.format != "t5x" and source.format != "t5x":
        expected = {(node.keys, node.value_type) for node in source.empty if not is_dropped(node.name, copy.drop)}
        differ = expected ^ {(node.keys, node.value_type) for node in fused.empty}
        yield from sorted({f"{'/'.join(key.name for key in keys)}: an empty node that differs" for keys, _ in differ})


def _leaf_problems(found: Leaf, like: Leaf, dtype: str | None) -> Iterator[str]:
    if found.shape != like.shape:
        yield f"{found.name}: shape {list(found.shape)}, {list(like.shape)} in the source"
    if found.dtype != (dtype or like.dtype):
        yield f"{found.name}: {found.dtype}, expected {dtype or like.dtype}"


def _parameters(source: Checkpoint, copy: Copy) -> frozenset[str]:
    """The full names of the source's parameters, where they were cast."""
    if copy.dtype is None:
        return frozenset()
    family = source.record.family if source.record is not None else ""
    shapes = {name: shape for name, shape in source.shapes.items() if not is_dropped(name, copy.drop)}
    try:
        tree = recognize(shapes, source.path)
    except Incompatible:
        tree = recognize(shapes, source.path, family) if family else UNKNOWN
    return frozenset(map(tree.full, tree.shapes))
