"""The options of a run, and the configuration that they and a preset resolve to.

Convention: an option left out takes the preset's value; a configuration holds no option, only resolved values, and two
runs with equal configuration, method and seed are the same run.
"""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from adapters.architectures import DropoutMasks
from adapters.cli.backend import Backend
from adapters.cli.output import Output
from adapters.cli.words import worded
from adapters.data.benchmarks import Benchmark, find_benchmark
from adapters.data.presets import Preset
from became_core import BecameError
from became_core.continual import (
    PROJECTORS,
    SGD,
    Adam,
    Augmentation,
    ClassOrder,
    Dataset,
    Learner,
    Method,
    MethodSettings,
    Optimiser,
    RelativeRates,
    Schedule,
    TaskStream,
    Training,
    build_method,
)

__all__ = ["Configuration", "Options", "method_names", "resolve"]

T = TypeVar("T")


@dataclass(frozen=True)
@worded
class Options:
    """Learn a benchmark's tasks with one or more methods; compare them in a table.

    With no option: Split-MNIST (embedded); became, gpm and finetune; one seed.

    An option that shows no default has the preset's value if it is left out.
    """

    benchmark: str = "split-mnist"
    """What to learn: split-mnist, permuted-mnist (both embedded), split-cifar100, split-miniimagenet,
    split-tinyimagenet."""
    methods: tuple[str, ...] = ("became", "gpm", "finetune")
    """Which methods: became, became-paper, coma, ewc, ewc-online, finetune, hat, imm-mean, imm-mode, joint, packnet, a
    projector by itself: gpm, sgp, gpcns, nscl, ogd, trgp, or both, as in became+trgp; became-0, became-half, became-1
    and became-grid merge at that alpha, or at the best by the true loss."""
    projector: Literal["none", "gpm", "sgp", "gpcns", "nscl", "ogd", "trgp"] | None = None
    """The projector of all methods that name none; became's own is gpm."""
    seeds: tuple[int, ...] = (0,)
    """A run for each; a seed names the initial weights and every random draw."""
    preset: Literal["quick", "paper", "nscl"] = "quick"
    """The published protocol, or the same protocol on a schedule that two CPU cores finish; nscl, that of Adam-NSCL, is
    for split-cifar100 and split-tinyimagenet."""
    network: str | None = None
    """The backbone: mlp, alexnet, resnet18."""
    tasks: int | None = None
    """How many tasks the classes are split into; it must divide them."""
    class_order: ClassOrder = "label"
    """How classes are dealt to tasks: in the order of their labels, or in one that the seed draws."""
    first: int | None = None
    """Learn the first so many of them only."""
    epochs: int | None = None
    """Epochs of stage 1 (at most so many, if the schedule stops by itself)."""
    stage2_epochs: int | None = None
    """Epochs of stage 2."""
    lr: float | None = None
    """The learning rate that both stages begin with."""
    head_lr: float | None = None
    """That of heads; it falls as the others do."""
    norm_lr: float | None = None
    """That of normalisation, and of biases."""
    first_lr: float | None = None
    """That of all other parameters in the first task."""
    optimiser: Literal["sgd", "adam"] | None = None
    """What turns gradients into steps."""
    momentum: float | None = None
    """SGD's momentum."""
    weight_decay: float | None = None
    """What each parameter adds of itself to its gradient."""
    batch_size: int | None = None
    """Samples a step, in training and in evaluation."""
    augment: bool | None = None
    """Whether training images are cropped at random, after padding by 4 pixels, and flipped left to right."""
    validation: float | None = None
    """Fraction of each task's training samples held out."""
    threshold: float | None = None
    """Epsilon of gpm, sgp, gpcns and trgp for the first task."""
    increment: float | None = None
    """What epsilon grows by from task to task."""
    scale: float | None = None
    """The scale of sgp's and gpcns's importances."""
    nscl_ratio: float | None = None
    """How far above the smallest eigenvalue nscl still calls a direction null."""
    norm_penalty: float | None = None
    """The strength of a pull, as in ewc, on what gpm, sgp, gpcns, nscl and trgp cannot protect: normalisation and
    biases; at 0 these are frozen after the first task."""
    ogd_samples: int | None = None
    """Training samples of each task whose gradients ogd keeps."""
    ogd_capacity: int | None = None
    """How many directions ogd keeps in all."""
    ewc_strength: float | None = None
    """EWC's lambda."""
    ewc_decay: float | None = None
    """ewc-online's gamma."""
    imm_transfer: bool | None = None
    """Whether imm trains a task from the model before it, or from the initial weights."""
    imm_pull: float | None = None
    """The strength of imm's pull to the model before (L2-transfer)."""
    coma_alpha: tuple[float, ...] | None = None
    """coma's coefficients, one a merge; the last one stays."""
    grid_points: int | None = None
    """How many coefficients became-grid tries."""
    packnet_share: float | None = None
    """The share of a layer's free weights that packnet prunes at each task."""
    hat_sharpness: float | None = None
    """How steep hat's gates become within an epoch."""
    hat_sparsity: float | None = None
    """What the units that a task uses cost in hat."""
    per: Literal["model", "layer", "leaf"] | None = None
    """What shares a coefficient in became."""
    precision: Literal["diagonal", "kronecker", "exact"] | None = None
    """The curvatures became merges by: both sides' diagonals, both sides' Kronecker factors, or the new task's exact
    one along the path beside the old tasks' calibrated diagonal."""
    projector_samples: int | None = None
    """Training samples of each task for the projector's memory; 0 for all."""
    curvature_samples: int | None = None
    """Training samples of each task for Fisher information and directional curvature; 0 for all."""
    path_points: int = 0
    """Trace the true loss and accuracy at so many points of every merging path."""
    data_dir: Path | None = None
    """A folder in the hub's layout; else the environment variable BECAME_DATA_DIR; else the hub."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, …"""
    mixed_precision: bool = False
    """Multiply in bfloat16 in training steps; weights, losses, normalisation, memory and all that is measured stay
    float32."""
    dropout_masks: DropoutMasks = "numpy"
    """What draws dropout's masks: NumPy, the same ones for every framework, or the framework's own generator, which is
    where the network is."""
    deterministic: bool = False
    """Use operations alone that give the same bits every time, which a GPU's usual ones do not; a CPU's do anyway."""
    out: Path | None = None
    """The folder for results; runs/BENCHMARK-PRESET if not given."""
    dry_run: bool = False
    """Show the configuration, the numbers of parameters and of steps, and an estimate of the time; learn nothing."""
    resume: bool = False
    """Go on with what the folder holds, and fail if it holds nothing; a run of another backend is then gone on with."""
    tracker: Literal["none", "tensorboard", "trackio"] = "none"
    """What scalars are also written for, as a run goes: TensorBoard, beside the results, or Trackio."""
    output: Annotated[Output, tyro.conf.arg(name="")] = field(default_factory=Output)


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
        mixed, masks = self.mixed_precision, self.dropout_masks
        return backend.learner(self.preset.network, stream, device, seed, mixed_precision=mixed, dropout_masks=masks)

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
            "mixed_precision": self.mixed_precision,
            "dropout_masks": self.dropout_masks,
            "validation": self.preset.validation,
            **asdict(training),
            "path_alphas": list(training.path_alphas),
            "optimiser": _named(training.optimiser),
            "stage1": _named(training.stage1),
            "stage2": _named(training.stage2),
            **asdict(self.preset.settings),
            "special": {projector: asdict(settings) for projector, settings in self.preset.special.items()},
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
    own = (*PROJECTORS, "joint", "packnet", "hat")
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
        relative=_relative(training, options),
    )


def _relative(training: Training, options: Options) -> RelativeRates:
    lr = _given(options.lr, training.stage1.lr)
    rates = {"heads": options.head_lr, "norms": options.norm_lr, "first": options.first_lr}
    return replace(training.relative, **{name: rate / lr for name, rate in rates.items() if rate is not None})


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


def _settings(settings: MethodSettings, options: Options) -> MethodSettings:
    names = [field.name for field in fields(settings)]
    return replace(settings, **{name: _given(getattr(options, name), getattr(settings, name)) for name in names})


def _given(value: T | None, otherwise: T) -> T:
    return otherwise if value is None else value


def _named(value: Schedule | Optimiser) -> dict[str, Any]:
    """A value's fields, empty and infinite ones left out, and what it is."""
    named = {"kind": type(value).__name__.lower()}
    return named | {name: field for name, field in asdict(value).items() if field not in ({}, math.inf)}
