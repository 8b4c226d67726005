"""Controls: every way in which a fusion can be wrong is found, at the weights and at the algebra level."""

from pathlib import Path

import numpy as np
import pytest
from models import checkpoint

from fusectl.formats import open_checkpoint
from fusectl.formats.sink import save
from fusectl.record import FILE_NAME, Fill
from fusectl.surgery import Options, carry_out, plan_fusion
from fusectl.verify import Settings, verify


LAYERS = {"encoder": 1, "decoder": 1}
EMBED, HEADS, JOINED, MLP = 12, 3, 15, 22


def wrong_factor(values, factor):
    values *= factor


def interleave_heads(values):
    """Heads a0 b0 a1 b1 … instead of a0 a1 … b0 b1 …: what joining head by head would give."""
    heads = values.reshape(values.shape[0], 2, HEADS, 5)
    values[:] = heads.transpose(0, 2, 1, 3).reshape(values.shape)


def transpose_block(values):
    block = values[:EMBED, :EMBED]
    values[:EMBED, :EMBED] = block.T.copy()


def swap_sources(values):
    values[:] = np.roll(values, EMBED, axis=0)


def change_one(values):
    values[0, 0] += 0.5


def leak(values):
    values[0, -1] = 0.5


FAULTS = {
    "logits not scaled": ("t5-1.1", "decoder/logits_dense/kernel", lambda v: wrong_factor(v, 2.0), True),
    "logits off by one percent": ("t5-1.1", "decoder/logits_dense/kernel", lambda v: wrong_factor(v, 1.01), True),
    "tied norm not scaled": (
        "t5-1.0",
        "decoder/decoder_norm/scale",
        lambda v: wrong_factor(v, np.float32(2**0.5)),
        True,
    ),
    "tied norm scaled by 1/K": (
        "t5-1.0",
        "decoder/decoder_norm/scale",
        lambda v: wrong_factor(v, np.float32(0.5**0.5)),
        True,
    ),
    "heads interleaved": ("t5-1.1", "encoder/layers_0/attention/query/kernel", interleave_heads, True),
    "a block transposed": ("t5-1.1", "encoder/layers_0/attention/key/kernel", transpose_block, True),
    "a norm of the other source": ("t5-1.1", "decoder/layers_0/pre_mlp_layer_norm/scale", swap_sources, True),
    "one value changed": ("t5-1.1", "decoder/layers_0/mlp/wo/kernel", change_one, True),
    "something where zeros belong": ("t5-1.1", "encoder/layers_0/mlp/wi_1/kernel", leak, True),
}


def fused(tmp_path, family, fill=Fill(), **options):
    # A joined_kv that equals embed lets a block be transposed in place.
    sizes = {
        "vocab": 41,
        "embed": EMBED,
        "heads": HEADS,
        "kv": 5,
        "joined_kv": JOINED,
        "mlp": MLP,
        "relpos_buckets": 32,
    }
    paths = [checkpoint(tmp_path / name, family, i, sizes, LAYERS) for i, name in enumerate("ab")]
    plan, sources = plan_fusion(paths, Options(fill=fill, **options))
    return carry_out(plan, sources, tmp_path / "fused")


def rewrite(path: Path, change) -> str:
    """The checkpoint with its tensors changed and its record kept, but for the checksums, which would give it away."""
    opened = open_checkpoint(str(path))
    values = {name: np.array(opened.read(name)) for name in opened.leaves}
    change(values)
    record = opened.record
    save(path.with_name("mutated"), values, "t5x", force=True)
    from dataclasses import replace

    (path.with_name("mutated") / FILE_NAME).write_bytes(replace(record, tensors={}).to_json())
    return str(path.with_name("mutated"))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_in_the_weights_and_in_the_function(tmp_path, fault):
    family, name, change, functional = FAULTS[fault]
    path = fused(tmp_path, family)
    mutated = rewrite(path, lambda values: change(values[f"target/{name}"]))

    report = verify(mutated, settings=Settings(("weights", "algebra")))

    assert report.weights.passed is False
    assert any(name in problem for problem in report.weights.problems)
    assert functional is (report.algebra.passed is False)
    assert not report.passed


def test_without_a_fault_the_rewritten_checkpoint_passes(tmp_path):
    path = fused(tmp_path, "t5-1.1")

    assert verify(rewrite(path, lambda _: None), settings=Settings(("weights", "algebra"))).passed


def test_a_dropped_tensor_is_found(tmp_path):
    path = fused(tmp_path, "t5-1.1")
    mutated = rewrite(path, lambda values: values.pop("target/decoder/layers_0/mlp/wo/kernel"))

    with pytest.raises(Exception, match="matches no|does not have the tree") as error:
        verify(mutated, settings=Settings(("weights",)))

    assert error.value.exit_code == 6
    assert any("decoder/layers_0/mlp/wo/kernel: missing" in detail for detail in error.value.details)


