"""What a command says beside its output: the logger ``became`` and Python's warnings, on standard error."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

__all__ = ["LOGGER", "Level", "logged"]

LOGGER = logging.getLogger("became")

Level = Literal["debug", "info", "warning", "error"]


class _StandardError(logging.Handler):
    """Writes to what standard error is at the time: a progress bar, and a test, put themselves in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


@contextmanager
def logged(level: Level) -> Iterator[None]:
    """Let messages of a level and of graver ones be seen, warnings among them, for the time of this context."""
    handler, usual = _StandardError(), LOGGER.level

    def warn(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: object = None,  # noqa: ARG001 # what it stands in for fixes the signature
        line: object = None,  # noqa: ARG001
    ) -> None:
        LOGGER.warning("%s", message)
        LOGGER.debug("that is a %s, from %s:%d", category.__name__, filename, lineno)

    LOGGER.addHandler(handler)
    LOGGER.setLevel(level.upper())
    try:
        with warnings.catch_warnings():
            warnings.showwarning = warn
            yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(usual)
