"""The learner: the whole contract of an adapter, and what is done with any learner.

A learner holds a network, places a data set on its device once, and knows nothing of methods, schedules or tasks beyond
which head a batch is for. Parameters are named arrays of the learner's framework; everything random that it does
is a function of the generator of random numbers that it is given.

Running statistics of normalisation layers are a function of a model's weights and of the images that it learned last.
They are no exponential averages of what was seen in training, but are estimated afresh for the weights as they are, in
one pass over the training images: exact, the same on every backend, and there for merged weights as for trained ones
(as is usual after averaging weights: Izmailov et al., UAI 2018). So theta_gp, theta_hat and the best model of a stage
have statistics of their own, and gradients, optimisers, projectors, penalties, curvature and delta leave them out.

Convention: the statistics of a layer are ``NAME.running_mean`` and ``NAME.running_var``, the biased variance; the mean
and the variance over all images of what the layer sees when the layers before it normalise by each batch's own
statistics, without dropout.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from became_core.arrays import Array, Params
from became_core.continual.data import Indices, Task, Views
from became_core.continual.rng import random_generator
from became_core.continual.step import Constraint, Optimiser, Trained
from became_core.curvature import Pushforward, TapMode, Taps
from became_core.projection import Region, View

__all__ = [
    "Batch",
    "Learner",
    "TapMode",
    "heads_of",
    "pooled",
    "refresh_statistics",
    "seen_through",
    "taps_of_shared_weights",
    "weights_of",
]

MEAN, VARIANCE = ".running_mean", ".running_var"


class Batch(NamedTuple):
    """One step's samples: all of one task, since a head and batch statistics belong to a task.

    Attributes:
        task: whose head they are for.
        indices: the rows of the data set.
        views: how each image is seen; None for images as they are.
    """

    task: int
    indices: Indices
    views: Views | None = None


class Learner(ABC):
    """A network on a device, with the data it learns from.

    Attributes:
        heads: for each task, the names of the parameters that are its own.
        projectable: names of the shared weights that taps describe as matrices, which a projector can protect.
        running_statistics: names of what ``parameters`` holds beside weights: running statistics of normalisation
            layers, if there are any. They are used in all but training and in taps of the mode "published", and
            changed by ``assign`` alone.
    """

    heads: Sequence[frozenset[str]]
    projectable: frozenset[str]
    running_statistics: frozenset[str]

    @abstractmethod
    def parameters(self) -> Params:
        """Return all parameters by canonical name; the arrays do not change when training goes on."""

    @abstractmethod
    def assign(self, parameters: Params) -> None:
        """Set the parameters."""

    @contextmanager
    def at(self, theta: Params) -> Iterator[None]:
        """Give the learner these parameters inside the context, and its own ones again after it.

        Args:
            theta: by name; a parameter that is not named keeps its value.
        """
        before = self.parameters()
        self.assign(before | theta)
        try:
            yield
        finally:
            self.assign(before)

    @abstractmethod
    def train(
        self,
        batches: Sequence[Batch],
        rates: NDArray[np.float64],
        constraint: Constraint,
        optimiser: Optimiser,
        rng: np.random.Generator,
    ) -> Trained:
        """Take a step on the mean cross-entropy of each batch: gradient, penalty, optimiser, projector, in this order.

        Args:
            batches: in order.
            rates: each step's learning rate.
            constraint: what every step must respect.
            optimiser: as ``initial`` returned it for what is trained, or as an earlier call left it.
            rng: where dropout is drawn from.
        """

    @abstractmethod
    def logits(self, indices: Indices, batch_size: int) -> Array:
        """Return the logits of all heads, [samples, tasks, classes], computed without dropout, batch by batch."""

    @abstractmethod
    def batch_statistics(self, indices: Indices, batch_size: int) -> Iterator[tuple[int, Params]]:
        """Yield each batch's size and its own mean and variance for every layer that has running statistics.

        They go by the names of the running statistics, and are computed without dropout, every layer normalising by
        the batch's own statistics. Where a layer runs several times in one pass, the later runs are yielded by
        themselves, with the batch's size again.
        """

    @abstractmethod
    def targets(self, indices: Indices) -> Array:
        """Return the labels within the task, integers [samples], on the device of the logits."""

    @abstractmethod
    def taps(
        self, task: int, indices: Indices, batch_size: int, mode: TapMode, rng: np.random.Generator
    ) -> Iterator[Taps]:
        """Yield each batch's taps of all layers that the task's loss depends on.

        They come in the order of the batches; one for each batch, or in the mode "true" as many as the task has
        classes, one after the other. ``became_core.curvature.TapMode`` says what the modes are; in all but "published"
        there is no dropout, and batch statistics are constants.
        """

    @abstractmethod
    def pushforward(
        self, task: int, indices: Indices, batch_size: int, directions: Sequence[Params]
    ) -> Iterator[Pushforward]:
        """Yield each batch's logits of the task's head with their derivatives along directions in parameter space.

        There is no dropout. Batch statistics are part of the function that is differentiated, as they are in
        evaluation; running statistics are constants, and a direction's entries for them have no meaning.
        """


def heads_of(learner: Learner) -> frozenset[str]:
    """Return the names of all heads' parameters."""
    return frozenset[str]().union(*learner.heads)


