"""Callbacks: what looks on while a run learns, its one extension point.

A callback is told, in this order, that the run begins or goes on; of every epoch's end, and then of the state; of every
task's end, and then of the state; and that the run has ended. It changes nothing: states and events are values. What a
callback raises ends the run.

    class Printer(Callback):
        def on_task_end(self, event: TaskEnd) -> None:
            print(f"task {event.task + 1}: {event.accuracy}")

    learn(learner, stream, method, training, callbacks=[Printer()])
"""

from collections.abc import Sequence

from became_core.continual.record import EpochEnd, RunRecord, TaskEnd
from became_core.continual.state import RunState

__all__ = ["Callback", "CallbackList"]


class Callback:
    """Looks on, and does nothing; a subclass does something where it says so."""

    def on_run_begin(self, state: RunState) -> None:
        """Be told what the run begins with: before the first epoch, or where an earlier run of it was interrupted."""

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Be told how an epoch went."""

    def on_task_end(self, event: TaskEnd) -> None:
        """Be told how all tasks so far score, now that one more has been learned."""

    def on_state(self, state: RunState) -> None:
        """Be given the state after an epoch or a task, once all callbacks know of its end.

        ``learn`` goes on from it as if there had been no interruption: to keep it is to make a checkpoint, and to raise
        here is to stop between two epochs. After a task it has no ``stage``, and its record has the task.
        """

    def on_run_end(self, record: RunRecord) -> None:
        """Be told that all tasks are learned, and how; not if the run ends with an error."""


class CallbackList(Callback):
    """Several callbacks as one; each is called in their order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        """Hold them."""
        self.callbacks = tuple(callbacks)

    def on_run_begin(self, state: RunState) -> None:
        """Tell each."""
        for each in self.callbacks:
            each.on_run_begin(state)

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Tell each."""
        for each in self.callbacks:
            each.on_epoch_end(event)

    def on_task_end(self, event: TaskEnd) -> None:
        """Tell each."""
        for each in self.callbacks:
            each.on_task_end(event)

    def on_state(self, state: RunState) -> None:
        """Give it to each."""
        for each in self.callbacks:
            each.on_state(state)

    def on_run_end(self, record: RunRecord) -> None:
        """Tell each."""
        for each in self.callbacks:
            each.on_run_end(record)
