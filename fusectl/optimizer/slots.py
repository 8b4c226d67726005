"""The optimizer's state: which slots a checkpoint has, and which ones T5X would create for the fused shapes.

    state/param_states/<parameter>/{m,v,v_row,v_col}      T5X's Adafactor: all four exist, unused ones are (1,) zeros
    state/param_states/<n>/{mu,nu}/<parameter>            optax's Adam inside T5X, with state/param_states/<n>/count
    opt_state/<n>/{mu,nu}/params/<parameter>              and in a training state of Flax or MaxText
    opt_state/inner_states/muon/…/mu/params/<parameter>   and others of optax's, which can be reset but not carried

Slot shapes are a function of the parameter's shape and axes, never of the source's slots: growing can turn `v` into
`v_row` and `v_col`, or swap what they index. Source: t5x/adafactor.py, `HeuristicRule` and
`standard_logical_factor_rules`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from fusectl.errors import Incompatible, shorten
from fusectl.families.recognized import Recognized
from fusectl.layout.axes import TensorSpec


# Where T5X keeps it, and Flax's training loops.
STATE = "state/param_states/"
FLAX_STATE = "opt_state/"
STATES = (STATE, FLAX_STATE)
UNUSED = (1,)
ADAM = ("mu", "nu")
ADAFACTOR = ("m", "v", "v_row", "v_col")
FIRST_MOMENTS = frozenset({"mu", "m"})

# T5X factors the second moments of a matrix only if both of its dimensions reach this.
FACTORED_FROM = 128
ROW = frozenset({"embed"})
COLUMN = frozenset({"vocab", "mlp", "heads", "kv", "joined_kv"})

Axes = tuple[int, ...]

# Below the states of the transformations that optax chains or wraps: by their places, or by their fields' names.
_OPTAX = re.compile(r"(?:(?:\d+|inner_state)/)*(mu|nu)/(.+)")
_COUNT = re.compile(r"(?:(?:\d+|inner_state)/)*(count|gradient_step|mini_step)")
# The losses and norms of gradients that MaxText's skip_step_on_spikes keeps, with a count of its own (optimizers.py).
_WINDOW = re.compile(r"((?:(?:\d+|inner_state)/)*)(losses|grad_norms|is_skipped)")
# Of any of optax's transformations: slots of a parameter's shape that begin as zeros, numbers that do, and settings.
_SLOT = re.compile(r"(?:[^/]+/)*?(mu|nu|trace|acc_grads)/(.+)")
_NUMBER = re.compile(r"(?:[^/]+/)*(count|gradient_step|mini_step)")
_SETTING = re.compile(r"(?:[^/]+/)*(ns_coeffs)")
_FLAX_COLLECTION = "params/"


@dataclass(frozen=True)
class OptimizerState:
    """The optimizer whose state a checkpoint holds, as far as its slots tell.

    `kind` is adafactor, adam, unknown or none. `factored` and `momentum` are Adafactor's settings; `names` all slots'
    names.
    """

    kind: str
    names: tuple[str, ...]
    factored: bool = False
    momentum: bool = False
    # Whether nothing in it is large enough to tell if it is factored: then T5X's default is assumed.
    may_be_either: bool = False
    # What stands before a parameter's name below mu and nu.
    inside: str = ""
    # The shapes of what is no parameter's, and of it what another model begins anew, and what no model changes.
    beside: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)
    anew: frozenset[str] = frozenset()
    settings: frozenset[str] = frozenset()
    # Why it cannot be carried.
    problems: tuple[str, ...] = ()

    @property
    def moments(self) -> tuple[str, ...]:
        """The slots that each parameter has."""
        return {"adam": ADAM, "adafactor": ADAFACTOR}.get(self.kind, ())

    def axes_of(self, slot: str, shape: tuple[int, ...], spec: TensorSpec) -> Axes | None:
        """The axes of a parameter of this shape that a slot has; None for one that is not in use."""
        if self.kind == "adam":
            return tuple(range(len(shape)))
        return adafactor_axes(shape, spec, factored=self.factored, momentum=self.momentum)[slot]

    def second_moments(self, kept: Axes, shape: tuple[int, ...], spec: TensorSpec) -> tuple[str, Axes]:
        """The slot of second moments that has these axes of a parameter, and all of its axes: perhaps more."""
        has = {slot: self.axes_of(slot, shape, spec) for slot in self.moments if slot not in FIRST_MOMENTS}
        return next((slot, axes) for slot, axes in has.items() if axes is not None and set(kept) <= set(axes))

    def slot(self, parameter: str, what: str) -> str:
        """The full name of a parameter's slot: m, v, v_row or v_col of Adafactor, mu or nu of Adam."""
        if self.kind == "adafactor":
            return f"{STATE}{parameter}/{what}"
        return self._adam[what, parameter]

    def slot_beside(self, like: str, parameter: str, what: str) -> str:
        """The full name of a slot of a parameter that is not there yet, where that of the one `like` it is."""
        if self.kind == "adafactor":
            return self.slot(parameter, what)
        return self.slot(like, what).removesuffix(like) + parameter

    def names_of(self, slot: str) -> tuple[str | None, str]:
        """The parameter and the slot that a full name says; no parameter for a counter."""
        if self.kind == "adafactor":
            parameter, _, what = slot.removeprefix(STATE).rpartition("/")
            return parameter, what
        if slot in self.beside:
            return None, without_root(slot)
        return _moment(slot, self.inside, _SLOT if self.kind == "unknown" else _OPTAX) or (None, without_root(slot))

    def require_known(self, where: str, hint: str) -> None:
        """Raises Incompatible where it is of an optimizer that fusectl does not know, so that it cannot be carried."""
        if self.problems:
            raise _unknown(where, self.problems, hint)

    @cached_property
    def _adam(self) -> Mapping[tuple[str, str], str]:
        found = ((_moment(name, self.inside), name) for name in self.names)
        return {(pair[1], pair[0]): name for pair, name in found if pair}


