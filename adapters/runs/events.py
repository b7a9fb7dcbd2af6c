"""``events.jsonl``: what happened in a run, a line each, only ever added to.

Convention: every line is a JSON object with ``event`` and ``time`` (UTC, ISO 8601). An epoch that was lost with an
interrupted process is there twice. Nothing is read back from it.
"""

import json
import math
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from became_core import BecameError
from became_core.continual import EpochEnd, TaskEnd

__all__ = ["EventLog"]


@dataclass(frozen=True)
class EventLog:
    """The events of the run in a folder."""

    file: Path

    def observe(self, event: EpochEnd | TaskEnd) -> None:
        """Add what the loop observed."""
        self.add("epoch" if isinstance(event, EpochEnd) else "task", **asdict(event))

    def add(self, name: str, **values: Any) -> None:
        """Add a line.

        Raises:
            BecameError: if it cannot be written.
        """
        entry = {"event": name, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **values}
        line = json.dumps({name: _plain(value) for name, value in entry.items()}, allow_nan=False)
        try:
            with self.file.open("a+b") as handle:
                handle.write((b"" if _ends_a_line(handle) else b"\n") + line.encode() + b"\n")
        except OSError as error:
            raise BecameError(f"cannot write {self.file}: {error.strerror}.") from None


def _ends_a_line(handle: Any) -> bool:
    """Whether what is there ends a line: it does not where a process was killed while it wrote."""
    end = handle.seek(0, 2)
    if not end:
        return True
    handle.seek(end - 1)
    return bool(handle.read(1) == b"\n")


def _plain(value: Any) -> Any:
    if isinstance(value, frozenset):
        return sorted(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
