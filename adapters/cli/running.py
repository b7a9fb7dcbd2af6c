"""Runs in their folders: started or resumed, saved after every epoch, stopped by a signal only once they are saved."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, get_args

from adapters.backend.entry import Backend, BackendName, threads_for
from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.benchmarks.location import data_directory
from adapters.cli.display import LOGGER, Display
from adapters.cli.options import METHODS_BY_DEFAULT, Request
from adapters.runs import RunDirectory, RunResult, write_summary
from adapters.runs.configuration import Configuration, full_method_name
from adapters.runs.directory import check_writable, read_record
from adapters.runs.events import place
from adapters.tracking import Tracker, Writer, open_writer
from became_core import BecameError
from became_core.continual import (
    Callback,
    Dataset,
    Learner,
    RunState,
    TaskStream,
    check_method,
    check_settings,
    method_settings,
    projector_names,
)
from became_core.registry import nearest

_Load = Callable[[str, Path | None, tuple[tuple[str, Any], ...]], Dataset]

__all__ = ["InterruptedRun", "Interruption", "Job", "requested_jobs", "run_jobs", "unfinished_jobs"]


@dataclass(frozen=True)
class Job:
    """A run to start or to resume.

    Attributes:
        run: where it is.
        backend: what it runs on.
        configuration: what it does.
        preset: the preset that the configuration was made from.
        resume: whether it may resume a run of another backend.
    """

    run: RunDirectory
    backend: Backend
    configuration: Configuration
    preset: str | None = None
    resume: bool = False

    def finished(self) -> RunResult | None:
        """Return the result if the run has finished before."""
        return self.run.finished(self.backend.name, self.configuration.to_json())

    def check_unfinished(self) -> str:
        """Return the backends that will have worked on the run; raise a BecameError if it cannot be resumed."""
        return self.run.check_unfinished(self.backend.name, self.configuration.to_json(), resume=self.resume)

    def stream(self) -> TaskStream:
        """Return the tasks of the run; the data set is read."""
        return _stream(self, _load)

    def learner(self, stream: TaskStream) -> Learner:
        """Return a fresh learner of these tasks."""
        configuration = self.configuration
        return self.backend.learner(
            configuration.network,
            stream,
            configuration.device,
            self.run.seed,
            norm=configuration.norm,
            mixed_precision=configuration.mixed_precision,
            dropout_masks=configuration.dropout_masks,
        )

    def check_values(self, stream: TaskStream) -> None:
        """Raise a BecameError if there is no such device, or the network cannot be built for these images."""
        self.backend.use_threads(self.threads(stream))
        self.learner(stream)

    def threads(self, stream: TaskStream) -> int | None:
        """Return with how many threads the run is to be computed; None for the framework's usual number.

        A run that goes on keeps the number with which it began, unless another one is asked for.
        """
        configuration = self.configuration
        asked_for = configuration.threads is not None or "OMP_NUM_THREADS" in os.environ
        if self.run.started and not asked_for and self.run.threads is not None:
            return self.run.threads
        shape: Any = stream.dataset.images.shape[1:]
        return configuration.threads or threads_for(configuration.network, shape, configuration.norm)

    def use_threads(self, stream: TaskStream) -> int:
        """Let the framework compute with the run's threads, and return how many they are.

        If the run began with another number, a warning says so, because its last digits may then differ.
        """
        before = self.run.threads if self.run.started else None
        threads = self.backend.use_threads(self.threads(stream))
        if before not in (None, threads):
            LOGGER.warning(
                "%s began with %d threads and goes on with %d, so that its last digits may differ; --threads %d keeps "
                "them.", self.run.name, before, threads, before,
            )  # fmt: skip
        return threads

    def write_config(self, backends: str, stream: TaskStream, threads: int | None = None) -> None:
        """Write what runs, with which options, and with how many threads, if that is known."""
        config, hints = self.configuration.to_json(), self.configuration.hints()
        hints["threads"] = threads or hints["threads"]
        self.run.write_config(backends, config, stream, hints=hints, preset=self.preset)

    def writer(self) -> Writer | None:
        """Return what writes the run's scalars for a tracker, if one is asked for."""
        tracker = self.configuration.tracker
        return None if tracker == "none" else open_writer(tracker, self.run.folder)


