"""The command: options in, runs and a table out. The same for every backend."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from adapters.benchmarks.location import data_directory
from adapters.cli.backend import Backend
from adapters.cli.configuration import method_names, resolve
from adapters.cli.display import Display, display_of
from adapters.cli.dryrun import plan
from adapters.cli.interruption import InterruptedRun
from adapters.cli.logs import logged
from adapters.cli.options import Options
from adapters.cli.output import Output
from adapters.cli.running import Job, run_jobs
from adapters.runs import RunDirectory
from became_core import BecameError

__all__ = ["Backend", "execute", "main", "parse", "run_options"]


def main(backend: Backend, arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status, as ``execute`` does."""
    return run_options(backend, parse(Options, f"python -m adapters.{backend.name}.run", arguments))


def parse(kind: Any, prog: str, arguments: Sequence[str] | None, description: str | None = None) -> Any:
    """Return what is given, of this kind; a question for help and a mistake end the program."""
    # What is left out is None, and a flag that is left out is off: neither needs words of its own.
    config = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(kind, prog=prog, args=arguments, description=description, config=config)


def execute(command: Callable[[Display], None], output: Output) -> int:
    """Do something, and return the exit status.

    That is 0, 2 after a sentence on what was wrong, or 128 and the number of the signal that stopped it: 130 for
    Ctrl-C, 143 for SIGTERM.
    """
    with logged(output.level):
        try:
            command(display_of(output))
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


def run_options(backend: Backend, options: Options, *remarks: str) -> int:
    """Do what the options say, after some remarks; return the exit status."""
    if options.deterministic:
        backend.repeat_exactly()

    def command(display: Display) -> None:
        for remark in remarks:
            display.note(remark)
        (_try_out if options.dry_run else _compare)(backend, options, display)

    return execute(command, options.output)


def _try_out(backend: Backend, options: Options, display: Display) -> None:
    configuration, seed = resolve(options), options.seeds[0]
    stream = configuration.stream(configuration.benchmark.load(data_directory(options.data_dir)), seed)
    learner = configuration.learner(backend, stream, options.device, seed)
    display.plan(plan(learner, stream, configuration, method_names(options), len(options.seeds)))


def _compare(backend: Backend, options: Options, display: Display) -> None:
    configuration = resolve(options)
    runs = [RunDirectory(configuration.out, method, seed) for seed in options.seeds for method in method_names(options)]
    if options.resume and not any(run.begun for run in runs):
        raise BecameError(f"{configuration.out} holds nothing to resume; leave out --resume to begin.")
    results = run_jobs([Job(run, backend, options, configuration) for run in runs], display)
    display.results(results, configuration.out)
