"""Carried optimizer state against the state that the fused model gathers itself over the same batches, in float64."""

import json
import math
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from cases import diagonals, exhaustive, first_soon, slow
from flax.serialization import to_state_dict
from flax.traverse_util import flatten_dict, unflatten_dict
from models import checkpoint, write_record

from fusectl.demo import random_parameters
from fusectl.errors import Incompatible
from fusectl.families.recognition import recognize
from fusectl.families.registry import family_named
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.registry import FORMATS
from fusectl.formats.sink import save
from fusectl.networks import t5_stages as t5_twin
from fusectl.networks.t5_flax import Transformer
from fusectl.operations.convert import plan_conversion
from fusectl.operations.fuse import plan_fusion
from fusectl.optimizer.adafactor import adafactor_slots, factored_axes
from fusectl.optimizer.registry import find_state
from fusectl.optimizer.state import STATE
from fusectl.planning.options import Options
from fusectl.verification import Settings, verify
from fusectl.writing.carrying_out import carry_out, write_table


# The embedding's slots change places when it is fused, and kernels of 64 come to be factored.
SIZES = {"vocab": 192, "embed": 128, "heads": 2, "kv": 32, "joined_kv": 64, "mlp": 96, "relpos_buckets": 32}
LAYERS = {"encoder": 1, "decoder": 1}
FAMILIES = ["t5-1.1", "t5-1.0", "scalable-t5-1.1-scanned"]
BATCHES = 3
TOLERANCE = 1e-12


def batches():
    rng = np.random.default_rng(0)
    for _ in range(BATCHES):
        encoder, targets = rng.integers(2, SIZES["vocab"], (2, 2, 6))
        yield encoder, np.pad(targets[:, :-1], ((0, 0), (1, 0))), targets


def network(tree, groups=()):
    """The logits of a tree as a function of its parameters by name, in float64; one norm, or one for each group."""
    config = t5_twin.config_of(tree, groups or (tree.sizes["embed"],), "float64", accumulate="float64")

    def logits(parameters, encoder, decoder, targets):
        flat = {}
        for name, values in parameters.items():
            axes = tree.rows[name].spec.axes
            if "layers" not in axes:
                flat[name] = values
                continue
            stack, _, rest = name.split("/", 2)
            for i, layer in enumerate(jnp.moveaxis(values, axes.index("layers"), 0)):
                flat[f"{stack}/layers_{i}/{rest}"] = layer
        variables = {"params": unflatten_dict(flat, sep="/")}
        return Transformer(config).apply(variables, encoder, decoder, targets, enable_dropout=False)

    return logits


def gradients(tree, parameters):
    """The gradients of the mean cross entropy over each batch, at the same parameters."""

    def loss(parameters, encoder, decoder, targets):
        log = jax.nn.log_softmax(network(tree)(parameters, encoder, decoder, targets))
        return -jnp.take_along_axis(log, targets[..., None], -1).mean()

    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(loss))
        return [jax.tree.map(np.asarray, gradient(parameters, *batch)) for batch in batches()]


def adam(tree, parameters):
    """Adam's moments after these batches, as optax keeps them inside T5X."""
    state = {}
    for gradient in gradients(tree, parameters):
        for name, g in gradient.items():
            for moment, b, value in (("mu", 0.9, g), ("nu", 0.99, g * g)):
                slot = f"{STATE}0/{moment}/{name}"
                state[slot] = b * state.get(slot, 0.0) + (1 - b) * value
    return {**state, f"{STATE}0/count": np.array(BATCHES, np.int32)}


def adafactor(tree, parameters, *, factored=True, momentum=False, least=None):
    """The state of T5X's Adafactor (t5x/adafactor.py) after these batches, with parameter scale and clipping.

    This implementation shares no code with the planner. `least` collects the smallest second moment that each
    gradient was divided by the root of.
    """
    state = {}
    for step, gradient in enumerate(gradients(tree, parameters)):
        decay = 1.0 - (step + 1.0) ** -0.8
        for name, g in gradient.items():
            spec, shape = tree.rows[name].spec, g.shape
            slots = adafactor_slots(shape, spec, factored=factored, momentum=momentum)
            old = {slot: state.get(f"{STATE}{name}/{slot}", np.zeros(own)) for slot, own in slots.items()}
            axes = factored_axes(shape, spec) if factored else None
            squared = g * g
            if axes is None:
                old["v"] = decay * old["v"] + (1 - decay) * squared
                update = np.divide(g, np.sqrt(old["v"]), out=np.zeros_like(g), where=old["v"] > 0)
            else:
                for slot, dropped in zip(("v_row", "v_col"), axes, strict=True):
                    old[slot] = decay * old[slot] + (1 - decay) * squared.mean(axis=tuple(dropped))
                update = None
            if least is not None and axes is None:
                least[name] = np.minimum(least.get(name, np.inf), old["v"])
            if momentum:
                update = update / max(1.0, math.sqrt((update**2).mean()))
                update = 0.01 * math.sqrt((parameters[name] ** 2).mean()) * update
                old["m"] = 0.9 * old["m"] + 0.1 * update
            state |= {f"{STATE}{name}/{slot}": values for slot, values in old.items()}
    return state


