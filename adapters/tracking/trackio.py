"""Scalars to Trackio: the project is called as the comparison's folder, a run as its own.

Trackio keeps them on this machine, ``trackio show`` shows them, and its own environment variables (TRACKIO_SPACE_ID, …)
send them elsewhere. What it says on standard output goes to standard error, since ours may be read by a program.
"""

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trackio

__all__ = ["open_writer"]


class _Trackio:
    def __init__(self, folder: Path) -> None:
        self._project, self._name = folder.parent.resolve().name, folder.name
        self._run: Any = None

    def begin(self, hyperparameters: Mapping[str, str | int | float | bool], step: int) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=self._project,
                name=self._name,
                config=dict(hyperparameters),
                resume="allow" if step else "never",
                embed=False,
            )

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def end(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


def open_writer(folder: Path) -> _Trackio:
    """Return the writer of the run in a folder."""
    return _Trackio(folder)
