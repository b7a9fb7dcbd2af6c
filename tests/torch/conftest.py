"""PyTorch for the tests of its adapter, on the device that is asked for."""

import pytest

from tests.backends import load


@pytest.fixture(scope="session", autouse=True)
def _configured(request: pytest.FixtureRequest) -> None:
    load("torch", str(request.config.getoption("--device")))
