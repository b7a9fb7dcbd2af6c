"""A user's own flax module as a backbone, images to features, called with nothing but the images.

While it runs, its Dense, Conv, normalisation and Dropout layers are taken over: they compute as described layers do,
with weights by canonical name, and so can be tapped; everything between them is the module's. A layer that is taken
over computes what flax's does, for the options in ``_LAYERS``; one with any other option is refused by its name, and so
is a module whose features differ.

Convention: names are paths joined by dots, ``block_0.Dense_0.weight``; canonical weights are [out, in] and OIHW, where
flax has [in, out] and HWIO. Images are [N, H, W, C]. A batch norm's ``mean`` in ``batch_stats`` is its
``running_mean``; whatever ``use_running_average`` says, it takes the batch's own in training and those in evaluation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import filterfalse
from math import prod
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax.errors import FlaxError
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax import numpy as jnp

from adapters.backend.checking import agreement
from adapters.backend.own_loop import Finding
from adapters.jax.layers import Pass, convolved
from adapters.networks import CANONICAL_AXES, BatchNorm, Dropout, Linear, Mask, Parameter, UserLayer
from became_core import BecameError
from became_core.arrays import Array, Params
from became_core.laplace import is_statistic

__all__ = ["FlaxBackbone"]


class _Layer(NamedTuple):
    """How a class of flax layers is taken over.

    Attributes:
        kind: of its tap.
        run: (pass, layer, module, inputs) -> outputs.
        options: the options that ``run`` follows: all others must be as flax has them by default.
    """

    kind: Literal["matrix", "scale"]
    run: Callable[[Pass, UserLayer, Any, Array], Array]
    options: frozenset[str]


@dataclass(frozen=True, eq=False)
class FlaxBackbone:
    """A module and what is known of its layers.

    Attributes:
        module: linen, from images [N, H, W, C] to features [N, features].
        tapped: its layers with parameters.
        parameters: by canonical name.
        masks: what its dropout layers need.
        initial: the weights that a learner begins with, by canonical name; if it is empty, they are drawn.
        constants: the variables that are neither parameters nor a batch norm's statistics.
        agreement: how far its features are from those of the module as the user runs it.
    """

    module: nn.Module
    tapped: tuple[UserLayer, ...]
    parameters: Mapping[str, Parameter]
    masks: tuple[Mask, ...]
    initial: Params = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    agreement: tuple[Finding, ...] = ()

    @classmethod
    def of(
        cls, module: nn.Module, image: tuple[int, int, int], variables: Mapping[str, Any] | None = None
    ) -> "FlaxBackbone":
        """Look at a module.

        Args:
            module: any linen module that is called with images alone.
            image: the shape of an image, [C, H, W].
            variables: what ``module.init`` returned or training made of it, which learners begin with; if it is not
                given, they draw weights of their own.

        Raises:
            BecameError: if a parameter belongs to a layer that taps do not know, a layer has an option that taps do not
                follow, or the module needs more than images and parameters to run.
        """
        channels, height, width = image
        layers: dict[str, UserLayer] = {}
        masks: list[Mask] = []

        def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            if type(context.module) is nn.Dropout:
                _check_options(context.module, frozenset({"rate", "deterministic", "rng_collection"}), kwargs)
                threshold = Dropout(context.module.rate).threshold
                masks.extend([(tuple(args[0].shape[1:]), threshold)] if threshold else [])
                return args[0]
            if _is_known(context.module):
                _check_options(context.module, _LAYERS[type(context.module)].options, kwargs)
                layer = _layer_of(context.module)
                layers[layer.name] = layer
                if type(context.module) is nn.BatchNorm:
                    kwargs = {**kwargs, "use_running_average": True}
                    object.__setattr__(context.module, "use_running_average", None)
            return call(*args, **kwargs)

        def initial(images: Array) -> Any:
            with nn.intercept_methods(look):
                return module.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, images)

        images = jax.random.normal(jax.random.key(0), (2, height, width, channels), "float32")
        try:
            own = jax.jit(initial)(images) if variables is None else variables
            jax.eval_shape(initial, images)
        except FlaxError as error:
            raise _cannot_run(error) from None
        parameters = _parameters(layers, own)
        constants = {name: value for name, value in own.items() if name not in ("params", "batch_stats")}
        others = {
            path: leaf
            for path, leaf in flatten_dict(own.get("batch_stats", {}), sep=".").items()
            if path.rpartition(".")[0] not in layers
        }
        constants |= {"batch_stats": unflatten_dict(others, sep=".")} if others else {}
        backbone = cls(module, tuple(layers.values()), parameters, tuple(masks), {}, constants)
        compared = backbone._compared(own, images)
        weights = {} if variables is None else backbone.weights(own.get("params", {}), own.get("batch_stats", {}))
        return replace(backbone, initial=weights, agreement=compared)

    def _compared(self, variables: Mapping[str, Any], images: Array) -> tuple[Finding, ...]:
        """Return how far our features of images are from the module's own, in evaluation and in training.

        In both, dropout keeps everything.

        Raises:
            BecameError: if they differ, or a layer runs where nothing of it can be recorded.
        """

        def features(variables: Any, images: Array, training: bool) -> tuple[Array, Array, list[Array]]:
            seen: list[Array] = []

            def record(_: Any, inputs: Any, output: Array) -> Array:  # noqa: ARG001 - a signature
                seen.append(output)
                return output

            def own(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
                if context.method_name == "__call__" and type(context.module) is nn.Dropout:
                    return args[0] * (Dropout(context.module.rate).scale if training else 1)
                if context.method_name == "__call__" and type(context.module) is nn.BatchNorm:
                    object.__setattr__(context.module, "use_running_average", None)
                    return call(*args, **{**kwargs, "use_running_average": not training})
                return call(*args, **kwargs)

            with nn.intercept_methods(own):
                theirs, _ = self.module.apply(variables, images, mutable=["batch_stats"] if training else [])
            weights = self.weights(variables.get("params", {}), variables.get("batch_stats", {}))
            masks = tuple(jnp.ones((len(images), *shape), bool) for shape, _ in self.masks)
            return theirs, self(Pass(weights, masks if training else None, record=record), images), seen

        findings = []
        for training in (False, True):
            try:
                theirs, ours, _ = jax.jit(partial(features, training=training))(dict(variables), images)
            except FlaxError as error:
                raise _cannot_run(error) from None
            except jax.errors.UnexpectedTracerError:
                raise BecameError(
                    f"a layer of the module {type(self.module).__name__} runs inside of nn.jit, nn.remat or another "
                    "transformation, where taps cannot follow; leave that out, as a run compiles the whole module."
                ) from None
            findings.append(agreement(ours, theirs, "training" if training else "evaluation"))
            if not findings[-1].difference <= TOLERANCE:
                raise BecameError(
                    f"with the layers that taps know the module {type(self.module).__name__} gives other features, by "
                    f"{findings[-1].difference:.3g} of the largest; it changes a layer's weights or inputs in a way "
                    "that taps cannot follow."
                )
        return tuple(findings)

    def __call__(self, run: Pass, images: Array) -> Array:
        """Return the features [N, features] of images [N, H, W, C]."""
        layers = {layer.name: layer for layer in self.tapped}

        def take_over(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            if type(context.module) is nn.Dropout:
                return run(Dropout(context.module.rate), args[0])
            if not _is_known(context.module):
                return call(*args, **kwargs)
            layer = layers[_layer_of(context.module).name]
            return _LAYERS[type(context.module)].run(run, layer, context.module, args[0])

        with nn.intercept_methods(take_over):
            return self.module.apply(dict(self.constants), images)

    def weights(self, params: Any, batch_stats: Any = None) -> Params:
        """Return flax trees of parameters and of batch norms' statistics by canonical name, in canonical layouts."""
        weights = {}
        for path, leaf in (flatten_dict(params, sep=".") | flatten_dict(batch_stats or {}, sep=".")).items():
            owner, _, own = path.rpartition(".")
            if (name := _canonical(owner, own)) in self.parameters:
                weights[name] = jnp.transpose(leaf, CANONICAL_AXES[leaf.ndim])
        return weights

    def batch_stats(self, weights: Params) -> Any:
        """Return batch norms' statistics by canonical name as flax has them."""
        kinds = {".running_mean": ".mean", ".running_var": ".var"}
        return unflatten_dict(
            {
                name.removesuffix(ours) + theirs: weights[name]
                for name in self.parameters
                for ours, theirs in kinds.items()
                if name.endswith(ours)
            },
            sep=".",
        )

    def params(self, weights: Params) -> Any:
        """Return weights by canonical name as flax has them; those of other layers, such as heads, are left out."""
        kernels = {layer.name: "kernel" if layer.kind == "matrix" else "scale" for layer in self.tapped}
        leaves = {}
        for name in filterfalse(is_statistic, self.parameters):
            owner, _, own = name.rpartition(".")
            path = f"{owner}.{'bias' if own == 'bias' else kernels[owner]}"
            axes = np.argsort(CANONICAL_AXES[weights[name].ndim])
            leaves[path] = jnp.transpose(weights[name], axes.tolist())
        return unflatten_dict(leaves, sep=".")


