"""The learner on PyTorch: any module that maps images to features, with a head for each task.

Convention: images are uint8 [N, C, H, W] and are normalised on the device, batch by batch. Parameters are named arrays,
the running statistics of batch norms among them; other buffers stay in the module.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from adapters.backend import NetworkLearner
from adapters.networks import Architecture
from adapters.torch.derivatives import Derivatives
from adapters.torch.layers import batch_statistics, running_norms
from adapters.torch.linear import constrained_inputs, plain_linear_layers
from adapters.torch.networks import Described, MultiHead, draw_masks_from
from adapters.torch.tapping import Layouts, collect_inputs, collect_taps, matrices_of
from became_core.arrays import Params
from became_core.continual import Batch, Constraint, Optimiser, TapMode, TaskStream, Trained, Views
from became_core.continual.data import Indices
from became_core.curvature import Taps, logit_cotangents
from became_core.projection import Region

__all__ = ["TorchLearner"]


class TorchLearner(NetworkLearner):
    """A PyTorch network that learns continually.

    Attributes:
        network: the backbone with all heads.
        derivatives: what measures curvature along directions; its ``way`` says how.
    """

    framework: ClassVar = "PyTorch"
    network: MultiHead

    def _find_device(self, name: Any) -> torch.device:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        torch.zeros((), device=device)
        return device

    def _find_dtype(self, name: Any) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, name) if isinstance(name, str) else name
        return dtype

    def _build(self, backbone: nn.Module | Architecture, stream: TaskStream, mixed_precision: bool, seed: int) -> None:
        if isinstance(backbone, Architecture):
            backbone = Described(backbone, seed, self._dtype)
        dataset, place = stream.dataset, {"device": self.device, "dtype": self._dtype}
        # Of group norm with channels last PyTorch has no forward-mode derivative.
        last = self.device.type in ("cpu", "cuda") and not any(isinstance(m, nn.GroupNorm) for m in backbone.modules())
        self._layout = torch.channels_last if last else torch.contiguous_format
        self._mixed_precision = mixed_precision
        features = self._check_features(_features_shape(backbone, dataset.images.shape[1:]))
        network = MultiHead(backbone, features, len(stream.tasks), stream.classes_per_task, seed, self._dtype)
        self.network = network.to(**place)
        self.network.to(memory_format=self._layout)  # type: ignore[call-overload] # PyTorch's own types lack it
        self._images = torch.from_numpy(dataset.images).to(self.device)
        self._targets = torch.from_numpy(stream.targets).to(self.device)
        self._mean, self._std = (
            torch.tensor(values, **place).mul(255).view(1, -1, 1, 1) for values in (dataset.mean, dataset.std)
        )
        self._named = {_canonical(name): parameter for name, parameter in self.network.named_parameters()}
        self._layers = {module: _canonical(name) for name, module in self.network.named_modules()}
        self._norms = running_norms(self._layers)
        self._running: dict[str, Tensor] = {
            f"{name}.{kind}": getattr(module, kind)
            for module, name in self._norms.items()
            for kind in ("running_mean", "running_var")
        }
        self.running_statistics = frozenset(self._running)
        self._layouts: dict[int, Layouts] = defaultdict(Layouts)
        self.derivatives = Derivatives()
        self._plain_layers: dict[nn.Module, str] | None = None
        self.projectable = self._find_projectable()

    def parameters(self) -> Params:
        """Return a copy of all parameters by canonical name."""
        return {name: value.detach().clone() for name, value in (self._named | self._running).items()}

    @torch.no_grad()
    def assign(self, parameters: Params) -> None:
        """Copy these values into the parameters."""
        for name, value in (self._named | self._running).items():
            value.copy_(parameters[name])

    def train(
        self,
        batches: Sequence[Batch],
        rates: NDArray[np.float64],
        constraint: Constraint,
        optimiser: Optimiser,
        rng: np.random.Generator,
    ) -> Trained:
        """Take one step on each batch."""
        trained = {name: parameter for name, parameter in self._named.items() if name in constraint.trainable}
        for name, parameter in self._named.items():
            parameter.requires_grad_(name in trained)
        if self._plain_layers is None:
            draw_masks_from(self.network, None)
            few = self._batch(batches[0].indices[:3])[0], batches[0].task
            plain = plain_linear_layers(self.network, self._layers, few)
            self._plain_layers = {module: name for module, name in self._layers.items() if module in plain}
        self.network.train()
        self._masks(rng)
        total = torch.zeros((), device=self.device, dtype=torch.promote_types(self._dtype, torch.float32))
        theta: Params = {name: parameter.detach() for name, parameter in trained.items()}
        region = constraint.region
        if region is not None:
            trains = constraint.trains_scales
            scales = {key: scale.clone().requires_grad_(trains) for key, scale in region.scales.items()}
            region, theta = region.with_scales(scales), theta | scales
            trained |= scales if trains else {}
        with constrained_inputs(self._plain_layers, constraint, optimiser, region) as done:
            remaining = None if region is None else region.without(done.beneath)
            if remaining is not None:  # the network's own weights become the effective ones
                theta |= {name: self._named[name].detach().clone() for name in remaining.weights}
                self._work_with(remaining, theta)
            for batch, rate in zip(batches, rates, strict=True):
                images, targets = self._batch(batch.indices, batch.views)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self._mixed_precision):
                    logits = self.network(images, batch.task)
                loss = functional.cross_entropy(logits.to(images.dtype), targets)
                for parameter in trained.values():
                    parameter.grad = None
                loss.backward()  # type: ignore[no-untyped-call]
                gradients = {name: value.grad for name, value in trained.items() if value.grad is not None}
                with torch.no_grad():
                    directions, optimiser = constraint.directions(gradients, theta, float(rate), optimiser, *done)
                    for name, direction in directions.items():
                        theta[name].sub_(direction, alpha=float(rate))
                if remaining is not None:
                    self._work_with(remaining, theta)
                total += loss.detach() * len(batch.indices)
        samples = sum(len(batch.indices) for batch in batches)
        self.network.requires_grad_(True)
        if region is not None:
            self.assign({name: theta.get(name, value) for name, value in self.parameters().items()})
            region = region.with_scales({key: theta[key].detach() for key in region.scales})
        return Trained(float(total) / samples, optimiser, region)

    @torch.no_grad()
    def _work_with(self, region: Region, theta: Params) -> None:
        """Let the network work with the effective weights of a region."""
        for name, weight in region.effective({name: theta[name] for name in region.weights}).items():
            self._named[name].copy_(weight)

    def targets(self, indices: Indices) -> Tensor:
        """Return the labels within the task, [samples]."""
        return self._targets[torch.from_numpy(indices).to(self.device)]

    @torch.no_grad()
    def _logits(self, rows: Indices) -> Tensor:
        self.network.eval()
        logits: Tensor = self.network(self._batch(rows)[0])
        return logits

    def _taps(self, task: int, rows: Indices, mode: TapMode, rng: np.random.Generator, masks: Any) -> Iterator[Taps]:
        images, targets = self._batch(rows)
        per_sample = mode != "published"
        self.network.train(not per_sample)
        if mode == "inputs":
            return collect_inputs(self.network, self._layers, (images, task), sorted(self.projectable))
        return collect_taps(
            self.network,
            self._layers,
            (images, task),
            lambda logits: logit_cotangents(logits, targets, mode, rng),
            layouts=self._layouts[task],
            per_sample=per_sample,
        )

    def _tangents(self, task: int, rows: Indices, directions: Sequence[Params]) -> tuple[Tensor, Tensor]:
        self.network.eval()
        primals = dict(self.network.named_parameters())
        images, _ = self._batch(rows)

        def logits(theta: Mapping[str, Tensor]) -> Tensor:
            result: Tensor = torch.func.functional_call(self.network, dict(theta), (images, task))
            return result

        along = [{name: direction[_canonical(name)] for name in primals} for direction in directions]
        return self.derivatives.along(logits, primals, along)

    def _batch_statistics(self, rows: Indices) -> Iterator[Params]:
        return batch_statistics(self.network.backbone, self._norms, self._batch(rows)[0])

    def _find_projectable(self) -> frozenset[str]:
        """Return the shared weights [d_out, d_in] that are used as matrices alone, as a few samples tell."""
        self.network.eval()
        arguments = (self._batch(np.arange(min(3, len(self._images))))[0], 0)
        matrices = matrices_of(self.network, self._layers, arguments)
        return frozenset(name for name, transposed in matrices.items() if not (transposed or name.startswith("heads.")))

    def _batch(self, indices: Indices, views: Views | None = None) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(indices).to(self.device)
        pixels = self._images[rows] if views is None else views.apply(self._images[rows], axis=2)
        images = pixels.to(self._dtype).sub_(self._mean).div_(self._std)
        return images.contiguous(memory_format=self._layout), self._targets[rows]

    def _masks(self, rng: np.random.Generator) -> Callable[[int, int], Any]:
        """Let every random draw of the network, our own dropout and the framework's layers, depend on the generator."""
        torch.manual_seed(int(rng.integers(2**63)))
        draw_masks_from(self.network, None if self._masks_by_framework else rng)
        return lambda number, samples: None  # the modules draw them


def _canonical(name: str) -> str:
    return "" if name == "backbone" else name.removeprefix("backbone.")


def _features_shape(backbone: nn.Module, image: tuple[int, ...]) -> Sequence[int] | None:
    """Return the shape of a backbone's features of two blank images; None if they are no tensor."""
    probe = next(backbone.parameters(), torch.zeros(()))
    was_training = backbone.training
    backbone.eval()
    with torch.no_grad():
        features = backbone(torch.zeros(2, *image, device=probe.device, dtype=probe.dtype))
    backbone.train(was_training)
    return features.shape if isinstance(features, Tensor) else None
