from collections.abc import Callable

import numpy as np
import pytest

from became_core.continual import SGD, Batch, Constraint, Learner, TaskStream
from reference.learner import ReferenceLearner
from tests.conformance import CHECKS, STREAM, Make, fresh_rng, numbers


def plain(stream: TaskStream, seed: int) -> Learner:
    return ReferenceLearner(stream, seed=seed)


def biased(stream: TaskStream, seed: int) -> Learner:
    return ReferenceLearner(stream, seed=seed, bias=True)


@pytest.mark.parametrize("make", [plain, biased])
@pytest.mark.parametrize("check", [check for check in CHECKS if "regression" not in check.__name__])
def test_the_reference_learner_conforms(check: Callable[[Make], None], make: Make) -> None:
    """But for regression: the reference has one likelihood, the categorical one."""
    check(make)


def test_images_are_normalised_with_the_data_sets_statistics() -> None:
    """The inputs of the first layer have mean 0 and variance 1 over the training part."""
    rows = np.arange(STREAM.dataset.train_size)
    learner = ReferenceLearner(STREAM)
    (taps,) = learner.taps(0, rows, len(rows), "empirical", fresh_rng())
    assert float(taps["fc1"].inputs.mean()) == pytest.approx(0, abs=1e-12)
    assert float(taps["fc1"].inputs.std()) == pytest.approx(1)


def test_dropout_is_a_function_of_the_generator() -> None:
    batch = Batch(0, STREAM.tasks[0].train)

    def trained(seed: int) -> dict[str, np.ndarray]:
        learner = ReferenceLearner(STREAM, dropout=0.5)
        everything = Constraint(frozenset(learner.parameters()))
        learner.train([batch], np.asarray([0.1]), everything, SGD(), np.random.default_rng(seed))
        return numbers(learner.parameters())

    first, again, other = trained(0), trained(0), trained(1)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["fc1.weight"], other["fc1.weight"])


def test_dropout_is_on_in_published_taps_only() -> None:
    rows = STREAM.tasks[0].train
    learner = ReferenceLearner(STREAM, hidden=(200, 100), dropout=0.5)
    (frozen,) = learner.taps(0, rows, len(rows), "empirical", fresh_rng())
    (published,) = learner.taps(0, rows, len(rows), "published", fresh_rng())
    without, dropped = frozen["fc2"].inputs, published["fc2"].inputs
    is_active = dropped != 0
    np.testing.assert_array_equal(
        dropped[is_active], 2 * without[is_active]
    )  # The remaining units are scaled by 1 / (1 - 0.5).
    assert float(is_active.sum() / (without != 0).sum()) == pytest.approx(0.5, abs=0.02)
