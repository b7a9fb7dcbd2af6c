"""One look at a user's network, when it is given: that what we compute of it is what it computes, for all frameworks.

It takes a few samples and a moment: outputs are computed twice, together and alone, and held against those of the
network as the user runs it; per-sample gradients by taps are held against a plain loop over the samples; outputs must
stay where matrices move that a sample reads nothing of; a derivative along a random direction is held against the
gradients of that loop.

Convention: outputs are [samples, ...]; a difference is a share of the largest value.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from adapters.backend.network import Data, Network
from adapters.backend.own_loop import Finding, NetworkCheck
from became_core import BecameError
from became_core.arrays import Array, Params, namespace, on_host
from became_core.continual.data import Indices
from became_core.curvature import Tap, Taps, per_sample_gradients

__all__ = ["STEPS", "LearnerView", "NetworkView", "agreement", "check_network"]

# A matrix that a sample multiplies with this many rows is not moved: to find what they leave free takes long.
MANY = 1024
# Of views that can take steps of any length.
STEPS: Sequence[float] = (1.0, 0.05, 0.002)


class NetworkView(Protocol):
    """A network on a few samples, in evaluation mode, as a check sees it.

    Attributes:
        theta: the trained parameters, by name.
        mixes_samples: whether outputs depend on a batch's other samples by design, as batch statistics make them.
        agreement: what was compared with the network as the user runs it.
        rounding: the epsilon of the coarsest dtype that it computes in; 0 if only that of its outputs is known.
        steps: what steps of a difference are multiplied by: shorter ones meet fewer kinks, and round more.
        padding: the row of an embedding that has no gradient from it, by the name of its weight; no direction has it.
    """

    theta: Params
    mixes_samples: bool
    agreement: Sequence[Finding]
    rounding: float
    steps: Sequence[float]
    padding: Mapping[str, int]

    @property
    def way(self) -> str:
        """How derivatives along directions were computed last."""

    def outputs(self, theta: Params, samples: slice) -> Array:
        """Return the outputs of some of the samples at these weights."""

    def seed(self, outputs: Array) -> Array:
        """Return gradients by the outputs of all samples."""

    def taps(self, seed: NDArray[Any]) -> Taps:
        """Return the taps of the backward pass that begins with these gradients."""

    def gradients(self, samples: slice, seed: NDArray[Any]) -> Mapping[str, Array | None]:
        """Return autograd's gradients by the trained parameters, of these samples alone; None where there is none."""

    def along(self, direction: Params, shorter: float) -> Array:
        """Return the derivative of all outputs along a direction; if by a difference, with a shorter step."""


class LearnerView:
    """A learner's network as a pure function, with the head of the first task, on a few samples."""

    steps: Sequence[float] = (1.0,)  # its network knows one length
    padding: Mapping[str, int] = {}
    rounding = 0.0

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

    def seed(self, outputs: Array) -> Array:
        """Return the gradients of each sample's loss by its logits."""
        targets = namespace(targets=self._data.targets).take(self._data.targets, self._rows, axis=0)
        rng = np.random.default_rng(0)
        return next(iter(self._network.likelihood.cotangents(outputs, targets, "empirical", rng)))

    def taps(self, seed: Array) -> Taps:
        """Return the taps."""
        weights, rng = self._fixed | self.theta, np.random.default_rng(0)
        return next(iter(self._network.taps(weights, self._data, self._rows, None, "empirical", rng)))

    def gradients(self, samples: slice, seed: NDArray[Any]) -> Params:
        """Return autograd's gradients of some of the samples alone."""
        return self._network.pulled_back(self._fixed | self.theta, self._data, self._rows[samples], seed)

    def along(self, direction: Params, shorter: float) -> Array:
        """Return the derivative of the logits along a direction."""
        xp: Any = namespace(**{"direction": next(iter(direction.values()))})
        along = {name: xp.zeros_like(value) for name, value in self._fixed.items()} | direction
        return self._network.tangents(self._fixed | self.theta, [along], self._data, self._rows)[1][0]


