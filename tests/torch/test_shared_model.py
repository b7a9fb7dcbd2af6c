"""``Continual`` around a model wrapped by DDP or FSDP2, in two real processes: the numbers of one process."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import ended, started
from tests.torch.shared_model_processes import CHECKS, page, work

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def test_two_processes_learn_with_a_wrapped_model_what_one_learns(tmp_path: Path) -> None:
    """To 1e-9 in double precision: weights, alpha, posterior, and what is saved; and what is refused."""
    with started(partial(work, folder=str(tmp_path))) as processes:
        assert ended(processes) == [0, 0]
    for rank in (0, 1):
        count, failures = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert failures == {}, "\n".join(f"{name}:\n{text}" for name, text in failures.items())
        assert count == 10 + len(CHECKS)


def test_the_script_of_the_page_runs_on_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = r"^```py\n(import torch\nfrom torch import distributed.*?)^```"
    (code,) = re.findall(script, PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    distributed: Any = torch.distributed  # whose types lack the store
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with started(partial(page, code, store.port)) as processes:
        assert ended(processes) == [0, 0]
    assert (tmp_path / "memory.safetensors").exists()
    assert (tmp_path / "memory" / "became.json").exists()
    assert "of the way from the stable to the plastic model" in (tmp_path / "out.0").read_text(encoding="utf-8")
    assert (tmp_path / "out.1").read_text(encoding="utf-8") == ""
