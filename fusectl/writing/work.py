"""What every unit of work needs, and reading the sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from fusectl.errors import Corrupt
from fusectl.formats.tree import Checkpoint
from fusectl.formats.zarr import nonfinite_at
from fusectl.layout.blocks import Mean, Region, Term, chunk_at
from fusectl.layout.fill import Fill
from fusectl.system.lru import Cache
from fusectl.writing.axis_matrices import Matrices


Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Work:
    """What every tile needs: the sources, the fill, what may pass, and the kernels that were measured before."""

    sources: Sequence[Checkpoint]
    fill: Fill
    allow_nonfinite: bool = False
    # Whether chunks that are taken over are read, to notice what is corrupt or not finite.
    check: bool = True
    stds: Mapping[tuple[Term, int | None], Array] = field(default_factory=dict)
    # And the means that products are made of, in float64.
    means: Mapping[Mean, Array] = field(default_factory=dict)
    # The CRC-32 of the sources' chunks that have been checked: a self-fusion takes each several times.
    checked: dict[tuple[int, str, tuple[int, ...]], str] = field(default_factory=dict)
    # The matrices that axes are expanded with.
    matrices: Matrices = field(default_factory=lambda: Matrices((), 0))
    # And parts of kernels that were, for the layers that are made from the same ones.
    mapped: Cache = field(default_factory=lambda: Cache(0))


def read_finite(work: Work, term: Term, region: Region) -> Array:
    """The values of a source region; raises Corrupt for a NaN or Inf among them, unless they may pass."""
    source = work.sources[term.source]
    values = source.read(term.tensor, region)
    if not work.allow_nonfinite:
        at = nonfinite_at(values)
        if at is not None:
            index = [r.start + i for r, i in zip(region, at, strict=True)]
            raise Corrupt(
                f"{source.path}: {term.tensor}{index} is {values[at]}",
                details=("a NaN or Inf spreads through the zero blocks (0 * NaN is NaN) into every other source",),
                hint="--allow-nonfinite fuses it all the same",
            )
    return values


def source_chunk(sources: Sequence[Checkpoint], term: Term, index: tuple[int, ...]) -> Array:
    """The values of a source's stored chunk that is taken over, cut at the tensor's edge."""
    source = sources[term.source]
    leaf = source.leaves[term.tensor]
    assert leaf.stored is not None
    return source.read(term.tensor, chunk_at(index, leaf.stored.storage.chunks, leaf.shape))
