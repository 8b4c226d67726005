"""What a checkpoint is, from its metadata alone: format, family, step, sizes, optimizer, and every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fusectl.errors import Corrupt, Incompatible, counted, shorten
from fusectl.families.naming import namings_of
from fusectl.families.recognition import match, nearest_row
from fusectl.families.recognized import Recognized
from fusectl.families.registry import family_named
from fusectl.families.table import Family, Row
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.registry import FORMATS
from fusectl.formats.tree import Checkpoint
from fusectl.optimizer.registry import find_state
from fusectl.optimizer.state import OptimizerState
from fusectl.optimizer.unknown import Unknown
from fusectl.sources.lineage import Lineage, remembered
from fusectl.sources.opened import recognized
from fusectl.sources.packed_qkv import unpacked


@dataclass(frozen=True)
class Inspection:
    """An opened checkpoint and what its tree turned out to be. `tree` is None when no family's table describes it.

    `rows` are those that took its tensors, by their full names: of the family that was asked for also where its table
    does not describe all of them, as `refused` says. `nearest` has the patterns that come nearest to the others' names.
    """

    checkpoint: Checkpoint
    tree: Recognized | None
    unrecognized: tuple[str, ...]
    state: OptimizerState
    missing: tuple[str, ...]
    rows: Mapping[str, Row] = field(default_factory=dict)
    nearest: Mapping[str, str] = field(default_factory=dict)
    refused: Incompatible | None = None

    def require_recognized(self) -> None:
        """Raises Incompatible when it is not of the family that was asked for."""
        if self.refused is not None:
            raise self.refused

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
                "sources": [source.path for source in record.sources or record.made_from],
                "weights": list(record.weights),
                "widths": {axis: list(sizes) for axis, sizes in record.widths.items()},
                "norm_groups": list(record.norm_groups),
                "fill": {"kind": record.fill.kind, "noise_scale": record.fill.noise_scale, "seed": record.fill.seed},
            },
            "nodes": [
                {"name": node.name, "type": node.value_type, **({"text": node.text} if node.text is not None else {})}
                for node in checkpoint.nodes
            ],
            "missing_chunks": list(self.missing),
            "tensors": [
                {
                    "name": leaf.name,
                    "row": self.rows[leaf.name].pattern if leaf.name in self.rows else None,
                    **({"nearest_row": self.nearest[leaf.name]} if leaf.name in self.nearest else {}),
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
        row = self.rows.get(name)
        return row.spec.axes if row else None


def inspect(path: str, arch: str | None = None, lineage: Lineage | None = None) -> Inspection:
    """The Inspection of a checkpoint; a tree of no known family, or not of that of `arch`, is described all the same.

    `lineage` says what it was trained on from.

    Raises Incompatible where no family is called `arch`.
    """
    checkpoint = remembered(open_checkpoint(path), lineage)
    apart = unpacked(checkpoint)
    family = family_named(arch) if arch else None
    missing = tuple(chunk for name in checkpoint.leaves for chunk in checkpoint.missing_chunks(name))
    unknown = Unknown()
    try:
        tree = recognized(apart, family)
    except Incompatible as error:
        seen = Inspection(checkpoint, None, error.details, unknown, missing)
        # A tree that is refused is described all the same: with --arch, which row took which tensor shows where a table
        # is wrong.
        return seen if family is None else _matched(seen, family, error)
    try:
        state = find_state(apart.shapes, tree, checkpoint.path)
    except Incompatible:
        state = unknown
    return Inspection(checkpoint, tree, (), state, missing, {tree.full(name): row for name, row in tree.rows.items()})


def _matched(seen: Inspection, family: Family, refused: Incompatible) -> Inspection:
    """An inspection with the rows of a family's table that its tensors fall under, though not all do."""
    shapes = seen.checkpoint.shapes
    matched = [(naming, *match(family, naming.parameters(shapes))) for naming in namings_of(shapes)]
    # What trainers put around names is not known while the family is not: the naming by which most rows match is the
    # one.
    naming, rows, _ = max(matched, key=lambda each: len(each[1]))
    nearest = {naming.full(n): nearest_row(family, n) for n in naming.parameters(shapes) if n not in rows}
    return replace(seen, rows={naming.full(n): row for n, row in rows.items()}, nearest=nearest, refused=refused)
