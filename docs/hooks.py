"""What MkDocs is told beyond its configuration: mathematics, pages kept elsewhere, and that nothing needs a network.

Convention: formulas are LaTeX between dollars; a page has them as MathML, which browsers show by themselves.
"""

import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Pages of the site that lie elsewhere in the repository, where readers of the code look for them.
ELSEWHERE = {
    "results.md": "RESULTS.md",
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
# Where their links lead to on the site.
LINKS = {target: page for page, target in ELSEWHERE.items()} | {"README.md": "index.md"}
LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(#[^)]*)?\)")
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</\1>',
    re.DOTALL,
)
# How the title of a block of code names the framework that it is for.
FRAMEWORKS = {"torch": "PyTorch", "jax": "JAX", "tensorflow": "TensorFlow", "run": "any framework"}
# What a browser would fetch from elsewhere; links, which a reader follows, are no part of it.
FETCHED = re.compile(
    r'<(?!a\b)\w+[^>]*\s(?:src|href|srcset|data|poster)\s*=\s*"?(?:https?:)?//[^>]*>'
    r'|(?:url\(|@import)\s*["\']?(?:https?:)?//'
)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere."""
    for page, source in ELSEWHERE.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(
            File.generated(config, page, content=LINK.sub(_on_the_site(source), content))
        )
    return files


def _on_the_site(source: str) -> Callable[[re.Match[str]], str]:
    """How a link of such a page reads on the site: to another page, or, of a file that is none, as its name."""

    def link(match: re.Match[str]) -> str:
        name, target, anchor = match.groups(default="")
        if "://" in target:
            return match[0]
        path = (ROOT / source).parent.joinpath(target).resolve().relative_to(ROOT).as_posix()
        page = LINKS.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        return f"`{name}`" if page is None else f"[{name}]({page}{anchor})"

    return link


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page in which a block of code for a framework, ``python torch``, has a title that says so."""
    return re.sub(r"^```python (\w+)$", _titled, markdown, flags=re.MULTILINE)


def _titled(match: re.Match[str]) -> str:
    return f'```{{ .python title="{FRAMEWORKS[match[1]]}" }}'


def on_page_content(html: str, **_: Any) -> str:
    """Return a page with its formulas as MathML."""
    return FORMULA.sub(_mathml, html)


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match["block"] is not None else "inline"
    return str(convert(unescape(match[display]), display=display))


def on_post_build(config: Any) -> None:
    """Fail if a page would fetch anything from a network."""
    pages = [
        file
        for file in sorted(Path(config.site_dir).rglob("*"))
        if file.suffix in (".html", ".css")
    ]
    for file in pages:
        found = FETCHED.search(file.read_text(encoding="utf-8"))
        if found:
            raise PluginError(f"{file} fetches from a network: {found[0]}")
