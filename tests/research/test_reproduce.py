"""The experiments: what is trained is kept and charged, every arm is held against the baseline of its compute."""

import fcntl
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import first_soon

from fusectl.cli import run as fusectl
from fusectl.errors import Corrupt, FusectlError, UsageError
from fusectl.formats.opening import open_checkpoint
from fusectl.networks.examples import window_of
from fusectl.networks.training import batch_of
from fusectl.research import reproduce as reproduction
from fusectl.research.kinds import Experiment, PresetName
from fusectl.research.reproduce import laboratory as module
from fusectl.research.reproduce.arms import (
    OTHER,
    THIRD,
    Arm,
    Baseline,
    Curve,
    Judged,
    Result,
    compare,
    grown,
    judged,
    sweep,
)
from fusectl.research.reproduce.experiments import EXPERIMENTS, FUSE, NOISE, SELF
from fusectl.research.reproduce.laboratory import Growth, Laboratory, Model, Point, Run, held_out_of
from fusectl.research.reproduce.presets import PRESETS
from fusectl.research.reproduce.report import Report, Table, comparison, verdicts
from fusectl.research.reproduce.texts import TASKS, task


SMOKE = PRESETS["smoke"]
SMALL = Model("small", 0, 1.0, 8)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    notes = []
    # The tests have eight devices.
    made = Laboratory(tmp_path_factory.mktemp("laboratory"), SMOKE, notes.append, jobs=1)
    made.notes = notes
    return made


def twice(seed=0, **changes):
    return replace(Model("medium", seed, 1.0, 8, Growth("twice", (SMALL,), ((*SELF, *NOISE),))), **changes)


# Training and growing.


@pytest.mark.slow
def test_a_run_is_kept_and_gone_on_with(laboratory):
    first = laboratory.run(SMALL)
    told = len(laboratory.notes)
    again = laboratory.run(SMALL)
    longer = laboratory.run(replace(SMALL, steps=12))

    assert again == first
    assert told == 1
    assert len(laboratory.notes) == 2
    assert [point.step for point in first.curve] == [0, 4, 8]
    assert longer.curve[:3] == first.curve
    assert first.path == longer.path.with_name("checkpoint_8")


@pytest.mark.slow
def test_to_go_on_is_the_same_as_to_train_at_once(laboratory, tmp_path):
    at_once = Laboratory(tmp_path, SMOKE, lambda _: None, jobs=1).run(replace(SMALL, steps=12))
    laboratory.run(SMALL)
    gone_on = laboratory.run(replace(SMALL, steps=12))

    assert at_once.end == gone_on.end
    assert at_once.end != laboratory.run(SMALL).end


@pytest.mark.slow
def test_a_checkpoint_without_its_part_of_the_curve_is_trained_again(tmp_path):
    made = Laboratory(tmp_path, SMOKE, lambda _: None, jobs=1)
    whole = made.run(replace(SMALL, steps=12))
    file = whole.path.parent / "run.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({**kept, "curve": [each for each in kept["curve"] if each[0] <= 4]}))
    before = whole.path.stat().st_mtime_ns

    assert made.run(replace(SMALL, steps=12)).curve == whole.curve
    assert whole.path.stat().st_mtime_ns != before


def test_batches_beyond_those_that_are_kept_are_the_same(laboratory, monkeypatch):
    examples = laboratory.examples(SMALL)
    whole = [next(batches) for batches in [examples.batches()] for _ in range(6)]
    monkeypatch.setattr(
        module, "KEPT_BYTES", 3 * sum(values.nbytes for values in batch_of(whole[0]).values() if values is not None)
    )
    stream = module._Stream(examples.batches)

    for first in (0, 2, 4):
        following = stream.following(first)
        for batch in whole[first:]:
            np.testing.assert_array_equal(next(following).encoder, batch.encoder)
    assert len(stream._made) == 3


@pytest.mark.slow
def test_self_fusion_starts_from_the_small_models_loss_and_its_state(laboratory):
    start = laboratory.run(twice(growth=Growth("zeros", (SMALL,), ((*SELF, "--fill", "zeros"),))))
    noisy = laboratory.run(twice())

    assert start.start.loss == pytest.approx(laboratory.run(SMALL).end.loss, abs=1e-5)
    assert noisy.start.loss != pytest.approx(start.start.loss, abs=1e-5)
    assert int(open_checkpoint(str(start.path)).read("state/step")) == 16


