"""The learner on TensorFlow: what ``adapters.backend`` leaves to a framework, which is derivatives and places.

Convention: as in ``adapters.backend.network``. Steps and evaluation are compiled by ``tf.function``, without XLA, with
which a convolutional network's step takes a third longer on a CPU. So are taps of one backward pass; those of many
share a forward pass, and run eagerly. The network's part of a step has the head as an argument and gives the gradients
by all parameters, so it is traced once for all tasks and methods, and once more for batches of another size. The
constraint's part is a few operations, whose structure is the memory's, so it is traced for each stage. Layers of a
user's model that run as they are have taps by operation, from a pass of their own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import tensorflow as tf

from adapters.backend import Data, Factors, FunctionalLearner, Network, State, Step
from adapters.networks import Backbone, Linear, Record, Tapped
from adapters.tensorflow.derivatives import Derivatives
from adapters.tensorflow.layers import Pass, Patches, with_positions
from adapters.tensorflow.traced import compiled_function
from became_core import BecameError
from became_core.arrays import Array, Params
from became_core.continual import Constraint, TapMode, TaskStream, Views
from became_core.continual.data import Indices
from became_core.curvature import Tap, Taps, inputs_of_uses
from became_core.laplace import is_statistic

__all__ = ["TensorFlowLearner", "TensorFlowNetwork"]

T = TypeVar("T")


class _Drawn(NamedTuple):
    """Stands for a generator of random numbers where a function is compiled: what it drew before."""

    noise: Array | None

    def gumbel(self, size: tuple[int, ...]) -> Array | None:
        return self.noise


class _Compiled:
    """A function of weights, compiled once for heads of each width, and for batches of any size."""

    def __init__(self, function: Callable[..., Any], head: str) -> None:
        self._function, self._head = function, head
        self._of_width: dict[int | None, Any] = {}

    def _for(self, weights: Params) -> Any:
        width = weights[self._head].shape[0] if self._head in weights else None
        if width not in self._of_width:
            self._of_width[width] = compiled_function(self._function, reduce_retracing=True)
        return self._of_width[width]

    def __call__(self, weights: Params, *arguments: Any) -> Any:
        return self._for(weights)(weights, *arguments)

    def get_concrete_function(self, weights: Params, *arguments: Any) -> Any:
        return self._for(weights).get_concrete_function(weights, *arguments)

    def experimental_get_tracing_count(self) -> int:
        return sum(int(function.experimental_get_tracing_count()) for function in self._of_width.values())


class _Logits:
    """A network's logits as a function of its weights, for derivatives that are not by forward mode."""

    def __init__(self, network: Network, names: Sequence[str]) -> None:
        self._network, self._names = network, names

    def in_order(self, theta: Params) -> list[Array]:
        return [theta[name] for name in self._names]

    def run(self, weights: Sequence[Array], inputs: Any) -> Array:
        return self._network.logits(Pass(dict(zip(self._names, weights, strict=True))), inputs)

    def outputs(self, theta: Params, inputs: Any) -> Array:
        return self.run(self.in_order(theta), inputs)


