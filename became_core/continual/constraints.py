"""What each stage of a method's training must respect."""

from dataclasses import replace

from became_core.continual.learner import Constraint, Learner, Penalty, heads_of
from became_core.continual.methods import Method
from became_core.continual.schedule import RelativeRates
from became_core.continual.state import Memory
from became_core.continual.statistics import weights_of
from became_core.continual.stream import Task
from became_core.laplace import Diagonal, LaplacePosterior
from became_core.projection import HAT, TRGP

__all__ = ["free_constraint", "relative_rates", "stable_constraint"]


def free_constraint(learner: Learner, task: Task, method: Method) -> Constraint:
    """Everything may change but the heads of other tasks (of later ones, in joint training)."""
    own = learner.heads[: task.index + 1] if method.joint else [learner.heads[task.index]]
    others = heads_of(learner).difference(*own)
    return Constraint(trainable=frozenset(weights_of(learner)) - others)


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
        constraint = _held(constraint, learner, task, method, memory)
    return replace(constraint, projector=projector, trains_scales=isinstance(projector, HAT | TRGP))


def _held(constraint: Constraint, learner: Learner, task: Task, method: Method, memory: Memory) -> Constraint:
    """Hold what a projector cannot protect, normalisation and biases, where the old tasks have left it.

    It is frozen, or, where the method has a penalty for it, trained under that one: a method that penalises all of the
    weights anyway penalises these as well.
    """
    names = _norms(learner)
    if method.norm_penalty == 0 or memory.posterior is None or not names:
        return replace(constraint, trainable=learner.projectable | learner.heads[task.index])
    if constraint.penalty is not None:
        return constraint
    mean = {name: value for name, value in memory.posterior.mean.items() if name in names}
    precision = {name: value for name, value in memory.posterior.precision.diagonal().items() if name in names}
    return replace(constraint, penalty=Penalty(LaplacePosterior(mean, Diagonal(precision)), method.norm_penalty))


def relative_rates(learner: Learner, task: Task, rates: RelativeRates) -> dict[str, float]:
    """Return what the learning rate is multiplied by, by parameter, where it is not 1."""
    first = rates.first if task.index == 0 else 1.0
    found = dict.fromkeys(learner.projectable, first) | dict.fromkeys(_norms(learner), rates.norms)
    found |= dict.fromkeys(heads_of(learner), rates.heads)
    return {name: found[name] for name in sorted(found) if found[name] != 1}


def _norms(learner: Learner) -> frozenset[str]:
    """Return the names of the shared parameters that no projector of matrices can protect."""
    return frozenset(weights_of(learner)) - learner.projectable - heads_of(learner)
