"""When to fuse: against closed forms and brute force, on noisy curves, and through the program."""

import json

import numpy as np
import pytest
from cases import first_soon
from models import SIZES, checkpoint
from written import csv_of, events_of, lines_of

from fusectl.errors import Incompatible, UsageError
from fusectl.families.recognition import recognize
from fusectl.formats.opening import open_checkpoint
from fusectl.research.curves import Curve
from fusectl.research.flops import flops_per_step
from fusectl.research.papers import table
from fusectl.research.when import Costs, advise


def power(limit, scale, exponent):
    return lambda steps: limit + scale * np.asarray(steps, float) ** -exponent


def curve(law, last, every=100, noise=0.0, seed=0):
    steps = np.arange(every, last + 1, every, dtype=float)
    return Curve("curve", steps, law(steps) + noise * np.random.default_rng(seed).normal(size=len(steps)))


SMALL = power(2.0, 20.0, 0.4)


def closed_form(scale, exponent, gap, ratio):
    """Where the slopes per operation are equal, of two curves that are `gap` apart at every step."""
    return (scale / gap * (ratio ** (exponent / (1 + exponent)) - 1)) ** (1 / exponent)


@pytest.mark.parametrize(("gap", "ratio"), [(0.1, 3.0), (0.15, 3.0), (0.2, 4.0), (0.1, 2.0)])
def test_for_a_gap_it_is_where_the_closed_form_has_it(gap, ratio):
    found = advise(curve(SMALL, 100_000), Costs(ratio), gap=gap)

    assert found.best_step == pytest.approx(closed_form(20.0, 0.4, gap, ratio), rel=0.005)
    assert found.grow
    assert found.large.limit == pytest.approx(2.0 - gap, abs=1e-3)


def brute_force(small, large, ratio, budget):
    """Every step of the small model tried, one by one, in whole steps: the best one, the loss that the budget reaches,
    and the least compute that reaches what it reaches from scratch.
    """
    of_large = large(np.arange(1, 4 * budget))
    best, target = (np.inf, 0), of_large[budget - 1]
    least = float(budget)
    for s in range(5_000, int(budget * ratio), 50):
        loss = float(small(s))
        # The grown model stands where the large one is first as low, and has what is left of the budget.
        begin = 1 + int(np.searchsorted(-of_large, -loss))
        left = int(budget - s / ratio)
        best = min(best, (of_large[begin + left - 1], s))
        if begin <= budget:
            least = min(least, s / ratio + (budget - begin))
    assert target == of_large[budget - 1]
    return best[1], best[0], 1 - least / budget


# The small one learns faster per operation at first, and ends higher.
LARGE = power(1.8, 18.0, 0.36)


@pytest.mark.parametrize("budget", first_soon([60_000, 120_000]))
def test_two_curves_give_what_trying_every_step_does(budget):
    small, ratio = power(2.1, 18.0, 0.42), 3.0
    step, loss, saving = brute_force(small, LARGE, ratio, budget)

    found = advise(curve(small, 150_000), Costs(ratio), large=curve(LARGE, 150_000), budget_steps=budget)

    assert 6_000 < step < 140_000
    # The optimum is flat: what is reached tells more than where.
    assert found.best_step == pytest.approx(step, rel=0.03)
    assert found.main.loss == pytest.approx(loss, abs=2e-4)
    assert found.main.saving == pytest.approx(saving, abs=2e-3)
    assert saving > 0.02
    assert found.main.scratch_loss == pytest.approx(float(LARGE(budget)), abs=2e-4)
    assert found.nearly[0] < step < found.nearly[1]
    assert found.best_step < found.pays_until


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_noise_moves_the_step_and_costs_little(seed):
    small, ratio, budget = power(2.1, 18.0, 0.42), 3.0, 100_000
    truth, *_ = brute_force(small, LARGE, ratio, budget)
    curves = [curve(law, 150_000, noise=0.02, seed=(seed, i)) for i, law in enumerate((small, LARGE))]

    found = advise(curves[0], Costs(ratio), large=curves[1], budget_steps=budget)

    def compute(step):
        begin = ((small(step) - 1.8) / 18.0) ** (-1 / 0.36)
        return step / ratio + budget - begin

    assert compute(found.best_step) < 1.01 * compute(truth)
    assert found.notes[0] == "curve: 1,426 points are averaged to 128"


