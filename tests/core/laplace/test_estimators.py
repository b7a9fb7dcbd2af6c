from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from became_core import BecameError, Quadratic
from became_core.arrays import Params, Reduce
from became_core.laplace import (
    Became,
    Calibrated,
    Diagonal,
    DiagonalFisher,
    Estimator,
    LaplacePosterior,
    LocalLoss,
    MergeSubspace,
    NativeExpansion,
    PaperClosedForm,
    Secant,
)
from became_core.laplace.estimators import _ratio
from reference.formulas import alpha_star
from tests.backends import to_numpy, to_xp
from tests.strategies import Segment, segments


@dataclass(frozen=True)
class Measured:
    """A new task that answers with its diagonal, and exactly: with ``kappa`` times the diagonal and a gradient.

    ``fall`` is how far its loss falls from theta_gp to theta_hat; if it is None, the loss is the quadratic.
    """

    xp: Any
    segment: Segment
    kappa: float = 1.0
    bent: float = 1.0
    fall: float | None = None

    @property
    def mean(self) -> Params:
        return to_xp(self.xp, self.segment.theta_hat)  # type: ignore[no-any-return]

    def diagonal(self) -> Diagonal:
        return Diagonal(to_xp(self.xp, self.segment.fisher_new))

    def along(self, directions: Sequence[Params]) -> Quadratic:
        rows = np.array([[to_numpy(each[name]).ravel() for name in sorted(each)] for each in directions], dtype=object)
        flat = np.array([np.concatenate(list(row)) for row in rows], dtype=float)
        _, _, _, new, gradient, _ = self.segment.dense()
        return Quadratic(to_xp(self.xp, flat @ gradient), to_xp(self.xp, self.kappa * flat @ new @ flat.T))

    def slope(self, origin: Params, directions: Sequence[Params]) -> Any:
        """At theta_gp, the gradient there; of a quadratic loss, unless ``bent`` says by how much it is none."""
        away = self.along([*directions, {n: origin[n] - value for n, value in self.mean.items()}])
        return away.slope[:-1] + self.bent * away.curvature[:-1, -1]

    def loss(self, theta: Params) -> Any:
        away = self.along([{n: theta[n] - value for n, value in self.mean.items()}])
        if self.fall is None:
            return away.slope[0] + 0.5 * away.curvature[0, 0]
        moved = any(np.any(to_numpy(theta[n]) != self.segment.theta_hat[n]) for n in theta)
        return self.fall if moved else 0.0


def frame_of(xp: Any, segment: Segment) -> MergeSubspace:
    delta = {name: value - segment.theta_gp[name] for name, value in segment.theta_hat.items()}
    return MergeSubspace(to_xp(xp, segment.theta_gp), [to_xp(xp, delta)], [1.0])


def quadratic_by(estimator: Estimator, xp: Any, segment: Segment, new_task: LocalLoss) -> Quadratic:
    posterior = LaplacePosterior(to_xp(xp, segment.mean), Diagonal(to_xp(xp, segment.fisher_old)))
    return estimator.quadratic(frame_of(xp, segment), [posterior, new_task])


def alpha_by(estimator: Estimator, xp: Any, segment: Segment, new_task: LocalLoss, *, clip: bool = False) -> float:
    return float(quadratic_by(estimator, xp, segment, new_task).minimiser("box" if clip else None)[0])


@given(segment=segments())
def test_published_is_the_papers_closed_form(xp: Any, segment: Segment) -> None:
    """It knows neither the gradient nor where the posterior's mean is."""
    assume(segment.curvature > 0)
    alpha = alpha_by(PaperClosedForm(), xp, segment, Measured(xp, segment))
    assert alpha == pytest.approx(alpha_star(*segment.dense(full=False)), rel=1e-14)


@given(segment=segments())
def test_diagonals_know_the_mean_and_no_gradient(xp: Any, segment: Segment) -> None:
    assume(segment.curvature > 0)
    gp, hat, old, new, gradient, mean = segment.dense()
    alpha = alpha_by(DiagonalFisher(), xp, segment, Measured(xp, segment))
    assert alpha == pytest.approx(alpha_star(gp, hat, old, new, 0 * gradient, mean), rel=1e-12, abs=1e-12)


@given(segment=segments(), kappa=st.sampled_from([0.25, 1.0, 8.0]))
def test_as_known_takes_every_side_as_it_is(xp: Any, segment: Segment, kappa: float) -> None:
    """Of the new task the gradient and the curvature kappa x diagonal, of the old ones their own; nothing is scaled."""
    assume(segment.curvature > 0)
    gp, hat, old, new, gradient, mean = segment.dense()
    alpha = alpha_by(NativeExpansion(), xp, segment, Measured(xp, segment, kappa))
    assert alpha == pytest.approx(alpha_star(gp, hat, old, kappa * new, gradient, mean), rel=1e-12, abs=1e-12)


