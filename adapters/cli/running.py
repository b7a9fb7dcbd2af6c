"""Runs in their folders: begun or gone on with, saved after every epoch, stopped by a signal only once it is saved."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.benchmarks.location import data_directory
from adapters.cli.backend import Backend
from adapters.cli.configuration import Configuration
from adapters.cli.display import Display
from adapters.cli.given import given
from adapters.cli.interruption import Interruption
from adapters.cli.logs import LOGGER
from adapters.cli.options import Options
from adapters.runs import RunDirectory, RunResult, write_summary
from adapters.runs.directory import check_writable
from adapters.runs.events import place
from adapters.tracking import Tracker, Writer, open_writer
from became_core import BecameError
from became_core.continual import Callback, Dataset, RunState, TaskStream, learn

__all__ = ["Job", "run_jobs"]


@dataclass(frozen=True)
class Job:
    """A run to carry out.

    Attributes:
        run: where it is.
        backend: what it runs on.
        options: as given, for this run or for several.
        configuration: what they resolve to.
    """

    run: RunDirectory
    backend: Backend
    options: Options
    configuration: Configuration

    @property
    def of(self) -> tuple[str, dict[str, Any]]:
        """The benchmark's name and the configuration as it is recorded."""
        return self.configuration.benchmark.name, self.configuration.record()

    def finished(self) -> RunResult | None:
        """Return the result if the run has finished before."""
        return self.run.finished(self.backend.name, *self.of)

    def check_unfinished(self) -> str:
        """Return the backends that will have worked on the run; it raises if it is not to be gone on with."""
        return self.run.check_unfinished(self.backend.name, *self.of, resume=self.options.resume)

    def load(self) -> Dataset:
        """Return what its tasks are made of."""
        return self.configuration.benchmark.load(data_directory(self.options.data_dir))

    def write_config(self, backends: str, stream: TaskStream) -> None:
        """Write what runs, and with which options."""
        self.run.write_config(backends, *self.of, stream, given=given(self.options))


def run_jobs(jobs: Sequence[Job], display: Display) -> list[RunResult]:
    """Begin runs or go on with them, one after the other; return their results, which are saved then.

    Raises:
        BecameError: if one cannot begin or go on, before any does where that can be known; the message names the last
            good checkpoint of one that failed, if there is one.
        InterruptedRun: if it was stopped by a signal.
    """
    finished = [job.finished() for job in jobs]
    to_do = [job for job, result in zip(jobs, finished, strict=True) if result is None]
    for run in (job.run for job, result in zip(jobs, finished, strict=True) if result is not None):
        # A process that was killed after it had saved the result can have left files, and the summary without this run.
        # A folder that cannot be written to, or that another process is at work in, is shown as it is.
        with suppress(BecameError), run.locked():
            write_summary(run.out)
    for job in to_do:
        job.check_unfinished()
        _writer(job)
    datasets: dict[tuple[str, Path | None], Dataset] = {}
    for job in to_do:
        check_writable(job.run.out)
        key = job.configuration.benchmark.name, job.options.data_dir
        if key not in datasets:
            datasets[key] = job.load()
            LOGGER.debug("%s: %d images are read", key[0], len(datasets[key].images))
        stream = job.configuration.stream(datasets[key], job.run.seed)
        if not job.run.begun:
            # So that `became resume` knows of all. What another process is at work on is in its hands.
            with suppress(BecameError), job.run.locked():
                job.write_config(job.backend.name, stream)
    results = []
    for job, result in zip(jobs, finished, strict=True):
        before = result is not None
        if result is None:
            dataset = datasets[job.configuration.benchmark.name, job.options.data_dir]
            result = _run_to_its_end(job, job.configuration.stream(dataset, job.run.seed), display)
            write_summary(job.run.out)
        display.result(job.run, result, before=before)
        results.append(result)
    return results


def _run_to_its_end(job: Job, stream: TaskStream, display: Display) -> RunResult:
    run, backend, configuration = job.run, job.backend, job.configuration
    benchmark, config = job.of
    with run.locked():
        done = job.finished()
        if done is not None:  # by another process, while this one was busy
            return done
        backends = job.check_unfinished()
        learner = configuration.learner(backend, stream, job.options.device, run.seed)
        method, training = configuration.method(run.method), configuration.preset.training
        checkpoints = run.checkpoints(stream, method, training)
        state = checkpoints.load(learner, lambda note: LOGGER.warning("%s: %s", run.name, note))
        job.write_config(backends, stream)
        events = replace(run.events, backend=backend.name)
        with (
            Interruption() as interruption,
            display.watching(run, backend.name, len(stream.tasks), method.stages) as shown,
            _tracked(job) as tracker,
        ):
            # Trackers come after checkpoints: what they write down is then saved.
            callbacks = shown, events, checkpoints, tracker, _Stopping(interruption, run.name)
            try:
                record = learn(learner, stream, method, training, seed=run.seed, callbacks=callbacks, state=state)
            except BecameError as error:
                last = checkpoints.last
                if last is None:
                    raise
                raise BecameError(f"{str(error).removesuffix('.')}; the last good checkpoint is {last}.") from None
            result = RunResult.of(
                record, backend=backends, benchmark=benchmark, method=run.method, seed=run.seed, config=config
            )
            run.save(result)
            interruption.check(f"{run.name} is finished")
        return result


@contextmanager
def _tracked(job: Job) -> Iterator[Callback]:
    """A callback that tracks the run, if that is asked for."""
    writer = _writer(job)
    if writer is None:
        yield Callback()
    else:
        benchmark, config = job.of
        about = {"backend": job.backend.name, "benchmark": benchmark, "method": job.run.method, "seed": job.run.seed}
        with Tracker(writer, {**about, **config}) as tracker:
            yield tracker


def _writer(job: Job) -> Writer | None:
    return None if job.options.tracker == "none" else open_writer(job.options.tracker, job.run.folder)


@dataclass(frozen=True)
class _Stopping(Callback):
    """Ends a run between two epochs if there was a signal."""

    interruption: Interruption
    name: str

    def on_state(self, state: RunState) -> None:
        """Stop, unless the run is over anyway."""
        if state.task < len(state.record.accuracy):
            self.interruption.check(f"{self.name} is saved after {place(state)}")
