"""The algebra and native levels: forward passes of the twin, logits against the mean of the sources' logits.

Algebra asks whether the weights are in the right place, so it must hold to rounding: a norm per source, and noise that
would shift the function taken out. Native runs what the trainer will run, norm and noise as they are, and reports how
far that is from the ensemble; it is a claim where one norm does not mix the sources: for copies of one model, and where
the trainer's network has a norm per source.

Logits are compared, not labels: top-1 agreement is blind to a wrong scale. Positions whose target is padding are left
out: their attention is masked whole, so that rounding alone decides it, and no loss looks at them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, assert_never

import jax
import numpy as np
import numpy.typing as npt

from fusectl.families.kinds import Norm
from fusectl.families.recognized import Recognized
from fusectl.formats.zarr import epsilon
from fusectl.layout.fill import FillKind
from fusectl.networks.run import Model, Outcome, Passes, Shelf, head_of, plan_passes, positions, run_stages, twin_of
from fusectl.networks.stages import Part, Tap
from fusectl.networks.tokens import Tokens
from fusectl.system.threads import Progress
from fusectl.verification.blocks import within_rounding
from fusectl.verification.claim import Claim
from fusectl.verification.logits import LogitsComparison
from fusectl.verification.report import Difference, FunctionResult, TraceRow
from fusectl.verification.settings import Settings


Array = npt.NDArray[Any]

# Units in the last place that one layer may cost, relative to the largest logit. float64 has bits to spare: loose in
# units, it is still a million times as tight in value.
UNITS_PER_LAYER = {"float32": 16, "float64": 512}
UNITS_AS_STORED = 4


@dataclass(frozen=True)
class Function:
    """The results of the levels that ran, the trace, and how the passes were run."""

    algebra: FunctionResult | None
    native: FunctionResult | None
    trace: tuple[TraceRow, ...]
    passes: str


def check_function(claim: Claim, tokens: Tokens, settings: Settings, progress: Progress) -> Function:
    """Runs the sources and the fused model on the tokens and compares them.

    Raises NotEnoughSpace when not even one layer of them fits into the budget.
    """
    fused, others = (claim.fused, claim.tree), [(claim.sources[i], claim.trees[i]) for i in claim.distinct]
    shelf = Shelf(settings.threads)
    # Sums are float64's in either precision, and JAX has float64 only in this mode.
    with jax.enable_x64(True):
        comparison = _Comparison(claim, settings, shelf)
        passes = plan_passes(
            fused,
            others,
            tokens,
            models=len(comparison.models),
            precision=settings.precision,
            budget_bytes=settings.max_memory_bytes,
            layered=settings.layered,
        )
        for outcome in run_stages(passes, comparison.models, [fused, *others], shelf, settings.precision, progress):
            comparison.add(outcome)
    return comparison.function(passes)


class _Comparison:
    """Which models are run, and what is made of their outcomes, stage by stage."""

    def __init__(self, claim: Claim, settings: Settings, shelf: Shelf) -> None:
        self._claim = claim
        self._settings = settings
        self._shelf = shelf
        fill, self_fused = claim.record.fill.kind, claim.record.self_fused
        match fill:
            case FillKind.ZEROS:
                self._noise_shifts = False
            case FillKind.GAUSSIAN:
                self._noise_shifts = True
            case FillKind.ANTISYMMETRIC:
                self._noise_shifts = not self_fused
            case other:
                assert_never(other)
        self._narrowed = _narrowed(claim)
        self._rounded = self._narrowed or _computed(claim)
        index = {id(claim.sources[i]): f"source {i}" for i in claim.distinct}
        self._names = [index[id(source)] for source in claim.sources]
        regrouped = any(len(groups) > 1 for groups in claim.source_groups)
        self._plain_names = [f"plain {n}" for n in self._names] if regrouped and self._one_norm else self._names
        self._logits: dict[str, LogitsComparison] = {}
        self._trace: dict[str, _NormSums] = {}
        self._first: Difference | None = None
        self.models = self._models()

    def _models(self) -> list[Model]:
        """The models to run: every source once, the fused one with a norm per source, as stored, and as it trains."""
        claim, settings = self._claim, self._settings
        record, tree, stored = claim.record, claim.tree, self._shelf.of(claim.fused)
        found: dict[str, Model] = {}
        for i, name in enumerate(self._names):
            values = self._shelf.of(claim.sources[i])
            found[name] = self._model(name, claim.trees[i], claim.source_groups[i], values)
            if settings.runs_native and self._plain_names[i] != name:
                width = (claim.trees[i].sizes["embed"],)
                found[self._plain_names[i]] = self._model(self._plain_names[i], claim.trees[i], width, values)
        if settings.runs_algebra:
            # A residual stream that was rescaled keeps its function exactly if the epsilon of its norms is, too.
            streams = tuple(
                scale for scale, groups in zip(record.residual_scales, claim.source_groups, strict=True) for _ in groups
            )
            rescaled = any(scale != 1.0 for scale in record.residual_scales)
            values = self._as_ensemble if self._rounded or self._noise_shifts else stored
            found["algebra"] = self._model("algebra", tree, record.norm_groups, values, streams if rescaled else ())
            if self._rounded or rescaled:
                values = self._without_noise if self._noise_shifts else stored
                found["stored"] = self._model("stored", tree, record.norm_groups, values)
        if settings.runs_native or settings.trace:
            groups = (tree.sizes["embed"],) if self._one_norm else record.norm_groups
            found["native"] = self._model("native", tree, groups, stored)
        looked_at = {*self._names, "algebra", *(["native"] if settings.trace else [])}
        return [replace(model, tapped=name in looked_at) for name, model in found.items()]

    def add(self, outcome: Outcome) -> None:
        """Compares what one stage made of one batch."""
        if "algebra" in outcome.taps:
            self._add_taps(outcome)
        if "native" in outcome.taps:
            self._add_norms(outcome)
        if outcome.logits:
            self._add_logits(outcome)

    def function(self, passes: Passes) -> Function:
        """The results, when all outcomes have been added."""
        algebra = native = None
        limit: float | None
        if self._settings.runs_algebra:
            noise = ", noise taken out" if self._noise_shifts else ""
            stored = self._logits["stored"].max_abs if "stored" in self._logits else None
            limit, limit_says = self._tolerance("algebra", as_stored=False)
            says = f"a norm per source{noise}"
            if self._claim.record.means_shared:
                limit, limit_says, says = None, "", f"{says}, shared scales averaged: approximate"
            algebra = self._logits["algebra"].result(limit, limit_says, says, stored, None)
            if algebra.passed is False:
                algebra = replace(algebra, first_difference=self._first or self._logits["algebra"].worst)
        if self._settings.runs_native:
            # One norm does not mix copies of one model, and antisymmetric noise cancels between them. What rounding
            # all weights to a narrower dtype does to a function has no bound worth the name.
            coarse = self._narrowed or (self._claim.record.fill.kind is FillKind.ANTISYMMETRIC and self._is_coarse)
            mixes_models = self._one_norm or self._claim.record.network.logits_soft_cap is not None
            exact = (self._claim.record.self_fused or not mixes_models) and not (
                self._noise_shifts or coarse or self._claim.record.means_shared
            )
            limit, limit_says = self._tolerance("native", as_stored=True) if exact else (None, "")
            says = f"{'one norm' if self._one_norm else 'a norm per source'}, as it trains, noise in place"
            native = self._logits["native"].result(limit, limit_says, says, None, self._settings.max_native_rms)
        rows = tuple(sums.row(name) for name, sums in self._trace.items())
        how = "layer by layer" if passes.layered else "all layers at once"
        batches = f", in {len(passes.batches)} batches" if len(passes.batches) > 1 else ""
        return Function(algebra, native, rows, f"{how}{batches}, in about {passes.needed_bytes / 2**20:,.0f} MiB")

    @property
    def _one_norm(self) -> bool:
        return self._claim.record.norm == Norm.RULE

    def _model(
        self,
        name: str,
        tree: Recognized,
        groups: tuple[int, ...],
        values: Any,
        streams: tuple[float, ...] = (),
    ) -> Model:
        # Widening a model changes the order of summation, which must not show: sums are accumulated in float64.
        config = twin_of(tree).config_of(
            tree, groups, self._settings.precision, stream_scales=streams, accumulate="float64"
        )
        return Model(name, config, values)

    def _as_ensemble(self, part: Part) -> Array:
        """The fused parameters whose function the algebra is about.

        Shifting noise is taken out, and the rounding of stored values undone where they are correctly rounded: a
        misplaced value is not, and stays.
        """
        blocks = self._claim.blocks(self._claim.tree.rows[part.name])
        stored = self._shelf.of(self._claim.fused)(part)
        values = self._without_noise(part)
        if blocks.shared:
            return values
        for i in blocks.sources:
            at = blocks.own(i)
            source = self._shelf.of(self._claim.sources[i])(part)
            taken_off = [stored[gap] for gap in blocks.takes_noise_off(i)]
            # A head of three copies stores W / 3 in float32, off by up to 6e-8 of a value. Without undoing that, such a
            # fusion could never be verified to 1e-12.
            right = within_rounding(stored[at], blocks.exact(i, source, taken_off, stored.dtype))
            exact = blocks.exact(i, source, [] if self._noise_shifts else taken_off, stored.dtype)
            values[at] = np.where(right, exact, values[at])
        return values

    def _without_noise(self, part: Part) -> Array:
        """The fused parameters as they are stored, in float64, but for noise that would shift the function."""
        blocks = self._claim.blocks(self._claim.tree.rows[part.name])
        stored = self._shelf.of(self._claim.fused)(part)
        values = stored.astype(np.float64)
        if self._noise_shifts:
            for i in blocks.sources:
                for gap in blocks.takes_noise_off(i):
                    values[blocks.own(i)] += stored[gap].astype(np.float64)
            for _, _, at in blocks.gaps():
                values[at] = 0.0
        return values

    def _add_logits(self, outcome: Outcome) -> None:
        weights, wanted = self._claim.record.weights, outcome.tokens.compared
        for name, sources in (("algebra", self._names), ("stored", self._names), ("native", self._plain_names)):
            if name in outcome.logits and (name != "native" or self._settings.runs_native):
                # The mean of the logits is one before they are capped; what will train caps the mean.
                cap = self._claim.record.network.logits_soft_cap if name == "native" else None
                mean = sum(w * capped(outcome.logits[n][wanted], cap) for w, n in zip(weights, sources, strict=True))
                comparison = self._logits.setdefault(name, LogitsComparison(head_of(self._claim.tree)))
                comparison.add(outcome.tokens, capped(outcome.logits[name][wanted], cap), np.asarray(mean))

    def _add_taps(self, outcome: Outcome) -> None:
        """Looks for the first module whose output leaves that of the sources by more than rounding."""
        if self._first is not None:
            return
        # Taps come in the order of computation, and whatever follows a module that differs inherits the difference.
        for k, tap in enumerate(outcome.taps["algebra"]):
            found = np.asarray(tap.outputs, np.float64)
            expected = self._side_by_side(found.shape, [outcome.taps[name][k] for name in self._names])
            off = np.abs(found - expected)
            mask = positions(tap, outcome.tokens)
            if mask is not None:
                off[~mask] = 0.0
            limit = self._relative(as_stored=False) * float(np.abs(expected).max(initial=0.0))
            # A NaN is never below the limit.
            if not off.max(initial=0.0) <= limit:
                at = tuple(int(i) for i in np.argwhere(~(off <= limit))[0])
                of_batch = (at[0] + outcome.tokens.first_row, *at[1:]) if tap.positions else at
                self._first = Difference(tap.parameter, of_batch, float(found[at]), float(expected[at]))
                return

    def _add_norms(self, outcome: Outcome) -> None:
        record = self._claim.record
        for k, tap in enumerate(outcome.taps["native"]):
            if tap.inputs is None:
                continue
            mask = positions(tap, outcome.tokens)
            expected = np.concatenate(
                [
                    np.asarray(outcome.taps[name][k].inputs, np.float64)[mask] * scale
                    for name, scale in zip(self._names, record.residual_scales, strict=True)
                ],
                axis=-1,
            )
            native, algebra = (
                np.asarray(outcome.taps[name][k].inputs, np.float64)[mask] if name in outcome.taps else None
                for name in ("native", "algebra")
            )
            sums = self._trace.setdefault(tap.parameter.rsplit("/", 1)[0], _NormSums(record.norm_groups))
            sums.add(expected, np.asarray(native), algebra)

    def _side_by_side(self, shape: tuple[int, ...], taps: list[Tap]) -> Array:
        """What the sources' modules make of it, as it stands in the fused model: side by side along the axis that has
        grown, or summed up where their streams meet; each times the factor that its parameter was stored with.
        """
        row = taps[0].row
        assert row is not None
        blocks = self._claim.blocks(row)
        parts = [np.asarray(tap.outputs, np.float64) * blocks.scale(i) for i, tap in enumerate(taps)]
        grown = [axis for axis, n in enumerate(shape) if parts[0].shape[axis] != n]
        return np.concatenate(parts, axis=grown[0]) if grown else np.asarray(sum(parts))

    def _relative(self, *, as_stored: bool) -> float:
        """The rounding that is allowed, relative to the largest value."""
        precision, layers = self._settings.precision, self._layers
        relative = float(np.finfo(precision).eps) * UNITS_PER_LAYER[precision] * layers
        if as_stored and self._rounded:
            # The roundings of the weights of one layer are many and independent: they add up like a random walk.
            relative += epsilon(self._coarsest) * UNITS_AS_STORED * math.sqrt(layers)
        return relative

    def _tolerance(self, name: str, *, as_stored: bool) -> tuple[float, str]:
        """What rounding may cost, and where that comes from: the dtypes, the depth, K.

        The units are those of the computation, and of the stored dtype where its rounding is part of the comparison.
        """
        precision, layers, largest = self._settings.precision, self._layers, self._logits[name].reference_max_abs
        unit = f"{float(np.finfo(precision).eps):.1e} ({precision})"
        says = f"{UNITS_PER_LAYER[precision]} x {unit} x {layers} layers"
        if as_stored and self._rounded:
            stored = f"{epsilon(self._coarsest):.1e} ({self._coarsest} as stored)"
            says = f"({says} + {UNITS_AS_STORED} x {stored} x sqrt({layers}))"
        copies = len(self._claim.record.weights)
        says += f" x the largest logit {largest:.3g}; K = {copies} adds nothing, sums being accumulated in float64"
        return self._relative(as_stored=as_stored) * largest, says

    @property
    def _layers(self) -> int:
        return 1 + sum(self._claim.tree.depths.values())

    @property
    def _is_coarse(self) -> bool:
        """Whether parameters are stored in less than float32."""
        return epsilon(self._coarsest) > epsilon("float32")

    @property
    def _coarsest(self) -> str:
        dtypes = {self._claim.fused.leaves[self._claim.tree.full(name)].dtype for name in self._claim.tree.shapes}
        return max(dtypes, key=epsilon)


class _NormSums:
    """What reaches one norm, over all tokens: sums that make up a TraceRow."""

    def __init__(self, groups: tuple[int, ...]) -> None:
        self._groups = groups
        self._squares = np.zeros(len(groups))
        self._mixing = np.zeros(len(groups))
        self._fused = self._off = self._algebra_off = 0.0
        self._tokens = 0

    def add(self, expected: Array, native: Array, algebra: Array | None) -> None:
        """Counts in the residual streams (tokens, embed) of the sources side by side, and of the fused models."""
        squares = np.stack(
            [np.mean(group**2, axis=-1) for group in np.split(expected, np.cumsum(self._groups)[:-1], axis=-1)]
        )
        self._squares += squares.sum(axis=1)
        self._mixing += np.sqrt(squares / np.mean(expected**2, axis=-1)).sum(axis=1)
        self._fused += float(np.sum(native**2))
        self._off += float(np.sum((native - expected) ** 2))
        self._algebra_off += math.nan if algebra is None else float(np.sum((algebra - expected) ** 2))
        self._tokens += len(expected)

    def row(self, norm: str) -> TraceRow:
        width = sum(self._groups)
        whole = float(np.sum(self._squares * self._groups))
        return TraceRow(
            norm=norm,
            rms=tuple(float(x) for x in np.sqrt(self._squares / self._tokens)),
            fused_rms=math.sqrt(self._fused / self._tokens / width),
            mixing=tuple(float(x) for x in self._mixing / self._tokens),
            deviation=math.sqrt(self._off / whole),
            algebra_deviation=math.sqrt(self._algebra_off / whole),
        )


def capped(logits: Array, cap: float | None) -> Array:
    """Logits drawn into (-cap, cap) by tanh; as they are for None."""
    return logits if cap is None else np.tanh(logits / cap) * cap


def _computed(claim: Claim) -> bool:
    """Whether values were computed whose rounding the comparison can see: scaled by more than a power of two, or less
    noise.
    """
    record = claim.record
    blocks = [(claim.blocks(row), i) for row in claim.tree.rows.values() for i in range(len(record.weights))]
    # frexp's mantissa is 0.5 for powers of two alone, and multiplying by one of these rounds nothing.
    changed = any(math.frexp(each.scale(i))[0] != 0.5 or each.offset(i) for each, i in blocks)
    return record.fill.kind is FillKind.ANTISYMMETRIC or changed


def _narrowed(claim: Claim) -> bool:
    """Whether a source was cast to a dtype that holds less."""
    return any(
        epsilon(claim.fused.leaves[claim.tree.full(name)].dtype) > epsilon(source.leaves[tree.full(name)].dtype)
        for source, tree in zip(claim.sources, claim.trees, strict=True)
        for name in tree.shapes
    )
