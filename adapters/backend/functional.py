"""Learners whose network is a pure function of its weights, as JAX's and TensorFlow's are.

The framework adds a ``Network`` with the derivatives, and how data and parameters are placed on a device.

Convention: images lie on the device as the data set has them and are normalised there, batch by batch; parameters are
named arrays.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice, takewhile
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.backend.checking import LearnerView, NetworkView
from adapters.backend.heads import Heads
from adapters.backend.learner import NetworkLearner
from adapters.backend.network import Data, Network, State, Step
from adapters.networks import (
    Architecture,
    Backbone,
    BatchNorm,
    Linear,
    Record,
    draw_masks,
    initial_values,
)
from became_core.arrays import Array, Params, namespace, on_host
from became_core.continual import Batch, Constraint, Optimiser, TapMode, TaskStream, Trained
from became_core.continual.data import Indices
from became_core.curvature import Taps
from became_core.laplace import is_statistic

__all__ = ["FunctionalLearner"]


class FunctionalLearner(NetworkLearner):
    """A learner whose network is a pure function of its weights; parameters are never changed but replaced.

    Attributes:
        network: the backbone and a head.
    """

    network: Network

    # What a framework adds.

    @abstractmethod
    def _network(self, backbone: Backbone, head: Linear, mixed_precision: bool) -> Network:
        """Return the network with the framework's derivatives."""

    @abstractmethod
    def _placed(self, array: Any, dtype: Any = None) -> Array:
        """Return an array of the framework on the device, a copy if need be."""

    @abstractmethod
    def _features_shape(self, backbone: Backbone, image: tuple[int, ...], record: Record) -> Sequence[int] | None:
        """Return the shape of a backbone's features of two images [H, W, C]; None if they are no array."""

    @abstractmethod
    def _framework_masks(self, seed: int) -> Callable[[int, int], Any]:
        """Return what the framework draws the masks of a batch from, by its number and its samples."""

    def _scale(self, values: Sequence[float], unit: float) -> Array:
        """Return the mean or standard deviation of the channels in the unit of images, in the dtype of the weights."""
        return self._placed(values, self._dtype) * unit

    def _steps(
        self, state: State, frozen: Params, constraint: Constraint, steps: Iterator[Step], equal: int
    ) -> tuple[State, list[Array]]:
        """Take steps of one task; return the state after them, and their mean losses.

        Args:
            state: before the first.
            frozen: the parameters that are not trained.
            constraint: what every step must respect.
            steps: in order, each made when it is asked for.
            equal: how many, from the first on, have batches of one size, if these are all batches of the call.
        """
        losses = []
        for step in steps:
            state, loss = self.network.step(state, frozen, self._data, step, constraint)
            losses.append(loss)
        return state, losses

    # What is shared.

    def _build(self, backbone: Backbone, stream: TaskStream, mixed_precision: bool, seed: int) -> None:
        dataset = stream.dataset
        images = np.ascontiguousarray(dataset.images if dataset.is_text else np.moveaxis(dataset.images, 1, -1))
        self._data = Data(
            self._placed(images),
            self._placed(stream.targets, None if self.likelihood.has_labels else self._dtype),
            *(self._scale(values, dataset.unit) for values in (dataset.mean, dataset.std)),
        )

        def look(layer: Any, inputs: Any, output: Array) -> Array:  # noqa: ARG001 - a record's signature
            if isinstance(layer, BatchNorm):
                self.mixes_samples |= not layer.running
                if prod(output.shape[1:-1]) == 1:
                    self._normalises_over_samples(layer.running)
            return output

        features = self._check_features(self._features_shape(backbone, images.shape[1:], look), dataset.predicts_bytes)
        features -= backbone.beside if isinstance(backbone, Architecture) else 0
        self.naming = Heads.beside(backbone.parameters, shared=stream.shared_head)
        head = Linear(self.naming.one, max(len(task.classes) for task in stream.tasks))
        self.network = self._network(backbone, head, mixed_precision)
        parameters = dict(backbone.parameters)
        for task in stream.tasks:
            parameters |= Linear(self.naming.name(task.index), len(task.classes)).parameters((features,))
        self.running_statistics = frozenset(filter(is_statistic, backbone.parameters))
        self.projectable = self.network.matrices | ({f"{head.name}.weight"} if stream.shared_head else set())
        self._theta: Params = dict.fromkeys(parameters)
        self.assign(initial_values(seed, parameters) | getattr(backbone, "initial", {}))

    def parameters(self) -> Params:
        """Return all parameters by canonical name."""
        return dict(self._theta)

    def assign(self, parameters: Params) -> None:
        """Take copies of these values."""
        self._theta = {name: self._placed(parameters[name], self._dtype) for name in self._theta}

    def train(
        self,
        batches: Sequence[Batch],
        rates: NDArray[np.float64],
        constraint: Constraint,
        optimiser: Optimiser,
        rng: np.random.Generator,
    ) -> Trained:
        """Take one step on each batch."""
        masks_of, region = self._masks(rng), constraint.region
        frozen = {name: value for name, value in self._theta.items() if name not in constraint.trainable}
        trained = {name: value for name, value in self._theta.items() if name in constraint.trainable}
        trained |= {} if region is None else region.scales
        trained, optimiser = self._own((trained, optimiser))
        steps = (
            Step(batch.indices, float(rate), masks_of(number, len(batch.indices)), batch.views)
            for number, (batch, rate) in enumerate(zip(batches, rates, strict=True))
        )
        losses: list[Array] = []
        for task, group in groupby(batches, key=lambda batch: batch.task):
            sizes = [len(batch.indices) for batch in group]
            equal = sum(1 for _ in takewhile(sizes[0].__eq__, sizes))
            state, of_task = self._steps(
                self.naming.for_task((trained, optimiser), task),
                self.naming.for_task(frozen, task),
                self.naming.for_task(constraint, task),
                islice(steps, len(sizes)),
                equal if len(sizes) == len(batches) else 0,
            )
            losses += of_task
            trained, optimiser = self.naming.put_back((trained, optimiser), state, task)
        self._theta = {name: trained.get(name, value) for name, value in self._theta.items()}
        if region is not None:
            region = region.with_scales({key: trained[key] for key in region.scales})
        means = np.concatenate([np.ravel(on_host(loss)) for loss in losses])
        return Trained(float(np.average(means, weights=[len(batch.indices) for batch in batches])), optimiser, region)

    def _view(self, rows: Indices) -> NetworkView:
        weights = self.naming.for_task(self._theta, 0)
        return LearnerView(self.network, weights, self._data, rows, self.mixes_samples, self.running_statistics)

    def _own(self, state: State) -> State:
        """Return a state whose arrays steps may overwrite, for frameworks whose steps do so."""
        return state

    def _draws(self) -> bool:
        return len(self.network.backbone.masks) > 0

    def _masks(self, rng: np.random.Generator) -> Callable[[int, int], Any]:
        seed = int(rng.integers(2**63))  # drawn in any case, so that the masks are the same in all adapters
        if self._masks_by_framework:
            return self._framework_masks(seed)
        return lambda number, samples: draw_masks(self.network.backbone.masks, samples, rng)

    def _shared(self) -> Params:
        """Return the parameters that are no head's."""
        return {name: value for name, value in self._theta.items() if not self.naming.has(name)}

    def _logits_of_text(self, text: NDArray[np.uint8]) -> Array:
        return self._logits_in(self._data._replace(images=self._placed(text)), np.arange(len(text)))

    def logits(self, indices: Indices, batch_size: int, heads: slice = slice(None)) -> Array:
        """Return the logits of all heads, or of some, [samples, heads, classes]."""
        # All are computed, since what is compiled is compiled anew for another number of heads.
        logits = super().logits(indices, batch_size)
        return logits if heads == slice(None) else logits[:, heads, ...]

    def _logits(self, rows: Indices, heads: slice) -> Array:
        """Return those of all heads, which ``logits`` takes apart once for all batches."""
        return self._logits_in(self._data, rows)

    def _logits_in(self, data: Data, rows: Indices) -> Array:
        names = [f"{self.naming.one}.weight"] if self.shares_head else [name for head in self.heads for name in head]
        heads = [self._theta[name] for name in names]
        return self.network.all_logits(self._shared(), heads, data, rows)

    def targets(self, indices: Indices) -> Array:
        """Return the labels within the task [samples], or numbers [samples, outputs]."""
        return namespace(targets=self._data.targets).take(self._data.targets, indices, axis=0)

    def _taps(self, task: int, rows: Indices, mode: TapMode, rng: np.random.Generator, masks: Any) -> Iterator[Taps]:
        weights, head = self.naming.for_task(self._theta, task), self.naming.one
        for taps in self.network.taps(weights, self._data, rows, masks, mode, rng):
            yield {self.naming.name(task) if layer == head else layer: tap for layer, tap in taps.items()}

    def _tangents(self, task: int, rows: Indices, directions: Sequence[Params]) -> tuple[Array, Array]:
        along = [self.naming.for_task(direction, task) for direction in directions]
        return self.network.tangents(self.naming.for_task(self._theta, task), along, self._data, rows)

    def _batch_statistics(self, rows: Indices) -> Iterator[Params]:
        yield self.network.batch_statistics(self._shared(), self._data, rows)
