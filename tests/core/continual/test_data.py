"""Task streams: every row is in one part of one task. Views: images are padded, cropped and flipped."""

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core import BecameError
from became_core.continual import Augmentation, Views, random_generator
from became_core.continual.data import Dataset, TaskStream, chunks
from became_core.continual.splits import measured_on, permute_pixels, scored_on, split_classes
from reference.learner import cropped
from tests.backends import to_numpy, to_xp
from tests.strategies import few_if_compiled
from tests.streams import prototype_stream, text_stream

SHAPES = [(tasks, classes) for classes in (1, 4, 6, 10, 12) for tasks in range(1, classes + 1) if classes % tasks == 0]


def make_dataset(classes: int, train: int = 40, test: int = 20) -> Dataset:
    """Return a data set with rows in random order, classes of unequal sizes, and every class in both parts."""
    draw = np.random.default_rng(classes)
    labels = [
        draw.permutation(np.concatenate([np.arange(classes), draw.integers(0, classes, size - classes)]))
        for size in (train, test)
    ]
    return Dataset(
        name="toy",
        images=np.zeros((train + test, 1, 2, 2), dtype=np.uint8),
        labels=np.concatenate(labels).astype(np.int64),
        train_size=train,
        mean=(0.5,),
        std=(0.5,),
    )


def rows(stream: TaskStream, *parts: str) -> list[int]:
    return [int(row) for task in stream.tasks for part in parts for row in getattr(task, part)]


@given(st.sampled_from(SHAPES), st.floats(0, 0.5), st.integers(0, 2**32 - 1))
def test_every_row_is_in_one_part_of_one_task(shape: tuple[int, int], validation: float, seed: int) -> None:
    dataset = make_dataset(shape[1])
    stream = split_classes(dataset, shape[0], validation=validation, seed=seed)
    assert sorted(rows(stream, "train", "validation")) == list(range(40))
    assert sorted(rows(stream, "test")) == list(range(40, 60))


@given(st.sampled_from(SHAPES), st.randoms(use_true_random=False))
def test_tasks_have_their_classes_in_the_wanted_order(shape: tuple[int, int], random: Random) -> None:
    dataset = make_dataset(shape[1])
    order = list(range(shape[1]))
    random.shuffle(order)
    stream = split_classes(dataset, shape[0], class_order=order)
    assert [label for task in stream.tasks for label in task.classes] == order
    for index, task in enumerate(stream.tasks):
        assert task.index == index
        for part in (task.train, task.validation, task.test):
            assert set(dataset.labels[part].tolist()) <= set(task.classes)
            # A target is a place in the task's own list of classes.
            np.testing.assert_array_equal(np.asarray(task.classes)[stream.targets[part]], dataset.labels[part])


def test_classes_are_in_label_order_by_default() -> None:
    stream = split_classes(make_dataset(6), 3)
    assert [task.classes for task in stream.tasks] == [(0, 1), (2, 3), (4, 5)]


@given(st.floats(0, 0.7))
def test_the_validation_fraction_is_of_each_tasks_training_rows(validation: float) -> None:
    for task in split_classes(make_dataset(6), 3, validation=validation).tasks:
        assert len(task.validation) == round(validation * (len(task.train) + len(task.validation)))


def test_validation_rows_are_drawn_across_the_task_and_by_seed() -> None:
    dataset = make_dataset(4, train=400)
    first, again, other = (split_classes(dataset, 2, validation=0.25, seed=seed) for seed in (0, 0, 1))
    for task, same, different in zip(first.tasks, again.tasks, other.tasks, strict=True):
        np.testing.assert_array_equal(task.validation, same.validation)
        assert not np.array_equal(task.validation, different.validation)
        np.testing.assert_array_equal(task.test, different.test)
        # Neither a head nor a tail of the rows: both halves of the training part give some.
        assert task.validation.min() < 200 <= task.validation.max()
        assert set(dataset.labels[task.validation].tolist()) == set(task.classes)


