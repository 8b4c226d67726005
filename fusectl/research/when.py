"""When to fuse: the step of the small model at which growing it saves most, from loss curves and costs per step.

Self-fusion keeps the loss. So the grown model is taken to go on from where the large model's own curve has that loss,
as if it had made the steps up to there itself (staged training's assumption, Shen et al. 2022, section 3.3):

    loss │ small                       gained(s) = steps_of(loss of small at s) - s / cost_ratio
         │ ╲                               in steps of the large model: those it has as good as made,
         │  ╲  large                       less those that the small model's s have cost
         │ ╲ ╲___ s
         │  ╲  :·┈┈┈┈ as if here
         │   ╲_:_│____                 The best step is where gained is largest: there both fall equally fast for
         └──────────── compute         a floating point operation.

The budget is in neither term: as long as it pays for both models, the best step does not depend on it, as Deep Fusion
finds (Mazzawi et al. 2024, section 5.5 and Figure 6). Whether growing pays at all is whether the small model's loss is
below the large one's at equal compute, somewhere.

A curve is averaged in bins of equal ratios of steps, and fitted from some step on by
limit + scale * steps ** -exponent. The spread of an answer is that of fits to resampled residuals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.errors import Incompatible, UsageError
from fusectl.research.curves import Curve


Array = npt.NDArray[np.float64]

# Warm-up, and what else no power law describes, is over after so much of a curve.
FIT_FROM = 0.05
BINS = 128
LEAST_POINTS = 6
# A grid finds the least squares wherever they are. Descending in all three numbers at once may end elsewhere, since
# limit and exponent make up for each other.
EXPONENTS = np.geomspace(0.02, 3.0, 2001)
REFITS = 200
# Residuals are resampled in runs, since neighbours err alike.
RUN = 5
# Steps that are tried, in equal ratios; and how far beyond its end a small curve is continued.
CANDIDATES = 4001
HORIZON = 10.0
BUDGETS = (0.5, 1.0, 2.0, 4.0)
# Of its last loss, how much lower than the small model the large one may end, where nobody says.
GAPS = (0.01, 0.02, 0.05, 0.1)
# What counts as nearly the best compute.
NEARLY = 0.01
# The paper's finding in numbers, which it does not give: at least so much of the reachable improvement is made, and so
# much, in deviations of the curve's own noise, is left.
WELL_TRAINED = 0.8
NOT_CONVERGED = 2.0
# The last part of a curve, which a decayed learning rate lets fall beyond what came before; by how much of the fall.
TAIL = 0.1
DECAYED = 0.02


@dataclass(frozen=True)
class Costs:
    """What a step costs: in floating point operations where they are known, and how many small ones a large one costs.

    Raises UsageError for costs that no growth has.
    """

    ratio: float
    small_flops: float | None = None
    large_flops: float | None = None

    def __post_init__(self) -> None:
        if not 1 < self.ratio < float("inf"):
            raise UsageError(
                f"a step of the large model costs {self.ratio:g} of the small one's: more than one is growth"
            )

    @classmethod
    def of_flops(cls, small: float, large: float) -> Costs:
        """The costs of steps of so many floating point operations."""
        if not (small > 0 and large > 0):
            raise UsageError(f"steps of {small:g} and {large:g} floating point operations")
        return cls(large / small, small, large)


@dataclass(frozen=True)
class Fit:
    """A loss curve as limit + scale * (steps / last_step) ** -exponent.

    `rms` is that of the residuals of the averaged curve, which it was fitted to from `first_step` on.
    """

    limit: float
    scale: float
    exponent: float
    rms: float
    first_step: float
    last_step: float

    def loss(self, steps: Array) -> Array:
        """The losses at these steps."""
        return self.limit + self.scale * (steps / self.last_step) ** -self.exponent

    def steps_of(self, losses: Array) -> Array:
        """The steps at which it has these losses; infinite for those that it never reaches."""
        above = np.maximum(losses - self.limit, 0.0)
        with np.errstate(divide="ignore", over="ignore"):
            return self.last_step * (above / self.scale) ** (-1 / self.exponent)

    def fall(self, step: float) -> float:
        """By how much the loss falls in a step there."""
        return float(self.exponent * self.scale / step * (step / self.last_step) ** -self.exponent)

    def as_json(self) -> Mapping[str, Any]:
        """Its numbers; the scale is that at `last_step`."""
        return {
            "limit": self.limit,
            "scale": self.scale,
            "exponent": self.exponent,
            "rms": self.rms,
            "first_step": self.first_step,
            "last_step": self.last_step,
        }


@dataclass(frozen=True)
class Budgeted:
    """What growing does with a budget, in steps of the large model from scratch.

    `best_step` is that of the small model, 0 where growing does not pay; `saving` the share of the budget that it
    saves on the way to `scratch_loss`, which the large model reaches with all of it; `loss` what the whole budget
    reaches with growth. `small_alone` is whether the best is to spend all of it on the small model.
    """

    budget_steps: float
    best_step: float
    saving: float
    loss: float
    scratch_loss: float
    small_alone: bool

    def as_json(self) -> Mapping[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Finding:
    """Deep Fusion's finding held against this data: fuse when well trained but not converged, whatever the budget.

    `made` is the share of the small model's reachable improvement that is made at the best step, counted from its first
    loss; `left` how far its loss is above its limit there.
    """

    made: float
    left: float
    well_trained: bool
    not_converged: bool
    independent_of_budget: bool


@dataclass(frozen=True)
class Advice:
    """When to fuse, with all that the answer rests on.

    `best_step` is None where it cannot be told: without a large model's curve, or an assumption in its place. `grow`
    is whether growing pays. `interval` are the 5th and 95th percentile of the best step over refits, `nearly` the steps
    between which the compute is within 1 % of the best. `pays_until` is the step from which on the large model from
    scratch is ahead; None where that is beyond what is looked at. `gaps` are answers for assumed curves, by how much
    lower than the small model the large one ends.
    """

    costs: Costs
    small: Fit
    large: Fit | None
    first_loss: float
    best_step: float | None
    grow: bool | None
    main: Budgeted | None
    interval: tuple[float, float] | None
    nearly: tuple[float, float] | None
    pays_until: float | None
    budgets: tuple[Budgeted, ...]
    gaps: Mapping[float, Budgeted]
    finding: Finding | None
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def made_at_end(self) -> float:
        """The share of the small model's reachable improvement that is made where its curve ends."""
        return _made(self.small, self.first_loss, self.small.last_step)

    @property
    def break_even(self) -> float:
        """By how much a step of the grown model has to lower the loss at the curve's end, to be worth what it costs."""
        return self.small.fall(self.small.last_step) * self.costs.ratio

    def as_json(self) -> Mapping[str, Any]:
        """All of it as numbers, strings and lists; `saving` is that of the budget that was asked for."""
        main = self.main
        return {
            "best_step": self.best_step,
            "grow": self.grow,
            "saving": None if main is None else main.saving,
            "interval": None if self.interval is None else list(self.interval),
            "range": None if self.nearly is None else list(self.nearly),
            "pays_until": self.pays_until,
            "budget_steps": None if main is None else main.budget_steps,
            "loss": None if main is None else main.loss,
            "scratch_loss": None if main is None else main.scratch_loss,
            "budgets": [each.as_json() for each in self.budgets],
            "gaps": [{"gap": gap, **each.as_json()} for gap, each in self.gaps.items()],
            "costs": dict(vars(self.costs)),
            "fit": {"small": self.small.as_json(), "large": None if self.large is None else self.large.as_json()},
            "small": {"made_at_end": self.made_at_end, "break_even_fall_per_large_step": self.break_even},
            "finding": None if self.finding is None else dict(vars(self.finding)),
            "assumptions": list(self.assumptions),
            "notes": list(self.notes),
        }


