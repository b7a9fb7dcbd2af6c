"""TinyImageNet: two layouts that give one data set, and one sentence for every way in which either can be wrong."""

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest

from adapters.benchmarks.tinyimagenet import load_tinyimagenet
from became_core.errors import BecameError
from tests.benchmarks.pictures import (
    TINY_NAMES,
    TINY_TRAIN,
    TINY_VALID,
    encoded,
    write_parquet,
    write_tiny_hub,
    write_tiny_zip,
)

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    roots = {name: tmp_path_factory.mktemp(name) for name in ("hub", "zip")}
    write_tiny_hub(roots["hub"])
    write_tiny_zip(roots["zip"])
    return roots


@pytest.mark.parametrize("layout", ["hub", "zip"])
def test_either_layout_gives_all_images_in_order_with_labels_in_the_order_of_names(
    layouts: dict[str, Path], layout: str
) -> None:
    dataset = load_tinyimagenet(layouts[layout])
    assert dataset.train_size == 400
    np.testing.assert_array_equal(dataset.images, np.concatenate([TINY_TRAIN, TINY_VALID]).transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(dataset.labels, [*np.repeat(np.arange(200), 2), *range(200)])
    assert dataset.labels.dtype == np.int64


def test_the_hub_gives_what_its_layout_gives(layouts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = layouts["hub"] / "zh-plus" / "tiny-imagenet" / "data"

    def hub(repository: str, *, split: str) -> datasets.Dataset:
        assert repository == "zh-plus/tiny-imagenet"
        return datasets.Dataset.from_parquet(
            str(folder / f"{split}-00000-of-00001.parquet"), cache_dir=str(layouts["hub"] / "cache")
        )

    monkeypatch.setattr(datasets, "load_dataset", hub)
    np.testing.assert_array_equal(load_tinyimagenet(None).images, load_tinyimagenet(layouts["hub"]).images)


def test_greyscale_files_become_rgb(tmp_path: Path) -> None:
    folder = write_tiny_zip(tmp_path)
    grey = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)
    (folder / "val" / "images" / "val_0.JPEG").write_bytes(encoded(grey))
    np.testing.assert_array_equal(load_tinyimagenet(tmp_path).images[400], np.broadcast_to(grey, (3, 64, 64)))


def test_a_greyscale_file_of_16_bits_is_refused(tmp_path: Path) -> None:
    image = write_tiny_zip(tmp_path) / "val" / "images" / "val_0.JPEG"
    image.write_bytes(encoded(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)))
    with pytest.raises(BecameError, match=f"{image.name} has 16 bits a pixel, which would become white"):
        load_tinyimagenet(tmp_path)


def test_a_hub_folder_that_lacks_a_class_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_hub(tmp_path)
    images = [encoded(image) for image in TINY_VALID]
    write_parquet(folder / "valid-00000-of-00001.parquet", images, [0, 0, *range(2, 200)])
    with pytest.raises(BecameError, match=r"valid-\*\.parquet holds no image of 1 of the 200 classes, such as 1"):
        load_tinyimagenet(tmp_path)


def test_neither_layout_is_one_sentence_that_names_both(tmp_path: Path) -> None:
    with pytest.raises(BecameError, match=r"no folder .*zh-plus/tiny-imagenet/data and no folder .*tiny-imagenet-200:"):
        load_tinyimagenet(tmp_path)


def cut(name: str, kept: float) -> Callable[[Path], object]:
    def damage(folder: Path) -> object:
        content = (folder / name).read_bytes()
        return (folder / name).write_bytes(content[: int(kept * len(content))])

    return damage


def annotated(line: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> object:
        file = folder / "val" / "val_annotations.txt"
        return file.write_text(file.read_text().replace(f"val_1.JPEG\t{TINY_NAMES[1]}\t", line))

    return damage


def cut_annotations(folder: Path) -> None:
    file = folder / "val" / "val_annotations.txt"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:80]))


def remove_folder(folder: Path) -> None:
    (folder / "train" / TINY_NAMES[3]).rename(folder / "moved")


FIRST = f"train/{TINY_NAMES[0]}/images/{TINY_NAMES[0]}_1.JPEG"
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (cut(FIRST, 0.8), f"{TINY_NAMES[0]}_1.JPEG holds a corrupt image"),
    (cut(FIRST, 0.0), f"{TINY_NAMES[0]}_1.JPEG holds a corrupt image"),
    (lambda folder: (folder / FIRST).write_bytes(encoded(NOISE, "JPEG")[:1500]), "holds a corrupt image"),
    (lambda folder: (folder / FIRST).write_bytes(encoded(NOISE, "BMP")), "holds a corrupt image"),
    (lambda folder: (folder / FIRST).write_bytes(encoded(NOISE[:32])), "is 64×32 pixels; every image must be 64×64"),
    (remove_folder, rf"no folder .*train/{TINY_NAMES[3]}/images, which must hold a class's images"),
    (lambda folder: (folder / "wnids.txt").unlink(), r"cannot read .*wnids\.txt: No such file"),
    (cut("wnids.txt", 0.5), r"wnids\.txt must name 200 classes"),
    (lambda folder: (folder / "wnids.txt").write_text("../n00000001\n" * 200), r"wnids\.txt must name 200 classes"),
    (lambda folder: (folder / "wnids.txt").write_bytes(b"\xff\xfe"), r"wnids\.txt is not text"),
    (lambda folder: (folder / "val" / "images" / "val_7.JPEG").unlink(), r"no file .*val_7\.JPEG' that can be read"),
    (cut_annotations, r"val holds no image of 120 of the 200 classes, such as 80"),
    (cut("val/val_annotations.txt", 0.4), r"line \d+ of .*val_annotations\.txt must begin"),
    (annotated("val_1.JPEG n00001001 "), r"line 2 of .*val_annotations\.txt must begin with an image's name, a tab"),
    (annotated("val_1.JPEG\tn09999999\t"), r"line 2 of .*val_annotations\.txt must begin"),
    (annotated(f"../val_1.JPEG\t{TINY_NAMES[1]}\t"), r"line 2 of .*val_annotations\.txt must begin"),
    (annotated(f"val\0.JPEG\t{TINY_NAMES[1]}\t"), r"no file .*val\\x00\.JPEG' that can be read"),
]


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_damage_to_the_unpacked_zip_is_named(number: int, tmp_path: Path) -> None:
    damage, message = DAMAGES[number]
    damage(write_tiny_zip(tmp_path))
    with pytest.raises(BecameError, match=message) as raised:
        load_tinyimagenet(tmp_path)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.skipif(not (REAL / "zh-plus").is_dir(), reason="the real images are not beside this checkout")
def test_the_real_images() -> None:
    dataset = load_tinyimagenet(REAL)
    assert dataset.images.shape[1:] == (3, 64, 64)
    train, test = dataset.labels[: dataset.train_size], dataset.labels[dataset.train_size :]
    for part in (train, test):
        assert len(set(np.bincount(part, minlength=200).tolist())) == 1  # each class as often
    np.testing.assert_allclose(dataset.mean, (0.4802, 0.4481, 0.3975), atol=5e-3)  # as commonly published
    np.testing.assert_allclose(dataset.std, (0.2770, 0.2691, 0.2821), atol=5e-3)
