"""T5X itself goes on with what fusectl wrote, by the gin file that restart-config prints, word for word.

Each run is T5X's own `t5x.main --run_mode=train` with the gin file of a small model (T5X's examples, with the sizes of
the test data), T5X's own pretrain.gin or finetune.gin, one that names data and batch, and, last, the printed file.

It wants an environment of its own, 3 GB, and T5X's sources (here those of 2026-04-21, cc342d41), of which the folder
t5x is enough; t5x_run.py stands in for what T5X imports and PyPI does not have:

    git clone https://github.com/google-research/t5x
    python3.12 -m venv t5x-env
    t5x-env/bin/pip install jax==0.10.2 flax==0.12.8 orbax-checkpoint==0.12.8 seqio==0.0.20 clu==0.0.12 fiddle==0.3.1 \\
        gin-config==0.5.0 tensorflow-cpu==2.21.0 tensorboard cached_property
    FUSECTL_T5X_PYTHON=t5x-env/bin/python FUSECTL_T5X_SOURCE=t5x python -m pytest -m external tests/external/test_t5x.py
"""

import os
import shutil
import subprocess
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import fusectl as package
from fusectl.formats.opening import open_checkpoint
from fusectl.restart import restart


PYTHON, SOURCE = os.environ.get("FUSECTL_T5X_PYTHON"), os.environ.get("FUSECTL_T5X_SOURCE")
pytestmark = [
    pytest.mark.external,
    pytest.mark.skipif(not (PYTHON and SOURCE), reason="FUSECTL_T5X_PYTHON and FUSECTL_T5X_SOURCE name none"),
]
STEP = 20
# By the test data's variant, which of T5X's examples it is, and the example's gin file.
EXAMPLES = {
    "t5_1_1": ("t5", "t5x/examples/t5/t5_1_1/tiny.gin"),
    "t5_1_0": ("t5", "t5x/examples/t5/t5_1_0/small.gin"),
    "scalable_1_1": ("scalable_t5", "t5x/examples/scalable_t5/t5_1_1/small.gin"),
}
SMALL = """\
from __gin__ import dynamic_registration
import seqio
from t5x.examples.{} import network
include '{}'
VOCABULARY = @seqio.PassThroughVocabulary()
seqio.PassThroughVocabulary.size = 128
network.T5Config:
  vocab_size = 128
  emb_dim = 16
  num_heads = 2
  num_encoder_layers = 2
  num_decoder_layers = 2
  head_dim = 8
  mlp_dim = 32
  dtype = 'float32'
"""
# What every run binds beside T5X's own file, among it a schedule that is the same in all of them.
RUN = """\
from __gin__ import dynamic_registration
import __main__ as train_script
from t5x import utils
MIXTURE_OR_TASK_NAME = 'tokens'
TASK_FEATURE_LENGTHS = {'inputs': 12, 'targets': 10}
USE_CACHED_TASKS = False
BATCH_SIZE = 4
DROPOUT_RATE = 0.0
RANDOM_SEED = 0
train/utils.DatasetConfig:
  shuffle = False
  pack = False
  seed = 0
train_script.train:
  train_eval_dataset_cfg = None
  infer_eval_dataset_cfg = None
  stats_period = 1
utils.create_learning_rate_scheduler:
  factors = 'constant'
  base_learning_rate = 0.01
"""
# Runs such as examples/t5/local_tiny.gin restore nothing.
NOTHING = """\
from __gin__ import dynamic_registration
from t5x import utils
utils.CheckpointConfig.restore = None
"""
PRETRAIN, FINETUNE = "t5x/configs/runs/pretrain.gin", "t5x/configs/runs/finetune.gin"


@dataclass
class Ran:
    """What T5X began with, by the names in a checkpoint, its logits, its losses, and what it said."""

    code: int
    said: str
    state: dict[str, np.ndarray]
    logits: np.ndarray | None = None
    losses: np.ndarray | None = None