@pytest.mark.slow
def test_the_interval_holds_the_true_step_about_as_often_as_it_says():
    truth = closed_form(20.0, 0.4, 0.15, 3.0)
    intervals = [
        advise(curve(SMALL, 100_000, noise=0.02, seed=seed), Costs(3.0), gap=0.15).interval for seed in range(40)
    ]

    inside = sum(low <= truth <= high for low, high in intervals)
    # Nine of ten. An interval that is twice as narrow holds six of ten, one that holds all says nothing.
    assert 31 <= inside <= 39
    narrow = sum(abs(truth - (low + high) / 2) <= (high - low) / 8 for low, high in intervals)
    assert narrow < 31


def test_more_noise_makes_the_interval_wider():
    wide = []
    for noise in (0.005, 0.02):
        low, high = advise(curve(SMALL, 100_000, noise=noise), Costs(3.0), gap=0.15).interval
        wide.append(high - low)

    assert wide[1] > 2 * wide[0] > 0


def test_a_small_model_that_saturates_later_is_fused_later():
    # The same curve in twice the steps, and one that falls more slowly.
    first = advise(curve(SMALL, 100_000), Costs(3.0), gap=0.15)
    stretched = advise(curve(lambda steps: SMALL(steps / 2), 200_000, 200), Costs(3.0), gap=0.15)
    slower = advise(curve(power(2.0, 20.0, 0.36), 100_000), Costs(3.0), gap=0.15)

    assert stretched.best_step == pytest.approx(2 * first.best_step, rel=1e-6)
    assert slower.best_step > 1.5 * first.best_step


def test_the_best_step_does_not_depend_on_a_budget_that_pays_for_it():
    found = advise(curve(SMALL, 100_000), Costs(3.0), gap=0.15, budget_steps=40_000)

    assert [each.budget_steps for each in found.budgets] == [20_000, 40_000, 80_000, 160_000]
    steps = [each.best_step for each in found.budgets]
    assert max(steps) < 1.005 * min(steps)
    assert found.finding.independent_of_budget
    savings = [each.saving for each in found.budgets]
    assert savings == sorted(savings, reverse=True)


def test_a_budget_that_does_not_pay_for_it_goes_to_the_small_model():
    best = closed_form(20.0, 0.4, 0.15, 3.0)
    found = advise(curve(SMALL, 100_000), Costs(3.0), gap=0.15, budget_steps=best / 6)

    assert found.main.small_alone
    assert found.best_step == pytest.approx(best / 2)
    assert any("all of it is the small model's" in note for note in found.notes)
    assert not found.finding.independent_of_budget
    # By its own curve it gets as low as the large one would, for less than all of it.
    target = float(SMALL(best / 6)) - 0.15
    alone = (20.0 / (target - 2.0)) ** (1 / 0.4)
    assert alone < best / 2
    assert found.main.saving == pytest.approx(1 - alone / (best / 2), abs=0.01)


def test_a_large_model_that_is_ahead_at_every_compute_is_not_grown():
    # A third of the steps, and lower all the same.
    large = power(1.8, 14.0, 0.42)
    assert all(large(steps / 3) < SMALL(steps) for steps in range(1_000, 200_000, 1_000))

    found = advise(curve(SMALL, 100_000), Costs(3.0), large=curve(large, 100_000))

    assert found.grow is False
    assert found.best_step is None
    assert found.main.saving == 0
    assert found.main.loss == found.main.scratch_loss
    assert any("growing does not pay" in note for note in found.notes)


def test_without_a_large_model_there_is_no_best_step():
    found = advise(curve(SMALL, 100_000), Costs(3.0))

    assert found.best_step is found.grow is found.main is None
    assert any("no best step and no saving can be told" in line for line in found.assumptions)
    # The lower the large one ends, the sooner.
    steps = [each.best_step for each in found.gaps.values()]
    assert steps == sorted(steps, reverse=True)
    for gap, each in found.gaps.items():
        if each.best_step > 1.01 * found.small.first_step and not each.small_alone:
            assert each.best_step == pytest.approx(closed_form(20.0, 0.4, gap, 3.0), rel=0.01)
    # 20 * s**-0.4 of 20 * 100**-0.4 is left at the end.
    assert found.made_at_end == pytest.approx(1 - 1000**-0.4, abs=1e-3)
    assert found.break_even == pytest.approx(3 * float(SMALL(99_999.5) - SMALL(100_000.5)), rel=1e-3)


