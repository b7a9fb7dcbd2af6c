"""Files are whole or not there; what cannot be written leaves what was."""

import errno
import os
from pathlib import Path

import pytest

from adapters.runs.files import DamagedError, read_sealed, remove_temporary_files, write_file, write_sealed
from became_core import BecameError


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")]
)
def test_what_cannot_be_written_leaves_what_was(
    number: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    write_file(file, b"before")

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(BecameError, match=rf"^cannot write .*file: {reason}\.$"):
        write_file(file, b"after")
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_stop_in_the_middle_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "file"

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_file(file, b"after")
    assert list(file.parent.iterdir()) == []


def test_temporary_files_of_the_named_files_alone_are_removed(tmp_path: Path) -> None:
    others = {"a.json", "a.json.1", ".a.json", ".a.json.swp", ".a.json.1.old", ".ba.json.1", ".c.json.1", ".b.json.2"}
    for name in {".a.json.1", ".a.json.123456", ".b.json.7"} | others - {".b.json.2"}:
        (tmp_path / name).touch()
    (tmp_path / ".b.json.2").mkdir()  # it cannot be removed as a file is
    remove_temporary_files(tmp_path, r"[ab]\.json")
    assert {path.name for path in tmp_path.iterdir()} == others
    remove_temporary_files(tmp_path / "missing", ".*")


def test_sealed_values_come_back_and_any_change_is_noticed(tmp_path: Path) -> None:
    file, values = tmp_path / "a.json", {"b": [1, 0.1, None], "a": {"x": "ä", "y": True}}
    for indent in (None, 2):
        write_sealed(file, values, indent=indent)
        assert read_sealed(file) == values
        assert list(read_sealed(file)) == ["b", "a"]
        text = file.read_text()
        for old, new in (("0.1", "0.2"), ("null", "1"), ("true", "false"), ('"x"', '"z"'), ("sha256", "sha257")):
            file.write_text(text.replace(old, new))
            with pytest.raises(DamagedError, match=r"a\.json is damaged$"):
                read_sealed(file)
