"""A step of training: what it must respect, and how optimisers turn gradients into directions.

Convention: theta <- theta - rate x direction. What is projected is the direction, not the gradient, so that neither
momentum nor weight decay nor Adam's rescaling can carry a step into the space that old tasks use.

| optimiser | direction u for a gradient g | source |
| --- | --- | --- |
| ``SGD`` | g' = g + decay x theta; v <- momentum x v + g'; u = v | Polyak 1964 |
| ``Adam`` | m, v: running means of g' and g'^2; u = m^ / (sqrt(v^) + epsilon), both unbiased | Kingma & Ba, ICLR 2015 |

All values here are frozen and are trees to the frameworks, so that a whole step can be compiled.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

from became_core.arrays import Params, device, namespace, pytree, static
from became_core.errors import BecameError
from became_core.laplace import LaplacePosterior
from became_core.projection import Projector, Region

__all__ = ["SGD", "Adam", "Constraint", "Optimiser", "Penalty", "Trained"]


@pytree
@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent.

    Attributes:
        momentum: the share of the last direction that is kept, in [0, 1).
        weight_decay: what each parameter adds of itself to its gradient, at least 0.
        velocity: the last direction, by parameter; empty without momentum.

    Raises:
        BecameError: if a number is not in its range.
    """

    momentum: float = static(default=0.0)
    weight_decay: float = static(default=0.0)
    velocity: Params = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check_settings("momentum", self.momentum, self.weight_decay)

    @property
    def is_linear(self) -> bool:
        """Whether directions are linear in the gradients since the beginning, so that either may be projected."""
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
    """Adam, with weight decay in the gradient (L2) if any.

    Attributes:
        beta1: the share that the first moment keeps, in [0, 1).
        beta2: the share that the second moment keeps, in [0, 1).
        epsilon: what is added to the denominator.
        weight_decay: what each parameter adds of itself to its gradient, at least 0.
        first: the running mean of gradients, by parameter.
        second: the running mean of their squares, by parameter.
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
        """Whether directions are linear in the gradients: they are not."""
        return False

    def initial(self, theta: Params) -> Self:
        """Return the optimiser before its first step on these parameters."""
        zeros = {name: value * 0 for name, value in theta.items()}
        ones = {}
        for name, value in theta.items():
            xp = namespace(parameter=value)
            ones[name] = xp.ones((2,), dtype=value.dtype, device=device(value))
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
            betas = xp.asarray([self.beta1, self.beta2], dtype=gradient.dtype, device=device(gradient))
            share = shares[name] * betas
            first[name] = self.beta1 * first[name] + (1 - self.beta1) * gradient
            second[name] = self.beta2 * second[name] + (1 - self.beta2) * gradient * gradient
            root = xp.sqrt(second[name] / (1 - share[1])) + self.epsilon
            directions[name] = first[name] / (1 - share[0]) / root
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
    if not weight_decay >= 0:
        raise BecameError(f"the weight decay is {weight_decay}; it must be at least 0.")


@pytree
@dataclass(frozen=True)
class Penalty:
    """A quadratic penalty on leaving the old tasks' posterior: strength x 1/2 (theta - mean).P.(theta - mean).

    Attributes:
        posterior: parameters of which it has no mean are free.
        strength: at least 0.
    """

    posterior: LaplacePosterior
    strength: float

    def add_to(
        self, gradients: Params, theta: Params, rate: float, relative: Mapping[str, float] | None = None
    ) -> Params:
        """Return the gradients of loss and penalty, such that a step of this rate is stable at any strength.

        With S = strength x P the step is semi-implicit, theta <- theta - rate (g + S (theta - mean)) / (1 + rate S):
        the loss is followed explicitly and the penalty, whose curvature is known, implicitly (a proximal step). Its
        fixed points are those of the sum; explicit steps diverge wherever rate x S exceeds 2.

        Args:
            gradients: of the loss, by name.
            theta: the parameters, of at least these names.
            rate: the learning rate of the step to come.
            relative: what the rate is multiplied by for some of the parameters.
        """
        penalised = [name for name in gradients if name in self.posterior.mean]
        slopes = self.posterior.gradient({name: theta[name] for name in penalised})
        curvature, relative = self.posterior.precision.diagonal(), relative or {}
        return gradients | {
            name: (gradients[name] + self.strength * slopes[name])
            / (1 + rate * relative.get(name, 1.0) * self.strength * curvature[name])
            for name in penalised
        }


@pytree
@dataclass(frozen=True)
class Constraint:
    """What a stage of training must respect.

    Attributes:
        trainable: names of the parameters that may change; all others keep their values to the bit.
        projector: if given, the direction of every step is projected by it.
        penalty: if given, every gradient has the penalty's added, before the optimiser sees it.
        region: if given, the network works with its effective weights, and the shared weights are trained.
        trains_scales: whether the region's scales are trained as well; they are never projected.
        relative: what the learning rate is multiplied by for some of the parameters; 1 for all others.
    """

    trainable: frozenset[str] = static()
    projector: Projector | None = None
    penalty: Penalty | None = None
    region: Region | None = None
    trains_scales: bool = static(default=False)
    relative: Mapping[str, float] = field(default_factory=dict)

    def projector_of_gradients(self, optimiser: Optimiser) -> Projector | None:
        """Return the projector if gradients may be projected before the optimiser step, else None.

        This needs a linear optimiser and no penalty: projecting the gradients is then the same as projecting the
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
        """Return what a step of this rate goes along, theta <- theta - rate x direction, and the optimiser after it.

        Args:
            gradients: of the loss, by the names of the parameters that the network works with.
            theta: the shared parameters, and the region's scales by their keys, if there is a region.
            rate: the learning rate of the step.
            optimiser: before the step.
            projected: names of the gradients that are projected already.
            beneath: names of the gradients that are by the region's shared weights already, not by effective ones.
        """
        if self.region is not None:
            region = self.region.with_scales({key: theta[key] for key in self.region.scales})
            pulled_back = beneath | region.scales.keys()
            effective = {name: value for name, value in gradients.items() if name not in pulled_back}
            gradients = gradients | region.pull_back(effective, theta)
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
        scaled = {name: self.relative[name] * directions[name] for name in directions if name in self.relative}
        return directions | scaled, optimiser


class Trained(NamedTuple):
    """What training returns.

    Attributes:
        loss: the mean over samples.
        optimiser: after the last step.
        region: likewise, if there is one.
    """

    loss: float
    optimiser: Optimiser
    region: Region | None
