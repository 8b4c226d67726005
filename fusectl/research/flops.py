"""The floating point operations of a training step, counted from a family's table.

A kernel multiplies and adds once for each of its values and each token that passes it: two operations forwards, and
twice as many backwards, for its inputs' gradient and its own. Which tokens pass it follows from where it stands:

    the encoder's kernels, and the keys and values of attention to the encoder     the inputs
    the decoder's kernels and the head, tied or not                                the targets
    tables that are looked up in                                                   none

To these come attention's products, of queries with keys and of weights with values, which grow with the square of the
lengths (Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022, appendix B). They are counted in full, as trainers
compute them: masks and windows leave nothing out. What works value by value (norms, activations, softmax) and the
optimizer are not counted; XLA counts them, and with them some percent more, the fewer the wider the model. Looking up
costs nothing here; T5X does it as a product with one-hot rows, four operations for each value of the table and token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fusectl.errors import Incompatible, UsageError
from fusectl.families.recognized import Recognized
from fusectl.families.table import ENCODER, Row, stack_of


# Two forwards, and four backwards.
FLOPS_PER_WEIGHT = 6
# Axes of tables that are looked up in.
LOOKED_UP = frozenset({"vocab", "relpos_buckets"})
# The roles of queries, and whose keys they meet where these are not their own tokens'.
_ATTENTIONS = {"query": None, "cross_query": "inputs"}


def flops_per_step(tree: Recognized, *, batch: int, length: int, target_length: int | None = None) -> float:
    """The floating point operations of one step, forwards and backwards, on `batch` rows.

    Of an encoder-decoder `length` is that of the inputs and `target_length` that of the targets, in tokens; a decoder
    has rows of `length` alone. Raises UsageError for lengths that are not a model's, Incompatible for a table that does
    not say which kernels attention is made of.
    """
    if (ENCODER in tree.depths) != (target_length is not None):
        raise UsageError(
            "an encoder-decoder has rows of inputs and of targets, a decoder one",
            hint="a target length for an encoder-decoder, none for a decoder",
        )
    lengths = {"inputs": length, "targets": length if target_length is None else target_length}
    if not any(role in row.roles for row in tree.rows.values() for role in _ATTENTIONS):
        raise Incompatible(
            f"{tree.family.name}: no row of its table has the role query: its attention cannot be counted",
            hint="role = … in the table, or the operations of a step from elsewhere",
        )
    counted = sum(
        weights * lengths[_passed_by(role, name)]
        for name, row in tree.rows.items()
        for role, weights in _kernels(row, tree.shapes[name])
    )
    if tree.family.tied:
        counted += tree.sizes["vocab"] * tree.sizes["embed"] * lengths["targets"]
    attended = sum(_attended(tree, name, row, lengths) for name, row in tree.rows.items())
    return float(FLOPS_PER_WEIGHT * batch * (counted + attended))


def _kernels(row: Row, shape: tuple[int, ...]) -> list[tuple[str, int]]:
    """The kernels that a tensor holds, each by its role with the number of its values; none of what is no kernel."""
    if not (row.spec.inputs and row.spec.outputs) or row.spec.inputs & LOOKED_UP:
        return []
    roles = row.roles or ("",)
    return [(role, math.prod(shape) // len(roles)) for role in roles]


def _passed_by(role: str, name: str) -> str:
    """The tokens that pass a kernel."""
    of_inputs = stack_of(name) == ENCODER or role in {"cross_key", "cross_value"}
    return "inputs" if of_inputs else "targets"


def _attended(tree: Recognized, name: str, row: Row, lengths: Mapping[str, int]) -> int:
    """The multiplications of attention's two products in all layers that a tensor of queries is of."""
    found = 0
    for role, weights in _kernels(row, tree.shapes[name]):
        if role in _ATTENTIONS:
            tokens = _passed_by(role, name)
            # Each query meets every key of its row, so that attention costs the square of the length where kernels cost
            # the length: it counts for little in wide models and for much in narrow ones.
            keys = _ATTENTIONS[role] or tokens
            # Heads times head_dim, summed over the layers.
            width = weights // tree.sizes["embed"]
            found += 2 * width * lengths[tokens] * lengths[keys]
    return found