def check_network(network: NetworkView) -> NetworkCheck:
    """Return what was compared, and how far it differs.

    Raises:
        BecameError: if samples do not lie on the first axis of inputs and outputs, or no parameter is used.
    """
    theta, everything = network.theta, slice(None)
    outputs = network.outputs(theta, everything)
    again = network.outputs(theta, everything)
    tolerance = tolerance_of(outputs, network.rounding)
    findings = [*network.agreement, Finding("outputs, computed twice", _apart([again], [outputs]), tolerance)]
    if not network.mixes_samples:
        alone = network.outputs(theta, slice(1))
        if alone.shape[0] != 1:
            raise BecameError(
                f"the first of {outputs.shape[0]} samples has {alone.shape[0]} rows of outputs by itself; samples must "
                "lie on the first axis of the outputs, and of all inputs that are theirs."
            )
        first = _numbers(outputs)[:1]
        findings.append(Finding("outputs of a sample alone", _apart([alone], [first]), tolerance))
    if not theta:
        return NetworkCheck(tuple(findings))
    # The arithmetic from here on is NumPy's: JAX would compile each operation for each shape.
    seed = _numbers(network.seed(outputs))
    parts = [everything] if network.mixes_samples else [slice(row, row + 1) for row in range(outputs.shape[0])]
    gradients = [_on_host(network.gradients(part, seed[part]), theta) for part in parts]
    if not network.mixes_samples:
        taps = network.taps(seed)
        if not taps:
            raise BecameError(
                "the outputs depend on none of the parameters that are trained; let them be those of the model that is "
                "given, in the place of another one's."
            )
        by_taps = per_sample_gradients({name: _tap_on_host(tap) for name, tap in taps.items()})
        pairs = [(np.ravel(rows), np.ravel([part[name] for part in gradients])) for name, rows in by_taps.items()]
        findings.append(Finding("gradients of single samples", _apart(*zip(*pairs, strict=True)), tolerance))
        findings.extend(_unread(network, taps, outputs, tolerance))
    # In the gradients' terms, since a difference of outputs is no measure here: in a deep network with ReLUs there are
    # kinks within any step that rounding allows. Where a difference is all there is, the best of some steps counts.
    direction = _random_direction(theta, network.padding)
    host = _on_host(direction, theta)
    slopes = np.array([sum(float((part[name] * host[name]).sum()) for name in theta) for part in gradients])
    difference = math.inf
    for shorter in network.steps:
        tangent = _numbers(network.along(direction, shorter)).astype(np.float64)
        products = (tangent * seed).reshape(outputs.shape[0], -1).sum(1)
        along = products.sum(keepdims=True) if network.mixes_samples else products
        difference = min(difference, _apart([along], [slopes]))
        if network.way != "difference":
            break
    allowed = 0.1 if network.way == "difference" else max(tolerance, 0.01)
    findings.append(Finding(f"a derivative, by {network.way}", difference, allowed))
    return NetworkCheck(tuple(findings))


def agreement(ours: Array, own: Array, mode: str, rounding: float = 0.0) -> Finding:
    """Return how far our pass is from the user's own one in a mode; the rounding as of a ``NetworkView``."""
    return Finding(f"outputs of the user's own pass, in {mode}", _apart([ours], [own]), tolerance_of(own, rounding))


def tolerance_of(outputs: Array, rounding: float = 0.0) -> float:
    """Return the share up to which a difference is rounding: many layers may round in different orders."""
    epsilon = max(float(namespace(outputs=outputs).finfo(outputs.dtype).eps), rounding)
    return min(10 * math.sqrt(epsilon), 0.1)


