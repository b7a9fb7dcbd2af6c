"""How merges around a loop of one's own choose alpha: by which estimator, Fisher information and digits.

A perceptron learns 3,200 digits of MNIST by AdamW, and then the same digits in three other views, one after the other.
The first task has all epochs; each later one has two thirds of them in ``stable`` and the others in ``plastic``, and is
merged. "GPM" has all epochs in ``stable``, and "1/2" the mean of both models. ``remember`` and ``merge`` are given the
digits that were trained on in one row, and 800 that were not in the next. What is printed are the mean test accuracies
on all four views at the end, in percent, and the alphas:

    python benchmarks/own_loop_calibration.py --epochs 6 24 --seeds 0 1 2
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from adapters.benchmarks.mnist import load_mnist
from adapters.torch import Continual
from became_core.laplace import Secant

Pairs = list[tuple[Tensor, Tensor]]
BATCH, RATE = 50, 1e-3
HELD_OUT = 16  # batches

VIEWS: tuple[Callable[[Any], Any], ...] = (
    lambda images: images,
    lambda images: np.roll(images, 6, axis=2),
    lambda images: np.rot90(images, axes=(1, 2)),
    lambda images: 1 - images,
)
WAYS: dict[str, dict[str, Any]] = {
    "GPM": {},
    "1/2": {},
    "PaperClosedForm()": {},  # the default
    "PaperClosedForm(), fisher='true'": {"fisher": "true"},
    "Secant()": {"estimator": Secant()},
    "Secant(), fisher='true'": {"estimator": Secant(), "fisher": "true"},
    "calibration='across'": {"calibration": "across"},
}


def tasks_of_digits() -> list[tuple[Pairs, Pairs]]:
    """Return the training and test batches of each view."""
    digits = load_mnist()
    images, labels = digits.images[:, 0].astype(np.float32) / 255, torch.from_numpy(digits.labels.astype(np.int64))

    def batches(view: Callable[[Any], Any], rows: Any) -> Pairs:
        pixels = torch.from_numpy(np.ascontiguousarray(view(images[rows])).reshape(-1, 784))
        return list(zip(torch.split(pixels, BATCH), torch.split(labels[rows], BATCH), strict=True))

    # The file is sorted by digit: its batches would have one digit each.
    train = np.random.default_rng(0).permutation(digits.train_size)
    test = np.arange(digits.train_size, len(images))
    return [(batches(view, train), batches(view, test)) for view in VIEWS]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Pairs, epochs: int, smoothing: float) -> None:
    """Train, in an order that is drawn anew in each epoch."""
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(batches)).tolist():
            inputs, targets = batches[index]
            optimizer.zero_grad()
            loss: Any = nn.functional.cross_entropy(model(inputs), targets, label_smoothing=smoothing)
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, batches: Pairs) -> float:
    """Return the share of right answers, in percent."""
    model.eval()
    return 100 * statistics.fmean(float((model(x).argmax(1) == y).float().mean()) for x, y in batches)


def learned(
    tasks: list[tuple[Pairs, Pairs, Pairs]], way: str, epochs: int, seed: int, smoothing: float
) -> tuple[float, list[float]]:
    """Return the mean test accuracy at the end, and the alphas.

    Args:
        tasks: of each view, the batches to train on, those for ``remember`` and ``merge``, and those to test on.
        way: a name in ``WAYS``.
        epochs: of each task.
        seed: of weights and orders.
        smoothing: of the labels in training.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    learning, alphas = Continual(model, progress=False, **WAYS[way]), list[float]()
    plastic = 0 if way == "GPM" else epochs // 3
    for index, (batches, measured, _) in enumerate(tasks):
        optimizer = torch.optim.AdamW(model.parameters(), RATE)
        if index == 0:
            train(model, optimizer, batches, epochs, smoothing)
        else:
            with learning.stable(optimizer):
                train(model, optimizer, batches, epochs - plastic, smoothing)
            theta_gp = {name: value.clone() for name, value in model.state_dict().items()}
            if plastic:
                with learning.plastic():
                    train(model, optimizer, batches, plastic, smoothing)
            if way == "1/2":
                model.load_state_dict({n: (theta_gp[n] + v) / 2 for n, v in model.state_dict().items()})
            elif plastic:
                alphas.append(learning.merge(measured).alpha)
        learning.remember(measured, share=1)
    return statistics.fmean(accuracy(model, test) for *_, test in tasks), alphas


def main() -> None:
    """Print a row for each number of epochs and each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, nargs="+", default=[6, 24], help="epochs a task, multiples of three")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--smoothing", type=float, default=0.0, help="of the labels in training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    views = tasks_of_digits()
    measured = {"training": slice(None, -HELD_OUT), "held out": slice(-HELD_OUT, None)}
    print("| epochs a task | | measured on | mean accuracy at the end | by seed | α, tasks 2 to 4, first seed |")
    print("| ---: | --- | --- | ---: | --- | --- |")
    for epochs, way, on in product(options.epochs, WAYS, measured):
        tasks = [(batches[:-HELD_OUT], batches[measured[on]], test) for batches, test in views]
        results = [learned(tasks, way, epochs, seed, options.smoothing) for seed in options.seeds]
        found, alphas = [accuracy for accuracy, _ in results], results[0][1]
        spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        each = ", ".join(f"{a:.2f}" for a in found)
        path = " ".join(f"{a:.2f}"[1:] if a < 1 else "1" for a in alphas)
        print(f"| {epochs} | {way} | {on} | {statistics.fmean(found):.2f}{spread} | {each} | {path} |", flush=True)


if __name__ == "__main__":
    main()
