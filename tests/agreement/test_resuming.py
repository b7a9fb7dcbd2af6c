"""One run on three frameworks in turn: what a backend saved, another loads and goes on with, as if it were its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.benchmarks.mnist import load_mnist
from adapters.networks import mlp
from adapters.runs import Checkpoints
from became_core.continual import (
    SGD,
    Annealed,
    Learner,
    Patience,
    RunRecord,
    RunState,
    Training,
    build_method,
    learn,
    split_classes,
)
from reference.learner import ReferenceLearner
from tests.agreement.frameworks import FRAMEWORKS
from tests.backends import to_numpy
from tests.listening import Listening

SHAPE = (1, 28, 28)
STREAM = split_classes(load_mnist(), 5, validation=0.1).first(3)
ANNEALED = Training(Annealed(0.1, 2), Annealed(0.1, 1), batch_size=25, curvature_samples=100)
PATIENT = Training(
    Patience(0.1, patience=1, minimum=0.04, epochs=3),
    Patience(0.1, patience=1, minimum=0.04, epochs=2, restores_best=False),
    batch_size=25,
    curvature_samples=100,
    optimiser=SGD(momentum=0.5),
)


class Stopped(Exception):  # noqa: N818 # it is no error
    pass


def _part(kept: Checkpoints, learner: Learner, until: Callable[[RunState], bool]) -> RunRecord | None:
    """Go on from the files until a state is so; the record, if the run has ended."""

    def keep(state: RunState) -> None:
        kept.save(state)
        if until(state):
            raise Stopped

    try:
        return learn(
            learner, STREAM, kept.method, kept.training, state=kept.load(learner), callbacks=[Listening(keep=keep)]
        )
    except Stopped:
        return None


def _in_stage_2(state: RunState) -> bool:
    return state.theta_gp is not None


@pytest.mark.parametrize(
    ("method", "training", "turns"),
    [
        # A task each.
        ("became", ANNEALED, [("torch", 1), ("jax", 2), ("tensorflow", None)]),
        ("became+trgp", ANNEALED, [("tensorflow", 1), ("torch", 2), ("jax", None)]),
        ("ewc+ogd", ANNEALED, [("jax", 1), ("tensorflow", 2), ("torch", None)]),
        # In the middle of a task, with momentum, the best model and theta_gp under way.
        ("became+sgp", PATIENT, [("torch", _in_stage_2), ("tensorflow", 2), ("jax", None)]),
    ],
)
def test_a_run_is_one_run_on_whatever_it_goes_on(
    method: str, training: Training, turns: list[tuple[str, Any]], tmp_path: Path
) -> None:
    settings = {"threshold": 0.9, "ogd_samples": 20, "ogd_capacity": 20}
    kept = Checkpoints(tmp_path, STREAM, build_method(method, settings), training)
    # All begin with the reference's weights, which come from a file as well.
    reference = ReferenceLearner(STREAM, hidden=(100, 100))
    kept.save(RunState.initial(reference, STREAM, kept.method))
    expected = learn(reference, STREAM, kept.method, training)
    found: RunRecord | None = None
    for framework, until in turns:
        learner = FRAMEWORKS[framework].learner(mlp(*SHAPE), STREAM, 0)
        stop = until if callable(until) else lambda state, until=until: state.task == until
        found = _part(kept, learner, stop)
    assert found is not None
    np.testing.assert_array_equal(found.accuracy, expected.accuracy)
    assert found.ranks == expected.ranks
    assert found.epochs == expected.epochs
    for ours, theirs in zip(found.alpha, expected.alpha, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)
    after: dict[str, NDArray[Any]] = reference.parameters()
    for name, value in learner.parameters().items():
        np.testing.assert_allclose(to_numpy(value), after[name], rtol=1e-6, atol=1e-9)
