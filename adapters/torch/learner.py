"""The learner protocol on PyTorch: any module that maps images to features, with a head for each task.

Convention: images stay on the device as uint8 [N, C, H, W] and are normalised there, batch by batch; parameters are
named arrays, the running statistics of batch norms among them; other buffers stay in the module.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from adapters.networks import DropoutMasks, checked_masks
from adapters.torch.dropout import use_stream
from adapters.torch.layers import is_matrix
from adapters.torch.linear import constrained_inputs
from adapters.torch.networks import MultiHead
from adapters.torch.statistics import batch_statistics, running_norms
from adapters.torch.tapping import collect_inputs, collect_taps, layers_with_samples_first
from became_core import BecameError
from became_core.arrays import Params
from became_core.continual import Batch, Constraint, Learner, Optimiser, TapMode, TaskStream, Trained, Views
from became_core.continual.data import Indices
from became_core.curvature import Pushforward, Taps, logit_cotangents
from became_core.projection import Region

__all__ = ["TorchLearner"]


class TorchLearner(Learner):
    """A PyTorch network that learns continually; ``became_core.continual.Learner`` says what each method promises."""

    def __init__(
        self,
        backbone: nn.Module,
        stream: TaskStream,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        mixed_precision: bool = False,
        dropout_masks: DropoutMasks = "numpy",
        seed: int = 0,
    ) -> None:
        """Place a backbone, with a fresh head for each task, and the stream's data on a device.

        Args:
            backbone: images [N, C, H, W] to features [N, features]; used as it is, with the weights it has. Batch norms
                that track running statistics no longer do so while they train: these are the core's to estimate.
            stream: the tasks; its images and targets go to the device once.
            device: where all arithmetic happens, e.g. "cpu", "cuda", "cuda:1", "mps".
            dtype: of the weights.
            mixed_precision: whether training steps multiply in bfloat16; weights, losses, normalisation, optimiser and
                all that is measured stay in the dtype of the weights.
            dropout_masks: what draws them: "numpy", the same ones for every framework, or the "framework" itself, where
                the network is; a function of the seeds either way.
            seed: names the draw of the heads' initial weights.

        Raises:
            BecameError: if the device does not exist, there is no such source of masks, or the backbone does not return
                [N, features].
        """
        self.device = _checked_device(device)
        self._dropout_masks = checked_masks(dropout_masks)
        dataset = stream.dataset
        # Of group norm with channels last PyTorch has no forward-mode derivative.
        last = self.device.type in ("cpu", "cuda") and not any(isinstance(m, nn.GroupNorm) for m in backbone.modules())
        layout = torch.channels_last if last else torch.contiguous_format
        features = _feature_width(backbone, dataset.images.shape[1:])
        network = MultiHead(backbone, features, len(stream.tasks), stream.classes_per_task, seed, dtype)
        self.network = network.to(device=self.device, dtype=dtype)
        self.network.to(memory_format=layout)  # type: ignore[call-overload] # PyTorch's own types lack it
        self._layout, self._mixed_precision = layout, mixed_precision
        self._images = torch.from_numpy(dataset.images).to(self.device)
        self._targets = torch.from_numpy(stream.targets).to(self.device)
        shape = (1, -1, 1, 1)
        self._mean = torch.tensor(dataset.mean, device=self.device, dtype=dtype).mul(255).view(shape)
        self._std = torch.tensor(dataset.std, device=self.device, dtype=dtype).mul(255).view(shape)
        self._named = {_canonical(name): parameter for name, parameter in self.network.named_parameters()}
        self._layers = {module: _canonical(name) for name, module in self.network.named_modules()}
        self._norms = running_norms(self._layers)
        self._running: dict[str, Tensor] = {
            f"{name}.{each}": getattr(module, each)
            for module, name in self._norms.items()
            for each in ("running_mean", "running_var")
        }
        self.running_statistics = frozenset(self._running)
        self._layers_of_task: dict[int, frozenset[nn.Module]] = {}
        self.heads = [
            frozenset(name for name in self._named if name.startswith(f"heads.{task}."))
            for task in range(len(stream.tasks))
        ]
        self.projectable = frozenset(
            f"{name}.weight"
            for module, name in self._layers.items()
            if is_matrix(module) and module in self._tapped_layers(0) and not name.startswith("heads.")
        )

    def parameters(self) -> Params:
        """Return a copy of all parameters by canonical name."""
        return {name: value.detach().clone() for name, value in (self._named | self._running).items()}

    def assign(self, parameters: Params) -> None:
        """Copy these values into the parameters."""
        with torch.no_grad():
            for name, value in (self._named | self._running).items():
                value.copy_(parameters[name])

    def train(
        self,
        batches: Sequence[Batch],
        rates: NDArray[np.float64],
        constraint: Constraint,
        optimiser: Optimiser,
        stream: np.random.Generator,
    ) -> Trained:
        """Take one step on each batch."""
        trained = {name: parameter for name, parameter in self._named.items() if name in constraint.trainable}
        for name, parameter in self._named.items():
            parameter.requires_grad_(name in trained)
        self.network.train()
        self._draw_from(stream)
        total = torch.zeros((), device=self.device, dtype=torch.promote_types(self._mean.dtype, torch.float32))
        theta: Params = {name: parameter.detach() for name, parameter in trained.items()}
        region = constraint.region
        if region is not None:
            trains = constraint.trains_scales
            scales = {key: scale.clone().requires_grad_(trains) for key, scale in region.scales.items()}
            region, theta = region.with_scales(scales), theta | scales
            trained |= scales if trains else {}
        with constrained_inputs(self._layers, constraint.projector_of_gradients(optimiser), region) as done:
            shown = None if region is None else region.without(done.beneath)
            if shown is not None:  # the network's own weights become the effective ones
                theta |= {name: self._named[name].detach().clone() for name in shown.weights}
                self._show(shown, theta)
            for batch, rate in zip(batches, rates, strict=True):
                images, targets = self._batch(batch.indices, batch.views)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self._mixed_precision):
                    logits = self.network(images, batch.task)
                loss = functional.cross_entropy(logits.to(images.dtype), targets)
                for parameter in trained.values():
                    parameter.grad = None
                loss.backward()  # type: ignore[no-untyped-call]
                gradients = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
                with torch.no_grad():
                    directions, optimiser = constraint.directions(gradients, theta, float(rate), optimiser, *done)
                    for name, direction in directions.items():
                        theta[name].sub_(direction, alpha=float(rate))
                if shown is not None:
                    self._show(shown, theta)
                total += loss.detach() * len(batch.indices)
        samples = sum(len(batch.indices) for batch in batches)
        self.network.requires_grad_(True)
        if region is not None:
            self.assign({name: theta.get(name, value) for name, value in self.parameters().items()})
            region = region.with_scales({key: theta[key].detach() for key in region.scales})
        return Trained(float(total) / samples, optimiser, region)

    @torch.no_grad()
    def _show(self, region: Region, theta: Params) -> None:
        """Let the network work with the effective weights of a region."""
        for name, weight in region.effective({name: theta[name] for name in region.weights}).items():
            self._named[name].copy_(weight)

    @torch.no_grad()
    def logits(self, indices: Indices, batch_size: int) -> Tensor:
        """Return all heads' logits, [samples, tasks, classes]."""
        self.network.eval()
        return torch.cat([self.network(self._batch(rows)[0]) for rows in _chunks(indices, batch_size)])

    def targets(self, indices: Indices) -> Tensor:
        """Return the labels within the task, [samples]."""
        return self._targets[torch.from_numpy(indices).to(self.device)]

    def taps(
        self, task: int, indices: Indices, batch_size: int, mode: TapMode, stream: np.random.Generator
    ) -> Iterator[Taps]:
        """Yield each batch's taps."""
        published = mode == "published"
        layers = None if published else self._tapped_layers(task)
        if published:
            self._draw_from(stream)
        for rows in _chunks(indices, batch_size):
            images, targets = self._batch(rows)

            def cotangents(logits: Tensor, targets: Tensor = targets) -> Iterator[Tensor]:
                return logit_cotangents(logits, targets, mode, stream)

            self.network.train(published)
            arguments = (images, task)
            if mode == "inputs":
                yield from collect_inputs(self.network, self._layers, arguments, self._tapped_layers(task))
                continue
            yield from collect_taps(
                self.network, self._layers, arguments, cotangents, layers=layers, per_sample=not published
            )

    @torch.no_grad()
    def pushforward(
        self, task: int, indices: Indices, batch_size: int, directions: Sequence[Params]
    ) -> Iterator[Pushforward]:
        """Yield each batch's logits and their derivatives along directions."""
        self.network.eval()
        primals = dict(self.network.named_parameters())
        for rows in _chunks(indices, batch_size):
            images, targets = self._batch(rows)

            def logits(theta: dict[str, Tensor], images: Tensor = images) -> Tensor:
                result: Tensor = torch.func.functional_call(self.network, theta, (images, task))
                return result

            tangents = []
            for direction in directions:
                along = {name: direction[_canonical(name)] for name in primals}
                outputs, tangent, *_ = torch.func.jvp(logits, (primals,), (along,))
                tangents.append(tangent)
            yield Pushforward(outputs, torch.stack(tangents), targets)

    def batch_statistics(self, indices: Indices, batch_size: int) -> Iterator[tuple[int, Params]]:
        """Yield each batch's size and statistics, once for every time that a layer runs."""
        for rows in _chunks(indices, batch_size):
            for found in batch_statistics(self.network.backbone, self._norms, self._batch(rows)[0]):
                yield len(rows), found

    def _tapped_layers(self, task: int) -> frozenset[nn.Module]:
        """Return the layers that can be tapped for a task; it is found out once, by two samples of any kind."""
        if task not in self._layers_of_task:
            self.network.eval()
            arguments = (self._batch(np.arange(min(2, len(self._images))))[0], task)
            self._layers_of_task[task] = layers_with_samples_first(self.network, self._layers, arguments)
        return self._layers_of_task[task]

    def _batch(self, indices: Indices, views: Views | None = None) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(indices).to(self.device)
        pixels = self._images[rows] if views is None else views.shown(self._images[rows], axis=2)
        images = pixels.to(self._mean.dtype).sub_(self._mean).div_(self._std)
        return images.contiguous(memory_format=self._layout), self._targets[rows]

    def _draw_from(self, stream: np.random.Generator) -> None:
        """Let every random draw of the network, our own dropout and the framework's layers, depend on the stream."""
        torch.manual_seed(int(stream.integers(2**63)))
        use_stream(self.network, stream if self._dropout_masks == "numpy" else None)


def _chunks(indices: Indices, size: int) -> Iterator[Indices]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _canonical(name: str) -> str:
    return "" if name == "backbone" else name.removeprefix("backbone.")


def _checked_device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise BecameError(f"PyTorch has no device '{name}' here; try cpu, or cuda on a machine with a GPU.") from None
    return device


def _feature_width(backbone: nn.Module, shape: tuple[int, ...]) -> int:
    """Return the width of a backbone's output, found by one pass of two blank images."""
    probe = next(backbone.parameters(), torch.zeros(()))
    was_training = backbone.training
    backbone.eval()
    with torch.no_grad():
        features = backbone(torch.zeros(2, *shape, device=probe.device, dtype=probe.dtype))
    backbone.train(was_training)
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise BecameError("the backbone must map images [N, C, H, W] to features [N, features].")
    return int(features.shape[1])
