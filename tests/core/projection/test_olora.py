"""O-LoRA: adapters of a new task have no overlap with those of any task before, by the published code's loss."""

from typing import Any

import numpy as np
import pytest

from became_core.projection import LowRankRegion, OLoRA
from reference.projection import olora_overlap
from tests.backends import to_numpy, to_xp
from tests.projections import WIDTH, Started, finished

NAME = "fc.weight"


def ended(xp: Any, memory: OLoRA, rows: np.ndarray[Any, Any]) -> OLoRA:
    region = LowRankRegion.initial(to_xp(xp, {NAME: rows}), to_xp(xp, {NAME: np.zeros((3, WIDTH), rows.dtype)}))
    return memory.end_stage(memory.tasks, region).remember(finished(xp, np.ones((WIDTH, 1))))


def test_what_begins_and_every_step_have_no_overlap_with_old_rows(xp: Any) -> None:
    draw, memory, old = np.random.default_rng(0), OLoRA(), list[Any]()
    for task in range(3):
        drawn = draw.normal(size=(2, WIDTH))
        rows = to_numpy(memory.adapter_rows(Started(task, {}), to_xp(xp, {NAME: drawn}))[NAME])
        step = to_numpy(memory.project(to_xp(xp, {NAME: draw.normal(size=(2, WIDTH))}))[NAME])
        assert olora_overlap(old, rows - 0.3 * step) < 1e-12
        assert task == 0 or olora_overlap(old, drawn) > 0.1
        old.append(rows - 0.3 * step)
        memory = ended(xp, memory, old[-1])
        assert memory.rank == {NAME: (2 * (task + 1), WIDTH)}
        assert memory.tasks == task + 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_that_are_there_already_and_rows_of_zeros_add_nothing(xp: Any, dtype: Any) -> None:
    rows = np.random.default_rng(0).normal(size=(2, WIDTH)).astype(dtype)
    memory = ended(xp, OLoRA(), rows)
    for again in (rows, 3 * rows, 0 * rows):
        memory = ended(xp, memory, again.astype(dtype))
        assert memory.rank == {NAME: (2, WIDTH)}


def test_as_many_rows_as_columns_fill_the_space(xp: Any) -> None:
    memory = ended(xp, OLoRA(), np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))
    assert memory.rank == {NAME: (WIDTH, WIDTH)}


def test_a_stage_without_adapters_adds_nothing() -> None:
    assert OLoRA().end_stage(0, None) == OLoRA()
