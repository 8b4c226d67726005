"""The vector fields of two losses on one space, their Lie bracket, and the flow that two gradient steps follow.

Deep Fusion, section 4: L_S is the loss of the small models, L_B that of the large one, X = -grad L_S, Y = -grad L_B.

    two steps       theta' = theta + h_S X(theta)         theta'' = theta' + h_B Y(theta')                  (6), (7)
    bracket         [X, Y] = (DY) X - (DX) Y = H_B grad L_S - H_S grad L_B
    modified field  G = h_S X + h_B Y - h_S^2/2 (DX) X - h_B^2/2 (DY) Y + h_S h_B / 2 [X, Y]            (Theorem 2)

The flow of G for unit time is at theta'' up to the third order in the steps; without the bracket up to the second. All
derivatives are products with Hessians, jvp of grad. A point is a pytree of arrays; a loss maps one to a scalar.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


Point = Any
Loss = Callable[[Point], Any]
Field = Callable[[Point], Point]

# The largest step of a series, for a curvature of one, and how often it is halved.
LARGEST_STEP = 2.0**-8
HALVINGS = 3
# Of a flow; twice as many lead to the same place if its integration error is negligible.
# The modified field is of the order of the steps h, so that one step of a method of fourth order errs by h**5, two
# orders below what is measured with it.
SUBSTEPS = 1
# As a part of what is measured with the flow; and how often a series begins anew, with steps of half the size, for it.
NEGLIGIBLE = 1e-3
MOST_RESTARTS = 8
# The stages of the classical Runge-Kutta method: how far the next one looks ahead, and the weight of this one.
_STAGES = ((0.5, 1 / 6), (0.5, 1 / 3), (1.0, 1 / 3), (0.0, 1 / 6))


@dataclass(frozen=True)
class Local:
    """Both losses at a point, their fields X and Y, and the derivatives (DX) u and (DY) w along two vectors."""

    small_loss: Any
    big_loss: Any
    x: Point
    y: Point
    dx_u: Point
    dy_w: Point


jax.tree_util.register_dataclass(
    Local, data_fields=("small_loss", "big_loss", "x", "y", "dx_u", "dy_w"), meta_fields=()
)


@dataclass(frozen=True, eq=False)
class Losses:
    """The losses L_S and L_B on one space. One program, compiled once, is all that is ever run of them."""

    small: Loss
    big: Loss

    @cached_property
    def program(self) -> Any:
        """The compiled function behind `at`: of a point and two pairs of coefficients, a Local."""

        def local(theta: Point, along: tuple[Any, Any]) -> Local:
            small_loss, x, dx = _linearized(self.small, theta)
            big_loss, y, dy = _linearized(self.big, theta)
            (a, b), (c, d) = along
            return Local(small_loss, big_loss, x, y, dx(combined((a, x), (b, y))), dy(combined((c, x), (d, y))))

        return jax.jit(local)

    def at(self, theta: Point, u: tuple[float, float] = (0.0, 0.0), w: tuple[float, float] = (0.0, 0.0)) -> Local:
        """What is known at a point, with u and w given by their coefficients of X and Y."""
        found: Local = self.program(theta, (u, w))
        return found


def _linearized(loss: Loss, theta: Point) -> tuple[Any, Point, Callable[[Point], Point]]:
    """A loss and its field at a point, and the map from a vector to the field's derivative along it."""

    def field(at: Point) -> tuple[Point, Any]:
        value, gradient = jax.value_and_grad(loss)(at)
        return jax.tree.map(jnp.negative, gradient), value

    # Linearizing the gradient gives products with the Hessian; the Hessian itself would have as many entries as the
    # square of the number of parameters.
    x, dx, value = jax.linearize(field, theta, has_aux=True)
    return value, x, dx


@dataclass(frozen=True)
class Derivatives:
    """Both losses and fields at a point, and the fields' derivatives along themselves and along each other."""

    small_loss: float
    big_loss: float
    x: Point
    y: Point
    dx_x: Point
    dx_y: Point
    dy_x: Point
    dy_y: Point

    @property
    def bracket(self) -> Point:
        """The Lie bracket [F_S, F_B] = (DY) X - (DX) Y = H_B grad L_S - H_S grad L_B."""
        return combined((1.0, self.dy_x), (-1.0, self.dx_y))

    @property
    def curvature(self) -> float:
        """How much the fields change along themselves and along each other, relative to how far that leads."""
        x, y = norm(self.x), norm(self.y)
        return max(norm(self.dx_x) / x, norm(self.dy_y) / y, norm(self.dx_y) / y, norm(self.dy_x) / x)

    def modified_loss(self, h_small: float, h_big: float) -> float:
        """Theorem 1's loss: h_S L_S + h_B L_B + h_S^2/4 |grad L_S|^2 + h_B^2/4 |grad L_B|^2."""
        squares = h_small**2 / 4 * norm(self.x) ** 2 + h_big**2 / 4 * norm(self.y) ** 2
        return h_small * self.small_loss + h_big * self.big_loss + squares


def derivatives(losses: Losses, theta: Point) -> Derivatives:
    """The Derivatives at a point."""
    own, crossed = losses.at(theta, (1.0, 0.0), (0.0, 1.0)), losses.at(theta, (0.0, 1.0), (1.0, 0.0))
    small_loss, big_loss = float(own.small_loss), float(own.big_loss)
    return Derivatives(small_loss, big_loss, own.x, own.y, own.dx_u, crossed.dx_u, crossed.dy_w, own.dy_w)


