"""The optimizers whose state fusectl knows, and the state of a tree."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from fusectl.families.recognized import Recognized
from fusectl.optimizer.adafactor import Adafactor
from fusectl.optimizer.adam import Adam
from fusectl.optimizer.state import STATE, UNUSED, OptimizerState, is_state, not_known
from fusectl.optimizer.unknown import NoState, Unknown


# In the order in which they are tried.
OPTIMIZERS: tuple[type[OptimizerState], ...] = (Adam, Adafactor)


def find_state(shapes: Mapping[str, tuple[int, ...]], tree: Recognized, where: str) -> OptimizerState:
    """The optimizer state in a tree.

    One of an optimizer that fusectl does not know is Unknown if all of it can be told apart: slots of a parameter's
    shape, numbers, settings. Raises Incompatible for what cannot, and for slots that do not fit.
    """
    own = {name: shape for name, shape in shapes.items() if is_state(name)}
    known: tuple[type[OptimizerState], ...] = (NoState, *OPTIMIZERS)
    tried = [found for each in known if (found := each.find(own, tree)) is not None]
    for state, wrong in tried:
        if not wrong:
            return state
    unknown, strange = Unknown.find(own, tree)
    nearest, wrong = min(tried, key=lambda found: len(found[1]), default=(unknown, []))
    if strange:
        raise not_known(where, wrong or strange, "--optimizer drop leaves it out; mu and nu are taken for Adam's")
    # Counts alone are SGD's, or Adam's that has lost all of its moments; some of these are Adam's that lacks slots.
    kind = nearest.kind if wrong and len(unknown.beside) < len(own) else unknown.kind
    return replace(unknown, kind=kind, problems=tuple(wrong) or unknown.problems)


# By name alone: Adafactor's in T5X below each parameter, optax's in trees like that of the parameters.
_T5X_SLOT = re.compile(rf"{STATE}(?P<parameter>.+)/(?P<slot>m|v|v_row|v_col)")
_TREE_SLOT = re.compile(
    r"(?:.*/)?(?:param_states|opt_state|optimizer_state|optimizer)/(?:.*?/)??"
    r"(?P<slot>mu|nu|trace|v|v_row|v_col)/(?P<parameter>.+)"
)


def unlike_their_parameters(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The slots of a tree of no known family that cannot be of the parameters that they are named after."""
    slots = {name: found for name in shapes if (found := _T5X_SLOT.fullmatch(name) or _TREE_SLOT.fullmatch(name))}
    # Where each name ends in that of a parameter: a tree may hold it more than once, as its average.
    ends: dict[str, list[tuple[int, ...]]] = {}
    wanted = {found["parameter"] for found in slots.values()}
    for name in shapes.keys() - slots.keys():
        parts = name.split("/")
        for end in ("/".join(parts[i:]) for i in range(len(parts))):
            if end in wanted:
                ends.setdefault(end, []).append(shapes[name])
    return [
        f"{name}: shape {list(shapes[name])}, of a parameter of shape {list(of[0])}"
        for name, found in slots.items()
        if (of := ends.get(found["parameter"])) and not any(_may_be_slot(found["slot"], shapes[name], s) for s in of)
    ]


def _may_be_slot(slot: str, shape: tuple[int, ...], parameter: tuple[int, ...]) -> bool:
    """Whether a slot may have this shape: its parameter's, or some of its axes, where second moments are factored."""
    if shape == parameter or (shape == UNUSED and slot not in Adam.orders):
        return True
    rest = iter(parameter)
    return slot in {"v_row", "v_col"} and all(n in rest for n in shape)
