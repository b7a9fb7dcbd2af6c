"""The learner protocol: the whole contract of an adapter.

A learner holds a network, places a data set on its device once, and knows nothing of methods, schedules or tasks beyond
which head a batch is for. Parameters are named arrays of the learner's framework; everything random that it does
is a function of the stream it is given.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from became_core.arrays import Array, Params, pytree, static
from became_core.continual.augmentation import Views
from became_core.continual.optimisers import Optimiser
from became_core.continual.stream import Indices
from became_core.curvature import Pushforward, TapMode, Taps
from became_core.laplace import LaplacePosterior
from became_core.projection import Projector, Region

__all__ = ["Batch", "Constraint", "Learner", "Penalty", "TapMode", "Trained", "heads_of"]


class Batch(NamedTuple):
    """One step's samples: all of one task, since a head and batch statistics belong to a task.

    Attributes:
        task: whose head they are for.
        indices: the rows of the data set.
        views: how each image is seen; as it is if there are none.
    """

    task: int
    indices: Indices
    views: Views | None = None


@pytree
@dataclass(frozen=True)
class Penalty:
    """A quadratic pull towards the old tasks' posterior: strength x 1/2 (theta - mean).P.(theta - mean).

    Parameters of which the posterior has no mean are free.
    """

    posterior: LaplacePosterior
    strength: float

    def add_to(
        self, gradients: Params, theta: Params, rate: float, relative: Mapping[str, float] | None = None
    ) -> Params:
        """Return the gradients of loss and penalty, such that a step of this rate is stable at any strength.

        With S = strength x P the step is semi-implicit, theta <- theta - rate (g + S (theta - mean)) / (1 + rate S):
        the loss is followed explicitly and the penalty, whose curvature is known, implicitly (a proximal step). Its
        fixed points are those of the sum; explicit steps diverge wherever rate x S exceeds 2.

        Args:
            gradients: of the loss, by name.
            theta: the parameters, of at least these names.
            rate: the learning rate of the step to come.
            relative: what it is multiplied by for some of the parameters.
        """
        held = [name for name in gradients if name in self.posterior.mean]
        pull = self.posterior.gradient({name: theta[name] for name in held})
        stiffness, relative = self.posterior.precision.diagonal(), relative or {}
        return gradients | {
            name: (gradients[name] + self.strength * pull[name])
            / (1 + rate * relative.get(name, 1.0) * self.strength * stiffness[name])
            for name in held
        }


@pytree
@dataclass(frozen=True)
class Constraint:
    """What a stage of training must respect.

    Attributes:
        trainable: names of the parameters that may change; all others keep their values to the bit.
        projector: if given, the direction of every step is projected by it.
        penalty: if given, every gradient has it added, before the optimiser sees it.
        region: if given, the network works with its effective weights, and what is trained are those beneath.
        trains_scales: whether the region's scales are trained as well; they are never projected.
        relative: what the learning rate is multiplied by for some of the parameters; 1 for all others.
    """

    trainable: frozenset[str] = static()
    projector: Projector | None = None
    penalty: Penalty | None = None
    region: Region | None = None
    trains_scales: bool = static(default=False)
    relative: Mapping[str, float] = field(default_factory=dict)

    def projector_of_gradients(self, optimiser: Optimiser) -> Projector | None:
        """Return the projector if it may as well project a loss's gradients as they are made: if nothing else moves.

        A penalty and an optimiser that is not linear come between gradient and direction. So does a region, for its own
        weights, unless their gradients are made by the weights beneath.
        """
        return self.projector if self.penalty is None and optimiser.is_linear else None

    def directions(
        self,
        gradients: Params,
        theta: Params,
        rate: float,
        optimiser: Optimiser,
        projected: frozenset[str] = frozenset(),
        beneath: frozenset[str] = frozenset(),
    ) -> tuple[Params, Optimiser]:
        """Return what a step of this rate goes along, theta <- theta - rate x direction, and the optimiser after it.

        Args:
            gradients: of the loss, by the name of the parameter that the network works with, and by the scales of what
                is made beneath.
            theta: the parameters beneath, and the region's scales by their keys, if there is one.
            rate: the learning rate of the step.
            optimiser: before the step.
            projected: names of gradients that were made projected.
            beneath: names of gradients that were made by the region's weights beneath, not by effective ones.
        """
        if self.region is not None:
            region = self.region.with_scales({key: theta[key] for key in self.region.scales})
            made = beneath | region.scales.keys()
            effective = {name: value for name, value in gradients.items() if name not in made}
            gradients = gradients | region.pull_back(effective, theta)
            if not self.trains_scales:
                gradients = {name: value for name, value in gradients.items() if name not in region.scales}
        if self.penalty is not None:
            free = {} if self.region is None else self.region.scales
            held = {name: value for name, value in gradients.items() if name not in free}
            gradients = gradients | self.penalty.add_to(held, theta, rate, self.relative)
        directions, optimiser = optimiser.step(gradients, theta)
        if self.projector is not None:
            remaining = {name: value for name, value in directions.items() if name not in projected}
            directions = directions | self.projector.project(remaining)
        scaled = {name: self.relative[name] * directions[name] for name in directions if name in self.relative}
        return directions | scaled, optimiser


class Trained(NamedTuple):
    """What training returns: the mean loss over samples, the optimiser after the last step, the region likewise."""

    loss: float
    optimiser: Optimiser
    region: Region | None


class Learner(Protocol):
    """A network on a device, with the data it learns from."""

    @property
    def heads(self) -> Sequence[frozenset[str]]:
        """For each task, the names of the parameters that are its own."""

    @property
    def projectable(self) -> frozenset[str]:
        """Names of the shared weights that taps speak of as matrices, which a projector can protect."""

    @property
    def statistics(self) -> frozenset[str]:
        """Names of what parameters hold beside weights: running statistics of normalisation layers, if there are any.

        They are used in all but training and in taps of the mode "published", and changed by ``assign`` alone.
        """

    def parameters(self) -> Params:
        """Return all parameters by canonical name; they do not change when training goes on."""

    def assign(self, parameters: Params) -> None:
        """Set the parameters."""

    def train(
        self,
        batches: Sequence[Batch],
        rates: NDArray[np.float64],
        constraint: Constraint,
        optimiser: Optimiser,
        stream: np.random.Generator,
    ) -> Trained:
        """Take a step on the mean cross-entropy of each batch: gradient, penalty, optimiser, projector, in this order.

        Args:
            batches: in order.
            rates: each step's learning rate.
            constraint: what every step must respect.
            optimiser: begun on what is trained.
            stream: where dropout is drawn from.
        """

    def logits(self, indices: Indices, batch_size: int) -> Array:
        """Return the logits of all heads, [samples, tasks, classes], computed without dropout, batch by batch."""

    def batch_statistics(self, indices: Indices, batch_size: int) -> Iterator[tuple[int, Params]]:
        """Yield each batch's size and its own mean and variance for every layer of ``statistics``, by their names.

        Computed without dropout, every layer normalising by the batch's own; of several runs of a layer in one pass,
        those after the first come by themselves, with the batch's size again.
        """

    def targets(self, indices: Indices) -> Array:
        """Return the labels within the task, integers [samples], on the device of the logits."""

    def taps(
        self, task: int, indices: Indices, batch_size: int, mode: TapMode, stream: np.random.Generator
    ) -> Iterator[Taps]:
        """Yield each batch's taps of all layers that the task's loss depends on.

        In order of the batches; one a batch, or in the mode "true" as many as the task has classes, one after the
        other. ``became_core.curvature.TapMode`` says what the modes are; in all but "published" there is no dropout,
        and batch statistics are constants.
        """

    def pushforward(
        self, task: int, indices: Indices, batch_size: int, directions: Sequence[Params]
    ) -> Iterator[Pushforward]:
        """Yield each batch's logits of the task's head with their derivatives along directions in parameter space.

        Without dropout; batch statistics are part of the function that is differentiated, as they are in evaluation,
        running ones are constants, and what directions say of them has no meaning.
        """


def heads_of(learner: Learner) -> frozenset[str]:
    """Return the names of all heads' parameters."""
    return frozenset[str]().union(*learner.heads)
