"""One unit of work: a tile of an output tensor, the source regions that it is computed from, and its chunks' values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fusectl.errors import Incompatible
from fusectl.formats.zarr import nonfinite_at, np_dtype
from fusectl.layout.blocks import (
    Block,
    Noise,
    Region,
    Term,
    intersect,
    is_computed,
    place_in_grid,
    places_in_grid,
    recurring_noise,
    shifted,
    size,
    slices,
    tiles_in,
)
from fusectl.layout.noise import lanes, tile_shape, unit_quantiles
from fusectl.planning.plan import Output
from fusectl.writing.evaluators import EVALUATORS
from fusectl.writing.measure import deviations, kernel_pieces
from fusectl.writing.work import Work, read_finite


Array = npt.NDArray[Any]


class Unit:
    """One tile of an output tensor: the source regions that it is computed from, each read once, and its noise."""

    def __init__(self, output: Output, tile: Region, work: Work) -> None:
        self.output = output
        self.work = work
        self.dtype = np_dtype(output.layout.dtype)
        self._computed = [
            (block, part)
            for block in output.layout.blocks
            if block not in output.passed and (part := intersect(block.at, tile)) is not None
        ]
        self._loaded: dict[Term, tuple[Region, Array]] | None = None
        self._tables: dict[tuple[Term, float], list[Array]] = {}
        self._stds: dict[tuple[int, float], Array] = {}
        self._recurring = recurring_noise(output.layout.blocks)
        self._kept: dict[tuple[Term, float, Region], Array] = {}
        self._blocks: dict[tuple[int, ...], list[Block]] = {}
        for block, part in self._computed:
            for index in places_in_grid(part, output.chunks):
                self._blocks.setdefault(index, []).append(block)

    def blocks_in(self, chunk: Region) -> list[Block]:
        """The blocks, of those that are not taken over, that meet a chunk."""
        return self._blocks.get(place_in_grid(chunk, self.output.chunks), [])

    def source(self, term: Term, region: Region) -> Array:
        """The values of a source region that lies within what the tile meets."""
        loaded, values = self._read()[term]
        return values[slices(region, loaded)]

    def require_read(self) -> None:
        """Reads what the tile meets; raises Incompatible where that has to be zero and is not."""
        self._read()

    def noise(self, noise: Noise, region: Region) -> Iterator[tuple[tuple[slice, ...], Array]]:
        """The noise of a region in pieces, each with its place there, in the output's dtype.

        In a tensor that is one unit of work, what is added in one place and taken off in another is generated once.
        """
        kept = self.output.at_once and noise.region in self._recurring
        edge = tile_shape(self.output.layout.shape)
        for index in places_in_grid(region, edge):
            tile = tuple(range(i * e, (i + 1) * e) for i, e in zip(index, edge, strict=True))
            within = intersect(tile, noise.region if kept else region)
            assert within is not None
            key = (noise.like, abs(noise.scale), within)
            values = self._kept.get(key)
            if values is None:
                values = self._generated(noise, within)
                if kept:
                    self._kept[key] = values
            part = intersect(within, region)
            assert part is not None
            values = values[slices(part, within)]
            yield slices(part, region), -values if noise.scale < 0 else values

    def _generated(self, noise: Noise, region: Region) -> Array:
        """The noise of a region that lies in one tile of the field, as it is added."""
        output, axis, seed = self.output, noise.stacked_axis, self.work.fill.seed
        assert seed is not None
        tables = self._tables_of(noise)
        ((_, chosen),) = lanes(seed, output.noise_name, output.layout.shape, region)
        # Every lane is a valid index; "clip" only skips the check for it.
        if axis is None:
            return tables[0].take(chosen, mode="clip")
        layers = np.moveaxis(chosen, axis, 0)
        each = [tables[layer].take(lane, mode="clip") for layer, lane in zip(region[axis], layers, strict=True)]
        return np.stack(each, axis)

    def stored(self, values: Array) -> Array:
        """The values in the output's dtype and C order; raises Incompatible where they do not fit into it."""
        if values.dtype == self.dtype:
            return np.asarray(values, order="C")
        with np.errstate(over="ignore"):
            cast = np.asarray(values, self.dtype, order="C")
        self.require_finite(cast, values)
        return cast

    def require_finite(self, cast: Array, values: Array) -> None:
        """Raises Incompatible where values became infinite in the output's dtype."""
        at = None if self.work.allow_nonfinite else nonfinite_at(cast)
        if at is not None:
            raise Incompatible(f"{self.output.name}: {values[at]:g} does not fit into {self.dtype.name}")

    def _read(self) -> Mapping[Term, tuple[Region, Array]]:
        """What the tile is computed from. Copies of one source are read once."""
        if self._loaded is None:
            terms = [read for block, part in self._computed for read in block.reads(part)]
            if self.output.at_once:
                summands = (each for block in self.output.layout.blocks for each in block.terms)
                terms += [(kernel, kernel.region) for each in summands for kernel, _ in each.kernels]
            read: dict[tuple[int, str, Region], Array] = {}
            self._loaded = {}
            for term, region in dict(terms).items():
                source = self.work.sources[term.source]
                key = (id(source), term.tensor, region)
                if key not in read:
                    read[key] = read_finite(self.work, term, region)
                if term.must_be_zero:
                    _require_zero(read[key], term, region, self.work)
                self._loaded[term] = (region, read[key])
        return self._loaded

    def _tables_of(self, noise: Noise) -> Sequence[Array]:
        """The 65,536 values that a noise takes, for each kernel that is stacked in the tensor."""
        key = (noise.like, abs(noise.scale))
        if key not in self._tables:
            units = unit_quantiles().astype(np.float64)
            # Rounded to the output's dtype: what is taken off is exactly what is added.
            self._tables[key] = [self.stored(units * std) for std in self._measured(noise) * abs(noise.scale)]
        return self._tables[key]

    def _measured(self, noise: Noise) -> Array:
        """The standard deviation of each kernel that a noise is relative to; of copies of one source measured once."""
        known = self.work.stds.get((noise.like, noise.stacked_axis))
        if known is not None:
            return known
        kernel = self._read()[noise.like][1]
        key = (id(kernel), noise.like.scale)
        if key not in self._stds:
            count = 1 if noise.stacked_axis is None else kernel.shape[noise.stacked_axis]
            kept = self.dtype == kernel.dtype
            self._stds[key] = deviations(
                lambda: kernel_pieces(kernel, noise.like.scale, noise.stacked_axis, kept=kept), count
            )
        return self._stds[key]


