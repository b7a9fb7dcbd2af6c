"""What a run remembers of a task: its posterior, its projector's spaces, and the models that later tasks need.

A task's curvature enters the posterior as it is measured, unless the method multiplies it: by a temperature that
held-out samples give (``tempering``), by a calibration along the movement of the task before (``calibration``), or by
both.

Convention: a factor multiplies curvature and has no unit. It is None if the method multiplies curvature by nothing.
The functions measure at the learner's weights and leave them as they are.
"""

from dataclasses import replace

from became_core.arrays import Params, difference
from became_core.continual.calibration import calibration
from became_core.continual.data import Task
from became_core.continual.learner import weights_of
from became_core.continual.path_report import old_tasks_with
from became_core.continual.run_context import RunContext
from became_core.continual.state import Memory, RunState
from became_core.continual.tempering import BY_FACTOR, temperature
from became_core.laplace import Precision
from became_core.projection import compact

__all__ = ["last_movement", "remembered", "weighed", "with_own_model"]


def with_own_model(context: RunContext, task: Task, state: RunState) -> tuple[RunState, Precision | None]:
    """Return the state with what later tasks need of the task's own model, in a method that merges tasks.

    The model that it will be merged with, ``theta_gp``, is the old model with the new task's head.

    Args:
        context: of the run; the learner has the task's own model.
        task: the task that was learned last.
        state: the state after its training.

    Returns:
        The state, and the task's curvature at its own model, which is None if the method does not need it.
    """
    assert state.before is not None
    learner, method = context.learner, context.method
    theta, memory, curvature = learner.parameters(), state.memory, None
    if method.keeps_posterior:
        curvature = context.measurement(task, "posterior", memory).precision(method.precision)
    if method.transfer is not None:
        memory = replace(memory, models=method.transfer.models_after(memory.models, state.before, theta))
    old = state.before | {name: theta[name] for name in learner.heads[task.index]}
    return replace(state, memory=memory, theta_gp=old), curvature


def last_movement(context: RunContext, state: RunState) -> Params | None:
    """Return by how much the last stage moved the weights, if the method calibrates curvature by it.

    The first task's stage began at the initial weights.

    Args:
        context: of the run; the learner has the weights with which that stage ended.
        state: the state after that stage.
    """
    if not context.method.calibrates:
        return None
    begin, end = state.theta_gp or state.before, weights_of(context.learner)
    assert begin is not None
    return difference(end, {name: begin[name] for name in end})


def weighed(context: RunContext, task: Task, state: RunState) -> tuple[RunState, float | None]:
    """Return the state before a merge, and the temperature of the task's curvature; None if the method has none.

    The first task has no delta from which a temperature could be estimated, and no task before it. So before the first
    merge its curvature takes the temperature of the second task, and the calibration that the second has at theta_gp.
    The record has their product as the first task's.

    Args:
        context: of the run; the learner is at theta_hat.
        task: the task that is merged.
        state: the state, whose memory is that of the old tasks.
    """
    method, memory, factor, of_first = context.method, state.memory, None, 1.0
    assert state.theta_gp is not None
    if method.temper in BY_FACTOR:
        measurement = context.measurement(task, "merge", memory)
        theta_gp = {name: state.theta_gp[name] for name in measurement.mean}
        factor = of_first = temperature(method.temper, measurement, theta_gp)
    is_first = task.index == 1 and (factor is not None or memory.movement is not None)
    if not is_first or memory.posterior is None:
        return state, factor
    if memory.movement is not None:
        with context.at(task, state.theta_gp, memory):
            there = context.measurement(task, "posterior", memory)
            of_first *= calibration(there, there.precision(method.precision), memory.movement)
    posterior = replace(memory.posterior, precision=memory.posterior.precision * of_first)
    old_tasks = None if memory.old_tasks is None else replace(memory.old_tasks, posterior=posterior)
    memory = replace(memory, posterior=posterior, old_tasks=old_tasks)
    return replace(state, memory=memory, record=replace(state.record, temperatures=[of_first])), factor


def remembered(
    context: RunContext, task: Task, memory: Memory, curvature: Precision | None, factor: float | None
) -> tuple[Memory, float | None]:
    """Return the memory with one more task, and what its curvature was multiplied by; None if by nothing.

    Args:
        context: of the run; the learner is at the merged weights.
        task: the task that was learned last.
        memory: the memory of the tasks before.
        curvature: the task's curvature at its own model; if it is None, it is measured at the merged weights.
        factor: the temperature of its curvature; None if there is none.
    """
    measurement, method = context.measurement(task, "posterior", memory), context.method
    if method.keeps_posterior:
        curvature = curvature or measurement.precision(method.precision)
        if memory.movement is not None:
            kappa = calibration(measurement, curvature, memory.movement)
            factor = kappa if factor is None else kappa * factor
        curvature = curvature if factor is None else curvature * factor
        posterior = method.updated_posterior(memory.posterior, weights_of(context.learner), curvature)
        memory = replace(memory, posterior=posterior)
    if method.rule is not None and context.training.path_alphas:
        memory = replace(memory, old_tasks=old_tasks_with(memory, measurement, method))
    if memory.projector is not None:
        memory = replace(memory, projector=compact(memory.projector.remember(measurement)))
    return memory, factor
