"""What an adapter measures of a user's batches, and the merge that is made of it, alike in every framework.

Convention: losses and curvatures are means over samples or over tokens, as the likelihood says.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from adapters.backend.batches import repeatable
from adapters.backend.memory import NOT_FINITE, InputGrams, check_finite
from adapters.backend.own_loop import MergeReport, NetworkCheck
from became_core import BecameError, Diagonal, LaplacePosterior, Quadratic, merge
from became_core.arrays import Array, Params, difference, namespace
from became_core.curvature import Likelihood
from became_core.laplace import Estimator, MergeSubspace

__all__ = ["ModelData", "TaskData", "TaskLoss", "by_slopes", "check_trace", "merge_report"]

# The part of the way along a direction at whose two sides slopes are taken, unless weights are in half precision.
STEP = 0.01


class TaskData(Protocol):
    """What an adapter measures on a user's batches."""

    def fisher(self, batches: Iterable[Any], *, with_memory: bool) -> tuple[Params, InputGrams]:
        """Return the diagonal Fisher information at the weights as they are, and what a projector remembers."""

    def along(
        self, batches: Iterable[Any], theta: Params, directions: Sequence[Params], share: float | None = 1.0
    ) -> tuple[Quadratic, str]:
        """Return the mean loss along directions from theta, and how its curvature was measured.

        It is that of a share of the batches, the same that ``fisher`` draws.
        """

    def slopes(
        self, batches: Iterable[Any], theta: Params, directions: Sequence[Params], places: Sequence[Sequence[float]]
    ) -> Array:
        """Return the slopes of the mean loss along K directions at M places, [M, K], in one pass over the batches.

        A place is theta plus the directions times its K coefficients. Every batch is read once and is used at all
        places, so that differences between places tell nothing of random augmentation or of a shuffled order.
        """

    def mean(self, batches: Iterable[Any], theta: Params | None = None) -> float:
        """Return the mean loss at theta, or at the weights as they are."""

    def in_dtype(self, numbers: Any, like: Array) -> Array:
        """Return numbers where an array is, in its dtype and in at least float32."""


class ModelData(TaskData, Protocol):
    """A model's loss on batches, and the model's parameters.

    Attributes:
        loss: a likelihood, or a loss of the user's own as one.
        checked: what the first look at the network found; None before it, or if there is none.
        matrices: the parameters that are used as matrices alone, and whether they are stored as [d_in, d_out]; None
            before the first look.
    """

    loss: Likelihood
    checked: NetworkCheck | None
    matrices: dict[str, bool] | None

    @property
    def trained(self) -> Mapping[str, Any]:
        """The parameters that are trained."""

    @property
    def shapes(self) -> Mapping[str, Sequence[int]]:
        """The shapes of all parameters, in the model's order."""

    def weights(self) -> Params:
        """Return copies of the trained parameters."""

    def assign(self, theta: Params) -> None:
        """Set the trained parameters."""

    def fisher(
        self,
        batches: Iterable[Any],
        *,
        with_memory: bool,
        held: frozenset[str] = frozenset(),
        share: float | None = 1.0,
    ) -> tuple[Params, InputGrams]:
        """Return the Fisher information of a share of the batches, and what a projector remembers of them.

        ``held`` are the parameters that old data hold otherwise than by the spaces of a projector.
        """

    def estimate_statistics(self, batches: Iterable[Any]) -> None:
        """Estimate the running statistics of batch norms anew, at the weights as they are; an error leaves them."""

    def kept_on_error(self) -> AbstractContextManager[None]:
        """Return a context that gives back what was known of the data before it, if it ends in an error."""


