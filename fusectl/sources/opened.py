"""A source: a checkpoint that is opened, recognised, complete, and real-valued."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt

from fusectl.errors import Corrupt, Incompatible, UsageError, counted, shorten
from fusectl.families.config import Config
from fusectl.families.kinds import Norm
from fusectl.families.recognition import configured, recognize
from fusectl.families.recognized import Recognized
from fusectl.families.settings import STORED
from fusectl.families.table import Family
from fusectl.families.userfile import parse_family
from fusectl.formats.opening import open_checkpoint
from fusectl.formats.record import FILE_NAME, Record, norm_groups
from fusectl.formats.tree import Checkpoint, is_dropped, kept_shapes
from fusectl.formats.zarr import is_float, nonfinite_at
from fusectl.sources.lineage import Lineage, remembered, require_groups
from fusectl.sources.packed_qkv import unpacked


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
    def trains_in_groups(self) -> bool:
        """Whether its network has a norm per group."""
        return self.checkpoint.record is not None and self.checkpoint.record.norm == Norm.PROPERTY

    @property
    def norm_groups(self) -> tuple[int, ...]:
        """The widths that its norms are to be taken over for the fusion property; its record knows them."""
        return norm_groups(self.checkpoint.record, self.tree.sizes["embed"]) if self.tree.sizes else ()

    def full(self, parameter: str) -> str:
        """The full name of a parameter in this checkpoint."""
        return self.tree.full(parameter)


def own_family(checkpoint: Checkpoint) -> Family | None:
    """The family whose table a checkpoint's record holds, so that the file that it came from may go.

    None without such a table; raises Corrupt for one that is none.
    """
    if checkpoint.record is None or checkpoint.record.table is None:
        return None
    where = f"{checkpoint.path}/{FILE_NAME}"
    try:
        return parse_family(checkpoint.record.table, where)
    except UsageError as error:
        raise Corrupt(f"{where}: the table of its family cannot be read", details=error.details) from error


def recognized(
    checkpoint: Checkpoint,
    arch: str | Family | None = None,
    drop: Collection[str] = (),
    config: Config | None = None,
) -> Recognized:
    """The tree of an opened checkpoint, what matches `drop` left out: of the family `arch`, else of the one whose table
    its record holds, else of the one that it is recognised as.

    What its network computes is told by the record of one that fusectl wrote, and before that by `config`. Raises
    Incompatible as `recognize` does, and where the config is of another model.
    """
    shapes = kept_shapes(checkpoint.shapes, drop)
    before = checkpoint.record.family if checkpoint.record is not None else None
    tree = with_record(recognize(shapes, checkpoint.path, arch or own_family(checkpoint), before=before), checkpoint)
    require_groups(checkpoint, tree.sizes["embed"])
    if config is None:
        return tree
    own = configured(tree, config, checkpoint.path)
    changed = [
        f"{setting}: {now} by {config.where}, {then} by its {FILE_NAME}"
        for setting, then, now in tree.network.differences(own.network)
        if setting in STORED and tree.told is not None
    ]
    if changed:
        # What it was stored with would be of another network.
        raise Incompatible(f"{checkpoint.path}: fused for another network than the config's", details=changed)
    return own


def open_source(
    path: str,
    arch: str | None = None,
    drop: tuple[str, ...] = (),
    config: Config | None = None,
    lineage: Lineage | None = None,
) -> Opened:
    """The source at a path, ready for planning, as `ready` has it, with what `lineage` says that it was fused from."""
    return ready(remembered(open_checkpoint(path), lineage), arch, drop, config)


def ready(
    checkpoint: Checkpoint, arch: str | None = None, drop: tuple[str, ...] = (), config: Config | None = None
) -> Opened:
    """An opened checkpoint as a source; raises Corrupt if a chunk of it is missing, all of them listed.

    What its network computes is told by `config`, else by the record of one that fusectl wrote. Packed queries, keys
    and values are seen apart.
    """
    # Unpacking comes before recognition, since no family has a row for packed queries, keys and values.
    checkpoint = unpacked(checkpoint)
    dropped = tuple(name for name in checkpoint.leaves if is_dropped(name, drop))
    tree = recognized(checkpoint, arch, drop, config)
    if checkpoint.record is not None:
        require_widths(tree, checkpoint.record, checkpoint.path)
    # Noise, means and factors of a quantised kernel would act on its codes, not on the values that they stand for.
    dtypes = {name: checkpoint.leaves[name].dtype for name in map(tree.full, tree.shapes)}
    integers = [f"{name}: {dtype}" for name, dtype in dtypes.items() if not is_float(dtype)]
    if integers:
        raise Incompatible(f"{checkpoint.path}: parameters that are no real numbers", details=shorten(integers))
    require_chunks(checkpoint, kept_shapes(checkpoint.shapes, drop))
    return Opened(checkpoint, tree, dropped)


def read_finite(checkpoint: Checkpoint, tensor: str) -> npt.NDArray[Any]:
    """The values of a tensor as they are stored; raises Corrupt for a NaN or Inf: no loss of it would be a number."""
    values = checkpoint.read(tensor)
    at = nonfinite_at(values)
    if at is not None:
        raise Corrupt(f"{checkpoint.path}: {tensor}{list(at)} is {values[at]}")
    return values


# A record of another family is of another tree, as where --arch overrules it: its settings would be that one's.
def with_record(tree: Recognized, checkpoint: Checkpoint) -> Recognized:
    """A checkpoint's tree with what its record tells of the network, if it has one of the same family."""
    record = checkpoint.record
    return tree if record is None or record.family != tree.family.name else replace(tree, told=record.network)


def require_chunks(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Raises Corrupt if a chunk of one of these tensors is missing, all of them listed."""
    # T5X's own format restores zeros for a chunk whose file is missing, without a word. In a fusion they would pass for
    # zero blocks.
    missing = [chunk for name in names for chunk in checkpoint.missing_chunks(name)]
    if missing:
        raise Corrupt(
            f"{checkpoint.path}: {counted(len(missing), 'chunk')} missing",
            details=shorten(missing, 5),
            hint="copy it again whole",
        )


def require_widths(tree: Recognized, record: Record, where: str) -> None:
    """Raises Incompatible unless a fused tree is as wide as its record says that its sources are together."""
    if not record.widths:
        # It was copied by someone who did not know its family.
        return
    grown = {axis: n for axis, n in tree.sizes.items() if axis in tree.family.grown}
    wrong = [
        f"axis {axis!r}: {grown.get(axis, 'none')} in {where}, {' + '.join(map(str, sizes)) or 'none'} in its sources"
        for axis in sorted(grown.keys() | record.widths.keys())
        if grown.get(axis) != sum(sizes := record.widths.get(axis, ()))
    ]
    if wrong:
        raise Incompatible(f"{where} is no fusion of these {len(record.weights)} sources", details=wrong)
