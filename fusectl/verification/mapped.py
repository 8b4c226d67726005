"""A checkpoint that a growth operator has made: every tensor against a dense application of the operator.

In float64, tensor by tensor, by the paper's formula: Omega_j = A_j W_j B_j^T, W'_l = sum_j w_lj Omega_j. What is
multiplied with what is worked out anew from axes and roles, the duals come from another factorisation. The planner,
the executor and what learning computes have no part in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.errors import NotFound
from fusectl.families.table import Row, stack_of
from fusectl.formats.opening import fingerprint, open_checkpoint
from fusectl.formats.tree import Checkpoint
from fusectl.formats.zarr import epsilon
from fusectl.layout.blocks import Region, whole
from fusectl.sources.operator import CUSTOM
from fusectl.system.lru import Cache
from fusectl.system.threads import Progress
from fusectl.verbs import Mapped
from fusectl.verification.claim import Declared
from fusectl.verification.grown import Grown, open_grown, report_on, require_no_trace
from fusectl.verification.report import Report, WeightsResult
from fusectl.verification.settings import Settings


Array = npt.NDArray[Any]
# What float64 may lose on the way, relative to a tensor's largest value.
RELATIVE = 1e-11
# Of the elements of a table that are multiplied at once.
TABLE_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Enlarged(Grown):
    """A mapped checkpoint and its source."""

    made: Mapped


def check(fused: Checkpoint, declared: Declared, settings: Settings, progress: Progress, report: Report) -> Report:
    """The report on a checkpoint that an operator has made."""
    if report.damaged:
        return report
    require_no_trace(settings)
    grown = open_grown(Enlarged, fused, declared)
    operator = find_operator(grown)
    learned = "" if operator is None else held_out(operator)
    weigh = partial(check_linear, grown, operator, budget_bytes=settings.read_bytes, progress=progress)
    return report_on(grown, weigh, settings, progress, report, (learned,) if learned else ())


def find_operator(grown: Enlarged) -> Checkpoint | None:
    """The operator that made a checkpoint, opened; None where it was not kept, or is not there any more."""
    if grown.made.operator is None:
        return None
    try:
        return open_checkpoint(grown.made.operator)
    except NotFound:
        return None


def held_out(operator: Checkpoint) -> str:
    """What learning an operator has measured on data that it was not learned from, in words; nothing where it was not
    learned.
    """
    about = operator.custom.get(CUSTOM)
    losses = about.get("held_out") if isinstance(about, Mapping) else None
    if not isinstance(losses, Mapping):
        return ""
    said = (f"{name} {value:.4f}" for name, value in losses.items() if isinstance(value, float))
    return f"held-out losses when it was learned: {', '.join(said)}"


def check_linear(
    grown: Enlarged, operator: Checkpoint | None, *, budget_bytes: int, progress: Progress
) -> WeightsResult:
    """Compares every tensor with the operator's, to the rounding of its dtype; raises NotFound without the operator."""
    if operator is None:
        raise NotFound(
            f"the operator {grown.made.operator} is not there any more", hint="move it back, beside what it grew"
        )
    dense = _Dense(grown, operator, budget_bytes)
    problems = [
        f"{each.path} has changed since it was used"
        for each, digest in (
            (operator, grown.made.operator_fingerprint),
            (grown.source, grown.made.source.fingerprint),
        )
        if fingerprint(each) != digest
    ]
    # All layers of a kind one after the other.
    kinds = {name: row.alternative(name) or name for name, row in grown.tree.rows.items()}
    names = [name for name in sorted(kinds, key=kinds.__getitem__) if grown.tree.full(name) in grown.fused.leaves]
    wanted = {grown.tree.full(name) for name in dense.wanted()}
    problems += [f"{name}: missing" for name in sorted(wanted - grown.fused.leaves.keys())]
    progress.start("applying the operator", sum(grown.fused.leaves[grown.tree.full(name)].nbytes for name in names))
    read = 0
    for name in names:
        leaf = grown.fused.leaves[grown.tree.full(name)]
        off = 0
        for region in _tiles(grown.tree.rows[name], leaf.shape):
            found = grown.fused.read(leaf.name, region).astype(np.float64)
            expected = dense.expected(name, region)
            if expected.shape != found.shape:
                problems.append(f"{name}: shape {list(leaf.shape)}, expected {list(expected.shape)}")
                break
            # The second part is for values that nearly cancel, whose error goes by the sizes of what is added up.
            limit = epsilon(leaf.dtype) * np.abs(expected) + RELATIVE * np.abs(expected).max(initial=0.0)
            # A NaN is never below a limit.
            off += int(np.count_nonzero(~(np.abs(found - expected) <= limit)))
        if off:
            problems.append(f"{name}: {off:,} values are not what the operator makes of {grown.source.path}")
        read += leaf.nbytes
        progress.advance(name, leaf.nbytes)
    return WeightsResult(not problems, len(names), len(names), 0, 0, tuple(problems), bytes_read=read)


