"""The training step of an output, and the streams of random numbers that go along with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusectl.errors import UsageError
from fusectl.families.naming import T5X, is_stream
from fusectl.formats.format import Format
from fusectl.formats.tree import STEPS, T5X_STEP, Key
from fusectl.formats.zarr import np_dtype
from fusectl.layout.blocks import Block, Layout, Product
from fusectl.optimizer.state import is_state
from fusectl.planning.builder import Builder
from fusectl.planning.options import Options
from fusectl.sources.opened import Opened


def plan_step(
    builder: Builder, first: Opened, options: Options, out_format: Format, keys: tuple[Key, ...] | None = None
) -> None:
    """Plans the step with these keys, or under the name that the format's readers look for; T5X must have one."""
    stored = step_of(first)
    of_t5x = out_format.needs_step or (stored is None and first.tree.naming == T5X)
    name = "/".join(key.name for key in keys) if keys else T5X_STEP if of_t5x else stored or "step"
    step = options.step
    if step is None and stored is not None:
        builder.copy(stored, to=name, keys=keys)
        return
    if step is None and not out_format.needs_step:
        return
    now = first.checkpoint.step
    if step is None:
        # That of the directory's name, if it has one.
        step = now or 0
        builder.notes.append(f"the source stores no step; T5X gets step {step:,}")
    else:
        instead = "" if now is None else f" instead of {now:,}"
        builder.notes.append(f"step {step:,}{instead}; the optimizer's own counts stay")
    leaf = first.checkpoint.leaves[stored] if stored else None
    kept = leaf is not None and not leaf.shape and np_dtype(leaf.dtype).kind in "iu"
    dtype = leaf.dtype if leaf is not None and kept else "int32"
    if step > np.iinfo(dtype).max:
        raise UsageError(f"--step {step}: more than {stored}, of {dtype}, can hold")
    # A product of nothing, times the step.
    block = Block((), (Product((), step),))
    builder.add(name, Layout((), (), dtype, (block,)), like=stored if kept else None, keys=keys)
    builder.used |= {stored} if stored else set()


def plan_auxiliary(builder: Builder, opened: Sequence[Opened]) -> None:
    """Plans copies of the streams of random numbers, which no width changes: each of the first source that has it."""
    planned: set[str] = set()
    for place, each in enumerate(opened):
        added = [name for name in auxiliary(each) if name not in planned]
        for name in added:
            builder.copy(name, source=place)
        if added and place:
            builder.notes.append(f"{each.label}: {len(added)} tensors of random streams, which no source before it has")
        planned.update(added)


def auxiliary(opened: Opened) -> list[str]:
    """The streams of random numbers that MaxText keeps with a model of NNX."""
    leaves, dropped = opened.checkpoint.leaves, opened.dropped
    return [name for name in leaves if is_stream(name) and not is_state(name) and name not in dropped]


def step_of(first: Opened) -> str | None:
    """The tensor that holds the step of a source."""
    return next((name for name in STEPS if name in first.checkpoint.leaves and name not in first.dropped), None)
