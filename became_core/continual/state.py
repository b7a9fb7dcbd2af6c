"""The state of a run between two epochs, as a frozen value: to keep it is to be able to go on from there.

Convention: whatever ``learn`` needs to go on exactly is in a ``RunState``; random draws need no state, since each is a
function of the run's seed, its purpose, task, stage and epoch.
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
    """The old tasks as path reports compare merges with them; no method looks at it.

    Attributes:
        posterior: that of the method, or, of a method without one, what it would be.
        batch: the sum over tasks of the published code's diagonal.
        kronecker: the sum over tasks of Kronecker factors.
    """

    posterior: LaplacePosterior
    batch: Precision
    kronecker: Precision


@dataclass(frozen=True)
class Memory:
    """What a method keeps of the tasks learned so far.

    Attributes:
        projector: of the old tasks.
        posterior: of the weights, if the method needs one.
        models: the models, "initial" and "previous", that later tasks begin with or are drawn to, where tasks' models
            are merged.
        old_tasks: for path reports alone, where paths are traced.
    """

    projector: Projector | None = None
    posterior: LaplacePosterior | None = None
    models: Mapping[str, Params] = field(default_factory=dict)
    old_tasks: OldTasks | None = None

    @property
    def size(self) -> int:
        """The bytes of all that the method keeps; what is for reports alone is not counted."""
        return size_in_bytes([self.projector, self.posterior, dict(self.models)])

    @property
    def full(self) -> frozenset[str]:
        """The names of the projector's spaces that are protected whole."""
        return frozenset() if self.projector is None else full(self.projector)


@dataclass(frozen=True)
class RunState:
    """A run between two epochs.

    Attributes:
        theta: the learner's parameters.
        memory: of the tasks learned so far.
        record: of these tasks.
        task: the number of the task that is being learned, or would be next.
        stage: the stage of it that is being trained; none before the task's first epoch.
        theta_gp: in stage 2, the weights that stage 1 ended with.
        before: the weights that the task began with, where tasks' models are merged.
    """

    theta: Params
    memory: Memory
    record: RunRecord
    task: int = 0
    stage: Stage | None = None
    theta_gp: Params | None = None
    before: Params | None = None

    def in_stage(self, number: int) -> bool:
        """Whether the task is in its stage 1, or 2."""
        return self.stage is not None and self.stage.number == number

    @property
    def epochs(self) -> int:
        """How many epochs have been trained, over all tasks."""
        return sum(self.record.epochs) + (0 if self.stage is None else self.stage.epochs)

    @classmethod
    def initial(cls, learner: Learner, stream: TaskStream, method: Method) -> Self:
        """Return the state before the first epoch."""
        return cls(learner.parameters(), Memory(projector=method.projector), RunRecord.empty(len(stream.tasks)))