OPTIMIZERS = {
    "adam": adam,
    "adafactor": adafactor,
    "adafactor with momentum": lambda tree, parameters, least=None: adafactor(
        tree, parameters, factored=False, momentum=True, least=least
    ),
}


def source(at, family, optimizer, seed=0):
    parameters = random_parameters(family_named(family), SIZES, LAYERS, seed)
    parameters = {name: values.astype(np.float64) for name, values in parameters.items()}
    tree = recognize({f"target/{name}": values.shape for name, values in parameters.items()}, "here", family)
    state = optimizer(tree, parameters)
    whole = {f"target/{name}": values for name, values in parameters.items()} | state
    save(at, {**whole, "state/step": np.array(BATCHES, np.int32)}, "t5x")
    return str(at)


def fuse(paths, at, **options):
    plan, opened = plan_fusion(paths, Options(**options))
    carry_out(plan, opened, at)
    return open_checkpoint(str(at))


def off(found, wanted):
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-300))


@pytest.mark.parametrize("family", first_soon(FAMILIES))
@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [("adam", 2), ("adafactor", 3), slow("adafactor", 2), slow("adafactor with momentum", 2)],
)
def test_carried_is_what_the_fused_model_gathers_itself(tmp_path, family, optimizer, copies):
    path = source(tmp_path / "a", family, OPTIMIZERS[optimizer])

    fused = fuse([path] * copies, tmp_path / "fused", dtype="float64")

    tree = recognize(fused.shapes, "fused")
    parameters = {name: fused.read(tree.full(name)) for name in tree.shapes}
    least = {}
    momentum = {"least": least} if "momentum" in optimizer else {}
    wanted = OPTIMIZERS[optimizer](tree, parameters, **momentum)
    found = {name: fused.read(name) for name in fused.leaves if name.startswith(STATE)}
    assert found.keys() == wanted.keys()
    assert {n: v.shape for n, v in found.items()} == {n: np.shape(v) for n, v in wanted.items()}
    # Each step divides a gradient by its deviation, and the momentum sums the quotients: the step with the smallest
    # deviation amplifies rounding errors most. Multiplying by that deviation compares them as gradients.
    weight = {f"{STATE}{name}/m": np.sqrt(v) for name, v in least.items()}
    weighed = lambda values, name: values * weight.get(name, 1.0)
    errors = {name: off(weighed(found[name], name), weighed(wanted[name], name)) for name in found}
    assert {name: error for name, error in errors.items() if error > TOLERANCE} == {}
    assert verify(str(tmp_path / "fused"), settings=Settings(("files", "weights"))).passed


@pytest.mark.slow
def test_what_is_copied_as_it_is_is_not_what_the_fused_model_gathers(tmp_path):
    """The control: gradients are 1/K of what they were, and nobody who forgets it passes."""
    path = source(tmp_path / "a", "t5-1.1", OPTIMIZERS["adam"])
    fused = fuse([path] * 2, tmp_path / "fused", dtype="float64")
    tree = recognize(fused.shapes, "fused")
    wanted = OPTIMIZERS["adam"](tree, {name: fused.read(tree.full(name)) for name in tree.shapes})
    slot = f"{STATE}0/nu/encoder/layers_0/mlp/wo/kernel"
    assert off(np.tile(open_checkpoint(path).read(slot), (2, 2)), wanted[slot]) > 2.9
    assert off(np.tile(open_checkpoint(path).read(slot) / 4, (2, 2)), wanted[slot]) < TOLERANCE


