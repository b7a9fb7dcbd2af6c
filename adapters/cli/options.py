"""The options of a run, and the configuration that they and a preset resolve to.

Convention: an option left out takes the preset's value; a configuration holds no option, only resolved values, and two
runs with equal configuration, method and seed are the same run.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from adapters.data.benchmarks import Benchmark, Preset, find_benchmark
from became_core import BecameError
from became_core.continual import Method, MethodSettings, Schedule, Training, build_method

__all__ = ["Configuration", "Options", "resolve"]

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """Learn a benchmark's tasks one after another with one or more methods, and compare them in a table.

    With no option: Split-MNIST on the embedded images, methods became, gpm and finetune, one seed.
    """

    benchmark: str = "split-mnist"
    """What to learn: split-mnist (embedded), split-cifar100."""
    methods: tuple[str, ...] = ("became", "gpm", "finetune")
    """Which methods: became, became-paper, ewc, finetune, gpm, joint."""
    seeds: tuple[int, ...] = (0,)
    """A run for each; a seed names the initial weights and every random draw."""
    preset: Literal["quick", "paper"] = "quick"
    """The published protocol, or the same protocol on a schedule that two CPU cores finish."""
    tasks: int | None = None
    """How many tasks the classes are split into; it must divide them."""
    epochs: int | None = None
    """Epochs of stage 1 (at most so many, if the schedule stops by itself)."""
    stage2_epochs: int | None = None
    """Epochs of stage 2."""
    lr: float | None = None
    """The learning rate that both stages begin with."""
    batch_size: int | None = None
    """Samples a step, in training and in evaluation."""
    validation: float | None = None
    """Fraction of each task's training samples held out."""
    gpm_threshold: float | None = None
    """GPM's epsilon for the first task."""
    gpm_increment: float | None = None
    """What epsilon grows by from task to task."""
    ewc_strength: float | None = None
    """EWC's lambda."""
    projector_samples: int | None = None
    """Training samples of each task for the projector's memory."""
    curvature_samples: int | None = None
    """Training samples of each task for Fisher information and directional curvature; 0 for all."""
    path_points: int = 0
    """Trace the true loss and accuracy at so many points of every merging path."""
    data_dir: Path | None = None
    """A folder in the hub's layout; else the environment variable BECAME_DATA_DIR; else the hub."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, …"""
    out: Annotated[Path | None, tyro.conf.arg(metavar="OUT")] = None
    """The folder for results; runs/BENCHMARK-PRESET if not given."""


@dataclass(frozen=True)
class Configuration:
    """What to run, fully resolved, for every method and seed alike."""

    benchmark: Benchmark
    tasks: int
    preset: Preset
    out: Path

    def method(self, name: str) -> Method:
        """Return the method of that name with this configuration's numbers."""
        return build_method(name, self.preset.settings)

    def record(self) -> dict[str, Any]:
        """Return the configuration as plain values for JSON: what determines the result, and nothing else."""
        training = self.preset.training
        return {
            "tasks": self.tasks,
            "network": self.benchmark.network,
            "validation": self.preset.validation,
            **asdict(training),
            "path_alphas": list(training.path_alphas),
            "stage1": {"schedule": type(training.stage1).__name__.lower(), **asdict(training.stage1)},
            "stage2": {"schedule": type(training.stage2).__name__.lower(), **asdict(training.stage2)},
            **asdict(self.preset.settings),
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
    preset = benchmark.presets[options.preset]
    preset = replace(
        preset,
        training=_training(preset.training, options),
        settings=_settings(preset.settings, options),
        validation=_given(options.validation, preset.validation),
    )
    tasks = _given(options.tasks, benchmark.tasks)
    out = _given(options.out, Path("runs") / f"{benchmark.name}-{options.preset}")
    configuration = Configuration(benchmark, tasks, preset, out)
    for name in options.methods:
        configuration.method(name)
    return configuration


def _training(training: Training, options: Options) -> Training:
    for name in ("batch_size", "projector_samples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise BecameError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    samples = _given(options.curvature_samples, training.curvature_samples)
    if options.path_points < 0 or options.path_points == 1 or (samples or 0) < 0:
        raise BecameError("--path-points must be 0 or at least 2, and --curvature-samples at least 0.")
    last = max(options.path_points - 1, 1)
    return Training(
        stage1=_schedule(training.stage1, options.lr, options.epochs),
        stage2=_schedule(training.stage2, options.lr, options.stage2_epochs),
        batch_size=_given(options.batch_size, training.batch_size),
        projector_samples=_given(options.projector_samples, training.projector_samples),
        curvature_samples=samples or None,
        path_alphas=tuple(point / last for point in range(options.path_points)),
    )


def _schedule(schedule: Schedule, lr: float | None, epochs: int | None) -> Schedule:
    return replace(schedule, lr=_given(lr, schedule.lr), epochs=_given(epochs, schedule.epochs))


def _settings(settings: MethodSettings, options: Options) -> MethodSettings:
    names = ("gpm_threshold", "gpm_increment", "ewc_strength")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(settings, **given)


def _given(value: T | None, otherwise: T) -> T:
    return otherwise if value is None else value
