"""The arguments of a run, and what can be computed from them at any time: constraints, measurements and losses.

Convention: a constraint says which parameters a stage may change, and how. Only ``move_to`` changes the learner; every
other function restores it.
"""

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from became_core.arrays import Params
from became_core.continual.adaptation import Adaptation
from became_core.continual.data import Task, TaskStream
from became_core.continual.evaluation import Evaluation, accuracies
from became_core.continual.learner import Learner, heads_of, refresh_statistics, weights_of
from became_core.continual.measurement import Measurement
from became_core.continual.methods import Method
from became_core.continual.rng import random_generator
from became_core.continual.schedule import RelativeRates, Training
from became_core.continual.state import Memory
from became_core.continual.step import Constraint, Penalty
from became_core.continual.tempering import calibrated
from became_core.errors import BecameError
from became_core.laplace import Diagonal, LaplacePosterior
from became_core.projection import Region, View

__all__ = ["RunContext", "Stopwatch", "check_method", "free_constraint", "relative_rates", "stable_constraint"]


@dataclass(frozen=True)
class RunContext:
    """The arguments of ``learn``, which documents them, and what can be computed from them."""

    learner: Learner
    stream: TaskStream
    method: Method
    training: Training
    seed: int

    def tasks_until(self, task: Task) -> Sequence[Task]:
        """Return all tasks up to this one."""
        return self.stream.tasks[: task.index + 1]

    @property
    def adaptation(self) -> Adaptation:
        """Which parameters learn; a projector that trains in adapters has some of its own where none are asked for."""
        return self.training.adaptation.with_own_rank(self.method.projector)

    @cached_property
    def still(self) -> frozenset[str]:
        """The names of the shared parameters that no stage changes."""
        return self.adaptation.still(self.learner)

    def adapters(self, task: Task, stage: int, memory: Memory) -> Region | None:
        """Return the low-rank adapters that a stage begins with; None without adapters.

        In stage 1 the projector has a say in their rows.
        """
        start, rng = self.measurement(task, "start", memory), random_generator(self.seed, "lora", task.index, stage)
        return self.adaptation.region(self.learner, start, rng, memory.projector if stage == 1 else None)

    def region(self, task: Task, memory: Memory) -> Region | None:
        """Return the region that a task was trained in; None if it has none."""
        return None if memory.projector is None else memory.projector.region(task.index)

    def views(self, task: Task, memory: Memory) -> Mapping[int, View]:
        """Return the views of those tasks up to this one that have one, by task number."""
        if memory.projector is None:
            return {}
        views = {learned.index: memory.projector.view(learned.index) for learned in self.tasks_until(task)}
        return {index: view for index, view in views.items() if view is not None}

    def measurement(self, task: Task, purpose: str, memory: Memory) -> Measurement:
        """Return the measurement of a task at the learner's weights; its random draws depend on the purpose."""
        region, still = self.region(task, memory), self.still
        of_task = Measurement(self.learner, task, self.training, self.method.fisher, self.seed, purpose, region, still)
        if self.method.temper == "calibrated" and purpose in ("merge", "posterior"):
            return calibrated(of_task)
        return of_task

    def accuracies(self, task: Task, memory: Memory) -> Evaluation:
        """Return the accuracies, losses and correlations on all tasks up to this one."""
        views = self.views(task, memory)
        return accuracies(self.learner, self.tasks_until(task), self.training.batch_size, views)

    @contextmanager
    def at(self, task: Task, theta: Params, memory: Memory) -> Iterator[None]:
        """Set the learner to these weights inside the context, with the running statistics that belong to them."""
        with self.learner.at(theta):
            self._refresh_statistics(task, memory)
            yield

    def true_loss(self, task: Task, theta: Params, memory: Memory) -> float:
        """Return the sum over all tasks so far of the mean loss on their own data, at these weights.

        Their own data are the samples that curvature is measured on. The loss is at the calibrated softmax if the
        method's ``temper`` is "calibrated".
        """
        with self.at(task, theta, memory):
            return sum(self.measurement(learned, "merge", memory).loss() for learned in self.tasks_until(task))

    def move_to(self, task: Task, theta: Params, memory: Memory) -> None:
        """Set the learner to these weights for good, with the running statistics that belong to them and the task."""
        self.learner.assign(self.learner.parameters() | theta)
        self._refresh_statistics(task, memory)

    def _refresh_statistics(self, task: Task, memory: Memory) -> None:
        size = self.training.batch_size
        refresh_statistics(self.learner, [task], size, self.seed, self.region(task, memory))