def is_state(name: str) -> bool:
    """Whether a tensor is part of the optimizer's state."""
    return name.startswith(STATES)


def without_root(name: str) -> str:
    """The name of a slot below the node that all of the optimizer's state is in."""
    root = next((root for root in STATES if name.startswith(root)), "")
    return name.removeprefix(root)


def _shape_of(moment: tuple[str, str] | None, tree: Recognized) -> tuple[int, ...] | None:
    """The shape that a slot has to have: that of its parameter; None where there is no such parameter."""
    return None if moment is None else tree.shapes.get(moment[0])


def _moment(slot: str, inside: str, pattern: re.Pattern[str] = _OPTAX) -> tuple[str, str] | None:
    """The parameter and the moment, such as mu or nu, that a slot is; None for others."""
    found = pattern.fullmatch(without_root(slot))
    if found is None or not found.group(2).startswith(inside):
        return None
    return found.group(2).removeprefix(inside), found.group(1)


def find_state(shapes: Mapping[str, tuple[int, ...]], tree: Recognized, where: str) -> OptimizerState:
    """The optimizer state in a tree.

    One of an optimizer that fusectl does not know is `unknown` if all of it can be told apart: slots of a parameter's
    shape, numbers, settings. Raises Incompatible for what cannot, and for slots that do not fit.
    """
    own = {name: shape for name, shape in shapes.items() if is_state(name)}
    if not own:
        return OptimizerState("none", ())
    short = [without_root(name) for name in own]
    if all(_OPTAX.fullmatch(name) or _COUNT.fullmatch(name) or _WINDOW.fullmatch(name) for name in short):
        state, wrong = _adam(own, tree)
    elif all(name.startswith(STATE) for name in own):
        state, wrong = _adafactor(own, tree)
    else:
        state, wrong = OptimizerState("unknown", tuple(own)), []
    if state.kind != "unknown" and not wrong:
        return state
    known, strange = _by_structure(own, tree)
    if strange:
        raise _unknown(where, wrong or strange, "--optimizer drop leaves it out; mu and nu are taken for Adam's")
    # Counts alone are SGD's, or Adam's that has lost all of its moments; some of these are Adam's that lacks slots.
    kind = state.kind if wrong and len(known.beside) < len(own) else "unknown"
    return replace(known, kind=kind, problems=tuple(wrong or _fields(known)))


