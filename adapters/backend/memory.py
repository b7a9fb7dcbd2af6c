"""What a method around a user's own loop does alike in every framework: it remembers, covers and merges.

A framework's adapter measures: Fisher information, slopes, curvature, and what layers read. What is made of the
measurements stands here, so that it cannot be different in PyTorch, JAX and Keras.

Convention: losses and Fisher information are means over samples or over tokens, as the likelihood says, and tasks count
alike, each with its mean. Parameters are arrays by name. A matrix is stored as [d_out, d_in] or, transposed, as
[d_in, d_out]; further axes are flattened.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from adapters.backend.batches import repeatable
from adapters.backend.own_loop import MergeReport
from became_core import BecameError, Diagonal, LaplacePosterior, Quadratic, merge
from became_core.arrays import Array, Params, difference, hold, namespace
from became_core.curvature import Exchange, GramSums
from became_core.laplace import Estimator, MergeSubspace
from became_core.projection import Products, Projector

__all__ = [
    "InputGrams",
    "Moments",
    "NewTask",
    "NewTaskData",
    "by_slopes",
    "check_settings",
    "fisher_of_moments",
    "grown",
    "held_by_curvature",
    "matrices_with",
    "merge_report",
    "pull_of",
]

NOT_GATHERED = "this projector remembers gradients, which one pass does not gather; choose GPM, SGP or NSCL."
NOT_FINITE = "the Fisher information of '{}' is not finite; look for NaN in the batches, and for very large outputs."

# What Adams add to the root of a second moment, so that nothing is divided by zero.
SMALLEST_SCALE = 1e-8

# The part of the way along a direction at whose two sides slopes are taken.
STEP = 0.01


def check_settings(projector: Projector, uncovered: str, penalty: float, decay: float, fisher: str) -> None:
    """Raise a BecameError if a setting is out of its range, or the projector does more than to project steps."""
    if fisher not in ("empirical", "true", "sampled"):
        raise BecameError(f"the Fisher information is '{fisher}'; choose empirical, true or sampled.")
    if uncovered not in ("penalised", "frozen", "free"):
        raise BecameError(f"uncovered is '{uncovered}'; choose penalised, frozen or free.")
    if not 0 <= penalty < float("inf"):
        raise BecameError(f"the penalty is {penalty}; it must be at least 0 and finite.")
    if not 0 <= decay <= 1:
        raise BecameError(f"the decay is {decay}; it must be in [0, 1].")
    own = type(projector)
    steps_alone = own.begin_task is Projector.begin_task and own.stages == 1 and not own.protects_all
    if not steps_alone:
        raise BecameError(
            f"{own.__name__} does more than to project steps, which a loop of your own cannot do for it; choose GPM, "
            "SGP or NSCL."
        )


# What is remembered.


def grown(posterior: LaplacePosterior | None, theta: Params, fisher: Params, decay: float) -> LaplacePosterior:
    """Return the posterior with one more task: mean theta, precision fisher + decay x that of the old tasks.

    A parameter that was not trained before has the curvature of this task alone, and one that is not trained now keeps
    that of the old tasks, and their mean.

    Raises:
        BecameError: if Fisher information is not finite.
    """
    _check_finite(fisher, NOT_FINITE)
    old = {} if posterior is None else posterior.precision.diagonal()
    frozen = {name: decay * value for name, value in old.items() if name not in fisher}
    total = {name: value + decay * old[name] if name in old else value for name, value in fisher.items()}
    mean = {} if posterior is None else {name: posterior.mean[name] for name in frozen}
    return LaplacePosterior(mean | theta, Diagonal(frozen | total))


def _check_finite(arrays: Params, message: str) -> None:
    """Raise a BecameError with the name of the first array that has an infinite entry, or one that is no number."""
    is_finite = hold(lambda xp, values: xp.isfinite(values), list(arrays.values())) if arrays else []
    for name, holds in zip(arrays, is_finite, strict=True):
        if not holds:
            raise BecameError(message.format(name))


def held_by_curvature(precision: Params, matrices: Mapping[str, bool]) -> frozenset[str]:
    """Return the parameters of which old data have curvature, and no space: these stay penalised.

    Args:
        precision: the old tasks'; of what processes share, each gives its part.
        matrices: the parameters of which spaces are known.
    """
    others = {name: value for name, value in precision.items() if name not in matrices}
    are_zero = hold(lambda xp, value: value == 0, list(others.values())) if others else []
    return frozenset(name for name, is_zero in zip(others, are_zero, strict=True) if not is_zero)


def matrices_with(
    known: Mapping[str, bool], found: Mapping[str, bool | None], held: Collection[str]
) -> dict[str, bool]:
    """Return the matrices that are known and those that new data have found, in which the model may use other parts.

    Args:
        known: of old data, and whether they are stored as [d_in, d_out].
        found: of new data, likewise; None of a parameter that is used otherwise than as a matrix.
        held: the parameters that old data hold otherwise, which become no matrices.

    Raises:
        BecameError: if a matrix was multiplied from its other side before, or new data use it otherwise.
    """
    otherwise = [name for name, way in found.items() if way is None and name in known]
    if otherwise:
        raise BecameError(
            f"'{otherwise[0]}' is protected as a matrix that is multiplied as a whole, and these data use it "
            "in another way, which no projector protects; let the model use it alike, or freeze it."
        )
    matrices = {name: way for name, way in found.items() if way is not None}
    turned = [name for name, way in matrices.items() if known.get(name, way) != way]
    if turned:
        raise BecameError(
            f"'{turned[0]}' was multiplied from its other side in the memory; let the model use it alike."
        )
    return {**known, **{name: way for name, way in matrices.items() if name not in held}}


class Moments(NamedTuple):
    """What an Adam knows of one parameter's gradients.

    Attributes:
        second: the running mean of squared gradients of batches, which begins at zero, of the parameter's shape.
        steps: how many steps it is of, a number or a 0-d array.
        beta: the share of it that each step leaves, the optimiser's beta_2.
    """

    second: Array
    steps: Any
    beta: float

    @property
    def unbiased(self) -> Array:
        """The mean of the squared gradients, without the pull of its beginning at zero; zero before the first step."""
        missing = 1 - self.beta**self.steps
        if isinstance(missing, int | float):
            return self.second / (missing or 1.0)
        xp: Any = namespace(second=self.second)
        return self.second / xp.where(missing > 0, missing, xp.ones_like(missing))


def fisher_of_moments(
    moments: Mapping[str, Moments | None], samples: int | None, theta: Params, stacklevel: int
) -> Params:
    """Return Fisher information from an Adam's second moments, without their bias, times the samples of a step.

    The gradient of a batch of B samples is a mean, so that its square is 1/B of a sample's on average, where the mean
    gradient is small.

    Args:
        moments: by parameter; one that has none has no information.
        samples: how many samples (or tokens) a step had.
        theta: the trained parameters.
        stacklevel: of the warning that says what makes moments unfit.

    Raises:
        BecameError: if there are no samples, or no moments.
    """
    if samples is None or samples < 1:
        raise BecameError("remembering an optimizer needs samples=, how many samples or tokens a step had, at least 1.")
    known = {name: value for name, value in moments.items() if value is not None and name in theta and value.steps > 0}
    if not known:
        raise BecameError(
            "the optimizer has no second moments of the model's parameters; give an Adam that has stepped."
        )
    warnings.warn(
        "second moments of an optimizer stand for the Fisher information of old data: they are those of batches, at "
        "the weights of the last steps, and are unfit after clipping, a scaled loss, weight decay in the gradient "
        "(Adam's, not AdamW's), or few steps; batches of old data are better.",
        stacklevel=stacklevel + 1,
    )
    xp: Any = namespace(values=next(iter(theta.values())))
    return {
        name: known[name].unbiased * samples if name in known else xp.zeros_like(value) for name, value in theta.items()
    }


def pull_of(rate: Any, strength: Array, moments: Moments | None) -> Array:
    """Return s of the proximal step theta <- (theta + s mean) / (1 + s) that pulls a parameter back, of its shape.

    It minimises the penalty plus the squared distance from where the optimiser's step has led, and the distance is in
    the optimiser's own metric. An Adam divides by the root of its second moments, so that it goes as far where
    gradients are small as where they are large. If the pull did not, it would be nothing beside such steps.

    Args:
        rate: the learning rate.
        strength: penalty x precision.
        moments: what an Adam knows of the parameter's gradients; None of another optimiser.
    """
    if moments is None:
        return rate * strength
    xp: Any = namespace(second=moments.second)
    return rate * strength / (xp.sqrt(moments.unbiased) + SMALLEST_SCALE)


class InputGrams(GramSums):
    """What a projector may ask about data that were remembered: the Gram matrices of what layers read.

    Attributes:
        exchange: how processes bring together what each has of the data; None if this one has all.
    """

    exchange: Exchange | None = None
    _means: Params | None = None

    def input_grams(self) -> Params:
        """Return the means of a a^T by weight, [d_in, d_in], or factors of those."""
        if self._means is None:  # an exchange can be done once
            self._means = self.means(self.exchange)
        return self._means

    def gradient_grams(self) -> Params:
        """Raise a BecameError: only what layers read is gathered."""
        raise BecameError(NOT_GATHERED)

    def logit_gradients(self, count: int) -> Iterator[Mapping[str, Array | Products]]:
        """Raise a BecameError, as ``gradient_grams`` does."""
        raise BecameError(NOT_GATHERED)


# Merging.


class NewTaskData(Protocol):
    """What an adapter measures on a user's batches."""

    def fisher(self, batches: Iterable[Any], *, with_memory: bool) -> tuple[Params, "InputGrams"]:
        """Return the diagonal Fisher information at the weights as they are, and what a projector remembers."""

    def along(self, batches: Iterable[Any], theta: Params, directions: Sequence[Params]) -> tuple[Quadratic, str]:
        """Return the mean loss along directions from theta, and how its curvature was measured."""

    def slope(self, batches: Iterable[Any], theta: Params, directions: Sequence[Params]) -> Array:
        """Return the slopes of the mean loss along directions at theta, [directions]."""

    def mean(self, batches: Iterable[Any], theta: Params | None = None) -> float:
        """Return the mean loss at theta, or at the weights as they are."""

    def in_dtype(self, numbers: Any, like: Array) -> Array:
        """Return numbers where an array is, in its dtype and in at least float32."""


