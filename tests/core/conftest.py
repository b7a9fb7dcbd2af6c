"""What is of Python or of the reference's NumPy alone is tested once, on NumPy.

A session on another backend runs here only what asks for its arrays, and the tests of its own namespace.
"""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
NAMESPACES = {FOLDER / "arrays" / "test_tensorflow.py": "tensorflow"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    backend = config.getoption("--backend")

    def concerns(item: pytest.Item) -> bool:
        if not item.path.is_relative_to(FOLDER):
            return True
        if item.path in NAMESPACES:
            return bool(NAMESPACES[item.path] == backend)
        return backend == "numpy" or "backend" in getattr(item, "fixturenames", ())

    left_out = [item for item in items if not concerns(item)]
    items[:] = [item for item in items if concerns(item)]
    config.hook.pytest_deselected(items=left_out)
