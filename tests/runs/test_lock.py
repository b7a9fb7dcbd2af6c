"""The lock: one process at a time, and never one that is dead."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from adapters.runs.lock import locked
from became_core import BecameError

HOLD = "import sys; from pathlib import Path; from adapters.runs.lock import locked\n"
HOLD += "with locked(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"


def test_a_lock_says_whose_it_is_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "run" / "lock"
    with locked(file):
        assert file.read_text() == f" {os.getpid()}\n"
        message = rf"^another process \({os.getpid()}\) is at work in .*run; wait for it or choose another --out\.$"
        with pytest.raises(BecameError, match=message), locked(file):
            pass
        assert file.exists()
    assert list(file.parent.iterdir()) == []
    with pytest.raises(KeyError), locked(file):
        raise KeyError
    assert not file.exists()


def test_another_process_keeps_us_out_until_it_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    root = Path(__file__).parents[2]
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD, file], cwd=root, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(BecameError, match=rf"another process \({other.pid}\) is at work"), locked(file):
                pass
        finally:
            other.kill()
    assert file.read_text() == f" {other.pid}\n"  # it is still there, and stale
    with locked(file):
        assert file.read_text() == f" {os.getpid()}\n"


def test_a_place_that_cannot_hold_a_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BecameError, match=r"cannot write .*file.lock: "), locked(tmp_path / "file/lock"):
        pass


def test_threads_that_wait_for_one_file_hold_it_one_after_another(tmp_path: Path) -> None:
    """Each removes the file as it ends, so that a waiting thread often has a file open that is gone."""
    file, inside, most_inside = tmp_path / "lock", [], []

    def enter_often(number: int) -> None:
        for _ in range(20):
            with locked(file, wait=True):
                inside.append(number)
                most_inside.append(len(inside))
                assert file.exists()
                inside.remove(number)

    threads = [threading.Thread(target=enter_often, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert most_inside == [1] * 80
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_names_nobody_still_keeps_others_out(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with locked(file):
        file.write_text("")
        with pytest.raises(BecameError, match=r"^another process is at work in "), locked(file):
            pass
