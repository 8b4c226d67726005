"""Making the sources' residual streams equally large, so that one norm over all of them mixes them less.

The embedding and all output projections of a pre-norm model, or the scales of the norms behind its blocks, times one
constant: every norm of the stream divides by it again, so that the model keeps its function, up to the epsilon in them.
One norm over two streams of which one is r times as large multiplies the smaller with sqrt(2 / (1 + r**2)) and the
larger with r times as much; equal streams keep 1.

The first source stays as it is, the others are multiplied with a constant that is measured

    trace      from forward passes: the ratio of the streams' rms, the geometric mean over all norms
    weights    from the weights alone: the ratio of what the embedding and the projections write per unit of input
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from fusectl.errors import Corrupt, Incompatible, UsageError
from fusectl.families.table import EMBEDDING, Row
from fusectl.layout.blocks import Region, size, tiles
from fusectl.networks.tokens import DEFAULT_BATCH, DEFAULT_LENGTH, random_tokens, read_tokens
from fusectl.operations.kinds import Measure
from fusectl.sources.opened import Opened
from fusectl.system.threads import Progress, Silent, default_jobs, default_max_memory_bytes, in_parallel


# What a value takes while its square is summed up: as it is stored, in float64, and squared.
BYTES_PER_VALUE = 24


@dataclass(frozen=True)
class Equalize:
    """How to measure the constants, `by` trace or weights. `tokens` is a file for the trace, random ones without.

    `max_memory_bytes` None is half of the free memory for forward passes, 256 MiB of values in flight for weights.
    """

    by: Measure = Measure.TRACE
    tokens: str | None = None
    max_memory_bytes: int | None = None
    jobs: int | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and self.by is not Measure.TRACE:
            raise UsageError("tokens are for measuring streams in forward passes", hint="--equalize-by trace")


def residual_scales(sources: Sequence[Opened], how: Equalize) -> tuple[float, ...]:
    """The constant for each source's residual stream, 1 for the first one.

    Raises Incompatible for a model whose stream is nothing, Corrupt for one whose stream is no number.
    """
    distinct = list(dict.fromkeys(sources))
    sizes = (_by_trace if how.by == "trace" else rms_by_weights)(distinct, how)
    constants = {}
    for source, own in zip(distinct, sizes, strict=True):
        if not all(map(math.isfinite, own.values())):
            raise Corrupt(
                f"{source.label}: NaN or Inf in its residual stream", hint="without --equalize they are named"
            )
        # The geometric mean does not depend on which source comes first: it inverts where two are exchanged.
        # In a toy decoder whose second source had a stream three times as large, one norm led to a loss of 2.05 before
        # equalizing and of 1.41 after it, as for streams that had been equal from the start. Between streams of about
        # one size equalizing gains nothing, since what is left is a ratio that varies from token to token.
        ratios = [math.log(sizes[0][name] / own[name]) for name in sizes[0] if sizes[0][name] > 0.0 < own[name]]
        if not ratios:
            raise Incompatible(f"{source.label}: its residual stream is nothing that could be equalized")
        constants[source] = math.exp(math.fsum(ratios) / len(ratios))
    return tuple(constants[source] for source in sources)


def _by_trace(sources: Sequence[Opened], how: Equalize) -> list[dict[str, float]]:
    """The rms of the residual stream that reaches each norm."""
    from fusectl.networks.run import stream_rms

    vocab = sources[0].tree.sizes["vocab"]
    tokens = (
        random_tokens(vocab, DEFAULT_BATCH, DEFAULT_LENGTH, seed=0)
        if how.tokens is None
        else read_tokens(how.tokens, vocab, None, None)
    )
    return stream_rms(
        sources,
        tokens,
        jobs=how.jobs or default_jobs(),
        budget_bytes=how.max_memory_bytes,
        progress=how.progress or Silent(),
    )


def rms_by_weights(sources: Sequence[Opened], how: Equalize) -> list[dict[str, float]]:
    """For each kernel that writes to the stream, the rms of what it writes for inputs of rms 1.

    A kernel that is stacked along `layers` counts for each of them, as it does unstacked.
    """
    rows = {name: row for name, row in sources[0].tree.rows.items() if row.writes_stream}
    leaves = [{name: s.checkpoint.leaves[s.full(name)] for name in rows} for s in sources]
    # By the number of the tile, and added up in that order: threads end in any order, and a sum in theirs had another
    # last bit from run to run, which made another plan for --resume.
    squares: list[dict[str, dict[int, npt.NDArray[np.float64]]]] = [{name: {} for name in each} for each in leaves]
    watched = how.progress or Silent()
    watched.start("measuring weights", sum(leaf.nbytes for each in leaves for leaf in each.values()))

    def measure(i: int, name: str, number: int, region: Region) -> None:
        values = sources[i].checkpoint.read(sources[i].full(name), region).astype(np.float64)
        network = sources[i].tree.network
        if rows[name].is_norm and network.norm_adds_one:
            values += 1.0
        if rows[name].role == EMBEDDING:
            values *= sources[i].tree.sizes["embed"] ** network.embedding_power
        stacked = rows[name].spec.stacked_axis
        rest = tuple(axis for axis in range(values.ndim) if axis != stacked)
        layers = np.zeros(_layers(rows[name], leaves[i][name].shape))
        layers[slice(None) if stacked is None else slice(region[stacked].start, region[stacked].stop)] = np.sum(
            values**2, axis=rest
        )
        squares[i][name][number] = layers
        watched.advance(name, values.size * leaves[i][name].itemsize)

    in_parallel(
        (
            (size(region) * BYTES_PER_VALUE, partial(measure, i, name, number, region))
            for i, each in enumerate(leaves)
            for name, leaf in each.items()
            for number, region in enumerate(tiles(leaf.shape, leaf.chunks))
        ),
        budget_bytes=how.max_memory_bytes or default_max_memory_bytes(),
        jobs=how.jobs or default_jobs(),
    )
    return [
        {
            f"{name}/{layer}": math.sqrt(total / _outputs(rows[name], leaves[i][name].shape))
            for name, parts in each.items()
            for layer, total in enumerate(np.ravel(sum(parts[number] for number in sorted(parts))))
        }
        for i, each in enumerate(squares)
    ]


def _layers(row: Row, shape: tuple[int, ...]) -> int:
    return 1 if row.spec.stacked_axis is None else shape[row.spec.stacked_axis]


def _outputs(row: Row, shape: tuple[int, ...]) -> int:
    """How many outputs the squares of a kernel are spread over; each token has outputs of its own in an embedding."""
    return math.prod(n for axis, n in zip(row.spec.axes, shape, strict=True) if axis in row.spec.outputs | {"vocab"})
