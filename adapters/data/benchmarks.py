"""The benchmarks by name: where their images come from, how many tasks they have, and how each preset trains on them.

``paper`` is the published protocol (Saha 2021, which BECAME follows); ``quick`` is the same protocol on a schedule that
two CPU cores finish, the learning rate annealed within each stage, curvature measured on a part of the samples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapters.data.cifar import load_cifar100
from adapters.data.mnist import load_mnist
from became_core import BecameError
from became_core.continual import Annealed, Dataset, MethodSettings, Patience, Training

__all__ = ["BENCHMARKS", "Benchmark", "Preset", "find_benchmark"]


@dataclass(frozen=True)
class Preset:
    """How a benchmark is trained on: the fraction held out for validation, schedules and sizes, methods' numbers."""

    training: Training
    settings: MethodSettings
    validation: float = 0.05


@dataclass(frozen=True)
class Benchmark:
    """A data set cut into tasks.

    Attributes:
        name: as on the command line.
        load: returns the data set, given a local folder or None.
        tasks: the usual number of tasks.
        network: the name of its backbone.
        presets: "quick" and "paper".
    """

    name: str
    load: Callable[[Path | None], Dataset]
    tasks: int
    network: str
    presets: dict[str, Preset]


_SPLIT_MNIST = Benchmark(
    name="split-mnist",
    load=lambda data_dir: load_mnist(),  # the images are embedded
    tasks=5,
    network="mlp",
    presets={
        "quick": Preset(
            Training(stage1=Annealed(lr=0.1, epochs=8), stage2=Annealed(lr=0.1, epochs=4), batch_size=10),
            MethodSettings(threshold=0.95, increment=0.003),
        ),
        "paper": Preset(
            Training(
                stage1=Patience(lr=0.05, minimum=1e-3),
                stage2=Patience(lr=0.05, minimum=1e-3, restores_best=False),
                batch_size=10,
            ),
            MethodSettings(threshold=0.95, increment=0.003),
            validation=0.1,
        ),
    },
)

_SPLIT_CIFAR100 = Benchmark(
    name="split-cifar100",
    load=load_cifar100,
    tasks=10,
    network="alexnet",
    presets={
        "quick": Preset(
            Training(stage1=Annealed(lr=0.05, epochs=12), stage2=Annealed(lr=0.05, epochs=6), curvature_samples=1024),
            MethodSettings(),
        ),
        "paper": Preset(
            Training(stage1=Patience(lr=0.05), stage2=Patience(lr=0.05, restores_best=False)), MethodSettings()
        ),
    },
)

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (_SPLIT_MNIST, _SPLIT_CIFAR100)}


def find_benchmark(name: str) -> Benchmark:
    """Return the benchmark of that name.

    Raises:
        BecameError: if there is none; the message lists those there are.
    """
    if name not in BENCHMARKS:
        raise BecameError(f"there is no benchmark '{name}'; choose from {', '.join(sorted(BENCHMARKS))}.")
    return BENCHMARKS[name]
