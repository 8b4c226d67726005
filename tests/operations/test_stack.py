"""fusectl stack: which layer each layer is, that identity keeps the function, where the optimizer's state goes."""

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import covered, first_soon, slow, some_soon, thinned
from flax.traverse_util import unflatten_dict
from models import (
    DECODER_NAMES,
    FAMILY_NAMES,
    checkpoint,
    contents,
    covering,
    ends_at,
    parts_of,
    state,
    write_record,
)
from written import FACTORED, restored, trained, tree, written_by_orbax

from fusectl.errors import Incompatible
from fusectl.families.registry import family_named
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.record import FILE_NAME
from fusectl.formats.sink import save
from fusectl.layout.fill import Fill
from fusectl.networks.tokens import random_tokens
from fusectl.operations.convert import plan_conversion
from fusectl.operations.fuse import plan_fusion
from fusectl.operations.noise_fill import plan_noise_fill
from fusectl.operations.stack import plan_stack
from fusectl.planning.options import Options
from fusectl.restart import restart
from fusectl.rules.kinds import How
from fusectl.testing.evaluate import evaluate_plan
from fusectl.verbs import Fused
from fusectl.verification import Settings, verify
from fusectl.writing.carrying_out import carry_out


HOWS = list(How)
T5_LAYERS = {"encoder": 4, "decoder": 2}
TINY = {"encoder": 2, "decoder": 1}
T5_DEEPER = {"encoder": 7, "decoder": 3}
WEIGHTS = Settings(levels=("files", "weights"))
NATIVE = Settings(levels=("native",), batch=2, length=8)
EXACT = replace(NATIVE, x64=True)


def own_depths(of_stack):
    return {f"{name}_layers": n for name, n in of_stack.items()}


def stack(path, out, how="stack", layers=None, of_stack=None, **options):
    plan, sources = plan_stack(str(path), Options(**options), how=how, layers=layers, **own_depths(of_stack or {}))
    carry_out(plan, sources, Path(out), sync=False)
    return plan


def values(path):
    opened = open_checkpoint(str(path))
    return {name: opened.read(name) for name in opened.leaves}


def proved(path, settings=WEIGHTS):
    report = verify(str(path), settings=settings)
    assert report.passed is not False, report.failures()
    return report


# --- what should be there, from names and shapes alone


NUMBERED = re.compile(r"((?:.*/)?layers?_)(\d+)(/.*)")
STACKED = re.compile(r".*(encoder/encoder|decoder/decoder|decoder/layers)/.*")
# What writes the residual stream; where norms stand behind the blocks it is they.
KERNELS = re.compile(r".*(/out/kernel|/wo/kernel|/attn_vec_einsum/w|/mlp/linear(/w)?)")
BEHIND = re.compile(r".*/(post_self_attention_norm|post_attention_norm|post_ffw_norm)(_local|_global)?/scale")


def order(how, now, then, turn=1):
    """The layer that each layer is made from, and the ones that add nothing."""
    old, new = now // turn, then // turn
    turns = np.arange(new) % old if how == "stack" else np.floor(np.arange(new) * (old / new) + 1e-9).astype(int)
    idle = np.concatenate([[False], np.diff(turns) == 0]) & (how == "identity")
    layers = (turns[:, None] * turn + np.arange(turn)).reshape(-1)
    rest = np.arange(old * turn, now)
    return [*layers, *rest], [*np.repeat(idle, turn), *[False] * len(rest)]


def deeper(found, how, depths, *, writes=KERNELS, nothing=0.0, turn=1):
    """The tensors of the deeper model. `depths` are (now, then) of each stack, in places of a tensor or in numbers."""
    expected = {}
    for name, value in found.items():
        of_slot = name.startswith(("state/", "opt_state/"))
        first = "/mu/" in name or (of_slot and name.endswith("/m"))
        layers, idle = order(how, *depths["encoder" if "encoder/" in name else "decoder"], turn)
        numbered = NUMBERED.fullmatch(name)
        empty = first or (not of_slot and writes.fullmatch(name))
        fill = 0.0 if of_slot else nothing
        if STACKED.fullmatch(name):
            now = max(layers) + 1
            if value.shape == (1,) and of_slot:
                expected[name] = value
                continue
            axis = value.shape.index(now)
            grown = value.take(layers, axis)
            if empty:
                np.moveaxis(grown, axis, 0)[np.flatnonzero(idle)] = fill
            expected[name] = grown
        elif numbered and "layers_remainder" not in name:
            for i, layer in enumerate(layers):
                if layer == int(numbered[2]):
                    its = np.full_like(value, fill) if idle[i] and empty else value
                    expected[f"{numbered[1]}{i}{numbered[3]}"] = its
        else:
            expected[name] = value
    return expected


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


# --- sources with optimizers


def momentum(found):
    """Adafactor's state with first moments."""
    rng = np.random.default_rng(1)
    own = dict(found)
    for name in found:
        if slot := re.fullmatch(r"state/param_states/(.*)/m", name):
            own[name] = rng.normal(size=found[f"target/{slot[1]}"].shape).astype(np.float32)
    return own


def unfactored(found):
    """Adafactor's state without factors: second moments of the parameters' shapes."""
    rng = np.random.default_rng(2)
    own = dict(found)
    for name in found:
        slot = re.fullmatch(r"state/param_states/(.*)/(v|v_row|v_col)", name)
        if slot is not None:
            shape = found[f"target/{slot[1]}"].shape if slot[2] == "v" else (1,)
            own[name] = (rng.uniform(1e-6, 1e-4, shape) if slot[2] == "v" else np.zeros(1)).astype(np.float32)
    return own


def adam(found):
    """T5X's tree of Adam, or that in a training state of Flax's."""
    rng = np.random.default_rng(3)
    t5x = any(name.startswith("target/") for name in found)
    prefix = "target/" if t5x else "params/params/"
    root, inside = ("state/param_states/0", "") if t5x else ("opt_state/0", "params/")
    own = {name: value for name, value in found.items() if not name.startswith("state/param_states/")}
    for name in [name for name in own if name.startswith(prefix)]:
        for moment in ("mu", "nu"):
            slot = f"{root}/{moment}/{inside}{name.removeprefix(prefix)}"
            own[slot] = rng.uniform(1e-6, 1e-4, own[name].shape).astype(np.float32)
    own[f"{root}/count"] = np.array(7, np.int32)
    return {**own, "state/step" if t5x else "step": np.array(7, np.int32)}


