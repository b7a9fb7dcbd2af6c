"""One look at a user's network, when it is given: that what we compute of it is what it computes, for all frameworks.

It takes a few samples and a moment: outputs are computed twice, together and alone, and held against those of the
network as the user runs it; per-sample gradients by taps are held against a plain loop over the samples; a derivative
along a random direction is held against a difference of outputs.

Convention: outputs are [samples, ...]; a difference is a share of the largest value.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from adapters.backend.network import Data, Network
from adapters.backend.own_loop import Finding, NetworkCheck
from became_core.arrays import Array, Params, namespace, on_host
from became_core.continual.data import Indices
from became_core.curvature import Taps, per_sample_gradients

__all__ = ["LearnerView", "NetworkView", "agreement", "check_network"]

# A difference is near a derivative where the network is smooth. Between its two ends may be a kink, of which shorter
# steps meet fewer; but they round more. One of these shares of the step should do.
_STEPS, _TOLERANCE_OF_DIFFERENCES = (1.0, 0.1, 0.01), 0.1


class NetworkView(Protocol):
    """A network on a few samples, in evaluation mode, as a check sees it.

    Attributes:
        theta: the trained parameters, by name.
        mixes_samples: whether outputs depend on a batch's other samples by design, as batch statistics make them.
        agreement: what was compared with the network as the user runs it.
    """

    theta: Params
    mixes_samples: bool
    agreement: Sequence[Finding]

    @property
    def way(self) -> str:
        """How derivatives along directions were computed last."""

    def outputs(self, theta: Params, samples: slice) -> Array:
        """Return the outputs of some of the samples at these weights."""

    def taps(self, outputs: Array) -> tuple[Array, Taps]:
        """Return gradients by the outputs of all samples, and the taps of the backward pass that begins with them."""

    def gradients(self, samples: slice, seed: Array) -> Mapping[str, Array | None]:
        """Return autograd's gradients by the trained parameters, of one sample alone; None where there is none."""

    def along(self, direction: Params) -> Array:
        """Return the derivative of all outputs along a direction."""


class LearnerView:
    """A learner's network as a pure function, with the head of the first task, on a few samples."""

    def __init__(
        self, network: Network, weights: Params, data: Data, rows: Indices, mixes_samples: bool, fixed: frozenset[str]
    ) -> None:
        """Keep them.

        Args:
            network: a backbone and a head.
            weights: all that it has.
            data: on the device.
            rows: of the samples.
            mixes_samples: as of a view.
            fixed: the weights that no gradient moves.
        """
        self._network, self._data, self._rows = network, data, rows
        self.theta = {name: value for name, value in weights.items() if name not in fixed}
        self._fixed = {name: value for name, value in weights.items() if name in fixed}
        self.mixes_samples, self.agreement = mixes_samples, getattr(network.backbone, "agreement", ())

    @property
    def way(self) -> str:
        """How derivatives along directions were computed last."""
        return self._network.way

    def outputs(self, theta: Params, samples: slice) -> Array:
        """Return the logits of some of the samples."""
        return self._network.outputs(self._fixed | theta, self._data, self._rows[samples])

    def taps(self, outputs: Array) -> tuple[Array, Taps]:
        """Return the gradients of each sample's loss by its logits, and the taps."""
        rng, network = np.random.default_rng(0), self._network
        targets = namespace(targets=self._data.targets).take(self._data.targets, self._rows, axis=0)
        seed = next(iter(network.likelihood.cotangents(outputs, targets, "empirical", rng)))
        taps = next(iter(network.taps(self._fixed | self.theta, self._data, self._rows, None, "empirical", rng)))
        return seed, taps

    def gradients(self, samples: slice, seed: Array) -> Params:
        """Return autograd's gradients of one sample alone."""
        return self._network.pulled_back(self._fixed | self.theta, self._data, self._rows[samples], seed)

    def along(self, direction: Params) -> Array:
        """Return the derivative of the logits along a direction."""
        xp: Any = namespace(**{"direction": next(iter(direction.values()))})
        along = {name: xp.zeros_like(value) for name, value in self._fixed.items()} | direction
        return self._network.tangents(self._fixed | self.theta, [along], self._data, self._rows)[1][0]