def _adam(own: Mapping[str, tuple[int, ...]], tree: Recognized) -> tuple[OptimizerState, list[str]]:
    """The state of optax's Adam, and what contradicts that it is one."""
    # Moments are kept in trees like that of the parameters, in which Flax's collections are one level more.
    collections = (moment[0] for name in own if (moment := _moment(name, _FLAX_COLLECTION)))
    inside = _FLAX_COLLECTION if any(parameter in tree.shapes for parameter in collections) else ""
    moments = {name: _moment(name, inside) for name in own}
    window = [found for name in own if (found := _WINDOW.fullmatch(without_root(name)))]
    anew = frozenset(name for name in own if without_root(name) in _window_of(window))
    wrong = [
        f"{name}: shape {list(shape)}"
        for name, shape in own.items()
        if not _WINDOW.fullmatch(without_root(name))
        and shape != (() if _COUNT.fullmatch(without_root(name)) else _shape_of(moments[name], tree))
    ]
    times = Counter((pair[1], pair[0]) for pair in moments.values() if pair)
    wrong += [
        f"{parameter}: {times[moment, parameter] or 'no'} slots {moment}, expected one"
        for parameter in tree.shapes
        for moment in ADAM
        if times[moment, parameter] != 1
    ]
    beside = {name: own[name] for name, moment in moments.items() if moment is None}
    return OptimizerState("adam", tuple(own), inside=inside, beside=beside, anew=anew), wrong


def _window_of(found: list[re.Match[str]]) -> frozenset[str]:
    """The names without their root of a window's parts, and of its count, which stands beside them."""
    return frozenset(name for each in found for name in (each.group(), f"{each.group(1)}count"))


def _adafactor(own: Mapping[str, tuple[int, ...]], tree: Recognized) -> tuple[OptimizerState, list[str]]:
    """The state of T5X's Adafactor, and what contradicts that it is one."""
    slots = {name.removeprefix(STATE): shape for name, shape in own.items()}
    momentum = any(name.endswith("/m") and shape != UNUSED for name, shape in slots.items())
    wrong_by = {f: _contradictions(slots, tree, factored=f, momentum=momentum) for f in (True, False)}
    fitting = [factored for factored, wrong in wrong_by.items() if not wrong]
    state = OptimizerState("adafactor", tuple(own), fitting[0] if fitting else False, momentum)
    return replace(state, may_be_either=len(fitting) > 1), [] if fitting else wrong_by[False]


def _by_structure(own: Mapping[str, tuple[int, ...]], tree: Recognized) -> tuple[OptimizerState, list[str]]:
    """The state of any of optax's optimizers, and what of it cannot be told apart."""
    inside = _FLAX_COLLECTION if any(f"/{_FLAX_COLLECTION}" in name for name in own) else ""
    moments = {name: _moment(name, inside, _SLOT) for name in own}
    settings = frozenset(name for name in own if _SETTING.fullmatch(without_root(name)))
    window = _window_of([found for name in own if (found := _WINDOW.fullmatch(without_root(name)))])
    numbers = [name for name in own if own[name] == () and _NUMBER.fullmatch(without_root(name))]
    anew = frozenset(name for name in own if without_root(name) in window)
    known = settings | anew | frozenset(numbers)
    strange = [
        f"{name}: no slot of a parameter, no count and no setting that fusectl knows"
        if moment is None or moment[0] not in tree.shapes
        else f"{name}: shape {list(own[name])}, its parameter is {list(tree.shapes[moment[0]])}"
        for name, moment in moments.items()
        if name not in known and own[name] != _shape_of(moment, tree)
    ]
    beside = {name: own[name] for name in own if name in known}
    return OptimizerState("unknown", tuple(own), inside=inside, beside=beside, anew=anew, settings=settings), strange


def _fields(state: OptimizerState) -> list[str]:
    """What a state of an unknown optimizer has for its parameters, in words."""
    parts = Counter(state.names_of(name)[1] for name in state.names if name not in state.beside)
    return [f"{n} slots {moment}, which need not be Adam's" for moment, n in parts.items()]


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
    if shape == parameter or (shape == UNUSED and slot not in ADAM):
        return True
    rest = iter(parameter)
    return slot in {"v_row", "v_col"} and all(n in rest for n in shape)


