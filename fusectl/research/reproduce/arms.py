"""Arms of a comparison, and the baseline that each is held against: a model from scratch at the same compute.

Every arm is trained at each of the preset's rates on its first seed, at twice and half of these as long as the best one
is the largest or the smallest, and repeated at the best one. The baseline is trained at each of them with all seeds,
and its rate is chosen for each length of training anew. The best is that of the least validation loss; what is compared
are losses on test data. T5's schedule has no end, so the baseline's curve says what any length of training gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fusectl.research.reproduce.laboratory import Growth, Laboratory, Model, Run


Command = tuple[str, ...]
# Seeds of a second small model, and of a third: other than those of the first. The fourth's is the sum of both.
OTHER = 500
THIRD = 250
# The baseline is trained for so much longer than the most compute that an arm takes, to see when it gets as far.
BEYOND = 1.25


@dataclass(frozen=True)
class Arm:
    """A way to come to a model: `make` gives it for a seed and a factor of the rate."""

    name: str
    make: Callable[[int, float], Model]


@dataclass(frozen=True)
class Result:
    """An arm after training: a run for each seed at the rate that was best on the first, and the compute of one.

    `swept` are the validation losses at the end on the first seed, by the factors of the rate.
    """

    arm: Arm
    base: float
    runs: tuple[Run, ...]
    swept: Mapping[float, float]
    charged_flops: float

    @property
    def losses(self) -> tuple[float, ...]:
        """After the last step, nats for a token, a seed each."""
        return tuple(run.end.loss for run in self.runs)

    @property
    def accuracies(self) -> tuple[float, ...]:
        """After the last step, the share of tokens, a seed each."""
        return tuple(run.end.accuracy for run in self.runs)

    @property
    def before_flops(self) -> float:
        """The compute that was spent before the first step of the model itself."""
        return self.charged_flops - self.runs[0].model.steps * self.runs[0].flops_per_step

    @cached_property
    def curve(self) -> Curve:
        """The mean curve."""
        return Curve.of(self.arm.name, self.runs, self.before_flops)


@dataclass(frozen=True)
class Curve:
    """Losses over the steps of the model itself, and over all compute that it took.

    The mean, the least and the most of the seeds; and the mean of the validation loss.
    """

    name: str
    steps: tuple[int, ...]
    flops: tuple[float, ...]
    mean: tuple[float, ...]
    least: tuple[float, ...]
    most: tuple[float, ...]
    validation: tuple[float, ...]

    @classmethod
    def of(cls, name: str, runs: Sequence[Run], before_flops: float) -> Curve:
        """The curve of several seeds, from what was spent before."""
        steps = sorted(set.intersection(*({point.step for point in run.curve} for run in runs)))
        points = [[point for point in run.curve if point.step in steps] for run in runs]
        losses = np.array([[point.loss for point in each] for each in points])
        validation = np.mean([[point.validation for point in each] for each in points], axis=0)
        flops = [before_flops + step * runs[0].flops_per_step for step in steps]
        found = (losses.mean(axis=0), losses.min(axis=0), losses.max(axis=0), validation)
        return cls(name, tuple(steps), tuple(flops), *(tuple(map(float, each)) for each in found))

    def at(self, flops: float) -> float:
        """The mean loss after so much compute, between the points on a line."""
        return float(np.interp(flops, self.flops, self.mean))

    def flops_to(self, loss: float) -> float | None:
        """The compute after which the mean loss is this one for the first time; None if it never is."""
        for i, here in enumerate(self.mean):
            if here <= loss:
                if i == 0:
                    return self.flops[0]
                share = (self.mean[i - 1] - loss) / (self.mean[i - 1] - here)
                return self.flops[i - 1] + share * (self.flops[i] - self.flops[i - 1])
        return None


@dataclass(frozen=True)
class Judged:
    """A result beside the baseline of the same compute: its loss there, mean, least and most of the seeds.

    `same_loss_flops` is what the baseline takes for the result's loss; None where it does not get there within
    `longest_flops`.
    """

    result: Result
    scratch_base: float
    scratch: tuple[float, float, float]
    same_loss_flops: float | None
    longest_flops: float

    @property
    def difference(self) -> float:
        """How much the loss lies above the baseline's, nats for a token."""
        return float(np.mean(self.result.losses)) - self.scratch[0]

    @property
    def verdict(self) -> str:
        """Whether growing pays at equal compute, as far as the seeds can tell."""
        losses = self.result.losses
        if len(losses) == 1:
            return "one seed: no verdict"
        # Ranges that do not overlap are a strict rule for three seeds, which differ by about 0.02 nats: effects below
        # some 13 % of the compute stay open.
        if max(losses) < self.scratch[1]:
            return "better"
        if min(losses) > self.scratch[2]:
            return "worse"
        return "no difference beyond the spread"

    @property
    def saved(self) -> float | None:
        """The share of the baseline's compute for the same loss that is saved; below 0 where it is more."""
        return None if self.same_loss_flops is None else 1.0 - self.result.charged_flops / self.same_loss_flops