def check_method(method: Method, stream: TaskStream, training: Training | None = None) -> None:
    """Raise a BecameError, with the reason, if a method makes no sense on a stream.

    Args:
        method: how tasks are learned.
        stream: the tasks.
        training: the settings of training, if they are to be checked as well.
    """
    projector, likelihood = method.projector, stream.dataset.likelihood
    if stream.shared_head and projector is not None and projector.needs_own_heads:
        raise BecameError(
            f"{method.name} is not for {stream.dataset.name}, whose tasks share a head: {projector.needs_own_heads}."
        )
    of_samples = likelihood.has_labels and not stream.dataset.predicts_bytes
    if projector is not None and projector.needs_labels and not of_samples:
        raise BecameError(
            f"{method.name} is not for {stream.dataset.name}, whose targets are no labels of samples: "
            f"{projector.needs_labels}."
        )
    adapts = training is not None and training.adaptation.rank is not None
    if adapts and projector is not None and projector.no_adapters:
        raise BecameError(f"{method.name} is not for low-rank adapters: {projector.no_adapters}; leave out --lora.")
    if training is not None and training.augmentation:
        stream.dataset.check_images(f"; leave --augment out for {stream.dataset.name}")
    _check_tempering(method, stream)
    if likelihood.has_labels:
        return
    if method.fisher == "batch" and method.keeps_posterior:
        raise BecameError(
            f"{method.name} is not for {stream.dataset.name}, whose targets are no labels: its Fisher information is "
            "that of the model's most likely labels, and there are none; of a Gaussian's most likely target it is 0."
        )
    if training is not None and training.path_alphas:
        raise BecameError(
            f"merging paths are not traced for {stream.dataset.name}, whose targets are no labels: the report compares "
            "with the published form, which needs them; leave out --path-points."
        )


def _check_tempering(method: Method, stream: TaskStream) -> None:
    """Raise a BecameError if there are no held-out samples to temper by, or no labels to calibrate a softmax by."""
    if method.temper != "none":
        for task in stream.tasks:
            if not len(task.validation):
                raise BecameError(
                    f"{method.name} is tempered by held-out samples, and task {task.index + 1} of "
                    f"{stream.dataset.name} has none; give a larger share for validation."
                )
    if method.temper == "calibrated" and not stream.dataset.likelihood.has_labels:
        raise BecameError(
            f"{method.name} cannot be calibrated for {stream.dataset.name}, whose targets are no labels: a softmax "
            "temperature is that of labels; temper it by curvature or rise."
        )


def free_constraint(learner: Learner, task: Task, method: Method) -> Constraint:
    """Return the constraint of free training: everything may change but the heads of other tasks.

    In joint training the heads of earlier tasks may change as well.
    """
    own = learner.heads[: task.index + 1] if method.joint else [learner.heads[task.index]]
    others = heads_of(learner).difference(*own)
    return Constraint(trainable=frozenset(weights_of(learner)) - others)


