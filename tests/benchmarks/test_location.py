"""Where data are looked for: the folder given, before the environment's, before the hub."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from adapters.benchmarks.location import VARIABLE, data_directory
from became_core import BecameError
from benchmarks import miniimagenet_standin, temperature

KEPT = Path(__file__).parents[2] / "benchmarks" / "results"


def test_the_folder_given_comes_before_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "from-environment")
    assert data_directory(Path("given")) == Path("given")
    assert data_directory(None) == Path("from-environment")


def test_without_either_it_is_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert data_directory(None) is None
    monkeypatch.setenv(VARIABLE, "")
    assert data_directory(None) is None


@pytest.mark.parametrize(
    ("script", "words"),
    [(temperature, [str(KEPT / "new-cifar100-across")]), (miniimagenet_standin, ["--out", "standin"])],
    ids=["temperature", "stand-in"],
)
def test_a_measurement_looks_there_as_a_run_does(
    script: ModuleType, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["script", *words])
    with pytest.raises(BecameError, match=re.escape(str(tmp_path))):
        script.main()
