"""A user's own Keras model as a backbone, images to features, called with nothing but the images.

While it runs, its Dense, Conv2D, normalisation and Dropout layers are taken over: they compute as described layers do,
with weights by canonical name, and so can be tapped; everything between them is the model's, and so are layers that the
user has frozen (``trainable = False``), which are never changed. A layer that is taken over computes what Keras's own
does, for the options in ``_LAYERS``.

Any other layer that is trained runs as it is, with given weights in the place of its variables, and its taps are read
off the graph of the forward pass (``adapters/tensorflow/own_layers.py``): a layer of another class or with other
options, one whose ``call`` is replaced, and one that runs twice. What cannot be right in a run is refused by the
layer's name: random draws other than Dropout's, constraints, losses of a layer's own, and variables that training
changes.

Convention: a layer's name is its own, ``conv1.weight``; canonical weights are [out, in] and OIHW, where Keras has
[in, out] and HWIO. Parameters of layers that run as they are have the names of ``adapters/tensorflow/parameters.py``.
Images are [N, H, W, C]. A batch norm's ``moving_mean`` is its ``running_mean``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any, Literal, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from adapters.backend.checking import agreement
from adapters.backend.own_loop import Finding
from adapters.networks import CANONICAL_AXES, BatchNorm, Dropout, Linear, Mask, Parameter, UserLayer
from adapters.tensorflow import parameters as own_parameters
from adapters.tensorflow.layers import Pass, convolved
from adapters.tensorflow.own_layers import OwnLayers, own_parameters_of, owner_of
from adapters.tensorflow.traced import compiled_methods, uncompiled
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
        default: such a layer as Keras makes it.
        options: the options that ``run`` follows: all others must be as in the default.
    """

    kind: Literal["matrix", "scale"]
    weight: str
    bias: str
    run: Callable[[Pass, UserLayer, Any, Array], Array]
    default: Callable[[], Any]
    options: frozenset[str]


