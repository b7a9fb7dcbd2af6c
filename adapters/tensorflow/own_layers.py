"""Layers of a user's Keras model that run as they are in a learner: their parameters and their taps.

The taps are read off the graph of the model's own forward pass, and the backward pass begins with the gradients of each
sample's loss by the features.

Convention: parameters have the names and layouts of ``adapters/tensorflow/parameters.py``; images are [N, H, W, C] and
features [N, features].
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from adapters.networks import Parameter as Shaped
from adapters.tensorflow.parameters import Parameter, parameters_of
from adapters.tensorflow.tapping import Tapping
from became_core import BecameError
from became_core.arrays import Array, Params
from became_core.curvature import Tap, Taps

__all__ = ["OwnLayers", "own_parameters_of", "owner_of"]

# (values of own parameters as their variables have them, all other weights by name, dropout masks, images) -> features.
Features = Callable[[Sequence[Array], Params, Any, Array], Array]


class OwnLayers:
    """Collects the taps of those layers of a model that run as they are.

    Attributes:
        parameters: theirs, by name; also called ``trained``, as those of a ``TappedNetwork``.
    """

    def __init__(self, features: Features, own: Mapping[str, Parameter], parameters: Mapping[str, Shaped]) -> None:
        """Keep what runs the model.

        Args:
            features: of images.
            own: the parameters of the layers that run as they are, by name.
            parameters: all of the model.
        """
        self.parameters = self.trained = own
        self._features, self._others = features, [name for name in parameters if name not in own]
        self._tapping = Tapping(self)
        self._matrices: frozenset[str] | None = None

    def in_order(self, theta: Params) -> list[Array]:
        """Return their weights in the shapes of their variables, and then all others."""
        own = [parameter.own(theta[name]) for name, parameter in self.parameters.items()]
        return own + [theta[name] for name in self._others]

    def run(self, weights: Sequence[Array], inputs: Any, masks: Any = None) -> Array:
        """Return the features of images; without dropout masks in evaluation mode."""
        own, others = weights[: len(self.parameters)], weights[len(self.parameters) :]
        return self._features(own, dict(zip(self._others, others, strict=True)), masks, inputs)

    def matrices(self, theta: Params, images: Array) -> frozenset[str]:
        """Return the parameters that a projector can protect: matrices alone, stored as [d_out, d_in].

        Args:
            theta: weights, by name; those of the first call decide.
            images: a few.
        """
        if self._matrices is None:
            features = self.run(self.in_order(theta), images)
            self._no_gradient = tf.zeros_like(features[:1])
            ways = self._tapping.ways(theta, images, tf.zeros_like(features))
            self._matrices = frozenset(name for name, transposed in ways.items() if transposed is False)
        return self._matrices

    def taps(self, theta: Params, images: Array, seed: Array, joined: Mapping[str, Sequence[Array]]) -> Taps:
        """Return their taps, which share inputs with those of other seeds of the batch.

        Args:
            theta: weights, by name.
            images: of a batch.
            seed: the gradient of each sample's loss by its features, [N, features].
            joined: what ``inputs_of_uses`` returned of another seed's taps; empty for the first of them.
        """
        return self._tapping.taps(theta, images, seed, joined=joined)

    def inputs(self, theta: Params, images: Array) -> Taps:
        """Return the taps of the inputs of their matrices alone."""
        names = self.matrices(theta, images)
        if not names:
            return {}
        seed = tf.repeat(self._no_gradient, images.shape[0], axis=0)  # what layers read does not depend on it
        taps = self._tapping.taps(theta, images, seed, by_sample=False)
        return {
            name: Tap("matrix", tap.inputs, tap.inputs[:, :, :0], own_name=True)
            for name, tap in taps.items()
            if name in names
        }

    def of_the_batch(self, theta: Params, images: Array, masks: Any, seed: Array) -> Taps:
        """Return the batch's gradients as taps of one sample, for passes in training mode with these masks."""
        weights = self.in_order(theta)
        own = weights[: len(self.parameters)]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(own)
            features = self.run([*own, *weights[len(own) :]], images, masks)
        gradients = tape.gradient(features, own, seed, unconnected_gradients="zero")
        taps = {}
        for (name, parameter), gradient in zip(self.parameters.items(), gradients, strict=True):
            flat = tf.reshape(parameter.canonical(tf.convert_to_tensor(gradient)), (1, 1, -1))
            taps[name] = Tap("gradient", flat, tf.ones_like(flat[..., :1]), own_name=True)
        return taps


def own_parameters_of(model: keras.Model, taken_over: Mapping[str, Any]) -> dict[str, Parameter]:
    """Return the trained parameters of a model's layers that run as they are, by names of their own.

    Args:
        model: the user's, built.
        taken_over: the variables of all other layers that are trained, by name.

    Raises:
        BecameError: if one has a constraint, belongs to a batch norm, or is computed with in half precision.
    """
    # By identity, since two layers of one name, in two parts of a model, have variables of one path.
    trained = {id(variable) for variable in model.trainable_variables} - {id(value) for value in taken_over.values()}
    own: dict[str, Parameter] = {}
    for parameter in parameters_of(model).values() if trained else ():
        if id(parameter.variable) not in trained:
            continue
        layer = owner_of(model, parameter.variable)
        if parameter.variable.constraint is not None:
            raise BecameError(
                f"the variable '{parameter.variable.path}' of the layer '{layer.name}' has a constraint, which steps "
                "of a method would not keep; leave it out."
            )
        if isinstance(layer, keras.layers.BatchNormalization):
            raise BecameError(
                f"the call of the batch norm '{layer.name}' is replaced, or a part of it is frozen, so that its "
                "statistics cannot be estimated; freeze all of it, or nothing."
            )
        if layer.compute_dtype not in ("float32", "float64"):
            raise BecameError(
                f"the layer '{layer.name}' computes in {layer.compute_dtype}, too coarse for what is measured; leave "
                "its dtype out, and let the learner train in mixed precision."
            )
        name = parameter.name
        while name in taken_over or name in own:
            name += "_"
        own[name] = parameter
    return own


def owner_of(model: Any, variable: Any) -> Any:
    """Return the innermost layer that has a variable."""
    for layer in getattr(model, "layers", ()):
        if any(own is variable for own in layer.variables):
            return owner_of(layer, variable)
    return model
