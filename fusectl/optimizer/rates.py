"""The learning rates that continue the small model's trajectory, as factors of the old one, by kind of parameter.

All blocks of a kernel's column move alike, and add up where equal copies meet. For the fused model's function to move
as the source's did, a parameter that is stored with the factor s may take, of the step that the source would have
taken, s for Adam, whose steps have no scale, and s / c for SGD, with c what gradients are multiplied with; a K-th of
that where K blocks add up. Adafactor's steps grow with the RMS of the parameter: that factor over its growth. This is
how widths scale in muP (Yang and Hu, 2022), too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fusectl.optimizer.carry import gradient_scale, rms_ratio
from fusectl.optimizer.state import Steps
from fusectl.rules.fusion import Fusion, stored_scale


SCHEMA = "fusectl/lr-table/1"
# What the factors do not survive: T5X's Adafactor with global_norm_clip_threshold leaves the trajectory at the second
# step, by 3e-4, where it agrees to 4e-7 without.
CLIPPED = "clipped by a global norm, which the grown model has another of"


@dataclass(frozen=True, slots=True)
class Rate:
    """A kind of parameter, and what its learning rate is to be multiplied with under each optimizer."""

    kind: str
    sgd: float
    adam: float
    # None where Adafactor's steps, which grow with the RMS of the parameter, do not grow by a factor.
    adafactor: float | None
    # And its gradients, and with them Adam's epsilon.
    gradient: float


def rates(fusion: Fusion) -> Mapping[str, Rate]:
    """The Rate of every parameter of K equal copies; none where the weights differ, and no one rate fits a tensor."""
    if len(set(fusion.weights)) > 1:
        return {}
    return {name: _rate(fusion, name) for name in fusion.tree.shapes}


def _rate(fusion: Fusion, parameter: str) -> Rate:
    row, grown = fusion.tree.rows[parameter], fusion.widths.keys()
    reads, writes = bool(row.spec.inputs & grown), bool(row.spec.outputs & grown)
    scale = stored_scale(fusion, row, 0)
    before_head = "norm before the head" if row.is_norm else "bias before the head"
    other = before_head if row.before_head and scale != 1.0 else "embedding" if scale != 1.0 else "other"
    kind = "kernel" if reads and writes else "head" if reads else other if writes else "shared"
    add_up = fusion.copies if reads and writes else 1
    adam = scale / add_up
    gradient = gradient_scale(fusion, parameter, 0)
    wider = rms_ratio(fusion, parameter)
    return Rate(kind, adam / gradient, adam, None if math.isnan(wider) else adam / wider, gradient)


def table(found: Mapping[str, Rate]) -> dict[str, Any]:
    """The rates as JSON: the factors of each kind, and the kind of each parameter, as labels for optax."""
    kinds = {rate.kind: rate for rate in found.values()}
    return {
        "schema": SCHEMA,
        "factors": {kind: {k: v for k, v in asdict(rate).items() if k != "kind"} for kind, rate in kinds.items()},
        "labels": {name: rate.kind for name, rate in found.items()},
    }


def module(found: Mapping[str, Rate]) -> str:
    """The rates as a Python module for trainers: optimizers whose updates are multiplied, their states as they were."""
    as_json = table(found)
    kinds = [(kind, each["adam"], each["adafactor"]) for kind, each in as_json["factors"].items()]
    factors = "".join(f"    {kind!r}: {{'adam': {a!r}, 'adafactor': {f!r}}},\n" for kind, a, f in kinds)
    labels = "".join(f"    {name!r}: {kind!r},\n" for name, kind in as_json["labels"].items())
    return _MODULE.replace("{clipped}", CLIPPED).replace("{factors}", factors).replace("{labels}", labels)


# It stands beside a training job, which need not have fusectl. T5X hands every parameter's path to its own optimizers
# (t5x/adafactor.py, apply_param_gradient); those of optax see the tree.
_MODULE = '''"""Learning rates with which a grown model moves as the small one did; written by fusectl --lr-table.

The optimizers' states are those that they have without it, so that a checkpoint's is restored as it is. It is exact, to
rounding, unless gradients are {clipped}.

T5X, with this file on the path as grown_rates.py: a gin file of its own, after the small model's, says

    from __gin__ import dynamic_registration
    import grown_rates
    from t5x import adafactor
    OPTIMIZER = @grown_rates.Adafactor()
    grown_rates.Adafactor:
      decay_rate = 0.8
      step_offset = 0
      logical_factor_rules = @adafactor.standard_logical_factor_rules()

The three are what T5X's base.gin binds of adafactor.Adafactor, whose bindings are no longer in force; what else the
small model's gin files bind of it, such as beta1 and factored, is to be repeated with them.

optax, in T5X or in a loop of one's own: `rescaled(optax.adamw(...))` stands for `optax.adamw(...)`.
"""

# By kind of parameter, what the learning rate is multiplied with.
FACTORS = {
{factors}}
LABELS = {
{labels}}


def factor(path, optimizer):
    """The factor of a parameter, whose path may start with `target/` or `params/`."""
    for prefix in ("", "target/", "params/params/", "params/"):
        if path.startswith(prefix) and path[len(prefix) :] in LABELS:
            return FACTORS[LABELS[path[len(prefix) :]]][optimizer]
    raise KeyError(f"{path}: no parameter of the checkpoint that this was written for")


def rescaled(transformation):
    """One of optax's transformations, such as adamw, each of its updates times its parameter's factor.

    Weight decay stays as it is: it takes the same share of all blocks. What it adds is told by parameters of zero.
    """
    import jax
    import optax

    transformation = optax.with_extra_args_support(transformation)

    def update(updates, state, params=None, **more):
        whole, after = transformation.update(updates, state, params, **more)
        nothing = None if params is None else jax.tree.map(jax.numpy.zeros_like, params)
        steps, _ = transformation.update(updates, state, nothing, **more)

        def times(path, both, step):
            names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
            return both + (factor("/".join(names), "adam") - 1.0) * step

        return jax.tree_util.tree_map_with_path(times, whole, steps), after

    return optax.GradientTransformationExtraArgs(transformation.init, update)


def Adafactor(*args, **kwargs):
    """T5X's Adafactor, each parameter's learning rate times its factor."""
    from t5x import adafactor

    class Rescaled(adafactor.Adafactor):
        def apply_param_gradient(self, step, hyper_params, param, state, grad, path):
            own = hyper_params.replace(learning_rate=hyper_params.learning_rate * factor(path, "adafactor"))
            return super().apply_param_gradient(step, own, param, state, grad, path)

    return Rescaled(*args, **kwargs)
'''


def in_words(found: Mapping[str, Rate], steps: Steps | None) -> str | None:
    """The factors for an optimizer whose steps scale so, in a line; None where there are none, or nothing changes."""
    if steps is None:
        return None
    by_kind = {rate.kind: float(factor) for rate in found.values() if (factor := getattr(rate, steps)) is not None}
    changed = [f"{kind} x {factor:.4g}" for kind, factor in by_kind.items() if not math.isclose(factor, 1.0)]
    return ", ".join(changed) or None
