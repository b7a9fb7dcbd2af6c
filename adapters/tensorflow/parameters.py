"""The parameters of a Keras model by names and in layouts that do not depend on Keras.

A parameter's name is the path of its layers below the model, ``encoder.fc1.weight``. What Keras names by itself is
numbered within the model (``dense``, ``dense_1``), so that building a model twice in one process gives the same names.
Dense layers and convolutions have their weights in the layouts that the core and the other frameworks know, so that a
memory of named layers is the same everywhere:

| layer | in Keras | here |
| --- | --- | --- |
| Dense | ``kernel`` [in, out] | ``weight`` [out, in] |
| Conv1D, Conv2D, Conv3D | ``kernel`` [..., in, out] | ``weight`` [out, in, ...] |
| DepthwiseConv1D, DepthwiseConv2D | ``kernel`` [..., in, multiple] | ``weight`` [in x multiple, 1, ...] |
| Embedding; normalisation | ``embeddings``; ``gamma``, ``beta`` | ``weight``; ``weight``, ``bias`` |
| any other | its own | its own |

Convention: parameters are floating-point variables; the running statistics of normalisation are none.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from became_core import BecameError
from became_core.arrays import Array

__all__ = ["Parameter", "layers_of", "parameters_of", "trained_of"]

_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
_NORMS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
)
_STATISTICS = ("moving_mean", "moving_variance")


@dataclass(frozen=True, eq=False)
class Parameter:
    """One variable of a model.

    Attributes:
        name: here.
        variable: Keras's.
        axes: the order that the variable's axes are brought into.
        shape: the shape that this then has.
        owner: the class of its layer, for messages.
    """

    name: str
    variable: Any
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    owner: str

    @property
    def is_turned(self) -> bool:
        """Whether the layout here is another than Keras's."""
        return self.axes != tuple(range(len(self.axes)))

    @property
    def size(self) -> int:
        """How many weights there are."""
        return prod(self.shape)

    def canonical(self, value: Array) -> Array:
        """Return an array of the variable's shape in the layout here."""
        turned = tf.transpose(value, self.axes) if self.is_turned else value
        return tf.reshape(turned, self.shape)

    def canonical_rows(self, values: Array) -> Array:
        """Return arrays [samples, *shape of the variable] in the layout here, [samples, *shape]."""
        turned = tf.transpose(values, (0, *(axis + 1 for axis in self.axes))) if self.is_turned else values
        return tf.reshape(turned, (-1, *self.shape))

    def own(self, value: Array) -> Array:
        """Return an array in the layout here in the variable's shape."""
        own = tuple(self.variable.shape)
        if not self.is_turned:
            return tf.reshape(value, own)
        return tf.transpose(tf.reshape(value, [own[axis] for axis in self.axes]), np.argsort(self.axes))

    @property
    def value(self) -> Array:
        """The variable's value now, in the layout here."""
        return self.canonical(tf.identity(self.variable.value))


def layers_of(layer: keras.Layer) -> list[keras.Layer]:
    """Return a layer and all layers inside it, each once, those inside before those around them."""
    seen: dict[int, keras.Layer] = {}

    def visit(value: Any) -> None:
        if isinstance(value, keras.Layer):
            if id(value) not in entered:
                entered.add(id(value))
                for part in list(vars(value).values()):
                    visit(part)
                seen[id(value)] = value
        elif isinstance(value, list | tuple | set | frozenset):
            for part in value:
                visit(part)
        elif isinstance(value, dict):
            for part in value.values():
                visit(part)

    entered: set[int] = set()
    visit(layer)
    return list(seen.values())


