"""What a framework's adapter gives to the command line, and which there are."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Literal, Protocol, cast

from adapters.networks import DropoutMasks, Norm
from became_core import BecameError
from became_core.continual import Learner, TaskStream

__all__ = ["BACKENDS", "Backend", "BackendName", "Builder", "first_installed", "load_backend"]

BackendName = Literal["torch", "jax", "tensorflow"]

# In the order in which one is looked for.
BACKENDS: tuple[BackendName, ...] = ("torch", "jax", "tensorflow")


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
        dropout_masks: DropoutMasks = "numpy",
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
        prepare: sets the framework up for runs; for a program's start.
    """

    name: str
    learner: Builder
    repeat_exactly: Callable[[], None]
    prepare: Callable[[], None] = lambda: None


def load_backend(name: BackendName) -> Backend:
    """Return a backend, set up for runs; its framework is loaded, or, if it is missing, the program ended."""
    backend = cast(Backend, import_module(f"adapters.{name}.run").BACKEND)
    backend.prepare()
    return backend


def first_installed() -> BackendName:
    """Return the name of the first framework that is installed; none is loaded.

    Raises:
        BecameError: if there is none.
    """
    for name in BACKENDS:
        if find_spec(name) is not None:
            return name
    others = " or ".join(BACKENDS[1:])
    raise BecameError(
        f"there is no framework to run on; pip install 'became[{BACKENDS[0]}]', or with {others} in its place."
    )
