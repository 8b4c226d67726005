"""Noise is a function of seed, name and position; the standard deviation of any order of summation."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusectl.layout.blocks import tiles, whole
from fusectl.layout.noise import Moments, tile_shape, unit_noise


def noise(seed, name, shape):
    return unit_noise(seed, name, shape, whole(shape))


@given(
    st.lists(st.integers(1, 700), min_size=1, max_size=3).filter(lambda s: np.prod(s) < 300_000).map(tuple), st.data()
)
def test_a_region_of_the_field_is_the_same_however_it_is_cut(shape, data):
    cut = tuple(data.draw(st.integers(max(1, n // 3), n)) for n in shape)
    field = noise(7, "kernel", shape)

    for region in tiles(shape, cut):
        expected = field[tuple(slice(r.start, r.stop) for r in region)]
        assert np.array_equal(expected, unit_noise(7, "kernel", shape, region))


def test_the_field_is_the_same_on_every_machine():
    """Pinned: another value here breaks resuming and comparing across machines and versions."""
    digest = hashlib.sha256(noise(3, "encoder/layers_0/mlp/wo/kernel", (300, 1030)).tobytes()).hexdigest()

    assert digest[:16] == "fc2183960062e06b"


def test_the_field_is_normal_and_depends_on_seed_and_name():
    field = noise(0, "a", (400, 900)).astype(np.float64)
    n = field.size

    # Five standard errors; the variance of a squared unit normal is 2, of its fourth power 96.
    assert abs(field.mean()) < 5 / np.sqrt(n)
    assert abs((field**2).mean() - 1) < 5 * np.sqrt(2 / n)
    assert abs((field**4).mean() - 3) < 5 * np.sqrt(96 / n)
    for other in (noise(1, "a", (400, 900)), noise(0, "b", (400, 900))):
        assert abs((field * other).mean()) < 5 / np.sqrt(n)


def test_neighbouring_tiles_are_not_correlated():
    shape = (256, 1024)
    assert tile_shape(shape) == (128, 512)
    field = noise(0, "a", shape).astype(np.float64)

    assert abs((field[:128, :512] * field[:128, 512:]).mean()) < 5 / 256
    assert abs((field[:128, :512] * field[128:, :512]).mean()) < 5 / 256


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=200),
    st.randoms(use_true_random=False),
)
def test_the_standard_deviation_does_not_depend_on_order_or_pieces(values, random):
    largest = max(map(abs, values))
    one = Moments(largest)
    one.add(np.array(values))
    shuffled = random.sample(values, len(values))
    cut = random.randrange(len(values) + 1)
    first, second = Moments(largest), Moments(largest)
    first.add(np.array(shuffled[:cut]))
    second.add(np.array(shuffled[cut:]))
    first.merge(second)

    assert one.std == first.std
    assert one.std == pytest.approx(np.std(values), abs=largest * 2**-17)


def test_a_constant_kernel_has_no_deviation():
    moments = Moments(0.1)
    moments.add(np.full(100_000, 0.1))

    assert moments.std == 0.0
