"""What the checks of several kinds share: arrays compared byte by byte, and what two records say of one model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.families.kinds import Norm
from fusectl.formats.record import Record
from fusectl.formats.tree import Checkpoint
from fusectl.layout.fill import FillKind


# Both sides, the cast one and a mask.
BYTES_PER_VALUE = 24
# What the record of a copy, or of a model that is grown, says as its source's does.
_OF_THE_MODEL = ("weights", "widths", "norm", "norm_groups", "residual_scales", "factor_in")


def count_differing(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> int:
    """How many values of two arrays of one shape and dtype are not the same bytes.

    >>> count_differing(np.array([np.nan, 0.0, 1.0]), np.array([np.nan, -0.0, 1.0]))
    1
    """
    # Values would not do: a NaN is not equal to itself, and -0.0 is equal to 0.0.
    one, other = (np.ascontiguousarray(each).reshape(-1).view(np.uint8) for each in (found, expected))
    return int(np.count_nonzero((one != other).reshape(found.size, -1).any(axis=1)))


def of_another_model(record: Record, source: Checkpoint) -> Iterator[str]:
    """What a record says of the model, and that of its source does not."""
    theirs = source.record
    if theirs is None:
        if record.fused or record.norm != Norm.RULE or record.fill.kind is not FillKind.ZEROS:
            yield f"{source.path} has no record of a fusion, as this one has"
        return
    for what in _OF_THE_MODEL:
        if getattr(record, what) != getattr(theirs, what):
            yield f"the record's {what}: {getattr(record, what)}, not {getattr(theirs, what)}"
    if replace(record.fill, seed=None) != replace(theirs.fill, seed=None):
        yield f"the record's fill: {record.fill}, not {theirs.fill}"
