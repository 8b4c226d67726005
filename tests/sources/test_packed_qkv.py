"""Queries, keys and values that are packed along one axis: split, fused, and packed again."""

import json

import numpy as np
import pytest
from cases import first_soon
from models import write_record
from written import trained

from fusectl.errors import Incompatible
from fusectl.families.config import read_config
from fusectl.families.recognition import recognize
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.record import FILE_NAME
from fusectl.formats.sink import save
from fusectl.layout.fill import Fill
from fusectl.networks import decoder_stages as decoder_twin
from fusectl.networks.stages import Step
from fusectl.networks.tokens import Tokens
from fusectl.operations.fuse import plan_fusion
from fusectl.operations.noise_fill import plan_noise_fill
from fusectl.planning.options import Options
from fusectl.sources.packed_qkv import unpacked
from fusectl.verification import Settings, verify
from fusectl.writing.carrying_out import carry_out


CASES = ["llama2_unscan_fusedqkv", "llama2_scan_fused_3layers"]
EXACT = Settings(levels=("weights", "algebra", "native"), x64=True, batch=2, length=8)
HEADS, KV_HEADS, WIDTH = 4, 2, 16


@pytest.fixture(params=first_soon(CASES))
def case(request, logits):
    return logits / "maxtext" / request.param


def kernel_of(path):
    opened = open_checkpoint(str(path))
    name = next(n for n in opened.leaves if n.endswith("qkv_proj/kernel") and n.startswith("params"))
    return opened.read(name)


def test_seen_apart_it_is_the_model_whose_logits_maxtext_has(case, tmp_path):
    found = np.load(case / "model.npz")
    seen = unpacked(open_checkpoint(trained(tmp_path / "a", case)))
    shapes = {name: leaf.shape for name, leaf in seen.leaves.items() if name.startswith("params/")}
    tree = recognize(shapes, "", config=read_config(str(case / "config.json")))
    assert (tree.sizes["heads"], tree.sizes["kv_heads"]) == (HEADS, KV_HEADS)
    parameters = {name: seen.read(tree.full(name)).astype(np.float32) for name in tree.shapes}
    tokens = found["tokens"]
    batch = Tokens(tokens, tokens, tokens, np.ones_like(tokens), np.ones_like(tokens))
    (stage,) = decoder_twin.whole(tree)
    state, _ = stage.run(Step(decoder_twin.config_of(tree, (WIDTH,), "float32"), parameters, batch, {}))
    assert np.abs(np.asarray(state["logits"]) - found["logits"]).max() < 1e-5 * np.abs(found["logits"]).max()


@pytest.mark.slow
@pytest.mark.parametrize("biases", [False, True])
def test_two_of_them_are_fused_part_by_part_and_packed_again(case, tmp_path, biases):
    a, b = trained(tmp_path / "a", case, 1, biases), trained(tmp_path / "b", case, 2, biases)
    plan, opened = plan_fusion([a, b], Options())
    carry_out(plan, opened, tmp_path / "f")

    report = verify(str(tmp_path / "f"), settings=EXACT)
    assert report.passed, report.failures()
    assert report.algebra.max_abs < 1e-12 * report.algebra.reference_max_abs
    one, two, both = kernel_of(a), kernel_of(b), kernel_of(tmp_path / "f")
    axis = both.ndim - 2
    assert both.shape[axis] == 2 * (HEADS + 2 * KV_HEADS)
    one, two, both = (np.moveaxis(each, axis, 0) for each in (one, two, both))
    # All queries, those of the first model before those of the second; then keys, then values.
    np.testing.assert_array_equal(both[:HEADS, :WIDTH], one[:HEADS])
    np.testing.assert_array_equal(both[HEADS : 2 * HEADS, WIDTH:], two[:HEADS])
    np.testing.assert_array_equal(both[2 * HEADS : 2 * HEADS + KV_HEADS, :WIDTH], one[HEADS : HEADS + KV_HEADS])
    np.testing.assert_array_equal(both[-KV_HEADS:, WIDTH:], two[-KV_HEADS:])
    assert not both[:HEADS, WIDTH:].any()
    kinds = {output.name.rsplit("/", 2)[1]: output.exactness for output in plan.outputs if output.exactness}
    assert kinds["qkv_proj"].kind == "exact"


