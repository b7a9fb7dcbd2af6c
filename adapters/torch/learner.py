"""The learner on PyTorch: any module that maps images to features, with a head for each task.

Convention: images are [N, C, H, W] and are normalised on the device, batch by batch. Parameters are named arrays, the
running statistics of batch norms and all other buffers among them.

The module is the user's. Its weights are trained in place, as PyTorch's own loops do, and nothing else of it is
changed for good: not what it has frozen, its modes, its layout in memory, or how its batch norms learn statistics.
``_working`` is the one place that changes such things, for the time of a context. Layers in evaluation mode inside a
module in training mode stay in it, and a batch norm whose weights are frozen is frozen with its statistics.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from adapters.backend import Heads, NetworkLearner
from adapters.networks import Architecture
from adapters.torch.checking import TorchView, agreement_of
from adapters.torch.compiled import CompiledSteps, TakesStep, compiled_forward, placed
from adapters.torch.derivatives import Derivatives
from adapters.torch.layers import (
    batch_statistics,
    is_batch_norm,
    is_frozen_norm,
    modes_kept,
    outputs_at,
    running_norms,
)
from adapters.torch.linear import ByInputs, constrained_inputs, plain_linear_layers
from adapters.torch.networks import Described, Drawing, MultiHead, OneHead, draw_masks_from
from adapters.torch.share import divided
from adapters.torch.tapping import Layouts, Names, collect_inputs, collect_taps, matrices_of, owners_of
from became_core import BecameError
from became_core.arrays import Params, map_leaves
from became_core.continual import Batch, Constraint, Optimiser, TapMode, TaskStream, Trained, Views
from became_core.continual.data import Indices
from became_core.curvature import Taps
from became_core.projection import Region

__all__ = ["TorchLearner"]

T = TypeVar("T")


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
        is_ours = isinstance(backbone, Architecture)
        module = Described(backbone, seed, self._dtype) if isinstance(backbone, Architecture) else backbone
        dataset, place = stream.dataset, {"device": self.device, "dtype": self._dtype}
        features = self._check_features(self._features_shape(module, dataset.images.shape[1:]), dataset.predicts_bytes)
        beside = backbone.beside if isinstance(backbone, Architecture) else 0  # a user's own may have that name
        names = (name for name, _ in [*module.named_parameters(), *module.named_buffers()])
        self.naming = Heads.beside(names, shared=stream.shared_head)
        widths = [len(task.classes) for task in stream.tasks]
        self.network = MultiHead(module, features - beside, widths, seed, self._dtype, self.naming, beside)
        self.network.to(**place)
        # Of group norm with channels last PyTorch has no forward-mode derivative. Users choose their own layout.
        has_group_norm = any(isinstance(layer, nn.GroupNorm) for layer in module.modules())
        if is_ours and self.device.type in ("cpu", "cuda") and not has_group_norm:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # PyTorch's types lack it
        last = any(parameter.ndim == 4 and not parameter.is_contiguous() for parameter in module.parameters())
        self._layout = torch.channels_last if last else torch.contiguous_format
        self._copied = torch.preserve_format if is_ours else torch.contiguous_format  # which safetensors can save
        self._mixed_precision = mixed_precision
        self._images = _tensor_of(dataset.images).to(self.device)
        targets = _tensor_of(stream.targets)
        self._targets = targets.to(self.device, targets.dtype if self.likelihood.has_labels else self._dtype)
        self._mean, self._std = (
            torch.tensor(values, **place).mul(dataset.unit).view(1, -1, 1, 1) for values in (dataset.mean, dataset.std)
        )
        self._named = {self._canonical(name): parameter for name, parameter in self.network.named_parameters()}
        self._layers = {layer: self._canonical(name) for name, layer in self.network.named_modules()}
        self._frozen = frozenset(name for name, parameter in self._named.items() if not parameter.requires_grad)
        self._in_evaluation = [layer for layer in module.modules() if module.training and not layer.training]
        self._in_evaluation += [layer for layer in module.modules() if is_frozen_norm(layer)]
        self._norms: dict[nn.Module, str] = {}
        with self._working(training=True):
            self._norms = running_norms(self._layers)
        self.running_statistics = frozenset(
            f"{name}.{kind}" for name in self._norms.values() for kind in ("running_mean", "running_var")
        )
        counts = {f"{name}.num_batches_tracked" for name in self._norms.values()}
        buffers = {name for name, _ in module.named_buffers()}
        self._stored = frozenset(buffers - counts)
        self.constants = self._frozen | (self._stored - self.running_statistics)
        may_be_compiled = not is_ours
        self._layouts: dict[int, Layouts] = defaultdict(lambda: Layouts(compiled=may_be_compiled))
        self._by_task: dict[int, tuple[OneHead, Names]] = {}
        self.derivatives = Derivatives(compiled=may_be_compiled)
        self._compiled: CompiledSteps | None = None
        self._forward: Callable[[Tensor, int], Tensor] = self.network
        self._plain_layers: dict[nn.Module, str] | None = None
        with self._working(training=False):
            few = (self._batch(np.arange(min(3, len(self._images))))[0], 0)
            matrices = matrices_of(self.network, self._layers, few, Layouts(compiled=may_be_compiled))
        # Stored as [d_out, d_in], as a few samples tell.
        self.projectable = frozenset(
            name for name, transposed in matrices.items() if not (transposed or self.naming.has(name))
        )

    def check_divisible(self) -> None:
        """Raise a BecameError if processes cannot share a training batch so that they learn what one would."""
        if not isinstance(self.network.backbone, Described):
            raise BecameError(
                "processes share the batches of described networks alone: a module of your own may compute what "
                "depends on the whole batch, or draw for it; train it in one process, or give a description."
            )
        if self._compiles:
            raise BecameError("processes exchange gradients within each step; leave out --compile, or use one process.")
        if self._masks_by_framework:
            raise BecameError(
                "processes draw dropout masks for the whole batch by NumPy; leave out --dropout-masks framework."
            )

    def _is_shipped(self, backbone: Any) -> bool:
        return isinstance(backbone, Architecture | Described)

    def _draws(self) -> bool:
        return any(isinstance(module, Drawing) for module in self.network.modules())

    def _view(self, rows: Indices) -> TorchView:
        images, backbone = self._batch(rows)[0], self.network.backbone
        modes = {mode: self._working(mode) for mode in (False, True)}
        compared = agreement_of(backbone, images, self._in_evaluation, modes)
        arguments = (images, 0)
        return TorchView(
            self.network,
            self._layers,
            arguments,
            self.derivatives,
            mixes_samples=self.mixes_samples,
            compared=compared,
        )

    def _with_head(self, task: int) -> tuple[OneHead, Names]:
        """Return the network with a task's head alone, and the canonical names of its modules."""
        if task not in self._by_task:
            network = OneHead(self.network, task)
            self._by_task[task] = network, {module: self._layers.get(module, "") for module in network.modules()}
        return self._by_task[task]

    def _canonical(self, name: str) -> str:
        """Return the canonical name of a parameter, buffer or module of the network with heads."""
        if name.startswith("heads.0") and self.naming.shared:
            return self.naming.one + name.removeprefix("heads.0")
        if name.startswith("heads."):
            return f"{self.naming.name(0).removesuffix('.0')}.{name.removeprefix('heads.')}"
        return "" if name == "backbone" else name.removeprefix("backbone.")

    def _features_shape(self, backbone: nn.Module, image: tuple[int, ...]) -> Sequence[int] | None:
        """Return the shape of a backbone's features of two blank images; None if they are no tensor."""

        def look(norm: Any, inputs: tuple[Tensor, ...]) -> None:
            self.mixes_samples |= norm.running_mean is None and not is_frozen_norm(norm)
            if inputs[0].numel() == len(inputs[0]) * inputs[0].shape[1] and not is_frozen_norm(norm):
                self._normalises_over_samples(running=norm.running_mean is not None)

        probe = next(backbone.parameters(), torch.zeros(()))
        with ExitStack() as context:
            context.enter_context(torch.no_grad())
            context.enter_context(modes_kept(backbone))
            backbone.eval()
            for norm in filter(is_batch_norm, backbone.modules()):
                context.callback(norm.register_forward_pre_hook(look).remove)
            dtype = torch.int64 if len(image) == 1 else probe.dtype  # text
            features = backbone(torch.zeros(2, *image, device=probe.device, dtype=dtype))
        return features.shape if isinstance(features, Tensor) else None

    @contextmanager
    def _working(self, training: bool) -> Iterator[None]:
        """Put the network into training or evaluation mode for the time of this context, except for what is frozen."""
        backbone = self.network.backbone  # heads have no modes, and there may be many
        with modes_kept(backbone):
            backbone.train(training)
            for layer in self._in_evaluation:
                layer.eval()
            norms: list[Any] = list(self._norms) if training else []
            for norm in norms:
                norm.track_running_stats = False  # the core estimates them
            try:
                yield
            finally:
                for norm in norms:
                    norm.track_running_stats = True

    def _measured(self, items: Iterator[T], training: bool = False) -> Iterator[T]:
        before = {name: value.clone() for name, value in self._buffers().items()}
        try:
            with self._working(training):
                yield from items
        finally:  # also if whoever asked stops early, or a pass fails
            self._put_buffers(before)

    def _buffers(self) -> dict[str, Tensor]:
        """Return what the network stores besides its parameters; a forward pass may put other tensors there."""
        return {name: value for name, value in self.network.backbone.named_buffers() if name in self._stored}

    @torch.no_grad()
    def _put_buffers(self, values: Params) -> None:
        for name, buffer in self._buffers().items():
            if buffer.shape == values[name].shape:
                buffer.copy_(values[name])
            else:
                owner, _, own = name.rpartition(".")
                setattr(self.network.backbone.get_submodule(owner), own, values[name].clone())

    def parameters(self) -> Params:
        """Return a copy of all parameters by canonical name."""
        entries = self._named | self._buffers()
        return {name: value.detach().clone(memory_format=self._copied) for name, value in entries.items()}

    @torch.no_grad()
    def assign(self, parameters: Params) -> None:
        """Copy these values into the parameters."""
        for name, value in self._named.items():
            value.copy_(parameters[name])
        self._put_buffers(parameters)

    def train(
        self,
        batches: Sequence[Batch],
        rates: NDArray[np.float64],
        constraint: Constraint,
        optimiser: Optimiser,
        rng: np.random.Generator,
    ) -> Trained:
        """Take one step on each batch."""
        with self._stepping(constraint.trainable - self._frozen):
            trained = {name: parameter for name, parameter in self._named.items() if parameter.requires_grad}
            if self._plain_layers is None:
                self._plain_layers = self._find_plain_layers(batches[0])
            self._masks(rng)
            total = torch.zeros((), device=self.device, dtype=torch.promote_types(self._dtype, torch.float32))
            theta: Params = {name: parameter.detach() for name, parameter in trained.items()}
            region = constraint.region
            if region is not None:
                trains = constraint.trains_scales
                scales = {key: scale.clone().requires_grad_(trains) for key, scale in region.scales.items()}
                region, theta = region.with_scales(scales), theta | scales
                trained |= scales if trains else {}
            compiled = self._compiled_for(constraint, optimiser)
            forwards = None if compiled is None else compiled.forwards
            with constrained_inputs(self._plain_layers, constraint, optimiser, region, forwards) as done:
                remaining = None if region is None else region.without(done.beneath)
                if remaining is not None:  # the network's own weights become the effective ones
                    theta |= {name: self._named[name].detach().clone() for name in remaining.weights}
                    self._work_with(remaining, theta)
                step = self._step(trained, theta, constraint, remaining, done)
                take = step if compiled is None else compiled.steps(step)
                dtype = self._dtype if compiled is not None and compiled.captures else None
                for batch, rate in placed(batches, rates, self.device, dtype):
                    loss, optimiser = take(batch, rate, optimiser)
                    total += loss * len(batch.indices)
                if compiled is not None:  # whose later steps overwrite the arrays of this state
                    optimiser = map_leaves(torch.clone, optimiser)
            total = self.share.total({"loss": total})["loss"]
            samples = sum(len(batch.indices) for batch in batches)
            if region is not None:
                self.assign({name: theta.get(name, value) for name, value in self.parameters().items()})
                region = region.with_scales({key: theta[key].detach() for key in region.scales})
            return Trained(float(total) / samples, optimiser, region)

    def _step(
        self, trained: Params, theta: Params, constraint: Constraint, region: Region | None, done: ByInputs
    ) -> TakesStep:
        """Return the function that takes a step.

        Args:
            trained: what gradients are by.
            theta: what the step changes, in place.
            constraint: of the stage.
            region: with whose effective weights the network works; None if it works with its own.
            done: what of the constraint is met by the layers.
        """

        def step(batch: Batch, rate: Any, optimiser: Optimiser) -> tuple[Tensor, Optimiser]:
            loss = self._loss(batch)
            for parameter in trained.values():
                parameter.grad = None
            loss.backward()  # type: ignore[no-untyped-call]
            gradients = {name: value.grad for name, value in trained.items() if value.grad is not None}
            gradients = self.share.total(gradients)
            with torch.no_grad():
                directions, optimiser = constraint.directions(gradients, theta, rate, optimiser, *done)
                for name, direction in directions.items():
                    if isinstance(rate, Tensor):
                        theta[name].addcmul_(direction, rate, value=-1)
                    else:
                        theta[name].sub_(direction, alpha=rate)
            if region is not None:
                self._work_with(region, theta)
            return loss.detach(), optimiser

        return step

    def _compiled_for(self, constraint: Constraint, optimiser: Optimiser) -> CompiledSteps | None:
        """Return the compiled steps of a stage; None if steps are not compiled, as those in a region never are."""
        if not self._compiles or constraint.region is not None:
            return None
        if self._compiled is None or not self._compiled.hold_for(constraint, optimiser):
            self._compiled = None  # frees the memory of the last ones before these take theirs
            self._compiled = CompiledSteps(constraint, optimiser, self.device)
            if not self._compiled.captures and self._forward is self.network:
                self._forward = compiled_forward(self.network)
        return self._compiled

    def _loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of a training batch; if processes share it, this one's part: their sum is the mean."""
        samples, likelihood = len(batch.indices), self.likelihood
        own = self.share.rows(samples)
        views = None if batch.views is None else Views(batch.views.offsets[own], batch.views.flips[own])
        images, targets = self._batch(batch.indices[own], views)
        with (
            divided(self.network.backbone, self.share, samples),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self._mixed_precision),
        ):
            logits = self._forward(images, batch.task)
        logits = logits.to(self._dtype)
        if self.share.count == 1:
            mean = functional.cross_entropy if likelihood.is_plain else likelihood.mean_loss
            loss: Tensor = mean(logits, targets)
            return loss
        loss = likelihood.loss(logits, targets) / likelihood.count(self.targets(batch.indices))
        return loss if self.share.divides(samples) else loss / self.share.count  # of which every process has all

    @contextmanager
    def _stepping(self, names: frozenset[str]) -> Iterator[None]:
        """Let only these parameters need a gradient, and put the network into training mode, inside this context."""
        try:
            for name, parameter in self._named.items():
                parameter.requires_grad_(name in names)
            with self._working(training=True):
                yield
        finally:
            for name, parameter in self._named.items():
                parameter.requires_grad_(name not in self._frozen)

    def _find_plain_layers(self, batch: Batch) -> dict[nn.Module, str]:
        """Return the linear layers that compute nothing but their product; what the network stores stays as it is."""
        draw_masks_from(self.network.backbone, None)
        few = self._batch(batch.indices[:3])[0], batch.task
        before = {name: value.clone() for name, value in self._buffers().items()}
        plain = plain_linear_layers(self.network, self._layers, few)
        self._put_buffers(before)
        return {module: name for module, name in self._layers.items() if module in plain}

    @torch.no_grad()
    def _work_with(self, region: Region, theta: Params) -> None:
        """Let the network work with the effective weights of a region."""
        for name, weight in region.effective({name: theta[name] for name in region.weights}).items():
            self._named[name].copy_(weight)

    def targets(self, indices: Indices) -> Tensor:
        """Return the labels within the task [samples], or numbers [samples, outputs]."""
        return self._targets[torch.as_tensor(indices, device=self.device)]

    @torch.no_grad()
    def _logits(self, rows: Indices, heads: slice) -> Tensor:
        logits: Tensor = self.network(self._batch(rows)[0], heads)
        return logits

    @torch.no_grad()
    def _logits_of_text(self, text: NDArray[np.uint8]) -> Tensor:
        logits: Tensor = self.network(torch.from_numpy(text).to(self.device, torch.int64))
        return logits

    def _taps(self, task: int, rows: Indices, mode: TapMode, rng: np.random.Generator, masks: Any) -> Iterator[Taps]:
        images, targets = self._batch(rows)
        per_sample = mode != "published"
        network, names = self._with_head(task)
        if mode == "inputs":
            return collect_inputs(network, names, (images,), sorted(self.projectable), self._layouts[task])
        return collect_taps(
            network,
            names,
            (images,),
            lambda logits: self.likelihood.cotangents(logits, targets, mode, rng),
            layouts=self._layouts[task],
            per_sample=per_sample,
        )

    def _tangents(self, task: int, rows: Indices, directions: Sequence[Params]) -> tuple[Tensor, Tensor]:
        network, names = self._with_head(task)
        owners, images = owners_of(names), self._batch(rows)[0]
        primals = {name: value for name, value in network.named_parameters() if owners[value] not in self._frozen}
        along = [{name: direction[owners[value]] for name, value in primals.items()} for direction in directions]
        return self.derivatives.along(lambda theta: outputs_at(network, theta, (images,)), primals, along)

    @torch.no_grad()
    def _draw_for_taps(self, task: int, rows: Indices, mode: TapMode, rng: np.random.Generator) -> None:
        if mode not in ("sampled", "published"):
            return
        images, targets = self._batch(rows)
        for _ in self.likelihood.cotangents(self.network(images, task), targets, mode, rng):
            pass

    def _batch_statistics(self, rows: Indices) -> Iterator[Params]:
        return batch_statistics(self.network.backbone, self._norms, self._batch(rows)[0])

    def _batch(self, indices: Indices, views: Views | None = None) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices, device=self.device)
        pixels = self._images[rows] if views is None else views.apply(self._images[rows], axis=2)
        if pixels.ndim == 2:
            return pixels.to(torch.int64), self._targets[rows]  # text
        images = pixels.to(self._dtype).sub_(self._mean).div_(self._std)
        return images.contiguous(memory_format=self._layout), self._targets[rows]

    def _masks(self, rng: np.random.Generator) -> Callable[[int, int], Any]:
        """Let every random draw of the network, our own dropout and the framework's layers, depend on the generator."""
        torch.manual_seed(int(rng.integers(2**63)))
        draw_masks_from(self.network.backbone, None if self._masks_by_framework else rng)
        return lambda number, samples: None  # the modules draw them


def _tensor_of(array: NDArray[Any]) -> Tensor:
    """Return an array as a tensor, which shares its memory where PyTorch can; nothing is written there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)  # a mapped file, say
        return torch.from_numpy(array.copy() if min(array.strides, default=0) < 0 else array)
