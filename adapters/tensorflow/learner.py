"""The learner protocol on TensorFlow: a network that maps images to features, with a head for each task.

Convention: images stay on the device as uint8 [N, H, W, C] and are normalised there, batch by batch; parameters are
named tensors, which never change: a step makes new ones.

Steps and evaluation are compiled by ``tf.function``, without XLA, with which a convolutional network's step takes a
third longer on a CPU. So are taps of one backward pass; those of many share a forward pass, and run eagerly.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from adapters.networks import Backbone, DropoutMasks, Linear, checked_masks, initial_values, is_statistic
from adapters.tensorflow.devices import checked_device, on_device
from adapters.tensorflow.dropout import mask_source
from adapters.tensorflow.layers import Pass
from adapters.tensorflow.stepping import Factors, advanced, loss_and_gradients
from adapters.tensorflow.tapping import collect_taps, input_taps
from became_core import BecameError
from became_core.arrays import Array, Params
from became_core.continual import Batch, Constraint, Learner, Optimiser, TapMode, TaskStream, Trained, Views
from became_core.continual.data import Indices
from became_core.curvature import Pushforward, Taps, logit_cotangents

__all__ = ["TensorFlowLearner"]

T = TypeVar("T")


class TensorFlowLearner(Learner):
    """A TensorFlow network that learns continually; ``became_core.continual.Learner`` says what each method promises.

    Attributes:
        traces: how often the network's part of a step has been traced.
        tap_traces: how often taps of one backward pass have.
    """

    def __init__(
        self,
        backbone: Backbone,
        stream: TaskStream,
        *,
        device: str = "cpu",
        dtype: tf.DType = tf.float32,
        mixed_precision: bool = False,
        dropout_masks: DropoutMasks = "numpy",
        seed: int = 0,
    ) -> None:
        """Place a backbone, with a fresh head for each task, and the stream's data on a device.

        Args:
            backbone: what maps images to features: a description, or any value like it.
            stream: the tasks; its images and targets go to the device once.
            device: where all arithmetic happens, e.g. "cpu", "gpu", "gpu:1".
            dtype: of the weights.
            mixed_precision: whether training steps multiply in bfloat16; weights, losses, normalisation, optimiser and
                all that is measured stay in the dtype of the weights.
            dropout_masks: what draws them: "numpy", the same ones for every framework, or the "framework" itself, where
                the network is; a function of the seeds either way.
            seed: names the draw of the initial weights.

        Raises:
            BecameError: if the device does not exist, there is no such source of masks, or the backbone does not return
                [N, features].
        """
        self.device = checked_device(device)
        self._dropout_masks = checked_masks(dropout_masks)
        dataset = stream.dataset
        self._backbone, self._dtype = backbone, dtype
        self._products = tf.bfloat16 if mixed_precision else None
        self._shared = tuple(backbone.parameters)
        self._head = Linear("head", stream.classes_per_task)
        self._heads = [replace(self._head, name=f"heads.{task}") for task in range(len(stream.tasks))]
        self.heads = [frozenset({f"{head.name}.weight"}) for head in self._heads]
        self.running_statistics = frozenset(filter(is_statistic, backbone.parameters))
        self.projectable = frozenset(f"{layer.name}.weight" for layer in backbone.tapped if layer.kind == "matrix")
        with tf.device(self.device):
            images = np.ascontiguousarray(np.moveaxis(dataset.images, 1, -1))
            self._images = tf.constant(images)
            self._targets = tf.constant(stream.targets)
            self._mean = tf.constant(dataset.mean, dtype) * 255
            self._std = tf.constant(dataset.std, dtype) * 255
            width = _feature_width(backbone, images.shape[1:], dtype)
        parameters = dict(backbone.parameters)
        for head in self._heads:
            parameters |= head.parameters((width,))
        self._theta: Params = dict.fromkeys(parameters)
        self.assign(initial_values(seed, parameters))
        self.traces = self.tap_traces = 0
        self._step_network = tf.function(self._loss_and_gradients, reduce_retracing=True)
        self._step_constraint = tf.function(advanced)
        self._logits_of_heads = tf.function(self._logits_of_all_heads, reduce_retracing=True)
        self._moments = tf.function(self._batch_moments, reduce_retracing=True)
        self._taps_of_one_pass = tf.function(self._first_taps, reduce_retracing=True)
        self._taps_of_inputs = tf.function(self._inputs_seen, reduce_retracing=True)
        self._pushed = tf.function(self._logits_and_tangent, reduce_retracing=True)

    def parameters(self) -> Params:
        """Return all parameters by canonical name."""
        return dict(self._theta)

    def assign(self, parameters: Params) -> None:
        """Set the parameters."""
        with tf.device(self.device):
            self._theta = {name: tf.convert_to_tensor(parameters[name], self._dtype) for name in self._theta}

    def train(
        self,
        batches: Sequence[Batch],
        rates: NDArray[np.float64],
        constraint: Constraint,
        optimiser: Optimiser,
        stream: np.random.Generator,
    ) -> Trained:
        """Take one step on each batch."""
        penalty, region, held = constraint.penalty, constraint.region, self._theta
        posterior, strength = (None, 0.0) if penalty is None else (penalty.posterior, penalty.strength)
        theta = {name: value for name, value in held.items() if name in constraint.trainable}
        effective: Params = {}  # what the network has of the region's weights instead of those beneath
        if region is not None:
            theta |= {name: held[name] for name in region.weights} | region.scales
            effective = region.effective({name: held[name] for name in region.weights})
        with tf.device(self.device):
            total, masks_of = tf.zeros((), self._dtype), self._masks(stream)
            for batch, rate in zip(batches, rates, strict=True):
                seen = self._for_task(batch.task, held | theta | effective)
                masks = masks_of(len(batch.indices))
                loss, *found = self._step_network(seen, batch.indices, masks, batch.views)
                gradients, factors = (self._trained(each, batch.task, constraint) for each in found)
                theta, optimiser, region, effective = self._step_constraint(
                    theta,
                    gradients,
                    factors,
                    tf.constant(rate, self._dtype),
                    optimiser,
                    (constraint.projector, posterior, region),
                    strength,
                    constraint.trains_scales,
                    dict(constraint.relative),
                )
                total += loss
        self._theta = {name: theta.get(name, value) for name, value in held.items()}
        return Trained(float(total) / sum(len(batch.indices) for batch in batches), optimiser, region)

    def logits(self, indices: Indices, batch_size: int) -> Array:
        """Return all heads' logits, [samples, tasks, classes]."""
        with tf.device(self.device):
            return tf.concat(
                [self._logits_of_heads(self._theta, rows) for rows in _chunks(indices, batch_size)], axis=0
            )

    def targets(self, indices: Indices) -> Array:
        """Return the labels within the task, [samples]."""
        with tf.device(self.device):
            return tf.gather(self._targets, indices)

    def taps(
        self, task: int, indices: Indices, batch_size: int, mode: TapMode, stream: np.random.Generator
    ) -> Iterator[Taps]:
        """Yield each batch's taps."""
        return on_device(self.device, self._taps(task, indices, batch_size, mode, stream))

    def pushforward(
        self, task: int, indices: Indices, batch_size: int, directions: Sequence[Params]
    ) -> Iterator[Pushforward]:
        """Yield each batch's logits and their derivatives along directions."""
        return on_device(self.device, self._pushforward(task, indices, batch_size, directions))

    def batch_statistics(self, indices: Indices, batch_size: int) -> Iterator[tuple[int, Params]]:
        """Yield each batch's size and statistics."""
        pairs = ((len(rows), self._moments(self._theta, rows)) for rows in _chunks(indices, batch_size))
        return on_device(self.device, pairs)

    def _taps(
        self, task: int, indices: Indices, batch_size: int, mode: TapMode, stream: np.random.Generator
    ) -> Iterator[Taps]:
        published = mode == "published"
        masks_of = self._masks(stream) if published else None
        theta, head = self._for_task(task, self._theta), self._heads[task].name
        for rows in _chunks(indices, batch_size):
            masks = None if masks_of is None else masks_of(len(rows))
            passes: Iterable[Taps]
            if mode == "inputs":
                passes = [self._taps_of_inputs(theta, rows)]
            elif mode == "true":
                passes = self._passes(theta, rows, masks, mode, stream)
            else:
                drawn = stream.gumbel(size=(len(rows), self._head.outputs)) if mode == "sampled" else None
                passes = [self._taps_of_one_pass(theta, rows, masks, mode, drawn)]
            for taps in passes:
                yield {head if name == self._head.name else name: tap for name, tap in taps.items()}

    def _pushforward(
        self, task: int, indices: Indices, batch_size: int, directions: Sequence[Params]
    ) -> Iterator[Pushforward]:
        theta = self._for_task(task, self._theta)
        along = [self._for_task(task, direction) for direction in directions]
        for rows in _chunks(indices, batch_size):
            pairs = [self._pushed(theta, each, rows) for each in along]
            yield Pushforward(pairs[0][0], tf.stack([tangent for _, tangent in pairs]), self.targets(rows))

    def _for_task(self, task: int, theta: Params) -> Params:
        """Return the shared parameters and the task's head as ``head.weight``: so all tasks have one structure."""
        return {name: theta[name] for name in self._shared} | {"head.weight": theta[f"heads.{task}.weight"]}

    def _trained(self, of_task: Mapping[str, T], task: int, constraint: Constraint) -> dict[str, T]:
        """Return what is of trainable parameters, by their own names."""
        named = {f"heads.{task}.weight" if name == "head.weight" else name: each for name, each in of_task.items()}
        return {name: each for name, each in named.items() if name in constraint.trainable}

    def _batch(self, rows: Array, views: Views | None = None) -> tuple[Array, Array]:
        pixels = tf.gather(self._images, rows)
        if views is not None:
            pixels = views.shown(pixels, axis=1)
        images = (tf.cast(pixels, self._dtype) - self._mean) / self._std
        return images, tf.gather(self._targets, rows)

    def _masks(self, stream: np.random.Generator) -> Callable[[int], Sequence[Array]]:
        """Return what draws the masks of so many samples."""
        return mask_source(self._backbone.masks, stream, by_framework=self._dropout_masks == "framework")

    # What follows is compiled.

    def _loss_and_gradients(
        self, theta: Params, rows: Array, masks: Sequence[Array], views: Views | None
    ) -> tuple[Array, Params, Factors]:
        self.traces += 1
        batch = self._batch(rows, views)
        return loss_and_gradients(self._backbone, self._head, theta, *batch, masks, self._products)

    def _first_taps(
        self, theta: Params, rows: Array, masks: Sequence[Array] | None, mode: TapMode, drawn: Array | None
    ) -> Taps:
        self.tap_traces += 1
        return next(self._passes(theta, rows, masks, mode, _Drawn(drawn)))

    def _passes(
        self, theta: Params, rows: Array, masks: Sequence[Array] | None, mode: TapMode, stream: Any
    ) -> Iterator[Taps]:
        images, targets = self._batch(rows)
        return collect_taps(
            self._backbone,
            self._head,
            theta,
            images,
            lambda logits: logit_cotangents(logits, targets, mode, stream),
            masks=masks,
            constant_statistics=mode != "published",
        )

    def _inputs_seen(self, theta: Params, rows: Array) -> Taps:
        return input_taps(self._backbone, self._head, theta, self._batch(rows)[0])

    def _logits_of_all_heads(self, theta: Params, rows: Array) -> Array:
        features = self._backbone(Pass(theta), self._batch(rows)[0])
        heads = tf.stack([theta[f"{head.name}.weight"] for head in self._heads])
        return tf.einsum("nd,tcd->ntc", features, heads)

    def _batch_moments(self, theta: Params, rows: Array) -> Params:
        moments: Params = {}
        self._backbone(Pass(theta, moments=moments), self._batch(rows)[0])
        return moments

    def _logits_and_tangent(self, theta: Params, direction: Params, rows: Array) -> tuple[Array, Array]:
        with tf.autodiff.ForwardAccumulator(theta, direction) as forward:
            run = Pass(theta)
            logits = run(self._head, self._backbone(run, self._batch(rows)[0]))
        return logits, forward.jvp(logits, unconnected_gradients=tf.UnconnectedGradients.ZERO)


class _Drawn(NamedTuple):
    """What a stream drew, in its place where a function is compiled."""

    noise: Array | None

    def gumbel(self, size: tuple[int, ...]) -> Array | None:
        return self.noise


def _feature_width(backbone: Backbone, image: tuple[int, ...], dtype: tf.DType) -> int:
    """Return the width of a backbone's output, found by one pass of two blank images [H, W, C]."""
    weights = {name: tf.zeros(each.shape, dtype) for name, each in backbone.parameters.items()}
    features = backbone(Pass(weights), tf.zeros((2, *image), dtype))
    if len(features.shape) != 2:
        raise BecameError("the backbone must map images [N, H, W, C] to features [N, features].")
    return int(features.shape[1])


def _chunks(indices: Indices, size: int) -> Iterator[Indices]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
