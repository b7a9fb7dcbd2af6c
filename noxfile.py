"""The checks, one session each: ``nox`` runs them all, ``nox -s NAME`` one; arguments after ``--`` go to pytest.

Convention: a session installs only what its subject may depend on, in the versions that ``constraints.txt`` pins.
"""

import nox

PROJECT = nox.project.load_toml("pyproject.toml")
FRAMEWORKS = ("torch", "jax", "tensorflow")

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "types", "tests-core", "tests-torch"]


def install(session: nox.Session, group: str, *requirements: str) -> None:
    """Install a dependency group of ``pyproject.toml``, and more, as pinned."""
    session.install("-c", "constraints.txt", *nox.project.dependency_groups(PROJECT, group), *requirements)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format."""
    install(session, "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Strict types, with the frameworks' own."""
    install(session, "types", "-e", ".[torch]")
    session.run("mypy")


@nox.session(name="tests-core")
def tests_core(session: nox.Session) -> None:
    """The core where no framework is installed, on NumPy and on a strict reading of the array API standard."""
    install(session, "test", "-e", ".")
    session.run("python", "-c", f"from importlib.util import find_spec; assert not any(map(find_spec, {FRAMEWORKS}))")
    for backend in ("numpy", "strict"):
        session.run("pytest", "tests/core", "tests/repository", "--backend", backend, *session.posargs)


@nox.session(name="tests-torch")
def tests_torch(session: nox.Session) -> None:
    """Everything, on PyTorch."""
    install(session, "test", "-e", ".[torch]")
    session.run("pytest", "tests", "--backend", "torch", *session.posargs)
