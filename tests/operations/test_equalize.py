"""Residual streams made equally large: the functions stay, and one norm mixes them less."""

import json
import random

import numpy as np
import pytest
from cases import first_soon
from models import SIZES, checkpoint, state, write_record

from fusectl.errors import Corrupt, Incompatible, UsageError
from fusectl.families.recognition import recognize
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.record import FILE_NAME
from fusectl.formats.sink import save
from fusectl.layout.fill import Fill
from fusectl.operations import equalize
from fusectl.operations.equalize import Equalize
from fusectl.operations.fuse import plan_fusion
from fusectl.operations.noise_fill import plan_noise_fill
from fusectl.planning.options import Options
from fusectl.sources.opened import open_source
from fusectl.verification import Settings, verify
from fusectl.writing.carrying_out import carry_out


VARIANTS = ["t5_1_1", "t5_1_0", "scalable_1_1"]


def rescaled(source, at, factor):
    """The same function with its residual stream `factor` times as large."""
    opened = open_checkpoint(source)
    tree = recognize(opened.shapes, source)
    values = {name: np.array(opened.read(name)) for name in opened.leaves}
    for name, row in tree.rows.items():
        if row.writes_stream:
            values[tree.full(name)] *= np.float32(factor)
        elif row.before_head and tree.family.tied:
            values[tree.full(name)] /= np.float32(factor)
    save(at, values, "t5x")
    return str(at)


def fuse(paths, output, equalize=None, **options):
    plan, sources = plan_fusion(paths, Options(**options), equalize=equalize)
    return str(carry_out(plan, sources, output, force=True))


def two(written, tmp_path, variant, factor):
    """Two models, the second with a residual stream that is `factor` times as large."""
    a, b = (str(written / variant / f"seed{i}/legacy/checkpoint_20") for i in (0, 1))
    return [a, rescaled(b, tmp_path / "b", factor)]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("by", ["trace", "weights"])
def test_the_constant_undoes_what_one_stream_was_scaled_with(written, tmp_path, variant, by):
    as_it_is = plan_fusion(two(written, tmp_path, variant, 1.0), Options(), equalize=Equalize(by))[0].record
    scaled = plan_fusion(two(written, tmp_path / "x", variant, 3.0), Options(), equalize=Equalize(by))[0].record

    assert as_it_is.residual_scales[0] == scaled.residual_scales[0] == 1.0
    # The epsilon in the norms is all that the trace sees of a scale.
    assert 3.0 * scaled.residual_scales[1] == pytest.approx(as_it_is.residual_scales[1], rel=1e-3)
    assert 0.5 < as_it_is.residual_scales[1] < 2.0


@pytest.mark.slow
@pytest.mark.parametrize("variant", first_soon(VARIANTS))
def test_equal_streams_mix_less_and_compute_the_same_mean(written, tmp_path, variant):
    sources = two(written, tmp_path, variant, 3.0)
    settings = Settings(("weights", "algebra", "native"), x64=True, trace=True)

    plain = verify(fuse(sources, tmp_path / "plain"), settings=settings)
    equal = verify(fuse(sources, tmp_path / "equal", Equalize()), settings=settings)

    assert plain.passed
    assert equal.passed
    assert equal.algebra.max_abs <= 1e-12
    # What the epsilon in the norms costs, which the algebra scales with the stream.
    assert 0 < equal.algebra.max_abs_as_stored < 1e-4
    assert equal.native.rms < plain.native.rms
    assert all(max(row.mixing) < 1.4 for row in equal.trace)
    assert plain.trace[0].rms[1] > 2 * plain.trace[0].rms[0]


def test_the_constants_stand_in_the_record_and_are_verified(written, tmp_path):
    path = tmp_path / "out"
    fuse(two(written, tmp_path, "t5_1_1", 3.0), path, Equalize("weights"))
    record = json.loads((path / FILE_NAME).read_text())

    def weights_pass(scales):
        write_record(path, {**record, "residual_scales": scales})
        return verify(str(path), settings=Settings(("weights",))).weights.passed

    assert record["norm"] == "rule"
    assert weights_pass(record["residual_scales"])
    assert not weights_pass([1.0, record["residual_scales"][1] * 1.001])
    assert not weights_pass([1.0, 1.0])


@pytest.mark.slow
def test_noise_beside_equalized_kernels_is_verified_in_every_dtype(written, tmp_path):
    sources = two(written, tmp_path, "t5_1_1", 3.0)
    for i, source in enumerate(sources):
        opened = open_checkpoint(source)
        values = {n: opened.read(n).astype("bfloat16" if n.startswith("target/") else "float32") for n in opened.leaves}
        save(tmp_path / f"half{i}", {**values, "state/step": opened.read("state/step")}, "t5x")
    halves = [str(tmp_path / f"half{i}") for i in range(2)]

    for paths, dtype in ((halves, None), (halves, "float32"), (sources, "bfloat16"), (sources, "float16")):
        path = fuse(paths, tmp_path / "out", Equalize("weights"), fill=Fill("gaussian", 0.1, 0), dtype=dtype)
        assert verify(path, settings=Settings(("files", "weights", "algebra"), x64=True)).passed, dtype


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gaussian", "antisymmetric"])
def test_filling_an_equalized_fusion_later_is_filling_it_at_once(written, tmp_path, kind):
    sources, fill = two(written, tmp_path, "t5_1_1", 3.0), Fill(kind, 0.1, 3)
    at_once = open_checkpoint(fuse(sources, tmp_path / "once", Equalize("weights"), fill=fill))
    plan, opened = plan_noise_fill(fuse(sources, tmp_path / "zeros", Equalize("weights")), Options(fill=fill))
    later = open_checkpoint(str(carry_out(plan, opened, tmp_path / "later")))

    for name in at_once.leaves:
        assert at_once.read(name).tobytes() == later.read(name).tobytes(), name
    report = verify(later.path, settings=Settings(("files", "weights", "algebra"), x64=True))
    assert report.passed
    assert report.algebra.max_abs <= 1e-12