@dataclass(frozen=True, eq=False)
class KerasBackbone:
    """A model and what is known of its layers.

    Attributes:
        model: built, from images [N, H, W, C] to features [N, features].
        layers: those that are taken over, in the order in which they run, and what a tap tells of them.
        parameters: by canonical name.
        masks: what its dropout layers need.
        variables: the model's own, by canonical name.
        own: the parameters of layers that run as they are, by canonical name.
        scaling: the names of layers that scale the images themselves.
        agreement: how far its features are from those of the model as the user runs it.
    """

    model: keras.Model
    layers: Mapping[Any, UserLayer]
    parameters: Mapping[str, Parameter]
    masks: tuple[Mask, ...]
    variables: Mapping[str, Any]
    own: Mapping[str, own_parameters.Parameter] = field(default_factory=dict)
    scaling: tuple[str, ...] = ()
    agreement: tuple[Finding, ...] = ()

    @classmethod
    def of(cls, model: keras.Model, image: tuple[int, int, int]) -> "KerasBackbone":
        """Look at a model while it sees two random images.

        Args:
            model: any that is called with images alone; learners begin with the weights that it has.
            image: the shape of an image, [C, H, W].

        Raises:
            BecameError: if two layers have one name, or a layer draws random numbers, has a constraint, adds a loss,
                changes a variable in training, or is a batch norm with an option that taps do not follow.
        """
        channels, height, width = image
        images = tf.random.stateless_normal((2, height, width, channels), (0, 0))
        masks: list[Mask] = []
        scaling: list[str] = []
        layers: dict[Any, UserLayer] = {}
        as_they_are: set[Any] = set()
        problems: list[BecameError] = []  # what is raised inside a call Keras wraps into its own report

        def look(call: Callable[[Array], Array], layer: Any, inputs: Array, has_mask: bool) -> Array:
            if type(layer) is keras.layers.Dropout:
                problems.extend(_options_without_effect(layer, _DROPOUT, len(inputs.shape)))
                threshold = Dropout(layer.rate).threshold
                masks.extend([(tuple(inputs.shape[1:]), threshold)] if threshold else [])
                return inputs
            if type(layer) in _SCALING:
                scaling.append(layer.name)
            is_norm = type(layer) is keras.layers.BatchNormalization
            if _is_known(layer):
                unfit = list(_options_without_effect(layer, _LAYERS[type(layer)], len(inputs.shape)))
                if has_mask:
                    unfit.append(
                        BecameError(
                            f"taps do not follow the mask that the layer '{layer.name}' is given; leave it out."
                        )
                    )
                if layer in layers:
                    unfit.append(
                        BecameError(f"the layer '{layer.name}' runs twice in one pass; give each run its own.")
                    )
                layers[layer] = _described(layer)
                problems.extend(unfit if is_norm else [])  # the core estimates its statistics
                as_they_are.update([layer] if unfit else [])
            # A batch norm would change its statistics; what it does to its inputs does not matter here.
            return inputs if is_norm else call(inputs)

        model(images, training=False)  # builds it
        before = [(variable, variable.numpy()) for variable in model.variables]
        with _intercepted(model, look):
            model(images, training=True)
        if problems:
            raise problems[0]
        _check_side_effects(model, before)
        layers = {layer: described for layer, described in layers.items() if layer not in as_they_are}
        parameters, variables = _parameters(layers)
        others = own_parameters_of(model, variables)
        parameters |= {name: Parameter(parameter.shape, None) for name, parameter in others.items()}
        variables |= {name: parameter.variable for name, parameter in others.items()}
        names = tuple(dict.fromkeys(scaling))
        backbone = cls(model, layers, parameters, tuple(masks), variables, others, names)
        return replace(backbone, agreement=tuple(backbone._compared(images)))

    def _compared(self, images: Array) -> Iterator[Finding]:
        """Yield how far our features of images are from the model's own, in evaluation and in training.

        In both, dropout keeps everything.

        Raises:
            BecameError: if they differ.
        """

        def keep_all(call: Callable[[Array], Array], layer: Any, inputs: Array, has_mask: bool) -> Array:  # noqa: ARG001 - a signature
            return inputs * Dropout(layer.rate).scale if type(layer) is keras.layers.Dropout else call(inputs)

        before = [(variable, variable.numpy()) for variable in self.model.variables]
        kept = tuple(tf.ones((len(images), *shape), tf.bool) for shape, _ in self.masks)
        for training, masks in ((False, None), (True, kept)):
            with _intercepted(self.model, keep_all) if training else nullcontext():
                own = self.model(images, training=training)
            for variable, value in before:  # a batch norm's statistics have moved
                variable.assign(value)
            ours = self(Pass(self.weights(), masks), images)
            finding = agreement(ours, own, "training" if training else "evaluation")
            if not finding.difference <= TOLERANCE:
                raise BecameError(
                    f"with the layers that taps know the model '{self.model.name}' gives other features, by "
                    f"{finding.difference:.3g} of the largest; one of its layers changes another's weights or inputs, "
                    "which taps cannot follow."
                )
            yield finding

    @property
    def tapped(self) -> tuple[UserLayer, ...]:
        """The layers that are taken over, in the order in which they run."""
        return tuple(self.layers.values())

    @cached_property
    def own_layers(self) -> OwnLayers | None:
        """What collects the taps of layers that run as they are; None if there is none."""

        def features(own: Sequence[Array], others: Params, masks: Any, images: Array) -> Array:
            return self.features(Pass(others, masks, constant_statistics=masks is None), own, images)

        return OwnLayers(features, self.own, self.parameters) if self.own else None

    @property
    def initial(self) -> Params:
        """The weights that a learner begins with, which are the model's."""
        return self.weights()

    def __call__(self, run: Pass, images: Array) -> Array:
        """Return the features [N, features] of images [N, H, W, C]."""
        values = [parameter.own(run.weights[name]) for name, parameter in self.own.items()]
        return self.features(run, values, images)

    def features(self, run: Pass, own: Sequence[Array], images: Array) -> Array:
        """Return the features of images, with values of ``own`` in the shapes of their variables."""

        def take_over(call: Callable[[Array], Array], layer: Any, inputs: Array, has_mask: bool) -> Array:  # noqa: ARG001 - a signature
            if type(layer) is keras.layers.Dropout:
                return run(Dropout(layer.rate), inputs)
            if layer not in self.layers:
                return call(inputs)
            output = _LAYERS[type(layer)].run(run, self.layers[layer], layer, inputs)
            activation = getattr(layer, "activation", None)
            return output if activation is None else activation(output)

        given = [(parameter.variable, value) for parameter, value in zip(self.own.values(), own, strict=True)]
        with _intercepted(self.model, take_over), keras.StatelessScope(state_mapping=given) if given else nullcontext():
            return self.model(images, training=run.masks is not None)

    def weights(self) -> Params:
        """Return the model's weights by canonical name, in canonical layouts."""
        return {
            name: self.own[name].value
            if name in self.own
            else tf.transpose(variable.value, CANONICAL_AXES[len(variable.shape)])
            for name, variable in self.variables.items()
        }

    def assign(self, weights: Params) -> None:
        """Give the model weights by canonical name; those of other layers, such as heads, are left out."""
        for name, variable in self.variables.items():
            if name in self.own:
                variable.assign(self.own[name].own(weights[name]))
            else:
                variable.assign(tf.transpose(weights[name], np.argsort(CANONICAL_AXES[len(variable.shape)])))


