"""``became reproduce``: tables of several runs by one name."""

from pathlib import Path

import pytest

from adapters.cli.__main__ import main
from adapters.cli.jobs import requested_jobs
from adapters.cli.options import parse_request
from adapters.cli.reproduce import Reproduction, reproductions
from adapters.torch.run import BACKEND
from became_core import BecameError

NAMES = [line.split()[0] for line in reproductions().splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_each_table_is_made_of_commands_that_can_be_run(name: str, tmp_path: Path) -> None:
    table = Reproduction.named(name)
    for words in table.commands(tmp_path):
        request = parse_request("became run", words[1:], backend=True)
        jobs = requested_jobs(request, lambda: BACKEND)
        assert {job.run.seed for job in jobs} == set(table.seeds)


def test_folders_of_one_name_hold_runs_of_one_schedule() -> None:
    schedules: dict[str, set[tuple[str, ...]]] = {}
    for name in NAMES:
        for folder, options in Reproduction.named(name).runs:
            schedules.setdefault(folder, set()).add(options[: options.index("--methods")])
    assert all(len(options) == 1 for options in schedules.values())


def test_what_has_finished_is_compared_by_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ("--epochs", "1", "--first", "1", "--methods")
    runs = ("mnist", (*short, "gpm")), ("other", (*short, "finetune")), ("later", (*short, "ewc"))
    table = Reproduction("a title", (3,), runs)
    for words in table.commands(tmp_path, "--backend", "torch")[:2]:
        assert main(words) == 0
    capsys.readouterr()
    assert table.compared(tmp_path).count("split-mnist, 5 tasks, the first 1") == 1
    assert [name in table.compared(tmp_path) for name in ("gpm", "finetune", "ewc")] == [True, True, False]


def test_dry_run_prints_the_commands_and_makes_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["reproduce", "ablation", "--out", str(out), "--dry-run", "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert "became run --benchmark split-cifar100 --epochs 14 --stage2-epochs 6" in said
    assert "--workers 2 " in said
    assert not out.exists()


def test_an_unknown_table_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "ablaton"]) == 2
    assert "there is no table 'ablaton'; did you mean 'ablation'?" in capsys.readouterr().err
    with pytest.raises(BecameError, match="'gian'"):
        Reproduction.named("gian")


def test_without_a_name_all_tables_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce"]) == 0
    assert capsys.readouterr().out.strip() == reproductions()
