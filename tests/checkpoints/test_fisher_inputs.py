"""Data of which Fisher information can be measured, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from became_core import BecameError
from tests.checkpoints.fisher_files import data, measured
from tests.checkpoints.networks import CLASSES, WIDTH


def test_random_tokens_come_with_a_warning_and_data_that_is_none_with_a_sentence(tmp_path: Path) -> None:
    from adapters.checkpoints.fisher_inputs import read_samples

    samples = read_samples("random:3x5x7", seed=1)
    assert samples.inputs.shape == samples.targets.shape == (3, 4)
    assert_array_equal(samples.inputs[:, 1:], samples.targets[:, :-1])
    assert "no text" in samples.notes[0]
    (tmp_path / "text.txt").write_text("ab\n\ncde\n", encoding="utf-8")
    lines = read_samples(str(tmp_path / "text.txt"), lambda text: [ord(letter) for letter in text])
    assert lines.inputs.tolist() == [[97, 0], [99, 100]]
    assert lines.targets.tolist() == [[98, -100], [100, 101]]
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    for name, message in (
        ("random:3x5", "SAMPLESxLENGTHxVOCABULARY"),
        ("random:1000000x1000000x9", "1,000,000,000,000 tokens; give at most 100,000,000"),
        (str(tmp_path / "missing.npz"), "there is no file"),
        (str(tmp_path / "other.npz"), "neither 'tokens'"),
        (str(tmp_path / "text.txt"), "no data that is known"),
    ):
        with pytest.raises(BecameError, match=message):
            read_samples(name)


@pytest.mark.parametrize(
    ("arrays_of_data", "message"),
    [
        ({"tokens": np.zeros((0, 4), int)}, "has no samples"),
        ({"tokens": np.zeros((3, 1), int)}, "sequences of 1 tokens; give at least two"),
        ({"tokens": np.zeros((3, 4))}, "targets that are no class numbers"),
        ({"inputs": np.zeros((2, WIDTH)), "targets": np.asarray([0, -5])}, "targets that are no class numbers"),
        ({"inputs": np.zeros((2, WIDTH)), "targets": np.asarray([0.0, 1.0])}, "targets that are no class numbers"),
        ({"inputs": np.zeros((0, WIDTH)), "targets": np.zeros(0, int)}, "has no samples"),
    ],
)
def test_data_that_no_model_takes_is_refused(tmp_path: Path, arrays_of_data: Any, message: str) -> None:
    from adapters.checkpoints.fisher_inputs import read_samples

    np.savez(tmp_path / "data.npz", **arrays_of_data)
    with pytest.raises(BecameError, match=message):
        read_samples(str(tmp_path / "data.npz"))


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (np.zeros((3, WIDTH + 1), np.float32), [0, 1, 2], "cannot take the samples 0 to 1: mat1 and mat2"),
        (np.zeros((3, WIDTH), np.int64), [0, 1, 2], "cannot take the samples 0 to 1: mat1 and mat2"),
        (np.zeros((3, WIDTH), np.float32), [0, 1, CLASSES], "have a label 3, and .* has the classes 0 to 2"),
    ],
)
@pytest.mark.usefixtures("model")
def test_samples_that_the_model_cannot_take_are_named(tmp_path: Path, inputs: Any, targets: Any, message: str) -> None:
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=targets)
    with pytest.raises(BecameError, match=message):
        measured(tmp_path, chunk=2)
    assert not (tmp_path / "F.safetensors").exists()


@pytest.mark.usefixtures("model")
def test_the_folder_of_a_fisher_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import adapters.checkpoints.fisher_data as module

    data(tmp_path / "data.npz", 4)
    monkeypatch.setattr(module, "SAVE_EVERY", 1)
    assert measured(tmp_path, "new/folder/F", chunk=1).exists()


def test_a_model_that_transformers_cannot_find_is_not_looked_for_elsewhere(tmp_path: Path, model: Path) -> None:
    from adapters.checkpoints.fisher_inputs import load_model

    for path in (model, tmp_path / "someone"):
        with pytest.raises(BecameError, match=r"a folder with a config.json, which .* is not; give --load"):
            load_model(path, None)