def t5(family, sizes=None, seed=0):
    return state(family, seed, sizes, T5_LAYERS)


def decoder(family, depth, seed=0):
    return state(family, seed, layers={"decoder": depth})


# Name: format, tensors, what plan_stack is told, and what `deeper` has to know.
T5_DEPTHS = {each: (T5_LAYERS[each], T5_DEEPER[each]) for each in T5_LAYERS}
CASES = {
    "t5-1.1": ("t5x", lambda: t5("t5-1.1"), T5_DEEPER, {"depths": T5_DEPTHS}),
    "t5-1.1, factored": ("t5x", lambda: t5("t5-1.1", FACTORED), T5_DEEPER, {"depths": T5_DEPTHS}),
    "scalable-t5-1.0, momentum": (
        "orbax",
        lambda: momentum(t5("scalable-t5-1.0", FACTORED)),
        T5_DEEPER,
        {"depths": T5_DEPTHS},
    ),
    "t5-1.0, unfactored": ("t5x", lambda: unfactored(t5("t5-1.0", FACTORED)), T5_DEEPER, {"depths": T5_DEPTHS}),
    "t5-1.0, adam": ("orbax-zarr2", lambda: adam(t5("t5-1.0")), T5_DEEPER, {"depths": T5_DEPTHS}),
    "scanned": ("t5x", lambda: t5("scalable-t5-1.1-scanned"), T5_DEEPER, {"depths": T5_DEPTHS}),
    "scanned, momentum": (
        "orbax",
        lambda: momentum(t5("scalable-t5-1.0-scanned", FACTORED)),
        T5_DEEPER,
        {"depths": T5_DEPTHS},
    ),
    "scanned, adam": ("t5x", lambda: adam(t5("scalable-t5-1.1-scanned")), T5_DEEPER, {"depths": T5_DEPTHS}),
    "llama": ("orbax", lambda: adam(decoder("maxtext-llama", 3)), 8, {"depths": {"decoder": (3, 8)}}),
    "llama, scanned": (
        "orbax",
        lambda: adam(decoder("maxtext-llama-scanned", 5)),
        12,
        {"depths": {"decoder": (5, 12)}},
    ),
    "qwen2, scanned along 0": (
        "orbax-zarr3",
        lambda: adam(decoder("maxtext-qwen2-scanned-0", 5)),
        7,
        {"depths": {"decoder": (5, 7)}},
    ),
    "gemma2 of maxtext": (
        "orbax",
        lambda: adam(decoder("maxtext-gemma2-tied", 6)),
        14,
        {"depths": {"decoder": (3, 7)}, "writes": BEHIND},
    ),
    "gemma2 of maxtext, scanned": (
        "orbax",
        lambda: adam(decoder("maxtext-gemma2-tied-scanned", 10)),
        16,
        {"depths": {"decoder": (5, 8)}, "writes": BEHIND},
    ),
    "gemma3 of maxtext": (
        "orbax",
        lambda: adam(decoder("maxtext-gemma3-tied", 7)),
        19,
        {"depths": {"decoder": (7, 19)}, "writes": BEHIND, "turn": 6},
    ),
    # Two sixes, and one layer behind them.
    "gemma3 of maxtext, scanned": (
        "orbax",
        lambda: adam(decoder("maxtext-gemma3-tied-scanned", 7)),
        19,
        {"depths": {"decoder": (1, 3)}, "writes": BEHIND},
    ),
    "gemma": ("orbax", lambda: decoder("gemma", 3), 5, {"depths": {"decoder": (3, 5)}}),
    "gemma2, flat": (
        "orbax",
        lambda: decoder("gemma2-transposed-flat", 4),
        10,
        {"depths": {"decoder": (4, 10)}, "writes": BEHIND, "nothing": -1.0, "turn": 2},
    ),
    "gemma3": (
        "orbax",
        lambda: decoder("gemma3", 8),
        14,
        {"depths": {"decoder": (8, 14)}, "writes": BEHIND, "nothing": -1.0, "turn": 6},
    ),
}


def written(at, case):
    """The source of a case; what plan_stack is told, and what `deeper` is."""
    format, make, then, told = CASES[case]
    save(at, make(), format)
    layers, of_stack = (then, {}) if isinstance(then, int) else (None, then)
    return at, {"layers": layers, "of_stack": of_stack}, told


# Each way of numbering or stacking layers, the optimizers in turn.
SOON = {
    "t5-1.1, factored",
    "scanned, momentum",
    "qwen2, scanned along 0",
    "gemma2 of maxtext",
    "gemma3 of maxtext",
    "gemma3 of maxtext, scanned",
    "gemma2, flat",
}


@pytest.mark.parametrize("case", some_soon(CASES, SOON.__contains__))
def test_every_tensor_is_made_of_the_right_layers(tmp_path, case):
    source, then, told = written(tmp_path / "a", case)
    found = values(source)

    for how in HOWS:
        plan, sources = plan_stack(
            str(source), Options(), how=how, layers=then["layers"], **own_depths(then["of_stack"])
        )
        same(evaluate_plan(plan, sources), deeper(found, how, **told))


# One of each kind of tree, and of each --how.
WRITTEN = [
    ("scalable-t5-1.0, momentum", "identity"),
    ("t5-1.0, adam", "interleave"),
    ("gemma3 of maxtext, scanned", "identity"),
    ("gemma2, flat", "stack"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "how"), first_soon(WRITTEN, 2))
def test_what_is_planned_is_written_and_proved(tmp_path, case, how):
    source, then, told = written(tmp_path / "a", case)

    stack(source, tmp_path / "b", how, **then)

    same(values(tmp_path / "b"), deeper(values(source), how, **told))
    proved(tmp_path / "b")


def test_the_expectation_by_hand():
    """The control of `order`, which the tests above go by."""
    assert order("stack", 3, 7) == ([0, 1, 2, 0, 1, 2, 0], [False] * 7)
    assert order("interleave", 3, 6)[0] == [0, 0, 1, 1, 2, 2]
    assert order("identity", 2, 5) == ([0, 0, 0, 1, 1], [False, True, True, False, True])
    assert order("stack", 7, 13, 6)[0] == [*range(6), *range(6), 6]


def turns(family):
    """After how many layers another one is like the first."""
    return 6 if "gemma3" in family else 2 if "gemma2" in family else 1


def small(family):
    """The depths of a model of a family, of a whole turn at least, and of one that is two turns deeper."""
    now = {"encoder": 3, "decoder": 2} if "t5" in family else {"decoder": 7 if "gemma3" in family else 4}
    return now, {each: n + 2 * turns(family) for each, n in now.items()}


