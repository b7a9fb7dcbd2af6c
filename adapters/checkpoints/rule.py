"""What a merging rule of checkpoints is: what it must know of the whole model first, and how it merges one slab.

A rule reads a model in slabs, flat ranges of one tensor's elements, the same range of every model. Rules with
``measures`` see every slab twice: first to be measured, which gives numbers that add up over slabs and tensors; then,
when the coefficients are known, to be merged. ``rules`` has the rules.

Convention: the first model of a slab is the origin: the base model if the plan has one, else the plan's first. A weight
multiplies its model's loss, except in ``linear`` and ``task_arithmetic``, where it is the coefficient itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from adapters.checkpoints.plan import MergePlan
from adapters.checkpoints.tensors import widened
from became_core import combine, merge
from became_core.laplace import Diagonal, Kronecker, Quadratic, is_statistic

__all__ = ["Array", "Rule", "Slab", "Solution", "combined", "scaled", "times"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Slab:
    """The same elements of one tensor in every model.

    Attributes:
        name: the tensor.
        models: its elements in each, flat, in float32 or wider; the base model first if there is one.
        weights: each model's, except the base's.
        fishers: the diagonal curvature of each model's loss; None where it is not known.
        factors: the Kronecker factors of the curvature of each model's loss, A [d_in, d_in] and G [d_out, d_out]; None
            where it has none, and empty where no model has any. Otherwise the slab is a whole tensor, and not flat.
        gradients: of each model's loss; None for zero.
        means: where each model's loss is expanded; None for the model itself.
        depth: how deep in the model the tensor lies, 0 to 1.
        has_base: whether the first of the models is a base model, which has no weight and no loss.
        grams: of the inputs of each model's linear layer, [d_in, d_in]; the slab then has whole rows.
        gram_inverse: the pseudo-inverse of their weighted sum.
    """

    name: str
    models: Sequence[Array]
    weights: Sequence[float]
    fishers: Sequence[Array | None] = ()
    gradients: Sequence[Array | None] = ()
    means: Sequence[Array | None] = ()
    depth: float = 0.0
    has_base: bool = False
    grams: Sequence[Array] = ()
    gram_inverse: Any = None
    factors: Sequence[tuple[Array, Array] | None] = ()

    @property
    def learned(self) -> Sequence[Array]:
        """The models without the base."""
        return self.models[int(self.has_base) :]

    @property
    def agrees(self) -> bool:
        """Whether all models have the same numbers here."""
        return all(np.array_equal(self.models[0], model) for model in self.models[1:])

    def precision(self, k: int) -> Diagonal | Kronecker:
        """Return the curvature of a model's loss times its weight, in float64."""
        factors = self.factors[k] if self.factors else None
        if factors is None:
            return Diagonal({self.name: widened(scaled(self.fishers[k], self.weights[k]), np.float64)})
        return Kronecker({self.name: factors}) * self.weights[k]


@dataclass(frozen=True)
class Solution:
    """The coefficients of a merge, and what the quadratic says about them.

    Attributes:
        coefficients: by group, one number for each model, the origin included.
        groups: the quadratic of each group, from which the coefficients are.
        constraint: where the minimum was looked for.
    """

    coefficients: Mapping[str, tuple[float, ...]]
    groups: Mapping[str, Quadratic]
    constraint: str = "box"

    @property
    def total(self) -> Quadratic | None:
        """The quadratic of the whole model in common coefficients; None where nothing was measured."""
        return sum(self.groups.values()) if self.groups else None  # type: ignore[return-value] # 0 + Quadratic

    @property
    def gain(self) -> float | None:
        """How much smaller than at the origin the losses are predicted to be, in the unit of the Fisher files."""
        if not self.groups:
            return None
        values = [quadratic.value(np.asarray(self.coefficients[group][1:])) for group, quadratic in self.groups.items()]
        return 0.0 - math.fsum(map(float, values))  # and never -0


