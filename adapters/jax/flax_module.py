"""A user's own flax module as a backbone, images to features, called with nothing but the images.

While it runs, its Dense, Conv, normalisation and Dropout layers are taken over: they compute as described layers do,
with weights by canonical name, and so can be tapped; everything between them is the module's. Batch norm takes the
batch's statistics, in evaluation too, and keeps none.

Convention: names are paths joined by dots, ``block_0.Dense_0.weight``; canonical weights are [out, in] and OIHW, where
flax has [in, out] and HWIO. Images are [N, H, W, C].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax import numpy as jnp

from adapters.jax.layers import Pass, convolved
from adapters.networks import CANONICAL_AXES, BatchNorm, Dropout, Linear, Mask, Parameter, UserLayer
from became_core import BecameError
from became_core.arrays import Array, Params

__all__ = ["FlaxBackbone"]


class _Layer(NamedTuple):
    """How a class of flax layers is taken over.

    Attributes:
        kind: of its tap.
        run: (pass, layer, module, inputs) -> outputs.
    """

    kind: Literal["matrix", "scale"]
    run: Callable[[Pass, UserLayer, Any, Array], Array]


@dataclass(frozen=True, eq=False)
class FlaxBackbone:
    """A module and what is known of its layers.

    Attributes:
        module: linen, from images [N, H, W, C] to features [N, features].
        tapped: its layers with parameters.
        parameters: by canonical name.
        masks: what its dropout layers need.
    """

    module: nn.Module
    tapped: tuple[UserLayer, ...]
    parameters: Mapping[str, Parameter]
    masks: tuple[Mask, ...]

    @classmethod
    def of(cls, module: nn.Module, image: tuple[int, int, int]) -> "FlaxBackbone":
        """Look at a module.

        Args:
            module: any linen module that is called with images alone.
            image: the shape of an image, [C, H, W].

        Raises:
            BecameError: if a parameter belongs to a layer that taps do not know.
        """
        channels, height, width = image
        layers: dict[str, UserLayer] = {}
        masks: list[Mask] = []

        def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            if type(context.module) is nn.Dropout:
                threshold = Dropout(context.module.rate).threshold
                masks.extend([(tuple(args[0].shape[1:]), threshold)] if threshold else [])
                return args[0]
            if _is_known(context.module):
                layer = _layer_of(context.module)
                layers[layer.name] = layer
            return call(*args, **kwargs)

        def initial(images: Array) -> Any:
            with nn.intercept_methods(look):
                return module.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, images)

        blank = jax.ShapeDtypeStruct((2, height, width, channels), jnp.float32)
        leaves = flatten_dict(jax.eval_shape(initial, blank).get("params", {}), sep=".")
        parameters: dict[str, Parameter] = {}
        for path, leaf in leaves.items():
            owner, _, own = path.rpartition(".")
            if owner not in layers:
                classes = ", ".join(sorted(layer_class.__name__ for layer_class in _LAYERS))
                raise BecameError(
                    f"taps do not know the layer of the parameter '{path}'; on JAX they know {classes} with weights, "
                    "Conv of images, one group."
                )
            shape = tuple(leaf.shape[axis] for axis in CANONICAL_AXES[leaf.ndim])
            fan_in = None if layers[owner].kind == "scale" else prod(leaves[f"{owner}.kernel"].shape[:-1])
            parameters[f"{owner}.{'bias' if own == 'bias' else 'weight'}"] = Parameter(shape, fan_in)
        return cls(module, tuple(layers.values()), parameters, tuple(masks))

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
            return self.module.apply({}, images)

    def weights(self, params: Any) -> Params:
        """Return a flax tree of parameters by canonical name, in canonical layouts."""
        weights = {}
        for path, leaf in flatten_dict(params, sep=".").items():
            owner, _, own = path.rpartition(".")
            name = f"{owner}.{'bias' if own == 'bias' else 'weight'}"
            weights[name] = jnp.transpose(leaf, CANONICAL_AXES[leaf.ndim])
        return weights

    def params(self, weights: Params) -> Any:
        """Return weights by canonical name as flax has them; those of other layers, such as heads, are left out."""
        kernels = {layer.name: "kernel" if layer.kind == "matrix" else "scale" for layer in self.tapped}
        leaves = {}
        for name in self.parameters:
            owner, _, own = name.rpartition(".")
            path = f"{owner}.{'bias' if own == 'bias' else kernels[owner]}"
            axes = np.argsort(CANONICAL_AXES[weights[name].ndim])
            leaves[path] = jnp.transpose(weights[name], axes.tolist())
        return unflatten_dict(leaves, sep=".")


def _layer_of(module: Any) -> UserLayer:
    return UserLayer(".".join(module.path), _LAYERS[type(module)].kind, module.use_bias)


def _is_known(module: Any) -> bool:
    if type(module) is nn.Conv:
        return len(module.kernel_size) == 2 and module.feature_group_count == 1
    if type(module) is nn.BatchNorm:
        return bool(module.use_scale and module.use_bias)
    return type(module) is nn.Dense or (type(module) in _LAYERS and bool(module.use_scale))


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


_LAYERS: dict[type, _Layer] = {
    nn.Dense: _Layer(
        "matrix", lambda run, layer, module, inputs: run(Linear(layer.name, module.features, layer.bias), inputs)
    ),
    nn.Conv: _Layer("matrix", _convolution),
    nn.BatchNorm: _Layer(
        "scale", lambda run, layer, module, inputs: run(BatchNorm(layer.name, module.epsilon), inputs)
    ),
    nn.LayerNorm: _Layer("scale", _layer_norm),
    nn.GroupNorm: _Layer("scale", _group_norm),
}
