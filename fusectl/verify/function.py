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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from fusectl.archs import Recognized
from fusectl.archs.twin import Part, Tap
from fusectl.errors import NotEnoughSpace
from fusectl.formats.tree import Checkpoint
from fusectl.parallel import Progress
from fusectl.tokens import Tokens
from fusectl.verify.blocks import Blocks, epsilon, within_rounding
from fusectl.verify.claim import Claim
from fusectl.verify.forward import Model, Outcome, Passes, Shelf, default_budget_bytes, plan_passes, run_stages, twin_of
from fusectl.verify.report import Difference, FunctionResult, TraceRow


Array = npt.NDArray[Any]

# Units in the last place that one layer may cost, relative to the largest logit. float64 has bits to spare: loose in
# units, it is still a million times as tight in value.
UNITS_PER_LAYER = {"float32": 16, "float64": 512}
UNITS_AS_STORED = 4
# T5's epsilon in a norm; a residual stream that was rescaled needs it rescaled, too, to keep its function exactly.
NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class FunctionSettings:
    """How to run the forward passes: which levels, in which precision, within which memory; a trace beside them.

    `budget_bytes` None is half of the free memory; `layered` None chooses by it.
    """

    algebra: bool
    native: bool
    precision: str
    jobs: int
    budget_bytes: int | None = None
    layered: bool | None = None
    trace: bool = False
    max_native_rms: float | None = None


@dataclass(frozen=True)
class Function:
    """The results of the levels that ran, the trace, and how the passes were run."""

    algebra: FunctionResult | None
    native: FunctionResult | None
    trace: tuple[TraceRow, ...]
    passes: str


def check_function(claim: Claim, tokens: Tokens, settings: FunctionSettings, progress: Progress) -> Function:
    """Runs the sources and the fused model on the tokens and compares them.

    Raises NotEnoughSpace when not even one layer of them fits into the budget.
    """
    fused, others = (claim.fused, claim.tree), [(claim.sources[i], claim.trees[i]) for i in claim.distinct]
    passes = fitting_passes(fused, others, tokens, settings.precision, settings.budget_bytes, settings.layered)
    shelf = Shelf(settings.jobs)
    with jax.enable_x64(True):
        comparison = _Comparison(claim, settings, shelf, passes)
        models, checkpoints = comparison.models(), [fused, *others]
        for outcome in run_stages(
            passes.stages, models, checkpoints, passes.batches, shelf, settings.precision, progress
        ):
            comparison.add(outcome)
    return comparison.function()


def fitting_passes(
    widest: tuple[Checkpoint, Recognized],
    others: list[tuple[Checkpoint, Recognized]],
    tokens: Tokens,
    precision: str,
    budget_bytes: int | None,
    layered: bool | None,
) -> Passes:
    """The Passes of models within a budget, by default half of the free memory; raises NotEnoughSpace if none fits."""
    budget = default_budget_bytes() if budget_bytes is None else budget_bytes
    passes = plan_passes(widest, others, tokens, precision=precision, budget_bytes=budget, layered=layered)
    if passes.needed_bytes > budget:
        what = "one layer of all models" if passes.layered else "all models"
        raise NotEnoughSpace(
            f"the forward passes hold {what} in memory",
            details=(f"about {passes.needed_bytes:,} bytes needed, {budget:,} given",),
            hint="a larger --max-memory; --levels files,weights checks the rest",
        )
    return passes


