"""Merging rules: values with one interface, ``merge(models, losses)``, from K models to one.

A rule is given K models, and, if it says that it needs them, the losses that the merged model must serve. In a
continual run these are (theta_gp, theta_hat) and (the old tasks' posterior, the new task measured at theta_hat); in
federated or ensemble merging, the clients' weights and each client's own loss near them.

A rule of one's own is a frozen dataclass below ``MergeRule``. Unless it says otherwise it is given the losses, so that
a rule that calls another one gets what that one needs.

| rule | merged weights | source |
| --- | --- | --- |
| ``Equal`` | the mean | |
| ``Fixed`` | (1 - alpha) theta_1 + alpha theta_2, alpha chosen by hand | CoMA, Marouf 2024 |
| ``MeanIMM`` | sum_k m_k theta_k | Lee 2017, mean-based IMM |
| ``ModeIMM`` | (sum_k m_k F_k)^-1 sum_k m_k F_k theta_k, F_k diagonal | Lee 2017, mode-based IMM |
| ``FisherMerge`` | the same, of any K models with any weights | Matena & Raffel 2022 |
| ``Became`` | the minimum of the losses' quadratic between the models | BECAME 2025 |
| ``BecameCurve`` | the minimum along a curve between two models, in ``bezier`` | |
| ``GridSearch`` | the best of a grid by a true loss | |

Rules that differ from merge to merge of a continual run are in ``became_core.continual.task_rules``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

from became_core.arrays import (
    Array,
    Params,
    Reduce,
    Tree,
    difference,
    in_single,
    namespace,
    promoted,
    reduction_dtype,
    shared_by_processes,
)
from became_core.errors import BecameError
from became_core.laplace.estimators import Estimator, LocalLoss, MergeSubspace, Secant
from became_core.laplace.expansion import Per, group_directions, group_names, group_of
from became_core.laplace.merge import combine, merge, scalar
from became_core.laplace.path import finite_losses, trace_path
from became_core.laplace.quadratic import Quadratic
from became_core.laplace.restricted import restricted

__all__ = [
    "Became",
    "Equal",
    "FisherMerge",
    "Fixed",
    "GridSearch",
    "MeanIMM",
    "MergeRule",
    "Merged",
    "ModeIMM",
]

TrueLoss = Callable[[Params], Any]

PerWeight = Literal[Per, "weight"]
"""Which weights share one coefficient of a rule: those that ``Per`` says; with "weight", each has its own."""


class Merged(NamedTuple):
    """What a rule returns.

    Attributes:
        theta: the merged weights.
        alpha: of two models, the second one's coefficient, 0-d or a tree of such; of more, all coefficients, [K]; None
            where the merged weights lie on no segment.
    """

    theta: Params
    alpha: Array | Tree | None


class MergeRule(ABC):
    """How to make one model of several."""

    needs_losses: ClassVar[bool] = True
    """Whether ``merge`` looks at losses. A continual run keeps a posterior of the old tasks for a rule that does."""

    @abstractmethod
    def merge(self, models: Sequence[Params], losses: Sequence[LocalLoss]) -> Merged:
        """Return the merged weights.

        Args:
            models: at least two, of one structure.
            losses: what the merged model must serve, one for each model; none where the rule needs none. A loss
                measures what it is asked for, and nothing else is computed.
        """

    def for_task(self, task: int, true_loss: TrueLoss) -> "MergeRule":
        """Return the rule of the merge after a task of a continual run; the same one, unless a rule says otherwise.

        Args:
            task: its number, counted from 0, so that the first merge is after task 1.
            true_loss: of a model: the loss of all tasks so far on their own data, which only a bound may look at.
        """
        return self


@dataclass(frozen=True)
class Equal(MergeRule):
    """The plain mean of all models.

    Examples:
        >>> import numpy as np
        >>> models = [{"w": np.array([0.0])}, {"w": np.array([1.0])}]
        >>> Equal().merge(models, ()).theta
        {'w': array([0.5])}
    """

    needs_losses: ClassVar[bool] = False

    def merge(self, models: Sequence[Params], losses: Sequence[LocalLoss]) -> Merged:
        """Return the mean."""
        return MeanIMM().merge(models, losses)


@dataclass(frozen=True)
class Fixed(MergeRule):
    """A coefficient chosen by hand, the same at every merge.

    Raises:
        BecameError: if it is not in [0, 1].

    Examples:
        >>> import numpy as np
        >>> models = [{"w": np.array([0.0])}, {"w": np.array([1.0])}]
        >>> Fixed(0.25).merge(models, ()).theta
        {'w': array([0.25])}
    """

    alpha: float

    needs_losses: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the coefficient."""
        if not 0 <= self.alpha <= 1:
            raise BecameError(f"the merging coefficient is {self.alpha}; it must be in [0, 1].")

    def merge(self, models: Sequence[Params], losses: Sequence[LocalLoss]) -> Merged:
        """Return (1 - alpha) theta_1 + alpha theta_2.

        Raises:
            BecameError: if there are not two models.
        """
        first, second = two_of(models, "a fixed coefficient")
        return Merged(merge(first, second, self.alpha), _array(self.alpha, first))


