"""One look at a user's Keras model, when it is first measured: that what we compute of it is what it computes.

It takes a few samples and a moment: outputs are computed twice, and held against those of the model as the user calls
it; per-sample gradients by taps are held against a plain loop over the samples; a derivative along a random direction
is held against the gradients of that loop.
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
    direction = {
        name: tf.constant(rng.normal(size=value.shape), value.dtype) * tf.maximum(tf.math.reduce_std(value), 1e-3)
        for name, value in theta.items()
    }
    apart, slopes = 0.0, []
    for sample in range(int(outputs.shape[0])):
        at = slice(sample, sample + 1)
        gradients = network.gradient(theta, samples_of(inputs, at), seed[at])
        slopes.append(sum(tf.reduce_sum(gradient * direction[name]) for name, gradient in gradients.items()))
        pairs = [(tf.reshape(value[sample], (-1,)), tf.reshape(gradients[n], (-1,))) for n, value in by_taps.items()]
        apart = max(apart, _apart(*(tf.concat(side, 0) for side in zip(*pairs, strict=True))))
    findings.append(Finding("gradients of single samples", apart, tolerance))
    # In the gradients' terms, since a difference of outputs is no measure here: in a deep network with ReLUs there are
    # kinks within any step that rounding allows. Where a difference is all there is, the best of three steps counts.
    tangents = [derivatives.along(theta, [direction], inputs)[1]]
    if derivatives.way == "difference":
        ways = [Derivatives(network, "difference", short) for short in (0.05, 0.002)]
        tangents += [way.along(theta, [direction], inputs)[1] for way in ways]
    along = [tf.reduce_sum(tf.reshape(tangent[0] * seed, (len(slopes), -1)), 1) for tangent in tangents]
    difference = min(_apart(slope, tf.stack(slopes)) for slope in along)
    allowed = 0.1 if derivatives.way == "difference" else max(tolerance, 0.01)
    findings.append(Finding(f"a derivative, by {derivatives.way}", difference, allowed))
    return NetworkCheck(findings)


def _apart(computed: Array, expected: Array) -> float:
    """Return the largest difference, as a share of the largest value."""
    scale = float(tf.reduce_max(tf.abs(expected))) or 1.0
    return float(tf.reduce_max(tf.abs(computed - expected))) / scale
