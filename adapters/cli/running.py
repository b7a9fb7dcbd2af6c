"""One run in its folder: begun or gone on with, saved after every epoch, stopped by a signal only once it is saved."""

from dataclasses import dataclass, replace

from rich.console import Console

from adapters.cli.backend import Backend
from adapters.cli.interruption import Interruption
from adapters.cli.options import Configuration
from adapters.cli.progress import RunProgress
from adapters.runs import RunDirectory, RunResult
from adapters.runs.events import place
from became_core import BecameError
from became_core.continual import Callback, RunState, TaskStream, learn

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
        network, mixed = configuration.preset.network, configuration.mixed_precision
        learner = backend.learner(network, stream, device, run.seed, mixed_precision=mixed)
        method, training = configuration.method(run.method), configuration.preset.training
        checkpoints = run.checkpoints(stream, method, training)

        def say(note: str) -> None:
            console.print(f"{run.name}  {note}", highlight=False, soft_wrap=True, markup=False)

        state = checkpoints.load(learner, say)
        run.write_config(backends, benchmark, config, stream)
        events = replace(run.events, backend=backend.name)
        with (
            Interruption() as interruption,
            RunProgress(console, run.name, len(stream.tasks), method.stages) as progress,
        ):
            callbacks = progress, events, checkpoints, _Stopping(interruption, run.name)
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


@dataclass(frozen=True)
class _Stopping(Callback):
    """Ends a run between two epochs if there was a signal."""

    interruption: Interruption
    name: str

    def on_state(self, state: RunState) -> None:
        """Stop, unless the run is over anyway."""
        if state.task < len(state.record.accuracy):
            self.interruption.check(f"{self.name} is saved after {place(state)}")
