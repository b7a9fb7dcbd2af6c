#!/usr/bin/env -S uv run --script
# /// script
# dependencies = ["nox>=2026.10.20"]
# ///
"""The checks, one session each: ``nox`` runs them all, ``nox -s NAME`` one; arguments after ``--`` go to pytest.

Convention: a session installs what ``constraints.txt`` pins. ``tests-core``, ``tests-jax`` and ``tests-tensorflow``
have an environment each, with only what their subject may depend on; the sessions that may have all frameworks share
the environment that ``everything`` makes. Two sessions run at a time: while one installs or ends with a single long
test, the other uses the processor. The seconds that each took are printed at the end.
"""

import atexit
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import nox
from nox.command import CommandFailed

PROJECT = nox.project.load_toml("pyproject.toml")
FRAMEWORKS = ("torch", "jax", "tensorflow")
# Not the extra: its `tensorflow` is the build for GPUs too, and the CPU's own is half the size.
TENSORFLOW = ("tensorflow-cpu", "keras")
# What runs on every framework beside its own folder: the core, the documentation's examples, and runs that stop and
# are gone on with, after pauses, a kill and a signal. What else the command does is the same on all, and tested with
# PyTorch; so are the other signal, and a kill that comes after a kill.
RESUMING = "tests/cli/test_resuming.py::test_"
ON_EACH = (
    *("tests/core", "tests/repository/test_examples.py"),
    f"{RESUMING}a_killed_process_loses_an_epoch_at_most",
    f"{RESUMING}a_signal_is_answered_once_the_epoch_is_saved[15-143]",
)
IN_PARTS = f"{RESUMING}a_run_in_parts_is_the_run_to_the_bit"
EVERYTHING = Path(".nox", "shared").absolute()
# What Flower accepts of what is pinned otherwise, TensorFlow's protobuf among it: so it has an environment of its own.
FLOWER = {
    "certifi": "2026.10.19.post1",
    "flwr": "1.42.0",
    "packaging": "25.0",
    "protobuf": "6.33.6",
    "rich": "14.3.4",
    "typer": "0.20.1",
}
# AdapterHub's package, whose name is that of our folder, and what it accepts of what is pinned otherwise.
ADAPTERHUB = {
    "adapters": "1.3.0",
    "datasets": "5.0.1",
    "fsspec": "2026.6.0",
    "huggingface-hub": "0.36.2",
    "tokenizers": "0.22.2",
    "transformers": "4.57.6",
}

# What may outlive a checkout, as pip's and pre-commit's caches do.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "became-tests"

# What Python compiles is written down, whatever the caller's settings say, and outside the checkout's own folders:
# PyTorch or TensorFlow is compiled once, and not by each process that imports it. That is most of what an import costs.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["PYTHONPYCACHEPREFIX"] = str(Path(".nox", "bytecode").absolute())

nox.needs_version = ">=2026.10.20"
nox.options.default_venv_backend = "virtualenv"
nox.options.allow_parallel = True
if not any(argument.startswith(("-s", "--session", "-e")) for argument in sys.argv):
    nox.options.parallel = 2  # a session that is asked for by name shows what it does as it does it
# The longest first, so that nothing long is left when all else is done.
nox.options.sessions = [
    *("tests-jax", "everything", "tests-tensorflow", "tests-torch", "agreement", "tests-core"),
    *("types", "docs", "lint"),
]


def install(session: nox.Session, groups: Sequence[str], *requirements: str) -> None:
    """Install dependency groups of ``pyproject.toml``, and more, as pinned.

    Nothing is compiled to bytecode in advance: of what is installed, a session imports a small part. If an index
    fails to answer for a moment, pip takes a package for missing; so a failed installation is tried once more.
    """
    wanted = *(each for group in groups for each in nox.project.dependency_groups(PROJECT, group)), *requirements
    command = python(session), "-m", "pip", "install", "--quiet", "--no-compile", "-c", "constraints.txt", *wanted
    try:
        session.run(*command)
    except CommandFailed:
        session.run(*command)


def pinned_with(folder: Path, other: dict[str, str]) -> tuple[str, str, str]:
    """Return pip's words for the pinned versions, with other ones of some packages, in a file in this folder."""
    lines = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line.partition("==")[0] not in other]
    pins += [f"{name}=={version}" for name, version in other.items()]
    (folder / "constraints.txt").write_text("\n".join(pins), encoding="utf-8")
    return "--no-compile", "-c", str(folder / "constraints.txt")


def python(session: nox.Session) -> str:
    """Return the interpreter of the session's own environment, or of the shared one."""
    folder = EVERYTHING if session.venv_backend == "none" else Path(session.virtualenv.location)
    return str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")


