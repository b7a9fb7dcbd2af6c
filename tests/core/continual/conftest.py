"""Loops, methods and metrics are of Python and of the reference learner's NumPy: they are tested once, on NumPy.

A session on another backend runs here only what asks for its arrays.
"""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--backend") == "numpy":
        return
    indifferent = {
        item
        for item in items
        if item.path.is_relative_to(FOLDER) and "backend" not in getattr(item, "fixturenames", ())
    }
    items[:] = [item for item in items if item not in indifferent]
    config.hook.pytest_deselected(items=list(indifferent))
