"""How long the phases of a run take, over all the parts that it was interrupted into.

Convention: seconds of wall-clock time.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

__all__ = ["Stopwatch"]

TOTAL = "total"


class Stopwatch:
    """Goes on from the seconds that earlier parts of the run took."""

    def __init__(self, before: Mapping[str, float]) -> None:
        """Start.

        Args:
            before: seconds by phase, and in total, of earlier parts.
        """
        self._started = {TOTAL: time.perf_counter()}
        self._seconds = {TOTAL: 0.0, **before}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time that this context takes to a phase."""
        self._started[name] = time.perf_counter()
        self._seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - self._started.pop(name)

    def read(self) -> dict[str, float]:
        """Return seconds by phase and in total, those of now among them."""
        now = time.perf_counter()
        return {name: seconds + now - self._started.get(name, now) for name, seconds in self._seconds.items()}
