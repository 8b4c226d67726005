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

from fusectl.transforms.carry import gradient_scale, growth
from fusectl.transforms.grow import Fusion, stored_scale


SCHEMA = "fusectl/lr-table/1"


@dataclass(frozen=True, slots=True)
class Rate:
    """A kind of parameter, and what its learning rate is to be multiplied with under each optimizer."""

    kind: str
    sgd: float
    adam: float
    adafactor: float
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
    other = "norm before the tied head" if row.tied_head else "other"
    kind = "kernel" if reads and writes else "head" if reads else other
    add_up = fusion.copies if reads and writes else 1
    adam = scale / add_up
    gradient = gradient_scale(fusion, parameter, 0)
    return Rate(kind, adam / gradient, adam, adam / growth(fusion, parameter), gradient)


def table(found: Mapping[str, Rate]) -> dict[str, Any]:
    """The rates as JSON: the factors of each kind, and the kind of each parameter, as labels for optax."""
    kinds = {rate.kind: rate for rate in found.values()}
    return {
        "schema": SCHEMA,
        "factors": {kind: {k: v for k, v in asdict(rate).items() if k != "kind"} for kind, rate in kinds.items()},
        "labels": {name: rate.kind for name, rate in found.items()},
    }


def in_words(found: Mapping[str, Rate], optimizer: str) -> str | None:
    """The factors for an optimizer in a line; None where there are none, or nothing changes."""
    by_kind = {rate.kind: float(getattr(rate, optimizer)) for rate in found.values()}
    changed = [f"{kind} x {factor:.4g}" for kind, factor in by_kind.items() if not math.isclose(factor, 1.0)]
    return ", ".join(changed) or None