@pytest.mark.slow
def test_compute_is_charged_once_for_each_model_that_is_used(laboratory):
    small, medium = laboratory.run(SMALL), laboratory.run(twice())
    other = replace(SMALL, seed=5)
    two = twice(growth=Growth("two", (SMALL, other), ((*FUSE, *NOISE),)))

    assert laboratory.charged_flops(SMALL) == 8 * small.flops_per_step
    assert laboratory.charged_flops(twice()) == 8 * (small.flops_per_step + medium.flops_per_step)
    assert laboratory.charged_flops(two) == 8 * (2 * small.flops_per_step + medium.flops_per_step)
    learned = replace(twice(), growth=replace(twice().growth, steps=3))
    assert laboratory.charged_flops(learned) == 8 * small.flops_per_step + 11 * medium.flops_per_step


@pytest.mark.slow
def test_a_norm_for_each_source_is_trained_with_and_kept_for_finetuning(laboratory):
    other = replace(SMALL, seed=5)
    by_norm = {
        norm: twice(growth=Growth(norm, (SMALL, other), ((*FUSE, "--fill", "zeros", "--norm", norm),)))
        for norm in ("rule", "property")
    }
    ends = {norm: laboratory.run(model).end.loss for norm, model in by_norm.items()}
    tuned = Model("medium", 0, 0.1, 4, Growth("pretrained", (by_norm["property"],)), data="category")

    assert ends["rule"] != ends["property"]
    # Of random weights that are trained for some steps the ensemble is what a norm for each source computes.
    assert (
        laboratory.run(tuned).start.loss
        != laboratory.run(replace(tuned, growth=Growth("pretrained", (by_norm["rule"],)))).start.loss
    )


@pytest.mark.slow
def test_grown_models_learn_from_batches_that_none_of_their_sources_saw(laboratory):
    def first(model):
        return next(laboratory.examples(model).batches()).encoder

    sources = tuple(replace(SMALL, seed=seed) for seed in (0, OTHER, THIRD, OTHER + THIRD))
    mediums = [twice(seed=each[0].seed, growth=Growth("fused", each, (FUSE,))) for each in (sources[:2], sources[2:])]
    large = Model("large", 0, 0.5, 4, Growth("fused again", tuple(mediums), (FUSE,)))
    seen = [*sources, *mediums]

    assert not any(np.array_equal(first(large), first(each)) for each in seen)
    assert not any(np.array_equal(first(medium), first(each)) for medium in mediums for each in sources)
    # A task's order is the same for all.
    assert np.array_equal(first(replace(large, data="category")), first(replace(SMALL, data="category")))


@pytest.mark.slow
def test_operators_are_not_learned_from_what_is_held_out(laboratory):
    with pytest.MonkeyPatch.context() as patch:
        words = []
        patch.setattr(laboratory, "fusectl", words.append)
        laboratory.grown(Growth("learned", (SMALL,), (("ligo", "--data", "{text}"),)))
    learned = Path(words[0][2]).read_bytes()
    examples = laboratory.examples(SMALL)
    validation, test = held_out_of(examples)
    window, rows = window_of(*SMOKE.lengths), sum(len(batch.encoder) for batch in examples.held_out)

    assert laboratory.text.read_bytes().startswith(learned)
    assert len(laboratory.text.read_bytes()) - len(learned) >= rows * window
    assert len(learned) % window == 0
    assert len(validation) == len(test) == 16
    assert not any(one is other for one in validation for other in test)


def test_two_processes_do_not_run_in_one_directory(tmp_path, capsys):
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        assert fusectl(["reproduce", "figure4", "--preset", "smoke", "-o", str(tmp_path)]) == 7
    finally:
        os.close(held)
    assert "another process" in capsys.readouterr().err
    assert not list(tmp_path.glob("figure4*"))


@pytest.mark.slow
def test_commands_that_fail_say_so(laboratory):
    with pytest.raises(FusectlError, match="self-fuse.*exit code 2"):
        laboratory.grown(Growth("wrong", (SMALL,), (("self-fuse", "{0}", "--copies", "0", "-o", "{out}"),)))


def test_a_directory_has_one_preset(laboratory):
    with pytest.raises(UsageError, match="another preset"):
        Laboratory(laboratory.out, replace(SMOKE, batch=4), lambda _: None, jobs=1)


# What results are held against.


def made_up(losses, *, flops=10.0, size="medium", name="arm", before=0.0, every=1):
    curves = [tuple(Point(i * every, loss, 0.5, loss) for i, loss in enumerate(each)) for each in losses]
    steps = (len(losses[0]) - 1) * every
    runs = tuple(Run(Model(size, seed, 1.0, steps), Path(), each, flops) for seed, each in enumerate(curves))
    return Result(Arm(name, lambda *_: None), 1.0, runs, {1.0: losses[0][-1]}, before + steps * flops)


