"""The algebra and native levels: forward passes of the twin, logits against the mean of the sources' logits.

Algebra asks whether the weights are in the right place, so it must hold to rounding: a norm per source, and noise that
would shift the function taken out. Native runs what the trainer will run, norm and noise as they are, and reports how
far that is from the ensemble; it is a claim only for copies of one model, which one norm does not mix.

Logits are compared, not labels: top-1 agreement is blind to a wrong scale. Positions whose target is padding are left
out: their attention is masked whole, so that rounding alone decides it, and no loss looks at them.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fusectl.archs import Recognized
from fusectl.errors import NotEnoughSpace
from fusectl.formats.zarr import np_dtype
from fusectl.verify.weights import FusedTensor, within_rounding


if TYPE_CHECKING:
    from fusectl.verify import Claim, FunctionResult, Settings


Array = npt.NDArray[Any]
Twin = Callable[[Array, Array, Array], Array]

# Units in the last place that one layer may cost, relative to the largest logit. float64 has bits to spare: loose in
# units, it is still a million times as tight in value.
UNITS_PER_LAYER = {"float32": 16, "float64": 512}
UNITS_AS_STORED = 4


@dataclass(frozen=True)
class Tokens:
    """A batch: encoder tokens, decoder inputs (targets shifted right by one) and targets; 0 is padding."""

    encoder: npt.NDArray[np.int32]
    decoder: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]


def random_tokens(vocab: int, batch: int, length: int, seed: int) -> Tokens:
    """Uniform tokens of a vocabulary, every other row padded at its end."""
    rng = np.random.default_rng(seed)
    encoder, targets = (rng.integers(1, vocab, (batch, length), dtype=np.int32) for _ in range(2))
    encoder[::2, length - length // 4 :] = 0
    targets[1::2, length - length // 4 :] = 0
    decoder = np.concatenate([np.zeros((batch, 1), np.int32), targets[:, :-1]], axis=1)
    return Tokens(encoder, decoder, targets)


def check_function(claim: Claim, settings: Settings) -> tuple[FunctionResult | None, FunctionResult | None]:
    """The results of the algebra and native levels, or None for the one that was not asked for."""
    import jax

    precision = "float64" if settings.x64 else "float32"
    _require_memory(claim, np_dtype(precision).itemsize)
    tokens = random_tokens(claim.tree.sizes["vocab"], settings.batch, settings.length, settings.seed)
    with jax.enable_x64(True):
        return _Comparison(claim, tokens, precision).results(settings)


class _Comparison:
    def __init__(self, claim: Claim, tokens: Tokens, precision: str) -> None:
        self._claim = claim
        self._tokens = tokens
        self._precision = precision
        self._fused = {name: claim.fused.read(claim.tree.prefix + name) for name in claim.tree.shapes}
        self._sources = [
            {name: source.read(tree.prefix + name) for name in tree.shapes} for source, tree in _distinct(claim)
        ]
        index = {id(source): i for i, (source, _) in enumerate(_distinct(claim))}
        self._place = [index[id(source)] for source in claim.sources]

    def results(self, settings: Settings) -> tuple[FunctionResult | None, FunctionResult | None]:
        claim, groups = self._claim, self._claim.record.norm_groups
        grouped = self._mean(self._source_logits(grouped=True))
        algebra = native = None
        if "algebra" in settings.levels:
            logits = self._logits(claim.tree, self._as_ensemble(), groups)
            stored = None
            if self._rounded:
                stored = float(np.abs(self._wanted(self._logits(claim.tree, self._fused, groups) - grouped)).max())
            says = "a norm per source" + (", noise taken out" if self._noise_shifts else "")
            algebra = self._compare(logits, grouped, self._tolerance(grouped, as_stored=False), says, stored)
        if "native" in settings.levels:
            plain = (
                grouped
                if all(len(g) == 1 for g in claim.source_groups)
                else self._mean(self._source_logits(grouped=False))
            )
            logits = self._logits(claim.tree, self._fused, (claim.tree.sizes["embed"],))
            # One norm does not mix copies of one model, and antisymmetric noise cancels between them.
            exact = claim.record.self_fused and not self._noise_shifts
            tolerance = self._tolerance(plain, as_stored=True) if exact else None
            native = self._compare(logits, plain, tolerance, "the trainer's norm, noise in place", None)
            if settings.max_native_rms is not None:
                native = _held_to(native, settings.max_native_rms)
        return algebra, native

    @property
    def _noise_shifts(self) -> bool:
        fill = self._claim.record.fill.kind
        return fill == "gaussian" or (fill == "antisymmetric" and not self._claim.record.self_fused)

    @property
    def _rounded(self) -> bool:
        """Whether storing cost precision that the comparison can see: values were computed, or cast."""
        record = self._claim.record
        scales = [
            FusedTensor(name, row, np.empty(0), [], record).scale(i)
            for name, row in self._claim.tree.rows.items()
            for i in range(len(record.weights))
        ]
        computed = record.fill.kind == "antisymmetric" or any(math.frexp(scale)[0] != 0.5 for scale in scales)
        cast = any(values.dtype != self._sources[0][name].dtype for name, values in self._fused.items())
        return cast or computed

    def _as_ensemble(self) -> dict[str, Array]:
        """The fused parameters whose function the algebra is about.

        Shifting noise is taken out, and the rounding of stored values undone where they are correctly rounded: a
        misplaced value is not, and stays.
        """
        parameters = {}
        for name, row in self._claim.tree.rows.items():
            sources = [self._sources[place][name] for place in self._place]
            view = FusedTensor(name, row, self._fused[name], sources, self._claim.record)
            values = self._fused[name].astype(np.float64)
            for i in range(len(sources)):
                at, exact = view.own(i), view.exact(i)
                own = np.where(within_rounding(self._fused[name][at], exact), exact, values[at])
                if self._noise_shifts and self._claim.record.fill.kind == "antisymmetric":
                    taken_off = [
                        self._fused[name][gap].astype(np.float64) for output, _, gap in view.gaps() if output == i
                    ]
                    own = own + sum(taken_off)
                values[at] = own
            if self._noise_shifts:
                for _, _, at in view.gaps():
                    values[at] = 0.0
            parameters[name] = values
        return parameters

    def _source_logits(self, *, grouped: bool) -> list[Array]:
        logits = {}
        for place, tree, groups in zip(self._place, self._claim.trees, self._claim.source_groups, strict=True):
            if place not in logits:
                widths = groups if grouped else (tree.sizes["embed"],)
                logits[place] = self._logits(tree, self._sources[place], widths)
        return [logits[place] for place in self._place]

    def _mean(self, logits: list[Array]) -> Array:
        return np.asarray(
            sum(w * x.astype(np.float64) for w, x in zip(self._claim.record.weights, logits, strict=True))
        )

    def _logits(self, tree: Recognized, parameters: Mapping[str, Array], groups: tuple[int, ...]) -> Array:
        assert tree.family.twin is not None
        module, function = tree.family.twin.split(":")
        build = getattr(importlib.import_module(module), function)
        twin: Twin = build(tree, parameters, groups, self._precision)
        return twin(self._tokens.encoder, self._tokens.decoder, self._tokens.targets).astype(np.float64)

    def _wanted(self, logits: Array) -> Array:
        return np.asarray(logits[self._tokens.targets > 0])

    def _tolerance(self, reference: Array, *, as_stored: bool) -> float:
        """What rounding may cost: units in the last place per layer, relative to the largest logit.

        The units are those of the computation, and of the stored dtype where its rounding is part of the comparison.
        """
        import ml_dtypes

        layers = 1 + sum(self._claim.tree.depths.values())
        relative = float(np.finfo(self._precision).eps) * UNITS_PER_LAYER[self._precision] * layers
        if as_stored and self._rounded:
            coarsest = max(float(ml_dtypes.finfo(values.dtype).eps) for values in self._fused.values())
            # The roundings of the weights of one layer are many and independent: they add up like a random walk.
            relative += coarsest * UNITS_AS_STORED * math.sqrt(layers)
        return relative * float(np.abs(self._wanted(reference)).max())

    def _compare(
        self, logits: Array, reference: Array, tolerance: float | None, says: str, stored: float | None
    ) -> FunctionResult:
        from fusectl.verify import FunctionResult

        got, wanted = self._wanted(logits), self._wanted(reference)
        off = got - wanted
        max_abs = float(np.abs(off).max())
        return FunctionResult(
            # A NaN is never below the tolerance.
            passed=None if tolerance is None else bool(max_abs <= tolerance),
            max_abs=max_abs,
            rms=float(np.sqrt(np.mean(off**2))),
            kl=max(0.0, float(np.mean(_kl(wanted, got)))),
            top1_agreement=float(np.mean(got.argmax(-1) == wanted.argmax(-1))),
            tolerance=tolerance,
            reference_rms=float(np.sqrt(np.mean(wanted**2))),
            reference_max_abs=float(np.abs(wanted).max()),
            tokens=len(wanted),
            says=says,
            max_abs_as_stored=stored,
        )


def _held_to(result: FunctionResult, max_rms: float) -> FunctionResult:
    return replace(result, passed=result.passed is not False and bool(result.rms <= max_rms))


def _kl(wanted: Array, got: Array) -> Array:
    """The Kullback-Leibler divergence KL(wanted || got) of each position, in nats."""
    log_p, log_q = _log_softmax(wanted), _log_softmax(got)
    return np.asarray(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1))


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _distinct(claim: Claim) -> list[tuple[Any, Recognized]]:
    """Each source once, though self-fusion names it K times."""
    return list({id(s): (s, t) for s, t in zip(claim.sources, claim.trees, strict=True)}.values())


def available_bytes() -> int:
    """The memory that the machine has free, caches that it can drop counted in."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found.group(1)) * 1024 if found else sys.maxsize


def _require_memory(claim: Claim, itemsize: int) -> None:
    """Raises NotEnoughSpace when the models do not fit into memory; a level that cannot run is not a pass."""
    parameters = claim.tree.parameters + sum(tree.parameters for _, tree in _distinct(claim))
    # The stored values, the float64 ones that are worked on, and the twin's.
    needed = parameters * (4 + 8 + itemsize)
    available = available_bytes()
    if needed > available:
        raise NotEnoughSpace(
            "the algebra and native levels hold all models in memory",
            details=(f"about {needed:,} bytes needed, {available:,} available",),
            hint="--levels files,weights checks the rest",
        )
