"""Fisher files of disjoint data add to one."""

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from safetensors.numpy import load_file

from adapters.checkpoints import add_fisher_files
from adapters.runs.lock import locked
from became_core import BecameError
from tests.checkpoints.fisher_files import USUAL, data, measured, metadata
from tests.checkpoints.models import arrays, saved
from tests.checkpoints.networks import SHAPES


@pytest.mark.usefixtures("model")
def test_files_of_disjoint_data_add(tmp_path: Path) -> None:
    inputs, targets = data(tmp_path / "data.npz", 6)
    np.savez(tmp_path / "one.npz", inputs=inputs[:2], targets=targets[:2])
    np.savez(tmp_path / "two.npz", inputs=inputs[2:], targets=targets[2:])
    parts = [measured(tmp_path, name, data=name) for name in ("one", "two")]
    add_fisher_files(parts, tmp_path / "sum.safetensors")
    whole = load_file(measured(tmp_path))
    for name, value in load_file(tmp_path / "sum.safetensors").items():
        assert_allclose(value, whole[name], rtol=1e-6)
    assert metadata(tmp_path / "sum.safetensors") == metadata(tmp_path / "F.safetensors")


def test_means_add_by_their_counts(tmp_path: Path) -> None:
    files = [
        saved(tmp_path, f"F{k}", arrays(k, positive=True), USUAL | {"unit": "mean", "samples": str(count)})
        for k, count in enumerate((1, 3))
    ]
    add_fisher_files(files, tmp_path / "sum.safetensors")
    for name, value in load_file(tmp_path / "sum.safetensors").items():
        expected = 0.25 * arrays(0, positive=True)[name] + 0.75 * arrays(1, positive=True)[name]
        assert_allclose(value, expected, rtol=1e-6)
    assert metadata(tmp_path / "sum.safetensors")["samples"] == "4"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"model": "a"}, "of another model"),
        ({"kind": "true"}, "has kind"),
        ({"unit": "mean"}, "has unit"),
        ({"per": "token"}, "has per"),
    ],
)
def test_files_that_are_not_alike_do_not_add(tmp_path: Path, words: dict[str, str], message: str) -> None:
    first = saved(tmp_path, "F0", arrays(0, positive=True), USUAL)
    files = [first, saved(tmp_path, "F1", arrays(1, positive=True), USUAL | words)]
    with pytest.raises(BecameError, match=message):
        add_fisher_files(files, tmp_path / "sum.safetensors")
    assert not (tmp_path / "sum.safetensors").exists()


def test_a_sum_that_float32_cannot_hold_is_refused(tmp_path: Path) -> None:
    large = {"w": np.full(3, 3e38, np.float32)}
    files = [saved(tmp_path, f"F{k}", large, USUAL) for k in range(2)]
    with pytest.raises(BecameError, match=r"'w' of .*sum.* no finite number"):
        add_fisher_files(files, tmp_path / "sum.safetensors")
    assert sorted(tmp_path.iterdir()) == files


def test_neither_a_link_nor_another_process_is_overwritten(tmp_path: Path) -> None:
    files = [saved(tmp_path, f"F{k}", arrays(k, positive=True), USUAL) for k in range(2)]
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    with pytest.raises(BecameError, match=r"link.* exists; nothing is overwritten"):
        add_fisher_files(files, tmp_path / "link.safetensors")
    with locked(tmp_path / ".sum.safetensors.lock"), pytest.raises(BecameError, match="is at work in"):
        add_fisher_files(files, tmp_path / "sum.safetensors")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["F0.safetensors", "F1.safetensors", "link.safetensors"]


def test_a_file_is_not_added_to_itself(tmp_path: Path) -> None:
    file = saved(tmp_path, "F", arrays(0, SHAPES, positive=True), USUAL)
    (tmp_path / "link.safetensors").symlink_to(file)
    with pytest.raises(BecameError, match="is given twice"):
        add_fisher_files([file, tmp_path / "link.safetensors"], tmp_path / "sum.safetensors")
