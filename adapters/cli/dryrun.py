"""``--dry-run``: how large the networks of a command are, how many steps it takes, and how long. It writes nothing.

The time of a method is that of short runs of it: three tasks, with a part of their samples and few epochs. Every phase
that a run has is measured there, checkpoints included, and is carried over to all tasks, samples and epochs:

| phase | what it grows with |
| --- | --- |
| training | steps, and epochs, each of which ends with a checkpoint; what precedes the first one, with the samples |
| memory | the samples that curvature, and perhaps the projector, are measured on |
| merging | the samples that curvature is measured on; the path's report also with the number of tasks so far |
| evaluation | the test samples of all tasks so far, and the tasks so far that are seen through a view of their own |

Convention: a step is one batch. The first tasks stand for themselves, the last of them for all later ones. Times are
those of this machine as busy as it is now; where several times are measured, the median counts.
"""

import heapq
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
from rich.console import Console

from adapters.analysis.tables import Column, Table, print_table
from adapters.backend.entry import available_threads
from adapters.runs import Checkpoints
from adapters.runs.configuration import Configuration
from became_core.continual import (
    Callback,
    Learner,
    Method,
    RunState,
    Schedule,
    Task,
    TaskStream,
    Training,
    learn,
    random_generator,
)
from became_core.continual.learner import weights_of
from became_core.continual.training import epoch_batches

__all__ = ["PHASES", "Plan", "plan", "steps"]

PHASES = ("training", "memory", "merging", "evaluation")

# Of a short run: its tasks, its epochs in each stage if it is quick, and the seconds that it may take, more or less.
_TASKS, _EPOCHS, _SECONDS = 3, 3, 3.0


@dataclass(frozen=True)
class Plan:
    """What would be done.

    Attributes:
        configuration: what the runs of all methods have in common, as it is recorded.
        own: by method, what is its own.
        shared: the number of parameters that all tasks have, in the one head of all tasks too.
        of_heads: the number of parameters in heads of single tasks.
        heads: the number of heads of single tasks; 0 where all tasks share one.
        steps: the steps of all seeds together, by method.
        seconds: the estimated time of all seeds together, by method and then by phase.
        bounded: whether a schedule may end earlier, so that steps and times are upper bounds.
        seeds: how many runs there are of each method.
        workers: how many runs are carried out at the same time.
        threads: how many threads each of them has; None if that was not asked.
        elapsed: the estimated seconds from the beginning to the end of all runs.
    """

    configuration: dict[str, Any]
    own: dict[str, dict[str, Any]]
    shared: int
    of_heads: int
    heads: int
    steps: dict[str, int]
    seconds: dict[str, dict[str, float]]
    bounded: bool
    seeds: int
    elapsed: float
    workers: int = 1
    threads: int | None = None

    def with_workers(self, workers: int, threads: int, cores: int | None = None) -> Self:
        """Return the plan for some workers at the same time, which begin the next run as they end one.

        If their threads are more than the cores, they wait for each other. That they share the memory's bandwidth, and
        that each loads its framework first, is not in the estimate.

        Args:
            workers: how many there are.
            threads: how many threads each run has.
            cores: how many cores there are for all; those that this process may use if None.
        """
        ends = [0.0] * workers
        for _ in range(self.seeds):
            for phases in self.seconds.values():
                heapq.heapreplace(ends, ends[0] + sum(phases.values()) / self.seeds)
        busy = min(workers, self.seeds * len(self.seconds)) * threads
        elapsed = max(ends) * max(1.0, busy / (cores or available_threads()))
        return replace(self, workers=workers, threads=threads, elapsed=elapsed)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def show(self, out: Console, *, quiet: bool = False) -> None:
        """Print the steps and the time of each method, and, unless quiet, the number of parameters."""
        most = "at most " if self.bounded else ""
        totals = {name: sum(seconds.values()) for name, seconds in self.seconds.items()}
        rows = [
            [name, f"{self.steps[name]:,}", *(_duration(seconds[phase]) for phase in PHASES), _duration(totals[name])]
            for name, seconds in self.seconds.items()
        ]
        if len(rows) > 1:
            of_phases = [sum(seconds[phase] for seconds in self.seconds.values()) for phase in PHASES]
            times = map(_duration, (*of_phases, sum(totals.values())))
            rows.append(["all", f"{sum(self.steps.values()):,}", *times])
        columns = [Column("method"), Column("steps"), *map(Column, PHASES), Column("in all")]
        title = f"{most or 'about '}what each method would take, and its time by phase"
        print_table(out, Table(title.capitalize(), columns, rows))
        if self.workers > 1:
            threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
            out.print(
                f"with {self.workers} workers of {threads} each: {most or 'about '}{_duration(self.elapsed)} from the "
                "beginning to the end",
                soft_wrap=True,
                highlight=False,
            )
        if not quiet:
            out.print(self._parameters())
            out.print("--print-config shows the configuration.")

    def _parameters(self) -> str:
        """Return in words how many parameters there are; heads are left out where the tasks share one."""
        heads = f", {self.of_heads:,} in {self.heads} head{'s' if self.heads != 1 else ''}" if self.heads else ""
        return f"{self.shared + self.of_heads:,} parameters: {self.shared:,} shared{heads}"


