"""The continual run (BECAME, Algorithm 1): for each task stage 1, stage 2, merge, then memory and evaluation.

The loop uses only the base class of learners and the hooks of projectors and merging rules; it knows none of them by
name. In the first task there is nothing to protect, so stage 2 would only continue stage 1. It is trained once, without
constraint, for the epochs of both stages.

Convention: a run is a ``RunState`` that advances. Callbacks get the state after every epoch and every task, and a run
that goes on from such a state gives exactly the results of a run without interruption.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from became_core.arrays import Params, named_leaves
from became_core.continual.callbacks import Callback, CallbackList
from became_core.continual.data import Task, TaskStream
from became_core.continual.learner import Learner, heads_of, weights_of
from became_core.continual.methods import Method
from became_core.continual.path_report import report_path
from became_core.continual.record import EpochEnd, MergePath, RunRecord, TaskEnd
from became_core.continual.remembering import last_movement, remembered, weighed, with_own_model
from became_core.continual.rng import random_generator
from became_core.continual.run_context import (
    RunContext,
    Stopwatch,
    check_method,
    free_constraint,
    relative_rates,
    stable_constraint,
)
from became_core.continual.schedule import Schedule, Training
from became_core.continual.state import Memory, RunState
from became_core.continual.step import Constraint
from became_core.continual.training import Stage, begin_stage, train_stage
from became_core.errors import BecameError
from became_core.laplace import LaplacePosterior, LocalLoss, Merged, MergeRule, Precision

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
    """Learn a stream of tasks with a method, and return the record; afterwards the learner has the final weights.

    Args:
        learner: a network with a head for each task, or with one that they share, as the stream has it. It must be new
            if no state is given.
        stream: the tasks.
        method: how each task is learned.
        training: the schedules and sizes.
        seed: the seed of the run; every random draw depends on it, its purpose, the task, the stage and the epoch.
        callbacks: objects that observe the run, called in this order. An exception that one of them raises ends the
            run.
        state: the state to go on from, which ``Callback.on_state`` got in a run with the same arguments; None to begin
            at the first task.

    Raises:
        BecameError: before anything begins, if the batch size is too small for the network's normalisation, a pattern
            of the adaptation matches nothing, its rank is above that of every weight that it adapts, or the method
            makes no sense on the stream or for the network; later, if training diverges.

    For example, with a learner, a stream and a training:

        method = build_method("became+gpm")
        record = learn(learner, stream, method, training, callbacks=[Printer()])
        print(average_accuracy(record.accuracy), record.alpha)
    """
    check_method(method, stream, training)
    training.adaptation.check(learner, method.projector)
    if training.batch_size < learner.least_batch:
        raise BecameError(
            f"the batch size is {training.batch_size}, and the network normalises by statistics over the samples of a "
            f"batch; take at least {learner.least_batch}, or another normalisation."
        )
    if state is None:
        state = RunState.initial(learner, stream, method)
    else:
        learner.assign(state.theta)
    run = _Run(learner, stream, method, training, seed, CallbackList(callbacks), Stopwatch(state.record.seconds))
    if state.task < len(stream.tasks):  # a projector refuses the network before anything begins
        run.prepared(stream.tasks[state.task], state.memory)
    run.callbacks.on_run_begin(state)
    while state.task < len(stream.tasks):
        state = run.learn_task(state)
    run.callbacks.on_run_end(state.record)
    return state.record


@dataclass(frozen=True)
class _Run(RunContext):
    """A run: its context, its callbacks and its stopwatch."""

    callbacks: Callback
    stopwatch: Stopwatch

    def learn_task(self, state: RunState) -> RunState:
        """Return the state after a task, from a state before or in the middle of it."""
        task = self.stream.tasks[state.task]
        state = self.begin_task(task, state)
        full_before = state.memory.full
        if not state.in_stage(2):
            state = self.stage1(task, state)
        if self.method.stages == 2:
            state = self.stage2(task, state)
        alpha, path, curvature, factor = None, None, None, None
        if self.method.merges == "tasks":
            with self.stopwatch.phase("memory"):
                state, curvature = with_own_model(self, task, state)
        movement = last_movement(self, state)
        if self.method.rule is not None and task.index > 0:
            with self.stopwatch.phase("merge"):
                state, factor = weighed(self, task, state)
            alpha, path = self.merge(task, state, self.method.rule, curvature)
        with self.stopwatch.phase("memory"):
            memory, factor = remembered(self, task, state.memory, curvature, factor)
        memory = replace(memory, movement=movement)
        return self.evaluate(task, replace(state, memory=memory), alpha, factor, path, memory.full - full_before)

    def prepared(self, task: Task, memory: Memory) -> Memory:
        """Return the memory with a projector that knows what it must about the network."""
        if memory.projector is None:
            return memory
        return replace(memory, projector=memory.projector.prepare(self.measurement(task, "start", memory)))

    def begin_task(self, task: Task, state: RunState) -> RunState:
        """Prepare the projector; in a method that merges tasks, set the weights with which the task's model begins."""
        memory, before = self.prepared(task, state.memory), state.before
        if self.method.calibrates and task.index == 0 and state.stage is None:
            before = self.learner.parameters()
        if self.method.merges == "tasks" and state.stage is None:
            before = self.learner.parameters()
            if self.method.transfer is not None and memory.models:
                self.learner.assign(self.method.transfer.start(memory.models, before, heads_of(self.learner)))
        return replace(state, memory=memory, before=before)

    def stage1(self, task: Task, state: RunState) -> RunState:
        """Return the state after stage 1, which is trained under the method's constraint."""
        schedule = self.training.stage1
        if self.method.merges_stages and task.index == 0:
            schedule = schedule.extended(self.training.stage2.epochs)
        with self.stopwatch.phase("stage1"):
            constraint = self.stable_constraint(task, state.memory)
            if state.stage is not None:
                region = state.stage.region
            elif self.adaptation.rank is not None:
                region = self.adapters(task, 1, state.memory)
            elif state.memory.projector is not None:
                region = state.memory.projector.begin_task(self.measurement(task, "start", state.memory))
            else:
                region = None
            constraint = replace(constraint, region=region, trains_scales=region is not None)
            return self.train(task, state, 1, schedule, constraint)

    def stage2(self, task: Task, state: RunState) -> RunState:
        """Return the state after stage 2.

        It is trained without constraint if stages are merged; otherwise it is the second stage of the projector, which
        is trained under the method's constraint.
        """
        projector, schedule = state.memory.projector, self.training.stage2
        if self.method.merges_stages:
            if task.index == 0:
                return state
            state = replace(state, theta_gp=state.theta_gp or self.learner.parameters())
            region, trains = self.region(task, state.memory), self.adaptation.rank is not None
            if trains and not state.in_stage(2):
                region = self.adapters(task, 2, state.memory)
            constraint = free_constraint(self.learner, task, self.method)
            constraint = replace(constraint, region=region, trains_scales=trains)
        else:
            assert projector is not None  # A method with two stages that it does not merge has a projector.
            if not state.in_stage(2):
                projectable = self.learner.projectable - self.still
                projector, theta = projector.between_stages(self.learner.parameters(), projectable)
                self.learner.assign(theta)
                state = replace(state, memory=replace(state.memory, projector=projector))
            constraint = self.stable_constraint(task, state.memory)
            # The second stage of a projector is projected in the first task as well.
            constraint = replace(constraint, projector=projector)
            schedule = schedule.scaled(projector.retraining_rate)
        with self.stopwatch.phase("stage2"):
            return self.train(task, state, 2, schedule, constraint)

    def train(self, task: Task, state: RunState, number: int, schedule: Schedule, constraint: Constraint) -> RunState:
        """Return the state after a stage, from a state before or in the middle of it.

        Args:
            task: the task that is learned.
            state: the state of the run.
            number: the number of the stage, 1 or 2.
            schedule: the schedule with which the stage begins.
            constraint: what every step must respect.
        """
        relative, first = relative_rates(self.learner, task, self.training.relative), self.training.relative.first
        if constraint.region is not None and constraint.region.absorbed and task.index == 0 and first != 1:
            relative |= dict.fromkeys(constraint.region.scales, first)
        trainable = constraint.trainable - self.still
        constraint = replace(constraint, trainable=trainable, relative=relative)
        stage = state.stage
        if stage is None or stage.number != number:
            curve = () if stage is None else stage.curve
            optimiser = self.training.optimiser
            stage = begin_stage(self.learner, task, number, schedule, optimiser, constraint, curve=curve)

        def after_epoch(stage: Stage, event: EpochEnd) -> None:
            self.callbacks.on_epoch_end(event)
            self.publish(replace(state, stage=stage))

        stage = train_stage(
            self.learner,
            self.tasks_until(task) if self.method.joint else [task],
            stage,
            constraint,
            batch_size=self.training.batch_size,
            seed=self.seed,
            augmentation=self.training.augmentation,
            after_epoch=after_epoch,
        )
        memory = state.memory
        if memory.projector is not None:
            memory = replace(memory, projector=memory.projector.end_stage(task.index, stage.region))
        if stage.region is not None and stage.region.absorbed:
            self.learner.assign(stage.region.effective(self.learner.parameters()))
            stage = replace(stage, region=None, best=None)
        return replace(state, stage=stage, memory=memory)

    def stable_constraint(self, task: Task, memory: Memory) -> Constraint:
        """Return the constraint of stage 1 without its region."""
        return stable_constraint(self.learner, task, self.method, memory, self.still)

    def publish(self, state: RunState) -> RunState:
        """Give the callbacks the state, with the learner's weights and the seconds so far, and return it."""
        record = replace(state.record, seconds=self.stopwatch.read())
        state = replace(state, theta=self.learner.parameters(), record=record)
        self.callbacks.on_state(state)
        return state

    def merge(
        self, task: Task, state: RunState, rule: MergeRule, curvature: Precision | None
    ) -> tuple[float | None, MergePath | None]:
        """Merge ``theta_gp`` and the learner's weights, and set the learner to the result.

        Args:
            task: the task that was learned last.
            state: the state, whose memory is that of the old tasks.
            rule: the merging rule of the method.
            curvature: the task's curvature at the learner's weights; None if it has not been measured.

        Returns:
            The coefficient of theta_hat, or the mean of the coefficients if there are several; None if the rule has
            none. And the report of the path; None if paths are not traced.
        """
        assert state.theta_gp is not None
        memory, theta_hat = state.memory, weights_of(self.learner)
        theta_gp = {name: state.theta_gp[name] for name in theta_hat}
        with self.stopwatch.phase("merge"):
            merged = self.merged(task, rule, theta_gp, theta_hat, memory, curvature)
        path = None
        if memory.old_tasks is not None:
            with self.stopwatch.phase("path"):
                path = report_path(self, task, theta_gp, theta_hat, memory)
        self.move_to(task, merged.theta, memory)
        if merged.alpha is None:
            return None, path
        return float(np.mean([float(alpha) for alpha in named_leaves(merged.alpha).values()])), path

    def merged(
        self,
        task: Task,
        rule: MergeRule,
        theta_gp: Params,
        theta_hat: Params,
        memory: Memory,
        curvature: Precision | None,
    ) -> Merged:
        """Return the result of the merging rule; the learner is at theta_hat, and is left there.

        Args:
            task: the task that was learned last.
            rule: the merging rule of the method.
            theta_gp: the stable weights, or the old model.
            theta_hat: the plastic weights, or the task's own model.
            memory: the memory of the old tasks.
            curvature: the task's curvature at theta_hat; None if it has not been measured.
        """
        rule = rule.for_task(task.index, lambda theta: self.true_loss(task, theta, memory))
        if not rule.needs_losses:
            return rule.merge((theta_gp, theta_hat), ())
        assert memory.posterior is not None  # A method has a posterior if its rule needs losses.
        measurement = self.measurement(task, "merge", memory)
        if curvature is None and self.method.precision != "diagonal":
            curvature = measurement.precision(self.method.precision)
        new: LocalLoss = measurement if curvature is None else LaplacePosterior(theta_hat, curvature)
        return rule.merge((theta_gp, theta_hat), (memory.posterior, new))

    def evaluate(
        self,
        task: Task,
        state: RunState,
        alpha: float | None,
        factor: float | None,
        path: MergePath | None,
        filled: frozenset[str],
    ) -> RunState:
        """Return the state after a task, with the accuracies on all tasks so far.

        Args:
            task: the task that was learned last.
            state: the state, whose memory has this task.
            alpha: the merging coefficient; None if nothing was merged.
            factor: what its curvature was multiplied by; None if nothing was.
            path: the report of the merging path; None if it was not traced.
            filled: the protected spaces that became whole with this task.
        """
        assert state.stage is not None
        memory = state.memory
        with self.stopwatch.phase("evaluation"):
            reached = self.accuracies(task, memory)
            samples = [
                self.learner.written(learned, random_generator(self.seed, "writing", task.index, learned.index))
                for learned in self.tasks_until(task)
            ]
            end = TaskEnd(
                task=task.index,
                alpha=alpha,
                accuracy=reached.accuracy,
                class_incremental_accuracy=reached.class_incremental_accuracy,
                full=filled,
                loss=reached.loss,
                samples=samples if any(samples) else [],
                correlation=reached.correlation,
                temperature=factor,
            )
        ranks = {} if memory.projector is None else dict(memory.projector.rank)
        record = state.record.with_task(end, curve=state.stage.curve, ranks=ranks, memory=memory.size, path=path)
        self.callbacks.on_task_end(end)
        return self.publish(RunState(state.theta, memory, record, task.index + 1))
