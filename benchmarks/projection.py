"""Speed of projected training: ``python benchmarks/projection.py [--data-dir DIR] [--json]``.

The AlexNet-like network learns two real CIFAR-100 tasks for a few epochs and remembers both by GPM. Then projected and
plain steps on the third task are timed in turn in one process, first with this memory, then with random bases of half
of every layer's width. The contender ``dense`` multiplies every gradient by a stored M M^T, as published code does.

Convention: batch 64, float32, PyTorch. Plain steps train the same parameters. Results are medians of ratios over
rounds.
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

# So that this checkout is measured, whether or not the package is installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

from adapters.benchmarks.cifar import load_cifar100
from adapters.benchmarks.location import data_directory
from adapters.torch.learner import TorchLearner
from adapters.torch.run import build_learner, keep_freed_memory
from became_core import BecameError
from became_core.arrays import Params
from became_core.continual import SGD, Annealed, Batch, Constraint, TaskStream, Training, split_classes
from became_core.continual.measurement import Measurement
from became_core.continual.training import begin_stage, train_stage
from became_core.projection import GPM
from benchmarks.frameworks import half_width

STEPS = 8  # timed together


@dataclass(frozen=True)
class Dense:
    """The straightforward projector: it multiplies every gradient by a stored M M^T."""

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


def after_two_tasks(learner: TorchLearner, stream: TaskStream, epochs: int) -> GPM:
    """Return the memory of two tasks after GPM has trained each of them for this many epochs."""
    training = Training(Annealed(0.05, epochs), Annealed(0.05, 1))
    memory = GPM(threshold=0.97, increment=0.003)
    for task in stream.tasks[:2]:
        head = learner.heads[task.index]
        trainable = learner.projectable | head if task.index else frozenset(learner.parameters())
        constraint = Constraint(trainable, projector=memory)
        stage = begin_stage(learner, task, 1, training.stage1, SGD(), constraint)
        train_stage(learner, [task], stage, constraint, batch_size=64, seed=0)
        memory = memory.remember(Measurement(learner, task, training, "empirical", 0, "posterior"))
    return memory


def seconds(learner: TorchLearner, batches: list[Batch], constraint: Constraint) -> float:
    """Return the time of these steps; afterwards the learner has its weights again."""
    with learner.at(learner.parameters()):
        began = time.perf_counter()
        learner.train(batches, np.full(len(batches), 0.01), constraint, SGD(), np.random.default_rng(0))
        return time.perf_counter() - began


def ratios(learner: TorchLearner, stream: TaskStream, memory: GPM, rounds: int) -> dict[str, float]:
    """Return the time of projected and of dense steps as ratios to that of plain steps, and that of a plain step."""
    rows = stream.tasks[2].train
    batches = [Batch(2, rows[64 * step : 64 * (step + 1)]) for step in range(STEPS)]
    trainable = learner.projectable | learner.heads[2]
    products = {name: basis @ basis.T for name, basis in memory.bases.items()}
    projectors: dict[str, Any] = {"plain": None, "projected": memory, "dense": Dense(products)}
    taken: dict[str, list[float]] = {name: [] for name in projectors}
    for _ in range(rounds + 1):  # the first round warms up
        for name, projector in projectors.items():
            taken[name].append(seconds(learner, batches, Constraint(trainable, projector=projector)))
    plain = np.array(taken["plain"][1:])
    return {
        f"{name}_over_plain": float(np.median(np.array(taken[name][1:]) / plain)) for name in ("projected", "dense")
    } | {"plain_step_seconds": float(np.median(plain)) / STEPS}


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=3, help="of each of the two tasks")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one object of ratios")
    options = parser.parse_args()
    keep_freed_memory()
    try:
        stream = split_classes(load_cifar100(data_directory(options.data_dir)), 10)
    except BecameError as error:
        sys.exit(f"error: {error}")
    learner = build_learner("alexnet", stream, "cpu", 0)
    results = {}
    for label, memory in (
        ("after two tasks", after_two_tasks(learner, stream, options.epochs)),
        ("half width", half_width(learner)),
    ):
        ranks = ", ".join(f"{name} {rank}/{width}" for name, (rank, width) in memory.rank.items())
        print(f"{label}: {ranks}", file=sys.stderr)
        for name, value in ratios(learner, stream, memory, options.rounds).items():
            results[f"{name}_{label.replace(' ', '_')}"] = value
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print("| what | over a plain step |\n| --- | ---: |")
    for name, value in results.items():
        print(f"| {name.replace('_', ' ')} | {value:.3f} |")


if __name__ == "__main__":
    main()
