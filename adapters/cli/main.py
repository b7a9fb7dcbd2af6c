"""The command: options in, runs and a table out. The same for every backend."""

import sys
from collections.abc import Sequence

import tyro
from rich.console import Console

from adapters.cli.backend import Backend
from adapters.cli.dryrun import describe
from adapters.cli.interruption import InterruptedRun
from adapters.cli.options import Options, method_names, resolve
from adapters.cli.paths import estimator_table, path_table
from adapters.cli.running import run_to_its_end
from adapters.cli.table import comparison_table
from adapters.data.location import data_directory
from adapters.runs import RunDirectory, write_summary
from adapters.runs.directory import check_writable
from became_core import BecameError

__all__ = ["Backend", "main"]


def main(backend: Backend, arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status.

    That is 0, 2 after a sentence on what was wrong, or 128 and the number of the signal that stopped it: 130 for
    Ctrl-C, 143 for SIGTERM.
    """
    options = tyro.cli(Options, prog=f"python -m adapters.{backend.name}.run", args=arguments)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    if options.deterministic:
        backend.repeat_exactly()
    try:
        (_try_out if options.dry_run else _compare)(backend, options, console)
    except BecameError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except InterruptedRun as stopped:
        print(f"stopped: {stopped}; the same command goes on from there.", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print("interrupted; what was saved is kept, and the same command goes on from there.", file=sys.stderr)
        return 130
    return 0


def _try_out(backend: Backend, options: Options, console: Console) -> None:
    configuration, seed = resolve(options), options.seeds[0]
    stream = configuration.stream(configuration.benchmark.load(data_directory(options.data_dir)), seed)
    preset, mixed = configuration.preset, configuration.mixed_precision
    learner = backend.learner(preset.network, stream, options.device, seed, norm=preset.norm, mixed_precision=mixed)
    describe(learner, stream, configuration, method_names(options), len(options.seeds), console)


def _compare(backend: Backend, options: Options, console: Console) -> None:
    configuration = resolve(options)
    record = configuration.record()
    runs = [RunDirectory(configuration.out, method, seed) for seed in options.seeds for method in method_names(options)]
    finished = {run: run.finished(backend.name, options.benchmark, record) for run in runs}
    for run in runs:
        if not finished[run]:
            run.check_unfinished(backend.name, options.benchmark, record, resume=options.resume)
    if options.resume and not any(run.begun for run in runs):
        raise BecameError(f"{configuration.out} holds nothing to resume; leave out --resume to begin.")
    if not all(finished.values()):
        check_writable(configuration.out)
        dataset = configuration.benchmark.load(data_directory(options.data_dir))
        configuration.stream(dataset, seed=0)
    results = []
    for run in runs:
        result = finished[run]
        if result is None:
            stream = configuration.stream(dataset, run.seed)
            result = run_to_its_end(backend, options.device, configuration, stream, run, console, resume=options.resume)
            write_summary(configuration.out)
        else:
            console.print(f"{run.name}  finished before: {run.results_file}", soft_wrap=True)
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
