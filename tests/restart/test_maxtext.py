"""MaxText's own trees: states of NNX from pre- and post-training, layers stacked by sixes, optimizers of optax's, and
what is refused, by name.
"""

import json
import shutil
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from cases import first_soon
from models import contents, state, write_record

from fusectl.errors import Incompatible
from fusectl.families.recognition import recognize
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.record import crc32_of
from fusectl.formats.registry import FORMATS
from fusectl.formats.sink import save
from fusectl.operations.convert import plan_conversion
from fusectl.operations.fuse import plan_fusion
from fusectl.operations.stack import plan_stack
from fusectl.planning.options import Options
from fusectl.verification import Settings, verify
from fusectl.writing.carrying_out import carry_out


WEIGHTS = Settings(levels=("files", "weights"))
KEY = "decoder/layers/self_attention/key/kernel"


def fuse(paths, output, **options):
    plan, opened = plan_fusion([str(path) for path in paths], Options(**options))
    carry_out(plan, opened, output)
    return plan


def convert(path, output, layers=None, **options):
    carry_out(*plan_conversion(str(path), Options(**options), layers), output)
    return output


def restored(item):
    with warnings.catch_warnings():
        # Of devices that are other ones now.
        warnings.filterwarnings("ignore", message="Sharding info not provided")
        return ocp.PyTreeCheckpointer().restore(item)


# --- post-training


