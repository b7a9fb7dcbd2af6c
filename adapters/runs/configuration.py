"""The configuration of a run: its options' values, and what they make of the run's parts.

The options are described in ``options.py``. A configuration is made of what the user gave and of a preset (``of``), is
recorded in ``config.json`` and ``results.json`` (``to_json``), and is what ``--resume`` and ``--config`` go on from
(``from_json``). Two runs of equal configuration (hints aside), method and seed are the same run.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.networks import hub_network
from adapters.runs.options import RunOptions, option_word, options
from became_core import BecameError
from became_core.continual import (
    METHODS,
    SGD,
    Adam,
    Adaptation,
    Annealed,
    Augmentation,
    BayesianDetector,
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
    scored_on,
)
from became_core.projection import PROJECTORS
from became_core.registry import Setting, nearest

__all__ = ["Configuration", "full_method_name"]


@dataclass(frozen=True, kw_only=True)
class Configuration(RunOptions):
    """What a run of one method does, fully resolved.

    >>> Configuration.of({"benchmark": "split-mnist", "lr": 0.2}, "gpm", preset="quick").epochs
    8

    Attributes:
        settings: those of the method, of its projector and of the benchmark, by option name.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the values that no other part checks.

        Raises:
            BecameError: if a value cannot be used.
        """
        hub_network(self.network, self.norm, pretrained=self.pretrained)
        for name, value in {**vars(self), **self.settings}.items():
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise BecameError(f"{option_word(name)} is {number}; it must be a finite number.")
        if self.batch_size < 1:
            raise BecameError(f"--batch-size is {self.batch_size}; it must be at least 1.")
        for name in ("projector_samples", "curvature_samples", "save_every"):
            if getattr(self, name) < 0:
                raise BecameError(f"{option_word(name)} is {getattr(self, name)}; it must be at least 0.")
        if self.threads is not None and self.threads < 1:
            raise BecameError(f"--threads is {self.threads}; it must be at least 1.")
        if self.path_points < 0 or self.path_points == 1:
            raise BecameError("--path-points must be 0 or at least 2.")
        if self.optimiser != "sgd" and self.momentum:
            raise BecameError("--momentum is SGD's; Adam has its own.")
        self._check_held_out()
        self._check_curvature_data()

    def _check_held_out(self) -> None:
        """Check that samples are held out if an option is about them."""
        for name, use in {"curvature_data": "measures", "score_on": "scores models"}.items():
            if getattr(self, name) == "validation" and not self.validation:
                raise BecameError(
                    f"{option_word(name)} validation {use} on held-out samples, and --validation 0 holds out none; "
                    "give --validation a share above 0."
                )

    def _check_curvature_data(self) -> None:
        """Check that curvature is measured on samples that differ from those it is compared with, and are at hand."""
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
        benchmark = BENCHMARKS[values.get("benchmark", cls.benchmark)]
        tasks = values.get("tasks", benchmark.tasks)
        preset = preset or benchmark.usual
        usual = benchmark.preset(preset, tasks).values_of(method)
        resolved: dict[str, Any] = {"first": tasks, **usual, **values, "tasks": tasks}
        declared, known = {each.name: each.default for each in fields(RunOptions)}, options()
        for name in resolved:
            if name not in known:
                raise BecameError(f"there is no option '{name}'{nearest(name, known)}.")
        for name, default in declared.items():
            if default is MISSING and name not in resolved:
                raise BecameError(f"the preset '{preset}' of {benchmark.name} has no '{name}'; give it one.")
        settings = {
            name: resolved.get(name, each.default) for name, each in _settings_of(method, benchmark.name).items()
        }
        configuration = cls(**{name: resolved[name] for name in declared if name in resolved}, settings=settings)
        if "first" in values and configuration.first < 1:
            raise BecameError(f"the first {configuration.first} tasks are asked for; give at least 1.")
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
        stream = scored_on(stream, self.score_on)
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


def full_method_name(method: str, projector: str | None) -> str:
    """Return a method's name with a projector that is asked for, unless the method names one or takes none.

    >>> full_method_name("became", "sgp"), full_method_name("joint", "sgp")
    ('became+sgp', 'joint')
    """
    takes_one = method in METHODS and not METHODS[method].alone
    return f"{method}+{projector}" if projector is not None and takes_one else method
