"""A curved merging path: the quadratic Bezier curve between two models, its minimum, and when it beats the segment.

    theta(t) = (1 - t)^2 theta_gp + 2 t (1 - t) theta_c + t^2 theta_hat
             = theta_gp + t delta + 2 t (1 - t) bend,    bend = theta_c - (theta_gp + theta_hat) / 2

The segment is the curve that does not bend. Under two diagonal curvatures the Laplace cumulative loss has its minimum
where every weight has an alpha of its own,

    theta_J = (F_old + F_new)^-1 (F_old theta_gp + F_new theta_hat)

It lies on the segment only if F_new / (F_old + F_new) is one number wherever the models differ; otherwise the curve
that passes through it at t = 1/2,

    theta_c = 2 theta_J - (theta_gp + theta_hat) / 2,

beats every point of the segment by ``predicted_advantage``. A curve lies in the plane of delta and bend, where a loss
known to second order is a quadratic of two directions. Along the curve it is a polynomial of degree four in t, so its
minimum is at an end, or at a root of a cubic. The control point can be trained on true losses as well (Garipov 2018).

Convention: means over samples, as elsewhere; t in [0, 1].
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from became_core.arrays import (
    Array,
    Params,
    Tree,
    check_values,
    difference,
    in_single,
    map_leaves,
    named_leaves,
    namespace,
    promoted,
    pytree,
    with_leaves,
)
from became_core.errors import BecameError
from became_core.laplace.estimators import Estimator, LocalLoss, MergeSubspace, Secant
from became_core.laplace.expansion import path_quadratic
from became_core.laplace.merge import merge, scalar
from became_core.laplace.quadratic import Quadratic
from became_core.laplace.rules import Merged, MergeRule, check_losses, diagonal_of, precision_weighted_mean, two_of

__all__ = ["BecameCurve", "BezierPath", "bezier_path", "curve_minimiser", "predicted_advantage", "train_control"]


@pytree
@dataclass(frozen=True)
class BezierPath:
    """A quadratic Bezier curve between two models, trees of one structure."""

    theta_gp: Tree
    control: Tree
    theta_hat: Tree

    @property
    def bend(self) -> Tree:
        """How far the control point is from the middle of the segment, a tree; zero for the segment itself."""

        def offset(start: Array, control: Array, end: Array) -> Array:
            start, control, end = promoted(start, control, end)
            return control - 0.5 * (start + end)

        return map_leaves(offset, self.theta_gp, self.control, self.theta_hat)

    def at(self, t: Array | float) -> Tree:
        """Return theta(t): at 0 and 1 exactly the two models, and where these and the control point agree, that value.

        Args:
            t: a number, or a 0-d array of the models' framework.
        """
        weight = 2 * t * (1 - t)

        def bent(between: Array, bend: Array) -> Array:
            segment, bend = promoted(in_single(between), in_single(bend))
            curve = segment + scalar(weight, bend.dtype, bend) * bend
            return namespace(model=between).astype(curve, between.dtype, copy=False)

        return map_leaves(bent, merge(self.theta_gp, self.theta_hat, t), self.bend)


def bezier_path(theta_gp: Tree, theta_hat: Tree, fisher_old: Tree, fisher_new: Tree) -> BezierPath:
    """Return the curve that passes at t = 1/2 through the minimum of the Laplace cumulative loss.

    It is straight in weights whose curvature is zero on both sides.

    Args:
        theta_gp: the stable weights, an array or a tree of arrays.
        theta_hat: the plastic weights; this and what follows have the same structure and shapes.
        fisher_old: the diagonal precision of the old tasks, whose mean is at theta_gp.
        fisher_new: the diagonal curvature of the new task at theta_hat, in the same unit.

    Raises:
        BecameError: if structures, shapes or frameworks differ, a curvature is negative, or an entry is not finite.

    Example:
        >>> import numpy as np
        >>> stable, plastic = np.zeros(2), np.ones(2)
        >>> path = bezier_path(stable, plastic, np.asarray([1.0, 3.0]), np.asarray([3.0, 1.0]))
        >>> path.at(0.0).tolist(), path.at(0.5).tolist(), path.at(1.0).tolist()
        ([0.0, 0.0], [0.75, 0.25], [1.0, 1.0])
    """
    path_quadratic(theta_gp, theta_hat, fisher_old, fisher_new)  # for its checks
    best = _mode(theta_gp, theta_hat, fisher_old, fisher_new)

    def beyond(centre: Array, start: Array, end: Array) -> Array:
        centre, start, end = promoted(centre, start, end)
        return 2 * centre - 0.5 * (start + end)

    control = map_leaves(beyond, best, theta_gp, theta_hat)
    return BezierPath(theta_gp, control, theta_hat)


def predicted_advantage(theta_gp: Tree, theta_hat: Tree, fisher_old: Tree, fisher_new: Tree) -> Array:
    """Return by how much the curve's best point is lower than the segment's, a 0-d array, at least 0 up to rounding.

    Zero exactly where one alpha serves every weight: then the segment is as good.

    Args:
        theta_gp: the stable weights.
        theta_hat: the plastic weights.
        fisher_old: the diagonal precision of the old tasks.
        fisher_new: the diagonal curvature of the new task.

    Example:
        >>> import numpy as np
        >>> stable, plastic = np.zeros(2), np.ones(2)
        >>> float(predicted_advantage(stable, plastic, np.asarray([1.0, 3.0]), np.asarray([3.0, 1.0])))
        0.25
    """
    on_segment = path_quadratic(theta_gp, theta_hat, fisher_old, fisher_new).predicted_gain("box")
    start, end, old, new = (map_leaves(in_single, tree) for tree in (theta_gp, theta_hat, fisher_old, fisher_new))
    gains = named_leaves(map_leaves(_gain, start, end, _mode(start, end, old, new), new)).values()
    xp = namespace(gain=on_segment)
    return sum((xp.astype(gain, on_segment.dtype, copy=False) for gain in gains), -on_segment)


def curve_minimiser(quadratic: Quadratic) -> Array:
    """Return the t in [0, 1] at which a loss is smallest along a curve, a 0-d array; it can be compiled.

    Args:
        quadratic: the loss from theta_gp along two directions, delta and the curve's bend.

    Raises:
        BecameError: if the quadratic has not two directions, or has entries that are not finite.

    Along the curve the coefficients of the two directions are t and 2 t (1 - t), so the loss is a polynomial of degree
    four. Its stationary points are the roots of a cubic, by Cardano's formula; as the cubic's first coefficient may be
    no more than rounding, those of the quadratic without it are tried too. Five steps of Newton's method improve each,
    and the lowest of them and the two ends is taken: 0 where the loss is constant.

    Example:
        >>> import numpy as np
        >>> straight = Quadratic(np.asarray([-1.0, 0.0]), np.asarray([[4.0, 0.0], [0.0, 0.0]]))
        >>> float(curve_minimiser(straight))
        0.25
    """
    if quadratic.directions != 2:
        raise BecameError(f"a curve lies in a plane of two directions; the quadratic has {quadratic.directions}.")
    b, c = quadratic.slope, quadratic.curvature
    xp = namespace(slope=b, curvature=c)
    derivative = xp.stack(
        [
            b[0] + 2 * b[1],
            c[0, 0] + 4 * (c[0, 1] + c[1, 1] - b[1]),
            -6 * c[0, 1] - 12 * c[1, 1],
            8 * c[1, 1],
        ]
    )
    check_values(
        xp.all(xp.isfinite(derivative)), "the loss along a curve has NaN or infinite entries; all must be finite."
    )
    d0, d1, d2, d3 = (derivative[power] for power in range(4))
    t = xp.clip(_stationary_points(derivative), 0.0, 1.0)
    for _ in range(5):
        slope, rise = d0 + t * (d1 + t * (d2 + t * d3)), d1 + t * (2 * d2 + t * 3 * d3)
        rises = rise > 0  # elsewhere a step would lead to a maximum
        step = xp.where(rises, slope / xp.where(rises, rise, xp.ones_like(rise)), xp.zeros_like(rise))
        t = xp.clip(t - step, 0.0, 1.0)
    t = xp.concat([xp.zeros_like(b[:1]), xp.ones_like(b[:1]), t])
    height = t * (d0 + t * (d1 / 2 + t * (d2 / 3 + t * d3 / 4)))
    return xp.take(t, xp.reshape(xp.argmax(-height, axis=0), (1,)), axis=0)[0]


def _stationary_points(derivative: Array) -> Array:
    """Return what may be real roots of d0 + d1 t + d2 t^2 + d3 t^3, [5], finite all; others may be among them.

    Derivatives are finite, too: JAX goes through branches that are not taken, where an infinite one times 0 is NaN.
    """
    xp = namespace(derivative=derivative)
    zero, one = xp.zeros_like(derivative[0]), xp.ones_like(derivative[0])
    largest = xp.max(xp.abs(derivative))
    derivative = derivative / xp.where(largest > 0, largest, one)
    d0, d1, d2, d3 = (derivative[power] for power in range(4))

    def quotient(above: Array, below: Array, least: float = 0.0) -> Array:
        usable = xp.abs(below) > least
        return xp.where(usable, above / xp.where(usable, below, one), zero)

    def power(base: Array, exponent: float) -> Array:
        """The power of a number above 0, or else 0."""
        is_positive = base > 0
        safe = xp.where(is_positive, base, one)
        return xp.where(is_positive, xp.sqrt(safe) if exponent == 0.5 else safe**exponent, zero)

    # Without the cubic term. The sum whose terms have equal signs loses no digits; the other root is by their product.
    root = power(d1 * d1 - 4 * d2 * d0, 0.5)
    sum_of_both = -0.5 * (d1 + xp.where(d1 < 0, -root, root))
    few = [quotient(sum_of_both, d2), quotient(d0, sum_of_both)]

    # With it: s = t + shift has s^3 + p s + q = 0. A first coefficient so small that q would be noise is left out.
    least = float(xp.finfo(derivative.dtype).eps) ** 0.75
    shift = quotient(d2, 3 * d3, least)
    p = quotient(d1, d3, least) - 3 * shift * shift
    q = quotient(d0, d3, least) - shift * quotient(d1, d3, least) + 2 * shift * shift * shift
    discriminant = q * q / 4 + p * p * p / 27
    # One real root where it is positive: the cube root of a sum of equal signs, and its partner.
    large = power(xp.abs(q) / 2 + power(discriminant, 0.5), 1 / 3)
    large = xp.where(q > 0, -large, large)
    single = large - quotient(p, 3 * large)
    # Three where it is not: 2 r cos(angle), with r^2 = -p / 3 and cos(3 angle) = -q / (2 r^3).
    r = power(-p / 3, 0.5)
    cosine = quotient(-q, 2 * r * r * r)
    inside = xp.abs(cosine) < 1
    angle = xp.where(inside, xp.acos(xp.where(inside, cosine, zero)), xp.where(cosine > 0, zero, math.pi * one)) / 3
    triple = [2 * r * xp.cos(angle - 2 * math.pi * k / 3) for k in range(3)]
    return xp.stack(few + [xp.where(discriminant > 0, single, other) - shift for other in triple])


@dataclass(frozen=True)
class BecameCurve(MergeRule):
    """The minimum of the losses' estimated quadratic along a curve that bends towards the mode of their diagonals.

    The control point is that of ``bezier_path``, from both losses' diagonals, each at its own model. The estimator then
    says how the loss goes in the plane of the curve; the merged weights are the best point of it.

    Attributes:
        precision: how the losses' curvatures in that plane are estimated; ``estimators`` has several.

    Example:
        >>> import numpy as np
        >>> from became_core.laplace import Diagonal, LaplacePosterior
        >>> models = {"w": np.zeros(2)}, {"w": np.ones(2)}
        >>> fishers = [1.0, 3.0], [3.0, 1.0]
        >>> losses = [LaplacePosterior(m, Diagonal({"w": np.asarray(f)})) for m, f in zip(models, fishers)]
        >>> merged = BecameCurve().merge(models, losses)
        >>> merged.theta["w"].tolist(), float(merged.alpha)
        ([0.75, 0.25], 0.5)
    """

    precision: Estimator = field(default_factory=Secant)

    def merge(self, models: Sequence[Params], losses: Sequence[LocalLoss]) -> Merged:
        """Return the best point of the curve between two models, and its t as the coefficient.

        Raises:
            BecameError: if there are not two models with a loss each.
        """
        theta_gp, theta_hat = two_of(models, "a curve")
        check_losses(models, losses)
        path = bezier_path(theta_gp, theta_hat, *(diagonal_of(loss, theta_gp) for loss in losses))
        delta = difference(theta_hat, theta_gp)
        plane = MergeSubspace(theta_gp, [delta, path.bend], [1.0, 0.0])
        t = curve_minimiser(self.precision.quadratic(plane, losses))
        return Merged(path.at(t), t)


def train_control(
    path: BezierPath, gradient: Callable[[Tree], Tree], *, rate: float, steps: int, nodes: int = 3
) -> BezierPath:
    """Return the path with its control point moved downhill on the mean loss over the curve.

    Args:
        path: where to begin.
        gradient: of the loss, at a tree of weights.
        rate: the step's length.
        steps: how many.
        nodes: at how many inner points of the curve the loss is looked at, evenly spaced.

    Raises:
        BecameError: if there is nothing to do.
    """
    if steps < 1 or nodes < 1:
        raise BecameError(f"a control point is trained in {steps} steps at {nodes} nodes; give at least 1 of each.")
    for _ in range(steps):
        for node in range(1, nodes + 1):
            t = node / (nodes + 1)
            pull = 2 * t * (1 - t) * rate / nodes  # d theta(t) / d control = 2 t (1 - t)
            moved = map_leaves(
                lambda control, slope, pull=pull: control - pull * slope, path.control, gradient(path.at(t))
            )
            path = BezierPath(path.theta_gp, moved, path.theta_hat)
    return path


def _mode(theta_gp: Tree, theta_hat: Tree, fisher_old: Tree, fisher_new: Tree) -> Tree:
    """Return the minimum of two diagonal quadratics, each about its own model; the middle where nothing is curved."""
    models, fishers = [theta_gp, theta_hat], [fisher_old, fisher_new]
    mode = precision_weighted_mean(list(map(named_leaves, models)), list(map(named_leaves, fishers)), (0.5, 0.5))
    return with_leaves(theta_gp, mode)


def _gain(theta_gp: Array, theta_hat: Array, best: Array, fisher_new: Array) -> Array:
    """A leaf's gain over theta_gp at the mode of diagonals: 1/2 sum (best - theta_gp) F_new delta."""
    theta_gp, theta_hat, fisher_new, best = promoted(theta_gp, theta_hat, fisher_new, best)
    xp = namespace(theta_gp=theta_gp)
    return 0.5 * xp.sum((best - theta_gp) * fisher_new * (theta_hat - theta_gp))
