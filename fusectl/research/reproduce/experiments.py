"""The papers' experiments, small: which models each compares, and what it reports of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from fusectl.errors import FusectlError
from fusectl.formats.opening import open_checkpoint
from fusectl.networks.training import Recipe
from fusectl.research.curves import Curve as LossCurve
from fusectl.research.kinds import Experiment
from fusectl.research.papers import table as paper_table
from fusectl.research.reproduce.arms import (
    OTHER,
    THIRD,
    Arm,
    Baseline,
    Command,
    Curve,
    Judged,
    Result,
    compare,
    grown,
    small,
    small_base,
    with_controls,
)
from fusectl.research.reproduce.laboratory import Growth, Laboratory, Model, Run
from fusectl.research.reproduce.report import Cell, Report, Table, comparison, spread, sweeps, verdicts
from fusectl.research.reproduce.texts import TASKS
from fusectl.research.theory.symmetry import of_checkpoint
from fusectl.research.when import Costs, advise
from fusectl.sources.opened import open_source
from fusectl.system.threads import Silent


# "Low variance" has no number in the paper: a tenth of a kernel's own deviation.
NOISE = ("--fill", "gaussian", "--noise-scale", "0.1")
SELF: Command = ("self-fuse", "{0}", "--copies", "2", "-o", "{out}")
FUSE: Command = ("fuse", "{0}", "{1}", "-o", "{out}")
CLAIM = "less loss than training from scratch at the same compute"


def one_source(laboratory: Laboratory, seed: int) -> tuple[Model, ...]:
    """The small model of a seed."""
    return (small(laboratory, seed),)


def two_sources(laboratory: Laboratory, seed: int) -> tuple[Model, ...]:
    """Two small models that differ in their seeds."""
    return small(laboratory, seed), small(laboratory, seed + OTHER)


def _always(*commands: Command) -> Callable[[int], tuple[Command, ...]]:
    return lambda _: commands


def _seeded(*commands: Command) -> Callable[[int], tuple[Command, ...]]:
    """Commands whose first one draws noise by the run's seed."""
    return lambda seed: ((*commands[0], "--seed", str(seed)), *commands[1:])


def _noisy(command: Command, *more: str) -> Callable[[int], tuple[Command, ...]]:
    """A command with the paper's noise."""
    return _seeded((*command, *NOISE, *more))


def fusions(laboratory: Laboratory) -> list[Arm]:
    """Table 1's arms but for the baseline."""
    one, two = partial(one_source, laboratory), partial(two_sources, laboratory)
    return [
        grown(laboratory, "medium", "fusion-rule", two, _noisy(FUSE)),
        grown(laboratory, "medium", "fusion-prop", two, _noisy(FUSE, "--norm", "property")),
        grown(laboratory, "medium", "self-fusion", one, _noisy(SELF)),
    ]


def _small_row(laboratory: Laboratory) -> str:
    runs = laboratory.all([small(laboratory, seed) for seed in range(laboratory.preset.seeds)])
    return (
        f"The small model's loss after {laboratory.preset.small_steps:,} steps: "
        f"{spread([run.end.loss for run in runs])}, rate {runs[0].model.base:g}."
    )


def table1(laboratory: Laboratory) -> Report:
    """Table 1: fusing two small models, with one norm and with a norm each, and fusing one with itself."""
    found, baseline = with_controls(laboratory, "medium", compare(laboratory, fusions(laboratory)))
    return Report(
        "table1",
        "Table 1: fused models against training from scratch",
        (comparison("Measured", found), sweeps([each.result for each in found]), _paper("table1")),
        (*verdicts(found, CLAIM), _small_row(laboratory)),
        _curves(baseline, found),
    )


