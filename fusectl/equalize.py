"""Making the sources' residual streams equally large, so that one norm over all of them mixes them less.

The embedding and all output projections of a pre-norm model times one constant: every norm divides by it again, so that
the model keeps its function, up to the epsilon in its norms. One norm over two streams of which one is r times as large
multiplies the smaller with sqrt(2 / (1 + r**2)) and the larger with r times as much; equal streams keep 1.

The first source stays as it is, the others are multiplied with a constant that is measured

    trace      from forward passes: the ratio of the streams' rms, the geometric mean over all norms
    weights    from the weights alone: the ratio of what the embedding and the projections write per unit of input
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fusectl.archs import Recognized
from fusectl.archs.table import Row
from fusectl.errors import Incompatible
from fusectl.formats.tree import Checkpoint
from fusectl.layout import Region, size, tiles
from fusectl.parallel import Progress, Silent, default_jobs, in_parallel
from fusectl.tokens import DEFAULT_BATCH, DEFAULT_LENGTH, random_tokens, read_tokens


MEASURES = ("trace", "weights")


@dataclass(frozen=True)
class Equalize:
    """How to measure the constants; `tokens` is a file of them for the trace, random ones without."""

    by: str = "trace"
    tokens: str | None = None
    progress: Progress | None = None
    jobs: int | None = None


@dataclass(frozen=True)
class Stream:
    """A source as far as its residual stream goes: its norm groups are those that its function needs."""

    checkpoint: Checkpoint
    tree: Recognized
    norm_groups: tuple[int, ...]


def residual_scales(sources: Sequence[Stream], how: Equalize, budget_bytes: int) -> tuple[float, ...]:
    """The constant for each source's residual stream, 1 for the first one.

    Raises Incompatible for a model whose stream is nothing or no number.
    """
    distinct = list({id(s.checkpoint): s for s in sources}.values())
    sizes = (_by_trace if how.by == "trace" else _by_weights)(distinct, how, budget_bytes)
    names = sizes[0].keys()
    constants = {}
    for source, own in zip(distinct, sizes, strict=True):
        if not all(0.0 < own[name] < math.inf for name in names):
            raise Incompatible(f"{source.checkpoint.path}: its residual stream has no size that could be equalized")
        ratios = [math.log(sizes[0][name] / own[name]) for name in names]
        constants[id(source.checkpoint)] = math.exp(math.fsum(ratios) / len(ratios))
    return tuple(constants[id(source.checkpoint)] for source in sources)


def _by_trace(sources: Sequence[Stream], how: Equalize, budget_bytes: int) -> list[dict[str, float]]:
    """The rms of the residual stream that reaches each norm."""
    from fusectl.verify.function import stream_rms

    del budget_bytes
    vocab = sources[0].tree.sizes["vocab"]
    tokens = (
        random_tokens(vocab, DEFAULT_BATCH, DEFAULT_LENGTH, seed=0)
        if how.tokens is None
        else read_tokens(how.tokens, vocab, None, None)
    )
    models = [(s.checkpoint, s.tree, s.norm_groups) for s in sources]
    found = stream_rms(
        models, tokens, jobs=how.jobs or default_jobs(), budget_bytes=None, progress=how.progress or Silent()
    )
    return [dict(each) for each in found]


def _by_weights(sources: Sequence[Stream], how: Equalize, budget_bytes: int) -> list[dict[str, float]]:
    """For each tensor that writes to the stream, the rms of what it writes for inputs of rms 1."""
    lock = threading.Lock()
    squares: list[dict[str, float]] = [{} for _ in sources]
    rows = {name: row for name, row in sources[0].tree.rows.items() if row.writes_stream}
    watched = how.progress or Silent()
    leaves = [{name: s.checkpoint.leaves[s.tree.full(name)] for name in rows} for s in sources]
    watched.start("measuring weights", sum(leaf.nbytes for each in leaves for leaf in each.values()))

    def add(i: int, name: str, region: Region) -> None:
        values = sources[i].checkpoint.read(sources[i].tree.full(name), region)
        total = float(np.sum(np.square(values, dtype=np.float64)))
        with lock:
            squares[i][name] = squares[i].get(name, 0.0) + total
        watched.advance(name, values.nbytes)

    in_parallel(
        (
            (size(region) * (4 + 8), partial(add, i, name, region))
            for i, each in enumerate(leaves)
            for name, leaf in each.items()
            for region in tiles(leaf.shape, leaf.chunks)
        ),
        budget_bytes=budget_bytes,
        jobs=how.jobs or default_jobs(),
    )
    return [
        {name: math.sqrt(total / _outputs(rows[name], leaves[i][name].shape)) for name, total in each.items()}
        for i, each in enumerate(squares)
    ]


def _outputs(row: Row, shape: tuple[int, ...]) -> int:
    """How many outputs the squares of a tensor are spread over; each token has outputs of its own in an embedding."""
    return math.prod(n for axis, n in zip(row.spec.axes, shape, strict=True) if axis in row.spec.outputs | {"vocab"})
