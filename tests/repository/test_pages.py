"""The pages of the site are made before a generator reads them, and a generator needs nothing but Markdown."""

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from became_core.continual import METHODS, method_settings
from became_core.projection import PROJECTORS

ROOT = Path(__file__).parents[2]
PAGES = runpy.run_path(str(ROOT / "docs" / "pages.py"))


@pytest.fixture(autouse=True)
def formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show the LaTeX of a formula in place of its MathML, which needs a package that only the site's session has."""
    converter = SimpleNamespace(convert=lambda latex, display: f"<math {display}>{latex}</math>")
    monkeypatch.setitem(sys.modules, "latex2mathml.converter", converter)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    PAGES["write_pages"](tmp_path / "pages")
    return tmp_path / "pages"


def test_every_page_of_the_navigation_is_made_and_every_link_leads_to_one(folder: Path) -> None:
    listed = re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = {page.relative_to(folder).as_posix(): page for page in folder.rglob("*.md")}
    assert sorted(pages) == sorted(listed)
    for page in pages.values():
        prose = re.sub(r"^```.*?^```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose)]
        assert [link for link in links if link and "://" not in link and not (page.parent / link).exists()] == []
    assert not list(folder.rglob("*.py"))


def test_tables_hold_all_that_is_registered(folder: Path) -> None:
    text = (folder / "reference" / "choices.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    options = [f"--{option.replace('_', '-')}" for option in method_settings()]
    assert sorted(names) == sorted([*METHODS.names, *PROJECTORS.names, *options])
    assert "<!-- table" not in text


def test_formulas_are_made_and_code_is_left_alone() -> None:
    text = "Of $\\hat\n\\theta$, not `$HOME`:\n\n```sh\necho $x $y\n```\n\n$$\nb + c\n$$\n\nIt costs 5$ or 6$.\n"
    made = PAGES["made"](text)
    formulas = re.findall(r"<math (\w+)>(.*?)</math>", made, re.DOTALL)
    assert formulas == [("inline", "\\hat\n\\theta"), ("block", "b + c")]
    assert "`$HOME`" in made
    assert PAGES["made"]("`--lr`, `--lr 1`, `lr`") == "`--lr`{ .option }, `--lr 1`, `lr`"
    assert "echo $x $y" in made
    assert "It costs 5$ or 6$." in made


def test_no_formula_is_left_for_the_generator(folder: Path) -> None:
    for page in folder.rglob("*.md"):
        prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        assert not re.search(r"\$[^$]+\$", prose), page.name


def test_a_block_of_code_names_its_framework() -> None:
    assert PAGES["made"]("```python jax\n1\n```\n") == '```{ .python title="JAX" }\n1\n```\n'
    assert PAGES["made"]("```python\n1\n```\n") == "```python\n1\n```\n"


def test_the_generator_runs_no_code_of_ours() -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert not re.search(r"^(hooks|  - macros|  - gen-files)", settings, re.MULTILINE)
    assert "docs_dir: build/pages\n" in settings


@pytest.mark.parametrize("index", ["search/search_index.js", "search.js"])
def test_a_site_that_needs_a_server_or_a_network_is_refused(tmp_path: Path, index: str) -> None:
    with pytest.raises(SystemExit, match="no search index"):
        PAGES["check_site"](tmp_path)
    (tmp_path / index).parent.mkdir(exist_ok=True)
    (tmp_path / index).touch()
    page = tmp_path / "index.html"
    page.write_text('<a href="https://example.org">a link</a><script src="a.js"></script>')
    PAGES["check_site"](tmp_path)
    page.write_text('<script src="https://example.org/a.js"></script>')
    with pytest.raises(SystemExit, match=r"index\.html fetches from a network"):
        PAGES["check_site"](tmp_path)
