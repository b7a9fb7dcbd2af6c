"""The merging rules of checkpoints, by the names that plans have for them.

The formulas are the core's: quadratics, their minimisers, combinations and precision-weighted means.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters.checkpoints.plan import MergePlan, Setting, check_method, group_of_tensor
from adapters.checkpoints.rule import Array, Rule, Slab, Solution, scaled, times
from adapters.checkpoints.tensors import widened
from became_core import BecameError
from became_core.laplace import (
    Diagonal,
    ModeIMM,
    Quadratic,
    path_quadratic,
    subspace_quadratic,
)

__all__ = ["RULES", "rule_of"]

# A curvature over a slab that float32 is not trusted with.
TINY = 1e-30


class LinearMean(Rule):
    """The weighted mean, or without ``normalize`` the weighted sum."""

    takes_base = False
    copies_base = True

    def check_weights(self, name: str, weights: Sequence[float]) -> None:
        """Refuse weights that cannot be normalised."""
        if self.plan.normalize and not abs(math.fsum(weights)) > 1e-12:
            raise BecameError(f"the weights of '{name}' sum to {math.fsum(weights):g}; they cannot be normalised.")

    def shares(self, name: str, depth: float, weights: Sequence[float], solution: Solution) -> Sequence[float]:
        """Return w_k, or w_k / sum_k w_k."""
        return [weight / math.fsum(weights) for weight in weights] if self.plan.normalize else weights


class TaskArithmetic(Rule):
    """The base model and the weighted differences from it (Ilharco et al., 2023)."""

    def __init__(self, plan: MergePlan) -> None:
        """Ask for a base model."""
        super().__init__(plan)
        if plan.base_model is None:
            raise BecameError("task_arithmetic adds differences to a base model; give base_model.")

    def shares(self, name: str, depth: float, weights: Sequence[float], solution: Solution) -> Sequence[float]:
        """Return lambda w_k, of theta_0 + lambda sum_k w_k (theta_k - theta_0)."""
        scale = self.plan.scale.at(name, depth)
        return [scale * weight for weight in weights]


class Slerp(Rule):
    """The arc between two models, tensor by tensor (Shoemake, 1985); a straight line where they are almost parallel."""

    measures = True
    takes_base = False
    copies_base = True

    def __init__(self, plan: MergePlan) -> None:
        """Ask for two models, one of which is the base model if there is one: there t is 0."""
        super().__init__(plan)
        if len(plan.models) != 2:
            raise BecameError(f"slerp is between two models, not {len(plan.models)}.")
        if any(model.weight != Setting.of(1.0, "weight") for model in plan.models):
            raise BecameError("slerp makes no use of weights; in a plan, t says how far along the arc.")
        places = [model.model.absolute() for model in plan.models]
        base = places[0] if plan.base_model is None else plan.base_model.absolute()
        if base not in places:
            raise BecameError(
                f"slerp goes from base_model to the other model, and {plan.base_model} is none of the two."
            )
        self._is_reversed = base != places[0]

    def measure(self, slab: Slab) -> Quadratic:
        """Return the inner products of the two models, as a curvature."""
        pair = [{"": widened(model, np.float64)} for model in slab.learned]
        return subspace_quadratic(pair, Diagonal({"": np.ones(pair[0][""].shape)}))

    def solve(self, sums: Mapping[str, Quadratic]) -> Solution:
        """Return the coefficients of each tensor."""
        coefficients = {}
        for name, products in sums.items():
            (first, both), (_, second) = products.curvature.tolist()
            norms = math.sqrt(first * second)
            coefficients[name] = (both / norms if norms else 1.0,)
        return Solution(coefficients, {})

    def shares(self, name: str, depth: float, weights: Sequence[float], solution: Solution) -> Sequence[float]:
        """Return sin((1 - t) angle) / sin(angle) and sin(t angle) / sin(angle)."""
        t = self.plan.t.at(name, depth)
        t = 1.0 - t if self._is_reversed else t
        if name not in solution.coefficients:
            return 1.0 - t, t
        cosine = solution.coefficients[name][0]
        if abs(cosine) > 0.9995:  # the sines would be quotients of rounding
            return 1.0 - t, t
        angle = math.acos(cosine)
        return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


class RegressionMean(Rule):
    """RegMean (Jin et al., 2023): linear layers whose outputs fit all models' outputs best, on each one's own inputs.

    A tensor without Gram matrices has the weighted mean.
    """

    needs_gram = True
    takes_base = False

    def check_weights(self, name: str, weights: Sequence[float]) -> None:
        """Refuse weights of which none counts."""
        _check_counts(name, weights)

    def shares(self, name: str, depth: float, weights: Sequence[float], solution: Solution) -> Sequence[float]:
        """Return w_k / sum_k w_k."""
        return [weight / math.fsum(weights) for weight in weights]

    def merge(self, slab: Slab, solution: Solution) -> Array:
        """Return the rows of (sum_k w_k W_k G_k) (sum_k w_k G_k)^-1, W_k [rows, d_in], and G_k [d_in, d_in].

        Written from the mean, so that inputs that no model has seen keep the mean's response.
        """
        mean = super().merge(slab, solution)
        if not slab.grams:
            return mean
        width = slab.grams[0].shape[0]
        centre = mean.astype(np.float64).reshape(-1, width)
        pull = np.zeros_like(centre)
        for model, gram, weight in zip(slab.learned, slab.grams, slab.weights, strict=True):
            pull += (model.reshape(-1, width) - centre) @ (weight * gram)
        merged = (centre + pull @ slab.gram_inverse).reshape(-1)
        return np.asarray(merged, dtype=mean.dtype)


class FisherMean(Rule):
    """The precision-weighted mean, weight by weight (Matena & Raffel, 2022)."""

    needs_fisher = True
    takes_base = False
    by_weight = True

    def check_weights(self, name: str, weights: Sequence[float]) -> None:
        """Refuse weights of which none counts."""
        _check_counts(name, weights)

    def merge(self, slab: Slab, solution: Solution) -> Array:
        """Return (sum_k w_k F_k)^-1 sum_k w_k F_k theta_k; where nothing is curved, the weighted mean."""
        models = list(slab.learned)
        if any(fisher is None for fisher in slab.fishers):  # equal models, or batch statistics
            fishers = [np.zeros_like(model) for model in models]
        else:
            fishers = [scaled(fisher, 1.0) for fisher in slab.fishers]
        # The core's FisherMerge is this mean, with importances for mixing weights.
        losses: Any = [_Known({"": model}, Diagonal({"": f})) for model, f in zip(models, fishers, strict=True)]
        return np.asarray(ModeIMM(tuple(slab.weights)).merge([{"": model} for model in models], losses).theta[""])


class PosteriorMode(FisherMean):
    """Mode-based incremental moment matching (Lee et al., 2017): the same mean, with mixing weights."""


class WeightwiseMinimum(FisherMean):
    """The minimum of the sum of the losses' quadratics, with a coefficient for every weight: their posteriors' mode."""

    def __init__(self, plan: MergePlan) -> None:
        """Refuse what the closed form does not have."""
        super().__init__(plan)
        for model in plan.models:
            if model.gradient is not None or model.mean is not None:
                raise BecameError("a coefficient for each weight takes no gradient and no mean; choose another per.")


class GroupwiseMinimum(Rule):
    """The minimum of the sum of the losses' quadratics between the models (BECAME, 2025), by model, layer or leaf.

    Two models: the segment. More: the simplex. With a base model: the differences from it, each between 0 and 1.
    """

    needs_fisher = True
    takes_factors = True
    measures = True

    @property
    def constraint(self) -> Any:
        """Where the minimum is looked for."""
        two = len(self.plan.models) == 2
        return "box" if two or self.plan.base_model is not None else "simplex"

    def measure(self, slab: Slab) -> Quadratic:
        """Return the quadratic of all losses along the ways from the origin to the other models."""
        is_segment = len(slab.models) == 2 and not slab.has_base and slab.gradients[0] is None and slab.means[1] is None
        if is_segment and not slab.factors:
            fishers = [scaled(fisher, weight) for fisher, weight in zip(slab.fishers, slab.weights, strict=True)]
            quadratic = self._between(slab, fishers, np.float32)
            # Squares of small differences times small curvatures leave float32's range before float64's. What is lost
            # below it, 2^18 times 1e-45 at most, is nothing beside such a curvature. A curvature that is 0 because no
            # data reached these weights is exact.
            is_sound = TINY < float(quadratic.curvature[0, 0]) < np.inf and np.isfinite(quadratic.slope[0])
            if not is_sound and (slab.gradients[1] is not None or any(fisher.any() for fisher in fishers)):
                quadratic = self._between(slab, fishers, np.float64)
            return quadratic
        origin, *others = (widened(model, np.float64) for model in slab.models)
        directions = [{slab.name: other - origin} for other in others]
        quadratics = []
        for k, model in enumerate(slab.learned):
            mean, gradient = slab.means[k], slab.gradients[k]
            quadratics.append(
                subspace_quadratic(
                    directions,
                    slab.precision(k),
                    offset={slab.name: origin - (model if mean is None else mean)},
                    gradient=None if gradient is None else {slab.name: times(gradient, slab.weights[k])},
                )
            )
        return sum(quadratics)  # type: ignore[return-value] # 0 + Quadratic

    def _between(self, slab: Slab, fishers: Sequence[Array], dtype: Any) -> Quadratic:
        """Return the quadratic along the segment, added up in a dtype or a wider one."""
        first, second = slab.models
        gradient, mean = slab.gradients[1], slab.means[0]
        return path_quadratic(
            {slab.name: widened(first, dtype)},
            {slab.name: second},
            {slab.name: fishers[0]},
            {slab.name: fishers[1]},
            gradient=None if gradient is None else {slab.name: times(gradient, slab.weights[1])},
            mean=None if mean is None else {slab.name: mean},
        )

    def solve(self, sums: Mapping[str, Quadratic]) -> Solution:
        """Return the minimiser of each group."""
        members: dict[str, list[Quadratic]] = {}
        for name, quadratic in sums.items():
            members.setdefault(group_of_tensor(name, self.plan.per), []).append(quadratic)
        groups: dict[str, Any] = {group: sum(members[group]) for group in sorted(members, key=_natural)}
        coefficients = {}
        for group, quadratic in groups.items():
            if self.constraint == "simplex":
                numbers = quadratic.with_origin().minimiser("simplex").tolist()
            else:
                ways = quadratic.minimiser("box").tolist()
                numbers = [1.0 - math.fsum(ways), *ways]
            coefficients[group] = tuple(map(float, numbers))
        return Solution(coefficients, groups, self.constraint)

    def shares(self, name: str, depth: float, weights: Sequence[float], solution: Solution) -> Sequence[float]:
        """Return the coefficients of the tensor's group; of a group without parameters the mean of all groups'."""
        count = len(self.plan.models)
        numbers = solution.coefficients.get(group_of_tensor(name, self.plan.per))
        if numbers is None:
            numbers = _mean_coefficients(solution, count + (self.plan.base_model is not None))
        return numbers[len(numbers) - count :]


@dataclass(frozen=True)
class _Known:
    """A loss that is known by its diagonal, at one point."""

    mean: Mapping[str, Array]
    precision: Diagonal

    def diagonal(self) -> Diagonal:
        """Return the diagonal."""
        return self.precision


RULES: Mapping[str, type[Rule]] = {
    "became": GroupwiseMinimum,
    "linear": LinearMean,
    "fisher": FisherMean,
    "imm-mode": PosteriorMode,
    "regmean": RegressionMean,
    "slerp": Slerp,
    "task_arithmetic": TaskArithmetic,
}


def rule_of(plan: MergePlan) -> Rule:
    """Return the rule that a plan names.

    Raises:
        BecameError: if it is not known, or cannot follow the plan.
    """
    check_method(plan.merge_method)
    if plan.merge_method != "became" and plan.per != "model":
        raise BecameError(f"'per: {plan.per}' is for became; {plan.merge_method} has no such coefficient.")
    by_weight = plan.merge_method == "became" and plan.per == "weight"
    rule = WeightwiseMinimum(plan) if by_weight else RULES[plan.merge_method](plan)
    if plan.base_model is not None and not rule.takes_base:
        name = "became per weight" if by_weight else plan.merge_method
        if not rule.copies_base:
            raise BecameError(f"{name} makes no use of the base_model {plan.base_model}; leave it out.")
        if len(plan.models) < 2:
            raise BecameError(
                f"{name} takes the tokenizer alone from the base_model {plan.base_model}; give it among the models too."
            )
    return rule


def _check_counts(name: str, weights: Sequence[float]) -> None:
    if not any(weights):
        raise BecameError(f"the weight of '{name}' is 0 for all models, so that none counts; give one of them more.")


def _natural(name: str) -> list[tuple[int, str]]:
    """Order names as people do: layer 10 after layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,9})", name)]


def _mean_coefficients(solution: Solution, count: int) -> tuple[float, ...]:
    """Return the mean of all groups' coefficients; equal ones where there is none."""
    if not solution.coefficients:
        return (1.0 / count,) * count
    return tuple(np.mean(list(solution.coefficients.values()), axis=0).tolist())
