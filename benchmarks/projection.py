"""Speed of projected training: ``python benchmarks/projection.py [--data-dir DIR] [--json]``.

The AlexNet-like network learns two real CIFAR-100 tasks, briefly, and remembers both by GPM; then steps on the third task
are timed, projected and plain, in turns in one process: with that memory, and with bases of half of every layer's width.
``dense`` is the straightforward peer, which multiplies every gradient by a stored M M^T, as the published code does.

Convention: batch 64, float32, PyTorch; medians of ratios over rounds. Without the images, random ones take their place,
and the first column is left out.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the checkout is measured, installed or not

from adapters.data.cifar import load_cifar100
from adapters.data.location import data_directory
from adapters.torch.memory import keep_freed_memory
from adapters.torch.run import build_learner
from became_core import BecameError
from became_core.arrays import Params
from became_core.continual import (
    SGD,
    Annealed,
    Batch,
    Constraint,
    Dataset,
    MethodSettings,
    TaskStream,
    Training,
    build_method,
    learn,
    split_classes,
)
from became_core.projection import GPM, Projector

STEPS = 8  # timed together


@dataclass(frozen=True)
class Dense:
    """What one would write without us: every gradient times a stored M M^T."""

    products: dict[str, torch.Tensor]

    rowwise = frozenset[str]()

    def project(self, updates: Params) -> Params:
        """Return G - G (M M^T), weight by weight."""
        return {name: self._project(name, update) for name, update in updates.items()}

    def _project(self, name: str, update: torch.Tensor) -> torch.Tensor:
        if name not in self.products:
            return update
        matrix = update.reshape(len(update), -1)
        return (matrix - matrix @ self.products[name]).reshape(update.shape)


def stream_of(data_dir: Path | None) -> tuple[TaskStream, bool]:
    """Return three tasks of ten classes, and whether they are real."""
    try:
        return split_classes(load_cifar100(data_directory(data_dir)), 10), True
    except BecameError:
        draw = np.random.default_rng(0)
        images, labels = draw.integers(0, 256, (2000, 3, 32, 32), dtype=np.uint8), np.arange(2000) % 100
        halves = (np.arange(2000) < 1900), (np.arange(2000) >= 1900)
        del halves
        return split_classes(Dataset(images, labels, np.arange(1900), np.arange(1900, 2000)), 10), False


def half_width(learner: Any) -> GPM:
    """Return a memory of random bases, half of every layer's width."""
    torch.manual_seed(0)
    theta = learner.parameters()
    grams = {}
    for name in sorted(learner.projectable):
        width = theta[name][0].numel()
        basis = torch.linalg.qr(torch.randn(width, width // 2, dtype=torch.float64))[0]
        grams[name] = (basis @ basis.T).float()
    return GPM(threshold=1 - 1e-4).remember(Grams(grams))


@dataclass(frozen=True)
class Grams:
    """Statistics that are given."""

    grams: Params

    def input_grams(self) -> Params:
        """Return them."""
        return self.grams


def seconds(learner: Any, batches: list[Batch], constraint: Constraint) -> float:
    """Return the time of these steps; the weights are put back."""
    theta = learner.parameters()
    began = time.perf_counter()
    learner.train(batches, np.full(len(batches), 0.01), constraint, SGD(), np.random.default_rng(0))
    taken = time.perf_counter() - began
    learner.assign(theta)
    return taken


def ratios(learner: Any, stream: TaskStream, memory: GPM, rounds: int) -> dict[str, float]:
    """Return projected and dense steps over plain ones."""
    rows = stream.tasks[2].train
    batches = [Batch(2, rows[64 * step : 64 * (step + 1)]) for step in range(STEPS)]
    trainable = learner.projectable | learner.heads[2]
    products = {name: basis @ basis.T for name, basis in memory.bases.items()}
    projectors: dict[str, Projector | None] = {"plain": None, "projected": memory, "dense": Dense(products)}
    taken: dict[str, list[float]] = {name: [] for name in projectors}
    for _ in range(rounds + 1):  # the first round warms up
        for name, projector in projectors.items():
            taken[name].append(seconds(learner, batches, Constraint(trainable, projector=projector)))
    plain = np.array(taken["plain"][1:])
    return {name: float(np.median(np.array(taken[name][1:]) / plain)) for name in ("projected", "dense")} | {
        "plain_step_seconds": float(np.median(plain)) / STEPS
    }


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=3, help="of each of the two tasks")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one object of ratios")
    options = parser.parse_args()
    keep_freed_memory()
    stream, real = stream_of(options.data_dir)
    learner = build_learner("alexnet", stream, "cpu", 0)
    found: dict[str, float] = {}
    if real:
        two = TaskStream(stream.dataset, stream.tasks[:2], stream.targets, stream.classes_per_task)
        training = Training(Annealed(0.05, options.epochs), Annealed(0.05, 1))
        memory = learn(learner, two, build_method("gpm", MethodSettings()), training).memory.projector
        assert isinstance(memory, GPM)
        found |= {
            f"{name}_after_two_tasks": value for name, value in ratios(learner, stream, memory, options.rounds).items()
        }
        print("ranks:", {name: f"{rank}/{width}" for name, (rank, width) in memory.rank.items()}, file=sys.stderr)
    found |= {
        f"{name}_half_width": value
        for name, value in ratios(learner, stream, half_width(learner), options.rounds).items()
    }
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print("| what | over a plain step |\n| --- | ---: |")
    for name, value in found.items():
        print(f"| {name.replace('_', ' ')} | {value:.3f} |")


if __name__ == "__main__":
    main()
