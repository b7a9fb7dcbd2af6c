"""The formulas of the Laplace merge, the Fisher information and the generalised Gauss-Newton matrix (GGN).

Each is computed from its definition.

Convention: float64. Parameters are flat vectors [d] and curvatures are dense matrices [d, d], so a diagonal is
``np.diag(values)`` here. Fisher matrices and the GGN are means over samples; ``squared_gradients`` is a sum.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "alpha_in_circulation",
    "alpha_star",
    "best_sharpness",
    "brute_force_minimiser",
    "cross_entropy",
    "directional_derivatives",
    "embedding_gradients",
    "grouped_gradients",
    "kfac_factors",
    "laplace_loss",
    "negative_log_likelihood",
    "output_curvature",
    "softmax",
    "squared_gradients",
    "squared_mean_gradient",
    "temperature",
]

Array = NDArray[np.float64]


def laplace_loss(
    alpha: float,
    theta_gp: Array,
    theta_hat: Array,
    precision_old: Array,
    hessian_new: Array,
    gradient: Array,
    mean: Array,
) -> float:
    """Return the Laplace cumulative loss at (1 - alpha) theta_gp + alpha theta_hat, without L_new(theta_hat).

    The loss of the old tasks is 1/2 (theta - mean)^T P (theta - mean). The loss of the new task is its second-order
    expansion at theta_hat.

    Args:
        alpha: the merging coefficient.
        theta_gp: the stable weights, [d].
        theta_hat: the plastic weights, [d].
        precision_old: P, [d, d].
        hessian_new: H of the new task at theta_hat, [d, d].
        gradient: of the new task at theta_hat, [d].
        mean: of the old tasks' posterior, [d].
    """
    theta = (1 - alpha) * theta_gp + alpha * theta_hat
    old = 0.5 * (theta - mean) @ precision_old @ (theta - mean)
    new = gradient @ (theta - theta_hat) + 0.5 * (theta - theta_hat) @ hessian_new @ (theta - theta_hat)
    return float(old + new)


def alpha_star(
    theta_gp: Array, theta_hat: Array, precision_old: Array, hessian_new: Array, gradient: Array, mean: Array
) -> float:
    """Return the alpha at which the derivative of ``laplace_loss`` is zero, not clipped; it must have curvature."""
    delta = theta_hat - theta_gp
    slope = gradient @ delta - delta @ hessian_new @ delta + (theta_gp - mean) @ precision_old @ delta
    curvature = delta @ (precision_old + hessian_new) @ delta
    return float(-slope / curvature)


def alpha_in_circulation(
    theta_gp: Array, theta_hat: Array, precision_old: Array, hessian_new: Array, gradient: Array
) -> float:
    """Return (delta.P.delta + grad L_new(theta_gp).delta) / delta.(P + H).delta, which some accounts print for alpha*.

    This is *not* the minimiser of the objective: the sign of the gradient is wrong, and so is the Hessian in the
    numerator. A test compares it with the minimiser.
    """
    delta = theta_hat - theta_gp
    gradient_at_gp = gradient - hessian_new @ delta
    curvature = delta @ (precision_old + hessian_new) @ delta
    return float((delta @ precision_old @ delta + gradient_at_gp @ delta) / curvature)


def brute_force_minimiser(function: Callable[[float], float], low: float, high: float, points: int = 200) -> float:
    """Return the point of [low, high] at which a function is smallest: the best of a grid, refined by golden section.

    The method compares values of the function, so its accuracy is about the square root of the rounding error.
    """
    grid = np.linspace(low, high, points + 1)
    best = int(np.argmin([function(float(alpha)) for alpha in grid]))
    left, right = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, points)])
    ratio = (np.sqrt(5) - 1) / 2
    while right - left > 1e-10 * (high - low):
        inner_left, inner_right = right - ratio * (right - left), left + ratio * (right - left)
        if function(inner_left) <= function(inner_right):
            right = inner_right
        else:
            left = inner_left
    return min((low, (left + right) / 2, high), key=function)


def softmax(logits: Array) -> Array:
    """Return the class probabilities; classes are the last axis."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def cross_entropy(logits: Array, labels: NDArray[np.int64]) -> float:
    """Return the mean over samples of -log softmax(logits)[label]; logits [samples, classes]."""
    return float(np.mean([-np.log(softmax(z)[label]) for z, label in zip(logits, labels, strict=True)]))


def best_sharpness(logits: Array, labels: NDArray[np.int64], low: float = 0.25, high: float = 4.0) -> float:
    """Return the factor of the logits, in [low, high], at which their mean cross-entropy is least.

    It is found by halving at the sign of the derivative, the mean over samples of z.(softmax(factor z) - e_label).
    """
    for _ in range(200):
        middle = (low + high) / 2
        parts = [z @ (softmax(middle * z) - np.eye(len(z))[label]) for z, label in zip(logits, labels, strict=True)]
        low, high = (low, middle) if np.mean(parts) > 0 else (middle, high)
    return (low + high) / 2


def temperature(held_out: float, training: float) -> float:
    """Return held-out over training, clipped to [1/4, 4]; 1 where the training samples have no positive value."""
    return 1.0 if training <= 0 else float(np.clip(held_out / training, 0.25, 4))


