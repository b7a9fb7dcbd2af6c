"""A run as a value: all there is of it between two epochs, whatever the backend.

Nothing random is kept, since every draw is a function of (seed, task, stage, epoch); nor is what the run was given:
its stream, method and training.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from became_core.arrays import Params, size_in_bytes
from became_core.continual.estimates import Approximations
from became_core.continual.learner import Learner
from became_core.continual.methods import Method
from became_core.continual.record import RunRecord
from became_core.continual.stream import TaskStream
from became_core.continual.training import Stage
from became_core.laplace import LaplacePosterior
from became_core.projection import HAT, PackNet, Projector, TrustRegion, View, full

__all__ = ["Memory", "RunState"]


@dataclass(frozen=True)
class Memory:
    """What is kept of the old tasks: a value, replaced after each task.

    Attributes:
        projector: what keeps stage 1 out of the space that they use.
        posterior: of the weights.
        regions: the trust regions of the tasks that have one, by index.
        models: what later tasks begin with or are pulled to, "initial" and "previous", where tasks' models are merged.
        approximations: of their curvature, for path reports alone.
    """

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


@dataclass(frozen=True)
class RunState:
    """A run between two epochs.

    Attributes:
        theta: the learner's parameters.
        memory: of the tasks learned so far.
        record: of these tasks.
        task: the index of the task that is being learned, or would be next.
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
