"""Adam's state of decoders: carried, and gathered by the fused model over the same batches, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import first_soon
from flax.traverse_util import unflatten_dict
from models import sizes_of, state

from fusectl.families.recognition import recognize
from fusectl.families.registry import family_named
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.sink import save
from fusectl.networks import decoder_stages as decoder_twin
from fusectl.networks.decoder_flax import Decoder
from fusectl.operations.fuse import plan_fusion
from fusectl.optimizer.registry import find_state
from fusectl.planning.options import Options
from fusectl.verification import Settings, verify
from fusectl.writing.carrying_out import carry_out


BATCHES = 3
TOLERANCE = 1e-12
# Untied, tied, with norms that all heads share, with scales that 1 is added to, with two kernels in one tensor.
FAMILIES = ["maxtext-llama-scanned", "maxtext-gemma2-tied", "maxtext-qwen3-tied", "gemma3", "gemma-qkv-transposed"]


@pytest.fixture
def differentiable():
    """In float64, as derivatives are compared."""
    with jax.enable_x64(True):
        yield


def loss_of(tree):
    """The cross entropy of the next token, of a tree's parameters by name."""
    config = decoder_twin.config_of(tree, (tree.sizes["embed"],), "float64", accumulate="float64")

    def loss(parameters, tokens):
        modules = unflatten_dict(dict(decoder_twin._modules(tree, parameters, xp=jnp)), sep="/")
        logits = jax.nn.log_softmax(Decoder(config).apply({"params": modules}, tokens[:, :-1]))
        return -jnp.take_along_axis(logits, tokens[:, 1:, None], -1).mean()

    return loss


def gathered(tree, parameters):
    """mu and nu of Adam after a few batches of gradients at these parameters."""
    rng = np.random.default_rng(0)
    gradient = jax.jit(jax.grad(loss_of(tree)))
    mu, nu = ({n: np.zeros(v.shape) for n, v in parameters.items()} for _ in range(2))
    for _ in range(BATCHES):
        found = gradient(parameters, rng.integers(1, tree.sizes["vocab"], (2, 7)))
        for name, g in found.items():
            mu[name] = 0.9 * mu[name] + 0.1 * np.asarray(g)
            nu[name] = 0.99 * nu[name] + 0.01 * np.asarray(g) ** 2
    return mu, nu


def trained(at, family, seed):
    """A model with the state of an optimizer that has seen the batches: its path."""
    rows = family_named(family)
    maxtext = rows.trainer == "maxtext"
    prefix = "params/params/" if maxtext else "params/"
    bare = state(family, seed, sizes_of(rows), {"decoder": max(2, *(row.every for row in rows.rows))})
    parameters = {n.removeprefix("params/params/"): v.astype(np.float64) for n, v in bare.items()}
    tree = recognize({prefix + n: v.shape for n, v in parameters.items()}, "", family)
    mu, nu = gathered(tree, parameters)
    inside = "params/" if maxtext else ""
    values = {prefix + n: v for n, v in parameters.items()}
    for moment, found in (("mu", mu), ("nu", nu)):
        values |= {f"opt_state/0/{moment}/{inside}{n}": v for n, v in found.items()}
    save(at, {**values, "opt_state/0/count": np.array(BATCHES, np.int32), "step": np.array(3, np.int32)}, "orbax")
    return str(at)


def fuse(paths, output):
    plan, opened = plan_fusion(paths, Options())
    carry_out(plan, opened, output)
    return open_checkpoint(str(output))


@pytest.mark.slow
@pytest.mark.parametrize("family", first_soon(FAMILIES, 2))
@pytest.mark.parametrize("copies", first_soon([2, 3]))
def test_the_carried_state_is_the_one_that_the_fused_model_gathers(tmp_path, differentiable, family, copies):
    fused = fuse([trained(tmp_path / "a", family, 1)] * copies, tmp_path / "f")
    tree = recognize(fused.shapes, "", family)
    parameters = {name: fused.read(tree.full(name)) for name in tree.shapes}
    slots = find_state(fused.shapes, tree, "")

    for moment, found in zip(("mu", "nu"), gathered(tree, parameters), strict=True):
        for name, expected in found.items():
            carried = fused.read(slots.slot(name, moment))
            assert np.abs(carried - expected).max() <= TOLERANCE * np.abs(expected).max(), (name, moment)
    assert fused.read("opt_state/0/count") == BATCHES


@pytest.mark.slow
@pytest.mark.parametrize("family", first_soon(["maxtext-llama-scanned", "maxtext-qwen3-tied", "gemma3"]))
def test_with_the_printed_factors_a_step_of_adam_moves_the_logits_as_it_moved_them(tmp_path, differentiable, family):
    path = trained(tmp_path / "a", family, 1)
    plan, opened = plan_fusion([path] * 2, Options())
    carry_out(plan, opened, tmp_path / "f")
    moved = []
    for at, factors in ((path, None), (str(tmp_path / "f"), plan.rates)):
        checkpoint = open_checkpoint(at)
        tree = recognize(checkpoint.shapes, "", family)
        slots = find_state(checkpoint.shapes, tree, "")
        before = {name: checkpoint.read(tree.full(name)) for name in tree.shapes}
        after = {}
        for name, values in before.items():
            mu, nu = (checkpoint.read(slots.slot(name, moment)) for moment in ("mu", "nu"))
            # Without an epsilon, which has a scale.
            step = np.divide(mu, np.sqrt(nu), out=np.zeros_like(mu), where=nu > 0)
            after[name] = values - 1e-4 * (factors[name].adam if factors else 1.0) * step
        loss = jax.jit(loss_of(tree))
        tokens = np.random.default_rng(5).integers(1, tree.sizes["vocab"], (2, 7))
        moved.append(float(loss(after, tokens) - loss(before, tokens)))
        if factors:
            # With the old rates it moves further: the control.
            plain = {n: before[n] + (after[n] - before[n]) / factors[n].adam for n in before}
            assert float(loss(plain, tokens) - loss(before, tokens)) != pytest.approx(moved[0], rel=0.1)
    assert moved[1] == pytest.approx(moved[0], rel=1e-6)


@pytest.mark.slow
def test_states_of_different_models_are_proved_with_the_parameters_that_they_share(tmp_path, differentiable):
    """Norms of queries and keys, equal in both: their gradients add up."""
    paths = [trained(tmp_path / str(seed), "maxtext-qwen3-tied", seed) for seed in (1, 2)]
    first, second = (open_checkpoint(path) for path in paths)
    shared = {
        n: first.read(n) for n in first.leaves if "_norm/scale" in n and "/self_attention/" in n and "opt" not in n
    }
    values = {n: shared.get(n, second.read(n)) for n in second.leaves}
    save(tmp_path / "b", values, "orbax")

    fused = fuse([paths[0], str(tmp_path / "b")], tmp_path / "f")

    report = verify(str(tmp_path / "f"), settings=Settings(levels=("weights",)))
    assert report.passed, report.failures()
    name = "opt_state/0/{}/params/decoder/layers_0/self_attention/key_norm/scale"
    mu, nu = ([each.read(name.format(moment)) for each in (first, second, fused)] for moment in ("mu", "nu"))
    np.testing.assert_allclose(mu[2], (mu[0] + mu[1]) / 2, rtol=1e-12, atol=1e-18)
    np.testing.assert_allclose(nu[2], ((np.sqrt(nu[0]) + np.sqrt(nu[1])) / 2) ** 2, rtol=1e-12)
