"""What is of Python or of the reference's NumPy alone is tested once, on NumPy.

A session on another backend runs here only what asks for its arrays, and the tests of its own namespace.
"""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
NAMESPACES = {FOLDER / "arrays" / "test_tensorflow.py": "tensorflow"}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out a namespace's tests on all other backends, before its framework is imported."""
    return NAMESPACES.get(collection_path, config.getoption("--backend")) != config.getoption("--backend") or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    backend = config.getoption("--backend")

    def concerns(item: pytest.Item) -> bool:
        if not item.path.is_relative_to(FOLDER):
            return True
        return item.path in NAMESPACES or backend == "numpy" or "backend" in getattr(item, "fixturenames", ())

    left_out = [item for item in items if not concerns(item)]
    items[:] = [item for item in items if concerns(item)]
    config.hook.pytest_deselected(items=left_out)