def of_all_kinds():
    """Families in which any two choices of their trainers' meet, and how they are stacked: in turn, but for identity,
    of which the function is proved.
    """
    for i, family in enumerate([*FAMILY_NAMES, *covering(DECODER_NAMES)]):
        yield family, "identity" if i % 2 else HOWS[i // 2 % len(HOWS)]


def kinds_of(case):
    """The choices that a family is one of, and its block with how it is stacked."""
    family, how = case
    parts = {("t5", family)} if family in FAMILY_NAMES else parts_of(family)
    return {*parts, ("how", how), *((part, how) for part in parts if part[0] in {"block", "model", "t5"})}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "how"), covered(of_all_kinds(), kinds_of))
def test_a_family_of_every_kind_is_stacked_and_proved(tmp_path, family, how):
    now, then = small(family)
    source = checkpoint(tmp_path / "a", family, layers=now, format="orbax")

    stack(source, tmp_path / "b", how, of_stack=then, arch=family)

    report = proved(tmp_path / "b", replace(EXACT, levels=("files", "weights", "native")))
    assert (report.native.max_abs < 1e-12 * max(1, report.native.reference_max_abs)) == (how == "identity")


# --- Orbax's trees


def nested(found):
    """A training state as MaxText has it: its optimizer's states in a list, one of them None."""
    whole = unflatten_dict({tuple(name.split("/")): value for name, value in found.items()})
    first = whole["opt_state"]["0"]
    count = {"count": np.array(7, np.int32)}
    return {**whole, "opt_state": [first, None, count]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "how"),
    [
        ("llama", "identity"),
        ("gemma2 of maxtext, scanned", "stack"),
        slow("llama", "interleave"),
        slow("llama", "stack"),
    ],
)
def test_unmodified_orbax_restores_the_tree_of_a_deeper_model(tmp_path, case, how):
    """As if a trainer had written it: the same structure, lists and None among it, and the same values."""
    import jax

    _, make, layers, told = CASES[case]
    source = written_by_orbax(tmp_path / "source/20", nested(make()), "orbax")
    wanted = written_by_orbax(tmp_path / "wanted/20", nested(deeper(make(), how, **told)), "orbax")

    stack(source, tmp_path / "out", how, layers)

    one, two = restored(wanted / "items"), restored(tmp_path / "out/items")
    assert jax.tree.structure(one) == jax.tree.structure(two)
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(two)))
    assert tree(tmp_path / "out") == tree(wanted)


def test_flat_keys_keep_their_slashes(tmp_path):
    source, then, told = decoder("gemma2-flat", 4), 8, CASES["gemma2, flat"][3]

    def flat(found):
        whole = {}
        for name, value in found.items():
            module, leaf = name.rsplit("/", 1)
            whole.setdefault(module, {})[leaf] = value
        return whole

    told = {**told, "depths": {"decoder": (4, 8)}}
    path = written_by_orbax(tmp_path / "source/20", flat(source), "orbax")
    wanted = written_by_orbax(tmp_path / "wanted/20", flat(deeper(source, "identity", **told)), "orbax")

    stack(path, tmp_path / "out", "identity", then)

    assert tree(tmp_path / "out") == tree(wanted)
    found, expected = restored(tmp_path / "out/items"), restored(wanted / "items")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key][leaf], v) for key, inside in expected.items() for leaf, v in inside.items())


@pytest.mark.slow
def test_lists_come_back_from_t5xs_format(tmp_path):
    """What its index cannot tell of the layers that are new is in the record, too."""
    _, make, layers, told = CASES["llama"]
    source = written_by_orbax(tmp_path / "source/20", nested(make()), "orbax")
    wanted = written_by_orbax(tmp_path / "wanted/20", nested(deeper(make(), "stack", **told)), "orbax")
    carry_out(*plan_conversion(str(source), Options(format="t5x")), tmp_path / "there")

    stack(tmp_path / "there", tmp_path / "deep", layers=layers)
    carry_out(*plan_conversion(str(tmp_path / "deep"), Options(format="orbax")), tmp_path / "back")

    assert tree(tmp_path / "back") == tree(wanted)
    for each in ("deep", "back"):
        proved(tmp_path / each)
    stack(tmp_path / "there", tmp_path / "without", layers=layers, optimizer="drop", step=3)
    carry_out(*plan_conversion(str(tmp_path / "without"), Options(format="orbax")), tmp_path / "bare")
    opened = open_checkpoint(str(tmp_path / "bare"))
    assert {name.split("/")[0] for name in opened.leaves} == {"params", "step"}
    assert (opened.nodes, opened.step) == ((), 3)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama2_unscan", "gemma2_scan"])
def test_streams_of_random_numbers_go_along_with_their_layers(tmp_path, logits, case):
    """Else the trainer's tree of a deeper model would not be that of the checkpoint."""
    source = logits / f"maxtext-trained/{case}/checkpoints/2"
    stack(source, tmp_path / "out", layers=8)
    one, two = values(source), values(tmp_path / "out")
    root = "nnx_aux/model/decoder/layers"
    keys = {name for name in two if name.startswith(root)}
    if case == "gemma2_scan":
        name = f"{root}/mlp_local/dropout/rngs/params/key"
        assert keys == {name for name in one if name.startswith(root)}
        np.testing.assert_array_equal(two[name], one[name][[0, 1, 0, 1]])
    else:
        tail = "mlp/dropout/rngs/dropout/key"
        np.testing.assert_array_equal(two[f"{root}_7/{tail}"], one[f"{root}_1/{tail}"])
        # What all layers share stands in the first one.
        shared = {name for name in keys if "attention_op" in name}
        assert shared == {name for name in one if "attention_op" in name}
        assert len(keys - shared) == 8 * 12
    proved(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["identity", slow("stack"), slow("interleave")])
@pytest.mark.parametrize("name", ["llama2_unscan_fusedqkv", "llama2_scan_fused_3layers"])
def test_packed_queries_keys_and_values_stay_packed(tmp_path, logits, name, how):
    source = trained(tmp_path / "a", logits / "maxtext" / name, 1, biases=True)
    now = 3 if "3layers" in name else 2

    stack(source, tmp_path / "b", how, 2 * now + 1)

    found, depths = values(source), {"decoder": (now, 2 * now + 1)}
    if "3layers" in name:
        # No other axis is as long.
        assert all(v.shape.count(3) == 1 for n, v in found.items() if "/layers/" in n)
    expected = deeper(found, how, depths)
    assert any("qkv_proj/bias" in each for each in expected)
    same(values(tmp_path / "b"), expected)
    proved(tmp_path / "b")
    if how == "identity" and now == 3:
        proved(tmp_path / "b", EXACT)


