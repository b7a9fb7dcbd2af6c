"""Scalars as TensorBoard's event files, beside the run's other files: ``tensorboard --logdir OUT`` shows all runs.

A run that goes on adds a file, which tells TensorBoard to drop what older files have of later steps.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams

__all__ = ["open_writer"]


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self, hyperparameters: Mapping[str, str | int | float | bool], step: int) -> None:
        # A file's own name has the second alone, and one of that name would be written over.
        suffix = f".{os.getpid()}.{step}"
        purge = {"purge_step": step + 1} if step else {}
        self._writer = SummaryWriter(logdir=str(self._folder), filename_suffix=suffix, **purge)
        if not step:
            for summary in hparams(dict(hyperparameters), {}):
                self._writer.file_writer.add_summary(summary)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def end(self) -> None:
        self._writer.close()


def open_writer(folder: Path) -> _TensorBoard:
    """Return the writer of the run in a folder."""
    return _TensorBoard(folder)
