"""What trainers are told: gin's bindings, parsed by gin with modules in place of T5X's; MaxText's overrides on what it
wrote; and Gemma's config, parsed and compared with that of the model.
"""

import ast
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import gin
import pytest
import yaml
from cases import first_soon
from models import LAYERS, SIZES, checkpoint, state

from fusectl.errors import Incompatible
from fusectl.families.recognition import recognize
from fusectl.families.registry import family_named
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.registry import FORMATS
from fusectl.formats.sink import save
from fusectl.formats.tree import Checkpoint, Leaf, Location
from fusectl.networks import t5_flax
from fusectl.restart import restart, restart_of


T5X = {
    "t5x/__init__.py": "",
    "t5x/examples/__init__.py": "",
    "t5x/examples/t5/__init__.py": "",
    "t5x/examples/scalable_t5/__init__.py": "",
    "t5x/utils.py": """
class CheckpointConfig:
    def __init__(self, restore=None):
        self.restore = restore
class RestoreCheckpointConfig:
    def __init__(self, path, mode='latest', dtype=None, fallback_to_scratch=False, assignment_map=None):
        self.__dict__.update(locals())
def create_learning_rate_scheduler(factors='constant * rsqrt_decay', warmup_steps=100, step_offset=0):
    return lambda step: max(max(0, step - step_offset), warmup_steps) ** -0.5
""",
    "t5x/models.py": """
class EncoderDecoderModel:
    def __init__(self, module):
        self.module = module
""",
}
# T5X's own, by their fields.
NETWORK = """
import dataclasses
from collections.abc import Sequence
from typing import Any
@dataclasses.dataclass
class T5Config:
    vocab_size: int
    dtype: Any = 'float32'
    emb_dim: int = 512
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    head_dim: int = 64
    mlp_dim: int = 2048
    mlp_activations: Sequence[str] = ('relu',)
    dropout_rate: float = 0.1
    logits_via_embedding: bool = False
    {}
class Transformer:
    def __init__(self, config):
        self.config = config
"""
FIELDS = {
    "t5": "float32_attention_logits: bool = False",
    "scalable_t5": "remat_policy: str = 'none'; scan_layers: bool = True; param_scan_axis: int = 1",
}
# What the small model was trained with.
BASE = """
from __gin__ import dynamic_registration
from t5x import models
from t5x.examples.{} import network
DROPOUT_RATE = 0.1
models.EncoderDecoderModel.module = @network.Transformer()
network.Transformer.config = @network.T5Config()
network.T5Config:
  vocab_size = 41
  emb_dim = 12
  dtype = 'bfloat16'
  dropout_rate = %DROPOUT_RATE
"""
# By the activations, as in T5X's base.gin files, and for scanned layers.
GATED = "  mlp_activations = ('gelu', 'linear')\n"
REMAT = "  remat_policy = 'minimal'\n"
# What T5X's run files say of restoring (t5x/configs/runs, and examples/t5/local_tiny.gin).
IMPORT = "from __gin__ import dynamic_registration\nfrom t5x import utils\n"
RUNS = {
    "pretrain.gin": "utils.CheckpointConfig.restore = @utils.RestoreCheckpointConfig()\n"
    "utils.RestoreCheckpointConfig.path = []\n",
    "finetune.gin": "INITIAL_CHECKPOINT_PATH = %gin.REQUIRED\n"
    "utils.CheckpointConfig.restore = @utils.RestoreCheckpointConfig()\n"
    "utils.RestoreCheckpointConfig:\n  path = %INITIAL_CHECKPOINT_PATH\n  mode = 'specific'\n  dtype = 'float32'\n",
    "eval.gin": "CHECKPOINT_PATH = %gin.REQUIRED\n"
    "utils.RestoreCheckpointConfig:\n  path = %CHECKPOINT_PATH\n  mode = 'specific'\n",
    "local_tiny.gin": "utils.CheckpointConfig.restore = None\n",
}


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Modules with the names of T5X's, which take any config."""
    at = tmp_path_factory.mktemp("modules")
    files = {**T5X, **{f"t5x/examples/{which}/network.py": NETWORK.format(FIELDS[which]) for which in FIELDS}}
    for name, text in files.items():
        path = at / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(at)
        yield


@pytest.fixture
def t5x(modules):
    yield
    gin.clear_config()


def base(family):
    """The gin file that a small model of a family was trained with."""
    which = "t5" if family.startswith("t5") else "scalable_t5"
    return BASE.format(which) + GATED * ("1.1" in family) + REMAT * (which == "scalable_t5")


