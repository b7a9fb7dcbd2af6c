"""What is compiled: gradients, an update, logits, taps, derivatives along directions; pure functions of arrays.

Convention: the network is static, all else is an argument, and the head is the task's by the name ``head``; so each is
compiled once for each batch size and for each set of trained parameters, whatever the task. An update is compiled for
each structure of projector, penalty, region and optimiser, apart from the network, which is what takes long to compile.

Gradients are of a batch's mean loss. Those of linear layers' weights come as factors where a projector asks for it: the
gradient by the outputs, g [n, d_out], and the inputs, a [n, d_in], of which they are the product g^T a, so that
projecting a few inputs stands for projecting d_out rows. The product is compiled for each batch size and each rank.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from adapters.jax.dropout import Masks, drawn
from adapters.jax.heads import HEAD
from adapters.jax.layers import Pass
from adapters.networks import Backbone, Linear, Tapped
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
    "multiplied",
    "output_width",
    "pull",
    "pushforward",
    "taps",
    "update",
]

# g and a, by the weight's name.
Factors = dict[str, tuple[Array, Array]]


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
    factored: Params,
    frozen: Params,
    data: Data,
    rows: Array,
    masks: Masks,
    views: Views | None = None,
    products: str | None = None,
) -> tuple[Array, Params, Factors]:
    """Return a batch's mean cross-entropy, its gradient by what is trained, and the factors of that by other weights.

    Args:
        backbone: the network.
        trained: by name.
        factored: weights of linear layers, trained as well.
        frozen: all others.
        data: on the device.
        rows: of the batch.
        masks: of dropout, or their key.
        views: how the images are seen.
        products: as in a ``Pass``.
    """
    images, targets = data.normalised(rows, views), data.targets[rows]
    linear = [name.removesuffix(".weight") for name in factored]
    masks = drawn(backbone.masks, masks, len(rows))

    def loss(trained: Params, perturbations: Params) -> tuple[Array, _Recorder]:
        recorder = _Recorder(perturbations, linear)
        run = Pass(frozen | factored | trained, masks, record=recorder, products=products)
        log_likelihoods = jax.nn.log_softmax(_logits(backbone, run, images))
        return -jnp.take_along_axis(log_likelihoods, targets[:, None], axis=1).mean(), recorder

    def with_inputs(trained: Params, perturbations: Params) -> tuple[Array, Params]:
        found, recorder = loss(trained, perturbations)
        return found, recorder.inputs

    zeros = _zeros(lambda: loss(trained, {})[1]) if linear else {}
    differentiated = jax.value_and_grad(with_inputs, argnums=(0, 1), has_aux=True)
    (value, inputs), (gradients, by_outputs) = differentiated(trained, zeros)
    factors = {f"{name}.weight": (_rows(by_outputs[name]), _rows(a)) for name, a in inputs.items()}
    return value, gradients, factors


def _by_inputs(names: Container[str], projector: Projector | None, region: Region | None) -> frozenset[str]:
    """Return which of the weights whose gradients come as factors are projected by their inputs."""
    rowwise = frozenset[str]() if projector is None else projector.rowwise
    # A region stands between the gradient by its effective weight and the direction.
    return frozenset(name for name in rowwise if name in names and (region is None or name not in region.weights))


def _multiplied(factors: Factors, projector: Projector | None, region: Region | None) -> Params:
    """Return gradients by their factors, projected where inputs can be."""
    projected = _by_inputs(factors, projector, region)

    def seen(name: str, a: Array) -> Array:
        return a if projector is None or name not in projected else projector.project_rows(name, a)

    return {name: g.T @ seen(name, a) for name, (g, a) in factors.items()}


def _update(
    trained: Params,
    optimiser: Optimiser,
    frozen: Params,
    gradients: Params,
    multiplied: Params,
    rate: float,
    projector: Projector | None,
    posterior: LaplacePosterior | None,
    strength: float,
    region: Region | None,
    trains_scales: bool,
    relative: dict[str, float],
) -> tuple[Params, Optimiser]:
    """Return what is trained and the optimiser after one step, by gradients and by those multiplied from factors."""
    penalty = None if posterior is None else Penalty(posterior, strength)
    gradients = gradients | multiplied
    constraint = Constraint(frozenset(gradients), projector, penalty, region, trains_scales, relative)
    done = _by_inputs(multiplied, projector, region)
    directions, optimiser = constraint.directions(gradients, frozen | trained, rate, optimiser, done)
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
    """Adds perturbations to the layers' outputs, and keeps those and the layers' inputs, [N, positions, d] each.

    Attributes:
        perturbations: by the layer's name.
        only: names of the layers that it looks at; all if None.
    """

    perturbations: Params
    only: Container[str] | None = None
    inputs: Params = field(default_factory=dict)
    outputs: Params = field(default_factory=dict)

    def __call__(self, layer: Tapped, inputs: Callable[[], Array], output: Array) -> Array:
        if self.only is not None and layer.name not in self.only:
            return output
        self.inputs[layer.name] = _with_positions(inputs())
        self.outputs[layer.name] = _with_positions(output)
        perturbation = self.perturbations.get(layer.name)
        return output if perturbation is None else output + perturbation.reshape(output.shape)


def _zeros(run: Callable[[], _Recorder]) -> Params:
    """Return perturbations that change nothing, of all outputs that are recorded in a run."""
    outputs = jax.eval_shape(lambda: run().outputs)
    return {name: jnp.zeros(output.shape, output.dtype) for name, output in outputs.items()}


def _with_positions(array: Array) -> Array:
    """Return [N, ..., d] as [N, positions, d]."""
    return array.reshape(array.shape[0], -1, array.shape[-1])


def _rows(array: Array) -> Array:
    """Return [N, ..., d] as [n, d]."""
    return array.reshape(-1, array.shape[-1])


def _taps(
    backbone: Backbone, weights: Params, data: Data, rows: Array, masks: Masks | None
) -> tuple[Array, Any, Params]:
    """Return the logits, the map from gradients by them to those by all layers' outputs, and all layers' inputs.

    Args:
        backbone: the network.
        weights: by name.
        data: on the device.
        rows: of the batch.
        masks: of dropout, or their key, with which batch statistics are part of the gradient; without, they are
            constants.
    """
    images = data.normalised(rows)
    kept = None if masks is None else drawn(backbone.masks, masks, len(rows))

    def logits(perturbations: Params) -> tuple[Array, _Recorder]:
        recorder = _Recorder(perturbations)
        return _logits(backbone, Pass(weights, kept, kept is None, recorder), images), recorder

    def perturbed(perturbations: Params) -> tuple[Array, Params]:
        found, recorder = logits(perturbations)
        return found, recorder.inputs

    return jax.vjp(perturbed, _zeros(lambda: logits({})[1]), has_aux=True)  # type: ignore[no-any-return]


def _pushforward(
    backbone: Backbone, weights: Params, data: Data, rows: Array, directions: list[Params]
) -> tuple[Array, Array]:
    """Return the logits, and their derivatives along directions, [directions, rows, classes]."""
    images = data.normalised(rows)
    logits, along = jax.linearize(lambda weights: _logits(backbone, Pass(weights), images), weights)
    return logits, jnp.stack([along(direction) for direction in directions])


gradients: Any = jax.jit(_gradients, static_argnums=0, static_argnames="products")
multiplied: Any = jax.jit(_multiplied)
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
