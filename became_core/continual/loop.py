"""The continual run (BECAME, Algorithm 1): for each task stage 1, stage 2, merge, then memory and evaluation.

The loop knows only the learner protocol. The first task has nothing to protect, so stage 2 would continue stage 1 as
it was: it is trained once, without constraint, for both stages' epochs.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from became_core.arrays import Params, named_leaves
from became_core.continual.evaluation import accuracies, mean_loss
from became_core.continual.learner import Constraint, Learner, Penalty
from became_core.continual.measurement import Measurement
from became_core.continual.methods import Method
from became_core.continual.record import PathPoint, RunRecord, TaskEnd
from became_core.continual.schedule import Schedule
from became_core.continual.stream import Task, TaskStream
from became_core.continual.training import EpochEnd, Training, train_stage
from became_core.laplace import LaplacePosterior, trace_path
from became_core.projection import Projector

__all__ = ["learn"]


@dataclass(frozen=True)
class Memory:
    """What is kept of the old tasks: a value, replaced after each task."""

    projector: Projector | None = None
    posterior: LaplacePosterior | None = None


def learn(
    learner: Learner,
    stream: TaskStream,
    method: Method,
    training: Training,
    *,
    seed: int = 0,
    observe: Callable[[EpochEnd | TaskEnd], None] = lambda event: None,
) -> RunRecord:
    """Learn a stream of tasks with a method and return the record; the learner is left with the final weights.

    Args:
        learner: a fresh network with a head for each task.
        stream: the tasks.
        method: what is done with each.
        training: schedules and sizes.
        seed: names every random draw, with task, stage and epoch.
        observe: called at the end of every epoch and of every task.

    Raises:
        BecameError: if training diverges.
    """
    run = _Run(learner, stream, method, training, seed, observe)
    memory = Memory(projector=method.projector)
    for task in stream.tasks:
        memory = run.learn_task(task, memory)
    return run.record


@dataclass
class _Run:
    """One run in progress: what is given, and the record that grows."""

    learner: Learner
    stream: TaskStream
    method: Method
    training: Training
    seed: int
    observe: Callable[[EpochEnd | TaskEnd], None]

    def __post_init__(self) -> None:
        shape = (len(self.stream.tasks), len(self.stream.tasks))
        self.record = RunRecord(accuracy=np.full(shape, np.nan), class_incremental_accuracy=np.full(shape, np.nan))

    def learn_task(self, task: Task, memory: Memory) -> Memory:
        """Learn one task; return the memory that includes it."""
        method, training = self.method, self.training
        merges = method.rule is not None and task.index > 0
        first_stage = training.stage1
        if method.rule is not None and not merges:
            first_stage = training.stage1.extended(training.stage2.epochs)
        with self.phase("stage1"):
            epochs = self.train(task, first_stage, self.stable_constraint(task, memory), stage=1)
        alpha: float | None = None
        if merges:
            theta_gp = self.learner.parameters()
            with self.phase("stage2"):
                epochs += self.train(task, training.stage2, self.free_constraint(task), stage=2)
            alpha = self.merge(task, theta_gp, memory)
        with self.phase("memory"):
            memory = self.remember(task, memory)
        self.record.alpha.append(alpha)
        self.record.epochs.append(epochs)
        self.record.ranks.append({} if memory.projector is None else dict(memory.projector.rank))
        self.evaluate(task, alpha)
        return memory

    def train(self, task: Task, schedule: Schedule, constraint: Constraint, stage: int) -> int:
        return train_stage(
            self.learner,
            self.seen(task) if self.method.joint else [task],
            schedule,
            constraint,
            stage=stage,
            optimiser=self.training.optimiser,
            batch_size=self.training.batch_size,
            seed=self.seed,
            observe=self.observe,
        )

    def free_constraint(self, task: Task) -> Constraint:
        """Everything may change but the heads of other tasks (of later ones, in joint training)."""
        tasks = {seen.index for seen in self.seen(task)} if self.method.joint else {task.index}
        others = frozenset[str]().union(*(head for index, head in enumerate(self.learner.heads) if index not in tasks))
        return Constraint(trainable=frozenset(self.learner.parameters()) - others)

    def stable_constraint(self, task: Task, memory: Memory) -> Constraint:
        """Stage 1: projected, penalised or free, as the method has it; the first task is free."""
        free = self.free_constraint(task)
        if memory.projector is not None and task.index > 0:
            # What a projector cannot protect (biases, normalisation) is frozen once the first task has set it.
            protected = self.learner.projectable | self.learner.heads[task.index]
            trainable = free.trainable if memory.projector.protects_all else protected
            return Constraint(trainable=trainable, projector=memory.projector)
        if self.method.penalty_strength > 0 and memory.posterior is not None:
            return Constraint(free.trainable, penalty=Penalty(memory.posterior, self.method.penalty_strength))
        return free

    def merge(self, task: Task, theta_gp: Params, memory: Memory) -> float | None:
        """Merge the two stages' weights and give them to the learner; return theta_hat's coefficient (their mean)."""
        rule, posterior = self.method.rule, memory.posterior
        assert rule is not None
        assert posterior is not None
        with self.phase("merge"):
            theta_hat = self.learner.parameters()
            merged = rule.merge((theta_gp, theta_hat), (posterior, self.measurement(task, "merge")))
        if self.training.path_alphas:
            with self.phase("path"):
                self.record.paths.append(self.trace(task, theta_gp, theta_hat))
        self.learner.assign(merged.theta)
        return None if merged.alpha is None else float(np.mean([float(a) for a in named_leaves(merged.alpha).values()]))

    def trace(self, task: Task, theta_gp: Params, theta_hat: Params) -> list[PathPoint]:
        def truth(theta: Params) -> tuple[float, float]:
            self.learner.assign(theta)
            size, seen = self.training.batch_size, self.seen(task)
            loss = sum(
                mean_loss(self.learner, old.index, self.measurement(old, "merge").curvature_rows(), size)
                for old in seen
            )
            return loss, float(np.mean(accuracies(self.learner, seen, size)[0]))

        alphas = self.training.path_alphas
        traced = trace_path(truth, theta_gp, theta_hat, alphas)
        return [PathPoint(alpha, *found) for alpha, found in zip(*traced, strict=True)]

    def remember(self, task: Task, memory: Memory) -> Memory:
        """Return the memory with this task: posterior at the merged weights, projector from the task's inputs."""
        projector, posterior = memory.projector, memory.posterior
        measurement = self.measurement(task, "posterior")
        if self.method.keeps_posterior:
            theta, fisher = self.learner.parameters(), measurement.diagonal()
            posterior = LaplacePosterior(theta, fisher) if posterior is None else posterior.update(theta, fisher)
        if projector is not None:
            projector = projector.remember(measurement)  # type: ignore[arg-type] # it has no logit gradients yet
        return Memory(projector, posterior)

    def evaluate(self, task: Task, alpha: float | None) -> None:
        with self.phase("evaluation"):
            seen = self.seen(task)
            within, among_all = accuracies(self.learner, seen, self.training.batch_size)
        self.record.accuracy[task.index, : len(seen)] = within
        self.record.class_incremental_accuracy[task.index, : len(seen)] = among_all
        self.observe(TaskEnd(task.index, alpha, within, among_all))

    def measurement(self, task: Task, purpose: str) -> Measurement:
        return Measurement(self.learner, task, self.training, self.method.fisher, self.seed, purpose)

    def seen(self, task: Task) -> Sequence[Task]:
        return self.stream.tasks[: task.index + 1]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.record.seconds[name] = self.record.seconds.get(name, 0.0) + time.perf_counter() - began
