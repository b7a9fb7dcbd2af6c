"""``became``: one command on any framework, what there is to choose from, and how it answers what it cannot do."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import adapters.backend.entry as of_backends
from adapters.backend.entry import first_installed
from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.cli.__main__ import main
from adapters.cli.listing import listed
from adapters.networks import NETWORKS
from adapters.runs.options import RunOptions
from became import main as entry
from became_core import BecameError
from became_core.continual import method_names
from became_core.projection import PROJECTORS
from tests.processes import WAIT

SHORT = ["--preset", "quick", "--epochs", "1", "--stage2-epochs", "1", "--batch-size", "64", "--first", "2"]
SHORT += ["--curvature-samples", "64"]
ROOT = Path(__file__).parents[2]


def test_the_first_framework_that_is_installed_is_taken_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert first_installed() == "torch"
    assert main(["run", *SHORT, "--methods", "finetune", "--out", str(tmp_path), "--first", "1"]) == 0
    assert capsys.readouterr().out.startswith("backend: torch, the first that is installed\n")
    monkeypatch.setattr(of_backends, "find_spec", lambda name: "there" if name == "tensorflow" else None)
    assert first_installed() == "tensorflow"
    monkeypatch.setattr(of_backends, "find_spec", lambda name: None)
    with pytest.raises(BecameError, match="there is no framework to run on; pip install 'became"):
        first_installed()
    assert main(["run"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def run_python(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("backend", "package"), [("torch", "torch"), ("jax", "jax"), ("tensorflow", "tensorflow")])
def test_a_missing_framework_is_one_sentence(backend: str, package: str) -> None:
    source = f"""
import sys

class Gone:
    def find_spec(self, name, *_):
        if name == "{package}":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Gone())
from adapters.cli.__main__ import main
sys.exit(main(["run", "--backend", "{backend}"]))
"""
    done = run_python(source)
    assert done.returncode == 2
    assert done.stderr == f"error: the package '{package}' is missing; pip install 'became[{backend}]'.\n"


def test_without_the_packages_of_any_extra_the_version_is_known_and_a_run_names_what_installs_them() -> None:
    source = """
import sys
sys.modules["tyro"] = None
sys.argv = ["became", "{}"]
import adapters.cli.__main__
"""
    assert run_python(source.format("--version")).stdout.startswith("became ")
    done = run_python(source.format("run"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: the package 'tyro' is missing; pip install 'became[torch]', or with jax")


def test_an_unknown_name_is_refused_before_a_framework_is_loaded() -> None:
    source = """
import sys
from adapters.cli.__main__ import main
assert main(["run", "--methods", "becme"]) == 2
print(sorted({"torch", "jax", "tensorflow"} & set(sys.modules)))
"""
    done = run_python(source)
    assert "there is no method 'becme'; did you mean 'became'?" in done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_loads_no_framework() -> None:
    source = """
import sys
from adapters.cli.__main__ import main
try:
    main(["run", "--help"])
except SystemExit:
    print(sorted({"torch", "jax", "tensorflow", "datasets", "matplotlib", "pyarrow"} & set(sys.modules)))
"""
    done = run_python(source)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--stage2-epochs" in done.stdout


def test_a_described_network_learns_and_merges_without_pytorchs_compiler(tmp_path: Path) -> None:
    """Which takes seconds to load, and is only asked where a user's own modules may be compiled."""
    words = ["run", "--methods", "became", "--first", "2", "--epochs", "1", "--stage2-epochs", "1", "--quiet"]
    source = f"""
import sys
from adapters.cli.__main__ import main
assert main({[*words, "--backend", "torch", "--out", str(tmp_path)]}) == 0
print(any(name.startswith("torch._dynamo") for name in sys.modules))
"""
    assert run_python(source).stdout.splitlines()[-1] == "False"