def test_a_lost_tensor_fails_the_files_level(tmp_path):
    path = fused(tmp_path, "t5-1.1")
    opened = open_checkpoint(str(path))
    values = {name: opened.read(name) for name in opened.leaves if "decoder_norm" not in name}
    save(tmp_path / "lost", values, "t5x")
    (tmp_path / "lost" / FILE_NAME).write_bytes((path / FILE_NAME).read_bytes())

    report = verify(str(tmp_path / "lost"), settings=Settings(("files",)))

    assert not report.passed
    assert "target/decoder/decoder_norm/scale: written, and gone" in report.files.problems


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.__setitem__("state/step", np.array(3, np.int32)), "the step: 3"),
        (
            lambda v: v["state/param_states/decoder/decoder_norm/scale/v"].__setitem__(0, 1.0),
            "declared as reset, and not zero",
        ),
        (
            lambda v: v.__setitem__("state/param_states/decoder/decoder_norm/scale/v", np.zeros(5, np.float32)),
            "decoder_norm/scale/v: shape [5], expected [24]",
        ),
    ],
)
def test_wrong_steps_and_slots_are_found(tmp_path, change, says):
    path = fused(tmp_path, "t5-1.1")

    report = verify(rewrite(path, change), settings=Settings(("weights",)))

    assert not report.weights.passed
    assert any(says in problem for problem in report.weights.problems), report.weights.problems


@pytest.mark.parametrize("factor", [0.8, 1.25, 0.0])
def test_noise_of_another_size_than_declared_is_found(tmp_path, factor):
    path = fused(tmp_path, "t5-1.1", Fill("gaussian", 0.1, 0))
    name = "target/encoder/layers_0/mlp/wi_0/kernel"

    def change(values):
        values[name][:EMBED, MLP:] *= factor

    report = verify(rewrite(path, change), settings=Settings(("weights",)))

    assert not report.weights.passed
    says = "values are not the noise of seed 0" if factor else "noise of mean"
    assert says in report.weights.problems[0]
    assert verify(rewrite(path, lambda _: None), settings=Settings(("weights",))).weights.passed


def test_noise_of_an_unknown_seed_is_held_to_its_mean_and_deviation(tmp_path):
    from fusectl.verify import Declared

    path = str(fused(tmp_path, "t5-1.1", Fill("gaussian", 0.1, 3)))

    def passed(scale):
        declared = Declared(fill=Fill("gaussian", scale, None))
        return verify(path, declared, Settings(("weights",))).weights.passed

    assert passed(0.1)
    assert not passed(0.2)


def test_antisymmetric_noise_that_does_not_cancel_is_found(tmp_path):
    path = fused(tmp_path, "t5-1.1", Fill("antisymmetric", 0.1, 0))
    name = "target/encoder/layers_0/mlp/wi_0/kernel"

    def change(values):
        values[name][2, MLP + 3] += np.float32(1e-3)

    assert verify(rewrite(path, lambda _: None), settings=Settings(("weights",))).weights.passed
    assert not verify(rewrite(path, change), settings=Settings(("weights",))).weights.passed


def test_sources_in_another_order_are_found(tmp_path):
    from fusectl.verify import Declared

    path = fused(tmp_path, "t5-1.1")
    declared = Declared(sources=(str(tmp_path / "b"), str(tmp_path / "a")))

    assert not verify(str(path), declared, Settings(("weights",))).weights.passed


def test_a_source_that_changed_since_is_said(tmp_path):
    path = fused(tmp_path, "t5-1.1")
    checkpoint(tmp_path / "new", "t5-1.1", 0, step=2000, layers=LAYERS)
    (tmp_path / "a").rename(tmp_path / "old")
    (tmp_path / "new").rename(tmp_path / "a")

    report = verify(str(path), settings=Settings(("weights",)))

    assert any("has changed since it was fused" in note for note in report.notes)


def test_a_flipped_value_fails_the_files_level(tmp_path):
    """The bytes decode; only the record's checksum tells."""
    path = fused(tmp_path, "t5-1.1", format="orbax-zarr2")
    opened = open_checkpoint(str(path))
    name = "target/encoder/layers_0/mlp/wi_0/kernel"
    values = {n: np.array(opened.read(n)) for n in opened.leaves}
    values[name][3, 5] = np.nextafter(values[name][3, 5], np.float32(1))
    record = (path / FILE_NAME).read_bytes()
    save(path, values, "orbax-zarr2", force=True, chunks={n: leaf.chunks for n, leaf in opened.leaves.items()})
    (path / FILE_NAME).write_bytes(record)

    report = verify(str(path), settings=Settings(("files",)))

    assert report.files.problems == (f"{name}: the chunk at [0, 0] is not what was written (CRC-32)",)