def parsed(text, family="t5-1.1", run="pretrain.gin"):
    """The model that gin makes of the small model's file, the run's and the one that is printed, as T5X reads them."""
    for each in (base(family), IMPORT + RUNS[run], text):
        gin.parse_config(each)
    gin.finalize()
    return gin.get_configurable("t5x.models.EncoderDecoderModel")()


def restored():
    """What T5X restores then."""
    return gin.get_configurable("t5x.utils.CheckpointConfig")().restore


FAMILIES = ["t5-1.1", "t5-1.0", "scalable-t5-1.1-scanned"]


@pytest.mark.parametrize("family", FAMILIES)
def test_gin_takes_the_sizes_of_the_fused_model(t5x, tmp_path, fusectl, family):
    out = tmp_path / "out/checkpoint_1000"
    assert fusectl("self-fuse", checkpoint(tmp_path / "a", family), "-o", out).code == 0

    done = fusectl("restart-config", out)

    assert done.code == 0, done.err
    found = vars(parsed(done.out, family).module.config)
    wanted = {
        "vocab_size": SIZES["vocab"],
        "emb_dim": 2 * SIZES["embed"],
        "num_heads": 2 * SIZES["heads"],
        "head_dim": SIZES["kv"],
        "mlp_dim": 2 * SIZES["mlp"],
        "num_encoder_layers": LAYERS["encoder"],
        "num_decoder_layers": LAYERS["decoder"],
        "logits_via_embedding": family == "t5-1.0",
    }
    settings = {"dtype": "bfloat16", "mlp_activations": ("gelu", "linear") if "1.1" in family else ("relu",)}
    settings |= {"scan_layers": True, "remat_policy": "minimal"} if "scalable" in family else {}
    assert found == {**found, **wanted, **settings}
    assert f"# EMBED_DIM = {2 * SIZES['embed']}" in done.out
    assert fusectl("restart-config", out, "--json").json["result"]["gin"] == done.out


@pytest.mark.parametrize("run", RUNS)
def test_t5x_restores_whatever_the_run(t5x, tmp_path, run):
    path = checkpoint(tmp_path / "checkpoint_1000")

    parsed(restart(path).text(), run=run)

    found = restored()
    assert (found.path, found.mode) == (path, "specific")
    assert (found.fallback_to_scratch, found.assignment_map) == (False, None)
    # The control: what the run itself restores.
    gin.clear_config()
    if "REQUIRED" in RUNS[run]:
        with pytest.raises(ValueError, match="CHECKPOINT_PATH"):
            parsed("", run=run)
    else:
        parsed("", run=run)
        assert restored() is None or restored().path == []


def test_the_file_is_one_of_its_own(t5x, tmp_path):
    """gin takes the lines behind no others: F6, and why the notes say so."""
    found = restart(checkpoint(tmp_path / "checkpoint_1000"))

    assert "a gin file of its own, the last --gin_file" in found.text()
    with pytest.raises(SyntaxError, match="Dynamic registration"):
        gin.parse_config(base("t5-1.1") + found.text())


def test_without_optimizer_state_t5x_is_told_to_begin_one(t5x, tmp_path, fusectl):
    out = tmp_path / "out/checkpoint_1000"
    fusectl("self-fuse", checkpoint(tmp_path / "a"), "-o", out, "--optimizer", "drop")

    text = fusectl("restart-config", out).out

    parsed(text)
    found = restored()
    assert (found.fallback_to_scratch, found.assignment_map) == (True, (("state/param_states.*", None),))
    assert "MODEL_DIR: empty at first, without this checkpoint, too" in text
    assert "MODEL_DIR: empty at first, or with this checkpoint" in restart(checkpoint(tmp_path / "b")).text()


def test_parameters_in_bfloat16_are_restored_in_float32(t5x, tmp_path, fusectl):
    for dtype in ("bfloat16", "float32"):
        out = tmp_path / dtype / "checkpoint_1000"
        assert fusectl("self-fuse", checkpoint(tmp_path / "a" / dtype), "-o", out, "--dtype", dtype).code == 0
        parsed(fusectl("restart-config", out).out)
        assert restored().dtype == ("float32" if dtype == "bfloat16" else None)
        gin.clear_config()


