"""The learner on JAX: what ``adapters.backend`` leaves to a framework, which is derivatives and places.

Convention: as in ``adapters.backend.network``; all arithmetic is in compiled functions. The network is static and all
else an argument, so gradients are compiled once for each batch size and for each set of trained parameters, whatever
the task. An update is compiled for each structure of constraint and optimiser, apart from the network, which is what
takes long to compile; products of factors are compiled for each batch size and each rank.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, ClassVar

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adapters.backend import Data, Factors, FunctionalLearner, Network, State, Step
from adapters.jax.layers import Pass
from adapters.jax.mesh import shared, warn_of_size, warn_of_threads, whole, with_automatic_axes
from adapters.networks import Backbone, Linear, Record, Tapped
from became_core import BecameError
from became_core.arrays import Array, Params, namespace, on_host
from became_core.continual import Batch, Constraint, TapMode, Trained, Views
from became_core.curvature import Tap, Taps

__all__ = ["JaxLearner", "JaxNetwork"]


@dataclass
class _Recorder:
    """Adds perturbations to the layers' outputs, and keeps those and the layers' inputs, [N, positions, d] each.

    Attributes:
        perturbations: by the layer's name; the gradient by one is that by the layer's output.
        layers: the names of the layers that it looks at; all if None.
    """

    perturbations: Params
    layers: Container[str] | None = None
    inputs: Params = field(default_factory=dict)
    outputs: Params = field(default_factory=dict)

    def __call__(self, layer: Tapped, inputs: Callable[[], Array], output: Array) -> Array:
        if self.layers is not None and layer.name not in self.layers:
            return output
        seen = inputs()
        is_text = layer.kind == "embedding"  # then inputs are tokens [N, L]
        self.inputs[layer.name] = seen if is_text else seen.reshape(seen.shape[0], -1, seen.shape[-1])
        self.outputs[layer.name] = output.reshape(output.shape[0], -1, output.shape[-1])
        perturbation = self.perturbations.get(layer.name)
        return output if perturbation is None else output + perturbation.reshape(output.shape)


def _zeros(run: Callable[[], _Recorder]) -> Params:
    """Return perturbations that change nothing, of all outputs that are recorded in a run."""
    outputs = jax.eval_shape(lambda: run().outputs)
    return {name: jnp.zeros(output.shape, output.dtype) for name, output in outputs.items()}


@dataclass(frozen=True)
class JaxNetwork(Network):
    """A network with JAX's derivatives; its masks of dropout are arrays, or a key that they are drawn from.

    Attributes:
        mesh: the devices that share each batch along the axis "data"; None for one device.
    """

    mesh: Mesh | None = None

    runs: ClassVar = Pass

    def images(self, data: Data, rows: Array, views: Views | None = None) -> Array:
        """Return the network's input; each device has some of the samples, or all if their number does not divide."""
        return shared(super().images(data, rows, views), self.mesh)

    def _masks(self, masks: Any, samples: int) -> tuple[Array, ...]:
        """Return the masks of a batch, which are drawn here if a key is given."""
        if isinstance(masks, tuple):
            return masks
        keys = (jax.random.fold_in(masks, place) for place in range(len(self.backbone.masks)))
        return tuple(
            jax.random.normal(key, (samples, *shape))
            if threshold is None
            else jax.random.bits(key, (samples, *shape), "uint16") >= threshold
            for key, (shape, threshold) in zip(keys, self.backbone.masks, strict=True)
        )

    def _gradients(
        self, trained: Params, factored: Params, frozen: Params, data: Data, batch: Step
    ) -> tuple[Array, Params, Factors]:
        images, targets = self.images(data, batch.rows, batch.views), data.targets[batch.rows]
        masks = self._masks(batch.masks, len(batch.rows))
        linear = [name.removesuffix(".weight") for name in factored]

        def loss(trained: Params, perturbations: Params) -> tuple[Array, _Recorder]:
            recorder = _Recorder(perturbations, linear)
            run = Pass(frozen | factored | trained, masks, record=recorder, products=self.products)
            outputs = self.logits(run, images)
            if not self.likelihood.is_plain:
                return self.likelihood.mean_loss(outputs, targets), recorder
            log_likelihoods = jax.nn.log_softmax(outputs)
            return -jnp.take_along_axis(log_likelihoods, targets[:, None], axis=1).mean(), recorder

        def loss_and_inputs(trained: Params, perturbations: Params) -> tuple[Array, Params]:
            value, recorder = loss(trained, perturbations)
            return value, recorder.inputs

        zeros = _zeros(lambda: loss(trained, {})[1]) if linear else {}
        differentiated = jax.value_and_grad(loss_and_inputs, argnums=(0, 1), has_aux=True)
        (value, inputs), (gradients, by_outputs) = differentiated(trained, zeros)
        factors = {
            f"{name}.weight": (by_outputs[name].reshape(-1, by_outputs[name].shape[-1]), a.reshape(-1, a.shape[-1]))
            for name, a in inputs.items()
        }
        return *whole((value, gradients), self.mesh), factors

    def _backward(self, weights: Params, data: Data, rows: Array, masks: Any) -> tuple[Array, Any, Params]:
        """Return the logits, the map from gradients by them to those by all layers' outputs, and all layers' inputs."""
        images = self.images(data, rows)
        masks = None if masks is None else self._masks(masks, len(rows))

        def logits(perturbations: Params) -> tuple[Array, _Recorder]:
            recorder = _Recorder(perturbations)
            return self.logits(Pass(weights, masks, masks is None, recorder), images), recorder

        def logits_and_inputs(perturbations: Params) -> tuple[Array, Params]:
            outputs, recorder = logits(perturbations)
            return outputs, recorder.inputs

        outputs, backward, inputs = jax.vjp(logits_and_inputs, _zeros(lambda: logits({})[1]), has_aux=True)
        return whole(outputs, self.mesh), backward, inputs

    def taps(
        self, weights: Params, data: Data, rows: Array, masks: Any, mode: TapMode, rng: np.random.Generator
    ) -> Iterator[Taps]:
        """Yield the taps of a batch."""
        logits, backward, inputs = self._compiled_backward(weights, data, rows, masks)
        if mode == "inputs":
            yield {
                layer.name: Tap("matrix", inputs[layer.name], inputs[layer.name][:, :, :0], layer.bias)
                for layer in self.layers
                if layer.kind == "matrix"
            }
            return
        for by_logits in self.likelihood.cotangents(logits, data.targets[rows], mode, rng):
            by_outputs = _backpropagated(backward, by_logits)
            yield {
                layer.name: Tap(
                    layer.kind, inputs[layer.name], by_outputs[layer.name], layer.bias, size=getattr(layer, "size", 0)
                )
                for layer in self.layers
            }

    def _tangents(self, weights: Params, directions: list[Params], data: Data, rows: Array) -> tuple[Array, Array]:
        images = self.images(data, rows)
        logits, along = jax.linearize(lambda weights: self.logits(Pass(weights), images), weights)
        return whole((logits, jnp.stack([along(direction) for direction in directions])), self.mesh)

    def _pulled_back(self, weights: Params, data: Data, rows: Array, seed: Array) -> Params:
        images = self.images(data, rows)
        gradients: Params = jax.grad(lambda weights: jnp.sum(self.logits(Pass(weights), images) * seed))(weights)
        return gradients

    def _all_logits(self, weights: Params, heads: list[Array], data: Data, rows: Array) -> Array:
        return whole(super().all_logits(weights, heads, data, rows), self.mesh)

    def _many_steps(
        self, state: State, frozen: Params, data: Data, steps: Step, constraint: Constraint
    ) -> tuple[State, Array]:
        """Return the state after all steps, which are stacked, and their losses [steps]."""

        def one(state: State, step: Step) -> tuple[State, Array]:
            return self.step(state, frozen, data, step, constraint)

        return lax.scan(one, state, steps)  # type: ignore[no-any-return]

    gradients = jax.jit(_gradients, static_argnums=0)
    tangents = jax.jit(_tangents, static_argnums=0)
    outputs = jax.jit(Network.outputs, static_argnums=0)
    pulled_back = jax.jit(_pulled_back, static_argnums=0)
    many_steps = jax.jit(_many_steps, static_argnums=0, donate_argnums=1)
    all_logits = jax.jit(_all_logits, static_argnums=0)
    batch_statistics = jax.jit(Network.batch_statistics, static_argnums=0)
    multiplied = jax.jit(Network.multiplied, static_argnums=0)
    advanced = jax.jit(Network.advanced, static_argnums=0, donate_argnums=1)
    effective = jax.jit(Network.effective, static_argnums=0)
    _compiled_backward = jax.jit(_backward, static_argnums=0)


