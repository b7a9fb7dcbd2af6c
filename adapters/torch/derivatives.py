"""The derivatives of a network's outputs along directions in parameter space, J d, for any network.

| way | what it needs | error |
| --- | --- | --- |
| forward mode | a forward-mode derivative of every operation | rounding |
| two reverse passes | a derivative of every operation's derivative: J d is that of u . (J d) by u | rounding |
| difference | forward passes alone, whatever the kernels: (z(theta + h d) - z(theta - h d)) / 2h | see below |

Each way is tried in turn, and what works is remembered. The difference takes h = cbrt(epsilon) |theta| / |d|, at which
the two errors are alike: the rounding of the outputs, epsilon / h, and what the third derivative leaves, h^2. In
float32 that is about 2e-5 of the scale on which the network bends.

Convention: the function is of the network's parameters by PyTorch's own names; a parameter without a direction stays.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from adapters.torch.tapping import as_written, unfused

__all__ = ["Derivatives", "Way"]

Way = Literal["forward mode", "two reverse passes", "difference"]

Parameters = Mapping[str, Tensor]
Function = Callable[[Parameters], Tensor]


@dataclass
class Derivatives:
    """Differentiates along directions by the first way that a network allows.

    Attributes:
        way: the way that is used, or tried next.
        shorter: what a difference's step is multiplied by.
        compiled: whether there may be modules that the user has compiled.
    """

    way: Way = "forward mode"
    shorter: float = 1.0
    compiled: bool = True

    def along(self, function: Function, theta: Parameters, directions: Sequence[Parameters]) -> tuple[Tensor, Tensor]:
        """Return the outputs at theta and their derivatives along directions, [directions, *outputs].

        Args:
            function: from parameters to outputs; each call must do the same.
            theta: the parameters.
            directions: at least one, each with arrays of the parameters' shapes by their names.

        Examples:
            >>> square = lambda theta: theta["w"] ** 2
            >>> theta, ones = {"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])}
            >>> Derivatives().along(square, theta, [ones])
            (tensor([9.]), tensor([[6.]]))
        """
        theta, before = {name: value.detach() for name, value in theta.items()}, self.way
        try:
            return self._by_first_way(function, theta, directions)
        except BaseException:
            self.way = before  # an error of every way is one of the inputs, and tells nothing of the network
            raise

    def _by_first_way(
        self, function: Function, theta: Parameters, directions: Sequence[Parameters]
    ) -> tuple[Tensor, Tensor]:
        if self.way == "forward mode":
            try:
                with torch.no_grad(), _differentiable(compiled=self.compiled):
                    return _forward_mode(function, theta, directions)
            except Exception:
                self.way = "two reverse passes"
        if self.way == "two reverse passes":
            try:
                with torch.enable_grad(), _differentiable(compiled=self.compiled), unfused():
                    return _two_reverse_passes(function, theta, directions)
            except Exception:
                self.way = "difference"
        return _difference(function, theta, directions, self.shorter)


@contextmanager
def _differentiable(*, compiled: bool) -> Iterator[None]:
    """Let PyTorch take those kernels of attention and of compiled modules that have all derivatives."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with as_written(compiled=compiled), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _forward_mode(function: Function, theta: Parameters, directions: Sequence[Parameters]) -> tuple[Tensor, Tensor]:
    tangents = []
    for direction in directions:
        along = {name: direction[name] for name in theta if name in direction}
        rest = {name: value for name, value in theta.items() if name not in along}
        primals = {name: theta[name] for name in along}
        outputs, tangent, *_ = torch.func.jvp(lambda moved, rest=rest: function(rest | moved), (primals,), (along,))
        tangents.append(tangent)
    return outputs, torch.stack(tangents)


def _two_reverse_passes(
    function: Function, theta: Parameters, directions: Sequence[Parameters]
) -> tuple[Tensor, Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    outputs = function(leaves)
    seed = torch.zeros_like(outputs, requires_grad=True)
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
        outputs, list(leaves.values()), seed, create_graph=True, allow_unused=True
    )
    tangents = []
    for direction in directions:
        pairs = [
            (gradient * direction[name]).sum()
            for name, gradient in zip(leaves, gradients, strict=True)
            if gradient is not None and name in direction
        ]
        total = torch.stack(pairs).sum() if pairs else (seed * 0).sum()
        (tangent,) = torch.autograd.grad(total, seed, retain_graph=True)
        tangents.append(tangent)
    return outputs.detach(), torch.stack(tangents).detach()


@torch.no_grad()
def _difference(
    function: Function, theta: Parameters, directions: Sequence[Parameters], shorter: float
) -> tuple[Tensor, Tensor]:
    outputs, tangents = function(theta), []
    for direction in directions:
        along = {name: direction[name] for name in theta if name in direction}
        length, size = _norm(along), _norm({name: theta[name] for name in along})
        if not length:
            tangents.append(torch.zeros_like(outputs))
            continue
        epsilon = max(torch.finfo(value.dtype).eps for value in (*along.values(), outputs))
        step = shorter * epsilon ** (1 / 3) * (size or 1.0) / length
        ahead, behind = (
            function({**theta, **{name: theta[name] + sign * step * value for name, value in along.items()}})
            for sign in (1, -1)
        )
        tangents.append((ahead - behind) / (2 * step))
    return outputs, torch.stack(tangents)


def _norm(values: Parameters) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values.values()))