@dataclass(frozen=True)
class MeanIMM(MergeRule):
    """Mean-based incremental moment matching: the mixture's mean.

    Attributes:
        mixing: m_k, non-negative, scaled to sum 1; equal if not given.

    Examples:
        >>> import numpy as np
        >>> models = [{"w": np.array([0.0])}, {"w": np.array([1.0])}]
        >>> MeanIMM(mixing=(3.0, 1.0)).merge(models, ()).theta
        {'w': array([0.25])}
    """

    mixing: tuple[float, ...] | None = None

    needs_losses: ClassVar[bool] = False

    def merge(self, models: Sequence[Params], losses: Sequence[LocalLoss]) -> Merged:
        """Return sum_k m_k theta_k.

        Raises:
            BecameError: if the mixing has not one non-negative number for each model, or is 0 for all.
        """
        mixing = _shares(self.mixing, len(models), "mixing is")
        alpha = mixing[1] if len(models) == 2 else mixing
        return Merged(combine(models, mixing), _array(alpha, models[0]))


@dataclass(frozen=True)
class ModeIMM(MergeRule):
    """Mode-based incremental moment matching: the mode of the product of the models' Laplace posteriors.

    Attributes:
        mixing: m_k, non-negative, scaled to sum 1; equal if not given.

    Examples:
        >>> import numpy as np
        >>> from became_core import Diagonal, LaplacePosterior
        >>> models = [{"w": np.array([0.0])}, {"w": np.array([1.0])}]
        >>> losses = [LaplacePosterior(model, Diagonal({"w": np.array([f])})) for model, f in zip(models, (3.0, 1.0))]
        >>> ModeIMM().merge(models, losses).theta
        {'w': array([0.25])}
    """

    mixing: tuple[float, ...] | None = None

    def merge(self, models: Sequence[Params], losses: Sequence[LocalLoss]) -> Merged:
        """Return (sum_k m_k F_k)^-1 sum_k m_k F_k theta_k, F_k being the diagonal of loss k.

        Raises:
            BecameError: if there is not one loss for each model; or if the mixing has not one non-negative number for
                each, or is 0 for all.
        """
        return _mode(models, losses, self.mixing, "mixing is")


@dataclass(frozen=True)
class FisherMerge(MergeRule):
    """Fisher-weighted averaging of K models.

    Attributes:
        weights: lambda_k, each model's importance, non-negative; equal if not given.

    Examples:
        >>> import numpy as np
        >>> from became_core import Diagonal, LaplacePosterior
        >>> models = [{"w": np.array([0.0])}, {"w": np.array([1.0])}]
        >>> losses = [LaplacePosterior(model, Diagonal({"w": np.array([f])})) for model, f in zip(models, (3.0, 1.0))]
        >>> FisherMerge(weights=(1.0, 3.0)).merge(models, losses).theta
        {'w': array([0.5])}
    """

    weights: tuple[float, ...] | None = None

    def merge(self, models: Sequence[Params], losses: Sequence[LocalLoss]) -> Merged:
        """Return (sum_k lambda_k F_k)^-1 sum_k lambda_k F_k theta_k.

        Raises:
            BecameError: if there is not one loss for each model; or if the weights are not one non-negative number for
                each, or are all 0.
        """
        return _mode(models, losses, self.weights, "weights are")


