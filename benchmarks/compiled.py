"""What ``--compile`` gains: ``python benchmarks/compiled.py [--network resnet18] [--frameworks torch] [--device gpu]``.

The benchmark trains epochs of a network on batches of 64 images, all of them without a constraint and then under GPM
with bases of half of every layer's width, with the adapter as it is and with ``--compile``. The network is the
AlexNet-like one, on images of CIFAR-100's size, or the small ResNet-18, on images of TinyImageNet's. Beside the first
stands a plain loop of the same framework, eager, and on PyTorch one that is compiled, by ``torch.compile`` with
``mode="reduce-overhead"``. All are in one process, in turn with each other.

Convention: float32; steps a second, the median over rounds of epochs, after one that compiles. Masks of dropout are
drawn by the framework.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

# So that this checkout is measured, whether or not the package is installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

from became_core.continual import SGD, Batch, Constraint, Learner, TaskStream
from benchmarks.frameworks import CLASSES, RATE, chunks, half_width, images, prepare, timed, wait_for
from benchmarks.plain_loops import PLAIN, torch_loop

# The networks, and the height and width of their images.
SIDES = {"alexnet": 32, "resnet18": 64}


def contenders(framework: str, network: str, stream: TaskStream, device: str) -> dict[str, Callable[[], None]]:
    """Return the functions that each train an epoch, by name."""
    build = importlib.import_module(f"adapters.{framework}.run").build_learner
    dataset, steps = stream.dataset, chunks(stream.tasks[1].train)
    plain = {}
    if network == "alexnet":
        scaled = ((dataset.images / np.float32(255) - np.float32(0.5)) / np.float32(0.25)).astype(np.float32)
        arguments = scaled, stream.targets, CLASSES, device
        plain["plain loop"] = PLAIN[framework](*arguments)
        if framework == "torch":
            plain["plain loop, compiled"] = torch_loop(*arguments, compiled=True)

    def train(learner: Learner, constraint: Constraint) -> None:
        batches = [Batch(1, rows) for rows in steps]
        learner.train(batches, np.full(len(batches), RATE), constraint, SGD(), np.random.default_rng(0))
        wait_for(learner.parameters())

    runs: dict[str, Callable[[], None]] = {name: partial(loop.train, steps) for name, loop in plain.items()}
    for compiled in (False, True):
        for projects in (False, True):
            # Each has a learner of its own, since compiled steps hold for one constraint.
            learner: Learner = build(
                network,
                stream,
                "cpu" if device == "cpu" else "cuda",
                0,
                dropout_masks="framework",
                compiled=compiled,
            )
            if framework == "jax":
                learner.whole_epochs = compiled  # type: ignore[attr-defined] # on a GPU they would be in any case
            free = Constraint(frozenset(learner.parameters()) - learner.heads[0])
            projected = Constraint(learner.projectable | learner.heads[1], half_width(learner))
            name = f"{'projected' if projects else 'free'} step{', --compile' if compiled else ''}"
            runs[name] = partial(train, learner, projected if projects else free)
    return runs


def measure(framework: str, network: str, device: str, rounds: int) -> dict[str, float]:
    """Return one framework's steps a second by contender."""
    prepare(framework)
    stream = images(side=SIDES[network])
    runs, count = contenders(framework, network, stream, device), len(chunks(stream.tasks[1].train))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    return {name: count / float(np.median(times)) for name, times in seconds.items()}


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--frameworks", nargs="+", choices=("torch", "jax"), default=["torch", "jax"])
    parser.add_argument("--network", choices=tuple(SIDES), default="alexnet")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one object of named numbers for each framework")
    options = parser.parse_args()
    results = {
        framework: measure(framework, options.network, options.device, options.rounds)
        for framework in options.frameworks
    }
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print("| framework | what | steps a second |\n| --- | --- | ---: |")
    for framework, numbers in results.items():
        print("\n".join(f"| {framework} | {name} | {number:.1f} |" for name, number in numbers.items()))


if __name__ == "__main__":
    main()