@pytest.mark.parametrize("trailing", ["", "\nIgnored = 1\n"])
@pytest.mark.parametrize("family", first_soon(["t5-1.1", "scalable-t5-1.1-scanned"]))
def test_a_norm_per_source_keeps_the_settings_of_the_small_model(
    t5x, property_fusion, tmp_path, fusectl, family, trailing
):
    """Those that its gin file binds, whether fusectl has been given it or not."""
    own = tmp_path / "small.gin"
    own.write_text(base(family) + "  # the end\n" + trailing)
    given = ("--gin", own) if trailing else ()

    text = fusectl("restart-config", property_fusion(family), *given).out

    config = parsed(text, family).module.config
    assert type(config) is (t5_flax.T5Config if family == "t5-1.1" else t5_flax.ScalableT5Config)
    assert (config.norm_groups, config.emb_dim) == ((12, 12), 24)
    assert (config.mlp_activations, config.dropout_rate, config.dtype) == (("gelu", "linear"), 0.1, "bfloat16")
    if family != "t5-1.1":
        assert (config.remat_policy, config.scan_layers) == ("minimal", True)
    assert ("  dtype = 'bfloat16'\n" in text) is ("  dropout_rate = %DROPOUT_RATE\n" in text) is bool(trailing)
    assert "T5X's defaults" in text
    assert ("assumed for what it does not bind, T5X's defaults: dtype = 'float32'" in text) is not bool(trailing)


@pytest.fixture
def property_fusion(tmp_path, fusectl):
    """Fuses two small models with a norm per source."""

    def fuse(family="t5-1.1"):
        pair = [checkpoint(tmp_path / family / name, family, seed=i) for i, name in enumerate("ab")]
        out = tmp_path / family / "checkpoint_1000"
        assert fusectl("fuse", *pair, "-o", out, "--norm", "property").code == 0
        return out

    return fuse


FORK = """
from mine import layers
from mine import network
import math as m
WIDTH = 12
network.Transformer.config = @wide/network.Config()
network.Config:
  vocab_size = 41
  emb_dim = %WIDTH
  mlp_activations = (
      @layers.swish,   # gated
      'linear',
  )
  use_bias = True
  dropout_rate = 0.2
wide/network.Config.dtype = 'float32'
network.Config.dtype = 'bfloat16'
narrow/network.Config.float32_attention_logits = True
other.Config.dtype = 'float16'
"""


