"""miniImageNet in every layout: one data set of all, the published hold-out, one sentence for what is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.benchmarks import miniimagenet
from adapters.benchmarks.miniimagenet import load_miniimagenet
from adapters.benchmarks.parquet import Columns
from became_core.errors import BecameError
from tests.benchmarks.pictures import encoded, shades, write_parquet

SIZE = 6  # instead of 84: the layouts are what is tested
PER_CLASS = 6
IMAGES = shades(100 * PER_CLASS, SIZE)
LABELS = np.repeat(np.arange(100), PER_CLASS)
LAST = np.arange(len(LABELS)) % PER_CLASS == PER_CLASS - 1  # what is held out of each class
Layout = Callable[[Path, str, NDArray[np.bool_]], None]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miniimagenet, "_SIZE", SIZE)
    monkeypatch.setattr(miniimagenet, "_COLUMNS", Columns("image", "label", SIZE, 100))


def as_parquet(root: Path, part: str, rows: NDArray[np.bool_]) -> None:
    images = [encoded(image) for image in IMAGES[rows]]
    write_parquet(root / "mini-imagenet" / f"{part}-00000-of-00001.parquet", images, LABELS[rows].tolist())


def as_npz(root: Path, part: str, rows: NDArray[np.bool_]) -> None:
    (root / "mini-imagenet").mkdir(exist_ok=True)
    np.savez(root / "mini-imagenet" / f"{part}.npz", images=IMAGES[rows], labels=LABELS[rows])


def as_npy(root: Path, part: str, rows: NDArray[np.bool_]) -> None:
    (root / "mini-imagenet").mkdir(exist_ok=True)
    np.save(root / "mini-imagenet" / f"{part}-images.npy", IMAGES[rows])
    np.save(root / "mini-imagenet" / f"{part}-labels.npy", LABELS[rows].astype(np.uint8))


def as_folders(root: Path, part: str, rows: NDArray[np.bool_]) -> None:
    for row in np.flatnonzero(rows):
        folder = root / "mini-imagenet" / part / f"n{LABELS[row]:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row:08d}.png").write_bytes(encoded(IMAGES[row]))


LAYOUTS = pytest.mark.parametrize("layout", [as_parquet, as_npz, as_npy, as_folders])
EVERY = np.ones(len(LABELS), dtype=bool)


def check_that_the_last_of_each_class_are_held_out(root: Path) -> None:
    dataset = load_miniimagenet(root)
    assert dataset.train_size == 500
    np.testing.assert_array_equal(dataset.labels, [*LABELS[~LAST], *LABELS[LAST]])
    pixels = np.concatenate([IMAGES[~LAST], IMAGES[LAST]]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(dataset.images, pixels)


@LAYOUTS
def test_of_one_part_the_last_sixth_of_each_class_is_held_out(layout: Layout, tmp_path: Path) -> None:
    layout(tmp_path, "train", EVERY)
    check_that_the_last_of_each_class_are_held_out(tmp_path)


@LAYOUTS
def test_parts_of_few_shot_learning_are_joined_and_split_alike(layout: Layout, tmp_path: Path) -> None:
    layout(tmp_path, "train", LABELS < 64)
    layout(tmp_path, "val", (LABELS >= 64) & (LABELS < 80))
    layout(tmp_path, "test", LABELS >= 80)
    check_that_the_last_of_each_class_are_held_out(tmp_path)


@LAYOUTS
def test_parts_of_continual_learning_are_taken_as_they_are(layout: Layout, tmp_path: Path) -> None:
    first = np.arange(len(LABELS)) % PER_CLASS == 0
    layout(tmp_path, "train", ~first)
    layout(tmp_path, "test", first)
    dataset = load_miniimagenet(tmp_path)
    assert dataset.train_size == 500
    np.testing.assert_array_equal(dataset.labels, [*LABELS[~first], *LABELS[first]])
    np.testing.assert_array_equal(dataset.images[500:], IMAGES[first].transpose(0, 3, 1, 2))


def test_the_published_classes_are_split_500_to_100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miniimagenet, "_SIZE", 1)
    (tmp_path / "mini-imagenet").mkdir()
    labels, images = np.tile(np.arange(100), 600), np.zeros((60_000, 1, 1, 3), np.uint8)
    images[::2] = 255  # a data set of one colour has no deviation to be divided by
    np.savez(tmp_path / "mini-imagenet" / "train.npz", images=images, labels=labels)
    dataset = load_miniimagenet(tmp_path)
    assert np.bincount(dataset.labels[:50_000]).tolist() == [500] * 100
    assert np.bincount(dataset.labels[50_000:]).tolist() == [100] * 100


@pytest.mark.parametrize("channels", [(), (1,)])
def test_greyscale_arrays_become_rgb(channels: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "mini-imagenet").mkdir()
    grey = np.random.default_rng(0).integers(0, 256, (600, SIZE, SIZE, *channels), dtype=np.uint8)
    np.savez(tmp_path / "mini-imagenet" / "train.npz", images=grey, labels=LABELS)
    expected = np.broadcast_to(grey.reshape(600, 1, SIZE, SIZE), (600, 3, SIZE, SIZE))
    np.testing.assert_array_equal(load_miniimagenet(tmp_path).images, np.concatenate([expected[~LAST], expected[LAST]]))


def test_without_a_folder_it_says_who_obtains_the_images(tmp_path: Path) -> None:
    with pytest.raises(BecameError, match=r"licence asks everyone to obtain it themselves: name by --data-dir"):
        load_miniimagenet(None)
    with pytest.raises(BecameError, match=r"no folder .*mini-imagenet: name by --data-dir the folder"):
        load_miniimagenet(tmp_path)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "mini-imagenet").mkdir()
    (tmp_path / "mini-imagenet" / "train.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(BecameError, match=r"no part that can be read: .*pickle files never are: save their arrays as"):
        load_miniimagenet(tmp_path)


class Exploding:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("an object was unpickled",))


@pytest.mark.parametrize("name", ["train.npz", "train-images.npy"])
def test_pickled_objects_in_an_archive_are_refused(name: str, tmp_path: Path) -> None:
    as_npy(tmp_path, "train", EVERY)
    file = tmp_path / "mini-imagenet" / name
    objects = np.array([Exploding()], dtype=object)
    if name.endswith("npz"):
        np.savez(file, images=objects, labels=LABELS)
    else:
        np.save(file, objects)
    with pytest.raises(BecameError, match=f"{file.name} is damaged or holds pickled objects, which are never read"):
        load_miniimagenet(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.999])
@pytest.mark.parametrize("layout", [as_npz, as_npy])
def test_a_truncated_archive_is_named(layout: Layout, kept: float, tmp_path: Path) -> None:
    layout(tmp_path, "train", EVERY)
    file = next(file for file in (tmp_path / "mini-imagenet").iterdir() if "labels" not in file.name)
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(BecameError, match=f"{file.name} is damaged"):
        load_miniimagenet(tmp_path)


@pytest.mark.parametrize("place", np.linspace(0, 0.999, 25).round(3).tolist())
def test_a_flipped_byte_of_a_zipped_archive_never_changes_a_pixel_silently(place: float, tmp_path: Path) -> None:
    as_npz(tmp_path, "train", EVERY)
    file = tmp_path / "mini-imagenet" / "train.npz"
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 0xFF
    file.write_bytes(content)
    try:
        dataset = load_miniimagenet(tmp_path)
    except BecameError as error:
        assert file.name in str(error)  # noqa: PT017 (whether it raises depends on whether the byte means anything)
    else:
        np.testing.assert_array_equal(dataset.images[:500], IMAGES[~LAST].transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, r"train\.npz has no array 'labels'; its arrays are images"),
        ({"images": IMAGES[:-1], "labels": LABELS}, "holds 599 images but .* 600 labels"),
        ({"images": IMAGES[:, :4], "labels": LABELS}, r"is uint8 \(600, 4, 6, 3\); it must be uint8 \[N, 6, 6, 3\]"),
        ({"images": IMAGES / 255, "labels": LABELS}, r"is float64 .*; it must be uint8"),
        ({"images": IMAGES, "labels": LABELS / 1}, r"is float64 \(600,\); it must be integers \[N\]"),
        ({"images": IMAGES, "labels": LABELS % 64}, r"have 64 classes in all; they must have 100"),
        ({"images": IMAGES[::6], "labels": LABELS[::6]}, "the last sixth of each class .* holds no image of 100 of"),
    ],
)
def test_an_archive_of_other_arrays_is_refused(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "mini-imagenet").mkdir()
    np.savez(tmp_path / "mini-imagenet" / "train.npz", **arrays)
    with pytest.raises(BecameError, match=message):
        load_miniimagenet(tmp_path)


def test_a_file_without_its_pair_is_named(tmp_path: Path) -> None:
    as_npy(tmp_path, "train", EVERY)
    (tmp_path / "mini-imagenet" / "train-labels.npy").unlink()
    with pytest.raises(BecameError, match=r"no file .*train-labels\.npy, which belongs to"):
        load_miniimagenet(tmp_path)


def test_parts_that_share_some_classes_are_refused(tmp_path: Path) -> None:
    as_npz(tmp_path, "train", EVERY)
    as_npz(tmp_path, "test", LABELS < 50)
    with pytest.raises(BecameError, match="share some of their classes but not all"):
        load_miniimagenet(tmp_path)


def test_parts_of_two_kinds_of_labels_are_refused(tmp_path: Path) -> None:
    as_npz(tmp_path, "train", LABELS < 64)
    as_folders(tmp_path, "test", LABELS >= 64)
    with pytest.raises(BecameError, match="classes by name and parts with classes by number"):
        load_miniimagenet(tmp_path)


def test_an_empty_class_folder_and_a_wrong_size_are_named(tmp_path: Path) -> None:
    as_folders(tmp_path, "train", EVERY)
    folder = tmp_path / "mini-imagenet" / "train"
    (folder / "n00000007" / "00000042.png").write_bytes(encoded(IMAGES[0, :, :3]))
    with pytest.raises(BecameError, match=r"00000042\.png is 3×6 pixels; every image must be 6×6"):
        load_miniimagenet(tmp_path)
    (folder / "n00000007a").mkdir()
    with pytest.raises(BecameError, match=r"n00000007a holds no images"):
        load_miniimagenet(tmp_path)
