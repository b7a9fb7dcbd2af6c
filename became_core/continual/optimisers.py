"""Optimisers, as frozen values that advance step by step: from gradients to the direction of a step.

Convention: theta <- theta - rate x direction. The direction, not the gradient, is what a projector projects: so neither
momentum nor weight decay nor Adam's rescaling can carry a step into the space that old tasks use.

| optimiser | direction u for a gradient g | source |
| --- | --- | --- |
| ``SGD`` | g' = g + decay x theta; v <- momentum x v + g'; u = v | Polyak 1964 |
| ``Adam`` | m, v: running means of g' and g'^2; u = m^ / (sqrt(v^) + epsilon), both unbiased | Kingma & Ba, ICLR 2015 |
"""

from dataclasses import dataclass, field, replace
from typing import Self

from became_core.arrays import Params, device, namespace, pytree, static
from became_core.errors import BecameError

__all__ = ["SGD", "Adam", "Optimiser"]


@pytree
@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent.

    Attributes:
        momentum: the share of the last direction that is kept, in [0, 1).
        weight_decay: what each parameter adds of itself to its gradient, at least 0.
        velocity: the last direction, by parameter; empty without momentum.
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
            gradients: by name; each must be among the parameters it began with.
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
        """Return the direction of a step, and the optimiser after it; arguments as of ``SGD.step``."""
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
    if weight_decay < 0:
        raise BecameError(f"the weight decay is {weight_decay}; it must be at least 0.")