class _Comparison:
    """Which models are run, and what is made of their outcomes, stage by stage."""

    def __init__(self, claim: Claim, settings: FunctionSettings, shelf: Shelf, passes: Passes) -> None:
        self._claim = claim
        self._settings = settings
        self._shelf = shelf
        self._passes = passes
        fill, self_fused = claim.record.fill.kind, claim.record.self_fused
        self._noise_shifts = fill == "gaussian" or (fill == "antisymmetric" and not self_fused)
        self._rounded = _rounded(claim)
        index = {id(claim.sources[i]): f"source {i}" for i in claim.distinct}
        self._names = [index[id(source)] for source in claim.sources]
        regrouped = any(len(groups) > 1 for groups in claim.source_groups)
        self._plain_names = [f"plain {n}" for n in self._names] if regrouped and self._one_norm else self._names
        self._logits: dict[str, LogitsComparison] = {}
        self._trace: dict[str, _NormSums] = {}
        self._first: Difference | None = None

    def models(self) -> list[Model]:
        """The models to run: every source once, the fused one with a norm per source, as stored, and as it trains."""
        claim, settings = self._claim, self._settings
        record, tree, stored = claim.record, claim.tree, self._shelf.of(claim.fused)
        found = {
            name: self._model(name, claim.trees[i], claim.source_groups[i], self._shelf.of(claim.sources[i]))
            for i, name in enumerate(self._names)
        }
        if settings.native:
            for i, name in enumerate(self._plain_names):
                if name not in found:
                    width = (claim.trees[i].sizes["embed"],)
                    found[name] = self._model(name, claim.trees[i], width, self._shelf.of(claim.sources[i]))
        if settings.algebra:
            epsilons = tuple(
                NORM_EPSILON * scale**2
                for scale, groups in zip(record.residual_scales, claim.source_groups, strict=True)
                for _ in groups
            )
            rescaled = any(scale != 1.0 for scale in record.residual_scales)
            values = self._as_ensemble if self._rounded or self._noise_shifts else stored
            found["algebra"] = self._model("algebra", tree, record.norm_groups, values, epsilons if rescaled else ())
            if self._rounded or rescaled:
                found["stored"] = self._model("stored", tree, record.norm_groups, stored)
        if settings.native or settings.trace:
            groups = (tree.sizes["embed"],) if self._one_norm else record.norm_groups
            found["native"] = self._model("native", tree, groups, stored)
        return list(found.values())

    def add(self, outcome: Outcome) -> None:
        """Compares what one stage made of one batch."""
        tokens = self._passes.batches[outcome.batch]
        if "algebra" in outcome.taps:
            self._add_taps(outcome, tokens)
        if self._settings.trace:
            self._add_norms(outcome, tokens)
        if outcome.logits:
            self._add_logits(outcome, tokens)

    def function(self) -> Function:
        """The results, when all outcomes have been added."""
        algebra = native = None
        stored = self._logits["stored"].max_abs if "stored" in self._logits else None
        if "algebra" in self._logits:
            noise = ", noise taken out" if self._noise_shifts else ""
            algebra = self._result("algebra", exact=True, says=f"a norm per source{noise}", stored=stored)
        if self._settings.native:
            # One norm does not mix copies of one model, and antisymmetric noise cancels between them.
            exact = (self._claim.record.self_fused or not self._one_norm) and not self._noise_shifts
            norm = "one norm" if self._one_norm else "a norm per source"
            native = self._result("native", exact=exact, says=f"{norm}, as it trains, noise in place", stored=None)
            if self._settings.max_native_rms is not None:
                native = _held_to(native, self._settings.max_native_rms)
        rows = tuple(sums.row(name) for name, sums in self._trace.items())
        return Function(algebra, native, rows, self._says())

    @property
    def _one_norm(self) -> bool:
        return self._claim.record.norm == "rule"

    def _model(
        self,
        name: str,
        tree: Recognized,
        groups: tuple[int, ...],
        values: Any,
        epsilons: tuple[float, ...] = (),
    ) -> Model:
        # Widening a model changes the order of summation, which must not show: sums are accumulated in float64.
        config = twin_of(tree).config_of(
            tree, groups, self._settings.precision, norm_epsilons=epsilons, accumulate="float64"
        )
        return Model(name, config, values)

    def _as_ensemble(self, part: Part) -> Array:
        """The fused parameters whose function the algebra is about.

        Shifting noise is taken out, and the rounding of stored values undone where they are correctly rounded: a
        misplaced value is not, and stays.
        """
        blocks = Blocks(self._claim.tree.rows[part.name], self._claim.record)
        stored = self._shelf.of(self._claim.fused)(part)
        values = stored.astype(np.float64)
        for i in blocks.sources:
            at = blocks.own(i)
            source = self._shelf.of(self._claim.sources[i])(part)
            taken_off = [stored[gap] for gap in blocks.takes_noise_off(i)]
            exact = blocks.exact(i, source, taken_off, stored.dtype)
            right = within_rounding(stored[at], exact)
            if self._noise_shifts:
                exact = blocks.exact(i, source, [], stored.dtype)
                values[at] += sum(noise.astype(np.float64) for noise in taken_off)
            values[at] = np.where(right, exact, values[at])
        if self._noise_shifts:
            for _, _, at in blocks.gaps():
                values[at] = 0.0
        return values

    def _add_logits(self, outcome: Outcome, tokens: Tokens) -> None:
        weights = self._claim.record.weights
        wanted = tokens.compared
        for name, sources in (("algebra", self._names), ("stored", self._names), ("native", self._plain_names)):
            if name in outcome.logits and (name != "native" or self._settings.native):
                mean = sum(w * outcome.logits[n][wanted] for w, n in zip(weights, sources, strict=True))
                comparison = self._logits.setdefault(name, LogitsComparison(len(self._passes.batches)))
                comparison.add(outcome.batch, wanted, outcome.logits[name][wanted], np.asarray(mean))

    def _add_taps(self, outcome: Outcome, tokens: Tokens) -> None:
        """Looks for the first module whose output leaves that of the sources by more than rounding."""
        if self._first is not None:
            return
        for k, tap in enumerate(outcome.taps["algebra"]):
            found = np.asarray(tap.outputs, np.float64)
            expected = self._side_by_side(found.shape, [outcome.taps[name][k] for name in self._names])
            off = np.abs(found - expected)
            mask = _mask(tap.positions, tokens)
            if mask is not None:
                off[~mask] = 0.0
            limit = self._relative(as_stored=False) * float(np.abs(expected).max(initial=0.0))
            if not off.max(initial=0.0) <= limit:
                # The first position, not the worst: of a NaN and its neighbours, too.
                at = tuple(int(i) for i in np.argwhere(~(off <= limit))[0])
                self._first = Difference(tap.parameter, at, float(found[at]), float(expected[at]))
                return

    def _add_norms(self, outcome: Outcome, tokens: Tokens) -> None:
        record = self._claim.record
        for k, tap in enumerate(outcome.taps["native"]):
            if tap.inputs is None:
                continue
            taps = [outcome.taps[name][k] for name in self._names]
            streams = [np.asarray(t.inputs, np.float64) * c for t, c in zip(taps, record.residual_scales, strict=True)]
            mask = _mask(tap.positions, tokens)
            expected = np.concatenate(streams, axis=-1)[mask]
            native = np.asarray(tap.inputs, np.float64)[mask]
            algebra = (
                np.asarray(outcome.taps["algebra"][k].inputs, np.float64)[mask] if "algebra" in outcome.taps else None
            )
            name = tap.parameter.rsplit("/", 1)[0]
            sums = self._trace.setdefault(name, _NormSums(record.norm_groups))
            sums.add(expected, native, algebra)

    def _side_by_side(self, shape: tuple[int, ...], taps: list[Tap]) -> Array:
        """What the sources' modules make of it, as it stands in the fused model: side by side along the axis that has
        grown, or summed up where their streams meet; each times the factor that its parameter was stored with.
        """
        row = taps[0].row
        assert row is not None
        blocks = Blocks(row, self._claim.record)
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

    def _tolerance(self, largest: float, *, as_stored: bool) -> tuple[float, str]:
        """What rounding may cost, and where that comes from: the dtypes, the depth, K.

        The units are those of the computation, and of the stored dtype where its rounding is part of the comparison.
        """
        precision, layers = self._settings.precision, self._layers
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
    def _coarsest(self) -> str:
        dtypes = {self._claim.fused.leaves[self._claim.tree.full(name)].dtype for name in self._claim.tree.shapes}
        return max(dtypes, key=epsilon)

    def _result(self, name: str, *, exact: bool, says: str, stored: float | None) -> FunctionResult:
        logits = self._logits[name]
        limit, limit_says = None, ""
        if exact:
            # What storing has rounded is undone in the algebra, and part of what trains.
            limit, limit_says = self._tolerance(logits.reference_max_abs, as_stored=name == "native")
        result = logits.result(limit, limit_says, says, stored)
        if result.passed is False and name == "algebra":
            return replace(result, first_difference=self._first or logits.difference(limit))
        return result

    def _says(self) -> str:
        passes = self._passes
        how = "layer by layer" if passes.layered else "all layers at once"
        rows = f", {len(passes.batches)} batches" if len(passes.batches) > 1 else ""
        return f"{how}{rows}, about {passes.needed_bytes / 2**20:,.0f} MiB of parameters at a time"


