"""Callbacks: objects that observe a run.

``learn`` calls them in this order: when the run begins or goes on; after every epoch, with the epoch and then with the
state; after every task, with the task and then with the state; and when the run has ended. A callback cannot change the
run, because states and events are immutable values. An exception that a callback raises ends the run.

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
    """Observes a run. Every method does nothing; a subclass overrides those that it needs."""

    def on_run_begin(self, state: RunState) -> None:
        """Do something before the first epoch, or before the first epoch after an interruption.

        Args:
            state: the state that the run begins with.
        """

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Do something after an epoch.

        Args:
            event: the losses and the learning rate of the epoch.
        """

    def on_task_end(self, event: TaskEnd) -> None:
        """Do something after a task.

        Args:
            event: the accuracies on all tasks that have been learned, this one included.
        """

    def on_state(self, state: RunState) -> None:
        """Do something with the state after an epoch or a task, when all callbacks have had the event.

        To store the state is to make a checkpoint, because ``learn`` goes on from it as if there had been no
        interruption. To raise an exception here is to stop between two epochs.

        Args:
            state: after an epoch, its ``stage`` is the present one. After a task, its ``stage`` is None and its record
                has the task.
        """

    def on_run_end(self, record: RunRecord) -> None:
        """Do something after all tasks have been learned; it is not called if the run ends with an error.

        Args:
            record: of the whole run.
        """


class CallbackList(Callback):
    """Several callbacks as one; each of its methods calls that of every callback, in their order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        """Store the callbacks."""
        self.callbacks = tuple(callbacks)

    def on_run_begin(self, state: RunState) -> None:
        """Call every callback."""
        for callback in self.callbacks:
            callback.on_run_begin(state)

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Call every callback."""
        for callback in self.callbacks:
            callback.on_epoch_end(event)

    def on_task_end(self, event: TaskEnd) -> None:
        """Call every callback."""
        for callback in self.callbacks:
            callback.on_task_end(event)

    def on_state(self, state: RunState) -> None:
        """Call every callback."""
        for callback in self.callbacks:
            callback.on_state(state)

    def on_run_end(self, record: RunRecord) -> None:
        """Call every callback."""
        for callback in self.callbacks:
            callback.on_run_end(record)
