"""The examples in the docstrings of the core run and print what they say."""

import doctest
import pkgutil
from importlib import import_module

import pytest

import became_core

MODULES = ["became_core", *(module.name for module in pkgutil.walk_packages(became_core.__path__, "became_core."))]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    failed, _ = doctest.testmod(import_module(name))
    assert not failed


def test_many_modules_have_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    assert sum(bool(test.examples) for name in MODULES for test in finder.find(import_module(name))) >= 20
