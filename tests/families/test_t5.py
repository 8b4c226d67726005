"""The tables of the T5 family against the trees that T5X wrote, and the recognition of families."""

import pytest
from models import ALL_NAMES, RECOGNIZED, SIZES, layers_of, sizes_of, state

from fusectl.errors import Incompatible
from fusectl.families.recognition import recognize
from fusectl.families.registry import FAMILIES, family_named
from fusectl.formats.opening import open_checkpoint


def shapes(family, **kwargs):
    return {name: values.shape for name, values in state(family, 0, **kwargs).items()}


@pytest.mark.parametrize(
    ("variant", "family"),
    [("t5_1_1", "t5-1.1"), ("t5_1_0", "t5-1.0"), ("scalable_1_1", "scalable-t5-1.1-scanned")],
)
def test_trees_that_t5x_wrote_are_recognized(written, variant, family):
    checkpoint = open_checkpoint(str(written / variant / "seed0/legacy/checkpoint_20"))

    tree = recognize(checkpoint.shapes, checkpoint.path)

    assert tree.family.name == family
    assert {"embed": 16, "mlp": 32, "heads": 2, "vocab": 128}.items() <= tree.sizes.items()
    assert tree.depths == {"encoder": 2, "decoder": 2}


@pytest.mark.parametrize("name", RECOGNIZED)
def test_every_family_recognizes_its_own_tree_and_no_other_does(name):
    tree = recognize(shapes(name), "here")

    assert tree.family.name == name
    assert tree.depths == layers_of(tree.family)
    assert tree.sizes == {axis: n for axis, n in sizes_of(tree.family).items() if axis in tree.sizes}


@pytest.mark.parametrize("name", ALL_NAMES)
def test_every_tensor_hits_exactly_one_row_and_every_row_is_hit(name):
    family = family_named(name)
    prefix = {"t5x": "target/", "maxtext": "params/params/", "gemma": ""}[family.trainer]
    names = [n.removeprefix(prefix) for n in shapes(name) if n.startswith(prefix)]

    for tensor in names:
        assert sum(row.matches(tensor) for row in family.rows) == 1, tensor
    for row in family.rows:
        assert any(row.matches(tensor) for tensor in names), row.pattern


def test_evidence_names_what_decided_and_the_public_model():
    tree = recognize(shapes("t5-1.1", sizes={**SIZES, "vocab": 384}), "here")

    assert "decoder/logits_dense: untied head" in tree.evidence
    assert "byT5" in tree.evidence


def test_aliases_lead_to_the_same_table():
    assert family_named("mt5") is family_named("byt5") is family_named("t5-1.1")


def test_a_family_that_does_not_exist_is_answered_with_near_names():
    with pytest.raises(Incompatible, match="no model family is called 't5-1.2'") as error:
        family_named("t5-1.2")

    assert "t5-1.1" in error.value.hint


def test_a_tree_that_lost_its_head_is_not_taken_for_a_tied_one():
    damaged = {n: s for n, s in shapes("t5-1.1").items() if "logits_dense" not in n}

    with pytest.raises(Incompatible, match="matches no model family") as error:
        recognize(damaged, "here")

    assert any("decoder/logits_dense/kernel: missing" in detail for detail in error.value.details)
    assert recognize(damaged, "here", "t5-1.1-tied").family.name == "t5-1.1-tied"


@pytest.mark.parametrize(
    "lost",
    [
        "encoder/layers_1/mlp/wo/kernel",
        "decoder/layers_0/pre_cross_attention_layer_norm/scale",
        "encoder/relpos_bias/rel_embedding",
    ],
)
def test_a_missing_tensor_is_named(lost):
    damaged = {n: s for n, s in shapes("t5-1.1").items() if n != f"target/{lost}"}

    with pytest.raises(Incompatible) as error:
        recognize(damaged, "here")

    assert f"{lost}: missing" in error.value.details


def test_an_unknown_tensor_is_answered_with_the_nearest_row():
    strange = {**shapes("t5-1.1"), "target/encoder/layers_0/mlp/wi_2/kernel": (12, 22)}

    with pytest.raises(Incompatible) as error:
        recognize(strange, "here")

    assert (
        "encoder/layers_0/mlp/wi_2/kernel: no row for it; nearest: encoder/layers_#/mlp/wi_1/kernel"
        in error.value.details
    )


def test_axes_that_disagree_are_named_with_both_values():
    strange = {**shapes("t5-1.1"), "target/encoder/layers_0/mlp/wo/kernel": (23, 12)}

    with pytest.raises(Incompatible) as error:
        recognize(strange, "here")

    assert "encoder/layers_0/mlp/wo/kernel: axis 'mlp' is 23 here and 22 in" in " ".join(error.value.details)


def test_stacks_of_different_depth_are_one_model():
    tree = recognize(shapes("scalable-t5-1.1-scanned", layers={"encoder": 7, "decoder": 2}), "here")

    assert tree.depths == {"encoder": 7, "decoder": 2}


def test_names_and_aliases_are_unique():
    names = [name for family in FAMILIES for name in (family.name, *family.aliases)]

    assert len(names) == len(set(names))


def test_a_transposed_kernel_is_named_and_not_another_family():
    """As a converter that forgets to transpose leaves it: each layer contradicts the table, all names are explained."""
    right = {name: shape for name, shape in shapes("t5-1.1").items() if name.startswith("target/")}
    wrong = {name: shape[::-1] if name.endswith("mlp/wo/kernel") else shape for name, shape in right.items()}

    with pytest.raises(Incompatible) as error:
        recognize(wrong, "here")

    assert error.value.details[0] == "nearest: t5-1.1"
    assert "mlp/wo/kernel: axis 'mlp' is" in error.value.details[1]
