"""What a run shows: plain lines where there is no terminal, a bar that only moves forward where there is one."""

import io
import math

from rich.console import Console

from adapters.cli.display import RunProgress
from became_core.continual import EpochEnd, TaskEnd

EVENTS: list[EpochEnd | TaskEnd] = [
    EpochEnd(0, 1, 1, 2, 0.5, 0.05, math.nan),
    EpochEnd(0, 1, 2, 2, 0.25, 0.0, 1.125),
    TaskEnd(0, None, [90.0], [90.0]),
    EpochEnd(1, 1, 1, 1, 0.5, 0.05, math.nan),
    EpochEnd(1, 2, 1, 1, 0.5, 0.05, math.nan),
    TaskEnd(1, 0.625, [80.0, 95.0], [40.0, 95.0], frozenset({"fc2.weight", "conv1.weight"})),
]


def show(progress: RunProgress, event: EpochEnd | TaskEnd) -> None:
    if isinstance(event, EpochEnd):
        progress.on_epoch_end(event)
    else:
        progress.on_task_end(event)


def test_without_a_terminal_every_event_is_one_plain_line() -> None:
    text = io.StringIO()
    with RunProgress(Console(file=text, width=40), "became-seed0", tasks=2, stages=2) as progress:
        for event in EVENTS:
            show(progress, event)
    assert text.getvalue().splitlines() == [
        "became-seed0  task 1/2  stage 1  epoch 1/2  loss 0.5000  lr 0.05",
        "became-seed0  task 1/2  stage 1  epoch 2/2  loss 0.2500  lr 0  validation loss 1.1250",
        "became-seed0  task 1/2 learned  accuracy 90.0",
        "became-seed0  task 2/2  stage 1  epoch 1/1  loss 0.5000  lr 0.05",
        "became-seed0  task 2/2  stage 2  epoch 1/1  loss 0.5000  lr 0.05",
        "became-seed0  task 2/2 learned  alpha 0.625  accuracy 80.0 95.0",
        "became-seed0  the protected space of conv1.weight is full: no update is left for it in stage 1",
        "became-seed0  the protected space of fc2.weight is full: no update is left for it in stage 1",
    ]


def test_on_a_terminal_the_bar_shows_the_state_and_only_moves_forward() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    done = []
    with RunProgress(console, "became-seed0", tasks=2, stages=2) as progress:
        for event in EVENTS:
            show(progress, event)
            done.append(progress.completed)
    assert done == [0.25, 0.5, 1, 1.5, 2, 2]
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "task 2/2  stage 2  epoch 1/1  loss 0.5000  lr 0.05" in shown