def _parameters(layers: Mapping[Any, UserLayer]) -> tuple[dict[str, Parameter], dict[str, Any]]:
    """Return the parameters and the variables of layers, by canonical name."""
    variables: dict[str, Any] = {}
    parameters: dict[str, Parameter] = {}
    names = [described.name for described in layers.values()]
    for layer, described in layers.items():
        if names.count(described.name) > 1:
            raise BecameError(f"two layers are called '{described.name}'; give each a name of its own.")
        known = _LAYERS[type(layer)]
        weights = {f"{described.name}.weight": getattr(layer, known.weight)}
        weights |= {f"{described.name}.bias": getattr(layer, known.bias)} if described.bias else {}
        if type(layer) is keras.layers.BatchNormalization:
            weights[f"{described.name}.running_mean"] = layer.moving_mean
            weights[f"{described.name}.running_var"] = layer.moving_variance
        fan_in = None if described.kind == "scale" else prod(layer.kernel.shape[:-1])
        for name, variable in weights.items():
            shape = tuple(variable.shape[axis] for axis in CANONICAL_AXES[len(variable.shape)])
            parameters[name] = Parameter(shape, fan_in)
        variables |= weights
    return parameters, variables


def _options_without_effect(layer: Any, known: Any, rank: int) -> Iterator[BecameError]:
    """Yield an error for each option of a layer, whose inputs have so many axes, that is not followed."""
    default = known.default().get_config()
    for option, value in layer.get_config().items():
        if option == "axis":
            followed = value in (-1, rank - 1, [-1], [rank - 1], (-1,), (rank - 1,))
        elif option == "dtype":  # as a policy; that of the learner is its own
            followed = layer.compute_dtype in ("float32", "float64")
        else:
            followed = option in known.options | _WITHOUT_EFFECT or option.endswith("_initializer")
        if not (followed or value == default.get(option)):
            yield BecameError(
                f"taps do not follow the option {option}={value!r} of the layer '{layer.name}', a "
                f"{type(layer).__name__}; leave it out, or freeze the layer."
            )


def _check_side_effects(model: Any, before: Sequence[tuple[Any, Any]]) -> None:
    """Raise an error if training does more to a model than to run it: random draws, losses, variables that change.

    Args:
        model: after a pass in training mode.
        before: its variables, and their values before that pass, which changed ones get back.
    """
    changed = [variable for variable, value in before if not np.array_equal(variable.numpy(), value)]
    for variable, value in before:
        variable.assign(value)
    for variable in changed:
        layer = owner_of(model, variable)
        if "seed_generator" in variable.path:
            raise BecameError(
                f"the layer '{layer.name}' draws random numbers in training, which a run could not repeat; take "
                "Dropout or the augmentation of Training in its place."
            )
        raise BecameError(
            f"the layer '{layer.name}' changes its variable '{variable.path}' in training, and not by gradients, "
            "which a run could not go on from; leave it out, or freeze it."
        )
    if model.losses:
        raise BecameError(
            f"the model '{model.name}' adds a loss of its own, by a regulariser, which is not the one that is trained; "
            "leave it out, and give the optimiser a weight decay."
        )


