"""A framework as the command line sees it: which there are, how one is loaded, and how its own command starts.

``adapters/FRAMEWORK/run.py`` makes one ``Backend``. Nothing here imports a framework.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, Protocol, TypeVar, cast

from adapters.networks import Architecture, DropoutMasks, HubNetwork, Norm, Weighted, build_network, hub_network
from became_core import BecameError, continual
from became_core.continual import Learner, RunRecord, TaskStream

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendName",
    "Builder",
    "available_threads",
    "first_installed",
    "learner_builder",
    "load_backend",
    "needs_package",
    "run_command",
    "threads_for",
]

BackendName = Literal["torch", "jax", "tensorflow"]

# In the order in which one is looked for.
BACKENDS: tuple[BackendName, ...] = ("torch", "jax", "tensorflow")


# Of one sample, in one pass: the multiplications below which a second thread waits for more than it computes. The mlp
# of the MNIST benchmarks has 88,400. With two threads it is no faster on idle cores, and ten times slower beside busy
# processes. The AlexNet-like network has 20 million.
SMALL = 1_000_000

L = TypeVar("L", bound=Learner)
L_co = TypeVar("L_co", bound=Learner, covariant=True)


class Builder(Protocol[L_co]):
    """A function that builds a fresh learner."""

    def __call__(
        self,
        network: str,
        stream: TaskStream,
        device: str,
        seed: int,
        *,
        norm: Norm = "batch",
        pretrained: bool = False,
        mixed_precision: bool = False,
        dropout_masks: DropoutMasks = "numpy",
        compiled: bool = False,
    ) -> L_co:
        """Return a fresh learner with a backbone known by name.

        Args:
            network: the backbone, one of ``adapters.networks.NETWORKS``, or of a package, ``hf:NAME`` or ``timm:NAME``.
            stream: what it will learn.
            device: a device as the framework calls it, or "auto" for the first accelerator there is, else the CPU.
            seed: names the draw of the initial weights.
            norm: the backbone's kind of normalisation, as in ``adapters.networks``.
            pretrained: whether a network of the hub has its pretrained weights.
            mixed_precision: whether training steps multiply in bfloat16.
            dropout_masks: what draws them.
            compiled: whether training steps are compiled as a whole, where they are not in any case.

        Raises:
            BecameError: if there is no such network or device.
        """


@dataclass(frozen=True)
class Backend:
    """A framework.

    Attributes:
        name: as in records.
        learner: builds a fresh learner.
        repeat_exactly: makes the framework use only operations that give the same bits every time, on a GPU too; it is
            called once, when a program starts.
        prepare: sets the framework up for runs; it is called once, when a program starts.
        use_threads: lets the CPU compute with so many threads, or with the framework's own choice if it is given None,
            and returns how many they are. A framework may only be able to before it has computed anything.
        learn: is ``became_core.continual.learn``, or does the same with several processes.
    """

    name: str
    learner: Builder[Learner]
    repeat_exactly: Callable[[], None]
    prepare: Callable[[], None] = lambda: None
    use_threads: Callable[[int | None], int] = lambda threads: threads or 1
    learn: Callable[..., RunRecord] = continual.learn


def learner_builder(
    learner: Callable[..., L], of_packages: Mapping[str, Callable[[HubNetwork, TaskStream, int], Any]] | None = None
) -> Builder[L]:
    """Return what builds learners of a class with backbones known by name.

    Args:
        learner: the class, whose constructor is that of ``NetworkLearner``.
        of_packages: by package, what makes the framework's module of a network of it, for a stream, with weights drawn
            by a seed; None if the framework has none.
    """

    def build_learner(
        network: str,
        stream: TaskStream,
        device: str,
        seed: int,
        *,
        norm: Norm = "batch",
        pretrained: bool = False,
        mixed_precision: bool = False,
        dropout_masks: DropoutMasks = "numpy",
        compiled: bool = False,
    ) -> L:
        hub = hub_network(network, norm, pretrained=pretrained)
        if hub is None:
            backbone: Any = build_network(network, stream.dataset.images.shape[1:], norm)
        elif of_packages is not None:
            backbone = of_packages[hub.package](hub, stream, seed)
        else:
            raise BecameError(
                f"the network '{network}' is one for PyTorch; choose --backend torch, or another network."
            )
        return learner(
            backbone,
            stream,
            device=device,
            mixed_precision=mixed_precision,
            dropout_masks=dropout_masks,
            compiled=compiled,
            seed=seed,
        )

    return build_learner


def load_backend(name: BackendName) -> Backend:
    """Return a backend, set up for runs.

    The framework is loaded; if it is missing, the program ends with a sentence that says so.
    """
    backend = cast(Backend, import_module(f"adapters.{name}.run").BACKEND)
    backend.prepare()
    return backend


def threads_for(network: str, shape: tuple[int, ...], norm: Norm = "batch") -> int | None:
    """Return how many threads a network should compute with: one if its arrays are small, None for the usual number.

    What the environment variable OMP_NUM_THREADS says comes first.

    >>> threads_for("mlp", (1, 28, 28)), threads_for("alexnet", (3, 32, 32))
    (1, None)

    Args:
        network: one of ``adapters.networks.NETWORKS``, or of a package.
        shape: of an image, [C, H, W], or of text, [L].
        norm: the network's kind of normalisation.
    """
    chosen = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if chosen.isdecimal() and int(chosen) > 0:
        return int(chosen)
    is_small = hub_network(network) is None and _multiplications(build_network(network, shape, norm)) < SMALL
    return 1 if is_small else None


def available_threads() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # other systems than Linux do not say


def _multiplications(network: Architecture) -> int:
    """Return how many multiplications a network's layers take for one sample."""
    positions = network.image[0] if len(network.image) == 1 else 1  # of text
    return sum(
        positions * math.prod(parameter.shape) * (math.prod(layer.output_shape(shape)[1:]) if positions == 1 else 1)
        for layer, shape in network.steps
        if isinstance(layer, Weighted)
        for parameter in layer.parameters(shape).values()
    )


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


@contextmanager
def needs_package(extra: str) -> Iterator[None]:
    """End the program with a sentence if a package that is imported in this context is missing.

    Args:
        extra: of this project's extras, the one that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        print(f"error: the package '{error.name}' is missing; pip install 'became[{extra}]'.", file=sys.stderr)
        sys.exit(2)


def run_command(backend: Backend) -> None:
    """Run the command line on a backend, and end the program: for ``python -m adapters.FRAMEWORK.run``."""
    with needs_package(backend.name):
        from adapters.cli.main import main
    backend.prepare()
    sys.exit(main(backend))