class Baseline:
    """Models of one size from scratch, of all seeds at every rate that is tried: the mean of all chooses among these.

    That is more than an arm is given, whose first seed chooses.
    """

    def __init__(self, laboratory: Laboratory, size: str, steps: int) -> None:
        self._laboratory, self.size, self.steps = laboratory, size, steps
        self._tried: dict[float, Curve] = {}

    def at(self, step: int) -> tuple[float, Curve]:
        """The rate that is best after so many steps, and the curve with it."""
        flops = step * self.flops_per_step

        def losses(wanted: Sequence[tuple[str, float]]) -> list[float]:
            self._train([base for _, base in wanted])
            curves = [self._tried[base] for _, base in wanted]
            return [float(np.interp(flops, each.flops, each.validation)) for each in curves]

        preset = self._laboratory.preset
        base = best_of(sweep([self.size], preset.bases, preset.more_bases, losses)[self.size])
        return base, self._tried[base]

    def judge(self, result: Result) -> Judged:
        """A result beside the baseline of its compute."""
        flops = result.charged_flops
        base, curve = self.at(round(flops / self.flops_per_step))
        mean, least, most = (
            float(np.interp(flops, curve.flops, each)) for each in (curve.mean, curve.least, curve.most)
        )
        return Judged(result, base, (mean, least, most), self.flops_to(float(np.mean(result.losses))), curve.flops[-1])

    def loss_at(self, flops: float) -> float:
        """The mean loss after so much compute, with the rate that is best there."""
        return self.at(round(flops / self.flops_per_step))[1].at(flops)

    def flops_to(self, loss: float) -> float | None:
        """The compute after which its mean loss is this one, with the rate that gets there first; None if none does."""
        reached = (each.flops_to(loss) for each in self._tried.values())
        return min((flops for flops in reached if flops is not None), default=None)

    @property
    def curve(self) -> Curve:
        """Its curve at the rate that is best in the end."""
        return self.at(self.steps)[1]

    def _train(self, bases: Sequence[float]) -> None:
        seeds = self._laboratory.preset.seeds
        new = [base for base in bases if base not in self._tried]
        runs = iter(self._laboratory.all([self._model(seed, base) for base in new for seed in range(seeds)]))
        for base in new:
            self._tried[base] = Curve.of(f"scratch, {self.size}", [next(runs) for _ in range(seeds)], 0.0)

    @property
    def flops_per_step(self) -> float:
        """Of a model of this size."""
        return self._laboratory.run(self._model(0, self._laboratory.preset.bases[0])).flops_per_step

    def _model(self, seed: int, base: float) -> Model:
        return Model(self.size, seed, base, self.steps)


def compare(laboratory: Laboratory, arms: Sequence[Arm], *, bases: Sequence[float] = ()) -> list[Result]:
    """The results of arms, each at its own best rate."""
    preset, named = laboratory.preset, {arm.name: arm for arm in arms}

    def ends(wanted: Sequence[tuple[str, float]]) -> list[float]:
        return [run.end.validation for run in laboratory.all([named[name].make(0, base) for name, base in wanted])]

    # Untuned rates can fabricate the effect that is looked for. In a toy decoder self-fusion ended 0.019 below a model
    # from scratch of the same compute when neither rate was tuned, and 0.09 above it when both were.
    losses = sweep(list(named), bases or preset.bases, preset.more_bases, ends)
    best = {name: best_of(found) for name, found in losses.items()}
    seeds = range(preset.seeds)
    runs = iter(laboratory.all([arm.make(seed, best[arm.name]) for arm in arms for seed in seeds]))
    return [
        Result(
            arm,
            best[arm.name],
            tuple(next(runs) for _ in seeds),
            losses[arm.name],
            laboratory.charged_flops(arm.make(0, best[arm.name])),
        )
        for arm in arms
    ]


