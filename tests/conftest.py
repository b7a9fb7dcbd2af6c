"""What every test may ask for: the backend's namespace ``xp``, and hypothesis in a fixed profile.

``pytest --backend {numpy,strict,strictest,torch,jax,tensorflow,dask,cupy}`` chooses the backend, and ``--device gpu``
has PyTorch's, JAX's and TensorFlow's arrays live on a GPU.
``HYPOTHESIS_PROFILE=long`` searches longer, at random.
"""

import gc
import os
import sys
from collections.abc import Callable, Generator
from concurrent.futures import Future
from functools import wraps
from threading import Thread
from typing import Any, cast

import pytest
from hypothesis import settings

from tests.backends import BACKENDS, load

# A torchvision that does not fit the installed PyTorch fails where ``transformers`` loads it. No test needs one.
cast(dict[str, Any], sys.modules)["torchvision"] = None

settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True, database=None)
# The strict namespaces compute with NumPy, whose own tests have all those examples; they differ in what they refuse.
settings.register_profile("strict", settings.get_profile("ci"), max_examples=15)
# JAX and TensorFlow compile anew, or look up a kernel, for every new shape, which is most of what examples cost there.
settings.register_profile("compiled", settings.get_profile("ci"), max_examples=10)
settings.register_profile("long", max_examples=2000, deadline=None)


def pytest_configure(config: pytest.Config) -> None:
    usual = {"jax": "compiled", "tensorflow": "compiled", "strict": "strict", "strictest": "strict"}
    backend = config.getoption("--backend")
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", usual.get(backend, "ci")))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import what is tested without looking for garbage in it: a million objects are made, and live until the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()  # nor do the tests look there
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Run every test of JAX, except the command's, in a thread of its own, where programs are lowered faster.

    JAX keeps the MLIR contexts of the last 2,048 programs. Whenever MLIR makes a context, it looks through all that are
    alive and that the same thread has used; once there are many, that is a fifth of the time of compiling a small
    program. The command's tests need the main thread, which alone receives signals.
    """
    test, name = pyfuncitem.obj, pyfuncitem.nodeid
    on_jax = pyfuncitem.config.getoption("--backend") == "jax" and not name.startswith("tests/cli/")
    if on_jax or name.startswith("tests/agreement/"):
        pyfuncitem.obj = in_a_new_thread(test)
    try:
        return (yield)
    finally:
        pyfuncitem.obj = test


def in_a_new_thread(function: Callable[..., object]) -> Callable[..., object]:
    """Return a function that calls this one in a new thread, waits for it, and raises what it raises."""

    @wraps(function)
    def call(*arguments: object, **named: object) -> object:
        result: Future[object] = Future()

        def run() -> None:
            try:
                result.set_result(function(*arguments, **named))
            except BaseException as error:  # a skip of pytest is no Exception
                result.set_exception(error)

        # A daemon does not keep the process alive if the test has not ended in time.
        thread = Thread(target=run, daemon=True)
        thread.start()
        thread.join()
        return result.result()

    return call


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=sorted(BACKENDS), default="numpy", help="whose arrays the tests use")
    parser.addoption("--device", choices=("cpu", "gpu"), default="cpu", help="where they live")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """The name of the backend."""
    return str(request.config.getoption("--backend"))


@pytest.fixture(scope="session")
def xp(backend: str, request: pytest.FixtureRequest) -> Any:
    """The Array API namespace of the backend."""
    return load(backend, str(request.config.getoption("--device")))
