"""Taps: layer inputs, recorded in a forward pass, and output gradients by one backward pass for each cotangent.

Convention: as in ``became_core.curvature.taps``. No weight gradient is computed: backward passes stop at outputs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import tensorflow as tf

from adapters.architectures import Backbone, Linear, Tapped
from adapters.tensorflow.layers import Pass, with_positions
from became_core.arrays import Array, Params
from became_core.curvature import Tap, Taps

__all__ = ["collect_taps"]


def collect_taps(
    backbone: Backbone,
    head: Linear,
    theta: Params,
    images: Array,
    cotangents: Callable[[Array], Iterable[Array]],
    *,
    masks: Sequence[Array] | None = None,
    constant_statistics: bool = True,
) -> Iterator[Taps]:
    """Run one forward pass, eagerly, and a backward pass for each cotangent; yield the taps of each.

    Without cotangents, yield those of the matrices' inputs alone.

    Args:
        backbone: what sees the images.
        head: what sees its features.
        theta: the parameters by canonical name.
        images: normalised, [N, H, W, C].
        cotangents: from logits to the gradients by them that backward passes begin with.
        masks: of dropout, as in a ``Pass``.
        constant_statistics: whether batch statistics are constants, so that per-sample gradients exist.
    """
    layers: list[Tapped] = []
    inputs: list[Array] = []
    outputs: list[Array] = []
    with tf.GradientTape(persistent=True) as tape:

        def record(layer: Tapped, seen: Callable[[], Array], output: Array) -> Array:
            tape.watch(output)
            layers.append(layer)
            outputs.append(output)
            with tape.stop_recording():
                inputs.append(with_positions(seen()))
            return output

        run = Pass(theta, masks, constant_statistics, record)
        logits = run(head, backbone(run, images))
    seeds = list(cotangents(logits))
    if not seeds:
        yield {
            layer.name: Tap("matrix", a, a[:, :, :0], layer.bias)
            for layer, a in zip(layers, inputs, strict=True)
            if layer.kind == "matrix"
        }
    for cotangent in seeds:
        gradients = tape.gradient(logits, outputs, cotangent)
        yield {
            layer.name: Tap(layer.kind, a, with_positions(gradient), layer.bias)
            for layer, a, gradient in zip(layers, inputs, gradients, strict=True)
        }