class Rule:
    """How to merge checkpoints.

    Attributes:
        plan: what the user asks for.
    """

    needs_fisher: ClassVar[bool] = False
    """Whether it needs the diagonal curvature of every model's loss."""
    takes_factors: ClassVar[bool] = False
    """Whether a Fisher file may have Kronecker factors: the curvature along a direction, and not of each weight."""
    needs_gram: ClassVar[bool] = False
    """Whether it needs the Gram matrices of the inputs of linear layers."""
    measures: ClassVar[bool] = False
    """Whether its coefficients depend on all weights, so that they are read twice."""
    takes_base: ClassVar[bool] = True
    """Whether the base model takes part in the merge."""
    copies_base: ClassVar[bool] = False
    """Whether a base model that takes no part may be given for its tokenizer, as in mergekit's plans of the rule."""
    by_weight: ClassVar[bool] = False
    """Whether its coefficients differ from weight to weight, so that no factors of a LoRA adapter can be merged."""

    def __init__(self, plan: MergePlan) -> None:
        """Keep the plan; raises a BecameError if the rule cannot follow it."""
        self.plan = plan

    def check_weights(self, name: str, weights: Sequence[float]) -> None:
        """Refuse weights by which a tensor cannot be merged; raises a BecameError."""

    def measure(self, slab: Slab) -> Quadratic:
        """Return what adds up over slabs."""
        raise NotImplementedError

    def solve(self, sums: Mapping[str, Quadratic]) -> Solution:
        """Return the coefficients, given the sums by tensor."""
        return Solution({}, {})

    def shares(self, name: str, depth: float, weights: Sequence[float], solution: Solution) -> Sequence[float] | None:
        """Return what each model, without the base, is multiplied by in a tensor; None where that differs by weight."""
        return None

    def merge(self, slab: Slab, solution: Solution) -> Array:
        """Return the merged elements, flat, as wide as the models'; statistics are averaged, whatever the rule."""
        shares = self.shares(slab.name, slab.depth, slab.weights, solution)
        assert shares is not None, "a rule without shares merges by itself"
        rest = 1.0 - math.fsum(shares)
        models, coefficients = slab.learned, shares
        if self.takes_base and slab.has_base:
            models, coefficients = slab.models, [rest, *shares]
        elif not abs(rest) < 1e-12 and not is_statistic(slab.name):
            models, coefficients = [np.zeros_like(slab.models[0]), *slab.learned], [rest, *shares]
        return combined(models, averaging(coefficients) if is_statistic(slab.name) else coefficients)


def averaging(coefficients: Sequence[float]) -> Sequence[float]:
    """Return coefficients of a mean: none below 0, with the sum 1; outside of it, a variance could be negative.

    Example:
        >>> averaging([-1.0, 1.0, 3.0]), averaging([0.0, -2.0])
        ([0.0, 0.25, 0.75], [0.5, 0.5])
    """
    positive = [max(0.0, coefficient) for coefficient in coefficients]
    total = math.fsum(positive)
    return [each / total for each in positive] if total else [1.0 / len(positive)] * len(positive)


def combined(models: Sequence[Array], coefficients: Sequence[float]) -> Array:
    """Return the models' combination, exact at the ends of a segment and wherever all agree."""
    if len(models) == 2:
        return np.asarray(merge({"": models[0]}, {"": models[1]}, float(coefficients[1]))[""])
    return np.asarray(combine([{"": model} for model in models], list(coefficients))[""])


def scaled(fisher: Array | None, weight: float) -> Array:
    """Return the diagonal curvature of a model's loss times the model's weight, wide."""
    if fisher is None:
        raise AssertionError("a rule was given no Fisher where the models differ")
    return times(widened(fisher), weight)


def times(values: Array, weight: float) -> Array:
    """Return values times a weight, in their dtype; the values themselves if it is 1."""
    return values if weight == 1 else values * values.dtype.type(weight)
