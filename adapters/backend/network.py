"""A network with one head as pure functions of its weights, and one step of training as a pure function.

A framework adds the derivatives to ``Network``, and compiles what is worth compiling. All else of a step is the same in
every framework: which gradients come as factors, where the projector sees a layer's inputs instead of gradients, what a
region makes of the weights, and what the optimiser does with the result.

Convention: images are [N, H, W, C] and stay on the device; the task's head is called ``head``. Gradients are of a
batch's mean cross-entropy. The gradient of a linear layer's weight may come as its factors, the gradient by the outputs
g [n, d_out] and the inputs a [n, d_in], of which it is the product g^T a: projecting a few inputs then stands for
projecting d_out rows.
"""

import math
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from adapters.networks import Architecture, Backbone, Linear, Pass, Tapped
from became_core.arrays import Array, Params, namespace
from became_core.continual import Constraint, Optimiser, TapMode, Views
from became_core.curvature import Categorical, Likelihood, Taps
from became_core.projection import Region

__all__ = ["Data", "Factors", "Network", "State", "Step", "projected_by_rows"]

# By the weight's name, the gradient by the layer's outputs [n, d_out] and the layer's inputs [n, d_in].
Factors = dict[str, tuple[Array, Array]]

# What is trained, a region's scales included, and the optimiser.
State = tuple[Params, Optimiser]


class Data(NamedTuple):
    """What lies on the device: images [N, H, W, C], targets [N, ...], and by channel mean and std in images' units."""

    images: Array
    targets: Array
    mean: Array
    std: Array

    def normalised(self, rows: Array, views: Views | None = None) -> Array:
        """Return the network's input, [rows, H, W, C] or of text [rows, L]."""
        xp: Any = namespace(images=self.images)
        pixels = xp.take(self.images, rows, axis=0)
        if len(pixels.shape) == 2:
            return xp.astype(pixels, xp.int32)  # text
        if views is not None:
            pixels = views.apply(pixels, axis=1)
        return (xp.astype(pixels, self.mean.dtype) - self.mean) / self.std


class Step(NamedTuple):
    """What differs from step to step: of one step, or of several, stacked.

    Attributes:
        rows: of the batch.
        rate: the learning rate.
        masks: of dropout, or what a framework draws them from.
        views: how the images are seen.
    """

    rows: Array
    rate: Any
    masks: Any
    views: Views | None


def projected_by_rows(
    constraint: Constraint, optimiser: Optimiser, linear: Set[str], beneath: Set[str] = frozenset()
) -> frozenset[str]:
    """Return the weights whose gradients are projected by projecting their layers' inputs.

    Args:
        constraint: of the stage.
        optimiser: of the stage.
        linear: the weights whose layers' inputs can be projected.
        beneath: of the region's weights, those whose gradients are made by the weight beneath. For all others the
            region stands between the gradient and the direction, so that the direction must be projected.
    """
    projector = constraint.projector_of_gradients(optimiser)
    if projector is None:
        return frozenset()
    between = frozenset[str]() if constraint.region is None else constraint.region.weights - beneath
    return frozenset(projector.rowwise & linear) - between