@dataclass(frozen=True)
class Became(MergeRule):
    """The minimum of the losses' estimated quadratic between the models, in closed form.

    Attributes:
        precision: how the losses' curvatures are estimated; ``estimators`` has several.
        per: "model" for one coefficient; "layer" or "leaf" for one for each, of two models; "weight" for one for each
            weight. The last is computed from the losses' diagonals alone, as ``ModeIMM`` does it.
        reduce: how numbers are summed over all processes or devices, if the models are one's own parts of models, as
            within ``jax.shard_map``. PyTorch's ``DTensor`` needs none.
        shrinkage: with "weight", how far the result is moved towards the merge per model: 0 for not at all, 1 for all
            the way. A diagonal says too much of single weights; the merge per model uses what is known of all together.

    Raises:
        BecameError: if the shrinkage is not in [0, 1].

    Examples:
        >>> import numpy as np
        >>> from became_core import Diagonal, LaplacePosterior, PaperClosedForm
        >>> models = [{"w": np.array([0.0])}, {"w": np.array([1.0])}]
        >>> losses = [LaplacePosterior(model, Diagonal({"w": np.array([f])})) for model, f in zip(models, (3.0, 1.0))]
        >>> float(Became(PaperClosedForm()).merge(models, losses).alpha)
        0.25
    """

    precision: Estimator = field(default_factory=Secant)
    per: PerWeight = "model"
    reduce: Reduce | None = None
    shrinkage: float = 0.0

    def __post_init__(self) -> None:
        """Check the shrinkage."""
        if not 0 <= self.shrinkage <= 1:
            raise BecameError(f"the shrinkage is {self.shrinkage}; it must be in [0, 1].")

    def merge(self, models: Sequence[Params], losses: Sequence[LocalLoss]) -> Merged:
        """Return the best point of the segment between two models, or of the simplex that K models span.

        Raises:
            BecameError: if there is not one loss for each model, or a coefficient for each layer or leaf is asked for
                of more than two models.
        """
        check_losses(models, losses)
        per = self.per
        if per == "weight":
            return self._by_weight(models, losses)
        if len(models) == 2:
            return self._between(models[0], models[1], losses, per)
        if per != "model":
            raise BecameError(f"a coefficient per {per} is for two models, not {len(models)}.")
        first, *others = models
        newest = [0.0] * (len(others) - 1) + [1.0]
        quadratic = self._quadratic(
            MergeSubspace(first, [difference(model, first) for model in others], newest), losses
        )
        coefficients = quadratic.with_origin().minimiser("simplex")
        return Merged(combine(models, coefficients), coefficients)

    def _quadratic(self, subspace: MergeSubspace, losses: Sequence[LocalLoss]) -> Quadratic:
        """Return the estimated quadratic; of models that processes share, with one reduction for all posteriors."""
        if self.reduce is not None or shared_by_processes(list(subspace.origin.values())) is not None:
            subspace, losses = restricted(subspace, losses, self.reduce)
        return self.precision.quadratic(subspace, losses)

    def _between(self, theta_gp: Params, theta_hat: Params, losses: Sequence[LocalLoss], per: Per) -> Merged:
        delta = difference(theta_hat, theta_gp)
        if per == "model":
            alpha = self._quadratic(MergeSubspace(theta_gp, [delta], [1.0]), losses).minimiser("box")[0]
            return Merged(merge(theta_gp, theta_hat, alpha), alpha)
        groups = group_names(theta_gp, per)
        frame = MergeSubspace(theta_gp, group_directions(delta, per), [1.0] * len(groups))
        minimiser = self._quadratic(frame, losses).minimiser("box")
        alphas = {name: minimiser[groups.index(group_of(name, per))] for name in theta_gp}
        return Merged(merge(theta_gp, theta_hat, alphas), alphas)

    def _by_weight(self, models: Sequence[Params], losses: Sequence[LocalLoss]) -> Merged:
        mode = ModeIMM().merge(models, losses).theta
        if self.shrinkage > 0:
            per_model = replace(self, per="model").merge(models, losses)
            mode = merge(mode, per_model.theta, self.shrinkage)
        return Merged(mode, None)


