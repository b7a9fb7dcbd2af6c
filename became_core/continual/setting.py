"""What a run is given, and what is asked of it at any time: measurements, accuracies, the true loss at some weights."""

from collections.abc import Sequence
from dataclasses import dataclass

from became_core.arrays import Params
from became_core.continual.evaluation import accuracies
from became_core.continual.learner import Learner
from became_core.continual.measurement import Measurement
from became_core.continual.methods import Method
from became_core.continual.state import Memory
from became_core.continual.statistics import place
from became_core.continual.stream import Task, TaskStream
from became_core.continual.training import Training

__all__ = ["Setting"]


@dataclass(frozen=True)
class Setting:
    """The arguments of ``learn``, which says what they are."""

    learner: Learner
    stream: TaskStream
    method: Method
    training: Training
    seed: int

    @property
    def keeps_posterior(self) -> bool:
        """Whether the method needs a posterior, or a path is held against one."""
        looks = self.method.rule is not None and bool(self.training.path_alphas)
        return self.method.keeps_posterior or looks

    def seen(self, task: Task) -> Sequence[Task]:
        """Return all tasks up to this one."""
        return self.stream.tasks[: task.index + 1]

    def place(self, task: Task, theta: Params, memory: Memory) -> None:
        """Give the learner weights, with the running statistics, if there are any, that belong to them and the task."""
        place(self.learner, theta, [task], self.training.batch_size, self.seed, memory.regions.get(task.index))

    def measurement(self, task: Task, purpose: str, memory: Memory) -> Measurement:
        """Return what can be measured of a task at the learner's weights; the purpose names the random draws."""
        region = memory.regions.get(task.index)
        return Measurement(self.learner, task, self.training, self.method.fisher, self.seed, purpose, region)

    def accuracies(self, task: Task, memory: Memory) -> tuple[list[float], list[float]]:
        """Return all tasks' accuracies up to this one, task- and class-incremental, in percent."""
        return accuracies(self.learner, self.seen(task), self.training.batch_size, memory.views)

    def true_loss(self, task: Task, theta: Params, memory: Memory) -> float:
        """Return the loss of all tasks so far, on their own data, at these weights, which the learner is left with."""
        self.place(task, theta, memory)
        return sum(self.measurement(each, "merge", memory).loss() for each in self.seen(task))
