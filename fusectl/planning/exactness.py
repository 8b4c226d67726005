"""How exactly a fused model is going to compute the mean of its sources' logits, and what it owes to which tensor.

    exact                           to rounding in float32, in the network that the trainer has
    exact with a norm per source    in that network with a norm for each source; its one norm over all of them deviates
    approximate                     in neither; the reason says by what

What cannot be fused at all is refused before there is a plan, with its reason (rules/fusion.py,
families/unsupported.py). verify measures how far the last two are from the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fusectl.families.kinds import Norm
from fusectl.families.table import Row
from fusectl.formats.record import Record
from fusectl.formats.zarr import epsilon
from fusectl.layout.fill import FillKind
from fusectl.rules.fusion import Fusion, noisy, stored_offset, stored_scale


EXACT, GROUPED, APPROXIMATE = "exact", "exact with a norm per source", "approximate"
KINDS = (EXACT, GROUPED, APPROXIMATE)


@dataclass(frozen=True, slots=True)
class Exactness:
    """One of KINDS, and why it is not the first of them."""

    kind: str = EXACT
    because: tuple[str, ...] = ()


def of_tensor(fusion: Fusion, record: Record, parameter: str, dtype: str, *, narrowed: bool) -> Exactness:
    """That of a parameter that is stored in a dtype, to which it may have been `narrowed`."""
    reasons = []
    row, fill, shared = fusion.tree.rows[parameter], record.fill, fusion.is_shared(parameter)
    if (
        noisy(fusion, row)
        and fill.kind is not FillKind.ZEROS
        and not (fill.kind is FillKind.ANTISYMMETRIC and record.self_fused)
    ):
        reasons.append(f"{fill.kind} noise of {fill.noise_scale:g} times the kernels' deviation moves the logits")
    if record.means_shared and shared:
        reasons.append("scales that all heads share are the mean of the sources'")
    if narrowed:
        reasons.append(f"parameters are rounded to {dtype}")
    elif epsilon(dtype) > epsilon("float32") and not shared and _scaled(fusion, row):
        reasons.append(f"parameters that are scaled are rounded to {dtype}; --dtype float32 keeps them")
    if reasons:
        return Exactness(APPROXIMATE, tuple(reasons))
    if row.is_norm and "embed" in row.spec.axes and not record.self_fused and record.norm == Norm.RULE:
        mixes = ["one norm over streams of different models mixes them"]
        if any(scale != 1.0 for scale in record.residual_scales):
            mixes.append("streams that were rescaled want their norms' epsilon rescaled, too")
        return Exactness(GROUPED, tuple(mixes))
    return Exactness()


def _scaled(fusion: Fusion, row: Row) -> bool:
    """Whether a source's values are multiplied with more than a power of two, or added to."""
    return any(
        math.frexp(stored_scale(fusion, row, i))[0] != 0.5 or stored_offset(fusion, row, i)
        for i in range(fusion.copies)
    )


def of_model(tensors: Sequence[Exactness], record: Record) -> Exactness:
    """That of the whole model: the least of its tensors', and of what its network does to logits."""
    found = list(tensors)
    cap = record.network.logits_soft_cap
    if cap is not None and not record.self_fused:
        because = f"logits are capped at {cap:g} behind their mean: it is the mean of what is capped, to third order"
        found.append(Exactness(APPROXIMATE, (because,)))
    return least(found)


def least(found: Iterable[Exactness | None]) -> Exactness:
    """The least exact of several, with the reasons of all; None is of no account.

    >>> least([Exactness(), Exactness(APPROXIMATE, ("noise",)), None])
    Exactness(kind='approximate', because=('noise',))
    """
    given = [each for each in found if each is not None]
    kind = max((each.kind for each in given), key=KINDS.index, default=EXACT)
    return Exactness(kind, tuple(dict.fromkeys(reason for each in given for reason in each.because)))
