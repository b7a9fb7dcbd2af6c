from typing import Any

import numpy as np
from hypothesis import given

from became_core import path_quadratic, trace_path
from reference.formulas import laplace_loss
from tests.backends import to_numpy, to_xp
from tests.strategies import Segment, segments

ALPHAS = [0.0, 0.25, 0.5, 1.0, 1.5]


@given(segment=segments())
def test_the_trace_of_a_quadratic_loss_is_what_the_quadratic_predicts(xp: Any, segment: Segment) -> None:
    gp, hat, old, new, gradient, mean = segment.dense()
    delta = hat - gp

    def loss(theta: dict[str, Any]) -> float:
        flat = np.concatenate([to_numpy(theta[name]).ravel() for name in sorted(theta)])
        away = flat - hat
        return float(0.5 * (flat - mean) @ old @ (flat - mean) + gradient @ away + 0.5 * away @ new @ away)

    traced = trace_path(loss, to_xp(xp, segment.theta_gp), to_xp(xp, segment.theta_hat), ALPHAS)
    np.testing.assert_allclose(traced, [laplace_loss(alpha, *segment.dense()) for alpha in ALPHAS], rtol=1e-13)
    trees = (segment.theta_gp, segment.theta_hat, segment.fisher_old, segment.fisher_new)
    quadratic = path_quadratic(
        *(to_xp(xp, tree) for tree in trees), gradient=to_xp(xp, segment.gradient), mean=to_xp(xp, segment.mean)
    )
    scale = 1 + float(np.abs(traced).max()) + float(delta @ delta)
    predicted = [traced[0] + float(quadratic.value(alpha)) for alpha in ALPHAS]
    np.testing.assert_allclose(predicted, traced, atol=1e-13 * scale, rtol=0)


def test_the_ends_are_the_models_themselves(xp: Any) -> None:
    stable, plastic = xp.asarray([0.1, 0.7]), xp.asarray([0.3, 0.2])
    first, last = trace_path(lambda theta: theta, stable, plastic, [0.0, 1.0])
    assert bool(xp.all(first == stable))
    assert bool(xp.all(last == plastic))
