"""Gradients by the logits, against the definition of each mode."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core.curvature import logit_cotangents
from reference.formulas import softmax
from tests.backends import to_numpy, to_xp
from tests.strategies import eighths

LABELS = np.asarray([0, 2, 1, 2])
ONE_HOT = np.eye(3)


def cotangents(xp: Any, logits: Any, mode: Any, seed: int = 0) -> list[np.ndarray]:
    stream = np.random.default_rng(seed)
    return [to_numpy(x) for x in logit_cotangents(to_xp(xp, logits), to_xp(xp, LABELS), mode, stream)]


@given(logits=eighths((4, 3)))
def test_one_pass_with_the_labels_of_the_mode(xp: Any, logits: Any) -> None:
    p = softmax(logits)
    expected = {
        "empirical": p - ONE_HOT[LABELS],
        "logit": ONE_HOT[LABELS],
        "published": p - ONE_HOT[logits.argmax(axis=1)],
    }
    for mode, gradient in expected.items():
        (found,) = cotangents(xp, logits, mode)
        np.testing.assert_allclose(found, gradient, atol=1e-14)


@given(logits=eighths((4, 3)))
def test_the_squares_of_all_passes_are_the_expectation_over_labels(xp: Any, logits: Any) -> None:
    """sum_c p_c (p - e_c)(p - e_c)^T = diag(p) - p p^T, the Hessian of cross-entropy by the logits."""
    p = softmax(logits)
    passes = cotangents(xp, logits, "true")
    assert len(passes) == 3
    found = sum(np.einsum("ni,nj->nij", x, x) for x in passes)
    np.testing.assert_allclose(found, np.einsum("ni,ij->nij", p, ONE_HOT) - np.einsum("ni,nj->nij", p, p), atol=1e-14)


@given(logits=eighths((4, 3)), seed=st.integers(0, 99))
def test_sampled_labels_repeat_with_their_stream(xp: Any, logits: Any, seed: int) -> None:
    (found,), (again,) = (cotangents(xp, logits, "sampled", seed) for _ in range(2))
    np.testing.assert_array_equal(found, again)
    drawn = softmax(logits) - found
    np.testing.assert_allclose(np.sort(drawn, axis=1), np.broadcast_to([0, 0, 1], (4, 3)), atol=1e-14)


def test_sampled_labels_are_drawn_from_the_models_distribution(xp: Any) -> None:
    logits, draws = np.asarray([[0.0, 1.0, -2.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 2.0]]), 2000
    stream, p = np.random.default_rng(0), softmax(logits)
    arrays = to_xp(xp, logits), to_xp(xp, LABELS)
    total = sum(p - to_numpy(next(logit_cotangents(*arrays, "sampled", stream))) for _ in range(draws))
    error = np.sqrt(p * (1 - p) / draws)
    assert np.all(np.abs(total / draws - p) <= 4 * error)


@pytest.mark.parametrize("mode", ["empirical", "sampled", "logit", "published"])
def test_they_keep_the_dtype(xp: Any, mode: Any) -> None:
    logits = xp.asarray(to_xp(xp, np.zeros((4, 3), dtype=np.float32)))
    (found,) = logit_cotangents(logits, to_xp(xp, LABELS), mode, np.random.default_rng(0))
    assert found.dtype == xp.float32