def _layer_of(module: Any) -> UserLayer:
    return UserLayer(".".join(module.path), _LAYERS[type(module)].kind, module.use_bias)


def _parameters(layers: Mapping[str, UserLayer], variables: Mapping[str, Any]) -> dict[str, Parameter]:
    """Return the parameters by canonical name, and the statistics of batch norms, of layers by name."""
    parameters: dict[str, Parameter] = {}
    leaves = flatten_dict(variables.get("params", {}), sep=".")
    for path, leaf in leaves.items():
        owner, _, kind = path.rpartition(".")
        if owner not in layers:
            classes = ", ".join(sorted(layer_class.__name__ for layer_class in _LAYERS))
            raise BecameError(
                f"taps do not know the layer of the parameter '{path}'; on JAX they know {classes} with weights, "
                "Conv of images, one group."
            )
        if leaf.ndim not in ((2, 4) if kind == "kernel" else (1,)):
            raise BecameError(
                f"the parameter '{path}' has the shape {list(leaf.shape)}, as nn.scan and nn.vmap make it of several "
                "layers, which taps do not follow on JAX; write the layers out one by one."
            )
        shape = tuple(leaf.shape[axis] for axis in CANONICAL_AXES[leaf.ndim])
        fan_in = None if layers[owner].kind == "scale" else prod(leaves[f"{owner}.kernel"].shape[:-1])
        parameters[_canonical(owner, kind)] = Parameter(shape, fan_in)
    statistics = flatten_dict(variables.get("batch_stats", {}), sep=".")
    for path, leaf in statistics.items():
        owner, _, kind = path.rpartition(".")
        if owner in layers:
            parameters[_canonical(owner, kind)] = Parameter(tuple(leaf.shape), None)
    return parameters