def _random_direction(theta: Params, padding: Mapping[str, int]) -> Params:
    """Return a direction in which each parameter moves as much as it varies, and the rows of padding not at all."""
    rng, xp = np.random.default_rng(0), namespace(theta=next(iter(theta.values())))
    direction = {}
    for name, value in theta.items():
        drawn = rng.normal(size=value.shape)
        if name in padding:
            drawn[padding[name]] = 0
        scale = max(float(np.std(_numbers(value).astype(np.float64))), 1e-3) if drawn.size else 0.0
        direction[name] = _as_array_like(drawn * scale, value, xp)
    return direction


def _as_array_like(numbers: NDArray[Any], like: Array, xp: Any) -> Array:
    """Return numbers in the dtype and on the device of an array."""
    return xp.asarray(numbers, dtype=like.dtype, device=getattr(like, "device", None))


def _unread(network: NetworkView, taps: Taps, outputs: Array, tolerance: float) -> Iterator[Finding]:
    """Yield how far the first sample's outputs move if matrices move where it reads nothing of them.

    A projector lets a matrix move there. Outputs would follow if the network used the matrix in a way that no gradient
    shows, as DoRA does, which divides by the norm of a detached weight.
    """
    rng, xp = np.random.default_rng(0), namespace(theta=next(iter(network.theta.values())))
    moves = {}
    for layer, tap in taps.items():
        name = tap.weight_name(layer)
        if name not in network.theta or tap.kind != "matrix" or tap.groups != 1 or tap.others:
            continue
        width = tap.inputs.shape[2]
        rows = _numbers(tap.inputs if tap.inputs.shape[0] != outputs.shape[0] else tap.inputs[:1]).reshape(-1, width)
        if len(rows) >= min(width, MANY):  # the first, since nothing is left free then
            continue
        value, (read, _) = _numbers(network.theta[name]), np.linalg.qr(rows.T.astype(np.float64))
        drawn = rng.normal(size=(value.size // width, width)) * max(float(np.std(value)), 1e-3)
        unread = drawn - drawn @ read @ read.T
        moves[name] = (unread.T if tap.transposed else unread).reshape(value.shape)

    def moved(names: Collection[str]) -> float:
        theta = {
            name: _as_array_like(_numbers(value) + moves[name], value, xp) if name in names else value
            for name, value in network.theta.items()
        }
        return _apart([network.outputs(theta, slice(1))], [_numbers(outputs)[:1]])

    if moves:
        what, difference = "matrices move", moved(moves)
        if not difference <= tolerance:
            what = next((f"'{name}' moves" for name in moves if not moved([name]) <= tolerance), what)
        yield Finding(f"outputs if {what} where the sample reads nothing", difference, tolerance)


def _numbers(array: Any) -> NDArray[Any]:
    """Return an array in NumPy; a dtype that NumPy has from an extension, such as bfloat16, becomes float32."""
    values = np.asarray(on_host(array))
    return values if values.dtype.kind in "biufc" else values.astype(np.float32)


def _tap_on_host(tap: Tap) -> Tap:
    """Return a tap whose arrays are NumPy's."""
    return replace(
        tap,
        inputs=_numbers(tap.inputs),
        output_gradients=_numbers(tap.output_gradients),
        others=tuple(map(_tap_on_host, tap.others)),
    )


def _on_host(values: Mapping[str, Array | None], theta: Params) -> dict[str, NDArray[np.float64]]:
    """Return the values of the parameters in NumPy, zeros where there is none."""
    return {
        name: np.zeros(weight.shape) if values[name] is None else _numbers(values[name]).astype(np.float64)
        for name, weight in theta.items()
    }


def _apart(computed: Sequence[Any], expected: Sequence[Any]) -> float:
    """Return the largest difference of corresponding arrays, as a share of the largest value."""
    pairs = [tuple(_numbers(side).astype(np.float64) for side in pair) for pair in zip(computed, expected, strict=True)]
    scale = max(float(np.abs(b).max(initial=0.0)) for _, b in pairs) or 1.0
    return max(float(np.abs(a - b).max(initial=0.0)) for a, b in pairs) / scale
