"""Block-diagonal fusion (Deep Fusion, section 3): K sources become one model of the sum of their widths.

One rule places every tensor, by the names of its axes:

    no grown axis                   shared: equal in all sources, or their weighted mean
    grown axes                      source i in cell (i, …, i) of them: one concatenates, two make a block diagonal
    grown on the input side only    (the output head) K streams meet: times the source's weight, unless the norm before
                                    it carries that: its scale feeds the head alone
    the embedding                   times (d / D) ** p, where embedded tokens are multiplied with width ** p (Gemma)
    the norm before another head    times the source's weight, if it carries that and not the head
    the norm before a tied head     times weight * (d / D) ** (q - p), its logits being multiplied with width ** q (T5)
    all that writes to the stream   times the source's constant, where streams are made equally large (equalize.py);
                                    every norm divides by it again, and the norm before a tied head is divided by it

and noise goes where an input of one source would meet an output of another. What a norm multiplies with is its scale,
or one more (Gemma): then that is what the factors are for, f * (1 + scale) - 1 being stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fusectl.errors import Incompatible
from fusectl.families.kinds import FactorIn
from fusectl.families.recognized import Recognized
from fusectl.families.table import EMBEDDING, Family, Row
from fusectl.layout.blocks import Block, Layout, Noise, Product, Region, Term, whole
from fusectl.layout.fill import Fill, FillKind


@dataclass(frozen=True, slots=True)
class Fusion:
    """Models of one family side by side: their weights, and per grown axis the sizes that they bring.

    `tree` is the tree of any one of them, or of the fused model: only its rows and shared axes are looked at.
    """

    tree: Recognized
    weights: tuple[float, ...]
    widths: Mapping[str, tuple[int, ...]]
    # What each source's residual stream is multiplied with.
    residual_scales: tuple[float, ...]
    # What carries the weights: the scale of the norm before the head, or the head.
    factor_in: FactorIn
    # Whether tensors that do not grow are the mean of the sources', which differ in them.
    means_shared: bool = False

    @property
    def copies(self) -> int:
        return len(self.weights)

    def source_shape(self, name: str, source: int) -> tuple[int, ...]:
        """The shape of a parameter in one of the sources."""
        return tuple(self.widths[axis][source] if axis in self.widths else n for axis, n in self._axes(name))

    def fused_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter of the fused model."""
        return tuple(sum(self.widths[axis]) if axis in self.widths else n for axis, n in self._axes(name))

    def cell(self, name: str, place: Mapping[str, int]) -> Region:
        """The region of a fused parameter where each grown axis is at the place of the given source."""
        spans = []
        for axis, n in self._axes(name):
            if axis in self.widths:
                start = sum(self.widths[axis][: place[axis]])
                spans.append(range(start, start + self.widths[axis][place[axis]]))
            else:
                spans.append(range(n))
        return tuple(spans)

    def cells(self, name: str) -> list[Region]:
        """For each source, the region of a fused parameter that is its own."""
        return [self.cell(name, dict.fromkeys(self.widths, i)) for i in range(self.copies)]

    def is_shared(self, name: str) -> bool:
        """Whether a parameter does not grow: all copies use the same one."""
        return not self.widths.keys() & set(self.tree.rows[name].spec.axes)

    def _axes(self, name: str) -> Iterator[tuple[str, int]]:
        return zip(self.tree.rows[name].spec.axes, self.tree.shapes[name], strict=True)


def line_up(
    sources: Sequence[Recognized],
    weights: Sequence[float],
    labels: Sequence[str],
    factor_in: FactorIn | None = None,
) -> Fusion:
    """The Fusion of these sources, streams as they are; raises Incompatible with all their differences, if any.

    The factor of the mean is where the family has it unless `factor_in` says so.
    """
    first = sources[0]
    uneven = [problem for source, label in zip(sources, labels, strict=True) for problem in _uneven(source, label)]
    if uneven:
        raise Incompatible("heads that no network has", details=tuple(dict.fromkeys(uneven)))
    differences = [
        difference
        for other, label in zip(sources[1:], labels[1:], strict=True)
        for difference in _differences(first, other, labels[0], label)
    ]
    if differences:
        raise Incompatible(
            f"{len(sources)} sources that do not fit together",
            details=differences,
            hint=_way_out(differences),
        )
    return Fusion(
        first,
        tuple(weights),
        widths_of(sources),
        (1.0,) * len(sources),
        factor_in=carrier(first.family, factor_in),
    )


