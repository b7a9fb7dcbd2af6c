"""A process that carries out runs, one after another, as another process orders them: ``WorkerProcess`` starts it.

Convention: an order is a dict of plain values, pickled onto the worker's standard input. The worker answers with
pickled tuples on what was its standard output: ``("watch", backend, tasks, stages)`` when a run begins, ``("event",
name, values)`` for each of its events, ``("log", level, text)``, and one of ``LAST`` with a text when it is done with
the run. If its standard input ends while it works, it saves the run and ends.
"""

import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from adapters.backend.entry import Backend, BackendName, load_backend
from adapters.cli.display import LOGGER, logged
from adapters.cli.interruption import InterruptedRun
from adapters.cli.jobs import Job, Load, load_data
from adapters.cli.running import run_job
from adapters.runs import RunDirectory
from adapters.runs.configuration import Configuration
from adapters.runs.events import Events
from adapters.runs.lock import BusyError
from became_core import BecameError, __version__

__all__ = ["LAST", "Message", "WorkerProcess", "main", "order_of"]

Message = tuple[Any, ...]

# The last message about a run: its result is saved; another process works on it; it failed; a signal stopped it.
LAST = ("finished", "busy", "failed", "stopped")
# How long an idle worker may take to end.
PATIENCE = 10.0
# On a GPU, JAX and TensorFlow would take the memory that the other workers need.
SHARED_GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}


def order_of(job: Job) -> dict[str, Any]:
    """Return plain values that say what a worker is to do; its folders are absolute."""
    level = LOGGER.level if LOGGER.level else logging.WARNING
    return {
        "version": __version__,
        "out": str(job.run.out.absolute()),
        "method": job.run.method,
        "seed": job.run.seed,
        "backend": job.backend.name,
        "config": job.configuration.to_json(),
        "hints": job.configuration.hints(),
        "preset": job.preset,
        "resume": job.resume,
        "share": job.share,
        "level": logging.getLevelName(level).lower(),
    }


def _job(order: Mapping[str, Any]) -> Job:
    """Return the job that an order describes; its framework is loaded."""
    hints = dict(order["hints"])
    hints["data_dir"] = None if hints["data_dir"] is None else Path(hints["data_dir"])
    configuration = replace(Configuration.from_json(order["config"], order["method"], file="the order"), **hints)
    backend = _backend(order["backend"], deterministic=configuration.deterministic)
    run = RunDirectory(Path(order["out"]), order["method"], order["seed"])
    return Job(run, backend, configuration, order["preset"], order["resume"], order["share"])


@cache
def _backend(name: BackendName, *, deterministic: bool) -> Backend:
    backend = load_backend(name)
    if deterministic:
        backend.repeat_exactly()
    return backend


class WorkerProcess:
    """A worker, as the process that gives it orders sees it. It has a session of its own: Ctrl-C does not reach it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Start the process, with this environment and with the path on which this process finds its modules."""
        code = f"import sys; sys.path[:] = {sys.path!r}; from adapters.cli.worker import main; main()"
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 # it lives as long as the process does
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**SHARED_GPU, **environment},
            start_new_session=True,
        )
        self._stopped = False

    @property
    def usable(self) -> bool:
        """Whether it can be given another order."""
        return self._process.poll() is None and not self._stopped

    def messages(self, order: Mapping[str, Any]) -> Iterator[Message]:
        """Give an order and yield what the worker says of it; the last message is one of ``LAST``, even if it dies."""
        orders, answers = cast(BinaryIO, self._process.stdin), cast(BinaryIO, self._process.stdout)
        try:
            pickle.dump(dict(order), orders)
            orders.flush()
            while True:
                message = cast(Message, pickle.load(answers))
                yield message
                if message[0] in LAST:
                    return
        except (OSError, EOFError, pickle.UnpicklingError):
            self.kill()
            yield ("stopped", "it had not begun") if self._stopped else ("failed", self._how_it_ended())

    def _how_it_ended(self) -> str:
        status = self._process.returncode
        if status < 0:
            known = {int(number): number.name for number in signal.Signals}
            name = known.get(-status, f"signal {-status}")
            why = " (as the system does when memory is short)" if -status == signal.SIGKILL else ""
            return f"its process was ended by {name}{why}; what it had saved is there."
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return f"its process ended with status {status}: {last.removeprefix('error: ')}"

    def stop(self) -> None:
        """Let it save the run that it works on after the present epoch, and end."""
        self._stopped = True
        with suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """End it, if it has not ended within a moment by itself."""
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End an idle worker."""
        with suppress(OSError):
            cast(BinaryIO, self._process.stdin).close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)
        self.kill()
        cast(BinaryIO, self._process.stdout).close()
        self._errors.close()


class _Relay(Events):
    """Sends the events of a run instead of showing them, as a display does."""

    def __init__(self, send: Callable[..., None]) -> None:
        self._send = send

    @contextmanager
    def watching(self, run: RunDirectory, backend: str, tasks: int, stages: int) -> Iterator[Events]:
        self.backend = backend
        self._send("watch", backend, tasks, stages)
        yield self

    def add(self, name: str, **values: Any) -> None:
        self._send("event", name, values)


class _RelayHandler(logging.Handler):
    def __init__(self, send: Callable[..., None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send("log", record.levelno, record.getMessage())


def main() -> None:
    """Carry out orders until there are no more."""
    orders, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no message
    inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    at_work = threading.Event()

    def read() -> None:
        with suppress(EOFError, OSError, pickle.UnpicklingError):
            while True:
                inbox.put(pickle.load(orders))
        inbox.put(None)
        if at_work.is_set():
            os.kill(os.getpid(), signal.SIGTERM)  # whoever ordered this run is gone: save it

    def send(*message: Any) -> None:
        with suppress(OSError):  # nobody hears it; the run is saved all the same
            pickle.dump(message, answers)
            answers.flush()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what stops a worker is SIGTERM
    threading.Thread(target=read, daemon=True).start()
    load = cache(load_data)
    while (order := inbox.get()) is not None:
        at_work.set()
        send(*_carried_out(order, load, send))
        at_work.clear()


def _carried_out(order: Mapping[str, Any], load: Load, send: Callable[..., None]) -> Message:
    """Carry out an order; return the last message about it."""
    with logged(order["level"], _RelayHandler(send)):
        try:
            run_job(_job(order), load, cast(Any, _Relay(send)))
        except BusyError as error:
            return "busy", str(error)
        except BecameError as error:
            return "failed", str(error)
        except InterruptedRun as stopped:
            return "stopped", str(stopped)
        except Exception as error:
            send("log", logging.ERROR, traceback.format_exc().rstrip())
            return "failed", f"{type(error).__name__}: {error}"
    return "finished", ""
