"""Two checkpoints side by side."""

import numpy as np
import pytest
from models import checkpoint, state

from fusectl.errors import UsageError
from fusectl.formats.registry import FORMATS
from fusectl.formats.sink import save
from fusectl.inspection.diff import diff


NAME = "target/decoder/layers_0/mlp/wo/kernel"


@pytest.mark.parametrize("format", FORMATS)
def test_a_checkpoint_is_itself_in_every_format(tmp_path, format):
    a, b = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b", format=format)

    found = diff(a, b, max_memory_bytes=1)

    assert found.same
    assert found.equal == len(state("t5-1.1", 0))


def test_every_kind_of_difference_is_found(tmp_path):
    values = state("t5-1.1", 0)
    save(tmp_path / "a", values, "t5x")
    other = dict(values)
    other[NAME] = values[NAME].copy()
    other[NAME][3, 5] += np.float32(0.5)
    other[NAME][4, 5] -= np.float32(0.25)
    other["target/encoder/encoder_norm/scale"] = np.ones(9, np.float32)
    other["target/decoder/decoder_norm/scale"] = values["target/decoder/decoder_norm/scale"].astype(np.float64)
    other["state/step"] = np.array(7, np.int32)
    del other["target/token_embedder/embedding"]
    other["target/more"] = np.ones(3, np.float32)
    save(tmp_path / "b", other, "t5x", chunks={NAME: (5, 7)})

    found = diff(str(tmp_path / "a"), str(tmp_path / "b"), jobs=3)

    assert not found.same
    assert found.only_a == ("target/token_embedder/embedding",)
    assert found.only_b == ("target/more",)
    assert {(m.what, m.name, m.a, m.b) for m in found.metadata} == {
        ("shape", "target/encoder/encoder_norm/scale", "[12]", "[9]"),
        ("dtype", "target/decoder/decoder_norm/scale", "float32", "float64"),
    }
    assert {v.name for v in found.values} == {NAME, "state/step"}
    kernel = next(v for v in found.values if v.name == NAME)
    assert (kernel.differing, kernel.size, kernel.max_abs) == (2, 22 * 12, pytest.approx(0.5, rel=1e-6))
    assert kernel.rms == pytest.approx(np.sqrt((0.5**2 + 0.25**2) / kernel.size), rel=1e-6)
    assert kernel.relative_rms == pytest.approx(kernel.rms / np.sqrt(np.mean(values[NAME] ** 2)), rel=1e-5)
    assert found.equal == len(values) - 4


def test_a_distance_makes_near_values_equal(tmp_path):
    values = state("t5-1.1", 0)
    save(tmp_path / "a", values, "t5x")
    save(tmp_path / "b", {**values, NAME: values[NAME] + np.float32(1e-3)}, "t5x")

    assert not diff(str(tmp_path / "a"), str(tmp_path / "b"), atol=0.9e-3).same
    assert diff(str(tmp_path / "a"), str(tmp_path / "b"), atol=1.1e-3).same
    with pytest.raises(UsageError, match="--atol -1"):
        diff(str(tmp_path / "a"), str(tmp_path / "b"), atol=-1.0)


def test_integers_are_compared_as_integers(tmp_path):
    values = {**state("t5-1.1", 0), "state/count": np.array([2**53, 5])}
    save(tmp_path / "a", values, "t5x")
    save(tmp_path / "b", {**values, "state/count": np.array([2**53 + 1, 5])}, "t5x")

    assert [v.name for v in diff(str(tmp_path / "a"), str(tmp_path / "b")).values] == ["state/count"]


@pytest.mark.slow
def test_steps_are_compared_where_only_the_directory_has_one(tmp_path):
    values = {n: v for n, v in state("t5-1.1", 0).items() if n != "state/step"}
    for step in (1, 2):
        save(tmp_path / f"checkpoint_{step}", values, "orbax")

    found = diff(str(tmp_path / "checkpoint_1"), str(tmp_path / "checkpoint_2"))

    assert [(m.what, m.a, m.b) for m in found.metadata] == [("step", "1", "2")]


def test_grids_that_cut_across_each_other_stay_within_the_memory():
    from fusectl.layout.blocks import common_tile

    assert common_tile((8192, 2048), [(8192, 16), (64, 2048)], 8192 * 2048) == (8192, 2048)
    assert common_tile((8192, 2048), [(8192, 16), (64, 2048)], 8192 * 2047) == (8192, 16)


def test_nan_is_nan_and_infinity_infinity_and_nothing_else(tmp_path):
    values = state("t5-1.1", 0)
    odd = values[NAME].copy()
    odd[0, :3] = np.nan, np.inf, -np.inf
    save(tmp_path / "a", {**values, NAME: odd}, "t5x")
    save(tmp_path / "b", {**values, NAME: odd.copy()}, "t5x")
    save(tmp_path / "c", values, "t5x")

    assert diff(str(tmp_path / "a"), str(tmp_path / "b")).same
    assert next(iter(diff(str(tmp_path / "a"), str(tmp_path / "c")).values)).differing == 3


def test_the_command_ends_with_3_where_they_differ(tmp_path, fusectl):
    a, b = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b", seed=1)

    same, other = fusectl("diff", a, a), fusectl("diff", a, b, "--json")

    assert same.code == 0
    assert "tensors are equal" in same.out
    assert other.code == 3
    assert other.json["status"] == "failed"
    assert len(other.json["result"]["values"]) > 50
    assert f"error: {a} and {b} differ" in fusectl("diff", a, b).err
    assert fusectl("diff", a, tmp_path / "absent").code == 4
    assert fusectl("diff", a).code == 2
