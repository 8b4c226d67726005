"""What the records of several operations have in common."""

from __future__ import annotations

from dataclasses import replace

import fusectl
from fusectl.formats.opening import fingerprint
from fusectl.formats.record import Record
from fusectl.rules.fusion import widths_of
from fusectl.sources.opened import Opened
from fusectl.verbs import SourceRecord


def own_record(opened: Opened, command: str) -> Record:
    """What a record says of a source's own model: what its own does, or that it is no fusion."""
    own, tree = opened.checkpoint.record, opened.tree
    if own is None:
        own = Record(
            widths=widths_of([tree]),
            norm_groups=opened.norm_groups,
            network=tree.network,
            factor_in=tree.family.factor_in,
        )
    return replace(
        own,
        version=fusectl.__version__,
        command=command,
        family=tree.family.name or own.family,
        table=tree.family.table if tree.family.name else own.table,
        tensors={},
        files={},
    )


def source_record(opened: Opened) -> SourceRecord:
    """What a record says of a checkpoint that went in."""
    checkpoint = opened.checkpoint
    return SourceRecord(
        checkpoint.path, checkpoint.format, checkpoint.step, fingerprint(checkpoint), opened.norm_groups
    )
