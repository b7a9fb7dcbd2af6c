"""Taps: layer inputs, recorded in a forward pass, and output gradients by one backward pass for each cotangent.

Convention: as in ``became_core.curvature.taps``. No weight gradient is computed: backward passes stop at outputs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import tensorflow as tf

from adapters.tensorflow.layers import Linear, Weighted, with_positions
from adapters.tensorflow.networks import Network
from became_core.arrays import Array, Params
from became_core.curvature import Tap, Taps

__all__ = ["collect_taps"]


def collect_taps(
    network: Network,
    head: Linear,
    theta: Params,
    images: Array,
    cotangents: Callable[[Array], Iterable[Array]],
    *,
    masks: Sequence[Array] = (),
    constant_statistics: bool = True,
) -> Iterator[Taps]:
    """Run one forward pass, eagerly, and a backward pass for each cotangent; yield the taps of each.

    Without cotangents, yield those of the matrices' inputs alone.

    Args:
        network: what sees the images.
        head: what sees its features.
        theta: the parameters by canonical name.
        images: normalised, [N, H, W, C].
        cotangents: from logits to the gradients by them that backward passes begin with.
        masks: of dropout, as in ``Network.features``.
        constant_statistics: whether batch statistics are constants, so that per-sample gradients exist.
    """
    layers: list[Weighted] = []
    inputs: list[Array] = []
    outputs: list[Array] = []
    with tf.GradientTape(persistent=True) as tape:

        def record(layer: Weighted, a: Array, output: Array) -> None:
            tape.watch(output)
            layers.append(layer)
            outputs.append(output)
            with tape.stop_recording():
                inputs.append(layer.seen(a))

        features = network.features(theta, images, masks, constant_statistics=constant_statistics, record=record)
        logits = head.applied(theta, features)
        record(head, features, logits)
    seeds = list(cotangents(logits))
    if not seeds:
        yield {
            layer.name: Tap("matrix", a, a[:, :, :0], layer.has_bias)
            for layer, a in zip(layers, inputs, strict=True)
            if layer.kind == "matrix"
        }
    for cotangent in seeds:
        gradients = tape.gradient(logits, outputs, cotangent)
        yield {
            layer.name: Tap(layer.kind, a, with_positions(gradient), layer.has_bias)
            for layer, a, gradient in zip(layers, inputs, gradients, strict=True)
        }