# --- the function


IDENTITY = [
    "scalable-t5-1.1-scanned",
    *map(slow, ["maxtext-gemma2-tied", "t5-1.0", "maxtext-llama-scanned", "gemma2-transposed-flat"]),
    *map(slow, ["t5-1.1", "scalable-t5-1.1", "maxtext-gemma3-tied-scanned", "maxtext-qwen3", "gemma", "gemma3"]),
]


def grown(tmp_path, family, how="identity", dtype=np.float64):
    """A model in this dtype, and one that is deeper."""
    now, then = small(family)
    found = state(family, 1, layers=now)
    save(tmp_path / "a", {n: v.astype(dtype) if v.dtype == np.float32 else v for n, v in found.items()}, "orbax")
    out = tmp_path / f"{how}-{np.dtype(dtype)}"
    stack(tmp_path / "a", out, how, of_stack=then)
    return out


@pytest.mark.parametrize("family", IDENTITY)
def test_identity_keeps_the_function(tmp_path, family):
    report = proved(grown(tmp_path, family), EXACT)

    assert report.native.passed
    assert report.native.max_abs <= 1e-12 * max(1.0, report.native.reference_max_abs)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5-1.0", slow("gemma3")])
def test_identity_keeps_the_function_in_float32_and_the_others_do_not(tmp_path, family):
    report = proved(grown(tmp_path, family, dtype=np.float32), NATIVE)
    assert report.native.passed
    assert report.native.max_abs <= 5e-6 * report.native.reference_max_abs
    shutil.rmtree(tmp_path / "a")
    other = proved(grown(tmp_path, family, "stack", np.float32), NATIVE)
    # No claim: a distance.
    assert other.native.passed is None
    assert other.native.max_abs > 1e-2
    far = verify(other.path, settings=replace(NATIVE, max_native_rms=1e-6))
    assert not far.passed


def idle_writer(found, record):
    """The kernel of a layer that adds nothing."""
    layer = record["made"]["idle"]["decoder"][0]
    return next(name for name in found if name.endswith(f"decoder/layers_{layer}/mlp/wo/kernel"))


def changed(at, change, found=None):
    """The grown checkpoint with other values, and checksums that fit: only the source tells."""
    opened = open_checkpoint(str(at))
    record = json.loads((at / FILE_NAME).read_bytes())
    found = values(at) if found is None else dict(found)
    change(found, record)
    other = at.with_name("changed")
    save(other, found, opened.format, force=True)
    own = json.loads((other / FILE_NAME).read_bytes()) if (other / FILE_NAME).exists() else {}
    record["tensors"], record["files"] = own.get("tensors", {}), own.get("files", {})
    write_record(other, record)
    return str(other)


@pytest.mark.slow
def test_what_is_not_idle_is_noticed_by_the_forward_pass(tmp_path):
    out = grown(tmp_path, "t5-1.0")

    def wakes(found, record):
        name = idle_writer(found, record)
        found[name] = found[name] + 1.0

    other = verify(changed(out, wakes), settings=EXACT)
    assert other.native.passed is False


@pytest.mark.slow
def test_layer_by_layer_it_is_the_same(tmp_path):
    out = grown(tmp_path, "t5-1.0")
    report = proved(out, replace(EXACT, layered=True))
    assert report.passes.startswith("layer by layer")
    assert report.native.max_abs <= 1e-12 * max(1.0, report.native.reference_max_abs)


@pytest.mark.slow
def test_what_was_rounded_is_approximate(tmp_path):
    source = checkpoint(tmp_path / "a", "t5-1.0", layers=TINY)
    plan = stack(source, tmp_path / "b", "identity", 4, dtype="bfloat16")
    assert (plan.exactness.kind, "rounded to bfloat16" in str(plan.exactness.because)) == ("approximate", True)
    report = proved(tmp_path / "b", NATIVE)
    assert report.native.passed is None
    assert plan_stack(source, Options(), how="identity", layers=4)[0].exactness.kind == "exact"
    assert plan_stack(source, Options(), how="stack", layers=4)[0].exactness.kind == "approximate"


@pytest.mark.slow
def test_the_layers_that_were_there_learn_as_they_did(tmp_path):
    """Their gradients are those of the source; in a layer that adds nothing only what wakes it has any."""
    import jax
    import jax.numpy as jnp

    from fusectl.families.recognition import recognize
    from fusectl.networks.stages import Step
    from fusectl.networks.t5_stages import config_of, whole

    out = grown(tmp_path, "t5-1.0")
    tokens = random_tokens(41, 2, 8, 0)

    def gradients(path):
        opened = open_checkpoint(str(path))
        own = recognize(opened.shapes, "")
        config = config_of(own, (own.sizes["embed"],), "float64", accumulate="float64")
        (stage,) = whole(own)

        def loss(parameters):
            found = stage.run(Step(config, parameters, tokens, {}))[0]["logits"]
            picked = jnp.take_along_axis(jax.nn.log_softmax(found), tokens.targets[..., None], -1)[..., 0]
            return -(picked * tokens.compared).sum()

        with jax.enable_x64(True):
            parameters = {name: jnp.asarray(opened.read(own.full(name))) for name in own.shapes}
            return {name: np.asarray(value) for name, value in jax.grad(loss)(parameters).items()}

    one, two = gradients(tmp_path / "a"), gradients(out)
    made = open_checkpoint(str(out)).record.made
    for name, value in two.items():
        numbered = NUMBERED.fullmatch(name)
        if numbered is None:
            np.testing.assert_allclose(
                value, one[name], rtol=0, atol=1e-12 * max(1, abs(one[name]).max()), err_msg=name
            )
            continue
        part, layer = name.split("/")[0], int(numbered[2])
        if layer not in made.idle[part]:
            was = one[f"{numbered[1]}{made.layers[part][layer]}{numbered[3]}"]
            np.testing.assert_allclose(value, was, rtol=0, atol=1e-12 * max(1, abs(was).max()), err_msg=name)
        else:
            assert value.any() == bool(KERNELS.fullmatch(name)), name