def sweep(
    names: Sequence[str],
    bases: Sequence[float],
    more: int,
    losses_of: Callable[[Sequence[tuple[str, float]]], Sequence[float]],
) -> dict[str, dict[float, float]]:
    """For each name the losses at these rates, and where the best one is at an end, at up to so many beyond it.

    `losses_of` gives the losses of names at rates, all that are wanted at once.
    """
    found: dict[str, dict[float, float]] = {name: {} for name in names}
    wanted = [(name, base) for name in names for base in bases]
    for _ in range(more + 1):
        for (name, base), loss in zip(wanted, losses_of(wanted), strict=True):
            found[name][base] = loss
        # A best rate at the end of what was tried may not be the best one: without going on, the arm that wants the
        # largest rate would look worse than it is.
        wanted = [(name, next_base) for name in names if (next_base := _beyond(found[name])) is not None]
        if not wanted:
            break
    return found


def _beyond(found: Mapping[float, float]) -> float | None:
    """The rate to try next: beyond the best, where that is the largest or the smallest."""
    best = best_of(found)
    if best == max(found):
        return 2 * best
    return best / 2 if best == min(found) else None


def best_of(found: Mapping[float, float]) -> float:
    """The rate whose loss is least."""
    return min(found, key=found.__getitem__)


def judged(laboratory: Laboratory, size: str, results: Sequence[Result]) -> tuple[list[Judged], Baseline]:
    """Results beside models of their size from scratch, which are trained for longer than any of them."""
    per_step = results[0].runs[0].flops_per_step
    most = max(result.charged_flops for result in results)
    baseline = Baseline(laboratory, size, round(BEYOND * most / per_step))
    return [baseline.judge(each) for each in results], baseline


def with_controls(laboratory: Laboratory, size: str, results: Sequence[Result]) -> tuple[list[Judged], Baseline]:
    """What `judged` says of results, and behind them of models that do not grow, of the last one's compute.

    A grown model may change its rate when it grows. So may these, at their own best rate: one from scratch, for as many
    steps as the grown one has, and the small model, from where others are grown from it.
    """
    last = judged(laboratory, size, results)[0][-1]
    flops, run = last.result.charged_flops, last.result.runs[0]
    first = max(1, round(flops / run.flops_per_step) - run.model.steps)
    per_small = laboratory.run(small(laboratory, 0)).flops_per_step
    more = max(1, round(flops / per_small) - laboratory.preset.small_steps)

    def from_scratch(seed: int, base: float) -> Model:
        begun = Model(size, seed, last.scratch_base, first)
        return Model(size, seed, base, run.model.steps, Growth("kept on", (begun,)))

    def of_small(seed: int, base: float) -> Model:
        return Model("small", seed, base, more, Growth("kept on", (small(laboratory, seed),)))

    arms = [Arm("no growth: from scratch", from_scratch), Arm("no growth: the small model", of_small)]
    return judged(laboratory, size, [*results, *compare(laboratory, arms)])


def small_base(laboratory: Laboratory) -> float:
    """The rate at which small models are best."""
    preset = laboratory.preset

    def ends(wanted: Sequence[tuple[str, float]]) -> list[float]:
        runs = laboratory.all([Model("small", 0, base, preset.small_steps) for _, base in wanted])
        return [run.end.validation for run in runs]

    return best_of(sweep(["small"], preset.bases, preset.more_bases, ends)["small"])


def small(laboratory: Laboratory, seed: int, steps: int | None = None) -> Model:
    """A small model at its best rate."""
    return Model("small", seed, small_base(laboratory), steps or laboratory.preset.small_steps)


def grown(
    laboratory: Laboratory,
    size: str,
    name: str,
    sources: Callable[[int], tuple[Model, ...]],
    commands: Callable[[int], tuple[Command, ...]],
    *,
    steps: int | None = None,
    growth_steps: int = 0,
    offset: int = 0,
) -> Arm:
    """The arm of models that commands make of the sources of a seed, trained on for `steps` (the preset's)."""

    def make(seed: int, base: float) -> Model:
        growth = Growth(name, sources(seed), commands(seed), growth_steps)
        return Model(size, seed, base, steps or laboratory.preset.grown_steps, growth, offset)

    return Arm(name, make)