def table2(laboratory: Laboratory) -> Report:
    """Table 2: fusion in stages, from small over medium to large."""
    small_steps, medium_steps, large_steps = laboratory.preset.staged_steps

    def one(seed: int) -> tuple[Model, ...]:
        return (small(laboratory, seed, small_steps),)

    def two(seed: int) -> tuple[Model, ...]:
        return (*one(seed), *one(seed + OTHER))

    # The rates of the models between are those that are best for them, on the first seed, as for every arm.
    mediums: dict[str, Result] = {
        each.arm.name: each
        for each in compare(
            laboratory,
            [
                Arm("medium from scratch", lambda seed, base: Model("medium", seed, base, medium_steps)),
                grown(laboratory, "medium", "medium, fused", two, _noisy(FUSE), steps=medium_steps),
                grown(laboratory, "medium", "medium, self-fused", one, _noisy(SELF), steps=medium_steps),
            ],
        )
    }

    def medium(name: str, *others: int) -> Callable[[int], tuple[Model, ...]]:
        result = mediums[name]
        return lambda seed: tuple(result.arm.make(seed + other, result.base) for other in (0, *others))

    def stage(name: str, sources: Callable[[int], tuple[Model, ...]], command: Command) -> Arm:
        return grown(laboratory, "large", name, sources, _noisy(command), steps=large_steps)

    # Of setting 2 nothing is known but its result; a fusion and a self-fusion after it is the one that is left over.
    arms = [
        stage("(2) S + S to M, M with itself to L", medium("medium, fused"), SELF),
        stage("(3) M + M to L", medium("medium from scratch", OTHER), FUSE),
        stage("(4) S + S to M twice, M + M to L", medium("medium, fused", THIRD), FUSE),
        stage("(5) M with itself to L", medium("medium from scratch"), SELF),
        stage("(6) S with itself to M, M with itself to L", medium("medium, self-fused"), SELF),
    ]
    found, baseline = with_controls(laboratory, "large", compare(laboratory, arms))
    return Report(
        "table2",
        "Table 2: fusion in stages",
        (comparison("Measured; (1) is the baseline", found), sweeps([each.result for each in found]), _paper("table2")),
        tuple(verdicts(found, CLAIM)),
        _curves(baseline, found),
        notes=(
            f"Small, medium and large models: {small_steps:,}, {medium_steps:,} and {large_steps:,} steps.",
            (
                "Which settings the paper's numbers stand for is drawn in its Figure 2, which is not in its text. (1) "
                "and (3) to (6) are what the text says of them; (2) is a guess."
            ),
            (
                "Fused with one norm (the fusion rule): a model that has been trained with a norm for each source "
                "could not be fused again with a norm for each."
            ),
        ),
    )


def table4(laboratory: Laboratory) -> Report:
    """Table 4: what it takes to get as far as the baseline, the small models' training charged."""
    found, baseline = with_controls(laboratory, "medium", compare(laboratory, fusions(laboratory)[1:]))
    scratch = baseline.curve
    grown_steps = laboratory.preset.grown_steps
    # As the paper's baseline, which has twice the steps that fused models have after fusion.
    reference_flops = 2 * grown_steps * baseline.flops_per_step
    quality = baseline.loss_at(reference_flops)
    # Where it gets there for the first time, as the others, with the rate that does so first.
    scratch_flops = baseline.flops_to(quality) or reference_flops
    rows = []
    for curve, flops in [(scratch, 0.0)] + [(each.result.curve, each.result.before_flops) for each in found]:
        reached = scratch_flops if curve is scratch else curve.flops_to(quality)
        saved = None if reached is None else 100 * (1 - reached / scratch_flops)
        rows.append((curve.name, flops / 1e9, None if reached is None else reached / 1e9, saved, curve.mean[-1]))
    columns = ("model", "GFLOP before", "GFLOP to the quality", "compute saved, %", "loss at its end")
    reached_by = [row[0] for row in rows[1:] if row[3] is not None and float(row[3] or 0) > 0]
    return Report(
        "table4",
        "Table 4: compute to a quality",
        (
            Table(
                f"Compute to a loss of {quality:.4f}, the baseline's after {2 * grown_steps:,} steps",
                columns,
                tuple(rows),
            ),
            comparison("Beside the baseline of the same compute", found),
            _paper("table4"),
        ),
        (
            (
                f"With less compute than the baseline got there: {', '.join(map(str, reached_by)) or 'none'}. "
                "The paper's saving is 24 % of TPU time, to a GLUE average instead of a loss."
            ),
            (
                "What counts is where a mean curve gets there first; the table below says whether the losses differ by "
                "more than those of the seeds."
            ),
        ),
        _curves(baseline, found),
    )


