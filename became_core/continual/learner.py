"""The base class of learners, which is all that an adapter must implement, and functions for any learner.

A learner has a network, and places a data set on its device once. It knows nothing about methods and schedules; of a
task it knows only its head. Parameters are named arrays of the learner's framework. All random numbers come from the
generators that the learner is given.

The running statistics of a normalisation layer are a function of the weights and of the images that were learned last.
They are not exponential averages over training. Instead they are estimated for the present weights in one pass over the
training images, so they are exact, the same on every backend, and available for merged weights too; this is usual after
averaging weights (Izmailov et al., UAI 2018). theta_gp, theta_hat and the best model of a stage therefore have
statistics of their own. Gradients, optimisers, projectors, penalties, curvature and delta do not include them.

Convention: the statistics of a layer are ``NAME.running_mean`` and ``NAME.running_var``. They are the mean and the
biased variance of the layer's inputs over all images, when the layers before it normalise by each batch's own
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
from became_core.continual.share import Share
from became_core.continual.step import Constraint, Optimiser, Trained
from became_core.curvature import Categorical, Likelihood, Pushforward, TapMode, Taps
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
    """The samples of one training step. All are of one task, because a head and batch statistics belong to one task.

    Attributes:
        task: the number of the task, and of its head.
        indices: the rows of the data set.
        views: the crop and flip of each image; None for the original images.
    """

    task: int
    indices: Indices
    views: Views | None = None


class Learner(ABC):
    """A network on a device, with the data that it learns from.

    Attributes:
        heads: for each task, the names of the parameters that are its own; none if all tasks share a head, whose
            weight is then a shared one, and projectable.
        shared_head: the names of the parameters of the head that all tasks share; empty if every task has its own.
        projectable: the names of the shared weights that taps describe as matrices, which a projector can protect.
        running_statistics: the names of those entries of ``parameters`` that are running statistics of normalisation
            layers and not weights. The network uses them except in training and in taps of the mode "published". Only
            ``assign`` changes them.
        constants: the names of those entries of ``parameters`` that are neither: weights that the user has frozen, and
            what layers store besides weights, which a training step may change. They are part of a run's state, and
            no optimiser, projector, penalty, curvature or merge includes them.
        least_batch: how few samples a step of training can have; 2 if a layer normalises by statistics over samples
            alone, because a single sample has none.
        mixes_samples: whether the logits of a sample depend on the other samples of its batch in evaluation too, as
            with batch norm by the batch's own statistics.
        share: what this process does of the work, if several share it: of a training step's batch its samples, and of
            what is measured its batches.
        likelihood: what the outputs of the heads, which are called logits throughout, say of the targets.
        target_scale: as of ``TaskStream``.
        unit: in which runs are measured, as of ``TaskStream``.
    """

    heads: Sequence[frozenset[str]]
    projectable: frozenset[str]
    running_statistics: frozenset[str]
    shared_head: frozenset[str] = frozenset()
    constants: frozenset[str] = frozenset()
    least_batch: int = 1
    likelihood: Likelihood = Categorical()
    target_scale: float = 1.0
    unit: str = "%"
    mixes_samples: bool = False
    share: Share = Share()

    @property
    def shares_head(self) -> bool:
        """Whether all tasks share a head."""
        return not any(self.heads)

    @abstractmethod
    def parameters(self) -> Params:
        """Return all parameters by their canonical names; later training does not change the returned arrays."""

    @abstractmethod
    def assign(self, parameters: Params) -> None:
        """Set all parameters."""

    @contextmanager
    def at(self, theta: Params) -> Iterator[None]:
        """Set parameters inside the context, and restore the learner's own ones after it.

        Args:
            theta: by name; a parameter that is missing keeps its value.
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
        """Take one step on the mean loss of each batch; ``Constraint.directions`` computes its direction.

        Args:
            batches: the batches, in the order of the steps.
            rates: the learning rate of each step.
            constraint: what every step must respect.
            optimiser: what ``initial`` returned for the parameters that are trained, or what an earlier call returned.
            rng: the generator that dropout is drawn from.
        """

    @abstractmethod
    def logits(self, indices: Indices, batch_size: int, heads: slice = slice(None)) -> Array:
        """Return the logits of all heads, or of some, [samples, heads, classes], batch by batch and without dropout.

        There is a head for each task, or one if the tasks share it. The logits of text are [samples, heads, length,
        classes].

        ``became_core.continual.data.chunks`` says which samples come together. A task with fewer classes than others
        has -inf for the classes that it lacks.

        Args:
            indices: the rows of the data set.
            batch_size: how many rows a batch has.
            heads: which heads; all by default. Only of these need logits be computed.
        """

    def written(self, task: Task, rng: np.random.Generator) -> str:
        """Return what the network makes in the manner of a task: text, or the address of a picture; empty if neither.

        Text goes on after the beginning of the task's first test sample. A picture is ``data:image/png;base64,...``:
        some of the task's test samples, what the network makes of them, and what it draws from its prior.

        Args:
            task: whose text or pictures it begins with.
            rng: the generator that each byte is drawn from.
        """
        return ""

    @abstractmethod
    def batch_statistics(self, indices: Indices, batch_size: int) -> Iterator[tuple[int, Params]]:
        """Yield each batch's size, and its mean and biased variance for every layer that has running statistics.

        They have the names of the running statistics. They are computed without dropout, while every layer normalises
        by the batch's own statistics. If a layer runs several times in one pass, each later run is yielded separately,
        with the batch's size again.
        """

    @abstractmethod
    def targets(self, indices: Indices) -> Array:
        """Return the targets of these rows, on the device of the logits.

        They are labels within the task, integers [samples], or of text by token [samples, L]; or, if they are no
        labels, numbers [samples, outputs].
        """

    @abstractmethod
    def taps(
        self,
        task: int,
        indices: Indices,
        batch_size: int,
        mode: TapMode,
        rng: np.random.Generator,
        *,
        own: bool = False,
    ) -> Iterator[Taps]:
        """Yield the taps of each batch, of all layers that the task's loss depends on.

        There is one set of taps for each batch, in the order of the batches. In the mode "true" a batch has as many
        sets as the task has classes, one after the other, which share the arrays of their inputs: by that, Kronecker
        factors count these once. ``became_core.curvature.TapMode`` defines the modes.

        Args:
            task: the number of the task, and of its head.
            indices: the rows of the data set.
            batch_size: how many rows a batch has, as ``chunks`` divides them.
            mode: the gradients with which backward passes begin.
            rng: the generator that the modes "sampled" and "published" draw from.
            own: whether batches that are not this process's own, by ``share``, are left out. What they draw is drawn.
        """

    @abstractmethod
    def pushforward(
        self, task: int, indices: Indices, batch_size: int, directions: Sequence[Params]
    ) -> Iterator[Pushforward]:
        """Yield each own batch's logits of the task's head, and their derivatives along directions in parameter space.

        There is no dropout. If the network uses batch statistics in evaluation, they are differentiated. Running
        statistics are constants, and entries of a direction for them have no effect.

        Args:
            task: the number of the task, and of its head.
            indices: the rows of the data set.
            batch_size: how many rows a batch has, as ``chunks`` divides them.
            directions: K directions, each by parameter.
        """


