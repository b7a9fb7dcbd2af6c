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

from adapters.networks import CANONICAL_AXES, BatchNorm, Dropout, Linear, Mask, Parameter, UserLayer
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
    run: Callable[[Pass, UserLayer, Any, Array], Array]


@dataclass(frozen=True, eq=False)
class KerasBackbone:
    """A model and what is known of its layers.

    Attributes:
        model: built, from images [N, H, W, C] to features [N, features].
        tapped: its layers with parameters, in the order in which they run.
        parameters: by canonical name.
        masks: what its dropout layers need.
        variables: the model's own, by canonical name.
    """

    model: keras.Model
    tapped: tuple[UserLayer, ...]
    parameters: Mapping[str, Parameter]
    masks: tuple[Mask, ...]
    variables: Mapping[str, Any]

    @classmethod
    def of(cls, model: keras.Model, image: tuple[int, int, int]) -> "KerasBackbone":
        """Look at a model while it sees two blank images.

        Args:
            model: any that is called with images alone.
            image: the shape of an image, [C, H, W].

        Raises:
            BecameError: if a variable belongs to a layer that taps do not know, or two layers have one name.
        """
        channels, height, width = image
        masks: list[Mask] = []
        layers: dict[Any, UserLayer] = {}

        def look(call: Callable[[Array], Array], layer: Any, inputs: Array) -> Array:
            if type(layer) is keras.layers.Dropout:
                threshold = Dropout(layer.rate).threshold
                masks.extend([(tuple(inputs.shape[1:]), threshold)] if threshold else [])
                return inputs
            if _is_known(layer):
                layers[layer] = _described(layer)
            return call(inputs)

        with _intercepted(look):
            model(tf.zeros((2, height, width, channels)))
        variables: dict[str, Any] = {}
        parameters: dict[str, Parameter] = {}
        names = [described.name for described in layers.values()]
        for layer, described in layers.items():
            if names.count(described.name) > 1:
                raise BecameError(f"two layers are called '{described.name}'; give each a name of its own.")
            known = _LAYERS[type(layer)]
            own = {f"{described.name}.weight": getattr(layer, known.weight)}
            own |= {f"{described.name}.bias": getattr(layer, known.bias)} if described.bias else {}
            fan_in = None if described.kind == "scale" else prod(layer.kernel.shape[:-1])
            for name, variable in own.items():
                shape = tuple(variable.shape[axis] for axis in CANONICAL_AXES[len(variable.shape)])
                parameters[name] = Parameter(shape, fan_in)
            variables |= own
        owned = {variable.path for variable in variables.values()}
        for variable in model.trainable_variables:
            if variable.path not in owned:
                classes = ", ".join(sorted(layer_class.__name__ for layer_class in _LAYERS))
                raise BecameError(
                    f"taps do not know the layer of the variable '{variable.path}'; on Keras they know {classes} with "
                    "weights, Conv2D of one group."
                )
        return cls(model, tuple(layers.values()), parameters, tuple(masks), variables)

    def __call__(self, run: Pass, images: Array) -> Array:
        """Return the features [N, features] of images [N, H, W, C]."""

        def take_over(call: Callable[[Array], Array], layer: Any, inputs: Array) -> Array:
            if type(layer) is keras.layers.Dropout:
                return run(Dropout(layer.rate), inputs)
            if not _is_known(layer):
                return call(inputs)
            output = _LAYERS[type(layer)].run(run, _described(layer), layer, inputs)
            activation = getattr(layer, "activation", None)
            return output if activation is None else activation(output)

        with _intercepted(take_over):
            return self.model(images)

    def weights(self) -> Params:
        """Return the model's weights by canonical name, in canonical layouts."""
        return {
            name: tf.transpose(variable.value, CANONICAL_AXES[len(variable.shape)])
            for name, variable in self.variables.items()
        }

    def assign(self, weights: Params) -> None:
        """Give the model weights by canonical name; those of other layers, such as heads, are left out."""
        for name, variable in self.variables.items():
            variable.assign(tf.transpose(weights[name], np.argsort(CANONICAL_AXES[len(variable.shape)])))


@contextmanager
def _intercepted(instead: Callable[[Callable[[Array], Array], Any, Array], Array]) -> Iterator[None]:
    """Let layers of the classes that taps know, and Dropout, do something else inside this context.

    Args:
        instead: (what the layer would do with inputs, the layer, its inputs) -> outputs. It must ask for the layer's
            class, since a subclass may inherit what is replaced here.
    """
    classes = (*_LAYERS, keras.layers.Dropout)
    inherited = {layer_class for layer_class in classes if "call" not in vars(layer_class)}
    before = {layer_class: layer_class.call for layer_class in classes}
    for layer_class, original in before.items():

        def call(layer: Any, inputs: Array, *, original: Any = original, **options: Any) -> Array:
            return instead(lambda x: original(layer, x, **options), layer, inputs)

        layer_class.call = call
    try:
        yield
    finally:
        for layer_class, original in before.items():
            if layer_class in inherited:
                del layer_class.call
            else:
                layer_class.call = original


def _described(layer: Any) -> UserLayer:
    known = _LAYERS[type(layer)]
    return UserLayer(layer.name, known.kind, getattr(layer, known.bias, None) is not None)


def _is_known(layer: Any) -> bool:
    if type(layer) is keras.layers.Conv2D:
        return bool(layer.groups == 1 and layer.data_format == "channels_last")
    if type(layer) is keras.layers.BatchNormalization:
        return bool(layer.scale and layer.center)
    return type(layer) is keras.layers.Dense or (type(layer) in _LAYERS and bool(layer.scale))


def _convolution(run: Pass, described: UserLayer, layer: Any, inputs: Array) -> Array:
    return convolved(
        run,
        described,
        inputs,
        kernel=layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding.upper(),
        rates=layer.dilation_rate,
    )


def _batch_norm(run: Pass, described: UserLayer, layer: Any, inputs: Array) -> Array:
    return run(BatchNorm(described.name, layer.epsilon), inputs)


def _layer_norm(run: Pass, described: UserLayer, layer: Any, inputs: Array) -> Array:
    mean, variance = tf.nn.moments(inputs, [-1], keepdims=True)
    return _scaled(run, described, (inputs - mean) * tf.math.rsqrt(variance + layer.epsilon))


def _scaled(run: Pass, described: UserLayer, normalised: Array) -> Array:
    return run.tapped(described, lambda: normalised, normalised * run.weights[f"{described.name}.weight"])


_LAYERS: dict[type, _Layer] = {
    keras.layers.Dense: _Layer(
        "matrix",
        "kernel",
        "bias",
        lambda run, described, layer, inputs: run(Linear(described.name, layer.units, described.bias), inputs),
    ),
    keras.layers.Conv2D: _Layer("matrix", "kernel", "bias", _convolution),
    keras.layers.BatchNormalization: _Layer(
        "scale",
        "gamma",
        "beta",
        lambda run, described, layer, inputs: run(BatchNorm(described.name, layer.epsilon), inputs),
    ),
    keras.layers.LayerNormalization: _Layer("scale", "gamma", "beta", _layer_norm),
}
