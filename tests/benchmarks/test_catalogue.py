"""The benchmarks' presets, field by field as published; and how each benchmark is cut into tasks."""

from dataclasses import astuple, replace

import numpy as np
import pytest

from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.benchmarks.mnist import load_mnist
from adapters.runs.configuration import Configuration
from became_core import BecameError
from became_core.continual import Adam, Augmentation, Patience, RelativeRates, Stepped
from tests.streams import prototype_stream

TOY = prototype_stream(tasks=3, classes_per_task=4).dataset
SPLIT = [("split-cifar100", 10), ("split-cifar100", 20), ("split-miniimagenet", 20), ("split-tinyimagenet", 25)]


def configured(benchmark: str, tasks: int, preset: str, method: str = "gpm") -> Configuration:
    return Configuration.of({"benchmark": benchmark, "tasks": tasks}, method, preset)


@pytest.mark.parametrize(("name", "tasks"), [*SPLIT, ("split-mnist", 5), ("permuted-mnist", 10)])
def test_every_benchmark_has_the_published_protocol_and_a_quick_one_for_the_same_network(name: str, tasks: int) -> None:
    quick, paper = (configured(name, tasks, preset) for preset in ("quick", "paper"))
    if name != "split-tinyimagenet":  # where the published network is Wang's, and quick has miniImageNet's
        assert quick.network == paper.network
    assert quick.epochs <= 12
    assert quick.stage2_epochs <= 6
    assert paper.training().curvature_samples is None  # all


@pytest.mark.parametrize("tasks", [10, 20])
def test_cifar100_as_published(tasks: int) -> None:
    preset = configured("split-cifar100", tasks, "paper")
    training = preset.training()
    assert training.stage1 == Patience(lr=0.05, factor=2, patience=6, minimum=5e-5, epochs=200, restores_best=True)
    assert training.stage2 == replace(training.stage1, restores_best=False)
    assert (training.batch_size, training.projector_samples, preset.validation) == (64, 125, 0.05)
    assert preset.network == "alexnet"
    for method in ("gpm", "became", "sgp", "became+gpcns"):
        settings = configured("split-cifar100", tasks, "paper", method).settings
        assert (settings["threshold"], settings["increment"], settings.get("scale", 5)) == (0.97, 0.003, 5)


def test_miniimagenet_as_published() -> None:
    preset = configured("split-miniimagenet", 20, "paper")
    training = preset.training()
    assert training.stage1 == Patience(lr=0.1, factor=3, patience=5, minimum=1e-3, epochs=200, restores_best=True)
    assert training.stage2 == replace(training.stage1, restores_best=False)
    assert (training.batch_size, training.projector_samples, preset.validation) == (64, 100, 0.05)
    assert preset.network == "resnet18"
    for method in ("gpm", "became", "trgp", "became+trgp"):
        settings = configured("split-miniimagenet", 20, "paper", method).settings
        assert (settings["threshold"], settings["increment"]) == (0.985, 0.0003)
    for method in ("sgp", "gpcns", "became+sgp", "ewc+gpcns"):
        settings = configured("split-miniimagenet", 20, "paper", method).settings
        assert (settings["threshold"], settings["increment"], settings["scale"]) == (0.98, 0.001, 3)


@pytest.mark.parametrize(
    ("name", "tasks", "preset", "batch_size", "ratio"),
    [
        ("split-cifar100", 10, "nscl", 32, 10),
        ("split-cifar100", 20, "nscl", 16, 30),
        ("split-tinyimagenet", 25, "nscl", 16, 10),
        ("split-tinyimagenet", 25, "paper", 16, 10),
    ],
)
def test_nscl_as_published(name: str, tasks: int, preset: str, batch_size: int, ratio: float) -> None:
    found = configured(name, tasks, preset)
    training = found.training()
    for stage in (training.stage1, training.stage2):
        assert isinstance(stage, Stepped)
        assert (stage.lr, stage.factor, stage.epochs) == (5e-5, 2, 80)
        assert [share * 80 for share in stage.milestones] == [30, 60]
    assert training.optimiser == Adam(beta1=0.9, beta2=0.999, weight_decay=5e-5)
    assert (training.batch_size, training.projector_samples, found.validation) == (batch_size, None, 0)
    assert training.augmentation == Augmentation(padding=4, flips=True)
    # 1e-4 in the first task (on TinyImageNet as later), 1e-3 for heads, 5e-4 for batch norm, beside 5e-5.
    first = 1.0 if name == "split-tinyimagenet" else 2.0
    assert astuple(training.relative) == pytest.approx(astuple(RelativeRates(heads=20.0, norms=10.0, first=first)))
    assert found.network == "preact_resnet18"
    for method in ("nscl", "became+nscl"):
        settings = configured(name, tasks, preset, method).settings
        assert settings["norm_penalty"] == 2 * 100  # which the published code has without 1/2
        assert settings["nscl_ratio"] == ratio


