"""Taps: layer inputs, recorded in a forward pass, and output gradients by one backward pass for each cotangent.

Convention: as in ``became_core.curvature.taps``. No weight gradient is computed: backward passes stop at outputs. All
of it can be compiled.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import tensorflow as tf

from adapters.networks import Backbone, Linear, Tapped
from adapters.tensorflow.layers import Pass, Patches, with_positions
from became_core.arrays import Array, Params
from became_core.curvature import Tap, Taps

__all__ = ["collect_taps", "input_taps"]


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
    """Run one forward pass, and a backward pass for each cotangent; yield the taps of each.

    Args:
        backbone: what sees the images.
        head: what sees its features.
        theta: the parameters of both.
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
    for cotangent in cotangents(logits):
        gradients = tape.gradient(logits, outputs, cotangent)
        yield {
            layer.name: Tap(layer.kind, a, with_positions(gradient), layer.bias)
            for layer, a, gradient in zip(layers, inputs, gradients, strict=True)
        }


def input_taps(backbone: Backbone, head: Linear, theta: Params, images: Array) -> Taps:
    """Return the taps of the matrices' inputs alone, of convolutions images where they can be; arguments as above."""
    taps: dict[str, Tap] = {}

    def record(layer: Tapped, seen: Callable[[], Array], output: Array) -> Array:
        if layer.kind == "matrix":
            taps[layer.name] = _input_tap(layer, seen)
        return output

    run = Pass(theta, record=record)
    run(head, backbone(run, images))
    return taps


def _input_tap(layer: Tapped, seen: Callable[[], Array]) -> Tap:
    if isinstance(seen, Patches) and seen.slide_by_one:
        images = tf.transpose(seen.images, (0, 3, 1, 2))
        return Tap("window", images, images[:, :0, :0], layer.bias, kernel=seen.kernel)
    a = with_positions(seen())
    return Tap("matrix", a, a[:, :, :0], layer.bias)
