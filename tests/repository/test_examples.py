"""The examples of the README and of the site's pages run, each where its framework is.

Convention: ``python`` runs everywhere, ``python torch`` on PyTorch, ``python jax`` on JAX, ``python tensorflow`` on
TensorFlow, and ``python run`` on each of the three, with the one that is installed. A page's examples for everywhere
and for one of these are one program, in their order.
"""

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from became_core.continual import METHODS
from became_core.projection import PROJECTORS
from became_core.registry import Catalogue

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FRAMEWORKS = ("torch", "jax", "tensorflow")
ANY_FRAMEWORK = "run"
# Packages that examples import and that not every test environment has.
OTHERS = ("equinox", "pytorch_lightning", "transformers")


def programs() -> dict[tuple[str, str], list[str]]:
    """The examples by page and framework; "" for those of a page that need none."""
    found: dict[tuple[str, str], list[str]] = {}
    for page in PAGES:
        text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
        examples = re.findall(r"^```python ?(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        for framework in {framework for framework, _ in examples}:
            found[name, framework] = [source for tag, source in examples if tag in ("", framework)]
    return dict(sorted(found.items()))


PROGRAMS = programs()


def test_there_is_one_for_each_framework() -> None:
    assert {framework for name, framework in PROGRAMS if name == "README.md"} == {"", "torch"}
    for page in ("docs/tutorials/merging.md", "docs/tutorials/continual.md"):
        assert {framework for name, framework in PROGRAMS if name == page} == {"", *FRAMEWORKS}


def test_each_is_for_a_framework_there_is() -> None:
    assert {framework for _, framework in PROGRAMS} == {"", *FRAMEWORKS, ANY_FRAMEWORK}


# Of PyTorch by Lightning, and of what Lightning would have its users do.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize(("page", "framework"), PROGRAMS)
def test_an_example_runs(page: str, framework: str, backend: str) -> None:
    if framework not in ("", backend) and not (framework == ANY_FRAMEWORK and backend in FRAMEWORKS):
        pytest.skip(f"this example is for {framework}")
    for package in OTHERS:
        if re.search(rf"^(from|import) {package}\b", "\n".join(PROGRAMS[page, framework]), re.MULTILINE):
            pytest.importorskip(package, reason="an example uses it, and it is not installed")
    registries: list[Catalogue[Any]] = [METHODS, PROJECTORS]
    if framework == ANY_FRAMEWORK:
        catalogue = importlib.import_module("adapters.benchmarks.catalogue")
        registries.append(catalogue.BENCHMARKS)
    before = [registry.names for registry in registries]
    names: dict[str, object] = {"__name__": "example"}
    try:
        for number, source in enumerate(PROGRAMS[page, framework], start=1):
            exec(compile(source, f"{page}, example {number} for {framework or 'all'}", "exec"), names)
    finally:  # other tests compare the registries with the documentation
        for registry, known in zip(registries, before, strict=True):
            for name in set(registry.names) - set(known):
                registry.remove(name)
