"""The benchmarks by name: where their images come from, how they are cut into tasks, and their presets.

Every benchmark of images is task-incremental: each task has a head. So has permuted MNIST, which as published has one
head for all tasks: here a task's permutation is known in testing, and class-incremental accuracy tells permutations
apart too. A data set with domains has a task for each, with one head for all unless each is to have its own.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters.benchmarks.cifar import load_cifar100
from adapters.benchmarks.imagenet_r import load_imagenet_r
from adapters.benchmarks.miniimagenet import load_miniimagenet
from adapters.benchmarks.mnist import load_mnist, load_mnist_to_draw
from adapters.benchmarks.presets import (
    CIFAR100,
    CIFAR100_IN_20,
    IMAGENET_R,
    MINIIMAGENET,
    MNIST_VAE,
    PERMUTED_MNIST,
    RATED_TEXT,
    SPLIT_MNIST,
    TABULAR,
    TEXT,
    TINYIMAGENET,
    Preset,
)
from adapters.benchmarks.tabular import TABULAR_SETTINGS, load_tabular
from adapters.benchmarks.text import TEXT_SETTINGS, load_rated_text, load_text
from adapters.benchmarks.tinyimagenet import load_tinyimagenet
from became_core import BecameError
from became_core.continual import ClassOrder, Dataset, TaskStream, permute_pixels, split_classes, split_domains
from became_core.registry import Catalogue, Setting, nearest

__all__ = ["BENCHMARKS", "Benchmark"]


@dataclass(frozen=True)
class Benchmark:
    """A data set cut into tasks.

    Attributes:
        name: as on the command line.
        load: returns the data set, given a local folder or None, and the settings by name.
        tasks: the usual number of tasks; 0 for as many as the data set has domains.
        presets: by name.
        otherwise: the presets of other numbers of tasks, where they differ.
        permuted: whether the tasks are permutations of the pixels, rather than groups of classes.
        usual: the name of the preset that is used if none is named.
        settings: what a user may choose of the data, by the name of its option.
        views: those settings of which other values show the same data in another way, and whose runs may be compared.
    """

    name: str
    load: Callable[..., Dataset]
    tasks: int
    presets: Mapping[str, Preset]
    otherwise: Mapping[int, Mapping[str, Preset]] = field(default_factory=dict)
    permuted: bool = False
    usual: str = "quick"
    settings: Mapping[str, Setting] = field(default_factory=dict)
    views: tuple[str, ...] = ()

    def preset(self, name: str, tasks: int) -> Preset:
        """Return the preset of that name for so many tasks.

        Raises:
            BecameError: if there is none.
        """
        presets = self.otherwise.get(tasks, self.presets)
        if name not in presets:
            raise BecameError(f"{self.name} has no preset '{name}'{nearest(name, presets)}.")
        return presets[name]

    def stream(
        self,
        dataset: Dataset,
        tasks: int,
        *,
        validation: float,
        seed: int,
        class_order: ClassOrder,
        settings: Mapping[str, Any] | None = None,
    ) -> TaskStream:
        """Return the tasks; arguments as of ``became_core.continual.split_classes``, and the benchmark's settings.

        Raises:
            BecameError: if the data set cannot be cut so.
        """
        if dataset.domains is not None:
            shared = (settings or {}).get("head", "shared") == "shared"
            stream = split_domains(dataset, validation=validation, seed=seed, shared_head=shared)
            if tasks not in (0, len(stream.tasks)):
                raise BecameError(
                    f"{dataset.name} has {len(stream.tasks)} tasks; leave --tasks out, or choose by --first."
                )
            return stream
        if self.permuted:
            if class_order != "label":
                raise BecameError(f"{self.name} has all classes in every task; their order can only be label.")
            dataset = permute_pixels(dataset, tasks)
        return split_classes(dataset, tasks, validation=validation, seed=seed, class_order=class_order)

    def summary(self) -> str:
        """Return one line about it: how many tasks, of what, with which presets."""
        data = (inspect.getdoc(self.load) or "").partition("\n")[0].removeprefix("Return ").partition(":")[0]
        parts = "permutations of the pixels of" if self.permuted else "groups of the classes of"
        tasks = f"{self.tasks} tasks, {parts}" if self.tasks else "a task for each domain:"
        presets = "preset" if len(self.presets) == 1 else "presets"
        return f"{tasks} {data.removesuffix('.')}; {presets} {', '.join(self.presets)}"


BENCHMARKS: Catalogue[Benchmark] = Catalogue(
    "became.benchmarks",
    "benchmark",
    {
        benchmark.name: benchmark
        for benchmark in (
            # The images of the first three are embedded.
            Benchmark("split-mnist", load_mnist, 5, SPLIT_MNIST, usual="demo"),
            Benchmark("permuted-mnist", load_mnist, 10, PERMUTED_MNIST, permuted=True),
            Benchmark("split-mnist-vae", load_mnist_to_draw, 0, MNIST_VAE),
            Benchmark("text-domains", load_text, 0, TEXT, settings=TEXT_SETTINGS, views=("context",)),
            Benchmark("text-sentiment", load_rated_text, 0, RATED_TEXT, settings=TEXT_SETTINGS, views=("context",)),
            Benchmark("tabular", load_tabular, 0, TABULAR, settings=TABULAR_SETTINGS),
            Benchmark("split-cifar100", load_cifar100, 10, CIFAR100, otherwise={20: CIFAR100_IN_20}),
            Benchmark("split-miniimagenet", load_miniimagenet, 20, MINIIMAGENET),
            Benchmark("split-tinyimagenet", load_tinyimagenet, 25, TINYIMAGENET),
            Benchmark("split-imagenet-r", load_imagenet_r, 10, IMAGENET_R, usual="pretrained"),
        )
    },
)
