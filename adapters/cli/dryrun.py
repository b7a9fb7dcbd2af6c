"""``--dry-run``: what a command would do, how large it is, how long it may take. Nothing is learned, nothing written.

Convention: a step is one batch; its time is that of a plain training step, the mean of ten after two to warm up.
Projection, validation, memory, curvature and evaluation come on top.
"""

import math
import time
from collections.abc import Sequence
from itertools import cycle, islice

import numpy as np
from rich.console import Console
from rich.table import Table

from adapters.cli.options import Configuration
from became_core.continual import Constraint, Learner, Method, TaskStream, Training, random_stream
from became_core.continual.statistics import weights_of
from became_core.continual.training import epoch_batches

__all__ = ["describe", "steps"]

_WARM_UP, _TIMED = 2, 10


def describe(
    learner: Learner, stream: TaskStream, configuration: Configuration, methods: Sequence[str], seeds: int, out: Console
) -> None:
    """Print the resolved configuration, the number of parameters, and each method's steps and time.

    Args:
        learner: a fresh one, which is of no further use.
        stream: what it would learn.
        configuration: of the runs.
        methods: their names.
        seeds: how many runs there are of each.
        out: where to.
    """
    out.print_json(data={"benchmark": configuration.benchmark.name, **configuration.record()})
    sizes = {name: math.prod(int(n) for n in value.shape) for name, value in weights_of(learner).items()}
    of_heads = sum(sizes[name] for head in learner.heads for name in head)
    shared = sum(sizes.values()) - of_heads
    out.print(f"{shared + of_heads:,} parameters: {shared:,} shared, {of_heads:,} in {len(learner.heads)} heads")
    seconds = _seconds_of_a_step(learner, stream, configuration.preset.training)
    out.print(f"{1000 * seconds:.1f} ms a plain training step of {configuration.preset.training.batch_size} samples")
    table = Table("method", "steps", "time", title="Training, without projection, memory and evaluation")
    training = configuration.preset.training
    total = 0
    for name in methods:
        count = seeds * steps(configuration.method(name), stream, training)
        total += count
        table.add_row(name, _bounded(f"{count:,}", training), _bounded(_duration(count * seconds), training))
    table.add_row("all", _bounded(f"{total:,}", training), _bounded(_duration(total * seconds), training))
    out.print(table)


def steps(method: Method, stream: TaskStream, training: Training) -> int:
    """Return how many steps a run of a method takes, at most where a schedule ends by itself."""
    total = 0
    for task in stream.tasks:
        trained_on = stream.tasks[: task.index + 1] if method.joint else [task]
        an_epoch = len(epoch_batches(trained_on, training.batch_size, random_stream(0, "steps")))
        epochs = training.stage1.epochs
        if method.rule is not None and method.stages == 2 and task.index == 0:
            epochs = training.stage1.extended(training.stage2.epochs).epochs
        elif method.stages == 2:
            epochs += training.stage2.epochs
        total += epochs * an_epoch
    return total


def _seconds_of_a_step(learner: Learner, stream: TaskStream, training: Training) -> float:
    first, others = stream.tasks[0], frozenset[str]().union(*learner.heads[1:])
    batches = epoch_batches([first], training.batch_size, random_stream(0, "steps"), training.augmentation)
    whole = [batch for batch in batches if len(batch.indices) == training.batch_size] or batches
    constraint = Constraint(trainable=frozenset(weights_of(learner)) - others)
    theta = learner.parameters()
    optimiser = training.optimiser.begun({name: theta[name] for name in sorted(constraint.trainable)})
    began = 0.0
    for count in (_WARM_UP, _TIMED):
        rates = np.full(count, training.stage1.lr)
        began = time.perf_counter()
        _, optimiser, _ = learner.train(
            list(islice(cycle(whole), count)), rates, constraint, optimiser, random_stream(0, "dropout")
        )
    return (time.perf_counter() - began) / _TIMED


def _bounded(text: str, training: Training) -> str:
    return f"at most {text}" if training.stage1.needs_validation else text


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
