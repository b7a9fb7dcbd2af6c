"""The configuration of a run: everything that a user may choose, described once.

The fields of ``Configuration`` are the one description. From them and from the settings of the registered methods and
projectors are made: the options of the command (``options``), the record in ``config.json`` and ``results.json``
(``to_json``), what ``--resume`` and ``--config`` go on from (``from_json``), and the command that repeats a run
(``repeating.py``). Presets give values for the same names.

Convention: values are plain (text, numbers, booleans, paths, tuples of them). A value that may change the result is
compared when a run goes on; a hint, such as the device, is not. Two runs of equal configuration (hints aside), method
and seed are the same run.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_type_hints

from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.networks import NETWORKS, DropoutMasks, Norm, hub_network
from adapters.tracking import TRACKERS
from became_core import BecameError
from became_core.continual import (
    METHODS,
    SGD,
    Adam,
    Adaptation,
    Annealed,
    Augmentation,
    BayesianDetector,
    ClassOrder,
    CurvatureData,
    Dataset,
    Detector,
    Method,
    Patience,
    PlateauDetector,
    RelativeRates,
    Schedule,
    Stepped,
    TaskStream,
    Training,
    Watch,
    build_method,
    measured_on,
    method_settings,
)
from became_core.projection import PROJECTORS
from became_core.registry import Setting, nearest

__all__ = ["GROUPS", "Configuration", "Option", "full_method_name", "options"]

BENCHMARK = "split-mnist"

# The groups of options, in the order of the help.
GROUPS = {
    "learn": "What to learn: the data, the tasks, the network",
    "methods": "Which methods, and their settings",
    "training": "How each stage is trained",
    "curvature": "What curvature, the projector's memory and merging paths are measured on",
    "where": "Where: the framework, the machine, the data, the folder of results",
    "output": "What is shown, and what else is written",
}


def _option(help: str, group: str, default: Any = MISSING, *, hint: bool = False, flag: bool = False) -> Any:
    """Return a field that is an option.

    Args:
        help: what ``--help`` says.
        group: where it stands in the help, a key of ``GROUPS``.
        default: its value where neither the user nor a preset gives one; without a default a preset must give one.
        hint: whether the result does not depend on it.
        flag: whether it is given without a value, to turn it on.
    """
    return field(default=default, metadata={"help": help, "group": group, "hint": hint, "flag": flag})


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What a run of one method does, fully resolved.

    >>> Configuration.of({"benchmark": "split-mnist", "lr": 0.2}, "gpm", preset="quick").epochs
    8
    """

    benchmark: str = _option("What to learn", "learn", BENCHMARK)
    tasks: int = _option(
        "How many tasks the classes are split into; it must divide them. 0 is for as many as the data have domains.",
        "learn",
    )
    first: int = _option("Learn only this many tasks, the first ones.", "learn")
    class_order: ClassOrder = _option(
        "How classes are assigned to tasks: in the order of their labels, or in an order that the seed draws.",
        "learn",
        "label",
    )
    single_head: bool = _option(
        "Let all tasks share one head (domain-incremental), whose classes are those of each task in their order. "
        "text-domains and text-sentiment have one anyway.",
        "learn",
        False,
        flag=True,
    )
    boundaries: Literal["known", "unknown"] = _option(
        "Whether the tasks are announced, or a detector cuts the stream of their samples where it changes. Unknown "
        "boundaries need one head for all tasks.",
        "learn",
        "known",
    )
    detector: Literal["bayesian", "plateau"] = _option(
        "What tells unknown boundaries: Bayesian online change-point detection, or plateaus and peaks of the loss.",
        "learn",
        "bayesian",
    )
    hazard: float = _option(
        "How probable a change is at each batch, before anything is seen, for the bayesian detector.", "learn", 0.01
    )
    reservoir: int = _option(
        "How many samples of what comes between two changes are stored, where boundaries are unknown; curvature and "
        "the projector's memory are computed from them alone.",
        "learn",
        200,
    )
    gradual: int = _option(
        "Over how many samples one task goes over into the next, where boundaries are unknown.", "learn", 0
    )
    validation: float = _option("The fraction of each task's training samples that is held out.", "learn", 0.05)
    augment: bool = _option(
        "Whether training images are cropped at random, after padding by 4 pixels, and flipped left to right.",
        "learn",
        False,
    )
    network: str = _option(
        "The backbone: hf:NAME, of Hugging Face's hub or a folder in its layout, on PyTorch alone, or one of these",
        "learn",
    )
    pretrained: bool = _option(
        "Begin with the weights that come with a network of the hub, instead of drawing them.",
        "learn",
        False,
        flag=True,
    )
    norm: Norm = _option(
        "What alexnet and resnet18 normalise by: batch, the statistics of the batch, in testing too; running, the same "
        "in training and running statistics otherwise, estimated anew for every model; group, each image's own "
        "statistics over groups of channels.",
        "learn",
        "batch",
    )
    mixed_precision: bool = _option(
        "Multiply in bfloat16 in training steps; weights, losses, normalisation, memory and everything that is "
        "measured stay float32. A CPU without instructions for bfloat16 emulates them, ten times slower: see "
        "--dry-run.",
        "training",
        False,
        flag=True,
    )
    dropout_masks: DropoutMasks = _option(
        "What draws dropout's masks: numpy, the same masks for every framework, or framework, the framework's own "
        "generator, on the device of the network.",
        "training",
        "numpy",
    )
    compile: bool = _option(
        "Compile training steps as a whole: PyTorch captures them on a GPU, and compiles the network on the CPU; JAX "
        "makes whole epochs one program; TensorFlow compiles its steps in any case. Results are equal up to rounding.",
        "training",
        False,
        hint=True,
        flag=True,
    )
    schedule: Literal["annealed", "stepped", "patience"] = _option(
        "How the learning rate falls in each stage: annealed, along a cosine to 0; stepped, divided after given shares "
        "of the epochs; patience, divided when the validation loss stops improving, until it is small.",
        "training",
    )
    lr: float = _option("The learning rate at the beginning of both stages.", "training")
    epochs: int = _option("Epochs of stage 1; at most this many if the schedule is patience.", "training")
    stage2_epochs: int = _option("Epochs of stage 2; at most this many if the schedule is patience.", "training")
    lr_factor: float = _option("What the schedules stepped and patience divide the rate by.", "training", 2.0)
    lr_steps: tuple[float, ...] = _option(
        "The shares of all epochs after which the schedule stepped divides the rate, each between 0 and 1.",
        "training",
        (0.375, 0.75),
    )
    lr_patience: int = _option(
        "After how many epochs without a better validation loss the schedule patience divides the rate.", "training", 6
    )
    lr_minimum: float = _option(
        "The schedule patience ends a stage when its rate would fall below this.", "training", 5e-5
    )
    head_rate: float = _option("What the learning rate of heads is multiplied by.", "training", 1.0)
    norm_rate: float = _option(
        "What the learning rate of normalisation and of biases is multiplied by.", "training", 1.0
    )
    first_rate: float = _option(
        "What the learning rate of all weights but those of heads and normalisation is multiplied by in the first "
        "task.",
        "training",
        1.0,
    )
    freeze: tuple[str, ...] = _option(
        "Patterns, such as 'conv*', of the parameters or layers that stand still; heads always learn.", "training", ()
    )
    lora: int | None = _option(
        "Learn through low-rank adapters of this rank (LoRA): W + B A in place of W, which becomes the new W when a "
        "stage ends. Shared parameters without adapters stand still. A weight of a lower rank has adapters of that "
        "rank.",
        "training",
        None,
    )
    lora_layers: tuple[str, ...] = _option(
        "Patterns, such as '*.attn.*', of the weights or layers that have low-rank adapters.", "training", ("*",)
    )
    lora_scale: float = _option(
        "What B A is multiplied by; lora_alpha / r in codes that divide by the rank.", "training", 1.0
    )
    optimiser: Literal["sgd", "adam"] = _option("What turns gradients into steps.", "training", "sgd")
    momentum: float = _option("The momentum of SGD.", "training", 0.0)
    weight_decay: float = _option("How much of each parameter is added to its gradient.", "training", 0.0)
    batch_size: int = _option("Samples of a step, in training and in evaluation.", "training", 64)
    projector_samples: int = _option(
        "Training samples of each task for the projector's memory; 0 for all.", "curvature", 125
    )
    curvature_samples: int = _option(
        "Training samples of each task for Fisher information and directional curvature; 0 for all.", "curvature", 0
    )
    curvature_data: CurvatureData = _option(
        "On which samples of each task curvature, and the slopes and losses of merging paths, are measured: training, "
        "validation (those held out by --validation), or augmented (training images under a crop and a flip drawn "
        "once).",
        "curvature",
        "training",
    )
    path_points: int = _option(
        "Trace the true loss and accuracy at this many points of every merging path.", "curvature", 0
    )
    data_dir: Path | None = _option(
        "A folder with the data in the hub's layout; else the environment variable BECAME_DATA_DIR; else the hub.",
        "where",
        None,
        hint=True,
    )
    device: str = _option(
        "Where to compute: auto, cpu, cuda, cuda:1 and so on; on JAX also cuda:all, auto:all or cpu:all, whose devices "
        "share each batch. Under torchrun (torchrun --nproc-per-node N -m adapters.torch.run), of which every "
        "process computes a share of each batch, cuda is each process's own GPU.",
        "where",
        "auto",
        hint=True,
    )
    threads: int | None = _option(
        "How many threads the CPU computes with. Without it as many as the environment variable OMP_NUM_THREADS says; "
        "else one for a small network, which more threads make slower, and the framework's own choice for others.",
        "where",
        None,
        hint=True,
    )
    deterministic: bool = _option(
        "Use only operations that give the same bits every time. The usual operations of a GPU do not; those of a CPU "
        "always do.",
        "where",
        False,
        hint=True,
        flag=True,
    )
    save_every: float = _option(
        "Save a run after an epoch only if it was last saved so many seconds ago, for runs whose epochs are short "
        "beside the time to save them. The end of a stage and a signal save in any case.",
        "where",
        0.0,
        hint=True,
    )
    tracker: str = _option(
        "Also write scalars for a tracker as a run goes",
        "output",
        "none",
        hint=True,
    )
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the values that no other part checks.

        Raises:
            BecameError: if a value cannot be used.
        """
        hub_network(self.network, self.norm, pretrained=self.pretrained)
        for name, value in [*((it.name, getattr(self, it.name)) for it in fields(self)), *self.settings.items()]:
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise BecameError(f"--{_dashed(name)} is {number}; it must be a finite number.")
        if self.batch_size < 1:
            raise BecameError(f"--batch-size is {self.batch_size}; it must be at least 1.")
        for name in ("projector_samples", "curvature_samples", "save_every"):
            if getattr(self, name) < 0:
                raise BecameError(f"--{_dashed(name)} is {getattr(self, name)}; it must be at least 0.")
        if self.threads is not None and self.threads < 1:
            raise BecameError(f"--threads is {self.threads}; it must be at least 1.")
        if self.path_points < 0 or self.path_points == 1:
            raise BecameError("--path-points must be 0 or at least 2.")
        if self.optimiser != "sgd" and self.momentum:
            raise BecameError("--momentum is SGD's; Adam has its own.")
        self._check_curvature_data()

    def _check_curvature_data(self) -> None:
        """Check that there are samples to measure curvature on, and for ``temper`` others to compare them with."""
        if self.curvature_data == "validation" and not self.validation:
            raise BecameError(
                "--curvature-data validation measures on held-out samples, and --validation 0 holds out none; give "
                "--validation a share above 0."
            )
        if self.curvature_data == "validation" and self.settings.get("temper") in ("curvature", "rise"):
            raise BecameError(
                f"--temper {self.settings['temper']} compares held-out samples with those of --curvature-data, and "
                "validation makes them the same; leave out one of the two options."
            )
        if self.curvature_data != "training" and self.boundaries == "unknown":
            raise BecameError(
                f"--curvature-data {self.curvature_data} is for announced tasks; where boundaries are unknown, only "
                "the reservoir's samples are at hand."
            )

    @classmethod
    def of(cls, values: Mapping[str, Any], method: str, preset: str | None = None) -> Self:
        """Return the configuration of a method: these values, and the preset's values for all others.

        Args:
            values: by option name; may be incomplete.
            method: METHOD or METHOD+PROJECTOR.
            preset: the benchmark's usual one if None.

        Raises:
            BecameError: if a name is unknown, or a value cannot be used.
        """
        benchmark = BENCHMARKS[values.get("benchmark", BENCHMARK)]
        tasks = values.get("tasks", benchmark.tasks)
        preset = preset or benchmark.usual
        usual = benchmark.preset(preset, tasks).values_of(method)
        resolved: dict[str, Any] = {"first": tasks, **usual, **values, "tasks": tasks}
        declared = {each.name: each for each in fields(cls) if each.name != "settings"}
        known = options()
        for name in resolved:
            if name not in known:
                raise BecameError(f"there is no option '{name}'{nearest(name, known)}.")
        for name, each in declared.items():
            if each.default is MISSING and name not in resolved:
                raise BecameError(f"the preset '{preset}' of {benchmark.name} has no '{name}'; give it one.")
        settings = {
            name: resolved.get(name, each.default) for name, each in _settings_of(method, benchmark.name).items()
        }
        configuration = cls(**{name: resolved[name] for name in declared if name in resolved}, settings=settings)
        configuration.training()
        configuration.watch()
        configuration.method(method)
        return configuration

    def training(self) -> Training:
        """Return how every method trains.

        Raises:
            BecameError: if a value cannot be used.
        """
        last = max(self.path_points - 1, 1)
        decay = self.weight_decay
        return Training(
            stage1=self._schedule(self.epochs, restores_best=True),
            stage2=self._schedule(self.stage2_epochs, restores_best=False),
            optimiser=SGD(self.momentum, decay) if self.optimiser == "sgd" else Adam(weight_decay=decay),
            batch_size=self.batch_size,
            projector_samples=self.projector_samples or None,
            curvature_samples=self.curvature_samples or None,
            path_alphas=tuple(point / last for point in range(self.path_points)),
            augmentation=Augmentation() if self.augment else None,
            relative=RelativeRates(heads=self.head_rate, norms=self.norm_rate, first=self.first_rate),
            adaptation=Adaptation(self.freeze, self.lora, self.lora_layers, self.lora_scale),
        )

    def watch(self) -> Watch | None:
        """Return how the stream is watched for changes; None if the tasks are announced.

        Raises:
            BecameError: if a value cannot be used.
        """
        detector: Detector = BayesianDetector(self.hazard)
        watch = Watch(detector if self.detector == "bayesian" else PlateauDetector(), self.reservoir, self.gradual)
        return None if self.boundaries == "known" else watch

    def _schedule(self, epochs: int, *, restores_best: bool) -> Schedule:
        if self.schedule == "annealed":
            return Annealed(self.lr, epochs)
        if self.schedule == "stepped":
            return Stepped(self.lr, epochs, self.lr_steps, self.lr_factor)
        return Patience(self.lr, self.lr_factor, self.lr_patience, self.lr_minimum, epochs, restores_best)

    def method(self, name: str) -> Method:
        """Return the method of that name, built with this configuration's settings."""
        known = method_settings()
        return build_method(name, {option: value for option, value in self.settings.items() if option in known})

    @property
    def data_settings(self) -> dict[str, Any]:
        """The settings of the benchmark."""
        return {option: self.settings[option] for option in BENCHMARKS[self.benchmark].settings}

    def stream(self, dataset: Dataset, seed: int) -> TaskStream:
        """Return the tasks that a run of this seed learns."""
        stream = BENCHMARKS[self.benchmark].stream(
            dataset,
            self.tasks,
            validation=self.validation,
            seed=seed,
            class_order=self.class_order,
            settings=self.data_settings,
        )
        if self.single_head:
            stream = replace(stream, shared_head=True)
        stream = stream.first(self.first) if self.first else stream
        return measured_on(stream, self.curvature_data, seed=seed, samples=self.curvature_samples or None)

    def to_json(self) -> dict[str, Any]:
        """Return the values that may change the result, the settings among them, for JSON."""
        return {**self._plain(hint=False), **{name: _plain(value) for name, value in self.settings.items()}}

    def hints(self) -> dict[str, Any]:
        """Return the hints, for JSON."""
        return self._plain(hint=True)

    def _plain(self, *, hint: bool) -> dict[str, Any]:
        declared = [each.name for each in fields(self) if each.metadata.get("hint") is hint]
        return {name: _plain(getattr(self, name)) for name in declared}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], method: str, *, file: str = "config.json") -> Self:
        """Return the configuration that ``to_json`` gave, with the hints as by default.

        Args:
            values: by name; all must be there.
            method: whose settings they have.
            file: what messages call the file.

        Raises:
            BecameError: if an option is missing, or this version does not know one.
        """
        names = {each.name for each in fields(cls) if each.metadata.get("hint") is False}
        expected = names | set(_settings_of(method, str(values.get("benchmark"))))
        for what, odd in (("has an unknown", set(values) - expected), ("lacks the", expected - set(values))):
            if odd:
                raise BecameError(f"{file} {what} option '{min(odd)}'; resume with the version that started this run.")
        read: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        settings = {name: read[name] for name in read if name not in names}
        return cls(**{name: read[name] for name in names}, settings=settings)


