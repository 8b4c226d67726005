"""MaxText itself trains small models, and goes on with what fusectl made of them, behind the lines that it prints.

The first loss is that of the model that was fused with itself, or whose layers were unstacked; at the rates of
--lr-table the ones after it are, too. The lines are pasted as they are, by a shell.

It wants an environment of its own, 2.4 GB, with Python 3.12, and MaxText's sources. They passed with those of
2026-08-22, e591f30c, jax 0.12.0.1, flax 0.12.12 and orbax-checkpoint 0.12.8:

    git clone https://github.com/AI-Hypercomputer/maxtext
    uv venv -p 3.12 maxtext-env
    uv pip install --python maxtext-env/bin/python jax flax optax orbax-checkpoint grain tensorflow-cpu aqtp drjax \\
        ml-collections omegaconf qwix tiktoken sentencepiece transformers tensorboardx pathwaysutils jaxtyping pillow \\
        tokamax psutil pydantic etils absl-py pyyaml jinja2 sympy ml-goodput-measurement google-cloud-storage
    FUSECTL_MAXTEXT_PYTHON=maxtext-env/bin/python FUSECTL_MAXTEXT_SOURCE=maxtext/src python -m pytest -m external
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


PYTHON, SOURCE = os.environ.get("FUSECTL_MAXTEXT_PYTHON"), os.environ.get("FUSECTL_MAXTEXT_SOURCE")
pytestmark = [
    pytest.mark.external,
    pytest.mark.skipif(not (PYTHON and SOURCE), reason="FUSECTL_MAXTEXT_PYTHON and FUSECTL_MAXTEXT_SOURCE name none"),
]
# As the fixtures were trained.
RUN = """
    hardware=cpu skip_jax_distributed_system=True override_model_config=True dtype=float32 weight_dtype=float32
    matmul_precision=highest attention=dot_product dropout_rate=0.0 enable_dropout=False packing=False
    per_device_batch_size=2 max_target_length=24 max_prefill_predict_length=8 vocab_size=64 base_emb_dim=16
    base_num_query_heads=4 base_num_kv_heads=2 head_dim=8 base_mlp_dim=32 base_num_decoder_layers=2 param_scan_axis=1
    dataset_type=synthetic checkpoint_period=100 async_checkpointing=False log_config=False
    sliding_window_size=8 learning_rate=1e-3 enable_goodput_recording=False enable_checkpointing=True
"""
GEMMA2 = """
    decoder_block=gemma2 mlp_activations=["gelu","linear"] logits_via_embedding=True final_logits_soft_cap=3.0
    attn_logits_soft_cap=5.0 use_post_attn_norm=True use_post_ffw_norm=True
