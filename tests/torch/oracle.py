"""Oracles: per-sample gradients by autograd, one sample at a time, and a merge's slopes; and a network's own taps."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.torch import Continual
from adapters.torch.tapping import collect_taps
from became_core.curvature import TapMode, Taps, diagonal_fisher, logit_cotangents
from tests.conformance import fresh_rng

__all__ = ["assert_exact", "autograd_gradients", "secant_by_brute_force", "taps_of"]


def autograd_gradients(network: nn.Module, samples: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradient of each sample's cross-entropy by a loop, [samples, *shape]."""
    rows: dict[str, list[Tensor]] = {}
    for sample, label in zip(samples, labels, strict=True):
        loss = functional.cross_entropy(network(sample[None]), label[None])
        named = dict(network.named_parameters())
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
            rows.setdefault(name, []).append(torch.zeros_like(parameter) if gradient is None else gradient.to_dense())
    return {name: torch.stack(gradients) for name, gradients in rows.items()}


def taps_of(network: nn.Module, samples: Tensor, labels: Tensor, mode: TapMode = "empirical") -> list[Taps]:
    """All taps of one batch."""
    names = {module: name for name, module in network.named_modules()}

    def cotangents(logits: Tensor) -> list[Tensor]:
        return list(logit_cotangents(logits, labels, mode, fresh_rng()))

    return list(collect_taps(network, names, (samples,), cotangents))


def assert_exact(network: nn.Module, samples: Tensor, labels: Tensor) -> None:
    """Assert that the diagonal Fisher of taps is the mean of squared autograd gradients."""
    taps = taps_of(network, samples, labels)
    assert not any(tap.inputs.requires_grad or tap.output_gradients.requires_grad for tap in taps[0].values())
    found = diagonal_fisher(taps, dict(network.named_parameters()), "empirical", samples=len(samples))
    expected = autograd_gradients(network, samples, labels)
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name].square().mean(0), rtol=1e-9, atol=1e-14)


def secant_by_brute_force(
    model: nn.Module,
    theta_gp: Mapping[str, Tensor],
    theta_hat: Mapping[str, Tensor],
    learning: Continual,
    new: Sequence[tuple[Tensor, Tensor]],
) -> tuple[float, float]:
    """The secant's slope b at theta_gp and curvature c; the model is left at theta_hat.

    New slopes are taken at both ends, and the old side is scaled by the exact curvature over the diagonal one.
    """
    inputs, targets = (torch.cat(side) for side in zip(*new, strict=True))
    assert learning.posterior is not None
    delta = {name: theta_hat[name] - theta_gp[name] for name in theta_hat}

    weights = dict(model.named_parameters())

    def at(theta: Mapping[str, Tensor]) -> Tensor:
        """The logits of a model that has these weights."""
        with torch.no_grad():
            for name, value in theta.items():
                weights[name].copy_(value)
        outputs: Tensor = model.eval()(inputs)
        return outputs

    def slope(theta: Mapping[str, Tensor]) -> float:
        loss = functional.cross_entropy(at(theta), targets)
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        pairs = zip(weights, gradients, strict=True)
        return sum(float((g.to_dense() * delta[name]).sum()) for name, g in pairs if g is not None)

    step = 1e-5
    with torch.no_grad():
        moved = [at({n: v + sign * step * delta[n] for n, v in theta_hat.items()}) for sign in (1, -1)]
        along, p = (moved[0] - moved[1]) / (2 * step), at(theta_hat).softmax(1)
    exact = float(((p * along.square()).sum(1) - (p * along).sum(1).square()).mean())
    gradients = autograd_gradients(model, inputs, targets)
    diagonal = sum(float((gradients[n].square().mean(0) * delta[n].square()).sum()) for n in delta)
    old = learning.posterior.precision.diagonal()
    offset = {n: theta_gp[n] - learning.posterior.mean[n] for n in delta}
    kappa = exact / diagonal
    start, bend = slope(theta_gp), slope(theta_hat) - slope(theta_gp)
    if bend < 0:  # no parabola has both slopes; that with the loss's fall has its minimum at theta_hat
        losses = [float(functional.cross_entropy(at(theta).detach(), targets)) for theta in (theta_gp, theta_hat)]
        fall = max(losses[0] - losses[1], 0.0)
        start, bend = -2 * fall, 2 * fall
    at(theta_hat)
    b = start + kappa * sum(float((offset[n] * old[n] * delta[n]).sum()) for n in delta)
    c = bend + kappa * sum(float((old[n] * delta[n].square()).sum()) for n in delta)
    return b, c
