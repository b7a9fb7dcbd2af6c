"""What each described layer computes in JAX, and what it gives a tap.

Convention: within a network images are [N, H, W, C]; weights are canonical, [out, in] and OIHW.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
from jax import lax
from jax import numpy as jnp

from adapters import networks
from adapters.networks import (
    GELU,
    AveragePool,
    BatchNorm,
    CausalAttention,
    Convolution,
    Dropout,
    Embedding,
    Flatten,
    GroupNorm,
    LastPosition,
    Latent,
    LayerNorm,
    Linear,
    MaxPool,
    Positions,
    ReLU,
    Tanh,
    Tapped,
)
from became_core.arrays import Array

__all__ = ["Pass", "convolved"]


def _linear(run: "Pass", layer: Linear, inputs: Array) -> Array:
    a, weight = run.lowered(inputs, run.weights[f"{layer.name}.weight"])
    return run.tapped(layer, lambda: inputs, (a @ weight.T).astype(inputs.dtype))


def _convolution(run: "Pass", layer: Convolution, inputs: Array) -> Array:
    return convolved(
        run,
        layer,
        inputs,
        lambda places: _patches(layer, inputs, places),
        window_strides=(layer.stride, layer.stride),
        padding=[(layer.padding, layer.padding)] * 2,
    )


def convolved(
    run: "Pass", layer: Tapped, inputs: Array, patches: Callable[[tuple[int, int]], Array], **window: Any
) -> Array:
    """Return the output of a convolution of images, recorded with its patches.

    Args:
        run: has the layer's weight.
        layer: what its tap tells of it.
        inputs: [N, H, W, C].
        patches: (how many windows there are along height and width) -> what they see, [N, H', W', d_in].
        window: how they lie, as ``lax.conv_general_dilated`` calls it.
    """
    a, weight = run.lowered(inputs, run.weights[f"{layer.name}.weight"])
    output = lax.conv_general_dilated(a, weight, dimension_numbers=("NHWC", "OIHW", "NHWC"), **window)
    return run.tapped(layer, lambda: patches(output.shape[1:3]), output.astype(inputs.dtype))


def _patches(layer: Convolution, inputs: Array, places: tuple[int, int]) -> Array:
    """Return what each output position sees, [N, H', W', channels x kernel x kernel], flattened as the weight is."""
    padded = jnp.pad(inputs, ((0, 0), (layer.padding, layer.padding), (layer.padding, layer.padding), (0, 0)))
    height, width = (layer.stride * (count - 1) + 1 for count in places)
    windows = [
        padded[:, row : row + height : layer.stride, column : column + width : layer.stride]
        for row in range(layer.kernel)
        for column in range(layer.kernel)
    ]
    return jnp.stack(windows, axis=-1).reshape(*windows[0].shape[:3], -1)


def _batch_norm(run: "Pass", layer: BatchNorm, inputs: Array) -> Array:
    axes = tuple(range(inputs.ndim - 1))
    mean, variance = run.statistics(layer, lambda: (inputs.mean(axes), inputs.var(axes)))
    if run.constant_statistics:
        mean, variance = lax.stop_gradient((mean, variance))
    inverse = lax.rsqrt(variance + layer.epsilon)
    outputs = (inputs - mean) * (inverse * run.weights[f"{layer.name}.weight"])  # one product for each number, not two
    return run.tapped(layer, lambda: (inputs - mean) * inverse, outputs)


def _group_norm(run: "Pass", layer: GroupNorm, inputs: Array) -> Array:
    samples, channels = inputs.shape[0], inputs.shape[-1]
    groups = layer.groups(channels)
    apart = inputs.reshape(samples, -1, groups, channels // groups)
    mean, variance = apart.mean((1, 3), keepdims=True), apart.var((1, 3), keepdims=True)
    normalised = ((apart - mean) * lax.rsqrt(variance + layer.epsilon)).reshape(inputs.shape)
    return run.tapped(layer, lambda: normalised, normalised * run.weights[f"{layer.name}.weight"])


def _layer_norm(run: "Pass", layer: LayerNorm, inputs: Array) -> Array:
    mean, variance = inputs.mean(-1, keepdims=True), inputs.var(-1, keepdims=True)
    normalised = (inputs - mean) * lax.rsqrt(variance + layer.epsilon)
    return run.tapped(layer, lambda: normalised, normalised * run.weights[f"{layer.name}.weight"])


def _embedding(run: "Pass", layer: Embedding, inputs: Array) -> Array:
    return run.tapped(layer, lambda: inputs, run.weights[f"{layer.name}.weight"][inputs])


def _positions(run: "Pass", layer: Positions, inputs: Array) -> Array:
    numbers = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape[:2])
    return inputs + run.tapped(layer, lambda: numbers, run.weights[f"{layer.name}.weight"][numbers])


def _attention(run: "Pass", layer: CausalAttention, inputs: Array) -> Array:  # noqa: ARG001 - a table's signature
    n, length, width = inputs.shape
    q, k, v = jnp.moveaxis(inputs.reshape(n, length, 3, layer.heads, -1), 2, 0)
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / q.shape[-1] ** 0.5
    before = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(before, scores, -jnp.inf), axis=-1)
    return jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(n, length, width // 3)


def _dropout(run: "Pass", layer: Dropout, inputs: Array) -> Array:
    keep = run.mask(layer)
    return inputs if keep is None else jnp.where(keep, inputs * layer.scale, 0)


def _latent(run: "Pass", layer: Latent, inputs: Array) -> Array:  # noqa: ARG001 - a table's signature
    mean, log_variance, noise = run.latent(inputs)
    return mean + jnp.exp(log_variance / 2) * noise


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _greatest(inputs: Array, size: int) -> Array:
    """Return the greatest of each square; of equal ones the first has the gradient, as in other frameworks.

    Where a derivative is taken, pixels are compared one by one. JAX's own maximum over axes finds the greatest again by
    ``==`` in the backward pass, for which XLA may compute the numbers anew and not to the same bit: in single precision
    gradients were off by a third. Elsewhere, as in evaluation, XLA's own loop is faster.
    """
    window = (1, size, size, 1)
    greatest: Array = lax.reduce_window(inputs, -jnp.inf, lax.max, window, window, "VALID")
    return greatest


@_greatest.defjvp  # type: ignore[untyped-decorator]
def _(size: int, inputs: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    greatest, along = jax.jvp(partial(_first_of_greatest, size=size), inputs, tangents)
    return greatest, along


def _first_of_greatest(inputs: Array, size: int) -> Array:
    squares = _squares(inputs, size)
    best, *others = (squares[:, :, row, :, column] for row in range(size) for column in range(size))
    for pixel in others:
        best = jnp.where((best >= pixel) | jnp.isnan(best), best, pixel)
    return best


def _squares(inputs: Array, size: int) -> Array:
    """Return the squares of pixels, side by side, as [N, H', size, W', size, C]."""
    n, height, width, channels = inputs.shape
    rows, columns = height // size, width // size
    whole = inputs[:, : rows * size, : columns * size]
    return whole.reshape(n, rows, size, columns, size, channels)


class Pass(networks.Pass):
    """One run of a network, while it is traced."""

    def lowered(self, *arrays: Array) -> tuple[Array, ...]:
        """Return what is multiplied in the dtype of products."""
        return arrays if self.products is None else tuple(array.astype(self.products) for array in arrays)

    computed: ClassVar = {
        Linear: _linear,
        Convolution: _convolution,
        BatchNorm: _batch_norm,
        GroupNorm: _group_norm,
        LayerNorm: _layer_norm,
        Embedding: _embedding,
        Positions: _positions,
        CausalAttention: _attention,
        GELU: lambda run, layer, inputs: jax.nn.gelu(inputs, approximate=False),
        ReLU: lambda run, layer, inputs: jax.nn.relu(inputs),
        Tanh: lambda run, layer, inputs: jnp.tanh(inputs),
        Dropout: _dropout,
        MaxPool: lambda run, layer, inputs: _greatest(inputs, layer.size),
        AveragePool: lambda run, layer, inputs: _squares(inputs, layer.size).mean((2, 4)),
        Latent: _latent,
        LastPosition: lambda run, layer, inputs: inputs[:, -1],
        Flatten: lambda run, layer, inputs: jnp.moveaxis(inputs, -1, 1).reshape(inputs.shape[0], -1),
    }