def _canonical(owner: str, kind: str) -> str:
    return f"{owner}.{_KINDS.get(kind, kind)}"


def _cannot_run(error: FlaxError) -> BecameError:
    first = str(error).partition(". ")[0].partition(" (http")[0]
    return BecameError(f"the module must run with images and its variables alone; flax says: {first}.")


def _is_known(module: Any) -> bool:
    if type(module) is nn.Conv:
        return not isinstance(module.kernel_size, int) and len(module.kernel_size) == 2
    if type(module) in (nn.LayerNorm, nn.GroupNorm):
        return bool(module.use_scale or module.use_bias)
    return type(module) in _LAYERS


def _check_options(module: Any, options: frozenset[str], call: Mapping[str, Any]) -> None:
    """Raise an error if a layer, or a call of it, has an option that is not followed."""
    own = {it.name: (getattr(module, it.name, None), it.default) for it in fields(module)}
    own |= {"call's mask": (call.get("mask"), None)}
    for option, (value, default) in own.items():
        if option in options | _WITHOUT_EFFECT or value is None or value == default:
            continue
        if option == "dtype" and jnp.dtype(value) in (jnp.float32, jnp.float64):
            continue
        raise BecameError(
            f"taps do not follow the option {option}={value!r} of the layer '{'.'.join(module.path)}', a "
            f"{type(module).__name__}; leave it out."
        )


