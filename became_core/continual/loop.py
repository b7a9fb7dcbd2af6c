"""The continual run (BECAME, Algorithm 1): for each task stage 1, stage 2, merge, then memory and evaluation.

The loop knows only the learner protocol. The first task has nothing to protect, so stage 2 would continue stage 1 as
it was: it is trained once, without constraint, for both stages' epochs.

Convention: a run is a ``RunState`` that advances; it is given away after every epoch and every task, and goes on from
any such state exactly as it would have without the interruption.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from became_core.arrays import Params, named_leaves
from became_core.continual.estimates import Approximations, new_sides, old_sides
from became_core.continual.evaluation import accuracies
from became_core.continual.learner import Constraint, Learner, Penalty
from became_core.continual.measurement import Measurement
from became_core.continual.methods import Method
from became_core.continual.record import MergePath, PathPoint, RunRecord, TaskEnd
from became_core.continual.schedule import Schedule
from became_core.continual.state import Memory, RunState
from became_core.continual.stopwatch import Stopwatch
from became_core.continual.stream import Task, TaskStream
from became_core.continual.training import EpochEnd, Stage, Training, begin_stage, train_stage
from became_core.laplace import LaplacePosterior, trace_path
from became_core.projection import TRGP, compact

__all__ = ["learn"]


def learn(
    learner: Learner,
    stream: TaskStream,
    method: Method,
    training: Training,
    *,
    seed: int = 0,
    observe: Callable[[EpochEnd | TaskEnd], None] = lambda event: None,
    state: RunState | None = None,
    keep: Callable[[RunState], None] = lambda state: None,
) -> RunRecord:
    """Learn a stream of tasks with a method and return the record; the learner is left with the final weights.

    Args:
        learner: a network with a head for each task; fresh, where no state is given.
        stream: the tasks.
        method: what is done with each.
        training: schedules and sizes.
        seed: names every random draw, with task, stage and epoch.
        observe: called at the end of every epoch and of every task.
        state: where to go on, as ``keep`` was given it in a run of the same arguments; from the beginning if None.
        keep: called with the state after every epoch and every task, after ``observe``. What it raises ends the run.

    Raises:
        BecameError: if training diverges.
    """
    if state is None:
        state = RunState.begun(learner, stream, method)
    else:
        learner.assign(state.theta)
    run = _Run(learner, stream, method, training, seed, observe, keep, Stopwatch(state.record.seconds))
    while state.task < len(stream.tasks):
        state = run.learn_task(state)
    return state.record


@dataclass(frozen=True)
class _Run:
    """What a run is given, and its stopwatch."""

    learner: Learner
    stream: TaskStream
    method: Method
    training: Training
    seed: int
    observe: Callable[[EpochEnd | TaskEnd], None]
    keep: Callable[[RunState], None]
    stopwatch: Stopwatch

    def learn_task(self, state: RunState) -> RunState:
        """Learn one task, from wherever the state is in it; return the state after it."""
        task = self.stream.tasks[state.task]
        alpha, path = None, None
        if state.theta_gp is None:
            state = self.stage1(task, state)
        if self.merges(task):
            state = replace(state, theta_gp=state.theta_gp or self.learner.parameters())
            state = self.stage2(task, state)
            alpha, path = self.merge(task, state)
        memory = self.remember(task, state.memory)
        return self.evaluate(task, replace(state, memory=memory), alpha, path, memory.full - state.memory.full)

    def merges(self, task: Task) -> bool:
        """Whether the task has a second stage and a merge."""
        return self.method.rule is not None and task.index > 0

    def stage1(self, task: Task, state: RunState) -> RunState:
        """Train under the method's constraint."""
        schedule = self.training.stage1
        if self.method.rule is not None and not self.merges(task):
            schedule = schedule.extended(self.training.stage2.epochs)
        with self.stopwatch.phase("stage1"):
            constraint = self.stable_constraint(task, state.memory)
            if constraint.trains_scales and state.stage is None:
                constraint = self.with_region(constraint, task, state.memory)
            return self.train(task, state, 1, schedule, constraint)

    def stage2(self, task: Task, state: RunState) -> RunState:
        """Train on, without constraint."""
        with self.stopwatch.phase("stage2"):
            constraint = replace(self.free_constraint(task), region=state.memory.regions.get(task.index))
            return self.train(task, state, 2, self.training.stage2, constraint)

    def train(self, task: Task, state: RunState, number: int, schedule: Schedule, constraint: Constraint) -> RunState:
        """Train a stage to its end, from its beginning or from where the state is in it."""
        stage = state.stage
        if stage is None or stage.number != number:
            before = 0 if stage is None else stage.epochs
            optimiser = self.training.optimiser
            stage = begin_stage(self.learner, task, number, schedule, optimiser, constraint, before=before)

        def each(stage: Stage, event: EpochEnd) -> None:
            self.observe(event)
            self.kept(replace(state, stage=stage))

        tasks = self.seen(task) if self.method.joint else [task]
        stage = train_stage(
            self.learner,
            tasks,
            stage,
            constraint,
            batch_size=self.training.batch_size,
            seed=self.seed,
            augmentation=self.training.augmentation,
            each=each,
        )
        memory = state.memory
        if stage.region is not None:
            memory = replace(memory, regions={**memory.regions, task.index: stage.region})
        return replace(state, stage=stage, memory=memory)

    def kept(self, state: RunState) -> RunState:
        """Return a state with the learner's weights and the seconds so far, after giving it away."""
        record = replace(state.record, seconds=self.stopwatch.read())
        state = replace(state, theta=self.learner.parameters(), record=record)
        self.keep(state)
        return state

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
        projector = memory.projector
        if projector is None or task.index == 0:
            return constraint
        if not projector.protects_all:
            # What it cannot protect (biases, normalisation) is frozen once the first task has set it.
            constraint = replace(constraint, trainable=self.learner.projectable | self.learner.heads[task.index])
        return replace(constraint, projector=projector, trains_scales=isinstance(projector, TRGP))

    def with_region(self, constraint: Constraint, task: Task, memory: Memory) -> Constraint:
        """Return the constraint with the trust region that a task begins with, at the learner's weights."""
        assert isinstance(memory.projector, TRGP)
        gradients = self.measurement(task, "trust-region", memory).gradients()
        return replace(constraint, region=memory.projector.trust_region(gradients))

    def merge(self, task: Task, state: RunState) -> tuple[float | None, MergePath | None]:
        """Merge the two stages' weights and give them to the learner.

        Returns:
            The coefficient of theta_hat (their mean, of several), and the path, if it is traced.
        """
        rule, memory, theta_gp = self.method.rule, state.memory, state.theta_gp
        assert rule is not None
        assert memory.posterior is not None
        assert theta_gp is not None
        with self.stopwatch.phase("merge"):
            theta_hat = self.learner.parameters()
            merged = rule.merge((theta_gp, theta_hat), (memory.posterior, self.measurement(task, "merge", memory)))
        path = None
        if self.training.path_alphas:
            with self.stopwatch.phase("path"):
                path = self.look_along(task, theta_gp, theta_hat, memory)
        self.learner.assign(merged.theta)
        if merged.alpha is None:
            return None, path
        return float(np.mean([float(a) for a in named_leaves(merged.alpha).values()])), path

    def look_along(self, task: Task, theta_gp: Params, theta_hat: Params, memory: Memory) -> MergePath:
        """Return the truth along the path, and what every estimator makes of it; the learner is at theta_hat."""
        assert memory.posterior is not None
        assert memory.approximations is not None
        seen = [self.measurement(each, "merge", memory) for each in self.seen(task)]
        new = new_sides(seen[-1], theta_gp)
        old = old_sides(memory.posterior, memory.approximations, seen[:-1], theta_gp, theta_hat)

        def truth(theta: Params) -> tuple[float, float]:
            self.learner.assign(theta)
            return sum(each.loss() for each in seen), float(np.mean(self.accuracies(task, memory)[0]))

        traced = trace_path(truth, theta_gp, theta_hat, self.training.path_alphas)
        return MergePath(
            [PathPoint(alpha, *found) for alpha, found in zip(*traced, strict=True)],
            new={name: (side.slope, side.curvature) for name, side in new.items()},
            old={name: (side.slope, side.curvature) for name, side in old.items()},
        )

    def remember(self, task: Task, memory: Memory) -> Memory:
        """Return the memory with this task: posterior at the merged weights, projector from the task's inputs."""
        with self.stopwatch.phase("memory"):
            measurement = self.measurement(task, "posterior", memory)
            if self.method.keeps_posterior:
                theta, fisher = self.learner.parameters(), measurement.diagonal()
                old = memory.posterior
                posterior = LaplacePosterior(theta, fisher) if old is None else old.update(theta, fisher)
                memory = replace(memory, posterior=posterior)
            if self.method.rule is not None and self.training.path_alphas:
                new, known = Approximations.of(measurement), memory.approximations
                memory = replace(memory, approximations=new if known is None else known + new)
            if memory.projector is not None:
                memory = replace(memory, projector=compact(memory.projector.remember(measurement)))
            return memory

    def evaluate(
        self, task: Task, state: RunState, alpha: float | None, path: MergePath | None, filled: frozenset[str]
    ) -> RunState:
        """Score all tasks so far; return the state after this one."""
        assert state.stage is not None
        memory = state.memory
        with self.stopwatch.phase("evaluation"):
            end = TaskEnd(task.index, alpha, *self.accuracies(task, memory), filled)
        ranks = {} if memory.projector is None else dict(memory.projector.rank)
        record = state.record.with_task(end, epochs=state.stage.epochs, ranks=ranks, path=path)
        self.observe(end)
        return self.kept(RunState(state.theta, memory, record, task.index + 1))

    def accuracies(self, task: Task, memory: Memory) -> tuple[list[float], list[float]]:
        return accuracies(self.learner, self.seen(task), self.training.batch_size, memory.regions)

    def measurement(self, task: Task, purpose: str, memory: Memory) -> Measurement:
        region = memory.regions.get(task.index)
        return Measurement(self.learner, task, self.training, self.method.fisher, self.seed, purpose, region)

    def seen(self, task: Task) -> Sequence[Task]:
        return self.stream.tasks[: task.index + 1]
