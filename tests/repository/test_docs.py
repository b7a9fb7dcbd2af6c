"""What the site's pages name is there: files, options, functions, values, methods.

Convention: a name in code is an option if it begins with ``--``, a class if it begins with a capital.
"""

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

import became_core
from became_core import continual, curvature, laplace, projection
from became_core.continual import METHODS, method_names, method_settings, projector_names
from became_core.projection import PROJECTORS

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
# Pages of the site that docs/pages.py takes from elsewhere.
ELSEWHERE = {"results.md", "benchmarks.md", "contributing.md", "changelog.md"}
# Commands of others, whose options are theirs.
OTHERS = ("torchrun ", "pip ", "nox", "mkdocs ", "dask ", "python benchmarks/")


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text(page), flags=re.DOTALL | re.MULTILINE)


def code(page: Path) -> list[str]:
    """What stands between single backquotes."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def fields_of_commands() -> set[str]:
    """The options of all commands: of configurations, and fields of the classes that ``adapters/cli`` reads."""
    pytest.importorskip("safetensors", reason="the command's own packages are not installed")
    found = set(importlib.import_module("adapters.runs.options").options())
    for file in (ROOT / "adapters" / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(text(file))):
            if isinstance(node, ast.ClassDef):
                fields = [each.target for each in node.body if isinstance(each, ast.AnnAssign)]
                found |= {field.id for field in fields if isinstance(field, ast.Name)}
    options = {"--" + name.rstrip("_").replace("_", "-") for name in found}
    return options | {"--help", "--help-all", "--tyro-write-completion"}


@cache
def classes() -> frozenset[str]:
    """The names of all classes in the repository's packages."""
    return frozenset(
        node.name
        for package in ("became_core", "adapters")
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(text(file)))
        if isinstance(node, ast.ClassDef)
    )


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_link_within_the_repository_leads_somewhere(page: Path) -> None:
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose(page))]
    inside = [target for target in targets if target and "://" not in target]
    missing = [target for target in inside if not (page.parent / target).exists() and target not in ELSEWHERE]
    assert [t for t in missing if (page.parent / t).resolve().name not in ELSEWHERE] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_an_option_is_one(page: Path) -> None:
    lines = [line for line in text(page).splitlines() if not line.startswith(OTHERS)]
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", "\n".join(lines)))
    declared_here = {f"--{name.replace('_', '-')}" for name in re.findall(r'option="(\w+)"', text(page))}
    assert sorted(options - fields_of_commands() - declared_here) == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_class_is_one(page: Path) -> None:
    defined_here = set(re.findall(r"^class (\w+)", text(page), re.MULTILINE))
    named = {name for each in code(page) for name in re.findall(r"^[A-Z]\w*[a-z]\w*", each) if not each.isupper()}
    assert sorted(named - classes() - defined_here) == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_function_is_one(page: Path) -> None:
    """Of names with an underscore, or that stand with a class or a module: all are attributes of what is public."""
    public = {name for package in (became_core, continual, curvature, laplace, projection) for name in package.__all__}
    known = set(method_names()) | set(projector_names()) | public
    for each in code(page):
        owner, _, attribute = each.partition(".")
        if owner in public and re.fullmatch(r"\w+", attribute):
            value = next(
                getattr(package, owner)
                for package in (became_core, continual, curvature, laplace, projection)
                if hasattr(package, owner)
            )
            assert hasattr(value, attribute) or attribute in getattr(value, "__annotations__", {}), each
        elif re.fullmatch(r"became_core(\.\w+)+", each):
            resolved(each)
        elif re.fullmatch(r"[a-z]+(_[a-z]+)+", each) and not each.endswith("_"):
            assert each in known or is_an_attribute(each) or re.search(rf"\b{each}\b", blocks(page)), each


def blocks(page: Path) -> str:
    return "\n".join(re.findall(r"^```.*?^```", text(page), re.DOTALL | re.MULTILINE))


def is_an_attribute(name: str) -> bool:
    """Whether any public value has it, as an attribute or an argument."""
    sources = (text(file) for file in (ROOT / "became_core").rglob("*.py"))
    return any(re.search(rf"^\s+{name}:|def {name}\(", source, re.MULTILINE) for source in sources)


def resolved(name: str) -> object:
    """A module, or what is in one."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


def test_the_pages_of_the_api_are_of_modules_there_are() -> None:
    """They are found and not loaded, because each framework's needs the framework."""
    modules = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", text(page), re.MULTILINE)]
    assert len(modules) > 4
    for name in modules:
        file = ROOT / name.replace(".", "/")
        assert file.with_suffix(".py").exists() or (file / "__init__.py").exists(), name


def test_every_file_that_is_named_is_there() -> None:
    named = {
        each
        for page in PAGES
        for each in code(page)
        if re.fullmatch(r"(became_core|adapters|tests|benchmarks|docs)/[\w/.]+", each)
    }
    assert sorted(each for each in named if not (ROOT / each).exists()) == []


def test_every_method_and_projector_is_explained() -> None:
    """The recipes on the page; every name, those of new projectors too, in the tables that are made of registries."""
    page = text(ROOT / "docs" / "methods.md")
    assert sorted(name for name in METHODS.names if f"`{name}`" not in page) == []
    tables = text(ROOT / "docs" / "reference" / "choices.md")
    assert "<!-- table of methods -->" in tables
    assert "<!-- table of projectors -->" in tables
    assert all(METHODS.summary(name) for name in METHODS.names)
    assert all(PROJECTORS.summary(name) for name in PROJECTORS.names)
    assert all(setting.help for setting in method_settings().values())


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"- (?:Start: )?([\w/]+\.md)$", text(ROOT / "mkdocs.yml"), re.MULTILINE))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES} | ELSEWHERE


def test_the_gallery_shows_four_figures_of_a_report_and_the_commands_that_made_them() -> None:
    page = text(ROOT / "docs" / "index.md")
    files = [ROOT / "docs" / name for name in re.findall(r"\]\((figures/gallery/[\w.-]+)\)", page)]
    assert len(files) == 4
    assert sorted(files) == sorted((ROOT / "docs" / "figures" / "gallery").iterdir())
    assert all("prefers-color-scheme: dark" in text(file) for file in files)
    methods = re.search(r"^became run .*--methods ([a-z -]+) --out", page.replace("\\\n", ""), re.MULTILINE)
    assert methods
    plasticity = text(ROOT / "docs" / "figures" / "gallery" / "plasticity.svg")
    assert [name for name in methods[1].split() if f">{name}<" not in plasticity] == []


def test_no_page_holds_the_marks_of_a_merge() -> None:
    pages = [*PAGES, *ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    assert [page.name for page in pages if re.search(r"^(<{7} |={7}$|>{7} )", text(page), re.MULTILINE)] == []
