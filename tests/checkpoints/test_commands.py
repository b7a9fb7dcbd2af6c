"""``became inspect``, ``became fisher`` and ``became merge`` as a user calls them."""

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("tyro")

from adapters.checkpoints import merge_checkpoints
from adapters.checkpoints.trace import trace_merge
from adapters.cli.__main__ import main
from adapters.cli.checkpoints import size_of
from became_core import BecameError
from tests.checkpoints.models import arrays, contents, folder_of, merged, pair, saved


def words(*parts: Any) -> list[str]:
    return [str(part) for part in parts]


def files(folder: Path) -> list[Path]:
    return [folder / f"{name}.safetensors" for name in ("A", "B", "FA", "FB")]


def test_a_merge_by_options_and_by_a_plan_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("yaml")
    plan = pair(tmp_path, per="layer")
    first, second, *fishers = files(tmp_path)
    out = ["--per", "layer", "--out", tmp_path / "options", "--quiet"]
    assert main(words("merge", first, second, "--fisher", *fishers, *out)) == 0
    shown = capsys.readouterr().out
    lines = [f"- {{model: {m.model}, fisher: {m.fisher}}}\n" for m in plan.models]
    (tmp_path / "plan.yaml").write_text(f"models:\n{''.join(lines)}per: layer\n", encoding="utf-8")
    assert main(words("merge", tmp_path / "plan.yaml", tmp_path / "plan", "--memory", "1GiB", "--workers", 1)) == 0
    report = merge_checkpoints(plan, tmp_path / "python")
    for name in ("model.safetensors", "alpha.svg"):
        assert len({contents(tmp_path / way)[name] for way in ("options", "plan", "python")}) == 1
    assert f"predicted gain: {report.gain:.6g}; the sum of the losses is convex" in shown
    assert isinstance(report.alpha, dict)
    assert all(f"{1 - alpha:.6f}, {alpha:.6f}" in shown for alpha in report.alpha.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "became needs a Fisher file"),
        (["--rule", "ties"], "merge_method 'ties' is not known"),
        (["--rule", "linear", "--weight", "1"], "--weight has 1 values for 2 models"),
        (["--rule", "linear", "--memory", "lots"], "--memory is 'lots'"),
        (["--rule", "linear", "--memory", "1KiB"], "needs at least"),
        (["--rule", "linear", "--workers", "0"], "--workers is 0"),
        (["--rule", "linear", "--workers", "2", "--scheduler", "x"], "--workers are threads of this machine, and"),
        (["--rule", "linear", "--dry-run", "--scheduler", "x"], "--dry-run measures this machine, and --scheduler"),
        (["--rule", "linear", "--trace", "3"], "--trace and --evaluate go together"),
        (["--rule", "linear", "--out-dtype", "int8"], "no known dtype"),
    ],
)
def test_a_mistake_is_a_sentence_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    pair(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(words("merge", *files(tmp_path)[:2], *options, "--out", tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_plan_needs_a_folder_and_no_other_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.yaml").write_text("models: [A, B]\n", encoding="utf-8")
    assert main(words("merge", tmp_path / "plan.yaml")) == 2
    assert "became merge PLAN.yaml OUT" in capsys.readouterr().err
    for option, value in (("--rank", 3), ("--rank", 0), ("--rule", "linear"), ("--per", "model")):
        assert main(words("merge", tmp_path / "plan.yaml", tmp_path / "out", option, value)) == 2
        assert f"{option} belongs into the plan" in capsys.readouterr().err
    assert main(words("merge", tmp_path / "A", tmp_path / "B")) == 2
    assert "say with --out" in capsys.readouterr().err


def test_the_size_of_shards_is_the_plans_unless_the_command_has_one(tmp_path: Path) -> None:
    pair(tmp_path)
    first, second, *_ = files(tmp_path)
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"models: ['{first}', '{second}']\nmerge_method: linear\nshard_size: 100\n", encoding="utf-8")
    for name, options, shards in (("one", [], False), ("two", ["--shard-size", "5GB"], True)):
        assert main(words("merge", plan, tmp_path / name, *options)) == 0
        assert (len(list((tmp_path / name).glob("*.safetensors"))) == 1) == shards


def test_a_plan_that_is_no_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.yaml").symlink_to("/dev/null")
    assert main(words("merge", tmp_path / "plan.yaml", tmp_path / "out")) == 2
    assert "plan.yaml is no file" in capsys.readouterr().err


def test_a_name_that_the_terminal_cannot_show_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert main(words("inspect", saved(tmp_path, "ü", arrays(0)))) == 0
    assert b"\\xfc.safetensors: safetensors file" in shown.buffer.getvalue()


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair(tmp_path)
    first, second, *fishers = files(tmp_path)
    assert main(words("merge", first, second, "--fisher", *fishers, "--out", tmp_path / "out", "--dry-run")) == 0
    shown = capsys.readouterr().out
    assert f'merge_method: "became"\nmodels:\n  - model: "{first}"' in shown
    assert "to read in 2 passes" in shown
    assert "MiB of memory at most" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "out exists; nothing is overwritten"),
        (["--trace", 1, "--evaluate", "tests.checkpoints.networks:distance"], "a path of 1 points has no ends"),
        (["--trace", 3, "--evaluate", "tests.nowhere:loss"], "there is no function 'tests.nowhere:loss'"),
    ],
)
def test_a_dry_run_refuses_what_the_merge_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[Any], message: str
) -> None:
    pair(tmp_path)
    if not options:
        (tmp_path / "out").mkdir()
    command = words("merge", *files(tmp_path)[:2], "--rule", "linear", "--out", tmp_path / "out", *options)
    for dry in ([], ["--dry-run"]):
        assert main([*command, *dry]) == 2
        assert message in capsys.readouterr().err


