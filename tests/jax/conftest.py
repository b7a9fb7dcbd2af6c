"""JAX for the tests of its adapter: in double precision; without JAX there is nothing here to collect."""

from importlib.util import find_spec

import pytest

from tests.backends import load

collect_ignore_glob = [] if find_spec("jax") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _configured(request: pytest.FixtureRequest) -> None:
    load("jax", str(request.config.getoption("--device")))