# --- the optimizer's state


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["reset", "drop"])
@pytest.mark.parametrize("case", ["t5-1.1, factored", "scanned, adam", "llama"])
def test_the_state_is_reset_or_dropped(tmp_path, case, optimizer):
    source, then, told = written(tmp_path / "a", case)

    stack(source, tmp_path / "b", "identity", **then, optimizer=optimizer)

    expected = deeper(values(source), "identity", **told)
    slots = {name for name in expected if name.startswith(("state/param_states/", "opt_state/"))}
    if optimizer == "drop":
        expected = {name: value for name, value in expected.items() if name not in slots}
    else:
        expected |= {name: np.zeros_like(expected[name]) for name in slots}
    same(values(tmp_path / "b"), expected)
    proved(tmp_path / "b")
    assert open_checkpoint(str(tmp_path / "b")).record.optimizer == optimizer


def test_a_model_without_a_state_has_none(tmp_path):
    save(tmp_path / "a", decoder("maxtext-llama", 2), "orbax")
    stack(tmp_path / "a", tmp_path / "b", layers=3)
    assert open_checkpoint(str(tmp_path / "b")).record.optimizer == "none"
    # And in T5X's format, which must have a step.
    stack(tmp_path / "a", tmp_path / "c", layers=3, format="t5x")
    for each in "bc":
        proved(tmp_path / each)


# --- one stack and not the other, and what cannot be


@pytest.mark.slow
@pytest.mark.parametrize(("part", "other"), [("encoder", "decoder"), slow("decoder", "encoder")])
def test_one_stack_grows_and_the_other_stays(tmp_path, fusectl, part, other):
    source = checkpoint(tmp_path / "a", layers=T5_LAYERS)
    depths = {part: (T5_LAYERS[part], 6), other: (T5_LAYERS[other],) * 2}

    done = fusectl("stack", source, f"--{part}-layers", 6, "--how", "identity", "-o", tmp_path / "b", "--verify")

    assert done.code == 0, done.err
    assert f"note: {part}: {T5_LAYERS[part]} layers become 6" in done.err
    assert f"note: {other}:" not in done.err
    same(values(tmp_path / "b"), deeper(values(source), "identity", depths))
    report = json.loads((tmp_path / "b/fusectl-verify.json").read_bytes())
    assert report["passed"]
    assert [each["path"] for each in report["sources"]] == [source]
    assert source in (tmp_path / "b/fusectl-verify.md").read_text()


def test_layers_is_for_both_and_the_others_come_first(tmp_path):
    source = checkpoint(tmp_path / "a", layers=T5_LAYERS)
    plan, _ = plan_stack(source, Options(), how="stack", layers=4, decoder_layers=7)
    assert {each: len(found) for each, found in plan.record.made.layers.items()} == {"encoder": 4, "decoder": 7}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    at = tmp_path_factory.mktemp("bad")
    checkpoint(at / "t5", layers=T5_LAYERS)
    checkpoint(at / "llama", "maxtext-llama", format="orbax")
    checkpoint(at / "gemma2", "gemma2", layers={"decoder": 3}, format="orbax")
    checkpoint(at / "gemma3", "maxtext-gemma3-tied-scanned", format="orbax")
    checkpoint(at / "corrupt", layers=T5_LAYERS)
    (at / "there").mkdir()
    (at / "there/x").write_text("x")
    chunk = next((at / "corrupt").glob("target.encoder.layers_1.mlp.wo.kernel/*"))
    chunk.write_bytes(chunk.read_bytes()[:10])
    return at


@pytest.mark.parametrize(
    ("source", "words", "code", "says"),
    [
        ("t5", ["--layers", "3"], 6, "encoder: 3 layers are fewer than its 4"),
        ("t5", ["--encoder-layers", "1", "--decoder-layers", "9"], 6, "never taken away"),
        ("t5", ["--encoder-layers", "4"], 2, "it has that many layers already (4 in the encoder, 2 in the decoder)"),
        ("t5", [], 2, "--layers N"),
        ("t5", ["--layers", "0"], 2, "--layers"),
        ("t5", ["--layers", "8", "--how", "zeros"], 2, "--how"),
        ("t5", ["--layers", "8", "--optimizer", "asymmetric"], 2, "asymmetric"),
        ("t5", ["--layers", "8", "--step", "-1"], 2, "a training step"),
        ("t5", ["--layers", "8", "--mesh", "model=7"], 6, "unequal shares"),
        ("t5", ["--layers", "8", "-o", "{there}"], 7, "exists"),
        ("t5", ["--layers", "8", "-o", "{t5}/b"], 7, "lies inside"),
        ("llama", ["--encoder-layers", "8"], 6, "maxtext-llama has no encoder"),
        ("gemma2", ["--layers", "6"], 6, "attend in turns of 2: by whole turns only"),
        ("gemma3", ["--layers", "12"], 6, "attend in turns of 6: by whole turns only"),
        ("nowhere", ["--layers", "8"], 4, "no such"),
        ("corrupt", ["--layers", "8"], 5, "target/encoder/layers_1/mlp/wo/kernel"),
    ],
)
def test_what_cannot_be_is_refused(bad, tmp_path, fusectl, source, words, code, says):
    words = [word.format(there=bad / "there", t5=bad / "t5") for word in words]
    out = [] if "-o" in words else ["-o", tmp_path / "out"]

    done = fusectl("stack", bad / source, *words, *out)

    assert done.code == code, done.err
    # The parser breaks its lines.
    assert says in re.sub(r"\s*│\s*│?\s*", " ", done.err), done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_tensors_that_only_some_layers_have_are_refused(tmp_path):
    """A table may say that a tensor is optional: nobody knows which of the new layers is to have it."""
    table = (Path(__file__).parents[2] / "README.md").read_text().split("```toml")[1].split("```")[0]
    extra = '\n[[row]]\npath = "blocks_#/bias"\naxes = "-> embed"\nrole = "bias"\noptional = true\n'
    (tmp_path / "own.toml").write_text(table + extra)
    (tmp_path / "plain.toml").write_text(table)
    family = family_named(str(tmp_path / "plain.toml"))
    found = {f"params/{n}": v for n, v in _random(family).items()}
    save(tmp_path / "a", found, "orbax")
    save(tmp_path / "b", {**found, "params/blocks_0/bias": np.ones(12, np.float32)}, "orbax")

    stack(tmp_path / "a", tmp_path / "deep", "identity", 6, arch=str(tmp_path / "plain.toml"))
    (tmp_path / "plain.toml").unlink()
    proved(tmp_path / "deep", EXACT)
    same(
        values(tmp_path / "deep"),
        {n.replace("layer_", "blocks_"): v for n, v in _by_blocks(found, "identity", 2, 6).items()},
    )
    with pytest.raises(Incompatible, match="do not have the same tensors") as caught:
        plan_stack(str(tmp_path / "b"), Options(arch=str(tmp_path / "own.toml")), how="stack", layers=6)
    assert "blocks_3/bias: none in layer 1" in str(caught.value.details)