def fresh_slots(
    state: OptimizerState, tree: Recognized, fused: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the slots that the optimizer creates for parameters of the fused shapes, but settings."""
    if state.kind != "adafactor":
        parameters = {name: state.names_of(name)[0] for name in state.names if name not in state.settings}
        return {name: state.beside[name] if p is None else fused[p] for name, p in parameters.items()}
    return {
        f"{STATE}{parameter}/{slot}": slot_shape
        for parameter, shape in fused.items()
        for slot, slot_shape in adafactor_slots(
            shape, tree.rows[parameter].spec, factored=state.factored, momentum=state.momentum
        ).items()
    }


def slot_axes(
    name: str, shape: tuple[int, ...], tree: Recognized, parameters: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """The names of the axes of a slot: its parameter's, if it has that one's whole shape among `parameters`.

    All others have none (`unnamed`): T5X replicates them, v_row and v_col among them (t5x/adafactor.py,
    `derive_logical_axes`). Slots of optimizers that fusectl does not know are told by their names, too.
    """
    parts = without_root(name).split("/")
    within = ("/".join(parts[i:j]) for i in range(len(parts)) for j in range(len(parts), i, -1))
    parameter = next((part for part in within if part in parameters), None)
    if parameter is None or parameters[parameter] != shape:
        return unnamed(shape)
    return tree.rows[parameter].spec.axes


def unnamed(shape: tuple[int, ...]) -> tuple[str, ...]:
    """Names for the axes of a tensor of which nothing is known; no rule lays them over a mesh.

    >>> unnamed((2, 3))
    ('axis0', 'axis1')
    """
    return tuple(f"axis{i}" for i in range(len(shape)))


def adafactor_slots(
    shape: tuple[int, ...], spec: TensorSpec, *, factored: bool, momentum: bool
) -> dict[str, tuple[int, ...]]:
    """The shapes of m, v, v_row and v_col that T5X's Adafactor creates for a parameter.

    >>> from fusectl.layout.axes import parse_axes
    >>> adafactor_slots((2048, 768), parse_axes("mlp -> embed"), factored=True, momentum=False)
    {'m': (1,), 'v': (1,), 'v_row': (768,), 'v_col': (2048,)}
    """
    axes_of = adafactor_axes(shape, spec, factored=factored, momentum=momentum)
    return {slot: UNUSED if axes is None else tuple(shape[axis] for axis in axes) for slot, axes in axes_of.items()}


def adafactor_axes(
    shape: tuple[int, ...], spec: TensorSpec, *, factored: bool, momentum: bool
) -> dict[str, Axes | None]:
    """The axes of a parameter that each slot of T5X's Adafactor has; None for those that are not in use."""
    every = tuple(range(len(shape)))
    m = every if momentum else None
    dropped = factored_axes(shape, spec) if factored else None
    if dropped is None:
        return {"m": m, "v": every, "v_row": None, "v_col": None}
    v_row, v_col = (tuple(axis for axis in every if axis not in axes) for axes in dropped)
    return {"m": m, "v": None, "v_row": v_row, "v_col": v_col}


def factored_axes(shape: tuple[int, ...], spec: TensorSpec) -> tuple[set[int], set[int]] | None:
    """The axes that v_row and v_col average over, or None where the second moments are not factored."""
    if len(shape) <= 2 and "layers" not in spec.axes:
        if len(shape) < 2:
            return None
        second, largest = sorted(range(len(shape)), key=shape.__getitem__)[-2:]
        return None if shape[second] < FACTORED_FROM else ({largest}, {second})
    rows = {axis for axis, name in enumerate(spec.axes) if name in ROW}
    columns = {axis for axis, name in enumerate(spec.axes) if name in COLUMN}
    return (columns, rows) if rows and columns else None


def _contradictions(
    slots: Mapping[str, tuple[int, ...]], tree: Recognized, *, factored: bool, momentum: bool
) -> list[str]:
    expected = {
        f"{parameter}/{slot}": shape
        for parameter, own in tree.shapes.items()
        for slot, shape in adafactor_slots(own, tree.rows[parameter].spec, factored=factored, momentum=momentum).items()
    }
    return [
        f"{STATE}{name}: shape {_shown(slots.get(name))}, expected {_shown(expected.get(name))}"
        for name in sorted(slots.keys() | expected.keys())
        if slots.get(name) != expected.get(name)
    ]


def _shown(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def _unknown(where: str, wrong: Sequence[str], hint: str) -> Incompatible:
    return Incompatible(
        f"{where}: optimizer state that does not fit its parameters, or of an optimizer that fusectl does not know",
        details=shorten(wrong, 5),
        hint=hint,
    )