def costs_of(
    ratio: float | None,
    small_flops: float | None,
    large_flops: float | None,
    small: str | None,
    copies: int | None,
    large: str | None,
    arch: str | None = None,
    batch: int = 128,
    length: int = 512,
    target_length: int | None = None,
) -> Costs:
    """The costs of steps: their ratio as it is told, those that are told, or counted (flops.py) for the checkpoint
    `small` and as many `copies` of it, or a large model as `grow --to` takes it.

    Raises UsageError unless it is one of these ways, and what reading the checkpoint and its sizes does.
    """
    ways = [ratio is not None, small_flops is not None or large_flops is not None, small is not None]
    if sum(ways) != 1 or (small is None and (copies is not None or large is not None)):
        raise UsageError(
            "what steps cost: one of three ways",
            hint="--cost-ratio N, --small-flops N --large-flops N, or --small CKPT with --copies K or --large SIZES",
        )
    if ratio is not None:
        return Costs(ratio)
    if small is None:
        if small_flops is None or large_flops is None:
            raise UsageError("--small-flops and --large-flops: both")
        return Costs.of_flops(small_flops, large_flops)
    if (copies is None) == (large is None):
        raise UsageError("--small: what it grows to", hint="--copies K or --large SIZES")
    return _counted(small, copies, large, arch, batch, length, target_length)


