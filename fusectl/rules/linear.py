"""LiGO's operator as a plan: every axis that grows is multiplied with a matrix, every layer is a sum of layers.

    W'_l = sum_j w[l, j] A_j W_j B_j^T            of a kernel (inputs, outputs); vectors and tables have one side only

What the matrices are, by the axis and by the tensor's role (LiGO, section 3.3, and what it leaves open):

    embed        outputs B = `embed`, of all that writes the residual stream; inputs its A. One for all layers and both
                 stacks, since the stream is one
    of norms     `norm`, and `final_norm` of each stack: a norm divides by what the whole stream is, so that its scale
                 is copied where the stream is duplicated with a factor. With the paper's tie it is `embed`
    heads        S of each layer's queries, keys and values: heads are mixed, their features kept (S x I), as rotary
                 positions and relative biases demand; the output projection reads what the values' S has made
    relpos       a selection of heads, never learned: tables of biases are shared by layers
    mlp          B of each layer: the gate's, what it gates, and A of what reads it
    w            a matrix for each kind of tensor of a stack that gets deeper; biases have their kernel's

`--tie paper` has A = B, `pinv` A = B (B^T B)^-1 (writing/axis_matrices.py). Axes and stacks that stay as they are have
no matrix.
Source: LiGO (ICLR 2023), equations 5 to 8, appendix B.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy.typing as npt

from fusectl.errors import Incompatible
from fusectl.families.recognized import Recognized
from fusectl.families.table import EMBEDDING, Row, stack_of
from fusectl.layout.blocks import Block, Expansion, Layout, Mapped, Product, Region, Term
from fusectl.rules.depth import problems_of_depths
from fusectl.rules.kinds import Tie


Array = npt.NDArray[Any]

HEADS = frozenset({"heads", "kv_heads", "joined_kv"})
# The place of the operator among the sources of a plan.
OPERATOR = 1


@dataclass(frozen=True)
class Growing:
    """A model's tree, the tree that it is to grow to, and how the two sides of its kernels are tied."""

    tree: Recognized
    grown: Recognized
    tie: str = Tie.PINV

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the operator's tensors.

        Matrices are (large, small), or (layers, large, small); those of depth (large, small) by layers.
        """
        found: dict[str, tuple[int, ...]] = {}
        for name, row in self.tree.rows.items():
            stack, in_layers = stack_of(name), row.is_of_layers(name)
            for role in row.roles:
                for axis, tensor, per_layer, _ in self._matrices(row, role, stack):
                    large, small = (self._count(tree, axis, role) for tree in (self.grown, self.tree))
                    layers = (self.tree.depths[stack],) if per_layer else ()
                    found[tensor] = (*layers, large, small)
                if in_layers and self.deeper(stack):
                    found[depth_name(stack, role)] = (self.grown.depths[stack], self.tree.depths[stack])
        return found

    def deeper(self, stack: str) -> bool:
        """Whether a stack gets more layers."""
        return self.grown.depths[stack] != self.tree.depths[stack]

    def expansions(self, row: Row, role: str, stack: str, layer: int) -> tuple[Expansion, ...]:
        """What the axes of a tensor in a layer of the small model are multiplied with."""
        return tuple(
            Expansion(
                axis=row.spec.axes.index(axis),
                source=OPERATOR,
                tensor=tensor,
                index=layer if per_layer else None,
                repeat=repeat,
                inverse=self.tie == Tie.PINV and axis in row.spec.inputs,
            )
            for axis, tensor, per_layer, repeat in self._matrices(row, role, stack)
        )

    def scale(self, row: Row, role: str) -> float:
        """What a tensor is multiplied with because its network multiplies with a power of the width."""
        # With `pinv` the norm before a tied head has a matrix of its own, whose start holds this factor
        # (sources/operator.py) and may be learned from there. With the paper's tie it shares `embed` with everything
        # else, so that the factor comes on top.
        network, part = self.tree.network, self.tree.sizes["embed"] / self.grown.sizes["embed"]
        if role == EMBEDDING:
            return float(part**network.embedding_power)
        if row.before_head and self.tree.family.tied and self.tie == Tie.PAPER:
            return float(part ** (network.tied_logits_power - network.embedding_power))
        return 1.0

    def _matrices(self, row: Row, role: str, stack: str) -> Iterator[tuple[str, str, bool, int]]:
        """For each axis that grows its matrix, whether there is one for each layer, and how often entries repeat."""
        for axis in row.spec.axes:
            if self.tree.sizes.get(axis) == self.grown.sizes.get(axis):
                continue
            if axis == "embed":
                yield axis, self._of_stream(row, role, stack), False, 1
            elif axis == "mlp":
                yield axis, f"{stack}/mlp", True, 1
            # LiGO mixes the features of all heads in one dense matrix. That does not commute with rotary positions,
            # which turn pairs of features, and breaks tables of relative positions, which know heads only as wholes. So
            # heads are mapped whole here, and one entry of S stands for all features of a head.
            elif axis in HEADS:
                sizes = self.tree.sizes
                kv_heads = sizes.get("kv_heads", sizes["heads"])
                repeat = sizes["joined_kv"] // sizes["heads"] if axis == "joined_kv" else 1
                if axis == "heads" and role == "out":
                    # Head i reads what kv head i // (heads / kv_heads) has.
                    repeat = sizes["heads"] // kv_heads
                yield axis, f"{stack}/{heads_of(role)}", role != "relpos", repeat

    def _of_stream(self, row: Row, role: str, stack: str) -> str:
        if not row.is_norm or self.tie == Tie.PAPER:
            return "embed"
        return f"{stack}/final_norm" if role == "final_norm" else "norm"

    def _count(self, tree: Recognized, axis: str, role: str) -> int:
        """The length of a matrix: heads are counted where they stand joined, kv heads where those read values."""
        if axis in HEADS:
            of_values = role in {"out", "key", "value", "key_bias", "value_bias"}
            return tree.sizes.get("kv_heads", tree.sizes["heads"]) if of_values else tree.sizes["heads"]
        return tree.sizes[axis]


def growing_to(tree: Recognized, sizes: Mapping[str, int], depths: Mapping[str, int], tie: str, where: str) -> Growing:
    """What grows a tree to these sizes of axes and depths of stacks, those that are not named staying as they are.

    Heads bring their features along, and kv heads as many as keep their number for a head, unless they are named.
    Raises Incompatible, with all that is wrong, for what a linear map of layers and units cannot do.
    """
    require_roles(tree, where)
    now, then = tree.sizes, dict(sizes)
    if "heads" in then and "joined_kv" in now:
        then["joined_kv"] = now["joined_kv"] // now["heads"] * then["heads"]
    # The output projection reads heads in groups that share a kv head, and takes its matrix from the values': the same
    # number of heads for a kv head on both sides is what makes that matrix fit.
    if "heads" in then and "kv_heads" in now and "kv_heads" not in then:
        then["kv_heads"] = now["kv_heads"] * then["heads"] // now["heads"]
    unknown = sorted(then.keys() - now.keys())
    if unknown:
        raise Incompatible(f"{where}: {tree.family.name} has no axis {' and no '.join(unknown)}")
    # With fewer large units than small ones B^T B is singular: no A undoes B, and nothing could keep the function.
    problems = [
        f"axis {axis!r}: {n} is less than its {now[axis]}; models grow, and never shrink"
        for axis, n in then.items()
        if n < now[axis]
    ]
    if "kv_heads" in now:
        one, other = (each["heads"] / each["kv_heads"] for each in (now, {**now, **then}))
        if one != other:
            problems.append(f"heads for each kv head: {one:g} now, {other:g} then; both have to grow by as much")
    if tree.network.query_scale == "embed_over_heads":
        one, other = (each["embed"] // each["heads"] for each in (now, {**now, **then}))
        if one != other:
            problems.append(f"embed // heads, by which queries are scaled: {one} now, {other} then")
    problems += problems_of_depths(tree, depths)
    if problems:
        raise Incompatible(f"{where}: sizes that it cannot grow to", details=problems)
    return Growing(tree, tree.resized(then, depths), tie)


@dataclass(frozen=True)
class Application:
    """Growing, with the operator's weights of layers (large, small) by their names: what a plan needs to know of it."""

    growing: Growing
    depth: Mapping[str, Array]

    def layout(self, parameter: str, dtype: str) -> Layout:
        """The Layout of a parameter of the grown model."""
        tree, grown = self.growing.tree, self.growing.grown
        row, shape = grown.rows[parameter], grown.shapes[parameter]
        blocks: list[Block] = []
        for kernel, role in enumerate(row.roles):
            if not row.is_of_layers(parameter):
                at = _at(row, shape, None, None)
                term = self._term(parameter, row, role, _at(row, tree.shapes[parameter], None, None), 0, 1.0)
                blocks.append(Block(at, self._summed(row, [term])))
                continue
            for place, layer in enumerate(grown.layers_of(parameter)):
                terms = [
                    self._term(name, row, role, _at(row, tree.shapes[name], there, kernel), j, weight)
                    for j, weight in self._weights(stack_of(parameter), role, layer)
                    for name, there in [self._kept_in[stack_of(parameter), role, j]]
                ]
                summed = self._summed(row, terms)
                if summed:
                    blocks.append(Block(_at(row, shape, place, kernel), summed))
        return Layout(row.spec.axes, shape, dtype, tuple(blocks))

    def like(self, parameter: str) -> str:
        """A parameter of the small model of the same kind."""
        row = self.growing.grown.rows[parameter]
        kind = row.alternative(parameter)
        return next(n for n, each in self.growing.tree.rows.items() if each is row and each.alternative(n) == kind)

    @cached_property
    def _kept_in(self) -> Mapping[tuple[str, str, int], tuple[str, int | None]]:
        """The tensor of the small model that has the kernel of a stack, a role and a layer, and its place in it.

        Layers that attend in turns are in different tensors, and a layer may be a sum of both kinds.
        """
        return {
            (stack_of(name), role, layer): (name, place if "layers" in row.spec.axes else None)
            for name, row in self.growing.tree.rows.items()
            if row.is_of_layers(name)
            for role in row.roles
            for place, layer in enumerate(self.growing.tree.layers_of(name))
        }

    def _weights(self, stack: str, role: str, layer: int) -> list[tuple[int, float]]:
        """The layers of the small model that a layer is made from, with their weights."""
        if not self.growing.deeper(stack):
            return [(layer, 1.0)]
        # Terms of weight zero are left out, so that a one-hot row (stack, interpolate, duplicate) reads one layer
        # instead of all of them, and an idle layer none.
        return [(j, float(w)) for j, w in enumerate(self.depth[depth_name(stack, role)][layer]) if w != 0]

    def _term(self, name: str, row: Row, role: str, region: Region, layer: int, weight: float) -> Mapped:
        growing = self.growing
        term = Term(0, growing.tree.full(name), region, weight * growing.scale(row, role))
        adds_one = row.is_norm and growing.tree.network.norm_adds_one
        return Mapped(term, growing.expansions(row, role, stack_of(name), layer), 1.0 if adds_one else 0.0)

    def _summed(self, row: Row, terms: Sequence[Mapped]) -> tuple[Term | Mapped | Product, ...]:
        """The terms as a sum; those that nothing maps are plain ones."""
        if row.is_norm and self.growing.tree.network.norm_adds_one:
            # What it multiplies with is 1 + scale.
            # Weights of layers act on 1 + scale: sum w (1 + s) - 1. A single layer as it is could be rounded on that
            # way, and its chunks could not be taken over.
            if len(terms) == 1 and not terms[0].expansions and terms[0].term.scale == 1.0:
                return (terms[0].term,)
            return (*terms, Product((), -1.0))
        # A plain Term passes its chunks through undecoded, which a Mapped without matrices would not.
        return tuple(each if each.expansions else each.term for each in terms)


