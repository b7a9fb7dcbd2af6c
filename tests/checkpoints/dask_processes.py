"""A Dask cluster of processes, which tests kill: a scheduler, and workers with a thread each."""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from distributed import Client, Scheduler, Worker

from tests.processes import forking, until


@contextmanager
def started(work: Callable[[str], None], file: Path) -> Iterator[BaseProcess]:
    """A process of a cluster, which is known by its scheduler's file; it is killed at the end."""
    process = forking().Process(target=work, args=(str(file),))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


@contextmanager
def scheduler(file: Path) -> Iterator[BaseProcess]:
    """A scheduler's process, once the scheduler can be reached."""
    with started(_schedule, file) as process:
        until(lambda: file.exists() and file.read_text(encoding="utf-8").endswith("}"))
        yield process


@contextmanager
def worker(file: Path, client: Client) -> Iterator[BaseProcess]:
    """A worker's process, once the scheduler knows it."""
    with started(_work, file) as process:
        until(lambda: process.pid in client.run(os.getpid, on_error="ignore").values())
        yield process


def _schedule(file: str) -> None:
    async def serve() -> None:
        async with Scheduler(host="127.0.0.1", scheduler_file=file, dashboard=False) as served:
            await served.finished()

    asyncio.run(serve())


def _work(file: str) -> None:
    async def serve() -> None:
        async with Worker(scheduler_file=file, nthreads=1) as served:
            await served.finished()

    asyncio.run(serve())
