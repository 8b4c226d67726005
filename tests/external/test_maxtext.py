"""MaxText itself goes on with what fusectl wrote, behind the overrides that restart-config prints.

The first loss is that of the model that was fused with itself.

It wants an environment of its own, about 4 GB, with Python 3.12, and MaxText's sources:

    git clone https://github.com/AI-Hypercomputer/maxtext
    uv venv -p 3.12 maxtext-env
    uv pip install --python maxtext-env/bin/python jax flax optax orbax-checkpoint grain tensorflow \\
        tensorflow-datasets tensorflow-text aqtp drjax ml-collections omegaconf qwix tiktoken sentencepiece \\
        transformers tensorboardx pathwaysutils jaxtyping jsonlines pillow datasets tokamax psutil pydantic etils \\
        absl-py chex pyyaml jinja2 tabulate sympy cloud-tpu-diagnostics ml-goodput-measurement \\
        cloud-accelerator-diagnostics google-cloud-storage safetensors
    FUSECTL_MAXTEXT_PYTHON=maxtext-env/bin/python FUSECTL_MAXTEXT_SOURCE=maxtext/src python -m pytest -m external
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fusectl.builder import Options
from fusectl.restart import restart
from fusectl.surgery import carry_out, plan_fusion


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
    dataset_type=synthetic steps=4 checkpoint_period=100 async_checkpointing=False log_config=False
    sliding_window_size=8 learning_rate=1e-3 enable_goodput_recording=False enable_checkpointing=True
    save_checkpoint_on_completion=False
"""
CASES = {
    "llama2_unscan": ["decoder_block=llama2", "scan_layers=False"],
    "gemma2_scan": [
        *("decoder_block=gemma2", 'mlp_activations=["gelu","linear"]', "logits_via_embedding=True"),
        *("final_logits_soft_cap=3.0", "attn_logits_soft_cap=5.0", "use_post_attn_norm=True"),
        *("use_post_ffw_norm=True", "scan_layers=True"),
    ],
}
_LOSS = re.compile(r"completed step: (\d+),.* loss: ([\d.]+),.* perplexity: ([\d.]+)")


def first_step(*words):
    """The step, the loss and the perplexity that a run of MaxText begins with."""
    # Its XLA is another, and knows other flags than these tests'.
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment = {**inherited, "DECOUPLE_GCLOUD": "TRUE", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(SOURCE)}
    config = Path(str(SOURCE)) / "maxtext/configs/base.yml"
    command = [str(PYTHON), "-m", "maxtext.trainers.pre_train.train", str(config), *RUN.split(), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    found = _LOSS.search(done.stdout + done.stderr)
    assert found, done.stderr[-3000:]
    return int(found.group(1)), float(found.group(2)), float(found.group(3))


@pytest.mark.parametrize("case", CASES)
def test_it_goes_on_with_a_fusion_where_it_was(tmp_path, logits, case):
    source = tmp_path / "base/small/checkpoints/2"
    shutil.copytree(logits / f"maxtext-trained/{case}/checkpoints/2", source)
    fused = tmp_path / "base/grown/checkpoints/2"
    fused.parent.mkdir(parents=True)
    plan, opened = plan_fusion([str(source)] * 2, Options())
    carry_out(plan, opened, fused)

    own = CASES[case]
    before = first_step(*own, f"base_output_directory={tmp_path / 'base'}", "run_name=small")
    after = first_step(*own, *restart(str(fused)).lines)
    anew = first_step(
        *own,
        *(line for line in restart(str(fused)).lines if not line.startswith(("base_output", "run_name"))),
        f"base_output_directory={tmp_path / 'elsewhere'}",
        "run_name=new",
    )

    assert before[0] == after[0] == 3
    # As many digits as it prints; a tied head's table is rounded to bfloat16.
    assert after[1:] == pytest.approx(before[1:], rel=1e-3)
    # Begun anew, the control, it is elsewhere.
    assert anew[0] == 0
    assert anew[1:] != pytest.approx(before[1:], rel=1e-2)
