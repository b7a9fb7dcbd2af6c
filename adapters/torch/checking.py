"""One look at a user's network, when it is given: that what we compute of it is what it computes.

It takes a few samples and a moment: outputs are computed twice; per-sample gradients by taps are held against a plain
loop over the samples; a derivative along a random direction is held against the gradients of that loop.
"""

from typing import Any

import torch
from torch import Tensor, nn

from adapters.backend.own_loop import Finding, NetworkCheck
from adapters.torch.derivatives import Derivatives
from adapters.torch.tapping import Names, collect_taps, owners_of, samples_of
from became_core.curvature import per_sample_gradients

__all__ = ["check_network"]


def check_network(
    network: nn.Module, names: Names, arguments: tuple[Any, ...], derivatives: Derivatives
) -> NetworkCheck:
    """Return what was compared, and how far it differs.

    Args:
        network: in evaluation mode; it returns [samples, ...].
        names: all its modules by canonical name.
        arguments: of the network, the first being a few samples.
        derivatives: what differentiates along directions.
    """
    generator = torch.Generator().manual_seed(0)

    def random_like(value: Tensor) -> Tensor:
        return torch.randn(value.shape, generator=generator).to(value)

    with torch.no_grad():
        outputs, again = network(*arguments), network(*arguments)
        first = network(*samples_of(arguments, slice(1), len(outputs)))
    # A loop and a batch may round in different orders, through many layers.
    tolerance = float(torch.finfo(outputs.dtype).eps) ** 0.5 * 10
    findings = [
        Finding("outputs, computed twice", _apart([again], [outputs]), tolerance),
        Finding("outputs of a sample alone", _apart([first], [outputs[:1]]), tolerance),
    ]
    parameters: dict[str, nn.Parameter] = {n: value for n, value in network.named_parameters() if value.requires_grad}
    if not parameters:
        return NetworkCheck(findings)
    seed = random_like(outputs)
    (taps,) = collect_taps(network, names, arguments, lambda _: [seed])
    by_taps = per_sample_gradients(taps)
    own = owners_of(names)
    loop: dict[str, list[Tensor]] = {name: [] for name in by_taps}
    theta = {name: value.detach() for name, value in parameters.items()}
    direction = {name: random_like(value) * value.std(correction=0).clamp(min=1e-3) for name, value in theta.items()}
    slopes: list[float] = []
    for sample in range(len(outputs)):
        with torch.enable_grad():
            alone = network(*samples_of(arguments, slice(sample, sample + 1), len(outputs)))
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            alone, list(parameters.values()), seed[sample : sample + 1], allow_unused=True
        )
        moved = [(g, direction[name]) for name, g in zip(parameters, gradients, strict=True) if g is not None]
        slopes.append(sum(float((gradient.double() * move.double()).sum()) for gradient, move in moved))
        for value, gradient in zip(parameters.values(), gradients, strict=True):
            if own[value] in loop:
                loop[own[value]].append(torch.zeros_like(value) if gradient is None else gradient)
    pairs = [(by_taps[name].flatten(), torch.stack(rows).flatten()) for name, rows in loop.items()]
    findings.append(Finding("gradients of single samples", _apart(*zip(*pairs, strict=True)), tolerance))

    def function(theta: Any) -> Tensor:
        result: Tensor = torch.func.functional_call(network, dict(theta), arguments)
        return result

    # In the gradients' terms, since a difference of outputs is no measure here: in a deep network with ReLUs there are
    # kinks within any step that rounding allows. Where a difference is all there is, the best of three steps counts.
    tangents = [derivatives.along(function, theta, [direction])[1]]
    if derivatives.way == "difference":
        tangents += [Derivatives("difference", short).along(function, theta, [direction])[1] for short in (0.05, 0.002)]
    along = [(tangent[0] * seed).double().flatten(1).sum(1).cpu() for tangent in tangents]
    apart = [_apart([slope], [torch.tensor(slopes, dtype=torch.float64)]) for slope in along]
    allowed = 0.1 if derivatives.way == "difference" else max(tolerance, 0.01)
    findings.append(Finding(f"a derivative, by {derivatives.way}", min(apart), allowed))
    return NetworkCheck(findings)


def _apart(computed: Any, expected: Any) -> float:
    """Return the largest difference of corresponding tensors, as a share of the largest value."""
    scale = max(float(value.abs().max()) for value in expected) or 1.0
    return max(float((a - b).abs().max()) for a, b in zip(computed, expected, strict=True)) / scale
