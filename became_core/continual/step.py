"""A step of training: optimisers, which turn gradients into directions, and the constraint that a step must respect.

Convention: theta <- theta - rate x direction. The projector projects the direction and not the gradient. Otherwise
momentum, weight decay or Adam's rescaling could carry a step into the space that old tasks use.

| optimiser | direction u for a gradient g | source |
| --- | --- | --- |
| ``SGD`` | g' = g + decay x theta; v <- momentum x v + g'; u = v | Polyak 1964 |
| ``Adam`` | m, v: running means of g' and g'^2; u = m^ / (sqrt(v^) + epsilon), both unbiased | Kingma & Ba, ICLR 2015 |

All classes here are frozen, and frameworks treat them as trees of arrays, so that a whole step can be compiled.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

from became_core.arrays import Params, device, namespace, pytree, reduction_dtype, static
from became_core.errors import BecameError
from became_core.laplace import LaplacePosterior
from became_core.projection import Projector, Region

__all__ = ["SGD", "Adam", "Constraint", "Optimiser", "Penalty", "Trained"]


@pytree
@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent.

    Attributes:
        momentum: the share of the last direction that is added to the next one, in [0, 1).
        weight_decay: the share of each parameter that is added to its gradient, at least 0.
        velocity: the last direction, by parameter; empty without momentum.

    Raises:
        BecameError: if a number is not in its range.

    Examples:
        >>> optimiser = SGD(momentum=0.5).initial({"w": 1.0})
        >>> direction, optimiser = optimiser.step({"w": 2.0}, {"w": 1.0})
        >>> optimiser.step({"w": 2.0}, {"w": 0.0})[0]
        {'w': 3.0}
    """

    momentum: float = static(default=0.0)
    weight_decay: float = static(default=0.0)
    velocity: Params = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check_settings("momentum", self.momentum, self.weight_decay)

    @property
    def is_linear(self) -> bool:
        """Whether directions are linear in all gradients so far; then either may be projected with the same result."""
        return self.weight_decay == 0

    def initial(self, theta: Params) -> Self:
        """Return the optimiser before its first step on these parameters."""
        if not self.momentum:
            return replace(self, velocity={})
        return replace(self, velocity={name: value * 0 for name, value in theta.items()})

    def step(self, gradients: Params, theta: Params) -> tuple[Params, Self]:
        """Return the direction of a step, and the optimiser after it.

        Args:
            gradients: by name; each must be among the parameters that ``initial`` was given.
            theta: the parameters, of at least these names.
        """
        directions = _decayed(gradients, theta, self.weight_decay)
        if not self.momentum:
            return directions, self
        directions = {name: self.momentum * self.velocity[name] + value for name, value in directions.items()}
        return directions, replace(self, velocity=self.velocity | directions)


@pytree
@dataclass(frozen=True)
class Adam:
    """Adam, with weight decay in the gradient (L2).

    Attributes:
        beta1: the share of the first moment that each step keeps, in [0, 1).
        beta2: the share of the second moment that each step keeps, in [0, 1).
        epsilon: the number that is added to the denominator.
        weight_decay: the share of each parameter that is added to its gradient, at least 0.
        first: the first moment, the running mean of gradients, by parameter.
        second: the second moment, the running mean of squared gradients, by parameter.
        shares: beta1^t and beta2^t after t steps, by parameter, [2].

    Raises:
        BecameError: if a number is not in its range.
    """

    beta1: float = static(default=0.9)
    beta2: float = static(default=0.999)
    epsilon: float = static(default=1e-8)
    weight_decay: float = static(default=0.0)
    first: Params = field(default_factory=dict)
    second: Params = field(default_factory=dict)
    shares: Params = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check_settings("beta1", self.beta1, self.weight_decay)
        _check_settings("beta2", self.beta2, self.weight_decay)

    @property
    def is_linear(self) -> bool:
        """Whether directions are linear in all gradients so far; those of Adam are not."""
        return False

    def initial(self, theta: Params) -> Self:
        """Return the optimiser before its first step on these parameters."""
        zeros = {name: value * 0 for name, value in theta.items()}
        ones = {}
        for name, value in theta.items():
            xp = namespace(parameter=value)
            # In bfloat16 beta2 would be 1.
            ones[name] = xp.ones((2,), dtype=reduction_dtype(xp, parameter=value), device=device(value))
        return replace(self, first=zeros, second=dict(zeros), shares=ones)

    def step(self, gradients: Params, theta: Params) -> tuple[Params, Self]:
        """Return the direction of a step, and the optimiser after it.

        Args:
            gradients: by name; each must be among the parameters that ``initial`` was given.
            theta: the parameters, of at least these names.
        """
        first, second, shares, directions = dict(self.first), dict(self.second), dict(self.shares), {}
        for name, gradient in _decayed(gradients, theta, self.weight_decay).items():
            xp = namespace(gradient=gradient)
            # Multiplied by numbers, not by a new array of them: a copy to a GPU cannot be part of a captured step.
            share = xp.stack([shares[name][0] * self.beta1, shares[name][1] * self.beta2])
            first[name] = self.beta1 * first[name] + (1 - self.beta1) * gradient
            second[name] = self.beta2 * second[name] + (1 - self.beta2) * gradient * gradient
            missing = xp.astype(1 - share, gradient.dtype, copy=False)
            root = xp.sqrt(second[name] / missing[1]) + self.epsilon
            directions[name] = first[name] / missing[0] / root
            shares[name] = share
        return directions, replace(self, first=first, second=second, shares=shares)


