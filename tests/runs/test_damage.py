"""Whatever happens to a file of a run directory: it is as it was, or it is left out or refused in one sentence."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.runs import Checkpoints, RunDirectory, RunResult, write_summary
from adapters.runs.encoding import encoded
from became_core import BecameError
from became_core.continual import Annealed, RunRecord, RunState, Training, build_method, learn
from reference.learner import ReferenceLearner
from tests.listening import Listening
from tests.streams import prototype_stream

STREAM = prototype_stream(tasks=2, per_class=8, side=3)
METHOD = build_method("became+trgp", {"threshold": 0.9})
TRAINING = Training(Annealed(0.2, 2), Annealed(0.2, 1), batch_size=6, path_alphas=(0.0, 1.0))
CONFIG = {"benchmark": "prototypes", "tasks": 2, "lr": 0.2}
# Damaged files for each of two folders; `nox -s stress` damages many more.
EXAMPLES = int(os.environ.get("BECAME_DAMAGES", "200"))


class Stopped(Exception):  # noqa: N818 # it is no error
    pass


@dataclass(frozen=True)
class Kept:
    """A run directory, its files as they were written, and what they hold."""

    run: RunDirectory
    checkpoints: Checkpoints
    learner: ReferenceLearner
    files: dict[Path, bytes]
    states: dict[int, str]
    result: str | None


def text_of(state: RunState) -> str:
    plain, arrays = encoded(state)
    return repr((plain, {name: (value.dtype, value.tobytes()) for name, value in arrays.items()}))


def result_of(record: RunRecord) -> RunResult:
    return RunResult.of(record, backend="numpy", benchmark="prototypes", method="became", seed=0, config=CONFIG)


def _kept(out: Path, *, stop_after: int | None) -> Kept:
    run = RunDirectory(out, "became", 0)
    checkpoints, states = run.checkpoints(STREAM, METHOD, TRAINING), dict[int, str]()
    learner = ReferenceLearner(STREAM, hidden=(5, 4))
    run.write_config("numpy", CONFIG, STREAM)

    def keep(state: RunState) -> None:
        checkpoints.save(state)
        states[checkpoints.numbers()[-1]] = text_of(state)
        if len(states) == stop_after:
            raise Stopped

    result = None
    try:
        looking = [run.events, Listening(keep=keep)]
        result = result_of(learn(learner, STREAM, METHOD, TRAINING, callbacks=looking))
        run.save(result)
    except Stopped:
        pass
    files = {file: file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}
    text = None if result is None else repr(result.to_json())
    return Kept(run, checkpoints, learner, files, states, text)


@pytest.fixture(scope="module")
def directories() -> Iterator[dict[str, Kept]]:
    with tempfile.TemporaryDirectory() as folder:
        yield {
            "finished": _kept(Path(folder, "finished"), stop_after=None),
            "unfinished": _kept(Path(folder, "unfinished"), stop_after=7),
        }


def damaged(content: bytes, draw: st.DataObject) -> bytes:
    kind = draw.draw(st.sampled_from(["flip", "cut", "grow", "swap"]))
    where = draw.draw(st.integers(0, max(len(content) - 1, 0)))
    if kind == "flip":
        return content[:where] + bytes([content[where] ^ (1 << draw.draw(st.integers(0, 7)))]) + content[where + 1 :]
    if kind == "cut":
        return content[:where]
    more = draw.draw(st.binary(min_size=1, max_size=9))
    return content[:where] + more + content[where + (len(more) if kind == "swap" else 0) :]


@pytest.mark.parametrize("which", ["finished", "unfinished"])
@settings(max_examples=EXAMPLES)
@given(draw=st.data())
def test_no_damage_is_taken_for_a_result(directories: dict[str, Kept], which: str, draw: st.DataObject) -> None:
    kept = directories[which]
    chosen = draw.draw(st.lists(st.sampled_from(sorted(kept.files)), min_size=1, max_size=2, unique=True))
    try:
        for file in chosen:
            file.write_bytes(damaged(kept.files[file], draw))
        check_what_is_loaded(kept)
    finally:
        for file in chosen:
            file.write_bytes(kept.files[file])


def check_what_is_loaded(kept: Kept) -> None:
    said: list[str] = []
    try:
        found = kept.run.finished("numpy", CONFIG)
        assert (found and repr(found.to_json())) == kept.result
    except BecameError as error:
        said.append(str(error))
    try:
        assert kept.run.check_unfinished("numpy", CONFIG, resume=False) == "numpy"
    except BecameError as error:
        said.append(str(error))
    try:
        notes: list[str] = []
        state = kept.checkpoints.load(kept.learner, notes.append)
        assert state is not None
        # The last one, or the one before, in which case it is said.
        assert text_of(state) == kept.states[sorted(kept.states)[-1 - len(notes)]]
    except BecameError as error:
        said.append(str(error))
    for sentence in said:
        assert str(kept.run.out) in sentence
        assert len(sentence.splitlines()) == 1
    kept.run.events.add("look")  # whatever the log ends with, it can be added to
    (kept.run.folder / "events.jsonl").write_bytes(kept.files[kept.run.folder / "events.jsonl"])


@pytest.mark.parametrize("name", ["config.json", "results.json", "checkpoints/000008.json"])
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"sha256": 1}', b"[" * 10**5, b"\xff\xfe", b"NaN", b"1" * 10**4]
)
def test_what_was_never_written_by_us_is_refused(directories: dict[str, Kept], name: str, content: bytes) -> None:
    kept = directories["finished"]
    file = kept.run.folder / name
    file.write_bytes(content)
    try:
        check_what_is_loaded(kept)
    finally:
        file.write_bytes(kept.files[file])


def test_a_folder_in_a_files_place_is_one_sentence(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, "became", 0)
    (run.results_file / "inner").mkdir(parents=True)
    with pytest.raises(BecameError, match=r"cannot read .*results\.json: Is a directory"):
        run.finished("numpy", CONFIG)
    with pytest.raises(BecameError, match=r"cannot read .*results\.json"):
        write_summary(tmp_path)
    with pytest.raises(BecameError, match=r"cannot write .*results\.json: Is a directory"):
        run.save(result_of(RunRecord(np.ones((1, 1)), np.ones((1, 1)), [None], [()], [{}], [0], [], {"total": 1.0})))
    assert os.listdir(run.folder) == ["results.json"]  # noqa: PTH208 # nothing temporary is left


def test_nothing_but_numbers_is_read_from_arrays(tmp_path: Path) -> None:
    """An array file that was exchanged for a pickle, digest and all, is damage: nothing looks into it."""
    import pickle

    from adapters.runs.files import digest, read_sealed, write_sealed

    class Harmful:
        def __reduce__(self) -> Any:
            return (os.abort, ())

    kept = _kept(tmp_path, stop_after=3)
    beside = kept.checkpoints.folder / "000003.safetensors"
    beside.write_bytes(pickle.dumps(Harmful()))
    file = kept.checkpoints.folder / "000003.json"
    write_sealed(file, read_sealed(file) | {"arrays": digest(beside.read_bytes())})
    said: list[str] = []
    assert kept.checkpoints.load(kept.learner, said.append) is not None
    assert said == [f"{beside} holds no arrays; it is left out."]
