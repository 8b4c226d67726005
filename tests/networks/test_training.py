"""The small trainer: it learns, by the schedule that it says, keeps states as T5X does, and counts its compute."""

import itertools
import math

import numpy as np
import pytest
from models import SIZES, checkpoint

from fusectl.families.recognition import recognize
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.sink import save
from fusectl.networks.examples import read_examples
from fusectl.networks.training import Recipe, Trainer, random_parameters
from fusectl.operations.fuse import plan_fusion
from fusectl.optimizer.registry import find_state
from fusectl.planning.options import Options
from fusectl.writing.carrying_out import carry_out


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    path = checkpoint(tmp_path_factory.mktemp("model") / "a", sizes={**SIZES, "vocab": 270})
    return Trainer(recognize(open_checkpoint(path).shapes, path))


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_bytes(b"the same words again and again, " * 200)
    return read_examples(
        str(text), vocab=270, objective="span_corruption", batch=8, lengths=(32, 16), seed=0, sentinel=265
    )


RECIPE = Recipe(1.0, warmup=5)


def begun(trainer):
    return trainer.begin(random_parameters(trainer.tree, 0))


def values_of(state):
    return {name: np.asarray(each) for name, each in state.parameters.items()}


@pytest.mark.slow
def test_the_loss_falls_and_compute_is_counted(trainer, examples):
    start = begun(trainer)
    before = trainer.measure(start.parameters, examples.held_out)
    noted = []
    after = trainer.train(start, examples.batches(), RECIPE, 30, lambda step, _: noted.append(step))
    found = trainer.measure(after.parameters, examples.held_out)

    assert after.step == 30
    assert noted == list(range(1, 31))
    assert found.loss < 0.8 * before.loss
    assert found.accuracy > before.accuracy
    # A product counts two for each value of its kernel and each token, three times over with the derivatives.
    shapes = trainer.tree.shapes
    least = 6 * 8 * 16 * sum(math.prod(s) for n, s in shapes.items() if n.startswith("decoder/layers"))
    assert least < trainer.flops_per_step(after, examples.held_out[0])


@pytest.mark.slow
def test_to_train_on_is_to_continue_also_from_disk(trainer, examples, tmp_path):
    whole = trainer.train(begun(trainer), examples.batches(), RECIPE, 12)
    half = trainer.train(begun(trainer), examples.batches(), RECIPE, 7)
    save(tmp_path / "checkpoint_7", trainer.stored(half), "t5x")
    kept = open_checkpoint(str(tmp_path / "checkpoint_7"))
    rest = itertools.islice(examples.batches(), 7, None)
    continued = trainer.train(trainer.restored(kept.read, kept.shapes), rest, RECIPE, 5)
    without = trainer.begin(values_of(trainer.restored(kept.read, kept.shapes)), 7)
    forgotten = trainer.train(without, itertools.islice(examples.batches(), 7, None), RECIPE, 5)

    for name, values in values_of(whole).items():
        np.testing.assert_array_equal(values_of(continued)[name], values)
    # The control: moments matter.
    assert any(not np.array_equal(values_of(forgotten)[name], values) for name, values in values_of(whole).items())


@pytest.mark.slow
def test_states_are_what_fusectl_takes_for_t5x_adafactor_and_carries(trainer, examples, tmp_path):
    state = trainer.train(begun(trainer), examples.batches(), RECIPE, 3)
    small = tmp_path / "checkpoint_3"
    save(small, trainer.stored(state), "t5x")
    kept = open_checkpoint(str(small))
    assert find_state(kept.shapes, trainer.tree, "here").kind == "adafactor"

    carry_out(*plan_fusion([str(small)] * 2, Options(), command="self-fuse"), tmp_path / "fused" / "checkpoint_3")
    fused = open_checkpoint(str(tmp_path / "fused" / "checkpoint_3"))
    wide = Trainer(recognize(fused.shapes, "fused"))
    grown = wide.restored(fused.read, fused.shapes)

    assert grown.step == 3
    assert int(grown.moments[0].count) == 3
    assert wide.measure(grown.parameters, examples.held_out).loss == pytest.approx(
        trainer.measure(state.parameters, examples.held_out).loss, abs=1e-5
    )
    moments = dict(grown.moments[0].v)
    assert all(np.all(np.isfinite(each)) for each in moments.values())
    assert all(np.any(np.asarray(each)) for name, each in moments.items() if np.asarray(each).shape != (1,))


@pytest.mark.slow
def test_nothing_is_learned_at_no_rate(trainer, examples):
    start = values_of(begun(trainer))
    after = trainer.train(begun(trainer), examples.batches(), Recipe(1e-12), 3)

    assert all(np.allclose(each, start[name], atol=1e-9) for name, each in values_of(after).items())


def test_a_training_that_has_diverged_has_no_finite_loss(trainer, examples):
    start = {
        name: values * math.inf if name.endswith("wo/kernel") else values
        for name, values in random_parameters(trainer.tree, 0).items()
    }
    assert trainer.measure(trainer.begin(start).parameters, examples.held_out).loss == math.inf


@pytest.mark.slow
def test_groups_of_norms_change_the_loss(trainer, examples):
    half = trainer.tree.sizes["embed"] // 2
    grouped = Trainer(trainer.tree, (half, half))
    parameters = begun(trainer).parameters

    assert grouped.measure(parameters, examples.held_out) != trainer.measure(parameters, examples.held_out)


def test_the_rate_holds_then_falls_by_the_root_and_offsets_shift_it():
    recipe = Recipe(2.0, warmup=100)

    assert [recipe.rate(step) for step in (0, 100, 400)] == pytest.approx([0.2, 0.2, 0.1])
    assert Recipe(2.0, warmup=100, offset=-300).rate(400) == pytest.approx(0.2)
    assert Recipe(2.0, warmup=100, offset=1200).rate(400) == pytest.approx(0.05)