def _random(family):
    from models import DECODER_SIZES

    from fusectl.demo import random_parameters

    return random_parameters(family, DECODER_SIZES, {"decoder": 2}, 0)


def _by_blocks(found, how, now, then):
    """Its layers attend in turns of two."""
    renamed = {name.replace("blocks_", "layer_"): value for name, value in found.items()}
    return deeper(renamed, how, {"decoder": (now, then)}, writes=re.compile(r".*(attn/o|mlp/down)/kernel"), turn=2)


@pytest.mark.slow
def test_an_encoder_alone_by_a_table_of_one_s_own(tmp_path):
    """BERT's, that is: no stack is called decoder."""
    (tmp_path / "bert.toml").write_text(
        'name = "bert"\n'
        '[[row]]\npath = "embedder/embedding"\naxes = "vocab -> embed"\nrole = "embedding"\n'
        '[[row]]\npath = "head/kernel"\naxes = "embed -> vocab"\nrole = "head"\n'
        '[[row]]\npath = "encoder/#/up/kernel"\naxes = "embed -> mlp"\n'
        '[[row]]\npath = "encoder/#/down/kernel"\naxes = "mlp -> embed"\n'
        '[[row]]\npath = "encoder/#/norm/scale"\naxes = "-> embed"\nwrites = true\n'
    )
    rng = np.random.default_rng(0)
    found = {"params/embedder/embedding": rng.normal(size=(41, 12)), "params/head/kernel": rng.normal(size=(12, 41))}
    for i in range(12):
        for name, shape in (("up/kernel", (12, 22)), ("down/kernel", (22, 12)), ("norm/scale", (12,))):
            found[f"params/encoder/{i}/{name}"] = rng.normal(size=shape)
    for name in [*found]:
        for moment in ("mu", "nu"):
            found[f"opt_state/0/{moment}/{name}"] = rng.uniform(size=found[name].shape)
    found |= {"opt_state/0/count": np.array(3, np.int32), "step": np.array(3, np.int32)}
    save(tmp_path / "a", found, "orbax")

    stack(tmp_path / "a", tmp_path / "b", "stack", 24, arch=str(tmp_path / "bert.toml"))

    deep = values(tmp_path / "b")
    for i in range(24):
        for name in ("params", "opt_state/0/mu/params", "opt_state/0/nu/params"):
            kernel = f"{name}/encoder/{{}}/down/kernel"
            np.testing.assert_array_equal(deep[kernel.format(i)], found[kernel.format(i % 12)])
    report = proved(tmp_path / "b", Settings())
    assert report.native is None
    assert any("no network of bert" in note for note in report.notes)


# --- passing through, resuming


@pytest.mark.slow
def test_chunks_are_taken_over_as_they_are(tmp_path, fusectl):
    source = checkpoint(tmp_path / "a", layers=TINY, format="orbax-zarr2")
    for how in ("stack", "interleave"):
        plan, _ = plan_stack(source, Options(), how=how, layers=4)
        assert plan.passed_bytes > 0.999 * plan.nonzero_bytes
    plan, _ = plan_stack(source, Options(), how="identity", layers=4)
    assert plan.passed_bytes > 0.99 * plan.nonzero_bytes

    assert fusectl("stack", source, "--layers", 4, "--link", "-o", tmp_path / "b").code == 0

    name = "target.encoder.layers_{}.mlp.wo.kernel/0.0"
    of_source, first, again = (
        next(Path(at).rglob(name.format(i))).stat().st_ino
        for at, i in ((source, 1), (tmp_path / "b", 1), (tmp_path / "b", 3))
    )
    assert of_source == first == again
    proved(tmp_path / "b")


@pytest.mark.slow
def test_the_plan_is_shown_and_nothing_is_written(tmp_path, fusectl):
    source = checkpoint(tmp_path / "a", layers=T5_LAYERS)
    words = ["stack", source, "--layers", "4", "--how", "identity"]

    shown = fusectl(*words, "--dry-run")
    told = fusectl(*words, "--dry-run", "--json").json["result"]["plan"]

    assert shown.code == 0
    for line in (
        f"writes       {tmp_path}/a.stacked",
        f"source 0     {source} (t5x, step 1000)",
        "encoder from 0 1 2 3",
        "decoder from 0 [0] 1 [1]",
        "widths       embed 12, joined_kv 15, mlp 22, heads 3\n",
        "function     exact",
    ):
        assert line in shown.out, shown.out
    assert told["growth"]["layers"] == {"encoder": [0, 1, 2, 3], "decoder": [0, 0, 1, 1]}
    assert told["growth"]["idle"] == {"encoder": [], "decoder": [1, 3]}
    assert [each["path"] for each in told["sources"]] == [source]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert fusectl(*words, "--json").json["result"]["path"] == f"{tmp_path}/a.stacked"
    seen = fusectl("inspect", tmp_path / "a.stacked", "--no-tree").out
    assert f"stack of 1: {source}" in seen
    assert "encoder 4, decoder 4" in seen


@pytest.mark.parametrize("format", ["t5x", slow("orbax")])
def test_an_interrupted_run_is_gone_on_with(tmp_path, fusectl, monkeypatch, format):
    source = checkpoint(tmp_path / "a", layers=T5_LAYERS)
    command = [
        "stack",
        source,
        "--layers",
        6,
        "--how",
        "identity",
        "--format",
        format,
        "--no-sync",
        "-o",
        tmp_path / "out",
    ]
    with monkeypatch.context() as patch:
        ends_at(40, KeyboardInterrupt(), patch)
        done = fusectl(*command)
    assert done.code == 130, done.err
    budget = re.search(r"--max-memory (\d+)", done.err)[1]

    other = fusectl(*command, "--how", "stack", "--resume", "--max-memory", budget)
    again = fusectl(*command, "--resume", "--max-memory", budget)

    assert (other.code, again.code) == (6, 0), other.err + again.err
    assert "note: going on with " in again.err
    assert fusectl(*command[:-1], tmp_path / "whole").code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    done = fusectl(*command, "--resume", "--max-memory", budget)
    assert (done.code, "complete already" in done.err) == (0, True)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [slow(None), "data=2,model=2"])