def _counted(
    small: str, copies: int | None, large: str | None, arch: str | None, batch: int, length: int, target: int | None
) -> Costs:
    """The costs of a checkpoint's steps and of those of what it grows to."""
    from fusectl.families.table import ENCODER
    from fusectl.formats.opening import open_checkpoint
    from fusectl.networks.examples import full_target_length
    from fusectl.operations.target import read_target
    from fusectl.research.flops import flops_per_step
    from fusectl.rules.linear import growing_to
    from fusectl.sources.opened import recognized
    from fusectl.sources.packed_qkv import unpacked

    tree = recognized(unpacked(open_checkpoint(small)), arch)
    if large is None:
        assert copies is not None
        grown = tree.resized({axis: copies * n for axis, n in tree.sizes.items() if axis in tree.family.grown}, {})
    else:
        to = read_target(large, tree)
        grown = growing_to(tree, to.sizes, to.depths, "pinv", small).grown
    if ENCODER in tree.depths:
        target = target or full_target_length(length)
    counted = (flops_per_step(each, batch=batch, length=length, target_length=target) for each in (tree, grown))
    return Costs.of_flops(*counted)


def budget_of(steps: float | None, flops: float | None, costs: Costs) -> float | None:
    """A budget in steps of the large model, as it is told or from its floating point operations; None for none.

    Raises UsageError for both, and for operations where nobody knows how many a step takes.
    """
    if flops is None:
        return steps
    if steps is not None:
        raise UsageError("--budget and --budget-flops", hint="one of them")
    if costs.large_flops is None:
        raise UsageError("--budget-flops: how many a step takes is not known", hint="--budget STEPS, or --large-flops")
    return flops / costs.large_flops


