"""Controls: every way in which a fusion can be wrong is found, at the weights and at the algebra level."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import first_soon, slow, some_soon
from models import checkpoint

from fusectl.errors import UsageError
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.record import FILE_NAME
from fusectl.formats.sink import save
from fusectl.layout.fill import Fill
from fusectl.operations.fuse import plan_fusion
from fusectl.planning.options import Options
from fusectl.verification import Settings, verify, weights
from fusectl.writing.carrying_out import carry_out


LAYERS = {"encoder": 1, "decoder": 1}
EMBED, HEADS, JOINED, MLP = 12, 3, 15, 22


def times(factor):
    def change(values):
        values *= np.float32(factor)

    return change


def interleave_heads(values):
    """Heads a0 b0 a1 b1 … instead of a0 a1 … b0 b1 …: what joining head by head would give."""
    heads = values.reshape(values.shape[0], 2, HEADS, 5)
    values[:] = heads.transpose(0, 2, 1, 3).reshape(values.shape)


def swap_two_heads(values):
    heads = values[:EMBED, :JOINED].reshape(EMBED, HEADS, 5)
    heads[:, [0, 1]] = heads[:, [1, 0]]


def transpose_block(values):
    values[:EMBED, :EMBED] = values[:EMBED, :EMBED].T.copy()


def swap_sources(axis):
    def change(values):
        values[:] = np.roll(values, values.shape[axis] // 2, axis=axis)

    return change


def repeat_the_first(values):
    rows, columns = (n // 2 for n in values.shape)
    values[rows:, columns:] = values[:rows, :columns]


def one_value(row, column, by=0.5):
    def change(values):
        values[row, column] += np.float32(by)

    return change


def lose(values):
    values[EMBED:] = 1.0


def shift_the_tokens(values):
    values[:] = np.roll(values, 1, axis=0)


def flip_the_sign_of_one_source(values):
    values[EMBED:, JOINED:] *= -1


def permute_features(values):
    values[:EMBED] = values[:EMBED][::-1].copy()


def weigh_otherwise(values):
    values[:EMBED] *= np.float32(1.2)
    values[EMBED:] *= np.float32(0.8)


ENCODER, DECODER = "encoder/layers_0", "decoder/layers_0"
# What is done to which tensor of a fusion of T5 1.1, or of T5 1.0 with its tied head.
FUNCTIONAL = {
    "the head not scaled": ("decoder/logits_dense/kernel", times(2.0)),
    "the head off by one percent": ("decoder/logits_dense/kernel", times(1.01)),
    "the head with other weights": ("decoder/logits_dense/kernel", weigh_otherwise),
    "the tied norm not scaled": ("1.0 decoder/decoder_norm/scale", times(2**0.5)),
    "the tied norm scaled by 1/K": ("1.0 decoder/decoder_norm/scale", times(0.5**0.5)),
    "heads interleaved": (f"{ENCODER}/attention/query/kernel", interleave_heads),
    "two heads of one kernel swapped": (f"{DECODER}/self_attention/key/kernel", swap_two_heads),
    "a block transposed": (f"{ENCODER}/attention/key/kernel", transpose_block),
    "a block with its sign flipped": (f"{DECODER}/encoder_decoder_attention/value/kernel", flip_the_sign_of_one_source),
    "one source's block in both places": (f"{ENCODER}/mlp/wi_0/kernel", repeat_the_first),
    "a norm of the other source": (f"{DECODER}/pre_mlp_layer_norm/scale", swap_sources(0)),
    "a norm lost": ("encoder/encoder_norm/scale", lose),
    "a norm in another order": (f"{DECODER}/pre_cross_attention_layer_norm/scale", permute_features),
    "one value changed": (f"{DECODER}/mlp/wo/kernel", one_value(0, 0)),
    "one value in the zeros of a kernel that reads": (f"{ENCODER}/mlp/wi_1/kernel", one_value(0, -1)),
    "one value in the zeros of a kernel that writes": (f"{DECODER}/self_attention/out/kernel", one_value(-1, 0)),
    "the relative bias of the other source": ("encoder/relpos_bias/rel_embedding", swap_sources(0)),
    "the relative bias off by one bucket": ("decoder/relpos_bias/rel_embedding", swap_sources(1)),
    "the embeddings of the other source": ("token_embedder/embedding", swap_sources(1)),
    "the embeddings shifted by a token": ("token_embedder/embedding", shift_the_tokens),
}


def fused(tmp_path, family, fill=Fill(), **options):
    # A joined_kv that is larger than embed lets a block be transposed in place.
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


@pytest.fixture(scope="module")
def fusions(tmp_path_factory):
    """A fusion of two models of each of two families, for tests that change copies of it."""
    return {family: fused(tmp_path_factory.mktemp(family), family) for family in ("t5-1.1", "t5-1.0")}


def rewrite(path: Path, change, to: Path | None = None) -> str:
    """The checkpoint with its tensors changed and its record kept, but for the checksums, which would give it away."""
    opened = open_checkpoint(str(path))
    values = {name: np.array(opened.read(name)) for name in opened.leaves}
    change(values)
    mutated = (to or path.parent) / "mutated"
    save(mutated, values, "t5x", force=True)
    (mutated / FILE_NAME).write_bytes(replace(opened.record, tensors={}, files={}).to_json())
    return str(mutated)


@pytest.mark.parametrize("fault", [fault if i % 2 else slow(fault) for i, fault in enumerate(FUNCTIONAL)])
def test_a_fault_is_found_in_the_weights_and_in_the_function(fusions, tmp_path, fault):
    name, change = FUNCTIONAL[fault]
    family = "t5-1.0" if name.startswith("1.0 ") else "t5-1.1"
    name = name.removeprefix("1.0 ")
    mutated = rewrite(fusions[family], lambda values: change(values[f"target/{name}"]), tmp_path)

    report = verify(mutated, settings=Settings(("weights", "algebra")))

    assert not report.passed
    assert report.weights.passed is False
    assert all(name in problem for problem in report.weights.problems)
    assert report.algebra.passed is False
    assert report.algebra.first_difference.parameter == name


SCALE = "target/encoder/encoder_norm/scale"
SLOT = "state/param_states/decoder/decoder_norm/scale/v"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.__setitem__("state/step", np.array(3, np.int32)), "the step: 3"),
        (lambda v: v.pop("state/step"), "the step is gone"),
        (lambda v: v.__setitem__("state/more", np.ones(3, np.float32)), "state/more: no part of a fusion"),
        (lambda v: v.__setitem__(SLOT, np.zeros(24, np.float16)), f"{SLOT}: float16, float32 in the first source"),
        (lambda v: v.__setitem__(SCALE, v[SCALE].astype(np.float64)), "float64, float32 in the first source"),
        (
            lambda v: v[SLOT].__setitem__(0, 1.0),
            f"{SLOT}: 1 values are not what the sources' state makes, first at [0]",
        ),
        (lambda v: v.__setitem__(SLOT, np.zeros(5, np.float32)), "decoder_norm/scale/v: shape [5], expected [24]"),
        (lambda v: v.pop(SLOT), "decoder_norm/scale/v: shape none, expected [24]"),
        (lambda v: [v.pop(name) for name in list(v) if "param_states" in name], "the optimizer's slots are gone"),
    ],
)
def test_a_fault_in_the_training_state_is_found_in_the_weights_only(fusions, tmp_path, change, says):
    mutated = rewrite(fusions["t5-1.1"], change, tmp_path)

    report = verify(mutated, settings=Settings(("weights", "algebra")))

    assert not report.weights.passed
    assert any(says in problem for problem in report.weights.problems), report.weights.problems
    assert report.algebra.passed


def test_a_slot_that_was_reset_and_is_not_zero_is_found(tmp_path):
    paths = [checkpoint(tmp_path / name, seed=i) for i, name in enumerate("ab")]
    plan, sources = plan_fusion(paths, Options(optimizer="reset"))
    carry_out(plan, sources, tmp_path / "fused")
    assert verify(str(tmp_path / "fused"), settings=Settings(("weights",))).passed
    mutated = rewrite(str(tmp_path / "fused"), lambda v: v[SLOT].__setitem__(0, 1.0), tmp_path)

    report = verify(mutated, settings=Settings(("weights",)))

    assert report.weights.problems == (f"{SLOT}: declared as reset, and not zero",)


@pytest.mark.parametrize("family", ["t5-1.1", "t5-1.0"])
def test_without_a_fault_the_rewritten_checkpoint_passes(fusions, tmp_path, family):
    mutated = rewrite(fusions[family], lambda _: None, tmp_path)

    assert verify(mutated, settings=Settings(("weights", "algebra"))).passed


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
    sums = {name: replace(own, metadata=None) for name, own in opened.record.tensors.items()}
    (tmp_path / "lost" / FILE_NAME).write_bytes(replace(opened.record, tensors=sums, files={}).to_json())

    report = verify(str(tmp_path / "lost"), settings=Settings(("files",)))

    assert not report.passed
    assert "target/decoder/decoder_norm/scale: written, and gone" in report.files.problems


@pytest.mark.parametrize("factor", first_soon([0.8, 1.25, 0.0]))
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


def test_declaring_what_is_recorded_keeps_the_seed(tmp_path):
    from fusectl.verification import Declared

    path = fused(tmp_path, "t5-1.1", Fill("gaussian", 0.1, 3))
    name = "target/encoder/layers_0/mlp/wi_0/kernel"

    def change(values):
        values[name][:EMBED, MLP:] = values[name][:EMBED, MLP:][::-1].copy()

    mutated = rewrite(path, change)
    for declared in (Declared(), Declared(fill="gaussian"), Declared(noise_scale=0.1)):
        assert not verify(mutated, declared, Settings(("weights",))).weights.passed


def test_noise_of_an_unknown_seed_is_held_to_its_mean_and_deviation(tmp_path):
    from fusectl.verification import Declared

    path = str(fused(tmp_path, "t5-1.1", Fill("gaussian", 0.1, 3)))

    def passed(scale):
        declared = Declared(fill="gaussian", noise_scale=scale)
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
    from fusectl.verification import Declared

    path = fused(tmp_path, "t5-1.1")
    declared = Declared(sources=(str(tmp_path / "b"), str(tmp_path / "a")))

    found = verify(str(path), declared, Settings(("weights",))).weights

    assert not found.passed
    assert found.problems[0] == f"the sources stand in another order: {tmp_path / 'a'}, {tmp_path / 'b'}"


@pytest.mark.slow
def test_a_source_that_changed_since_is_said(tmp_path):
    path = fused(tmp_path, "t5-1.1")
    checkpoint(tmp_path / "new", "t5-1.1", 0, step=2000, layers=LAYERS)
    (tmp_path / "a").rename(tmp_path / "old")
    (tmp_path / "new").rename(tmp_path / "a")

    report = verify(str(path), settings=Settings(("weights",)))

    assert any("has changed since it was fused" in note for note in report.notes)
    assert "has changed since it was fused" in report.weights.problems[0]


def test_what_was_trained_on_cannot_be_verified(tmp_path):
    """A trainer's save has no fusectl.json, and another step; the control is the fusion without its record."""
    from fusectl.verification import Declared

    declared = Declared(sources=(str(tmp_path / "a"), str(tmp_path / "b")))
    path = fused(tmp_path, "t5-1.1")
    (path / FILE_NAME).unlink()
    saved = tmp_path / "saved"
    opened = open_checkpoint(str(path))
    save(saved, {name: opened.read(name) + (name == "state/step") for name in opened.leaves}, "t5x")

    with pytest.raises(UsageError, match="no fusectl.json") as caught:
        verify(str(saved), settings=Settings(("weights",)))
    assert "trained on after it was fused cannot be verified" in caught.value.details[0]
    assert "theory --symmetry --copies K, or diff" in caught.value.hint
    trained, same = (verify(str(at), declared, Settings(("weights",))) for at in (saved, path))

    assert trained.notes == (
        "no fusectl.json, step 1001, and 1000 of its first source: what was trained on since cannot be verified",
    )
    assert same.notes == ()


