"""A user's own Keras model as a backbone, images to features, called with nothing but the images.

While it runs, its Dense, Conv2D, normalisation and Dropout layers are taken over: they compute as described layers do,
with weights by canonical name, and so can be tapped; everything between them is the model's. Batch norm takes the
batch's statistics, in evaluation too, and keeps none.

Convention: a layer's name is its own, ``conv1.weight``; canonical weights are [out, in] and OIHW, where Keras has
[in, out] and HWIO. Images are [N, H, W, C].
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from adapters.networks import BatchNorm, Dropout, Linear, Mask, Parameter
from adapters.networks.own import CANONICAL_AXES, OwnLayer
from adapters.tensorflow.layers import Pass, convolved
from became_core import BecameError
from became_core.arrays import Array, Params

__all__ = ["KerasBackbone"]


class _Layer(NamedTuple):
    """How a class of Keras layers is taken over.

    Attributes:
        kind: of its tap.
        weight: the attribute that holds its weight.
        bias: the attribute that holds its bias.
        run: (pass, layer, the Keras layer, inputs) -> outputs before the layer's activation.
    """

    kind: Literal["matrix", "scale"]
    weight: str
    bias: str
    run: Callable[[Pass, OwnLayer, Any, Array], Array]


@dataclass(frozen=True, eq=False)
class KerasBackbone:
    """A model and what is known of its layers.

    Attributes:
        model: built, from images [N, H, W, C] to features [N, features].
        tapped: its layers with parameters.
        parameters: by canonical name.
        masks: what its dropout layers need.
    """

    model: keras.Model
    tapped: tuple[OwnLayer, ...]
    parameters: Mapping[str, Parameter]
    masks: tuple[Mask, ...]

    @classmethod
    def of(cls, model: keras.Model, image: tuple[int, int, int]) -> "KerasBackbone":
        """Look at a model.

        Args:
            model: any that is called with images alone.
            image: the shape of an image, [C, H, W].

        Raises:
            BecameError: if a variable belongs to a layer that taps do not know, or two layers have one name.
        """
        channels, height, width = image
        masks: list[Mask] = []

        def look(following: Callable[..., Array], layer: Any, inputs: Array) -> Array:
            if type(layer) is not keras.layers.Dropout:
                return following(inputs)
            threshold = Dropout(layer.rate).threshold
            masks.extend([(tuple(inputs.shape[1:]), threshold)] if threshold else [])
            return inputs

        with _intercepted(model, look):
            model(tf.zeros((2, height, width, channels)))
        found = {layer: _layer_of(layer) for layer in model._flatten_layers() if _is_known(layer)}
        names = [each.name for each in found.values()]
        parameters: dict[str, Parameter] = {}
        owned = set()
        for layer, each in found.items():
            if names.count(each.name) > 1:
                raise BecameError(f"two layers are called '{each.name}'; give each a name of its own.")
            fan_in = None if each.kind == "scale" else prod(layer.kernel.shape[:-1])
            for name, variable in _variables(layer, each).items():
                shape = tuple(variable.shape[axis] for axis in CANONICAL_AXES[len(variable.shape)])
                parameters[name] = Parameter(shape, fan_in)
                owned.add(variable.path)
        for variable in model.trainable_variables:
            if variable.path not in owned:
                known = ", ".join(sorted(each.__name__ for each in _LAYERS))
                raise BecameError(
                    f"taps do not know the layer of the variable '{variable.path}'; on Keras they know {known} with "
                    "weights, Conv2D of one group."
                )
        return cls(model, tuple(found.values()), parameters, tuple(masks))

    def __call__(self, run: Pass, images: Array) -> Array:
        """Return the features [N, features] of images [N, H, W, C]."""

        def take_over(following: Callable[..., Array], layer: Any, inputs: Array) -> Array:
            if type(layer) is keras.layers.Dropout:
                return run(Dropout(layer.rate), inputs)
            if not _is_known(layer):
                return following(inputs)
            output = _LAYERS[type(layer)].run(run, _layer_of(layer), layer, inputs)
            activation = getattr(layer, "activation", None)
            return output if activation is None else activation(output)

        with _intercepted(self.model, take_over):
            return self.model(images)

    def weights(self) -> Params:
        """Return the model's weights by canonical name, in canonical layouts."""
        layers = {layer.name: layer for layer in self.model._flatten_layers() if _is_known(layer)}
        return {
            name: tf.transpose(variable.value, CANONICAL_AXES[len(variable.shape)])
            for each in self.tapped
            for name, variable in _variables(layers[each.name], each).items()
        }

    def assign(self, weights: Params) -> None:
        """Give the model weights by canonical name; those of other layers, such as heads, are left out."""
        layers = {layer.name: layer for layer in self.model._flatten_layers() if _is_known(layer)}
        for each in self.tapped:
            for name, variable in _variables(layers[each.name], each).items():
                variable.assign(tf.transpose(weights[name], np.argsort(CANONICAL_AXES[len(variable.shape)])))