def requested_jobs(request: Request, backend: Backend) -> list[Job]:
    """Return the runs that a command asks for, by seed and then by method.

    Raises:
        BecameError: if a name is unknown, a value cannot be used, or there is nothing to resume where there should be.
    """
    record = None if request.config is None else read_record(request.config)
    values, preset = dict(request.values), request.preset
    methods, seeds = request.methods, request.seeds
    if record is not None:
        if preset is not None:
            raise BecameError("--config and --preset both give the values of all options; give one of them.")
        configuration = record.configuration
        values = {**vars(configuration), **configuration.settings, **values}
        del values["settings"]
        preset = record.preset
        methods = (record.method,) if methods is None else methods
        seeds = (record.seed,) if seeds is None else seeds
    methods = METHODS_BY_DEFAULT if methods is None else methods
    seeds = (0,) if seeds is None else seeds
    if not methods or not seeds:
        raise BecameError("give at least one method and one seed.")
    if min(seeds) < 0:
        raise BecameError(f"the seed {min(seeds)} is negative; give 0 or more.")
    projector = request.projector
    if projector is not None and projector not in projector_names():
        raise BecameError(f"there is no projector '{projector}'{nearest(projector, projector_names())}.")
    # A value that cannot be used is refused even if none of the methods uses it.
    check_settings({option: value for option, value in request.values.items() if option in method_settings()})
    names = list(dict.fromkeys(full_method_name(method, projector) for method in methods))
    seeds = tuple(dict.fromkeys(seeds))
    configurations = {name: Configuration.of(values, name, preset) for name in names}
    benchmark = configurations[names[0]].benchmark
    preset = preset or BENCHMARKS[benchmark].usual
    out = request.out or Path("runs") / f"{benchmark}-{preset}"
    jobs = [
        Job(RunDirectory(out, name, seed), backend, configurations[name], preset, request.resume)
        for seed in seeds
        for name in names
    ]
    if request.resume and not any(job.run.started for job in jobs):
        raise BecameError(f"{out} holds nothing to resume; leave out --resume to start.")
    return jobs


def unfinished_jobs(
    out: Path,
    load: Callable[[BackendName], Backend],
    *,
    backend: BackendName | None = None,
    data_dir: Path | None = None,
    device: str | None = None,
) -> list[Job]:
    """Return the runs of a folder that have started, or were to, and have no results.

    Args:
        out: a folder that ``--out`` named.
        load: returns a backend by its name; called once for each that is needed.
        backend: what they are resumed on; if None, each on the backend that worked on it last.
        data_dir: where the data is; if None, where it was, if that still exists.
        device: where to compute; if None, where it was or, on another backend, "auto".

    Raises:
        BecameError: if there are none, or a file does not hold a run's configuration.
    """
    files = sorted(out.glob("*/config.json"))
    if not files:
        raise BecameError(f"{out} holds no runs; give a folder that --out named.")
    load = cache(load)
    jobs = []
    for file in files:
        if (file.parent / "results.json").exists():
            continue
        record = read_record(file)
        name = backend or record.backend
        if name not in get_args(BackendName):
            raise BecameError(f"{file} is of a run on {name}; say with --backend what to resume it on.")
        before = record.configuration
        usual = before.device if name == record.backend else "auto"
        configuration = replace(before, data_dir=data_dir or before.data_dir, device=device or usual)
        run = RunDirectory(out, record.method, record.seed)
        jobs.append(Job(run, load(name), configuration, record.preset, resume=True))
    if not jobs:
        raise BecameError(f"all runs in {out} are finished; there is nothing to resume.")
    return jobs


def run_jobs(jobs: Sequence[Job], display: Display) -> list[RunResult]:
    """Start runs or resume them, one after the other; return their results, which are saved then.

    Raises:
        BecameError: if a run cannot start or be resumed, before any does where that can be known; the message names the
            last good checkpoint of a run that failed, if there is one.
        InterruptedRun: if a run was stopped by a signal.
    """
    for backend in {id(job.backend): job.backend for job in jobs if job.configuration.deterministic}.values():
        backend.repeat_exactly()
    load = cache(_load)
    results = _results_before(jobs, load)
    to_do = [job for job, result in zip(jobs, results, strict=True) if result is None]
    for run in (job.run for job, result in zip(jobs, results, strict=True) if result is not None):
        # A process that was killed after it had saved the result can have left files, and the summary without this run.
        # A folder that cannot be written to, or that another process is at work in, is shown as it is.
        with suppress(BecameError), run.locked():
            write_summary(run.out)
    for job in to_do:
        job.writer()
    _check_values(to_do, load)  # before a folder is made: a command that fails leaves none
    for job in to_do:
        check_writable(job.run.out)
        if not job.run.started:
            # So that `became resume` knows of all runs. One that another process is working on is left to it.
            with suppress(BecameError), job.run.locked():
                job.write_config(job.backend.name, _stream(job, load))
    finished = []
    for job, result in zip(jobs, results, strict=True):
        before = result is not None
        if result is None:
            result = _run_to_its_end(job, _stream(job, load), display)
            write_summary(job.run.out)
        display.result(job.run, result, before=before)
        finished.append(result)
    return finished


