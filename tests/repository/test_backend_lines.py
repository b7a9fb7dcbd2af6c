"""What a backend must write itself stays as short as it is promised to be, and no module is left out of the count."""

import re

import pytest

from tests.repository.count_backend_lines import ADAPTERS, LIMIT, PARTS, count_lines


def test_a_jax_learner_is_no_longer_than_promised() -> None:
    assert 100 < count_lines("jax", "learner") <= LIMIT


@pytest.mark.parametrize("part", ["learner", "layers", "command", "own models"])
def test_the_page_for_contributors_has_the_count(part: str) -> None:
    (module,) = PARTS["jax"][part]
    page = (ADAPTERS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert re.findall(rf"{module}\.py` \((\d+) lines", page) == [str(count_lines("jax", part))]


def test_every_module_of_an_adapter_is_counted_once() -> None:
    for framework, parts in PARTS.items():
        counted = [name for names in parts.values() for name in names]
        modules = [file.stem for file in (ADAPTERS / framework).glob("*.py") if file.stem != "__init__"]
        assert sorted(counted) == sorted(modules)