@pytest.mark.parametrize("tasks", [10, 20])
def test_the_original_code_of_each_method_on_cifar100(tasks: int) -> None:
    for method, rate, least, scale in (
        ("gpm", 0.01, 1e-5, None),
        ("trgp", 0.01, 1e-5, None),
        ("sgp", 0.05, 5e-5, 10),
        ("gpcns", 0.05, 5e-5, 5),
    ):
        preset = configured("split-cifar100", tasks, "original", method)
        assert preset.training().stage1 == Patience(lr=rate, factor=2, patience=6, minimum=least, epochs=200)
        assert (preset.settings["threshold"], preset.settings.get("scale")) == (0.97, scale)


def test_the_original_code_of_each_method_on_miniimagenet() -> None:
    for method, threshold, increment, validation in (("gpm", 0.985, 0.0003, 0.05), ("trgp", 0.985, 0.0, 0.02)):
        preset = configured("split-miniimagenet", 20, "original", method)
        assert preset.training().stage1 == Patience(lr=0.1, factor=3, patience=5, minimum=1e-3, epochs=200)
        assert (preset.settings["threshold"], preset.settings["increment"]) == (threshold, increment)
        assert preset.validation == validation


@pytest.mark.parametrize("name", ["split-mnist", "permuted-mnist", "split-cifar100", "split-miniimagenet"])
def test_masks_as_published_in_paper_and_ours_in_quick(name: str) -> None:
    tasks = BENCHMARKS[name].tasks
    for preset, published in (("paper", True), ("quick", False)):
        assert configured(name, tasks, preset, "hat").settings["hat_clamped"] is published
        packnet = configured(name, tasks, preset, "packnet").settings
        assert packnet["packnet_even"] is published
        assert packnet["packnet_retraining"] == (0.1 if published else 1.0)


def test_permuted_mnist_as_published_by_gpm() -> None:
    preset = configured("permuted-mnist", 10, "paper")
    assert preset.training().stage1.epochs == 5
    np.testing.assert_array_equal(preset.training().stage1.rates(3), [0.01] * 3)
    assert (preset.batch_size, preset.projector_samples, preset.validation) == (10, 300, 0.1)
    assert (preset.settings["threshold"], preset.settings["increment"], preset.network) == (0.95, 0, "mlp")


def test_a_preset_that_a_benchmark_lacks_is_named_beside_those_there_are() -> None:
    with pytest.raises(BecameError, match="split-mnist has no preset 'nscl'; choose from demo, paper, quick"):
        BENCHMARKS["split-mnist"].preset("nscl", 5)


def test_permuted_mnist_gives_each_task_all_digits_a_head_and_a_permutation() -> None:
    digits = load_mnist()
    stream = BENCHMARKS["permuted-mnist"].stream(digits, 3, validation=0.1, seed=0, class_order="label")
    assert [task.classes for task in stream.tasks] == [tuple(range(10 * t, 10 * t + 10)) for t in range(3)]
    assert [len(task.train) + len(task.validation) for task in stream.tasks] == [4000] * 3
    for task in stream.tasks:
        images = stream.dataset.images[task.test].reshape(1000, -1)
        np.testing.assert_array_equal(stream.targets[task.test], digits.labels[4000:])
        np.testing.assert_array_equal(images.sum(axis=1), digits.images[4000:].sum(axis=(1, 2, 3)))
        same = np.array_equal(images, digits.images[4000:].reshape(1000, -1))
        assert same == (task.index == 0)


def test_permuted_classes_keep_their_order() -> None:
    with pytest.raises(
        BecameError, match="permuted-mnist has all classes in every task; their order can only be label"
    ):
        BENCHMARKS["permuted-mnist"].stream(TOY, 2, validation=0, seed=0, class_order="seeded")


def test_a_split_benchmark_takes_either_class_order() -> None:
    benchmark = BENCHMARKS["split-cifar100"]
    label, seeded = (benchmark.stream(TOY, 3, validation=0, seed=1, class_order=order) for order in ("label", "seeded"))
    assert label.tasks[0].classes == (0, 1, 2, 3)
    assert seeded.tasks[0].classes != (0, 1, 2, 3)
