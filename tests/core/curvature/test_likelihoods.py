"""Likelihoods against the oracle: losses by their definition, gradients by differences, curvature by dense Hessians."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core import BecameError
from became_core.curvature import (
    ELBO,
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    derivatives_along,
    likelihood_named,
)
from became_core.curvature.base import Pushforward, TapMode
from reference.formulas import negative_log_likelihood, output_curvature
from tests.backends import to_numpy, to_xp
from tests.compilers import gradient_of
from tests.strategies import eighths

SAMPLES, WIDTH = 4, 3
WEIGHTS = (0.5, 2.0, 1.0)
LABELS = np.asarray([0, 2, 1, 2])
BITS = np.asarray([[0, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 1]])
REALS = np.asarray([[0.5, -1.0, 2.0], [0.0, 0.25, -0.5], [1.0, 1.0, 1.0], [-2.0, 0.0, 3.0]])

# The likelihood, its targets, and its kind and scale for the oracle.
CASES: dict[str, tuple[Likelihood, Any, str, Any]] = {
    "categorical": (Categorical(), LABELS, "categorical", 1.0),
    "weighted": (Categorical(weights=WEIGHTS), LABELS, "categorical", np.asarray(WEIGHTS)),
    "gaussian": (Gaussian(noise=0.5), REALS, "gaussian", 0.5),
    "bernoulli": (Bernoulli(), BITS, "bernoulli", 1.0),
}


@pytest.mark.parametrize("case", CASES)
@given(outputs=eighths((SAMPLES, WIDTH)))
def test_losses_and_gradients_are_those_of_the_definition(xp: Any, case: str, outputs: Any) -> None:
    likelihood, targets, kind, scale = CASES[case]
    arrays = to_xp(xp, outputs), to_xp(xp, targets)
    terms = zip(outputs, targets, strict=True)
    total = sum(negative_log_likelihood(kind, z, y, scale) for z, y in terms)
    assert float(likelihood.loss(*arrays)) == pytest.approx(total, rel=1e-12, abs=1e-12)
    (gradient,) = likelihood.cotangents(*arrays, "empirical", np.random.default_rng(0))
    step = 1e-6
    for sample, (z, y) in enumerate(zip(outputs, targets, strict=True)):
        for index, unit in enumerate(np.eye(WIDTH)):
            ahead, behind = (negative_log_likelihood(kind, z + sign * step * unit, y, scale) for sign in (1, -1))
            assert to_numpy(gradient)[sample, index] == pytest.approx((ahead - behind) / (2 * step), abs=2e-7, rel=1e-6)


@pytest.mark.parametrize("case", CASES)
@given(outputs=eighths((SAMPLES, WIDTH)), tangents=eighths((2, SAMPLES, WIDTH)))
def test_derivatives_along_directions_are_those_of_dense_hessians(
    xp: Any, case: str, outputs: Any, tangents: Any
) -> None:
    likelihood, targets, kind, scale = CASES[case]
    arrays = to_xp(xp, outputs), to_xp(xp, targets)
    (gradient,) = likelihood.cotangents(*arrays, "empirical", np.random.default_rng(0))
    slope, curvature = likelihood.derivatives(arrays[0], to_xp(xp, tangents), arrays[1])
    expected = sum(
        tangents[:, n] @ output_curvature(kind, outputs[n], targets[n], scale) @ tangents[:, n].T
        for n in range(SAMPLES)
    )
    bound = 1e-13 * (1 + np.abs(tangents).max()) ** 2 * (1 + np.abs(outputs).max())
    np.testing.assert_allclose(to_numpy(slope), np.einsum("knd,nd->k", tangents, to_numpy(gradient)), atol=100 * bound)
    np.testing.assert_allclose(to_numpy(curvature), expected, atol=100 * bound)
    np.testing.assert_array_equal(to_numpy(curvature), to_numpy(curvature).T)


@pytest.mark.parametrize("case", CASES)
@given(outputs=eighths((SAMPLES, WIDTH)))
def test_the_squares_of_all_passes_are_the_output_curvature(xp: Any, case: str, outputs: Any) -> None:
    likelihood, targets, kind, scale = CASES[case]
    passes = likelihood.cotangents(to_xp(xp, outputs), to_xp(xp, targets), "true", np.random.default_rng(0))
    found = sum(np.einsum("ni,nj->nij", x, x) for x in map(to_numpy, passes))
    expected = [output_curvature(kind, z, y, scale) for z, y in zip(outputs, targets, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_targets_that_are_drawn_have_the_models_curvature_on_average(xp: Any, case: str) -> None:
    likelihood, targets, kind, scale = CASES[case]
    draws, outputs = 3000, np.asarray([[0.5, -1.0, 0.0]] * SAMPLES)
    rng, arrays = np.random.default_rng(0), (to_xp(xp, outputs), to_xp(xp, targets))
    total = np.zeros((WIDTH, WIDTH))
    for _ in range(draws // SAMPLES):
        (gradient,) = likelihood.cotangents(*arrays, "sampled", rng)
        total += np.einsum("ni,nj->ij", to_numpy(gradient), to_numpy(gradient))
    expected = np.mean([output_curvature(kind, z, y, scale) for z, y in zip(outputs, targets, strict=True)], axis=0)
    np.testing.assert_allclose(total / draws, expected, atol=6 * expected.max() / draws**0.5)


@given(eights=eighths((SAMPLES, WIDTH)), scale=st.sampled_from([1.0, 8.0, 20.0]), targets=st.booleans())
def test_bernoulli_is_as_accurate_for_ones_as_for_zeros(xp: Any, eights: Any, scale: float, targets: bool) -> None:
    """In float32, where p is 1 from a logit of 17 on: against the oracle, and the mirror image of the other label's."""
    z = scale * eights
    y = BITS if targets else np.ones_like(BITS)
    found = []
    for sign in (1, -1):
        arrays = [to_xp(xp, each.astype(np.float32)) for each in (sign * z, y if sign > 0 else 1 - y)]
        tangents = to_xp(xp, np.ones((1, *z.shape), np.float32))
        (gradient,) = Bernoulli().cotangents(arrays[0], arrays[1], "empirical", np.random.default_rng(0))
        roots = map(to_numpy, Bernoulli().cotangents(arrays[0], arrays[1], "true", np.random.default_rng(0)))
        curvature = Bernoulli().derivatives(arrays[0], tangents, arrays[1])[1]
        loss = Bernoulli().loss(*arrays)
        found.append([sign * to_numpy(gradient), sum(roots), to_numpy(curvature), to_numpy(loss)])
    for ours, mirrored in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, mirrored)
    p, q = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
    variances = [np.diag(output_curvature("bernoulli", *pair)) for pair in zip(z, y, strict=True)]
    losses = [negative_log_likelihood("bernoulli", *pair) for pair in zip(z, y, strict=True)]
    expected = [(1 - y) * p - y * q, np.sqrt(variances), np.sum(variances), np.sum(losses)]
    for ours, correct in zip(found[0], expected, strict=True):
        np.testing.assert_allclose(np.squeeze(ours), correct, rtol=2e-5)


