"""A learner in NumPy and float64: a ReLU network with two hidden layers and with every derivative written by hand.

Convention: images are flattened and normalised with the data set's mean and standard deviation. Weights are
[d_out, d_in]. Output gradients are those of each sample's own loss, so a batch's mean gradient is their sum divided by
the batch's size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from became_core.arrays import Params
from became_core.continual import (
    Batch,
    Constraint,
    Learner,
    Optimiser,
    TapMode,
    TaskStream,
    Trained,
    Views,
    random_generator,
)
from became_core.continual.data import Indices, chunks
from became_core.curvature import Pushforward, Tap, Taps
from became_core.projection import Region

__all__ = ["ReferenceLearner", "cropped"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Pass:
    """One forward pass.

    Attributes:
        inputs: the inputs of each layer, [samples, d_in].
        gates: the derivative of each hidden layer's ReLU and dropout, [samples, d_out].
        logits: of the task's head, [samples, classes].
    """

    inputs: list[Array]
    gates: list[Array]
    logits: Array


class ReferenceLearner(Learner):
    """A multi-layer perceptron: fc1 - ReLU - fc2 - ReLU - a head for each task. The heads have no bias."""

    def __init__(
        self,
        stream: TaskStream,
        *,
        hidden: tuple[int, int] = (24, 16),
        bias: bool = False,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Draw the weights (He 2015) and normalise the stream's images once.

        Args:
            stream: the tasks.
            hidden: the widths of the two hidden layers.
            bias: whether the hidden layers have biases; these start at zero.
            dropout: the probability that a hidden unit is dropped in training.
            seed: of the generator that draws the weights.
        """
        dataset = stream.dataset
        self._dataset = dataset
        self._inputs: Array = self._normalised(dataset.images)
        self._targets = stream.targets
        self._bias = bias
        self._dropout = dropout
        self._heads = [f"heads.{task}" for task in range(len(stream.tasks))]
        self.heads = [frozenset({f"{head}.weight"}) for head in self._heads]
        self.projectable = frozenset({"fc1.weight", "fc2.weight"})
        self.running_statistics = frozenset()
        rng = random_generator(seed, "weights")
        self._parameters: dict[str, Array] = {}
        shapes = {"fc1": (hidden[0], self._inputs.shape[1]), "fc2": (hidden[1], hidden[0])}
        shapes |= {head: (len(task.classes), hidden[1]) for head, task in zip(self._heads, stream.tasks, strict=True)}
        for layer, shape in shapes.items():
            self._parameters[f"{layer}.weight"] = rng.normal(scale=np.sqrt(2 / shape[1]), size=shape)
            if bias and layer not in self._heads:
                self._parameters[f"{layer}.bias"] = np.zeros(shape[0])

    def batch_statistics(self, indices: Indices, batch_size: int) -> Iterator[tuple[int, Params]]:
        """Yield nothing: the network has no running statistics."""
        return iter(())

    def parameters(self) -> Params:
        """Return copies of all parameters."""
        return {name: value.copy() for name, value in self._parameters.items()}

    def assign(self, parameters: Params) -> None:
        """Set the parameters to copies of these."""
        self._parameters = {name: np.array(parameters[name], dtype=np.float64) for name in self._parameters}

    def train(
        self,
        batches: Sequence[Batch],
        rates: NDArray[np.float64],
        constraint: Constraint,
        optimiser: Optimiser,
        rng: np.random.Generator,
    ) -> Trained:
        """Take one step on each batch."""
        total, samples, region = 0.0, 0, constraint.region
        theta = self.parameters() | ({} if region is None else dict(region.scales))
        # A diverging run overflows. The loop checks the loss and raises the error, so NumPy need not warn.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            self._work_with(theta, region)
            for batch, rate in zip(batches, rates, strict=True):
                labels = self._targets[batch.indices]
                forward = self._forward(batch.task, batch.indices, rng, batch.views)
                gradients = self._gradients(batch.task, forward, labels)
                trained = {name: value for name, value in gradients.items() if name in constraint.trainable}
                directions, optimiser = constraint.directions(trained, theta, float(rate), optimiser)
                theta = theta | {name: theta[name] - rate * value for name, value in directions.items()}
                region = self._work_with(theta, region)
                total += float(np.sum(_losses(forward.logits, labels)))
                samples += len(labels)
        self.assign(theta)
        return Trained(total / samples, optimiser, region)

    def logits(self, indices: Indices, batch_size: int, heads: slice = slice(None)) -> Array:
        """Return the logits of all heads, or of some, [samples, heads, classes]."""
        widths = [len(self._parameters[f"{head}.weight"]) for head in self._heads]
        logits = np.full((len(indices), len(widths), max(widths)), -np.inf)
        for task, width in enumerate(widths):
            logits[:, task, :width] = self._forward(task, indices).logits
        return logits[:, heads]

    def targets(self, indices: Indices) -> Indices:
        """Return the labels within the task, [samples]."""
        return self._targets[indices]

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
        """Yield each batch's taps; every layer has one position a sample."""
        for rows in chunks(indices, batch_size):
            forward = self._forward(task, rows, rng if mode == "published" else None)
            if mode == "inputs":
                passes = [[a[:, :0] for a in forward.inputs]]
            else:
                seeds = _at_logits(forward.logits, self._targets[rows], mode, rng)
                passes = [self._backward(task, forward, at_logits) for at_logits in seeds]
            inputs = [a[:, None, :] for a in forward.inputs]  # one array for all sets of taps of the batch
            for gradients in passes:
                yield {
                    layer: Tap("matrix", a, g[:, None, :], has_bias=f"{layer}.bias" in self._parameters)
                    for layer, a, g in zip(self._layers(task), inputs, gradients, strict=True)
                }

    def pushforward(
        self, task: int, indices: Indices, batch_size: int, directions: Sequence[Params]
    ) -> Iterator[Pushforward]:
        """Yield each batch's logits and their derivatives along directions."""
        for rows in chunks(indices, batch_size):
            forward = self._forward(task, rows)
            tangents = np.stack([self._tangent(task, forward, direction) for direction in directions])
            yield Pushforward(forward.logits, tangents, self._targets[rows])

    def jacobian(self, task: int, indices: Indices, names: Sequence[str]) -> Array:
        """Return the derivative of a task's logits by every single entry of these parameters, [samples, classes, d]."""
        theta, columns = self.parameters(), []
        for name in names:
            for entry in range(theta[name].size):
                unit = {other: np.zeros_like(value) for other, value in theta.items()}
                unit[name].flat[entry] = 1.0
                (batch,) = self.pushforward(task, indices, len(indices), [unit])
                columns.append(batch.tangents[0])
        return np.stack(columns, axis=2)

    def _tangent(self, task: int, forward: _Pass, direction: Params) -> Array:
        """Return the derivative of the logits along a direction, [samples, classes]."""
        tangent = np.zeros_like(forward.inputs[0])
        for layer, a, gate in zip(self._layers(task), forward.inputs, [*forward.gates, 1.0], strict=True):
            tangent = tangent @ self._parameters[f"{layer}.weight"].T + a @ direction[f"{layer}.weight"].T
            if f"{layer}.bias" in self._parameters:
                tangent = tangent + direction[f"{layer}.bias"]
            tangent = tangent * gate
        return tangent

    def _layers(self, task: int) -> tuple[str, str, str]:
        return ("fc1", "fc2", self._heads[task])

    def _normalised(self, images: NDArray[np.uint8]) -> Array:
        channel = (1, -1, 1, 1)
        mean, std = np.reshape(self._dataset.mean, channel), np.reshape(self._dataset.std, channel)
        return np.asarray((images / self._dataset.unit - mean) / std).reshape(len(images), -1)

    def _forward(
        self, task: int, rows: Indices, rng: np.random.Generator | None = None, views: Views | None = None
    ) -> _Pass:
        """Run the network: with dropout if there is a generator, on augmented images if there are views."""
        seen = self._inputs[rows] if views is None else self._normalised(cropped(self._dataset.images[rows], views))
        inputs, gates = [seen], []
        for layer in self._layers(task)[:2]:
            z = inputs[-1] @ self._parameters[f"{layer}.weight"].T + self._parameters.get(f"{layer}.bias", 0.0)
            gate = (z > 0).astype(np.float64)
            if rng is not None and self._dropout > 0:
                gate = gate * (rng.random(z.shape) >= self._dropout) / (1 - self._dropout)
            gates.append(gate)
            inputs.append(z * gate)
        return _Pass(inputs, gates, inputs[-1] @ self._parameters[f"{self._heads[task]}.weight"].T)

    def _backward(self, task: int, forward: _Pass, at_head: Array) -> list[Array]:
        """Return the gradients with respect to each layer's outputs, [samples, d_out], given those at the logits."""
        _, fc2, head = self._layers(task)
        at_fc2 = at_head @ self._parameters[f"{head}.weight"] * forward.gates[1]
        at_fc1 = at_fc2 @ self._parameters[f"{fc2}.weight"] * forward.gates[0]
        return [at_fc1, at_fc2, at_head]

    def _gradients(self, task: int, forward: _Pass, labels: Indices) -> dict[str, Array]:
        """Return the gradient of the batch's mean loss with respect to every parameter that it depends on."""
        gradients = {}
        output_gradients = self._backward(task, forward, _loss_gradient(forward.logits, labels))
        for layer, a, g in zip(self._layers(task), forward.inputs, output_gradients, strict=True):
            gradients[f"{layer}.weight"] = g.T @ a / len(a)
            if f"{layer}.bias" in self._parameters:
                gradients[f"{layer}.bias"] = g.sum(axis=0) / len(a)
        return gradients

    def _work_with(self, theta: Params, region: Region | None) -> Region | None:
        """Assign the weights, or, in a region, the effective weights; return the region with the scales in theta."""
        if region is not None:
            region = region.with_scales({key: theta[key] for key in region.scales})
            theta = region.effective(theta)
        self.assign(theta)
        return region


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _loss_gradient(logits: Array, labels: Indices) -> Array:
    """Return the gradient of each sample's cross-entropy with respect to its logits: p - e_label."""
    return np.exp(_log_softmax(logits)) - np.eye(logits.shape[1])[labels]