def _plain(value: Any) -> Any:
    """A value as JSON gives it back; a path is absolute, so that it holds in any folder."""
    if isinstance(value, Path):
        return str(value.absolute())
    return list(value) if isinstance(value, tuple) else value


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _settings_of(method: str, benchmark: str) -> dict[str, Setting]:
    """The settings of a method, METHOD or METHOD+PROJECTOR, of its projector and of a benchmark, by option name."""
    build_method(method)  # raises if there is no such method
    base, plus, projector = method.partition("+")
    names = METHODS.options_of(base) if base in METHODS else ()
    if not plus:
        projector = METHODS[base].projector if base in METHODS else base
    if projector != "none":
        names += PROJECTORS.options_of(projector)
    of_data = BENCHMARKS[benchmark].settings if benchmark in BENCHMARKS else {}
    return {name: setting for name, setting in method_settings().items() if name in names} | dict(of_data)


@dataclass(frozen=True)
class Option:
    """One option of the command, as the configuration or a setting describes it.

    Attributes:
        name: the name of the field or of the setting; on the command line with dashes.
        type: the type of its value.
        help: what ``--help`` says.
        group: where it stands in the help, a key of ``GROUPS``.
        flag: whether it is given without a value, to turn it on.
        names: the registered names that it chooses from; empty if it is no such choice.
    """

    name: str
    type: Any
    help: str
    group: str
    flag: bool = False
    names: tuple[str, ...] = ()

    def words(self, value: Any) -> list[str]:
        """Return the words on the command line that give the option this value.

        Raises:
            BecameError: if it is a flag that would have to be turned off.
        """
        if self.flag:
            if not value:
                raise BecameError(f"--{_dashed(self.name)} cannot be turned off.")
            return [f"--{_dashed(self.name)}"]
        return [f"--{_dashed(self.name)}", *map(str, value if isinstance(value, tuple) else [value])]


