"""The papers' experiments at small sizes, against a baseline that is tuned as well: `fusectl reproduce`.

texts.py        what is trained on                 presets.py      how large, how long, how often
laboratory.py   models trained and grown, kept     arms.py         sweeps, and the baseline of the same compute
experiments.py  which models each compares         report.py       tables, curves, what was found
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fusectl.errors import UsageError
from fusectl.research.kinds import Experiment


@dataclass(frozen=True)
class Reproduced:
    """An experiment that has been run: what it found, a sentence each, and the files of its report."""

    experiment: str
    found: tuple[str, ...]
    files: tuple[Path, ...]


def reproduce(experiment: str, preset: str, out: Path, note: Callable[[str], None]) -> Reproduced:
    """Runs an experiment in a directory, as far as that has not been done, and writes its report there.

    Raises UsageError for names of experiments and presets that there are none of; NotFound where matplotlib is missing;
    OutputExists where another process runs one there.
    """
    _prepare(preset)
    import jax

    import fusectl
    from fusectl.research.pictures import require_picture
    from fusectl.research.reproduce.experiments import EXPERIMENTS
    from fusectl.research.reproduce.laboratory import Laboratory, Model
    from fusectl.research.reproduce.presets import PRESETS

    for name, known, what in ((experiment, EXPERIMENTS, "experiment"), (preset, PRESETS, "preset")):
        if name not in known:
            raise UsageError(f"{name}: no such {what}", hint=f"one of {', '.join(known)}")
    # This is asked before hours of training, and not when the curves are to be drawn.
    require_picture(Path("curves.png"), "reproduce")
    chosen = PRESETS[preset]
    device = jax.devices()[0]
    laboratory = Laboratory(out, chosen, note, _jobs())
    with _alone(laboratory.out):
        report = EXPERIMENTS[Experiment(experiment)](laboratory)
    circumstances = (
        (
            f"`fusectl reproduce {experiment} --preset {preset}`, fusectl {fusectl.__version__}, "
            f"{time.strftime('%Y-%m-%d')}."
        ),
        (
            f"{len(jax.devices())} x {device.device_kind}, {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"JAX {jax.__version__}."
        ),
        (
            f"Data: {laboratory.examples(Model('small', 0, 1.0, 0)).says}, the standard library of that Python; span "
            f"corruption of bytes, rows of {chosen.lengths[0]} and {chosen.lengths[1]}, {chosen.batch} at a time. Of "
            "what is held out every other batch chooses the rates; losses are those of the others."
        ),
        (
            f"T5 1.1, small: width {chosen.width}, {chosen.heads} heads of {chosen.head_dim}, {chosen.layers} + "
            f"{chosen.layers} layers; medium and large twice and four times as wide. Adafactor, the rate a factor by "
            f"1 / sqrt(max(step, {chosen.warmup:,})); factors {', '.join(f'{base:g}' for base in chosen.bases)}, each "
            "tried on the first seed by every arm and on all seeds by the baseline, then twice or half of the last one "
            "while that was the best."
        ),
        f"Seeds 0 to {chosen.seeds - 1}; in brackets the least and the most of them. FLOPs as XLA counts them.",
    )
    return Reproduced(experiment, report.found, tuple(report.write(out, circumstances)))


def _jobs() -> int:
    """How many models are trained side by side: a core each, or one over all devices.

    Where each of several programs waits for all devices, they wait for each other, and XLA aborts.
    """
    import jax

    return (os.cpu_count() or 1) if [each.platform for each in jax.devices()] == ["cpu"] else 1


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keeps other processes from running experiments in a directory."""
    from fusectl.formats.staging import require_alone

    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        require_alone(lock, f"{directory}: another process runs an experiment in it")
        yield
    finally:
        os.close(lock)


def _prepare(preset: str) -> None:
    """Runs of small models go side by side, a core each: XLA's threads would only wait for each other."""
    if preset == "gpu":
        # LiGO's learning is a process of its own, and needs some of the memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    elif "jax" not in sys.modules:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