def depth_name(stack: str, role: str) -> str:
    """The name of the weights of layers that tensors of a role have; a bias has its kernel's."""
    # The paper gives a module's bias the weights of its kernel; the released code learns separate ones (coeffs_bias).
    # One vector for both keeps a sum of layers a sum of affine maps.
    return f"{stack}/depth/{role.removesuffix('_bias')}"


def is_depth(name: str) -> bool:
    """Whether a tensor of an operator has weights of layers."""
    return "/depth/" in name


def heads_of(role: str) -> str:
    """The name of the matrix that maps the heads of a tensor with this role."""
    return f"{role.removesuffix('out')}value" if role.endswith("out") else role.removesuffix("_bias")


def require_roles(tree: Recognized, where: str) -> None:
    """Raises Incompatible for a table some of whose rows do not say what they are in the network."""
    without = sorted({row.pattern for row in tree.rows.values() if not row.roles})
    if without:
        raise Incompatible(
            f"{where}: {tree.family.name} has rows without a role, so that nobody knows what to multiply them with",
            details=without,
            hint="role = … in the table",
        )


def _at(row: Row, shape: tuple[int, ...], layer: int | None, kernel: int | None) -> Region:
    """The region of one layer and one kernel in a tensor, where it stacks them; all of it along other axes."""
    places = {"layers": layer, "stack": kernel}
    return tuple(
        range(place, place + 1) if (place := places.get(axis)) is not None else range(n)
        for axis, n in zip(row.spec.axes, shape, strict=True)
    )