@given(segment=segments(), kappa=st.sampled_from([0.25, 1.0, 8.0]))
def test_calibrated_is_the_formula_by_hand(xp: Any, segment: Segment, kappa: float) -> None:
    gp, hat, old, new, gradient, mean = segment.dense()
    delta = hat - gp
    exact = kappa * delta @ new @ delta
    scale = kappa if exact > 0 else 1.0  # nothing to calibrate by: the old side as it is
    quadratic = quadratic_by(Calibrated(), xp, segment, Measured(xp, segment, kappa))
    assert float(quadratic.slope[0]) == pytest.approx(
        gradient @ delta - exact + scale * (gp - mean) @ old @ delta, rel=1e-13, abs=1e-13
    )
    assert float(quadratic.curvature[0, 0]) == pytest.approx(exact + scale * delta @ old @ delta, rel=1e-13)


@given(segment=segments(), kappa=st.sampled_from([0.5, 2.0, 4.0]))
def test_calibrated_is_exact_where_both_diagonals_miss_alike(xp: Any, segment: Segment, kappa: float) -> None:
    gp, hat, old, new, gradient, mean = segment.dense()
    assume((hat - gp) @ new @ (hat - gp) > 0)
    truth = alpha_star(gp, hat, kappa * old, kappa * new, gradient, mean)
    assert alpha_by(Calibrated(), xp, segment, Measured(xp, segment, kappa)) == pytest.approx(
        truth, rel=1e-12, abs=1e-12
    )


@given(segment=segments())
def test_calibrated_is_the_full_formula_where_nothing_is_missed(xp: Any, segment: Segment) -> None:
    assume(segment.curvature > 0)
    alpha = alpha_by(Calibrated(), xp, segment, Measured(xp, segment))
    assert alpha == pytest.approx(alpha_star(*segment.dense()), rel=1e-12, abs=1e-12)


@given(segment=segments(), kappa=st.sampled_from([0.25, 1.0, 8.0]))
def test_the_secant_is_the_calibrated_form_where_the_loss_is_a_parabola(
    xp: Any, segment: Segment, kappa: float
) -> None:
    gp, hat, _, new, _, _ = segment.dense()
    assume((hat - gp) @ new @ (hat - gp) > 0)
    secant, calibrated = (
        quadratic_by(estimator, xp, segment, Measured(xp, segment, kappa)) for estimator in (Secant(), Calibrated())
    )
    assert float(secant.slope[0]) == pytest.approx(float(calibrated.slope[0]), rel=1e-12, abs=1e-12)
    assert float(secant.curvature[0, 0]) == pytest.approx(float(calibrated.curvature[0, 0]), rel=1e-12)


@pytest.mark.parametrize("calibrates", [True, False])
@given(segment=segments(), kappa=st.sampled_from([0.5, 2.0]), bent=st.sampled_from([0.125, 0.5, 3.0]))
def test_the_secant_is_the_formula_by_hand(
    xp: Any, calibrates: bool, segment: Segment, kappa: float, bent: float
) -> None:
    gp, hat, old, new, gradient, mean = segment.dense()
    delta = hat - gp
    exact = kappa * delta @ new @ delta
    assume(exact > 0)
    start = gradient @ delta - bent * exact
    quadratic = quadratic_by(Secant(calibrates), xp, segment, Measured(xp, segment, kappa, bent))
    known = (kappa if calibrates else 1.0) * old
    assert float(quadratic.slope[0]) == pytest.approx(start + (gp - mean) @ known @ delta, rel=1e-12, abs=1e-12)
    assert float(quadratic.curvature[0, 0]) == pytest.approx(bent * exact + delta @ known @ delta, rel=1e-12)


@given(segment=segments())
def test_a_loss_that_is_convex_between_the_models_is_not_measured(xp: Any, segment: Segment) -> None:
    """It takes two passes over the new task's samples, which only a loss that bends down needs."""

    class Unmeasured(Measured):
        def loss(self, theta: Params) -> Any:
            raise AssertionError("the loss was measured")

    gp, hat, _, new, _, _ = segment.dense()
    assume((hat - gp) @ new @ (hat - gp) > 0)
    quadratic_by(Secant(), xp, segment, Unmeasured(xp, segment))


@given(segment=segments(), kappa=st.sampled_from([0.5, 2.0]), fall=st.sampled_from([0.01, 0.3, 5.0]))
def test_a_loss_that_bends_down_counts_by_its_fall(xp: Any, segment: Segment, kappa: float, fall: float) -> None:
    """It is the parabola that falls as far as the loss does, and is least at theta_hat."""
    gp, hat, old, new, _, mean = segment.dense()
    delta = hat - gp
    assume(delta @ new @ delta > 0)
    task = Measured(xp, segment, kappa, bent=-0.5, fall=fall)
    quadratic = quadratic_by(Secant(), xp, segment, task)
    past = kappa * (gp - mean) @ old @ delta, kappa * delta @ old @ delta
    assert float(quadratic.slope[0]) == pytest.approx(-2 * fall + past[0], rel=1e-12, abs=1e-12)
    assert float(quadratic.curvature[0, 0]) == pytest.approx(2 * fall + past[1], rel=1e-12)


