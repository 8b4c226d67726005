"""What a checkpoint is, from its metadata alone: format, family, step, sizes, optimizer, and every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusectl.archs import Recognized, recognize
from fusectl.errors import Corrupt, Incompatible, counted, shorten
from fusectl.formats import FORMATS, open_checkpoint
from fusectl.formats.tree import Checkpoint
from fusectl.transforms.optimizer import OptimizerState, find_state


@dataclass(frozen=True)
class Inspection:
    """An opened checkpoint and what its tree turned out to be. `tree` is None when no family's table describes it."""

    checkpoint: Checkpoint
    tree: Recognized | None
    unrecognized: tuple[str, ...]
    state: OptimizerState
    missing: tuple[str, ...]

    def require_complete(self) -> None:
        """Raises Corrupt when chunks are missing."""
        if self.missing:
            raise Corrupt(
                f"{self.checkpoint.path}: {counted(len(self.missing), 'chunk')} missing",
                details=shorten(self.missing, 4),
                hint="copy it again whole",
            )

    @property
    def format_says(self) -> str:
        return FORMATS[self.checkpoint.format].says

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.checkpoint.leaves.values())

    def as_json(self) -> Mapping[str, Any]:
        """The inspection as numbers, strings and lists."""
        checkpoint, tree = self.checkpoint, self.tree
        record = checkpoint.record
        return {
            "path": checkpoint.path,
            "format": checkpoint.format,
            "item": checkpoint.location.item,
            "family": tree.family.name if tree else None,
            "evidence": tree.evidence if tree else list(self.unrecognized),
            "step": checkpoint.step,
            "sizes": dict(tree.sizes) if tree else None,
            "layers": dict(tree.depths) if tree else None,
            "parameters": tree.parameters if tree else None,
            "bytes": self.nbytes,
            "optimizer": {"kind": self.state.kind, "slots": len(self.state.names)},
            "fused": None
            if record is None
            else {
                "command": record.command,
                "sources": [source.path for source in record.sources],
                "weights": list(record.weights),
                "widths": {axis: list(sizes) for axis, sizes in record.widths.items()},
                "norm_groups": list(record.norm_groups),
                "fill": {"kind": record.fill.kind, "noise_scale": record.fill.noise_scale, "seed": record.fill.seed},
            },
            "missing_chunks": list(self.missing),
            "tensors": [
                {
                    "name": leaf.name,
                    "axes": list(self.axes(leaf.name) or ()) or None,
                    "shape": list(leaf.shape),
                    "dtype": leaf.dtype,
                    "chunks": list(leaf.stored.chunks) if leaf.stored else None,
                    "codec": leaf.stored.codec if leaf.stored else "index",
                }
                for leaf in checkpoint.leaves.values()
            ],
        }

    def axes(self, name: str) -> tuple[str, ...] | None:
        """The names of a parameter's axes, or None for what the family's table does not describe."""
        if self.tree is None or not name.startswith(self.tree.prefix):
            return None
        row = self.tree.rows.get(name.removeprefix(self.tree.prefix))
        return row.spec.axes if row else None


def inspect(path: str, arch: str | None = None) -> Inspection:
    """The Inspection of a checkpoint; a tree of no known family is described all the same."""
    checkpoint = open_checkpoint(path)
    missing = tuple(chunk for name in checkpoint.leaves for chunk in checkpoint.missing_chunks(name))
    unknown = OptimizerState("unknown", ())
    try:
        tree = recognize(checkpoint.shapes, checkpoint.path, arch)
    except Incompatible as error:
        if arch is not None:
            raise
        return Inspection(checkpoint, None, error.details, unknown, missing)
    try:
        state = find_state(checkpoint.shapes, tree, checkpoint.path)
    except Incompatible:
        state = unknown
    return Inspection(checkpoint, tree, (), state, missing)
