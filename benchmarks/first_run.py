"""How the values of the preset ``demo`` of Split-MNIST were chosen, which a command without options runs.

    python benchmarks/first_run.py

Wanted is a first run of seconds in which merging matters at every task: every alpha strictly between 0 and 1, and
BECAME ahead of GPM at equal epochs. Each candidate is run with three seeds, which also draw the order of the classes.
A fifth of the training images is held out, and accuracies are measured on it: no test image is looked at. Of the
candidates whose alphas are all inside, the one with the largest gain in task-incremental accuracy over GPM is taken.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the checkout is measured, installed or not

from adapters.benchmarks.mnist import load_mnist
from adapters.runs.configuration import Configuration
from adapters.torch.run import BACKEND
from became_core.continual import RunRecord, learn

HELD_OUT = 0.2
EPOCHS = 10  # of a task, for every method


def candidates() -> Iterator[dict[str, Any]]:
    """Yield values of options: how strict the projector is, and how many of the epochs are stage 2's."""
    for threshold, stage2_epochs in product((0.98, 0.99), (3, 5)):
        yield {"threshold": threshold, "epochs": EPOCHS - stage2_epochs, "stage2_epochs": stage2_epochs}


@cache
def gpm_record(threshold: float, seed: int) -> RunRecord:
    """Return the record of GPM by itself, which is the same whatever epochs a second stage would have."""
    return held_out_record({"threshold": threshold, "epochs": EPOCHS}, "gpm", seed)


def held_out_record(values: dict[str, Any], method: str, seed: int) -> RunRecord:
    """Return the record of a run whose test images are training images that were held out."""
    configuration = Configuration.of({"validation": HELD_OUT, **values}, method, "demo")
    stream = configuration.stream(load_mnist(), seed)
    stream = replace(stream, tasks=tuple(replace(task, test=task.validation) for task in stream.tasks))
    learner = BACKEND.learner(configuration.network, stream, "cpu", seed)
    return learn(learner, stream, configuration.method(method), configuration.training(), seed=seed)


def main() -> None:
    """Print a line for each candidate and seed, and then the candidate that is taken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    BACKEND.prepare()
    BACKEND.use_threads(1)
    gains: dict[str, float] = {}
    for values in candidates():
        alphas, ahead = [], []
        for seed in seeds:
            became, gpm = held_out_record(values, "became", seed), gpm_record(values["threshold"], seed)
            scores = [float(np.nanmean(record.accuracy[-1])) for record in (became, gpm)]
            among_all = [float(np.nanmean(record.class_incremental_accuracy[-1])) for record in (became, gpm)]
            merged = [alpha for alpha in became.alpha if alpha is not None]
            print(
                f"{values}  seed {seed}  alpha {' '.join(f'{alpha:.2f}' for alpha in merged)}  "
                f"task {scores[0]:.2f} against {scores[1]:.2f}  class {among_all[0]:.2f} against {among_all[1]:.2f}",
                flush=True,
            )
            alphas += merged
            ahead.append(scores[0] - scores[1])
        if all(0 < alpha < 1 for alpha in alphas):
            gains[str(values)] = float(np.mean(ahead))
    print("taken:", max(gains, key=lambda name: gains[name]) if gains else "none; no candidate's alphas are all inside")


if __name__ == "__main__":
    main()
