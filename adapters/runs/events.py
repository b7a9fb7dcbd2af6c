"""``events.jsonl``: what happened in a run, one event a line; lines are only added.

Convention: every line is a JSON object with ``event`` and ``time`` (UTC, ISO 8601). An epoch that was lost with an
interrupted process is recorded twice. Nothing is read back from this file.
"""

import json
import math
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adapters.runs.provenance import versions
from became_core import BecameError
from became_core.continual import Callback, EpochEnd, RunRecord, RunState, TaskEnd

__all__ = ["EventLog", "Events", "json_line", "now", "place"]


class Events(Callback):
    """The events of a run, by name and with plain values; a subclass writes them."""

    backend: str = ""

    def add(self, name: str, **values: Any) -> None:
        """Add an event."""
        raise NotImplementedError

    def on_run_begin(self, state: RunState) -> None:
        """Add that a run begins, or where it is resumed."""
        fresh = state.task == 0 and state.stage is None
        after = {} if fresh else {"after": place(state), "tasks_done": state.task}
        self.add("begin" if fresh else "resume", **after, backend=self.backend, versions=versions())

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Add an epoch."""
        self.add("epoch", **asdict(event))

    def on_task_end(self, event: TaskEnd) -> None:
        """Add a task."""
        self.add("task", **asdict(event))

    def on_run_end(self, record: RunRecord) -> None:
        """Add the end of the run."""
        self.add("end")


@dataclass(frozen=True)
class EventLog(Events):
    """The events of a run in a file.

    Attributes:
        file: the file, ``events.jsonl`` in the run's folder.
        backend: the name of the backend that works on the run.
    """

    file: Path
    backend: str = ""

    def add(self, name: str, **values: Any) -> None:
        """Add a line.

        Raises:
            BecameError: if it cannot be written.
        """
        line = json_line({"event": name, "time": now(), **values})
        try:
            with self.file.open("a+b") as handle:
                handle.write((b"" if _ends_a_line(handle) else b"\n") + line.encode() + b"\n")
        except OSError as error:
            raise BecameError(f"cannot write {self.file}: {error.strerror}.") from None


def place(state: RunState) -> str:
    """Return where a run is, for messages: "task 2/5, stage 1, epoch 3"."""
    total = len(state.record.accuracy)
    if state.stage is None:
        return f"task {state.task}/{total}"
    return f"task {state.task + 1}/{total}, stage {state.stage.number}, epoch {state.stage.schedule.epoch}"


def now() -> str:
    """Return the present time as events have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def json_line(values: dict[str, Any]) -> str:
    """Return an object as one line of JSON; sets are sorted lists, and NaN and infinities are null."""
    return json.dumps({name: _plain(value) for name, value in values.items()}, allow_nan=False)


def _ends_a_line(handle: Any) -> bool:
    """Whether the file ends with a whole line; it does not if a process was killed while it wrote."""
    end = handle.seek(0, 2)
    if not end:
        return True
    handle.seek(end - 1)
    return bool(handle.read(1) == b"\n")


def _plain(value: Any) -> Any:
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