@pytest.mark.parametrize("logit", [0.0, 20.0, -20.0])
def test_a_bernoulli_loss_has_its_own_derivative(xp: Any, backend: str, logit: float) -> None:
    """Also where a maximum of 0 and the logit has none, and where the logistic function is rounded to 1."""
    z, y = to_xp(xp, np.full((1, 1), logit, np.float32)), xp.ones((1, 1), dtype=xp.float32)
    found = gradient_of(backend, lambda logits: Bernoulli().loss(logits, y))(z)
    np.testing.assert_allclose(to_numpy(found), [[-1 / (1 + np.exp(logit))]], rtol=1e-6)


def test_bernoulli_targets_that_are_drawn_are_ones_as_often_as_zeros(xp: Any) -> None:
    """At a logit of 12 and at -12, one draw in 160,000 is the rare one, and none is the other's."""
    draws = 1_000_000
    for sign in (1, -1):
        z = to_xp(xp, np.full((draws, 1), sign * 12.0, np.float32))
        (gradient,) = Bernoulli().cotangents(z, z, "sampled", np.random.default_rng(0))
        rare = int(np.sum(sign * to_numpy(gradient) > 0.5))
        assert abs(rare - draws / (1 + np.exp(12.0))) <= 3 * (draws / np.exp(12.0)) ** 0.5
        assert np.all(sign * to_numpy(gradient)[np.abs(to_numpy(gradient)) < 0.5] < 0)