class Made:
    """A laboratory whose runs from scratch have these curves, by rate and seed."""

    def __init__(self, curves, bases, seeds):
        self.preset = replace(SMOKE, bases=bases, seeds=seeds)
        self._curves = curves

    def run(self, model):
        losses = self._curves[model.base, model.seed]
        curve = tuple(Point(step, loss, 0.0, loss) for step, loss in enumerate(losses) if step <= model.steps)
        return Run(model, Path(), curve, 10.0)

    def all(self, models):
        return [self.run(model) for model in models]


FALLING = {(1.0, seed): [6.0 - step + 0.1 * seed for step in range(6)] for seed in (0, 1)}


def test_the_baseline_judged_by_itself_saves_nothing():
    same = made_up([FALLING[1.0, seed] for seed in (0, 1)])
    judgement = Baseline(Made(FALLING, (1.0,), 2), "medium", 5).judge(same)

    assert judgement.difference == pytest.approx(0.0)
    assert judgement.saved == pytest.approx(0.0)
    assert judgement.verdict == "no difference beyond the spread"


@pytest.mark.parametrize(("end", "verdict", "saved"), [(0.5, "better", None), (3.05, "worse", 1 - 50 / 30)])
def test_better_and_worse_are_beyond_all_seeds(end, verdict, saved):
    judgement = Baseline(Made(FALLING, (1.0,), 2), "medium", 5).judge(
        made_up([[9.0, 9.0, 9.0, 9.0, 9.0, end], [9.0, 9.0, 9.0, 9.0, 9.0, end]])
    )

    assert judgement.verdict == verdict
    assert judgement.saved == (None if saved is None else pytest.approx(saved))


def test_what_was_spent_before_is_charged():
    ends = [[9.0, 9.0, 9.0, 3.05], [9.0, 9.0, 9.0, 3.05]]
    baseline = Baseline(Made(FALLING, (1.0,), 2), "medium", 5)

    assert baseline.judge(made_up(ends)).verdict == "no difference beyond the spread"
    assert baseline.judge(made_up(ends, before=10.0)).verdict == "worse"


def test_the_baselines_rate_is_the_best_for_each_length():
    # Fast at first, and slow but lower in the end.
    curves = {(1.0, 0): [6.0, 3.0, 2.9, 2.8], (0.5, 0): [6.0, 5.0, 3.5, 1.0]}
    baseline = Baseline(Made(curves, (1.0, 0.5), 1), "medium", 3)

    assert baseline.at(1)[0] == 1.0
    assert baseline.at(3)[0] == 0.5
    assert [baseline.loss_at(10.0 * step) for step in (1, 2, 3)] == [3.0, 2.9, 1.0]
    assert baseline.flops_to(3.0) == 10.0
    assert baseline.flops_to(1.0) == 30.0
    assert baseline.flops_to(0.5) is None


def test_a_compute_is_found_between_the_points_of_a_curve():
    losses = (4.0, 2.0, 1.0)
    curve = Curve("c", (0, 1, 2), (0.0, 10.0, 20.0), losses, losses, losses, losses)

    assert curve.flops_to(3.0) == pytest.approx(5.0)
    assert curve.flops_to(5.0) == 0.0
    assert curve.flops_to(0.5) is None
    assert curve.at(15.0) == pytest.approx(1.5)


def test_every_arm_takes_the_rate_that_is_best_on_its_first_seed():
    ends = {("a", 1.0): 2.0, ("a", 0.5): 3.0, ("b", 1.0): 2.0, ("b", 0.5): 1.0}

    class Arms(Made):
        def run(self, model):
            end = ends[model.data, model.base] + model.seed / 10
            # What is reported would choose the other one.
            return Run(model, Path(), (Point(0, 5.0, 0.0, 5.0), Point(1, 9.0 - end, 0.0, end)), 10.0)

        def charged_flops(self, model):
            return 10.0

    arms = [Arm(name, lambda seed, base, name=name: Model("medium", seed, base, 1, data=name)) for name in ("a", "b")]
    found = compare(Arms({}, (1.0, 0.5), 2), arms)

    assert [each.base for each in found] == [1.0, 0.5]
    assert found[0].swept == {1.0: 2.0, 0.5: 3.0}
    assert found[1].losses == pytest.approx((8.0, 7.9))


