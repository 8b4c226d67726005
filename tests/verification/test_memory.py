"""Verification in less memory than the model has: measured, on a model that would not fit."""

import subprocess
import sys

import pytest
from models import SIZES, checkpoint

from fusectl.formats.opening import open_checkpoint
from fusectl.operations.fuse import plan_fusion
from fusectl.planning.options import Options
from fusectl.writing.carrying_out import carry_out


MEASURE = """
import sys
from fusectl.cli import run
from fusectl.system.memory import peak_rss_bytes
code = run(sys.argv[1:])
print(peak_rss_bytes(), file=sys.stderr)
sys.exit(code)
"""


def peak_bytes(*arguments):
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return int(done.stderr.split()[-1]), done.stdout


@pytest.mark.alone
@pytest.mark.slow
def test_a_model_is_proved_in_a_part_of_its_own_memory(tmp_path):
    """0.4 billion parameters, 1.6 GB, made of two of 0.1 billion; layer by layer it takes the largest layer's share."""
    sizes = {**SIZES, "vocab": 8000, "embed": 768, "heads": 12, "joined_kv": 768, "mlp": 2048}
    paths = [
        checkpoint(tmp_path / name, "t5-1.1", i, sizes, {"encoder": 6, "decoder": 6}) for i, name in enumerate("ab")
    ]
    plan, sources = plan_fusion(paths, Options())
    path = carry_out(plan, sources, tmp_path / "out")
    fused = open_checkpoint(str(path))
    parameters = sum(leaf.nbytes for name, leaf in fused.leaves.items() if name.startswith("target/"))
    everything = parameters + 2 * sum(leaf.nbytes for leaf in sources[0].leaves.values())

    layered, out = peak_bytes("verify", path, "--max-memory", "1GB", "--trace", "-q")
    weights, _ = peak_bytes("verify", path, "--levels", "files,weights", "--max-memory", "64MiB", "-q")
    whole, told = peak_bytes("verify", path, "--levels", "algebra", "--whole", "-q")

    assert parameters > 1.2e9
    assert "layer by layer" in out
    assert "all layers at once" in told
    assert layered < parameters
    assert weights < 64 * 2**20 + 300e6
    # The control: whole, it takes more than all models have.
    assert whole > everything
