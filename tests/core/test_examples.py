"""The examples in the docstrings of the core run and print what they say."""

import doctest
import pkgutil
from importlib import import_module

import pytest

import became_core

# Modules that only a framework's own arrays ask for.
OF_ONE_FRAMEWORK = {"became_core.arrays.tensorflow": "tensorflow", "became_core.arrays.dtensor": "torch"}
MODULES = ["became_core", *(module.name for module in pkgutil.walk_packages(became_core.__path__, "became_core."))]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    if name in OF_ONE_FRAMEWORK:
        pytest.importorskip(OF_ONE_FRAMEWORK[name], reason=f"{OF_ONE_FRAMEWORK[name]} is not installed")
    failed, _ = doctest.testmod(import_module(name))
    assert not failed


def test_many_modules_have_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [import_module(name) for name in MODULES if name not in OF_ONE_FRAMEWORK]
    assert sum(bool(test.examples) for module in modules for test in finder.find(module)) >= 20
