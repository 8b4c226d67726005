"""The grown model as a function of the operator, in JAX: W'_l = sum_j w[l, j] A_j W_j B_j^T.

It shares with the plan what each axis is multiplied with (rules/linear.py), and computes all layers of a kind at
once; the executor computes chunks. A test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fusectl.families.recognized import Recognized
from fusectl.families.table import Row, stack_of
from fusectl.layout.blocks import Expansion
from fusectl.rules.linear import Growing, depth_name, is_depth


Array = Any


def grow(growing: Growing, small: Mapping[str, Array], operator: Mapping[str, Array]) -> dict[str, Array]:
    """The parameters of the grown model by their names, from those of the small one and the operator's matrices."""
    tree, grown = growing.tree, growing.grown
    duals = {name: dual(matrix) for name, matrix in operator.items() if not is_depth(name)}
    # Width first and then depth, as in the paper's Eq. 6 to 8, with one matrix for each layer of the small model. The
    # released code sums layers first and has one for each layer of the large one.
    mapped: dict[tuple[str, str], Array] = {}
    for (stack, role), (row, kernels) in _kernels(tree, small).items():
        values = kernels + 1.0 if _adds_one(growing, row) else kernels
        for each in growing.expansions(row, role, stack, 0):
            matrices = duals if each.inverse else operator
            axis = [axis for axis in row.spec.axes if axis not in {"layers", "stack"}].index(row.spec.axes[each.axis])
            values = _expanded(values, matrices[each.tensor], axis + 1, each)
        if depth_name(stack, role) in operator:
            values = jnp.einsum("lj,j...->l...", operator[depth_name(stack, role)], values)
        values = values * growing.scale(row, role)
        mapped[stack, role] = values - 1.0 if _adds_one(growing, row) else values
    return {name: _assembled(grown, name, mapped) for name in grown.shapes}


# The first ones bring the smallest eigenvalue up, the last ones the digits. Where operators are applied, conditions
# above 1e12 are refused.
_MOST_ITERATIONS = 64


def dual(matrix: Array) -> Array:
    """B (B^T B)^-1 of a matrix (large, small), or of each of several."""
    return matrix @ inverse(jnp.swapaxes(matrix, -1, -2) @ matrix)


def _inverse(gram: Array) -> Array:
    """The inverses of symmetric positive definite matrices (…, n, n), by Newton's iteration X (2 I - G X).

    Products only: on a CPU with few cores XLA's threads wait for each other for ever where LAPACK, which would be asked
    by jnp.linalg.inv, is called for several matrices at once.
    """
    identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    # The largest row sum bounds the eigenvalues, so that those of gram / norm lie in (0, 1], where the iteration
    # converges. Each step about doubles the small ones: a condition of 1e12 takes about 40 steps, the digits after that
    # a few more.
    norms = jnp.abs(gram).sum(axis=-1).max(axis=-1)[..., None, None]
    enough = 8 * gram.shape[-1] * jnp.finfo(gram.dtype).eps

    def goes_on(state: tuple[Array, Array, Array]) -> Array:
        i, _, off = state
        # A NaN ends it, too.
        return (i < _MOST_ITERATIONS) & (off > enough)

    def iterate(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        i, x, _ = state
        residual = identity - gram @ x
        return i + 1, x + x @ residual, jnp.abs(residual).max()

    return jax.lax.while_loop(goes_on, iterate, (0, identity / norms, jnp.asarray(jnp.inf, gram.dtype)))[1]


def _inverse_forward(gram: Array) -> tuple[Array, Array]:
    found = _inverse(gram)
    return found, found


def _inverse_backward(found: Array, cotangent: Array) -> tuple[Array]:
    transposed = jnp.swapaxes(found, -1, -2)
    # d(G^-1) = -G^-1 dG G^-1: the derivative needs no iteration, and no memory for the steps of one.
    return (-transposed @ cotangent @ transposed,)


# What differentiates the iteration is the inverse itself.
inverse = jax.custom_vjp(_inverse)
inverse.defvjp(_inverse_forward, _inverse_backward)


def _expanded(values: Array, matrix: Array, axis: int, expansion: Expansion) -> Array:
    """Values (layers, …) with an axis multiplied with a matrix, or with one for each layer."""
    last = jnp.moveaxis(values, axis, -1)
    # Neighbours that one entry stands for are mapped alike.
    last = last.reshape(*last.shape[:-1], matrix.shape[-1], expansion.repeat)
    equation = "l...nr,mn->l...mr" if expansion.index is None else "l...nr,lmn->l...mr"
    out = jnp.einsum(equation, last, matrix)
    return jnp.moveaxis(out.reshape(*out.shape[:-2], -1), -1, axis)


def _kernels(tree: Recognized, parameters: Mapping[str, Array]) -> dict[tuple[str, str], tuple[Row, Array]]:
    """For each stack and role its kernels (layers, …), in the order of the layers, and their row."""
    found: dict[tuple[str, str], tuple[Row, dict[int, Array]]] = {}
    for name, row in tree.rows.items():
        for layer, role, kernel in _pieces(tree, name, parameters[name]):
            found.setdefault((stack_of(name), role), (row, {}))[1][layer] = kernel
    return {key: (row, jnp.stack([each[i] for i in sorted(each)])) for key, (row, each) in found.items()}


def _pieces(tree: Recognized, name: str, values: Array) -> list[tuple[int, str, Array]]:
    """The layer, the role and the values of every kernel that a tensor holds."""
    row = tree.rows[name]
    axes, pieces = list(row.spec.axes), [(0, values)]
    if row.is_of_layers(name):
        layers, parts = tree.layers_of(name), [values]
        if "layers" in axes:
            parts = list(jnp.moveaxis(values, axes.index("layers"), 0))
            axes.remove("layers")
        pieces = list(zip(layers, parts, strict=True))
    if "stack" not in axes:
        return [(layer, row.roles[0], part) for layer, part in pieces]
    at = axes.index("stack")
    return [
        (layer, role, kernel)
        for layer, part in pieces
        for role, kernel in zip(row.roles, jnp.moveaxis(part, at, 0), strict=True)
    ]


def _assembled(grown: Recognized, name: str, mapped: Mapping[tuple[str, str], Array]) -> Array:
    """A tensor of the grown tree from the kernels that it holds."""
    row, stack = grown.rows[name], stack_of(name)
    axes = [axis for axis in row.spec.axes if axis != "layers"]
    layers = list(grown.layers_of(name)) if row.is_of_layers(name) else [0]
    if "stack" in axes:
        at = axes.index("stack")
        parts = [jnp.stack([mapped[stack, role][layer] for role in row.roles], at) for layer in layers]
    else:
        parts = [mapped[stack, row.roles[0]][layer] for layer in layers]
    return jnp.stack(parts, row.spec.axes.index("layers")) if "layers" in row.spec.axes else parts[0]


def _adds_one(growing: Growing, row: Row) -> bool:
    return row.is_norm and growing.tree.network.norm_adds_one
