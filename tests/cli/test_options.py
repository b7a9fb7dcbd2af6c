"""Options are made of what is registered, in this package or in another one; shells complete registered names."""

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import pytest

from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.cli.__main__ import main
from adapters.cli.options import Request, parse_request
from adapters.networks import NETWORKS
from adapters.runs.options import GROUPS, options
from adapters.tracking import TRACKERS
from became_core.continual import METHODS, Method, MethodRecipe, method_names, projector_names
from became_core.projection import PROJECTORS
from became_core.registry import setting

ROOT = Path(__file__).parents[2]
NEWCOMER = '''
"""A package that has one of each."""

from dataclasses import dataclass

from adapters.benchmarks.catalogue import Benchmark
from adapters.benchmarks.mnist import load_mnist
from adapters.benchmarks.presets import Preset
from adapters.networks import Architecture, Flatten, Linear, ReLU
from became_core.arrays import pytree
from became_core.continual import Method, MethodRecipe
from became_core.projection import GPM
from became_core.registry import setting


@pytree
@dataclass(frozen=True)
class Cautious(GPM):
    """Protects a little more than gpm.

    Attributes:
        caution: by how much more.
    """

    caution: float = setting(0.01)


@dataclass(frozen=True)
class Thrifty(MethodRecipe):
    """Saves a little.

    Attributes:
        thrift: how
            thrifty it is.
    """

    thrift: int = setting(3)

    def build(self):
        return Method("thrifty", penalty_strength=float(self.thrift))


def tiny(channels, height, width, norm="batch"):
    """Return eight units."""
    return Architecture((Flatten(), Linear("fc1", 8), ReLU()), (channels, height, width))


VALUES = {"network": "tiny", "schedule": "annealed", "lr": 0.1, "epochs": 1, "stage2_epochs": 1, "batch_size": 64}
digits = Benchmark("digits", load_mnist, 2, {"quick": Preset({**VALUES, "thrift": 5})})
'''
ENTRY_POINTS = """
[became.projectors]
cautious = newcomer:Cautious
[became.methods]
thrifty = newcomer:Thrifty
[became.networks]
tiny = newcomer:tiny
[became.benchmarks]
digits = newcomer:digits
"""
ARGUMENTS = ["--benchmark", "digits", "--methods", "thrifty", "--projector", "cautious", "--caution", "0.25"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which another package is installed."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "newcomer.py").write_text(NEWCOMER)
    about = folder / "newcomer-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: newcomer\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


def became(installed: Path, *arguments: str) -> str:
    path = os.pathsep.join([str(installed), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "adapters.cli", *arguments],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "100"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_another_package_registers_runs_and_is_recorded(installed: Path, tmp_path: Path) -> None:
    shown = became(installed, "run", "--backend", "torch", *ARGUMENTS, "--out", str(tmp_path))
    assert "thrifty+cautious" in shown
    record = json.loads((tmp_path / "thrifty+cautious-seed0" / "config.json").read_text())
    config = record["config"]
    assert (config["benchmark"], config["network"], config["tasks"]) == ("digits", "tiny", 2)
    assert (config["caution"], config["thrift"], config["threshold"]) == (0.25, 5, 0.97)


def test_what_another_package_registers_is_listed_explained_and_completed(installed: Path) -> None:
    lines = [line.split(maxsplit=1) for line in became(installed, "list").splitlines() if line]
    assert ["cautious", "Protects a little more than gpm"] in lines
    assert ["thrifty", "Saves a little"] in lines
    assert ["tiny", "eight units"] in lines
    assert ["digits", "2 tasks, groups of the classes of 5,000 digits of MNIST; preset quick"] in lines
    assert "--caution" in became(installed, "run", "--help")
    shown = " ".join(
        became(installed, "run", "--help-all").replace("│", " ").split()
    )  # wider, the help has two columns
    assert "--caution FLOAT By how much more. (cautious; default: 0.01)" in shown
    assert "--thrift INT How thrifty it is. (thrifty)" in shown
    script = became(installed, "--tyro-write-completion", "bash", "-")
    for option, name in (("methods", "thrifty+cautious"), ("benchmark", "digits"), ("network", "tiny")):
        assert name in completions(script, f"--{option}")


def register(monkeypatch: pytest.MonkeyPatch, registry: Any, name: str, value: Any) -> None:
    """Register a value for the time of a test."""
    monkeypatch.setattr(registry, "_values", {each: registry[each] for each in registry.names})
    registry.register(name, value)


def test_what_a_script_registers_before_it_calls_the_command_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "newcomer.py").write_text(NEWCOMER)
    monkeypatch.syspath_prepend(str(tmp_path))
    import newcomer  # type: ignore[import-not-found]

    for registry, name, value in (
        (PROJECTORS, "cautious", newcomer.Cautious),
        (METHODS, "thrifty", newcomer.Thrifty),
        (NETWORKS, "tiny", newcomer.tiny),
        (BENCHMARKS, "digits", newcomer.digits),
    ):
        register(monkeypatch, registry, name, value)
    assert main(["run", "--backend", "torch", *ARGUMENTS, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert (tmp_path / "out" / "thrifty+cautious-seed0" / "results.json").exists()


def test_a_setting_with_the_name_of_another_option_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lr = ("rate", float, setting(3.0, option="lr"))
    methods = {"build": lambda self: Method("greedy")}
    greedy = make_dataclass("Greedy", [lr], bases=(MethodRecipe,), namespace=methods, frozen=True)
    register(monkeypatch, METHODS, "greedy", greedy)
    assert main(["run"]) == 2
    said = "error: the setting 'lr' of greedy has the name of another option; rename it.\n"
    assert capsys.readouterr().err == said


def test_the_short_help_names_every_option_once_in_its_group_and_fits_80_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--help"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    heads = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert heads == [f"{title}:" for title in GROUPS.values()]
    named = [word for line in lines if re.match(r"  (--|also)", line) for word in line.split() if word.startswith("--")]
    named += [word for line in lines if re.match(r"  --\S+ --", line) for word in line.split()[99:]]
    assert len(named) == len(set(named))
    expected = {*options(), "methods", "projector", "preset", "seeds", "backend", "out", "config", "resume", "dry_run"}
    expected |= {"print_config", "quiet", "log", "log_level", "workers", "scheduler"}
    assert set(named) == {f"--{name.replace('_', '-')}" for name in expected}


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["run", "--schedule", "anealed"], "did you mean 'annealed'?"),
        (["run", "--augment", "Ture"], "did you mean 'True'?"),
        (["run", "--backend", "torhc"], "did you mean 'torch'?"),
        (["run", "--precision", "exakt"], "did you mean 'exact'?"),
        (["list", "netwoks"], "did you mean 'networks'?"),
        (["compare", "x", "--format", "latx"], "did you mean 'latex'?"),
        (["run", "--epochs", "three"], "Error parsing --epochs: 'three' is not a whole number."),
        (["run", "--lora", "1.5"], "Error parsing --lora: '1.5' is not a whole number."),
        (["run", "--lr-steps", "0.5", "x"], "Error parsing --lr-steps: 'x' is not a number."),
        (["run", "--seeds", "0", "x"], "Error parsing --seeds: 'x' is not a whole number."),
    ],
)
def test_a_wrong_word_is_answered_with_what_would_be_right_and_never_with_none(
    arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert answer in said
    assert "None" not in said


def completion(script: str) -> dict[str, dict[str, Any]]:
    """What the script knows of each option of `became run`, by flag."""
    found = re.search(r"^COMPLETION_SPEC = (.*)$", script, re.MULTILINE)
    assert found
    known = ast.literal_eval(found[1])["subcommands"]["run"]["options"]
    return {flag: option for option in known for flag in option["flags"]}


def completions(script: str, flag: str) -> list[str]:
    option = completion(script)[flag]
    assert option["type"] == "choice"  # never "path", by which a shell offers files
    return list(option["choices"])


@pytest.fixture(scope="module")
def script() -> str:
    done = subprocess.run(
        [sys.executable, "-m", "adapters.cli", "--tyro-write-completion", "bash", "-"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def test_no_option_offers_none_and_files_are_offered_for_paths_alone(script: str) -> None:
    known = completion(script)
    assert completions(script, "--schedule") == ["annealed", "stepped", "patience"]
    assert completions(script, "--augment") == ["True", "False"]
    assert not [flag for flag, option in known.items() if "None" in option.get("choices", ())]
    paths = {flag for flag, option in known.items() if option["type"] == "path"}
    assert paths == {"--config", "--out", "--data-dir"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_written_to_a_file_with_the_same_corrections(shell: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--tyro-write-completion", shell, str(tmp_path / "script")])
    assert stopped.value.code in (0, None)
    written = (tmp_path / "script").read_text()
    assert "'choices': ['annealed', 'stepped', 'patience']" in written
    assert not [choices for choices in re.findall(r"'choices': \[.*?\]", written) if "'None'" in choices]


def test_a_script_that_cannot_be_written_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "nowhere" / "script"
    with pytest.raises(SystemExit) as stopped:
        main(["--tyro-write-completion", "bash", str(file)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: cannot write {file}: No such file or directory.\n"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_can_complete(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--tyro-write-completion", shell, "-"])
    assert stopped.value.code in (0, None)
    written = capsys.readouterr().out
    assert all(word in written for word in ("became", "stage2-epochs", "split-cifar100", "became+trgp"))


def test_registered_names_are_completed(script: str) -> None:
    methods = completions(script, "--methods")
    assert set(method_names()) <= set(methods)
    assert {"became+trgp", "ewc+none"} <= set(methods)
    assert {"joint+gpm", "became+hat"}.isdisjoint(methods)
    assert completions(script, "--projector") == list(projector_names())
    assert completions(script, "--benchmark") == list(BENCHMARKS.names)
    assert completions(script, "--network") == list(NETWORKS.names)
    assert completions(script, "--preset") == ["demo", "quick", "paper", "original", "nscl", "pretrained"]
    assert completions(script, "--tracker") == ["none", *TRACKERS]
    assert set(completion(script)) >= {f"--{name.replace('_', '-')}" for name in options()}


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["run", "--methods", "became+t"], ["became+trgp"]),
        (["run", "--methods", "gpm", "ewc+sg"], ["ewc+sgp"]),  # the second of several
        (["run", "--benchmark", "split-c"], ["split-cifar100"]),
        (["run", "--network", "res"], ["resnet18"]),
        (["run", "--lr", "res"], [""]),
        (["report", "res"], ["results.json"]),
        (["compare", "split-code", "res"], ["results.json"]),  # the second of several
        (["rep"], ["report", "reproduce"]),
        (["res"], ["resume"]),
    ],
)
def test_a_shell_offers_names_and_files_each_in_their_place(
    script: str, typed: list[str], offered: list[str], tmp_path: Path
) -> None:
    """Bash itself, asked for what completes the last word, in a folder with files of such names."""
    for name in ("became+test", "ewc+sgd", "split-code", "results.json"):
        (tmp_path / name).touch()
    words = ["became", *typed]
    (tmp_path / "complete.sh").write_text(
        script + f"\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}\n"
        "_tyro_became; printf '%s\\n' \"${COMPREPLY[@]}\"\n"
    )
    done = subprocess.run(["bash", "complete.sh"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == offered


def test_an_unknown_name_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--methods", "gpm", "becam"], "there is no method 'becam'; did you mean 'became'?"),
        (["--projector", "gmp"], "there is no projector 'gmp'; did you mean 'gpm'?"),
        (["--benchmark", "split-mnits"], "there is no benchmark 'split-mnits'; did you mean 'split-mnist'?"),
        (["--network", "resnet"], "there is no network 'resnet'; did you mean 'resnet18'?"),
        (["--tracker", "tensorbord"], "there is no tracker 'tensorbord'; did you mean 'tensorboard'?"),
        (["--preset", "papre"], "split-mnist has no preset 'papre'; did you mean 'paper'?"),
    ):
        assert main(["run", "--backend", "torch", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {message}")
        assert len(said.splitlines()) == 1


def test_what_is_left_out_is_left_to_the_preset_or_the_record() -> None:
    assert parse_request("run", [], backend=True) == Request()
    given = ["--lr", "0.5", "--augment", "False", "--mixed-precision", "--lr-steps", "--coma-alpha", "0.5", "0.25"]
    assert parse_request("run", given, backend=False).values == {
        "lr": 0.5, "augment": False, "mixed_precision": True, "lr_steps": (), "coma_alpha": (0.5, 0.25),
    }  # fmt: skip


@pytest.mark.parametrize("arguments", [["--seeds"], ["--methods"], ["--seeds", "1", "-1"]])
def test_there_must_be_a_method_and_a_seed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--backend", "torch", *arguments]) == 2
    said = capsys.readouterr().err
    assert "at least one method" in said or "the seed -1 is negative; give 0 or more." in said


def test_a_value_that_cannot_be_used_is_refused_even_if_no_method_uses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "run",
        "--backend",
        "torch",
        "--methods",
        "finetune",
        "--ewc-strength",
        "-1",
        "--out",
        str(tmp_path / "x"),
    ]
    assert main(arguments) == 2
    assert "the EWC strength is -1.0; it must be at least 0." in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_a_later_method_adapts_by_its_own_rank_is_checked_before_any_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "x")]
    options = ["--backend", "torch", "--lora-layers", "nothing*", *out]
    assert main(["run", "--methods", "finetune", "inflora", *options]) == 2
    assert capsys.readouterr().err.startswith("error: --lora-layers nothing* matches none of the network's names")
    assert not (tmp_path / "x").exists()