@pytest.mark.slow
def test_the_settings_of_another_class_are_repeated(t5x, property_fusion, tmp_path, fusectl, monkeypatch):
    """A fork's, whose config binds nothing of T5X's."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").touch()
    (tmp_path / "mine/layers.py").write_text("def swish(x):\n    return x\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = tmp_path / "fork.gin"
    own.write_text(FORK)

    text = fusectl("restart-config", property_fusion(), "--gin", own).out

    config = parsed(text).module.config
    assert (config.dtype, config.dropout_rate, config.float32_attention_logits) == ("float32", 0.2, False)
    assert (config.mlp_activations[0].__name__, config.mlp_activations[1]) == ("swish", "linear")
    assert "from mine import layers\n" in text
    assert "not repeated, since this network does not have them: use_bias\n" in text
    assert f"as {own} binds them: dtype, mlp_activations, dropout_rate\n" in text
    assert "T5X's defaults: float32_attention_logits = False\n" in text


def test_gin_files_are_held_against_the_checkpoint(property_fusion, tmp_path, fusectl, trained):
    own = tmp_path / "small.gin"
    own.write_text("network.T5Config:\n  vocab_size = 40\n  head_dim = 5\n  mlp_activations = ('relu',)\n")

    done = fusectl("restart-config", property_fusion(), "--gin", own)

    assert (done.code, done.out) == (6, "")
    assert f"vocab_size: 40 in {own}, 41 in the checkpoint" in done.err
    assert "mlp_activations: ('relu',)" in done.err
    assert "head_dim" not in done.err
    own.write_text(base("t5-1.1"))
    assert "stays in force" in fusectl("restart-config", checkpoint(tmp_path / "checkpoint_3"), "--gin", own).out
    done = fusectl("restart-config", trained("llama2_unscan"), "--gin", own)
    assert (done.code, "MaxText has no gin files" in done.err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [each for each in FORMATS.values() if each.zarr == 3], ids=lambda each: each.name)
def test_what_t5x_cannot_open_is_refused_with_the_command_that_mends_it(tmp_path, fusectl, layout):
    out = tmp_path / "checkpoint_1000"
    written = fusectl("self-fuse", checkpoint(tmp_path / "a"), "-o", out, "--format", layout.name)

    done = fusectl("restart-config", out)

    assert (done.code, done.out, written.code) == (6, "", 0)
    assert f"T5X does not read {layout.name}" in done.err
    # The end of the command that wrote it says so, too, and not how to go on.
    command = f"fusectl convert {out} --format orbax-ocdbt-zarr2"
    assert command in done.err
    assert command in written.err
    assert "T5X goes on" not in written.err
    mended = fusectl(*command.split()[1:]).out.strip()
    assert mended.endswith("/checkpoint_1000")
    done = fusectl("restart-config", mended)
    assert (done.code, f"INITIAL_CHECKPOINT_PATH = '{mended}'" in done.out) == (0, True)
    # So does that of a copy.
    copied = fusectl("convert", mended, "-o", tmp_path / "checkpoint_2000", "--format", layout.name)
    assert f"fusectl convert {tmp_path / 'checkpoint_2000'} --format orbax-ocdbt-zarr2" in copied.err


@pytest.mark.parametrize("rearranged", ["item", "prefix"])
def test_a_tree_that_t5x_would_not_look_at_is_refused(tmp_path, fusectl, rearranged):
    """Its Orbax knows the item `state` and parameters below `target/`, and nothing else."""
    out = tmp_path / "checkpoint_7"
    if rearranged == "item":
        save(out, state("t5-1.1", 0), "orbax-ocdbt-zarr2", item="default")
    else:
        parameters = {f"params/{n[7:]}": v for n, v in state("t5-1.1", 0).items() if n.startswith("target/")}
        save(out, parameters, "orbax-ocdbt-zarr2", item="state")

    done = fusectl("restart-config", out)

    assert (done.code, done.out) == (6, "")
    assert f"fusectl convert {out} --format t5x" in done.err
    mended = fusectl("convert", out, "--format", "t5x").out.strip()
    assert fusectl("restart-config", mended).code == 0


@pytest.mark.slow
def test_a_name_that_t5x_does_not_take_is_noted(tmp_path, fusectl):
    said = "T5X restores only from directories named checkpoint_STEP: move it to a new one as checkpoint_1000"
    source = checkpoint(tmp_path / "a")

    assert said in fusectl("restart-config", source).out
    assert said in fusectl("self-fuse", source, "-o", tmp_path / "out").err
    assert said not in fusectl("self-fuse", source, "-o", tmp_path / "out/checkpoint_1000").err
    # Nor is an output without a name called so.
    beside = fusectl("self-fuse", checkpoint(tmp_path / "checkpoint_1000")).out.strip()
    assert beside == f"{tmp_path}/checkpoint_1000.self-fused-2x/checkpoint_1000"
    assert said not in fusectl("restart-config", beside).out


@pytest.mark.parametrize(("offset", "at"), [(-700, 300), (500, 1500), (-1000, 0)])
def test_the_schedule_goes_on_with_an_offset(t5x, tmp_path, fusectl, offset, at):
    """The step is 1,000; T5X's formula is t5x/utils.py's."""
    path = checkpoint(tmp_path / "grown")

    done = fusectl("restart-config", path, "--lr-offset", str(offset))

    parsed(done.out)
    rate = gin.get_configurable("t5x.utils.create_learning_rate_scheduler")()
    assert rate(1000) == max(at, 100) ** -0.5
    notes = [line for line in done.out.splitlines() if "schedule goes on" in line or "schedules" in line]
    assert len(notes) == 1
    assert f"step 1,000, and the schedule goes on at step {at:,} of its own" in notes[0]
    if at:
        assert f"{(1000 / at) ** 0.5:.3g} times the rate" in notes[0]
    assert ("unstable" in notes[0]) == (offset < 0 < at)


@pytest.mark.parametrize("offset", ["-1001", "99999999999"])
def test_an_offset_that_leaves_the_schedule_is_refused(tmp_path, fusectl, offset):
    done = fusectl("restart-config", checkpoint(tmp_path / "a"), "--lr-offset", offset)
    assert (done.code, f"--lr-offset {offset}" in done.err, done.out) == (2, True, "")


def test_what_is_no_checkpoint_is_told(tmp_path, fusectl):
    assert fusectl("restart-config", tmp_path / "none").code == 4
    done = fusectl("restart-config", checkpoint(tmp_path / "a"), "--trainer", "pax")
    assert (done.code, "'pax' is not" in done.err) == (2, True)


def test_the_bindings_are_those_of_the_library(tmp_path):
    found = restart(checkpoint(tmp_path / "a"))
    assert json.loads(json.dumps(found.as_json()))["network"]["emb_dim"] == SIZES["embed"]


LLAMA = {
    "base_emb_dim": 16,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "head_dim": 8,
    "base_mlp_dim": 32,
    "vocab_size": 64,
    "base_num_decoder_layers": 2,
    "override_model_config": True,
}
GROWN = ("base_emb_dim", "base_num_query_heads", "base_num_kv_heads", "base_mlp_dim")
FULL, RUN, PARAMETERS = "load_full_state_path", "base_output_directory", "load_parameters_path"


@pytest.fixture
def trained(logits):
    """The newest step of one of MaxText's runs."""
    return lambda name: logits / "maxtext-trained" / name / "checkpoints/2"


