"""Scalars for Trackio: the project has the name of the comparison's folder, and a run the name of its own folder.

Trackio stores them on this machine, ``trackio show`` shows them, and its environment variables, such as
TRACKIO_SPACE_ID, send them elsewhere. What Trackio prints on standard output goes to standard error, because a program
may read our standard output.
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
            trackio.finish()


def open_writer(folder: Path) -> _Trackio:
    """Return the writer of the run in a folder."""
    return _Trackio(folder)