def test_a_dry_run_refuses_a_disk_without_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    command = words("merge", *files(tmp_path)[:2], "--rule", "linear", "--out", tmp_path / "out", "--dry-run")
    assert main(command) == 2
    assert re.search(r"out needs .* and .* has 100 bytes free", capsys.readouterr().err)


def test_a_trace_finds_the_best_of_a_grid_and_the_regret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair(tmp_path)
    command = words("merge", *files(tmp_path)[:2], "--rule", "linear", "--out", tmp_path / "out")
    assert main([*command, "--trace", "11", "--evaluate", "tests.checkpoints.networks:distance"]) == 0
    assert "alpha 0.3" in capsys.readouterr().out
    trace = json.loads((tmp_path / "out" / "became_trace.json").read_text(encoding="utf-8"))
    assert trace["best"] == pytest.approx(0.3)
    assert trace["alphas"] == pytest.approx(np.linspace(0, 1, 11).tolist())
    gap = sum(float(((arrays(1)[name] - value) ** 2).sum()) for name, value in arrays(0).items())
    assert trace["regret"] == pytest.approx(0.2**2 * gap, rel=1e-4)
    assert list(tmp_path.glob(".*")) == []


def test_a_merge_that_is_there_is_traced_without_another_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one whose evaluation failed, after the function is mended; not if an input or the plan is another one."""
    pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "evaluations.py").write_text("def loss(folder):\n    return 'none'\n", encoding="utf-8")
    command = words("merge", *files(tmp_path)[:2], "--rule", "linear", "--out", "out", "--trace", 3)
    assert main([*command, "--evaluate", "evaluations:loss"]) == 2
    assert "returned none, not a finite number" in capsys.readouterr().err
    merged = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert main([*command, "--evaluate", "tests.checkpoints.networks:distance"]) == 0
    assert "out has this merge already; it is traced" in capsys.readouterr().out
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert after.pop("became_trace.json")
    assert after == merged
    other = words("merge", *files(tmp_path)[:2], "--rule", "linear", "--weight", 1, 3, "--out", "out", "--trace", 3)
    assert main([*other, "--evaluate", "tests.checkpoints.networks:distance"]) == 2
    assert "out exists; nothing is overwritten" in capsys.readouterr().err
    saved(tmp_path, "A", arrays(5))
    assert main([*command, "--evaluate", "tests.checkpoints.networks:distance"]) == 2
    assert "A.safetensors has changed since out was merged; merge it into another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [("AB", ["--trace", "1"], "a path of 1 points has no ends"), ("ABA", ["--trace", "3"], "between two models")],
)
def test_a_path_without_two_ends_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], models: str, options: list[str], message: str
) -> None:
    pair(tmp_path)
    named = [tmp_path / f"{name}.safetensors" for name in models]
    command = words("merge", *named, "--rule", "linear", "--out", tmp_path / "out", *options)
    assert main([*command, "--evaluate", "tests.checkpoints.networks:distance"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_merge_of_the_plan_is_not_traced(tmp_path: Path) -> None:
    plan, out = pair(tmp_path), tmp_path / "out"
    message = rf"^{re.escape(str(out))} has no merge of this plan; write it there by merge_checkpoints first\.$"
    with pytest.raises(BecameError, match=message):
        trace_merge(plan, out, 3, lambda folder: 0.0)
    merge_checkpoints(plan.replaced(per="layer"), out)
    with pytest.raises(BecameError, match=message):
        trace_merge(plan, out, 3, lambda folder: 0.0)


def test_a_function_is_found_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair(tmp_path)
    (tmp_path / "beside_the_models.py").write_text("def loss(folder):\n    return 0.5\n", encoding="utf-8")
    (tmp_path / "needs_more.py").write_text("import not_installed\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    command = words("merge", *files(tmp_path)[:2], "--rule", "linear", "--trace", 2)
    assert main([*command, "--out", "out", "--evaluate", "beside_the_models:loss"]) == 0
    assert "loss of the merge: 0.5" in capsys.readouterr().out
    assert main([*command, "--out", "other", "--evaluate", "needs_more:loss"]) == 2
    assert "there is no function 'needs_more:loss' (No module named 'not_installed')" in capsys.readouterr().err


def test_a_function_that_is_not_there_is_said_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair(tmp_path)
    command = words("merge", *files(tmp_path)[:2], "--rule", "linear", "--out", tmp_path / "out", "--trace", 3)
    assert main([*command, "--evaluate", "tests.nowhere:loss"]) == 2
    assert "there is no function 'tests.nowhere:loss'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_inspect_says_what_checkpoints_are_and_whether_they_merge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair(tmp_path)
    assert main(words("inspect", *files(tmp_path)[:2])) == 0
    shown = capsys.readouterr().out
    assert "6 tensors, 151 weights, 604 bytes, 6 F32" in shown
    assert "2 layers" in shown
    assert "They can be merged: 6 tensors" in shown
    other = saved(tmp_path, "C", {name: value for name, value in arrays(3).items() if name != "model.norm.weight"})
    assert main(words("inspect", files(tmp_path)[0], other)) == 0
    assert "They cannot be merged: 'model.norm.weight' is in" in capsys.readouterr().out
    config = {"tie_word_embeddings": True}
    tied = folder_of(tmp_path / "T", {n: v for n, v in arrays(4).items() if n != "lm_head.weight"}, config=config)
    assert main(words("inspect", files(tmp_path)[0], tied)) == 0
    assert (
        "'lm_head.weight' is tied to another tensor in some of the models, and a tensor of its own in"
        in capsys.readouterr().out
    )
    assert main(words("inspect", tmp_path / "missing")) == 2
    assert "there is no" in capsys.readouterr().err


def test_fisher_measures_adds_and_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    from tests.checkpoints import networks

    model = saved(tmp_path, "M", arrays(3, networks.SHAPES))
    generator = np.random.default_rng(0)
    for name in "XY":
        inputs = generator.normal(size=(4, networks.WIDTH)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", inputs=inputs, targets=np.arange(4) % networks.CLASSES)
        command = words("fisher", model, "--data", tmp_path / f"{name}.npz", "--out", tmp_path / f"{name}.safetensors")
        assert main([*command, "--load", "tests.checkpoints.networks:load"]) == 0
    parts = [tmp_path / f"{name}.safetensors" for name in "XY"]
    assert main(words("fisher", "--add", *parts, "--out", tmp_path / "sum.safetensors")) == 0
    total = load_file(tmp_path / "sum.safetensors")
    for name, value in total.items():
        np.testing.assert_allclose(value, sum(load_file(part)[name] for part in parts), rtol=1e-6)
    assert main(words("inspect", tmp_path / "sum.safetensors")) == 0
    assert "a Fisher file: kind empirical, unit sum, per sample, samples 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["M", "--data", "x.npz"], "say with --out"),
        (["M", "--data", "x.npz", "--out", "F.npz"], "give --out a name such as F.safetensors"),
        (["M", "--out", "F.safetensors"], "give one of --data, --from and --add, not none"),
        (["--add", "F", "--from", "o.pt", "--out", "F.safetensors"], "not --from and --add"),
        (["--from", "o.pt", "--out", "F.safetensors"], "--from needs --model"),
        (["--add", "F", "--out", "F.safetensors"], "give at least two"),
        (["--data", "x.npz", "--out", "F.safetensors"], "--data measures one model, and 0 were given"),
        (["M", "--data", "x.npz", "--out", "F.safetensors", "--chunk", "0"], "at least 1"),
        (["M", "--data", "x.npz", "--out", "F.safetensors", "--seed", "-1"], "--seed is -1; it must be at least 0."),
        (["M", "--data", "x.npz", "--out", "F.safetensors", "--model", "N"], "--data makes no use of --model; leave"),
        (["--add", "F", "G", "--out", "F.safetensors", "--kind", "true"], "--add makes no use of --kind; leave it out"),
        (["M", "--from", "o.pt", "--model", "N", "--out", "F.safetensors"], "--from makes no use of a model before"),
    ],
)
def test_what_fisher_cannot_do_is_a_sentence(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["fisher", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_loader_that_returns_no_module_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    command = words("fisher", tmp_path, "--data", "x.npz", "--out", tmp_path / "F.safetensors")
    assert main([*command, "--load", "tests.checkpoints.networks:no_module"]) == 2
    assert "returned PosixPath, not a torch.nn.Module" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 * 2**20), ("5GB", 5 * 10**9), ("1.5 GiB", 3 * 2**29), ("2G", 2 * 10**9), ("7", 7), ("1kb", 1000)],
)
def test_a_size_is_read_in_either_unit(text: str, size: int) -> None:
    assert size_of(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "-1", "lots", "5XB", "1e9", "9" * 40])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BecameError, match="give a size such as 512MiB"):
        size_of(text, "--memory")


def test_quiet_merges_say_only_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair(tmp_path)
    assert main(words("merge", *files(tmp_path)[:2], "--rule", "linear", "--out", tmp_path / "out", "--quiet")) == 0
    assert capsys.readouterr().out.startswith("written: ")
    assert merged(tmp_path / "out").keys() == arrays(0).keys()


def test_for_programs_each_command_is_a_line_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair(tmp_path)
    first, second, *fishers = files(tmp_path)
    both = ("--fisher", *fishers, "--out")
    counted = {"became.fisher": "1", "kind": "empirical", "unit": "sum", "per": "sample", "samples": "4"}
    parts = [saved(tmp_path, f"F{k}", arrays(k, positive=True), counted) for k in range(2)]
    commands = {
        "inspection": words("inspect", first, second),
        "preview": words("merge", first, second, *both, tmp_path / "out", "--dry-run"),
        "merge": words("merge", first, second, *both, tmp_path / "out"),
        "fisher": words("fisher", "--add", *parts, "--out", tmp_path / "sum.safetensors"),
    }
    found = {}
    for event, command in commands.items():
        assert main([*command, "--log", "json"]) == 0, event
        (line,) = capsys.readouterr().out.splitlines()
        found[event] = json.loads(line)
        assert found[event]["event"] == event
    assert any(line.startswith("They can be merged: 6 tensors") for line in found["inspection"]["lines"])
    assert found["preview"]["bytes_to_read"] > 0
    (coefficients,) = found["merge"]["coefficients"].values()
    assert sum(coefficients) == pytest.approx(1)
    assert (found["merge"]["out"], found["merge"]["files"]) == (str(tmp_path / "out"), ["model.safetensors"])
    assert [model["model"] for model in found["merge"]["plan"]["models"]] == [str(first), str(second)]
    assert found["fisher"]["out"] == str(tmp_path / "sum.safetensors")


def test_a_package_that_a_users_function_misses_is_no_extra_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair(tmp_path)
    (tmp_path / "scoring_of_mine.py").write_text("def loss(path):\n    import no_such_package.part\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    first, second, *fishers = files(tmp_path)
    trace = ("--trace", "3", "--evaluate", "scoring_of_mine:loss")
    assert main(words("merge", first, second, "--fisher", *fishers, "--out", tmp_path / "out", *trace)) == 2
    assert "the package 'no_such_package' is missing; install it." in capsys.readouterr().err
