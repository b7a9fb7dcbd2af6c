"""One look at a user's Keras model, when it is first measured: that what we compute of it is what it computes.

It takes a few samples and a moment: outputs are computed twice, and held against those of the model as the user calls
it; per-sample gradients by taps are held against a plain loop over the samples; a derivative along a random direction
is held against a difference of outputs.
"""

from typing import Any

import numpy as np
import tensorflow as tf

from adapters.backend.own_loop import Finding, NetworkCheck
from adapters.tensorflow.derivatives import Derivatives
from adapters.tensorflow.tapping import Tapping
from adapters.tensorflow.traced import KerasFunction, samples_of
from became_core.arrays import Array, Params
from became_core.curvature import per_sample_gradients

__all__ = ["check_network"]


def check_network(
    network: KerasFunction, tapping: Tapping, derivatives: Derivatives, theta: Params, inputs: Any
) -> NetworkCheck:
    """Return what was compared, and how far it differs.

    Args:
        network: the model as a function.
        tapping: what collects its taps.
        derivatives: what differentiates along directions.
        theta: the weights that the model has.
        inputs: of a few samples.
    """
    rng = np.random.default_rng(0)
    outputs, again = network.outputs(theta, inputs), network.outputs(theta, inputs)
    own = network.run(network.in_order(theta), inputs)  # eagerly
    alone = samples_of(inputs, slice(1))
    tolerance = 10 * (2.0**-52 if outputs.dtype == tf.float64 else 2.0**-23) ** 0.5
    findings = [
        Finding("outputs, computed twice", max(_apart(again, outputs), _apart(own, outputs)), tolerance),
        Finding("outputs of a sample alone", _apart(network.outputs(theta, alone), outputs[:1]), tolerance),
    ]
    seed = tf.constant(rng.normal(size=outputs.shape), outputs.dtype)
    by_taps = per_sample_gradients(tapping.taps(theta, inputs, seed))
    apart = 0.0
    for sample in range(int(outputs.shape[0])):
        at = slice(sample, sample + 1)
        gradients = network.gradient(theta, samples_of(inputs, at), seed[at])
        pairs = [(tf.reshape(value[sample], (-1,)), tf.reshape(gradients[n], (-1,))) for n, value in by_taps.items()]
        apart = max(apart, _apart(*(tf.concat(side, 0) for side in zip(*pairs, strict=True))))
    findings.append(Finding("gradients of single samples", apart, tolerance))
    direction = {
        name: tf.constant(rng.normal(size=value.shape), value.dtype) * tf.maximum(tf.math.reduce_std(value), 1e-3)
        for name, value in theta.items()
    }
    _, tangents = derivatives.along(theta, [direction], inputs)
    _, expected = Derivatives(network, "difference").along(theta, [direction], inputs)
    # A difference is near where the network is smooth; a kink between its two ends shows.
    findings.append(Finding(f"a derivative, by {derivatives.way}", _apart(tangents, expected), 0.1))
    return NetworkCheck(findings)


def _apart(computed: Array, expected: Array) -> float:
    """Return the largest difference, as a share of the largest value."""
    scale = float(tf.reduce_max(tf.abs(expected))) or 1.0
    return float(tf.reduce_max(tf.abs(computed - expected))) / scale
