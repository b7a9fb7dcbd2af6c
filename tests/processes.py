"""What tests of several processes share: bounded waits for events, and what a run's files say."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Seconds after which a process that has not gone on counts as hanging, also beside busy processes.
WAIT = 300.0


def until(happened: Callable[[], object]) -> None:
    """Wait until something has happened."""
    end = time.monotonic() + WAIT
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)


def lines(log: Path) -> int:
    """How many whole lines a file has; none if it is not there."""
    return log.read_bytes().count(b"\n") if log.exists() else 0


def result(out: Path, name: str) -> dict[str, Any]:
    """What came out of a run, seconds aside."""
    values: dict[str, Any] = json.loads((out / name / "results.json").read_text())
    return {key: value for key, value in values.items() if key not in ("seconds", "sha256")}