"""
MODELS = {
    "llama2": "decoder_block=llama2 scan_layers=True",
    "gemma2": f"{GEMMA2} scan_layers=True",
    # As its public models have it, which fusectl assumes of a tied head where no --config tells.
    "qwen3": "decoder_block=qwen3 use_qk_norm=True logits_via_embedding=True normalize_embedding_logits=False "
    "scan_layers=True",
    # A cycle of six layers, and two that remain.
    "gemma3": "model_name=gemma3-4b base_num_decoder_layers=8 scan_layers=True",
    # One of the fixtures.
    "llama2_unscan": "decoder_block=llama2 scan_layers=False",
}
# Trained from step 0; gone on with from step 3 to the last one. Clipped gradients would have other norms.
TRAINED, LAST = "steps=3", "steps=12 save_checkpoint_on_completion=False gradient_clipping_threshold=0.0"
TRAINER = "-m maxtext.trainers.pre_train.train"
_STEP = re.compile(r"completed step: (\d+),.* loss: ([\d.]+),.* perplexity: ([\d.]+)")


def run(words, program=TRAINER):
    """The loss and the perplexity of each step of a run of MaxText's, whose command line ends with these words."""
    # Its XLA is another, and knows other flags than these tests'.
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment = {**inherited, "DECOUPLE_GCLOUD": "TRUE", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(SOURCE)}
    config = Path(str(SOURCE)) / "maxtext/configs/base.yml"
    command = [str(PYTHON), *program.split(), str(config), *RUN.split(), *words.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    found = {int(m[1]): (float(m[2]), float(m[3])) for m in _STEP.finditer(done.stdout + done.stderr)}
    assert found, done.stderr[-3000:]
    return found


def shell(command, cwd=None):
    """What a command prints in a shell that has fusectl."""
    here = f'fusectl() {{ "{sys.executable}" -m fusectl "$@"; }}'
    done = subprocess.run(["bash", "-c", f"{here}\n{command}"], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def small(tmp_path_factory, logits):
    """The directory of runs in which a model was trained as `small`, and its steps when it goes on; each once."""
    known = {}

    def trained(model):
        if model not in known:
            base = tmp_path_factory.mktemp(model)
            own = f"{MODELS[model]} base_output_directory={base} run_name=small"
            if model == "llama2_unscan":
                shutil.copytree(logits / f"maxtext-trained/{model}/checkpoints/2", base / "small/checkpoints/2")
            else:
                run(f"{own} {TRAINED}")
            known[model] = base, run(f"{own} {LAST}")
        return known[model]

    return trained


def first(steps):
    return min(steps), steps[min(steps)]


@pytest.mark.parametrize("model", ["llama2", "gemma2", "qwen3", "llama2_unscan"])
def test_it_goes_on_with_a_fusion_where_it_was(small, model):
    base, before = small(model)
    shell(f"fusectl self-fuse {base}/small/checkpoints/2 -o {base}/grown/checkpoints/2 --verify")

    lines = shell(f"fusectl restart-config {base}/grown/checkpoints/2 | grep -v '^#'")
    after = run(f"{MODELS[model]} {LAST} {lines}")

    assert first(before)[0] == first(after)[0] == 3
    # As many digits as it prints; a tied head's table is rounded to bfloat16.
    assert first(after)[1] == pytest.approx(first(before)[1], rel=1e-3)


def test_begun_anew_it_is_elsewhere(small, tmp_path):
    """The control: the same sizes, and nothing restored."""
    base, before = small("llama2")
    shell(f"fusectl self-fuse {base}/small/checkpoints/2 -o {tmp_path}/grown/checkpoints/2")
    lines = shell(f"fusectl restart-config {tmp_path}/grown/checkpoints/2 | grep -v '^#\\|^base_output\\|^run_name'")

    anew = run(f"{MODELS['llama2']} {LAST} {lines} base_output_directory={tmp_path / 'elsewhere'} run_name=new")

    assert first(anew)[0] == 0
    assert first(anew)[1] != pytest.approx(first(before)[1], rel=1e-2)


def test_at_the_rates_of_the_table_it_moves_as_the_small_one_does(small, tmp_path):
    base, before = small("llama2")
    out = base / "rescaled/checkpoints/2"
    shell(f"fusectl self-fuse {base}/small/checkpoints/2 -o {out} --lr-table {tmp_path}/grown_rates.py")
    printed = shell(f"fusectl restart-config {out}")
    (command,) = re.findall(r"fusectl restart-config \S+ \| sed .* > train_grown.py", printed)
    shell(command, cwd=tmp_path)

    lines = shell(f"fusectl restart-config {out} | grep -v '^#'")
    after = run(f"{MODELS['llama2']} {LAST} {lines}", program=str(tmp_path / "train_grown.py"))
    as_before = run(f"{MODELS['llama2']} {LAST} {lines}")

    assert after.keys() == before.keys() == set(range(3, 12))
    for step, losses in after.items():
        assert losses == pytest.approx(before[step], rel=1e-3), step
    # The control: at unchanged rates it moves faster.
    assert as_before[11] != pytest.approx(before[11], rel=1e-2)


def test_it_goes_on_with_unstacked_layers(small):
    base, before = small("gemma3")
    shell(f"fusectl convert {base}/small/checkpoints/2 --unscan -o {base}/apart/checkpoints/2 --verify")

    lines = shell(f"fusectl restart-config {base}/apart/checkpoints/2 | grep -v '^#'")
    after = run(f"{MODELS['gemma3']} {LAST} {lines}")

    assert after.keys() == before.keys() == set(range(3, 12))
    for step, losses in after.items():
        assert losses == pytest.approx(before[step], rel=1e-3), step