def plan(
    learner: Callable[[], Learner], stream: TaskStream, configurations: Mapping[str, Configuration], seeds: int
) -> Plan:
    """Return what runs would do.

    Args:
        learner: returns a fresh learner.
        stream: what it would learn.
        configurations: of the runs, by the name of the method.
        seeds: how many runs there are of each method.
    """
    common, own = shared_values(configurations)
    training = next(iter(configurations.values())).training()
    fresh = learner()
    sizes = {name: math.prod(int(n) for n in value.shape) for name, value in weights_of(fresh).items()}
    of_heads = sum(sizes[name] for head in fresh.heads for name in head)
    methods = {name: configuration.method(name) for name, configuration in configurations.items()}
    trainings = {name: configuration.training() for name, configuration in configurations.items()}
    times = {
        name: {phase: seeds * seconds for phase, seconds in estimated(learner, stream, method, trainings[name]).items()}
        for name, method in methods.items()
    }
    return Plan(
        configuration=common,
        own=own,
        shared=sum(sizes.values()) - of_heads,
        of_heads=of_heads,
        heads=sum(bool(head) for head in fresh.heads),
        steps={name: seeds * steps(method, stream, trainings[name]) for name, method in methods.items()},
        seconds=times,
        bounded=training.stage1.needs_validation,
        seeds=seeds,
        elapsed=sum(sum(phases.values()) for phases in times.values()),
    )


def shared_values(configurations: Mapping[str, Configuration]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the values that all configurations have, and those that are each method's own, as they are recorded."""
    records = {name: configuration.to_json() for name, configuration in configurations.items()}
    first, *others = records.values()
    common = {name: value for name, value in first.items() if all(other.get(name, ...) == value for other in others)}
    own = {
        name: {option: value for option, value in record.items() if option not in common}
        for name, record in records.items()
    }
    return common, own


def steps(method: Method, stream: TaskStream, training: Training) -> int:
    """Return how many steps a run of a method takes; an upper bound where a schedule ends by itself."""
    return sum(
        epochs * _steps_of_an_epoch(method, stream, training, task)
        for task in stream.tasks
        for epochs in _epochs(method, training, task)
    )


def _epochs(method: Method, training: Training, task: Task) -> tuple[int, ...]:
    """Return how many epochs each stage of a task has."""
    if method.merges_stages and task.index == 0:
        return (training.stage1.extended(training.stage2.epochs).epochs,)
    return (training.stage1.epochs, training.stage2.epochs)[: method.stages]


def _steps_of_an_epoch(method: Method, stream: TaskStream, training: Training, task: Task) -> int:
    trained_on = stream.tasks[: task.index + 1] if method.joint else [task]
    return len(epoch_batches(trained_on, training.batch_size, random_generator(0, "steps")))


def estimated(
    learner: Callable[[], Learner], stream: TaskStream, method: Method, training: Training
) -> dict[str, float]:
    """Return the seconds that a run of a method would take, by phase.

    Args:
        learner: returns a fresh learner.
        stream: what it would learn.
        method: the method.
        training: how it would train.
    """
    whole = min(len(task.train) for task in stream.tasks)
    fewest = min(whole, max(2 * training.batch_size, training.projector_samples or 0))
    warming = _short_run(learner, stream, method, training, fewest, epochs=1)  # the first of its kind: not counted
    quick = warming.total < _SECONDS / 2
    few = _short_run(learner, stream, method, training, fewest, epochs=_EPOCHS) if quick else warming
    factor = max(_SECONDS / max(few.total, 1e-3), 3.0)
    many = _short_run(learner, stream, method, training, min(whole, int(factor * fewest)), few.epochs)
    return _carried_over(few, many, stream, method, training)


@dataclass
class _ShortRun(Callback):
    """A short run, as a callback of it.

    Attributes:
        stream: its tasks.
        epochs: how many epochs each stage has, at most.
        total: its seconds.
        phases: for each task, the seconds by phase.
        by_epoch: for each task and stage, the seconds of each epoch; the first has those from the stage's beginning.
        views: for each task, how many tasks up to it are evaluated by a view of their own.
    """

    stream: TaskStream
    epochs: int
    total: float = 0.0
    phases: list[dict[str, float]] = field(default_factory=list)
    by_epoch: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    views: list[int] = field(default_factory=list)
    _last: dict[str, float] = field(default_factory=dict)
    _before_task: dict[str, float] = field(default_factory=dict)

    def on_state(self, state: RunState) -> None:
        """Note how long the epoch took, or the task."""
        seconds = state.record.seconds
        if state.stage is not None:
            stage = state.stage.number
            phase = f"stage{stage}"
            spent = seconds.get(phase, 0.0) - self._last.get(phase, 0.0)
            self.by_epoch.setdefault((state.task, stage), []).append(spent)
            self._last = dict(seconds)
            return
        self.phases.append({name: spent - self._before_task.get(name, 0.0) for name, spent in seconds.items()})
        self._last = self._before_task = dict(seconds)
        self.total = seconds["total"]
        projector, tasks = state.memory.projector, range(len(self.phases))
        self.views.append(0 if projector is None else sum(projector.view(task) is not None for task in tasks))


def _short_run(
    learner: Callable[[], Learner], stream: TaskStream, method: Method, training: Training, samples: int, epochs: int
) -> _ShortRun:
    """Return a run of the first tasks with so many samples of each, in training and in testing."""

    def part(rows: Any) -> Any:
        return rows[np.linspace(0, len(rows) - 1, min(samples, len(rows))).astype(int)]

    tasks = stream.first(min(_TASKS, len(stream.tasks))).tasks
    short = replace(stream, tasks=tuple(replace(task, train=part(task.train), test=part(task.test)) for task in tasks))
    stages: list[Schedule] = [replace(stage, epochs=epochs) for stage in (training.stage1, training.stage2)]
    training = replace(training, stage1=stages[0], stage2=stages[1])
    run = _ShortRun(short, epochs)
    with TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), short, method, training)
        learn(learner(), short, method, training, callbacks=(checkpoints, run))
    return run