@pytest.mark.slow
def test_what_is_extrapolated_is_said():
    later = advise(curve(SMALL, 100_000), Costs(3.0), gap=0.05, budget_steps=1_000_000)
    sooner = advise(curve(SMALL, 100_000), Costs(3.0), gap=0.15)
    beyond = advise(curve(SMALL, 100_000), Costs(3.0), large=curve(LARGE, 40_000), budget_steps=80_000)
    within = advise(curve(SMALL, 100_000), Costs(3.0), large=curve(LARGE, 90_000), budget_steps=80_000)

    def says(found, text):
        return any(text in note for note in found.notes)

    assert later.best_step > 100_000
    assert says(later, "the best step is extrapolated")
    assert not says(sooner, "extrapolated")
    assert says(beyond, "ends at step 40,000: losses beyond are extrapolated")
    assert not says(within, "losses beyond")


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_decay_of_the_learning_rate_is_noticed(noise):
    plain = curve(SMALL, 100_000, noise=noise)
    decayed = Curve("decayed", plain.steps, plain.losses - 0.1 * np.clip((plain.steps - 90_000) / 10_000, 0, 1))

    def says(found):
        return any("its last tenth falls below" in note for note in found.notes)

    assert says(advise(decayed, Costs(3.0), gap=0.15))
    assert not says(advise(plain, Costs(3.0), gap=0.15))


def test_a_curve_that_does_not_saturate_says_so():
    steps = np.arange(1_000, 100_001, 1_000.0)
    found = advise(Curve("log", steps, 10 - 0.5 * np.log(steps)), Costs(3.0))

    assert any("no saturation to be seen" in note for note in found.notes)
    assert not any("no saturation" in note for note in advise(curve(SMALL, 100_000), Costs(3.0)).notes)


def test_the_papers_hours_give_a_cost_and_its_step_is_near_what_its_curve_would_have_to_be():
    row = table("table4").row("self-fusion")
    ratio = (row["large_hours"] / row["large_steps"]) / (row["small_hours"] / row["small_steps"])

    assert ratio == pytest.approx(2.74, abs=0.01)
    # For that cost there is a gap whose best step is the paper's; it is fused neither at the start nor at the end.
    gap = 20.0 * 500_000**-0.4 * (ratio ** (0.4 / 1.4) - 1)
    found = advise(curve(SMALL, 1_000_000, 1000), Costs(ratio), gap=gap, budget_steps=1_500_000)
    assert found.best_step == pytest.approx(500_000, rel=0.01)
    assert found.finding.independent_of_budget
    assert found.finding.well_trained
    assert found.finding.not_converged


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"small": curve(SMALL, 100)}, UsageError, "1 of 1 points"),
        ({"small": curve(SMALL, 500)}, UsageError, "a fit takes|5 of 5 points"),
        ({"small": curve(lambda s: 2 + s / 1e5, 10_000)}, Incompatible, "does not fall"),
        ({"budget_steps": 0}, UsageError, "a budget of 0"),
        ({"budget_steps": 100}, UsageError, "too small"),
        ({"budget_steps": float("nan")}, UsageError, "a budget of nan"),
        ({"gap": -1.0}, UsageError, "a gap of -1"),
        ({"large": curve(LARGE, 10_000)}, UsageError, "in its place"),
        ({"large": curve(power(2.5, 18.0, 0.4), 50_000), "gap": None}, Incompatible, "never gets as low"),
        ({"fit_from": 1e9}, UsageError, "0 of 1,000 points"),
    ],
)
def test_what_has_no_answer_is_refused(change, error, says):
    given = {"small": curve(SMALL, 100_000), "gap": 0.15, **change}
    with pytest.raises(error, match=says):
        advise(given.pop("small"), Costs(3.0), **given)


@pytest.mark.parametrize("ratio", [1.0, 0.5, float("nan"), float("inf")])
def test_a_large_model_costs_more(ratio):
    with pytest.raises(UsageError, match="more than one is growth"):
        Costs(ratio)


@pytest.fixture
def small_csv(tmp_path):
    found = curve(SMALL, 100_000)
    return csv_of(tmp_path / "small.csv", zip(found.steps, found.losses, strict=True))


@pytest.fixture
def large_csv(tmp_path):
    found = curve(LARGE, 100_000)
    return csv_of(tmp_path / "large.csv", zip(found.steps, found.losses, strict=True))


