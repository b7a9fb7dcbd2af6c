"""A CNN with real weights learns 10-split CIFAR-100, whole or by adapters: ``python benchmarks/pretrained.py``.

EfficientNet-Lite0 with ImageNet's weights (``real_models.py``) learns ten tasks of ten classes by ``learn``, the loop
of ``became run``, with a head for each task. The methods have the same images and epochs, the same Adam, and their
default settings: nothing was tuned. Batch norms use a batch's statistics in training, and those of each task's images
in evaluation, as for any module. Every result is written when it is there, and is not computed again.

Convention: accuracies in percent, among the ten classes of an image's task, and class-incremental, among all hundred.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))

from adapters.benchmarks.cifar import load_cifar100
from adapters.torch.learner import TorchLearner
from became_core.continual import Adam, Annealed, Dataset, TaskStream, Training, build_method, learn, split_classes
from became_core.continual.adaptation import Adaptation
from became_core.continual.metrics import average_accuracy, backward_transfer, forgetting, plasticity
from became_core.continual.rng import random_generator
from benchmarks.real_models import MEAN, STD, mean_and_spread, pretrained_lite0, remembered_result

METHODS = ("became", "gpm", "ewc", "finetune")
RATE, EPOCHS, BATCH = 5e-4, 4, 25


def pictures(data_dir: Path, seed: int, *, a_class: int, tests: int, side: int) -> TaskStream:
    """Return ten tasks of ten classes, with so many images a class, drawn by the seed and enlarged."""
    data, rng = load_cifar100(data_dir), random_generator(seed, "classes and images")
    labels, split, classes = np.asarray(data.labels), data.train_size, rng.permutation(100)
    rows, targets = [], []
    for part, first, count in ((labels[:split], 0, a_class), (labels[split:], split, tests)):
        for number, label in enumerate(classes):
            rows.append(first + rng.permutation(np.flatnonzero(part == label))[:count])
            targets.append(np.full(count, number))
    images = torch.from_numpy(np.ascontiguousarray(data.images[np.concatenate(rows)])).float()
    enlarged = functional.interpolate(images, (side, side), mode="bilinear", align_corners=False)
    pixels = enlarged.round().clamp(0, 255).to(torch.uint8).numpy()
    dataset = Dataset("cifar100-enlarged", pixels, np.concatenate(targets), 100 * a_class, MEAN, STD)
    return split_classes(dataset, 10)


def backbone() -> nn.Module:
    """Return the network without its outputs."""
    network: nn.Module = pretrained_lite0()
    network._fc, network._dropout = nn.Identity(), nn.Identity()
    return network.train()


def run(stream: TaskStream, method: str, rank: int | None, seed: int) -> dict[str, Any]:
    """Return what a run reached."""
    built = build_method(method)
    first = EPOCHS if built.rule is None else EPOCHS // 2  # without a rule there is no second stage
    training = Training(
        Annealed(RATE, first),
        Annealed(RATE, max(1, EPOCHS - first)),
        optimiser=Adam(),
        batch_size=BATCH,
        curvature_samples=200,
        adaptation=Adaptation(rank=rank),
    )
    began = time.process_time()
    record = learn(TorchLearner(backbone(), stream, seed=seed), stream, built, training, seed=seed)
    return {
        "acc": average_accuracy(record.accuracy),
        "bwt": backward_transfer(record.accuracy),
        "forgetting": forgetting(record.accuracy),
        "plasticity": plasticity(record.accuracy),
        "class_incremental": average_accuracy(record.class_incremental_accuracy),
        "alpha": record.alpha,
        "processor_seconds": time.process_time() - began,
    }


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder with CIFAR-100")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrained"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[0, 8], help="of the adapters; 0 trains all weights")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images", type=int, default=40, help="to train on, a class")
    parser.add_argument("--tests", type=int, default=30, help="to test on, a class")
    parser.add_argument("--side", type=int, default=64, help="of an image, in pixels")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for seed in options.seeds:
        stream = pictures(options.data_dir, seed, a_class=options.images, tests=options.tests, side=options.side)
        for rank in options.ranks:
            for method in options.methods:
                file = options.out / f"{method}-rank{rank}-seed{seed}.json"
                result = remembered_result(file, partial(run, stream, method, rank or None, seed))
                results.setdefault((method, rank), []).append(result)
    print("| method | learns | ACC | BWT | forgetting | plasticity | class-incremental ACC | alpha, first seed |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for (method, rank), runs in results.items():
        names = ("acc", "bwt", "forgetting", "plasticity", "class_incremental")
        numbers = (mean_and_spread([one[name] for one in runs], 2) for name in names)
        alphas = " ".join(f"{alpha:.2f}" for alpha in runs[0]["alpha"] if isinstance(alpha, float))
        learns = f"adapters of rank {rank}" if rank else "all weights"
        print(f"| `{method}` | {learns} | {' | '.join(numbers)} | {alphas} |")


if __name__ == "__main__":
    main()
