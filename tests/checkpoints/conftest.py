"""A model on the disk."""

from pathlib import Path

import pytest

from tests.checkpoints.models import arrays, saved
from tests.checkpoints.networks import SHAPES


@pytest.fixture
def model(tmp_path: Path) -> Path:
    pytest.importorskip("torch")
    return saved(tmp_path, "M", arrays(3, SHAPES))