@pytest.mark.slow
def test_the_program_says_when(fusectl, small_csv, large_csv, tmp_path):
    done = fusectl("when", small_csv, "--large-curve", large_csv, "--cost-ratio", 3, "--plot", tmp_path / "w.png")
    as_json = fusectl("when", small_csv, "--large-curve", large_csv, "--cost-ratio", 3, "--json").json["result"]

    assert done.code == 0, done.err
    assert f"{as_json['best_step']:,.0f} of the small model" in done.out
    assert f"{as_json['saving']:.1%} of 100,000 large steps" in done.out
    assert "assumed" in done.out
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")
    assert {"best_step", "saving", "range", "assumptions", "fit"} <= as_json.keys()
    assert as_json["fit"]["small"]["exponent"] == pytest.approx(0.4, abs=1e-3)
    assert as_json["range"][0] <= as_json["best_step"] <= as_json["range"][1]
    again = fusectl("when", small_csv, "--cost-ratio", 3, "--gap", 0.1, "--plot", tmp_path / "w.png")
    assert again.code == 7
    without = fusectl("when", small_csv, "--cost-ratio", 3, "--plot", tmp_path / "w.png", "--force")
    assert without.code == 0, without.err
    assert "cannot be told" in without.out


@pytest.mark.slow
def test_all_kinds_of_files_give_the_same_answer(fusectl, small_csv, tmp_path):
    found = curve(SMALL, 100_000)
    # Event files hold float32: the others are given what it holds.
    points = [(int(s), float(np.float32(v))) for s, v in zip(found.steps, found.losses, strict=True)]
    paths = [
        csv_of(tmp_path / "a.csv", points),
        lines_of(tmp_path / "a.jsonl", [{"step": s, "loss": v} for s, v in points]),
        events_of(tmp_path / "run", points),
    ]
    results = [fusectl("when", path, "--cost-ratio", 3, "--gap", 0.1, "--json").json["result"] for path in paths]

    for result in results:
        # Notes name their files.
        result.pop("notes")
    assert results[0] == results[1] == results[2]
    assert results[0]["best_step"] > 0


def test_costs_are_counted_for_a_checkpoint_and_what_it_grows_to(fusectl, small_csv, tmp_path):
    path = checkpoint(tmp_path / "small")
    tree = recognize(open_checkpoint(path).shapes, path)
    wide = tree.resized({"embed": 24, "heads": 6, "joined_kv": 30, "mlp": 44}, {})
    lengths = {"batch": 8, "length": 64, "target_length": 20}
    expected = [flops_per_step(each, **lengths) for each in (tree, wide)]
    words = ["when", small_csv, "--small", path, "--batch", 8, "--length", 64, "--target-length", 20, "--json"]

    for to in (["--copies", 2], ["--large", "emb=24,heads=6,mlp=44"]):
        result = fusectl(*words, *to).json["result"]
        assert [result["costs"]["small_flops"], result["costs"]["large_flops"]] == expected
        assert result["costs"]["ratio"] == expected[1] / expected[0]
    larger = checkpoint(tmp_path / "large", sizes={**SIZES, **{axis: wide.sizes[axis] for axis in wide.family.grown}})
    assert fusectl(*words, "--large", larger).json["result"]["costs"]["large_flops"] == expected[1]
    budget = fusectl(*words, "--copies", 2, "--gap", 0.1, "--budget-flops", 60_000 * expected[1]).json["result"]
    assert budget["budget_steps"] == pytest.approx(60_000)
    told = fusectl("when", small_csv, "--small-flops", expected[0], "--large-flops", expected[1], "--json")
    assert told.json["result"]["costs"] == result["costs"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "what steps cost"),
        (["--cost-ratio", 3, "--small-flops", 1], 2, "what steps cost"),
        (["--cost-ratio", 3, "--copies", 2], 2, "what steps cost"),
        (["--small-flops", 1], 2, "both"),
        (["--small-flops", 0, "--large-flops", 1], 2, "steps of 0 and 1"),
        (["--small", "x"], 2, "what it grows to"),
        (["--small", "x", "--copies", 2], 4, "x"),
        (["--cost-ratio", 3, "--budget-flops", 1e9], 2, "is not known"),
        (["--small-flops", 1, "--large-flops", 3, "--budget-flops", 1e9, "--budget", 3], 2, "one of them"),
        (["--cost-ratio", 3, "--loss-column", "nll"], 2, "there are 'step', 'loss'"),
        (["--cost-ratio", 3, "--gap", 0.1, "--plot", "when.txt"], 2, "--plot when.txt: no format of pictures"),
    ],
)
def test_what_is_not_said_well_is_answered(fusectl, small_csv, words, code, says):
    done = fusectl("when", small_csv, *words)

    assert done.code == code
    assert says in done.err
    assert json.loads(fusectl("when", small_csv, *words, "--json").out)["error"]["message"]
