"""The gemma package itself loads what fusectl wrote, and its logits are those of the sources, and of their twin.

It wants an environment of its own, 2.3 GB, whose interpreter FUSECTL_GEMMA_PYTHON names:

    pip install uv && uv venv -p 3.11 gemma-env
    for name in tensorflow xmanager opencv-python scikit-image scikit-learn altair pyarrow; do
        echo "$name ; python_version < '3'"
    done > off
    uv pip install --python gemma-env/bin/python --override off gemma==3.3.0 kauldron==1.4.2 jax==0.10.2 flax==0.12.8 \\
        orbax-checkpoint==0.12.8 sentencepiece==0.2.1 tensorflow-cpu==2.21.0
    FUSECTL_GEMMA_PYTHON=gemma-env/bin/python python -m pytest -m external tests/external
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fusectl.operations.fuse import plan_fusion
from fusectl.planning.options import Options
from fusectl.writing.carrying_out import carry_out


PYTHON = os.environ.get("FUSECTL_GEMMA_PYTHON")
pytestmark = [
    pytest.mark.external,
    pytest.mark.skipif(PYTHON is None, reason="FUSECTL_GEMMA_PYTHON names no interpreter that has gemma"),
]
CASES = ["gemma1_mqa", "gemma1_qkv", "gemma2", "gemma2_27b", "gemma2_27b_gqa", "gemma3", "gemma3_mqa"]
COPIES = 2
GROWN = ("embed_dim", "hidden_dim", "num_heads", "num_kv_heads")


def test_the_package_computes_of_a_fusion_what_it_computed_of_its_source(tmp_path, logits):
    words, sources = [], {}
    for case in CASES:
        home = logits / "gemma" / case
        fields = json.loads((home / "config.json").read_text())
        wide = tmp_path / f"{case}.json"
        wide.write_text(json.dumps({**fields, **{name: COPIES * fields[name] for name in GROWN}}))
        plan, opened = plan_fusion([str(home / "params")] * COPIES, Options(configs=(str(home / "config.json"),)))
        fused = carry_out(plan, opened, tmp_path / case)
        sources[case] = np.load(home / "logits.npz")
        words += [home / "params", home / "config.json", tmp_path / f"{case}.source.npy"]
        words += [fused, wide, tmp_path / f"{case}.fused.npy"]
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, sources["gemma2"]["tokens"])

    script = Path(__file__).with_name("gemma_logits.py")
    subprocess.run([str(PYTHON), str(script), tokens, *words], check=True, timeout=900)

    for case in CASES:
        before, after = (np.load(tmp_path / f"{case}.{name}.npy") for name in ("source", "fused"))
        theirs = sources[case]["logits"]
        largest = max(1.0, np.abs(theirs).max())
        # What the twin is compared with in test_decoder_twin.py is what the package computes here.
        assert np.abs(before - theirs).max() <= 1e-5 * largest, case
        assert np.abs(after - before).max() <= 1e-5 * largest, case
