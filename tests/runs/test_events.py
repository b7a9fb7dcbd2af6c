"""The log of events: lines that are only added to, strict JSON."""

import json
import math
from pathlib import Path

from adapters.runs.events import EventLog
from became_core.continual import EpochEnd, TaskEnd


def test_events_are_lines_that_are_added(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.add("begin", versions={"numpy": "2"})
    log.on_epoch_end(EpochEnd(0, 1, 2, 3, 0.5, 0.1, math.nan))
    first = log.file.read_bytes()
    EventLog(log.file).on_task_end(TaskEnd(0, None, [90.0], [80.0], frozenset({"fc2.weight", "fc1.weight"})))
    assert log.file.read_bytes().startswith(first)
    begin, epoch, task = (json.loads(line) for line in log.file.read_text().splitlines())
    assert begin["versions"] == {"numpy": "2"}
    assert begin["time"].endswith("+00:00")
    assert (epoch["event"], epoch["epoch"], epoch["validation_loss"]) == ("epoch", 2, None)
    assert (task["event"], task["alpha"], task["full"]) == ("task", None, ["fc1.weight", "fc2.weight"])


def test_a_line_that_was_cut_short_is_ended(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.file.write_text('{"event": "ep')
    log.add("resume")
    cut, line = log.file.read_text().splitlines()
    assert cut == '{"event": "ep'
    assert json.loads(line)["event"] == "resume"
