"""``became``: one command on any framework, runs gone on with by their folder, what there is to choose from."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import adapters.backend.entry as of_backends
import adapters.cli.__main__ as became
from adapters.backend.entry import first_installed
from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.cli.__main__ import main
from adapters.cli.listing import listed
from adapters.networks import NETWORKS
from adapters.runs import RunDirectory
from adapters.runs.configuration import Configuration
from adapters.runs.directory import read_record
from adapters.runs.files import read_sealed, write_sealed
from adapters.torch.run import BACKEND
from became import main as entry
from became_core import BecameError
from became_core.continual import method_names
from became_core.projection import PROJECTORS
from tests.processes import WAIT

SHORT = ["--preset", "quick", "--epochs", "1", "--stage2-epochs", "1", "--batch-size", "64", "--first", "2"]
SHORT += ["--curvature-samples", "64"]
ROOT = Path(__file__).parents[2]


def command(out: Path, *more: str) -> list[str]:
    return ["run", "--backend", "torch", *SHORT, "--methods", "gpm", "finetune", "--out", str(out), *more]


def results(out: Path) -> dict[str, Any]:
    """What came out of each run, seconds aside."""
    found = {file.parent.name: json.loads(file.read_text()) for file in sorted(out.glob("*/results.json"))}
    return {
        name: {key: value for key, value in values.items() if key not in ("seconds", "sha256")}
        for name, values in found.items()
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results without any interruption."""
    out = tmp_path_factory.mktemp("whole")
    assert main(command(out)) == 0
    assert sorted(results(out)) == ["finetune-seed0", "gpm-seed0"]
    return results(out)


@pytest.fixture
def interrupted(tmp_path: Path, after_saves: Callable[[int], None]) -> Callable[..., Path]:
    """A command that was interrupted within its first run."""

    def make(*more: str) -> Path:
        after_saves(1)
        assert main(command(tmp_path / "out", *more)) == 130
        after_saves(0)
        return tmp_path / "out"

    return make


def test_resume_finishes_all_runs_of_a_command_even_those_that_had_not_begun(
    expected: dict[str, Any], interrupted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = interrupted()
    assert results(out) == {}
    capsys.readouterr()
    assert main(["resume", str(out)]) == 0
    assert results(out) == expected
    shown = capsys.readouterr().out
    assert "gpm-seed0  goes on after task 1/2, stage 1, epoch 1" in shown
    assert f"{expected['gpm-seed0']['acc']:.2f}" in shown
    assert main(["resume", str(out)]) == 2
    assert capsys.readouterr().err == f"error: all runs in {out} are finished; there is nothing to resume.\n"


UNKNOWN = ["--single-head", "--boundaries", "unknown", "--batch-size", "10"]


def test_a_run_without_boundaries_is_recorded_and_resumed_to_the_same_bits(
    tmp_path: Path, after_saves: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(whole, *UNKNOWN, "--methods", "gpm")) == 0
    shown = capsys.readouterr().out
    assert "What was found in the streams, in batches" in shown
    assert re.search(r"seed +segments +known +delay of each change +false alarms\n─+\n0 +2 +0 +\d +0\b", shown)
    values = results(whole)["gpm-seed0"]
    assert (values["config"]["boundaries"], values["config"]["hazard"]) == ("unknown", 0.01)
    assert values["boundaries"]["changes"] == [76]
    assert values["boundaries"]["false_alarms"] == 0
    assert all(delay <= 10 for delay in values["boundaries"]["delays"])
    assert sum(values["boundaries"]["tested"]) == 400
    assert len(values["accuracy"]) == 2
    after_saves(3)
    assert main(command(parts, *UNKNOWN, "--methods", "gpm")) == 130
    after_saves(0)
    assert main(["resume", str(parts)]) == 0
    assert results(parts)["gpm-seed0"] == values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--boundaries", "unknown"], "mnist has a head for each task, and without boundaries nothing says which head"),
        ([*UNKNOWN, "--hazard", "1"], "the hazard is 1.0; give a probability between 0 and 1."),
        ([*UNKNOWN, "--reservoir", "0"], "a reservoir of 0 samples holds nothing; let it hold at least 1."),
        ([*UNKNOWN, "--reservoir", "50"], "a reservoir of 50 samples holds 5 batches of 10; let it hold at least 80"),
        (
            [*UNKNOWN, "--reservoir", "5000"],
            "the stream of mnist has 152 batches, and the first 500 fill the reservoir",
        ),
    ],
)
def test_a_stream_that_cannot_be_watched_is_refused_before_a_folder_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(command(tmp_path / "out", *options)) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


HELD_OUT = ["--methods", "became", "--first", "3", "--validation", "0.1", "--temper"]


