"""The theory of a fusion of checkpoints on a batch: gradients, lemmas, the Lie bracket, both theorems, the symmetry.

Deep Fusion (Mazzawi et al., ICML 2024), section 4. Lemmas are about copies of one model; of different ones the sizes of
the bracket's two parts are reported instead, and Theorems 1 and 2 hold for both.

    Lemma 1   dL_B / d theta_k = 1/K dL / d theta_s                    the copies
    Lemma 2   dL_B / d theta_0 = 1/K dL / d theta_s                    every zero block, with its kernel's gradient
    Lemma 3   [F_S, F_B] = 0 on the copies                             and 1/K P (H grad L) in every zero block
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from fusectl.errors import Incompatible, NotEnoughSpace, UsageError
from fusectl.families.kinds import Norm
from fusectl.families.table import stack_of
from fusectl.formats.opening import open_checkpoint
from fusectl.layout.blocks import slices
from fusectl.networks.tokens import DEFAULT_BATCH, DEFAULT_LENGTH, Tokens, random_tokens
from fusectl.networks.training import batch_of
from fusectl.operations.fuse import open_sources, shared_differ
from fusectl.operations.learning.learn import examples_of
from fusectl.planning.options import Options
from fusectl.research.theory.field import LARGEST_STEP, Convergence, Derivatives, Losses, convergence, derivatives, norm
from fusectl.research.theory.space import Space
from fusectl.research.theory.symmetry import Symmetry, of_checkpoint, of_fusion, symmetry_of
from fusectl.rules.fusion import check_fill, line_up
from fusectl.sources.lesson import Data
from fusectl.sources.lineage import for_each, remembered
from fusectl.sources.opened import Opened
from fusectl.system.memory import available_bytes
from fusectl.system.threads import Progress, Silent


Array = npt.NDArray[Any]

# Rows and tokens of a batch of data, where nobody says how many.
DATA_BATCH, DATA_LENGTH = 8, 64
# Of a lemma, in units of the precision: what rounding may leave of the deepest sums.
# These are 9e-13 in float64. The demo's model is off by 4e-15, while a wrong factor would be off by a good part of 1.
TOLERANCE_EPSILONS = 4096
# Points that a step of the flow holds beside what the program does.
POINTS_HELD = 8


@dataclass(frozen=True)
class Batch:
    """What the losses are computed on: examples of a file (examples.py), or random tokens."""

    data: str | None = None
    rows: int | None = None
    length: int | None = None
    target_length: int | None = None
    sentinel: int | None = None
    seed: int = 0

    def tokens(self, source: Opened) -> Tokens:
        """The batch for a model; raises what read_examples does."""
        if self.data is None:
            rows, length = self.rows or DEFAULT_BATCH, self.length or DEFAULT_LENGTH
            return random_tokens(source.tree.sizes["vocab"], rows, length, self.seed)
        data = Data(self.data, self.rows or DATA_BATCH, self.length or DATA_LENGTH, self.target_length, self.sentinel)
        return next(examples_of(data, source.tree, self.seed).batches())


@dataclass(frozen=True)
class Lemma:
    """How far a lemma is from holding: the largest deviation in a tensor, relative to the largest entry that it should
    have, of the tensor where that is worst.
    """

    error: float
    tensor: str


@dataclass(frozen=True)
class Lemmas:
    """The three lemmas; the third one's two halves are about the copies and about the zero blocks.

    What should be zero on the copies is relative to the largest entry of H_B grad L_S there, which cancels.
    """

    gradient_of_copies: Lemma
    gradient_of_zeros: Lemma
    bracket_of_copies: Lemma
    bracket_of_zeros: Lemma
    tolerance: float

    @property
    def errors(self) -> tuple[float, float, float]:
        """The errors of Lemmas 1, 2 and 3."""
        third = max(self.bracket_of_copies.error, self.bracket_of_zeros.error)
        return self.gradient_of_copies.error, self.gradient_of_zeros.error, third


@dataclass(frozen=True)
class LayerNorms:
    """The bracket's norm in a layer, or in a module outside of them: on the copied parameters, and in the zeros."""

    layer: str
    copies: float
    zeros: float


@dataclass(frozen=True)
class ModifiedLoss:
    """Theorem 1 at equal steps h: the modified loss, its bound (Eq. 10), and, for copies of one model, both from the
    small model's loss and gradient alone.
    """

    h: float
    value: float
    bound: float
    of_small_model: float | None


