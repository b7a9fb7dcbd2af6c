"""Models that two real processes share, as PyTorch's ``DTensor``: equal numbers, no gathered leaf, few reductions."""

import json
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from tests.processes import WAIT
from tests.torch.sharded_processes import work


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_merge_as_one_does_and_gather_nothing(tmp_path: Path) -> None:
    context = get_context("spawn")  # a fresh interpreter each, as torchrun gives
    processes = [context.Process(target=work, args=(rank, str(tmp_path))) for rank in (0, 1)]
    try:
        for process in processes:
            process.start()
        end = time.monotonic() + WAIT
        for process in processes:
            process.join(max(end - time.monotonic(), 0.0))
            assert process.exitcode == 0, f"exit status {process.exitcode}, or None after {WAIT} seconds"
    finally:
        for process in processes:
            process.kill()
            process.join()
    for rank in (0, 1):
        count, failures = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert failures == {}, "\n".join(f"{name}:\n{text}" for name, text in failures.items())
        assert count == 11
