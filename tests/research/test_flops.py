"""Operations of a step: by hand, and against what XLA counts of the twin."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from models import DECODER_SIZES, LAYERS, SIZES, metadata_only

from fusectl.errors import Incompatible, UsageError
from fusectl.families.table import ENCODER
from fusectl.formats.opening import open_checkpoint
from fusectl.networks.tokens import Tokens
from fusectl.networks.training import batch_of, loss_of
from fusectl.operations.learning.learn import random_parameters
from fusectl.research.flops import flops_per_step
from fusectl.sources.opened import recognized
from fusectl.sources.packed_qkv import unpacked


def tree_of(tmp_path, family, sizes, layers):
    path = metadata_only(tmp_path / "model", family, sizes, layers, "float32")
    return recognized(unpacked(open_checkpoint(str(path))), family)


def test_an_encoder_decoder_by_hand(tmp_path):
    tree = tree_of(tmp_path, "t5-1.1", SIZES, LAYERS)
    embed, joined, mlp, vocab = (SIZES[axis] for axis in ("embed", "joined_kv", "mlp", "vocab"))
    batch, inputs, targets = 4, 10, 7

    encoder = LAYERS["encoder"] * (4 * embed * joined + 3 * embed * mlp) * inputs
    decoder = LAYERS["decoder"] * (
        (4 * embed * joined + 3 * embed * mlp) * targets
        # Queries and outputs of attention to the encoder are the targets', keys and values the inputs'.
        + 2 * embed * joined * (targets + inputs)
    )
    head = embed * vocab * targets
    squares = LAYERS["encoder"] * inputs * inputs + LAYERS["decoder"] * (targets * targets + targets * inputs)
    by_hand = 6 * batch * (encoder + decoder + head) + 12 * batch * joined * squares

    assert flops_per_step(tree, batch=batch, length=inputs, target_length=targets) == by_hand


@pytest.mark.parametrize(
    "family", ["maxtext-llama", "maxtext-llama-tied", "gemma", "gemma-qkv", "maxtext-llama-scanned"]
)
def test_a_decoder_by_hand(tmp_path, family):
    kv_heads = 6 if family == "gemma-qkv" else 3
    sizes = {axis: n for axis, n in DECODER_SIZES.items() if axis != "kv_heads" or kv_heads == 3}
    tree = tree_of(tmp_path, family, sizes, {"decoder": 3})
    embed, heads, kv, mlp, vocab = (DECODER_SIZES[axis] for axis in ("embed", "heads", "kv", "mlp", "vocab"))
    batch, length = 4, 10

    layer = 2 * embed * heads * kv + 2 * embed * kv_heads * kv + 3 * embed * mlp
    by_hand = 6 * batch * length * (3 * layer + embed * vocab + 3 * 2 * heads * kv * length)

    # The head is counted, whether it is a kernel of its own or the table; looking up is not.
    assert flops_per_step(tree, batch=batch, length=length) == by_hand


def test_twice_the_widths_cost_four_times_the_kernels_and_twice_the_squares(tmp_path):
    tree = tree_of(tmp_path, "t5-1.1", SIZES, LAYERS)
    wide = tree.resized({axis: 2 * n for axis, n in SIZES.items() if axis in tree.family.grown}, {})

    def count(tree, length):
        return flops_per_step(tree, batch=1, length=length, target_length=length)

    def squares(tree):
        # What is left of rows of two tokens beyond those of one, twice.
        return (count(tree, 2) - 2 * count(tree, 1)) / 2

    kernels = [count(each, 1) - squares(each) for each in (tree, wide)]
    assert squares(wide) == 2 * squares(tree) > 0
    head = 6 * SIZES["embed"] * SIZES["vocab"]
    assert kernels[1] - 2 * head == 4 * (kernels[0] - head)


def of_xla(tree, batch, length, target_length):
    """What XLA counts of the loss and its gradient."""
    shapes = (batch, length if ENCODER in tree.depths else 1), (batch, target_length or length)
    inputs, targets = (np.ones(shape, np.int32) for shape in shapes)
    tokens = Tokens(inputs, targets, targets)
    step = jax.jit(jax.value_and_grad(partial(loss_of, tree)))
    return step.lower(random_parameters(tree, 0), batch_of(tokens)).compile().cost_analysis()["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5-1.1", "maxtext-llama"])
def test_xla_counts_as_many_and_some_percent_more(tmp_path, family):
    of_t5 = {"vocab": 300, "embed": 128, "heads": 4, "kv": 32, "joined_kv": 128, "mlp": 256, "relpos_buckets": 32}
    of_decoders = {"vocab": 300, "embed": 128, "heads": 4, "kv_heads": 2, "kv": 32, "mlp": 256}
    t5 = family.startswith("t5")
    batch, length, target_length = 4, 48, 24 if t5 else None
    sizes, layers = (of_t5, {"encoder": 2, "decoder": 2}) if t5 else (of_decoders, {"decoder": 2})
    tree = tree_of(tmp_path, family, sizes, layers)
    counted = flops_per_step(tree, batch=batch, length=length, target_length=target_length)
    # T5X looks tokens up by multiplying rows of zeros and a one with the table: forwards, and for the table's gradient.
    one_hot = 4 * batch * (length + target_length) * sizes["vocab"] * sizes["embed"] if t5 else 0

    more = of_xla(tree, batch, length, target_length) / (counted + one_hot) - 1
    # Norms, activations and softmax: what works value by value.
    assert 0 < more < 0.03
    # Nothing as small as the head or the squares could be missing.
    squares = 12 * batch * 2 * sizes["embed"] * length * length
    assert 6 * batch * length * sizes["vocab"] * sizes["embed"] > 0.03 * counted
    assert squares > 0.03 * counted


def test_what_cannot_be_counted_is_refused(tmp_path):
    tree = tree_of(tmp_path, "t5-1.1", SIZES, LAYERS)
    with pytest.raises(UsageError, match="rows of inputs and of targets"):
        flops_per_step(tree, batch=1, length=8)
    decoder = tree_of(tmp_path / "decoder", "maxtext-llama", DECODER_SIZES, {"decoder": 2})
    with pytest.raises(UsageError, match="a decoder one"):
        flops_per_step(decoder, batch=1, length=8, target_length=8)
    rows = {name: replace(row, role="") for name, row in tree.rows.items()}
    with pytest.raises(Incompatible, match="no row of its table has the role query"):
        flops_per_step(replace(tree, rows=rows), batch=1, length=8, target_length=8)
