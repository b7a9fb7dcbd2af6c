import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core import BecameError
from became_core.laplace import Dense, Diagonal, Isotropic, Kronecker, LaplacePosterior
from reference.precisions import evidence_slope, log_gaussian, regression_evidence, regression_posterior
from tests.backends import to_numpy, to_xp
from tests.strategies import Segment, Structured, each_structure, eighths, few_if_compiled, segments, structured


def posterior_of(xp: Any, segment: Segment) -> LaplacePosterior:
    return LaplacePosterior(to_xp(xp, segment.mean), Diagonal(to_xp(xp, segment.fisher_old)))


@given(segment=segments())
def test_loss_is_the_quadratic_form(xp: Any, segment: Segment) -> None:
    gp, _, old, _, _, mean = segment.dense()
    assert float(posterior_of(xp, segment).loss(to_xp(xp, segment.theta_gp))) == 0.5 * (gp - mean) @ old @ (gp - mean)


@given(segment=segments())
def test_gradient_is_that_of_the_loss(xp: Any, segment: Segment) -> None:
    gradient = posterior_of(xp, segment).gradient(to_xp(xp, segment.theta_gp))
    for name, value in segment.theta_gp.items():
        expected = segment.fisher_old[name] * (value - segment.mean[name])
        np.testing.assert_array_equal(to_numpy(gradient[name]), expected)


@given(segment=segments())
def test_gradient_is_for_the_parameters_given(xp: Any, segment: Segment) -> None:
    name = next(iter(segment.theta_gp))
    assert set(posterior_of(xp, segment).gradient(to_xp(xp, {name: segment.theta_gp[name]}))) == {name}


@each_structure
@given(case=structured(), data=st.data())
def test_quadratic_is_the_loss_along_the_directions(xp: Any, case: Structured, data: st.DataObject) -> None:
    rows = data.draw(few_if_compiled(st.integers(3, 5), [4]))
    mean, origin, *directions = data.draw(eighths((rows, case.size)))
    posterior = LaplacePosterior(to_xp(xp, case.tree(mean)), case.on(xp))
    quadratic = posterior.quadratic(
        to_xp(xp, case.tree(origin)), [to_xp(xp, case.tree(direction)) for direction in directions]
    )
    slope, curvature = to_numpy(quadratic.slope), to_numpy(quadratic.curvature)
    assert slope.shape == (len(directions),)
    assert curvature.shape == (len(directions), len(directions))
    for a in (np.linspace(-1, 1, len(directions)), np.full(len(directions), 0.5)):
        there, start = (
            float(posterior.loss(to_xp(xp, case.tree(point))))
            for point in (origin + a @ np.asarray(directions), origin)
        )
        bound = 1e-13 * (1 + there + start + a @ curvature @ a)
        assert slope @ a + 0.5 * a @ curvature @ a == pytest.approx(there - start, abs=bound)


@given(segment=segments())
@pytest.mark.parametrize(("weight", "decay"), [(1.0, 1.0), (1.0, 0.5), (100.0, 1.0)])
def test_update_recentres_and_adds(xp: Any, weight: float, decay: float, segment: Segment) -> None:
    before = posterior_of(xp, segment)
    fisher = Diagonal(to_xp(xp, segment.fisher_new))
    after = before.update(to_xp(xp, segment.theta_hat), fisher, weight=weight, decay=decay)
    for name, value in segment.theta_hat.items():
        np.testing.assert_array_equal(to_numpy(after.mean[name]), value)
        expected = weight * segment.fisher_new[name] + decay * segment.fisher_old[name]
        np.testing.assert_array_equal(to_numpy(after.precision.diagonal()[name]), expected)
        np.testing.assert_array_equal(to_numpy(before.precision.diagonal()[name]), segment.fisher_old[name])
    assert float(after.loss(to_xp(xp, segment.theta_hat))) == 0


@given(segment=segments())
def test_an_update_weighs_both_alike_if_it_is_not_told(xp: Any, segment: Segment) -> None:
    fisher = Diagonal(to_xp(xp, segment.fisher_new))
    after = posterior_of(xp, segment).update(to_xp(xp, segment.theta_hat), fisher).precision.diagonal()
    for name, old in segment.fisher_old.items():
        np.testing.assert_array_equal(to_numpy(after[name]), old + segment.fisher_new[name])


@each_structure
@given(case=structured(definite=True), data=st.data())
def test_log_density_is_the_gaussians(xp: Any, case: Structured, data: st.DataObject) -> None:
    mean, theta = data.draw(eighths((2, case.size)))
    posterior = LaplacePosterior(to_xp(xp, case.tree(mean)), case.on(xp))
    expected = log_gaussian(theta, mean, np.asarray(np.linalg.inv(case.matrix), dtype=np.float64))
    condition = float(np.linalg.cond(case.matrix))
    bound = 1e-14 * condition * (1 + abs(expected) + case.size)
    assert float(posterior.log_density(to_xp(xp, case.tree(theta)))) == pytest.approx(expected, rel=0, abs=bound)