@pytest.mark.parametrize(
    ("losses", "tried"),
    [
        ({0.5: 3.0, 1.0: 1.0, 2.0: 2.0}, {0.5, 1.0, 2.0}),
        ({0.25: 4.0, 0.5: 3.0, 1.0: 2.0, 2.0: 1.0, 4.0: 1.5}, {0.5, 1.0, 2.0, 4.0}),
        ({0.125: 2.0, 0.25: 1.0, 0.5: 2.0, 1.0: 3.0}, {0.125, 0.25, 0.5, 1.0}),
        ({0.5: 5.0, 1.0: 4.0, 2.0: 3.0, 4.0: 2.0, 8.0: 1.0}, {0.5, 1.0, 2.0, 4.0}),
    ],
)
def test_a_sweep_goes_on_while_the_best_rate_is_the_last(losses, tried):
    found = sweep(["arm"], (0.5, 1.0), 2, lambda wanted: [losses[base] for _, base in wanted])

    assert set(found["arm"]) == tried


def test_one_seed_gives_no_verdict():
    alone = {(1.0, 0): FALLING[1.0, 0]}
    judgement = Baseline(Made(alone, (1.0,), 1), "medium", 5).judge(made_up([[9.0, 9.0, 9.0, 9.0, 9.0, 0.5]]))

    assert "no verdict" in judgement.verdict
    assert "is open" in verdicts([judgement], "it is better")[0]


# Data and reports.


@pytest.mark.parametrize("name", first_soon(TASKS))
def test_a_tasks_examples_are_classes_and_none_is_held_out_and_learned(laboratory, name, tmp_path):
    rows = [json.loads(line) for line in task(name, tmp_path).read_text().splitlines()]
    examples = laboratory.examples(replace(SMALL, data=name))
    held = {tuple(row) for batch in examples.held_out for row in batch.encoder}
    batches = examples.batches()
    learned = {tuple(row) for _ in range(20) for row in next(batches).encoder}

    assert len({row["targets"][0] for row in rows}) >= 5
    assert all(len(row["targets"]) == 1 and max(row["inputs"]) < 384 for row in rows)
    assert task(name, tmp_path / ".").read_bytes() == (tmp_path / f"{name}.jsonl").read_bytes()
    # Names that are cut to one length may coincide.
    assert len(held & learned) <= len(held) // 10


def test_a_report_stands_beside_the_papers_numbers(tmp_path):
    one = Judged(made_up([[3.0, 2.0], [3.0, 2.1]]), 1.0, (2.5, 2.4, 2.6), None, 100.0)
    report = Report("table1", "A title", (comparison("Measured", [one]), Table.of_paper(paper())), ("found",))
    files = report.write(tmp_path, ["how"])
    text = files[0].read_text()

    assert "| arm | 1 | 3 | 2.0500 (2.0000 to 2.1000)" in text
    assert "better" in text
    assert "> 90" in text
    assert "self-fusion" in text
    assert "67.2" in text
    assert json.loads(files[1].read_text())["circumstances"] == ["how"]


def paper():
    from fusectl.research.papers import table

    return table("table1")


def numbers_in(text):
    return set(re.findall(r"(?<![\d.])[12]\.\d{3}(?!\d)", text))


def test_the_losses_that_the_readme_tells_are_those_of_the_reports():
    reports = Path(module.__file__).parent / "reports"
    kept = [json.loads(file.read_text()) for file in sorted(reports.glob("*.json"))]
    shown = " ".join(str(cell) for each in kept for table in each["tables"] for row in table["rows"] for cell in row)
    shown += " ".join(sentence for each in kept for sentence in each["found"])
    shown += " ".join(table["title"] for each in kept for table in each["tables"])
    measured = {f"{float(number):.3f}" for number in re.findall(r"(?<![\d.])[12]\.\d{3,}", shown)}
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    told = numbers_in(readme.partition("## The papers' claims, put to the test")[2].partition("\n## ")[0])

    assert {each["experiment"] for each in kept} <= set(EXPERIMENTS)
    assert len(told) > 10
    assert told <= measured
    assert not numbers_in("2.999") <= measured


def test_the_command_offers_what_there_is():
    assert set(EXPERIMENTS) == set(Experiment)
    assert set(PRESETS) == set(PresetName)