def _carried_over(
    few: _ShortRun, many: _ShortRun, stream: TaskStream, method: Method, training: Training
) -> dict[str, float]:
    """Return the seconds of a run of all tasks by phase, from two short runs of few and of many samples."""
    seconds = dict.fromkeys(PHASES, 0.0)
    rows_tested = 0
    for task in stream.tasks:
        like = min(task.index, len(many.phases) - 1)
        rows_tested += len(task.test)
        samples = [len(run.stream.tasks[like].train) for run in (few, many)]
        for stage, epochs in enumerate(_epochs(method, training, task), start=1):
            an_epoch = _line(
                [_steps_of_an_epoch(method, run.stream, training, run.stream.tasks[like]) for run in (few, many)],
                [statistics.median(run.by_epoch[like, stage]) for run in (few, many)],
                _steps_of_an_epoch(method, stream, training, task),
            )
            of_stages = [run.by_epoch[like, stage] for run in (few, many)]
            before = [of_epochs[0] - statistics.median(of_epochs) for of_epochs in of_stages]
            seconds["training"] += epochs * an_epoch + _line(samples, before, len(task.train))
        for phase, parts in (("memory", ("memory",)), ("merging", ("merge", "path"))):
            for part in parts:
                of_runs = [run.phases[like].get(part, 0.0) for run in (few, many)]
                curved = [min(count, training.curvature_samples or count) for count in (*samples, len(task.train))]
                growth = (task.index + 1) / (like + 1) if part == "path" else 1
                seconds[phase] += growth * _line(curved[:2], of_runs, curved[2])
        tested = sum(len(learned.test) for learned in many.stream.tasks[: like + 1])
        seen = many.views[like]
        later = task.index - like if seen else 0  # of later tasks, all have a view, or none has
        passes = (1 + seen + later) / (1 + seen)
        seconds["evaluation"] += passes * many.phases[like].get("evaluation", 0.0) * rows_tested / tested
    return seconds


def _line(sizes: Sequence[int], seconds: Sequence[float], size: int) -> float:
    """Return the time of a size, on the line through two measured times, which rises and has nothing below 0 on it."""
    (smaller, larger), (before, after) = sizes, seconds
    if larger == smaller:
        return after * max(size / larger, 1.0) if larger else after
    slope = min(max((after - before) / (larger - smaller), 0.0), after / larger)
    return max(after + slope * (size - larger), 0.0)


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
