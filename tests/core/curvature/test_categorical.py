"""The derivatives of the cross-entropy: gradients by the logits, and slopes and curvatures along directions."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core import BecameError
from became_core.curvature import Categorical, Pushforward, TapMode, derivatives_along, log_softmax, logit_cotangents
from reference.formulas import cross_entropy, directional_derivatives, softmax
from tests.backends import to_numpy, to_xp
from tests.strategies import eighths

LABELS = np.asarray([0, 2, 1, 2])
ONE_HOT = np.eye(3)


def cotangents(xp: Any, logits: Any, mode: Any, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [to_numpy(x) for x in logit_cotangents(to_xp(xp, logits), to_xp(xp, LABELS), mode, rng)]


@given(logits=eighths((4, 3)))
def test_modes_with_one_pass_use_their_own_labels(xp: Any, logits: Any) -> None:
    p = softmax(logits)
    expected = {
        "empirical": p - ONE_HOT[LABELS],
        "logit": ONE_HOT[LABELS],
        "published": p - ONE_HOT[logits.argmax(axis=1)],
    }
    for mode, gradient in expected.items():
        (result,) = cotangents(xp, logits, mode)
        np.testing.assert_allclose(result, gradient, atol=1e-14)


@given(logits=eighths((4, 3)))
def test_the_squares_of_all_passes_are_the_expectation_over_labels(xp: Any, logits: Any) -> None:
    """sum_c p_c (p - e_c)(p - e_c)^T = diag(p) - p p^T, the Hessian of cross-entropy by the logits."""
    p = softmax(logits)
    passes = cotangents(xp, logits, "true")
    assert len(passes) == 3
    result = sum(np.einsum("ni,nj->nij", x, x) for x in passes)
    np.testing.assert_allclose(result, np.einsum("ni,ij->nij", p, ONE_HOT) - np.einsum("ni,nj->nij", p, p), atol=1e-14)


@given(logits=eighths((4, 3)), seed=st.integers(0, 99))
def test_sampled_labels_are_equal_for_equal_generators(xp: Any, logits: Any, seed: int) -> None:
    (result,), (again,) = (cotangents(xp, logits, "sampled", seed) for _ in range(2))
    np.testing.assert_array_equal(result, again)
    drawn = softmax(logits) - result
    np.testing.assert_allclose(np.sort(drawn, axis=1), np.broadcast_to([0, 0, 1], (4, 3)), atol=1e-14)


def test_sampled_labels_are_drawn_from_the_models_distribution(xp: Any) -> None:
    logits, draws = np.asarray([[0.0, 1.0, -2.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 2.0]]), 2000
    rng, p = np.random.default_rng(0), softmax(logits)
    arrays = to_xp(xp, logits), to_xp(xp, LABELS)
    total = sum(p - to_numpy(next(logit_cotangents(*arrays, "sampled", rng))) for _ in range(draws))
    error = np.sqrt(p * (1 - p) / draws)
    assert np.all(np.abs(total / draws - p) <= 4 * error)


@pytest.mark.parametrize("mode", ["empirical", "sampled", "logit", "published"])
def test_gradients_by_logits_keep_the_dtype(xp: Any, mode: Any) -> None:
    logits = xp.asarray(to_xp(xp, np.zeros((4, 3), dtype=np.float32)))
    (result,) = logit_cotangents(logits, to_xp(xp, LABELS), mode, np.random.default_rng(0))
    assert result.dtype == xp.float32


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_is_summed_in_single_and_its_gradients_are_of_its_dtype(xp: Any, name: str) -> None:
    if not hasattr(xp, name):
        pytest.skip(f"this backend has no {name}")
    logits = xp.zeros((1, 70_000), dtype=getattr(xp, name))
    found = log_softmax(logits)
    assert found.dtype == xp.float32
    np.testing.assert_allclose(to_numpy(found), -np.log(70_000), rtol=1e-6)
    modes: list[TapMode] = ["empirical", "true", "sampled", "logit", "published"]
    for mode in modes:
        gradient = next(logit_cotangents(logits, xp.asarray([1]), mode, np.random.default_rng(0)))
        assert gradient.dtype == logits.dtype


SAMPLES, CLASSES, WIDTH = 5, 3, 4
PROBLEMS = st.tuples(
    eighths((SAMPLES, CLASSES)),
    eighths((SAMPLES, CLASSES, WIDTH)),
    eighths((WIDTH,)),
    st.lists(st.integers(0, CLASSES - 1), min_size=SAMPLES, max_size=SAMPLES).map(np.asarray),
)


def batches_of(xp: Any, problem: Any, *cuts: int) -> Any:
    """Return the batches of a problem along two directions: delta, and -2 times delta in reversed order."""
    logits, jacobians, delta, labels = problem
    tangents = np.stack([jacobians @ delta, -2 * jacobians @ delta[::-1]])
    parts = zip(np.split(logits, cuts), np.split(tangents, cuts, axis=1), np.split(labels, cuts), strict=True)
    return [Pushforward(*(to_xp(xp, part) for part in batch)) for batch in parts]


@given(problem=PROBLEMS)
@pytest.mark.parametrize("cuts", [(), (2,)])
def test_slopes_and_curvatures_are_those_of_the_explicit_jacobian(xp: Any, cuts: tuple[int, ...], problem: Any) -> None:
    logits, jacobians, delta, labels = problem
    slope, curvature = (to_numpy(result) for result in derivatives_along(batches_of(xp, problem, *cuts)))
    expected = directional_derivatives(logits, jacobians, labels, np.stack([delta, -2 * delta[::-1]]))
    scale = 1e-14 * (1 + np.max(np.abs(jacobians)) * np.abs(delta).sum()) ** 2
    np.testing.assert_allclose(slope, expected[0], atol=2 * scale)
    np.testing.assert_allclose(curvature, expected[1], atol=40 * scale)


@given(problem=PROBLEMS)
def test_the_ggn_is_the_curvature_where_logits_are_linear(xp: Any, problem: Any) -> None:
    """The reference is finite differences of the loss, which need no formula for a Jacobian or a Hessian."""
    logits, jacobians, delta, labels = problem
    tangent = jacobians @ delta
    step = 1e-3 / (1 + np.max(np.abs(tangent)))
    low, middle, high = (cross_entropy(logits + t * tangent, labels) for t in (-step, 0.0, step))
    slope, curvature = (to_numpy(result).ravel()[0] for result in derivatives_along(batches_of(xp, problem)))
    assert float(slope) * step == pytest.approx((high - low) / 2, abs=1e-9)
    assert float(curvature) * step**2 == pytest.approx(high - 2 * middle + low, abs=1e-9)


@given(problem=PROBLEMS)
def test_the_ggn_is_positive_semi_definite(xp: Any, problem: Any) -> None:
    curvature = to_numpy(derivatives_along(batches_of(xp, problem))[1])
    np.testing.assert_array_equal(curvature, curvature.T)
    assert np.linalg.eigvalsh(curvature)[0] >= -1e-13 * np.abs(curvature).max()


@given(logits=eighths((4, 3)), shift=st.sampled_from([0.0, 1e4, -1e4]))
def test_log_softmax_is_stable(xp: Any, logits: Any, shift: float) -> None:
    result = to_numpy(log_softmax(to_xp(xp, logits + shift)))
    np.testing.assert_allclose(result, np.log(softmax(logits)), rtol=1e-12, atol=1e-11)


def test_no_batches_is_an_error() -> None:
    with pytest.raises(BecameError, match=r"^a directional derivative needs at least one sample; none was given\.$"):
        derivatives_along([])


def test_hits_are_counted_where_labels_count_and_against_what_they_are_predicted_for(xp: Any) -> None:
    labels = np.array([[1, 2, 0, 0], [1, 2, 0, 0]])
    logits = np.zeros((2, 4, 3))
    for position, predicted in enumerate([1, 2, 1, 1]):
        logits[:, position, predicted] = 5
    outputs, targets = to_xp(xp, logits), xp.asarray(labels)
    assert Categorical(by="token").hits(outputs, targets) == (4, 8)
    assert Categorical(by="token", ignored=0).hits(outputs, targets) == (4, 4)
    # Shifted, position 0 predicts the label of position 1, and the last position predicts nothing.
    following = to_xp(xp, np.eye(3)[np.roll(labels, -1, axis=1)])
    assert Categorical(by="token", shift=True).hits(following, targets) == (6, 6)


def test_labels_of_a_narrow_dtype_are_those_of_a_wide_one(xp: Any) -> None:
    """The classes are more than their dtype can count."""
    draw = np.random.default_rng(0)
    logits, labels = to_xp(xp, draw.normal(size=(4, 300))), np.array([5, 0, 255, 7])
    found = [
        next(iter(Categorical().cotangents(logits, xp.asarray(labels.astype(kind)), "empirical", draw)))
        for kind in (np.uint8, np.int32)
    ]
    np.testing.assert_array_equal(to_numpy(found[0]), to_numpy(found[1]))


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4), (2, 2, 2, 2)])
@pytest.mark.parametrize("by", ["sample", "token"])
def test_the_mean_loss_is_the_sum_over_its_units(xp: Any, by: Any, shape: tuple[int, ...]) -> None:
    """However many axes of positions a sample has."""
    draw, likelihood = np.random.default_rng(0), Categorical(by=by, weights=(1.0, 0.5, 2.0), ignored=2)
    labels = draw.integers(0, 3, shape)
    outputs, targets = to_xp(xp, draw.normal(size=(*shape, 3))), xp.asarray(labels)
    expected = float(likelihood.loss(outputs, targets)) / likelihood.units(outputs, targets)
    assert float(likelihood.mean_loss(outputs, targets)) == pytest.approx(expected, rel=1e-12)
    if by == "sample":
        plain = Categorical()
        mean = float(plain.loss(outputs, targets)) / shape[0]
        assert float(plain.mean_loss(outputs, targets)) == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64"])
def test_labels_may_have_any_integral_dtype(xp: Any, dtype: str) -> None:
    """A byte of 156 is no -100, a sum with a head's first class does not wrap, and PyTorch's indices are int64."""
    logits, first = np.random.default_rng(0).normal(size=(3, 300)), 200
    numbers = np.asarray([7, 100, 99] if dtype == "int8" else [156, 1, 99])
    labels, wide = xp.asarray(numbers.astype(dtype)), xp.asarray(numbers)
    ours = Categorical()
    assert ours.count(labels) == 3
    outputs, tangents = to_xp(xp, logits), to_xp(xp, logits[None])
    np.testing.assert_array_equal(to_numpy(ours.loss(outputs, labels)), to_numpy(ours.loss(outputs, wide)))
    for found, expected in zip(*(ours.derivatives(outputs, tangents, each) for each in (labels, wide)), strict=True):
        np.testing.assert_array_equal(to_numpy(found), to_numpy(expected))
    best = np.zeros((3, 400))
    best[np.arange(3), numbers + first] = 1.0
    assert ours.hits(to_xp(xp, best), labels, first) == (3, 3)