POSTTRAINED = {
    "sft_unscanned": ("maxtext-llama", "orbax-ocdbt-zarr3", "", "decoder/layers_2/"),
    "rl_scanned": ("maxtext-llama-scanned", "orbax-ocdbt-zarr2", "base/", "decoder/layers/"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", POSTTRAINED)
def test_a_post_trained_model_is_read_fused_and_proved(posttrained, tmp_path, fusectl, name):
    family, layout, prefix, layer = POSTTRAINED[name]
    source = posttrained / name / "7"

    seen = fusectl("inspect", source, "--json").json["result"]

    assert (seen["family"], seen["format"], seen["item"], seen["step"]) == (family, layout, "model_params", 7)
    rows = {tensor["name"]: tensor["row"] for tensor in seen["tensors"]}
    assert rows[f"{prefix}{layer}mlp/wo/kernel/value"] is not None
    assert rows[f"{prefix}decoder/dropout/rngs/aqt/count/value"] is None
    done = fusectl("self-fuse", source, "-o", tmp_path / "8")
    assert done.code == 0, done.err
    assert verify(str(tmp_path / "8"), settings=WEIGHTS).passed
    left = "of the step's items only 'model_params' is read; a trainer begins anew what is in optimizer_state"
    assert (left in done.err) == (name == "rl_scanned")
    was, now = (restored(each / "model_params") for each in (source, tmp_path / "8"))
    assert jax.tree.structure(was) == jax.tree.structure(now)
    wide = restored(tmp_path / "8/model_params")
    table = (wide["base"] if prefix else wide)["token_embedder"]["embedding"]["value"]
    assert table.shape == (58, 24)
    streams = [each for each in contents(source) if "/rngs/" in each]
    assert len(streams) == {"sft_unscanned": 60, "rl_scanned": 30}[name]
    assert all(contents(tmp_path / "8")[each] == contents(source)[each] for each in streams)


@pytest.mark.slow
@pytest.mark.parametrize("name", POSTTRAINED)
@pytest.mark.parametrize("format", first_soon(["t5x", *(format for format in FORMATS if format != "t5x")]))
def test_a_post_trained_model_goes_to_every_format_and_back(posttrained, tmp_path, name, format):
    source = posttrained / name / "7"
    there = convert(source, tmp_path / "there/7", format=format)
    layers = "scanned" if name == "sft_unscanned" else "unscanned"
    other = convert(there, tmp_path / "other/7", layers)
    again = convert(other, tmp_path / "again/7", "unscanned" if layers == "scanned" else "scanned")
    back = convert(again, tmp_path / "back/7", format=open_checkpoint(str(source)).format)

    assert contents(back) == contents(source)
    assert {leaf.keys for leaf in open_checkpoint(str(back)).leaves.values()} == {
        leaf.keys for leaf in open_checkpoint(str(source)).leaves.values()
    }
    for path in (there, other, back):
        assert verify(str(path), settings=WEIGHTS).passed
    # Restacked on the way out of T5X's format, parameters keep what stands around their names.
    direct = convert(there, tmp_path / "direct/7", layers, format="orbax")
    assert (
        recognize(open_checkpoint(str(direct)).shapes, "").naming
        == recognize(open_checkpoint(str(source)).shapes, "").naming
    )


# Of the decoder's modules, and three of each of a layer's; unstacked, the first layer has attention's of all of them.
@pytest.mark.parametrize(
    ("name", "layers", "keys"),
    [("sft_unscanned", "scanned", 3 + 2 * 3 + 3), ("rl_scanned", "unscanned", 6 + 4 * 3 * 3)],
)
def test_the_streams_of_layers_go_along_and_their_keys_stay_keys(posttrained, tmp_path, name, layers, keys):
    found = open_checkpoint(str(convert(posttrained / name / "7", tmp_path / "7", layers))).leaves
    streams = {each: leaf for each, leaf in found.items() if each.endswith("/key/value")}
    assert {leaf.random_key for leaf in streams.values()} == {"unsafe_rbg"}
    assert len(streams) == keys
    left = [each for each in streams if ("/layers_" if layers == "scanned" else "/layers/") in each]
    assert all("layers_0/self_attention/attention_op" in each for each in left)


@pytest.mark.slow
def test_a_post_trained_model_becomes_deeper(posttrained, tmp_path):
    source = posttrained / "sft_unscanned/7"
    plan, opened = plan_stack(str(source), Options(), how="identity", layers=6)
    carry_out(plan, opened, tmp_path / "8")

    assert verify(str(tmp_path / "8"), settings=WEIGHTS).passed
    found = open_checkpoint(str(tmp_path / "8")).leaves
    assert "decoder/layers_5/mlp/dropout/rngs/params/key/value" in found
    assert found["decoder/layers_5/mlp/dropout/rngs/params/key/value"].random_key == "unsafe_rbg"


def test_post_training_is_told_where_the_parameters_are(posttrained, tmp_path, fusectl):
    assert fusectl("self-fuse", posttrained / "rl_scanned/7", "-o", tmp_path / "8").code == 0

    printed = fusectl("restart-config", tmp_path / "8").out.splitlines()

    assert f"load_parameters_path={tmp_path / '8/model_params'}" in printed
    assert "checkpoint_storage_use_zarr3=False" in printed
    assert any("post-training (train_sft, train_dpo, train_rl)" in line for line in printed)
    assert any("STEP/model_params" in line for line in printed)
    assert not any("here it finds none" in line for line in printed)


def test_a_table_of_ones_own_may_have_the_ends_of_names_in_its_patterns(posttrained, tmp_path):
    """As it had to before such trees were known."""
    source = open_checkpoint(str(posttrained / "sft_unscanned/7"))
    tree = recognize(source.shapes, "")
    rows = [
        f'[[row]]\npath = "{row.pattern}/value"\naxes = "{row.axes}"\nrole = "{row.role}"\n' for row in tree.family.rows
    ]
    (tmp_path / "mine.toml").write_text('name = "mine"\n' + "".join(rows))

    found = recognize(source.shapes, "", str(tmp_path / "mine.toml"))

    assert (found.family.name, found.naming.suffix) == ("mine", "")
    assert found.full("decoder/decoder_norm/scale/value") == "decoder/decoder_norm/scale/value"


# --- streams of random numbers


@pytest.fixture
def linen(logits, tmp_path):
    """A state of NNX, and the same as Linen has it: without nnx_aux."""
    nnx = logits / "maxtext-trained/llama2_unscan/checkpoints/2"
    return nnx, convert(nnx, tmp_path / "linen/2", drop=("nnx_aux*",))


@pytest.mark.slow
@pytest.mark.parametrize("first", ["nnx", "linen"])
def test_states_of_nnx_and_linen_are_fused_in_either_order(linen, tmp_path, first):
    nnx, without = linen
    pair = [nnx, without] if first == "nnx" else [without, nnx]

    plan = fuse(pair, tmp_path / "f")

    streams = {name: values for name, values in contents(nnx).items() if name.startswith("nnx_aux/")}
    assert streams.items() <= contents(tmp_path / "f").items()
    said = f"{nnx}: {len(streams)} tensors of random streams, which no source before it has"
    assert (said in plan.notes) == (first == "linen")
    keys = [leaf.random_key for leaf in open_checkpoint(str(tmp_path / "f")).leaves.values()]
    assert keys.count("unsafe_rbg") == len(streams) // 2
    assert verify(str(tmp_path / "f"), settings=WEIGHTS).passed


@pytest.mark.slow
@pytest.mark.parametrize("change", ["lost", "other"])
def test_a_stream_that_did_not_come_along_is_noticed(linen, tmp_path, change):
    """The control: by the record's checksums nothing is wrong."""
    fuse([linen[0]] * 2, tmp_path / "f")
    found = open_checkpoint(str(tmp_path / "f"))
    name = next(name for name in found.leaves if name.endswith("rngs/params/count"))
    tree = {each: found.read(each) for each in found.leaves if each != name or change == "other"}
    if change == "other":
        tree[name] = tree[name] + np.uint32(1)
    save(tmp_path / "g", tree, "orbax", item="items")
    record = json.loads((tmp_path / "f/fusectl.json").read_text())
    record |= {"tensors": {}, "files": {"items/_METADATA": crc32_of((tmp_path / "g/items/_METADATA").read_bytes())}}
    write_record(tmp_path / "g", record)

    problems = list(verify(str(tmp_path / "g"), settings=Settings(levels=("weights",))).failures())

    said = f"{name}: missing" if change == "lost" else f"{name}: not that of"
    assert any(said in problem for problem in problems), problems


# --- layers by sixes


def by_sixes(at, family):
    """A state of eight layers, six and two, with Adam's moments and streams of random numbers, as MaxText has it."""
    parameters = state(family, 3, layers={"decoder": 8})
    rng = np.random.default_rng(3)
    moments = {
        f"opt_state/0/{moment}/{name.removeprefix('params/')}": rng.uniform(0, 1, value.shape).astype(np.float32)
        for name, value in parameters.items()
        for moment in ("mu", "nu")
    }
    streams = {"nnx_aux/model/decoder/rngs/dropout/count": np.array(5, np.uint32)}
    for j in range(6):
        module = f"nnx_aux/model/decoder/layers/layers_{j}/dropout/rngs/dropout/"
        streams[f"{module}count"] = np.array([10 + j], np.uint32)
        streams[f"{module}key"] = rng.integers(0, 9, (1, 4)).astype(np.uint32)
    for i in range(2):
        module = f"nnx_aux/model/decoder/layers_remainder/layers_{i}/dropout/rngs/dropout/"
        streams[f"{module}count"] = np.array(16 + i, np.uint32)
        streams[f"{module}key"] = rng.integers(0, 9, 4).astype(np.uint32)
    # One that the first layer alone has.
    streams["nnx_aux/model/decoder/layers/layers_0/rngs/dropout/count"] = np.array([7], np.uint32)
    save(at, {**parameters, **moments, **streams, "step": np.array(3, np.int32)}, "orbax", item="items")
    return at


@pytest.mark.slow
@pytest.mark.parametrize("family", first_soon(["maxtext-gemma3-tied-scanned", "maxtext-gemma3-fused-mlp-scanned"]))
def test_gemma_3_is_unstacked_and_stacked_again(tmp_path, family):
    source = by_sixes(tmp_path / "source/2", family)

    apart = convert(source, tmp_path / "apart/2", "unscanned")
    back = convert(apart, tmp_path / "back/2", "scanned")

    assert contents(back) == contents(source)
    assert recognize(open_checkpoint(str(apart)).shapes, "").family.name == family.removesuffix("-scanned")
    assert recognize(open_checkpoint(str(apart)).shapes, "").depths == {"decoder": 8}
    for path in (apart, back):
        assert verify(str(path), settings=WEIGHTS).passed
    there, here = open_checkpoint(str(source)), open_checkpoint(str(apart))
    for root in ("params/params", "opt_state/0/mu/params", "opt_state/0/nu/params"):
        for layer in range(8):
            found = here.read(f"{root}/decoder/layers_{layer}/mlp/wo/kernel")
            if layer < 6:
                expected = there.read(f"{root}/decoder/layers/layers_{layer}/mlp/wo/kernel")[:, 0]
            else:
                expected = there.read(f"{root}/decoder/layers_remainder/layers_{layer - 6}/mlp/wo/kernel")
            np.testing.assert_array_equal(found, expected)
    counts = [int(here.read(f"nnx_aux/model/decoder/layers_{i}/dropout/rngs/dropout/count")) for i in range(8)]
    assert counts == list(range(10, 18))


def test_fewer_layers_than_are_stacked_at_once_are_not_stacked(tmp_path):
    save(tmp_path / "a", state("maxtext-gemma3", 1, layers={"decoder": 5}), "orbax", item=None)
    with pytest.raises(Incompatible, match="fewer than maxtext-gemma3-scanned stacks in turn"):
        plan_conversion(str(tmp_path / "a"), Options(), "scanned")


# --- optimizers


def with_slots(tree, *groups):
    """Slots of parameters: for each group the place of its state, the moments, and what the parameters' names hold."""
    rng = np.random.default_rng(5)
    bare = {name.removeprefix("params/params/"): value for name, value in tree.items()}
    return {
        f"opt_state/{place}/{moment}/{name}": rng.uniform(1, 2, value.shape).astype(np.float32)
        for place, moments, chosen in groups
        for moment in moments
        for name, value in bare.items()
        if chosen(name)
    }


def one(n, dtype=np.int32):
    return np.array(n, dtype)


# As MaxText's NNX saves them: maxtext/optimizers/optimizers.py.
OPTIMIZERS = {
    "muon": (
        lambda tree: with_slots(
            tree,
            ("inner_states/muon/inner_state/0", ("mu",), lambda name: "layers" in name and "norm" not in name),
            ("inner_states/adam/inner_state/0", ("mu", "nu"), lambda name: "layers" not in name or "norm" in name),
        ),
        {
            "inner_states/muon/inner_state/0/count": one(3),
            "inner_states/muon/inner_state/0/ns_coeffs": np.array([3.4, -4.8, 2.0], np.float32),
            "inner_states/muon/inner_state/3/count": one(3),
            "inner_states/adam/inner_state/0/count": one(3),
            "inner_states/adam/inner_state/2/count": one(3),
        },
    ),
    "sgd": (lambda _: {}, {"1/count": one(3)}),
    "skip": (
        lambda tree: with_slots(tree, ("inner_state/0", ("mu", "nu"), lambda _: True)),
        {
            "count": one(3),
            "losses": np.arange(8, dtype=np.float32),
            "grad_norms": np.arange(8, dtype=np.float32),
            "is_skipped": one(1, np.bool_),
            "inner_state/0/count": one(3),
            "inner_state/2/count": one(3),
        },
    ),
    "momentum": (
        lambda tree: with_slots(tree, ("0", ("trace",), lambda _: True)),
        {"1/count": one(3)},
    ),
    "adam of some": (
        lambda tree: with_slots(tree, ("inner_states/trainable/inner_state/0", ("mu", "nu"), lambda n: "mlp" in n)),
        {"inner_states/trainable/inner_state/0/count": one(3)},
    ),
}


@pytest.fixture
def trained(tmp_path):
    """A small model with the state of one of the optimizers, and what else is given."""

    def write(name, **more):
        tree = state("maxtext-llama-scanned", 1)
        slots, beside = OPTIMIZERS[name]
        own = slots(tree) | {f"opt_state/{place}": value for place, value in beside.items()}
        save(tmp_path / name, {**tree, **own, **more, "step": one(3)}, "orbax", item=None)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_is_reset_if_all_of_it_is_told_apart(trained, tmp_path, name):
    source = trained(name)
    fuse([source] * 2, tmp_path / "f", optimizer="reset")

    was, now = (open_checkpoint(str(path)) for path in (source, tmp_path / "f"))
    slots = [each for each in was.leaves if each.startswith("opt_state/")]
    assert {each for each in now.leaves if each.startswith("opt_state/")} == set(slots)
    for each in slots:
        parameter = each.split("/decoder/")[-1]
        wide = now.leaves.get(f"params/params/decoder/{parameter}")
        if each.endswith("ns_coeffs"):
            # A setting: of zeros the updates would be zero for good.
            np.testing.assert_array_equal(now.read(each), was.read(each))
        else:
            assert now.leaves[each].dtype == was.leaves[each].dtype
            assert not now.read(each).any()
        if wide is not None:
            assert now.leaves[each].shape == wide.shape != was.leaves[each].shape
    assert verify(str(tmp_path / "f"), settings=WEIGHTS).passed


@pytest.mark.parametrize("name", ["muon", "sgd", "momentum", "adam of some"])
def test_a_state_that_cannot_be_carried_says_that_it_can_be_reset(trained, name):
    with pytest.raises(Incompatible, match="of an optimizer that fusectl does not know") as error:
        plan_fusion([trained(name)] * 2, Options())
    assert error.value.hint.startswith("--optimizer reset makes zeros of its slots")


@pytest.mark.parametrize("name", ["muon", "sgd", "skip", "half"])
def test_a_state_of_stock_is_sound_and_half_of_adams_is_not(trained, tmp_path, fusectl, name):
    path = trained("skip" if name == "half" else name)
    if name == "half":
        opened = open_checkpoint(path)
        save(tmp_path / name, {n: opened.read(n) for n in opened.leaves if "/nu/" not in n}, "orbax", item=None)

    done = fusectl("inspect", tmp_path / name, "--fsck")

    lacks = "no slots nu, expected one" in done.out + done.err
    assert (done.code, lacks) == ((5, True) if name == "half" else (0, False)), done.err
    unknown = "the optimizer is none that fusectl knows" in done.out + done.err
    assert unknown == (name in {"muon", "sgd"})
    if name == "half":
        with pytest.raises(Incompatible, match="does not fit its parameters"):
            plan_fusion([str(tmp_path / name)] * 2, Options(optimizer="reset"))


def test_what_is_no_slot_is_named_and_not_made_zero(trained):
    """It could be a learning rate."""
    source = trained("muon", **{"opt_state/inner_states/muon/hyperparams/learning_rate": np.array(0.1, np.float32)})
    with pytest.raises(Incompatible) as error:
        plan_fusion([source] * 2, Options(optimizer="reset"))
    (said,) = error.value.details
    assert said.startswith("opt_state/inner_states/muon/hyperparams/learning_rate: no slot of a parameter, no count")
    assert error.value.hint.startswith("--optimizer drop leaves it out")


def test_a_wrapped_adam_is_carried_and_its_window_begins_anew(trained, tmp_path):
    source = trained("skip")
    plan = fuse([source] * 2, tmp_path / "f")

    was, now = (open_checkpoint(str(path)) for path in (source, tmp_path / "f"))
    mu = f"opt_state/inner_state/0/mu/{KEY}"
    assert now.leaves[mu].shape == now.leaves[f"params/params/{KEY}"].shape
    # Both blocks between the copies have what both on the diagonal have.
    np.testing.assert_array_equal(now.read(mu), np.tile(was.read(mu) / 2, (2, 1, 2, 1)))
    assert int(now.read("opt_state/inner_state/0/count")) == int(now.read("opt_state/inner_state/2/count")) == 3
    for name in ("count", "losses", "grad_norms", "is_skipped"):
        assert not now.read(f"opt_state/{name}").any(), name
    assert any("window of losses and norms" in note for note in plan.notes)
    assert verify(str(tmp_path / "f"), settings=WEIGHTS).passed


@pytest.mark.parametrize(
    ("name", "slot", "says"),
    [
        ("skip", "losses", "declared as reset, and not zero"),
        ("skip", "inner_state/2/count", "not what the sources' state makes"),
        ("muon", "inner_states/muon/inner_state/0/ns_coeffs", "not what the sources' state makes"),
        ("muon", "inner_states/muon/inner_state/3/count", "declared as reset, and not zero"),
    ],
)
def test_what_of_a_state_is_no_parameters_is_held_against_the_source(trained, tmp_path, name, slot, says):
    source = trained(name)
    fuse([source] * 2, tmp_path / "f", optimizer="reset" if name == "muon" else "carry")
    found = open_checkpoint(str(tmp_path / "f"))
    tree = {each: found.read(each) for each in found.leaves}
    tree[f"opt_state/{slot}"] = tree[f"opt_state/{slot}"] + tree[f"opt_state/{slot}"].dtype.type(1)
    record = json.loads((tmp_path / "f/fusectl.json").read_text())
    shutil.rmtree(tmp_path / "f")
    save(tmp_path / "f", tree, "orbax", item=None)
    write_record(tmp_path / "f", {**record, "tensors": {}, "files": {}})

    problems = list(verify(str(tmp_path / "f"), settings=Settings(levels=("weights",))).failures())

    assert any(slot in problem and says in problem for problem in problems), problems


@pytest.mark.parametrize("how", ["identity", "stack"])
def test_a_window_begins_anew_in_a_deeper_model_too(trained, tmp_path, how):
    carry_out(*plan_stack(trained("skip"), Options(), how=how, layers=6), tmp_path / "f")

    found = open_checkpoint(str(tmp_path / "f"))
    assert not found.read("opt_state/losses").any()
    assert int(found.read("opt_state/inner_state/0/count")) == 3
    assert verify(str(tmp_path / "f"), settings=WEIGHTS).passed


# --- what is refused


MOE, MLA = "a mixture of experts (MoE)", "multi-head latent attention (MLA)"
SINKS, MTP = "attention sinks", "heads that predict several tokens ahead (MTP)"
TOWER, DELTA = "a vision or audio tower beside the decoder", "gated delta networks or state space layers"
CHOSEN = "attention to compressed or chosen tokens (DeepSeek 3.2 and 4)"
HYPER = "hyper-connections between layers (DeepSeek 4)"
SCALED, PER_LAYER = "layers with a scale each (Gemma 4)", "embeddings per layer (Gemma 3n and 4)"
GPT3 = "norms with biases and learned positions (GPT-3)"
PACKED = "queries, keys and values packed along one axis (fused_qkv)"
REFUSED = {
    "deepseek": [MOE, MLA],
    "deepseek_v2lite": [MOE, MLA],
    "deepseek_v4": [MOE, MLA, CHOSEN, HYPER, SINKS],
    "envy": [MOE],
    "gemma2_fused": [PACKED],
    "gemma3_fused": [PACKED],
    "gemma3_mm": [TOWER],
    "gemma4": [SCALED],
    "gemma4_small": [PER_LAYER, SCALED],
    "gpt3": [GPT3],
    "gpt_oss": [MOE, SINKS],
    "llama4": [MOE],
    "llama4_mm": [MOE, TOWER],
    "mixtral": [MOE],
    "mtp_deepseek": [MOE, MLA, MTP],
    "qwen2_fused": [PACKED],
    "qwen3_5": [MOE, DELTA],
    "qwen3_moe": [MOE],
    "qwen3_next": [MOE, DELTA],
    "qwen3_vl": [TOWER],
}


def refusal(shapes):
    with pytest.raises(Incompatible) as error:
        recognize(shapes, "here")
    return error.value


@pytest.mark.parametrize("block", REFUSED)
def test_a_block_is_refused_by_what_it_is_and_with_a_way_out_that_there_is(logits, block):
    files = [logits / f"refused/{block}_{layers}.json" for layers in ("scan", "unscan")]
    for file in (each for each in files if each.exists()):
        error = refusal({name: tuple(shape) for name, shape in json.loads(file.read_text()).items()})

        assert [detail.split(": ")[0] for detail in error.details] == REFUSED[block]
        *others, last = REFUSED[block]
        what = f"{', '.join(others)} and {last}" if others else last
        assert error.message == f"here: {what}, which fusectl does not fuse"
        said = f"{error.message} {error.details} {error.hint}"
        # Copies are no different models, and a table cannot say what would be needed.
        assert "different models" not in said
        assert "--arch" not in said
        ways = {TOWER: "--drop '*vision*' --drop '*/mm_*'"}
        alone = ways.get(REFUSED[block][0]) if len(REFUSED[block]) == 1 else None
        assert error.hint.startswith(alone or "without --dtype, --mesh, --scan and --unscan, convert copies it")


def test_olmo_3_is_called_so_and_qwen_3_next_is_not():
    tree = {name: value.shape for name, value in state("maxtext-llama", 1).items()}
    module = "params/params/decoder/layers_0/attention"
    olmo = {f"{module}/{which}_norm/scale": (12,) for which in ("query", "key")}
    qwen = {f"{module}/attention/{which}_norm/scale": (4,) for which in ("query", "key")}

    assert "(OLMo 3)" in refusal({**tree, **olmo}).message
    assert "OLMo" not in refusal({**tree, **qwen}).message


def test_an_optimizers_state_alone_leads_to_its_model(posttrained):
    tree = recognize(open_checkpoint(str(posttrained / "rl_scanned/7")).shapes, "")
    slots = {f"opt_state/1/0/mu/{tree.full(name)}": shape for name, shape in tree.shapes.items()}

    error = refusal({**slots, "opt_state/1/0/count/value": (), "step/value": ()})

    assert error.message == "here: an optimizer's state without its model, which fusectl does not fuse"
    assert error.hint == "name the step, or its item model_params"
    assert "optimizer" not in refusal({**slots, "decoder/mine/value": (3,)}).message


def test_packed_queries_of_gpt_3_lack_no_output_projection():
    tree = {name: value.shape for name, value in state("maxtext-llama", 1).items()}
    packed = {"params/params/decoder/layers_0/self_attention/qkv_proj/kernel": (12, 3, 6, 4)}
    bias = {"params/params/decoder/decoder_norm/bias": (12,)}

    assert refusal({**tree, **packed}).message == f"here: {PACKED}, which fusectl does not fuse"
    assert refusal({**tree, **packed, **bias}).message == f"here: {GPT3}, which fusectl does not fuse"


def test_heads_for_tokens_ahead_are_named_and_can_be_left_out(tmp_path, fusectl):
    heads = {
        "params/params/mtp_block/mtp_layer_1/mtp_1_embedding_norm/scale": np.ones(12, np.float32),
        "params/params/mtp_block/mtp_layer_1/mtp_1_transformer_layer/mlp/wo/kernel": np.ones((22, 12), np.float32),
    }
    save(tmp_path / "a", {**state("maxtext-llama-scanned", 1), **heads}, "orbax", item=None)

    done = fusectl("self-fuse", tmp_path / "a", "-o", tmp_path / "f")

    assert (done.code, MTP in done.err, "hint: --drop '*mtp*' leaves them out" in done.err) == (6, True, True)
    assert fusectl("self-fuse", tmp_path / "a", "-o", tmp_path / "f", "--drop", "*mtp*").code == 0


def test_a_stream_called_aqt_is_no_quantized_weight():
    tree = {name: value.shape for name, value in state("maxtext-llama", 1).items()}
    inside = "params/params/decoder/layers_0/mlp"
    assert recognize({**tree, f"{inside}/dropout/rngs/aqt/count": ()}, "here").family.name == "maxtext-llama"
    assert "quantized weights" in refusal({**tree, f"{inside}/wo/AqtDotGeneral_0/qrhs/frozen/value": (3,)}).message


@pytest.mark.parametrize("words", [("inspect", "--arch", "zzz"), ("convert", "--scan", "-o", "out")])
def test_a_refusal_never_lists_all_families(tmp_path, fusectl, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a", state("gemma", 1), "orbax", item=None)
    done = fusectl(words[0], tmp_path / "a", *words[1:])
    assert done.code == 6
    assert max(map(len, done.err.splitlines())) < 300, done.err
