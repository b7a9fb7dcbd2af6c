"""One run in its folder: begun or gone on with, saved after every epoch, stopped by a signal only once it is saved."""

from rich.console import Console

from adapters.cli.backend import Backend
from adapters.cli.interruption import Interruption
from adapters.cli.options import Configuration
from adapters.cli.progress import RunProgress
from adapters.runs import RunDirectory, RunResult
from adapters.runs.provenance import versions
from became_core import BecameError
from became_core.continual import EpochEnd, RunState, TaskEnd, TaskStream, learn

__all__ = ["run_to_its_end"]


def run_to_its_end(
    backend: Backend,
    device: str,
    configuration: Configuration,
    stream: TaskStream,
    run: RunDirectory,
    console: Console,
    *,
    resume: bool,
) -> RunResult:
    """Begin a run or go on with it; return its result, which is saved then.

    Args:
        backend: what it runs on.
        device: as the backend calls it.
        configuration: of all runs.
        stream: what this one learns.
        run: where it is.
        console: where progress shows.
        resume: whether another backend's run may be gone on with.

    Raises:
        BecameError: if it cannot go on: the message names the last good checkpoint, if there is one.
        InterruptedRun: if it was stopped by a signal.
    """
    benchmark, config = configuration.benchmark.name, configuration.record()
    with run.locked():
        done = run.finished(backend.name, benchmark, config)
        if done is not None:  # by another process, while this one was busy
            return done
        backends = run.check_unfinished(backend.name, benchmark, config, resume=resume)
        preset, mixed = configuration.preset, configuration.mixed_precision
        learner = backend.learner(preset.network, stream, device, run.seed, norm=preset.norm, mixed_precision=mixed)
        method, training = configuration.method(run.method), configuration.preset.training
        checkpoints = run.checkpoints(stream, method, training)

        def say(note: str) -> None:
            console.print(f"{run.name}  {note}", highlight=False, soft_wrap=True, markup=False)

        state = checkpoints.load(learner, say)
        run.write_config(backends, benchmark, config, stream)
        if state is None:
            run.events.add("begin", versions=versions())
        else:
            say(f"goes on after {_place(state, stream)}")
            run.events.add("resume", after=_place(state, stream), backend=backend.name, versions=versions())
        stages = method.stages
        with (
            Interruption() as interruption,
            RunProgress(console, run.name, len(stream.tasks), stages) as progress,
        ):

            def observe(event: EpochEnd | TaskEnd) -> None:
                progress(event)
                run.events.observe(event)

            def keep(state: RunState) -> None:
                checkpoints.save(state)
                if state.task < len(stream.tasks):
                    interruption.check(f"{run.name} is saved after {_place(state, stream)}")

            try:
                record = learn(
                    learner, stream, method, training, seed=run.seed, observe=observe, state=state, keep=keep
                )
            except BecameError as error:
                last = checkpoints.last
                if last is None:
                    raise
                raise BecameError(f"{str(error).removesuffix('.')}; the last good checkpoint is {last}.") from None
            result = RunResult.of(
                record, backend=backends, benchmark=benchmark, method=run.method, seed=run.seed, config=config
            )
            run.save(result)
            run.events.add("end")
            interruption.check(f"{run.name} is finished")
        return result


def _place(state: RunState, stream: TaskStream) -> str:
    """Where a run is, in words."""
    total = len(stream.tasks)
    if state.stage is None:
        return f"task {state.task}/{total}"
    return f"task {state.task + 1}/{total}, stage {state.stage.number}, epoch {state.stage.schedule.epoch}"
