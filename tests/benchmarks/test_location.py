"""Where data are looked for: the folder given, before the environment's, before the hub."""

from pathlib import Path

import pytest

from adapters.benchmarks.location import VARIABLE, data_directory


def test_the_folder_given_comes_before_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "from-environment")
    assert data_directory(Path("given")) == Path("given")
    assert data_directory(None) == Path("from-environment")


def test_without_either_it_is_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert data_directory(None) is None
    monkeypatch.setenv(VARIABLE, "")
    assert data_directory(None) is None
