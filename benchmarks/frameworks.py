"""Speed of the adapters: ``python benchmarks/frameworks.py [--frameworks torch jax …] [--device gpu] [--json]``.

The benchmark compares each adapter with a plain training loop in the same framework (``benchmarks/plain_loops.py``), in
the same process and on the same threads, with the AlexNet-like network and batches of 64 images of CIFAR-100's size. It
times a training step of all parameters, a step under GPM with bases of half of every layer's width, and evaluation. The
plain loop has no counterpart for three more: the exact diagonal Fisher information and GPM's memory update from 125
images, which are given as ratios to plain training on the same images, and alpha* with its merge, which is given as a
ratio to one plain step. The time of the first step, which traces and compiles, is given separately.

Convention: float32. Results are medians of ratios over rounds, and every contender runs in each round. Lower is better.
"""

import argparse
import importlib
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# So that this checkout is measured, whether or not the package is installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

from became_core import merge, optimal_alpha
from became_core.arrays import device as device_of
from became_core.arrays import namespace
from became_core.continual import (
    SGD,
    Annealed,
    Batch,
    Constraint,
    Dataset,
    Learner,
    TaskStream,
    Training,
    split_classes,
)
from became_core.continual.evaluation import accuracies
from became_core.continual.measurement import Measurement
from became_core.projection import GPM
from benchmarks.plain_loops import PLAIN

BATCH, STEPS, CLASSES, RATE = 64, 6, 10, 0.01
IMAGES = 1024  # of each task, for training and for testing