@pytest.mark.parametrize("family", first_soon(FAMILIES))
def test_equal_models_that_nobody_knows_to_be_equal_get_the_same_where_the_moments_have_rank_one(tmp_path, family):
    """The estimate between two different models is exact then; first moments between them start from zero."""

    def rank_one(tree, parameters):
        rng = np.random.default_rng(1)
        state = {}
        for name, values in parameters.items():
            spec = tree.rows[name].spec
            sides = [
                rng.uniform(
                    0.5,
                    2.0,
                    [n if axis not in spec.outputs else 1 for n, axis in zip(values.shape, spec.axes, strict=True)],
                ),
                rng.uniform(
                    0.5,
                    2.0,
                    [n if axis not in spec.inputs else 1 for n, axis in zip(values.shape, spec.axes, strict=True)],
                ),
            ]
            state[f"{STATE}0/nu/{name}"] = np.broadcast_to(sides[0] * sides[1], values.shape).copy()
            state[f"{STATE}0/mu/{name}"] = rng.normal(size=values.shape)
        return {**state, f"{STATE}0/count": np.array(7, np.int32)}

    paths = [source(tmp_path / name, family, rank_one) for name in "ab"]

    known, unknown = (fuse(pair, tmp_path / at, dtype="float64") for pair, at in (([paths[0]] * 2, "k"), (paths, "u")))

    tree = recognize(known.shapes, "fused")
    for name in known.leaves:
        if "/nu/" in name:
            assert off(unknown.read(name), known.read(name)) < TOLERANCE, name
    kernel = next(n for n in tree.shapes if n.endswith("wo/kernel"))
    at, slot = tree.rows[kernel].spec.axes.index("embed"), f"{STATE}0/mu/{kernel}"
    first, second = np.split(unknown.read(slot), 2, axis=at)
    mlp = tree.rows[kernel].spec.axes.index("mlp")
    assert not np.split(first, 2, axis=mlp)[1].any()
    assert not np.split(second, 2, axis=mlp)[0].any()
    assert np.array_equal(
        np.split(first, 2, axis=mlp)[0], np.split(np.split(known.read(slot), 2, axis=at)[0], 2, axis=mlp)[0]
    )
    assert unknown.read(f"{STATE}0/count") == 7


def restored(path):
    """What a trainer restores, by name: through unmodified Orbax where it can read it."""
    opened = open_checkpoint(str(path))
    if opened.format == "t5x":
        return {name: opened.read(name) for name in opened.leaves}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return flatten_dict(ocp.PyTreeCheckpointer().restore(opened.location.index), sep="/")


def first_loss(path, groups=()):
    """The mean cross entropy of the first batch after a restart."""
    values = {name.removeprefix("target/"): v for name, v in restored(path).items() if name.startswith("target/")}
    tree = recognize({f"target/{name}": v.shape for name, v in values.items()}, str(path))
    with jax.enable_x64(True):
        batch = next(batches())
        logits = network(tree, groups)({name: jnp.asarray(v, jnp.float64) for name, v in values.items()}, *batch)
        log = jax.nn.log_softmax(logits)
        return float(-jnp.take_along_axis(log, batch[-1][..., None], -1).mean()), np.asarray(logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    "format", [form if form in {"t5x", "orbax-ocdbt-zarr3"} else exhaustive(form) for form in FORMATS]
)
def test_the_first_loss_after_a_restart_is_the_one_before_the_growth(tmp_path, format):
    """Fused and written in another format, by what a trainer restores; state and step are those before conversion."""
    sources = [checkpoint(tmp_path / name, seed=seed, sizes=SIZES, layers=LAYERS) for seed, name in enumerate("ab")]
    fuse([sources[0]] * 2, tmp_path / "self")
    fuse(sources, tmp_path / "two", norm="property")
    for name in ("self", "two"):
        carry_out(*plan_conversion(str(tmp_path / name), Options(format=format)), tmp_path / f"{name}.out")

    losses, logits = zip(*map(first_loss, sources))
    log = jax.nn.log_softmax(sum(logits) / 2)
    ensemble = float(-np.take_along_axis(np.asarray(log), next(batches())[-1][..., None], -1).mean())

    assert first_loss(tmp_path / "self.out")[0] == pytest.approx(losses[0], rel=TOLERANCE)
    assert first_loss(tmp_path / "two.out", (SIZES["embed"],) * 2)[0] == pytest.approx(ensemble, rel=1e-6)
    # The control: one norm over both is another model.
    assert first_loss(tmp_path / "two.out")[0] != pytest.approx(ensemble, rel=1e-3)
    for name in ("self", "two"):
        before, after = restored(tmp_path / name), restored(tmp_path / f"{name}.out")
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[key], after[key]) for key in before)