@given(segment=segments(), fall=st.sampled_from([0.01, 0.3]))
def test_of_several_directions_the_way_to_the_last_model_has_the_fall(xp: Any, segment: Segment, fall: float) -> None:
    gp, hat, _, new, _, _ = segment.dense()
    assume((hat - gp) @ new @ (hat - gp) > 0)
    delta = {name: value - segment.theta_gp[name] for name, value in segment.theta_hat.items()}
    other = {name: 1 + value**2 for name, value in delta.items()}
    subspace = MergeSubspace(to_xp(xp, segment.theta_gp), [to_xp(xp, other), to_xp(xp, delta)], [0.0, 1.0])
    flat = LaplacePosterior(to_xp(xp, segment.theta_gp), Diagonal(to_xp(xp, {n: 0 * v for n, v in delta.items()})))
    task = Measured(xp, segment, bent=-0.5, fall=fall)
    quadratic = Secant().quadratic(subspace, [flat, task])
    slope, curvature = to_numpy(quadratic.slope), to_numpy(quadratic.curvature)
    newest = np.array([0.0, 1.0])
    np.testing.assert_allclose(slope + curvature @ newest, 0, atol=1e-12 * np.abs(curvature).max())
    assert -(slope @ newest + newest @ curvature @ newest / 2) == pytest.approx(fall, rel=1e-12)
    exact = to_numpy(task.along(subspace.directions).curvature)
    np.testing.assert_allclose(curvature * exact[1, 1], exact * curvature[1, 1], rtol=1e-12)


@dataclass(frozen=True)
class FlatAtItsEnd(Measured):
    """A new task whose curvature at theta_hat is ``left`` of what its slopes say of the way there."""

    left: float = 0.0

    def along(self, directions: Sequence[Params]) -> Quadratic:
        known = super().along(directions)
        return Quadratic(known.slope, known.curvature * self.left)

    def slope(self, origin: Params, directions: Sequence[Params]) -> Any:
        away = super().along([*directions, {n: origin[n] - value for n, value in self.mean.items()}])
        return away.slope[:-1] + self.bent * away.curvature[:-1, -1]


@given(segment=segments(), left=st.sampled_from([0.0, 1e-322, 1e-300, 1e-40, 1e-12, 1e-3]))
def test_the_slopes_count_where_the_loss_is_flat_at_theta_hat(xp: Any, segment: Segment, left: float) -> None:
    gp, hat, old, new, gradient, mean = segment.dense()
    delta = hat - gp
    bend = delta @ new @ delta
    assume(bend > 0)
    quadratic = quadratic_by(Secant(calibrates=False), xp, segment, FlatAtItsEnd(xp, segment, left=left))
    start = gradient @ delta - bend
    assert float(quadratic.slope[0]) == pytest.approx(start + (gp - mean) @ old @ delta, rel=1e-12, abs=1e-12)
    # Where slopes are almost all that the exact curvature is read from, it is known to a hundredth.
    tolerance = 1e-12 if left < 1e-20 else 0.01
    assert float(quadratic.curvature[0, 0]) == pytest.approx(bend + delta @ old @ delta, rel=tolerance)


@pytest.mark.parametrize("bent", [1.0, -0.5])
@given(segment=segments(), left=st.sampled_from([0.0, 1e-322, 1e-300, 1e-40]))
def test_of_several_directions_the_way_alone_is_curved_where_the_loss_is_flat(
    xp: Any, segment: Segment, left: float, bent: float
) -> None:
    gp, hat, _, new, *_ = segment.dense()
    delta = hat - gp
    assume(delta @ new @ delta > 0)
    newest, mixed = np.array([0.5, 2.0]), {n: segment.theta_hat[n] - v for n, v in segment.theta_gp.items()}
    other = {name: 1 + value**2 for name, value in mixed.items()}
    directions = [to_xp(xp, other), to_xp(xp, {n: (value - 0.5 * other[n]) / 2 for n, value in mixed.items()})]
    flat = LaplacePosterior(to_xp(xp, segment.theta_gp), Diagonal(to_xp(xp, {n: 0 * v for n, v in mixed.items()})))
    task = FlatAtItsEnd(xp, segment, bent=bent, left=left, fall=0.25)
    origin = to_xp(xp, segment.theta_gp)
    quadratic = Secant(calibrates=False).quadratic(MergeSubspace(origin, directions, newest.tolist()), [flat, task])
    slope, curvature = to_numpy(quadratic.slope), to_numpy(quadratic.curvature)
    rise = float(bent * delta @ new @ delta) if bent > 0 else 2 * 0.25
    assert newest @ curvature @ newest == pytest.approx(rise, rel=1e-10)
    np.testing.assert_allclose(curvature @ np.array([2.0, -0.5]), 0, atol=1e-12 * rise)
    if bent > 0:
        np.testing.assert_array_equal(slope, to_numpy(task.slope(origin, directions)))
    else:
        np.testing.assert_allclose(slope + curvature @ newest, 0, atol=1e-12)