@dataclass(frozen=True)
class Theory:
    """What the theory says of a fusion, and how far it is true."""

    sources: tuple[str, ...]
    norm: str
    self_fused: bool
    precision: str
    tokens: str
    parameters: int
    # The mean of the small models' losses, in nats for a token.
    small_loss: float
    big_loss: float
    small_gradients: tuple[float, ...]
    big_gradient: float
    # How much the gradients change along themselves and each other, per unit of length.
    curvature: float
    lemmas: Lemmas | None
    layers: tuple[LayerNorms, ...]
    # |P b - b| / |b| of the bracket b; None where sources have different widths.
    bracket_defect: float | None
    modified_loss: ModifiedLoss
    convergence: Convergence | None
    symmetry: Symmetry | None
    notes: tuple[str, ...]

    @property
    def bracket_of_copies(self) -> float:
        """The bracket's norm on the copied parameters."""
        return math.hypot(*(layer.copies for layer in self.layers))

    @property
    def bracket_of_zeros(self) -> float:
        """The bracket's norm in the zero blocks."""
        return math.hypot(*(layer.zeros for layer in self.layers))

    @property
    def bracket_norm(self) -> float:
        """The bracket's norm."""
        return math.hypot(self.bracket_of_copies, self.bracket_of_zeros)

    def as_json(self) -> dict[str, Any]:
        """All of it as numbers, strings and lists; null for what is not defined or was not measured."""
        lemma1, lemma2, lemma3 = self.lemmas.errors if self.lemmas else (None, None, None)
        slopes = self.convergence.slopes if self.convergence else (None, None, None)
        return {
            "sources": list(self.sources),
            "copies": len(self.sources),
            "self_fused": self.self_fused,
            "norm": self.norm,
            "precision": self.precision,
            "tokens": self.tokens,
            "parameters": self.parameters,
            "loss": {"small": self.small_loss, "big": self.big_loss},
            "gradient_norm": {"small": list(self.small_gradients), "big": self.big_gradient},
            "curvature": self.curvature,
            "lemma1": lemma1,
            "lemma2": lemma2,
            "lemma3": lemma3,
            "lemmas": None if self.lemmas is None else asdict(self.lemmas),
            "bracket_norm": self.bracket_norm,
            "bracket_norm_copies": self.bracket_of_copies,
            "bracket_norm_zeros": self.bracket_of_zeros,
            "bracket_symmetry_defect": self.bracket_defect,
            "layers": [asdict(layer) for layer in self.layers],
            "slope_with_bracket": slopes[0],
            "slope_without_bracket": slopes[1],
            "slope_wrong_sign": slopes[2],
            "convergence": None if self.convergence is None else asdict(self.convergence),
            "modified_loss": asdict(self.modified_loss),
            **({"symmetry_defect": None} if self.symmetry is None else self.symmetry.as_json()),
            "notes": list(self.notes),
        }


def paths_of(sources: Sequence[str], copies: int | None) -> list[str]:
    """The checkpoints that are to be fused: different ones, or so many copies of a single one.

    Raises UsageError where that makes no fusion.
    """
    if len(sources) > 1:
        if copies is not None:
            raise UsageError(f"--copies {copies}: of one checkpoint, not of {len(sources)}")
        return list(sources)
    if copies is None:
        raise UsageError("a fusion takes two checkpoints, or copies of one", hint="--copies 2")
    if copies < 2:
        raise UsageError(f"--copies {copies}: fusing takes two or more")
    return [*sources] * copies


def is_fusion(path: str, options: Options) -> bool:
    """Whether a checkpoint's record, or what it was trained on from, says that it is a fusion."""
    record = remembered(open_checkpoint(path), for_each(options.lineages, 1)[0]).record
    return record is not None and record.fused


