"""The state of a run between two epochs, as a frozen value. A run can go on from a stored state.

Convention: a ``RunState`` has everything that ``learn`` needs to go on exactly. Random numbers need no state, because
each generator is a function of the run's seed, its purpose, the task, the stage and the epoch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from became_core.arrays import Params, size_in_bytes
from became_core.continual.data import TaskStream
from became_core.continual.learner import Learner
from became_core.continual.methods import Method
from became_core.continual.record import RunRecord
from became_core.continual.training import Stage
from became_core.laplace import LaplacePosterior, Precision
from became_core.projection import Projector, full

__all__ = ["Memory", "OldTasks", "RunState"]


@dataclass(frozen=True)
class OldTasks:
    """What path reports need of the old tasks; no method uses it.

    Attributes:
        posterior: the posterior of the method; if the method has none, the one that it would have.
        batch: the sum over tasks of the published code's diagonal Fisher information.
        kronecker: the sum over tasks of the Kronecker factors.
    """

    posterior: LaplacePosterior
    batch: Precision
    kronecker: Precision


@dataclass(frozen=True)
class Memory:
    """What a run stores of the tasks learned so far.

    Attributes:
        projector: the projector with these tasks; None if the method has none.
        posterior: the Laplace posterior of the weights; None if the method needs none.
        models: the models that later tasks begin with or are drawn to, by the names "initial" and "previous"; empty if
            the method needs none.
        movement: by how much the last stage of the task before moved the weights, in a method that calibrates curvature
            by it; else None.
        old_tasks: what path reports need; None if paths are not traced.
    """

    projector: Projector | None = None
    posterior: LaplacePosterior | None = None
    models: Mapping[str, Params] = field(default_factory=dict)
    movement: Params | None = field(default=None, metadata={"later": True})
    old_tasks: OldTasks | None = None

    @property
    def size(self) -> int:
        """The bytes of all that the method stores, without what path reports need."""
        return size_in_bytes([self.projector, self.posterior, dict(self.models), self.movement])

    @property
    def full(self) -> frozenset[str]:
        """The names of the projector's spaces that are protected as a whole."""
        return frozenset() if self.projector is None else full(self.projector)


@dataclass(frozen=True)
class RunState:
    """The state of a run between two epochs.

    Attributes:
        theta: the learner's parameters.
        memory: what the run stores of the tasks learned so far.
        record: the results of these tasks.
        task: the number of the task that is being learned, or that comes next.
        stage: the stage of that task that is being trained; None before its first epoch.
        theta_gp: in stage 2, the weights with which stage 1 ended; when tasks are merged, the old model; else None.
        before: the weights with which the task began, in a method that merges tasks or needs the first task's movement;
            else None.
    """

    theta: Params
    memory: Memory
    record: RunRecord
    task: int = 0
    stage: Stage | None = None
    theta_gp: Params | None = None
    before: Params | None = None

    def in_stage(self, number: int) -> bool:
        """Return whether the task is in the stage with this number, 1 or 2."""
        return self.stage is not None and self.stage.number == number

    @property
    def epochs(self) -> int:
        """The number of epochs that have been trained, over all tasks."""
        return sum(self.record.epochs) + (0 if self.stage is None else self.stage.epochs)

    @classmethod
    def initial(cls, learner: Learner, stream: TaskStream, method: Method) -> Self:
        """Return the state before the first epoch."""
        return cls(
            learner.parameters(),
            Memory(projector=method.projector),
            RunRecord.empty(len(stream.tasks), learner.unit),
        )
