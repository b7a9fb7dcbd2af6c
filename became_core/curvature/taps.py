"""Taps: what a layer saw and what its output was held responsible for; all that curvature and projection ask for.

Convention: ``inputs`` a [samples, positions, d_in] and ``output_gradients`` g [samples, positions, d_out], g being the
gradient of each sample's own loss (a sum over samples, never a mean). A linear layer on flat inputs has one position; a
convolution has one for each place of its kernel, and its patches are flattened as its weight is (d_in = channels x
height x width of the kernel). For an elementwise scale (a normalisation layer) a is the normalised input, d_in = d_out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from became_core.arrays import Array, Params, namespace

__all__ = ["Tap", "Taps", "batch_gradient", "per_sample_square_sum"]


@dataclass(frozen=True)
class Tap:
    """One layer's inputs and output gradients over a batch.

    Attributes:
        kind: "matrix" for y = W a + b at each position, "scale" for y = w * a + b.
        inputs: [samples, positions, d_in].
        output_gradients: [samples, positions, d_out].
        has_bias: whether the layer has a ``bias`` beside its ``weight``.
    """

    kind: Literal["matrix", "scale"]
    inputs: Array
    output_gradients: Array
    has_bias: bool = False


# By layer name: the tap of ``conv1`` speaks of ``conv1.weight`` and ``conv1.bias``.
Taps = Mapping[str, Tap]


def per_sample_square_sum(taps: Taps) -> Params:
    """Return, for each parameter, the sum over samples of the squared gradient of the sample's own loss.

    A matrix's gradient for sample n is sum_l g_nl a_nl^T. With one position its square factors into g^2 and a^2, so the
    sum over samples is one matrix product; otherwise the batch of per-sample gradients is one batched product.
    Weights come as [d_out, d_in] or, for a scale, [d].
    """
    squares: Params = {}
    for layer, tap in taps.items():
        a, g = tap.inputs, tap.output_gradients
        xp = namespace(inputs=a, output_gradients=g)
        if tap.kind == "scale":
            squares[f"{layer}.weight"] = _square_sum(xp.sum(g * a, axis=1))
        elif a.shape[1] == 1:
            squares[f"{layer}.weight"] = xp.matmul(xp.matrix_transpose(xp.square(g[:, 0, :])), xp.square(a[:, 0, :]))
        else:
            squares[f"{layer}.weight"] = _square_sum(xp.matmul(xp.matrix_transpose(g), a))
        if tap.has_bias:
            squares[f"{layer}.bias"] = _square_sum(xp.sum(g, axis=1))
    return squares


def _square_sum(per_sample: Array) -> Array:
    xp = namespace(per_sample=per_sample)
    return xp.sum(xp.square(per_sample), axis=0)


def batch_gradient(taps: Taps) -> Params:
    """Return, for each parameter, the gradient of the sum of the samples' losses; shapes as in the squares."""
    gradients: Params = {}
    for layer, tap in taps.items():
        a, g = tap.inputs, tap.output_gradients
        xp = namespace(inputs=a, output_gradients=g)
        if tap.kind == "scale":
            gradients[f"{layer}.weight"] = xp.sum(g * a, axis=(0, 1))
        else:
            rows = a.shape[0] * a.shape[1]
            flat_g, flat_a = xp.reshape(g, (rows, g.shape[2])), xp.reshape(a, (rows, a.shape[2]))
            gradients[f"{layer}.weight"] = xp.matmul(xp.matrix_transpose(flat_g), flat_a)
        if tap.has_bias:
            gradients[f"{layer}.bias"] = xp.sum(g, axis=(0, 1))
    return gradients
