"""A callback made of two functions, for tests that observe a run; and what a terminal is shown of a pass."""

from collections.abc import Callable
from typing import Any

import pytest

from became_core.continual import Callback, EpochEnd, RunState, TaskEnd

__all__ = ["Listening", "totals_shown"]


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


def totals_shown(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Let there be a terminal; return the totals of the progress bars of ``remember``, which are added as they show."""
    totals: list[int | None] = []

    def track(batches: Any, what: str, total: int | None, **_: Any) -> Any:
        assert what == "remembering"
        totals.append(total)
        return batches

    monkeypatch.setattr("rich.progress.track", track)
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    return totals