@given(segment=segments(), fall=st.sampled_from([0.0, -0.3]))
def test_a_loss_that_bends_down_and_does_not_fall_is_left_out(xp: Any, segment: Segment, fall: float) -> None:
    """Then the old tasks decide alone; at their minimum at theta_gp, that is to stay."""
    settled = Segment(
        segment.theta_gp, segment.theta_hat, segment.fisher_old, segment.fisher_new, segment.gradient, segment.theta_gp
    )
    assert alpha_by(Secant(), xp, settled, Measured(xp, settled, bent=-0.5, fall=fall), clip=True) == 0


@pytest.mark.parametrize("estimator", [PaperClosedForm(), Calibrated(), DiagonalFisher(), Secant()])
def test_models_that_agree_keep_the_stable_one(xp: Any, estimator: Estimator) -> None:
    one = {"w": np.ones(3)}
    segment = Segment(one, one, one, one, one, one)
    assert alpha_by(estimator, xp, segment, Measured(xp, segment), clip=True) == 0


def test_a_gradient_moves_the_calibrated_alpha_only(xp: Any) -> None:
    """An overshooting stage 2 (g.delta > 0) is to be trusted less than a converged one."""
    one, none = {"w": np.ones(3)}, {"w": np.zeros(3)}
    converged = Segment(none, one, one, one, none, none)
    overshot = Segment(none, one, one, one, {"w": np.full(3, 0.5)}, none)

    def alpha(estimator: Estimator, segment: Segment) -> float:
        return alpha_by(estimator, xp, segment, Measured(xp, segment), clip=True)

    assert alpha(PaperClosedForm(), overshot) == alpha(PaperClosedForm(), converged) == 0.5
    assert alpha(Calibrated(), converged) == 0.5
    assert alpha(Calibrated(), overshot) == 0.25


@pytest.mark.parametrize(
    "estimator", [PaperClosedForm(), Calibrated(), DiagonalFisher(), NativeExpansion(), Secant()], ids=str
)
def test_an_estimator_refuses_a_loss_alone(xp: Any, estimator: Estimator) -> None:
    theta = {"w": xp.asarray([1.0, 2.0])}
    loss = LaplacePosterior(theta, Diagonal({"w": xp.asarray([1.0, 1.0])}))
    with pytest.raises(BecameError, match="was given 1 of its losses; give those of the old tasks"):
        estimator.quadratic(MergeSubspace(theta, [theta], [1.0]), [loss])


ESTIMATORS = [DiagonalFisher(), NativeExpansion(), PaperClosedForm(), Calibrated(), Secant()]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("reduce", [None, lambda numbers: numbers])
def test_a_new_tasks_head_is_unknown_to_the_old_tasks(xp: Any, estimator: Estimator, reduce: Reduce | None) -> None:
    """A posterior that lacks a parameter has neither a mean nor curvature there: as with any mean and none."""
    gp, hat = to_xp(xp, {"fc": np.zeros(2), "head": np.zeros(1)}), to_xp(xp, {"fc": np.ones(2), "head": np.ones(1)})
    new = LaplacePosterior(hat, Diagonal(to_xp(xp, {"fc": np.ones(2), "head": np.ones(1)})))
    lacking = LaplacePosterior({"fc": gp["fc"]}, Diagonal({"fc": hat["fc"]}))
    knowing = LaplacePosterior(gp, Diagonal({"fc": hat["fc"], "head": gp["head"]}))
    rule = Became(estimator, reduce=reduce)
    first, second = (float(rule.merge((gp, hat), (old, new)).alpha) for old in (lacking, knowing))  # type: ignore[arg-type]
    assert first == pytest.approx(second, rel=1e-12)
    assert 0 < first < 1


def test_kappa_does_not_depend_on_slopes(xp: Any) -> None:
    """A slope far above the curvatures would take all their digits if it were added and subtracted again."""
    exact, diagonal = (
        Quadratic(xp.asarray([-0.3], dtype=xp.float32), xp.asarray([[curvature]], dtype=xp.float32))
        for curvature in (4e-9, 1e-9)
    )
    assert float(_ratio(exact, diagonal, xp.ones((1,), dtype=xp.float32))) == pytest.approx(4.0, rel=1e-6)
