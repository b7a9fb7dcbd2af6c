from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from became_core.arrays import Array, Params
from became_core.laplace import Calibrated, Diagonal, LaplacePosterior, NewTask, Published
from reference.formulas import alpha_star
from tests.backends import to_xp
from tests.strategies import Segment, segments


@dataclass(frozen=True)
class Measured:
    """A new task that answers with given numbers; ``exact_over_diagonal`` is what the diagonal misses."""

    xp: Any
    segment: Segment
    exact_over_diagonal: float = 1.0

    def diagonal(self) -> Diagonal:
        return Diagonal(to_xp(self.xp, self.segment.fisher_new))

    def along(self, delta: Params) -> tuple[Array, Array]:
        gp, hat, _, new, gradient, _ = self.segment.dense()
        slope, curvature = gradient @ (hat - gp), self.exact_over_diagonal * (hat - gp) @ new @ (hat - gp)
        return to_xp(self.xp, np.asarray(slope)), to_xp(self.xp, np.asarray(curvature))


def quadratic_by(rule: Published | Calibrated, xp: Any, segment: Segment, new_task: NewTask) -> Any:
    posterior = LaplacePosterior(to_xp(xp, segment.mean), Diagonal(to_xp(xp, segment.fisher_old)))
    return rule.quadratic(to_xp(xp, segment.theta_gp), to_xp(xp, segment.theta_hat), posterior, new_task)


@given(segment=segments())
def test_published_is_the_papers_closed_form(xp: Any, segment: Segment) -> None:
    """It knows neither the gradient nor where the posterior's mean is."""
    assume(segment.curvature > 0)
    alpha = float(quadratic_by(Published(), xp, segment, Measured(xp, segment)).minimiser())
    assert alpha == pytest.approx(alpha_star(*segment.dense(full=False)), rel=1e-14)


@given(segment=segments(), kappa=st.sampled_from([0.25, 1.0, 8.0]))
def test_calibrated_is_the_formula_by_hand(xp: Any, segment: Segment, kappa: float) -> None:
    gp, hat, old, new, gradient, mean = segment.dense()
    delta = hat - gp
    exact = kappa * delta @ new @ delta
    scale = kappa if exact > 0 else 1.0  # nothing to calibrate by: the old side as it is
    quadratic = quadratic_by(Calibrated(), xp, segment, Measured(xp, segment, kappa))
    assert float(quadratic.slope) == pytest.approx(
        gradient @ delta - exact + scale * (gp - mean) @ old @ delta, rel=1e-13, abs=1e-13
    )
    assert float(quadratic.curvature) == pytest.approx(exact + scale * delta @ old @ delta, rel=1e-13)


@given(segment=segments(), kappa=st.sampled_from([0.5, 2.0, 4.0]))
def test_calibrated_is_exact_where_both_diagonals_miss_alike(xp: Any, segment: Segment, kappa: float) -> None:
    gp, hat, old, new, gradient, mean = segment.dense()
    assume((hat - gp) @ new @ (hat - gp) > 0)
    truth = alpha_star(gp, hat, kappa * old, kappa * new, gradient, mean)
    quadratic = quadratic_by(Calibrated(), xp, segment, Measured(xp, segment, kappa))
    assert float(quadratic.minimiser(clip=False)) == pytest.approx(truth, rel=1e-12, abs=1e-12)


@given(segment=segments())
def test_calibrated_is_the_full_formula_where_nothing_is_missed(xp: Any, segment: Segment) -> None:
    assume(segment.curvature > 0)
    quadratic = quadratic_by(Calibrated(), xp, segment, Measured(xp, segment))
    assert float(quadratic.minimiser(clip=False)) == pytest.approx(alpha_star(*segment.dense()), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("rule", [Published(), Calibrated()])
def test_models_that_agree_keep_the_stable_one(xp: Any, rule: Published | Calibrated) -> None:
    one = {"w": np.ones(3)}
    segment = Segment(one, one, one, one, one, one)
    assert float(quadratic_by(rule, xp, segment, Measured(xp, segment)).minimiser()) == 0


def test_a_gradient_moves_the_calibrated_alpha_only(xp: Any) -> None:
    """An overshooting stage 2 (g.delta > 0) is to be trusted less than a converged one."""
    one, none = {"w": np.ones(3)}, {"w": np.zeros(3)}
    converged = Segment(none, one, one, one, none, none)
    overshot = Segment(none, one, one, one, {"w": np.full(3, 0.5)}, none)

    def alpha(rule: Published | Calibrated, segment: Segment) -> float:
        return float(quadratic_by(rule, xp, segment, Measured(xp, segment)).minimiser())

    assert alpha(Published(), overshot) == alpha(Published(), converged) == 0.5
    assert alpha(Calibrated(), converged) == 0.5
    assert alpha(Calibrated(), overshot) == 0.25