def figure4(laboratory: Laboratory) -> Report:
    """Figure 4: the learning rate after fusion, by offsets of the schedule."""
    preset = laboratory.preset
    one = partial(one_source, laboratory)
    base = small_base(laboratory)
    # T5's rate falls by the root of the step, so that offsets of 4 and 16 times the steps made are what it takes for a
    # rate that is clearly lower.
    offsets = (-preset.small_steps, 0, preset.small_steps, 4 * preset.small_steps, 16 * preset.small_steps)
    arms = {o: grown(laboratory, "medium", f"offset {o:+,}", one, _noisy(SELF), offset=o) for o in offsets}
    runs = laboratory.all([arm.make(seed, base) for arm in arms.values() for seed in range(preset.seeds)])
    by_offset = {o: runs[i * preset.seeds : (i + 1) * preset.seeds] for i, o in enumerate(offsets)}
    rows, curves = [], []
    for o, each in by_offset.items():
        recipe = Recipe(base, preset.warmup, o)
        early = [run.curve[1].loss for run in each]
        first, last = (recipe.rate(preset.small_steps + step) for step in (0, preset.grown_steps))
        rows.append((o, first, last, spread(early), spread([run.end.loss for run in each])))
        before = laboratory.charged_flops(each[0].model) - preset.grown_steps * each[0].flops_per_step
        curves.append(Curve.of(arms[o].name, each, before))
    ends = {o: float(np.mean([run.end.loss for run in each])) for o, each in by_offset.items()}
    begun = {o: float(np.mean([run.curve[1].loss for run in each])) for o, each in by_offset.items()}
    high, low = min(offsets), max(offsets)
    measured = by_offset[high][0].curve[1].step
    columns = ("offset, steps", "rate at first", "rate at last", f"loss after {measured} steps", "loss at its end")
    return Report(
        "figure4",
        "Figure 4: the learning rate after self-fusion",
        (Table("By the offset of the schedule", columns, tuple(rows)),),
        (
            f"In the end the highest rate is {_more(ends[high] - ends[low])} the lowest; the paper: better.",
            f"After {measured} steps it is {_more(begun[high] - begun[low])} the lowest; the paper: worse at first.",
            f"The offset that ends best: {min(ends, key=ends.__getitem__):+,} steps.",
        ),
        tuple(curves),
        notes=(f"The factor of the rate is {base:g}, the small model's best, for every offset.",),
    )