def _results_before(jobs: Sequence[Job], load: _Load) -> list[RunResult | None]:
    """Return the results of the runs that have finished before; raise a BecameError if one cannot be resumed."""
    try:
        results = [job.finished() for job in jobs]
        for job, result in zip(jobs, results, strict=True):
            if result is None:
                job.check_unfinished()
    except BecameError:
        _check_values(jobs, load)  # a value that no run can have is reported before a folder that holds another run
        raise
    return results


def _load(benchmark: str, data_dir: Path | None, settings: tuple[tuple[str, Any], ...]) -> Dataset:
    dataset = BENCHMARKS[benchmark].load(data_directory(data_dir), **dict(settings))
    LOGGER.debug("%s: %d samples are read", benchmark, len(dataset.images))
    return dataset


def _stream(job: Job, load: _Load) -> TaskStream:
    """Return the tasks of a run."""
    configuration = job.configuration
    settings = tuple(configuration.data_settings.items())
    dataset = load(configuration.benchmark, configuration.data_dir, settings)
    return job.configuration.stream(dataset, job.run.seed)


def _check_values(jobs: Sequence[Job], load: _Load) -> None:
    """Raise a BecameError if the data cannot be read, or cut as asked for, or the network cannot be built for them.

    Of the runs of one command, which differ in what the methods need, the first on each backend stands for all. Of the
    runs of one method, which differ in their seeds, the first does.
    """
    for job in {id(job.backend): job for job in reversed(jobs)}.values():
        job.check_values(_stream(job, load))
    for job in {(id(job.configuration), job.run.method): job for job in reversed(jobs)}.values():
        configuration = job.configuration
        check_method(configuration.method(job.run.method), _stream(job, load), configuration.training())


def _run_to_its_end(job: Job, stream: TaskStream, display: Display) -> RunResult:
    run, backend, configuration = job.run, job.backend, job.configuration
    with run.locked():
        result = job.finished()
        if result is not None:  # another process has finished it meanwhile
            return result
        backends = job.check_unfinished()
        threads = job.use_threads(stream)
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
            callbacks = progress, events, checkpoints, tracker, _Stopping(interruption, run.name)
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


@dataclass(frozen=True)
class _Stopping(Callback):
    """Ends a run between two epochs if there was a signal."""

    interruption: "Interruption"
    name: str

    def on_state(self, state: RunState) -> None:
        """Stop, unless the run is over anyway."""
        if state.task < len(state.record.accuracy):
            self.interruption.check(f"{self.name} is saved after {place(state)}")


class InterruptedRun(Exception):  # noqa: N818 # it is no error
    """A run was stopped by a signal after it was saved; the message says where."""

    def __init__(self, message: str, number: int) -> None:
        """Hold the message, and the exit status that says which signal it was."""
        super().__init__(message)
        self.status = 128 + number


class Interruption:
    """Notes SIGINT and SIGTERM for the time of this context; the same signal once more does what it usually does."""

    def __init__(self) -> None:
        """Prepare to listen."""
        self._received: int | None = None
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Listen, where a program may: in its main thread."""
        if threading.current_thread() is threading.main_thread():
            self._usual = {each: signal.signal(each, self._note) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Listen no more."""
        for number, usual in self._usual.items():
            signal.signal(number, usual)

    def check(self, where: str) -> None:
        """Raise an InterruptedRun if there was a signal.

        Args:
            where: what has been saved, for the message.
        """
        if self._received is not None:
            raise InterruptedRun(where, self._received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        signal.signal(number, self._usual[number])
        # Not print: the signal may have come within one.
        os.write(2, b"\nthe epoch is finished and saved first; the same signal again stops at once.\n")