@dataclass(frozen=True)
class Network:
    """A backbone and a head. Subclasses have the derivatives, and compile their methods.

    Attributes:
        backbone: images [N, H, W, C] to features [N, features].
        head: features to logits [N, classes], for the task with the most classes.
        products: the dtype that training steps multiply in, as in a ``Pass``.
        likelihood: what the logits say of the targets.
    """

    backbone: Backbone
    head: Linear
    products: Any = None
    likelihood: Likelihood = field(default_factory=Categorical)

    runs: ClassVar[type[Pass]]  # the framework's own

    def gradients(
        self, trained: Params, factored: Params, frozen: Params, data: Data, batch: Step
    ) -> tuple[Array, Params, Factors]:
        """Return a batch's mean loss, its gradients by what is trained, and factors of those that have factors.

        Args:
            trained: weights whose gradients are asked for, by name.
            factored: weights of linear layers, of whose gradients the factors are asked for.
            frozen: all others.
            data: on the device.
            batch: its rows, masks and views.
        """
        raise NotImplementedError

    def taps(
        self, weights: Params, data: Data, rows: Array, masks: Any, mode: TapMode, rng: np.random.Generator
    ) -> Iterator[Taps]:
        """Yield the taps of a batch, as ``Learner.taps`` does; without masks batch statistics are constants."""
        raise NotImplementedError

    def tangents(self, weights: Params, directions: list[Params], data: Data, rows: Array) -> tuple[Array, Array]:
        """Return the logits [rows, classes] and their derivatives along directions [directions, rows, classes]."""
        raise NotImplementedError

    @property
    def way(self) -> str:
        """How ``tangents`` are computed."""
        return "forward mode"

    def outputs(self, weights: Params, data: Data, rows: Array) -> Array:
        """Return the logits [rows, classes], in evaluation mode."""
        return self.logits(self.runs(weights), self.images(data, rows))

    def pulled_back(self, weights: Params, data: Data, rows: Array, seed: Array) -> Params:
        """Return the gradients of seed . logits by all weights, by the framework's own backward pass alone."""
        raise NotImplementedError

    def images(self, data: Data, rows: Array, views: Views | None = None) -> Array:
        """Return the network's input, as ``Data.normalised`` does; a framework may spread it over devices."""
        return data.normalised(rows, views)

    @property
    def layers(self) -> tuple[Tapped, ...]:
        """The layers that have parameters, the head being the last."""
        return (*self.backbone.tapped, self.head)

    @property
    def matrices(self) -> frozenset[str]:
        """The names of the backbone's weights that a projector can protect."""
        return frozenset(f"{layer.name}.weight" for layer in self.backbone.tapped if layer.kind == "matrix")

    def logits(self, run: Any, images: Array) -> Array:
        """Return the head's logits [N, classes] in a run of the network, and what features are outputs besides."""
        features, apart = self._seen(self.backbone(run, images))
        outputs: Array = run(self.head, features)
        return namespace(outputs=outputs).concat([outputs, *apart], axis=1) if apart else outputs

    def _seen(self, features: Array) -> tuple[Array, list[Array]]:
        """Return the features that a head sees, and those that are outputs as they are."""
        beside = self.backbone.beside if isinstance(self.backbone, Architecture) else 0
        return (features[:, :-beside], [features[:, -beside:]]) if beside else (features, [])

    def all_logits(self, weights: Params, heads: list[Array], data: Data, rows: Array) -> Array:
        """Return the logits of all heads [rows, heads, classes], -inf for the classes that a task has not."""
        features, apart = self._seen(self.backbone(self.runs(weights), self.images(data, rows)))
        xp: Any = namespace(features=features)
        logits = [xp.matmul(features, xp.matrix_transpose(head)) for head in heads]
        never = xp.zeros_like(logits[0][:, :1]) - math.inf
        missing = [self.head.outputs - head.shape[0] for head in heads]
        logits = [
            xp.concat([of_one, *([never] * m), *apart], axis=1) if m or apart else of_one
            for of_one, m in zip(logits, missing, strict=True)
        ]
        return xp.stack(logits, axis=1)

    def batch_statistics(self, weights: Params, data: Data, rows: Array) -> Params:
        """Return a batch's own mean and variance of every layer that has running ones."""
        moments: Params = {}
        self.backbone(self.runs(weights, moments=moments), self.images(data, rows))
        return moments

    def step(
        self, state: State, frozen: Params, data: Data, batch: Step, constraint: Constraint
    ) -> tuple[State, Array]:
        """Return the state after one step, and the batch's mean loss.

        Args:
            state: before the step; its arrays may be overwritten.
            frozen: the parameters that are not trained.
            data: on the device.
            batch: of this step.
            constraint: what the step must respect; its region has the scales that it began with.
        """
        trained, optimiser = state
        region = constraint.region
        scales, beneath = frozenset[str](), {}
        weights = frozen | trained
        if region is not None:
            scales = frozenset(region.scales)
            beneath = {name: frozen[name] for name in region.weights if name in frozen}
            weights |= self.effective(trained, beneath, region)
        early = constraint.projector_of_gradients(optimiser) is not None
        names = trained.keys() - scales
        linear = {name for name in names & self.matrices if early and len(trained[name].shape) == 2}
        loss, gradients, factors = self.gradients(
            {name: weights[name] for name in names - linear},
            {name: weights[name] for name in linear},
            {name: weights[name] for name in frozen},
            data,
            batch,
        )
        return self.updated(state, beneath, gradients, factors, batch.rate, constraint), loss

    def updated(
        self, state: State, beneath: Params, gradients: Params, factors: Factors, rate: Any, constraint: Constraint
    ) -> State:
        """Return the state after a step along these gradients, some of which come as factors.

        Args:
            state: before the step.
            beneath: the region's weights that are not trained.
            gradients: by the weights that the network works with.
            factors: of further gradients.
            rate: the learning rate.
            constraint: what the step must respect.
        """
        products = self.multiplied(factors, state[1], constraint) if factors else {}
        return self.advanced(state, beneath, gradients, products, rate, constraint)

    def multiplied(self, factors: Factors, optimiser: Optimiser, constraint: Constraint) -> Params:
        """Return gradients by their factors, projected where the inputs can be."""
        projected = projected_by_rows(constraint, optimiser, factors.keys())
        products = {}
        for name, (g, a) in factors.items():
            if name in projected and constraint.projector is not None:
                a = constraint.projector.project_rows(name, a)
            xp: Any = namespace(g=g, a=a)
            products[name] = xp.matmul(xp.matrix_transpose(g), a)
        return products

    def advanced(
        self, state: State, beneath: Params, gradients: Params, products: Params, rate: Any, constraint: Constraint
    ) -> State:
        """Return the state after a step along gradients, of which the products of factors are projected as above."""
        trained, optimiser = state
        projected = projected_by_rows(constraint, optimiser, products.keys())
        directions, optimiser = constraint.directions(
            gradients | products, beneath | trained, rate, optimiser, projected
        )
        moved = {name: trained[name] - rate * direction for name, direction in directions.items()}
        return trained | moved, optimiser

    def effective(self, trained: Params, beneath: Params, region: Region) -> Params:
        """Return the weights that the network works with, of those in a region, whose scales are trained or not."""
        theta = beneath | trained
        region = region.with_scales({key: theta[key] for key in region.scales})
        effective = region.effective({name: theta[name] for name in region.weights})
        return {name: effective[name] for name in region.weights}
