"""Temperatures of the posterior: what held-out samples say of a loss that its training samples cannot say.

A task's curvature is measured on the samples that were fitted. Weights that move away from them raise their loss more
than that of unseen samples, so that a posterior made of it is too sharp. Three estimates mend it, each from one task
alone, from its own training and held-out samples; ``Method.temper`` chooses one.

With delta = theta_hat - theta_gp, and L of the task that is merged, the first two multiply the task's curvature by tau
when it enters the posterior, clipped to [1/4, 4]:

    "curvature"   tau = c_held-out / c_training,  c = (grad L(theta_hat) - grad L(theta_gp)).delta
    "rise"        tau = r_held-out / r_training,  r = L(theta_gp) - L(theta_hat)

c is the curvature over the whole length of delta, as the rule ``Secant`` has it. The first task has no delta: it takes
the temperature of the second. The new task's own side of a merge is left as it is measured.

    "calibrated"  L is measured with the logits multiplied by beta = argmin_beta L_held-out(beta z), in [1/4, 4]

1 / beta is the softmax temperature of Guo et al. (ICML 2017, arXiv 1706.04599). The likelihood then has the confidence
that held-out samples bear out, as the noise of a Gaussian likelihood is estimated from residuals. It is that of the
weights at which curvature is measured, and applies to the new task's slopes at both ends, too.

The evidence of the posterior gives no temperature; docs/mathematics.md has the proof.

Convention: temperatures are factors of precisions, without a unit; below 1 the posterior becomes flatter.
"""

import math
from dataclasses import replace
from typing import Literal

from became_core.arrays import Array, Params, difference, namespace
from became_core.continual.measurement import Measurement
from became_core.curvature import Likelihood

__all__ = ["BY_FACTOR", "GREATEST", "LEAST", "Tempering", "calibrated", "clipped_ratio", "sharpness", "temperature"]

Tempering = Literal["none", "curvature", "rise", "calibrated"]
"""How the curvature of a task is tempered by its held-out samples."""

BY_FACTOR: tuple[Tempering, ...] = ("curvature", "rise")
"""Those that multiply a task's curvature as it enters the posterior."""

LEAST, GREATEST = 0.25, 4.0

# Of the bisection in the logarithm of beta: 4 / (1/4) to the power of 2^-32.
HALVINGS = 32


def temperature(tempering: Tempering, measurement: Measurement, theta_gp: Params) -> float:
    """Return what a task's curvature is multiplied by when it enters the posterior; 1 if it is not by a factor.

    Args:
        tempering: how it is estimated.
        measurement: of the task, whose learner is at theta_hat, and is left there.
        theta_gp: the stable weights.
    """
    if tempering not in BY_FACTOR:
        return 1.0
    delta, parts = difference(measurement.mean, theta_gp), []
    for side in (measurement.held_out(), measurement):
        if tempering == "rise":
            parts.append(side.loss(theta_gp) - side.loss())
        else:
            parts.append(float(side.along([delta]).slope[0]) - float(side.slope(theta_gp, [delta])[0]))
    return clipped_ratio(*parts)


def clipped_ratio(held_out: float, training: float) -> float:
    """Return the ratio of two curvatures or rises, in [1/4, 4]; 1 where that of the training samples is not positive.

    Examples:
        >>> clipped_ratio(1.0, 2.0), clipped_ratio(-1.0, 2.0), clipped_ratio(1.0, 0.0)
        (0.5, 0.25, 1.0)
    """
    if not training > 0:
        return 1.0
    return min(max(held_out / training, LEAST), GREATEST)


def calibrated(measurement: Measurement) -> Measurement:
    """Return a measurement whose softmax is as sharp as the task's held-out samples bear out, at the present weights.

    Args:
        measurement: of a task with held-out samples, whose targets are labels.
    """
    learner, rows = measurement.learner, measurement.task.validation
    outputs = measurement.outputs(rows)
    return replace(measurement, sharpness=sharpness(learner.likelihood, outputs, learner.targets(rows)))


def sharpness(likelihood: Likelihood, outputs: Array, targets: Array) -> float:
    """Return the factor of the outputs, in [1/4, 4], that makes the loss least.

    The loss of a softmax is convex in the factor, so its slope is negative below the least and positive above it.

    Args:
        likelihood: what the outputs say of the targets.
        outputs: [samples, ...]; -inf for classes that the task has not.
        targets: what is given of the samples.

    Examples:
        >>> import numpy as np
        >>> from became_core.curvature import Categorical
        >>> outputs, targets = np.full((4, 2), (4.0, 0.0)), np.array([0, 0, 0, 1])
        >>> factor = sharpness(Categorical(), outputs, targets)
        >>> round(1 / (1 + float(np.exp(-4 * factor))), 6)  # the probability of the first class, which is right 3 in 4
        0.75
    """
    xp = namespace(outputs=outputs)
    finite = xp.isfinite(outputs)
    tangents = xp.expand_dims(xp.where(finite, outputs, xp.zeros_like(outputs)), axis=0)

    def slope(factor: float) -> float:
        return float(likelihood.derivatives(outputs * factor, tangents, targets)[0][0])

    low, high = LEAST, GREATEST
    if slope(low) >= 0:
        return low
    if slope(high) <= 0:
        return high
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return math.sqrt(low * high)
