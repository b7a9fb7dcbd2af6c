"""``--dry-run``: what a command would do, how large it is, how long it may take. It learns and writes nothing.

Convention: a step is one batch; its time is that of a plain training step, the mean of ten after two to warm up.
Projection, validation, memory, curvature and evaluation come on top.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
from rich.console import Console

from adapters.analysis.tables import Column, Table
from adapters.runs.configuration import Configuration
from became_core.continual import Constraint, Learner, Method, TaskStream, Training, random_generator
from became_core.continual.learner import weights_of
from became_core.continual.training import epoch_batches

__all__ = ["Plan", "plan", "steps"]

_WARM_UP, _TIMED = 2, 10


@dataclass(frozen=True)
class Plan:
    """What would be done.

    Attributes:
        configuration: what the runs of all methods have in common, as it is recorded.
        own: by method, what is its own.
        shared: the number of parameters outside heads.
        of_heads: the number of parameters in heads.
        heads: the number of heads.
        batch_size: samples of a step.
        seconds: the time of a plain training step.
        steps: the steps of all seeds together, by method.
        bounded: whether a schedule may end earlier, so that ``steps`` are upper bounds.
    """

    configuration: dict[str, Any]
    own: dict[str, dict[str, Any]]
    shared: int
    of_heads: int
    heads: int
    batch_size: int
    seconds: float
    steps: dict[str, int]
    bounded: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def show(self, out: Console) -> None:
        """Print the configuration, the number of parameters, and the steps and the time of each method."""
        out.print_json(data=self.configuration | self.own)
        total = self.shared + self.of_heads
        out.print(f"{total:,} parameters: {self.shared:,} shared, {self.of_heads:,} in {self.heads} heads")
        out.print(f"{1000 * self.seconds:.1f} ms a plain training step of {self.batch_size} samples")
        rows, most = [], "at most " if self.bounded else ""
        for name, count in {**self.steps, "all": sum(self.steps.values())}.items():
            rows.append([name, f"{most}{count:,}", f"{most}{_duration(count * self.seconds)}"])
        columns = [Column("method"), Column("steps"), Column("time")]
        out.print(Table("Training, without projection, memory and evaluation", columns, rows))


def plan(learner: Learner, stream: TaskStream, configurations: Mapping[str, Configuration], seeds: int) -> Plan:
    """Return what runs would do.

    Args:
        learner: a fresh one; it is of no further use.
        stream: what it would learn.
        configurations: of the runs, by the name of the method.
        seeds: how many runs there are of each method.
    """
    records = {name: configuration.to_json() for name, configuration in configurations.items()}
    first = next(iter(records.values()))
    common = {
        name: value
        for name, value in first.items()
        if all(name in record and record[name] == value for record in records.values())
    }
    training = next(iter(configurations.values())).training()
    sizes = {name: math.prod(int(n) for n in value.shape) for name, value in weights_of(learner).items()}
    of_heads = sum(sizes[name] for head in learner.heads for name in head)
    return Plan(
        configuration=common,
        own={
            name: {option: value for option, value in record.items() if option not in common}
            for name, record in records.items()
        },
        shared=sum(sizes.values()) - of_heads,
        of_heads=of_heads,
        heads=len(learner.heads),
        batch_size=training.batch_size,
        seconds=_seconds_of_a_step(learner, stream, training),
        steps={
            name: seeds * steps(configuration.method(name), stream, training)
            for name, configuration in configurations.items()
        },
        bounded=training.stage1.needs_validation,
    )


def steps(method: Method, stream: TaskStream, training: Training) -> int:
    """Return how many steps a run of a method takes; an upper bound where a schedule ends by itself."""
    total = 0
    for task in stream.tasks:
        trained_on = stream.tasks[: task.index + 1] if method.joint else [task]
        an_epoch = len(epoch_batches(trained_on, training.batch_size, random_generator(0, "steps")))
        epochs = training.stage1.epochs
        if method.rule is not None and method.stages == 2 and task.index == 0:
            epochs = training.stage1.extended(training.stage2.epochs).epochs
        elif method.stages == 2:
            epochs += training.stage2.epochs
        total += epochs * an_epoch
    return total


def _seconds_of_a_step(learner: Learner, stream: TaskStream, training: Training) -> float:
    first, others = stream.tasks[0], frozenset[str]().union(*learner.heads[1:])
    batches = epoch_batches([first], training.batch_size, random_generator(0, "steps"), training.augmentation)
    whole = [batch for batch in batches if len(batch.indices) == training.batch_size] or batches
    constraint = Constraint(trainable=frozenset(weights_of(learner)) - others)
    theta = learner.parameters()
    optimiser = training.optimiser.initial({name: theta[name] for name in sorted(constraint.trainable)})
    began = 0.0
    for count in (_WARM_UP, _TIMED):
        rates = np.full(count, training.stage1.lr)
        began = time.perf_counter()
        _, optimiser, _ = learner.train(
            list(islice(cycle(whole), count)), rates, constraint, optimiser, random_generator(0, "dropout")
        )
    return (time.perf_counter() - began) / _TIMED


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
