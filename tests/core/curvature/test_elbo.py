"""The evidence lower bound as a likelihood: its definition, and its curvature by finite differences."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray

from became_core import BecameError
from became_core.curvature import ELBO
from tests.backends import to_numpy, to_xp
from tests.strategies import eighths

SAMPLES, PIXELS, LATENT = 3, 2, 2
WIDTH = PIXELS + 2 * LATENT
TARGETS = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 0.25]])

Numbers = NDArray[np.float64]


def bound(outputs: Numbers, targets: Numbers) -> float:
    """One sample's negative bound as the paper has it: -log p(y | z) + KL(N(m, e^v) | N(0, 1))."""
    p = 1 / (1 + np.exp(-outputs[:PIXELS]))
    mean, variance = outputs[PIXELS : PIXELS + LATENT], np.exp(outputs[PIXELS + LATENT :])
    of_pixels = -np.sum(targets * np.log(p) + (1 - targets) * np.log(1 - p))
    return float(of_pixels - 0.5 * np.sum(1 + np.log(variance) - mean**2 - variance))


def differences(outputs: Numbers, targets: Numbers, step: float = 1e-4) -> tuple[Numbers, Numbers]:
    """Gradient and curvature of a sample's bound by central differences."""
    units = step * np.eye(WIDTH)
    gradient = [(bound(outputs + u, targets) - bound(outputs - u, targets)) / (2 * step) for u in units]
    curvature = [
        [
            sum(i * j * bound(outputs + i * u + j * v, targets) for i in (1, -1) for j in (1, -1)) / (4 * step**2)
            for v in units
        ]
        for u in units
    ]
    return np.array(gradient), np.array(curvature)


@given(outputs=eighths((SAMPLES, WIDTH)), tangents=eighths((2, SAMPLES, WIDTH)))
def test_the_bound_its_slopes_and_its_curvature(xp: Any, outputs: Any, tangents: Any) -> None:
    arrays = to_xp(xp, outputs), to_xp(xp, TARGETS)
    pairs = list(zip(outputs, TARGETS, strict=True))
    assert float(ELBO().loss(*arrays)) == pytest.approx(sum(bound(*pair) for pair in pairs), rel=1e-12)
    assert float(ELBO().mean_loss(*arrays)) == pytest.approx(np.mean([bound(*pair) for pair in pairs]), rel=1e-12)
    (gradient,) = ELBO().cotangents(*arrays, "empirical", np.random.default_rng(0))
    slope, curvature = (to_numpy(each) for each in ELBO().derivatives(arrays[0], to_xp(xp, tangents), arrays[1]))
    by_sample = [differences(*pair) for pair in pairs]
    np.testing.assert_allclose(to_numpy(gradient), [each for each, _ in by_sample], atol=1e-6)
    along = [tangents[:, n] @ each for n, (each, _) in enumerate(by_sample)]
    np.testing.assert_allclose(slope, np.sum(along, axis=0), atol=1e-4)
    bends = [tangents[:, n] @ each @ tangents[:, n].T for n, (_, each) in enumerate(by_sample)]
    np.testing.assert_allclose(curvature, np.sum(bends, axis=0), atol=1e-3, rtol=1e-5)
    assert (curvature == curvature.T).all()


@given(outputs=eighths((SAMPLES, WIDTH)))
def test_cotangents_of_the_models_own_targets_make_the_curvature(xp: Any, outputs: Any) -> None:
    """Their outer products: exactly with one for each output, and in the mean over draws."""
    arrays = to_xp(xp, outputs), to_xp(xp, TARGETS)
    expected = [np.diag(np.diag(differences(*pair)[1])) for pair in zip(outputs, TARGETS, strict=True)]
    exact = [to_numpy(each) for each in ELBO().cotangents(*arrays, "true", np.random.default_rng(0))]
    np.testing.assert_allclose(np.einsum("kni,knj->nij", exact, exact), expected, atol=1e-5)


def test_drawn_cotangents_have_the_curvature_in_the_mean(xp: Any) -> None:
    outputs = np.linspace(-1, 1, SAMPLES * WIDTH).reshape(SAMPLES, WIDTH)
    arrays, draw = (to_xp(xp, outputs), to_xp(xp, TARGETS)), np.random.default_rng(0)
    drawn = np.array([to_numpy(next(ELBO().cotangents(*arrays, "sampled", draw))) for _ in range(1000)])
    expected = [np.diag(differences(*pair)[1]) for pair in zip(outputs, TARGETS, strict=True)]
    np.testing.assert_allclose(np.mean(drawn**2, axis=0), expected, atol=0.15)
    np.testing.assert_allclose(np.mean(drawn, axis=0), 0, atol=0.15)


def test_what_is_no_bound_is_refused(xp: Any) -> None:
    outputs, targets = xp.zeros((2, 5)), xp.zeros((2, 2))
    with pytest.raises(BecameError, match="a logit for each target, and as many means as log variances"):
        ELBO().loss(outputs, targets)
    with pytest.raises(BecameError, match="no gradients of the mode 'published'; use empirical, true or sampled"):
        list(ELBO().cotangents(xp.zeros((2, 4)), targets, "published", np.random.default_rng(0)))
