"""The command of one backend: options in, runs and a table out. The same for every backend."""

import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import ParamSpec

from adapters.backend.entry import Backend
from adapters.cli.display import LOGGER, Display, display_of, logged
from adapters.cli.dryrun import plan, shared_values
from adapters.cli.interruption import InterruptedRun
from adapters.cli.jobs import Job, requested_jobs
from adapters.cli.options import Output, Request, parse_request
from adapters.cli.pool import engine_of, slots_of
from adapters.cli.running import UnfinishedError, run_jobs
from became_core import BecameError

__all__ = ["Backend", "execute", "main", "run_request", "while_it_is_read"]

Arguments = ParamSpec("Arguments")


def while_it_is_read(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """Have a command end in silence once nobody reads its output, as that of ``became list | head -1``.

    If the output cannot be written, as on a full disk, the command ends with a sentence and the status 2. Where there
    is no output at all, as after ``>&-``, nothing is shown.
    """

    @wraps(main)
    def quiet(*arguments: Arguments.args, **options: Arguments.kwargs) -> int:
        if sys.stdout is None:
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 # for as long as the program runs
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal can show a path, or an alpha
        try:
            try:
                return main(*arguments, **options)
            finally:
                sys.stdout.flush()
        except OSError as error:
            is_broken = isinstance(error, BrokenPipeError)
            if not is_broken and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise
            if error.filename is None:  # Python flushes once more at its end, which must not fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if is_broken:
                return 1  # as rich does where it prints
            print(f"error: cannot write {error.filename or 'the output'}: {error.strerror}.", file=sys.stderr)
            return 2

    return quiet


@while_it_is_read
def main(backend: Backend, arguments: Sequence[str] | None = None) -> int:
    """Run the command on a backend; return its exit status, as ``execute`` does.

    Args:
        backend: the framework.
        arguments: the words of the command; those of this process if None.
    """
    return run_request(
        lambda: backend, parse_request(f"python -m adapters.{backend.name}.run", arguments, backend=False)
    )


def execute(command: Callable[[Display], None], output: Output) -> int:
    """Call a command with a display, and return the exit status.

    The status is 0, or 2 after a sentence on what was wrong, or 128 and the number of the signal that stopped the
    command: 130 for Ctrl-C, 143 for SIGTERM.
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
            print("interrupted; the same command goes on from what was saved.", file=sys.stderr)
            return 130
    return 0


def run_request(load: Callable[[], Backend], request: Request, *remarks: str) -> int:
    """Do what a command asks for, after showing some remarks; return the exit status.

    Where the configuration is printed, remarks are for the log alone: standard output is then JSON that programs read.

    Args:
        load: returns the framework.
        request: what the command asks for.
        remarks: lines.
    """

    def command(display: Display) -> None:
        for remark in remarks:
            if request.print_config:
                LOGGER.info("%s", remark)
            else:
                display.note(remark)
        engine, share = engine_of(request.workers, request.scheduler)
        jobs = [replace(job, share=share) for job in requested_jobs(request, load)]
        if request.dry_run:
            _show_plan(jobs, display, share, request.scheduler)
        if request.print_config:
            _show_configuration(jobs, display)
        if not (request.dry_run or request.print_config):
            try:
                results = run_jobs(jobs, display, engine)
            except UnfinishedError as error:
                display.results(error.results, jobs[0].run.out)
                raise
            display.results(results, jobs[0].run.out)

    return execute(command, request.output)


def _show_plan(jobs: Sequence[Job], display: Display, workers: int, scheduler: str | None) -> None:
    job = jobs[0]
    if job.configuration.deterministic:
        job.backend.repeat_exactly()
    stream = job.stream()
    threads = job.use_threads(stream)
    configurations = {job.run.method: job.configuration for job in jobs}
    seeds = len(jobs) // len(configurations)
    estimated = plan(lambda: job.learner(stream), stream, configurations, seeds)
    if scheduler is not None:
        slots = slots_of(scheduler)  # each as fast as this machine is for one run
        estimated = estimated.with_workers(slots, threads, cores=slots * threads)
    elif workers > 1:
        estimated = estimated.with_workers(workers, threads)
    display.plan(estimated)


def _show_configuration(jobs: Sequence[Job], display: Display) -> None:
    common, own = shared_values({job.run.method: job.configuration for job in jobs})
    display.configuration(common | jobs[0].configuration.hints() | own)