def test_sums_do_not_depend_on_the_order_in_which_threads_end(tmp_path, monkeypatch):
    """The constants are in the plan, and --resume continues that plan alone."""
    values = state("t5-1.1", 0, {**SIZES, "vocab": 500}, {"encoder": 1, "decoder": 1})
    save(tmp_path / "a", values, "t5x", chunks={"target/token_embedder/embedding": (3, 12)})
    opened = open_source(str(tmp_path / "a"))
    found = [equalize.rms_by_weights([opened], Equalize("weights"))]
    for seed in range(10):

        def shuffled(tasks, seed=seed, **_):
            works = [work for _, work in tasks]
            random.Random(seed).shuffle(works)
            for work in works:
                work()

        monkeypatch.setattr(equalize, "in_parallel", shuffled)
        found.append(equalize.rms_by_weights([opened], Equalize("weights")))

    assert all(each == found[0] for each in found)


@pytest.mark.slow
def test_stacked_layers_count_as_unstacked_ones(tmp_path):
    """The same two models, scanned and not, have the same constant."""
    constants = []
    for family in ("scalable-t5-1.1", "scalable-t5-1.1-scanned"):
        rng = np.random.default_rng(0)
        paths = []
        for i in range(2):
            values = state(family, i)
            for name, each in values.items():
                if name.endswith(("out/kernel", "wo/kernel", "embedding")):
                    each[:] = rng.normal(0, 1.0 + i, each.shape)
                if "layers_" in name and name.endswith("wo/kernel"):
                    each[:] *= 1.0 + int(name.split("layers_")[1][0])
                elif name.endswith("wo/kernel"):
                    each[:] *= 1.0 + np.arange(each.shape[1], dtype=np.float32)[:, None]
            save(tmp_path / f"{family}{i}", values, "t5x")
            paths.append(str(tmp_path / f"{family}{i}"))
        constants.append(plan_fusion(paths, Options(), equalize=Equalize("weights"))[0].record.residual_scales[1])

    assert constants[0] == pytest.approx(constants[1], rel=0.05)
    assert constants[0] == pytest.approx(0.5, rel=0.05)


@pytest.mark.slow
def test_tokens_of_a_file_measure_the_trace(written, tmp_path):
    sources = two(written, tmp_path, "t5_1_1", 1.0)
    tokens = tmp_path / "t.jsonl"
    tokens.write_text('{"inputs": [3, 4, 1], "targets": [5, 1]}\n')

    random, own = (plan_fusion(sources, Options(), equalize=Equalize(tokens=t))[0] for t in (None, str(tokens)))

    assert random.record.residual_scales != own.record.residual_scales


@pytest.mark.slow
def test_what_cannot_be_equalized_is_refused(tmp_path):
    a, b = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b", seed=1)
    opened = open_checkpoint(b)
    empty = ("mlp/wo", "out/kernel", "embedding")
    values = {n: opened.read(n) * (0 if any(part in n for part in empty) else 1) for n in opened.leaves}
    save(tmp_path / "zero", values, "t5x")
    odd = {n: opened.read(n) * (np.nan if "mlp/wo" in n and "target" in n else 1) for n in opened.leaves}
    save(tmp_path / "odd", odd, "t5x")

    with pytest.raises(UsageError, match="measuring streams in forward passes"):
        Equalize("weights", "tokens.npz")
    with pytest.raises(UsageError, match="nothing to equalize"):
        plan_fusion([a, b], Options(norm="property"), equalize=Equalize())
    with pytest.raises(Incompatible, match="nothing that could be equalized"):
        plan_fusion([a, str(tmp_path / "zero")], Options(), equalize=Equalize("weights"))
    for by in ("weights", "trace"):
        with pytest.raises(Corrupt, match="NaN or Inf in its residual stream"):
            plan_fusion([a, str(tmp_path / "odd")], Options(), equalize=Equalize(by))


def test_on_the_command_line(tmp_path, fusectl):
    a, b = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b", seed=1)

    done = fusectl("fuse", a, b, "--norm", "rule", "--equalize", "--equalize-by", "weights", "--dry-run", "--json")

    scales = done.json["result"]["plan"]["residual_scales"]
    assert scales[0] == 1.0 != scales[1]
    assert "residual streams are multiplied with 1, " in done.err
    assert fusectl("fuse", a, b, "--equalize-by", "weights").code == 2
    assert fusectl("fuse", a, b, "--tokens", "x").code == 2
    assert fusectl("fuse", a, b, "--equalize", "--norm", "property").code == 2
    assert fusectl("fuse", a, b, "--equalize", "--tokens", tmp_path / "absent").code == 4
