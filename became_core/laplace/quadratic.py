"""The quadratic along directions: the sufficient statistic of merging (BECAME, Sections 3.2 and 3.3).

Along theta_0 + sum_k a_k d_k a loss known to second order is, up to a constant,

    q(a) = b.a + 1/2 a.C.a        slope b [K], curvature C [K, K]

All that a merge needs is read off it: its minimiser (alpha*, for the one direction delta = theta_hat - theta_gp),
convexity, the slopes at both ends, the gain to expect. Quadratics add: over leaves, layers, shards and tasks.

Minimisers: one direction, or several that the curvature does not couple, have a closed form, which works under any
trace. Several coupled directions are minimised in the box [0, 1]^K or on the simplex (a >= 0, sum a = 1) on the host in
double precision, because K is small and the search depends on values. On a face of these regions some coefficients are
held at a bound and the others satisfy a linear system; a minimiser is that point of some face which meets the
optimality (KKT) conditions. For few directions all faces are tried, which finds the global minimum even where the
quadratic is not convex. For more, the active-set method walks from face to face (Nocedal & Wright, Numerical
Optimization, Algorithm 16.3).

Convention: the unit of the loss (a mean or a sum over samples) is the caller's, and is the same in every term.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from became_core.arrays import Array, check_values, device, has_values, namespace, on_host, pytree
from became_core.errors import BecameError

__all__ = ["CONSTRAINTS", "Constrained", "Quadratic", "segment_minimiser"]

# None: anywhere. "box": each coefficient in [0, 1]. "simplex": none negative, and their sum 1.
Constrained = Literal["box", "simplex"] | None
CONSTRAINTS = (None, "box", "simplex")

# Up to so many directions all faces are tried: 3^5 of the box, 2^9 of the simplex.
ENUMERATED = {"box": 5, "simplex": 9}

Numbers = NDArray[np.float64]


@pytree
@dataclass(frozen=True)
class Quadratic:
    """A loss along K directions, up to a constant: ``b.a + 1/2 a.C.a``.

    Attributes:
        slope: b, the derivatives at a = 0, [K].
        curvature: C, symmetric, [K, K].

    Raises:
        BecameError: if the shapes are not [K] and [K, K] with K at least 1.

    Examples:
        >>> import numpy as np
        >>> loss = Quadratic(slope=np.array([-4.0]), curvature=np.array([[2.0]]))
        >>> loss.minimiser(), loss.minimiser("box")
        (array([2.]), array([1.]))
    """

    slope: Array
    curvature: Array

    def __post_init__(self) -> None:
        """Check the shapes."""
        namespace(slope=self.slope, curvature=self.curvature)
        slope, curvature = tuple(self.slope.shape), tuple(self.curvature.shape)
        if len(slope) != 1 or slope[0] < 1 or curvature != slope * 2:
            raise BecameError(f"a quadratic has slope {slope} and curvature {curvature}; give [K] and [K, K].")

    @property
    def directions(self) -> int:
        """How many directions there are, K."""
        return int(self.slope.shape[0])

    def __add__(self, other: "Quadratic") -> "Quadratic":
        """Return the quadratic of the sum of the two losses."""
        return Quadratic(self.slope + other.slope, self.curvature + other.curvature)

    def __radd__(self, other: Any) -> "Quadratic":
        """Return the quadratic itself when it is added to 0, so that ``sum(quadratics)`` is the sum of several."""
        if isinstance(other, int | float) and other == 0:
            return self
        return NotImplemented

    def __mul__(self, factor: Array | float) -> "Quadratic":
        """Return the quadratic of the loss times a number."""
        return Quadratic(self.slope * factor, self.curvature * factor)

    def with_origin(self) -> "Quadratic":
        """Return it in the coefficients of K + 1 models: the origin, to which nothing leads, and the directions' ends.

        On the simplex of these coefficients lie the weighted means of the models.

        Example:
            >>> import numpy as np
            >>> between = Quadratic(np.asarray([-1.0]), np.asarray([[4.0]]))
            >>> between.with_origin().minimiser("simplex").tolist()
            [0.75, 0.25]
        """
        xp = namespace(slope=self.slope)
        column = xp.zeros_like(self.curvature[:, :1])
        row = xp.zeros_like(self.slope[:1])
        below = xp.concat([column, self.curvature], axis=1)
        above = xp.zeros_like(below[:1, :])
        return Quadratic(xp.concat([row, self.slope]), xp.concat([above, below], axis=0))

    def value(self, a: Array | float) -> Array:
        """Return the change of the loss from a = 0 to this point [K] (or to each of [..., K]; a number means [1])."""
        point = self._point(a)
        xp = namespace(a=point)
        return xp.sum(point * (self.slope + 0.5 * self.bend(point)), axis=-1)

    def slope_at(self, a: Array | float) -> Array:
        """Return the gradient b + C a at this point, [K] (or at each of [..., K]; a number means [1])."""
        return self.slope + self.bend(self._point(a))

    @property
    def is_convex(self) -> Array:
        """Whether the loss is convex along the directions, as wherever all curvatures are positive semi-definite.

        Up to rounding: the least eigenvalue may be as far below zero as the largest one's last few digits.

        Raises:
            BecameError: if there are several directions and something is not finite.
        """
        xp = namespace(curvature=self.curvature)
        if self.directions == 1:
            return self.curvature[0, 0] >= 0
        _check_finite(self.slope, self.curvature)
        eigenvalues = xp.linalg.eigvalsh(self.curvature)
        rounding = self.directions * xp.finfo(self.curvature.dtype).eps * xp.max(xp.abs(eigenvalues))
        return xp.min(eigenvalues) >= -rounding

    @property
    def has_interior_optimum(self) -> Array:
        """Whether the optimum lies strictly inside the box.

        For one direction: whether slopes of opposite sign at the ends put it between them, better than both (the
        plasticity theorem).
        """
        xp = namespace(slope=self.slope)
        if self.directions == 1:
            return (self.slope[0] < 0) & (self.slope_at(1.0)[0] > 0)
        free = _free_minimiser(self.slope, self.curvature)
        return xp.all((free > 0) & (free < 1)) & self.is_convex

    def minimiser(self, constraint: Constrained = None) -> Array:
        """Return the coefficients a* at which the loss is smallest, [K].

        Args:
            constraint: None for anywhere (the stationary point), "box" for [0, 1] each, "simplex" for non-negative
                coefficients with sum 1. Where nothing is curved or sloped, all zero; on the simplex, all on the first.

        Raises:
            BecameError: for an unknown constraint; with several directions, where something is not finite; with more
                than 5 in the box or 9 on the simplex, where the loss is not convex there; with several directions and
                a constraint, under a trace (``jax.jit``, ``torch.compile``, ``tf.function``, ``vmap``, ``jax.grad``).

        Derivatives of a constrained minimiser are those along its free coefficients, by the framework's automatic
        differentiation: the face on which it lies has none.

        Example:
            >>> import numpy as np
            >>> Quadratic(np.asarray([-1.0, -8.0]), np.diag([4.0, 4.0])).minimiser("box").tolist()
            [0.25, 1.0]
        """
        if constraint is None:
            return _free_minimiser(self.slope, self.curvature)
        if constraint not in CONSTRAINTS:
            raise BecameError(f"there is no constraint '{constraint}'; give None, 'box' or 'simplex'.")
        if self.directions == 1 and constraint == "box":
            return segment_minimiser(self.slope, self.curvature[:, 0], clip=True)
        return _constrained_minimiser(self.slope, self.curvature, constraint)

    def predicted_gain(self, constraint: Constrained = "box") -> Array:
        """Return how much smaller the loss is at the minimiser than at a = 0, a 0-d array, at least 0 in the box."""
        value = self.value(self.minimiser(constraint))
        xp = namespace(value=value)
        # The negative of 0.0 is -0.0, and TensorFlow takes 0 - value for the negative.
        return xp.where(value == 0, xp.zeros_like(value), -value)

    def _point(self, a: Any) -> Array:
        if not isinstance(a, int | float):
            return a
        if self.directions > 1:
            raise BecameError(f"a point of {self.directions} directions is an array [{self.directions}], not a number.")
        xp = namespace(slope=self.slope)
        return xp.full((1,), float(a), dtype=self.slope.dtype, device=device(self.slope))

    def bend(self, point: Array) -> Array:
        """Return C a at points [..., K], of the same shape: by how much the slopes differ from those at the origin."""
        xp = namespace(point=point, curvature=self.curvature)
        return xp.sum(self.curvature * xp.expand_dims(point, axis=-2), axis=-1)


def segment_minimiser(slope: Array, curvature: Array, *, clip: bool) -> Array:
    """Return the minimiser of ``slope * a + curvature * a^2 / 2``, element by element.

    Args:
        slope: of any shape.
        curvature: of the same shape.
        clip: minimise over [0, 1]: a concave or linear quadratic has its minimum at an end, and a constant one gives 0.
            Without it, the stationary point, and 0 where there is no curvature.

    Example:
        >>> import numpy as np
        >>> segment_minimiser(np.asarray([-1.0, -1.0]), np.asarray([4.0, 0.0]), clip=True).tolist()
        [0.25, 1.0]
    """
    xp = namespace(slope=slope, curvature=curvature)
    # What is below the smallest normal number is rounding, and some processors flush it: zero on all of them.
    tiny = xp.finfo(slope.dtype).smallest_normal
    zero, one = xp.zeros_like(slope), xp.ones_like(slope)
    slope = xp.where(xp.abs(slope) < tiny, zero, slope)
    curvature = xp.where(xp.abs(curvature) < tiny, zero, curvature)
    # `not (c <= 0)` rather than `c > 0`: what is not a number must not pass for "no curvature".
    curved = xp.logical_not(curvature <= 0) if clip else curvature != 0
    # The inner `where` keeps the branch not taken finite: its infinite gradient would poison the one that is. And the
    # gradient by a small curvature has its square, which would overflow: both are multiplied by a power of two.
    scale = xp.where(xp.abs(curvature) < 2.0**-60, one * 2.0**60, one)
    stationary = -(slope * scale) / xp.where(curved, curvature * scale, one)
    if not clip:
        return xp.where(curved, stationary, zero)
    better_end = xp.where(slope + 0.5 * curvature < 0, one, zero)
    return xp.where(curved, xp.clip(stationary, 0.0, 1.0), better_end)


def _free_minimiser(slope: Array, curvature: Array) -> Array:
    """Return the stationary point -C^-1 b, [K]; 0 for a direction without curvature."""
    xp = namespace(slope=slope, curvature=curvature)
    if slope.shape[0] == 1:
        return segment_minimiser(slope, curvature[:, 0], clip=False)
    _check_finite(slope, curvature)
    identity = xp.eye(slope.shape[0], dtype=curvature.dtype, device=device(curvature))
    magnitude, own = xp.max(xp.abs(curvature), axis=1), xp.abs(xp.sum(curvature * identity, axis=1))
    # A ridge of the size of rounding lets directions that coincide share their weight evenly rather than fail. It is a
    # share of each direction's own curvature: beside that of another one a small curvature is not rounding.
    own = xp.where(own > 0, own, xp.where(magnitude > 0, magnitude, xp.ones_like(own)))
    ridge = xp.where(magnitude > 0, 2 * slope.shape[0] * xp.finfo(curvature.dtype).eps * own, own)
    system = curvature + xp.expand_dims(ridge, axis=-1) * identity
    solution = xp.linalg.solve(system, xp.expand_dims(-slope, axis=-1))[:, 0]
    return xp.where(magnitude > 0, solution, xp.zeros_like(slope))


def _check_finite(slope: Array, curvature: Array) -> None:
    """Raise a BecameError where values can be looked at and one is NaN or infinite, which no solver takes."""
    xp = namespace(slope=slope, curvature=curvature)
    finite = xp.logical_and(xp.all(xp.isfinite(slope)), xp.all(xp.isfinite(curvature)))
    check_values(finite, f"a quadratic of {slope.shape[0]} directions has NaN or infinite entries; all must be finite.")


def _constrained_minimiser(slope: Array, curvature: Array, constraint: Literal["box", "simplex"]) -> Array:
    """Return the minimiser of several directions, found on the host."""
    xp, size = namespace(slope=slope, curvature=curvature), int(slope.shape[0])
    if not (has_values(slope) and has_values(curvature)):
        raise BecameError(
            f"a minimum along {size} directions with the constraint '{constraint}' depends on values, which a trace "
            "does not have; compute it outside jit, vmap, grad or compile."
        )
    _check_finite(slope, curvature)
    if constraint == "simplex":
        slope = slope - xp.min(slope)  # a constant added to all slopes changes nothing, but would cost digits
    face = _Faces(
        on_host(slope).astype(np.float64),
        on_host(curvature).astype(np.float64),
        float(xp.finfo(slope.dtype).eps),
        constraint == "simplex",
    )
    point, free = face.best() if size <= ENUMERATED[constraint] else face.walk()

    def constant(values: Numbers) -> Array:
        return xp.asarray(values, dtype=slope.dtype, device=device(slope))

    # A Newton step on the face. The point moves by rounding only, and gets the derivatives of the implicit function.
    minimum = constant(point)
    minimum = minimum - xp.matmul(constant(face.inverse(free)), slope + xp.matmul(curvature, minimum))
    minimum = xp.clip(minimum, 0.0, 1.0)
    return minimum / xp.sum(minimum) if constraint == "simplex" else minimum


@dataclass(frozen=True)
class _Faces:
    """The faces of the box or of the simplex, and a quadratic to minimise there, in double precision on the host.

    Attributes:
        slope: b [K].
        curvature: C [K, K].
        eps: the rounding of the numbers that these were made of.
        on_simplex: on the simplex, or in the box.

    A face is told by which coefficients are ``free``, booleans [K] or [faces, K], and where the others are ``held``.
    """

    slope: Numbers
    curvature: Numbers
    eps: float
    on_simplex: bool

    @property
    def slack(self) -> float:
        """What share of the largest number is taken for rounding."""
        return 16 * len(self.slope) * self.eps

    @property
    def own(self) -> Numbers:
        """How curved the loss is along each direction, [K], beside which rounding is small; the slope where it is flat.

        In the box a direction has a scale of its own: a curvature far below that of another one is no rounding. On the
        simplex the coefficients have one common gradient, and so one scale.
        """
        sizes = np.abs(np.diag(self.curvature)), np.abs(self.curvature).max(axis=1), np.abs(self.slope)
        if self.on_simplex:
            return np.full(len(self.slope), sizes[1].max() or sizes[2].max() or 1.0)
        return np.select([size > 0 for size in sizes], sizes, 1.0)

    @property
    def steepest(self) -> Numbers:
        """How large the terms of each direction's slope are in the box or on the simplex, [K]; 1 where all are 0."""
        terms = np.abs(self.curvature).max(axis=1) + np.abs(self.slope)
        if self.on_simplex:
            terms = np.full(len(terms), np.abs(self.curvature).max() + np.abs(self.slope).max())
        return np.where(terms > 0, terms, 1.0)

    def stationary(self, free: NDArray[np.bool_], held: Numbers) -> Numbers:
        """Return the point of each face where the loss is stationary along the face, [faces, K]."""
        # A constant added to all curvatures changes nothing on the simplex. With it, systems are singular only where a
        # face has many minima; a ridge of the size of rounding then lets coinciding directions share their weight.
        curvature = self.curvature + (np.abs(self.curvature).max() if self.on_simplex else 0.0)
        identity = np.eye(len(self.slope))
        ridged = curvature + identity * (2 * len(self.slope) * self.eps * self.own)
        systems = np.where(free[:, :, None] & free[:, None, :], ridged, identity)
        if not self.on_simplex:
            right = np.where(free, -(self.slope + held @ self.curvature), held)
            return np.asarray(np.linalg.solve(systems, right[..., None]))[..., 0]
        right = np.stack([free * self.slope, free * 1.0], axis=-1)
        by_slope, by_one = np.moveaxis(np.linalg.solve(systems, right), -1, 0)
        share = (1 + by_slope.sum(axis=1, keepdims=True)) / by_one.sum(axis=1, keepdims=True)
        return np.asarray(share * by_one - by_slope)

    def stationary_along(self, free: NDArray[np.bool_]) -> Numbers:
        """Return the point of one face of the simplex, [K], where the loss is stationary, whatever its curvature."""
        middle = free / free.sum()
        return np.asarray(middle - self.inverse(free) @ (self.slope + self.curvature @ middle))

    def pull(self, points: Numbers, free: NDArray[np.bool_]) -> Numbers:
        """Return how strongly the loss pulls each coefficient off its bound, [faces, K]; off zero slope, where free."""
        gradient = self.slope + points @ self.curvature
        if self.on_simplex:  # the free coefficients have one common gradient
            first = np.argmax(free, axis=1)[:, None]
            pull = np.take_along_axis(gradient, first, axis=1) - gradient
        else:
            pull = np.where(points > 0.5, gradient, -gradient)
        return np.where(free, np.abs(pull), pull)

    def best(self) -> tuple[Numbers, NDArray[np.bool_]]:
        """Return the minimiser [K] and what is free there, by trying all faces.

        It is the first point that meets the optimality conditions up to rounding, or the lowest feasible one if the
        loss is not convex. Not the lowest one in any case: near a minimum values differ by less than their rounding,
        and the conditions do not. Faces with few free coefficients come first, so that of many minima a simple one is
        taken.
        """
        bounds = (None, 0.0) if self.on_simplex else (0.0, 1.0, None)
        faces = sorted(product(bounds, repeat=len(self.slope)), key=_simplest_first)[int(self.on_simplex) :]
        free = np.array([[bound is None for bound in face] for face in faces])
        eigenvalues = np.linalg.eigvalsh(self.curvature)
        is_convex = eigenvalues.min() >= -self.slack * np.abs(eigenvalues).max()
        if is_convex or not self.on_simplex:
            points = self.stationary(free, np.array([[bound or 0.0 for bound in face] for face in faces]))
        else:  # the constant of ``stationary`` can make the system of a face singular that has one minimum
            points = np.array([self.stationary_along(face) for face in free])
        outside = np.maximum(0, np.maximum(-points, points - 1)).max(axis=1)
        if is_convex:
            violation = outside + (np.maximum(0, self.pull(points, free)) / self.steepest).max(axis=1)
            chosen = int(np.argmax(violation <= violation.min() + self.slack))
        else:
            height = (points * (self.slope + 0.5 * points @ self.curvature)).sum(axis=1)
            chosen = int(np.argmin(np.where(outside <= self.slack, height, np.inf)))
        return points[chosen], free[chosen]

    def walk(self) -> tuple[Numbers, NDArray[np.bool_]]:
        """Return the minimiser [K] of a convex loss and what is free there, by the active-set method.

        From a corner, always downhill: to the stationary point of the present face, or as far as a bound lets; there,
        one more coefficient is held. Where a face's own minimum is reached, the coefficient that the loss pulls most is
        let go.
        """
        size, across = len(self.slope), self.curvature
        if self.on_simplex:  # what only the sum of the coefficients feels is the same everywhere
            across = across - across.mean(axis=0, keepdims=True)
            across = across - across.mean(axis=1, keepdims=True)
        if np.linalg.eigvalsh(across).min() < -self.slack * np.abs(self.curvature).max():
            raise BecameError(
                f"a constrained minimum along {size} directions is found only where the loss is convex along them."
            )
        highest = np.inf if self.on_simplex else 1.0
        point, free = np.zeros(size), np.zeros(size, dtype=bool)
        if self.on_simplex:
            best_corner = np.argmin(self.slope + 0.5 * np.diag(self.curvature))
            point[best_corner], free[best_corner] = 1.0, True
        for _ in range(50 * size):
            step = self.stationary(free[None], np.where(free, 0.0, point)[None])[0] - point
            moves = np.abs(step) > self.slack
            room = np.full(size, np.inf)
            room[moves] = np.where(step > 0, highest - point, point)[moves] / np.abs(step[moves])
            blocking = int(np.argmin(room))
            if room[blocking] < 1 - self.slack:
                point = point + max(room[blocking], 0.0) * step
                point[blocking], free[blocking] = float(step[blocking] > 0), False
                continue
            point = point + step
            pull = np.where(free, -np.inf, self.pull(point[None], free[None])[0] / self.steepest)
            if pull.max() <= self.slack:
                return point, free
            free[np.argmax(pull)] = True
        raise BecameError(
            f"the constrained minimum along {size} directions was not found, for rounding; double precision may help."
        )

    def inverse(self, free: NDArray[np.bool_]) -> Numbers:
        """Return the inverse of the curvature along one face, [K, K]; zero across it, and where the loss is flat."""
        along = np.diag(free * 1.0)
        if self.on_simplex:
            along = along - np.outer(free, free) / free.sum()
        scale = np.sqrt(np.outer(self.own, self.own))
        inverse = np.linalg.pinv(along @ self.curvature @ along / scale, rcond=self.slack, hermitian=True) / scale
        return np.where(np.outer(free, free), inverse, 0.0)  # exactly, so that what is held stays where it is


def _simplest_first(face: tuple[float | None, ...]) -> tuple[int, list[float]]:
    """Order faces by how many coefficients are free, and then from the first coefficient on."""
    return face.count(None), [-1.0 if bound is None else bound for bound in face]