@pytest.mark.slow
def test_noise_is_put_between_the_parts_and_a_record_keeps_it(case, tmp_path):
    a = trained(tmp_path / "a", case, 1)
    for name, fill in (("f", Fill()), ("g", Fill("antisymmetric", 0.2, 3))):
        carry_out(*plan_fusion([a, a], Options(fill=fill)), tmp_path / name)
    assert verify(str(tmp_path / "g"), settings=EXACT).passed
    carry_out(*plan_noise_fill(str(tmp_path / "f"), Options(fill=Fill("antisymmetric", 0.2, 3))), tmp_path / "n")
    np.testing.assert_array_equal(kernel_of(tmp_path / "n"), kernel_of(tmp_path / "g"))
    assert (np.count_nonzero(kernel_of(tmp_path / "g") == 0), np.count_nonzero(kernel_of(tmp_path / "f") == 0) > 0) == (
        0,
        True,
    )
    # Noise of another seed is another: the control.
    tree = json.loads((tmp_path / "g" / FILE_NAME).read_text())
    tree["fill"]["seed"] = 4
    write_record(tmp_path / "g", tree)
    assert not verify(str(tmp_path / "g"), settings=Settings(levels=("weights",))).passed


def test_a_head_in_a_wrong_part_is_noticed(case, tmp_path):
    """Fused as one tensor heads of one model would stand between those of the other: the control of the proofs."""
    a, b = trained(tmp_path / "a", case, 1), trained(tmp_path / "b", case, 2)
    carry_out(*plan_fusion([a, b], Options(optimizer="drop")), tmp_path / "f")
    opened = open_checkpoint(str(tmp_path / "f"))
    values = {name: opened.read(name) for name in opened.leaves}
    for name, kernel in values.items():
        if name.endswith("qkv_proj/kernel"):
            axis = kernel.ndim - 2
            order = [*range(4), *range(8, 10), *range(12, 14), *range(4, 8), *range(10, 12), *range(14, 16)]
            values[name] = kernel.take(order, axis=axis)
    save(tmp_path / "wrong", values, "orbax")
    (tmp_path / "wrong" / FILE_NAME).unlink(missing_ok=True)
    from fusectl.verification import Declared

    report = verify(str(tmp_path / "wrong"), Declared(sources=(a, b)), EXACT)
    assert not report.weights.passed
    assert report.algebra.passed is False


@pytest.mark.slow
def test_it_goes_through_the_command_line(case, tmp_path, fusectl):
    a = trained(tmp_path / "a", case, 1)
    outcome = fusectl("self-fuse", a, "-o", tmp_path / "f", "--verify")
    assert outcome.code == 0, outcome.err
    assert fusectl("inspect", tmp_path / "f").code == 0
    assert "fused_qkv=True" in fusectl("restart-config", tmp_path / "f").out
    assert fusectl("convert", tmp_path / "f", "--format", "orbax-zarr2", "-o", tmp_path / "z").code == 0
    assert fusectl("diff", tmp_path / "f", tmp_path / "z").code == 0


def test_what_only_looks_like_a_pack_is_left_as_it_is(tmp_path):
    for name, pack, out in (("a", (), (4, 8, 16)), ("b", (16, 8, 8), (4,)), ("c", (16, 8), (4, 8, 16))):
        values = {"x/qkv_proj/kernel": np.zeros(pack), "x/out/kernel": np.zeros(out)}
        save(tmp_path / name, values, "orbax", item=None)
        assert unpacked(open_checkpoint(str(tmp_path / name))).leaves.keys() == values.keys()


def test_packs_of_uneven_heads_are_corrupt(logits, tmp_path, fusectl):
    a = trained(tmp_path / "a", logits / "maxtext" / CASES[0])
    opened = open_checkpoint(a)
    values = {n: v[:, :-1] if n.endswith("qkv_proj/kernel") else v for n in opened.leaves for v in [opened.read(n)]}
    save(tmp_path / "b", values, "orbax")
    outcome = fusectl("self-fuse", tmp_path / "b", "-o", tmp_path / "f")
    assert (outcome.code, "packed heads beside an output projection of 4" in outcome.err) == (5, True)
    with pytest.raises(Incompatible):
        recognize(opened.shapes, "here")