@given(logits=eighths((SAMPLES, WIDTH)), tangents=eighths((2, SAMPLES, WIDTH)))
def test_a_categorical_likelihood_is_the_cross_entropy(xp: Any, logits: Any, tangents: Any) -> None:
    arrays = to_xp(xp, logits), to_xp(xp, tangents), to_xp(xp, LABELS)
    found = Categorical().derivatives(*arrays)
    expected = derivatives_along([Pushforward(*arrays)])
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            to_numpy(ours) / SAMPLES, to_numpy(theirs), atol=1e-12 * (1 + np.abs(tangents).max()) ** 2
        )


@given(logits=eighths((2, 3, WIDTH)), tangents=eighths((1, 2, 3, WIDTH)), shift=st.booleans())
def test_tokens_are_counted_one_by_one_and_ignored_ones_are_not(
    xp: Any, logits: Any, tangents: Any, shift: bool
) -> None:
    labels = np.asarray([[0, -100, 2], [1, 2, -100]])
    likelihood = Categorical(by="token", shift=shift)
    arrays = to_xp(xp, logits), to_xp(xp, labels)
    pairs = [
        (n, place, labels[n, place + shift])
        for n in range(2)
        for place in range(3 - shift)
        if labels[n, place + shift] >= 0
    ]
    assert likelihood.units(*arrays) == len(pairs) == (2 if shift else 4)
    total = sum(negative_log_likelihood("categorical", logits[n, place], label) for n, place, label in pairs)
    assert float(likelihood.loss(*arrays)) == pytest.approx(total)
    (gradient,) = likelihood.cotangents(*arrays, "empirical", np.random.default_rng(0))
    expected = np.zeros_like(logits)
    for n, place, label in pairs:
        alone = Categorical().cotangents(
            logits[n, place][None], np.asarray([label]), "empirical", np.random.default_rng(0)
        )
        expected[n, place] = next(alone)[0]
    np.testing.assert_allclose(to_numpy(gradient), expected, atol=1e-13)
    slope, curvature = likelihood.derivatives(arrays[0], to_xp(xp, tangents), arrays[1])
    np.testing.assert_allclose(to_numpy(slope)[0], (expected * tangents[0]).sum(), atol=1e-11)
    hessians = [
        tangents[0, n, p] @ output_curvature("categorical", logits[n, p], y) @ tangents[0, n, p] for n, p, y in pairs
    ]
    np.testing.assert_allclose(to_numpy(curvature)[0, 0], sum(hessians), atol=1e-10)


@pytest.mark.parametrize("shift", [False, True])
def test_squares_of_tokens_have_a_pass_for_each_position(xp: Any, shift: bool) -> None:
    logits = np.random.default_rng(0).normal(size=(2, 3, WIDTH))
    arrays = to_xp(xp, logits), to_xp(xp, np.asarray([[0, 1, 2], [1, 2, -100]]))
    rng = np.random.default_rng(0)
    (whole,) = map(to_numpy, Categorical(shift=shift).cotangents(*arrays, "empirical", rng))
    apart = Categorical(shift=shift, squares="token")
    parts = [to_numpy(part) for part in apart.cotangents(*arrays, "empirical", rng)]
    assert len(parts) == 3 - shift
    for position, part in enumerate(parts):
        np.testing.assert_array_equal(part[:, position], whole[:, position])
        assert not np.delete(part, position, axis=1).any()
    # All labels of all positions: the squares add up to the diagonal of the output curvature, p (1 - p).
    squares = sum(to_numpy(part) ** 2 for part in Categorical(squares="token").cotangents(*arrays, "true", rng))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    counts = np.asarray([[1, 1, 1], [1, 1, 0]])[..., None]
    np.testing.assert_allclose(squares, counts * p * (1 - p), atol=1e-12)


def test_units_are_samples_or_weights(xp: Any) -> None:
    outputs, labels = to_xp(xp, np.zeros((4, 3))), to_xp(xp, LABELS)
    assert Categorical().units(outputs, labels) == 4
    assert Categorical(weights=WEIGHTS).units(outputs, labels) == 0.5 + 1 + 2 + 1
    tokens, ignored = to_xp(xp, np.zeros((2, 3, 3))), to_xp(xp, np.asarray([[0, -100, 1], [-100] * 3]))
    assert Categorical().units(tokens, ignored) == 1
    assert Categorical().count(ignored) == 1
    assert Gaussian(1.0).units(outputs, outputs) == Bernoulli().units(outputs, outputs) == 4


