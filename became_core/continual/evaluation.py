"""Scoring a learner: accuracies of all tasks seen so far, and losses, from logits.

Convention: accuracies in percent. Task-incremental accuracy chooses among the classes of the sample's task;
class-incremental accuracy among those of all tasks so far, the argmax over all their heads. Both come from one pass.
"""

from collections.abc import Iterable

from became_core.arrays import Array, namespace
from became_core.continual.learner import Learner
from became_core.continual.stream import Indices, Task
from became_core.curvature import log_softmax
from became_core.errors import BecameError

__all__ = ["accuracies", "mean_loss"]


def accuracies(learner: Learner, tasks: Iterable[Task], batch_size: int) -> tuple[list[float], list[float]]:
    """Return the test accuracies of these tasks, all that were seen so far: task-incremental, class-incremental.

    Raises:
        BecameError: if a task has no test samples.
    """
    seen = list(tasks)
    for task in seen:
        if not len(task.test):
            raise BecameError(f"task {task.index + 1} has no test samples to score it on.")
    pairs = [_task_accuracies(learner, task, len(seen), batch_size) for task in seen]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _task_accuracies(learner: Learner, task: Task, seen: int, batch_size: int) -> tuple[float, float]:
    logits, targets = learner.logits(task.test, batch_size), learner.targets(task.test)
    xp = namespace(logits=logits, targets=targets)
    samples, _, width = logits.shape
    within = xp.argmax(logits[:, task.index, :], axis=-1)
    among_all = xp.argmax(xp.reshape(logits[:, :seen, :], (samples, seen * width)), axis=-1)
    return _percent(within == targets), _percent(among_all == targets + task.index * width)


def _percent(correct: Array) -> float:
    xp = namespace(correct=correct)
    return 100.0 * int(xp.count_nonzero(correct)) / int(correct.shape[0])


def mean_loss(learner: Learner, task: int, indices: Indices, batch_size: int) -> float:
    """Return the mean cross-entropy of a task's head on these samples."""
    logits, targets = learner.logits(indices, batch_size), learner.targets(indices)
    xp = namespace(logits=logits, targets=targets)
    log_p = log_softmax(logits[:, task, :])
    return -float(xp.mean(xp.take_along_axis(log_p, targets[:, None], axis=-1)))