def check_network(network: NetworkView) -> NetworkCheck:
    """Return what was compared, and how far it differs."""
    theta, everything = network.theta, slice(None)
    outputs = network.outputs(theta, everything)
    again = network.outputs(theta, everything)
    tolerance = tolerance_of(outputs)
    findings = [*network.agreement, Finding("outputs, computed twice", _apart([again], [outputs]), tolerance)]
    if not network.mixes_samples:
        alone = network.outputs(theta, slice(1))
        findings.append(Finding("outputs of a sample alone", _apart([alone], [outputs[:1]]), tolerance))
    if not theta:
        return NetworkCheck(findings)
    moving: Params = {}
    if not network.mixes_samples:
        seed, taps = network.taps(outputs)
        by_taps = per_sample_gradients(taps)
        loop: dict[str, list[NDArray[Any]]] = {name: [] for name in by_taps}
        for sample in range(outputs.shape[0]):
            rows = slice(sample, sample + 1)
            gradients = network.gradients(rows, seed[rows])
            for name in loop:
                gradient = gradients[name]
                loop[name].append(np.zeros(theta[name].shape) if gradient is None else np.asarray(on_host(gradient)))
        pairs = [(np.ravel(on_host(by_taps[name])), np.ravel(rows)) for name, rows in loop.items()]
        ours, expected = zip(*pairs, strict=True)
        findings.append(Finding("gradients of single samples", _apart(ours, expected), tolerance))
        moving = {name: np.any(rows, axis=0).reshape(theta[name].shape) for name, rows in loop.items()}
    difference = math.inf
    for seed, share in enumerate(_STEPS):
        if not difference <= _TOLERANCE_OF_DIFFERENCES:
            difference = _derivative_apart(network, moving, seed, share)
    findings.append(Finding(f"a derivative, by {network.way}", difference, _TOLERANCE_OF_DIFFERENCES))
    return NetworkCheck(findings)


def agreement(ours: Array, own: Array, mode: str) -> Finding:
    """Return how far our pass is from the user's own one in a mode."""
    return Finding(f"outputs of the user's own pass, in {mode}", _apart([ours], [own]), tolerance_of(own))


def tolerance_of(outputs: Array) -> float:
    """Return the share up to which a difference is rounding: many layers may round in different orders."""
    epsilon = float(namespace(outputs=outputs).finfo(outputs.dtype).eps)
    return 10 * math.sqrt(epsilon)


def _derivative_apart(network: NetworkView, moving: Params, seed: int, share: float) -> float:
    """Return how far a derivative along a random direction is from a difference of outputs over a share of a step.

    The direction leaves out what no gradient moves, where that is known: a sign that a parametrisation keeps beside its
    weights, for example, at which the outputs jump.
    """
    rng, theta = np.random.default_rng(seed), network.theta
    xp: Any = namespace(**{"theta": next(iter(theta.values()))})
    direction = {}
    for name, value in theta.items():
        host = np.asarray(on_host(value), np.float64)
        drawn = rng.normal(size=value.shape) * max(float(host.std()), 1e-3) * moving.get(name, 1.0)
        direction[name] = xp.asarray(drawn, dtype=value.dtype, device=getattr(value, "device", None))
    length, size = _norm(direction) or 1.0, _norm(theta)
    epsilon = max(float(xp.finfo(value.dtype).eps) for value in theta.values())
    step = share * epsilon ** (1 / 3) * (size or 1.0) / length
    tangents = network.along(direction)
    ahead, behind = (
        network.outputs({name: value + sign * step * direction[name] for name, value in theta.items()}, slice(None))
        for sign in (1, -1)
    )
    return _apart([tangents], [(ahead - behind) / (2 * step)])


def _norm(values: Params) -> float:
    squares = (np.square(np.asarray(on_host(value), np.float64)).sum() for value in values.values())
    return math.sqrt(sum(map(float, squares)))


def _apart(computed: Sequence[Any], expected: Sequence[Any]) -> float:
    """Return the largest difference of corresponding arrays, as a share of the largest value."""
    pairs = [
        tuple(np.asarray(on_host(side), np.float64) for side in pair) for pair in zip(computed, expected, strict=True)
    ]
    scale = max(float(np.abs(b).max(initial=0.0)) for _, b in pairs) or 1.0
    return max(float(np.abs(a - b).max(initial=0.0)) for a, b in pairs) / scale
