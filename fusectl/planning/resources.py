"""The memory that carrying out a plan may take, and what it is for."""

from __future__ import annotations

from dataclasses import dataclass

from fusectl.formats.format import Format


# Each commit to an OCDBT database holds its bytes twice until it is done.
LARGEST_COMMIT_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Resources:
    """Bytes, of which `budget` is all that may be in flight."""

    budget: int
    # Of an OCDBT database: how many are committed at once, and how many it holds of what it has been given.
    commit: int = 0
    pending: int = 0
    # For the matrices that axes are expanded with, for parts of kernels that have been, and for decoded chunks that
    # several tensors are cut from.
    matrices: int = 0
    mapped: int = 0
    cache: int = 0

    @property
    def units(self) -> int:
        """What is left for units of work.

        >>> Resources(budget=100, pending=40, matrices=10).units
        50
        """
        return self.budget - self.pending - self.matrices - self.mapped - self.cache


def resources_of(
    max_memory_bytes: int, out_format: Format, *, matrices: int = 0, mapped: int = 0, cache: int = 0
) -> Resources:
    """The Resources of a plan for a format, of which so many bytes are set apart."""
    commit = min(LARGEST_COMMIT_BYTES, max_memory_bytes // 8)
    # Two commits under way, each of which holds its bytes twice.
    pending = 4 * commit if out_format.ocdbt else 0
    return Resources(max_memory_bytes, commit, pending, matrices, mapped, cache)
