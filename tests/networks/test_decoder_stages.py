"""The decoders' twin: its logits are MaxText's and the gemma package's, of every block, layout and feature."""

import json
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from cases import slow, some_soon

from fusectl.errors import Incompatible
from fusectl.families.config import read_config
from fusectl.families.recognition import recognize
from fusectl.formats.opening import open_checkpoint
from fusectl.networks import decoder_stages as decoder_twin
from fusectl.networks.stages import Step
from fusectl.networks.tokens import Tokens
from fusectl.operations.fuse import plan_fusion
from fusectl.planning.options import Options
from fusectl.verification.function import capped
from fusectl.writing.carrying_out import carry_out


MAXTEXT = {
    "llama2_scan_3layers": "maxtext-llama-scanned",
    "llama2_scan0": "maxtext-llama-scanned-0",
    "llama2_unscan": "maxtext-llama",
    "llama2_unscan_fusedmlp": "maxtext-llama-fused-mlp",
    "llama2_tied": "maxtext-llama-tied",
    "llama2_tied_nonorm": "maxtext-llama-tied",
    "llama2_caps": "maxtext-llama",
    "llama2_ropelinear": "maxtext-llama",
    "llama2_eps": "maxtext-llama",
    "llama31_rope": "maxtext-llama",
    "mistral_unscan": "maxtext-llama",
    "qwen2_scan": "maxtext-qwen2-scanned",
    "qwen2_unscan": "maxtext-qwen2",
    "qwen2_tied": "maxtext-qwen2-tied",
    "qwen3_scan": "maxtext-qwen3-tied-scanned",
    "qwen3_untied": "maxtext-qwen3",
    "gemma_scan": "maxtext-gemma-tied-scanned",
    "gemma_unscan": "maxtext-gemma-tied",
    "gemma2_scan_3pairs": "maxtext-gemma2-tied-scanned",
    "gemma2_unscan": "maxtext-gemma2-tied",
    "gemma3_scan_7": "maxtext-gemma3-tied-scanned",
    "gemma3_unscan": "maxtext-gemma3-tied",
    "gemma3_eps": "maxtext-gemma3-tied",
    "gemma3_27b": "maxtext-gemma3-tied",
}
GEMMA = {
    "gemma1_mqa": "gemma",
    "gemma1_qkv": "gemma-qkv",
    "gemma2": "gemma2-transposed",
    "gemma2_27b": "gemma2-transposed",
    "gemma2_27b_gqa": "gemma2-transposed",
    "gemma3": "gemma3-transposed",
    "gemma3_mqa": "gemma3-transposed",
}
TOLERANCE = 1e-5


def maxtext(home):
    found = np.load(home / "model.npz")
    parameters = {name.removeprefix("params/"): found[name] for name in found if name.startswith("params/")}
    return parameters, found["tokens"], found["logits"]


def gemma(home, layout="params"):
    opened, found = open_checkpoint(str(home / layout)), np.load(home / "logits.npz")
    return {name: opened.read(name) for name in opened.leaves}, found["tokens"], found["logits"]


def stages(tree, parameters, tokens, layered, head=lambda values: values, groups=()):
    """The logits of the twin, whole or layer by layer; `head` is what becomes of the head's parameter."""
    batch = Tokens(tokens, tokens, tokens, np.ones_like(tokens), np.ones_like(tokens))
    config = decoder_twin.config_of(tree, groups or (tree.sizes["embed"],), "float32")
    state, parts = {}, []
    for stage in decoder_twin.layered(tree, batch, 24) if layered else decoder_twin.whole(tree):
        own = {}
        for part in stage.parts:
            values = parameters[part.name]
            if part.axis is not None:
                values = values.take(list(part.at), axis=tree.rows[part.name].spec.axes.index(part.axis))
            own[part.name] = head(values) if "[" in stage.name else values
        state, taps = stage.run(Step(config, own, batch, state))
        assert len({tap.parameter for tap in taps}) == len(taps)
        if "logits" in state:
            parts.append(np.asarray(state.pop("logits")))
    return capped(np.concatenate(parts, -1), tree.network.logits_soft_cap)


def off(found, expected):
    return float(np.abs(found - expected).max())


def as_bfloat16(values):
    """MaxText rounds the table of a tied head, whatever it computes in."""
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.mark.parametrize("case", some_soon(MAXTEXT, lambda case: list(MAXTEXT).index(case) % 8 == 0))
def test_its_logits_are_maxtexts(logits, case):
    home = logits / "maxtext" / case
    parameters, tokens, theirs = maxtext(home)
    tree = recognize({n: v.shape for n, v in parameters.items()}, case, config=read_config(str(home / "config.json")))
    assert tree.family.name == MAXTEXT[case]

    with jax.default_matmul_precision("highest"):
        ours = stages(tree, parameters, tokens, True, as_bfloat16 if tree.family.tied else lambda values: values)
        assert off(ours, theirs) < TOLERANCE * max(1.0, np.abs(theirs).max())
        # The same layers at once, but for that rounding.
        at_once = stages(tree, parameters, tokens, False)
        assert off(at_once, stages(tree, parameters, tokens, True)) < TOLERANCE * max(1.0, np.abs(theirs).max())