def smoke(experiment, out):
    """On one device, where models are trained side by side."""
    words = ["reproduce", experiment, "--preset", "smoke", "-o", str(out), "--json"]
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    environment = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-m", "fusectl", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["result"]
    assert found["found"]
    for file in found["files"]:
        assert Path(file).stat().st_size
    kept = json.loads((out / f"{experiment}.json").read_text())
    cells = " ".join(str(cell) for each in kept["tables"] for row in each["rows"] for cell in row)
    numbers = [float(number) for number in re.findall(r"(?<![\w.])-?(?:\d+\.\d+|inf|nan)\b", cells, re.IGNORECASE)]
    assert numbers
    assert all(math.isfinite(number) for number in numbers)
    return kept


@pytest.mark.slow
def test_table1_runs_and_reports(tmp_path):
    kept = smoke("table1", tmp_path)
    rows = {row[0]: row for row in kept["tables"][0]["rows"]}

    without = {"no growth: the small model", "no growth: from scratch"}
    assert set(rows) == {"fusion-rule", "fusion-prop", "self-fusion"} | without
    curves = {each["name"]: each for each in kept["curves"]}
    # Two small models cost twice as much before the first step as one.
    before = {name: each["flops"][0] for name, each in curves.items()}
    assert before["scratch, medium"] == 0
    assert before["fusion-rule"] == pytest.approx(2 * before["self-fusion"])
    assert max(curves["scratch, medium"]["flops"]) >= max(curves["fusion-rule"]["flops"])


@pytest.mark.slow
def test_every_experiment_runs_and_reports(tmp_path):
    for experiment in EXPERIMENTS:
        smoke(experiment, tmp_path)
    # LiGO's start is beside the duplicate's, whose loss is the small model's.
    kept = json.loads((tmp_path / "ligo.json").read_text())
    starts = {row[0]: row[2] for row in kept["tables"][0]["rows"]}
    small = Laboratory(tmp_path, SMOKE, lambda _: None, jobs=1).run(SMALL)
    assert starts["duplicate"] == pytest.approx(small.end.loss, abs=1e-4)
    assert starts["self-fusion, idle layers"] == pytest.approx(small.end.loss, abs=1e-4)
    assert starts["LiGO, the paper's tying"] != pytest.approx(small.end.loss, abs=1e-2)


def test_wrong_names_are_refused(tmp_path, capsys):
    assert fusectl(["reproduce", "table9", "-o", str(tmp_path)]) == 2
    assert fusectl(["reproduce", "table1"]) == 2
    capsys.readouterr()
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_directory_that_is_none_and_notes_that_are_damaged_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not a directory"):
        Laboratory(tmp_path / "file", SMOKE, lambda _: None, jobs=1)
    made = Laboratory(tmp_path / "there", SMOKE, lambda _: None, jobs=1)
    (made.out / "preset.json").write_text("{")
    with pytest.raises(Corrupt, match="not what was written"):
        Laboratory(tmp_path / "there", SMOKE, lambda _: None, jobs=1)


@pytest.mark.slow
def test_a_directory_may_begin_with_a_dash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Laboratory(Path("-x"), SMOKE, lambda _: None, jobs=1)

    assert made.run(twice()).start.loss > 0


@pytest.mark.slow
def test_judged_trains_the_baseline_as_far_as_the_most_compute(laboratory):
    arms = [grown(laboratory, "medium", "self", lambda _: (SMALL,), lambda _: ((*SELF, *NOISE),))]
    results = compare(laboratory, arms)
    (one,), baseline = judged(laboratory, "medium", results)

    assert baseline.curve.flops[-1] >= one.result.charged_flops
    assert np.isfinite(one.difference)


def test_models_are_trained_side_by_side_on_one_device_only(monkeypatch):
    import jax

    assert len(jax.devices()) == 8
    assert reproduction._jobs() == 1
    monkeypatch.setattr(jax, "devices", lambda devices=jax.devices()[:1]: devices)
    assert reproduction._jobs() == (os.cpu_count() or 1)


@pytest.mark.slow
def test_batches_lie_over_all_devices(laboratory, tmp_path):
    script = (
        "import sys, pathlib, jax\n"
        "from fusectl.research.reproduce.laboratory import Laboratory, Model\n"
        "from fusectl.research.reproduce.presets import PRESETS\n"
        "made = Laboratory(pathlib.Path(sys.argv[1]), PRESETS['smoke'], print, 1)\n"
        "run = made.run(Model('small', 0, 0.05, 4))\n"
        "print(len(jax.devices()), run.end.loss)\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    devices, loss = done.stdout.split()[-2:]

    assert int(devices) == 4
    # At a low rate: at the preset's, steps amplify what rounding leaves.
    assert float(loss) == pytest.approx(laboratory.run(Model("small", 0, 0.05, 4)).end.loss, abs=1e-4)
