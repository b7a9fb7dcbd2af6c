"""A memory in a folder, of one process; ``test_shared_model.py`` has it of two."""

import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from adapters.backend.memory_file import memory_arrays
from adapters.torch import Continual
from became_core import BecameError
from became_core.projection import GPM


class Scaled(nn.Module):
    """A linear layer and a scale without axes, in the layout that channels last gives a weight."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, classes)
        self.fc.weight.data = self.fc.weight.data.T.contiguous().T
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.fc(inputs) * self.scale
        return outputs


@pytest.fixture
def learning() -> Continual:
    """What has remembered a task."""
    result = Continual(Scaled(), projector=GPM(0.8), progress=False)
    result.remember([(torch.randn(8, 6), torch.arange(8) % 3)])
    return result


def _arrays(learning: Continual) -> dict[str, Any]:
    assert learning.posterior is not None
    return memory_arrays(learning.posterior, learning.projector)


def test_an_older_pytorch_is_one_sentence(learning: Continual, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learning.save(tmp_path / "memory", sharded=True)
    monkeypatch.delattr(torch.distributed.checkpoint, "hf_storage")
    monkeypatch.setitem(sys.modules, "torch.distributed.checkpoint.hf_storage", None)
    for sharded in (
        lambda: learning.save(tmp_path / "other", sharded=True),
        lambda: Continual.load(Scaled(), tmp_path / "memory"),
    ):
        with pytest.raises(BecameError, match=r"cannot write or read a memory in shards; install PyTorch 2\.8"):
            sharded()
    assert not (tmp_path / "other").exists()


def test_a_folder_has_what_a_file_has(learning: Continual, tmp_path: Path) -> None:
    learning.save(tmp_path / "file")
    learning.save(tmp_path / "deep" / "folder", sharded=True)
    whole, loaded = load_file(tmp_path / "file"), Continual.load(Scaled(), tmp_path / "deep" / "folder")
    arrays = _arrays(loaded)
    assert arrays.keys() == whole.keys()
    for name, value in whole.items():
        assert arrays[name].dtype == value.dtype
        np.testing.assert_array_equal(arrays[name].numpy(), value.numpy())
    assert loaded.coverage == learning.coverage
    loaded.save(tmp_path / "again")  # and so a folder becomes a file, which other frameworks load
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


def test_a_save_that_was_killed_leaves_the_memory_before_it(
    learning: Continual, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learning.save(tmp_path, sharded=True)
    before = {name: value.clone() for name, value in _arrays(learning).items()}
    learning.remember([(torch.ones(8, 6), torch.arange(8) % 3)])
    with monkeypatch.context() as patched:  # nothing is written or cleaned after the shards, as if it were killed
        patched.setattr("adapters.torch.sharded_memory.write_sealed", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            learning.save(tmp_path, sharded=True)
    assert len(list(tmp_path.glob("shards-*"))) == 2
    for name, value in _arrays(Continual.load(Scaled(), tmp_path)).items():
        np.testing.assert_array_equal(value.numpy(), before[name].numpy())
    learning.save(tmp_path, sharded=True)
    assert len(list(tmp_path.glob("shards-*"))) == 1
    for name, value in _arrays(Continual.load(Scaled(), tmp_path)).items():
        np.testing.assert_array_equal(value.numpy(), _arrays(learning)[name].numpy())


def test_what_is_no_memory_of_this_model_is_refused_by_a_sentence(learning: Continual, tmp_path: Path) -> None:
    def refuses(words: str, model: nn.Module | None = None) -> None:
        with pytest.raises(BecameError, match=words):
            Continual.load(model or Scaled(), tmp_path)

    refuses(r"is no memory that Continual\.save wrote: it has no became\.json\.$")
    learning.save(tmp_path, sharded=True)
    refuses("is the memory of another architecture: .*fc.weight", Scaled(classes=4))
    (shards,) = tmp_path.glob("shards-*")
    (file,) = shards.iterdir()
    content, manifest = file.read_bytes(), (tmp_path / "became.json").read_bytes()
    file.write_bytes(content[:-4])
    refuses(f"{file.name} has {len(content) - 4} bytes instead of {len(content)}; save the memory again")
    file.write_bytes(b"\xff" * len(content))
    refuses("^process 1 could not read .*: .*header")
    shutil.rmtree(shards)
    refuses(f"{file.name} is missing; save the memory again")
    (tmp_path / "became.json").write_bytes(manifest.replace(b"float32", b"float64"))
    refuses("became.json is damaged; save the memory again")


def test_a_memory_of_nothing_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(BecameError, match="needs a memory of old data"):
        Continual(Scaled()).save(tmp_path / "folder", sharded=True)
    assert not (tmp_path / "folder").exists()