def figure5(laboratory: Laboratory) -> Report:
    """Figure 5: whether blocks that were zeros catch up, at a high rate and at a low one."""
    preset = laboratory.preset
    base = small_base(laboratory)
    one = partial(one_source, laboratory)
    kernel = "target/encoder/layers_0/mlp/wi_0/kernel"
    steps = sorted({max(1, preset.grown_steps // part) for part in (8, 4, 2, 1)})
    rows, ratios, pictures = [], {}, {}
    for name, offset in (("high", -preset.small_steps), ("low", 16 * preset.small_steps)):
        arm = grown(
            laboratory, "medium", f"zeros at a {name} rate", one, _always((*SELF, "--fill", "zeros")), offset=offset
        )
        runs = [
            laboratory.all([replace(arm.make(seed, base), steps=step) for seed in range(preset.seeds)])
            for step in steps
        ]
        for step, each in zip(steps, runs, strict=True):
            found = [_ratio(run, kernel) for run in each]
            ratios[name] = float(np.mean(found))
            rows.append((name, step, spread(found), spread([run.end.loss for run in each])))
        # Of the last checkpoint, the first seed.
        picture = f"figure5-{name}.png"
        laboratory.fusectl(
            [
                "plot",
                str(runs[-1][0].path),
                "--tensor",
                kernel,
                "--copies",
                "2",
                "--force",
                "-o",
                str(laboratory.out / picture),
            ]
        )
        pictures[f"the first feed-forward kernel at a {name} rate"] = picture
    columns = ("rate", "steps after fusion", "rms of former zero blocks / of the sources' own", "loss")
    return Report(
        "figure5",
        "Figure 5: former zero blocks at a high and at a low learning rate",
        (Table(f"{kernel.removeprefix('target/')}", columns, tuple(rows)),),
        (
            (
                f"After {steps[-1]:,} steps the former zero blocks are {ratios['high']:.3f} of the sources' own at the "
                f"high rate and {ratios['low']:.3f} at the low one. The paper: at a low rate they have not caught up."
            ),
        ),
        notes=("Filled with zeros, which only rounding tells apart: noise would be there from the start.",),
        pictures=pictures,
    )


def figure6(laboratory: Laboratory) -> Report:
    """Figure 6: at which step of the small model to self-fuse, for three budgets."""
    preset = laboratory.preset
    shares = (0.25, 0.5, 1.0, 1.5)
    at_steps = [max(1, round(share * preset.small_steps)) for share in shares]
    per_small = laboratory.run(small(laboratory, 0)).flops_per_step
    probe = grown(laboratory, "medium", "self-fusion", partial(one_source, laboratory), _noisy(SELF))
    per_step = laboratory.run(probe.make(0, preset.bases[0])).flops_per_step
    # The largest budget leaves the model that is fused last half of the preset's steps.
    largest = at_steps[-1] * per_small + preset.grown_steps / 2 * per_step
    budgets = [share * largest for share in (0.6, 0.8, 1.0)]

    def arm(step: int) -> Arm:
        return grown(
            laboratory,
            "medium",
            f"fused at {step:,}",
            lambda seed: (small(laboratory, seed, step),),
            _noisy(SELF),
            steps=max(1, int((largest - step * per_small) / per_step)),
        )

    results = compare(laboratory, [arm(step) for step in at_steps])
    found, baseline = with_controls(laboratory, "medium", results)
    # No loss where the small model's training alone takes more than the budget.
    losses = {
        step: [result.curve.at(b) if b > result.before_flops else None for b in budgets]
        for step, result in zip(at_steps, results, strict=True)
    }
    best = [
        min((each[i], step) for step, each in losses.items() if each[i] is not None)[1] for i in range(len(budgets))
    ]
    rows: list[tuple[Cell, ...]] = [(step, *each) for step, each in losses.items()]
    rows.append(("scratch", *(baseline.loss_at(budget) for budget in budgets)))
    smalls = laboratory.all([small(laboratory, seed, at_steps[-1]) for seed in range(preset.seeds)])
    same = "does not depend" if len(set(best)) == 1 else "seems to depend"
    columns = ("small model's steps", *(f"loss at {budget / 1e9:,.0f} GFLOP" for budget in budgets))
    return Report(
        "figure6",
        "Figure 6: when to self-fuse",
        (
            Table("By the step of fusion, for three budgets", columns, tuple(rows)),
            comparison("At the largest budget, beside the baseline", found),
            _paper("figure6"),
        ),
        (
            (
                f"The best step is {', '.join(f'{each:,}' for each in best)} for the three budgets, so it {same} on "
                "the budget here; the paper: it does not."
            ),
            _predicted(Curve.of("small", smalls, 0.0), baseline.curve, largest),
            *verdicts(found, CLAIM),
        ),
        _curves(baseline, found),
        notes=("The schedule has no end: the loss at a budget is that of the run when it has spent so much.",),
    )


def _predicted(small_curve: Curve, scratch: Curve, budget_flops: float) -> str:
    """What `fusectl when` says of the curves of the small and the large model."""
    per_small, per_large = (each.flops[-1] / each.steps[-1] for each in (small_curve, scratch))
    curves = [
        LossCurve(each.name, np.array(each.steps[1:], float), np.array(each.mean[1:]))
        for each in (small_curve, scratch)
    ]
    try:
        costs = Costs.of_flops(per_small, per_large)
        advice = advise(curves[0], costs, large=curves[1], budget_steps=budget_flops / per_large)
    except FusectlError as error:
        return f"`fusectl when` cannot tell from these curves: {error}."
    if advice.main is None or advice.best_step is None or not advice.grow:
        return "`fusectl when` says of these two curves that growing does not pay."
    return (
        f"`fusectl when` says of these two curves: fuse at step {advice.best_step:,.0f}, which saves "
        f"{100 * advice.main.saving:.1f} % of the largest budget."
    )


def starts(laboratory: Laboratory) -> Report:
    """How a self-fused model is begun: what fills the zero blocks, and what becomes of the optimizer's state."""
    one = partial(one_source, laboratory)
    preset = laboratory.preset
    sizes = preset.sizes("medium")
    wider = ("--emb", str(sizes["embed"]), "--heads", str(sizes["heads"]), "--mlp", str(sizes["mlp"]))
    antisymmetric = ("--fill", "antisymmetric", "--noise-scale", "0.2")
    # A clone has W / 2 in every block, rounds alike in all of them, and stays symmetric to the bit. The others differ
    # in what parts their copies: rounding, noise, or a state that only the first one has.
    kinds: Mapping[str, Callable[[int], tuple[Command, ...]]] = {
        "zeros": _always((*SELF, "--fill", "zeros")),
        "gaussian 0.1": _noisy(SELF),
        "antisymmetric 0.2": _seeded((*SELF, *antisymmetric)),
        "clone": _always(("ligo", "{0}", *wider, "--steps", "0", "-o", "{out}")),
        "zeros, asymmetric state": _always((*SELF, "--fill", "zeros", "--optimizer", "asymmetric")),
        "zeros, no state": _always((*SELF, "--fill", "zeros", "--optimizer", "drop")),
        "antisymmetric 0.2, no state": _seeded((*SELF, *antisymmetric, "--optimizer", "drop")),
    }
    arms = [grown(laboratory, "medium", name, one, commands) for name, commands in kinds.items()]
    results = compare(laboratory, arms)
    found, baseline = with_controls(laboratory, "medium", results)
    ends = {each.arm.name: float(np.mean(each.losses)) for each in results}
    rows = tuple(
        (
            each.arm.name,
            each.base,
            spread(each.losses),
            ends[each.arm.name] - ends["zeros"],
            spread([_defect(run) for run in each.runs]),
        )
        for each in results
    )
    return Report(
        "starts",
        "How a self-fused model starts",
        (
            Table(
                "By the start",
                ("start", "rate", "loss at its end", "difference to zeros", "symmetry defect at its end"),
                rows,
            ),
            comparison("Beside the baseline of the same compute", found),
            sweeps([each.result for each in found]),
        ),
        (
            (
                f"The best start is {min(ends, key=ends.__getitem__)}, "
                f"{max(ends.values()) - min(ends.values()):.4f} nats for a token better than the worst, "
                f"{max(ends, key=ends.__getitem__)}."
            ),
            *verdicts(found, CLAIM),
        ),
        _curves(baseline, found),
        notes=("A clone, each block W/2, has no state that could be carried: zeros without state are its control.",),
    )


def finetune(laboratory: Laboratory) -> Report:
    """Table 3: fusing before fine-tuning, on tasks that every Python has the data of."""
    preset = laboratory.preset
    one, two = partial(one_source, laboratory), partial(two_sources, laboratory)
    half, full = preset.grown_steps // 2, preset.grown_steps

    def scratch(steps: int) -> Arm:
        return Arm(f"baseline {steps}", lambda seed, base: Model("medium", seed, base, steps))

    def longer(seed: int, base: float) -> Model:
        return Model("small", seed, base, 2 * preset.small_steps)

    prop = grown(laboratory, "medium", "fusion-prop", two, _noisy(FUSE, "--norm", "property"), steps=half)
    alone = grown(laboratory, "medium", "self-fusion", one, _noisy(SELF), steps=half)
    pretrained = {
        ("baseline", "half"): scratch(half),
        ("baseline", "full"): scratch(full),
        ("fusion-prop", "half"): prop,
        ("self-fusion", "half"): alone,
        ("small", "full"): Arm("small", longer),
    }
    of_pretraining = dict(zip(pretrained, compare(laboratory, list(pretrained.values())), strict=True))

    def after(which: tuple[str, str]) -> Callable[[int], Growth | None]:
        result = of_pretraining[which]
        return lambda seed: Growth("pretrained", (result.arm.make(seed, result.base),))

    # Fine-tuning resumes with the optimizer's state of the model that it starts from; the baseline without pre-training
    # has none.
    starts_by: Mapping[tuple[str, str], Callable[[int], Growth | None]] = {
        ("baseline", "0"): lambda _: None,
        ("baseline", "half"): after(("baseline", "half")),
        ("baseline", "full"): after(("baseline", "full")),
        # What the rate is does not matter before the first step.
        ("fusion-prop", "0"): lambda seed: prop.make(seed, 1.0).growth,
        ("fusion-prop", "half"): after(("fusion-prop", "half")),
        ("self-fusion", "0"): lambda seed: alone.make(seed, 1.0).growth,
        ("self-fusion", "half"): after(("self-fusion", "half")),
        ("small", "full"): after(("small", "full")),
    }

    def tuned(which: tuple[str, str], task: str) -> Arm:
        size = "small" if which[0] == "small" else "medium"
        return Arm(
            f"{which[0]} {which[1]} {task}",
            lambda seed, rate: Model(size, seed, rate, preset.tuned_steps, starts_by[which](seed), data=task),
        )

    results = {
        (which, task): result
        for which in starts_by
        for task, result in zip(
            TASKS, compare(laboratory, [tuned(which, task) for task in TASKS], bases=preset.tuned_bases), strict=True
        )
    }
    averages = {
        which: [
            100 * float(np.mean([results[which, task].accuracies[seed] for task in TASKS]))
            for seed in range(preset.seeds)
        ]
        for which in starts_by
    }
    columns = ("model", "pre-training", *(f"{task}, %" for task in TASKS), "average, %", "GFLOP before fine-tuning")
    rows: list[tuple[Cell, ...]] = []
    for which, average in averages.items():
        before = max(results[which, task].before_flops for task in TASKS) / 1e9
        each = (spread([100 * a for a in results[which, task].accuracies], 1) for task in TASKS)
        rows.append((*which, *each, spread(average, 1), before))
    mean = {which: float(np.mean(average)) for which, average in averages.items()}
    gained = mean["self-fusion", "0"] - mean["small", "full"]
    return Report(
        "finetune",
        "Table 3: fusing before fine-tuning",
        (
            Table("Accuracy after fine-tuning", columns, tuple(rows)),
            sweeps(list(of_pretraining.values()), "Pre-training"),
            sweeps(list(results.values()), "Fine-tuning"),
            _paper("table3"),
        ),
        (
            (
                f"Self-fused and not trained on, against the small model trained twice as long: {gained:+.1f} points "
                "(the paper: 81.01 to 80.28, +0.7)."
            ),
            (
                f"Self-fused and trained on for half of the steps, against the baseline after all: "
                f"{mean['self-fusion', 'half'] - mean['baseline', 'full']:+.1f} points (the paper: +0.2)."
            ),
        ),
        notes=(
            f"Pre-training: full is {full:,} steps, half {half:,}; small models {preset.small_steps:,}, full twice.",
            (
                f"Fine-tuned for {preset.tuned_steps:,} steps; the rate is chosen for each task and model on the first "
                f"seed, from {', '.join(f'{base:g}' for base in preset.tuned_bases)} on, and so is each pre-training's."
            ),
            "Held out are a few batches, fewer of the smallest task: spreads are wide.",
        ),
    )


def ligo(laboratory: Laboratory) -> Report:
    """LiGO's comparison: twice as wide and twice as deep, by learned and by plain operators."""
    one = partial(one_source, laboratory)
    preset = laboratory.preset
    sizes, layers = preset.sizes("deep"), str(preset.depths("deep")["encoder"])
    larger = (
        "--emb",
        str(sizes["embed"]),
        "--heads",
        str(sizes["heads"]),
        "--mlp",
        str(sizes["mlp"]),
        "--layers",
        layers,
    )
    lengths = ("--length", str(preset.lengths[0]), "--target-length", str(preset.lengths[1]))
    learning = ("--data", "{text}", "--steps", str(preset.ligo_steps), "--batch", str(preset.batch), *lengths)
    grow_by: Command = ("ligo", "{0}", *larger, "-o", "{out}")
    widened: Command = ("self-fuse", "{0}", "--copies", "2", "--fill", "antisymmetric", "-o", "{between}")
    deepened: Command = ("stack", "{between}", "--layers", layers, "-o", "{out}")
    plain: Mapping[str, Callable[[int], tuple[Command, ...]]] = {
        "self-fusion, idle layers": _seeded(widened, (*deepened, "--how", "identity")),
        "self-fusion, stacked": _seeded(widened, (*deepened, "--how", "stack")),
        "duplicate": _always((*grow_by, "--steps", "0")),
        "bert2BERT-like": _always((*grow_by, "--steps", "0", "--init", "stack")),
    }
    arms = [grown(laboratory, "deep", name, one, commands, steps=preset.deep_steps) for name, commands in plain.items()]
    for name, how in (("LiGO", ()), ("LiGO, the paper's tying", ("--tie", "paper", "--init", "random"))):

        def commands(seed: int, how: Command = how) -> tuple[Command, ...]:
            return ((*grow_by, *learning, "--seed", str(seed), *how),)

        arms.append(
            grown(laboratory, "deep", name, one, commands, steps=preset.deep_steps, growth_steps=preset.ligo_steps)
        )
    results = compare(laboratory, arms)
    found, baseline = with_controls(laboratory, "deep", results)
    start = {each.arm.name: float(np.mean([run.start.loss for run in each.runs])) for each in results}
    fresh = baseline.curve.mean[0]
    duplicate = next(each.curve for each in results if each.arm.name == "duplicate")
    ordinary = float(np.interp(preset.ligo_steps, duplicate.steps, duplicate.mean))
    below = start["LiGO"] < min(start["duplicate"], fresh)
    return Report(
        "ligo",
        "LiGO: twice as wide and twice as deep",
        (comparison("Measured", found), sweeps(results), _paper("ligo")),
        (
            (
                f"After {preset.ligo_steps} steps of learning the operator, LiGO starts "
                f"{'below' if below else 'not below'} the duplicate and a random start: "
                f"{start['LiGO']:.4f}, {start['duplicate']:.4f}, {fresh:.4f}. After as many ordinary steps the "
                f"duplicate is at {ordinary:.4f}."
            ),
            *verdicts(found, CLAIM),
            _small_row(laboratory),
        ),
        _curves(baseline, found),
        notes=(
            "LiGO's steps are charged as steps of the grown model; the paper does not charge the small model's.",
            "What is self-fused carries its optimizer's state; what a linear operator makes has none.",
        ),
    )


EXPERIMENTS: Mapping[Experiment, Callable[[Laboratory], Report]] = {
    Experiment(each.__name__): each
    for each in (table1, table2, table4, figure4, figure5, figure6, starts, finetune, ligo)
}


def _paper(name: str) -> Table:
    return Table.of_paper(paper_table(name))


def _curves(baseline: Baseline, found: Sequence[Judged]) -> tuple[Curve, ...]:
    return (baseline.curve, *(each.result.curve for each in found))


def _more(difference: float) -> str:
    return f"{abs(difference):.4f} nats for a token {'above' if difference > 0 else 'below'}"


def _defect(run: Run) -> float:
    """How far the two copies in a model are from being exchangeable, of the norm of its parameters."""
    return of_checkpoint(open_source(str(run.path)), 2, Silent()).defect


def _ratio(run: Run, kernel: str) -> float:
    """The rms of the blocks off the diagonal by that of those on it."""
    values = open_checkpoint(str(run.path)).read(kernel).astype(np.float64)
    inputs, outputs = (size // 2 for size in values.shape)
    blocks = values.reshape(2, inputs, 2, outputs).swapaxes(1, 2)
    own, other = ([blocks[i, j] for i in range(2) for j in range(2) if (i == j) is same] for same in (True, False))
    return float(np.sqrt(np.mean(np.square(other)) / np.mean(np.square(own))))
