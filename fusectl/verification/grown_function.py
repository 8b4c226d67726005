"""The native level of a grown checkpoint: its logits against those of the source, each model run by itself.

Two models of different depths have no stages in common, so that the logits of both are kept: what memory the tokens
take is the caller's to choose.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from fusectl.families.kinds import Norm
from fusectl.families.recognized import Recognized
from fusectl.formats.record import Record
from fusectl.formats.tree import Checkpoint
from fusectl.formats.zarr import epsilon
from fusectl.networks.run import Model, Shelf, head_of, plan_passes, run_stages, twin_of
from fusectl.networks.tokens import Tokens
from fusectl.system.threads import Progress
from fusectl.verbs import Mapped
from fusectl.verification.function import UNITS_AS_STORED, UNITS_PER_LAYER, capped
from fusectl.verification.grown import Grown
from fusectl.verification.logits import LogitsComparison
from fusectl.verification.report import FunctionResult
from fusectl.verification.settings import Settings


Array = npt.NDArray[Any]


def check_grown_function(
    grown: Grown, record: Record, tokens: Tokens, settings: Settings, progress: Progress
) -> tuple[FunctionResult, str, tuple[str, ...]]:
    """The comparison of a grown model's logits with its source's, how the passes were run, and the losses in words, if
    the tokens are somebody's and not random.

    It is a claim to hold where the growth keeps the function, and a distance to report where it does not. Raises
    NotEnoughSpace when not even one layer of a model fits into the budget.
    """
    found, how = _logits(grown.fused, grown.tree, record, tokens, settings, progress)
    expected, _ = _logits(grown.source, grown.source_tree, record, tokens, settings, progress)
    comparison = LogitsComparison(head_of(grown.tree))
    comparison.add(tokens, found, expected)
    limit, limit_says = None, ""
    # What rounding all weights to a narrower dtype does to a function has no bound worth the name.
    if grown.keeps_function and not grown.narrowed:
        layers, largest = 1 + sum(grown.tree.depths.values()), comparison.reference_max_abs
        unit = float(np.finfo(settings.precision).eps)
        relative = unit * UNITS_PER_LAYER[settings.precision] * layers
        limit_says = f"{UNITS_PER_LAYER[settings.precision]} x {unit:.1e} ({settings.precision}) x {layers} layers"
        if isinstance(grown.made, Mapped):
            # What an operator multiplies is rounded anew.
            stored = max({grown.fused.leaves[grown.tree.full(name)].dtype for name in grown.tree.shapes}, key=epsilon)
            relative += epsilon(stored) * UNITS_AS_STORED * math.sqrt(layers)
            as_stored = f"{UNITS_AS_STORED} x {epsilon(stored):.1e} ({stored} as stored) x sqrt({layers})"
            limit_says = f"({limit_says} + {as_stored})"
        limit, limit_says = relative * largest, f"{limit_says} x the largest logit {largest:.3g}"
    says = "against the model that it was grown from"
    result = comparison.result(limit, limit_says, says, None, settings.max_native_rms)
    if settings.tokens is None:
        return result, how, ()
    own, before = (_loss(each, tokens) for each in (found, expected))
    said = f"loss on these tokens, in nats for each: {own:.4f}; of the model that it was grown from, {before:.4f}"
    return result, how, (said,)


def _loss(logits: Array, tokens: Tokens) -> float:
    """The cross-entropy of logits (compared positions, vocab), in nats for a token."""
    largest = logits.max(axis=-1, keepdims=True)
    log_total = np.log(np.exp(logits - largest).sum(axis=-1)) + largest[:, 0]
    of_targets = np.take_along_axis(logits, tokens.targets[tokens.compared][:, None], axis=-1)[:, 0]
    return float(np.mean(log_total - of_targets))


def _logits(
    checkpoint: Checkpoint,
    tree: Recognized,
    record: Record,
    tokens: Tokens,
    settings: Settings,
    progress: Progress,
) -> tuple[Array, str]:
    """The logits (compared positions, vocab) of one model, and how it was run."""
    shelf, weights = Shelf(settings.threads), (checkpoint, tree)
    groups = record.norm_groups if record.norm == Norm.PROPERTY else (tree.sizes["embed"],)
    parts: dict[int, list[Array]] = {}
    with jax.enable_x64(True):
        passes = plan_passes(
            weights,
            [],
            tokens,
            models=1,
            precision=settings.precision,
            budget_bytes=settings.max_memory_bytes,
            layered=settings.layered,
        )
        config = twin_of(tree).config_of(tree, groups, settings.precision, accumulate="float64")
        model = Model("native", config, shelf.of(checkpoint), tapped=False)
        for outcome in run_stages(passes, [model], [weights], shelf, settings.precision, progress):
            if outcome.logits:
                logits = capped(outcome.logits["native"][outcome.tokens.compared], tree.network.logits_soft_cap)
                parts.setdefault(outcome.tokens.first_row, []).append(logits)
    how = f"{'layer by layer' if passes.layered else 'all layers at once'}, in about {passes.needed_bytes / 2**20:,.0f}"
    return np.concatenate([np.concatenate(parts[row], axis=-1) for row in sorted(parts)]), f"{how} MiB"
