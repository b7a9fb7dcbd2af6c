"""Runs in their folders: started or resumed, saved after every epoch, stopped by a signal only once they are saved."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

from adapters.cli.display import LOGGER, Display
from adapters.cli.interruption import InterruptedRun, Interruption
from adapters.cli.jobs import Job, Load, load_data
from adapters.runs import RunResult, write_summary
from adapters.runs.checkpoints import Checkpoints
from adapters.runs.directory import check_writable, read_results
from adapters.runs.events import place
from adapters.runs.settings import fingerprint
from adapters.tracking import Tracker
from became_core import BecameError
from became_core.continual import Callback, RunState, check_method

__all__ = ["Engine", "UnfinishedError", "one_after_another", "run_job", "run_jobs"]


class UnfinishedError(BecameError):
    """Some of several runs have failed, and the others are finished.

    Attributes:
        results: those of the runs that are finished.
    """

    def __init__(self, message: str, results: Sequence[RunResult]) -> None:
        """Hold the message and the results."""
        super().__init__(message)
        self.results = results


class Engine(Protocol):
    """What carries out runs: one after another in this process, or several at a time elsewhere."""

    def __call__(self, jobs: Sequence[Job], load: Load, display: Display) -> Sequence[RunResult | None]:
        """Carry out runs that are not finished yet, and show each result as it comes.

        Args:
            jobs: the runs; all have been checked, and their folders have a configuration.
            load: returns a data set; it remembers those that it has returned.
            display: shows the runs.

        Returns:
            For each run its result, which is saved; None if it failed while others went on, and that was shown.

        Raises:
            BecameError: if a run cannot start or be resumed, or fails, and the others cannot go on.
            InterruptedRun: if a signal stopped the runs; they are saved.
        """


def one_after_another(jobs: Sequence[Job], load: Load, display: Display) -> list[RunResult]:
    """Carry out runs in this process; the first that fails ends all. See ``Engine``."""
    results = []
    for job in jobs:
        results.append(run_job(job, load, display))
        display.result(job.run, results[-1], before=False)
    return results


def run_jobs(jobs: Sequence[Job], display: Display, engine: Engine = one_after_another) -> list[RunResult]:
    """Start runs or resume them; return their results, which are saved then.

    Args:
        jobs: the runs; all are in one folder.
        display: shows them.
        engine: what carries them out.

    Raises:
        UnfinishedError: if some runs failed and the others are finished.
        BecameError: if a run cannot start or be resumed, before any does where that can be known; the message names the
            last good checkpoint of a run that failed, if there is one.
        InterruptedRun: if a run was stopped by a signal.
    """
    for backend in {id(job.backend): job.backend for job in jobs if job.configuration.deterministic}.values():
        backend.repeat_exactly()
    load = cache(load_data)
    results = _results_before(jobs, load)
    to_do = [job for job, result in zip(jobs, results, strict=True) if result is None]
    for run in (job.run for job, result in zip(jobs, results, strict=True) if result is not None):
        # A process that was killed after it had saved the result can have left files, and the summary without this run.
        # A folder that cannot be written to, or that another process is at work in, is shown as it is.
        with suppress(BecameError), run.locked():
            write_summary(run.out)
    for out in {job.run.out for job in to_do}:
        read_results(out)  # the summary has them all, so one that is damaged is said before anything is computed
    for job in to_do:
        job.writer()
    _check_values(to_do, load)  # before a folder is made: a command that fails leaves none
    for job in to_do:
        check_writable(job.run.out)
        if not job.run.started:
            # So that `became resume` knows of all runs. One that another process is working on is left to it.
            with suppress(BecameError), job.run.locked():
                job.write_config(job.backend.name, job.stream(load))
    for job, result in zip(jobs, results, strict=True):
        if result is not None:
            display.result(job.run, result, before=True)
    new = iter(engine(to_do, load, display) if to_do else ())
    results = [next(new) if result is None else result for result in results]
    finished = [result for result in results if result is not None]
    failed = [job.run.name for job, result in zip(jobs, results, strict=True) if result is None]
    if failed:
        message = f"{len(failed)} of {len(jobs)} runs failed; the same command tries them again: {', '.join(failed)}."
        raise UnfinishedError(message, finished)
    return finished


def _results_before(jobs: Sequence[Job], load: Load) -> list[RunResult | None]:
    """Return the results of the runs that have finished before.

    Raises:
        BecameError: if one was of other data, or one that is not finished cannot be resumed.
    """
    try:
        results = [job.finished() for job in jobs]
        for job, result in zip(jobs, results, strict=True):
            if result is None:
                job.check_unfinished()
            else:
                job.check_data(result, load)
    except BecameError:
        _check_values(jobs, load)  # a value that no run can have is reported before a folder that holds another run
        raise
    return results


def _check_values(jobs: Sequence[Job], load: Load) -> None:
    """Raise a BecameError if the data cannot be read, or cut as asked for, or the network cannot be built for them.

    Of the runs of one command, which differ in what the methods need, the first on each backend stands for all that
    adapt the network alike. Of the runs of one method, which differ in their seeds, the first does.
    """
    for job in {(id(job.backend), job.adaptation): job for job in reversed(jobs)}.values():
        job.check_values(job.stream(load))
    for job in {(id(job.configuration), job.run.method): job for job in reversed(jobs)}.values():
        configuration = job.configuration
        check_method(configuration.method(job.run.method), job.stream(load), configuration.training())


def run_job(job: Job, load: Load, display: Display) -> RunResult:
    """Start a run or resume it, in this process; return its result, which is saved then, and is in the summary.

    Args:
        job: the run.
        load: returns a data set.
        display: shows the run.

    Raises:
        BusyError: if another process works on it.
        BecameError: if it cannot start or be resumed, or fails.
        InterruptedRun: if it was stopped by a signal.
    """
    try:
        result = _run_to_its_end(job, load, display)
    except InterruptedRun:
        if job.run.results_file.exists():  # the signal came as the run ended
            write_summary(job.run.out)
        raise
    write_summary(job.run.out)
    return result


def _run_to_its_end(job: Job, load: Load, display: Display) -> RunResult:
    run, backend, configuration = job.run, job.backend, job.configuration
    with run.locked():
        result = job.finished()
        if result is not None:  # another process has finished it meanwhile
            return result
        backends = job.check_unfinished()
        stream = job.stream(load)
        threads = job.use_threads(stream)
        segments = job.segments(stream)
        stream = stream if segments is None else segments.stream
        learner = job.learner(stream)
        method, training = configuration.method(run.method), configuration.training()
        checkpoints = run.checkpoints(stream, method, training)
        state = checkpoints.load(learner, lambda note: LOGGER.warning("%s: %s", run.name, note))
        job.write_config(backends, stream, threads)
        events = replace(run.events, backend=backend.name)
        with (
            Interruption() as interruption,
            display.watching(run, backend.name, len(stream.tasks), method.stages) as progress,
            _tracked(job) as tracker,
        ):
            # The tracker comes after the checkpoints: what it writes is then saved.
            saving = _Saving(checkpoints, configuration.save_every, interruption)
            callbacks = progress, events, saving, tracker, _Stopping(interruption, run.name)
            try:
                record = backend.learn(
                    learner, stream, method, training, seed=run.seed, callbacks=callbacks, state=state
                )
            except BecameError as error:
                last = checkpoints.last
                if last is None:
                    raise
                raise BecameError(f"{str(error).removesuffix('.')}; the last good checkpoint is {last}.") from None
            benchmark, config = configuration.benchmark, configuration.to_json()
            result = RunResult.of(
                record,
                backend=backends,
                benchmark=benchmark,
                method=run.method,
                seed=run.seed,
                config=config,
                data_dir=configuration.hints()["data_dir"],
                data=fingerprint(stream.dataset),
                segments=segments,
            )
            run.save(result)
            interruption.check(f"{run.name} is finished")
        return result


@contextmanager
def _tracked(job: Job) -> Iterator[Callback]:
    """A callback that gives the run's scalars to a tracker, if one is asked for."""
    writer = job.writer()
    if writer is None:
        yield Callback()
    else:
        about = {"backend": job.backend.name, "method": job.run.method, "seed": job.run.seed}
        with Tracker(writer, {**about, **job.configuration.to_json()}) as tracker:
            yield tracker


@dataclass
class _Saving(Callback):
    """Saves a run at the end of each stage and task and after a signal, and else if it was last saved long ago."""

    checkpoints: Checkpoints
    every: float
    interruption: Interruption
    saved: float = -math.inf

    def on_state(self, state: RunState) -> None:
        """Save the state if it is time to."""
        at_an_end = state.stage is None or state.stage.schedule.finished
        if at_an_end or self.interruption.received is not None or time.monotonic() - self.saved >= self.every:
            self.checkpoints.save(state)
            self.saved = time.monotonic()


@dataclass(frozen=True)
class _Stopping(Callback):
    """Ends a run between two epochs if there was a signal."""

    interruption: Interruption
    name: str

    def on_state(self, state: RunState) -> None:
        """Stop, unless the run is over anyway."""
        if state.task < len(state.record.accuracy):
            self.interruption.check(f"{self.name} is saved after {place(state)}")