def overrides(done):
    """The overrides as a shell and OmegaConf would take them: words at spaces, values as YAML."""
    assert done.code == 0, done.err
    words = " ".join(line for line in done.out.splitlines() if not line.startswith("#")).split()
    pairs = [word.split("=", 1) for word in words]
    assert len(dict(pairs)) == len(pairs)
    return {key: yaml.safe_load(value) for key, value in pairs}


def notes(done):
    return [line for line in done.out.splitlines() if line.startswith("# ")]


def grown(sizes):
    return {key: 2 * n if key in GROWN else n for key, n in sizes.items()}


def test_maxtext_takes_the_sizes_of_the_fused_model(decoders, tmp_path, fusectl):
    out = tmp_path / "runs/grown/checkpoints/2"
    source = decoders / "maxtext-written/llama2_scanned/seed1/2"
    own = overrides(fusectl("restart-config", source))
    done = fusectl("self-fuse", source, "-o", out)
    assert done.code == 0, done.err

    printed = fusectl("restart-config", out)

    found = overrides(printed)
    sizes = {key: found[key] for key in LLAMA}
    assert sizes == grown({key: own[key] for key in LLAMA})
    shape = open_checkpoint(str(out)).shapes["params/params/decoder/layers/self_attention/query/kernel"]
    names = ("base_emb_dim", "base_num_decoder_layers", "base_num_query_heads", "head_dim")
    assert shape == tuple(found[name] for name in names)
    assert {key: value for key, value in found.items() if key not in LLAMA} == {
        "scan_layers": True,
        "param_scan_axis": 1,
        "logits_via_embedding": False,
        RUN: str(tmp_path / "runs"),
        "run_name": "grown",
    }
    assert any("llama2, mistral or qwen2" in note for note in notes(printed))
    assert any("learning rates as before" in note for note in notes(printed))
    assert any(f"{FULL}={out / 'items'}" in note for note in notes(printed))
    # The same at the end of the command that wrote it, without the comments.
    ended = done.err.partition("MaxText goes on with ")[2].splitlines()[1:]
    assert ended == [line for line in printed.out.splitlines() if not line.startswith("#")]
    result = fusectl("restart-config", out, "--json").json["result"]
    assert (result["trainer"], result["overrides"], result["shell"]) == ("maxtext", found, printed.out)


# What the printed program imports. The trainer prints what an update of its head is over that of a norm.
TRAINER = {
    "maxtext/__init__.py": "",
    "maxtext/optimizers/__init__.py": "",
    "maxtext/optimizers/optimizers.py": """
import optax
def get_optimizer(config, learning_rate_schedule, model=None):
    return optax.adamw(learning_rate_schedule)
""",
    "maxtext/trainers/__init__.py": "",
    "maxtext/trainers/pre_train/__init__.py": "",
    "maxtext/trainers/pre_train/train.py": """
import numpy as np
from maxtext.optimizers import optimizers
def main(argv):
    optimizer = optimizers.get_optimizer(None, 1e-3, model=None)
    zeros, ones = (
        {"decoder": {"decoder_norm": {"scale": np.full(3, x)}, "logits_dense": {"kernel": np.full(3, x)}}}
        for x in (0.0, 1.0)
    )
    found = optimizer.update(ones, optimizer.init(zeros), zeros)[0]["decoder"]
    print(float(found["logits_dense"]["kernel"][0] / found["decoder_norm"]["scale"][0]))
""",
}


