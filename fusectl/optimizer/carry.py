"""The optimizer's state of a fused model, from the states of its sources.

The gradient of a fused parameter is the source's, times the weight of the copy whose outputs it feeds, over the factor
that the source is stored with (`gradient_scale`). Between equal copies it is the same in every block, those that are
zero included. That is exact for copies of one model with equal weights, or with a norm each; one norm over copies of
different weights couples them, and different models together err less than each alone. So, with that factor c and
Adam's or Adafactor's moments of each source:

    first moments      c * mu_i      in every block of equal copies;            0 between different models
    second moments     c^2 * nu_i    in every block of equal copies; between different models i and j the rank-1 mix
                       c^2 * mean_over_out(nu_j) * mean_over_in(nu_i) / sqrt(mean(nu_i) mean(nu_j))
    v_row, v_col       the means of that over the axes that T5X drops for the fused shape
    m                  an average of updates, not of gradients: times RMS(fused kernel) / RMS(kernel)
    shared parameters  all copies' gradients add up: the weighted mean of mu_i, and of nu_i's roots, squared, which
                       takes different models' gradients for alike; with equal copies that is exact, too

What a slot indexes follows from the shape of its parameter, the source's from the source's: a `v` may become `v_row`
and `v_col`, and these two may change places. Source: Deep Fusion, Lemma 2; t5x/adafactor.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fusectl.errors import Incompatible
from fusectl.layout.blocks import Block, Factor, Mean, Product, Region, Term, whole
from fusectl.optimizer.state import UNUSED, Axes, OptimizerState, Order
from fusectl.rules.fusion import Fusion, stored_offset, stored_scale


@dataclass(frozen=True)
class Carry:
    """The state of K sources, and the fusion that they go into."""

    fusion: Fusion
    states: Sequence[OptimizerState]
    # For each source, the first one that is the same model.
    models: tuple[int, ...]
    # Only the first copy's own state: all others start anew, which sets the copies apart.
    only_first: bool = False

    def slots(self) -> Iterator[tuple[str, tuple[int, ...], tuple[Block, ...]]]:
        """Name, shape and blocks of every slot of the fused model; its name is the first source's, too.

        Counters are not among them.
        """
        first = self.states[0]
        for parameter in self.fusion.tree.shapes:
            shape, spec = self.fusion.fused_shape(parameter), self.fusion.tree.rows[parameter].spec
            for slot in first.moments(parameter):
                kept = first.axes_of(slot, shape, spec)
                if kept is None:
                    yield first.slot(parameter, slot), UNUSED, ()
                else:
                    own = tuple(shape[axis] for axis in kept)
                    yield first.slot(parameter, slot), own, self._blocks(parameter, slot, kept)

    def _blocks(self, parameter: str, slot: str, kept: Axes) -> tuple[Block, ...]:
        """The blocks of a slot that has the axes `kept` of its parameter."""
        fused = self.fusion.fused_shape(parameter)
        if self.fusion.is_shared(parameter):
            return (Block(whole(tuple(fused[axis] for axis in kept)), tuple(self._of_shared(parameter, slot, kept))),)
        blocks: dict[Region, dict[object, Term | Product]] = {}
        for reads, writes, cell in self._cells(parameter):
            if self.only_first and (reads or writes):
                continue
            dropped = [axis for axis in range(len(fused)) if axis not in kept]
            share = math.prod(len(cell[axis]) / fused[axis] for axis in dropped)
            terms = blocks.setdefault(tuple(cell[axis] for axis in kept), {})
            for term in self._terms(parameter, slot, kept, reads, writes):
                key = replace(term, scale=1.0)
                before = terms[key].scale if key in terms else 0.0
                terms[key] = replace(term, scale=before + share * term.scale)
        return tuple(Block(at, tuple(terms.values())) for at, terms in blocks.items() if terms)

    def _of_shared(self, parameter: str, slot: str, kept: Axes) -> Iterator[Term | Product]:
        """What a slot of a parameter that all copies share consists of."""
        shares: dict[int, float] = {}
        for model, weight in zip(self.models, self.fusion.weights, strict=True):
            shares[model] = shares.get(model, 0.0) + weight
        if len(shares) == 1:
            # The weights' sum, not to be rounded.
            shares = dict.fromkeys(shares, 1.0)
        every = tuple(range(len(kept)))
        for one, share in shares.items():
            if self.states[0].is_first(slot):
                tensor = self.states[one].slot(parameter, slot)
                yield Term(one, tensor, whole(self.fusion.source_shape(parameter, one)), share)
                continue
            mean = self._mean(one, parameter, kept)
            if len(shares) == 1 and not mean.over:
                shape = self.fusion.source_shape(parameter, one)
                yield Term(one, mean.tensor, whole(tuple(shape[axis] for axis in kept)))
                continue
            for two, other in shares.items():
                pair = (mean,) if one == two else (mean, self._mean(two, parameter, kept))
                yield Product(tuple(Factor(each, every, 1 / len(pair)) for each in pair), share * other)

    def _cells(self, parameter: str) -> Iterator[tuple[int, int, Region]]:
        """Every block of a fused parameter, with the sources that it reads from and writes to."""
        spec, widths = self.fusion.tree.rows[parameter].spec, self.fusion.widths
        for i in range(self.fusion.copies):
            for j in range(self.fusion.copies):
                reads, writes = spec.inputs & widths.keys(), spec.outputs & widths.keys()
                if i != j and not (reads and writes):
                    continue
                yield j, i, self.fusion.cell(parameter, {**dict.fromkeys(reads, j), **dict.fromkeys(writes, i)})

    def _terms(self, parameter: str, slot: str, kept: Axes, reads: int, writes: int) -> Iterator[Term | Product]:
        """What a block consists of, seen along the axes `kept`."""
        own, scale = self.models[writes], gradient_scale(self.fusion, parameter, writes)
        squared = scale**2
        shape = self.fusion.source_shape(parameter, own)
        if self.states[0].is_first(slot):
            if self.models[reads] == own:
                by = scale if self.states[0].orders[slot] is Order.GRADIENT else rms_ratio(self.fusion, parameter)
                if math.isnan(by):
                    whose = f"{self.states[0].kind.capitalize()}'s momentum of a norm"
                    raise Incompatible(
                        f"{parameter}: {whose} that multiplies with 1 + scale cannot be carried",
                        hint="--optimizer reset",
                    )
                yield Term(own, self.states[own].slot(parameter, slot), whole(shape), by)
        elif self.models[reads] == own:
            mean = self._mean(own, parameter, kept)
            if mean.over:
                yield Product((Factor(mean, tuple(range(len(kept))), 1.0),), squared)
            else:
                yield Term(own, mean.tensor, whole(tuple(shape[axis] for axis in kept)), squared)
        else:
            yield Product(self._mix(parameter, kept, self.models[reads], own), squared)

    def _mix(self, parameter: str, kept: Axes, reads: int, writes: int) -> tuple[Factor, ...]:
        """The estimate of the second moments between two models: the inputs of one, the outputs of the other."""
        spec = self.fusion.tree.rows[parameter].spec
        inputs, outputs = (tuple(a for a in kept if spec.axes[a] in side) for side in (spec.inputs, spec.outputs))
        stacked = tuple(a for a, axis in enumerate(spec.axes) if axis not in spec.inputs | spec.outputs)
        powers: dict[tuple[Mean, Axes], float] = {}
        for model, axes, power in (
            (reads, inputs, 1.0),
            (writes, outputs, 1.0),
            (reads, (), -0.5),
            (writes, (), -0.5),
        ):
            along = tuple(sorted({*axes, *stacked}))
            mean, place = self._mean(model, parameter, along), tuple(map(kept.index, along))
            powers[mean, place] = powers.get((mean, place), 0.0) + power
        return tuple(Factor(mean, along, power) for (mean, along), power in powers.items() if power)

    def _mean(self, source: int, parameter: str, kept: Axes) -> Mean:
        """The mean of a source's second moments over all axes but these."""
        state, shape = self.states[source], self.fusion.source_shape(parameter, source)
        slot, has = state.second_moments(parameter, kept, shape, self.fusion.tree.rows[parameter].spec)
        over = tuple(i for i, axis in enumerate(has) if axis not in kept)
        return Mean(source, state.slot(parameter, slot), over)