def test_help_fits_80_columns_and_names_no_default_that_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("run", "resume", "compare", "report", "figures", "list"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = capsys.readouterr().out
        assert "None" not in shown
        assert max(map(len, shown.splitlines())) <= (100 if command == "compare" else 80)  # its usage line is longer


@pytest.mark.parametrize("methods", [["gpm"], ["became", "gpm"]])
def test_the_configuration_is_printed_as_json_alone_with_the_value_of_every_option(
    methods: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    hints = ["--threads", "3", "--save-every", "7.5", "--device", "cpu", "--tracker", "tensorboard"]
    assert main(["run", *SHORT, "--methods", *methods, *hints, "--print-config", "--log-level", "info"]) == 0
    said = capsys.readouterr()
    values: dict[str, Any] = json.loads(said.out)
    assert {each.name for each in fields(RunOptions)} <= set(values)
    given = {name: values[name] for name in ("threads", "save_every", "device", "tracker", "epochs")}
    assert given == {"threads": 3, "save_every": 7.5, "device": "cpu", "tracker": "tensorboard", "epochs": 1}
    assert said.err.startswith("info: backend: torch, the first that is installed\n")


def test_ctrl_c_before_a_command_has_begun_is_one_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("adapters.cli.__main__.main", interrupted)
    assert entry() == 130
    assert capsys.readouterr().err == "interrupted.\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("became ")


def lines_of(capsys: pytest.CaptureFixture[str], *kind: str) -> dict[str, str]:
    assert main(["list", *kind]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line}


def test_what_there_is_to_choose_from_is_listed_in_the_modules_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    methods = lines_of(capsys, "methods")
    assert sorted(methods) == sorted(method_names())
    assert all(methods.values())
    assert methods["became"].endswith("(BECAME 2025)")
    projectors = lines_of(capsys, "projectors")
    assert sorted(projectors) == sorted(PROJECTORS.names)
    assert all(projectors.values())
    benchmarks = lines_of(capsys, "benchmarks")
    assert (
        benchmarks["split-cifar100"]
        == "10 tasks, groups of the classes of CIFAR-100; presets quick, paper, original, nscl, pretrained"
    )
    assert sorted(benchmarks) == sorted(BENCHMARKS.names)
    networks = lines_of(capsys, "networks")
    assert sorted(networks) == sorted(NETWORKS.names)
    assert all(networks.values())
    presets = lines_of(capsys, "presets")
    assert sorted(presets) == ["demo", "nscl", "original", "paper", "pretrained", "quick"]
    assert presets["nscl"].endswith("(for split-cifar100, split-tinyimagenet)")
    assert presets["pretrained"].endswith("(for split-cifar100, split-imagenet-r)")
    assert not [name for name, source in presets.items() if source.startswith("(for ")]
    everything = lines_of(capsys)
    assert {*methods, *projectors, *benchmarks, *networks, *presets} < set(everything)
    narrow = listed(None, 80).splitlines()  # as on a terminal
    assert max(map(len, narrow)) <= 80
    assert " ".join(" ".join(narrow).split()) == " ".join(listed(None, 1000).split())
    with pytest.raises(SystemExit) as stopped:
        main(["list", "moons"])
    assert stopped.value.code == 2
    assert "became list --help" in capsys.readouterr().err  # and not the help of all commands


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runn"], "there is no command 'runn'; did you mean 'run'?"),
        (["run", "--methods", "gmp"], "there is no method 'gmp'"),
        (
            ["run", "--tracker", "trackio"],
            "the tracker trackio needs the package trackio; pip install 'became[trackio]'.",
        ),
        (["run", "--scheduler", "tcp://x:1"], "the package 'distributed' is missing; pip install 'became[dask]'."),
        (["run", "--workers", "0"], "--workers is 0; it must be at least 1."),
        (["resume", ".", "--workers", "0"], "--workers is 0; it must be at least 1."),
        (["compare"], "there is nothing to compare"),
        (["compare", "nowhere"], "nowhere holds no finished runs"),
        (["report"], "there is nothing to report on"),
        (["resume", "nowhere"], "nowhere holds no runs"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "adapters.tracking.trackio", raising=False)
    for name in ("adapters.cli.cluster", "adapters.runs.cluster"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("trackio", "distributed"):
        monkeypatch.setitem(sys.modules, name, None)  # as if they were not there
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["list"], ["run", "--help-all"], ["run", "--backend", "torch", "--dry-run", *SHORT]])
def test_a_command_whose_output_nobody_reads_ends_in_silence(words: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "became", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate(timeout=WAIT)
    assert "Traceback" not in said
    assert "BrokenPipeError" not in said
    assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full here")
@pytest.mark.parametrize("words", [["list"], ["--version"]])
def test_output_that_cannot_be_written_is_an_error_in_a_sentence(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "became", *words],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=WAIT,
        )
    assert (done.returncode, done.stderr) == (2, "error: cannot write the output: No space left on device.\n")


def test_a_command_without_an_output_does_its_work() -> None:
    process = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' -m became list >&-"], cwd=ROOT, capture_output=True, text=True, timeout=WAIT
    )
    assert (process.returncode, process.stderr) == (0, "")