@pytest.mark.slow
def test_maxtext_is_told_where_its_rates_go(decoders, tmp_path, fusectl):
    """What the shell makes of the printed line is the program; it is run on modules in place of MaxText's."""
    source, out = decoders / "maxtext-written/llama2_scanned/seed1/2", tmp_path / "runs/grown/checkpoints/2"
    home = tmp_path / "program"
    for name, text in TRAINER.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    assert fusectl("self-fuse", source, "-o", out, "--lr-table", home / "grown_rates.py").code == 0
    printed = fusectl("restart-config", out)
    (line,) = (note.partition(": ")[2] for note in notes(printed) if " | sed " in note)

    given, _, command = line.partition(" | ")
    assert given == f"fusectl restart-config {out}"
    subprocess.run(command, shell=True, input=printed.out, text=True, cwd=home, check=True)
    done = subprocess.run([sys.executable, "train_grown.py"], cwd=home, capture_output=True, text=True, check=True)

    assert float(done.stdout) == pytest.approx(0.5)
    assert fusectl("restart-config", out, "--json").json["result"]["rates"] == (home / "train_grown.py").read_text()
    assert any("gradient_clipping_threshold=0.0" in note for note in notes(printed))
    # The rest is no comment.
    assert overrides(printed)["run_name"] == "grown"


@pytest.mark.parametrize(("words", "told"), [((), True), (("--weights", "0.7,0.3"), False), (("other",), False)])
def test_rates_have_a_place_only_where_there_are_some(decoders, tmp_path, fusectl, words, told):
    home = decoders / "maxtext-written/llama2_scanned"
    pair = (home / "seed1", home / ("seed2" if "other" in words else "seed1"))
    options = [word for word in words if word != "other"]
    assert fusectl("fuse", *pair, *options, "-o", tmp_path / "f").code == 0
    assert (
        any("#> import grown_rates" in line for line in fusectl("restart-config", tmp_path / "f").out.splitlines())
        is told
    )


def test_maxtext_is_told_what_a_config_told(trained, logits, tmp_path, fusectl):
    config = tmp_path / "model.yml"
    config.write_text(
        "decoder_block: gemma2\nmlp_activations: [gelu, linear]\nattn_logits_soft_cap: 5\nfinal_logits_soft_cap: 3\n"
        "normalization_layer_epsilon: 1e-6\nnormalize_embedding_logits: false\nsliding_window_size: 8\n"
        "rope_max_timescale: 500000\nlocal_rope_max_timescale: 100\nrope_linear_scaling_factor: 8\n"
    )
    out = tmp_path / "grown"
    assert fusectl("self-fuse", trained("gemma2_scan"), "-o", out, "--config", config).code == 0

    printed = fusectl("restart-config", out)

    assert overrides(printed) == {
        **grown(LLAMA),
        "decoder_block": "gemma2",
        "scan_layers": True,
        "param_scan_axis": 1,
        "logits_via_embedding": True,
        "normalize_embedding_logits": False,
        "use_post_attn_norm": True,
        "use_post_ffw_norm": True,
        "mlp_activations": ["gelu", "linear"],
        "normalization_layer_epsilon": "1e-06",
        "attn_logits_soft_cap": 5.0,
        "final_logits_soft_cap": 3.0,
        "rope_max_timescale": 500_000,
        "rope_linear_scaling_factor": 8.0,
        "local_rope_max_timescale": 100,
        "sliding_window_size": 8,
        FULL: str(out / "items"),
    }
    # Two pairs: the tree holds four layers.
    assert any("counts pairs" in note for note in notes(printed))
    assert sum(recognize(open_checkpoint(str(out)).shapes, "").depths.values()) == 4
    assumed = "normalize_embedding_logits as the public models have it"
    assert not any(assumed in note for note in notes(printed))
    untold = fusectl("restart-config", trained("gemma2_scan"))
    assert any(assumed in note for note in notes(untold))
    plain = overrides(untold)
    assert plain["normalize_embedding_logits"] is True
    assert not plain.keys() & {"mlp_activations", "attn_logits_soft_cap", "rope_max_timescale", "sliding_window_size"}


@pytest.mark.parametrize(
    ("layout", "flags"),
    [
        ("orbax", {}),
        ("orbax-ocdbt-zarr2", {"zarr3": False}),
        ("orbax-zarr2", {"ocdbt": False, "zarr3": False}),
        ("orbax-zarr3", {"ocdbt": False}),
    ],
)
def test_maxtext_is_told_how_it_lies_on_disk(trained, tmp_path, fusectl, layout, flags):
    out = tmp_path / "3"
    assert fusectl("convert", trained("llama2_unscan"), "-o", out, "--format", layout).code == 0

    found = overrides(fusectl("restart-config", out))

    told = {key: value for key, value in found.items() if key.startswith("checkpoint_storage_")}
    assert told == {f"checkpoint_storage_use_{name}": value for name, value in flags.items()}
    assert found["scan_layers"] is False
    assert "param_scan_axis" not in found


