"""alpha* under PyTorch's transforms: differentiated, vectorised, compiled."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from became_core import Diagonal, Quadratic, layerwise_quadratic, optimal_alpha


def _arguments() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"fc.weight": torch.rand(2, 3, generator=generator, dtype=torch.float64)} for _ in range(4)]


def test_its_gradient_is_that_of_finite_differences() -> None:
    theta_gp, theta_hat, old, new = _arguments()
    gradient = {"fc.weight": torch.full((2, 3), 0.05, dtype=torch.float64)}

    def alpha(value: Tensor) -> Tensor:
        result: Tensor = optimal_alpha(theta_gp, {"fc.weight": value}, old, new, gradient=gradient)
        return result

    assert 0 < alpha(theta_hat["fc.weight"]) < 1  # at an end of [0, 1] there is no derivative
    assert torch.autograd.gradcheck(alpha, theta_hat["fc.weight"].clone().requires_grad_())
    value = theta_hat["fc.weight"]
    step = 1e-6 * torch.ones_like(value)
    slope = torch.func.grad(alpha)(value).sum() * 1e-6
    torch.testing.assert_close(slope, (alpha(value + step) - alpha(value - step)) / 2, rtol=1e-5, atol=1e-12)


def test_its_derivative_forwards_is_that_backwards() -> None:
    theta_gp, theta_hat, old, new = _arguments()
    value, direction = theta_hat["fc.weight"], torch.ones(2, 3, dtype=torch.float64)
    with forward_ad.dual_level():
        dual = {"fc.weight": forward_ad.make_dual(value, direction)}  # type: ignore[no-untyped-call]
        alpha = optimal_alpha(theta_gp, dual, old, new)
        tangent = forward_ad.unpack_dual(alpha).tangent  # type: ignore[no-untyped-call]
    backwards = torch.func.grad(lambda each: optimal_alpha(theta_gp, {"fc.weight": each}, old, new))(value)
    torch.testing.assert_close(tangent, (backwards * direction).sum())


def test_vmap_is_a_loop() -> None:
    theta_gp, theta_hat, old, new = _arguments()
    candidates = torch.stack([theta_hat["fc.weight"] * factor for factor in (0.5, 1.0, 2.0)])

    def alpha(value: Tensor) -> Tensor:
        result: Tensor = optimal_alpha(theta_gp, {"fc.weight": value}, old, new)
        return result

    torch.testing.assert_close(torch.func.vmap(alpha)(candidates), torch.stack([alpha(value) for value in candidates]))


def test_values_pass_through_vmap() -> None:
    """In, a stack of precisions; out, a stack of quadratics."""
    theta_gp, theta_hat, old, new = _arguments()
    factors = (0.5, 1.0, 2.0)
    stacked = Diagonal({"fc.weight": torch.stack([old["fc.weight"] * factor for factor in factors])})

    def quadratic(precision: Diagonal) -> Quadratic:
        return layerwise_quadratic(theta_gp, theta_hat, precision, new)

    found = torch.func.vmap(quadratic)(stacked)
    assert isinstance(found, Quadratic)
    for index, factor in enumerate(factors):
        alone = quadratic(Diagonal(old) * factor)
        torch.testing.assert_close(found.slope[index], alone.slope)
        torch.testing.assert_close(found.curvature[index], alone.curvature)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_it_compiles_whole() -> None:
    arguments = _arguments()
    compiled = torch.compile(optimal_alpha, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), optimal_alpha(*arguments))