def theory(
    paths: Sequence[str],
    options: Options,
    batch: Batch,
    *,
    x64: bool = True,
    budget_bytes: int | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Theory:
    """The theory of fusing the checkpoints at these paths; the same path K times is self-fusion.

    `options` says the fill, the norm and how checkpoints are recognised; the fill is what the symmetry is measured
    with, all else is about zeros. The budget is half of the free memory if it is None. In float32 (not `x64`) there are
    no slopes: they would be of rounding. Raises Incompatible for sources that do not fit together and for a loss that
    is no number, Corrupt for a NaN or Inf, NotEnoughSpace before anything is computed.
    """
    opened = open_sources(paths, options)
    fusion = line_up([each.tree for each in opened], (1 / len(opened),) * len(opened), [o.label for o in opened])
    shared_differ(opened, fusion, options)
    check_fill(fusion, options.fill)
    tokens = batch.tokens(opened[0])
    precision = "float64" if x64 else "float32"
    space = Space(fusion, opened, options.norm or Norm.RULE, precision)
    with jax.enable_x64(x64):
        losses = space.losses(batch_of(tokens))
        note(f"compiling the losses of {space.size:,} parameters and their derivatives")
        _require_memory(losses, space, budget_bytes)
        point = jax.tree.map(jax.numpy.asarray, space.start())
        found = _measured(space, losses, point, note if x64 else None)
    symmetry = of_fusion(fusion, opened, options.fill) if space.alike else None
    return replace(found, tokens=tokens.says, symmetry=symmetry, notes=(*found.notes, *_notes(space, symmetry)))


def symmetry(path: str, options: Options, copies: int | None, progress: Progress | None = None) -> Symmetry:
    """The symmetry defect of a checkpoint that is a fusion; raises what symmetry.of_checkpoint does."""
    (opened,) = open_sources([path], options)
    return of_checkpoint(opened, copies, progress or Silent())


def _require_memory(losses: Losses, space: Space, budget_bytes: int | None) -> None:
    """Compiles the program; raises NotEnoughSpace where running it would not fit into the budget."""
    budget = available_bytes() // 2 if budget_bytes is None else budget_bytes
    point = {name: jax.ShapeDtypeStruct(layout.shape, space.dtype) for name, layout in space.layouts.items()}
    sizes = losses.program.lower(point, ((0.0, 0.0), (0.0, 0.0))).compile().memory_analysis()
    held = POINTS_HELD * space.size * np.dtype(space.dtype).itemsize
    needed = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes + held
    if needed > budget:
        raise NotEnoughSpace(
            f"the theory of {space.size:,} parameters in {space.dtype} does not fit into memory",
            details=(f"about {needed:,} bytes needed, {budget:,} given",),
            hint="a smaller model or --batch, --no-x64, or a larger --max-memory",
        )


def _measured(space: Space, losses: Losses, point: Any, note: Callable[[str], None] | None) -> Theory:
    """All but the symmetry; without a `note` no series of steps."""
    found = derivatives(losses, point)
    small, big = norm(found.x), norm(found.y)
    if not all(map(math.isfinite, (found.small_loss, found.big_loss, small, big))):
        raise Incompatible(
            "a loss that is no number",
            details=(f"small models {found.small_loss:g}, fused {found.big_loss:g}; gradients {small:g} and {big:g}",),
        )
    if not (small and big and found.curvature):
        raise Incompatible("a gradient of zero on this batch: nothing of the theory shows", hint="other --data")
    bracket = _arrays(found.bracket)
    series, largest = None, LARGEST_STEP / found.curvature
    if note is not None:
        note("two steps, and the flow, for a series of step sizes")
        series = convergence(losses, point, largest)
        largest = series.steps[0]
    return Theory(
        sources=tuple(source.label for source in space.sources),
        norm=space.norm,
        self_fused=space.self_fused,
        precision=space.dtype,
        tokens="",
        parameters=space.size,
        small_loss=found.small_loss / space.fusion.copies,
        big_loss=found.big_loss,
        small_gradients=_gradients(space, found),
        big_gradient=big,
        curvature=found.curvature,
        lemmas=_lemmas(space, found, bracket) if space.self_fused else None,
        layers=tuple(_by_layer(space, bracket)),
        # The paper reads the bracket as what unlocks capacity. For copies it is the same in every zero block, and so
        # keeps them exchangeable; its own defect is printed to show that.
        bracket_defect=_defect(space, bracket) if space.alike else None,
        modified_loss=_modified_loss(space, found, largest),
        convergence=series,
        symmetry=None,
        notes=(),
    )


def _arrays(point: Mapping[str, Any]) -> dict[str, Array]:
    return {name: np.asarray(values) for name, values in point.items()}


def _gradients(space: Space, found: Derivatives) -> tuple[float, ...]:
    """The norm of each small model's gradient; of what all of them share each has an equal part."""
    squares = [0.0] * space.fusion.copies
    for name, values in _arrays(found.x).items():
        regions = space.own(name)
        shared = len(regions) < len(squares)
        for i in range(len(squares)):
            part = values / len(squares) if shared else values[slices(regions[i])]
            squares[i] += float(np.vdot(part, part))
    return tuple(map(math.sqrt, squares))


def _lemmas(space: Space, found: Derivatives, bracket: Mapping[str, Array]) -> Lemmas:
    """The lemmas' errors, for copies of one model."""
    copies = space.fusion.copies
    x, y, dx_x, dy_x = (_arrays(each) for each in (found.x, found.y, found.dx_x, found.dy_x))
    worst = [Lemma(0.0, "")] * 4

    def compare(which: int, name: str, off: Array, expected: Array) -> None:
        furthest, largest = float(np.abs(off).max(initial=0.0)), float(np.abs(expected).max(initial=0.0))
        error = furthest / largest if largest else math.inf if furthest else 0.0
        if error > worst[which].error:
            worst[which] = Lemma(error, name)

    for name in space.layouts:
        own = [slices(region) for region in space.own(name)]
        gradient, closed = x[name][own[0]] / copies, dx_x[name][own[0]] / copies
        for at in own:
            compare(0, name, y[name][at] - gradient, gradient)
            compare(2, name, bracket[name][at], dy_x[name][at])
        for at in map(slices, space.zeros(name)):
            compare(1, name, y[name][at] - gradient, gradient)
            compare(3, name, bracket[name][at] - closed, closed)
    copied, zeros, bracket_of_copies, bracket_of_zeros = worst
    tolerance = TOLERANCE_EPSILONS * float(np.finfo(space.dtype).eps)
    return Lemmas(copied, zeros, bracket_of_copies, bracket_of_zeros, tolerance)


def _by_layer(space: Space, bracket: Mapping[str, Array]) -> list[LayerNorms]:
    """The bracket's norm in every layer, those of the stacks in their order behind what is outside of them."""
    tree = space.tree
    squares: dict[str, list[float]] = {}
    for name, values in bracket.items():
        row = tree.rows[name]
        zeros = values.copy()
        for region in space.own(name):
            zeros[slices(region)] = 0.0
        parts, labels = [(values - zeros, zeros)], [name.rsplit("/", 1)[0]]
        if row.is_of_layers(name):
            labels = [f"{stack_of(name)}/layers_{i}" for i in tree.layers_of(name)]
        if "layers" in row.spec.axes:
            axis = row.spec.axes.index("layers")
            parts = list(zip(*(np.moveaxis(part, axis, 0) for part in parts[0]), strict=True))
        for label, pair in zip(labels, parts, strict=True):
            sums = squares.setdefault(label, [0.0, 0.0])
            for i, part in enumerate(pair):
                sums[i] += float(np.vdot(part, part))
    in_order = [f"{stack}/layers_{i}" for stack, depth in tree.depths.items() for i in range(depth)]
    outside = [label for label in squares if label not in in_order]
    return [LayerNorms(label, *map(math.sqrt, squares[label])) for label in (*outside, *in_order)]


def _defect(space: Space, tensors: Mapping[str, Array]) -> float:
    each = ((name, space.layouts[name].axes, values) for name, values in tensors.items())
    return symmetry_of(each, space.fusion.widths, "").defect


def _modified_loss(space: Space, found: Derivatives, h: float) -> ModifiedLoss:
    copies = space.fusion.copies
    small, big = norm(found.x) ** 2, norm(found.y) ** 2
    # Losses are convex in the logits, so that by Jensen the loss of the mean is at most the mean of the losses; copies
    # have equality. That bounds the value of the modified loss, and says nothing of where its flow leads.
    bound = (h + h / copies) * found.small_loss + h**2 / 4 * (small + big)
    of_small_model = None
    if space.self_fused:
        squares = small + _big_square(space, found)
        of_small_model = (copies * h + h) * found.small_loss / copies + h**2 / 4 * squares
    return ModifiedLoss(h, found.modified_loss(h, h), bound, of_small_model)


def _big_square(space: Space, found: Derivatives) -> float:
    """|grad L_B|^2 of copies by Lemmas 1 and 2: |grad_W L|^2 + 1/K |grad_v L|^2, kernels with zero blocks being W."""
    square = 0.0
    for name, values in _arrays(found.x).items():
        own, zeros = space.own(name), space.zeros(name)
        gradient = values[slices(own[0])] / space.fusion.copies
        square += (len(own) + len(zeros)) * float(np.vdot(gradient, gradient))
    return square


def _notes(space: Space, symmetry: Symmetry | None) -> list[str]:
    network, notes = space.fusion.tree.network, []
    if not space.self_fused:
        notes.append("different models: the lemmas are about copies of one; the bracket has two parts, see its norms")
    if space.norm != Norm.PROPERTY and not space.self_fused:
        notes.append("with one norm over all sources the fused model is not their mean: Theorem 1's bound may fail")
    if network.logits_soft_cap is not None and not space.self_fused:
        notes.append("the logits are capped behind their mean: Theorem 1's bound may fail")
    if symmetry is None:
        notes.append("sources of different widths cannot be exchanged: no symmetry to measure")
    return notes