def options() -> dict[str, Option]:
    """Return every option of a configuration by name: its fields, then the settings of all methods and projectors."""
    hints = get_type_hints(Configuration)
    registered = {"benchmark": BENCHMARKS.names, "network": NETWORKS.names, "tracker": ("none", *TRACKERS)}
    of_presets = {
        name
        for benchmark in (BENCHMARKS[name] for name in BENCHMARKS.names)
        for preset in benchmark.presets.values()
        for name in preset.values
    }
    known: dict[str, Option] = {}
    for each in fields(Configuration):
        if each.name == "settings":
            continue
        names, help_text = registered.get(each.name, ()), each.metadata["help"]
        if names:
            help_text = f"{help_text}: {', '.join(names)}."
        if each.name not in of_presets and each.default not in (MISSING, None, False, ()):
            several = isinstance(each.default, tuple)
            help_text += f" (default: {' '.join(map(str, each.default)) if several else each.default})"
        known[each.name] = Option(
            each.name, hints[each.name], help_text, each.metadata["group"], each.metadata["flag"], names
        )
    of_data = {name: each for benchmark in BENCHMARKS for name, each in BENCHMARKS[benchmark].settings.items()}
    for name, setting in {**method_settings(), **of_data}.items():
        if name in known:
            raise BecameError(f"the setting '{name}' of {setting.owners[0]} has the name of another option; rename it.")
        help_text = f"{setting.help[:1].upper()}{setting.help[1:]} ({', '.join(setting.owners)}"
        if name not in of_presets:
            default = " ".join(map(str, setting.default)) if isinstance(setting.default, tuple) else setting.default
            help_text += f"; default: {default}"
        help_text += ")"
        known[name] = Option(name, setting.type, help_text, "learn" if name in of_data else "methods")
    return known


def full_method_name(method: str, projector: str | None) -> str:
    """Return a method's name with a projector that is asked for, unless the method names one or takes none.

    >>> full_method_name("became", "sgp"), full_method_name("joint", "sgp")
    ('became+sgp', 'joint')
    """
    takes_one = method in METHODS and not METHODS[method].alone
    return f"{method}+{projector}" if projector is not None and takes_one else method
