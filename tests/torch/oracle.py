"""Per-sample gradients by autograd, one sample at a time: the oracle of taps; and the taps of a network on its own."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.torch.tapping import collect_taps
from became_core.curvature import TapMode, Taps, diagonal_fisher, logit_cotangents
from tests.conformance import fresh_rng

__all__ = ["assert_exact", "autograd_gradients", "taps_of"]


def autograd_gradients(network: nn.Module, samples: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradient of each sample's cross-entropy by a loop, [samples, *shape]."""
    rows: dict[str, list[Tensor]] = {}
    for sample, label in zip(samples, labels, strict=True):
        loss = functional.cross_entropy(network(sample[None]), label[None])
        named = dict(network.named_parameters())
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
            rows.setdefault(name, []).append(torch.zeros_like(parameter) if gradient is None else gradient)
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
