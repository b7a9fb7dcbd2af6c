"""Speed beside the published code of GPM: ``python benchmarks/peers.py --gpm FOLDER [--python PYTHON] [--json]``.

FOLDER has https://github.com/sahagobinda/GPM, and PYTHON is the interpreter of an environment that has what it needs:
PyTorch and NumPy are enough. Its training functions, as they are, and our learner do the same work in turn: steps of
the AlexNet-like network of its CIFAR-100 experiment, 64 images a batch, free and projected by bases of half of every
layer's width, and one update of the memory of such bases from 125 images. Each is a process with as many threads as
``OMP_NUM_THREADS`` says, 1 if it does not.

Convention: float32 on the CPU, random images. Seconds are medians over rounds; ratios are medians of each round's, and
one below 1 says that ours is faster. The published epoch of 4,750 images has 75 steps.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

# So that this checkout is measured, whether or not the package is installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

from adapters.torch.run import build_learner, keep_freed_memory
from became_core.continual import SGD, Annealed, Batch, Constraint, Training
from became_core.continual.measurement import Measurement
from benchmarks.frameworks import half_width, images
from benchmarks.published_gpm import BATCH, STEPS, TASKS

THEIRS = Path(__file__).with_name("published_gpm.py")


def ours() -> dict[str, Callable[[], Any]]:
    """Return what the published code does, done by our learner."""
    stream = images(TASKS)
    learner = build_learner("alexnet", stream, "cpu", 0)
    task, memory = stream.tasks[2], half_width(learner)
    batches = [Batch(2, task.train[BATCH * step : BATCH * (step + 1)]) for step in range(STEPS)]
    free = Constraint(frozenset(learner.parameters()) - frozenset().union(*learner.heads) | learner.heads[2])
    projected = Constraint(learner.projectable | learner.heads[2], projector=memory)
    training = Training(Annealed(0.01, 1), Annealed(0.01, 1), projector_samples=125)

    def train(constraint: Constraint) -> None:
        learner.train(batches, np.full(STEPS, 0.01), constraint, SGD(), np.random.default_rng(0))

    return {
        "plain": lambda: train(free),
        "projected": lambda: train(projected),
        "memory": lambda: memory.remember(Measurement(learner, task, training, "empirical", 0, "posterior")),
    }


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--gpm", type=Path, required=True, help="a folder with the published code")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of its environment")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one object of numbers")
    options = parser.parse_args()
    if not (options.gpm / "main_cifar100.py").exists():
        sys.exit(f"error: {options.gpm} has no main_cifar100.py; fetch https://github.com/sahagobinda/GPM.")
    threads = os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(threads))
    keep_freed_memory()
    own = ours()
    command = [options.python, str(THEIRS), str(options.gpm)]
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in own}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdin is not None
        assert peer.stdout is not None
        for _ in range(options.rounds + 1):  # the first round warms up
            for name, run in own.items():
                print(name, file=peer.stdin, flush=True)
                theirs = peer.stdout.readline()
                if not theirs:
                    sys.exit(f"error: {' '.join(command)} has failed.")
                began = time.perf_counter()
                run()
                taken[name].append((float(theirs), time.perf_counter() - began))
        peer.stdin.close()
    results = {}
    for name, pairs in taken.items():
        times = np.array(pairs[1:]) / (1 if name == "memory" else STEPS)
        theirs, mine = np.median(times, axis=0)
        results[name] = {"published": theirs, "ours": mine, "ratio": float(np.median(times[:, 1] / times[:, 0]))}
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print("| what | published, s | ours, s | ours over published |\n| --- | ---: | ---: | ---: |")
    for name, values in results.items():
        label = "an update of the memory" if name == "memory" else f"a {name} step"
        print(f"| {label} | {values['published']:.3f} | {values['ours']:.3f} | {values['ratio']:.2f} |")


if __name__ == "__main__":
    main()
