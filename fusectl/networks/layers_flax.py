"""What all twins' networks are made of: norms over groups of features, and sums accumulated in a wider dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax


Array = Any


def require_groups(groups: Sequence[int], width: int, per_group: Sequence[float], what: str) -> None:
    """Raises ValueError unless groups sum up to the width, and what is given for each of them, if anything, is."""
    if groups and sum(groups) != width:
        raise ValueError(f"norm groups {list(groups)} do not sum up to emb_dim {width}")
    if per_group and len(per_group) != len(groups):
        raise ValueError(f"{len(per_group)} {what} for {len(groups)} norm groups")


def normalized(x: Array, groups: Sequence[int], epsilons: Sequence[float], accumulate: Any) -> Array:
    """X / rms(x) over each group of the last axis by itself; `accumulate` is the dtype that sums are in."""
    parts = []
    for group, epsilon in zip(jnp.split(x, np.cumsum(groups)[:-1], axis=-1), epsilons, strict=True):
        mean_square = jnp.mean(lax.square(group), axis=-1, keepdims=True, dtype=accumulate)
        parts.append(group * lax.rsqrt(mean_square + epsilon).astype(x.dtype))
    return jnp.concatenate(parts, axis=-1)


def contract(equation: str, a: Array, b: Array, accumulate: Any) -> Array:
    """An einsum in the arrays' dtype, its sums accumulated in the dtype `accumulate`, or as XLA likes for None."""
    # Inputs stay in their dtype and only the sums are wider: what is compared is what the trainer computes, less the
    # order in which it adds up. So self-fusions by powers of two come out equal to the bit.
    return jnp.einsum(equation, a, b, preferred_element_type=accumulate).astype(a.dtype)