def images(tasks: int = 2, side: int = 32) -> TaskStream:
    """Return tasks of random images of a height and width; half of the images are for testing."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2 * tasks * IMAGES, 3, side, side), dtype=np.uint8)
    labels = np.tile(np.arange(tasks * CLASSES), len(pixels) // (tasks * CLASSES) + 1)[: len(pixels)]
    dataset = Dataset("random", pixels, labels, len(pixels) // 2, (0.5,) * 3, (0.25,) * 3)
    return split_classes(dataset, tasks)


def half_width(learner: Learner) -> GPM:
    """Return a memory of random bases with half of every layer's width as their rank."""
    theta = learner.parameters()
    xp: Any = namespace(weight=next(iter(theta.values())))
    rng = np.random.default_rng(0)
    device = device_of(next(iter(theta.values())))
    arrays: dict[str, Any] = {"tasks": xp.asarray(1, device=device)}
    for name in sorted(learner.projectable):
        width = int(np.prod(theta[name].shape[1:]))
        basis = np.linalg.qr(rng.normal(size=(width, width // 2)))[0].astype(np.float32)
        arrays[f"bases.{name}"] = xp.asarray(basis, device=device)
    return GPM(threshold=0.97).with_arrays(arrays)


def chunks(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return the rows in batches of full size; rows at the end that fill no batch are left out."""
    return [rows[start : start + BATCH] for start in range(0, len(rows) - BATCH + 1, BATCH)]


def timed(run: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def contenders(framework: str, stream: TaskStream, device: str) -> dict[str, Callable[[], Any]]:
    """Return the functions to be timed, by name; each call waits until its result is computed."""
    adapter = importlib.import_module(f"adapters.{framework}.run")
    # NumPy draws masks on the CPU, and a GPU would wait for the copy; so on a GPU the framework draws them there.
    device_name, masks = ("cpu", "numpy") if device == "cpu" else ("cuda", "framework")
    learner: Learner = adapter.build_learner("alexnet", stream, device_name, 0, dropout_masks=masks)
    dataset, task = stream.dataset, stream.tasks[1]
    scaled = (dataset.images / np.float32(255) - np.float32(0.5)) / np.float32(0.25)
    plain = PLAIN[framework](scaled.astype(np.float32), stream.targets, CLASSES, device)
    steps = chunks(task.train)[:STEPS]
    tests = chunks(stream.tasks[0].test)
    scored = replace(stream.tasks[0], test=np.concatenate(tests))
    everything = Constraint(frozenset(learner.parameters()) - learner.heads[0])
    projected = Constraint(learner.projectable | learner.heads[1], half_width(learner))
    training = Training(Annealed(RATE, 1), Annealed(RATE, 1), projector_samples=125)
    measured = Measurement(learner, replace(task, train=np.concatenate(steps)), training, "empirical", 0, "posterior")
    fisher = measured.diagonal().values
    stable = learner.parameters()
    plastic = {name: value * 1.01 for name, value in stable.items()}

    def train(constraint: Constraint) -> None:
        batches = [Batch(1, rows) for rows in steps]
        learner.train(batches, np.full(len(batches), RATE), constraint, SGD(), np.random.default_rng(0))
        wait_for(learner.parameters())

    return {
        "plain step": lambda: plain.train(steps),
        "step": lambda: train(everything),
        "projected step": lambda: train(projected),
        "plain evaluation": lambda: plain.evaluate(tests),
        "evaluation": lambda: accuracies(learner, [scored], BATCH),
        "Fisher": lambda: wait_for(measured.diagonal().values),
        "GPM update": lambda: wait_for(GPM(0.97).remember(measured).bases),
        "alpha* and merge": lambda: wait_for(
            merge(stable, plastic, optimal_alpha(stable, plastic, fisher, fisher)),
        ),
    }


def wait_for(arrays: Any) -> None:
    """Wait until these arrays are computed, in frameworks that compute asynchronously."""
    for value in arrays.values():
        if hasattr(value, "block_until_ready"):
            value.block_until_ready()
        elif getattr(value, "is_cuda", False):
            importlib.import_module("torch").cuda.synchronize()


def measure(framework: str, device: str, rounds: int) -> dict[str, float]:
    """Return one framework's ratios, and the seconds of its plain step and of its first steps."""
    prepare(framework)
    runs = contenders(framework, images(), device)
    first = {name: timed(run) for name, run in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(timed(run))
    seconds = {name: np.array(times) for name, times in taken.items()}
    step, evaluation = seconds["plain step"], seconds["plain evaluation"]
    ratios = {
        "step_over_plain": seconds["step"] / step,
        "projected_over_plain": seconds["projected step"] / step,
        "evaluation_over_plain": seconds["evaluation"] / evaluation,
        "fisher_over_plain_steps": seconds["Fisher"] / step,
        "gpm_update_over_plain_steps": seconds["GPM update"] / (step * 125 / (STEPS * BATCH)),
        "alpha_and_merge_over_plain_step": seconds["alpha* and merge"] / (step / STEPS),
    }
    absolute = {"plain_step_seconds": float(np.median(step)) / STEPS}
    for name in ("plain step", "step", "projected step"):
        absolute[f"first_{name.replace(' ', '_')}_seconds"] = first[name] - float(np.median(seconds[name]))
    return {name: float(np.median(values)) for name, values in ratios.items()} | absolute


def prepare(framework: str) -> None:
    """Configure a framework as the ``became`` command does."""
    importlib.import_module(f"adapters.{framework}.run").BACKEND.prepare()


def in_its_own_process(framework: str, device: str, rounds: int) -> dict[str, float]:
    """Measure a framework in a process that loads no other framework."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (framework, device, rounds))


def table(results: dict[str, dict[str, float]]) -> Sequence[str]:
    """Return the lines of a Markdown table, given each framework's results by name."""
    lines = [f"| what | {' | '.join(results)} |", f"| --- |{' ---: |' * len(results)}"]
    for name in next(iter(results.values())):
        cells = (f"{values[name]:.2f}" for values in results.values())
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--frameworks", nargs="+", choices=sorted(PLAIN), default=list(PLAIN))
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one object of named ratios for each framework")
    options = parser.parse_args()
    results = {
        framework: in_its_own_process(framework, options.device, options.rounds) for framework in options.frameworks
    }
    print(json.dumps(results, indent=2) if options.json else "\n".join(table(results)))


if __name__ == "__main__":
    main()