def test_a_source_that_was_copied_elsewhere_is_the_same_source(tmp_path):
    from fusectl.verification import Declared

    path = fused(tmp_path, "t5-1.1")
    (tmp_path / "a").rename(tmp_path / "moved")
    declared = Declared(sources=(str(tmp_path / "moved"), str(tmp_path / "b")))

    report = verify(str(path), declared, Settings(("weights",)))

    assert report.passed
    assert report.notes == ()


@pytest.mark.parametrize(
    ("fill", "dtype"),
    some_soon(
        itertools.product(
            [Fill(), Fill("gaussian", 0.1, 5), Fill("antisymmetric", 0.2, 5)],
            ["float64", "float32", "bfloat16", "float16"],
        ),
        lambda case: (case[0].kind, case[1]) in {("zeros", "float32"), ("antisymmetric", "bfloat16")},
    ),
)
def test_every_dtype_passes_and_one_value_fails(tmp_path, fill, dtype, monkeypatch):
    path = fused(tmp_path, "t5-1.0", fill, dtype=dtype)
    name = "target/decoder/decoder_norm/scale"

    def three_units_off(values):
        for _ in range(3):
            values[name][0] = np.nextafter(values[name][0], values[name].dtype.type(9))

    assert verify(str(path), settings=Settings(("files", "weights"))).passed
    # Also in slabs of a few values each.
    monkeypatch.setattr(weights, "SLAB", 50)
    assert verify(str(path), settings=Settings(("files", "weights"))).passed
    assert not verify(rewrite(path, three_units_off), settings=Settings(("weights",))).passed