def directional_derivatives(
    logits: Array, jacobians: Array, labels: NDArray[np.int64], directions: Array
) -> tuple[Array, Array]:
    """Return g.d_k [K] and d_k.GGN.d_l [K, K], where g is the gradient of the mean cross-entropy.

    Args:
        logits: [samples, classes].
        jacobians: the derivatives of each sample's logits with respect to the parameters, [samples, classes, d].
        labels: [samples].
        directions: one in each row, [K, d].
    """
    parameters = directions.shape[1]
    gradient = np.zeros(parameters)
    ggn = np.zeros((parameters, parameters))
    for z, jacobian, label in zip(logits, jacobians, labels, strict=True):
        p = softmax(z)
        gradient += jacobian.T @ (p - np.eye(p.size)[label]) / len(labels)
        ggn += jacobian.T @ (np.diag(p) - np.outer(p, p)) @ jacobian / len(labels)
    return directions @ gradient, directions @ ggn @ directions.T


def negative_log_likelihood(kind: str, outputs: Array, targets: Array, scale: float | Array = 1.0) -> float:
    """Return one target's negative log-likelihood, up to a constant.

    Args:
        kind: "categorical", "gaussian" or "bernoulli".
        outputs: z, [d].
        targets: a label, or numbers [d].
        scale: of a categorical target, the classes' weights [d] or 1; of a Gaussian one, the standard deviation.
    """
    if kind == "categorical":
        label = int(targets)
        return float(-np.broadcast_to(scale, outputs.shape)[label] * np.log(softmax(outputs)[label]))
    if kind == "gaussian":
        return float(((outputs - targets) ** 2).sum() / (2 * float(scale) ** 2))
    p, q = 1 / (1 + np.exp(-outputs)), 1 / (1 + np.exp(outputs))
    return float(-(targets * np.log(p) + (1 - targets) * np.log(q)).sum())


def output_curvature(kind: str, outputs: Array, targets: Array, scale: float | Array = 1.0) -> Array:
    """Return the Hessian by the outputs of ``negative_log_likelihood``, [d, d]; arguments alike."""
    if kind == "categorical":
        p = softmax(outputs)
        weight = np.broadcast_to(scale, outputs.shape)[int(targets)]
        return np.asarray(weight * (np.diag(p) - np.outer(p, p)))
    if kind == "gaussian":
        return np.eye(outputs.size) / float(scale) ** 2
    p, q = 1 / (1 + np.exp(-outputs)), 1 / (1 + np.exp(outputs))
    return np.diag(p * q)


def squared_gradients(inputs: Array, output_gradients: Array) -> tuple[Array, Array]:
    """Return the sum over samples of the squared gradients of W [d_out, d_in] and of b [d_out] in a layer y = W a + b.

    Args:
        inputs: a, [samples, positions, d_in].
        output_gradients: the gradient of each sample's own loss with respect to y, [samples, positions, d_out].
    """
    weight = np.zeros((output_gradients.shape[2], inputs.shape[2]))
    bias = np.zeros(output_gradients.shape[2])
    for a, g in zip(inputs, output_gradients, strict=True):
        weight += sum(np.outer(g_l, a_l) for a_l, g_l in zip(a, g, strict=True)) ** 2
        bias += sum(g) ** 2
    return weight, bias


def grouped_gradients(inputs: Array, output_gradients: Array, groups: int) -> Array:
    """Return each sample's gradient with respect to the weight of a grouped layer, [samples, d_out, d_in / groups].

    A grouped layer is a dense layer whose weight is block-diagonal; its parameters are the blocks.
    """
    width, height = inputs.shape[2] // groups, output_gradients.shape[2] // groups  # of a block
    gradients = []
    for a, g in zip(inputs, output_gradients, strict=True):
        dense = np.asarray(sum(np.outer(g_l, a_l) for a_l, g_l in zip(a, g, strict=True)))
        blocks = [dense[k * height : (k + 1) * height, k * width : (k + 1) * width] for k in range(groups)]
        gradients.append(np.concatenate(blocks))
    return np.stack(gradients)


def embedding_gradients(indices: NDArray[np.int64], output_gradients: Array, size: int) -> Array:
    """Return each sample's gradient with respect to an embedding's weight, [samples, size, d].

    An index may occur several times in a sample; its gradients are then added.
    """
    gradients = np.zeros((len(indices), size, output_gradients.shape[2]))
    for n, (row, g) in enumerate(zip(indices, output_gradients, strict=True)):
        for index, g_l in zip(row, g, strict=True):
            gradients[n, index] += g_l
    return gradients


def kfac_factors(inputs: Array, output_gradients: Array, sharing: str) -> tuple[Array, Array]:
    """Return K-FAC's A and G of a layer as means over samples, for sharing "expand" or "reduce" (Eschenhagen 2023)."""
    n = len(inputs)
    a_factor: Array = np.zeros((inputs.shape[2],) * 2)
    g_factor: Array = np.zeros((output_gradients.shape[2],) * 2)
    for a, g in zip(inputs, output_gradients, strict=True):
        if sharing == "reduce":
            a, g = a.mean(axis=0)[None], g.sum(axis=0)[None]
        for a_l, g_l in zip(a, g, strict=True):
            a_factor = a_factor + np.outer(a_l, a_l) / len(a) / n
            g_factor = g_factor + np.outer(g_l, g_l) / n
    return a_factor, g_factor


def squared_mean_gradient(inputs: Array, output_gradients: Array) -> tuple[Array, Array]:
    """Return the published code's estimate for W and b from one batch: its size x (gradient of its mean loss)^2."""
    size = len(inputs)
    weight = np.zeros((output_gradients.shape[2], inputs.shape[2]))
    bias = np.zeros(output_gradients.shape[2])
    for a, g in zip(inputs, output_gradients, strict=True):
        weight += sum(np.outer(g_l, a_l) for a_l, g_l in zip(a, g, strict=True)) / size
        bias += sum(g) / size
    return size * weight**2, size * bias**2