def combined(*terms: tuple[Any, Point]) -> Point:
    """The linear combination of points, each with its coefficient."""
    return _compiled_sum(*zip(*terms, strict=True))


def _sum(coefficients: Sequence[Any], points: Sequence[Point]) -> Point:
    return jax.tree.map(lambda *leaves: sum(c * leaf for c, leaf in zip(coefficients, leaves, strict=True)), *points)


def norm(point: Point) -> float:
    """The Euclidean norm of a point."""
    return math.sqrt(_compiled_square(point))


def _square(point: Point) -> Any:
    return sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(point))


# Leaf by leaf each would be compiled by itself.
_compiled_sum, _compiled_square = jax.jit(_sum), jax.jit(_square)


def modified_field(losses: Losses, h_small: float, h_big: float, bracket: float = 1.0) -> Field:
    """The field G of Theorem 2; its bracket is multiplied with `bracket`: 0 leaves it out, -1 turns its sign."""
    mixed = bracket * h_small * h_big / 2

    def field(theta: Point) -> Point:
        # Both products of the bracket and both of the flatness terms come from two linear maps: (DX) of one combination
        # of the fields and (DY) of another.
        local = losses.at(theta, u=(-(h_small**2) / 2, -mixed), w=(mixed, -(h_big**2) / 2))
        return combined((h_small, local.x), (h_big, local.y), (1.0, local.dx_u), (1.0, local.dy_w))

    return field


def flow(field: Field, theta: Point, substeps: int = SUBSTEPS) -> Point:
    """How far a field carries a point in unit time, by the classical Runge-Kutta method of fourth order.

    The displacement, not the place: it is not rounded as the point is.
    """
    displacement = jax.tree.map(jnp.zeros_like, theta)
    for _ in range(substeps):
        start, at = displacement, displacement
        for ahead, weight in _STAGES:
            velocity = field(combined((1.0, theta), (1.0, at)))
            displacement = combined((1.0, displacement), (weight / substeps, velocity))
            at = combined((1.0, start), (ahead / substeps, velocity))
    return displacement


def two_steps(losses: Losses, theta: Point, h_small: float, h_big: float) -> Point:
    """The displacement after a step of the small models' gradient and one of the large model's, Eq. (6) and (7)."""
    first = combined((h_small, losses.at(theta).x))
    second = losses.at(combined((1.0, theta), (1.0, first))).y
    return combined((1.0, first), (h_big, second))


@dataclass(frozen=True)
class Convergence:
    """How far the flow of Theorem 2 is from two real steps, for a series of steps h_S = h_B: with the bracket, without
    it, and with its sign turned.

    `integration_error` is what the integrator adds to the first of these at the largest and the smallest step, as a
    part of it, at most.
    """

    steps: tuple[float, ...]
    with_bracket: tuple[float, ...]
    without_bracket: tuple[float, ...]
    wrong_sign: tuple[float, ...]
    integration_error: float

    @property
    def slopes(self) -> tuple[float, float, float]:
        """Of log error over log h: with the bracket, without it, with the wrong sign."""
        with_it, without, wrong = (
            slope(self.steps, errors) for errors in (self.with_bracket, self.without_bracket, self.wrong_sign)
        )
        return with_it, without, wrong


def convergence(losses: Losses, theta: Point, largest: float) -> Convergence:
    """The Convergence at a point, for steps from the largest one on, each half of the one before.

    Where the integrator's error is not negligible the series begins with half the step, a few times at most: a kink of
    ReLU may lie on the way, and Theorem 2 is about smooth losses. What is looked at is the integrator alone, never how
    far the flow is from the steps.
    """
    # On a small MLP in float64 the slopes came out as 2.93 to 2.96 with the bracket and as 1.94 to 1.99 without it or
    # with the wrong sign, which is how a wrong convention for the bracket would show.
    error = _integration_error(losses, theta, largest)
    for _ in range(MOST_RESTARTS):
        if error <= NEGLIGIBLE:
            break
        largest /= 2
        error = _integration_error(losses, theta, largest)
    steps = tuple(largest / 2**i for i in range(HALVINGS + 1))
    real = [two_steps(losses, theta, h, h) for h in steps]

    def errors(bracket: float) -> tuple[float, ...]:
        flows = (flow(modified_field(losses, h, h, bracket), theta) for h in steps)
        return tuple(_distance(found, there) for found, there in zip(flows, real, strict=True))

    error = max(error, _integration_error(losses, theta, steps[-1]))
    return Convergence(steps, errors(1.0), errors(0.0), errors(-1.0), error)


def _integration_error(losses: Losses, theta: Point, h: float) -> float:
    """How far the flow moves with twice as many substeps, as a part of its distance from two real steps."""
    field = modified_field(losses, h, h)
    once, twice = flow(field, theta), flow(field, theta, 2 * SUBSTEPS)
    distance = _distance(twice, two_steps(losses, theta, h, h))
    return _distance(once, twice) / distance if distance else math.inf


def _distance(one: Point, other: Point) -> float:
    return norm(combined((1.0, one), (-1.0, other)))


def slope(steps: Sequence[float], errors: Sequence[float]) -> float:
    """The slope of log error over log step, by least squares; NaN where an error is no positive number."""
    if not all(0.0 < error < math.inf for error in errors):
        return math.nan
    x, y = (np.log(each) - np.mean(np.log(each)) for each in (steps, errors))
    return float(x @ y / (x @ x))