@contextmanager
def _intercepted(model: keras.Model, instead: Callable[[Callable[..., Array], Any, Array], Array]) -> Iterator[None]:
    """Let the layers of a model that taps know, and its Dropout, do something else, for the time of this context."""
    layers = [each for each in model._flatten_layers() if _is_known(each) or type(each) is keras.layers.Dropout]
    for layer in layers:
        following = layer.call

        def call(inputs: Array, *, layer: Any = layer, following: Any = following, **options: Any) -> Array:
            return instead(lambda x: following(x, **options), layer, inputs)

        layer.call = call
    try:
        yield
    finally:
        for layer in layers:
            del layer.call


def _layer_of(layer: Any) -> OwnLayer:
    known = _LAYERS[type(layer)]
    return OwnLayer(layer.name, known.kind, getattr(layer, known.bias, None) is not None)


def _variables(layer: Any, each: OwnLayer) -> dict[str, Any]:
    known = _LAYERS[type(layer)]
    weight = {f"{each.name}.weight": getattr(layer, known.weight)}
    return weight | ({f"{each.name}.bias": getattr(layer, known.bias)} if each.bias else {})


def _is_known(layer: Any) -> bool:
    if type(layer) is keras.layers.Conv2D:
        return bool(layer.groups == 1 and layer.data_format == "channels_last")
    if type(layer) is keras.layers.BatchNormalization:
        return bool(layer.scale and layer.center)
    return type(layer) is keras.layers.Dense or (type(layer) in _LAYERS and bool(layer.scale))


def _convolution(run: Pass, each: OwnLayer, layer: Any, inputs: Array) -> Array:
    return convolved(
        run,
        each,
        inputs,
        kernel=layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding.upper(),
        rates=layer.dilation_rate,
    )


def _layer_norm(run: Pass, each: OwnLayer, layer: Any, inputs: Array) -> Array:
    mean, variance = tf.nn.moments(inputs, [-1], keepdims=True)
    return _scaled(run, each, (inputs - mean) * tf.math.rsqrt(variance + layer.epsilon))


def _scaled(run: Pass, each: OwnLayer, normalised: Array) -> Array:
    return run.tapped(each, lambda: normalised, normalised * run.weights[f"{each.name}.weight"])


_LAYERS: dict[type, _Layer] = {
    keras.layers.Dense: _Layer(
        "matrix",
        "kernel",
        "bias",
        lambda run, each, layer, inputs: run(Linear(each.name, layer.units, each.bias), inputs),
    ),
    keras.layers.Conv2D: _Layer("matrix", "kernel", "bias", _convolution),
    keras.layers.BatchNormalization: _Layer(
        "scale", "gamma", "beta", lambda run, each, layer, inputs: run(BatchNorm(each.name, layer.epsilon), inputs)
    ),
    keras.layers.LayerNormalization: _Layer("scale", "gamma", "beta", _layer_norm),
}