@pytest.mark.parametrize("tasks", [0, -2, 4, 7, 12])
def test_a_number_of_tasks_that_does_not_divide_the_classes_is_an_error(tasks: int) -> None:
    with pytest.raises(BecameError, match=f"{tasks} tasks do not divide the 6 classes of toy"):
        split_classes(make_dataset(6), tasks)


@pytest.mark.parametrize("validation", [-0.1, 1.0, 1.5, float("nan")])
def test_a_validation_fraction_outside_zero_to_one_is_an_error(validation: float) -> None:
    with pytest.raises(BecameError, match=f"the validation fraction is {validation}; it must be"):
        split_classes(make_dataset(6), 3, validation=validation)


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 3, 4, 4], [1, 2, 3, 4, 5, 6], list(range(7))])
def test_a_class_order_that_is_no_permutation_is_an_error(order: list[int]) -> None:
    with pytest.raises(BecameError, match="not a permutation of the 6 classes of toy"):
        split_classes(make_dataset(6), 3, class_order=order)


def test_a_seeded_class_order_is_a_permutation_drawn_by_the_seed() -> None:
    dataset = make_dataset(12)
    orders = [
        [label for task in split_classes(dataset, 3, seed=seed, class_order="seeded").tasks for label in task.classes]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(12)) != orders[0]


def images_of(classes: int, channels: int = 3) -> Dataset:
    draw = np.random.default_rng(0)
    dataset = make_dataset(classes)
    images = draw.integers(0, 256, (60, channels, 4, 5), dtype=np.uint8)
    return replace(dataset, images=images, mean=(0.5,) * channels, std=(0.5,) * channels)


def test_every_permuted_task_holds_every_image_with_its_pixels_in_one_order() -> None:
    plain = images_of(4)
    stream = split_classes(permute_pixels(plain, 3), 3, validation=0)
    assert [len(task.classes) for task in stream.tasks] == [4] * len(stream.tasks)
    orders = []
    for task in stream.tasks:
        for part, expected in ((task.train, slice(0, 40)), (task.test, slice(40, 60))):
            np.testing.assert_array_equal(stream.targets[part], plain.labels[expected])
        images = stream.dataset.images[np.concatenate([task.train, task.test])].reshape(180, 20)
        # Random bytes: a pixel's history over all images and channels is its name.
        names = [column.tobytes() for column in plain.images.reshape(180, 20).T]
        orders.append([names.index(column.tobytes()) for column in images.T])
    assert orders[0] == list(range(20))
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_permutations_are_the_same_in_every_run_and_for_any_number_of_tasks() -> None:
    two, three = (permute_pixels(images_of(4), tasks) for tasks in (2, 3))
    np.testing.assert_array_equal(two.images[:80], three.images[:80])
    assert three.train_size == 120
    assert (three.mean, three.std) == (images_of(4).mean, images_of(4).std)


def test_zero_permuted_tasks_are_an_error() -> None:
    with pytest.raises(BecameError, match="0 tasks of permuted pixels"):
        permute_pixels(images_of(4), 0)


@given(
    sizes=few_if_compiled(
        st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), st.integers(1, 4)),
        [(1, 1, 1, 1), (3, 2, 3, 4), (2, 1, 4, 1)],
    ),
    far=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_views_are_padded_cropped_and_flipped_images(
    xp: Any, sizes: tuple[int, int, int, int], far: int, seed: int
) -> None:
    """Of sizes [images, channels, height, width]."""
    draw, count = np.random.default_rng(seed), sizes[0]
    images = draw.integers(1, 256, sizes, dtype=np.uint8)  # nothing in them is black
    views = Views(draw.integers(-far, far + 1, (count, 2)), draw.integers(0, 2, count).astype(bool))
    expected = cropped(images, views)
    channels_first = views.apply(to_xp(xp, images), axis=2)
    channels_last = views.apply(to_xp(xp, np.moveaxis(images, 1, -1).copy()), axis=1)
    assert channels_first.dtype == xp.uint8
    np.testing.assert_array_equal(to_numpy(channels_first), expected)
    np.testing.assert_array_equal(to_numpy(channels_last), np.moveaxis(expected, 1, -1))


