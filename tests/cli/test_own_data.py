"""Runs on a user's own tables: another table is never learned, shown or averaged in place of the one that was meant."""

from pathlib import Path

import pytest

from adapters.analysis.comparison import comparison, gather
from adapters.cli.__main__ import main
from adapters.runs.directory import read_record, read_results
from became_core import BecameError

RUN = ["run", "--backend", "torch", "--benchmark", "tabular", "--methods", "finetune", "--epochs", "1", "--quiet"]


def table(file: Path, slope: float) -> Path:
    lines = "".join(f"{row % 2},{row},{slope * row}\n" for row in range(40))
    file.write_text(f"task,x,target\n{lines}", encoding="utf-8")
    return file


def run(data: Path | None, out: Path, *more: str) -> int:
    where = [] if data is None else ["--data-dir", str(data)]
    return main([*RUN, *where, "--out", str(out), *more])


def interrupted(data: Path, out: Path) -> Path:
    """A run that was to begin, of which there is a configuration alone."""
    assert run(data, out) == 0
    (folder,) = out.glob("finetune-*")
    (folder / "results.json").unlink()
    for file in (folder / "checkpoints").iterdir():
        file.unlink()
    return folder / "config.json"


def test_a_run_whose_table_is_gone_or_another_one_does_not_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = table(tmp_path / "own.csv", 1.5), tmp_path / "out"
    config = interrupted(data, out)
    before = config.read_bytes()
    moved = data.rename(tmp_path / "moved.csv")
    assert main(["resume", str(out)]) == 2
    assert f"there is no file {data}" in capsys.readouterr().err
    assert main(["run", "--config", str(config), "--out", str(tmp_path / "other")]) == 2
    assert f"there is no file {data}" in capsys.readouterr().err
    table(data, 2.5)
    assert main(["resume", str(out)]) == 2
    assert "is of a run on other data than own as it is now; name the folder or the file" in capsys.readouterr().err
    assert config.read_bytes() == before
    assert main(["resume", str(out), "--data-dir", str(moved)]) == 0
    (result,) = read_results(out)
    assert result.data == read_record(config).data


def test_the_variable_names_the_place_of_data_that_were_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = table(tmp_path / "own.csv", 1.5), tmp_path / "out"
    interrupted(data, out)
    monkeypatch.setenv("BECAME_DATA_DIR", str(data.rename(tmp_path / "moved.csv")))
    assert main(["resume", str(out)]) == 0


def test_a_result_of_another_table_is_neither_shown_nor_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data, out = table(tmp_path / "own.csv", 1.5), tmp_path / "out"
    assert run(data, out) == 0
    assert run(Path("own.csv"), out) == 0  # the same table by another path is the same run
    assert run(table(tmp_path / "b.csv", 2.5), out, "--seeds", "1") == 0
    with pytest.raises(BecameError, match="out holds runs on other data than the others"):
        gather([out])
    # What a user chooses of one table may be compared if the data are the same.
    assert run(data, tmp_path / "chosen", "--target-kind", "numbers") == 0
    assert run(data, tmp_path / "own", "--head", "own") == 0
    assert len(comparison(gather([tmp_path / "chosen", tmp_path / "own"]))[0].rows) == 2
    assert run(data, tmp_path / "column", "--target-column", "x", "--target-kind", "numbers") == 0
    with pytest.raises(BecameError, match="column holds runs on other data than the others"):
        gather([tmp_path / "chosen", tmp_path / "column"])
    assert run(data, tmp_path / "classes", "--target-kind", "classes") == 0
    with pytest.raises(BecameError, match="classes holds runs that are measured in %, the others in RMSE"):
        gather([tmp_path / "chosen", tmp_path / "classes"])
    capsys.readouterr()
    table(data, 3.5)
    assert run(data, out) == 2
    assert "is a run on other data than own as it is now" in capsys.readouterr().err


def test_a_recorded_configuration_of_a_table_is_taken_again(tmp_path: Path) -> None:
    data = table(tmp_path / "own.csv", 1.5)
    assert run(data, tmp_path / "out") == 0
    config = tmp_path / "out" / "finetune-seed0" / "config.json"
    assert main(["run", "--config", str(config), "--seeds", "3", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert [result.seed for result in read_results(tmp_path / "out")] == [0, 3]
    assert [len(result.accuracy) for result in read_results(tmp_path / "out")] == [2, 2]