def stepped(tree, parameters, state, factors, epsilon):
    """The parameters after one step of Adam from a state, each with its own factor of the learning rate."""
    (gradient, *_), rate = gradients(tree, parameters), 1e-4
    count, after = BATCHES + 1, {}
    for name, g in gradient.items():
        mu = 0.9 * state[f"{STATE}0/mu/{name}"] + 0.1 * g
        nu = 0.99 * state[f"{STATE}0/nu/{name}"] + 0.01 * g * g
        step = (mu / (1 - 0.9**count)) / (np.sqrt(nu / (1 - 0.99**count)) + epsilon[name])
        after[name] = parameters[name] - rate * factors[name] * step
    return after


def moved(tree, parameters, *args):
    """How the logits move in such a step."""
    with jax.enable_x64(True):
        batch = next(batches())
        before, after = (np.asarray(network(tree)(p, *batch)) for p in (parameters, stepped(tree, parameters, *args)))
    return after - before


@pytest.mark.slow
@pytest.mark.parametrize(("family", "copies"), diagonals(FAMILIES, [2, 3]))
def test_with_the_factors_of_the_table_the_logits_move_as_the_sources_would_have(tmp_path, family, copies):
    path = source(tmp_path / "a", family, OPTIMIZERS["adam"])
    plan, opened = plan_fusion([path] * copies, Options())
    fused = fuse([path] * copies, tmp_path / "fused")
    models = []
    for model in (opened[0], fused):
        tree = recognize(model.shapes, "here")
        parameters = {name: model.read(tree.full(name)) for name in tree.shapes}
        models.append((tree, parameters, {n: model.read(n) for n in model.leaves if n.startswith(STATE)}))
    (small, small_values, small_state), (large, values, state) = models
    one = dict.fromkeys(small.shapes, 1.0)
    epsilon = dict.fromkeys(small.shapes, 1e-8)
    scaled = {name: 1e-8 * rate.gradient for name, rate in plan.rates.items()}

    wanted = moved(small, small_values, small_state, one, epsilon)
    factors = {name: rate.adam for name, rate in plan.rates.items()}
    found = moved(large, values, state, factors, scaled)

    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    # The control: at the old rate it moves about K times as far.
    plain = moved(large, values, state, one, scaled)
    assert np.linalg.norm(plain) > 1.4 * np.linalg.norm(wanted)


@pytest.mark.slow
def test_optax_takes_the_table_as_it_is(tmp_path):
    import optax

    plan, _ = plan_fusion([checkpoint(tmp_path / "a")] * 2, Options())
    write_table(plan, tmp_path / "rates.json")

    # As in the README.
    table = json.loads((tmp_path / "rates.json").read_text())
    factors = {kind: optax.scale(each["adam"]) for kind, each in table["factors"].items()}
    labels = unflatten_dict(table["labels"], sep="/")
    optimizer = optax.chain(optax.scale_by_adam(), optax.multi_transform(factors, labels), optax.scale(-1.0))
    ones = unflatten_dict({name: jnp.ones(2) for name in table["labels"]}, sep="/")
    state = optimizer.init(ones)
    updates, _ = optimizer.update(ones, state)

    found = {name: float(-value[0]) for name, value in flatten_dict(updates, sep="/").items()}
    assert found == pytest.approx({name: rate.adam for name, rate in plan.rates.items()}, rel=1e-5)
    kept = flatten_dict(to_state_dict(state), sep="/")
    assert {"0/count", *(f"0/{moment}/{name}" for moment in ("mu", "nu") for name in table["labels"])} <= kept.keys()


def groups_of(tree, groups):
    """A network like `network`, with a norm per source."""
    return t5_twin.config_of(tree, groups, "float64", accumulate="float64")


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["rule", "property"])
def test_copies_of_different_weights_are_exact_with_a_norm_each_only(tmp_path, monkeypatch, norm):
    path = source(tmp_path / "a", "t5-1.1", OPTIMIZERS["adam"])
    plan, opened = plan_fusion([path] * 2, Options(norm=norm), weights=(0.8, 0.2))
    assert any(("estimated" in note) == (norm == "rule") for note in plan.notes if note.startswith("optimizer"))
    carry_out(plan, opened, tmp_path / "fused")
    fused = open_checkpoint(str(tmp_path / "fused"))
    tree = recognize(fused.shapes, "fused")
    if norm == "property":
        config = groups_of(tree, fused.record.norm_groups)
        monkeypatch.setattr(t5_twin, "config_of", lambda *_, **__: config)
    wanted = OPTIMIZERS["adam"](tree, {name: fused.read(tree.full(name)) for name in tree.shapes})
    worst = max(off(fused.read(name), wanted[name]) for name in wanted)
    assert worst < TOLERANCE if norm == "property" else worst > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("fixture", first_soon(["t5_1_1", "t5_1_0", "scalable_1_1"]))
