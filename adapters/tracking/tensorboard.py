"""Scalars as TensorBoard's event files, beside the run's other files: ``tensorboard --logdir OUT`` shows all runs.

A resumed run adds a file, which tells TensorBoard to drop the later steps of older files.
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
        # Without a suffix, two files that begin in the same second would have one name, and one would be lost.
        suffix = f".{os.getpid()}.{step}"
        purge = {"purge_step": step + 1} if step else {}
        self._writer = SummaryWriter(logdir=str(self._folder), filename_suffix=suffix, flush_secs=1, **purge)
        if not step:
            for summary in hparams(dict(hyperparameters), {}):
                self._writer.file_writer.add_summary(summary)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def end(self) -> None:
        self._writer.close()


def open_writer(folder: Path) -> _TensorBoard:
    """Return the writer of the run in a folder."""
    return _TensorBoard(folder)
