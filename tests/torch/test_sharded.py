"""Models that two real processes share, as PyTorch's ``DTensor``: equal numbers, no gathered leaf, few reductions."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.processes import ended, started
from tests.torch.sharded_processes import work


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_merge_as_one_does_and_gather_nothing(tmp_path: Path) -> None:
    with started(partial(work, folder=str(tmp_path))) as processes:
        assert ended(processes) == [0, 0]
    for rank in (0, 1):
        count, failures = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert failures == {}, "\n".join(f"{name}:\n{text}" for name, text in failures.items())
        assert count == 11
