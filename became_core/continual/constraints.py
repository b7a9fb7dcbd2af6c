"""What each stage of a method's training must respect."""

from dataclasses import replace

from became_core.continual.learner import Constraint, Learner, Penalty, heads_of
from became_core.continual.methods import Method
from became_core.continual.state import Memory
from became_core.continual.stream import Task
from became_core.projection import HAT, TRGP

__all__ = ["free_constraint", "stable_constraint"]


def free_constraint(learner: Learner, task: Task, method: Method) -> Constraint:
    """Everything may change but the heads of other tasks (of later ones, in joint training)."""
    own = learner.heads[: task.index + 1] if method.joint else [learner.heads[task.index]]
    others = heads_of(learner).difference(*own)
    return Constraint(trainable=frozenset(learner.parameters()) - others)


def stable_constraint(learner: Learner, task: Task, method: Method, memory: Memory) -> Constraint:
    """Stage 1: projected, penalised, gated, or free, as the method has it; a region is yet to come."""
    projector = memory.projector
    constraint = replace(free_constraint(learner, task, method), trains_scales=isinstance(projector, HAT))
    if method.penalty_strength > 0 and memory.posterior is not None:
        constraint = replace(constraint, penalty=Penalty(memory.posterior, method.penalty_strength))
    if method.transfer is not None and memory.models:
        constraint = replace(constraint, penalty=method.transfer.penalty(memory.models, heads_of(learner)))
    if projector is None or task.index == 0:  # the first task has nothing to protect
        return constraint
    if not projector.protects_all:
        # What it cannot protect (biases, normalisation) is frozen once the first task has set it.
        constraint = replace(constraint, trainable=learner.projectable | learner.heads[task.index])
    return replace(constraint, projector=projector, trains_scales=isinstance(projector, HAT | TRGP))