@each_structure
@given(case=structured(definite=True), data=st.data())
def test_a_sample_is_the_mean_and_coloured_noise(xp: Any, case: Structured, data: st.DataObject) -> None:
    mean = data.draw(eighths((case.size,)))
    posterior = LaplacePosterior(to_xp(xp, case.tree(mean)), case.on(xp))
    sample = posterior.sample(np.random.default_rng(7))
    stream = np.random.default_rng(7)
    noise = {name: np.asarray(stream.standard_normal(case.shapes[name])) for name in sorted(case.shapes)}
    spread = case.vector(posterior.precision.sample(to_xp(xp, noise)))
    np.testing.assert_array_equal(case.vector(sample), mean + spread)
    # Half the squared distance of a sample is that of its noise: S^T P S = 1.
    distance = sum(float(np.sum(value**2)) for value in noise.values())
    condition = float(np.linalg.cond(case.matrix))
    assert 2 * float(posterior.loss(sample)) == pytest.approx(distance, rel=1e-14 * condition * (case.size + 10))
    other = posterior.sample(np.random.default_rng(8))
    assert not np.array_equal(case.vector(other), case.vector(sample))


def test_a_sample_has_the_means_dtype(xp: Any) -> None:
    mean = to_xp(xp, {"w": np.ones((2, 3), dtype=np.float32)})
    posterior = LaplacePosterior(mean, Diagonal(to_xp(xp, {"w": np.ones((2, 3))})))
    assert posterior.sample(np.random.default_rng(0))["w"].dtype == xp.float32


def test_marginal_variances_come_in_the_parameters_shapes(xp: Any) -> None:
    """A Kronecker product that was not told a convolution's shape knows it as a matrix."""
    mean = to_xp(xp, {"conv.weight": np.zeros((2, 3, 1, 1)), "bias": np.zeros(2)})
    a, g = np.diag([1.0, 2.0, 4.0]), np.diag([1.0, 0.5])
    kronecker = Kronecker({"conv.weight": (to_xp(xp, a), to_xp(xp, g))})
    posterior = LaplacePosterior(mean, kronecker + Diagonal(to_xp(xp, {"bias": np.asarray([4.0, 8.0])})))
    variance = posterior.marginal_variance()
    np.testing.assert_allclose(
        to_numpy(variance["conv.weight"]).reshape(2, 3), [[1, 0.5, 0.25], [2, 1, 0.5]], rtol=1e-14
    )
    assert tuple(variance["conv.weight"].shape) == (2, 3, 1, 1)
    np.testing.assert_array_equal(to_numpy(variance["bias"]), [0.25, 0.125])


class Regression:
    """Bayesian linear regression of two parameters, w [2] and b [1], in batches of one to three samples."""

    noise_precision = 2.5

    def __init__(self, xp: Any) -> None:
        stream = np.random.default_rng(0)
        self.xp = xp
        self.x, self.y = stream.standard_normal((6, 3)), stream.standard_normal(6)
        self.batches = [slice(0, 3), slice(3, 4), slice(4, 6)]
        root = stream.standard_normal((3, 3))
        self.mean, self.precision = stream.standard_normal(3), root @ root.T + 0.5 * np.eye(3)
        self.case = Structured("Dense", {"matrix": self.precision}, {"w": (2,), "b": (1,)}, self.precision)

    def prior(self) -> LaplacePosterior:
        return LaplacePosterior(to_xp(self.xp, self.case.tree(self.mean)), self.case.on(self.xp))

    def learn(self, posterior: LaplacePosterior, batch: slice) -> LaplacePosterior:
        x, y = self.x[batch], self.y[batch]
        gradient = -self.noise_precision * x.T @ (y - x @ self.case.vector(posterior.mean))
        curvature = Dense(to_xp(self.xp, self.noise_precision * x.T @ x), self.case.shapes)
        return posterior.assimilate(to_xp(self.xp, self.case.tree(gradient)), curvature)

    def log_likelihood(self, posterior: LaplacePosterior, batch: slice) -> float:
        y = self.y[batch]
        predicted = self.x[batch] @ self.case.vector(posterior.mean)
        return log_gaussian(y, predicted, np.eye(len(y)) / self.noise_precision)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_sequential_bayes_is_the_posterior_of_all_data_in_any_order(xp: Any, order: tuple[int, ...]) -> None:
    regression = Regression(xp)
    posterior = regression.prior()
    for index in order:
        posterior = regression.learn(posterior, regression.batches[index])
    mean, precision = regression_posterior(
        regression.x, regression.y, regression.noise_precision, regression.mean, regression.precision
    )
    np.testing.assert_allclose(regression.case.vector(posterior.mean), mean, rtol=1e-12)
    np.testing.assert_allclose(to_numpy(Dense.of(posterior.precision).matrix), precision, rtol=1e-13)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_sequential_evidence_is_the_marginal_likelihood_of_all_data(xp: Any, order: tuple[int, ...]) -> None:
    """By the chain rule: p(all) is the product of each batch's probability given those before."""
    regression = Regression(xp)
    prior = posterior = regression.prior()
    total = 0.0
    for batch in (regression.batches[index] for index in order):
        before, posterior = posterior, regression.learn(posterior, batch)
        total += float(posterior.evidence(regression.log_likelihood(posterior, batch), before))
    exact = regression_evidence(
        regression.x, regression.y, regression.noise_precision, regression.mean, regression.precision
    )
    assert total == pytest.approx(exact, rel=1e-12)
    everything = slice(0, 6)
    at_once = regression.learn(prior, everything)
    assert float(at_once.evidence(regression.log_likelihood(at_once, everything), prior)) == pytest.approx(
        exact, rel=1e-12
    )