class LogitsComparison:
    """Logits against a reference, in parts of the vocab and in batches: sums that are added up as the parts come."""

    def __init__(self, batches: int) -> None:
        self._by_batch: list[_Softmax | None] = [None] * batches
        self._squares = self._reference_squares = 0.0
        self._count = 0
        self.max_abs = 0.0
        self.reference_max_abs = 0.0
        self._worst: Difference | None = None

    def add(self, batch: int, wanted: npt.NDArray[np.bool_], got: Array, reference: Array) -> None:
        """Counts in the logits (positions, part of the vocab) of the wanted positions of a batch; parts in order."""
        softmax = self._by_batch[batch]
        if softmax is None:
            softmax = self._by_batch[batch] = _Softmax(len(got))
        off = np.abs(got - reference)
        if off.size:
            worst = float(off.max())
            # A NaN is never below anything, and stays.
            if not worst <= self.max_abs:
                position, token = (int(i) for i in np.unravel_index(int(off.argmax()), off.shape))
                row, at = (int(i) for i in np.argwhere(wanted)[position])
                where = (row, at, softmax.seen + token)
                self._worst = Difference(
                    "logits/", where, float(got[position, token]), float(reference[position, token])
                )
            self.max_abs = float(np.maximum(self.max_abs, worst))
            self.reference_max_abs = float(np.maximum(self.reference_max_abs, np.abs(reference).max()))
        self._squares += float(np.sum(off**2))
        self._reference_squares += float(np.sum(reference**2))
        self._count += off.size
        softmax.add(got, reference)

    def difference(self, limit: float | None) -> Difference | None:
        """The position at which the logits are furthest apart, if they are further than the limit."""
        return self._worst if limit is not None and not self.max_abs <= limit else None

    def result(self, tolerance: float | None, tolerance_says: str, says: str, stored: float | None) -> FunctionResult:
        """The comparison of all that was added."""
        batches = [softmax for softmax in self._by_batch if softmax is not None]
        rms, reference_rms = (math.sqrt(s / self._count) for s in (self._squares, self._reference_squares))
        kl = np.concatenate([softmax.kl for softmax in batches])
        return FunctionResult(
            # A NaN is never below the tolerance.
            passed=None if tolerance is None else bool(self.max_abs <= tolerance),
            max_abs=self.max_abs,
            rms=rms,
            relative_rms=rms / reference_rms if reference_rms else math.nan,
            kl=float(np.maximum(0.0, np.mean(kl))),
            top1_agreement=float(np.mean(np.concatenate([softmax.agree for softmax in batches]))),
            tolerance=tolerance,
            tolerance_says=tolerance_says,
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
        self.argmax = np.where(largest > self._largest, part.argmax(axis=-1) + offset, self.argmax)
        shrink = np.exp(self._largest - largest)
        weights = np.exp(part - largest[:, None])
        self.total = self.total * shrink + weights.sum(axis=-1)
        self._largest = largest
        return shrink, weights

    @property
    def value(self) -> Array:
        return np.asarray(self._largest + np.log(self.total))


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


def _rounded(claim: Claim) -> bool:
    """Whether storing cost precision that the comparison can see: values were computed, or cast."""
    record, first = claim.record, claim.sources[0]
    scales = [Blocks(row, record).scale(i) for row in claim.tree.rows.values() for i in range(len(record.weights))]
    computed = record.fill.kind == "antisymmetric" or any(math.frexp(scale)[0] != 0.5 for scale in scales)
    cast = any(
        claim.fused.leaves[claim.tree.full(name)].dtype != first.leaves[claim.trees[0].full(name)].dtype
        for name in claim.tree.shapes
    )
    return cast or computed


def _held_to(result: FunctionResult, max_rms: float) -> FunctionResult:
    return replace(result, passed=result.passed is not False and bool(result.rms <= max_rms))


def _mask(positions: str, tokens: Tokens) -> npt.NDArray[np.bool_] | None:
    """The positions that are no padding: rounding alone decides what stands at the others."""
    if positions == "encoder":
        return np.asarray(tokens.encoder > 0)
    return tokens.compared if positions == "decoder" else None


def stream_rms(
    claims: list[tuple[Checkpoint, Recognized, tuple[int, ...]]],
    tokens: Tokens,
    *,
    jobs: int,
    budget_bytes: int | None,
    progress: Progress,
) -> Iterator[Mapping[str, float]]:
    """For each model, with its norm groups, the rms of the residual stream that reaches each of its norms."""
    checkpoints = [(checkpoint, tree) for checkpoint, tree, _ in claims]
    widest = max(checkpoints, key=lambda each: each[1].parameters)
    passes = fitting_passes(
        widest, [each for each in checkpoints if each is not widest], tokens, "float32", budget_bytes, None
    )
    shelf, squares, counts = Shelf(jobs), [dict[str, float]() for _ in claims], dict[str, int]()
    with jax.enable_x64(True):
        models = [
            Model(str(i), twin_of(tree).config_of(tree, groups, "float32", accumulate="float64"), shelf.of(checkpoint))
            for i, (checkpoint, tree, groups) in enumerate(claims)
        ]
        outcomes = run_stages(passes.stages, models, checkpoints, passes.batches, shelf, "float32", progress)
        for outcome in outcomes:
            for i, sums in enumerate(squares):
                for tap in outcome.taps[str(i)]:
                    mask = _mask(tap.positions, passes.batches[outcome.batch])
                    if tap.inputs is not None and mask is not None:
                        stream = np.asarray(tap.inputs, np.float64)[mask]
                        sums[tap.parameter] = sums.get(tap.parameter, 0.0) + float(np.mean(stream**2, axis=-1).sum())
                        counts[f"{i}/{tap.parameter}"] = counts.get(f"{i}/{tap.parameter}", 0) + len(stream)
    for i, sums in enumerate(squares):
        yield {name: math.sqrt(total / counts[f"{i}/{name}"]) for name, total in sums.items()}
