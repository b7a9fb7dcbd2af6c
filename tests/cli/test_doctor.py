"""``became doctor`` says what there is and what is missing, whatever is missing."""

import subprocess
import sys
from pathlib import Path

import pytest

from adapters.cli import doctor
from adapters.cli.__main__ import main

ROOT = Path(__file__).parents[2]


def test_it_tells_of_versions_devices_threads_and_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mini-imagenet").mkdir()
    monkeypatch.setenv("BECAME_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(doctor, "BACKENDS", ("torch",))
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for words in ("Python 3.", "cores; OMP_NUM_THREADS is", "numpy 2.", "torch 2.", "cpu", "embedded"):
        assert words in shown
    assert f"split-miniimagenet: {tmp_path / 'mini-imagenet'}" in shown
    assert f"split-cifar100: there is no {tmp_path / 'uoft-cs/cifar100'}" in shown


def test_what_is_missing_has_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    lines = doctor.diagnosis().splitlines()
    assert "  none; pip install 'became[torch]', or with jax or tensorflow in its place" in lines
    assert "  matplotlib (became report): pip install 'became[report]'" in lines


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise ImportError('a library is missing')", "ImportError: a library is missing"),
        ("import os; os.abort()", "its process ended with status -6"),
    ],
)
def test_a_framework_that_is_broken_is_told_of(program: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "BACKENDS", ("torch",))
    monkeypatch.setitem(doctor.PROGRAMS, "torch", program)
    assert f"  torch cannot be used: {said}" in doctor.diagnosis().splitlines()


def test_what_a_framework_prints_when_it_is_loaded_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "BACKENDS", ("torch",))
    monkeypatch.setitem(doctor.PROGRAMS, "torch", "import sys; print('a warning', file=sys.stderr); print('2.0: cpu')")
    assert "  torch 2.0: cpu" in doctor.diagnosis().splitlines()
    assert "a warning" not in "".join(capfd.readouterr())


def test_it_needs_no_framework() -> None:
    source = """
import sys

class Gone:
    def find_spec(self, name, *_):
        if name in ("torch", "jax", "tensorflow"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Gone())
from adapters.cli import doctor
doctor.find_spec = lambda name: None
print(doctor.diagnosis())
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Not installed:" in done.stdout
