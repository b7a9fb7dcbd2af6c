"""The continual run (BECAME, Algorithm 1): for each task stage 1, stage 2, merge, then memory and evaluation.

The loop knows only the learner protocol. The first task has nothing to protect, so stage 2 would continue stage 1 as
it was: it is trained once, without constraint, for both stages' epochs.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from became_core.arrays import Params, named_leaves, size_in_bytes
from became_core.continual.estimates import Approximations, new_sides, old_sides
from became_core.continual.evaluation import accuracies
from became_core.continual.learner import Constraint, Learner, Penalty
from became_core.continual.measurement import Measurement
from became_core.continual.methods import Method
from became_core.continual.record import MergePath, PathPoint, RunRecord, TaskEnd
from became_core.continual.rows import layers_in_a_row
from became_core.continual.schedule import Schedule
from became_core.continual.seeding import random_stream
from became_core.continual.stream import Task, TaskStream
from became_core.continual.training import EpochEnd, Training, train_stage
from became_core.laplace import LaplacePosterior, LocalLoss, Precision, trace_path
from became_core.projection import HAT, TRGP, GatedRegion, PackNet, Projector, Region, TrustRegion, View, full

__all__ = ["learn"]


@dataclass(frozen=True)
class Memory:
    """What is kept of the old tasks: a value, replaced after each task."""

    projector: Projector | None = None
    posterior: LaplacePosterior | None = None
    regions: Mapping[int, TrustRegion] = field(default_factory=dict)
    models: Mapping[str, Params] = field(default_factory=dict)
    approximations: Approximations | None = None

    @property
    def size(self) -> int:
        """The bytes of all that a method keeps; what is for reports alone is not counted."""
        return size_in_bytes([self.projector, self.posterior, dict(self.regions), dict(self.models)])

    @property
    def views(self) -> Mapping[int, View]:
        """What each task sees of the weights, of those that see them otherwise than they are."""
        if isinstance(self.projector, PackNet | HAT):
            return {task: self.projector.view(task) for task in range(self.projector.tasks)}
        return self.regions

    @property
    def full(self) -> frozenset[str]:
        """The names of the projector's spaces that are protected whole."""
        return frozenset() if self.projector is None else full(self.projector)


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
        method = self.method
        merges = method.rule is not None and task.index > 0
        old = self.learner.parameters()
        epochs, memory = self.first_stage(task, memory)
        theta_gp = self.learner.parameters()
        alpha: float | None = None
        curvature: Precision | None = None
        if method.merges == "tasks":
            if self.keeps_posterior:
                with self.phase("memory"):
                    curvature = self.measurement(task, "posterior", memory).precision(method.precision)
            if method.transfer is not None:
                memory = replace(memory, models=method.transfer.kept(memory.models, old, theta_gp))
            # The task's head is its own model's: the old one has not trained it.
            theta_gp = old | {name: theta_gp[name] for name in self.learner.heads[task.index]}
        elif method.stages == 2:
            more, memory = self.second_stage(task, memory)
            epochs += more
        if merges:
            alpha = self.merge(task, theta_gp, memory, curvature)
        before = memory.full
        with self.phase("memory"):
            memory = self.remember(task, memory, curvature)
        self.record.alpha.append(alpha)
        self.record.epochs.append(epochs)
        self.record.ranks.append({} if memory.projector is None else dict(memory.projector.rank))
        self.record.memory.append(memory.size)
        self.evaluate(task, alpha, memory, memory.full - before)
        return memory

    def first_stage(self, task: Task, memory: Memory) -> tuple[int, Memory]:
        """Train a task under the method's constraint; return the epochs and the memory with what it sees."""
        method, training = self.method, self.training
        projector = memory.projector
        if isinstance(projector, HAT) and not projector.order:
            order, heads = layers_in_a_row(self.learner, task)
            memory = replace(memory, projector=replace(projector, order=order, heads=heads))
        if method.transfer is not None and memory.models:
            merged = self.learner.parameters()
            self.learner.assign(method.transfer.start(memory.models, merged, self.heads))
        schedule = training.stage1
        if method.rule is not None and method.stages == 2 and task.index == 0:
            schedule = schedule.extended(training.stage2.epochs)
        with self.phase("stage1"):
            epochs, region = self.train(task, schedule, self.stable_constraint(task, memory), stage=1)
        if isinstance(region, TrustRegion):
            memory = replace(memory, regions={**memory.regions, task.index: region})
        if isinstance(region, GatedRegion) and isinstance(memory.projector, HAT):
            memory = replace(memory, projector=memory.projector.settled(region))
        return epochs, memory

    def second_stage(self, task: Task, memory: Memory) -> tuple[int, Memory]:
        """Train on: without constraint, or, in PackNet, what is left after pruning; return as the first stage does."""
        if isinstance(memory.projector, PackNet):
            packed, theta = memory.projector.pruned(self.learner.parameters(), self.learner.projectable)
            self.learner.assign(theta)
            memory = replace(memory, projector=packed)
            constraint = replace(self.stable_constraint(task, memory), projector=packed)
        elif task.index == 0:
            return 0, memory
        else:
            constraint = replace(self.free_constraint(task), region=memory.regions.get(task.index))
        with self.phase("stage2"):
            return self.train(task, self.training.stage2, constraint, stage=2)[0], memory

    def train(self, task: Task, schedule: Schedule, constraint: Constraint, stage: int) -> tuple[int, Region | None]:
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
        """Stage 1: projected, penalised, both or free, as the method has it; the first task is free."""
        constraint = self.free_constraint(task)
        if self.method.penalty_strength > 0 and memory.posterior is not None:
            constraint = replace(constraint, penalty=Penalty(memory.posterior, self.method.penalty_strength))
        if self.method.transfer is not None and memory.models:
            constraint = replace(constraint, penalty=self.method.transfer.penalty(memory.models, self.heads))
        projector = memory.projector
        if isinstance(projector, HAT):
            region = projector.region(self.learner.parameters(), random_stream(self.seed, "gates", task.index))
            constraint = replace(constraint, region=region, trains_scales=True)
        if projector is None or task.index == 0:
            return constraint
        if not projector.protects_all:
            # What it cannot protect (biases, normalisation) is frozen once the first task has set it.
            constraint = replace(constraint, trainable=self.learner.projectable | self.learner.heads[task.index])
        if isinstance(projector, TRGP):
            trusted = projector.trust_region(self.measurement(task, "trust-region", memory).gradients())
            constraint = replace(constraint, region=trusted, trains_scales=True)
        return replace(constraint, projector=projector)

    def merge(self, task: Task, theta_gp: Params, memory: Memory, curvature: Precision | None) -> float | None:
        """Merge these weights and the learner's and give them to the learner; return theta_hat's coefficient (mean).

        Args:
            task: the last one.
            theta_gp: the stable weights, or the old model.
            memory: of the old tasks.
            curvature: the task's at the learner's weights, if it has been measured.
        """
        with self.phase("merge"):
            theta_hat = self.learner.parameters()
            new: LocalLoss = self.measurement(task, "merge", memory)
            if curvature is None and self.method.precision != "diagonal":
                curvature = self.measurement(task, "merge", memory).precision(self.method.precision)
            if curvature is not None:
                new = LaplacePosterior(theta_hat, curvature)
            rule = self.method.rule_after(task.index, lambda theta: self.true_loss(task, theta, memory))
            assert rule is not None
            losses = (new,) if memory.posterior is None else (memory.posterior, new)
            merged = rule.merge((theta_gp, theta_hat), losses)
        self.learner.assign(theta_hat)
        if self.training.path_alphas:
            with self.phase("path"):
                self.record.paths.append(self.look_along(task, theta_gp, theta_hat, memory))
        self.learner.assign(merged.theta)
        return None if merged.alpha is None else float(np.mean([float(a) for a in named_leaves(merged.alpha).values()]))

    def true_loss(self, task: Task, theta: Params, memory: Memory) -> float:
        """Return the loss of all tasks so far, on their own data, at these weights, which the learner is left with."""
        self.learner.assign(theta)
        return sum(self.measurement(each, "merge", memory).loss() for each in self.seen(task))

    def look_along(self, task: Task, theta_gp: Params, theta_hat: Params, memory: Memory) -> MergePath:
        """Return the truth along the path, and what every estimator makes of it; the learner is at theta_hat."""
        assert memory.posterior is not None
        assert memory.approximations is not None
        seen = [self.measurement(each, "merge", memory) for each in self.seen(task)]
        new = new_sides(seen[-1], theta_gp)
        old = old_sides(memory.posterior, memory.approximations, seen[:-1], theta_gp, theta_hat)

        def truth(theta: Params) -> tuple[float, float]:
            return self.true_loss(task, theta, memory), float(np.mean(self.accuracies(task, memory)[0]))

        traced = trace_path(truth, theta_gp, theta_hat, self.training.path_alphas)
        return MergePath(
            [PathPoint(alpha, *found) for alpha, found in zip(*traced, strict=True)],
            new={name: (side.slope, side.curvature) for name, side in new.items()},
            old={name: (side.slope, side.curvature) for name, side in old.items()},
        )

    def remember(self, task: Task, memory: Memory, curvature: Precision | None) -> Memory:
        """Return the memory with this task: posterior at the merged weights, projector from the task's inputs.

        The curvature is measured there too, unless it has been at the task's own model.
        """
        measurement = self.measurement(task, "posterior", memory)
        if self.keeps_posterior:
            curvature = curvature or measurement.precision(self.method.precision)
            posterior = self.method.remembered(memory.posterior, self.learner.parameters(), curvature)
            memory = replace(memory, posterior=posterior)
        if self.method.rule is not None and self.training.path_alphas:
            new, known = Approximations.of(measurement), memory.approximations
            memory = replace(memory, approximations=new if known is None else known + new)
        if memory.projector is not None:
            memory = replace(memory, projector=memory.projector.remember(measurement))
        return memory

    def evaluate(self, task: Task, alpha: float | None, memory: Memory, filled: frozenset[str]) -> None:
        with self.phase("evaluation"):
            within, among_all = self.accuracies(task, memory)
        self.record.accuracy[task.index, : len(within)] = within
        self.record.class_incremental_accuracy[task.index, : len(within)] = among_all
        self.observe(TaskEnd(task.index, alpha, within, among_all, filled))

    @property
    def keeps_posterior(self) -> bool:
        """Whether the method needs a posterior, or a path is held against one."""
        looks = self.method.rule is not None and bool(self.training.path_alphas)
        return self.method.keeps_posterior or looks

    @property
    def heads(self) -> frozenset[str]:
        """The names of all heads' parameters."""
        return frozenset[str]().union(*self.learner.heads)

    def accuracies(self, task: Task, memory: Memory) -> tuple[list[float], list[float]]:
        return accuracies(self.learner, self.seen(task), self.training.batch_size, memory.views)

    def measurement(self, task: Task, purpose: str, memory: Memory) -> Measurement:
        region = memory.regions.get(task.index)
        return Measurement(self.learner, task, self.training, self.method.fisher, self.seed, purpose, region)

    def seen(self, task: Task) -> Sequence[Task]:
        return self.stream.tasks[: task.index + 1]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.record.seconds[name] = self.record.seconds.get(name, 0.0) + time.perf_counter() - began
