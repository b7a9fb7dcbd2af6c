"""A Keras model as a function of its trained weights and of a batch's inputs, traced once for batches of each kind.

The model runs as it is, in evaluation mode, with weights that are given in the place of its own
(``keras.StatelessScope``), so that nothing of it changes. A function is traced for each shape of a sample, and serves
batches of any size. What cannot be traced, because the model computes with values that a graph does not have, runs
eagerly, which is slower. What the user has compiled by ``tf.function`` runs as it is written: a function that was
compiled before would read the model's own weights.

Convention: outputs are [samples, ...] and logits; a model that ends in a softmax or a sigmoid is taken back to logits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import keras
import tensorflow as tf

from adapters.tensorflow.batches import Reader
from adapters.tensorflow.parameters import Parameter, layers_of, parameters_of, trained_of
from became_core import BecameError
from became_core.arrays import Array, Params, namespace

__all__ = [
    "KerasFunction",
    "Traced",
    "as_written",
    "compiled_function",
    "compiled_methods",
    "kind_of",
    "samples_of",
    "uncompiled",
]

# Probabilities in half precision add up to 1 up to this.
_NEARLY = 1e-2
# Operations that multiply with weights.
_OF_WEIGHTS = ("MatMul", "BatchMatMulV2", "Conv2D", "Conv3D", "Einsum")


def compiled_function(function: Callable[..., Any], **options: Any) -> Any:
    """Return a function that is compiled as Keras compiles its own training: autograph rewrites nothing.

    TensorFlow warns of a function that is traced often, and takes all functions with the same code for one, such as a
    method of several models. The traces of a ``partial`` are counted apart, so that several models bring no warning.

    Args:
        function: what is compiled, by the first call.
        options: those of ``tf.function``.
    """
    return tf.function(partial(function), autograph=False, **options)


class Traced:
    """A function of tensors and of a batch, traced once for batches of each kind, and for any number of samples.

    Attributes:
        is_eager: whether it could not be traced and runs as it is.
    """

    def __init__(self, function: Callable[[list[Any], Any], Any], *, needs_graph: bool = False) -> None:
        """Keep the function.

        Args:
            function: of tensors whose shapes stay, and a tree of tensors that have samples first.
            needs_graph: whether an error in tracing is raised, as the function is of no use without a graph.
        """
        self.is_eager = False
        self._function, self._needs_graph = function, needs_graph
        self._of_kind: dict[Any, Any] = {}

    def __call__(self, tensors: list[Any], batch: Any) -> Any:
        """Return what the function does."""
        if self.is_eager:
            return self._function(tensors, batch)
        kind = kind_of(batch)
        if kind not in self._of_kind:
            signature = [tf.nest.map_structure(_whole, tensors), tf.nest.map_structure(_any_number, batch)]
            self._of_kind[kind] = compiled_function(self._function, input_signature=signature)
        try:
            return self._of_kind[kind](tensors, batch)
        except BecameError:
            raise
        except Exception:
            if self._needs_graph:
                raise
            self.is_eager = True
            return self._function(tensors, batch)


def kind_of(batch: Any) -> Any:
    """Return what two batches have in common that one trace serves: structure, shapes of samples, dtypes."""
    return str(tf.nest.map_structure(_any_number, batch))


def _whole(tensor: Any) -> tf.TensorSpec:
    return tf.TensorSpec(tensor.shape, tensor.dtype)


def _any_number(tensor: Any) -> tf.TensorSpec:
    return tf.TensorSpec([None, *tensor.shape[1:]] if tensor.shape.rank else [], tensor.dtype)


def samples_of(tree: Any, rows: slice) -> Any:
    """Return some of the samples of a tree of tensors."""
    return tf.nest.map_structure(lambda tensor: tensor[rows] if tensor.shape.rank else tensor, tree)


Method = tuple[keras.Layer, str, Any]


def as_written(function: Any) -> Any:
    """Return what ``tf.function`` was given, or a function that is not compiled as it is."""
    return function.python_function if isinstance(function, tf.types.experimental.PolymorphicFunction) else function


def compiled_methods(model: keras.Model) -> list[Method]:
    """Return the methods of a model's layers that the user has compiled: layer, name, and the method as written."""
    methods: list[Method] = []
    for layer in layers_of(model):
        # By hand: a forward pass asks, and ``inspect.getattr_static`` takes a tenth of a millisecond for each name.
        attributes: dict[str, Any] = {}
        for owner in reversed(type(layer).__mro__):
            attributes |= vars(owner)
        attributes |= vars(layer)
        for name, compiled in attributes.items():
            if isinstance(compiled, tf.types.experimental.PolymorphicFunction):
                own = as_written(compiled)
                methods.append((layer, name, own if name in vars(layer) else MethodType(own, layer)))
    return methods


@contextmanager
def uncompiled(methods: Sequence[Method]) -> Iterator[None]:
    """Let layers run these methods in this context, and those that they had after it."""
    before = [vars(layer).get(name) for layer, name, _ in methods]
    for layer, name, own in methods:
        vars(layer)[name] = own
    try:
        yield
    finally:
        for (layer, name, _), compiled in zip(methods, before, strict=True):
            if compiled is None:
                del vars(layer)[name]
            else:
                vars(layer)[name] = compiled


