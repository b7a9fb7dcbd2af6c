"""What a method around a user's own loop remembers, alike in every framework.

A framework's adapter measures: Fisher information, slopes, curvature, and what layers read. What is made of the
measurements stands here and in ``merging.py``, so that it cannot be different in PyTorch, JAX and Keras.

Convention: losses and Fisher information are means over samples or over tokens, as the likelihood says, and tasks count
alike, each with its mean. Parameters are arrays by name. A matrix is stored as [d_out, d_in] or, transposed, as
[d_in, d_out]; further axes are flattened.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from became_core import BecameError, Diagonal, LaplacePosterior
from became_core.arrays import Array, Params, hold, namespace
from became_core.curvature import Exchange, GramSums
from became_core.projection import Products, Projector

__all__ = [
    "NOT_FINITE",
    "InputGrams",
    "Moments",
    "check_finite",
    "check_settings",
    "fisher_of_moments",
    "grown",
    "held_by_curvature",
    "matrices_with",
    "pull_of",
]

NOT_GATHERED = "this projector remembers gradients, which one pass does not gather; choose GPM, SGP or NSCL."
NOT_FINITE = "the Fisher information of '{}' is not finite; look for NaN in the batches, and for very large outputs."

# What Adams add to the root of a second moment, so that nothing is divided by zero.
SMALLEST_SCALE = 1e-8


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
    steps_alone = own.begin_task is Projector.begin_task and own.stages == 1
    if not steps_alone or own.protects_all or own.own_rank:
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
    check_finite(fisher, NOT_FINITE)
    old = {} if posterior is None else posterior.precision.diagonal()
    frozen = {name: decay * value for name, value in old.items() if name not in fisher}
    total = {name: value + decay * old[name] if name in old else value for name, value in fisher.items()}
    mean = {} if posterior is None else {name: posterior.mean[name] for name in frozen}
    return LaplacePosterior(mean | theta, Diagonal(frozen | total))


def check_finite(arrays: Params, message: str) -> None:
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
