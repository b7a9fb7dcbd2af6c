"""Models that two real processes share, as PyTorch's ``DTensor``: equal numbers, no gathered leaf, few reductions."""

import json
import time
from pathlib import Path

import pytest
import torch

from tests.torch.sharded_processes import work

LIMIT = 60  # seconds


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_merge_as_one_does_and_gather_nothing(tmp_path: Path) -> None:
    processes = torch.multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=2, join=False)
    end = time.monotonic() + LIMIT
    try:
        while not processes.join(timeout=max(end - time.monotonic(), 0.1)):
            assert time.monotonic() < end, f"the processes have not ended within {LIMIT} seconds"
    finally:
        for process in processes.processes:
            process.kill()
    for rank in (0, 1):
        count, failures = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert failures == {}, "\n".join(f"{name}:\n{text}" for name, text in failures.items())
        assert count == 11