def stable_constraint(
    learner: Learner, task: Task, method: Method, memory: Memory, still: frozenset[str] = frozenset()
) -> Constraint:
    """Return the constraint of stage 1, projected, penalised or free as the method says, but without a region.

    Args:
        learner: the learner.
        task: the task that is learned.
        method: how it is learned.
        memory: of the tasks before.
        still: the names of shared parameters that stand still whatever the constraint says.
    """
    projector = memory.projector
    constraint = free_constraint(learner, task, method)
    if method.penalty_strength > 0 and memory.posterior is not None:
        constraint = replace(constraint, penalty=Penalty(memory.posterior, method.penalty_strength))
    if method.transfer is not None and memory.models:
        constraint = replace(constraint, penalty=method.transfer.penalty(memory.models, heads_of(learner)))
    if projector is None or task.index == 0:  # In the first task there is nothing to protect.
        return constraint
    if not projector.protects_all:
        constraint = _protecting_unprojectable(constraint, learner, task, method, memory, still)
    return replace(constraint, projector=projector)


def _protecting_unprojectable(
    constraint: Constraint, learner: Learner, task: Task, method: Method, memory: Memory, still: frozenset[str]
) -> Constraint:
    """Return the constraint with the parameters that a projector cannot protect, normalisation and biases, protected.

    They are frozen, unless the method has a penalty for them. A penalty on all weights includes them already.
    """
    names = _unprojectable(learner) - still
    if method.norm_penalty == 0 or memory.posterior is None or not names:
        _warn_of_what_stands_still(learner, names)
        return replace(constraint, trainable=learner.projectable | learner.heads[task.index])
    if constraint.penalty is not None:
        return constraint
    mean = {name: value for name, value in memory.posterior.mean.items() if name in names}
    precision = {name: value for name, value in memory.posterior.precision.diagonal().items() if name in names}
    return replace(constraint, penalty=Penalty(LaplacePosterior(mean, Diagonal(precision)), method.norm_penalty))


def _warn_of_what_stands_still(learner: Learner, names: frozenset[str]) -> None:
    """Warn if most of the shared weights are frozen, because no projector can protect them."""
    sizes = {name: math.prod(value.shape) for name, value in learner.parameters().items()}
    still = sum(sizes[name] for name in names)
    shared = sum(sizes.values()) - sum(sizes[name] for name in heads_of(learner))
    if still > shared / 2:
        warnings.warn(
            f"{100 * still / shared:.0f} % of the shared weights stand still in stage 1 of this and later tasks: they "
            f"are no matrices that a projector can protect ({', '.join(sorted(names)[:3])}, for example); a penalty on "
            "them, norm_penalty, lets them learn.",
            stacklevel=3,
        )


def relative_rates(learner: Learner, task: Task, rates: RelativeRates) -> dict[str, float]:
    """Return the factors of the learning rate, by parameter, of those parameters whose factor is not 1."""
    first = rates.first if task.index == 0 else 1.0
    by_name = dict.fromkeys(learner.projectable, first) | dict.fromkeys(_unprojectable(learner), rates.norms)
    by_name |= dict.fromkeys(heads_of(learner) | learner.shared_head, rates.heads)
    return {name: by_name[name] for name in sorted(by_name) if by_name[name] != 1}


def _unprojectable(learner: Learner) -> frozenset[str]:
    """Return the names of the shared parameters that taps do not describe as matrices."""
    return frozenset(weights_of(learner)) - learner.projectable - heads_of(learner)


class Stopwatch:
    """Measures the wall-clock time of a run by phase and in total, over all parts of an interrupted run."""

    TOTAL = "total"

    def __init__(self, before: Mapping[str, float]) -> None:
        """Start to measure.

        Args:
            before: the seconds of earlier parts of the run, by phase and in total.
        """
        self._started = {self.TOTAL: time.perf_counter()}
        self._seconds = {self.TOTAL: 0.0, **before}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time that this context takes to a phase."""
        self._started[name] = time.perf_counter()
        self._seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - self._started.pop(name)

    def read(self) -> dict[str, float]:
        """Return the seconds until now, by phase and in total; a phase that is running is counted until now."""
        now = time.perf_counter()
        return {name: seconds + now - self._started.get(name, now) for name, seconds in self._seconds.items()}
