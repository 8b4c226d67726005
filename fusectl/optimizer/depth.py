"""The optimizer's slots of a model that has become deeper."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from fusectl.layout.blocks import Block
from fusectl.optimizer.state import UNUSED, OptimizerState
from fusectl.rules.depth import Deepening, blocks_of


def deepened_slots(
    deepening: Deepening, state: OptimizerState
) -> Iterator[tuple[str, str, tuple[int, ...], tuple[Block, ...]]]:
    """Name, that of the source's slot that it is like, shape and blocks of every slot but the counters.

    The moments of a layer go along with it. Where it adds nothing, its first moments are zero: it has not moved.
    """
    for parameter, row in deepening.grown.rows.items():
        pieces = list(deepening.pieces(parameter))
        like = pieces[0].parameter
        for slot in state.moments(like):
            kept = state.axes_of(slot, deepening.grown.shapes[parameter], row.spec)
            axes = () if kept is None else tuple(row.spec.axes[axis] for axis in kept)
            shape = UNUSED if kept is None else tuple(deepening.grown.shapes[parameter][axis] for axis in kept)
            moved = [piece for piece in pieces if not state.is_first(slot) or not piece.in_idle_layer]
            blocks = blocks_of(moved, axes, shape, partial(state.slot, moment=slot)) if kept is not None else ()
            yield state.slot_beside(like, parameter, slot), state.slot(like, slot), shape, blocks
