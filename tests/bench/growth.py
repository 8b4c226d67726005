"""What growing a small T5 is worth against training the large one from scratch, at equal compute. An experiment.

    python tests/bench/growth.py --out runs            (resumable: what is in runs is not done again)
    python tests/bench/growth.py --out runs --report   (the table and the picture of what is there)

A T5 1.1 of two and two layers is trained on the text of Python's standard library (bytes), then grown to twice the
width and twice the depth by fusectl's own commands, and trained on: by self-fusion, by stacking, by lossless
duplication, by LiGO (its steps are charged). The same large model is trained from scratch. Every arm has the learning
rate that did best on the first seed, of the same few; the report says what the small model's own training adds.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusectl.archs import Recognized, family_named, recognize
from fusectl.cli import run
from fusectl.demo import parameter_shapes
from fusectl.examples import read_examples
from fusectl.formats import open_checkpoint
from fusectl.formats.sink import save
from fusectl.ligo.learn import random_parameters
from fusectl.training import Recipe, Trained, train


FAMILY = "t5-1.1"
PREFIX = "target/"
SMALL = {"vocab": 384, "embed": 64, "heads": 4, "joined_kv": 64, "mlp": 128, "relpos_buckets": 32}
LARGE = {**SMALL, "embed": 128, "heads": 8, "joined_kv": 128, "mlp": 256}
DEPTHS, DEEPER = {"encoder": 2, "decoder": 2}, {"encoder": 4, "decoder": 4}
SIZES = ["--emb", "128", "--heads", "8", "--mlp", "256", "--layers", "4"]
LENGTHS = (128, 32)
BATCH = 16
RATES = (1e-3, 2e-3, 4e-3)
ARMS = ("scratch", "self-fuse", "stack", "duplicate", "ligo")


@dataclass(frozen=True)
class Experiment:
    """How long everything takes, and where it is kept."""

    out: Path
    small_steps: int
    large_steps: int
    ligo_steps: int
    seeds: int

    def text(self) -> Path:
        """The text: the modules of the standard library in one file, in the order of their names."""
        file = self.out / "stdlib.txt"
        if not file.exists():
            modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
            file.write_bytes(b"\n".join(module.read_bytes() for module in modules))
        return file

    def examples(self, seed: int):
        """Span corruption over that text."""
        return read_examples(
            str(self.text()), vocab=384, objective="span_corruption", batch=BATCH, lengths=LENGTHS, seed=seed
        )

    def small(self, seed: int) -> Path:
        """The small model of a seed, at its best rate."""
        return self.trained_small(seed, self.small_rate())[0]

    def small_rate(self) -> float:
        """The rate that is best for the small model on the first seed."""
        return min(RATES, key=lambda rate: self.trained_small(0, rate)[1]["curve"][-1][1])

    def trained_small(self, seed: int, rate: float) -> tuple[Path, dict]:
        """The small model of a seed and its curve."""
        path = self.out / f"small-{seed}-{rate:g}" / "checkpoint_1"
        notes = path.parent / "curve.json"
        if not notes.exists():
            tree = tree_of(SMALL, DEPTHS)
            found = train(tree, random_parameters(tree, seed), self.examples(seed), Recipe(rate, self.small_steps))
            write(path, found)
            notes.write_text(json.dumps({"curve": found.curve, "flops": found.flops_per_step}))
        return path, json.loads(notes.read_text())

    def grown(self, arm: str, seed: int) -> Path | None:
        """The large model that an arm starts from, by fusectl's own commands; none for scratch."""
        if arm == "scratch":
            return None
        small, out = str(self.small(seed)), self.out / f"{arm}-{seed}" / "checkpoint_1"
        if out.exists():
            return out
        wide = str(out.with_name("wide_1"))
        twice = ["self-fuse", small, "--copies", "2", "--fill", "antisymmetric", "-o", wide, "--force"]
        learning = ["--data", str(self.text()), "--steps", str(self.ligo_steps), "--batch", str(BATCH)]
        learning += ["--length", str(LENGTHS[0]), "--target-length", str(LENGTHS[1])]
        commands = {
            "self-fuse": [twice, ["stack", wide, "--layers", "4", "--how", "identity", "-o", str(out)]],
            "stack": [twice, ["stack", wide, "--layers", "4", "--how", "stack", "-o", str(out)]],
            "duplicate": [["ligo", small, *SIZES, "--steps", "0", "-o", str(out), "--force"]],
            "ligo": [["ligo", small, *SIZES, *learning, "--seed", str(seed), "-o", str(out), "--force"]],
        }[arm]
        for words in commands:
            assert run([*words, "-q"]) == 0, words
        return out

    def result(self, arm: str, seed: int, rate: float) -> dict:
        """The curve of an arm."""
        notes = self.out / f"{arm}-{seed}-{rate:g}.json"
        if not notes.exists():
            tree, start = tree_of(LARGE, DEEPER), self.grown(arm, seed)
            parameters = random_parameters(tree, seed) if start is None else read(start, tree)
            # Other batches than the small model has seen first.
            found = train(
                tree,
                parameters,
                self.examples(1000 + seed),
                Recipe(rate, self.large_steps),
                measure_every=max(1, self.large_steps // 20),
            )
            notes.write_text(json.dumps({"curve": found.curve, "flops": found.flops_per_step}))
        return json.loads(notes.read_text())

    def best_rate(self, arm: str) -> float:
        """The rate that does best on the first seed."""
        return min(RATES, key=lambda rate: self.result(arm, 0, rate)["curve"][-1][1])


def tree_of(sizes: dict[str, int], depths: dict[str, int]) -> Recognized:
    """The tree of a T5 of these sizes."""
    shapes = {PREFIX + name: shape for name, _, shape in parameter_shapes(family_named(FAMILY), sizes, depths)}
    return recognize(shapes, "the experiment's model", FAMILY)


def write(path: Path, found: Trained) -> None:
    """Writes a model as T5X does, without a state."""
    values = {PREFIX + name: np.asarray(each) for name, each in found.parameters.items()}
    save(path, {**values, "state/step": np.array(1, np.int32)}, "t5x")


def read(path: Path, tree: Recognized) -> dict[str, np.ndarray]:
    """The parameters of a checkpoint."""
    checkpoint = open_checkpoint(str(path))
    return {name: checkpoint.read(tree.full(name)) for name in tree.shapes}


def report(experiment: Experiment) -> None:
    """Prints the table, and draws the curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    steps_axes, compute_axes = figure.subplots(1, 2, sharey=True)
    rate = experiment.small_rate()
    small = [experiment.trained_small(seed, rate)[1] for seed in range(experiment.seeds)]
    small_flops = small[0]["flops"] * experiment.small_steps
    print(f"small model: {mean([each['curve'][-1][1] for each in small])}, {small_flops:.3g} FLOPs each")
    for color, arm in enumerate(ARMS):
        rate = experiment.best_rate(arm)
        found = [experiment.result(arm, seed, rate) for seed in range(experiment.seeds)]
        flops = found[0]["flops"]
        charged = (0.0 if arm == "scratch" else small_flops) + flops * experiment.ligo_steps * (arm == "ligo")
        losses = np.array([[value for _, value in each["curve"]] for each in found])
        steps = np.array([step for step, _ in found[0]["curve"]])
        print(
            f"{arm:10} rate {rate:g}, start {mean(losses[:, 0])}, end {mean(losses[:, -1])}, "
            f"{flops * experiment.large_steps:.3g} FLOPs, {charged:.3g} before"
        )
        line = {"color": f"C{color}", "label": arm}
        steps_axes.plot(steps[1:], losses.mean(axis=0)[1:], **line)
        compute_axes.plot((charged + steps * flops)[1:], losses.mean(axis=0)[1:], **line)
    steps_axes.set(xlabel="steps of the large model", ylabel="held-out loss, nats for a token", title="not charged")
    compute_axes.set(xlabel="FLOPs, the small model's included", title="charged")
    steps_axes.legend()
    figure.savefig(experiment.out / "growth.png", dpi=120)


def mean(values) -> str:
    """The mean of several seeds and their spread."""
    return f"{np.mean(values):.4f} ({np.min(values):.4f} to {np.max(values):.4f})"


def main() -> None:
    """Runs what is not there yet, then reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small-steps", type=int, default=3000)
    parser.add_argument("--large-steps", type=int, default=1500)
    parser.add_argument("--ligo-steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="only of what is there")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(given.out, given.small_steps, given.large_steps, given.ligo_steps, given.seeds)
    for arm in ARMS:
        for seed in range(experiment.seeds):
            experiment.result(arm, seed, experiment.best_rate(arm))
    report(experiment)


if __name__ == "__main__":
    main()