def test_one_view_computed_by_hand(xp: Any) -> None:
    image = np.array([[[[1, 2, 3], [4, 5, 6]]]], dtype=np.uint8)
    down_left = Views(np.array([[1, -1]]), np.array([False]))
    np.testing.assert_array_equal(to_numpy(down_left.apply(to_xp(xp, image), axis=2)), [[[[0, 4, 5], [0, 0, 0]]]])
    flipped = Views(np.array([[1, -1]]), np.array([True]))  # after the crop
    np.testing.assert_array_equal(to_numpy(flipped.apply(to_xp(xp, image), axis=2)), [[[[5, 4, 0], [0, 0, 0]]]])


def test_all_offsets_are_equally_likely_and_half_of_the_images_are_flipped() -> None:
    views = Augmentation(padding=2).draw(20_000, np.random.default_rng(0))
    for offsets in views.offsets.T:
        np.testing.assert_array_equal(np.unique(offsets), [-2, -1, 0, 1, 2])
        np.testing.assert_allclose(np.bincount(offsets + 2) / 20_000, 0.2, atol=0.015)
    assert np.mean(views.flips) == pytest.approx(0.5, abs=0.015)
    assert abs(np.corrcoef(views.offsets[:, 0], views.offsets[:, 1])[0, 1]) < 0.03


def test_without_flips_nothing_is_flipped_and_offsets_are_the_same() -> None:
    views, unflipped = (Augmentation(flips=flips).draw(50, np.random.default_rng(0)) for flips in (True, False))
    np.testing.assert_array_equal(views.offsets, unflipped.offsets)
    assert views.flips.any()
    assert not unflipped.flips.any()


def test_a_negative_padding_is_an_error() -> None:
    with pytest.raises(BecameError, match="padding is -1 pixels"):
        Augmentation(padding=-1)


def small(**changes: Any) -> Dataset:
    """Eight images of two channels, of four classes that are in both parts, with something changed."""
    images = np.random.default_rng(0).integers(0, 256, (8, 2, 3, 4), dtype=np.uint8)
    fields: dict[str, Any] = {
        "images": images,
        "labels": [0, 1, 2, 3, 0, 1, 2, 3],
        "train_size": 4,
        "mean": (0.5, 0.5),
        "std": (0.3, 0.3),
    }
    return Dataset(name="small", **(fields | changes))


PIXELS = small().images