def test(session: nox.Session, *arguments: str) -> None:
    """Run pytest, a process a core: with one thread each, since arrays are small here, and threads would only wait.

    A process that has finished its share takes over tests of another; so none is idle while one has a long module.
    """
    threads = "OMP_NUM_THREADS", "TF_NUM_INTEROP_THREADS", "TF_NUM_INTRAOP_THREADS"
    session.env.update(dict.fromkeys(threads, "1"))
    processes = "--numprocesses", "auto", "--maxprocesses", "8", "--dist", "worksteal"
    slowest = "--durations", "15", "--durations-min", "5"
    session.run(python(session), "-m", "pytest", *processes, *slowest, *arguments, *session.posargs)


def cache_compilations(session: nox.Session) -> None:
    """Let JAX keep what it has compiled: another test, process or session then need not compile it again.

    A machine that stopped as JAX wrote can have left an empty file there, which JAX can neither read nor replace.
    """
    for entry in (CACHE / "jax").glob("*-cache"):
        if not entry.stat().st_size:
            entry.unlink(missing_ok=True)
    session.env["JAX_COMPILATION_CACHE_DIR"] = str(CACHE / "jax")
    session.env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def compile_quickly(session: nox.Session) -> None:
    """Let XLA compile in a quarter of the time, to slower programs: thousands are compiled, and each runs for moments.

    Tests that ask for it in ``tests/compilers.py`` compile as users do, and so does all that is in ``stress``.
    """
    session.env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    session.env["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def assert_absent(session: nox.Session, *frameworks: str) -> None:
    """Fail if one of these can be imported: what is tested must not lean on it."""
    session.run("python", "-c", f"from importlib.util import find_spec; assert not any(map(find_spec, {frameworks}))")


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format."""
    install(session, ["lint"])
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session(venv_backend="none")
def everything(session: nox.Session) -> None:
    """The environment with every framework, which several sessions share."""
    session.run(sys.executable, "-m", "virtualenv", "--quiet", "--clear", "--no-periodic-update", str(EVERYTHING))
    extras = "-e", ".[merge,torch,jax,report,tensorboard,dask]", *TENSORFLOW
    install(session, ["test-torch", "test-jax", "types"], *extras)
    # A package for tests brings torchvision, which no test needs and which need not fit this PyTorch: Lightning, which
    # imports it where it is installed, would fail.
    session.run(python(session), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision")


@nox.session(venv_backend="none", requires=["everything"])
def types(session: nox.Session) -> None:
    """Strict types, with PyTorch's own."""
    session.run(python(session), "-m", "mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site, built into ``site/``; a warning is an error, and so is a page that needs a network."""
    install(session, ["docs"], "-e", ".")
    session.env["NO_MKDOCS_2_WARNING"] = "1"  # on the theme's end of life, which is none of a page's mistakes
    session.env["BECAME_REPOSITORY"] = PROJECT["project"].get("urls", {}).get("Repository", "")
    session.run("python", "docs/pages.py")
    session.run("mkdocs", "build", "--strict", *session.posargs)
    session.run("python", "docs/pages.py", "check")


@nox.session(name="tests-core")
def tests_core(session: nox.Session) -> None:
    """The core where no framework is installed, on NumPy and on the strictest reading of the array API standard."""
    install(session, ["test"], "-e", ".")
    assert_absent(session, *FRAMEWORKS)
    test(session, "tests/networks", "tests/core", "tests/repository")
    test(session, "tests/core", "--backend", "strictest")


@nox.session(name="tests-torch", venv_backend="none", requires=["everything"])
def tests_torch(session: nox.Session) -> None:
    """The core and the adapter on PyTorch; and what needs a framework, whichever it is."""
    elsewhere = (f"--ignore=tests/{folder}" for folder in ("agreement", "jax", "tensorflow"))
    test(session, "tests", *elsewhere, "--backend", "torch")


@nox.session(name="tests-jax")
def tests_jax(session: nox.Session) -> None:
    """The core and the adapter on JAX, where no other framework is installed."""
    install(session, ["test-jax"], "-e", ".[jax]")
    assert_absent(session, "torch", "tensorflow")
    cache_compilations(session)
    compile_quickly(session)
    session.env["BECAME_KILLS"] = "1"
    # The run that the killed one is compared with; TRGP's, with the largest state, would compile 600 programs more.
    test(session, *ON_EACH, f"{IN_PARTS}[became]", "tests/jax", "--backend", "jax")


@nox.session(name="tests-tensorflow")
def tests_tensorflow(session: nox.Session) -> None:
    """The core and the adapter on TensorFlow, where no other framework is installed."""
    install(session, ["test"], "-e", ".[run]", *TENSORFLOW)
    assert_absent(session, "torch", "jax")
    session.env["BECAME_KILLS"] = "1"
    test(session, *ON_EACH, f"{IN_PARTS}[became+trgp]", "tests/tensorflow", "--backend", "tensorflow")


@nox.session(venv_backend="none", requires=["everything"])
def agreement(session: nox.Session) -> None:
    """Whole runs and networks, the same on all frameworks, which live in one process here."""
    cache_compilations(session)
    compile_quickly(session)
    test(session, "tests/agreement")


@nox.session
def wheel(session: nox.Session) -> None:
    """On request: the wheel beside AdapterHub's package ``adapters``, then each without the other."""
    check_files = str(Path("tests", "repository", "check_files.py").absolute())
    folder = Path(tempfile.mkdtemp(dir=Path(session.create_tmp()).absolute()))
    pinned = pinned_with(folder, ADAPTERHUB)

    session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), ".")
    (ours,) = folder.glob("became-*.whl")
    session.install(*pinned, f"{ours}[torch]", "adapters")
    session.chdir(folder)  # here, Python does not find the checkout
    run = "became", "run", "--epochs", "1", "--stage2-epochs", "1", "--first", "2", "--out"
    import_ours = "python", "-c", "import became; from adapters.torch.run import BACKEND"
    import_theirs = "python", "-c", "from adapters import AutoAdapterModel, BnConfig; import adapters.methods.lora"

    session.run("python", check_files, "became", "adapters")
    session.run(*run, "both")
    session.run(*import_ours)
    session.run(*import_theirs)
    session.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", "adapters")
    session.run("python", check_files, "became")
    session.run(*run, "alone")
    session.run(*import_ours)
    session.install(*pinned, "adapters")
    session.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", "became")
    session.run("python", check_files, "adapters")
    session.run(*import_theirs)


