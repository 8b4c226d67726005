"""Logits against a reference, from parts of the vocab and from batches: sums that are added up as the parts come."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.networks.tokens import Tokens
from fusectl.verification.report import Difference, FunctionResult


Array = npt.NDArray[Any]


class LogitsComparison:
    """The comparison of one model with its reference, where targets are not padding. `head` is its last parameter."""

    def __init__(self, head: str) -> None:
        self._head = head
        self._by_batch: dict[int, _Softmax] = {}
        self._squares = self._reference_squares = 0.0
        self._count = 0
        # The position at which the logits are furthest apart.
        self.worst: Difference | None = None
        self.max_abs = 0.0
        self.reference_max_abs = 0.0

    def add(self, tokens: Tokens, got: Array, reference: Array) -> None:
        """Counts in the logits (compared positions, next part of the vocab) of a batch."""
        softmax = self._by_batch.setdefault(tokens.first_row, _Softmax(len(got)))
        off = np.abs(got - reference)
        self._squares += float(np.sum(off**2))
        self._reference_squares += float(np.sum(reference**2))
        self._count += off.size
        # A NaN is never below anything; the first one is the worst.
        if off.size and not math.isnan(self.max_abs) and not off.max() <= self.max_abs:
            position, token = (int(i) for i in np.unravel_index(int(off.argmax()), off.shape))
            row, at = (int(i) for i in np.argwhere(tokens.compared)[position])
            where = (tokens.first_row + row, at, softmax.seen + token)
            self.worst = Difference(self._head, where, float(got[position, token]), float(reference[position, token]))
            self.max_abs = float(off.max())
        self.reference_max_abs = float(np.maximum(self.reference_max_abs, np.abs(reference).max(initial=0.0)))
        softmax.add(got, reference)

    def result(
        self, tolerance: float | None, tolerance_says: str, says: str, stored: float | None, max_rms: float | None
    ) -> FunctionResult:
        """The comparison of all that was added. It passes or fails only if there is a tolerance or a largest rms."""
        softmaxes = list(self._by_batch.values())
        rms, reference_rms = (math.sqrt(s / self._count) for s in (self._squares, self._reference_squares))
        kl = np.concatenate([softmax.kl for softmax in softmaxes])
        # A NaN is never below a limit, and where all logits are zero there is nothing to compare.
        held = [
            bool(found <= limit) and self.reference_max_abs > 0.0
            for found, limit in ((self.max_abs, tolerance), (rms, max_rms))
            if limit is not None
        ]
        return FunctionResult(
            passed=all(held) if held else None,
            max_abs=self.max_abs,
            rms=rms,
            relative_rms=rms / reference_rms if reference_rms else math.nan,
            # Rounding may take a divergence of zero below zero.
            kl=float(np.maximum(0.0, np.mean(kl))),
            top1_agreement=float(np.mean(np.concatenate([softmax.agree for softmax in softmaxes]))),
            tolerance=tolerance,
            tolerance_says=tolerance_says,
            max_rms=max_rms,
            reference_rms=reference_rms,
            reference_max_abs=self.reference_max_abs,
            tokens=len(kl),
            says=says,
            max_abs_as_stored=stored,
        )


class _Softmax:
    """For each position, KL(reference || got) and whether the likeliest tokens agree, from parts of the vocab."""

    def __init__(self, positions: int) -> None:
        self.seen = 0
        self._got = _LogSumExp(positions)
        self._reference = _LogSumExp(positions)
        # sum of exp(reference - its largest) * (reference - got)
        self._gain = np.zeros(positions)

    def add(self, got: Array, reference: Array) -> None:
        """Counts in the logits of the next tokens of the vocab."""
        self._got.add(got, self.seen)
        shrink, weights = self._reference.add(reference, self.seen)
        # KL = E[reference - got] - log Z of the reference + log Z of the other, the mean being over the reference's
        # softmax. Parts of the vocabulary come one by one, so that all sums are relative to the largest logit so far
        # and shrink with a new one.
        self._gain = self._gain * shrink + np.sum(weights * (reference - got), axis=-1)
        self.seen += got.shape[-1]

    @property
    def kl(self) -> Array:
        """In nats."""
        return np.asarray(self._gain / self._reference.total - self._reference.value + self._got.value)

    @property
    def agree(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self._got.argmax == self._reference.argmax)


class _LogSumExp:
    """log(sum(exp(x))) and argmax of each position, from parts."""

    def __init__(self, positions: int) -> None:
        self._largest = np.full(positions, -np.inf)
        self.total = np.zeros(positions)
        self.argmax = np.zeros(positions, np.int64)

    def add(self, part: Array, offset: int) -> tuple[Array, Array]:
        """What earlier sums shrink by, since the largest value has grown, and exp(part - largest)."""
        largest = np.maximum(self._largest, part.max(axis=-1))
        # Of equal logits the first one counts, as in np.argmax over the whole vocabulary.
        self.argmax = np.where(largest > self._largest, part.argmax(axis=-1) + offset, self.argmax)
        shrink = np.exp(self._largest - largest)
        weights = np.exp(part - largest[:, None])
        self.total = self.total * shrink + weights.sum(axis=-1)
        self._largest = largest
        return shrink, weights

    @property
    def value(self) -> Array:
        return np.asarray(self._largest + np.log(self.total))
