"""Trees of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


# Larger than the index or the record of any checkpoint; in memory each entry takes about a hundred bytes.
MOST_ENTRIES = 2_000_000


def parsed(raw: bytes) -> Any:
    """The tree that a JSON text is; raises ValueError for what is none, or would take gigabytes of memory.

    RecursionError is raised for one that is too deep.
    """
    entries = sum(map(raw.count, (b",", b"[", b"{")))
    if entries > MOST_ENTRIES:
        raise ValueError(f"more than {MOST_ENTRIES:,} entries")
    return json.loads(raw)


def finite(value: Any) -> Any:
    """The same tree for JSON, which has no NaN: a number that is none is null."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
