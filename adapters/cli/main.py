"""The command: options in, runs and a table out. The same for every backend."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tyro
from rich.console import Console

from adapters.cli.options import Configuration, Options, method_names, resolve
from adapters.cli.paths import estimator_table, path_table
from adapters.cli.progress import RunProgress
from adapters.cli.table import comparison_table
from adapters.data.location import data_directory
from adapters.runs import RunDirectory, RunResult, write_summary
from adapters.runs.directory import check_writable
from became_core import BecameError
from became_core.continual import Learner, TaskStream, learn

__all__ = ["Backend", "main"]


@dataclass(frozen=True)
class Backend:
    """What a framework's adapter gives to the command line.

    Attributes:
        name: as in records.
        learner: builds a fresh learner from (network, stream, device, seed).
    """

    name: str
    learner: Callable[[str, TaskStream, str, int], Learner]


def main(backend: Backend, arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, or 2 after a sentence on what was wrong."""
    options = tyro.cli(Options, prog=f"python -m adapters.{backend.name}.run", args=arguments)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    try:
        _compare(backend, options, console)
    except BecameError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept, and the same command goes on after them.", file=sys.stderr)
        return 130
    return 0


def _compare(backend: Backend, options: Options, console: Console) -> None:
    configuration = resolve(options)
    record = configuration.record()
    runs = [RunDirectory(configuration.out, method, seed) for seed in options.seeds for method in method_names(options)]
    finished = {run: run.finished(backend.name, options.benchmark, record) for run in runs}
    if not all(finished.values()):
        check_writable(configuration.out)
        dataset = configuration.benchmark.load(data_directory(options.data_dir))
        configuration.stream(dataset, seed=0)
    results = []
    for run in runs:
        result = finished[run]
        if result is None:
            stream = configuration.stream(dataset, run.seed)
            result = _run(backend, options.device, configuration, stream, run, console)
            run.save(result)
            write_summary(configuration.out)
        else:
            console.print(f"{run.method}-seed{run.seed}  finished before: {run.results_file}", soft_wrap=True)
        results.append(result)
    for result in results:
        if result.paths:
            console.print(path_table(result))
            console.print(estimator_table(result))
    console.print(comparison_table(results))
    console.print(
        f"results: {configuration.out}/<method>-seed<k>/results.json, {configuration.out}/summary.csv",
        soft_wrap=True,
        highlight=False,
    )


def _run(
    backend: Backend, device: str, configuration: Configuration, stream: TaskStream, run: RunDirectory, console: Console
) -> RunResult:
    began = time.perf_counter()
    learner = backend.learner(configuration.benchmark.network, stream, device, run.seed)
    method = configuration.method(run.method)
    with RunProgress(console, f"{run.method}-seed{run.seed}", len(stream.tasks), method.stages) as progress:
        record = learn(
            learner,
            stream,
            method,
            configuration.preset.training,
            seed=run.seed,
            observe=progress,
        )
    record.seconds["total"] = time.perf_counter() - began
    return RunResult.of(
        record,
        backend=backend.name,
        benchmark=configuration.benchmark.name,
        method=run.method,
        seed=run.seed,
        config=configuration.record(),
    )