def test_scanned_layers_are_the_same_in_any_budget_and_on_any_mesh(tmp_path, fusectl, mesh):
    sizes = {**FACTORED, "heads": 8, "vocab": 64}
    source = checkpoint(tmp_path / "a", "scalable-t5-1.1-scanned", sizes=sizes, layers=T5_LAYERS)
    more = ["--mesh", mesh] if mesh else ["--max-memory", "3MiB", "-j", "2"]

    for how in HOWS:
        done = fusectl("stack", source, "--layers", 7, "--how", how, *more, "--no-sync", "-o", tmp_path / how)
        assert done.code == 0, done.err
        proved(tmp_path / how)
        depths = {each: (n, 7) for each, n in T5_LAYERS.items()}
        same(values(tmp_path / how), deeper(values(source), how, depths))


# --- what verify notices


def flip(name):
    def change(found, record):
        found[name] = found[name].copy()
        found[name].reshape(-1).view(np.uint8)[0] ^= 1

    return change


def lose(name):
    return lambda found, record: found.pop(name)


def put(name, value):
    return lambda found, record: found.update({name: value})


def swap(a, b):
    def change(found, record):
        found[a], found[b] = found[b], found[a]

    return change


def tell(**fields):
    return lambda found, record: record.update(fields)


def tell_made(**fields):
    return lambda found, record: record["made"].update(fields)


KERNEL, SLOT = "target/encoder/layers_{}/mlp/wi_0/kernel", "state/param_states/encoder/layers_{}/mlp/wi_0/kernel/v"
# What is changed in a model of 2 + 1 layers that has 4 of each by identity, and what is said of it.
WRONG = {
    "a value of a copied layer": (flip(KERNEL.format(2)), f"{KERNEL.format(2)}: 1 values are not"),
    "a value of the embedding": (flip("target/token_embedder/embedding"), "1 values are not"),
    "a layer at the place of another": (swap(KERNEL.format(0), KERNEL.format(3)), KERNEL.format(3)),
    "an output that is not idle": (lambda f, r: flip(idle_writer(f, r))(f, r), "mlp/wo/kernel: 1 values"),
    "a slot of another layer": (swap(SLOT.format(0), SLOT.format(3)), SLOT.format(3)),
    "a slot of nothing": (put(SLOT.format(4), np.ones(1, np.float32)), f"{SLOT.format(4)}: no part of"),
    "a slot that is missing": (lose(SLOT.format(3)), f"{SLOT.format(3)}: missing"),
    "a slot of another shape": (put(SLOT.format(3), np.ones((3, 4), np.float32)), "shape [3, 4]"),
    "another step": (put("state/step", np.array(1001, np.int32)), "the step: 1001, expected 1000"),
    "no step": (lose("state/step"), "the step: None, expected 1000"),
    "a tensor of another dtype": (
        lambda f, r: f.update({KERNEL.format(2): f[KERNEL.format(2)].astype(np.float64)}),
        f"{KERNEL.format(2)}: float64, float32 in the source",
    ),
    "a tensor that is no part": (put("more/x", np.ones(3, np.float32)), "more/x: no part of"),
    "layers": (
        tell_made(layers={"encoder": [0, 1, 0, 1], "decoder": [0, 0, 0, 0]}),
        "the record's layers of the encoder",
    ),
    "idle ones": (tell_made(idle={"encoder": [], "decoder": []}), "the record's layers of the decoder"),
    "how": (tell_made(how="stack"), "not those of --how stack"),
    "an unknown how": (tell_made(how="other"), "which fusectl does not know"),
    "another optimizer": (tell(optimizer="drop"), "no part of"),
    "zeros for a state": (tell(optimizer="reset"), "values are not"),
    "a step that was set": (tell(step=5), "the step: 1000, expected 5"),
    "a norm of its own": (tell(norm="property"), "no record of a fusion"),
    "noise": (tell(fill={"kind": "gaussian", "noise_scale": 0.1, "seed": 0}), "no record of a fusion"),
}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """One that nothing is wrong with, and its tensors."""
    at = tmp_path_factory.mktemp("deep")
    checkpoint(at / "a", layers=TINY)
    stack(at / "a", at / "b", "identity", 4)
    found = values(at / "b")
    # The control: it is the change that is noticed, not that it was written anew.
    proved(changed(at / "b", lambda found, record: None, found), Settings(levels=("weights",)))
    return at / "b", found


@pytest.mark.parametrize("what", thinned(WRONG, mark=slow))
def test_what_is_wrong_is_noticed(deep, what):
    change, says = WRONG[what]
    at, found = deep

    # Of the algebra there is nothing to say here, but that the weights are not those.
    for levels in [("weights",)] if what != "how" else [("weights",), ("algebra",)]:
        report = verify(changed(at, change, found), settings=Settings(levels=levels))
        assert not report.passed
        assert any(says in line for line in report.failures()), report.failures()


def test_a_tensor_of_a_layer_that_is_missing_is_another_tree(deep):
    with pytest.raises(Incompatible, match="does not have the tree|matches no model family"):
        verify(changed(deep[0], lose(KERNEL.format(3)), deep[1]), settings=WEIGHTS)


@pytest.mark.slow
def test_what_goes_wrong_with_adam_and_the_streams_is_noticed(tmp_path, logits):
    stack(logits / "maxtext-trained/llama2_unscan/checkpoints/2", tmp_path / "b", layers=4)
    key = "nnx_aux/model/decoder/layers_3/mlp/dropout/rngs/dropout/key"
    settings = Settings(levels=("weights",))
    assert proved(changed(tmp_path / "b", lambda found, record: None), settings)
    for change, says in (
        (lose("opt_state/0/count"), "opt_state/0/count: missing"),
        (flip("opt_state/2/count"), "opt_state/2/count: 1 values"),
        (flip(key), f"{key}: 1 values"),
        (lose(key), f"{key}: missing"),
        (lose("step"), "the step: None"),
    ):
        report = verify(changed(tmp_path / "b", change), settings=settings)
        assert any(says in line for line in report.failures()), (says, report.failures())