def _require_zero(values: Array, term: Term, region: Region, work: Work) -> None:
    if values.any():
        index = [r.start + int(i) for r, i in zip(region, np.argwhere(values)[0], strict=True)]
        raise Incompatible(
            f"{work.sources[term.source].path}: {term.tensor}{index} is not zero",
            details=("noise fills blocks of zeros; this one has been filled or trained already",),
        )


def compute(chunk: Region, unit: Unit) -> Array:
    """The values of one chunk of an output tensor, in its dtype and C order."""
    blocks = [(block, part) for block in unit.blocks_in(chunk) if (part := intersect(block.at, chunk)) is not None]
    if len(blocks) == 1 and blocks[0][1] == chunk and not is_computed(blocks[0][0].terms):
        return _plain(blocks[0][0], chunk, unit)
    covered = sum(size(part) for _, part in blocks) == size(chunk)
    out = (np.empty if covered else np.zeros)(tuple(map(len, chunk)), unit.dtype)
    for block, part in blocks:
        # The ellipsis keeps it a view, where the tensor has no axes, too.
        _sum(block, part, unit, out[slices(part, chunk) or ...])
    return out


def _plain(block: Block, part: Region, unit: Unit) -> Array:
    """A part of a block that is one source region as it is."""
    term = block.taken
    return unit.stored(unit.source(term, shifted(part, block.at, term.region)))


def _sum(block: Block, part: Region, unit: Unit, out: Array) -> None:
    """Puts the sum of a block's summands over a part of it into `out`."""
    if not is_computed(block.terms):
        out[...] = _plain(block, part, unit)
        return
    # Sums in float64 depend on their order as well: kinds come by rank, each in the planner's order.
    summands = sorted((each for each in block.terms if each.adds), key=lambda each: each.rank)
    if len(summands) < len(block.terms):
        # Noise alone reads nothing where its kernel was measured before.
        unit.require_read()
    if _at_once(summands, block, part, unit, out):
        return
    rounds = any(each.is_random for each in summands)
    # Piece by piece, so that what is in float64 stays in the processor's cache.
    kept = any(each.is_kept for each in summands)
    for piece in [part] if kept else tiles_in(part, tile_shape(unit.output.layout.shape)):
        total = np.zeros(tuple(map(len, piece)), np.float64)
        for each in summands:
            values = EVALUATORS[type(each)](each, block, piece, unit)
            # What noise is taken off is rounded before, too, as it is where the noise is filled in later.
            total += unit.stored(values).astype(np.float64) if rounds and each.copied is not None else values
        out[slices(piece, part)] = unit.stored(total)


def _at_once(summands: Sequence[Any], block: Block, part: Region, unit: Unit, out: Array) -> bool:
    """Puts a sum into `out` that needs no float64 in between; whether it is one.

    A product or a sum of two float32 is the same, whether it is rounded from float64 or computed in float32.
    """
    terms, noises = [e.copied for e in summands if e.copied], [e for e in summands if e.is_random]
    if len(terms) + len(noises) < len(summands):
        return False
    if not terms and len(noises) == 1:
        for at, values in unit.noise(noises[0], shifted(part, block.at, noises[0].region)):
            out[at] = values
        return True
    # float64 has 53 bits, more than the 2 * 24 + 2 from which on rounding a sum or product of two float32 twice is the
    # same as rounding it once. That covers neither three summands nor a factor that no float32 holds.
    if len(terms) != 1 or unit.dtype != np.float32:
        return False
    values = unit.source(terms[0], shifted(part, block.at, terms[0].region))
    scale = np.float32(terms[0].scale)
    if values.dtype != np.float32 or float(scale) != terms[0].scale or len(noises) + (scale != 1) > 1:
        return False
    if not noises:
        with np.errstate(over="ignore"):
            np.multiply(values, scale, out=out)
    for noise in noises:
        for at, added in unit.noise(noise, shifted(part, block.at, noise.region)):
            np.add(values[at], added, out=out[at])
    unit.require_finite(out, values)
    return True
