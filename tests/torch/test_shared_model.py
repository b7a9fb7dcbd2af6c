"""``Continual`` around a model wrapped by DDP or FSDP2, in two real processes: the numbers of one process."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.processes import ended, started
from tests.torch.shared_model_processes import work


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_learn_with_a_wrapped_model_what_one_learns(tmp_path: Path) -> None:
    """To 1e-9 in double precision: weights, alpha, posterior, and what is saved; and what is refused."""
    with started(partial(work, folder=str(tmp_path))) as processes:
        assert ended(processes) == [0, 0]
    for rank in (0, 1):
        count, failures = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert failures == {}, "\n".join(f"{name}:\n{text}" for name, text in failures.items())
        assert count == 13
