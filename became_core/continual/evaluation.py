"""Scoring a learner: accuracies of all tasks seen so far, and losses, from logits.

Convention: accuracies in percent. Task-incremental accuracy chooses among the classes of the sample's task;
class-incremental accuracy among those of all tasks so far, the argmax over all their heads. Both come from one pass;
where tasks have regions or masks, from one for each, since a head then works with weights of its own.
"""

from collections.abc import Iterable, Mapping, Sequence

from became_core.arrays import Array, namespace
from became_core.continual.learner import Learner
from became_core.continual.regions import reparametrised
from became_core.continual.stream import Indices, Task
from became_core.curvature import log_softmax
from became_core.errors import BecameError
from became_core.projection import View

__all__ = ["accuracies", "mean_loss"]

NO_REGIONS: Mapping[int, View] = {}


def accuracies(
    learner: Learner, tasks: Iterable[Task], batch_size: int, regions: Mapping[int, View] = NO_REGIONS
) -> tuple[list[float], list[float]]:
    """Return the test accuracies of these tasks, all that were seen so far: task-incremental, class-incremental.

    Args:
        learner: what is scored.
        tasks: all that were seen so far, in order.
        batch_size: of the passes.
        regions: what tasks see of the weights, by index, of those that see them otherwise than they are.

    Raises:
        BecameError: if a task has no test samples.
    """
    seen = list(tasks)
    for task in seen:
        if not len(task.test):
            raise BecameError(f"task {task.index + 1} has no test samples to score it on.")
    # By task, and by head.
    logits = [_heads(learner.logits(task.test, batch_size), len(seen)) for task in seen]
    for index, region in regions.items():
        with reparametrised(learner, region):
            for heads, task in zip(logits, seen, strict=True):
                heads[index] = learner.logits(task.test, batch_size)[:, index, :]
    pairs = [_task_accuracies(learner, task, each) for task, each in zip(seen, logits, strict=True)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _heads(logits: Array, count: int) -> list[Array]:
    return [logits[:, head, :] for head in range(count)]


def _task_accuracies(learner: Learner, task: Task, logits: Sequence[Array]) -> tuple[float, float]:
    targets = learner.targets(task.test)
    xp = namespace(logits=logits[0], targets=targets)
    width = int(logits[0].shape[1])
    within = xp.argmax(logits[task.index], axis=-1)
    among_all = xp.argmax(xp.concat(list(logits), axis=1), axis=-1)
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
