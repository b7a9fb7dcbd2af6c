"""CIFAR-100: exact pixels in order, and one sentence for every way in which a folder can be wrong."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from adapters.benchmarks.cifar import load_cifar100
from became_core.errors import BecameError

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data"
PIXELS = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, 100, 30)
TRAIN = 24


def png(pixels: NDArray[np.uint8]) -> bytes:
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write(
    root: Path,
    name: str,
    images: Sequence[bytes | None],
    labels: Sequence[int | None],
    names: tuple[str, str] = ("img", "fine_label"),
) -> Path:
    file = root / "uoft-cs" / "cifar100" / "cifar100" / f"{name}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = pa.array(
        [{"bytes": image, "path": None} for image in images], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    coarse = pa.array([0] * len(images), pa.int64())
    table = pa.table({names[0]: cells, names[1]: pa.array(labels, pa.int64()), "coarse_label": coarse})
    pq.write_table(table, file, row_group_size=5)
    return file


def write_rows(root: Path, name: str, start: int, stop: int) -> Path:
    return write(root, name, [png(image) for image in PIXELS[start:stop]], LABELS[start:stop].tolist())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty-four training rows in two shards, and six test rows."""
    write_rows(tmp_path, "train-00000-of-00002", 0, 11)
    write_rows(tmp_path, "train-00001-of-00002", 11, TRAIN)
    write_rows(tmp_path, "test-00000-of-00001", TRAIN, 30)
    return tmp_path


def shard(folder: Path, name: str = "train-00001-of-00002") -> Path:
    return folder / "uoft-cs" / "cifar100" / "cifar100" / f"{name}.parquet"