def carrier(family: Family, wanted: FactorIn | None) -> FactorIn:
    """What carries the factor of the mean, `wanted` or by default; raises Incompatible where a family has no such."""
    if wanted == FactorIn.NORM and not any(row.before_head for row in family.rows):
        raise Incompatible(
            f"--factor-in norm: {family.name} has no norm that is known to feed the head alone",
            hint="before_head = true in the row of that norm's scale, or --factor-in head",
        )
    if wanted == FactorIn.HEAD and family.tied:
        raise Incompatible(
            f"--factor-in head: the head of {family.name} is its embedding, which writes the stream, too",
            hint="--factor-in norm",
        )
    return family.factor_in if wanted is None else wanted


def _uneven(tree: Recognized, label: str) -> Iterator[str]:
    """Numbers of heads, or of their features, that do not go together."""
    heads, kv_heads = tree.sizes.get("heads", 1), tree.sizes.get("kv_heads", 1)
    if heads % kv_heads:
        yield f"{heads} heads do not share {kv_heads} kv heads evenly in {label}"
    if tree.family.rotates_heads and tree.sizes["kv"] % 2:
        yield f"head_dim {tree.sizes['kv']} is odd in {label}: rotary positions turn pairs of features"


def widths_of(sources: Sequence[Recognized]) -> dict[str, tuple[int, ...]]:
    """Per grown axis, the size that each source brings."""
    first = sources[0]
    return {axis: tuple(s.sizes[axis] for s in sources) for axis in first.sizes if axis in first.family.grown}


