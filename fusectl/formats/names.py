"""What files are called in checkpoints, and directories of steps."""

from __future__ import annotations

import re


T5X_INDEX = "checkpoint"
ORBAX_INDEX = "_METADATA"
# Next to it; that of the first process is all that fusectl reads and writes.
ARRAY_METADATAS = "array_metadatas/process_0"
STRINGS = "_strings.json"
# Orbax before 0.4.3 wrote this index instead, by the name of T5X's; up to 0.5.20 it may hold values next to the other.
PACKED_INDEX = "checkpoint"
STEP_METADATA = "_CHECKPOINT_METADATA"
COMMITTED = "commit_success.txt"
TEMPORARY_SUFFIX = ".fusectl-tmp"
# Marks an unfinished write that can be resumed; removed once the checkpoint has appeared.
JOURNAL = "fusectl-journal.jsonl"
# Who is writing to a place in a bucket.
LEASE = "fusectl-lease.json"

# The names of directories that T5X restores from (t5x/checkpoints_utils.py, get_step_from_checkpoint_dir).
T5X_STEP = re.compile(r"checkpoint_\d+")
STEP = re.compile(r"(?:checkpoint_)?(\d+)$")
# With the `step_prefix` of a manager of Orbax's.
PREFIXED = re.compile(r"(.+)_(\d+)$")


def step_of(name: str) -> int | None:
    """The step that the name of a directory says, as T5X and Orbax name them; None for other names.

    >>> step_of("checkpoint_20"), step_of("20"), step_of("final")
    (20, 20, None)
    """
    found = STEP.fullmatch(name)
    return int(found.group(1)) if found else None