def heads_of(learner: Learner) -> frozenset[str]:
    """Return the names of the parameters of all heads."""
    return frozenset[str]().union(*learner.heads)


def weights_of(learner: Learner) -> Params:
    """Return a learner's parameters without its running statistics and its constants."""
    others = learner.running_statistics | learner.constants
    return {name: value for name, value in learner.parameters().items() if name not in others}


@contextmanager
def seen_through(learner: Learner, view: View | None) -> Iterator[None]:
    """Set a learner's parameters to the effective weights of a view inside the context; do nothing if there is no view.

    A learner applies a region in training alone. Whatever else it computes for a task that has a view is computed in
    this context: with TRGP, for example, a task works with the effective weights W + sum_j W B_j (Q_j - I) B_j^T.
    """
    if view is None or not view.weights:
        yield
        return
    with learner.at(view.effective(learner.parameters())):
        yield


def taps_of_shared_weights(region: Region | None, batches: Iterable[Taps]) -> Iterator[Taps]:
    """Yield the taps of a region's shared weights, given those of its effective weights.

    The sets of taps of one batch share the array of their inputs; they then share the array that it is turned into.
    """
    latest: dict[str, tuple[Array, Array]] = {}
    for taps in batches:
        beneath = dict(taps)
        for layer, tap in taps.items():
            name = tap.weight_name(layer)
            if region is not None and name in region.rowwise:
                if layer not in latest or latest[layer][0] is not tap.inputs:
                    latest[layer] = tap.inputs, region.inputs_beneath(name, tap.inputs)
                beneath[layer] = replace(tap, inputs=latest[layer][1])
        yield beneath


def refresh_statistics(
    learner: Learner, tasks: Sequence[Task], batch_size: int, seed: int, view: View | None = None
) -> None:
    """Estimate a learner's running statistics for its present weights; do nothing if it has none.

    Args:
        learner: the learner, whose running statistics are set.
        tasks: the tasks whose training images are used, in a random order.
        batch_size: how many images a batch has.
        seed: the seed of the run; the order depends on it and on the last task.
        view: the view that the last task has, if any.
    """
    if not learner.running_statistics:
        return
    rows = np.concatenate([task.train for task in tasks])
    rows = random_generator(seed, "statistics", tasks[-1].index).permutation(rows)
    with seen_through(learner, view):
        statistics = pooled(learner.batch_statistics(rows, batch_size))
    learner.assign(learner.parameters() | statistics)


def pooled(batches: Iterable[tuple[int, Params]]) -> Params:
    """Return the statistics over the images of all batches.

    The mean is the mean of the batches' means. The variance is the mean of the batches' variances plus the variance of
    their means. Batches count by their sizes.

    Args:
        batches: the size and the statistics of each batch, as ``Learner.batch_statistics`` yields them.

    Examples:
        >>> first = {"bn.running_mean": 0.0, "bn.running_var": 1.0}
        >>> pooled([(1, first), (1, first | {"bn.running_mean": 2.0})])
        {'bn.running_mean': 1.0, 'bn.running_var': 2.0}
    """
    parts = list(batches)
    layers = dict.fromkeys(name.removesuffix(MEAN) for _, part in parts for name in part if name.endswith(MEAN))
    statistics: Params = {}
    for layer in layers:
        runs = [(n, part[layer + MEAN], part[layer + VARIANCE]) for n, part in parts if layer + MEAN in part]
        total = sum(n for n, _, _ in runs)
        mean = sum((n / total * m for n, m, _ in runs[1:]), runs[0][0] / total * runs[0][1])
        # The squares are of differences from the mean; E[x^2] - E[x]^2 would cancel where the variance is small.
        squares = [n / total * (v + (m - mean) ** 2) for n, m, v in runs]
        statistics |= {layer + MEAN: mean, layer + VARIANCE: sum(squares[1:], squares[0])}
    return statistics