_backpropagated: Any = jax.jit(lambda backward, by_logits: backward(by_logits)[0])


class JaxLearner(FunctionalLearner):
    """A JAX network that learns continually.

    Attributes:
        whole_epochs: whether an epoch's steps on equal batches of one task run as one program, unless NumPy draws masks
            for them. On an accelerator a program for each step leaves the device waiting for Python; on a CPU XLA's
            convolutions are slower within a loop of its own. So None, as it is at first, means on accelerators, and
            elsewhere if the learner was asked to compile them.
        mesh: the devices that share each batch, if the learner was given a mesh or all devices.
    """

    framework: ClassVar = "JAX"
    default_device: ClassVar = "auto"
    network: JaxNetwork
    whole_epochs: bool | None = None
    mesh: Mesh | None = None

    def _find_device(self, name: Any) -> jax.Device:
        if isinstance(name, str):
            platform, _, number = name.partition(":")
            backend = None if platform == "auto" else platform
            if number != "all":
                return jax.local_devices(backend=backend)[self._parts_of(name)[1]]
            name = Mesh(np.asarray(jax.devices(backend)), ("data",))
        if not isinstance(name, Mesh):
            return name
        if "data" not in name.axis_names:
            raise BecameError(f"the mesh has the axes {', '.join(name.axis_names)}; one must be called data.")
        warn_of_threads(name)
        self.mesh = with_automatic_axes(name)
        return NamedSharding(self.mesh, PartitionSpec())

    def spread(self, mesh: Mesh) -> None:
        """Share each batch among the devices of a mesh from now on; each has the weights and the data whole.

        Args:
            mesh: with an axis "data". If it is of several processes, each does the same, with equal data and weights.
        """
        self.device = self._find_device(mesh)
        self.network = replace(self.network, mesh=self.mesh)
        self._data = Data(*(self._placed(on_host(array)) for array in self._data))
        self.assign({name: on_host(value) for name, value in self._theta.items()})

    def _find_dtype(self, name: Any) -> str:
        if jax.dtypes.canonicalize_dtype(name) != name:
            raise BecameError(f"JAX has no {name} as it is configured; set jax_enable_x64 before any array is made.")
        return str(jnp.dtype(name).name)

    def _network(self, backbone: Backbone, head: Linear, mixed_precision: bool) -> JaxNetwork:
        namespace(images=self._data.images)  # JAX learns of the core's values
        products = "bfloat16" if mixed_precision else None
        return JaxNetwork(backbone, head, products, self.likelihood, self.mesh)

    def _placed(self, array: Any, dtype: Any = None) -> Array:
        return jax.device_put(array if dtype is None else jnp.array(array, dtype=dtype), self.device)

    def _scale(self, values: Sequence[float], unit: float) -> Array:
        return self._placed(np.multiply(values, unit).astype(self._dtype))

    def _features_shape(self, backbone: Backbone, image: tuple[int, ...], record: Record) -> Sequence[int] | None:
        weights = {name: jax.ShapeDtypeStruct(it.shape, jnp.float32) for name, it in backbone.parameters.items()}
        images = jax.ShapeDtypeStruct((2, *image), jnp.int32 if len(image) == 1 else jnp.float32)
        features = jax.eval_shape(
            lambda weights, images: backbone(Pass(weights, record=record), images), weights, images
        )
        return getattr(features, "shape", None)

    def _framework_masks(self, seed: int) -> Callable[[int, int], Any]:
        key = jax.random.key(seed)
        return lambda number, samples: jax.random.fold_in(key, number)

    def _own(self, state: State) -> State:
        return jax.tree.map(jnp.copy, state)  # type: ignore[no-any-return]

    def train(self, batches: Sequence[Batch], *others: Any, **named: Any) -> Trained:
        """Take one step on each batch."""
        warn_of_size(len(batches[0].indices), self.mesh)
        return super().train(batches, *others, **named)

    def _steps(
        self, state: State, frozen: Params, constraint: Constraint, steps: Iterator[Step], equal: int
    ) -> tuple[State, list[Array]]:
        masks_from_host = self._draws() and not self._masks_by_framework
        automatic = self._compiles or any(device.platform != "cpu" for device in self._data.targets.devices())
        as_one_program = automatic if self.whole_epochs is None else self.whole_epochs
        losses: list[Array] = []
        if as_one_program and not masks_from_host and equal > 1:
            together: Step = jax.tree.map(
                lambda *parts: jnp.stack(parts) if isinstance(parts[0], jax.Array) else np.stack(parts),
                *islice(steps, equal),
            )
            together = together._replace(rate=together.rate.astype(self._dtype))
            state, of_steps = self.network.many_steps(state, frozen, self._data, together, constraint)
            losses.append(of_steps)
        state, others = super()._steps(state, frozen, constraint, steps, 0)
        return state, losses + others
