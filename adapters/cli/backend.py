"""What a framework's adapter gives to the command line."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from adapters.architectures import Norm
from became_core.continual import Learner, TaskStream

__all__ = ["Backend", "Builder"]


class Builder(Protocol):
    """What builds a fresh learner."""

    def __call__(
        self,
        network: str,
        stream: TaskStream,
        device: str,
        seed: int,
        *,
        norm: Norm = "batch",
        mixed_precision: bool = False,
    ) -> Learner:
        """Return a learner with a network known by name, what it will learn, on a device, with weights by the seed."""


@dataclass(frozen=True)
class Backend:
    """A framework.

    Attributes:
        name: as in records.
        learner: builds a fresh learner.
        repeat_exactly: makes the framework use operations alone that give the same bits every time, on a GPU too; for a
            program's start.
    """

    name: str
    learner: Builder
    repeat_exactly: Callable[[], None]