@pytest.mark.parametrize("options", [["calibrated", "--curvature-data", "augmented"], ["curvature"]])
def test_a_tempered_run_resumes_to_the_same_bits(
    tmp_path: Path, after_saves: Callable[[int], None], options: list[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(whole, *HELD_OUT, *options)) == 0
    after_saves(6)  # within the third task
    assert main(command(parts, *HELD_OUT, *options)) == 130
    after_saves(0)
    assert main(["resume", str(parts)]) == 0
    assert results(parts) == results(whole)
    (values,) = results(whole).values()
    assert values["config"]["temper"] == options[0]
    assert len(values["temperatures"]) == (3 if options[0] == "curvature" else 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--curvature-data", "validation", "--validation", "0"], "--curvature-data validation measures on held-out"),
        (["--temper", "rise", "--validation", "0"], "became is tempered by held-out samples, and task 1 of mnist has"),
    ],
)
def test_what_needs_held_out_samples_is_refused_where_there_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(command(tmp_path / "out", "--methods", "became", *options)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_resume_goes_on_with_the_backend_there_was_or_the_one_given(
    interrupted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked = interrupted(), []

    def load(name: str) -> Any:
        asked.append(name)
        return replace(BACKEND, name=name)

    monkeypatch.setattr(became, "load_backend", load)
    assert main(["resume", str(out), "--backend", "jax"]) == 0
    assert asked == ["jax"]
    assert {name: values["backend"] for name, values in results(out).items()} == {
        "gpm-seed0": "torch+jax",
        "finetune-seed0": "jax",
    }


def test_resume_refuses_what_it_cannot_go_on_with(
    interrupted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["resume", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'nowhere'} holds no runs; give a folder that --out named.\n"
    )
    out = interrupted()
    capsys.readouterr()
    file = RunDirectory(out, "gpm", 0).config_file
    config = read_sealed(file)
    for changes, message in (
        ({"config": None}, "holds no run's configuration; give the command that started the run."),
        (
            {"config": config["config"] | {"momenta": 3}},
            "has an unknown option 'momenta'; resume with the version that started this run.",
        ),
        ({"backend": "abacus"}, "is of a run on abacus; say with --backend what to resume it on."),
    ):
        write_sealed(file, config | changes)
        assert main(["resume", str(out)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {file} {message}")
        assert len(said.splitlines()) == 1
    file.write_text("{")
    assert main(["resume", str(out)]) == 2
    assert capsys.readouterr().err == f"error: {file} is damaged; move {file.parent} away.\n"
    assert results(out) == {}


def test_a_recorded_run_comes_back_with_the_hints_that_still_hold(
    interrupted: Callable[..., Path], tmp_path: Path
) -> None:
    file = interrupted("--lr", "0.5", "--device", "cpu", "--data-dir", str(tmp_path)) / "gpm-seed0" / "config.json"
    record = read_record(file)
    assert (record.backend, record.method, record.seed, record.preset) == ("torch", "gpm", 0, "quick")
    short: dict[str, Any] = {"epochs": 1, "stage2_epochs": 1, "batch_size": 64, "first": 2, "curvature_samples": 64}
    expected = {**short, "lr": 0.5, "device": "cpu", "data_dir": tmp_path, "threads": 1}
    assert record.configuration == Configuration.of(expected, "gpm", "quick")
    values = read_sealed(file)
    write_sealed(file, values | {"hints": values["hints"] | {"data_dir": str(tmp_path / "gone")}})
    assert read_record(file).configuration == replace(record.configuration, data_dir=None)


def test_config_takes_a_recorded_configuration_and_options_change_it(
    expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command(tmp_path / "first")) == 0
    file = tmp_path / "first" / "gpm-seed0" / "config.json"
    capsys.readouterr()
    assert main(["run", "--config", str(file)]) == 0  # the same method and seed, into a folder by its preset's name
    assert capsys.readouterr().out.startswith(f"backend: torch, as in {file}\n")
    assert results(tmp_path / "runs" / "split-mnist-quick") == {"gpm-seed0": expected["gpm-seed0"]}
    more = ["--lr", "0.25", "--methods", "finetune", "--seeds", "3", "--out", "other"]
    assert main(["run", "--config", str(file), *more]) == 0
    other = read_record(tmp_path / "other" / "finetune-seed3" / "config.json")
    before = read_record(file).configuration
    assert other.configuration == replace(before, lr=0.25, settings={})
    for arguments, message in (
        (["--config", str(file), "--preset", "paper"], "--config and --preset both give the values of all options"),
        (["--config", "nowhere.json"], "cannot read nowhere.json: No such file or directory."),
        (
            ["--config", str(file), "--epochs", "9", "--out", "other", "--methods", "finetune", "--seeds", "3"],
            "is a run",
        ),
    ):
        capsys.readouterr()
        assert main(["run", *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert len(said.splitlines()) == 1


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