def gradient_scale(fusion: Fusion, parameter: str, source: int) -> float:
    """What a source's gradients are multiplied with in the fused model; a shared parameter has those of all copies."""
    if fusion.is_shared(parameter):
        return 1.0
    return fusion.weights[source] / stored_scale(fusion, fusion.tree.rows[parameter], source)


def rms_ratio(fusion: Fusion, parameter: str) -> float:
    """RMS of a fused parameter over that of a source, as if all sources had one; noise is left out of account.

    NaN where more than a factor is between the two: a norm that multiplies with 1 + scale.
    """
    if fusion.is_shared(parameter):
        return 1.0
    row, total = fusion.tree.rows[parameter], math.prod(fusion.fused_shape(parameter))
    if any(stored_offset(fusion, row, i) for i in range(fusion.copies)):
        return math.nan
    squares = (
        stored_scale(fusion, row, i) ** 2 * math.prod(fusion.source_shape(parameter, i)) / total
        for i in range(fusion.copies)
    )
    return math.sqrt(sum(squares))


def same_models(places: Sequence[str]) -> tuple[int, ...]:
    """For each source, by the place where it lies, the first one that it is.

    >>> same_models(["a", "b", "a"])
    (0, 1, 0)
    """
    first: dict[str, int] = {}
    return tuple(first.setdefault(place, i) for i, place in enumerate(places))
