"""What tests of several processes share: bounded waits for events, and what a run's files say."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

# Seconds after which a process that has not gone on counts as hanging, also beside busy processes.
WAIT = 300.0
LIMIT = 180.0  # what several processes take is a few seconds, or many times that beside busy processes


def until(happened: Callable[[], object]) -> None:
    """Wait until something has happened."""
    end = time.monotonic() + WAIT
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)


def lines(log: Path) -> int:
    """How many whole lines a file has; none if it is not there."""
    return log.read_bytes().count(b"\n") if log.exists() else 0


def result(out: Path, name: str) -> dict[str, Any]:
    """What came out of a run, seconds aside."""
    values: dict[str, Any] = json.loads((out / name / "results.json").read_text())
    return {key: value for key, value in values.items() if key not in ("seconds", "sha256")}


def forking() -> ForkServerContext:
    """What starts processes by forking one that has loaded PyTorch and Dask, where they are, once for all tests."""
    context = get_context("forkserver")
    theirs = [f"tests.torch.{name}_processes" for name in ("torchrun", "sharded", "shared_model")]
    context.set_forkserver_preload([*theirs, "distributed", "adapters.checkpoints"])
    return context


@contextmanager
def started(work: Callable[[int], None], count: int = 2) -> Iterator[list[Any]]:
    """Processes with PyTorch that do their work, each by its rank; none is left afterwards."""
    context = forking()
    processes = [context.Process(target=work, args=(rank,)) for rank in range(count)]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def ended(processes: list[Any], within: float = LIMIT) -> list[int | None]:
    """The exit statuses of processes; None for one that is still there after so many seconds."""
    end = time.monotonic() + within
    for process in processes:
        process.join(max(end - time.monotonic(), 0.0))
    return [process.exitcode for process in processes]