Optimiser = SGD | Adam


def _decayed(gradients: Params, theta: Params, weight_decay: float) -> Params:
    if not weight_decay:
        return gradients
    return {name: gradient + weight_decay * theta[name] for name, gradient in gradients.items()}


def _check_settings(name: str, share: float, weight_decay: float) -> None:
    if not 0 <= share < 1:
        raise BecameError(f"the optimiser's {name} is {share}; it must be at least 0 and below 1.")
    if not 0 <= weight_decay < math.inf:
        raise BecameError(f"the weight decay is {weight_decay}; it must be at least 0 and finite.")


@pytree
@dataclass(frozen=True)
class Penalty:
    """A quadratic penalty on leaving the old tasks' posterior: strength x 1/2 (theta - mean).P.(theta - mean).

    Attributes:
        posterior: the mean, and the precision P; a parameter that it does not have is not penalised.
        strength: the strength of the penalty, at least 0.
    """

    posterior: LaplacePosterior
    strength: float

    def add_to(
        self, gradients: Params, theta: Params, rate: float, relative: Mapping[str, float] | None = None
    ) -> Params:
        """Return the gradients of loss and penalty, scaled so that a step with this rate is stable at any strength.

        With S = strength x P, the step is theta <- theta - rate (g + S (theta - mean)) / (1 + rate S). It is explicit
        in the loss, and implicit in the penalty, whose curvature is known (a proximal step). Its fixed points are those
        of loss plus penalty. An explicit step would diverge for every parameter with rate x S above 2.

        Args:
            gradients: of the loss, by name.
            theta: the parameters, of at least these names.
            rate: the learning rate of the step.
            relative: the factors of the rate, for those parameters that have one.
        """
        penalised = [name for name in gradients if name in self.posterior.precision.covered()]
        # Solving (theta' - theta) / rate = -(g + S (theta' - mean)) for the new theta' gives the denominator. S is
        # taken to be diagonal there: with the full matrix, each step would have to solve a linear system.
        slopes = self.posterior.gradient({name: theta[name] for name in penalised})
        curvature, relative = self.posterior.precision.diagonal(), relative or {}
        return gradients | {
            name: (gradients[name] + self.strength * slopes[name])
            / (1 + rate * relative.get(name, 1.0) * self.strength * curvature[name])
            for name in penalised
        }

    def add_beneath(
        self,
        gradients: Params,
        theta: Params,
        rate: float,
        region: Region,
        relative: Mapping[str, float] | None = None,
    ) -> Params:
        """Return the gradients by a region's scales of loss and penalty, if the penalty is on the effective weights.

        As in ``add_to`` they are divided by 1 + rate x curvature. The curvature is a bound of that by each scale, so
        that the fixed points stay those of loss plus penalty, and the steps are stable at any strength.

        Args:
            gradients: of the loss by the effective weights, by name.
            theta: the shared weights and the scales.
            rate: the learning rate of the step.
            region: which is absorbed.
            relative: the factors of the rate, for those scales that have one.
        """
        weights = region.effective({name: theta[name] for name in region.weights})
        penalised = sorted(weights.keys() & gradients.keys() & self.posterior.precision.covered().keys())
        slopes = self.posterior.gradient({name: weights[name] for name in penalised})
        total = gradients | {name: gradients[name] + self.strength * slopes[name] for name in penalised}
        pulled, curvature = region.pull_back(total, theta), self.posterior.precision.diagonal()
        bounds, relative = region.curvature_bounds({name: curvature[name] for name in penalised}), relative or {}
        return pulled | {
            key: pulled[key] / (1 + rate * relative.get(key, 1.0) * self.strength * bound)
            for key, bound in bounds.items()
            if key in pulled
        }


