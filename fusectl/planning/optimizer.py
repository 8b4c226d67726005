"""Planning the optimizer's state: carried over, zeros of the right shapes, or none; and what that does, in words."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from fusectl.errors import Incompatible
from fusectl.families.kinds import Norm
from fusectl.layout.blocks import Block, Layout
from fusectl.optimizer.carry import Carry, same_models
from fusectl.optimizer.depth import deepened_slots
from fusectl.optimizer.kinds import OnState
from fusectl.optimizer.registry import find_state
from fusectl.optimizer.state import OptimizerState, is_state, slot_axes, unnamed
from fusectl.optimizer.unknown import NoState
from fusectl.planning.builder import Builder
from fusectl.planning.options import Options
from fusectl.rules.depth import Deepening
from fusectl.rules.fusion import Fusion
from fusectl.sources.opened import Opened


# Below so many updates moments are far from unbiased: 0.999 to its power is 5e-5.
MOST_BIASED_COUNT = 10_000
DROPPED = "optimizer: dropped; the trainer begins a new one, whose first updates need a warm-up"
RESET = "reset to zeros; the step is kept, so the first updates are of full size: warm up"


def plan_state(
    builder: Builder, opened: Sequence[Opened], fusion: Fusion, options: Options
) -> tuple[str, OptimizerState]:
    """Plans the optimizer's slots: carried over, zeros of the right shapes, or none.

    What was done, in a word, and the state that was, NoState where none is left.
    """
    first = opened[0]
    with_state = [any(is_state(n) and n not in o.dropped for n in o.checkpoint.leaves) for o in opened]
    if not any(with_state) or options.optimizer == OnState.DROP:
        if any(with_state):
            builder.notes.append(DROPPED)
        return (OnState.DROP if any(with_state) else "none"), NoState()
    if not with_state[0] or (options.optimizer != OnState.RESET and not all(with_state)):
        without = [o.label for o, has in zip(opened, with_state, strict=True) if not has]
        raise Incompatible(
            "sources with and without optimizer state",
            details=[f"none in {label}" for label in dict.fromkeys(without)],
            hint="--optimizer drop leaves it out, --optimizer reset makes zeros of that of the first source",
        )
    state = state_of(first)
    if state.kind != "unknown":
        state.require_known(first.label, "--optimizer drop leaves it out")
    elif options.optimizer != OnState.RESET:
        state.require_known(first.label, "--optimizer reset makes zeros of its slots, --optimizer drop leaves it out")
    fused_shapes = {name: fusion.fused_shape(name) for name in first.tree.shapes}
    slots: Iterable[tuple[str, tuple[int, ...], tuple[Block, ...]]]
    if options.optimizer == OnState.RESET:
        slots = ((name, shape, ()) for name, shape in state.fresh(first.tree, fused_shapes).items())
        effect = RESET
    else:
        carry = Carry(
            fusion,
            _one_optimizer([state, *map(state_of, opened[1:])], opened),
            same_models([str(o.checkpoint.location.index) for o in opened]),
            only_first=options.optimizer == OnState.ASYMMETRIC,
        )
        builder.notes += _notes_on_state(carry, opened)
        slots = carry.slots()
        effect = _effect(carry, options.norm)
    planned = set()
    for name, shape, blocks in slots:
        axes = slot_axes(name, shape, first.tree, fused_shapes)
        dtype = first.checkpoint.leaves[name].dtype
        if blocks and dtype == "float16" and not state.is_first(state.names_of(name)[1]):
            raise Incompatible(
                f"{name}: second moments in float16, which come to zero when they are scaled", hint="--optimizer reset"
            )
        builder.add(name, Layout(axes, shape, dtype, blocks), like=name)
        planned.add(name)
    plan_beside(builder, first, state, planned, reset=options.optimizer == OnState.RESET)
    builder.notes.append(f"optimizer: {state.kind}, {len(state.names)} slots {effect}")
    return options.optimizer, state


def plan_deeper_state(builder: Builder, opened: Opened, deepening: Deepening, options: Options) -> str:
    """Plans the optimizer's slots of a deeper model: each layer's along with it, zeros, or none. What was done."""
    state = state_of(opened)
    state.require_known(opened.label, "--optimizer drop leaves it out")
    if state.kind == "none" or options.optimizer == OnState.DROP:
        if state.kind != "none":
            builder.notes.append(DROPPED)
        return OnState.DROP if state.kind != "none" else "none"
    reset = options.optimizer == OnState.RESET
    leaves, grown = opened.checkpoint.leaves, deepening.grown
    for name, like, shape, blocks in deepened_slots(deepening, state):
        axes = slot_axes(name, shape, grown, grown.shapes)
        builder.add(name, Layout(axes, shape, leaves[like].dtype, () if reset else blocks), like=like)
    plan_beside(builder, opened, state, {output.name for output in builder.outputs}, reset=reset)
    effect = RESET if reset else "carried along with their layers"
    if not reset and any(depth.idle for depth in deepening.depths.values()):
        effect += "; first moments of those that add nothing start from 0"
    builder.notes.append(f"optimizer: {state.kind}, {effect}")
    return options.optimizer


def plan_beside(
    builder: Builder, opened: Opened, state: OptimizerState, planned: Collection[str], *, reset: bool
) -> None:
    """Plans what of a state no parameter has, and is not planned yet: settings as they are, counts too or as zeros.

    What another model begins anew is zeros in any case.
    """
    for name, shape in state.beside.items():
        if name in planned:
            continue
        if name in state.settings or not (reset or name in state.anew):
            builder.copy(name)
        else:
            dtype = opened.checkpoint.leaves[name].dtype
            builder.add(name, Layout(unnamed(shape), shape, dtype, ()), like=name)
    if state.anew:
        builder.notes.append("optimizer: the window of losses and norms by which steps are skipped begins anew")


def state_of(opened: Opened) -> OptimizerState:
    shapes = {n: s for n, s in opened.checkpoint.shapes.items() if n not in opened.dropped}
    return find_state(shapes, opened.tree, opened.label)


def _one_optimizer(states: Sequence[OptimizerState], opened: Sequence[Opened]) -> list[OptimizerState]:
    """The states, each as what the others tell it to be.

    Raises Incompatible unless they are of one optimizer with one set of settings, and of one dtype for each slot.
    """
    states = [s.among(states) for s in states]
    said = [f"{s} in {o.label}" for s, o in zip(states, opened, strict=True)]
    if len(set(map(str, states))) == 1:
        dtypes = [{o.checkpoint.leaves[name].dtype for name in s.names} for s, o in zip(states, opened, strict=True)]
        said = [f"{', '.join(sorted(found))} in {o.label}" for found, o in zip(dtypes, opened, strict=True)]
        if all(found == dtypes[0] for found in dtypes):
            return states
    raise Incompatible(
        "optimizer states that do not fit together",
        details=tuple(dict.fromkeys(said)),
        hint="--optimizer reset makes zeros of them, --optimizer drop leaves them out",
    )


def _notes_on_state(carry: Carry, opened: Sequence[Opened]) -> list[str]:
    """What the sources' states do not tell; raises Incompatible where one count of updates cannot stand for all."""
    fusion = carry.fusion
    shapes = {name: fusion.fused_shape(name) for name in fusion.tree.shapes}
    notes = list(carry.states[0].doubts(fusion.tree, shapes))
    counters = [[n for n in s.beside if n not in s.anew] for s in carry.states]
    counts = [[int(o.checkpoint.read(n)) for n in names] for names, o in zip(counters, opened, strict=True)]
    if any(each != counts[0] for each in counts):
        said = ", ".join(str(max(each, default=0)) for each in counts)
        if min(min(each, default=0) for each in counts) < MOST_BIASED_COUNT:
            raise Incompatible(
                f"the sources have made {said} updates: one count cannot correct the bias of all their moments",
                hint="--optimizer reset, or train the younger one on",
            )
        notes.append(f"the sources have made {said} updates; the output counts on from the first one's")
    return notes


def _effect(carry: Carry, norm: str | None) -> str:
    """What carrying the state does to the first update, in words."""
    if carry.only_first:
        return "kept for the first copy, zero elsewhere: large first updates there, which set the copies apart"
    if len(set(carry.models)) > 1:
        return "carried; between different sources second moments are estimated (rank 1), first ones start from 0"
    if len(set(carry.fusion.weights)) > 1 and norm != Norm.PROPERTY:
        return "carried; estimated, since one norm couples copies of different weights"
    return "carried into every block: the first update is that of a fused model trained so far"