@contextmanager
def _intercepted(
    model: keras.Model, instead: Callable[[Callable[[Array], Array], Any, Array, bool], Array]
) -> Iterator[None]:
    """Let layers of the classes that taps know, and Dropout, do something else inside this context.

    Args:
        model: what the user has compiled of it by ``tf.function`` runs as it is written.
        instead: (what the layer would do with inputs, the layer, its inputs, whether it is given a mask) -> outputs. It
            must ask for the layer's class, since a subclass may inherit what is replaced here.
    """
    classes = (*_LAYERS, *_SCALING, keras.layers.Dropout)
    inherited = {layer_class for layer_class in classes if "call" not in vars(layer_class)}
    before = {layer_class: layer_class.call for layer_class in classes}
    for layer_class, original in before.items():

        def call(layer: Any, inputs: Array, *, original: Any = original, **options: Any) -> Array:
            has_mask = options.get("mask") is not None
            return instead(lambda x: original(layer, x, **options), layer, inputs, has_mask)

        layer_class.call = call
    try:
        with uncompiled(compiled_methods(model)):
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
    """Whether a layer is one that taps know, and trained as a whole; any other runs by itself."""
    if type(layer) not in _LAYERS or "call" in vars(layer) or not layer.trainable:
        return False
    known = _LAYERS[type(layer)]
    own = [getattr(layer, name, None) for name in (known.weight, known.bias)]
    return all(variable.trainable for variable in own if variable is not None)


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


def _layer_norm(run: Pass, described: UserLayer, layer: Any, inputs: Array) -> Array:
    mean, variance = tf.nn.moments(inputs, [-1], keepdims=True)
    return _scaled(run, described, (inputs - mean) * tf.math.rsqrt(variance + layer.epsilon))


def _scaled(run: Pass, described: UserLayer, normalised: Array) -> Array:
    return run.tapped(described, lambda: normalised, normalised * run.weights[f"{described.name}.weight"])


class _Options(NamedTuple):
    """The options of a class of layers without weights; attributes as of ``_Layer``."""

    default: Callable[[], Any]
    options: frozenset[str]


# What is in a layer's configuration and changes nothing that is computed from its weights, or is the learner's.
_WITHOUT_EFFECT = frozenset({"name", "trainable", "momentum", "synchronized", "seed"})
_SCALING = (keras.layers.Rescaling, keras.layers.Normalization)
_DROPOUT = _Options(lambda: keras.layers.Dropout(0.5), frozenset({"rate"}))
# Features may differ by rounding, as a share of the greatest.
TOLERANCE = 1e-3

_LAYERS: dict[type, _Layer] = {
    keras.layers.Dense: _Layer(
        "matrix",
        "kernel",
        "bias",
        lambda run, described, layer, inputs: run(Linear(described.name, layer.units, described.bias), inputs),
        lambda: keras.layers.Dense(1),
        frozenset({"units", "activation", "use_bias"}),
    ),
    keras.layers.Conv2D: _Layer(
        "matrix",
        "kernel",
        "bias",
        _convolution,
        lambda: keras.layers.Conv2D(1, 1, data_format="channels_last"),
        frozenset({"filters", "kernel_size", "strides", "padding", "dilation_rate", "activation", "use_bias"}),
    ),
    keras.layers.BatchNormalization: _Layer(
        "scale",
        "gamma",
        "beta",
        lambda run, described, layer, inputs: run(BatchNorm(described.name, layer.epsilon, running=True), inputs),
        keras.layers.BatchNormalization,
        frozenset({"epsilon"}),
    ),
    keras.layers.LayerNormalization: _Layer(
        "scale",
        "gamma",
        "beta",
        _layer_norm,
        keras.layers.LayerNormalization,
        frozenset({"epsilon", "center"}),
    ),
}
