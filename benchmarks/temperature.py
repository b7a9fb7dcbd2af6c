"""Loss at a fitted softmax temperature: ``python benchmarks/temperature.py [--data-dir DATA] OUT…``.

A model that is too sure of its answers has a higher loss at the same accuracy, and a merged model is less sure than the
two that it lies between. So the final models of finished runs are scored on their test samples twice: as they are, and
with the outputs of each task's head divided by the softmax temperature that is best on its held-out samples (Guo et
al., ICML 2017, arXiv 1706.04599). What is left of a difference between two methods is not due to that.

The runs are those of PyTorch, with a head for each task and no masks. Convention: losses are means over tasks of means
over samples, in nats.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from adapters.analysis.bootstrap import Estimate
from adapters.analysis.tables import Cell, Column, Table, as_text
from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.benchmarks.location import data_directory
from adapters.runs import RunDirectory, RunResult, finished_runs
from adapters.runs.configuration import Configuration
from adapters.torch.run import build_learner
from became_core import BecameError
from became_core.arrays import Array
from became_core.continual import scored_on
from became_core.continual.data import Dataset, Task
from became_core.continual.tempering import sharpness


def losses(out: Path, run: RunResult, dataset: Dataset) -> tuple[float, float, float]:
    """Return the mean loss on test samples, that at the fitted temperatures, and the mean of these temperatures."""
    configuration = Configuration.from_json(run.config, run.method)
    stream = configuration.stream(dataset, run.seed)
    learner = build_learner(configuration.network, stream, "cpu", run.seed, norm=configuration.norm)
    directory = RunDirectory(out, run.method, run.seed)
    checkpoints = directory.checkpoints(stream, configuration.method(run.method), configuration.training())
    state = checkpoints.load(learner)
    if state is None:
        raise BecameError(f"{directory.folder} has no checkpoint; give folders of runs that have theirs.")
    learner.assign(state.theta)
    projector = state.memory.projector
    has_views = projector is not None and any(projector.view(task.index) is not None for task in stream.tasks)
    if learner.shares_head or has_views:
        raise BecameError(f"{directory.folder} has one head, or masks for each task; give runs of other methods.")

    def scored(task: Task) -> tuple[Array, Array]:
        head = slice(task.index, task.index + 1)
        return learner.logits(task.test, configuration.batch_size, head)[:, 0], learner.targets(task.test)

    found, likelihood = [], learner.likelihood
    for task, held_out in zip(stream.tasks, scored_on(stream, "validation").tasks, strict=True):
        factor = sharpness(likelihood, *scored(held_out))
        outputs, targets = scored(task)
        pair = (float(likelihood.mean_loss(outputs * each, targets)) for each in (1.0, factor))
        found.append((*pair, 1 / factor))
    return tuple(np.mean(found, axis=0).tolist())


def main() -> None:
    """Print a row for each run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("outs", nargs="+", type=Path, metavar="OUT", help="folders that --out named")
    parser.add_argument("--data-dir", type=Path, help="the folder of the data, as the runs had it")
    options = parser.parse_args()
    data_dir = data_directory(options.data_dir)
    datasets: dict[str, Dataset] = {}
    rows: list[list[Cell]] = []
    for out in options.outs:
        for run in finished_runs([out]):
            if run.benchmark not in datasets:
                datasets[run.benchmark] = BENCHMARKS[run.benchmark].load(data_dir)
            numbers = [Estimate((value,)) for value in losses(out, run, datasets[run.benchmark])]
            rows.append([str(out), run.method, str(run.seed), *numbers])
    columns = [Column("folder"), Column("method"), Column("seed")]
    columns += [Column("loss", 3), Column("at the fitted temperature", 3), Column("temperature", 2)]
    print(as_text([Table("Test losses of final models", columns, rows)]))


if __name__ == "__main__":
    try:
        main()
    except BecameError as error:
        sys.exit(f"error: {error}")
