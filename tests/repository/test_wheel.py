"""The wheel: what is in it, and that it gets on with AdapterHub's package, which is named ``adapters`` too.

Convention: a folder with a package of that name stands for AdapterHub's; like it, it puts another module in its own
place as it is loaded. ``nox -s wheel`` installs the real one.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import became
import became_core

ROOT = Path(__file__).parents[2]
# What AdapterHub's adapters 1.3.0 has at the top of its package.
ADAPTERHUB = {
    *("__init__", "composition", "configuration", "context", "head_utils", "heads", "hub_mixin", "interface"),
    *("loading", "methods", "model_mixin", "models", "trainer", "training", "utils", "wrappers"),
}
OTHER = """
import sys, types
from adapters.composition import Stack

class Lazy(types.ModuleType):
    __path__ = __path__
    VERSION = "1.3.0"

sys.modules[__name__] = Lazy(__name__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a built wheel's files."""
    pytest.importorskip("hatchling", reason="the wheel is built with hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "files")
    return folder / "files"


def other_package(folder: Path, source: str = OTHER) -> Path:
    """Write another package named ``adapters``, and return the folder that it is in."""
    (folder / "adapters").mkdir(parents=True, exist_ok=True)
    (folder / "adapters" / "__init__.py").write_text(source)
    (folder / "adapters" / "composition.py").write_text("class Stack: pass\n")
    return folder


def python(*arguments: str, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(path)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_version_is_stated_once(wheel: Path) -> None:
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    assert f"\nVersion: {became_core.__version__}\n" in metadata.read_text(encoding="utf-8")
    assert became.__version__ is became_core.__version__
    assert "version =" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.", 1)[0]


def test_the_wheel_has_every_package_and_what_they_read(wheel: Path) -> None:
    top = {path.name for path in wheel.iterdir() if path.suffix != ".dist-info"}
    assert top == {"became.py", "became_core", "adapters"}
    for package in ("became_core", "adapters"):
        sources = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*.*") if "__pycache__" not in path.parts}
        assert sources == {path.relative_to(wheel) for path in (wheel / package).rglob("*.*")}
    assert (wheel / "adapters/benchmarks/mnist_5k.npz").stat().st_size < 1.2e6


def test_the_wheel_owns_no_file_that_adapterhub_has(wheel: Path) -> None:
    ours = {path.name.partition(".")[0] for path in (wheel / "adapters").iterdir()}
    assert "torch" in ours
    assert ours.isdisjoint(ADAPTERHUB)
    # Marked as typed one by one, since a mark at the top would be on the other package's files too.
    assert all((wheel / "adapters" / name / "py.typed").exists() for name in ours)


def test_both_are_found_in_one_folder(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("tyro", reason="the command needs what the extra `run` installs")
    both = other_package(shutil.copytree(wheel, tmp_path / "site"))
    source = "import adapters, adapters.composition, adapters.networks, adapters.cli.__main__; print(adapters.VERSION)"
    assert python("-c", source, cwd=tmp_path, path=both).stdout == "1.3.0\n"
    done = python("-m", "became", "list", "networks", cwd=tmp_path, path=both)
    assert "mlp" in done.stdout
    assert (done.stderr, done.returncode) == ("", 0)


def test_a_checkout_finds_its_own_packages_beside_the_other(tmp_path: Path) -> None:
    pytest.importorskip("tyro", reason="the command needs what the extra `run` installs")
    other = other_package(tmp_path / "site")
    assert "No module named adapters.cli" in python("-m", "adapters.cli", cwd=ROOT, path=other).stderr
    done = python("-m", "became", "list", "networks", cwd=ROOT, path=other)
    assert "mlp" in done.stdout
    assert (done.stderr, done.returncode) == ("", 0)


def test_a_broken_package_of_the_name_is_one_sentence(tmp_path: Path) -> None:
    other = other_package(tmp_path / "site", "raise ImportError('transformers is too new\\n\\nsee above')")
    done = python("-m", "became", "--version", cwd=ROOT, path=other)
    assert done.stderr == (
        f"error: the package 'adapters' in {other}/adapters/__init__.py, which is not part of became, fails to load "
        "(ImportError: transformers is too new); repair or uninstall it, or if it is a folder of your own, run became "
        "in another folder.\n"
    )
    assert done.returncode == 2


def test_a_package_that_shadows_ours_is_one_sentence(tmp_path: Path) -> None:
    other = other_package(tmp_path / "site", "from . import runs")
    (other / "adapters" / "runs.py").touch()
    done = python("-m", "became", "--version", cwd=ROOT, path=other)
    assert done.stderr == (
        f"error: {other}/adapters/runs.py takes the place of became's own {ROOT}/adapters/runs; uninstall the package "
        "that it is part of, or if it is in a folder of your own, run became in another folder.\n"
    )
    assert done.returncode == 2