def _at_logits(logits: Array, labels: Indices, mode: TapMode, rng: np.random.Generator) -> Iterator[Array]:
    """Yield the gradients at the logits from which a mode's backward passes start."""
    p = np.exp(_log_softmax(logits))
    if mode == "true":
        for label in range(logits.shape[1]):
            yield np.sqrt(p[:, [label]]) * _loss_gradient(logits, np.full(len(logits), label))
    elif mode == "logit":
        yield np.eye(logits.shape[1])[labels]
    elif mode == "sampled":
        sampled = (np.log(p) + rng.gumbel(size=logits.shape)).argmax(axis=1)  # a draw from p, by the Gumbel-max trick
        yield _loss_gradient(logits, sampled)
    else:
        yield _loss_gradient(logits, logits.argmax(axis=1) if mode == "published" else labels)


def _losses(logits: Array, labels: Indices) -> Array:
    return -_log_softmax(logits)[np.arange(len(labels)), labels]


def cropped(images: NDArray[np.uint8], views: Views) -> NDArray[np.uint8]:
    """Return images [N, C, H, W], padded with black, then cropped and flipped as the views say."""
    height, width = images.shape[2:]
    border = int(np.abs(views.offsets).max())
    padded = np.pad(images, ((0, 0), (0, 0), (border, border), (border, border)))
    crops = []
    for image, (down, right), flip in zip(padded, views.offsets, views.flips, strict=True):
        crop = image[:, border + down : border + down + height, border + right : border + right + width]
        crops.append(crop[:, :, ::-1] if flip else crop)  # from left to right
    return np.stack(crops)
