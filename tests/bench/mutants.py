"""Faults put into the package on purpose, one at a time: does the suite that runs each time find them?

    python tests/bench/mutants.py [NAME ...]

For each fault the repository is copied, one line of the copy is changed, and the suite is run until its first failure.
What survives says which test is missing. test_rooms.py sees to it that every line to be changed is still there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[2]


# It fails for every fault, since it looks for the very lines.
ABOUT_THESE = [
    "--deselect",
    "tests/test_rooms.py::test_the_faults_that_are_put_in_on_purpose_are_about_lines_that_are_there",
]


class Fault(NamedTuple):
    file: str
    right: str
    wrong: str


FAULTS = {
    "the head's weight": Fault(
        "rules/fusion.py",
        "return fusion.weights[source] if reads_streams and not writes_streams else 1.0",
        "return 1.0",
    ),
    "the offset of 1 + scale": Fault(
        "rules/fusion.py", "if row.is_norm and fusion.tree.network.norm_adds_one else 0.0", "if False else 0.0"
    ),
    "a tied head's power of the width": Fault(
        "rules/fusion.py",
        "logits: float = part**network.tied_logits_power",
        "logits: float = part**-network.tied_logits_power",
    ),
    "second moments by the factor, not its square": Fault(
        "optimizer/carry.py", "squared = scale**2", "squared = scale"
    ),
    "second moments between models": Fault("optimizer/carry.py", "(writes, (), -0.5),", "(writes, (), 0.5),"),
    "layers in another order": Fault(
        "rules/depth.py",
        "runs = [i % old for i in range(new)]",
        "runs = in_order",
    ),
    "idle layers one too early": Fault(
        "rules/depth.py", "if runs[i] == runs[i - 1]}", "if i + 1 < new and runs[i] == runs[i + 1]}"
    ),
    "heads of ligo not repeated": Fault("rules/linear.py", 'repeat = sizes["heads"] // kv_heads', "repeat = 1"),
    "inputs not inverted": Fault("rules/linear.py", "self.tie == Tie.PINV and axis in row.spec.inputs", "False"),
    "kv heads repeated side by side": Fault(
        "sources/kv_heads.py", "return tuple(each // common for each in groups)", "return tuple(1 for each in groups)"
    ),
    "noise of another seed": Fault(
        "layout/noise.py", 'hashlib.blake2b(f"{seed}\\0{name}"', 'hashlib.blake2b(f"{seed + 1}\\0{name}"'
    ),
    "noise over what is not zero": Fault("writing/unit.py", "if term.must_be_zero:", "if False:"),
    "a chunk of the wrong piece": Fault(
        "writing/unit.py",
        "total += unit.stored(values).astype(np.float64) if rounds and each.copied is not None else values",
        "total += values",
    ),
    "a product that is not scaled": Fault(
        "writing/evaluators.py",
        "value = np.full((1,) * len(region), product.scale)",
        "value = np.full((1,) * len(region), 1.0)",
    ),
    "a chunk that the journal claims is not read": Fault(
        "writing/execute.py", "if crc32 is None or not _holds(chunk, unit, sink, crc32):", "if crc32 is None:"
    ),
    "another plan is resumed": Fault(
        "writing/journal.py", 'same = (found["schema"], found["plan"]) == (SCHEMA, digest)', "same = True"
    ),
    "a CRC-32C that is not looked at": Fault(
        "formats/encoding.py", "    require_crc32c(crc32c(body), bytes(view[-CRC32C_BYTES:]))\n", ""
    ),
    "rounding is never wrong": Fault(
        "verification/blocks.py",
        "return np.asarray(np.abs(wide - exact) <= unit(",
        "return np.asarray(np.abs(wide - exact) <= 1e9 + unit(",
    ),
    "a record's own CRC-32": Fault(
        "formats/record.py", "if found is None or int(found.group(1), 16) != zlib.crc32(body):", "if found is None:"
    ),
    "an output over a source": Fault(
        "writing/carrying_out.py",
        "if real == home or home in real.parents or real in home.parents:",
        "if real == home or home in real.parents:",
    ),
}


def problems() -> list[str]:
    """The faults whose line is not there, or there more than once."""
    return [
        f"{name}: {count} times in {fault.file}"
        for name, fault in FAULTS.items()
        if (count := (ROOT / "fusectl" / fault.file).read_text(encoding="utf-8").count(fault.right)) != 1
    ]


def found_by(fault: Fault) -> tuple[str, float]:
    """The test that fails first, or nothing, and after how many seconds."""
    with tempfile.TemporaryDirectory() as home:
        copy = Path(home) / "fusectl"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache"))
        file = copy / "fusectl" / fault.file
        text = file.read_text(encoding="utf-8")
        assert text.count(fault.right) == 1, fault.right
        file.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")
        began = time.monotonic()
        # The tests of its own room first, which find most in a tenth of the time.
        for tests in ([f"tests/{fault.file.partition('/')[0]}"], []):
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-rf", *ABOUT_THESE, *tests],
                cwd=copy,
                capture_output=True,
                text=True,
                check=False,
            )
            failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            # A run that ends otherwise, for want of tests or memory, has found nothing.
            assert failed or done.returncode == 0, done.stdout[-500:]
            if failed:
                return failed[0], time.monotonic() - began
    return "", time.monotonic() - began


def main() -> int:
    survived = []
    for name in sys.argv[1:] or FAULTS:
        test, took = found_by(FAULTS[name])
        print(f"{name}: {test or 'NOT FOUND'} ({took:.0f} s)", flush=True)
        survived += [] if test else [name]
    print(f"{len(survived)} not found")
    return bool(survived)


if __name__ == "__main__":
    sys.exit(main())