def test_maxtext_goes_on_with_a_run_only_from_its_newest_step(trained, tmp_path, fusectl):
    step = tmp_path / "runs/a/checkpoints/2"
    shutil.copytree(trained("llama2_unscan"), step)
    in_run = {RUN: str(tmp_path / "runs"), "run_name": "a"}

    def loading():
        found = overrides(fusectl("restart-config", step))
        return {key: value for key, value in found.items() if key in {*in_run, FULL, PARAMETERS}}

    (step.parent / "1").mkdir()
    assert loading() == in_run
    (step.parent / "10").mkdir()
    assert loading() == {FULL: str(step / "items")}
    # A run looks for its state in the item `items`.
    (step.parent / "10").rmdir()
    (step / "items").rename(step / "state")
    assert loading() == {FULL: str(step / "state")}


def test_maxtext_loads_parameters_alone(trained, tmp_path, fusectl):
    out = tmp_path / "runs/a/checkpoints/0"
    assert fusectl("self-fuse", trained("llama2_unscan"), "-o", out, "--optimizer", "drop").code == 0

    printed = fusectl("restart-config", out)

    found = overrides(printed)
    assert found[PARAMETERS] == str(out / "items")
    assert not found.keys() & {FULL, RUN, "run_name"}
    assert any("without optimizer state" in note for note in notes(printed))
    assert not any("MaxText looks for" in note or "spaces" in note for note in notes(printed))
    # In directories of this name it looks for bare parameters.
    (out / "items").rename(out / "model")
    assert any("MaxText looks for" in note for note in notes(fusectl("restart-config", out)))
    spaced = out.rename(tmp_path / "with space")
    assert any("spaces" in note for note in notes(fusectl("restart-config", spaced)))


@pytest.mark.slow
def test_a_norm_per_source_is_not_maxtexts(trained, tmp_path, fusectl):
    source, out = trained("llama2_unscan"), tmp_path / "out"
    other = shutil.copytree(source, tmp_path / "other")
    for norm, said in (("property", True), ("rule", False)):
        assert fusectl("fuse", source, other, "-o", out, "--norm", norm, "--force").code == 0
        found = [note for note in notes(fusectl("restart-config", out)) if "norm_groups = (16, 16)" in note]
        assert bool(found) is said


def described(name, tmp_path, **sizes):
    """The overrides and the notes for a tree of one of MaxText's families, whose values do not matter."""
    family = family_named(name)
    shapes = {}
    for row in family.rows:
        for parameter in row.alternatives:
            if row.optional:
                continue
            number = parameter.replace("#", "0")
            shapes[number] = tuple({"stack": len(row.roles), **sizes}[axis] for axis in row.spec.axes)
    location = Location(tmp_path / "0/items", tmp_path / "0", "orbax", item="items")
    leaves = {f"params/params/{name}": Leaf(name, (), shape, "float32") for name, shape in shapes.items()}
    opened = Checkpoint(location, "orbax", leaves, files=None, file_of={})
    found = restart_of(opened, recognize(opened.shapes, "", name))
    return dict(line.split("=", 1) for line in found.lines), found.notes


AXES = {"embed": 24, "heads": 6, "kv_heads": 3, "kv": 10, "mlp": 40, "vocab": 50, "layers": 5}


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("maxtext-qwen3-tied-scanned-0", {"use_qk_norm": "True", "param_scan_axis": "0", "scan_layers": "True"}),
        ("maxtext-qwen2-scanned", {"attention_bias": "True", "decoder_block": "qwen2", "param_scan_axis": "1"}),
        ("maxtext-llama-fused-mlp-scanned", {"fused_mlp": "True", "logits_via_embedding": "False"}),
        ("maxtext-gemma-tied-scanned", {"decoder_block": "gemma", "normalize_embedding_logits": "True"}),
        ("maxtext-gemma3-tied-scanned", {"use_qk_norm": "True", "base_num_decoder_layers": "30"}),
    ],
)
def test_maxtext_is_told_what_the_tree_has(tmp_path, family, wanted):
    found, notes = described(family, tmp_path, **AXES)

    assert found == {**found, **wanted}
    assert {"use_qk_norm", "attention_bias", "fused_mlp"} & found.keys() <= wanted.keys()
    assert any("model_name stays gemma3-4b" in note for note in notes) == ("gemma3-" in family)
    sizes = {"base_emb_dim": "24", "base_num_query_heads": "6", "base_num_kv_heads": "3", "head_dim": "10"}
    assert found == {**found, **sizes, "base_mlp_dim": "40", "vocab_size": "50"}