class NewTask:
    """The new task's loss at the plastic weights, at which the model is; it measures what an estimator asks for.

    Attributes:
        mean: the plastic weights.
        way: how the curvature along a direction was measured.
    """

    def __init__(self, data: NewTaskData, batches: Iterable[Any], theta_hat: Params) -> None:
        """Keep the data, batches, which are gone through several times, and the plastic weights."""
        self._data, self._batches = data, repeatable(batches)
        self.mean = theta_hat
        self.way = "the diagonal Fisher information"

    def diagonal(self) -> Diagonal:
        """Return the diagonal Fisher information at the plastic weights.

        Raises:
            BecameError: if it is not finite.
        """
        fisher = self._data.fisher(self._batches, with_memory=False)[0]
        _check_finite(fisher, NOT_FINITE)
        return Diagonal(fisher)

    def along(self, directions: Sequence[Params]) -> Quadratic:
        """Return the mean loss along directions from the plastic weights."""
        quadratic, self.way = self._data.along(self._batches, self.mean, directions)
        return Quadratic(self._in_dtype(quadratic.slope), self._in_dtype(quadratic.curvature))

    def slope(self, origin: Params, directions: Sequence[Params]) -> Array:
        """Return the slopes of the mean loss at other weights."""
        return self._in_dtype(self._data.slope(self._batches, origin, directions))

    def loss(self, theta: Params) -> float:
        """Return the true mean loss at other weights."""
        return self._data.mean(self._batches, theta)

    def _in_dtype(self, numbers: Any) -> Array:
        return self._data.in_dtype(numbers, next(iter(self.mean.values())))


