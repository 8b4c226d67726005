"""Adafactor's slots: the shapes that T5X creates, for the sizes where its rules change."""

import pytest
from models import state

from fusectl.errors import Incompatible
from fusectl.families.recognition import recognize
from fusectl.formats.opening import open_checkpoint
from fusectl.layout.axes import parse_axes
from fusectl.optimizer.adafactor import adafactor_slots
from fusectl.optimizer.registry import find_state
from fusectl.optimizer.state import STATE, UNUSED


def slots(shape, axes, **kwargs):
    found = adafactor_slots(shape, parse_axes(axes), **{"factored": True, "momentum": False, **kwargs})
    return found["v_row"], found["v_col"], found["v"]


@pytest.mark.parametrize(
    ("shape", "axes", "v_row", "v_col"),
    [
        # T5X's tables for T5 1.1 base, T5 1.0 3B, byT5 small and scanned T5 base.
        ((32128, 768), "vocab -> embed", (768,), (32128,)),
        ((384, 1472), "vocab -> embed", (384,), (1472,)),
        ((768, 2048), "embed -> mlp", (768,), (2048,)),
        ((2048, 768), "mlp -> embed", (768,), (2048,)),
        ((1024, 4096), "embed -> joined_kv", (1024,), (4096,)),
        ((4096, 1024), "joined_kv -> embed", (1024,), (4096,)),
        ((1472, 384), "embed -> joined_kv", (384,), (1472,)),
        ((768, 768), "embed -> joined_kv", (768,), (768,)),
        ((768, 12, 12, 64), "embed layers -> heads kv", (768, 12), (12, 12, 64)),
        ((12, 12, 64, 768), "heads layers kv -> embed", (12, 768), (12, 12, 64)),
        ((2048, 12, 768), "mlp layers -> embed", (12, 768), (2048, 12)),
        ((16, 2, 8), "embed -> heads kv", (16,), (2, 8)),
    ],
)
def test_factored_slots_have_the_shapes_that_t5x_creates(shape, axes, v_row, v_col):
    assert slots(shape, axes) == (v_row, v_col, UNUSED)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((768,), "-> embed"),
        ((12, 32), "heads <- relpos_buckets"),
        ((768, 12), "-> embed layers"),
        ((12, 12, 32), "heads layers <- relpos_buckets"),
        ((64, 127), "embed -> mlp"),
    ],
)
def test_unfactored_slots_have_the_parameters_shape(shape, axes):
    assert slots(shape, axes) == (UNUSED, UNUSED, shape)


def test_fusing_can_cross_the_threshold_of_factoring_and_swap_what_the_slots_index():
    assert slots((64, 300), "embed -> mlp") == (UNUSED, UNUSED, (64, 300))
    assert slots((128, 600), "embed -> mlp") == ((128,), (600,), UNUSED)
    # Of equal sizes, v_row indexes the first axis.
    assert slots((256, 128), "mlp -> embed") == ((128,), (256,), UNUSED)
    assert slots((256, 256), "mlp -> embed") == ((256,), (256,), UNUSED)


@pytest.mark.parametrize("variant", ["t5_1_1", "t5_1_0", "scalable_1_1"])
def test_the_slots_of_every_fixture_are_the_ones_the_rule_predicts(written, variant):
    checkpoint = open_checkpoint(str(written / variant / "seed0/legacy/checkpoint_20"))
    tree = recognize(checkpoint.shapes, "here")

    found = find_state(checkpoint.shapes, tree, "here")

    own = {name: shape for name, shape in checkpoint.shapes.items() if name.startswith(STATE)}
    assert found.kind == "adafactor"
    assert found.fresh(tree, tree.shapes) == own


def test_momentum_and_unfactored_slots_are_recognized():
    """umT5 XXL's optimizer: beta1 = 0.9, factored = False."""
    shapes = {n: v.shape for n, v in state("scalable-t5-1.1-scanned", 0).items() if n.startswith("target/")}
    tree = recognize(shapes, "here")
    for name, shape in list(tree.shapes.items()):
        for slot, own in {"m": shape, "v": shape, "v_row": UNUSED, "v_col": UNUSED}.items():
            shapes[f"{STATE}{name}/{slot}"] = own

    found = find_state(shapes, tree, "here")

    assert (found.kind, found.factored, found.momentum) == ("adafactor", False, True)


def test_adam_in_t5x_is_recognized_and_grows_with_its_parameters():
    shapes = {n: v.shape for n, v in state("t5-1.1", 0).items() if n.startswith("target/")}
    tree = recognize(shapes, "here")
    for name, shape in tree.shapes.items():
        shapes |= {f"{STATE}0/mu/{name}": shape, f"{STATE}0/nu/{name}": shape}
    shapes[f"{STATE}0/count"] = ()
    doubled = {name: tuple(2 * n for n in shape) for name, shape in tree.shapes.items()}

    found = find_state(shapes, tree, "here")
    fresh = found.fresh(tree, doubled)

    assert found.kind == "adam"
    assert fresh[f"{STATE}0/count"] == ()
    assert fresh[f"{STATE}0/nu/decoder/logits_dense/kernel"] == doubled["decoder/logits_dense/kernel"]
    assert len(fresh) == 2 * len(tree.shapes) + 1


def test_slots_that_do_not_fit_are_named_with_both_shapes():
    shapes = {n: v.shape for n, v in state("t5-1.1", 0).items()}
    shapes[f"{STATE}decoder/decoder_norm/scale/v"] = (13,)
    tree = recognize(shapes, "here")

    with pytest.raises(Incompatible, match="does not fit its parameters") as error:
        find_state(shapes, tree, "here")

    assert error.value.details[0] == f"{STATE}decoder/decoder_norm/scale/v: shape [13], expected [12]"
    assert "--optimizer drop" in error.value.hint


def test_slots_of_another_optimizer_in_t5x_are_told_apart_and_are_not_adafactors():
    parameters = {name: v.shape for name, v in state("t5-1.1", 0).items() if name.startswith("target/")}
    slots = {f"{STATE}0/trace/{name.removeprefix('target/')}": shape for name, shape in parameters.items()}
    tree = recognize(parameters, "here")

    found = find_state({**parameters, **slots}, tree, "here")

    assert found.kind == "unknown"
    assert found.fresh(tree, tree.shapes) == slots
