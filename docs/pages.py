"""The pages of the documentation site, made before a site generator reads them.

``python docs/pages.py`` writes them into ``build/pages``: the pages of ``docs``, and those whose source is elsewhere in
the repository, with formulas, tables of what is registered, and titles of code blocks. A generator then needs nothing
but Markdown. ``python docs/pages.py check`` examines the built site.

Convention: formulas are LaTeX between dollar signs. The made page has them as MathML, which browsers show without a
script.
"""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from became_core.continual import METHODS, method_settings
from became_core.projection import PROJECTORS
from became_core.registry import Registry

ROOT = Path(__file__).parents[1]
MADE = ROOT / "build" / "pages"
# Pages of the site whose source is outside docs/, where readers of the code look for it.
ELSEWHERE = {
    "results.md": "RESULTS.md",
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
# For each file that has a page, the page.
PAGES = {source: page for page, source in ELSEWHERE.items()} | {"README.md": "index.md"}
LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(#[^)]*)?\)")
# Code, which is left as it is, or a formula: a displayed one, or one within a line, which may go on in the next line.
CODE_OR_FORMULA = re.compile(
    r"(?P<code>^(?P<fence> *```+)[^\n]*\n.*?^(?P=fence)$|(?P<quotes>`+).+?(?P=quotes))"
    r"|\$\$(?P<block>.+?)\$\$|(?<![\\\w$])\$(?=\S)(?P<inline>(?:[^$\n]|\n(?!\s*\n))+?)(?<=\S)\$(?!\w)",
    re.DOTALL | re.MULTILINE,
)
# The title of a code block by the word after "python": one framework, or "run" for any framework that trains.
FRAMEWORKS = {
    "torch": "PyTorch",
    "jax": "JAX",
    "tensorflow": "TensorFlow",
    "run": "Any framework",
}
# The registries of which a page can have a table, by a line such as ``<!-- table of projectors -->``.
REGISTRIES: dict[str, Registry[Any]] = {"methods": METHODS, "projectors": PROJECTORS}
# Where a generator puts the search index that a page can load without a server: MkDocs' theme, and Zensical.
SEARCH_INDICES = ("search/search_index.js", "search.js")
# What a browser would request from another server. Links are not among it: only a reader's click follows them.
REQUEST = re.compile(
    r'<(?!a\b)\w+[^>]*\s(?:src|href|srcset|data|poster)\s*=\s*"?(?:https?:)?//[^>]*>'
    r'|(?:url\(|@import)\s*["\']?(?:https?:)?//'
)


def write_pages(into: Path = MADE) -> None:
    """Write everything that the site is made of into a folder, which is emptied first."""
    shutil.rmtree(into, ignore_errors=True)
    tools = shutil.ignore_patterns("*.py", "*.toml", "__pycache__")
    shutil.copytree(ROOT / "docs", into, ignore=tools)
    for file in sorted(into.rglob("*.md")):
        link = _link_from_docs(file.relative_to(into))
        file.write_text(LINK.sub(link, file.read_text(encoding="utf-8")), encoding="utf-8")
    for page, source in ELSEWHERE.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        (into / page).write_text(LINK.sub(_link_on_site(source), content), encoding="utf-8")
    for file in sorted(into.rglob("*.md")):
        file.write_text(made(file.read_text(encoding="utf-8")), encoding="utf-8")


def _link_from_docs(page: Path) -> Callable[[re.Match[str]], str]:
    """Return the function that rewrites a link of a page of ``docs`` to a file outside, if that file has a page."""

    def link(match: re.Match[str]) -> str:
        name, target, anchor = match.groups(default="")
        path = (ROOT / "docs" / page).parent.joinpath(target).resolve()
        other = (
            PAGES.get(path.relative_to(ROOT).as_posix()) if path.is_relative_to(ROOT) else None
        )
        if other is None:
            return match[0]
        return f"[{name}]({'../' * (len(page.parts) - 1)}{other}{anchor})"

    return link


def _link_on_site(source: str) -> Callable[[re.Match[str]], str]:
    """Return the function that rewrites a link of a source file for the site.

    A link to a file that has a page becomes a link to the page. A link to any other file becomes the file's name.
    """

    def link(match: re.Match[str]) -> str:
        name, target, anchor = match.groups(default="")
        if "://" in target:
            return match[0]
        path = (ROOT / source).parent.joinpath(target).resolve().relative_to(ROOT).as_posix()
        page = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        return f"`{name}`" if page is None else f"[{name}]({page}{anchor})"

    return link


def made(markdown: str) -> str:
    """Return a page with its tables, its formulas, and a title on each code block that needs a framework."""
    markdown = CODE_OR_FORMULA.sub(_mathml, markdown)
    for marker, registry in REGISTRIES.items():
        markdown = markdown.replace(f"<!-- table of {marker} -->", table(registry))
    markdown = markdown.replace("<!-- table of settings -->", settings_table())
    return re.sub(r"^( *)```python (\w+)$", _fence_with_title, markdown, flags=re.MULTILINE)


def table(registry: Registry[Any]) -> str:
    """Return a table of all entries of a registry, with the first lines of their docstrings and their options."""
    rows = []
    for name in registry.names:
        options = ", ".join(
            f"`--{option.replace('_', '-')}`" for option in registry.options_of(name)
        )
        rows.append(f"| `{name}` | {registry.summary(name)} | {options} |")
    return "\n".join(["| name | what it does | settings |", "| --- | --- | --- |", *rows])


def settings_table() -> str:
    """Return a table of the settings of all methods and projectors."""
    rows = [
        f"| `--{option.replace('_', '-')}` | {setting.default} | {setting.help} |"
        for option, setting in sorted(method_settings().items())
    ]
    return "\n".join(["| option | default | what it is |", "| --- | --- | --- |", *rows])


def _mathml(match: re.Match[str]) -> str:
    if match["code"] is not None:
        # The style sheet keeps an option on one line, which browsers would break between its dashes.
        return f"{match[0]}{{ .option }}" if re.fullmatch("`--[^` ]+`", match[0]) else match[0]
    from latex2mathml.converter import convert  # only who makes the site needs it

    display = "block" if match["block"] is not None else "inline"
    # A span, because Markdown would take a line that begins with <math> for the beginning of a block.
    formula = f"<span>{convert(match[display].strip(), display=display)}</span>"
    # A hat is an accent, and its character the combining one: browsers set "^" as high as a letter of its own.
    formula = formula.replace("<mover>", '<mover accent="true">')
    return formula.replace(
        "<mo>&#x0005E;</mo></mover>", '<mo stretchy="false">&#x00302;</mo></mover>'
    )


def _fence_with_title(match: re.Match[str]) -> str:
    return f'{match[1]}```{{ .python title="{FRAMEWORKS[match[2]]}" }}'


def check_site(site: Path) -> None:
    """Fail if the search of the built site needs a server, or a page would request anything from a network.

    Raises:
        SystemExit: with a sentence that names the file.
    """
    if not any((site / index).exists() for index in SEARCH_INDICES):
        sys.exit(f"{site} has no search index that a page read from a folder can load.")
    for file in sorted(site.rglob("*")):
        if file.suffix in (".html", ".css"):
            request = REQUEST.search(file.read_text(encoding="utf-8"))
            if request:
                sys.exit(f"{file} fetches from a network: {request[0]}")


if __name__ == "__main__":
    if sys.argv[1:] == ["check"]:
        check_site(ROOT / "site")
    else:
        write_pages()
