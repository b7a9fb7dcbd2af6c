"""Speed of GPM's memory update: ``python benchmarks/memory.py [--data-dir DIR] [--json]``.

The AlexNet-like network is trained briefly on one CIFAR-100 task, and GPM then remembers the task. The other contender
works as the published code is described: it keeps every layer's activations of 125 images, cuts them into patches one
by one in Python, and takes the SVD of the matrix of all patches. Our code adds up Gram matrices batch by batch and
takes their eigenvectors. Both have the same threshold. The largest angle between their subspaces is computed in
float64.

The update from the whole task, 4,750 images, is compared with a plain forward pass, with and without the eigenvectors.

Convention: float32, PyTorch. Results are medians of ratios over rounds.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
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
from became_core.continual import SGD, Annealed, Constraint, TaskStream, Training, split_classes
from became_core.continual.measurement import Measurement
from became_core.continual.training import begin_stage, train_stage
from became_core.projection import GPM

EPSILON = 0.97
SAMPLES = 125


def trained(stream: TaskStream, epochs: int) -> TorchLearner:
    """Return a learner that was trained on the first task for a few epochs."""
    learner = build_learner("alexnet", stream, "cpu", 0)
    task, constraint = stream.tasks[0], Constraint(frozenset(learner.parameters()))
    stage = begin_stage(learner, task, 1, Annealed(0.05, epochs), SGD(), constraint)
    train_stage(learner, [task], stage, constraint, batch_size=64, seed=0)
    return learner


def measurement(learner: TorchLearner, stream: TaskStream, samples: int | None) -> Measurement:
    """Return measurements of the first task on this many samples; None for all."""
    training = Training(Annealed(0.05, 1), Annealed(0.05, 1), projector_samples=samples)
    return Measurement(learner, stream.tasks[0], training, "empirical", 0, "posterior")


def published(learner: TorchLearner, rows: Any) -> dict[str, np.ndarray]:
    """Return the bases [d_in, rank], by name, from patches and an SVD."""
    inputs: dict[str, torch.Tensor] = {}
    layers = {n: m for n, m in learner.network.named_modules() if n.split(".")[-1].startswith(("conv", "fc"))}
    handles = [
        module.register_forward_hook(lambda m, i, o, name=name: inputs.__setitem__(name, i[0].detach()))
        for name, module in layers.items()
    ]
    learner.logits(rows, len(rows))
    for handle in handles:
        handle.remove()
    bases = {}
    for name, module in layers.items():
        activation = inputs[name].contiguous().numpy()
        matrix = _patches(activation, module.kernel_size[0]) if isinstance(module, torch.nn.Conv2d) else activation.T
        vectors, sigma, _ = np.linalg.svd(matrix, full_matrices=False)
        share = np.cumsum(sigma**2) / np.sum(sigma**2)
        bases[f"{name.removeprefix('backbone.')}.weight"] = vectors[:, : int(np.sum(share < EPSILON)) + 1]
    return bases


def _patches(activation: np.ndarray, size: int) -> np.ndarray:
    """Return all patches of square images as columns, cut one by one."""
    samples, channels, height, _ = activation.shape
    positions = height - size + 1
    matrix = np.zeros((channels * size * size, samples * positions * positions), dtype=activation.dtype)
    column = 0
    for sample in range(samples):
        for top in range(positions):
            for left in range(positions):
                matrix[:, column] = activation[sample, :, top : top + size, left : left + size].reshape(-1)
                column += 1
    return matrix


def largest_angle(bases: Params, others: dict[str, np.ndarray]) -> float:
    """Return the largest principal angle between subspaces of equal rank, in degrees."""
    sines = [0.0]
    for name, basis in others.items():
        ours = bases[name].double().numpy()
        assert ours.shape == basis.shape, (name, ours.shape, basis.shape)
        # The sine of the largest angle is the norm of the part of one basis outside the other. The cosine would be
        # inaccurate here, because it is 1 to rounding for all small angles.
        sines.append(float(np.linalg.norm(basis - ours @ (ours.T @ basis), ord=2)))
    return float(np.degrees(np.arcsin(min(max(sines), 1.0))))


def timed(run: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=2, help="of the task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one object of ratios")
    options = parser.parse_args()
    keep_freed_memory()
    try:
        stream = split_classes(load_cifar100(data_directory(options.data_dir)), 10)
    except BecameError as error:
        sys.exit(f"error: {error}")
    learner = trained(stream, options.epochs)
    some, whole = measurement(learner, stream, SAMPLES), measurement(learner, stream, None)
    rows = some.projector_rows()
    # Batch norm uses the statistics of the batch, so both contenders must see all samples in one batch.
    in_one_batch = replace(some, training=replace(some.training, batch_size=SAMPLES))
    exact = TorchLearner(copy.deepcopy(learner.network.backbone), stream, dtype=torch.float64)
    exact.assign({name: value.double() for name, value in learner.parameters().items()})
    angle = largest_angle(GPM(EPSILON).remember(replace(in_one_batch, learner=exact)).bases, published(exact, rows))
    contenders: dict[str, Callable[[], Any]] = {
        "ours": lambda: GPM(EPSILON).remember(in_one_batch),
        "published": lambda: published(learner, rows),
        "forward": lambda: learner.logits(stream.tasks[0].train, 64),
        "whole grams": lambda: whole.input_grams(),
        "whole": lambda: GPM(EPSILON).remember(whole),
    }
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds + 1):  # the first round warms up
        for name, run in contenders.items():
            taken[name].append(timed(run))
    times = {name: np.array(seconds[1:]) for name, seconds in taken.items()}
    results = {
        "published_over_ours": float(np.median(times["published"] / times["ours"])),
        "largest_angle_degrees": angle,
        "whole_grams_over_forward": float(np.median(times["whole grams"] / times["forward"])),
        "whole_over_forward": float(np.median(times["whole"] / times["forward"])),
        "ours_seconds": float(np.median(times["ours"])),
        "forward_seconds": float(np.median(times["forward"])),
    }
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print("| what | |\n| --- | ---: |")
    for name, value in results.items():
        print(f"| {name.replace('_', ' ')} | {value:.3g} |")


if __name__ == "__main__":
    main()