@pytree
@dataclass(frozen=True)
class Constraint:
    """What every step of a stage must respect.

    Attributes:
        trainable: the names of the parameters that may change; all others keep their values to the bit.
        projector: the projector that projects the direction of every step; None for none.
        penalty: the penalty whose gradient is added to that of the loss, before the optimiser; None for none.
        region: the region with whose effective weights the network works, while the shared weights are trained; None if
            the network works with the shared weights.
        trains_scales: whether the scales of the region are trained as well; of these the projector projects those that
            the region's ``projected_as`` names.
        relative: the factors of the learning rate, for those parameters that have one.
    """

    trainable: frozenset[str] = static()
    projector: Projector | None = None
    penalty: Penalty | None = None
    region: Region | None = None
    trains_scales: bool = static(default=False)
    relative: Mapping[str, float] = field(default_factory=dict)

    def projector_of_gradients(self, optimiser: Optimiser) -> Projector | None:
        """Return the projector if gradients may be projected before the optimiser step, else None.

        This needs a linear optimiser and no penalty. To project the gradients is then the same as to project the
        directions, and can be cheaper.
        """
        return self.projector if self.penalty is None and optimiser.is_linear else None

    def directions(
        self,
        gradients: Params,
        theta: Params,
        rate: float,
        optimiser: Optimiser,
        projected: frozenset[str] = frozenset(),
        beneath: frozenset[str] = frozenset(),
    ) -> tuple[Params, Optimiser]:
        """Return the direction of a step, theta <- theta - rate x direction, and the optimiser after the step.

        The gradients go through the region, the penalty, the optimiser, the projector and the relative rates, in this
        order.

        Args:
            gradients: of the loss by the parameters that the network works with, by name.
            theta: the shared parameters, and the scales of the region by their keys, if there is a region.
            rate: the learning rate of the step.
            optimiser: the optimiser before the step.
            projected: the names of those gradients that are projected already.
            beneath: the names of those gradients that are by shared weights already, not by effective weights.
        """
        if self.region is not None:
            region = self.region.with_scales({key: theta[key] for key in self.region.scales})
            pulled_back = beneath | region.scales.keys()
            effective = {name: value for name, value in gradients.items() if name not in pulled_back}
            already = {name: value for name, value in gradients.items() if name in pulled_back}
            if self.penalty is not None and region.absorbed:
                gradients = already | self.penalty.add_beneath(effective, theta, rate, region, self.relative)
            else:
                gradients = already | region.pull_back(effective, theta)
            if not self.trains_scales:
                gradients = {name: value for name, value in gradients.items() if name not in region.scales}
        if self.penalty is not None:
            scales = {} if self.region is None else self.region.scales
            by_weights = {name: value for name, value in gradients.items() if name not in scales}
            gradients = gradients | self.penalty.add_to(by_weights, theta, rate, self.relative)
        directions, optimiser = optimiser.step(gradients, theta)
        if self.projector is not None:
            remaining = {name: value for name, value in directions.items() if name not in projected}
            directions = directions | self.projector.project(remaining)
            rows = {} if self.region is None else self.region.projected_as
            if rows:
                by_weight = self.projector.project({rows[key]: directions[key] for key in rows if key in directions})
                directions = directions | {key: by_weight[rows[key]] for key in rows if key in directions}
        scaled = {name: self.relative[name] * directions[name] for name in directions if name in self.relative}
        return directions | scaled, optimiser


class Trained(NamedTuple):
    """The result of ``Learner.train``.

    Attributes:
        loss: the mean training loss over all samples.
        optimiser: the optimiser after the last step.
        region: the region after the last step; None if there is none.
    """

    loss: float
    optimiser: Optimiser
    region: Region | None