@dataclass(frozen=True, eq=False)
class TensorFlowNetwork(Network):
    """A network with TensorFlow's derivatives."""

    _slower: dict[int, Derivatives] = field(default_factory=dict, init=False, repr=False)  # by classes of the head

    runs: ClassVar = Pass

    def __post_init__(self) -> None:
        """Compile what is worth compiling."""
        object.__setattr__(self, "_updated", compiled_function(super().updated))
        for name in ("_all_gradients", "_one_backward_pass", "_inputs", "_tangent", "all_logits", "batch_statistics"):
            object.__setattr__(self, name, _Compiled(getattr(self, name), f"{self.head.name}.weight"))

    def gradients(
        self, trained: Params, factored: Params, frozen: Params, data: Data, batch: Step
    ) -> tuple[Array, Params, Factors]:
        """Return a batch's mean loss, its gradients, and factors of those by linear layers' weights."""
        wanted = trained | factored
        loss, *gradients = self._all_gradients(wanted | frozen, data, batch.rows, batch.masks, batch.views)
        return loss, *({name: it for name, it in part.items() if name in wanted} for part in gradients)

    def _all_gradients(
        self, weights: Params, data: Data, rows: Array, masks: Sequence[Array], views: Views | None
    ) -> tuple[Array, Params, Factors]:
        """Return a batch's mean loss and its gradients by all weights, those of linear layers as factors."""
        inputs: Params = {}
        outputs: Params = {}
        with tf.GradientTape() as tape:
            tape.watch(weights)

            def record(layer: Tapped, seen: Callable[[], Array], output: Array) -> Array:
                if isinstance(layer, Linear):
                    tape.watch(output)
                    inputs[f"{layer.name}.weight"], outputs[f"{layer.name}.weight"] = seen(), output
                return output

            run = Pass(weights, masks, record=record, products=self.products)
            logits = self.logits(run, data.normalised(rows, views))
            targets = tf.gather(data.targets, rows)
            if self.likelihood.is_plain:
                loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits))
            else:
                loss = self.likelihood.mean_loss(logits, targets)
        others = {name: it for name, it in weights.items() if name not in outputs and not is_statistic(name)}
        gradients, by_outputs = tape.gradient(loss, (others, outputs), unconnected_gradients="zero")
        rows_of = {name: tf.reshape(it, (-1, it.shape[-1])) for name, it in by_outputs.items()}
        return loss, gradients, {name: (rows_of[name], tf.reshape(a, (-1, a.shape[-1]))) for name, a in inputs.items()}

    def updated(
        self, state: State, beneath: Params, gradients: Params, factors: Factors, rate: float, constraint: Constraint
    ) -> State:
        """Return the state after a step along these gradients; compiled as a whole."""
        dtype = next((it.dtype for it in state[0].values()), tf.float32)
        updated: State = vars(self)["_updated"](
            state, beneath, gradients, factors, tf.constant(rate, dtype), constraint
        )
        return updated

    def taps(
        self, weights: Params, data: Data, rows: Array, masks: Any, mode: TapMode, rng: np.random.Generator
    ) -> Iterator[Taps]:
        """Yield the taps of a batch, by operation those of layers that run as they are."""
        own = getattr(self.backbone, "own_layers", None)
        if own is None:
            yield from self._taps_of_layers(weights, data, rows, masks, mode, rng)
            return
        images, head = data.normalised(rows), self.head.name
        shared = {name: value for name, value in weights.items() if name in self.backbone.parameters}
        joined: Mapping[str, Sequence[Array]] = {}
        for taps in self._taps_of_layers(weights, data, rows, masks, mode, rng):
            if mode == "inputs":
                yield taps | own.inputs(shared, images)
                continue
            by_features = tf.matmul(taps[head].output_gradients[:, 0], weights[f"{head}.weight"])
            if mode == "published":
                yield taps | own.of_the_batch(shared, images, masks, by_features)
            else:
                taps_of_own = own.taps(shared, images, by_features, joined)
                joined = joined or inputs_of_uses(taps_of_own)
                yield taps | taps_of_own

    def _taps_of_layers(
        self, weights: Params, data: Data, rows: Array, masks: Any, mode: TapMode, rng: np.random.Generator
    ) -> Iterator[Taps]:
        if mode == "inputs":
            yield self._inputs(weights, data, rows)
        elif mode == "true" or (mode == "sampled" and not self.likelihood.is_plain):
            yield from self._backward_passes(weights, data, rows, masks, mode, rng)
        else:
            noise = (
                rng.gumbel(size=(len(rows), weights[f"{self.head.name}.weight"].shape[0]))
                if mode == "sampled"
                else None
            )
            yield self._one_backward_pass(weights, data, rows, masks, mode, noise)

    def _one_backward_pass(
        self, weights: Params, data: Data, rows: Array, masks: Any, mode: TapMode, noise: Array | None
    ) -> Taps:
        return next(self._backward_passes(weights, data, rows, masks, mode, _Drawn(noise)))

    def _backward_passes(
        self, weights: Params, data: Data, rows: Array, masks: Any, mode: TapMode, rng: Any
    ) -> Iterator[Taps]:
        """Run one forward pass, and a backward pass for each cotangent; yield the taps of each.

        No weight gradient is computed: backward passes stop at outputs.
        """
        layers: list[Tapped] = []
        inputs: list[Array] = []
        outputs: list[Array] = []
        with tf.GradientTape(persistent=True) as tape:

            def record(layer: Tapped, seen: Callable[[], Array], output: Array) -> Array:
                tape.watch(output)
                layers.append(layer)
                outputs.append(output)
                with tape.stop_recording():
                    inputs.append(seen() if layer.kind == "embedding" else with_positions(seen()))
                return output

            logits = self.logits(Pass(weights, masks, mode != "published", record), data.normalised(rows))
        for by_logits in self.likelihood.cotangents(logits, tf.gather(data.targets, rows), mode, rng):
            by_outputs = tape.gradient(logits, outputs, by_logits)
            yield {
                layer.name: Tap(layer.kind, a, with_positions(gradient), layer.bias, size=getattr(layer, "size", 0))
                for layer, a, gradient in zip(layers, inputs, by_outputs, strict=True)
            }

    def _inputs(self, weights: Params, data: Data, rows: Array) -> Taps:
        """Return the taps of the matrices' inputs alone, of convolutions images where they can be."""
        taps: dict[str, Tap] = {}

        def record(layer: Tapped, seen: Callable[[], Array], output: Array) -> Array:
            if isinstance(seen, Patches) and seen.slide_by_one:
                images = tf.transpose(seen.images, (0, 3, 1, 2))
                taps[layer.name] = Tap("window", images, images[:, :0, :0], layer.bias, kernel=seen.kernel)
            elif layer.kind == "matrix":
                a = with_positions(seen())
                taps[layer.name] = Tap("matrix", a, a[:, :, :0], layer.bias)
            return output

        self.logits(Pass(weights, record=record), data.normalised(rows))
        return taps

    def tangents(self, weights: Params, directions: list[Params], data: Data, rows: Array) -> tuple[Array, Array]:
        """Return the logits and their derivatives along directions."""
        width = weights[f"{self.head.name}.weight"].shape[0]
        if width not in self._slower:
            try:
                pairs = [self._tangent(weights, direction, data, rows) for direction in directions]
                return pairs[-1][0], tf.stack([tangent for _, tangent in pairs])
            except Exception:
                if getattr(self.backbone, "own_layers", None) is None:
                    raise
                # Some operation of the user's has no forward-mode derivative.
                self._slower[width] = Derivatives(_Logits(self, list(weights)), "two reverse passes")
        logits: tuple[Array, Array] = self._slower[width].along(weights, directions, data.normalised(rows))
        return logits

    @property
    def way(self) -> str:
        """How ``tangents`` were computed last."""
        return next((slower.way for slower in self._slower.values()), "forward mode")

    def pulled_back(self, weights: Params, data: Data, rows: Array, seed: Array) -> Params:
        """Return the gradients of seed . logits by all weights."""
        with tf.GradientTape() as tape:
            tape.watch(weights)
            logits = self.outputs(weights, data, rows)
        gradients = tape.gradient(logits, weights, tf.constant(seed), unconnected_gradients="zero")
        return {name: tf.convert_to_tensor(gradient) for name, gradient in gradients.items()}

    def _tangent(self, weights: Params, direction: Params, data: Data, rows: Array) -> tuple[Array, Array]:
        with tf.autodiff.ForwardAccumulator(weights, direction) as forward:
            logits = self.logits(Pass(weights), data.normalised(rows))
        return logits, forward.jvp(logits, unconnected_gradients=tf.UnconnectedGradients.ZERO)


