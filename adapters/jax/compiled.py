"""What is compiled: gradients, an update, logits, taps, derivatives along directions; pure functions of arrays.

Convention: the network is static, all else is an argument, and the head is the task's by the name ``head``; so each is
compiled once for each batch size and for each set of trained parameters, whatever the task. An update is compiled for
each structure of projector, penalty, region and optimiser, apart from the network, which is what takes long to compile.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from adapters.architectures import Backbone, Linear, Tapped
from adapters.jax.heads import HEAD
from adapters.jax.layers import Pass
from became_core.arrays import Array, Params
from became_core.continual import Constraint, Optimiser, Penalty, Views
from became_core.laplace import LaplacePosterior
from became_core.projection import Projector, Region

__all__ = [
    "Data",
    "all_logits",
    "batch_statistics",
    "effective",
    "gradients",
    "output_width",
    "pull",
    "pushforward",
    "taps",
    "update",
]

Masks = tuple[Any, ...]


class Data(NamedTuple):
    """What lies on the device: uint8 images [N, H, W, C], labels [N], and by channel 255 x mean and 255 x std."""

    images: Array
    targets: Array
    mean: Array
    std: Array

    def normalised(self, rows: Array, views: Views | None = None) -> Array:
        """Return the network's input, [rows, H, W, C]."""
        pixels = self.images[rows] if views is None else views.shown(self.images[rows], axis=1)
        return (pixels.astype(self.mean.dtype) - self.mean) / self.std


def _logits(backbone: Backbone, run: Pass, images: Array) -> Array:
    """Return the logits of the task's head."""
    found = backbone(run, images)
    return run(Linear(HEAD, len(run.weights[f"{HEAD}.weight"])), found)


def _gradients(
    backbone: Backbone,
    trained: Params,
    frozen: Params,
    data: Data,
    rows: Array,
    masks: Masks,
    views: Views | None = None,
    products: str | None = None,
) -> tuple[Array, Params]:
    """Return a batch's mean cross-entropy, and its gradient by what is trained."""
    images, targets = data.normalised(rows, views), data.targets[rows]

    def loss(trained: Params) -> Array:
        logits = _logits(backbone, Pass(frozen | trained, masks, products=products), images)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)
        return -chosen.mean()

    return jax.value_and_grad(loss)(trained)  # type: ignore[no-any-return]


def _update(
    trained: Params,
    optimiser: Optimiser,
    frozen: Params,
    gradients: Params,
    rate: float,
    projector: Projector | None,
    posterior: LaplacePosterior | None,
    strength: float,
    region: Region | None,
    trains_scales: bool,
    relative: dict[str, float],
) -> tuple[Params, Optimiser]:
    """Return what is trained and the optimiser after one step."""
    penalty = None if posterior is None else Penalty(posterior, strength)
    constraint = Constraint(frozenset(gradients), projector, penalty, region, trains_scales, relative)
    directions, optimiser = constraint.directions(gradients, frozen | trained, rate, optimiser)
    moved = {name: trained[name] - rate * direction for name, direction in directions.items()}
    return trained | moved, optimiser


def _effective(trained: Params, frozen: Params, region: Region) -> Params:
    """Return the weights that the network works with, of those in a region, whose scales are among what is trained."""
    theta = frozen | trained
    found = region.with_scales({key: theta[key] for key in region.scales}).effective(theta)
    return {name: found[name] for name in region.weights}


def _all_logits(backbone: Backbone, weights: Params, heads: list[Array], data: Data, rows: Array) -> Array:
    """Return all heads' logits, [rows, heads, classes]."""
    found = backbone(Pass(weights), data.normalised(rows))
    return jnp.stack([found @ head.T for head in heads], axis=1)


def _batch_statistics(backbone: Backbone, weights: Params, data: Data, rows: Array) -> Params:
    """Return a batch's own mean and variance of every layer that has running ones."""
    moments: Params = {}
    backbone(Pass(weights, moments=moments), data.normalised(rows))
    return moments


@dataclass
class _Recorder:
    """Adds perturbations to the layers' outputs, and keeps those and the layers' inputs, [N, positions, d] each."""

    perturbations: Params
    inputs: Params = field(default_factory=dict)
    outputs: Params = field(default_factory=dict)

    def __call__(self, layer: Tapped, inputs: Callable[[], Array], output: Array) -> Array:
        self.inputs[layer.name] = _with_positions(inputs())
        self.outputs[layer.name] = _with_positions(output)
        perturbation = self.perturbations.get(layer.name)
        return output if perturbation is None else output + perturbation.reshape(output.shape)


def _with_positions(array: Array) -> Array:
    """Return [N, ..., d] as [N, positions, d]."""
    return array.reshape(array.shape[0], -1, array.shape[-1])


def _taps(
    backbone: Backbone, weights: Params, data: Data, rows: Array, masks: Masks | None
) -> tuple[Array, Any, Params]:
    """Return the logits, the map from gradients by them to those by all layers' outputs, and all layers' inputs.

    Args:
        backbone: the network.
        weights: by name.
        data: on the device.
        rows: of the batch.
        masks: of dropout, with which batch statistics are part of the gradient; without, they are constants.
    """
    images = data.normalised(rows)

    def logits(perturbations: Params) -> tuple[Array, _Recorder]:
        recorder = _Recorder(perturbations)
        return _logits(backbone, Pass(weights, masks, masks is None, recorder), images), recorder

    outputs = jax.eval_shape(lambda: logits({})[1].outputs)
    zeros = {name: jnp.zeros(output.shape, output.dtype) for name, output in outputs.items()}

    def perturbed(perturbations: Params) -> tuple[Array, Params]:
        found, recorder = logits(perturbations)
        return found, recorder.inputs

    return jax.vjp(perturbed, zeros, has_aux=True)  # type: ignore[no-any-return]


def _pushforward(
    backbone: Backbone, weights: Params, data: Data, rows: Array, directions: list[Params]
) -> tuple[Array, Array]:
    """Return the logits, and their derivatives along directions, [directions, rows, classes]."""
    images = data.normalised(rows)
    logits, along = jax.linearize(lambda weights: _logits(backbone, Pass(weights), images), weights)
    return logits, jnp.stack([along(direction) for direction in directions])


gradients: Any = jax.jit(_gradients, static_argnums=0, static_argnames="products")
update: Any = jax.jit(_update, static_argnames="trains_scales", donate_argnums=(0, 1))
effective: Any = jax.jit(_effective)
all_logits: Any = jax.jit(_all_logits, static_argnums=0)
batch_statistics: Any = jax.jit(_batch_statistics, static_argnums=0)
taps: Any = jax.jit(_taps, static_argnums=0)
pull: Any = jax.jit(lambda map_back, at_logits: map_back(at_logits)[0])
pushforward: Any = jax.jit(_pushforward, static_argnums=0)


def output_width(backbone: Backbone, images: tuple[int, ...]) -> int | None:
    """Return the width of a backbone's features [N, features], given images [N, H, W, C]; None if they are no such."""
    weights = {name: jax.ShapeDtypeStruct(each.shape, jnp.float32) for name, each in backbone.parameters.items()}
    blank = jax.ShapeDtypeStruct(images, jnp.float32)
    found = jax.eval_shape(lambda weights, images: backbone(Pass(weights), images), weights, blank)
    return int(found.shape[1]) if getattr(found, "ndim", 0) == 2 else None