def advise(
    small: Curve,
    costs: Costs,
    *,
    large: Curve | None = None,
    gap: float | None = None,
    budget_steps: float | None = None,
    fit_from: float | None = None,
    seed: int = 0,
) -> Advice:
    """When to fuse a small model with itself, from its loss curve and what steps cost.

    `large` is the curve of the large model from scratch; in its place `gap` assumes one of the small model's shape that
    ends lower by so much. The budget is in steps of the large model: by default as many as the large curve has, or the
    small one. Curves are fitted from step `fit_from` on, by default after a twentieth of each. Raises UsageError for
    settings that no answer has and curves of too few points, Incompatible for a loss that does not fall, and for a
    large model that never gets as low as the small one.
    """
    if large is not None and gap is not None:
        raise UsageError("a large model's curve, and a gap in its place", hint="one of them")
    if gap is not None and not 0 < gap < float("inf"):
        raise UsageError(f"a gap of {gap:g}: how much lower the large model ends")
    if budget_steps is not None and not 1 <= budget_steps < float("inf"):
        raise UsageError(f"a budget of {budget_steps:g} steps of the large model: at least one")
    rng = np.random.default_rng(seed)
    of_small = _fitted(small, fit_from, rng)
    of_large = None if large is None else _fitted(large, fit_from, rng)
    first_loss = float(small.losses[0])
    n = budget_steps or (small if large is None else large).last_step
    least = of_small.fit.first_step / costs.ratio
    if n <= least:
        raise UsageError(
            f"a budget of {n:g} steps of the large model: too small for the small one's {of_small.fit.first_step:g}",
            hint=f"a budget of more than {least:.3g}, or a smaller --fit-from",
        )
    notes = [*small.notes, *(() if large is None else large.notes), *of_small.notes]
    notes += () if of_large is None else of_large.notes
    advice = Advice(
        costs,
        of_small.fit,
        None,
        first_loss,
        best_step=None,
        grow=None,
        main=None,
        interval=None,
        nearly=None,
        pays_until=None,
        budgets=(),
        gaps={},
        finding=None,
        assumptions=tuple(_assumptions(large, gap)),
        notes=tuple(notes),
    )
    if of_large is None and gap is None:
        # A small model's curve does not determine the large one's. Without that curve there is no best step, only the
        # step that would be best for each assumed gap.
        last = float(of_small.fit.loss(np.array(small.last_step)))
        assumed = {share * last: _lower(of_small.fit, share * last) for share in GAPS}
        return replace(advice, gaps={each: _budgeted(of_small.fit, fit, costs, n) for each, fit in assumed.items()})
    if of_large is None:
        assert gap is not None
        small_fit, large_fit = of_small.fit, _lower(of_small.fit, gap)
        pairs = [(each, each and _lower(each, gap)) for each in of_small.refits]
    else:
        small_fit, large_fit = of_small.fit, of_large.fit
        pairs = list(zip(of_small.refits, of_large.refits, strict=True))
    _require_lower(small_fit, large_fit)
    main = _budgeted(small_fit, large_fit, costs, n)
    budgets = tuple(_budgeted(small_fit, large_fit, costs, each) for f in BUDGETS if (each := n * f) > least)
    grow = main.best_step > 0
    others = [
        _budgeted(one, other, costs, n).best_step
        for one, other in pairs
        if one is not None and other is not None and other.limit < one.limit
    ]
    if len(others) < len(pairs):
        notes.append(
            f"{len(pairs) - len(others)} of {len(pairs)} refits have no answer: the curves are noisy, or short"
        )
    low, high = np.percentile(others, [5, 95]) if others else (main.best_step, main.best_step)
    notes += _beyond(main, small_fit, large_fit, assumed=of_large is None)
    return replace(
        advice,
        large=large_fit,
        best_step=main.best_step if grow else None,
        grow=grow,
        main=main,
        interval=(float(low), float(high)) if grow else None,
        nearly=_nearly(main, small_fit, large_fit, costs) if grow else None,
        pays_until=_pays_until(small_fit, large_fit, costs) if grow else None,
        budgets=budgets,
        finding=_finding(main, budgets, small_fit, first_loss) if grow else None,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Fitted:
    """A curve's fit, those to resampled residuals (None where such a curve does not fall), and what is to be said."""

    fit: Fit
    refits: tuple[Fit | None, ...]
    notes: tuple[str, ...]


def _fitted(curve: Curve, fit_from: float | None, rng: np.random.Generator) -> _Fitted:
    begin = max(curve.last_step * FIT_FROM if fit_from is None else fit_from, 1e-9)
    inside = curve.steps >= begin
    if inside.sum() < LEAST_POINTS:
        raise UsageError(
            f"{curve.path}: {inside.sum():,} of {len(curve.steps):,} points from step {begin:g} on",
            details=(f"a fit takes {LEAST_POINTS}",),
            hint="a curve of more points, or a smaller --fit-from",
        )
    steps, losses = _averaged(curve.steps[inside], curve.losses[inside])
    if len(steps) < LEAST_POINTS:
        raise UsageError(f"{curve.path}: points too close to each other: {len(steps)} when averaged")
    (fit,) = _fits(steps, losses[None], curve.last_step)
    if fit is None:
        raise Incompatible(
            f"{curve.path}: the loss does not fall from step {steps[0]:g} on",
            details=(f"{losses[0]:g} there, {losses[-1]:g} at the end",),
            hint="--fit-from another step",
        )
    residuals = losses - fit.loss(steps)
    runs = rng.integers(0, len(steps), (REFITS, -(-len(steps) // RUN)))
    picked = (runs[:, :, None] + np.arange(RUN)).reshape(REFITS, -1)[:, : len(steps)] % len(steps)
    refits = _fits(steps, fit.loss(steps) + residuals[picked], curve.last_step)
    notes = []
    if len(steps) < inside.sum():
        notes.append(f"{curve.path}: {inside.sum():,} points are averaged to {len(steps)}")
    if fit.limit == 0 or fit.exponent <= EXPONENTS[0]:
        notes.append(f"{curve.path}: no saturation to be seen: its limit, and all that follows from it, is open")
    if _decayed(steps, losses, curve.last_step):
        notes.append(
            f"{curve.path}: its last tenth falls below what came before, as where the learning rate decays: "
            "the fit is of no constant rate, and no run goes on from there as it says"
        )
    return _Fitted(fit, tuple(refits), tuple(notes))


def _averaged(steps: Array, losses: Array) -> tuple[Array, Array]:
    """Means of steps and losses in at most BINS bins of equal ratios of steps."""
    share = np.log(steps / steps[0]) / np.log(steps[-1] / steps[0])
    bins = np.minimum((share * BINS).astype(int), BINS - 1)
    _, place, counts = np.unique(bins, return_inverse=True, return_counts=True)
    return np.bincount(place, steps) / counts, np.bincount(place, losses) / counts


def _fits(steps: Array, losses: Array, last_step: float) -> list[Fit | None]:
    """Least squares fits to losses (curves, points) of a limit that is not negative; None where a curve does not fall.

    Given the exponent the others are linear: the exponents of a grid are tried, then those around the best.
    """
    *_, squares = _solved(steps, losses, last_step, EXPONENTS)
    found: list[Fit | None] = []
    for losses_of_one, at in zip(losses, squares.argmin(axis=1), strict=True):
        near = np.linspace(EXPONENTS[max(at - 1, 0)], EXPONENTS[min(at + 1, len(EXPONENTS) - 1)], 41)
        limits, scales, left = _solved(steps, losses_of_one[None], last_step, near)
        i = int(left[0].argmin())
        fit = Fit(float(limits[0, i]), float(scales[0, i]), float(near[i]), 0.0, float(steps[0]), last_step)
        rms = float(np.sqrt(np.mean((losses_of_one - fit.loss(steps)) ** 2)))
        found.append(replace(fit, rms=rms) if fit.scale > 0 else None)
    return found


def _solved(steps: Array, losses: Array, last_step: float, exponents: Array) -> tuple[Array, Array, Array]:
    """Limits and scales (curves, exponents), and the sums of the squares that they leave."""
    powers = (steps / last_step) ** -exponents[:, None]
    of_powers = powers - powers.mean(axis=1)[:, None]
    of_losses = losses - losses.mean(axis=1)[:, None]
    products, spread = of_losses @ of_powers.T, (of_powers**2).sum(axis=1)
    scales = products / spread
    limits = losses.mean(axis=1)[:, None] - scales * powers.mean(axis=1)
    squares = (of_losses**2).sum(axis=1)[:, None] - products**2 / spread
    # Cross-entropies are not negative.
    products, spread = losses @ powers.T, (powers**2).sum(axis=1)
    through_zero = (losses**2).sum(axis=1)[:, None] - products**2 / spread
    # The squares are convex in the limit, so that where the best one is negative the best allowed one is zero.
    below = limits < 0
    scales = np.where(below, products / spread, scales)
    squares = np.where(below, through_zero, squares)
    return np.maximum(limits, 0.0), scales, np.where(scales > 0, squares, np.inf)


def _decayed(steps: Array, losses: Array, last_step: float) -> bool:
    """Whether the last part falls below what a fit to all before it says, by more than noise."""
    before = steps < (1 - TAIL) * last_step
    if before.sum() < LEAST_POINTS or before.all():
        return False
    (fit,) = _fits(steps[before], losses[None, before], last_step)
    if fit is None:
        return False
    # A decayed rate is worth 0.14 to 0.20 nats in a toy model, ten times what growing is looked at for: a fit through
    # it would take the decay for the model's own progress.
    below = float((fit.loss(steps[~before]) - losses[~before]).mean())
    return below > max(3 * fit.rms, DECAYED * float(losses[before][0] - losses[before][-1]))


def _lower(fit: Fit, gap: float) -> Fit:
    """The curve of a model that ends lower by a gap, and is lower by it at every step."""
    return replace(fit, limit=fit.limit - gap)


def _require_lower(small: Fit, large: Fit) -> None:
    if large.limit >= small.limit:
        raise Incompatible(
            "the large model never gets as low as the small one: there is nothing to grow for",
            details=(f"limit of the small model's loss: {small.limit:g}", f"of the large one's: {large.limit:g}"),
            hint="curves of one loss on the same data; longer ones",
        )


def _gained(steps: Array, small: Fit, large: Fit, costs: Costs) -> Array:
    """The steps of the large model that fusing at these steps is ahead by; see the module's docstring."""
    # This is one of two laws in use: the grown model has a head start and keeps to the large model's curve. With
    # Chinchilla's constants, and 65k tokens a step, it predicts that growing T5-Small at 500k steps loses 11 to 13 % of
    # 1M steps, where Deep Fusion reports savings of 18 to 24 %. Those need the other law, by which the grown model
    # catches up with that curve at equal tokens. In a pilot of one seed at toy size neither held: a step of the small
    # model was worth 0.46 large ones at the growth and 0.15 of one after 2,500 steps more.
    return large.steps_of(small.loss(steps)) - steps / costs.ratio


def _candidates(small: Fit, most: float) -> Array:
    """Steps to fuse at, none above `most`, and none before what was fitted."""
    return np.geomspace(small.first_step, min(most, HORIZON * small.last_step), CANDIDATES)


def _budgeted(small: Fit, large: Fit, costs: Costs, budget_steps: float) -> Budgeted:
    """What growing does with a budget."""
    steps = _candidates(small, budget_steps * costs.ratio)
    gained = _gained(steps, small, large, costs)
    i = int(gained.argmax())
    step, ahead = (float(steps[i]), float(gained[i])) if gained[i] > 0 else (0.0, 0.0)
    scratch, loss = large.loss(np.array([budget_steps, budget_steps + ahead]))
    compute = float(_compute(steps[i], small, large, costs, budget_steps)) if step else budget_steps
    alone = step >= 0.999 * budget_steps * costs.ratio
    return Budgeted(budget_steps, step, 1 - compute / budget_steps, float(loss), float(scratch), alone)


def _compute(steps: Array, small: Fit, large: Fit, costs: Costs, budget_steps: float) -> Array:
    """The compute, in steps of the large model, in which fusing at these steps gets as low as the budget from scratch.

    A small model that is as low before needs no large one.
    """
    alone = small.steps_of(large.loss(np.array(budget_steps)))
    return np.where(steps >= alone, alone / costs.ratio, budget_steps - _gained(steps, small, large, costs))


def _nearly(main: Budgeted, small: Fit, large: Fit, costs: Costs) -> tuple[float, float]:
    """The steps around the best one between which the compute to the same loss is nearly as little."""
    steps = _candidates(small, main.budget_steps * costs.ratio)
    compute = _compute(steps, small, large, costs, main.budget_steps)
    good = steps[compute <= (1 + NEARLY) * (1 - main.saving) * main.budget_steps]
    return float(min(good[0], main.best_step)), float(max(good[-1], main.best_step))


def _pays_until(small: Fit, large: Fit, costs: Costs) -> float | None:
    """The last step at which fusing still saves something, or None where that is beyond the horizon."""
    steps = _candidates(small, HORIZON * small.last_step)
    paying = np.flatnonzero(_gained(steps, small, large, costs) > 0)
    return None if paying[-1] == len(steps) - 1 else float(steps[paying[-1]])


def _made(small: Fit, first_loss: float, step: float) -> float:
    return float((first_loss - small.loss(np.array(step))) / (first_loss - small.limit))


def _finding(main: Budgeted, budgets: Sequence[Budgeted], small: Fit, first_loss: float) -> Finding:
    made = _made(small, first_loss, main.best_step)
    left = float(small.loss(np.array(main.best_step)) - small.limit)
    # Budgets that do not pay for so many steps cannot have them.
    enough = [each.best_step for each in budgets if not each.small_alone]
    same = not main.small_alone and max(enough) <= 1.01 * min(enough)
    return Finding(made, left, made >= WELL_TRAINED, left > NOT_CONVERGED * small.rms, same)


def _assumptions(large: Curve | None, gap: float | None) -> Iterator[str]:
    yield "one small model is trained and fused with itself, which keeps its loss"
    if large is None and gap is None:
        yield "nothing is known of the large model: no best step and no saving can be told, only what gaps would mean"
    if large is None:
        yield "for a gap, the large model's curve is the small one's, lower by the gap at every step"
    yield "the grown model goes on along the large model's own curve, from where that has the same loss"
    yield "both curves are of one loss on the same data, at learning rates that do not decay to zero at their ends"
    yield "the large model's learning rate is tuned: from an untuned one any growth seems to save compute"
    yield "curves go on as limit + scale * steps ** -exponent, as they do where they were fitted"


def _beyond(main: Budgeted, small: Fit, large: Fit, *, assumed: bool) -> Iterator[str]:
    """What lies outside of the data."""
    if not main.best_step:
        yield "the large model's loss is below the small one's at every compute: growing does not pay"
        return
    if main.small_alone:
        yield "the budget ends before the best step: all of it is the small model's"
    if main.best_step >= 0.999 * HORIZON * small.last_step:
        yield f"later than {HORIZON:g} times the small model's curve it may be better still: so far nobody looks"
    if main.best_step > small.last_step:
        yield f"the small model's curve ends at step {small.last_step:,.0f}: the best step is extrapolated"
    if main.best_step <= 1.001 * small.first_step:
        yield f"the best step is before {small.first_step:,.0f}, where the part begins that was fitted"
    if not assumed:
        as_if = float(large.steps_of(small.loss(np.array(main.best_step))))
        if not large.first_step <= as_if <= large.last_step:
            yield f"the large model's curve is extrapolated to its step {as_if:,.0f}, where the grown one begins"
        if main.budget_steps > large.last_step:
            yield f"the large model's curve ends at step {large.last_step:,.0f}: losses beyond are extrapolated"
