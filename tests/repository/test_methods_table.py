"""The documentation's table of methods names every recipe, and nothing that is not a method."""

import re
from pathlib import Path

from became_core.continual import METHODS, method_names

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")


def test_the_methods_are_those_of_the_table() -> None:
    section = re.search(r"^## Methods$(.*?)(?=^## )", PAGE, re.DOTALL | re.MULTILINE)
    assert section, "the page has no heading `## Methods`"
    rows = re.findall(r"^\| (`[^|]*`) \|", section[1], re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(names) == len(set(names))
    assert set(METHODS.names) <= set(names) <= set(method_names())