def _tiles(row: Row, shape: tuple[int, ...]) -> Iterator[Region]:
    """A table in parts along the vocabulary, which nothing is multiplied with; any other tensor whole."""
    if "vocab" not in row.spec.axes:
        yield whole(shape)
        return
    axis = row.spec.axes.index("vocab")
    edge = max(1, TABLE_ELEMENTS // max(1, int(np.prod(shape)) // shape[axis]))
    for start in range(0, shape[axis], edge):
        yield (*whole(shape[:axis]), range(start, min(start + edge, shape[axis])), *whole(shape[axis + 1 :]))


@dataclass
class _Dense:
    """The operator applied densely."""

    grown: Grown
    operator: Checkpoint
    budget_bytes: int

    def __post_init__(self) -> None:
        self._cache = Cache(self.budget_bytes)

    def wanted(self) -> Iterator[str]:
        """The parameters that the grown model should have: each kind as often as it has layers."""
        sizes, grown = self.grown.tree.sizes, self.grown
        depths = {stack: self._depth(stack) for stack in grown.source_tree.depths}
        yield from grown.source_tree.resized(sizes, depths).shapes

    def _depth(self, stack: str) -> int:
        weights = [name for name in self.operator.leaves if name.startswith(f"{stack}/depth/")]
        return self.operator.leaves[weights[0]].shape[0] if weights else self.grown.source_tree.depths[stack]

    def expected(self, name: str, region: Region) -> Array:
        """What stands in a region of a tensor; the region is cut along the vocabulary alone."""
        row, stack, network = self.grown.tree.rows[name], stack_of(name), self.grown.source_tree.network
        one = 1.0 if network.norm_adds_one and row.role.endswith("_norm") else 0.0
        axes = row.spec.axes
        layers = list(self.grown.tree.layers_of(name)) if row.is_of_layers(name) else [None]
        by_layer = []
        for layer in layers:
            kernels = []
            for role in row.roles:
                total: Array | float = 0.0
                for j, weight in self._weights(stack, role, layer):
                    # Every layer of a kind is made from the same ones.
                    key = (stack, role, j, region if j is None else None)
                    total = total + weight * self._cache.get(key, partial(self._omega, name, role, j, region, one))
                kernels.append(np.asarray(total) * self._factor(row, role) - one)
            beside = [axis for axis in axes if axis != "layers"]
            by_layer.append(np.stack(kernels, beside.index("stack")) if "stack" in axes else kernels[0])
        return np.stack(by_layer, axes.index("layers")) if "layers" in axes else np.asarray(by_layer[0])

    def _omega(self, name: str, role: str, layer: int | None, region: Region, one: float) -> Array:
        """A kernel of the small model with all axes as long as the grown one's."""
        row, stack = self.grown.tree.rows[name], stack_of(name)
        source, axes = self._kernel(name, stack, role, layer, region)
        values = source + one
        for at, axis in enumerate(axes):
            matrix = self._matrix(axis, role, stack, layer, reads=axis in row.spec.inputs)
            if matrix is not None:
                values = np.moveaxis(np.tensordot(matrix, values, (1, at)), 0, at)
        return values

    def _weights(self, stack: str, role: str, layer: int | None) -> list[tuple[int | None, float]]:
        name = f"{stack}/depth/{role.removesuffix('_bias')}"
        if layer is None or name not in self.operator.leaves:
            return [(layer, 1.0)]
        # A layer of nothing has a shape, too.
        return [(j, float(w)) for j, w in enumerate(self._read(name)[layer]) if w] or [(0, 0.0)]

    def _kernel(
        self, name: str, stack: str, role: str, layer: int | None, region: Region
    ) -> tuple[Array, tuple[str, ...]]:
        """The small model's kernel of a role and a layer, and its axes."""
        tree = self.grown.source_tree
        for other, row in tree.rows.items():
            of_layer = (
                layer in tree.layers_of(other) if row.is_of_layers(other) and layer is not None else other == name
            )
            if stack_of(other) != stack or role not in row.roles or not of_layer:
                continue
            at = list(whole(tree.shapes[other]))
            axes = list(row.spec.axes)
            if "vocab" in axes:
                at[axes.index("vocab")] = region[axes.index("vocab")]
            if "layers" in axes:
                place = tree.layers_of(other).index(layer or 0)
                at[axes.index("layers")] = range(place, place + 1)
            if "stack" in axes:
                at[axes.index("stack")] = range(row.roles.index(role), row.roles.index(role) + 1)
            values = self.grown.source.read(tree.full(other), tuple(at)).astype(np.float64)
            stacked = tuple(axes.index(axis) for axis in ("layers", "stack") if axis in axes)
            return values.squeeze(stacked), tuple(axis for axis in axes if axis not in {"layers", "stack"})
        raise AssertionError(f"{role} of layer {layer}")

    def _matrix(self, axis: str, role: str, stack: str, layer: int | None, *, reads: bool) -> Array | None:
        """What an axis is multiplied with, (large, small); None for one that stays as it is."""
        pinv = self._about["tie"] == "pinv"
        now, then = (self.grown.source_tree.sizes, self.grown.tree.sizes)
        if now.get(axis) == then.get(axis):
            return None
        name, repeat = axis, 1
        if axis == "embed" and role.endswith("_norm") and pinv:
            name = f"{stack}/final_norm" if role == "final_norm" else "norm"
        elif axis == "mlp":
            name = f"{stack}/mlp"
        elif axis in {"heads", "kv_heads", "joined_kv"}:
            cross = "cross_" if role.startswith("cross_") else ""
            part = role.removeprefix("cross_").removesuffix("_bias")
            name = f"{stack}/{cross}{'value' if part == 'out' else part}"
            grouped = axis == "heads" and part == "out" and "kv_heads" in now
            repeat = now["heads"] // now["kv_heads"] if grouped else 1
            repeat = now["joined_kv"] // now["heads"] if axis == "joined_kv" else repeat
        elif axis != "embed":
            return None
        index = layer if len(self.operator.leaves[name].shape) == 3 else None
        inverted = reads and pinv
        return self._cache.get((name, index, repeat, inverted), partial(self._made, name, index, repeat, inverted))

    def _made(self, name: str, index: int | None, repeat: int, inverted: bool) -> Array:
        matrix = self._read(name) if index is None else self._read(name)[index]
        if inverted:
            # A^T with A^T B = 1, from the triangles of B: another way than the executor's, and faster than by SVD.
            q, triangle = np.linalg.qr(matrix)
            matrix = np.linalg.solve(triangle, q.T).T
        return np.kron(matrix, np.eye(repeat)) if repeat > 1 else matrix

    def _factor(self, row: Row, role: str) -> float:
        """What the network's own powers of the width make of embeddings, and of the norm before a tied head."""
        network, part = self.grown.source_tree.network, self._part
        if role == "embedding":
            return float(part**network.embedding_power)
        paper = self._about["tie"] == "paper"
        before_tied = row.before_head and self.grown.source_tree.family.tied
        return float(part ** (network.tied_logits_power - network.embedding_power)) if before_tied and paper else 1.0

    @property
    def _part(self) -> float:
        return float(self.grown.source_tree.sizes["embed"] / self.grown.tree.sizes["embed"])

    @property
    def _about(self) -> Any:
        return self.operator.custom[CUSTOM]

    def _read(self, name: str) -> Array:
        return self._cache.get(name, lambda: self.operator.read(name).astype(np.float64))