def by_slopes(
    slope: Callable[[Params, Sequence[Params]], Array], theta: Params, directions: Sequence[Params]
) -> Quadratic:
    """Return a loss along K directions from theta, with the curvature as the difference of slopes at both sides.

    Args:
        slope: from weights and directions to the loss's slopes there, [K].
        theta: where to measure.
        directions: K of them.
    """
    rows = []
    for direction in directions:
        ahead, behind = (
            slope({name: value + sign * STEP * direction[name] for name, value in theta.items()}, directions)
            for sign in (1, -1)
        )
        rows.append((ahead - behind) / (2 * STEP))
    xp: Any = namespace(row=rows[0])
    curvature = xp.stack(rows)
    return Quadratic(slope(theta, directions), (curvature + xp.matrix_transpose(curvature)) / 2)


def merge_report(
    estimator: Estimator, posterior: LaplacePosterior, theta_gp: Params, new: NewTask, trace: int
) -> MergeReport:
    """Return the best coefficient between the stable weights and the plastic ones, ``new.mean``, and what tells of it.

    Args:
        estimator: how losses along the way are estimated.
        posterior: the old tasks' loss; of parameters that it does not know it says nothing.
        theta_gp: the stable weights.
        new: the new task's loss at the plastic weights, of the same names.
        trace: at how many alphas the true loss of the new data is measured, both ends among them; 0 for none.

    Raises:
        BecameError: if weights, or what is measured of the new data, are not finite.
    """
    theta_hat, way = new.mean, difference(new.mean, theta_gp)
    _check_finite(
        way,
        "'{}' is not finite in the stable or in the plastic model: training has diverged there; load weights from "
        "before, and train with a smaller learning rate.",
    )
    subspace = MergeSubspace(theta_gp, [way], [1.0])
    precision = {name: value for name, value in posterior.precision.diagonal().items() if name in theta_hat}
    mean = {name: posterior.mean.get(name, value) for name, value in theta_gp.items()}
    quadratic = estimator.quadratic(subspace, (LaplacePosterior(mean, Diagonal(precision)), new))
    alpha = float(quadratic.minimiser("box")[0])
    if not math.isfinite(alpha):
        raise BecameError("the loss of the new data is not finite along the way; look for NaN in the batches.")
    points = [index / (trace - 1) for index in range(trace)] if trace > 1 else [alpha] * trace
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