def test_pixels_labels_and_order_are_those_of_the_files(folder: Path) -> None:
    dataset = load_cifar100(folder)
    assert dataset.train_size == TRAIN
    assert dataset.images.dtype == np.uint8
    assert dataset.labels.dtype == np.int64
    np.testing.assert_array_equal(dataset.images, PIXELS.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(dataset.labels, LABELS)


def test_mean_and_std_are_of_the_training_part_per_channel(folder: Path) -> None:
    dataset = load_cifar100(folder)
    scaled = PIXELS[:TRAIN] / 255
    np.testing.assert_allclose(dataset.mean, scaled.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(dataset.std, scaled.std(axis=(0, 1, 2)))


def test_greyscale_images_become_rgb(folder: Path) -> None:
    write(folder, "test-00000-of-00001", [png(PIXELS[0, :, :, 0])], [3])
    np.testing.assert_array_equal(load_cifar100(folder).images[-1], np.broadcast_to(PIXELS[0, :, :, 0], (3, 32, 32)))


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_a_truncated_file_is_named_and_its_mended_copy_loads(folder: Path, kept: float) -> None:
    file = shard(folder)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(BecameError, match=f"{file.name} cannot be read as parquet"):
        load_cifar100(folder)
    file.write_bytes(whole)
    np.testing.assert_array_equal(load_cifar100(folder).labels, LABELS)


@pytest.mark.parametrize("place", np.linspace(0, 0.999, 25).round(3).tolist())
def test_a_flipped_byte_never_changes_a_pixel_silently(folder: Path, place: float) -> None:
    file = shard(folder)
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 0xFF
    file.write_bytes(content)
    try:
        images = load_cifar100(folder).images
    except BecameError as error:
        assert file.name in str(error)  # noqa: PT017 (whether it raises depends on whether the byte means anything)
    else:
        np.testing.assert_array_equal(images, PIXELS.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("position", [1, 10, 35, 41, 42, 1500, -17, -3])  # signature, header, pixels, checksum, end
def test_a_damaged_image_is_named_by_row_and_file(folder: Path, position: int) -> None:
    damaged = bytearray(png(PIXELS[1]))
    damaged[position] ^= 0x01
    write(folder, "test-00000-of-00001", [png(PIXELS[0]), bytes(damaged)], [3, 4])
    with pytest.raises(BecameError, match=r"row 1 of .*test-00000-of-00001\.parquet holds a corrupt image"):
        load_cifar100(folder)


def test_a_missing_folder_is_named_with_what_would_be_right(tmp_path: Path) -> None:
    with pytest.raises(BecameError, match=r"no folder .*absent.*by --data-dir the folder that holds uoft-cs/cifar100"):
        load_cifar100(tmp_path / "absent")


def test_a_folder_without_a_split_says_which_files_it_lacks(folder: Path) -> None:
    shard(folder, "test-00000-of-00001").unlink()
    with pytest.raises(BecameError, match=r"holds no file test-\*\.parquet"):
        load_cifar100(folder)


def test_a_missing_shard_is_not_read_as_a_smaller_data_set(folder: Path) -> None:
    shard(folder).unlink()
    with pytest.raises(BecameError, match=r"holds 1 of the files train-\*\.parquet where their names promise 2"):
        load_cifar100(folder)


def test_a_missing_column_is_named_beside_those_there_are(folder: Path) -> None:
    write(folder, "test-00000-of-00001", [png(PIXELS[0])], [3], names=("img", "label"))
    with pytest.raises(BecameError, match=r"test-.* has no column 'fine_label'.*img, label, coarse_label"):
        load_cifar100(folder)


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (png(PIXELS[0, :16]), 3, r"row 0 of .* is 32×16 pixels; every image must be 32×32"),
        (b"not an image", 3, r"row 0 of .* holds a corrupt image"),
        (None, 3, r"row 0 of .* holds no image"),
        (png(PIXELS[0]), 100, r"row 0 of .* has label 100; labels are 0 … 99"),
        (png(PIXELS[0]), -1, r"has label -1"),
        (png(PIXELS[0]), None, r"has label None"),
    ],
)
def test_a_row_that_is_no_labelled_image_is_named(
    folder: Path, image: bytes | None, label: int | None, message: str
) -> None:
    write(folder, "test-00000-of-00001", [image], [label])
    with pytest.raises(BecameError, match=message):
        load_cifar100(folder)


def test_a_file_without_rows_and_a_column_without_images_are_errors(folder: Path) -> None:
    file = shard(folder, "test-00000-of-00001")
    pq.ParquetWriter(file, pq.read_schema(file)).close()
    with pytest.raises(BecameError, match="cannot be read as parquet"):
        load_cifar100(folder)
    pq.write_table(pa.table({"img": [1.5], "fine_label": [3]}), file)
    with pytest.raises(BecameError, match=r"column 'img' of .* does not hold encoded images"):
        load_cifar100(folder)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_folder_is_read_in_silence_without_network_and_leaves_nothing(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, damaged: bool
) -> None:
    if damaged:
        shard(folder).write_bytes(shard(folder).read_bytes()[:-100])
    scratch = tmp_path_factory.mktemp("scratch")
    script = f"""
import socket, sys
def refuse(*arguments, **options):
    print("network:", arguments)
    raise OSError("no network")
socket.getaddrinfo = socket.socket.connect = refuse
from pathlib import Path
from adapters.benchmarks.cifar import load_cifar100
from became_core.errors import BecameError
try:
    load_cifar100(Path({str(folder)!r}))
except BecameError:
    sys.exit(2)
"""
    environment = os.environ | {"HF_HOME": str(scratch), "TMPDIR": str(scratch), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2 if damaged else 0, "", "")
    assert [path for path in scratch.rglob("*") if path.is_file()] == []


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach it\non the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(BecameError, match=r"^uoft-cs/cifar100 .*reach it on the hub.*--data-dir a folder"):
        load_cifar100(None)


def test_the_hub_gives_what_a_folder_gives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"train": [str(shard(folder, f"train-0000{k}-of-00002")) for k in (0, 1)]}
    files["test"] = [str(shard(folder, "test-00000-of-00001"))]

    def hub(repository: str, *, split: str) -> datasets.Dataset:
        assert repository == "uoft-cs/cifar100"
        return datasets.Dataset.from_parquet(files[split], cache_dir=str(folder / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    from_hub, from_folder = load_cifar100(None), load_cifar100(folder)
    np.testing.assert_array_equal(from_hub.images, from_folder.images)
    np.testing.assert_array_equal(from_hub.labels, from_folder.labels)
    assert from_hub.train_size == from_folder.train_size == TRAIN


@pytest.mark.skipif(not REAL.is_dir(), reason="the real images are not beside this checkout, in ../shared/data")
def test_the_real_images() -> None:
    dataset = load_cifar100(REAL)
    assert dataset.images.shape == (60_000, 3, 32, 32)
    assert dataset.train_size == 50_000
    assert np.bincount(dataset.labels[:50_000]).tolist() == [500] * 100
    assert np.bincount(dataset.labels[50_000:]).tolist() == [100] * 100
    np.testing.assert_allclose(dataset.mean, (0.5071, 0.4865, 0.4409), atol=1e-4)  # as commonly published
    np.testing.assert_allclose(dataset.std, (0.2673, 0.2564, 0.2762), atol=1e-4)