def weights_of(learner: Learner) -> Params:
    """Return a learner's parameters without running statistics."""
    statistics = learner.running_statistics
    return {name: value for name, value in learner.parameters().items() if name not in statistics}


@contextmanager
def seen_through(learner: Learner, view: View | None) -> Iterator[None]:
    """Let a learner work with a view's effective weights inside the context; with its own ones if there is no view.

    TRGP lets every task work with weights of its own, W + sum_j W B_j (Q_j - I) B_j^T, of which W alone is shared.
    A learner knows of them in training only; whatever else is asked of it about a task is asked in this context.
    PackNet's and HAT's tasks see a part of the weights each, in evaluation alone.
    """
    if view is None or not view.weights:
        yield
        return
    with learner.at(view.effective(learner.parameters())):
        yield


def taps_of_shared_weights(region: Region | None, taps: Taps) -> Taps:
    """Return the taps of a region's shared weights, given those of its effective weights."""
    if region is None or not region.rowwise:
        return taps
    return {
        layer: replace(tap, inputs=region.inputs_beneath(f"{layer}.weight", tap.inputs))
        if f"{layer}.weight" in region.rowwise
        else tap
        for layer, tap in taps.items()
    }


def refresh_statistics(
    learner: Learner, tasks: Sequence[Task], batch_size: int, seed: int, view: View | None = None
) -> None:
    """Estimate a learner's running statistics for its weights; nothing is done if it has none.

    Args:
        learner: whose statistics.
        tasks: whose training images are seen, in a shuffled order.
        batch_size: of the pass; a last batch of one image, which has no statistics, is left out.
        seed: the run's, which with the last task names the order.
        view: what the last task sees of the weights, if it does not see them as they are.
    """
    if not learner.running_statistics:
        return
    rows = np.concatenate([task.train for task in tasks])
    rows = random_generator(seed, "statistics", tasks[-1].index).permutation(rows)
    if len(rows) > 1 and len(rows) % batch_size == 1:
        rows = rows[:-1]
    with seen_through(learner, view):
        statistics = pooled(learner.batch_statistics(rows, batch_size))
    learner.assign(learner.parameters() | statistics)


def pooled(batches: Iterable[tuple[int, Params]]) -> Params:
    """Return the statistics of all batches together, given each one's size and own statistics.

    The mean of all is that of the batches' means; their variance, the mean of the batches' variances plus the variance
    of their means.
    """
    parts = list(batches)
    layers = dict.fromkeys(name.removesuffix(MEAN) for _, part in parts for name in part if name.endswith(MEAN))
    statistics: Params = {}
    for layer in layers:
        runs = [(n, part[layer + MEAN], part[layer + VARIANCE]) for n, part in parts if layer + MEAN in part]
        total = sum(n for n, _, _ in runs)
        mean = sum((n / total * m for n, m, _ in runs[1:]), runs[0][0] / total * runs[0][1])
        spread = [n / total * (v + (m - mean) ** 2) for n, m, v in runs]
        statistics |= {layer + MEAN: mean, layer + VARIANCE: sum(spread[1:], spread[0])}
    return statistics
