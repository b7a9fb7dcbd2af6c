"""A Dask cluster: how to connect to it, and whether its workers can do what they will be asked to.

All that is used of Dask, whose extra is ``dask``, is imported from here: so one sentence says what to install.
"""

import json
from pathlib import Path

from became_core import BecameError, __version__
from became_core.errors import first_line

try:
    from dask import config
    from distributed import Client, Future, KilledWorker, fire_and_forget, get_worker
except ModuleNotFoundError as error:
    raise BecameError(f"the package '{error.name}' is missing; pip install 'became[dask]'.") from None

__all__ = [
    "CONNECT",
    "Client",
    "Future",
    "KilledWorker",
    "check_versions",
    "config",
    "connected",
    "fire_and_forget",
    "get_worker",
    "sentence_on",
    "threads_by_host",
]

CONNECT = 10.0  # seconds until a scheduler that does not answer counts as missing


def connected(scheduler: str) -> Client:
    """Return a client of a scheduler, as a context.

    Args:
        scheduler: its address, or the path of its scheduler file.

    Raises:
        BecameError: if there is none, or the file is no scheduler's.
    """
    address = _address_in(Path(scheduler)) if Path(scheduler).is_file() else scheduler
    try:
        return Client(address, timeout=CONNECT, set_as_default=False, name="became")
    except (OSError, ValueError) as error:
        message = f"no scheduler answers at {scheduler} ({first_line(error)}); start one with 'dask scheduler'."
        raise BecameError(message) from None


def _address_in(file: Path) -> str:
    """Return the address that a scheduler file has."""
    try:
        address = json.loads(file.read_bytes())["address"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        address = None
    if not isinstance(address, str) or not address:
        raise BecameError(
            f"{file} is no scheduler's file; give the one that 'dask scheduler --scheduler-file FILE' has written."
        )
    return address


def threads_by_host(client: Client) -> dict[str, int]:
    """Return how many threads the workers of each host have together; empty if there are no workers yet."""
    threads: dict[str, int] = {}
    for about in client.scheduler_info(n_workers=-1)["workers"].values():
        threads[about["host"]] = threads.get(about["host"], 0) + int(about["nthreads"])
    return threads


def check_versions(client: Client) -> None:
    """Refuse workers that have another version of this package, or none; raises a BecameError."""

    def version() -> str | None:  # sent as code: a worker need not have this module
        try:
            from became_core import __version__ as installed
        except ModuleNotFoundError:
            return None
        return str(installed)

    for worker, theirs in client.run(version, on_error="return").items():
        if theirs != __version__:
            has = f"has version {theirs}" if isinstance(theirs, str) else "has no version"
            raise BecameError(f"the worker {worker} {has} of this package, not {__version__}; install the same.")


def sentence_on(error: BaseException | None, what: str) -> str:
    """Return why a task of ours failed, in a sentence.

    Args:
        error: what it raised.
        what: of the task is still there, as "what it had saved is there".
    """
    if isinstance(error, KilledWorker):
        return f"several workers died with it, one after another; {what}."
    if isinstance(error, ModuleNotFoundError | AttributeError):
        return f"its worker has another version of this package ({error}); install the same version on all."
    return f"{type(error).__name__}: {error}"
