"""Hooks that MkDocs calls: formulas, generated tables, pages from elsewhere, and a check for network requests.

Convention: formulas on a page are LaTeX between dollar signs. The built page has them as MathML, which browsers show
without a script.
"""

import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

from became_core.continual import METHODS, method_settings
from became_core.projection import PROJECTORS
from became_core.registry import Registry
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
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
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</\1>',
    re.DOTALL,
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
# What a browser would request from another server. Links are not among it: only a reader's click follows them.
REQUEST = re.compile(
    r'<(?!a\b)\w+[^>]*\s(?:src|href|srcset|data|poster)\s*=\s*"?(?:https?:)?//[^>]*>'
    r'|(?:url\(|@import)\s*["\']?(?:https?:)?//'
)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages whose source is outside docs/."""
    for page, source in ELSEWHERE.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(
            File.generated(config, page, content=LINK.sub(_link_on_site(source), content))
        )
    return files


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


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with generated tables, and with a title on each code block that needs a framework."""
    for marker, registry in REGISTRIES.items():
        markdown = markdown.replace(f"<!-- table of {marker} -->", table(registry))
    markdown = markdown.replace("<!-- table of settings -->", settings_table())
    return re.sub(r"^```python (\w+)$", _fence_with_title, markdown, flags=re.MULTILINE)


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


def _fence_with_title(match: re.Match[str]) -> str:
    return f'```{{ .python title="{FRAMEWORKS[match[1]]}" }}'


def on_page_content(html: str, **_: Any) -> str:
    """Return the page with its formulas as MathML."""
    return FORMULA.sub(_mathml, html)


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match["block"] is not None else "inline"
    return str(convert(unescape(match[display]), display=display))


def on_post_build(config: Any) -> None:
    """Fail if a page would request anything from a network."""
    for file in sorted(Path(config.site_dir).rglob("*")):
        if file.suffix in (".html", ".css"):
            request = REQUEST.search(file.read_text(encoding="utf-8"))
            if request:
                raise PluginError(f"{file} fetches from a network: {request[0]}")