def test_noise_is_fitted_unless_it_is_known(xp: Any) -> None:
    outputs, targets = to_xp(xp, np.asarray([[0.0], [2.0]])), to_xp(xp, np.asarray([[3.0], [-2.0]]))
    assert Gaussian().fitted(outputs, targets) == Gaussian(12.5**0.5)
    assert Gaussian(2.0).fitted(outputs, targets) == Gaussian(2.0)
    with pytest.raises(BecameError, match=r"the noise of a Gaussian likelihood is not known yet"):
        Gaussian().loss(outputs, targets)


def test_what_makes_no_sense_is_refused(xp: Any) -> None:
    outputs, labels, rng = to_xp(xp, np.zeros((4, 3))), to_xp(xp, LABELS), np.random.default_rng(0)
    with pytest.raises(BecameError, match=r"there is no likelihood 'poisson'; choose from categorical, gaussian, bern"):
        likelihood_named("poisson")
    with pytest.raises(
        BecameError, match=r"the noise of a Gaussian likelihood is nan; it must be above 0 and finite\."
    ):
        Gaussian(float("nan"))
    with pytest.raises(BecameError, match=r"outputs have shape \(4, 3\) and targets \(4,\); make them equal\."):
        Gaussian(1.0).loss(outputs, labels)
    with pytest.raises(BecameError, match=r"targets \(2,\); a categorical likelihood needs a label for each row"):
        Categorical().loss(outputs, labels[:2])
    with pytest.raises(BecameError, match="one label a sample"):
        next(Categorical().cotangents(to_xp(xp, np.zeros((2, 2, 3))), to_xp(xp, np.zeros((2, 2), int)), "true", rng))
    for likelihood in (Gaussian(1.0), Bernoulli()):
        with pytest.raises(BecameError, match="has no gradients of the mode 'logit'"):
            next(likelihood.cotangents(outputs, outputs, "logit", rng))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "likelihood", [Categorical(), Categorical(by="token"), Gaussian(noise=0.5), Bernoulli(), ELBO()], ids=repr
)
def test_sums_of_half_precision_are_taken_in_single(xp: Any, likelihood: Likelihood, name: str) -> None:
    """float16 ends at 65,504, and bfloat16 counts up to 256 one by one."""
    if not hasattr(xp, name):
        pytest.skip(f"this backend has no {name}")
    half, draw = getattr(xp, name), np.random.default_rng(0)
    shape = (90, 100, 10) if likelihood == Categorical(by="token") else (9000, 10)
    targets: Any
    outputs, tangents = draw.integers(-16, 16, shape) / 8, draw.integers(0, 16, (2, *shape)) / 8
    if isinstance(likelihood, Categorical):
        targets = draw.integers(0, 10, shape[:-1])
    else:
        targets = draw.integers(0, 2, (9000, 4 if isinstance(likelihood, ELBO) else 10)) * 1.0
    wide = to_xp(xp, outputs), to_xp(xp, tangents), to_xp(xp, targets)
    narrow = xp.astype(wide[0], half), xp.astype(wide[1], half), wide[2]
    expected, found = (
        (
            likelihood.loss(outputs, targets),
            likelihood.mean_loss(outputs, targets),
            *likelihood.derivatives(outputs, tangents, targets),
        )
        for outputs, tangents, targets in (wide, narrow)
    )
    for ours, correct in zip(found, expected, strict=True):
        assert ours.dtype == xp.float32
        np.testing.assert_allclose(to_numpy(ours), to_numpy(correct), rtol=1e-4)
    assert likelihood.units(narrow[0], narrow[2]) == 9000
    modes: list[TapMode] = ["empirical", "sampled", "true"]
    for mode in modes[: len(modes) if len(shape) == 2 else 2]:  # the exact expectation is for one label a sample
        assert next(likelihood.cotangents(narrow[0], narrow[2], mode, draw)).dtype == half


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_residuals_of_half_precision_are_fitted_in_single(xp: Any, name: str) -> None:
    if not hasattr(xp, name):
        pytest.skip(f"this backend has no {name}")
    outputs = xp.full((10, 10), 300.0, dtype=getattr(xp, name))  # its square is more than float16 can represent
    assert Gaussian().fitted(outputs, xp.zeros((10, 10))).noise == 300
