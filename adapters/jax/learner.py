"""The learner protocol on JAX: a network as a value, with a head for each task; all arithmetic in compiled functions.

Convention: images stay on the device as uint8 [N, H, W, C] and are normalised there, batch by batch; parameters are
named arrays, and the learner's own are never changed but replaced.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice, takewhile
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from numpy.typing import NDArray

from adapters.jax import compiled
from adapters.jax.dropout import Masks, mask_source
from adapters.jax.heads import HEAD, for_task, head_of, put_back
from adapters.jax.stepping import State, Steps, many_steps, stacked, step
from adapters.networks import (
    Backbone,
    DropoutMasks,
    Linear,
    Tapped,
    checked_masks,
    initial_values,
    is_statistic,
)
from became_core import BecameError
from became_core.arrays import Array, Params, namespace
from became_core.continual import Batch, Constraint, Learner, Optimiser, TapMode, TaskStream, Trained
from became_core.continual.data import Indices
from became_core.curvature import Pushforward, Tap, Taps, logit_cotangents

__all__ = ["JaxLearner"]


class JaxLearner(Learner):
    """A JAX network that learns continually; ``became_core.continual.Learner`` says what each method promises."""

    def __init__(
        self,
        backbone: Backbone,
        stream: TaskStream,
        *,
        device: str | jax.Device | None = None,
        dtype: str = "float32",
        mixed_precision: bool = False,
        dropout_masks: DropoutMasks = "numpy",
        whole_epochs: bool | None = None,
        seed: int = 0,
    ) -> None:
        """Draw the weights of a backbone with a head for each task, and place them and the data on a device.

        Args:
            backbone: what maps images to features: a description, or any hashable value like it.
            stream: the tasks; its images and targets go to the device once.
            device: where all arithmetic happens: a JAX device, or e.g. "cpu", "gpu:1"; JAX's default if not given.
            dtype: of the weights.
            mixed_precision: whether training steps multiply in bfloat16; weights, losses, normalisation, optimiser and
                all that is measured stay in the dtype of the weights.
            dropout_masks: what draws them: "numpy", the same ones for every framework, or the "framework" itself, where
                the network is; a function of the seeds either way.
            whole_epochs: whether an epoch's steps on equal batches of one task run as one program, unless NumPy draws
                masks for them; on accelerators alone if not given.
            seed: names the draw of the initial weights.

        Raises:
            BecameError: if the device or the source of masks does not exist, JAX has no such dtype as it is configured,
                or the backbone does not return [N, features].
        """
        dataset, count = stream.dataset, len(stream.tasks)
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise BecameError(f"JAX has no {dtype} as it is configured; set jax_enable_x64 before any array is made.")
        self._device = _checked_device(device)
        self._dropout_masks = checked_masks(dropout_masks)
        self._whole_epochs = self._device.platform != "cpu" if whole_epochs is None else whole_epochs
        self._backbone = backbone
        images = np.moveaxis(dataset.images, 1, -1)
        width = compiled.output_width(backbone, (2, *images.shape[1:]))
        if width is None:
            raise BecameError("the backbone must map images [N, H, W, C] to features [N, features].")
        heads = [Linear(head_of(task), stream.classes_per_task) for task in range(count)]
        mean, std = (np.multiply(each, 255.0).astype(dtype) for each in (dataset.mean, dataset.std))
        self._data = compiled.Data(*jax.device_put((images, stream.targets, mean, std), self._device))
        namespace(images=self._data.images)  # JAX learns of the core's values
        self._layers: dict[str, Tapped] = {layer.name: layer for layer in (*backbone.tapped, *heads)}
        of_heads = [head.parameters((width,)) for head in heads]
        parameters = dict(backbone.parameters)
        for each in of_heads:
            parameters |= each
        self._names = tuple(parameters)
        self._dtype, self._products = dtype, "bfloat16" if mixed_precision else None
        self._theta: Params = {}
        self.assign(initial_values(seed, parameters))
        self.heads = [frozenset(each) for each in of_heads]
        self.running_statistics = frozenset(filter(is_statistic, backbone.parameters))
        self.projectable = frozenset(f"{layer.name}.weight" for layer in backbone.tapped if layer.kind == "matrix")
        self._linear = frozenset(name for name in self.projectable if len(parameters[name].shape) == 2)

    def parameters(self) -> Params:
        """Return all parameters by canonical name."""
        return dict(self._theta)

    def assign(self, parameters: Params) -> None:
        """Take copies of these values."""
        values = {name: jnp.array(parameters[name], dtype=self._dtype) for name in self._names}
        self._theta = jax.device_put(values, self._device)

    def train(
        self,
        batches: Sequence[Batch],
        rates: NDArray[np.float64],
        constraint: Constraint,
        optimiser: Optimiser,
        stream: np.random.Generator,
    ) -> Trained:
        """Take one step on each batch."""
        masks_of = self._masks(stream)
        region = constraint.region
        scales = {} if region is None else region.scales
        projected_early = constraint.projector_of_gradients(optimiser) is not None
        factored = self._linear & constraint.trainable if projected_early else frozenset[str]()
        static: dict[str, Any] = {"factored": factored, "products": self._products}
        frozen = {name: value for name, value in self._theta.items() if name not in constraint.trainable}
        trained = {name: value for name, value in self._theta.items() if name in constraint.trainable} | scales
        # An update takes the buffers of what it changes, which others may hold.
        trained, optimiser = jax.tree.map(jnp.copy, (trained, optimiser))
        steps = (
            Steps(batch.indices, float(rate), masks_of(number, len(batch.indices)), batch.views)
            for number, (batch, rate) in enumerate(zip(batches, rates, strict=True))
        )
        at_once = self._steps_at_once(batches)
        losses: list[Array] = []
        for task, of_task in groupby(batches, key=lambda batch: batch.task):
            state: State = for_task(trained, task), for_task(optimiser, task)
            own_frozen, respected = for_task(frozen, task), _for_task(constraint, task)
            if at_once:
                state, found = many_steps(
                    self._backbone,
                    state,
                    own_frozen,
                    self._data,
                    stacked(list(islice(steps, at_once)), self._dtype),
                    {name: value for name, value in respected.items() if name != "trains_scales"},
                    trains_scales=constraint.trains_scales,
                    **static,
                )
                losses.append(found)
            for each in islice(steps, len(list(of_task)) - at_once):
                state, loss = step(self._backbone, state, own_frozen, self._data, each, respected, **static)
                losses.append(loss)
            trained, optimiser = put_back(trained, state[0], task), put_back(optimiser, state[1], task)
        self._theta = {name: trained.get(name, value) for name, value in self._theta.items()}
        if region is not None:
            region = region.with_scales({key: trained[key] for key in scales})
        found_losses = np.concatenate([np.ravel(each) for each in jax.device_get(losses)])
        mean_loss = np.average(found_losses, weights=[len(batch.indices) for batch in batches])
        return Trained(float(mean_loss), optimiser, region)

    def logits(self, indices: Indices, batch_size: int) -> Array:
        """Return all heads' logits, [samples, tasks, classes]."""
        heads = [self._theta[name] for head in self.heads for name in head]
        shared = self._shared()
        return jnp.concatenate(
            [
                compiled.all_logits(self._backbone, shared, heads, self._data, rows)
                for rows in _chunks(indices, batch_size)
            ]
        )

    def targets(self, indices: Indices) -> Array:
        """Return the labels within the task, [samples]."""
        return self._data.targets[indices]

    def taps(
        self, task: int, indices: Indices, batch_size: int, mode: TapMode, stream: np.random.Generator
    ) -> Iterator[Taps]:
        """Yield each batch's taps."""
        published = mode == "published"
        masks_of = self._masks(stream) if published else None
        weights = for_task(self._theta, task)
        layers = {layer.name: layer for layer in self._backbone.tapped} | {HEAD: self._layers[head_of(task)]}
        for number, rows in enumerate(_chunks(indices, batch_size)):
            masks = None if masks_of is None else masks_of(number, len(rows))
            logits, map_back, inputs = compiled.taps(self._backbone, weights, self._data, rows, masks)
            if mode == "inputs":
                yield {
                    layer.name: Tap("matrix", inputs[name], inputs[name][:, :, :0], layer.bias)
                    for name, layer in layers.items()
                    if layer.kind == "matrix"
                }
            for at_logits in logit_cotangents(logits, self.targets(rows), mode, stream):
                at_outputs = compiled.pull(map_back, at_logits)
                yield {
                    layer.name: Tap(layer.kind, inputs[name], at_outputs[name], layer.bias)
                    for name, layer in layers.items()
                }

    def pushforward(
        self, task: int, indices: Indices, batch_size: int, directions: Sequence[Params]
    ) -> Iterator[Pushforward]:
        """Yield each batch's logits and their derivatives along directions."""
        weights = for_task(self._theta, task)
        along = [for_task(direction, task) for direction in directions]
        for rows in _chunks(indices, batch_size):
            logits, tangents = compiled.pushforward(self._backbone, weights, self._data, rows, along)
            yield Pushforward(logits, tangents, self.targets(rows))

    def batch_statistics(self, indices: Indices, batch_size: int) -> Iterator[tuple[int, Params]]:
        """Yield each batch's size and statistics."""
        for rows in _chunks(indices, batch_size):
            yield len(rows), compiled.batch_statistics(self._backbone, self._shared(), self._data, rows)

    def _shared(self) -> Params:
        return {name: value for name, value in self._theta.items() if not name.startswith("heads.")}

    def _masks(self, stream: np.random.Generator) -> Callable[[int, int], Masks]:
        return mask_source(self._backbone.masks, stream, by_framework=self._dropout_masks == "framework")

    def _steps_at_once(self, batches: Sequence[Batch]) -> int:
        """Return how many steps, from the first on, run as one program: those on an epoch's equal batches, or none."""
        from_host = self._dropout_masks == "numpy" and len(self._backbone.masks) > 0
        if not self._whole_epochs or from_host or len({batch.task for batch in batches}) > 1:
            return 0
        equal = takewhile(lambda batch: len(batch.indices) == len(batches[0].indices), batches)
        count = len(list(equal))
        return count if count > 1 else 0


def _for_task(constraint: Constraint, task: int) -> dict[str, Any]:
    """Return what an update must respect, by the arguments of ``compiled.update``."""
    penalty = constraint.penalty
    return {
        "projector": constraint.projector,
        "posterior": None if penalty is None else for_task(penalty.posterior, task),
        "strength": 0.0 if penalty is None else penalty.strength,
        "region": for_task(constraint.region, task),
        "trains_scales": constraint.trains_scales,
        "relative": for_task(dict(constraint.relative), task),
    }


def _chunks(indices: Indices, size: int) -> Iterator[Indices]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _checked_device(device: str | jax.Device | None) -> jax.Device:
    if device is None:
        return jax.devices()[0]
    if not isinstance(device, str):
        return device
    platform, _, number = device.partition(":")
    try:
        return jax.devices(platform)[int(number or 0)]
    except (RuntimeError, IndexError, ValueError):
        raise BecameError(f"JAX has no device '{device}' here; try cpu, or cuda on a machine with a GPU.") from None
