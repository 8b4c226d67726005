"""The gin bindings for a restart, parsed by gin, with modules in place of T5X's."""

import json

import gin
import pytest
from models import LAYERS, SIZES, checkpoint

from fusectl.archs import t5_flax
from fusectl.restart import restart


T5X = {
    "t5x/__init__.py": "",
    "t5x/examples/__init__.py": "",
    "t5x/examples/t5/__init__.py": "",
    "t5x/examples/scalable_t5/__init__.py": "",
    "t5x/utils.py": """
class RestoreCheckpointConfig:
    def __init__(self, fallback_to_scratch=False, assignment_map=None):
        self.fallback_to_scratch, self.assignment_map = fallback_to_scratch, assignment_map
def create_learning_rate_scheduler(factors='constant * rsqrt_decay', warmup_steps=100, step_offset=0):
    return lambda step: max(max(0, step - step_offset), warmup_steps) ** -0.5
""",
    "t5x/models.py": """
class EncoderDecoderModel:
    def __init__(self, module):
        self.module = module
""",
}
NETWORK = """
class T5Config:
    def __init__(self, mlp_activations=None, **fields):
        self.fields, self.mlp_activations = fields, mlp_activations
class Transformer:
    def __init__(self, config):
        self.config = config
"""
# What the small model was trained with.
BASE = """
from __gin__ import dynamic_registration
from t5x import models
from t5x.examples.{} import network
DROPOUT_RATE = 0.1
models.EncoderDecoderModel.module = @network.Transformer()
network.Transformer.config = @network.T5Config()
network.T5Config.mlp_activations = ('gelu', 'linear')
network.T5Config.emb_dim = 12
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Modules with the names of T5X's, which take any config."""
    at = tmp_path_factory.mktemp("modules")
    files = {**T5X, **{f"t5x/examples/{which}/network.py": NETWORK for which in ("t5", "scalable_t5")}}
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


def parsed(text, which):
    """The model that gin makes of the small model's file and the bindings behind it."""
    gin.parse_config(BASE.format(which))
    gin.parse_config(text)
    return gin.get_configurable("t5x.models.EncoderDecoderModel")()


FAMILIES = [("t5-1.1", "t5"), ("t5-1.0", "t5"), ("scalable-t5-1.1-scanned", "scalable_t5")]


@pytest.mark.parametrize(("family", "which"), FAMILIES)
def test_gin_takes_the_sizes_of_the_fused_model(t5x, tmp_path, fusectl, family, which):
    out = tmp_path / "out"
    assert fusectl("self-fuse", checkpoint(tmp_path / "a", family), "-o", out).code == 0

    done = fusectl("restart-config", out)

    assert done.code == 0, done.err
    config = parsed(done.out, which).module.config
    assert config.mlp_activations == ("gelu", "linear")
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
    if which == "scalable_t5":
        wanted["scan_layers"] = True
    assert config.fields == wanted
    assert gin.query_parameter("%INITIAL_CHECKPOINT_PATH") == str(out)
    assert f"# EMBED_DIM = {2 * SIZES['embed']}" in done.out
    assert fusectl("restart-config", out, "--json").json["result"]["gin"] == done.out


def test_without_optimizer_state_t5x_is_told_to_begin_one(t5x, tmp_path, fusectl):
    fusectl("self-fuse", checkpoint(tmp_path / "a"), "-o", tmp_path / "out", "--optimizer", "drop")

    parsed(fusectl("restart-config", tmp_path / "out").out, "t5")

    found = gin.get_configurable("t5x.utils.RestoreCheckpointConfig")()
    assert (found.fallback_to_scratch, found.assignment_map) == (True, (("state/param_states.*", None),))


@pytest.mark.parametrize("family", ["t5-1.1", "scalable-t5-1.1-scanned"])
def test_a_norm_per_source_takes_fusectls_network(t5x, tmp_path, fusectl, family):
    pair = [checkpoint(tmp_path / name, family, seed=i) for i, name in enumerate("ab")]
    fusectl("fuse", *pair, "-o", tmp_path / "out", "--norm", "property")

    text = fusectl("restart-config", tmp_path / "out").out

    config = parsed(text, "t5").module.config
    assert type(config) is (t5_flax.T5Config if family == "t5-1.1" else t5_flax.ScalableT5Config)
    assert (config.norm_groups, config.emb_dim) == ((12, 12), 24)
    assert (config.mlp_activations, config.dropout_rate) == (("gelu", "linear"), 0.1)


@pytest.mark.parametrize(("offset", "at"), [(-700, 300), (500, 1500), (-1000, 0)])
def test_the_schedule_goes_on_with_an_offset(t5x, tmp_path, fusectl, offset, at):
    """The step is 1,000; T5X's formula is t5x/utils.py's."""
    path = checkpoint(tmp_path / "grown")

    done = fusectl("restart-config", path, "--lr-offset", str(offset))

    parsed(done.out, "t5")
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