@pytest.mark.slow
def test_the_source_that_has_changed_moved_or_is_another_one(tmp_path, fusectl):
    source = Path(checkpoint(tmp_path / "a"))
    out = tmp_path / "b"
    stack(source, out, layers=4)
    moved = source.rename(tmp_path / "moved")
    levels = ["--levels", "weights"]
    done = fusectl("verify", out)
    assert (done.code, "--sources NAME" in done.err) == (4, True)
    assert fusectl("verify", out, "--levels", "files").code == 0
    assert fusectl("verify", out, *levels, "--sources", moved).code == 0
    others = {
        "seed": state("t5-1.1", 5),
        "wider": state("t5-1.1", 0, {**FACTORED}),
        "deeper": state("t5-1.1", 0, layers={"encoder": 5, "decoder": 2}),
        "shallower": state("t5-1.1", 0, layers={"encoder": 2, "decoder": 2}),
        "adam": adam(state("t5-1.1", 0)),
        "stateless": {n: v for n, v in state("t5-1.1", 0).items() if not n.startswith("state/param")},
    }
    for name, found in others.items():
        save(tmp_path / name, found, "t5x")
        done = fusectl("verify", out, *levels, "--sources", tmp_path / name)
        assert (done.code, "has changed since it was grown" in done.err) == (3, True), (name, done.err)
    checkpoint(tmp_path / "other", "t5-1.0")
    assert fusectl("verify", out, *levels, "--sources", tmp_path / "other").code == 6
    done = fusectl("verify", out, "--sources", moved, "--trace")
    assert (done.code, "grown from a single one" in done.err) == (2, True)


# --- along with the other commands


@pytest.mark.slow
def test_through_pipes(tmp_path, fusectl, monkeypatch):
    at = fusectl("stack", checkpoint(tmp_path / "a", layers=TINY), "--layers", 3, "-q").out
    for words in (["self-fuse", "--copies", "2"], ["verify", "--levels", "files,weights"]):
        monkeypatch.setattr("sys.stdin", io.StringIO(at))
        done = fusectl(*words)
        assert done.code == 0, done.err
        at = done.out
    assert "passed: " in at


@pytest.fixture
def two(tmp_path):
    """Two models fused, each to be trained with a norm of its own."""
    sources = [checkpoint(tmp_path / f"{i}", seed=i, layers={"encoder": 1, "decoder": 1}) for i in range(2)]
    carry_out(*plan_fusion(sources, Options(norm="property")), tmp_path / "fused", sync=False)
    return sources, tmp_path / "fused"


@pytest.mark.slow
def test_a_fusion_is_stacked_and_keeps_its_function(tmp_path, two):
    plan = stack(two[1], tmp_path / "deep", "identity", 3)
    assert plan.record.norm_groups == (12, 12)
    report = proved(tmp_path / "deep", replace(EXACT, levels=("weights", "native")))
    assert report.native.max_abs <= 1e-12 * max(1.0, report.native.reference_max_abs)


@pytest.mark.slow
def test_a_fusion_is_stacked_and_filled(tmp_path, fusectl, two):
    sources, fused = two
    stack(fused, tmp_path / "deep", "identity", 3)
    names = [tmp_path / f"{i}-deep" for i in range(2)]
    for source, name in zip(sources, names):
        stack(source, name, "identity", 3)
    carry_out(*plan_fusion(list(map(str, names)), Options(norm="property")), tmp_path / "two", sync=False)
    # Growing in depth and in width commute.
    one, other = (
        {n: v for n, v in values(tmp_path / name).items() if n.startswith("target/")} for name in ("deep", "two")
    )
    same(one, other)

    filling = plan_noise_fill(str(tmp_path / "deep"), Options(fill=Fill("gaussian", 0.1, 3)))
    carry_out(*filling, tmp_path / "noisy", sync=False)

    record = open_checkpoint(str(tmp_path / "noisy")).record
    assert (record.made, record.fill.kind, record.norm_groups) == (Fused(), "gaussian", (12, 12))
    done = fusectl("verify", tmp_path / "noisy", "--levels", "weights")
    assert (done.code, "--sources" in done.err) == (2, True)
    done = fusectl("verify", tmp_path / "noisy", "--levels", "weights", "--sources", *names)
    assert done.code == 0, done.err
    # And a model that has noise already.
    stack(tmp_path / "noisy", tmp_path / "deeper", "interleave", 6)
    assert open_checkpoint(str(tmp_path / "deeper")).record.fill.seed is None
    proved(tmp_path / "deeper")
    assert "norm_groups = (12, 12)" in restart(str(tmp_path / "deeper")).text()


@pytest.mark.slow
@pytest.mark.parametrize("layers", [slow(None), "unscanned"])
def test_a_converted_one_is_proved_and_restarted(tmp_path, layers):
    source = checkpoint(tmp_path / "a", "scalable-t5-1.1-scanned", sizes=FACTORED, layers=TINY)
    stack(source, tmp_path / "deep", layers=3)
    stack(tmp_path / "deep", tmp_path / "deeper", "identity", 4)

    carry_out(*plan_conversion(str(tmp_path / "deeper"), Options(format="orbax"), layers), tmp_path / "other")

    for each in ("deep", "deeper", "other"):
        proved(tmp_path / each)
    text = restart(str(tmp_path / "other")).text()
    assert "num_encoder_layers = 4" in text
    assert "num_decoder_layers = 4" in text
    # One that was converted can be grown, too.
    stack(tmp_path / "other", tmp_path / "deepest", layers=5)
    proved(tmp_path / "deepest")


@pytest.mark.slow
def test_decoders_are_restarted_with_their_new_number_of_layers(tmp_path):
    for family, layers, says in (
        ("maxtext-llama", 8, "base_num_decoder_layers=8"),
        ("maxtext-gemma2-tied-scanned", 12, "base_num_decoder_layers=6"),
        ("gemma3", 14, "num_layers=14"),
    ):
        checkpoint(tmp_path / family, family, layers={"decoder": 8 if family == "gemma3" else 4}, format="orbax")
        stack(tmp_path / family, tmp_path / f"{family}-deep", layers=layers)
        assert says in restart(str(tmp_path / f"{family}-deep")).text()


@pytest.mark.slow
def test_what_the_public_models_have_by_their_depth_stays_as_it_was(tmp_path):
    """Gemma 3's windows go by its size; the deeper model is none of the public ones."""
    checkpoint(tmp_path / "a", "gemma3", layers={"decoder": 8}, format="orbax")
    stack(tmp_path / "a", tmp_path / "b", layers=32)
    assert open_checkpoint(str(tmp_path / "b")).record.network.attending[0].window == 512
    assert "sliding_window_size=512" in restart(str(tmp_path / "b")).text()
