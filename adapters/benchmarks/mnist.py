"""The embedded benchmarks: 5,000 real MNIST digits, 500 of each, in ``mnist_5k.npz`` beside this file.

Convention: the split is 80/20 within each digit, drawn once for all runs, so every run sees the same test images;
within a part, rows keep the order of the file. ``mnist_5k.md`` has the file's origin and licences.
"""

import hashlib
import io
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from adapters.benchmarks.assembly import Part, assemble
from became_core.continual.data import Dataset
from became_core.continual.rng import random_generator
from became_core.curvature import ELBO
from became_core.errors import BecameError

__all__ = ["load_mnist", "load_mnist_to_draw"]

LATENT = 16  # numbers of noise of a sample, as the network vae has latent numbers

_FILE = files("adapters.benchmarks") / "mnist_5k.npz"
_SHA256 = "246e0c30eeea57c8d0037d3f38c8e00651ec204cc61b8022563e9aeeb9d756f4"
_TRAIN_FRACTION = 0.8


def load_mnist(data_dir: Path | None = None) -> Dataset:  # noqa: ARG001 # a loader is given it
    """Return 5,000 digits of MNIST: uint8 [5000, 1, 28, 28], 4,000 training rows and then 1,000 test rows.

    Args:
        data_dir: of no use, since they come with this package.

    Raises:
        BecameError: if the file of digits is missing or damaged.
    """
    images, labels = _read_digits()
    train = np.zeros(len(labels), dtype=bool)
    for digit in np.unique(labels):
        rows = random_generator(0, "mnist split", int(digit)).permutation(np.flatnonzero(labels == digit))
        train[rows[: round(_TRAIN_FRACTION * len(rows))]] = True
    return assemble("mnist", (images[train], labels[train]), (images[~train], labels[~train]))


def load_mnist_to_draw(data_dir: Path | None = None) -> Dataset:  # noqa: ARG001 # a loader is given it
    """Return digits of MNIST, to be encoded and drawn again: a domain is two digits, 0 and 1 the first.

    A sample is 784 pixels, each 0 or 1 (1 where there is more ink than half), and 16 numbers of standard normal noise,
    [800, 1, 1]; what is to be predicted are the pixels.

    Args:
        data_dir: of no use, since they come with this package.

    Raises:
        BecameError: if the file of digits is missing or damaged.
    """
    digits = load_mnist()
    pixels: Any = (digits.images.reshape(len(digits.images), -1) > 127).astype(np.float32)
    noise = random_generator(0, "latent noise").standard_normal((len(pixels), LATENT)).astype(np.float32)
    samples = np.concatenate([pixels, noise], axis=1)
    width = samples.shape[1]
    return Dataset(
        name="split-mnist-vae",
        images=samples[:, :, None, None],
        labels=pixels,
        train_size=digits.train_size,
        mean=(0.0,) * width,
        std=(1.0,) * width,
        likelihood=ELBO(),
        domains=digits.labels // 2,
        pictures=(28, 28),
    )


def _read_digits() -> Part:
    try:
        content = _FILE.read_bytes()
    except OSError as error:
        raise BecameError(f"cannot read {_FILE}: {error.strerror}; install the package became again.") from None
    if hashlib.sha256(content).hexdigest() != _SHA256:
        raise BecameError(f"{_FILE} is damaged; install the package became again.")
    with np.load(io.BytesIO(content)) as arrays:
        return arrays["images"].reshape(-1, 1, 28, 28), arrays["labels"].astype(np.int64)