def evidence_of_scale(
    xp: Any, rho: float, precision: Any, fisher: Any, offset: Any
) -> tuple[float, np.ndarray[Any, Any]]:
    """Return the evidence of a task of diagonal curvature, from a prior of a scale about 0, and the share of the way.

    The log-likelihood is quadratic, with its maximum, 0, at the offset.
    """
    prior = LaplacePosterior(to_xp(xp, {"w": 0 * offset}), Diagonal(to_xp(xp, {"w": precision})) * rho)
    task = LaplacePosterior(to_xp(xp, {"w": offset}), Diagonal(to_xp(xp, {"w": fisher})))
    posterior = prior.assimilate(to_xp(xp, {"w": -fisher * offset}), task.precision)
    return float(posterior.evidence(-task.loss(posterior.mean), prior)), to_numpy(posterior.mean["w"]) / offset


@given(seed=st.integers(0, 10**6), rho=st.floats(0.01, 100))
def test_the_evidence_of_a_scale_of_the_prior_is_the_offsets_density_and_has_its_slope(
    xp: Any, seed: int, rho: float
) -> None:
    draw = np.random.default_rng(seed)
    precision, fisher, offset = np.exp(draw.normal(size=3)), np.exp(draw.normal(size=3)), 2 * draw.normal(size=3)
    found, _ = evidence_of_scale(xp, rho, precision, fisher, offset)
    density = log_gaussian(offset, np.zeros(3), np.diag(1 / fisher + 1 / (rho * precision)))
    # The likelihood is 1 at its maximum; as a density of the offset it would be normalised.
    assert found == pytest.approx(
        density + 1.5 * math.log(2 * math.pi) - 0.5 * np.log(fisher).sum(), rel=1e-9, abs=1e-9
    )
    step = 1e-5
    above, below = (
        evidence_of_scale(xp, rho * math.exp(sign * step), precision, fisher, offset)[0] for sign in (1, -1)
    )
    expected = evidence_slope(rho, np.diag(precision), np.diag(fisher), offset)
    assert (above - below) / (2 * step) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    # MacKay: it is half the number of weights that the task determines, less rho times the mode's squared distance.
    _, share = evidence_of_scale(xp, rho, precision, fisher, offset)
    assert 0.5 * float(np.sum(share) - rho * precision @ (share * offset) ** 2) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("ratio", [0.1, 1.0, 10.0])
def test_at_the_evidences_best_scale_a_merge_does_not_depend_on_how_sharp_the_prior_was(xp: Any, ratio: float) -> None:
    """It is 1 - d / o.H.o (James and Stein); where that is negative, the evidence rises for ever: nothing is learned.

    So no temperature of the old tasks can be had from it (docs/mathematics.md).
    """
    fisher, offset = np.asarray([4.0, 1.0, 9.0]), np.asarray([1.5, 3.0, 1.0])
    length = float(fisher @ offset**2)  # 27, of 3 weights
    best = 1 / (ratio * (length / 3 - 1))
    assert evidence_slope(best, np.diag(ratio * fisher), np.diag(fisher), offset) == pytest.approx(0, abs=1e-12)
    peak, share = evidence_of_scale(xp, best, ratio * fisher, fisher, offset)
    np.testing.assert_allclose(share, 1 - 3 / length, rtol=1e-12)
    assert all(evidence_of_scale(xp, best * factor, ratio * fisher, fisher, offset)[0] < peak for factor in (0.5, 2.0))
    near = offset / 4  # o.H.o is below 3
    rising = [evidence_of_scale(xp, rho, ratio * fisher, fisher, near)[0] for rho in (0.1, 1.0, 10.0, 1e3, 1e5)]
    assert rising == sorted(rising)