class TensorFlowLearner(FunctionalLearner):
    """A TensorFlow network that learns continually."""

    framework: ClassVar = "TensorFlow"
    network: TensorFlowNetwork

    def _find_device(self, name: Any) -> str:
        if name == "auto":
            name = "gpu" if tf.config.list_logical_devices("GPU") else "cpu"
        kind, number = self._parts_of(name.replace("cuda", "gpu"))  # one device option for all backends
        return str(tf.config.list_logical_devices(kind.upper())[number].name)

    def _find_dtype(self, name: Any) -> tf.DType:
        return tf.as_dtype(name)

    def _network(self, backbone: Backbone, head: Linear, mixed_precision: bool) -> TensorFlowNetwork:
        return TensorFlowNetwork(backbone, head, tf.bfloat16 if mixed_precision else None, self.likelihood)

    def _placed(self, array: Any, dtype: Any = None) -> Array:
        with tf.device(self.device):
            return tf.convert_to_tensor(array, dtype)

    def _features_shape(self, backbone: Backbone, image: tuple[int, ...], record: Record) -> Sequence[int] | None:
        weights = {name: tf.zeros(it.shape, self._dtype) for name, it in backbone.parameters.items()}
        samples = tf.zeros((2, *image), tf.int32 if len(image) == 1 else self._dtype)
        return tuple(backbone(Pass(weights, record=record), samples).shape)

    def _framework_masks(self, seed: int) -> Callable[[int, int], Any]:
        generator = tf.random.Generator.from_seed(seed)
        masks = self.network.backbone.masks
        return lambda number, samples: tuple(
            generator.normal((samples, *shape))
            if threshold is None
            else generator.uniform((samples, *shape)) >= threshold / 2**16
            for shape, threshold in masks
        )

    def _build(self, backbone: Backbone, stream: TaskStream, mixed_precision: bool, seed: int) -> None:
        dataset, scaling = stream.dataset, getattr(backbone, "scaling", ())
        if scaling and not (np.equal(dataset.mean, 0).all() and np.allclose(np.multiply(dataset.std, dataset.unit), 1)):
            raise BecameError(
                f"the model scales its images itself, in the layer '{scaling[0]}', and the data set {dataset.name} has "
                f"them normalised before; leave one of the two out: means of 0 and deviations of 1/{dataset.unit:.0f} "
                "leave images as they are."
            )
        for variable in getattr(backbone, "variables", {}).values():
            if tf.as_dtype(variable.dtype) != self._dtype:
                raise BecameError(
                    f"the model's variable '{variable.path}' is of {variable.dtype}, and the learner computes in "
                    f"{self._dtype.name}; give both one dtype, keras.config.set_dtype_policy before the model is made."
                )
        with tf.device(self.device):
            super()._build(backbone, stream, mixed_precision, seed)
            own = getattr(backbone, "own_layers", None)
            if own is not None:
                few = self._data.normalised(np.arange(min(3, len(self._data.images))))
                self.projectable |= own.matrices(self._shared(), few)

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Take one step on each batch."""
        with tf.device(self.device):
            return super().train(*arguments, **options)

    def targets(self, indices: Indices) -> Array:
        """Return the labels within the task, [samples]."""
        with tf.device(self.device):
            return super().targets(indices)

    def _measured(self, items: Iterator[T], training: bool = False) -> Iterator[T]:
        while True:
            with tf.device(self.device):
                item = next(items, None)
            if item is None:
                return
            yield item