class TaskLoss:
    """A task's mean loss around weights; it measures what an estimator asks for, or a calibration.

    Attributes:
        mean: the weights, at a merge the plastic ones.
        way: how the curvature along a direction was measured.
    """

    def __init__(self, data: TaskData, batches: Iterable[Any], theta: Params, *, share: float | None = 1.0) -> None:
        """Keep what is measured.

        Args:
            data: at these weights where ``diagonal`` is asked for.
            batches: which are gone through several times.
            theta: the weights.
            share: of the batches, drawn at random, that ``along`` measures; None for one that suits their number.
        """
        self._data, self._batches, self._share = data, repeatable(batches), share
        self.mean = theta
        self.way = "the diagonal Fisher information"

    def diagonal(self) -> Diagonal:
        """Return the diagonal Fisher information at the weights.

        Raises:
            BecameError: if it is not finite.
        """
        fisher = self._data.fisher(self._batches, with_memory=False)[0]
        check_finite(fisher, NOT_FINITE)
        return Diagonal(fisher)

    def along(self, directions: Sequence[Params]) -> Quadratic:
        """Return the mean loss along directions from the weights."""
        quadratic, self.way = self._data.along(self._batches, self.mean, directions, self._share)
        return Quadratic(self._in_dtype(quadratic.slope), self._in_dtype(quadratic.curvature))

    def slope(self, origin: Params, directions: Sequence[Params]) -> Array:
        """Return the slopes of the mean loss at other weights."""
        at_origin = [[0.0] * len(directions)]
        return self._in_dtype(self._data.slopes(self._batches, origin, directions, at_origin)[0])

    def loss(self, theta: Params) -> float:
        """Return the true mean loss at other weights."""
        return self._data.mean(self._batches, theta)

    def _in_dtype(self, numbers: Any) -> Array:
        return self._data.in_dtype(numbers, next(iter(self.mean.values())))


def by_slopes(slopes: Callable[[Sequence[Sequence[float]]], Array], theta: Params, count: int) -> Quadratic:
    """Return a loss along K directions from theta, with the curvature as the difference of slopes at both sides.

    Args:
        slopes: from M places, each the K coefficients of the directions from theta, to the loss's slopes there, [M, K].
        theta: where to measure, for its dtypes: the coarser they are, the longer a step must be to be told from
            rounding, by the cube root of the unit, at which a central difference loses least.
        count: the number of directions, K.
    """
    xp: Any = namespace(values=next(iter(theta.values())))
    step = max(STEP, *(float(xp.finfo(value.dtype).eps) ** (1 / 3) for value in theta.values()))
    sides = [[sign * step * (other == own) for other in range(count)] for own in range(count) for sign in (1, -1)]
    found = slopes([[0.0] * count, *sides])
    curvature = (found[1::2] - found[2::2]) / (2 * step)
    return Quadratic(found[0], (curvature + namespace(values=curvature).matrix_transpose(curvature)) / 2)


def check_trace(trace: int) -> None:
    """Raise a BecameError if a path of so many points has not both ends."""
    if trace < 0 or trace == 1:
        raise BecameError(f"trace is {trace}; give at least 2 points, both ends among them, or 0 for none.")


def merge_report(
    estimator: Estimator, posterior: LaplacePosterior, theta_gp: Params, new: TaskLoss, trace: int
) -> MergeReport:
    """Return the best coefficient between the stable weights and the plastic ones, ``new.mean``, and what tells of it.

    Args:
        estimator: how losses along the way are estimated.
        posterior: the old tasks' loss; it is flat along parameters that it does not know.
        theta_gp: the stable weights.
        new: the new task's loss at the plastic weights, of the same names.
        trace: at how many alphas the true loss of the new data is measured, both ends among them; 0 for none. It has
            passed ``check_trace``, before anything is measured.

    Raises:
        BecameError: if weights, or what is measured of the new data, are not finite.
    """
    theta_hat, way = new.mean, difference(new.mean, theta_gp)
    check_finite(
        way,
        "'{}' is not finite in the stable or in the plastic model: training has diverged there; load weights from "
        "before, and train with a smaller learning rate.",
    )
    subspace = MergeSubspace(theta_gp, [way], [1.0])
    known, xp = posterior.precision.diagonal(), namespace(values=next(iter(theta_hat.values())))
    precision = {name: known[name] if name in known else xp.zeros_like(value) for name, value in theta_hat.items()}
    mean = {name: posterior.mean.get(name, value) for name, value in theta_gp.items()}
    quadratic = estimator.quadratic(subspace, (LaplacePosterior(mean, Diagonal(precision)), new))
    alpha = float(quadratic.minimiser("box")[0])
    if not math.isfinite(alpha):
        raise BecameError("the loss of the new data is not finite along the way; look for NaN in the batches.")
    points = [index / (trace - 1) for index in range(trace)] if trace else []
    return MergeReport(
        alpha=alpha,
        slopes=(float(quadratic.slope_at(0.0)[0]), float(quadratic.slope_at(1.0)[0])),
        gain=float(quadratic.predicted_gain("box")),
        is_convex=bool(quadratic.is_convex),
        promised=bool(quadratic.has_interior_optimum),
        curvature=new.way,
        quadratic=quadratic,
        trace=[(point, new.loss(merge(theta_gp, theta_hat, point))) for point in points],
    )