def test_what_t5x_wrote_is_carried_and_verified(written, tmp_path, fixture):
    a, b = (str(written / fixture / f"seed{i}/legacy/checkpoint_20") for i in (0, 1))
    for at, paths in (("self", [a, a]), ("two", [a, b]), ("three", [a, b, a])):
        for optimizer in ("carry", "asymmetric"):
            fused = fuse(paths, tmp_path / f"{at}-{optimizer}", optimizer=optimizer)
            tree = recognize(fused.shapes, "fused")
            assert find_state(fused.shapes, tree, "fused").kind == "adafactor"
            assert verify(str(tmp_path / f"{at}-{optimizer}"), settings=Settings(("files", "weights"))).passed


@pytest.mark.slow
def test_widths_that_differ_and_are_factored_in_one_source_only(tmp_path):
    """96 x 120 is not factored, 160 x 200 is, and so is their fusion."""
    sizes = [{**SIZES, "embed": 96, "mlp": 120}, {**SIZES, "embed": 160, "mlp": 200, "heads": 3, "joined_kv": 96}]
    paths = [checkpoint(tmp_path / str(i), seed=i, sizes=each) for i, each in enumerate(sizes)]
    fused = fuse(paths, tmp_path / "fused")
    slot = f"{STATE}encoder/layers_0/mlp/wi_0/kernel/"
    small, large = (open_checkpoint(path).shapes for path in paths)
    assert [shapes[f"{slot}v_row"] for shapes in (small, large, fused.shapes)] == [(1,), (160,), (256,)]
    assert fused.read(f"{slot}v_row").all()
    report = verify(str(tmp_path / "fused"), settings=Settings(("files", "weights")))
    assert report.passed, report.failures()


@pytest.mark.slow
def test_one_model_by_two_paths_is_one_model(written, tmp_path):
    a = written / "t5_1_1/seed0/legacy/checkpoint_20"
    paths = [str(a), f"{a}/"]
    fused, same = fuse(paths, tmp_path / "two"), fuse([str(a)] * 2, tmp_path / "one")
    slot = f"{STATE}encoder/layers_0/mlp/wi_0/kernel/v"
    assert np.array_equal(fused.read(slot), same.read(slot))
    assert verify(str(tmp_path / "two"), settings=Settings(("weights",))).passed


def test_asymmetric_state_is_the_first_copys_alone(written, tmp_path):
    a = str(written / "t5_1_1/seed0/legacy/checkpoint_20")
    carried, first = (fuse([a, a], tmp_path / o, optimizer=o) for o in ("carry", "asymmetric"))
    slot = f"{STATE}encoder/layers_0/mlp/wi_0/kernel/v"
    n, m = open_checkpoint(a).shapes[slot]
    assert np.array_equal(first.read(slot)[:n, :m], carried.read(slot)[:n, :m])
    assert not first.read(slot)[n:].any()
    assert not first.read(slot)[:, m:].any()


def changed(at, path, change):
    """The checkpoint with its values changed."""
    opened = open_checkpoint(path)
    values = {name: opened.read(name) for name in opened.leaves}
    change(values)
    save(at, values, "t5x")
    return str(at)


KERNEL = "encoder/layers_0/mlp/wo/kernel"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.pop(f"{STATE}0/nu/{KERNEL}"), "no slots nu, expected one"),
        (lambda v: v.update({f"{STATE}1/mu/{KERNEL}": v[f"{STATE}0/mu/{KERNEL}"]}), "2 slots mu, expected one"),
    ],
)
def test_a_state_with_slots_too_many_or_too_few_is_refused(tmp_path, change, says):
    path = changed(tmp_path / "b", source(tmp_path / "a", "t5-1.1", OPTIMIZERS["adam"]), change)
    with pytest.raises(Incompatible, match="does not fit") as error:
        plan_fusion([path] * 2, Options())
    assert any(says in line for line in error.value.details)


