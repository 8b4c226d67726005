"""`fusectl demo`: two small random T5 models as T5X writes them, every operation on them, the proofs in a table."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.errors import OutputExists
from fusectl.families.recognition import recognize
from fusectl.families.registry import family_named
from fusectl.families.table import Family, Row, stack_of
from fusectl.formats.kinds import FormatName
from fusectl.formats.sink import save
from fusectl.layout.fill import Fill, FillKind
from fusectl.operations.fuse import plan_fusion
from fusectl.operations.noise_fill import plan_noise_fill
from fusectl.optimizer.adafactor import Adafactor
from fusectl.optimizer.state import STATE
from fusectl.planning.options import Options
from fusectl.verification import Report, verify
from fusectl.writing.carrying_out import carry_out


SIZES = {"vocab": 384, "embed": 96, "joined_kv": 80, "heads": 5, "mlp": 224, "relpos_buckets": 32}
LAYERS = {"encoder": 3, "decoder": 2}
STEP = 1000


@dataclass(frozen=True)
class DemoRow:
    """One checkpoint of the demo: what was done, where it is, how long it took with its verification, what came out."""

    what: str
    path: Path
    seconds: float
    report: Report


def demo(directory: Path | None, note: Callable[[str], None]) -> list[DemoRow]:
    """Makes the demo's checkpoints in `directory` (or in a temporary one) and verifies each that fusectl wrote."""
    if directory is not None and directory.exists() and any(directory.iterdir()):
        raise OutputExists(f"{directory}: not empty", hint="choose another -o")
    with nullcontext(directory) if directory else tempfile.TemporaryDirectory(prefix="fusectl-demo-") as root:
        at = Path(root)
        a, b = (at / name / f"checkpoint_{STEP}" for name in ("a", "b"))
        for seed, path in enumerate((a, b)):
            save(path, random_t5x_state(family_named("t5-1.1"), SIZES, LAYERS, seed), FormatName.T5X)
        note(f"two random T5 1.1 models of width {SIZES['embed']} in {at}, as T5X writes them")
        two = plan_fusion([str(a), str(b)], Options())
        twice = plan_fusion([str(a)] * 2, Options(), command="self-fuse")
        antisymmetric = Options(fill=Fill(FillKind.ANTISYMMETRIC, 0.2, 0))
        thrice = plan_fusion([str(a)] * 3, antisymmetric, command="self-fuse")
        rows = [
            _row("fuse a b", two, at / "fused" / a.name),
            _row("self-fuse a --copies 2", twice, at / "self-fused" / a.name),
            _row("self-fuse a --copies 3 --fill antisymmetric", thrice, at / "self-fused-3x" / a.name),
        ]
        filled = plan_noise_fill(str(rows[0].path), Options(fill=Fill(FillKind.GAUSSIAN, 0.1, 0)))
        rows.append(_row("fuse a b | noise-fill --noise-scale 0.1", filled, at / "filled" / a.name))
        return rows


def _row(what: str, planned: tuple[Any, Any], output: Path) -> DemoRow:
    started = time.monotonic()
    carry_out(*planned, output)
    report = verify(str(output))
    return DemoRow(what, output, time.monotonic() - started, report)


def random_parameters(
    family: Family, sizes: Mapping[str, int], layers: Mapping[str, int], seed: int
) -> dict[str, npt.NDArray[np.float32]]:
    """A random model of a family, with kernels of unit gain and norm scales that differ: names of the table to float32.

    `layers` gives the depth of each stack.
    """
    rng = np.random.default_rng(seed)
    parameters: dict[str, npt.NDArray[np.float32]] = {}
    added = float(family.network({**sizes, "layers": sum(layers.values())}).norm_adds_one)
    for name, row, shape in parameter_shapes(family, sizes, layers):
        if row.is_norm:
            values = rng.uniform(0.5, 1.5, shape) - added
        else:
            axes = zip(row.spec.axes, shape, strict=True)
            read = [n for axis, n in axes if axis in row.spec.inputs and axis != "vocab"]
            values = rng.normal(0.0, 1.0 / math.sqrt(math.prod(read)), shape)
        parameters[name] = values.astype(np.float32)
    return parameters


def parameter_shapes(
    family: Family, sizes: Mapping[str, int], layers: Mapping[str, int]
) -> Iterator[tuple[str, Row, tuple[int, ...]]]:
    """The parameters of a model of a family: names of the table, their rows and shapes."""
    group = max(row.every for row in family.rows)
    for row in family.rows:
        for alternative in row.alternatives:
            depth = layers.get(stack_of(alternative), 1)
            places = depth % group if row.behind else depth // row.every
            names = [alternative.replace("#", str(i)) for i in range(places)] if "#" in alternative else [alternative]
            counted = {**sizes, "layers": places, "stack": len(row.roles)}
            shape = tuple(counted[axis] for axis in row.spec.axes)
            yield from ((name, row, shape) for name in names)


def random_t5x_state(
    family: Family, sizes: Mapping[str, int], layers: Mapping[str, int], seed: int, *, step: int = STEP
) -> dict[str, npt.NDArray[Any]]:
    """A whole training state as T5X keeps it: `target/…`, Adafactor's slots with positive values, and the step."""
    target = random_parameters(family, sizes, layers, seed)
    state: dict[str, npt.NDArray[Any]] = {f"target/{name}": values for name, values in target.items()}
    tree = recognize({name: values.shape for name, values in state.items()}, family.name, family.name)
    rng = np.random.default_rng(seed + 1_000_000)
    for name, shape in Adafactor(factored=True).fresh(tree, tree.shapes).items():
        used = shape != (1,)
        state[name] = (rng.uniform(1e-6, 1e-4, shape) if used else np.zeros(shape)).astype(np.float32)
    assert all(name.startswith((STATE, "target/")) for name in state)
    state["state/step"] = np.array(step, np.int32)
    return state
