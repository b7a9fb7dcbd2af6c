"""What a framework's adapter gives to the command line."""

from collections.abc import Callable
from dataclasses import dataclass

from became_core.continual import Learner, TaskStream

__all__ = ["Backend"]


@dataclass(frozen=True)
class Backend:
    """A framework.

    Attributes:
        name: as in records.
        learner: builds a fresh learner from (network, stream, device, seed).
    """

    name: str
    learner: Callable[[str, TaskStream, str, int], Learner]
