"""The continual run (BECAME, Algorithm 1): for each task stage 1, stage 2, merge, then memory and evaluation.

The loop knows only the learner protocol. The first task has nothing to protect, so stage 2 would continue stage 1 as
it was: it is trained once, without constraint, for both stages' epochs.

Convention: a run is a ``RunState`` that advances; callbacks are given it after every epoch and every task, and it goes
on from any such state exactly as it would have without the interruption.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from became_core.arrays import named_leaves
from became_core.continual.callbacks import Callback, CallbackList
from became_core.continual.constraints import free_constraint, relative_rates, stable_constraint
from became_core.continual.estimates import Approximations
from became_core.continual.learner import Constraint, Learner, heads_of
from became_core.continual.merging import merge, trace
from became_core.continual.methods import Method
from became_core.continual.record import EpochEnd, MergePath, RunRecord, TaskEnd
from became_core.continual.schedule import Schedule
from became_core.continual.seeding import random_stream
from became_core.continual.setting import Setting
from became_core.continual.state import Memory, RunState
from became_core.continual.statistics import refresh, weights_of
from became_core.continual.stopwatch import Stopwatch
from became_core.continual.stream import Task, TaskStream
from became_core.continual.training import Stage, Training, begin_stage, train_stage
from became_core.continual.unit_graph import find_unit_graph
from became_core.laplace import Precision
from became_core.projection import HAT, TRGP, GatedRegion, PackNet, Region, TrustRegion, compact

__all__ = ["learn"]


def learn(
    learner: Learner,
    stream: TaskStream,
    method: Method,
    training: Training,
    *,
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    state: RunState | None = None,
) -> RunRecord:
    """Learn a stream of tasks with a method and return the record; the learner is left with the final weights.

    Args:
        learner: a network with a head for each task; fresh, where no state is given.
        stream: the tasks.
        method: what is done with each.
        training: schedules and sizes.
        seed: names every random draw, with task, stage and epoch.
        callbacks: what looks on, each told in this order; what one raises ends the run.
        state: where to go on, as ``on_state`` was given it in a run of the same arguments; from the beginning if None.

    Raises:
        BecameError: if training diverges.
    """
    if state is None:
        state = RunState.initial(learner, stream, method)
    else:
        learner.assign(state.theta)
    run = _Run(learner, stream, method, training, seed, CallbackList(callbacks), Stopwatch(state.record.seconds))
    run.callbacks.on_run_begin(state)
    while state.task < len(stream.tasks):
        state = run.learn_task(state)
    run.callbacks.on_run_end(state.record)
    return state.record


@dataclass(frozen=True)
class _Run(Setting):
    """A run: its setting, who looks on, and its stopwatch."""

    callbacks: Callback
    stopwatch: Stopwatch

    def learn_task(self, state: RunState) -> RunState:
        """Learn one task, from wherever the state is in it; return the state after it."""
        task = self.stream.tasks[state.task]
        state = self.prepared(task, state)
        if not state.in_stage(2):
            state = self.stage1(task, state)
        if self.method.stages == 2:
            state = self.stage2(task, state)
        alpha, path, curvature = None, None, None
        if self.method.merges == "tasks":
            state, curvature = self.with_own_model(task, state)
        if self.method.rule is not None and task.index > 0:
            alpha, path = self.merge(task, state, curvature)
        memory = self.remember(task, state.memory, curvature)
        return self.evaluate(task, replace(state, memory=memory), alpha, path, memory.full - state.memory.full)

    def prepared(self, task: Task, state: RunState) -> RunState:
        """Find out what HAT must know of the network; begin a task of IMM and CoMA where its own model begins."""
        memory, before = state.memory, state.before
        if isinstance(memory.projector, HAT) and memory.projector.wiring is None:
            wiring = find_unit_graph(self.learner, task)
            memory = replace(memory, projector=replace(memory.projector, wiring=wiring))
        if self.method.merges == "tasks" and state.stage is None:
            before = self.learner.parameters()
            if self.method.transfer is not None and memory.models:
                self.learner.assign(self.method.transfer.start(memory.models, before, heads_of(self.learner)))
        return replace(state, memory=memory, before=before)

    def stage1(self, task: Task, state: RunState) -> RunState:
        """Train under the method's constraint."""
        schedule = self.training.stage1
        if self.method.rule is not None and self.method.stages == 2 and task.index == 0:
            schedule = schedule.extended(self.training.stage2.epochs)
        with self.stopwatch.phase("stage1"):
            constraint = stable_constraint(self.learner, task, self.method, state.memory)
            if constraint.trains_scales and state.stage is None:
                constraint = replace(constraint, region=self.region(task, state.memory))
            return self.train(task, state, 1, schedule, constraint)

    def stage2(self, task: Task, state: RunState) -> RunState:
        """Train on: without constraint, or, in PackNet, what is left after pruning."""
        if isinstance(state.memory.projector, PackNet):
            if not state.in_stage(2):
                packed, theta = state.memory.projector.pruned(self.learner.parameters(), self.learner.projectable)
                self.learner.assign(theta)
                state = replace(state, memory=replace(state.memory, projector=packed))
            constraint = replace(
                stable_constraint(self.learner, task, self.method, state.memory), projector=state.memory.projector
            )
        elif task.index == 0:
            return state
        else:
            state = replace(state, theta_gp=state.theta_gp or self.learner.parameters())
            constraint = replace(
                free_constraint(self.learner, task, self.method), region=state.memory.regions.get(task.index)
            )
        with self.stopwatch.phase("stage2"):
            return self.train(task, state, 2, self.training.stage2, constraint)

    def train(self, task: Task, state: RunState, number: int, schedule: Schedule, constraint: Constraint) -> RunState:
        """Train a stage to its end, from its beginning or from where the state is in it."""
        constraint = replace(constraint, relative=relative_rates(self.learner, task, self.training.relative))
        stage = state.stage
        if stage is None or stage.number != number:
            curve = () if stage is None else stage.curve
            optimiser = self.training.optimiser
            stage = begin_stage(self.learner, task, number, schedule, optimiser, constraint, curve=curve)

        def each(stage: Stage, event: EpochEnd) -> None:
            self.callbacks.on_epoch_end(event)
            self.kept(replace(state, stage=stage))

        stage = train_stage(
            self.learner,
            self.seen(task) if self.method.joint else [task],
            stage,
            constraint,
            batch_size=self.training.batch_size,
            seed=self.seed,
            augmentation=self.training.augmentation,
            each=each,
        )
        memory = state.memory
        if isinstance(stage.region, TrustRegion):
            memory = replace(memory, regions={**memory.regions, task.index: stage.region})
        if isinstance(stage.region, GatedRegion) and isinstance(memory.projector, HAT):
            memory = replace(memory, projector=memory.projector.settled(stage.region))
        return replace(state, stage=stage, memory=memory)

    def kept(self, state: RunState) -> RunState:
        """Return a state with the learner's weights and the seconds so far, after giving it away."""
        record = replace(state.record, seconds=self.stopwatch.read())
        state = replace(state, theta=self.learner.parameters(), record=record)
        self.callbacks.on_state(state)
        return state

    def region(self, task: Task, memory: Memory) -> Region:
        """Return the region that a task begins with, at the learner's weights."""
        if isinstance(memory.projector, HAT):
            return memory.projector.region(self.learner.parameters(), random_stream(self.seed, "gates", task.index))
        assert isinstance(memory.projector, TRGP)
        refresh(self.learner, [task], self.training.batch_size, self.seed)
        return memory.projector.trust_region(self.measurement(task, "trust-region", memory).gradients())

    def with_own_model(self, task: Task, state: RunState) -> tuple[RunState, Precision | None]:
        """Keep what later tasks need of the task's own model; what it is merged with is the old model with its head.

        Returns:
            The state, and the task's curvature at its own model, if the method asks for it.
        """
        assert state.before is not None
        theta, memory = self.learner.parameters(), state.memory
        curvature: Precision | None = None
        if self.keeps_posterior:
            with self.stopwatch.phase("memory"):
                curvature = self.measurement(task, "posterior", memory).precision(self.method.precision)
        if self.method.transfer is not None:
            memory = replace(memory, models=self.method.transfer.kept(memory.models, state.before, theta))
        old = state.before | {name: theta[name] for name in self.learner.heads[task.index]}
        return replace(state, memory=memory, theta_gp=old), curvature

    def merge(self, task: Task, state: RunState, curvature: Precision | None) -> tuple[float | None, MergePath | None]:
        """Merge theta_gp, or the old model, and the learner's weights; give the result to the learner.

        Args:
            task: the last one.
            state: with the old tasks' memory.
            curvature: the task's at the learner's weights, if it has been measured.

        Returns:
            The coefficient of theta_hat (their mean, of several), and the path, if it is traced.
        """
        assert state.theta_gp is not None
        theta_hat = weights_of(self.learner)
        theta_gp = {name: state.theta_gp[name] for name in theta_hat}
        with self.stopwatch.phase("merge"):
            merged = merge(self, task, theta_gp, theta_hat, state.memory, curvature)
        path = None
        if self.training.path_alphas:
            with self.stopwatch.phase("path"):
                path = trace(self, task, theta_gp, theta_hat, state.memory)
        self.place(task, merged.theta, state.memory)
        if merged.alpha is None:
            return None, path
        return float(np.mean([float(a) for a in named_leaves(merged.alpha).values()])), path

    def remember(self, task: Task, memory: Memory, curvature: Precision | None) -> Memory:
        """Return the memory with this task: posterior at the merged weights, projector from the task's inputs.

        The curvature is measured there too, unless it has been at the task's own model.
        """
        with self.stopwatch.phase("memory"):
            measurement = self.measurement(task, "posterior", memory)
            if self.keeps_posterior:
                curvature = curvature or measurement.precision(self.method.precision)
                posterior = self.method.remembered(memory.posterior, weights_of(self.learner), curvature)
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
        record = state.record.with_task(end, curve=state.stage.curve, ranks=ranks, memory=memory.size, path=path)
        self.callbacks.on_task_end(end)
        return self.kept(RunState(state.theta, memory, record, task.index + 1))
