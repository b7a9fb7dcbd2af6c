"""The one gateway to the Hugging Face library ``datasets``: rows of a parquet file, rows of a data set on the hub.

Convention: a file is read into memory through a cache folder of its own, which is gone when the rows are there, so that
a load that was killed, or a file that was mended, never meets what an earlier load left. The hub has its usual cache.
``datasets`` is imported when it is first needed: that takes two seconds, and no embedded benchmark needs it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING

from became_core.errors import BecameError

if TYPE_CHECKING:
    import datasets

__all__ = ["rows_of_file", "rows_of_hub"]


def rows_of_file(file: Path) -> "datasets.Dataset":
    """Return all rows and columns of one parquet file, in its order; nothing but the file is read, and no network.

    Raises:
        BecameError: if the file cannot be read or has no rows, or the library is not installed.
    """
    # Not `load_dataset("parquet", …)`, which asks a server to count the download, and not the streaming reader, whose
    # threads may abort the interpreter at its exit (huggingface/datasets#7566).
    with _library() as library:
        try:
            with TemporaryDirectory() as cache:
                return library.Dataset.from_parquet(str(file), cache_dir=cache, keep_in_memory=True)
        except Exception as error:  # a corrupt file can fail in any layer of the library, each with errors of its own
            raise BecameError(f"{file} cannot be read as parquet ({_reason(error)}): fetch it again.") from error


def rows_of_hub(repository: str, split: str) -> "datasets.Dataset":
    """Return all rows of one split of a data set on the hub, downloaded on the first call and cached by the library.

    Raises:
        BecameError: if it is neither cached nor to be had, or the library is not installed.
    """
    with _library() as library:
        try:
            return library.load_dataset(repository, split=split)
        except Exception as error:  # no network, no such data set, no space, a broken cache: each an error of its own
            raise BecameError(
                f"{repository} cannot be read from the Hugging Face hub ({_reason(error)}): "
                "check the connection, or name by --data-dir a folder that holds it (docs/runs.md has its layout)."
            ) from error


@contextmanager
def _library() -> Iterator[ModuleType]:
    """Yield ``datasets``, silent: what went wrong is told once, in the exception, and progress by whoever calls."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise BecameError("this data set is read with the package datasets: run `pip install datasets`.") from error
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = not datasets.are_progress_bars_disabled()
    try:
        datasets.disable_progress_bars()
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield datasets
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _reason(error: BaseException) -> str:
    """The innermost cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