def equal_widths(tree: Recognized, copies: int, where: str) -> dict[str, tuple[int, ...]]:
    """Per grown axis, the sizes of `copies` models of equal widths that a fused tree has room for.

    Raises Incompatible where they do not divide an axis.
    """
    grown = {axis: n for axis, n in tree.sizes.items() if axis in tree.family.grown}
    uneven = [f"axis {axis!r}: {n}" for axis, n in grown.items() if n % copies]
    if uneven:
        raise Incompatible(f"{where}: widths that {copies} equal models do not have", details=uneven)
    return {axis: (n // copies,) * copies for axis, n in grown.items()}


def _differences(first: Recognized, other: Recognized, a: str, b: str) -> Iterator[str]:
    if other.family.name != first.family.name:
        yield f"family: {first.family.name} in {a}, {other.family.name} in {b}"
    elif (other.family.rows, other.family.grown) != (first.family.rows, first.family.grown):
        yield f"{first.family.name}: another table in {b} than in {a}"
    if other.depths != first.depths:
        for stack, depth in first.depths.items():
            if other.depths.get(stack) != depth:
                yield f"depth of the {stack}: {depth} layers in {a}, {other.depths.get(stack)} in {b}"
    elif other.family.name == first.family.name:
        for name in sorted(set(first.shapes) ^ set(other.shapes)):
            yield f"{name}: only in {a if name in first.shapes else b}"
    for axis, n in first.sizes.items():
        if axis not in first.family.grown and other.sizes.get(axis, n) != n:
            yield f"axis {axis!r} is shared but differs: {n} in {a}, {other.sizes[axis]} in {b}"
    yield from _head_dims_that_differ(first, other, a, b)
    yield from _groups_of_heads_that_differ(first, other, a, b)
    if other.family.name == first.family.name:
        for setting, one, two in first.network.differences(other.network):
            yield f"{setting}: {_in_words(one)} in {a}, {_in_words(two)} in {b}"
        # embed and heads both add up, and a sum of numerators over a sum of denominators lies between the quotients of
        # its parts. So one quotient for all sources is the quotient of the fusion, too, and queries keep their scale.
        if first.network.query_scale == "embed_over_heads":
            one, two = (s.sizes["embed"] // s.sizes["heads"] for s in (first, other))
            if one != two:
                yield f"embed // heads, by which queries are scaled: {one} in {a}, {two} in {b}"


def _in_words(value: object) -> str:
    """A setting in words."""
    if not isinstance(value, tuple):
        return str(value)
    return "; ".join(
        f"rope {each.rope_base:g}{f' / {each.rope_scale:g}' if each.rope_scale != 1 else ''}"
        f"{f' window {each.window}' if each.window else ''}"
        for each in dict.fromkeys(value)
    )


def _way_out(differences: Sequence[str]) -> str:
    if all(difference.startswith(_RATIO) for difference in differences):
        return "--expand-kv repeats the kv heads of the one that has fewer for its heads"
    return "grown axes (embed, heads, kv_heads, mlp) may differ in size; everything else must be equal"


def query_groups(tree: Recognized) -> int:
    """How many heads share a kv head; 1 where each has its own."""
    heads = tree.sizes.get("heads", 1)
    return heads // tree.sizes.get("kv_heads", heads)


_RATIO = "heads for each kv head"


def _groups_of_heads_that_differ(first: Recognized, other: Recognized, a: str, b: str) -> Iterator[str]:
    """Head n reads kv head n // (heads / kv_heads), wherever it stands."""
    # Fusing concatenates query heads source by source, and kv heads likewise. The network then divides every head's
    # number by a single ratio, so that heads find their own source's kv heads only if all sources have that ratio.
    one, two = query_groups(first), query_groups(other)
    if one != two:
        yield f"{_RATIO}: {one} in {a}, {two} in {b}"


def _head_dims_that_differ(first: Recognized, other: Recognized, a: str, b: str) -> Iterator[str]:
    """joined_kv hides head_dim: it is joined_kv / heads."""
    if not all({"joined_kv", "heads"} <= tree.sizes.keys() for tree in (first, other)):
        return
    # joined_kv counts heads first and their features second, so that concatenating along it concatenates heads, but
    # only as long as the fused network cuts it into heads of the length that the sources had.
    one, two = (s.sizes["joined_kv"] / s.sizes["heads"] for s in (first, other))
    if one != two:
        yield f"head_dim (joined_kv / heads) is shared but differs: {one:g} in {a}, {two:g} in {b}"


def stored_scale(fusion: Fusion, row: Row, source: int) -> float:
    """The factor of a source's tensor: it makes the output the weighted mean of the logits, and the streams equal."""
    stream, network = fusion.residual_scales[source], fusion.tree.network
    # A tied head reads the table that the embedding is stored in, so that the norm before it makes up for both. With
    # the network's powers p (embedded tokens) and q (logits), its factor a has to satisfy
    #     a * D**q * (d / D)**p * stream * (y E^T)  =  weight * d**q * (y E^T)
    # T5 1.0 has p = 0 and q = -1/2: each of K copies stores scale / sqrt(K), and not scale / K. Without a factor the
    # logits of K = 2 came out 1.41 times too large; those of an untied head came out twice as large.
    weight, by_norm = fusion.weights[source], fusion.factor_in == FactorIn.NORM
    if row.role == EMBEDDING or (row.before_head and by_norm and fusion.tree.family.tied):
        widths = fusion.widths["embed"]
        part = widths[source] / sum(widths)
        embedded: float = part**network.embedding_power
        logits: float = part**network.tied_logits_power
        return stream * embedded if row.role == EMBEDDING else weight * logits / embedded / stream
    # Before an untied head the norm has divided by the stream's constant already. With the weight in its scale all
    # chunks of the head pass through, and one vector is rounded instead of a matrix: in an mT5 the head is half of all
    # bytes. Where the factor stands decides which gradient stays as it was: that of the scale here and the head's own
    # there, where all others shrink to 1/K.
    if row.before_head and by_norm:
        return weight
    if row.writes_stream:
        return stream
    reads_streams = bool(row.spec.inputs & fusion.widths.keys())
    writes_streams = bool(row.spec.outputs & fusion.widths.keys())
    return weight if reads_streams and not writes_streams and not by_norm else 1.0


def stored_offset(fusion: Fusion, row: Row, source: int) -> float:
    """What is added to a source's scaled tensor: a norm that multiplies with 1 + scale has its 1 scaled, too."""
    return stored_scale(fusion, row, source) - 1.0 if row.is_norm and fusion.tree.network.norm_adds_one else 0.0


def fused(fusion: Fusion, name: str, dtype: str, fill: Fill, tensors: Sequence[str]) -> Layout:
    """The Layout of one parameter of the fused model; `tensors[i]` is its full name in source i."""
    row = fusion.tree.rows[name]
    axes, shape = row.spec.axes, fusion.fused_shape(name)
    kernels = [
        Term(i, tensor, whole(fusion.source_shape(name, i)), stored_scale(fusion, row, i))
        for i, tensor in enumerate(tensors)
    ]
    if fusion.is_shared(name):
        return Layout(axes, shape, dtype, (Block(whole(shape), _shared(fusion, kernels)),))
    own = [
        Block(at, (kernel, *([Product((), offset)] if offset else [])))
        for i, (at, kernel) in enumerate(zip(fusion.cells(name), kernels, strict=True))
        for offset in [stored_offset(fusion, row, i)]
    ]
    return Layout(axes, shape, dtype, tuple(with_noise(fusion, name, fill, own, kernels)))


def _shared(fusion: Fusion, kernels: Sequence[Term]) -> tuple[Term, ...]:
    """What stands for a tensor that does not grow: that of the first source, if the others' are said to be equal."""
    if fusion.means_shared:
        return tuple(replace(term, scale=weight) for term, weight in zip(kernels, fusion.weights, strict=True))
    # Callers have compared them value by value. A scale of queries or keys that all heads share cannot be folded into a
    # kernel, since rotary positions stand between the two, and keeping the first source's where they differ was
    # measured to be off by 0.6.
    return (kernels[0],)


def filled(fusion: Fusion, name: str, dtype: str, fill: Fill, tensor: str) -> Layout:
    """The Layout of one parameter of an already fused model after its zero blocks were filled with noise."""
    row = fusion.tree.rows[name]
    shape = fusion.fused_shape(name)
    if not noisy(fusion, row):
        return Layout(row.spec.axes, shape, dtype, (Block(whole(shape), (Term(0, tensor, whole(shape)),)),))
    kernels = [Term(0, tensor, cell) for cell in fusion.cells(name)]
    own = [Block(kernel.region, (kernel,)) for kernel in kernels]
    blocks = []
    for block in with_noise(fusion, name, fill, own, kernels):
        # Blocks of noise come with a term that only checks: a fusion that has been filled or trained since has values
        # there, which the noise would replace without a word.
        at_zeros = isinstance(block.terms[0], Noise)
        must_be_zero = (Term(0, tensor, block.at, must_be_zero=True),) if at_zeros else ()
        blocks.append(Block(block.at, (*must_be_zero, *block.terms)))
    return Layout(row.spec.axes, shape, dtype, tuple(blocks))


def noisy(fusion: Fusion, row: Row) -> bool:
    """Whether a tensor has zero blocks that noise may fill: where one source's inputs would meet another's outputs."""
    return bool(row.spec.inputs & fusion.widths.keys() and row.spec.outputs & fusion.widths.keys())


def with_noise(fusion: Fusion, name: str, fill: Fill, own: Sequence[Block], kernels: Sequence[Term]) -> Iterator[Block]:
    """The sources' own blocks, and the blocks of noise between them.

    The noise between input j and output i is relative to the kernel of i, whose outputs it disturbs. Antisymmetric:
    what is added at (j, i) is taken off at (i, i), so that equal inputs leave every output as it was.
    """
    row = fusion.tree.rows[name]
    if fill.kind is FillKind.ZEROS or not noisy(fusion, row):
        yield from own
        return
    # Noise is there because equal copies do not part by themselves: a kernel between them stays [[A, B], [B, A]]
    # through training, and the wide model learns no more than the small one. SGD in float64 left a difference of 1e-15
    # after 300 steps. Only rounding, dropout or noise leads out of that subspace.
    stacked = row.spec.stacked_axis
    for i, (block, kernel) in enumerate(zip(own, kernels, strict=True)):
        between = [
            fusion.cell(name, {**dict.fromkeys(row.spec.inputs, j), **dict.fromkeys(row.spec.outputs, i)})
            for j in range(fusion.copies)
            if j != i
        ]
        # Over equal inputs h the noise in front of one copy's outputs adds up to sum_j h N_j - sum_j h N_j = 0, so the
        # function stays as it is, up to rounding. In a small decoder plain noise of scale 0.3 cost 0.76 nats at the
        # start; this cost none.
        taken_off = [
            Noise(at, kernel, -fill.noise_scale, stacked) for at in between if fill.kind is FillKind.ANTISYMMETRIC
        ]
        yield Block(block.at, (*block.terms, *taken_off))
        for at in between:
            yield Block(at, (Noise(at, kernel, fill.noise_scale, stacked),))


def check_fill(fusion: Fusion, fill: Fill) -> None:
    """Raises Incompatible where antisymmetric noise is undefined: the blocks of a row must have one shape."""
    if fill.kind is FillKind.ANTISYMMETRIC:
        uneven = {axis: sizes for axis, sizes in fusion.widths.items() if len(set(sizes)) > 1}
        if uneven:
            raise Incompatible(
                "antisymmetric noise needs sources of equal widths",
                details=[f"axis {axis!r}: {', '.join(map(str, sizes))}" for axis, sizes in uneven.items()],
                hint="--fill gaussian",
            )
