"""The packages' ranks, and what each may import; that nothing asks which projector, rule or method a value is; that
modules explain themselves; that the public API is as published.

Convention: a package may import from packages of lower rank and from itself. ``became_core``, the facade, ranks above
all that is within it.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import became_core

ROOT = Path(__file__).parents[2]
RANKS = {
    "became_core.errors": 0,
    "became_core.registry": 1,
    "became_core.arrays": 1,
    "became_core.precision": 2,
    "became_core.laplace": 3,
    "became_core.curvature": 3,
    "became_core.projection": 3,
    "became_core.continual": 4,
    "became_core": 5,
    "adapters": 6,
    "became": 7,
}
FRAMEWORKS = {"torch", "jax", "tensorflow", "keras", "flax"}
# What is special about a class derived from one of these stands in its own file: others call its hooks.
HOOKED = {"Projector", "Region", "MergeRule", "MethodRecipe"}
WITH_FRAMEWORK = tuple(f"adapters.{name}." for name in ("torch", "jax", "tensorflow"))


def sources(*packages: str) -> Iterator[Path]:
    for package in packages:
        file = ROOT / f"{package}.py"
        yield from [file] if file.exists() else sorted((ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(name: str) -> str | None:
    """The ranked package that a dotted name lies in: the longest that is a part of it."""
    return max((package for package in RANKS if f"{name}.".startswith(f"{package}.")), key=len, default=None)


def imports(tree: ast.AST, *, lazy: bool) -> Iterator[str]:
    """Every dotted name that is imported; those within functions only if ``lazy``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A relative import would hide the rank; naming it so makes it a violation.
            base = node.module if node.module and not node.level else "adapters.(relative)"
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(node, lazy=lazy)


def violations(module: str, source: str) -> list[str]:
    """What a module imports although its rank, or its freedom from frameworks, forbids it."""
    tree = ast.parse(source)
    top, own = module.partition(".")[0], package_of(module)
    found = []
    for name in imports(tree, lazy=True):
        other = package_of(name)
        if own and other and other != own and RANKS[other] >= RANKS[own]:
            found.append(f"{module} imports {name}")
        if (top in {"became_core", "adapters"} and name.startswith("reference.")) or (
            top == "reference" and other == "adapters"
        ):
            found.append(f"{module} imports {name}")
    if not f"{module}.".startswith(WITH_FRAMEWORK):
        at_import = imports(tree, lazy=False)
        found += [f"{module} imports {name}" for name in at_import if name.partition(".")[0] in FRAMEWORKS]
    return found