class T5x:
    """T5X in a directory of its own, with a small model of the test data."""

    def __init__(self, at, written, variant):
        self.at, self.model_dir, self.modules = at, at / "model_dir", at / "modules"
        self.sources = [written / variant / f"seed{i}/legacy/checkpoint_{STEP}" for i in (0, 1)]
        self.small = self._file("small.gin", SMALL.format(*EXAMPLES[variant]))
        tokens = dict(np.load(written / variant / "seed0/logits.npz"))
        self.logits = [np.load(written / variant / f"seed{i}/logits.npz")["logits"] for i in (0, 1)]
        del tokens["logits"]
        np.savez(at / "tokens.npz", **tokens, vocab=np.array(128))

    def _file(self, name, text):
        path = self.at / name
        path.write_text(text)
        return path

    def run(self, *printed, run=PRETRAIN, steps=3, also=""):
        """Trains from what the printed files restore."""
        files = [self.small, run, self._file("run.gin", RUN)]
        files += [self._file("also.gin", also)] if also else []
        files += [self._file(f"printed{i}.gin", text) for i, text in enumerate(printed)]
        flags = [f"--gin_file={path}" for path in files]
        flags += [f'--gin.MODEL_DIR="{self.model_dir}"', f"--gin.TRAIN_STEPS={STEP + steps}"]
        # Its XLA is another, and knows other flags than these tests'.
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        paths = (str(SOURCE), str(Path(package.__file__).parents[1]), str(self.modules))
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        script, seen = Path(__file__).with_name("t5x_run.py"), self.at / "seen.npz"
        command = [str(PYTHON), script, self.at / "tokens.npz", seen, "--run_mode=train", *flags]
        done = subprocess.run(
            command, cwd=self.at, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        state = dict(np.load(seen)) if seen.exists() else {}
        seen.unlink(missing_ok=True)
        return Ran(done.returncode, done.stderr, state, state.pop("logits", None), state.pop("losses", None))


@pytest.fixture
def t5x(tmp_path, written):
    return lambda variant="t5_1_1": T5x(tmp_path, written, variant)


def require_restored(ran, path):
    """That the state was every leaf of a checkpoint, to the bit; Orbax makes T5X's step a float."""
    assert ran.code == 0, ran.said[-3000:]
    opened = open_checkpoint(str(path))
    assert ran.state.keys() == opened.leaves.keys()
    for name, values in ran.state.items():
        assert np.array_equal(values, opened.read(name).astype(values.dtype)), name
        assert name == "state/step" or values.dtype == np.float32
    assert ran.state["state/step"] == STEP


def printed(path, *options, fusectl):
    done = fusectl("restart-config", path, *options)
    assert done.code == 0, done.err
    return done.out


def made(fusectl, *words):
    done = fusectl(*words)
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def first_loss(tmp_path_factory, written):
    """The small model's own, restored by the file that is printed for it."""
    own = T5x(tmp_path_factory.mktemp("small"), written, "t5_1_1")
    ran = own.run(restart(str(own.sources[0])).text(), steps=1)
    require_restored(ran, own.sources[0])
    assert np.abs(ran.logits - own.logits[0]).max() <= 2e-6
    return ran.losses[0]


@pytest.mark.parametrize(
    ("run", "also", "layout"),
    [
        (PRETRAIN, "", "t5x"),
        (PRETRAIN, "", "orbax-ocdbt-zarr2"),
        (FINETUNE, "", "t5x"),
        (PRETRAIN, NOTHING, "orbax-ocdbt-zarr2"),
    ],
    ids=["pretrain", "pretrain-orbax", "finetune", "nothing-orbax"],
)
def test_it_goes_on_with_a_fusion_where_it_was(t5x, first_loss, tmp_path, fusectl, run, also, layout):
    own, out = t5x(), tmp_path / f"grown/checkpoint_{STEP}"
    made(fusectl, "self-fuse", own.sources[0], "-o", out, "--format", layout)

    ran = own.run(printed(out, fusectl=fusectl), run=run, also=also)

    require_restored(ran, out)
    assert np.abs(ran.logits - own.logits[0]).max() <= 2e-6
    assert ran.losses[0] == pytest.approx(first_loss, rel=1e-5)
    assert ran.losses[2] < ran.losses[0]


def test_without_the_lines_that_restore_it_starts_from_scratch(t5x, tmp_path, fusectl):
    """The control: what fusectl printed once."""
    own, out = t5x(), tmp_path / f"grown/checkpoint_{STEP}"
    made(fusectl, "self-fuse", own.sources[0], "-o", out)
    lines = printed(out, fusectl=fusectl).splitlines(keepends=True)
    at = lines.index("utils.CheckpointConfig:\n")

    ran = own.run("".join(lines[:at] + lines[lines.index("network.T5Config:\n") :]))

    assert ran.code == 0
    assert ran.state["state/step"] == 0
    name = "target/encoder/layers_0/mlp/wo/kernel"
    assert not np.array_equal(ran.state[name], open_checkpoint(str(out)).read(name))
    assert np.abs(ran.logits - own.logits[0]).max() > 0.1


def test_it_goes_on_from_model_dir(t5x, tmp_path, fusectl):
    own, out = t5x(), tmp_path / f"grown/checkpoint_{STEP}"
    made(fusectl, "self-fuse", own.sources[0], "-o", out)
    text = printed(out, fusectl=fusectl)
    # Where the path leads to is gone.
    own.model_dir.mkdir()
    moved = shutil.move(out, own.model_dir)

    ran = own.run(text)

    require_restored(ran, moved)
    assert np.abs(ran.logits - own.logits[0]).max() <= 2e-6


def test_a_state_without_an_optimizers_is_completed_and_the_run_resumed(t5x, tmp_path, fusectl):
    own, out = t5x(), tmp_path / f"grown/checkpoint_{STEP}"
    made(fusectl, "self-fuse", own.sources[0], "-o", out, "--optimizer", "drop")
    text, opened = printed(out, fusectl=fusectl), open_checkpoint(str(out))

    ran = own.run(text, steps=1)
    resumed = own.run(text, steps=2)

    assert (ran.code, resumed.code) == (0, 0), resumed.said[-3000:]
    for name in opened.leaves:
        assert np.array_equal(ran.state[name], opened.read(name)), name
    assert (ran.state["state/step"], resumed.state["state/step"]) == (STEP, STEP + 1)
    slots = [name for name in ran.state if name.startswith("state/param_states/")]
    assert not any(ran.state[name].any() for name in slots)
    assert any(resumed.state[name].any() for name in slots)
    # As the notes have it, it is not restored from there.
    shutil.rmtree(own.model_dir)
    own.model_dir.mkdir()
    shutil.copytree(out, own.model_dir / out.name)
    refused = own.run(text)
    assert (refused.code, "param_states" in refused.said) == (1, True)


def test_parameters_in_bfloat16_are_trained_in_float32(t5x, tmp_path, fusectl):
    own, out = t5x(), tmp_path / f"grown/checkpoint_{STEP}"
    made(fusectl, "self-fuse", own.sources[0], "-o", out, "--dtype", "bfloat16")
    text = printed(out, fusectl=fusectl)

    require_restored(own.run(text, steps=1), out)

    # The control.
    shutil.rmtree(own.model_dir)
    narrow = own.run(text.replace("  dtype = 'float32'\n", ""), steps=1)
    assert narrow.state["target/encoder/layers_0/mlp/wo/kernel"].dtype != np.float32


@pytest.mark.parametrize(
    ("variant", "given"),
    [("t5_1_1", False), ("t5_1_1", True), ("t5_1_0", False), ("scalable_1_1", False), ("scalable_1_1", True)],
)
def test_a_norm_per_source_computes_the_mean(t5x, tmp_path, fusectl, monkeypatch, variant, given):
    own, out = t5x(variant), tmp_path / f"grown/checkpoint_{STEP}"
    made(fusectl, "fuse", *own.sources, "-o", out, "--norm", "property")
    monkeypatch.chdir(str(SOURCE))
    text = printed(out, *(("--gin", own.small) if given else ()), fusectl=fusectl)
    assert ("\n  dtype = 'float32'\n" in text) is given

    ran = own.run(text, steps=2)

    require_restored(ran, out)
    assert np.abs(ran.logits - (own.logits[0] + own.logits[1]) / 2).max() <= 2e-6
    assert ran.losses[1] < ran.losses[0]


def test_one_norm_or_other_settings_do_not_compute_the_mean(t5x, tmp_path, fusectl):
    """The control."""
    own, out = t5x(), tmp_path / f"grown/checkpoint_{STEP}"
    made(fusectl, "fuse", *own.sources, "-o", out, "--norm", "property")
    text, mean = printed(out, fusectl=fusectl), (own.logits[0] + own.logits[1]) / 2

    one = own.run(text.replace("norm_groups = (16, 16)", "norm_groups = (32,)"), steps=1)
    shutil.rmtree(own.model_dir)
    narrow = own.run(text.replace("network.T5Config:\n", "network.T5Config:\n  dtype = 'bfloat16'\n"), steps=1)

    assert np.abs(one.logits - mean).max() > 0.1
    assert np.abs(narrow.logits - mean).max() > 1e-3


def test_the_table_of_rates_keeps_the_trajectory_of_scanned_layers(t5x, tmp_path, fusectl):
    """By the gin lines in the module's own docstring."""
    own, out = t5x("scalable_1_1"), tmp_path / f"grown/checkpoint_{STEP}"
    own.modules.mkdir()
    made(fusectl, "self-fuse", own.sources[0], "-o", out, "--lr-table", own.modules / "grown_rates.py")
    text, module = printed(out, fusectl=fusectl), (own.modules / "grown_rates.py").read_text()
    lines = module[module.index("    from __gin__") : module.index("\n\nThe three are")]
    small = own.run(restart(str(own.sources[0])).text(), steps=5)

    losses = []
    for printed_files in ((text, textwrap.dedent(lines)), (text,)):
        shutil.rmtree(own.model_dir)
        ran = own.run(*printed_files, steps=5)
        require_restored(ran, out)
        losses.append(np.abs(ran.losses - small.losses).max())

    assert losses[0] <= 1e-5
    # The control: the rate as it was.
    assert losses[1] > 1e-3


@pytest.mark.parametrize(
    ("name", "layout", "said"),
    [
        ("grown", "t5x", "improperly formatted checkpoint directory"),
        (f"checkpoint_{STEP}.grown", "t5x", "invalid literal for int()"),
        (f"checkpoint_{STEP}", "orbax-zarr3", ".zarray"),
    ],
)
def test_what_it_does_not_restore_is_what_fusectl_says(t5x, tmp_path, fusectl, name, layout, said):
    own, out = t5x(), tmp_path / name
    made(fusectl, "self-fuse", own.sources[0], "-o", out, "--format", layout)
    found = fusectl("restart-config", out)
    if layout == "t5x":
        assert "T5X restores only from directories named checkpoint_STEP" in found.out
    else:
        assert (found.code, "T5X does not read" in found.err) == (6, True)
    text = restart(str(own.sources[0])).text().replace(str(own.sources[0]), str(out))

    ran = own.run(text.replace("emb_dim = 16", "emb_dim = 32"), steps=1)

    assert (ran.code, said in ran.said, ran.losses) == (1, True, None), ran.said[-3000:]
