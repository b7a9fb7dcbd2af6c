"""``python -m adapters.jax.run`` in several processes, which share runs as ``adapters/backend/processes.py`` has it.

All devices of all processes make one mesh, and a batch is spread over it as over the devices of one process.

| what happens | what it leads to |
| --- | --- |
| a process dies | the others' next sum fails, or JAX ends them; each of them says so |
| a process or the network stalls | the same after ``BECAME_TIMEOUT`` seconds, 60 unless it is set |
| a signal | the first process stops after the epoch, and the others end as if it had died |

Convention: environment variables say who is who, as torchrun's do: ``JAX_COORDINATOR_ADDRESS``, which JAX reads itself,
``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``, which JAX finds out under SLURM and Open MPI.
"""

import io
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import Mesh

from adapters.backend import Backend, LostProcessError, Processes, run_in_processes, timeout_asked_for
from adapters.jax.learner import JaxLearner
from became_core import BecameError

__all__ = ["JaxProcesses", "is_one_of_several", "run_as_one_of_several"]


def is_one_of_several() -> bool:
    """Whether this process was started beside others."""
    return "JAX_COORDINATOR_ADDRESS" in os.environ


class _Pickler(pickle.Pickler):
    """Writes JAX's arrays as NumPy's, and notes which they are."""

    def persistent_id(self, value: Any) -> Any:
        return np.asarray(value) if isinstance(value, jax.Array) else None


class _Unpickler(pickle.Unpickler):
    """Places what were JAX's arrays where a learner has its own."""

    learner: JaxLearner

    def persistent_load(self, pid: Any) -> Any:
        return jax.device_put(pid, self.learner.device)


@dataclass
class JaxProcesses(Processes):
    """The processes that JAX has connected, as one of them sees them."""

    def send(self, value: Any, source: int = 0) -> Any:
        """Return the value that one process gives; the others wait for as long as it takes."""
        is_source = self.rank == source
        numbers = np.frombuffer(pickle.dumps(value) if is_source else b"", np.uint8)
        try:
            length = int(broadcast_one_to_all(np.int64(len(numbers)), is_source))
            numbers = numbers if is_source else np.zeros(length, np.uint8)
            return pickle.loads(np.asarray(broadcast_one_to_all(numbers, is_source)).tobytes())
        except (RuntimeError, ValueError) as error:
            raise LostProcessError(self.count, self.timeout) from error

    def built(self, network: str, stream: Any, device: str, seed: int, **options: Any) -> JaxLearner:
        """Return a fresh learner on this process's first device."""
        if ":" in device:
            kind = device.partition(":")[0]
            raise BecameError(f"several processes share all devices of a kind; give {kind} in place of '{device}'.")
        learner = self.backend.learner(network, stream, device, seed, **options)
        assert isinstance(learner, JaxLearner)
        return learner

    def share(self, learner: Any) -> None:
        """Let a learner spread its batches over all devices of all processes, of the kind that it has."""
        platform = learner.device.platform
        learner.spread(Mesh(np.asarray(jax.devices(platform)), ("data",)))

    def packed(self, values: dict[str, Any]) -> bytes:
        """Return values as bytes."""
        written = io.BytesIO()
        _Pickler(written).dump(values)
        return written.getvalue()

    def unpacked(self, packed: bytes, learner: Any) -> dict[str, Any]:
        """Return the values, whole on every device."""
        reader = _Unpickler(io.BytesIO(packed))
        reader.learner = learner
        values: dict[str, Any] = reader.load()
        return values

    def conditions(self) -> tuple[int | None, bool]:
        """Return what need not be told: XLA has looked at both when processes met."""
        return None, False

    def failed(self, error: Exception) -> Exception:
        """Return a LostProcessError for an error of gloo's or NCCL's."""
        is_lost = any(name in str(error) for name in ("Gloo", "NCCL", "coordination service"))
        return LostProcessError(self.count, self.timeout) if is_lost else error


def run_as_one_of_several(backend: Backend) -> NoReturn:
    """Run the command in the first process, and follow it in the others; then end the process.

    Args:
        backend: JAX, for one process.
    """
    rank = os.environ.get("JAX_PROCESS_ID", os.environ.get("SLURM_PROCID", "0"))
    with ExitStack() as watched:
        status, all_end = run_in_processes(partial(_met, backend, watched), rank == "0")
    sys.stdout.flush()
    sys.stderr.flush()
    if not all_end:
        os._exit(status)  # the others may never end, and JAX's own end would wait for them
    sys.exit(status)  # JAX's own end waits for the others, which JAX would abort if this process were gone


def _met(backend: Backend, watched: ExitStack, words: list[str]) -> Processes:
    """Wait for all processes; return what this one works with.

    Args:
        backend: JAX, for one process.
        watched: within which this process is watched from then on.
        words: of the command.

    Raises:
        BecameError: if the processes are not alike, or an environment variable is wrong.
    """
    timeout, count, rank = timeout_asked_for(), _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    backend.use_threads(int(threads) if threads.isdecimal() and int(threads) else 1)  # 1, as torchrun has it
    if "--deterministic" in words:
        backend.repeat_exactly()
    jax.config.update("jax_enable_preemption_service", False)  # it would take signals, which are the command's
    watched.enter_context(_watched(LostProcessError(count, timeout)))
    waits = ("initialization_timeout", "heartbeat_timeout_seconds", "shutdown_timeout_seconds")
    try:
        jax.distributed.initialize(num_processes=count, process_id=rank, **dict.fromkeys(waits, max(1, round(timeout))))
    except (IndexError, TypeError, ValueError) as error:
        raise BecameError(
            f"JAX cannot connect the processes ({str(error).rstrip('.')}); give each the first one's "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES, and JAX_PROCESS_ID from 0."
        ) from None
    processes = JaxProcesses(backend, jax.process_index(), jax.process_count(), timeout)
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)  # gloo reports there how many it has connected
    processes.check_alike(command=" ".join(words), jax=jax.__version__, Python=sys.version.split()[0])
    os.dup2(stdout, 1)
    os.close(stdout)
    return processes


def _number(name: str) -> int | None:
    """Return the number that an environment variable has; None if there is none."""
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise BecameError(f"{name} is '{text}'; it must be a number.")
    return None if text is None else int(text)


@contextmanager
def _watched(sentence: Exception) -> Iterator[None]:
    """Have a shell say a sentence if this process ends within this context.

    JAX aborts a process that has lost the one it coordinates by, with a report of its own, and no code of ours runs.
    """
    command = ["sh", "-c", 'read -r done || printf "%s\\n" "$0" >&2', f"error: {sentence}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as shell:
        try:
            yield
        finally:
            shell.communicate(b"done\n")