def parameters_of(model: keras.Model) -> dict[str, Parameter]:
    """Return the parameters of a model by name, in the model's order, those that are frozen as well.

    Raises:
        BecameError: if the model is not built yet, so that it has no variables.
    """
    # A model that is not built may have the states of its random layers.
    if not (model.built and model.variables) and not any(variable.trainable for variable in model.variables):
        raise BecameError(
            f"the model '{model.name}' has no variables yet; call it on a batch, or give it a keras.Input, before "
            "it is handed over."
        )
    layers = layers_of(model)
    owners: dict[int, keras.Layer] = {}
    for layer in layers:
        for variable in layer.variables:
            owners.setdefault(id(variable), layer)
    new_names = _numbered_within(layers)
    parameters: dict[str, Parameter] = {}
    for variable in model.variables:
        owner = owners[id(variable)]
        if not _is_parameter(variable, owner):
            continue
        *path, last = variable.path.split("/")
        path = path[1:] if path[:1] == [model.name] else path
        known, axes, shape = _layout(variable, owner)
        name = ".".join([*(new_names.get(part, part) for part in path), known or last])
        while name in parameters:  # two layers of one name
            name += "_"
        parameters[name] = Parameter(name, variable, axes, shape, type(owner).__name__)
    return parameters


def _is_parameter(variable: Any, owner: keras.Layer) -> bool:
    if isinstance(owner, keras.layers.Normalization):  # it is adapted to data, and never trained
        return False
    if not tf.as_dtype(variable.dtype).is_floating or any(getattr(owner, s, None) is variable for s in _STATISTICS):
        return False
    # What its layer trains, or would train if the user had not frozen it; and no statistics of other layers.
    return bool(variable.trainable) or not owner.trainable


def _layout(variable: Any, owner: keras.Layer) -> tuple[str | None, tuple[int, ...], tuple[int, ...]]:
    """Return a variable's last name if it has another one here, the order of its axes and its shape here."""
    own = tuple(variable.shape)
    straight = tuple(range(len(own)))

    def is_its(attribute: str) -> bool:
        return getattr(owner, attribute, None) is variable

    if isinstance(owner, keras.layers.Dense) and is_its("kernel"):
        return "weight", (1, 0), (own[1], own[0])
    if isinstance(owner, _CONVOLUTIONS) and is_its("kernel"):
        axes = (len(own) - 1, len(own) - 2, *straight[:-2])
        return "weight", axes, tuple(own[axis] for axis in axes)
    if isinstance(owner, _DEPTHWISE) and is_its("kernel"):
        return "weight", (len(own) - 2, len(own) - 1, *straight[:-2]), (own[-2] * own[-1], 1, *own[:-2])
    if (isinstance(owner, keras.layers.Embedding) and is_its("embeddings")) or (
        isinstance(owner, _NORMS) and (is_its("gamma") or is_its("scale"))
    ):
        return "weight", straight, own
    return ("bias" if isinstance(owner, _NORMS) and is_its("beta") else None), straight, own


def _numbered_within(layers: list[keras.Layer]) -> dict[str, str]:
    """Return new names for those that Keras has made of a class and a number, numbered within the model.

    The order of the numbers stays, so that in a process that builds one model alone nothing changes.
    """
    numbers: dict[str, set[int]] = {}
    for base, number in filter(None, (_own_number(layer) for layer in layers)):
        numbers.setdefault(base, set()).add(number)
    return {
        _with_number(base, number): _with_number(base, place)
        for base, own in numbers.items()
        for place, number in enumerate(sorted(own))
    }


def _own_number(layer: keras.Layer) -> tuple[str, int] | None:
    match = re.fullmatch(r"(.+?)(?:_(\d+))?", layer.name)
    if match is None:
        return None
    # The two layers of a Bidirectional have its layer's name behind the direction.
    own = re.sub("^(forward|backward)_", "", match[1])
    if type(layer).__name__.lower() not in (match[1].replace("_", ""), own.replace("_", "")):
        return None
    return match[1], int(match[2] or 0)


def _with_number(base: str, number: int) -> str:
    return f"{base}_{number}" if number else base


def trained_of(model: keras.Model, parameters: dict[str, Parameter]) -> Iterator[Parameter]:
    """Yield those parameters that training changes now."""
    trained = {id(variable) for variable in model.trainable_variables}
    yield from (parameter for parameter in parameters.values() if id(parameter.variable) in trained)