def config_of(text):
    """The fields of the one call of TransformerConfig in a module, and what load_params is called with."""
    calls = {ast.unparse(call.func): call for call in ast.walk(ast.parse(text)) if isinstance(call, ast.Call)}
    fields = {}
    for keyword in calls["gm.nn.config.TransformerConfig"].keywords:
        value = keyword.value
        if isinstance(value, ast.Attribute):
            fields[keyword.arg] = value.attr
        elif isinstance(value, ast.Call):
            # As the package's make_attention_layers_types has it.
            pattern = [kind.attr for kind in value.args[0].elts]
            (layers,) = (each.value.value for each in value.keywords)
            fields[keyword.arg] = [pattern[i % len(pattern)] for i in range(layers)]
        else:
            fields[keyword.arg] = ast.literal_eval(value)
    return fields, ast.literal_eval(calls["gm.ckpts.load_params"].args[0])


@pytest.mark.parametrize("case", ["gemma1_mqa", "gemma1_qkv", "gemma2", "gemma2_27b", "gemma3", "gemma3_mqa"])
def test_gemma_takes_the_config_of_the_fused_model(logits, tmp_path, fusectl, case):
    home, out = logits / "gemma" / case, tmp_path / "out"
    wanted = json.loads((home / "config.json").read_text())
    del wanted["vision_encoder"]
    assert fusectl("self-fuse", home / "params", "-o", out, "--config", home / "config.json").code == 0

    printed = fusectl("restart-config", out)

    wanted |= {name: 2 * wanted[name] for name in ("embed_dim", "hidden_dim", "num_heads", "num_kv_heads")}
    assert config_of(printed.out) == (wanted, str(out))
    assert any("keeps its value" in note for note in notes(printed)) == (case == "gemma2_27b")
    assert not any("public models" in note for note in notes(printed))
    result = fusectl("restart-config", out, "--json").json["result"]
    assert (result["config"], result["params"], result["python"]) == (wanted, str(out), printed.out)


def test_what_no_config_told_of_gemma_is_that_of_the_public_models(logits, fusectl):
    printed = fusectl("restart-config", logits / "gemma/gemma2/params")

    found = config_of(printed.out)[0]
    assert (found["final_logit_softcap"], found["attn_logits_soft_cap"]) == (30.0, 50.0)
    assert any("final_logit_softcap" in note and "no --config" in note for note in notes(printed))


@pytest.mark.parametrize(("trainer", "of"), [("maxtext", "t5x"), ("gemma", "maxtext"), ("t5x", "gemma")])
def test_another_trainer_than_the_familys_is_refused(trained, logits, tmp_path, fusectl, trainer, of):
    paths = {
        "t5x": lambda: checkpoint(tmp_path / "a"),
        "maxtext": lambda: trained("llama2_unscan"),
        "gemma": lambda: logits / "gemma/gemma2/params",
    }
    path = paths[of]()
    done = fusectl("restart-config", path, "--trainer", trainer)
    assert (done.code, f"--trainer {of}" in done.err, done.out) == (6, True, "")
    assert fusectl("restart-config", path, "--trainer", of).out == fusectl("restart-config", path).out != ""


def test_what_the_decoders_trainers_do_not_have_is_refused(trained, logits, tmp_path, fusectl):
    for path in (trained("llama2_unscan"), logits / "gemma/gemma2/params"):
        done = fusectl("restart-config", path, "--lr-offset", "-1")
        assert (done.code, "--lr-offset -1" in done.err, done.out) == (2, True, "")
        out = tmp_path / path.parent.name
        assert fusectl("convert", path, "-o", out, "--format", "t5x").code == 0
        done = fusectl("restart-config", out)
        assert (done.code, f"fusectl convert {out} --format orbax" in done.err, done.out) == (6, True, "")


def test_a_family_without_a_trainer_is_refused(trained):
    opened = open_checkpoint(str(trained("llama2_unscan")))
    tree = recognize(opened.shapes, opened.path)
    with pytest.raises(Incompatible, match="no trainer is known for the family mine"):
        restart_of(opened, replace(tree, family=replace(tree.family, name="mine", trainer="")))