def test_assimilating_keeps_what_is_not_covered(xp: Any) -> None:
    mean = to_xp(xp, {"w": np.ones(2), "head": np.full(2, 5.0)})
    prior = LaplacePosterior(mean, Diagonal(to_xp(xp, {"w": np.ones(2)})))
    posterior = prior.assimilate(to_xp(xp, {"w": np.asarray([4.0, -8.0])}), Diagonal(to_xp(xp, {"w": np.full(2, 3.0)})))
    np.testing.assert_array_equal(to_numpy(posterior.mean["w"]), [0.0, 3.0])
    np.testing.assert_array_equal(to_numpy(posterior.mean["head"]), [5.0, 5.0])
    np.testing.assert_array_equal(to_numpy(prior.mean["w"]), [1.0, 1.0])


def test_weight_decay_keeps_the_closed_forms_of_kronecker_factors(xp: Any) -> None:
    """The usual Laplace: an isotropic prior over all, factors for the weights, a diagonal for the rest."""
    mean = to_xp(xp, {"w": np.zeros((2, 2)), "b": np.zeros(2)})
    a, g = np.asarray([[2.0, 1.0], [1.0, 2.0]]), np.asarray([[1.0, 0.5], [0.5, 1.0]])
    curvature = Kronecker({"w": (to_xp(xp, a), to_xp(xp, g))}) + Diagonal(to_xp(xp, {"b": np.asarray([1.0, 3.0])}))
    prior = LaplacePosterior(mean, Isotropic.over(mean, 0.5))
    posterior = prior.update(mean, curvature, weight=10)
    matrix = np.zeros((6, 6))
    matrix[:2, :2], matrix[2:, 2:] = np.diag([10.0, 30.0]), 10 * np.kron(g, a)
    matrix += 0.5 * np.eye(6)
    np.testing.assert_allclose(to_numpy(Dense.of(posterior.precision).matrix), matrix, rtol=1e-14)
    expected = 0.5 * np.linalg.slogdet(matrix)[1] - 3 * math.log(2 * math.pi)
    assert float(posterior.log_density(mean)) == pytest.approx(expected, rel=1e-13)


def test_parameters_without_curvature_have_no_density(xp: Any) -> None:
    mean = to_xp(xp, {"w": np.ones(2), "head": np.ones(2)})
    posterior = LaplacePosterior(mean, Diagonal(to_xp(xp, {"w": np.ones(2)})))
    assert float(posterior.loss(to_xp(xp, {"w": np.zeros(2), "head": np.zeros(2), "new": np.ones(1)}))) == 1.0
    np.testing.assert_array_equal(to_numpy(posterior.gradient(to_xp(xp, {"new": np.ones(1)}))["new"]), [0.0])
    asked: list[Any] = [posterior.marginal_variance, lambda: posterior.log_density(mean)]
    asked += [lambda: posterior.sample(np.random.default_rng(0)), lambda: posterior.evidence(0.0, posterior)]
    for ask in asked:
        with pytest.raises(
            BecameError, match=r"^the precision does not cover 'head', so that there is no density; add"
        ):
            ask()


def test_a_precision_must_fit_the_mean(xp: Any) -> None:
    mean = to_xp(xp, {"w": np.ones(2)})
    with pytest.raises(BecameError, match=r"^the precision covers 'v', of which the mean has no value; give it one\.$"):
        LaplacePosterior(mean, Diagonal(to_xp(xp, {"v": np.ones(2)})))
    with pytest.raises(BecameError, match=r"^the mean of 'w' has shape \(2,\) but its precision is for \(3,\); make"):
        LaplacePosterior(mean, Diagonal(to_xp(xp, {"w": np.ones(3)})))


@pytest.mark.parametrize("dtypes", [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float64")], ids=str)
def test_a_mean_and_a_precision_may_have_two_dtypes(xp: Any, dtypes: tuple[str, str]) -> None:
    if not all(hasattr(xp, name) for name in dtypes):
        pytest.skip(f"this backend has not both {' and '.join(dtypes)}")
    narrow, wide = (getattr(xp, name) for name in dtypes)
    mean, theta = xp.ones((3,), dtype=narrow), 2 * xp.ones((3,), dtype=wide)
    posterior = LaplacePosterior({"w": mean}, Diagonal({"w": xp.ones((3,), dtype=wide)}))
    assert float(posterior.loss({"w": theta})) == 1.5
    after = posterior.assimilate({"w": theta}, posterior.precision).mean["w"]
    assert after.dtype == wide
    np.testing.assert_array_equal(to_numpy(after), 0)