@pytest.mark.slow
def test_its_logits_are_those_of_a_post_trained_model(posttrained):
    """The names of a state of NNX are those of the parameters: no tensor stands for another."""
    opened, found = open_checkpoint(str(posttrained / "rl_scanned/7")), np.load(posttrained / "rl_scanned/forward.npz")
    tree = recognize(opened.shapes, "here")

    with jax.default_matmul_precision("highest"):
        ours = stages(tree, {name: opened.read(tree.full(name)) for name in tree.shapes}, found["tokens"], False)

    theirs = found["logits_source"]
    assert off(ours, theirs) < TOLERANCE * max(1.0, np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize("case", GEMMA)
def test_its_logits_are_the_gemma_packages(logits, case):
    home = logits / "gemma" / case
    parameters, tokens, theirs = gemma(home)
    tree = recognize({n: v.shape for n, v in parameters.items()}, case, config=read_config(str(home / "config.json")))
    assert tree.family.name == GEMMA[case]

    with jax.default_matmul_precision("highest"):
        for layered in (False, True):
            assert off(stages(tree, parameters, tokens, layered), theirs) < TOLERANCE * max(1.0, np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gemma2", "gemma3"])
def test_flat_keys_are_the_same_model(logits, case):
    home = logits / "gemma" / case
    parameters, tokens, theirs = gemma(home, "params_flat")
    tree = recognize({n: v.shape for n, v in parameters.items()}, case, config=read_config(str(home / "config.json")))
    assert tree.family.name == f"{GEMMA[case]}-flat"
    assert off(stages(tree, parameters, tokens, False), theirs) < TOLERANCE * max(1.0, np.abs(theirs).max())


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("llama2_unscan", {"normalization_layer_epsilon": 0.1}),
        slow("llama2_unscan", {"rope_max_timescale": 100}),
        ("llama2_unscan", {"rope_type": "llama3.1"}),
        ("llama2_unscan", {"mlp_activations": ["gelu", "linear"]}),
        slow("llama2_ropelinear", {"rope_linear_scaling_factor": 1.0}),
        ("llama2_caps", {"attn_logits_soft_cap": 0.0}),
        ("llama2_tied", {"normalize_embedding_logits": False}),
        ("llama2_unscan", {"decoder_block": "qwen2"}),
        ("gemma2_unscan", {"sliding_window_size": 9}),
        slow("gemma2_unscan", {"final_logits_soft_cap": 0.0}),
        ("gemma3_unscan", {"local_rope_max_timescale": 1_000_000}),
        slow("gemma3_eps", {"normalization_layer_epsilon": 1e-6}),
    ],
)
def test_every_setting_that_a_config_tells_makes_a_difference(logits, tmp_path, case, changes):
    """The control of the comparisons above."""
    home = logits / "maxtext" / case
    parameters, tokens, theirs = maxtext(home)
    (tmp_path / "config.json").write_text(json.dumps({**json.loads((home / "config.json").read_text()), **changes}))
    config = read_config(str(tmp_path / "config.json"))
    tree = recognize({n: v.shape for n, v in parameters.items()}, case, config=config)
    rounded = as_bfloat16 if tree.family.tied else lambda values: values
    assert off(stages(tree, parameters, tokens, True, rounded), theirs) > 3e-3


@pytest.mark.slow
def test_blocks_that_are_not_supported_are_refused_by_name(logits):
    said = {}
    for path in sorted((logits / "refused").glob("*.json")):
        shapes = {f"params/params/{n}": tuple(s) for n, s in json.loads(path.read_text()).items()}
        with pytest.raises(Incompatible) as error:
            recognize(shapes, "here")
        said[path.stem] = error.value.message
    for block, what in {
        "mixtral_scan": "mixture of experts",
        "qwen3_moe_unscan": "mixture of experts",
        "deepseek_scan": "latent attention",
        "gpt_oss_scan": "mixture of experts",
        "gemma3_mm_scan": "vision",
        "qwen3_next_scan": "gated delta networks",
        "gemma4_scan": "layers with a scale each",
        "gemma4_small_unscan": "embeddings per layer",
        "qwen2_fused_scan": "fused_qkv",
        "gpt3_scan": "GPT-3",
    }.items():
        assert what in said[block], (block, said[block])


@pytest.mark.slow
def test_what_is_fused_here_has_the_logits_that_the_package_has_of_its_own_fusion(decoders, tmp_path):
    """Of a model with itself, and of two: with the package's norm, and with a norm each."""
    home = decoders / "gemma-written/gemma2_like"
    fields = json.loads((home / "config.json").read_text())
    attending = {**fields, "attention_types": [name.upper() for name in fields["attention_types"]]}
    # The fixture's caps are none, its kind's are not.
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**attending, "attn_logits_soft_cap": None, "final_logit_softcap": None}))
    theirs = np.load(home / "logits.npz")
    for name, sources, groups in (
        ("fused_self", "AA", (32,)),
        ("fused_plain", "AB", (32,)),
        ("fused_grouped", "AB", (16, 16)),
    ):
        plan, opened = plan_fusion([str(home / source) for source in sources], Options(configs=(str(config),)))
        fused = open_checkpoint(str(carry_out(plan, opened, tmp_path / name)))
        tree = replace(recognize(fused.shapes, name), told=fused.record.network)
        parameters = {parameter: fused.read(tree.full(parameter)) for parameter in tree.shapes}
        ours = stages(tree, parameters, theirs["tokens"], False, groups=groups)
        assert off(ours, theirs[name]) < TOLERANCE, name
