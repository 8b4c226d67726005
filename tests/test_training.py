"""The small trainer of the experiments: it learns, by the schedule that it says, and counts its compute."""

import math

import numpy as np
import pytest
from models import SIZES, checkpoint

from fusectl.archs import recognize
from fusectl.examples import read_examples
from fusectl.formats import open_checkpoint
from fusectl.ligo.learn import random_parameters
from fusectl.training import Recipe, train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = checkpoint(tmp_path_factory.mktemp("model") / "a", sizes={**SIZES, "vocab": 270})
    return recognize(open_checkpoint(path).shapes, path)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_bytes(b"the same words again and again, " * 200)
    return read_examples(
        str(text), vocab=270, objective="span_corruption", batch=8, lengths=(32, 16), seed=0, sentinel=265
    )


def test_the_loss_falls_and_is_measured_when_it_is_said(model, examples):
    start = random_parameters(model, 0)
    found = train(model, start, examples, Recipe(1e-2, 30, warmup=5), measure_every=10)

    assert [step for step, _ in found.curve] == [0, 10, 20, 30]
    assert found.final_loss < 0.8 * found.curve[0][1]
    # A product counts two for each value of its kernel and each token, three times over with the derivatives.
    least = 6 * 8 * 16 * sum(math.prod(s) for n, s in model.shapes.items() if n.startswith("decoder/layers"))
    assert least < found.flops_per_step
    again = train(model, start, examples, Recipe(1e-2, 30, warmup=5), measure_every=10)
    assert again.curve == found.curve


def test_nothing_is_learned_at_no_rate(model, examples):
    start = random_parameters(model, 0)
    found = train(model, start, examples, Recipe(1e-12, 3))

    assert all(np.allclose(found.parameters[name], start[name], atol=1e-9) for name in start)


def test_a_loss_that_is_no_number_ends_it(model, examples):
    start = {
        name: values * math.inf if name.endswith("wo/kernel") else values
        for name, values in random_parameters(model, 0).items()
    }
    with pytest.raises(FloatingPointError):
        train(model, start, examples, Recipe(1e-3, 2))


def test_the_rate_rises_stays_and_falls():
    recipe = Recipe(2.0, 100, warmup=10, decay=0.5)
    rates = [float(recipe.rate(step)) for step in (0, 4, 9, 30, 50, 75, 99)]

    assert rates == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0, 1.0, 0.04])