# By what is wrong with them: what a data set is made of, and what the message says.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "channels last": (
        {"images": np.moveaxis(PIXELS, 1, -1)},
        r"channels come first, as numpy\.moveaxis\(images, -1, 1\)",
    ),
    "a table": ({"images": PIXELS[:, :, 0, 0]}, r"a table \[N, d\] is images \[N, d, 1, 1\]"),
    "no channels": ({"images": PIXELS[:, 0]}, r"they must be \[N, C, H, W\]"),
    "other channels": ({"mean": (0.5,), "std": (0.3,)}, r"are \[8, 2, 3, 4\] and have 1 means of channels"),
    "integers": ({"images": PIXELS.astype(np.int64)}, r"are int64; give pixels as uint8, 0 to 255, or floating point"),
    "booleans": ({"images": PIXELS > 9}, r"are bool; give pixels as uint8"),
    "statistics of 0..255": (
        {"mean": (127.0, 127.0), "std": (70.0, 70.0)},
        r"scaled to \[0, 1\], so divide them by 255",
    ),
    "a mean below 0": ({"mean": (-0.5, 0.5)}, r"scaled to \[0, 1\]"),
    "no deviation": ({"std": (0.3, 0.0)}, r"deviations above 0"),
    "a mean that is no number": ({"mean": (0.5, np.nan)}, r"give a finite number of each"),
    "one deviation": ({"std": (0.3,)}, r"give a finite number of each for every channel"),
    "pixels as floats": ({"images": PIXELS.astype(np.float32)}, r"give those of the samples as they are"),
    "a float that is none": ({"images": np.full((8, 2, 3, 4), np.nan)}, r"have a number that is not finite"),
    "more labels": ({"labels": [0, 1, 2, 3] * 3}, r"has 8 samples and labels \[12\]; give one label a sample"),
    "fewer labels": ({"labels": [0, 1, 2, 3]}, r"has 8 samples and labels \[4\]"),
    "one-hot labels": ({"labels": np.eye(8, dtype=np.int64)}, r"has 8 samples and labels \[8, 8\]"),
    "labels as floats": ({"labels": np.arange(8.0)}, r"the labels of small are float64; they must be integers"),
    "a negative label": ({"labels": [-1, 1, 2, 3] * 2}, r"has the label -1; labels go from 0"),
    "no training images": ({"train_size": 0}, r"has 0 training samples among 8"),
    "too many of them": ({"train_size": 9}, r"has 9 training samples among 8"),
    "a gap": ({"labels": [0, 1, 3, 3] * 2}, r"has no training samples of class 2; labels must go from 0"),
    "a class in the test part alone": ({"labels": [0, 1, 2, 2, 0, 1, 2, 3]}, r"no training samples of class 3"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_a_data_set_that_contradicts_itself_is_refused(wrong: str) -> None:
    changes, message = REFUSED[wrong]
    with pytest.raises(BecameError, match=message):
        split_classes(small(**changes), 2)


# Changes of a stream of two tasks with two classes each, which is made of ``small``.
STREAMS: dict[str, tuple[Callable[[TaskStream], TaskStream], str]] = {
    "no tasks": (lambda stream: replace(stream, tasks=()), "is split into no tasks"),
    "no training rows": (lambda stream: part_of(stream, train=[]), "task 2 of small has no train samples"),
    "no test rows": (lambda stream: part_of(stream, test=np.zeros(0)), "task 2 of small has no test samples"),
    "rows beyond": (lambda stream: part_of(stream, train=[2, 8]), "has train rows beyond the 8 samples"),
    "negative rows": (lambda stream: part_of(stream, test=[-1]), "has test rows beyond the 8 samples"),
    "masks for rows": (lambda stream: part_of(stream, train=np.ones(8, bool)), "the train rows .* are bool"),
    "a wrong order": (lambda stream: replace(stream, tasks=stream.tasks[::-1]), "has the index 1; it must be 0"),
    "fewer targets": (lambda stream: replace(stream, targets=stream.targets[:4]), r"has 8 samples and targets \[4\]"),
    "targets as floats": (lambda stream: replace(stream, targets=np.asarray(stream.targets / 1)), "are float64"),
    "targets of all classes": (
        lambda stream: replace(stream, targets=stream.dataset.labels),
        "task 2 of small has 2 classes, and a sample with the target 2; targets go from 0 to 1",
    ),
    "classes that are too few": (lambda stream: part_of(stream, classes=(2,)), "has 1 classes, and .* the target 1"),
}


def part_of(stream: TaskStream, **changes: Any) -> TaskStream:
    return replace(stream, tasks=(stream.tasks[0], replace(stream.tasks[1], **changes)))


@pytest.mark.parametrize("wrong", STREAMS)
def test_a_stream_that_contradicts_itself_is_refused(wrong: str) -> None:
    change, message = STREAMS[wrong]
    with pytest.raises(BecameError, match=message):
        change(split_classes(small(), 2, validation=0.0))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int64])
def test_integers_of_any_size_are_labels_targets_and_rows(dtype: type) -> None:
    expected = split_classes(small(), 2, validation=0.0)
    stream = split_classes(small(labels=np.asarray(expected.dataset.labels, dtype)), 2, validation=0.0)
    stream = replace(part_of(stream, train=stream.tasks[1].train.astype(dtype)), targets=stream.targets.astype(dtype))
    assert stream.dataset.labels.dtype == stream.targets.dtype == stream.tasks[1].train.dtype == np.int64
    np.testing.assert_array_equal(stream.targets, expected.targets)
    np.testing.assert_array_equal(stream.tasks[1].train, expected.tasks[1].train)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_images_may_be_numbers_in_their_own_unit(dtype: type) -> None:
    assert small().unit == 255
    images: Any = (1000 + 5 * np.random.default_rng(0).normal(size=(8, 2, 3, 4))).astype(dtype)
    dataset = small(images=images, mean=(1000.0, 1000.0), std=(5.0, 5.0))
    assert dataset.unit == 1
    assert dataset.images.dtype == dtype
    with pytest.raises(BecameError, match="give those of the samples as they are"):
        small(images=images, mean=(0.5, 0.5), std=(0.25, 0.25))