@pytest.mark.slow
def test_a_state_that_only_counts_is_not_carried(tmp_path):
    """As optax's sgd has it, or Adam's that has lost all of its moments: nothing tells which."""
    without = changed(
        tmp_path / "b",
        source(tmp_path / "a", "t5-1.1", OPTIMIZERS["adam"]),
        lambda v: [v.pop(name) for name in list(v) if "/mu/" in name or "/nu/" in name],
    )

    with pytest.raises(Incompatible):
        plan_fusion([without] * 2, Options())


@pytest.mark.slow
def test_what_would_be_silently_wrong_is_refused_or_said(tmp_path):
    a = source(tmp_path / "a", "t5-1.1", OPTIMIZERS["adam"])
    older = changed(tmp_path / "b", a, lambda v: v.update({f"{STATE}0/count": np.array(10**6, np.int32)}))
    bare = changed(tmp_path / "c", a, lambda v: [v.pop(name) for name in list(v) if name.startswith(STATE)])
    half = changed(
        tmp_path / "d", a, lambda v: v.update({n: x.astype(np.float16) for n, x in v.items() if "/nu/" in n})
    )
    for paths, says in (
        ([a, older], "one count cannot correct"),
        ([a, bare], "with and without optimizer state"),
        ([bare, a], "with and without optimizer state"),
        ([half, half], "second moments in float16"),
        ([a, half], "do not fit together"),
    ):
        with pytest.raises(Incompatible, match=says):
            plan_fusion(paths, Options())
    both = changed(tmp_path / "e", older, lambda v: v.update({f"{STATE}0/count": np.array(10**6 + 1, np.int32)}))
    plan, _ = plan_fusion([older, both], Options())
    assert any("counts on from the first" in note for note in plan.notes)


@pytest.mark.slow
def test_of_factored_moments_asymmetric_state_keeps_what_they_stand_for(tmp_path):
    a = source(tmp_path / "a", "t5-1.1", OPTIMIZERS["adafactor"])
    name = f"{STATE}token_embedder/embedding/"
    carried, first = (fuse([a, a], tmp_path / how, optimizer=how) for how in ("carry", "asymmetric"))

    def rebuilt(fused):
        row, column = fused.read(f"{name}v_row"), fused.read(f"{name}v_col")
        whole = np.outer(row, column) / row.mean()
        return (whole if whole.shape == fused.shapes["target/token_embedder/embedding"] else whole.T)[
            :, : SIZES["embed"]
        ]

    np.testing.assert_allclose(rebuilt(first), rebuilt(carried), rtol=1e-6)


@pytest.mark.slow
def test_verify_finds_nan_in_a_carried_slot_and_minds_what_was_dropped(tmp_path):
    a = source(tmp_path / "a", "t5-1.1", OPTIMIZERS["adam"])
    more = {f"{STATE}0/{moment}/extra": np.ones(3) for moment in ("mu", "nu")} | {"target/extra": np.ones(3)}
    extended = changed(tmp_path / "b", a, lambda v: v.update(more))
    plan, opened = plan_fusion([extended] * 2, Options(drop=("*extra",)))
    carry_out(plan, opened, tmp_path / "fused")
    assert verify(str(tmp_path / "fused"), settings=Settings(("weights",))).passed
    fuse([a, a], tmp_path / "sound")

    def spoil(values):
        values[f"{STATE}0/nu/{KERNEL}"][3, 4] = np.nan

    spoilt = changed(tmp_path / "spoilt", str(tmp_path / "sound"), spoil)
    shutil.copy(tmp_path / "sound/fusectl.json", tmp_path / "spoilt/fusectl.json")
    record = json.loads((tmp_path / "spoilt/fusectl.json").read_text())
    write_record(tmp_path / "spoilt", {**record, "tensors": {}, "files": {}})
    report = verify(spoilt, settings=Settings(("weights",)))
    assert not report.passed
    assert any("first at [3, 4]: nan" in problem for problem in report.failures())


@pytest.mark.slow
def test_sources_with_states_that_do_not_fit_together_are_refused(tmp_path):
    one = source(tmp_path / "a", "t5-1.1", OPTIMIZERS["adafactor"])
    other = source(tmp_path / "b", "t5-1.1", OPTIMIZERS["adam"], seed=1)
    with pytest.raises(Incompatible, match="do not fit together") as error:
        plan_fusion([one, other], Options())
    assert "reset" in error.value.hint
    plan_fusion([one, other], Options(optimizer="reset"))
