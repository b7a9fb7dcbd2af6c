"""ImageNet-R in the layout of its archive: the published draw, what becomes of images of any size, what is refused."""

import json
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adapters.benchmarks import imagenet_r
from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.benchmarks.imagenet_r import load_imagenet_r
from adapters.benchmarks.images import read_resized
from adapters.runs.configuration import Configuration
from became_core import BecameError
from became_core.continual import Adam, Annealed
from tests.benchmarks.pictures import encoded

CLASSES, PER_CLASS, SIZE = 4, 25, 12


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet_r, "_CLASSES", CLASSES)
    monkeypatch.setattr(imagenet_r, "_SIZE", SIZE)
    monkeypatch.setattr(imagenet_r, "_SHORTER", SIZE + 2)


def write(folder: Path, per_class: int = PER_CLASS, first: int = 0) -> None:
    """Write images of one colour each, of all sizes, class by class; names are not in the order of colours' numbers."""
    for row in range(CLASSES * per_class):
        target = folder / f"n{3 - row // per_class:08d}"
        target.mkdir(parents=True, exist_ok=True)
        colour = np.array([first + row, 7 * row % 256, 255 - row], np.uint8)
        pixels = np.broadcast_to(colour, (9 + row % 20, 40 - row % 23, 3))
        (target / f"art_{row}.jpg").write_bytes(encoded(pixels))  # PNG in spite of the suffix: colours stay


def test_the_draw_is_that_of_the_published_code(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    write(tmp_path / "imagenet-r")
    (tmp_path / "imagenet-r" / "README.txt").touch()
    dataset = load_imagenet_r(tmp_path)
    assert (dataset.images.shape, dataset.train_size) == ((100, 3, SIZE, SIZE), 80)
    files = sorted((tmp_path / "imagenet-r").glob("*/*"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # as the code's first run does
        parts = torch.utils.data.random_split(files, [80, 20])
    order = [row for part in parts for row in part.indices]
    colours = [np.asarray(Image.open(files[row]))[0, 0] for row in order]
    np.testing.assert_array_equal(dataset.images[:, :, 0, 0], colours)
    assert np.ptp(dataset.images, axis=(2, 3)).max() == 0
    np.testing.assert_array_equal(dataset.labels, [int(files[row].parent.name[1:]) for row in order])


def test_parts_that_are_there_are_taken_as_they_are(tmp_path: Path) -> None:
    write(tmp_path / "imagenet-r" / "train", 3)
    write(tmp_path / "imagenet-r" / "test", 2, first=100)
    dataset = load_imagenet_r(tmp_path)
    assert dataset.train_size == 12
    np.testing.assert_array_equal(dataset.labels, np.repeat([0, 1, 2, 3, 0, 1, 2, 3], [3] * 4 + [2] * 4))
    np.testing.assert_array_equal(dataset.images[:, 0, 0, 0] >= 100, [False] * 12 + [True] * 8)


@pytest.mark.parametrize(("width", "height"), [(60, 41), (41, 60), (20, 20), (8, 31)])
def test_the_middle_of_a_resized_image_is_kept(width: int, height: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    (tmp_path / "image.png").write_bytes(encoded(pixels))
    (found,) = read_resized([tmp_path / "image.png"], 16, 10)
    size = (16, int(16 * height / width)) if width < height else (int(16 * width / height), 16)
    resized = np.asarray(Image.open(BytesIO(encoded(pixels))).resize(size, Image.Resampling.BILINEAR))
    left, top = round((size[0] - 10) / 2), round((size[1] - 10) / 2)
    np.testing.assert_array_equal(found.transpose(1, 2, 0), resized[top : top + 10, left : left + 10])


def test_what_is_not_as_the_archive_unpacks_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, message in ((None, "ImageNet-R is read from a folder: name by --data-dir"), (tmp_path, "no folder")):
        with pytest.raises(BecameError, match=message):
            load_imagenet_r(folder)
    write(tmp_path / "imagenet-r", 5)
    files = sorted((tmp_path / "imagenet-r").glob("*/*"))
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-20])
    with pytest.raises(BecameError, match=rf"{files[0].name} holds a corrupt image"):
        load_imagenet_r(tmp_path)
    files[0].write_bytes(whole)
    with pytest.raises(BecameError, match=r"the test part of .* holds no image of 1 of the 4 classes"):
        load_imagenet_r(tmp_path)
    monkeypatch.setattr("adapters.benchmarks.images._MOST_PIXELS", 100)
    with pytest.raises(BecameError, match=r"pixels; an image has at most 100 in all"):
        load_imagenet_r(tmp_path)
    (tmp_path / "imagenet-r" / "n00000009").mkdir()
    with pytest.raises(BecameError, match="holds 5 folders; it must hold one for each of 4 classes"):
        load_imagenet_r(tmp_path)


@pytest.mark.parametrize(
    ("name", "epochs", "threshold", "increment"),
    [("split-cifar100", 20, 0.95, 0.005), ("split-imagenet-r", 50, 0.98, 0.002)],
)
def test_vision_transformers_as_published(name: str, epochs: int, threshold: float, increment: float) -> None:
    preset = Configuration.of({"benchmark": name}, "inflora", "pretrained")
    training = preset.training()
    assert training.stage1 == Annealed(5e-4, epochs)
    assert (training.optimiser, training.batch_size, training.projector_samples) == (Adam(), 128, None)
    assert (preset.network, preset.pretrained) == ("hf:google/vit-base-patch16-224-in21k", True)
    assert (preset.lora, preset.tasks, preset.class_order, preset.validation) == (10, 10, "label", 0)
    assert (preset.settings["threshold"], preset.settings["increment"]) == (threshold, increment)
    old = [f"model.encoder.layer.0.attention.attention.{layer}" for layer in ("query", "key", "value")]
    new = [f"model.layers.0.attention.{layer}_proj" for layer in ("q", "k", "v")]
    for first, *others in (old, new):
        assert [fnmatchcase(layer, *preset.lora_layers) for layer in (first, *others)] == [False, True, True]


def test_the_preset_runs_on_a_small_network_of_the_same_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from adapters.cli.main import main
    from adapters.torch.run import BACKEND

    write(tmp_path / "imagenet-r")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=SIZE, patch_size=4, **small)
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    words = ["--benchmark", "split-imagenet-r", "--data-dir", str(tmp_path), "--network", f"hf:{tmp_path}/vit"]
    words += ["--tasks", "2", "--epochs", "1", "--stage2-epochs", "1", "--lora", "2", "--out", str(tmp_path / "runs")]
    assert main(BACKEND, [*words, "--methods", "inflora", "became"]) == 0
    assert "class" in capsys.readouterr().out
    for method in ("inflora", "became"):
        results = json.loads((tmp_path / "runs" / f"{method}-seed0" / "results.json").read_text())
        assert results["config"]["lora_layers"] == list(
            BENCHMARKS["split-imagenet-r"].presets["pretrained"].values["lora_layers"]
        )
        protected = set(results["ranks"][-1])
        assert len(protected) == 4
        assert all("key" in name or "value" in name or "k_proj" in name or "v_proj" in name for name in protected)
        assert np.isfinite(results["class_incremental_accuracy"][1]).all()