@pytest.mark.parametrize("fill", [slow(Fill()), slow(Fill("gaussian", 0.1, 5)), Fill("antisymmetric", 0.2, 5)])
@pytest.mark.parametrize("family", ["t5-1.0", slow("scalable-t5-1.1-scanned")])
def test_the_result_does_not_depend_on_threads_and_budget(tmp_path, family, fill):
    path = str(fused(tmp_path, family, fill))
    settings = [Settings(("files", "weights"), jobs=1, max_memory_bytes=1), Settings(("files", "weights"), jobs=8)]

    first, second = (verify(path, settings=each) for each in settings)

    assert first.passed
    assert replace(first.weights, seconds=0.0) == replace(second.weights, seconds=0.0)
    assert replace(first.files, seconds=0.0) == replace(second.files, seconds=0.0)
    assert (first.weights.noise_std_off is None) == (fill.kind == "zeros")


def test_a_flipped_value_fails_the_files_level(tmp_path):
    """The bytes decode; only the record's checksum tells."""
    path = fused(tmp_path, "t5-1.1", format="orbax-zarr2")
    opened = open_checkpoint(str(path))
    name = "target/encoder/layers_0/mlp/wi_0/kernel"
    encoding = opened.leaves[name].stored.storage.encoding
    chunk = opened.location.index / opened.key(name, (0, 0))
    shape = opened.leaves[name].chunks
    values = np.frombuffer(encoding.decode(chunk.read_bytes(), 4 * np.prod(shape)), np.float32).reshape(shape).copy()
    values[3, 5] = np.nextafter(values[3, 5], np.float32(1))
    chunk.write_bytes(b"".join(encoding.encode(values)))

    (problem,) = verify(str(path), settings=Settings(("files",))).files.problems

    assert f"{name}: the chunk {opened.key(name, (0, 0))} is not what was written: CRC-32" in problem
