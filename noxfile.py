"""The checks, one session each: ``nox`` runs them all, ``nox -s NAME`` one; arguments after ``--`` go to pytest.

Convention: a session installs only what its subject may depend on, in the versions that ``constraints.txt`` pins.
"""

import os
from pathlib import Path

import nox

PROJECT = nox.project.load_toml("pyproject.toml")
FRAMEWORKS = ("torch", "jax", "tensorflow")
# Runs that are killed and go on, by the command; what they leave on a disk, and what becomes of it.
INTERRUPTED = ("tests/cli/test_resuming.py", "tests/runs")

# What may outlive a checkout, as pip's and pre-commit's caches do.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "became-tests"

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = [
    *("lint", "types", "docs"),
    *("tests-core", "tests-torch", "tests-jax", "tests-tensorflow", "agreement"),
]


def install(session: nox.Session, group: str, *requirements: str) -> None:
    """Install a dependency group of ``pyproject.toml``, and more, as pinned."""
    session.install("-c", "constraints.txt", *nox.project.dependency_groups(PROJECT, group), *requirements)


def test(session: nox.Session, *arguments: str) -> None:
    """Run pytest, a process a core: with one thread each, since arrays are small here, and threads would only wait."""
    threads = "OMP_NUM_THREADS", "TF_NUM_INTEROP_THREADS", "TF_NUM_INTRAOP_THREADS"
    session.env.update(dict.fromkeys(threads, "1"))
    session.run(
        "pytest", "--numprocesses", "auto", "--maxprocesses", "8", "--dist", "loadscope", *arguments, *session.posargs
    )


def assert_absent(session: nox.Session, *frameworks: str) -> None:
    """Fail if one of these can be imported: what is tested must not lean on it."""
    session.run("python", "-c", f"from importlib.util import find_spec; assert not any(map(find_spec, {frameworks}))")


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format."""
    install(session, "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Strict types, with the frameworks' own."""
    install(session, "types", "-e", ".[torch,report]")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site, built into ``site/``; a warning is an error, and so is a page that needs a network."""
    install(session, "docs")
    session.env["NO_MKDOCS_2_WARNING"] = "1"  # on the theme's end of life, which is none of a page's mistakes
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session(name="tests-core")
def tests_core(session: nox.Session) -> None:
    """The core where no framework is installed, on NumPy and on the strictest reading of the array API standard."""
    install(session, "test", "-e", ".")
    assert_absent(session, *FRAMEWORKS)
    test(session, "tests/networks", "tests/core", "tests/repository")
    test(session, "tests/core", "--backend", "strictest")


@nox.session(name="tests-torch")
def tests_torch(session: nox.Session) -> None:
    """Everything, on PyTorch."""
    install(session, "test-torch", "-e", ".[torch,report,tensorboard]")
    test(session, "tests", "--backend", "torch")


@nox.session(name="tests-jax")
def tests_jax(session: nox.Session) -> None:
    """The core and the adapter on JAX, where no other framework is installed."""
    install(session, "test", "-e", ".[jax]")
    assert_absent(session, "torch", "tensorflow")
    # Most of the time goes into compiling what another test, process or session has compiled already.
    session.env["JAX_COMPILATION_CACHE_DIR"] = str(CACHE / "jax")
    session.env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    folders = "tests/core", "tests/jax", "tests/repository", *INTERRUPTED
    test(session, *folders, "--backend", "jax")


@nox.session(name="tests-tensorflow")
def tests_tensorflow(session: nox.Session) -> None:
    """The core and the adapter on TensorFlow, where no other framework is installed."""
    # Not the extra: its `tensorflow` is the build for GPUs too, and the CPU's own is half the size.
    install(session, "test", "-e", ".[run]", "tensorflow-cpu", "keras")
    assert_absent(session, "torch", "jax")
    folders = "tests/core", "tests/repository", "tests/tensorflow", *INTERRUPTED
    test(session, *folders, "--backend", "tensorflow")


@nox.session
def agreement(session: nox.Session) -> None:
    """Whole runs and networks, the same on all frameworks, which live in one process here."""
    install(session, "test", "-e", ".[torch,jax]", "tensorflow-cpu", "keras")
    test(session, "tests/agreement")
