"""A source: a checkpoint that is opened, recognised, complete, and real-valued."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fusectl.archs import Recognized, recognize
from fusectl.errors import Corrupt, Incompatible, counted, shorten
from fusectl.formats import open_checkpoint
from fusectl.formats.tree import Checkpoint, is_dropped
from fusectl.formats.zarr import is_float
from fusectl.record import norm_groups
from fusectl.transforms.grow import require_widths


@dataclass(frozen=True, eq=False)
class Opened:
    """A source: the checkpoint, its parameters' tree, and which of its tensors are dropped on purpose."""

    checkpoint: Checkpoint
    tree: Recognized
    dropped: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.checkpoint.path

    @property
    def norm_groups(self) -> tuple[int, ...]:
        """The widths that its norms are to be taken over for the fusion property; its record knows them."""
        return norm_groups(self.checkpoint.record, self.tree.sizes["embed"]) if self.tree.sizes else ()

    def full(self, parameter: str) -> str:
        """The full name of a parameter in this checkpoint."""
        return self.tree.full(parameter)


def open_source(path: str, arch: str | None = None, drop: tuple[str, ...] = ()) -> Opened:
    """The source at a path, ready for planning, as `ready` has it."""
    return ready(open_checkpoint(path), arch, drop)


def ready(checkpoint: Checkpoint, arch: str | None = None, drop: tuple[str, ...] = ()) -> Opened:
    """An opened checkpoint as a source; raises Corrupt if a chunk of it is missing, all of them listed."""
    dropped = tuple(name for name in checkpoint.leaves if is_dropped(name, drop))
    shapes = {name: shape for name, shape in checkpoint.shapes.items() if name not in dropped}
    tree = recognize(shapes, checkpoint.path, arch)
    if checkpoint.record is not None:
        require_widths(tree, checkpoint.record, checkpoint.path)
    dtypes = {name: checkpoint.leaves[name].dtype for name in map(tree.full, tree.shapes)}
    integers = [f"{name}: {dtype}" for name, dtype in dtypes.items() if not is_float(dtype)]
    if integers:
        raise Incompatible(f"{checkpoint.path}: parameters that are no real numbers", details=shorten(integers))
    require_chunks(checkpoint, shapes)
    return Opened(checkpoint, tree, dropped)


def require_chunks(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Raises Corrupt if a chunk of one of these tensors is missing, all of them listed."""
    missing = [chunk for name in names for chunk in checkpoint.missing_chunks(name)]
    if missing:
        raise Corrupt(
            f"{checkpoint.path}: {counted(len(missing), 'chunk')} missing",
            details=shorten(missing, 5),
            hint="copy it again whole",
        )
