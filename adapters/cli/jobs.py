"""Which runs a command is to carry out: those that it asks for, or those of a folder that are not finished."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

from adapters.backend.entry import Backend, BackendName, available_threads, threads_for
from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.benchmarks.location import data_directory
from adapters.cli.display import LOGGER
from adapters.cli.options import METHODS_BY_DEFAULT, Request
from adapters.runs import RunDirectory, RunResult
from adapters.runs.configuration import Configuration, full_method_name
from adapters.runs.directory import read_record, read_result
from adapters.runs.options import option_word, options
from adapters.runs.settings import is_of
from adapters.tracking import Writer, open_writer
from became_core import BecameError
from became_core.continual import (
    Adaptation,
    Dataset,
    Learner,
    Segments,
    TaskStream,
    check_settings,
    check_watchable,
    find_segments,
    method_settings,
    projector_names,
)
from became_core.projection import Projector
from became_core.registry import nearest

__all__ = ["Job", "Load", "load_data", "requested_jobs", "unfinished_jobs"]

Load = Callable[[str, Path | None, tuple[tuple[str, Any], ...]], Dataset]


def load_data(benchmark: str, data_dir: Path | None, settings: tuple[tuple[str, Any], ...]) -> Dataset:
    """Return the data set of a benchmark.

    Args:
        benchmark: its name.
        data_dir: where the data is; None for the usual places.
        settings: those of the benchmark, by name.

    Raises:
        BecameError: if it cannot be read.
    """
    dataset = BENCHMARKS[benchmark].load(data_directory(data_dir), **dict(settings))
    LOGGER.debug("%s: %d samples are read", benchmark, len(dataset.images))
    return dataset


@dataclass(frozen=True)
class Job:
    """A run to start or to resume.

    Attributes:
        run: where it is.
        backend: what it runs on.
        configuration: what it does.
        preset: the preset that the configuration was made from.
        resume: whether it may resume a run of another backend.
        share: among how many runs the machine's cores are divided.
        data: the digest that its data have, by its record; None if any data may be learned.
    """

    run: RunDirectory
    backend: Backend
    configuration: Configuration
    preset: str | None = None
    resume: bool = False
    share: int = 1
    data: str | None = None

    def finished(self) -> RunResult | None:
        """Return the result if the run has finished before."""
        return self.run.finished(self.backend.name, self.configuration.to_json())

    def check_data(self, result: RunResult, load: Load) -> None:
        """Raise a BecameError if the run has finished on other data than those that are there now.

        Published data sets take long to read, and are looked at only if the folder is another one. A user's own tables
        and texts, each domain of which is a task, may have changed in their place.
        """
        folder = self.configuration.hints()["data_dir"]
        if folder not in (None, result.data_dir) or BENCHMARKS[self.configuration.benchmark].tasks == 0:
            self.run.check_data(self.stream(load))

    def check_unfinished(self) -> str:
        """Return the backends that will have worked on the run; raise a BecameError if it cannot be resumed."""
        return self.run.check_unfinished(self.backend.name, self.configuration.to_json(), resume=self.resume)

    def stream(self, load: Load | None = None) -> TaskStream:
        """Return the tasks of the run.

        Args:
            load: returns the data set; by default it is read.

        Raises:
            BecameError: if it cannot be read, or cut as asked for, or is not what the run began with.
        """
        configuration, load = self.configuration, load or load_data
        settings = tuple(configuration.data_settings.items())
        dataset = load(configuration.benchmark, configuration.data_dir, settings)
        stream = configuration.stream(dataset, self.run.seed)
        if self.data is not None and not is_of(self.data, stream.dataset):
            raise BecameError(
                f"{self.run.config_file} is of a run on other data than {dataset.name} as it is now; name the folder "
                "or the file of its data by --data-dir."
            )
        return stream

    def learner(self, stream: TaskStream) -> Learner:
        """Return a fresh learner of these tasks."""
        configuration = self.configuration
        return self.backend.learner(
            configuration.network,
            stream,
            configuration.device,
            self.run.seed,
            norm=configuration.norm,
            pretrained=configuration.pretrained,
            mixed_precision=configuration.mixed_precision,
            dropout_masks=configuration.dropout_masks,
            compiled=configuration.compile,
        )

    @property
    def projector(self) -> Projector | None:
        """The projector of the method; None if it has none."""
        return self.configuration.method(self.run.method).projector

    @property
    def adaptation(self) -> Adaptation:
        """Which parameters learn, by the configuration and by the projector."""
        return self.configuration.training().adaptation.with_own_rank(self.projector)

    def segments(self, stream: TaskStream) -> Segments | None:
        """Return what a detector finds in the stream of these tasks' samples; None if the tasks are announced."""
        configuration = self.configuration
        watch = configuration.watch()
        if watch is None:
            return None
        return find_segments(self.learner(stream), stream, configuration.training(), watch, self.run.seed)

    def check_values(self, stream: TaskStream) -> None:
        """Build what the run would need, without training.

        Raises:
            BecameError: if there is no such device, the network cannot be built, the stream cannot be watched for
                changes, a pattern of what is frozen or adapted matches nothing of the network, or the rank of adapters
                is above that of every weight.
        """
        self.backend.use_threads(self.threads(stream))
        learner, training, watch = self.learner(stream), self.configuration.training(), self.configuration.watch()
        training.adaptation.check(learner, self.projector)
        if watch is not None:
            check_watchable(learner, stream, training, watch)

    def threads(self, stream: TaskStream) -> int | None:
        """Return with how many threads the run is to be computed; None for the framework's usual number.

        A run that goes on keeps the number with which it began, unless another one is asked for.
        """
        configuration = self.configuration
        asked_for = configuration.threads is not None or "OMP_NUM_THREADS" in os.environ
        if self.run.started and not asked_for and self.run.threads is not None:
            return self.run.threads
        shape: Any = stream.dataset.images.shape[1:]
        usual = configuration.threads or threads_for(configuration.network, shape, configuration.norm)
        return max(1, available_threads() // self.share) if usual is None and self.share > 1 else usual

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


def requested_jobs(request: Request, load: Callable[[], Backend]) -> list[Job]:
    """Return the runs that a command asks for, by seed and then by method.

    Args:
        request: what the command asks for.
        load: returns the framework. That takes seconds, so a mistake in a name or a value is said before.

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
        recorded = {**vars(configuration), **configuration.settings}
        del recorded["settings"]
        if request.workers is not None or "OMP_NUM_THREADS" in os.environ:
            del recorded["threads"]  # the recorded number was that of the other run's machine
        if configuration.first == configuration.tasks:  # it learned all tasks, however many
            del recorded["first"]
        values = {**recorded, **values}
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
    out, backend = request.out or Path("runs") / f"{benchmark}-{preset}", load()
    jobs = [
        Job(RunDirectory(out, name, seed), backend, configurations[name], preset, request.resume)
        for seed in seeds
        for name in names
    ]
    _warn_of_idle(request.values, jobs)
    if request.resume and not any(job.run.started for job in jobs):
        raise BecameError(f"{out} holds nothing to resume; leave out --resume to start.")
    return jobs


def _warn_of_idle(given: Iterable[str], jobs: Sequence[Job]) -> None:
    """Warn of options that a user gave and that change nothing in any of the runs."""
    known = options()
    for name in given:
        option, word = known[name], option_word(name)
        if option.owners:
            if not any(name in job.configuration.settings for job in jobs):
                LOGGER.warning("%s changes nothing here; it is a setting of %s.", word, ", ".join(option.owners))
        elif option.idle is not None:
            other, values = option.idle
            # A projector may bring adapters of its own rank.
            found = [job.adaptation.rank if other == "lora" else getattr(job.configuration, other) for job in jobs]
            if all(value in values for value in found):
                reason = (
                    f"without {option_word(other)}" if found[0] is None else f"with {option_word(other)} {found[0]}"
                )
                LOGGER.warning("%s changes nothing here, %s.", word, reason)


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
        BecameError: if there are none, a file does not hold a run's configuration or is missing, or a run's folder was
            renamed.
    """
    for folder in sorted(checkpoints.parent for checkpoints in out.glob("*/checkpoints")):
        if not (folder / "config.json").exists() and not (folder / "results.json").exists():
            raise BecameError(
                f"{folder} holds checkpoints of a run and no config.json, without which they cannot be resumed; put "
                "the file back, or move the folder away."
            )
    files = sorted(out.glob("*/config.json"))
    if not files:
        raise BecameError(f"{out} holds no runs; give a folder that --out named.")
    load = cache(load)
    jobs = []
    for file in files:
        if (file.parent / "results.json").exists():
            read_result(file.parent / "results.json")  # which refuses one that is damaged
            continue
        record = read_record(file)
        name = backend or record.backend
        if name not in get_args(BackendName):
            raise BecameError(f"{file} is of a run on {name}; say with --backend what to resume it on.")
        before = record.configuration
        usual = before.device if name == record.backend else "auto"
        configuration = replace(before, data_dir=data_dir or before.data_dir, device=device or usual)
        run = RunDirectory(out, record.method, record.seed)
        if file.parent.name != run.name:
            raise BecameError(f"{file.parent} holds the run {run.name}; give the folder that name again.")
        jobs.append(Job(run, load(name), configuration, record.preset, resume=True, data=record.data))
    if not jobs:
        raise BecameError(f"all runs in {out} are finished; there is nothing to resume.")
    return jobs
