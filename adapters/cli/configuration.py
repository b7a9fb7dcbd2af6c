"""The configuration that options and a preset resolve to.

Convention: a configuration holds no option, only resolved values, and two runs with equal configuration, method and
seed are the same run.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from adapters.benchmarks.catalogue import Benchmark, find_benchmark
from adapters.benchmarks.presets import Preset
from adapters.cli.backend import Backend
from adapters.cli.options import Options
from adapters.networks import DropoutMasks
from became_core import BecameError
from became_core.continual import (
    SGD,
    Adam,
    Augmentation,
    ClassOrder,
    Dataset,
    Learner,
    Method,
    Optimiser,
    RelativeRates,
    Schedule,
    TaskStream,
    Training,
    build_method,
    method_settings,
)
from became_core.projection import PROJECTORS

__all__ = ["Configuration", "method_names", "resolve"]

T = TypeVar("T")


@dataclass(frozen=True)
class Configuration:
    """What to run, fully resolved, for every method and seed alike."""

    benchmark: Benchmark
    tasks: int
    first: int
    preset: Preset
    out: Path
    class_order: ClassOrder = "label"
    mixed_precision: bool = False
    dropout_masks: DropoutMasks = "numpy"

    def learner(self, backend: Backend, stream: TaskStream, device: str, seed: int) -> Learner:
        """Return a fresh learner of this configuration."""
        return backend.learner(
            self.preset.network,
            stream,
            device,
            seed,
            norm=self.preset.norm,
            mixed_precision=self.mixed_precision,
            dropout_masks=self.dropout_masks,
        )

    def stream(self, dataset: Dataset, seed: int) -> TaskStream:
        """Return the tasks that a run of this seed learns."""
        stream = self.benchmark.stream(
            dataset, self.tasks, validation=self.preset.validation, seed=seed, class_order=self.class_order
        )
        return stream.first(self.first)

    def method(self, name: str) -> Method:
        """Return the method of that name with this configuration's numbers."""
        return build_method(name, self.preset.settings_of(name))

    def record(self) -> dict[str, Any]:
        """Return the configuration as plain values for JSON: what determines the result, and nothing else."""
        training = self.preset.training
        return {
            "tasks": self.tasks,
            "first": self.first,
            "class_order": self.class_order,
            "network": self.preset.network,
            "norm": self.preset.norm,
            "mixed_precision": self.mixed_precision,
            "dropout_masks": self.dropout_masks,
            "validation": self.preset.validation,
            **asdict(training),
            "path_alphas": list(training.path_alphas),
            "optimiser": _named(training.optimiser),
            "stage1": _named(training.stage1),
            "stage2": _named(training.stage2),
            **self.preset.settings,
            "special": {projector: dict(settings) for projector, settings in self.preset.special.items()},
        }


def resolve(options: Options) -> Configuration:
    """Return the configuration of these options.

    Raises:
        BecameError: if a benchmark or method is unknown, or a number cannot be used.
    """
    benchmark = find_benchmark(options.benchmark)
    if not options.methods or not options.seeds:
        raise BecameError("give at least one method and one seed.")
    for seed in options.seeds:
        if seed < 0:
            raise BecameError(f"the seed {seed} is negative; give 0 or more.")
    tasks = _given(options.tasks, benchmark.tasks)
    preset = benchmark.preset(options.preset, tasks)
    preset = replace(
        preset,
        network=_given(options.network, preset.network),
        norm=_given(options.norm, preset.norm),
        training=_training(preset.training, options),
        settings=_settings(preset.settings, options),
        special={projector: _settings(settings, options) for projector, settings in preset.special.items()},
        validation=_given(options.validation, preset.validation),
    )
    out = _given(options.out, Path("runs") / f"{benchmark.name}-{options.preset}")
    first = _given(options.first, tasks)
    configuration = Configuration(
        benchmark, tasks, first, preset, out, options.class_order, options.mixed_precision, options.dropout_masks
    )
    for name in method_names(options):
        configuration.method(name)
    return configuration


def method_names(options: Options) -> tuple[str, ...]:
    """Return the methods to run, each with the projector that is asked for where it names none."""
    if options.projector is None:
        return options.methods
    own = (*PROJECTORS.names, "joint")
    return tuple(name if "+" in name or name in own else f"{name}+{options.projector}" for name in options.methods)


def _training(training: Training, options: Options) -> Training:
    if options.batch_size is not None and options.batch_size < 1:
        raise BecameError(f"--batch-size is {options.batch_size}; it must be at least 1.")
    for name in ("projector_samples", "curvature_samples"):
        if (getattr(options, name) or 0) < 0:
            raise BecameError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 0.")
    if options.path_points < 0 or options.path_points == 1:
        raise BecameError("--path-points must be 0 or at least 2.")
    last = max(options.path_points - 1, 1)
    return Training(
        stage1=_schedule(training.stage1, options.lr, options.epochs),
        stage2=_schedule(training.stage2, options.lr, options.stage2_epochs),
        optimiser=_optimiser(training.optimiser, options),
        batch_size=_given(options.batch_size, training.batch_size),
        projector_samples=_given(options.projector_samples, training.projector_samples) or None,
        curvature_samples=_given(options.curvature_samples, training.curvature_samples) or None,
        path_alphas=tuple(point / last for point in range(options.path_points)),
        augmentation=_augmentation(training.augmentation, options.augment),
        relative=_relative(training.relative, options),
    )


def _relative(rates: RelativeRates, options: Options) -> RelativeRates:
    return RelativeRates(
        heads=_given(options.head_rate, rates.heads),
        norms=_given(options.norm_rate, rates.norms),
        first=_given(options.first_rate, rates.first),
    )


def _augmentation(preset: Augmentation | None, wanted: bool | None) -> Augmentation | None:
    if wanted is None:
        return preset
    return (preset or Augmentation()) if wanted else None


def _schedule(schedule: Schedule, lr: float | None, epochs: int | None) -> Schedule:
    return replace(schedule, lr=_given(lr, schedule.lr), epochs=_given(epochs, schedule.epochs))


def _optimiser(optimiser: Optimiser, options: Options) -> Optimiser:
    if options.optimiser is not None:
        optimiser = SGD() if options.optimiser == "sgd" else Adam()
    if options.momentum is not None:
        if not isinstance(optimiser, SGD):
            raise BecameError("--momentum is SGD's; Adam has its own.")
        optimiser = replace(optimiser, momentum=options.momentum)
    return replace(optimiser, weight_decay=_given(options.weight_decay, optimiser.weight_decay))


def _settings(settings: Mapping[str, Any], options: Options) -> dict[str, Any]:
    defaults = {name: setting.default for name, setting in method_settings().items()} | dict(settings)
    return {name: _given(getattr(options, name), value) for name, value in defaults.items()}


def _given(value: T | None, otherwise: T) -> T:
    return otherwise if value is None else value


def _named(value: Schedule | Optimiser) -> dict[str, Any]:
    """A value's fields, empty and infinite ones left out, and what it is."""
    named = {"kind": type(value).__name__.lower()}
    return named | {name: field for name, field in asdict(value).items() if field not in ({}, math.inf)}