@nox.session
def federation(session: nox.Session) -> None:
    """On request: federations with Flower, in an environment of its own."""
    folder = Path(tempfile.mkdtemp(dir=Path(session.create_tmp()).absolute()))
    groups = nox.project.dependency_groups(PROJECT, "test")
    session.install(*pinned_with(folder, FLOWER), *groups, "-e", ".[flower]")
    session.env.update(BECAME_KILLS="20", BECAME_FEDERATION="1")
    test(session, "tests/flower")


@nox.session(venv_backend="none", requires=["everything"])
def stress(session: nox.Session) -> None:
    """Far more of what is drawn at random: 400 killed processes, 25,000 damaged files, the long hypothesis profile."""
    cache_compilations(session)
    session.env.update(BECAME_DAMAGES="5000")  # in each of two folders
    test(session, "tests/runs/test_damage.py", "tests/checkpoints/test_damage.py", "--timeout", "3600")
    session.env.update(BECAME_KILLS="20")
    clusters = "tests/cli/test_cluster.py", "tests/checkpoints/test_cluster.py"
    test(session, "tests/cli/test_pool.py", *clusters, "--timeout", "3600")
    session.env.update(BECAME_KILLS="50")
    test(session, "tests/checkpoints/test_resume.py", "--timeout", "3600")
    for backend, kills in {"torch": 100, "jax": 50, "tensorflow": 50}.items():
        session.env.update(BECAME_KILLS=str(kills))
        test(session, f"{RESUMING}a_killed_process_loses_an_epoch_at_most", IN_PARTS, "--backend", backend)
    session.env.update(BECAME_KILLS="20")
    test(session, "tests/torch/test_torchrun.py", "--backend", "torch", "--timeout", "7200")
    test(session, "tests/jax", "--backend", "jax", "--timeout", "3600")  # with all of XLA's optimisations
    test(session, "tests/agreement", "--timeout", "3600")  # likewise
    session.env.update(HYPOTHESIS_PROFILE="long")
    test(session, "tests/core", "tests/networks", "--timeout", "3600")


def print_seconds(report: Path, begin: float) -> None:
    """Print how long each session took, from nox's own report of this call."""
    if report.exists() and report.stat().st_mtime >= begin:
        sessions = json.loads(report.read_text(encoding="utf-8"))["sessions"]
        for session in sessions:
            print(f"{session['duration']:7.0f} s  {session['name']}: {session['result']}")
        print(f"{time.time() - begin:7.0f} s  from the beginning to the end")


# nox runs each session of several in a process of its own, which reads this file too: only the first prints.
if "BECAME_NOX" not in os.environ:
    os.environ["BECAME_NOX"] = "1"
    nox.options.report = str(Path(".nox", "report.json").absolute())
    Path(".nox").mkdir(exist_ok=True)
    atexit.register(print_seconds, Path(nox.options.report), time.time())

if __name__ == "__main__":
    nox.main()