def test_a_test_row_far_from_all_others_is_no_wrong_statistic() -> None:
    images: Any = np.random.default_rng(0).normal(size=(8, 2, 3, 4)).astype(np.float32)
    images[-1] = 1e6
    assert small(images=images, mean=(0.0, 0.0), std=(1.0, 1.0)).unit == 1
    images[0] = 1e6
    with pytest.raises(BecameError, match="give those of the samples as they are"):
        small(images=images, mean=(0.0, 0.0), std=(1.0, 1.0))


@given(st.integers(2, 60), st.integers(1, 20))
def test_chunks_are_in_order_and_none_is_of_one(count: int, size: int) -> None:
    parts = chunks(np.arange(count), size)
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(count))
    sizes = [len(part) for part in parts]
    assert min(sizes) > 1
    assert set(sizes[:-1]) <= {max(size, 2)}
    assert sizes[-1] <= max(size, 2) + 1
    assert [len(part) for part in chunks(np.arange(1), size)] == [1]


def test_curvature_of_validation_is_measured_on_the_held_out_rows() -> None:
    stream = prototype_stream(tasks=2, validation=0.2)
    for before, after in zip(stream.tasks, measured_on(stream, "validation").tasks, strict=True):
        assert after.curvature is not None
        np.testing.assert_array_equal(after.curvature, before.validation)
        np.testing.assert_array_equal(after.train, before.train)
    assert measured_on(stream, "training") is stream


@pytest.mark.parametrize("samples", [None, 5])
def test_augmented_samples_are_copies_of_training_images_that_are_no_rows_of_any_task(samples: int | None) -> None:
    stream = prototype_stream(tasks=2, validation=0.2)
    wider = measured_on(stream, "augmented", seed=3, samples=samples)
    rows, size = len(stream.dataset.images), 0
    np.testing.assert_array_equal(wider.dataset.images[:rows], stream.dataset.images)
    for before, after in zip(stream.tasks, wider.tasks, strict=True):
        assert after.curvature is not None
        assert after.curvature.min() == rows + size
        size += len(after.curvature)
        assert len(after.curvature) == (len(before.train) if samples is None else samples)
        originals = random_generator(3, "curvature", before.index).permutation(before.train)[:samples]
        views = Augmentation().draw(len(originals), random_generator(3, "curvature-views", before.index))
        np.testing.assert_array_equal(
            wider.dataset.images[after.curvature], cropped(stream.dataset.images[originals], views)
        )
        np.testing.assert_array_equal(wider.targets[after.curvature], stream.targets[originals])
        np.testing.assert_array_equal(wider.dataset.labels[after.curvature], stream.dataset.labels[originals])
        for part in ("train", "validation", "test"):
            np.testing.assert_array_equal(getattr(after, part), getattr(before, part))
    assert len(wider.dataset.images) == rows + size
    assert wider.dataset.train_size == stream.dataset.train_size


def test_curvature_cannot_be_measured_on_samples_that_there_are_not() -> None:
    with pytest.raises(BecameError, match=r"^task 1 of prototypes has no held-out samples to measure curvature on; "):
        measured_on(prototype_stream(tasks=2, validation=0.0), "validation")
    with pytest.raises(BecameError, match=r"^task 1 of prototypes has no held-out samples to score models on; give a "):
        scored_on(prototype_stream(tasks=2, validation=0.0), "validation")
    with pytest.raises(BecameError, match=r"^text is not cropped and flipped, so curvature cannot be measured on "):
        measured_on(text_stream(), "augmented")
    stream = prototype_stream(tasks=2)
    beyond = replace(stream.tasks[0], curvature=np.asarray([10**6]))
    with pytest.raises(BecameError, match=r"^task 1 of prototypes has curvature rows beyond the \d+ samples\.$"):
        replace(stream, tasks=(beyond, stream.tasks[1]))