@dataclass(frozen=True)
class GridSearch(MergeRule):
    """The best coefficient of an even grid by a true loss: what a closed form is held against.

    Attributes:
        loss: of a model; a number, or a 0-d array.
        points: how many, both ends among them.

    Examples:
        >>> import numpy as np
        >>> models = [{"w": np.array([0.0])}, {"w": np.array([1.0])}]
        >>> rule = GridSearch(lambda theta: float((theta["w"][0] - 0.32) ** 2), points=11)
        >>> float(rule.merge(models, ()).alpha)
        0.3
    """

    loss: TrueLoss
    points: int = 21

    needs_losses: ClassVar[bool] = False

    def merge(self, models: Sequence[Params], losses: Sequence[LocalLoss]) -> Merged:
        """Return the best of the segment's grid points.

        Raises:
            BecameError: if there are not two models, the grid has no two ends, or a loss is not finite.
        """
        first, second = two_of(models, "a grid search")
        if self.points < 2:
            raise BecameError(f"a grid of {self.points} points has no ends; give at least 2.")
        alphas = [index / (self.points - 1) for index in range(self.points)]
        values = finite_losses(trace_path(self.loss, first, second, alphas))
        best = alphas[values.index(min(values))]
        return Merged(merge(first, second, best), _array(best, first))


def precision_weighted_mean(models: Sequence[Params], precisions: Sequence[Params], weights: Sequence[float]) -> Params:
    """Return (sum_k w_k F_k)^-1 sum_k w_k F_k theta_k; the weighted mean of the models where every F_k is zero.

    It has the dtypes of the first model, and is computed in the promoted one of all, which is at least float32.
    """
    merged = {}
    for name, own in models[0].items():
        values = promoted(*(in_single(tree[name]) for tree in (*models, *precisions)))
        thetas, curvatures = values[: len(models)], values[len(models) :]
        first, xp = thetas[0], namespace(model=own)
        factors = [weight * curvature for weight, curvature in zip(weights, curvatures, strict=True)]
        total = sum(factors[1:], factors[0])
        known = total > 0
        safe = xp.where(known, total, xp.ones_like(total))
        # From the first model: where all agree, so does the result, to the bit.
        step = xp.zeros_like(first)
        for theta, factor, weight in zip(thetas, factors, weights, strict=True):
            step = step + xp.where(known, factor / safe, xp.zeros_like(total) + weight) * (theta - first)
        merged[name] = xp.astype(first + step, own.dtype, copy=False)
    return merged


def diagonal_of(loss: LocalLoss, theta: Params) -> Params:
    """Return the diagonal of a loss's curvature by every parameter of theta: 0 by those that it does not depend on.

    Kronecker factors of old tasks, say, know nothing of a new task's head.
    """
    known = loss.diagonal().values
    return {name: known[name] if name in known else value * 0 for name, value in theta.items()}


def check_losses(models: Sequence[Params], losses: Sequence[LocalLoss]) -> None:
    if len(losses) != len(models):
        raise BecameError(f"there are {len(models)} models and {len(losses)} losses; give each model's own loss.")


def two_of(models: Sequence[Params], what: str) -> tuple[Params, Params]:
    if len(models) != 2:
        raise BecameError(f"{what} is for two models, not {len(models)}.")
    return models[0], models[1]


def _mode(models: Sequence[Params], losses: Sequence[LocalLoss], weights: Sequence[float] | None, what: str) -> Merged:
    check_losses(models, losses)
    precisions = [diagonal_of(loss, models[0]) for loss in losses]
    return Merged(precision_weighted_mean(models, precisions, _shares(weights, len(models), what)), None)


def _shares(weights: Sequence[float] | None, count: int, what: str) -> list[float]:
    """Return non-negative shares of sum 1; a refusal begins with what these numbers are: "mixing is"."""
    shares = [1.0] * count if weights is None else list(weights)
    if len(shares) != count or not all(0 <= share < math.inf for share in shares) or sum(shares) <= 0:
        raise BecameError(f"the {what} {shares} for {count} models; give one non-negative number each, not all 0.")
    return [share / sum(shares) for share in shares]


def _array(number: float | Sequence[float], like: Params) -> Array:
    first = next(iter(like.values()))
    return scalar(number, reduction_dtype(namespace(model=first), model=first), first)
