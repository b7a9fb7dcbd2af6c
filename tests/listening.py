"""A callback made of two functions, for tests that observe a run."""

from collections.abc import Callable

from became_core.continual import Callback, EpochEnd, RunState, TaskEnd

__all__ = ["Listening"]


class Listening(Callback):
    """Calls ``observe`` with every event, and ``keep`` with every state."""

    def __init__(
        self,
        observe: Callable[[EpochEnd | TaskEnd], object] = lambda event: None,
        keep: Callable[[RunState], object] = lambda state: None,
    ) -> None:
        self.observe, self.keep = observe, keep

    def on_epoch_end(self, event: EpochEnd) -> None:
        self.observe(event)

    def on_task_end(self, event: TaskEnd) -> None:
        self.observe(event)

    def on_state(self, state: RunState) -> None:
        self.keep(state)