def test_no_module_imports_what_its_rank_forbids() -> None:
    paths = list(sources("became", "became_core", "adapters", "reference"))
    assert {package_of(module_of(path)) for path in paths} >= set(RANKS)  # every rank has modules to look at
    assert [line for path in paths for line in violations(module_of(path), path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("became_core.errors", "from became_core.arrays import xp"),
        ("became_core.arrays.trees", "import became_core.laplace.quadratic"),
        ("became_core.precision.base", "from became_core.laplace.quadratic import Quadratic"),
        ("became_core.laplace.merge", "from became_core.curvature.taps import taps"),
        ("became_core.projection.gpm", "from became_core import laplace"),
        ("became_core.curvature.fisher", "def f():\n    from became_core.continual import loop"),
        ("became_core.continual.run", "from became_core import merge"),
        ("became_core.continual.run", "from ..adapters import data"),
        ("became_core.continual.run", "def f():\n    import adapters.torch"),
        ("became_core", "import adapters"),
        ("became_core.arrays.trees", "try:\n    import torch.nn\nexcept ImportError:\n    pass"),
        ("became_core.arrays.trees", "from reference.oracle import alpha"),
        ("reference.oracle", "from jax import numpy"),
        ("reference.oracle", "from adapters.benchmarks import mnist"),
        ("adapters.networks.layers", "import torch"),
        ("adapters.torch.run", "from became import main"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("became_core.laplace.merge", "from became_core.arrays import xp\nfrom became_core.laplace.path import trace"),
        ("became_core.arrays.namespace", "def f():\n    import torch"),
        ("became_core", "from became_core.laplace import merge"),
        ("adapters.torch.run", "import torch\nfrom became_core import merge"),
        ("became", "from adapters.cli.__main__ import main"),
        ("reference.oracle", "import numpy\nfrom became_core.continual.learner import Learner"),
    ],
)
def test_an_allowed_import_is_not(module: str, source: str) -> None:
    assert violations(module, source) == []


def derived_classes(sources: dict[str, str]) -> dict[str, str]:
    """The module of each class that is derived from one of ``HOOKED``, at any depth; sources are by module."""
    bases: dict[str, set[str]] = {}
    modules: dict[str, str] = {}
    for module, source in sources.items():
        tree = ast.parse(source)
        named_otherwise = aliases(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {named_otherwise.get(name, name) for base in node.bases for name in last_names(base)}
                modules[node.name] = module
    derived: set[str] = set()
    while more := {name for name in bases.keys() - derived if bases[name] & (HOOKED | derived)}:
        derived |= more
    return {name: modules[name] for name in derived}


def aliases(tree: ast.AST) -> dict[str, str]:
    """Every name that an import gives to something, with the name that it has where it is defined."""
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.asname: alias.name for node in imported for alias in node.names if alias.asname}


def last_names(node: ast.AST) -> set[str]:
    """The names within an expression; of ``a.b``, b."""
    if isinstance(node, ast.Attribute):
        return {node.attr}
    if isinstance(node, ast.Name):
        return {node.id}
    return {name for child in ast.iter_child_nodes(node) for name in last_names(child)}


def questions(tree: ast.AST) -> Iterator[ast.AST]:
    """What a module compares the class of a value with, in every way that Python has."""
    asking = {"isinstance", "issubclass"}
    asking |= {name for name, original in aliases(tree).items() if original in asking}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and len(node.args) == 2 and last_names(node.func) & asking:
            yield node.args[1]
        elif isinstance(node, ast.MatchClass):
            yield node.cls
        elif isinstance(node, ast.Compare) and any(
            last_names(side.func if isinstance(side, ast.Call) else side) & {"type", "__class__"}
            for side in [node.left, *node.comparators]
        ):
            yield node


def named_classes(module: str, source: str, derived: dict[str, str]) -> list[str]:
    """The derived classes of other modules that a module asks for by name."""
    tree = ast.parse(source)
    named_otherwise = aliases(tree)
    names = {named_otherwise.get(name, name) for node in questions(tree) for name in last_names(node)}
    return [f"{module} asks for {name}" for name in sorted(names & derived.keys()) if derived[name] != module]


def test_no_module_asks_which_projector_rule_or_method_a_value_is() -> None:
    paths = sources("became", "became_core", "adapters")
    by_module = {module_of(path): path.read_text(encoding="utf-8") for path in paths}
    derived = derived_classes(by_module)
    assert {"GPM", "SGP", "TRGP", "TrustRegion", "HAT", "PackNet", "Became", "ModeIMM"} <= derived.keys()
    assert [line for module, source in by_module.items() for line in named_classes(module, source, derived)] == []


FAMILY = {
    "became_core.projection.base": "class Projector: pass",
    "became_core.projection.gpm": "class GPM(Rising): pass",
    "became_core.projection.layerwise": "from became_core.projection import base\nclass Rising(base.Projector): pass",
    "became_core.laplace.rules": (
        "from became_core.laplace import MergeRule as Rule\nclass Became(Rule): pass\nclass Other: pass"
    ),
}


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(x, GPM)",
        "isinstance(x, projection.GPM)",
        "isinstance(x, (int, GPM))",
        "isinstance(x, Became | int)",
        "issubclass(x, Rising)",
        "def f(x):\n    return type(x) is GPM",
        "type(x) in (GPM, int)",
        "x.__class__ == Became",
        "from became_core.laplace import Became as B\nisinstance(x, B)",
        "match x:\n    case GPM(threshold=t):\n        pass",
        "from builtins import isinstance as is_a\nis_a(x, GPM)",
    ],
)
def test_a_question_for_a_class_by_name_is_found(source: str) -> None:
    assert len(named_classes("became_core.continual.run", source, derived_classes(FAMILY))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("became_core.projection.gpm", "isinstance(x, GPM)"),  # its own file
        ("became_core.continual.run", "isinstance(x, Projector)"),
        ("became_core.continual.run", "isinstance(x, Other)"),
        ("became_core.continual.run", "rule = Became()\nassert isinstance(rule.alpha, float)"),
        ("became_core.continual.run", "x == GPM"),
    ],
)
def test_what_asks_for_no_derived_class_is_not(module: str, source: str) -> None:
    assert named_classes(module, source, derived_classes(FAMILY)) == []


def test_importing_the_core_loads_no_framework_and_no_adapter() -> None:
    loaded = "import sys, became_core; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    names = set(done.stdout.split())
    assert "became_core" in names
    assert names.isdisjoint(FRAMEWORKS | {"adapters", "reference"})


def test_every_module_says_what_it_holds() -> None:
    silent = [
        module_of(path)
        for path in sources("became", "became_core", "adapters", "reference")
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


def test_the_public_names_are_those_in_the_documentation() -> None:
    page = (ROOT / "docs" / "reference" / "core.md").read_text(encoding="utf-8")
    section = re.search(r"^## The names at a glance$(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    assert section, "the page has no heading `## The names at a glance`"
    cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", section[1], re.MULTILINE)
    documented = [name for cell in cells for name in re.findall(r"\w+", cell)]
    assert sorted(documented) == sorted(became_core.__all__)
    assert all(hasattr(became_core, name) for name in documented)