class KerasFunction:
    """A model's logits as a function of its trained parameters.

    Attributes:
        model: the user's.
        parameters: all of the model, by name.
        link: what the model's last operation makes of logits, "softmax", "sigmoid" or None.
    """

    def __init__(self, model: keras.Model, reader: Reader) -> None:
        """Keep the model, which must be built.

        Raises:
            BecameError: if it is not, or its batches have one size.
        """
        for given in getattr(model, "inputs", None) or ():
            if given.shape[0] is not None:
                raise BecameError(
                    f"the model takes batches of {given.shape[0]} samples alone, and single samples are measured; make "
                    "its Input without batch_size, or its batch_shape with None."
                )
        self.model, self._reader = model, reader
        self.link: str | None = None
        self.retrace()

    @property
    def trained(self) -> dict[str, Parameter]:
        """The parameters that training changes."""
        return {parameter.name: parameter for parameter in trained_of(self.model, self.parameters)}

    def weights(self) -> Params:
        """Return the trained parameters' values now, by name."""
        return {name: parameter.value for name, parameter in self.trained.items()}

    def assign(self, theta: Params) -> None:
        """Set the trained parameters."""
        for name, parameter in self.trained.items():
            parameter.variable.assign(parameter.own(theta[name]))

    def in_order(self, theta: Params) -> list[Array]:
        """Return values of the trained parameters in the shapes of their variables, zeros where there is none."""
        return [
            parameter.own(theta[name])
            if name in theta
            else tf.zeros(parameter.variable.shape, parameter.variable.dtype)
            for name, parameter in self.trained.items()
        ]

    def run(self, weights: Sequence[Array], inputs: Any) -> Array:
        """Return logits; inside a trace or eagerly.

        Args:
            weights: of the trained parameters, in the shapes of their variables.
            inputs: of a batch.
        """
        variables = [parameter.variable for parameter in self.trained.values()]
        given = keras.StatelessScope(state_mapping=list(zip(variables, weights, strict=True)))
        with given, uncompiled(self._compiled):
            outputs = self._reader.outputs(self.model, inputs)
        return _logits(outputs, self.link)

    def outputs(self, theta: Params, inputs: Any) -> Array:
        """Return the logits at these weights."""
        return self._outputs(self.in_order(theta), inputs)

    def gradient(self, theta: Params, inputs: Any, seed: Array) -> Params:
        """Return the gradient of seed . logits by the trained parameters."""
        gradients = self._gradient(self.in_order(theta), (inputs, seed))
        return {n: p.canonical(gradient) for (n, p), gradient in zip(self.trained.items(), gradients, strict=True)}

    def _run_gradient(self, weights: list[Array], batch: tuple[Any, Array]) -> list[Array]:
        inputs, seed = batch
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            outputs = self.run(weights, inputs)
        gradients: list[Array] = tape.gradient(outputs, weights, seed, unconnected_gradients="zero")
        return [tf.convert_to_tensor(gradient) for gradient in gradients]  # those of embeddings are sparse

    def find_link(self, theta: Params, inputs: Any, wanted: str) -> None:
        """Find out whether the model ends in the link function of its likelihood, and what the logits are.

        Args:
            theta: weights.
            inputs: of some samples.
            wanted: "softmax" or "sigmoid".

        Raises:
            BecameError: if that cannot be found out.
        """
        self.link, last = None, list[str]()

        def look(weights: list[Array], inputs: Any) -> Array:
            outputs = self.run(weights, inputs)
            if not tf.executing_eagerly():
                last[:] = _last_operations(outputs)
            return outputs

        outputs = Traced(look)(self.in_order(theta), inputs)
        self.link = wanted if last[:1] == [wanted.title()] else None
        if self.link is None and bool(tf.reduce_all((outputs >= 0) & (outputs <= 1))):
            if not last:
                raise BecameError(
                    "the model cannot be traced, and its outputs lie between 0 and 1, so they may be probabilities or "
                    "logits; let it return logits, or give a loss of your own."
                )
            # Zeros, of a head that begins with them, are logits.
            total = tf.reduce_sum(outputs, axis=-1)
            adds_up = wanted == "softmax" and bool(tf.reduce_all(tf.abs(total - 1) < _NEARLY))
            if adds_up or {"Softmax", "Sigmoid"} & set(last):
                raise BecameError(
                    f"the model's outputs are probabilities, and a {wanted} is not its last operation, so that its "
                    "logits cannot be had from them; let it return logits, or give a loss of your own."
                )
        self.retrace()

    def retrace(self) -> None:
        """Trace the model anew from here on: its layers, or a value of Python's that it reads, may have changed."""
        self.parameters = parameters_of(self.model)
        self._compiled = compiled_methods(self.model)
        self._outputs, self._gradient = Traced(self.run), Traced(self._run_gradient)

    def changed_in_training(self, inputs: Any) -> list[str]:
        """Return the trained parameters that the model itself assigns to when it runs in training mode."""
        with keras.StatelessScope() as scope, uncompiled(self._compiled):
            self.model(inputs, training=True)
        return [name for name, own in self.trained.items() if scope.get_current_value(own.variable) is not None]


def _last_operations(outputs: Array) -> list[str]:
    """Return the kind of the last operation, then those of all before it up to where weights are used."""
    operation = outputs.op
    while operation.type in ("Identity", "Cast", "Reshape"):
        operation = operation.inputs[0].op
    kinds, seen, left = [], {operation.name}, [operation]
    while left:
        operation = left.pop(0)
        kinds.append(str(operation.type))
        if operation.type not in _OF_WEIGHTS:
            new = [tensor.op for tensor in operation.inputs if tensor.op.name not in seen]
            seen.update(earlier.name for earlier in new)
            left += new
    return kinds


def _logits(outputs: Array, link: str | None) -> Array:
    """Return outputs of which the link makes the same probabilities again: their logarithms, or log odds."""
    if link is None:
        return outputs
    # Away from 0 and 1 by so little that no probability that the dtype tells from them is moved.
    limits = namespace(outputs=outputs).finfo(outputs.dtype)
    log = tf.math.log(tf.maximum(outputs, 10 * limits.smallest_normal))
    return log if link == "softmax" else log - tf.math.log(tf.maximum(1 - outputs, limits.eps / 2))