def _convolution(run: Pass, layer: UserLayer, module: Any, inputs: Array) -> Array:
    window: dict[str, Any] = {
        "window_strides": _pair(module.strides),
        "padding": _padding(module),
        "lhs_dilation": _pair(module.input_dilation),
        "rhs_dilation": _pair(module.kernel_dilation),
    }

    def patches(places: tuple[int, int]) -> Array:  # noqa: ARG001 - JAX finds them out
        numbers = ("NHWC", "OIHW", "NHWC")
        return lax.conv_general_dilated_patches(inputs, module.kernel_size, dimension_numbers=numbers, **window)

    return convolved(run, layer, inputs, patches, **window)


def _padding(module: Any) -> Any:
    """Return the padding of images as XLA has it."""
    if isinstance(module.padding, str):
        if module.padding not in ("SAME", "VALID"):
            raise BecameError(
                f"the layer '{'.'.join(module.path)}' is padded {module.padding}; taps know SAME and VALID."
            )
        return module.padding
    if isinstance(module.padding, int):
        return [(module.padding, module.padding)] * 2
    return [(side, side) if isinstance(side, int) else side for side in module.padding]


def _pair(value: Any) -> tuple[int, ...]:
    return (1, 1) if value is None else (value, value) if isinstance(value, int) else tuple(value)


def _layer_norm(run: Pass, layer: UserLayer, module: Any, inputs: Array) -> Array:
    return _scaled(run, layer, _standardised(inputs, -1, module.epsilon))


def _group_norm(run: Pass, layer: UserLayer, module: Any, inputs: Array) -> Array:
    groups = module.num_groups or inputs.shape[-1] // module.group_size
    split = inputs.reshape(len(inputs), -1, groups, inputs.shape[-1] // groups)
    return _scaled(run, layer, _standardised(split, (1, 3), module.epsilon).reshape(inputs.shape))


def _standardised(inputs: Array, axes: Any, epsilon: float) -> Array:
    mean, variance = inputs.mean(axes, keepdims=True), inputs.var(axes, keepdims=True)
    return (inputs - mean) * lax.rsqrt(variance + epsilon)


def _scaled(run: Pass, layer: UserLayer, normalised: Array) -> Array:
    return run.tapped(layer, lambda: normalised, normalised * run.weights[f"{layer.name}.weight"])


# The last parts of names, from flax's to the canonical ones.
_KINDS = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}

# What changes nothing but first values and rounding, or is the learner's.
_WITHOUT_EFFECT = frozenset(
    {"name", "parent", "param_dtype", "precision", "kernel_init", "bias_init", "scale_init", "momentum"}
) | {"use_fast_variance", "force_float32_reductions", "use_running_average"}

# Features may differ by rounding, as a share of the greatest.
TOLERANCE = 1e-3

_LAYERS: dict[type, _Layer] = {
    nn.Dense: _Layer(
        "matrix",
        lambda run, layer, module, inputs: run(Linear(layer.name, module.features, layer.bias), inputs),
        frozenset({"features", "use_bias"}),
    ),
    nn.Conv: _Layer(
        "matrix",
        _convolution,
        frozenset({"features", "kernel_size", "strides", "padding", "input_dilation", "kernel_dilation", "use_bias"}),
    ),
    nn.BatchNorm: _Layer(
        "scale",
        lambda run, layer, module, inputs: run(BatchNorm(layer.name, module.epsilon, running=True), inputs),
        frozenset({"epsilon"}),
    ),
    nn.LayerNorm: _Layer("scale", _layer_norm, frozenset({"epsilon", "use_bias"})),
    nn.GroupNorm: _Layer("scale", _group_norm, frozenset({"epsilon", "use_bias", "num_groups", "group_size"})),
}
