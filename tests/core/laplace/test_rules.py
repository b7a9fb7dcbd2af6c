"""Merging rules, of two models and of many, on problems whose optimum is known."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given

from became_core import BecameError, Quadratic
from became_core.laplace import (
    Became,
    BecameCurve,
    Calibrated,
    Diagonal,
    DiagonalFisher,
    Equal,
    FisherMerge,
    Fixed,
    GridSearch,
    LaplacePosterior,
    MeanIMM,
    MergeRule,
    ModeIMM,
    PaperClosedForm,
    Secant,
    optimal_alpha,
)
from became_core.laplace.estimators import LocalLoss, MergeSubspace
from became_core.laplace.expansion import Per
from tests.backends import to_numpy, to_xp
from tests.strategies import Segment, segments


def losses_of(xp: Any, segment: Segment) -> list[LaplacePosterior]:
    """Each model's own loss, known where the model is."""
    return [
        LaplacePosterior(to_xp(xp, segment.theta_gp), Diagonal(to_xp(xp, segment.fisher_old))),
        LaplacePosterior(to_xp(xp, segment.theta_hat), Diagonal(to_xp(xp, segment.fisher_new))),
    ]


def models_of(xp: Any, segment: Segment) -> list[Any]:
    return [to_xp(xp, segment.theta_gp), to_xp(xp, segment.theta_hat)]


def cumulative(losses: list[LaplacePosterior], theta: Any) -> float:
    return sum(float(loss.loss(theta)) for loss in losses)


@given(segment=segments())
@pytest.mark.parametrize("estimator", [PaperClosedForm(), DiagonalFisher(), Calibrated(), Secant()])
def test_became_of_two_models_is_optimal_alpha(xp: Any, estimator: Any, segment: Segment) -> None:
    """Where every loss is a diagonal quadratic known at its own model, all estimators agree."""
    assume(segment.curvature > 0)
    merged = Became(estimator).merge(models_of(xp, segment), losses_of(xp, segment))
    trees = (segment.theta_gp, segment.theta_hat, segment.fisher_old, segment.fisher_new)
    expected = float(optimal_alpha(*(to_xp(xp, tree) for tree in trees)))
    assert float(to_numpy(merged.alpha)) == pytest.approx(expected, abs=1e-12)
    for name, value in merged.theta.items():
        between = segment.theta_gp[name] + expected * (segment.theta_hat[name] - segment.theta_gp[name])
        np.testing.assert_allclose(to_numpy(value), between, atol=1e-11)


@dataclass
class Seen:
    """An estimator that keeps the frame it is asked about."""

    frames: list[MergeSubspace] = field(default_factory=list)

    def quadratic(self, frame: MergeSubspace, losses: Sequence[LocalLoss]) -> Quadratic:
        self.frames.append(frame)
        return DiagonalFisher().quadratic(frame, losses)


@pytest.mark.parametrize(("count", "per"), [(2, "model"), (2, "layer"), (2, "leaf"), (3, "model"), (5, "model")])
def test_an_estimator_is_told_where_the_last_model_is(xp: Any, count: int, per: Per) -> None:
    draw = np.random.default_rng(0)
    shapes = {"a.weight": (2, 3), "a.bias": (2,), "b.weight": (4,)}
    models = [to_xp(xp, {name: draw.normal(size=shape) for name, shape in shapes.items()}) for _ in range(count)]
    losses = [LaplacePosterior(model, Diagonal({k: v * 0 + 1 for k, v in model.items()})) for model in models]
    seen = Seen()
    Became(seen, per=per).merge(models, losses)
    (frame,) = seen.frames
    for name in shapes:
        reached = frame.origin[name] + sum(
            a * direction[name] for a, direction in zip(frame.newest, frame.directions, strict=True)
        )
        np.testing.assert_allclose(to_numpy(reached), to_numpy(models[-1][name]), rtol=1e-12, atol=1e-12)


@given(segment=segments())
def test_more_freedom_serves_the_losses_better(xp: Any, segment: Segment) -> None:
    """Leaf by leaf is at least as good as model-wide, the mode at least as good as both, the mean no better."""
    assume(segment.curvature > 0)
    models, losses = models_of(xp, segment), losses_of(xp, segment)

    def reached(rule: MergeRule) -> float:
        return cumulative(losses, rule.merge(models, losses).theta)

    mode, leaf, model = reached(ModeIMM()), reached(Became(per="leaf")), reached(Became())
    slack = 1e-12 * (1 + model)
    assert mode <= leaf + slack
    assert leaf <= model + slack
    assert model <= reached(Equal()) + slack
    assert model <= min(reached(Fixed(0.3)), cumulative(losses, models[0]), cumulative(losses, models[1])) + slack


@given(segment=segments())
def test_the_grid_comes_as_close_as_its_spacing(xp: Any, segment: Segment) -> None:
    assume(segment.curvature > 0)
    models, losses = models_of(xp, segment), losses_of(xp, segment)
    found = GridSearch(lambda theta: cumulative(losses, theta), points=41).merge(models, losses)
    best = float(to_numpy(Became(DiagonalFisher()).merge(models, losses).alpha))
    assert abs(float(to_numpy(found.alpha)) - best) <= 1 / 80 + 1e-9


def clients(xp: Any, count: int = 6) -> tuple[list[Any], list[LaplacePosterior], Any]:
    """Linear regression on clients of unequal size and noise: losses are exactly quadratic, so the optimum is known.

    All inputs are rotations of one diagonal second moment, so each loss's curvature is diagonal and the sum's minimum
    on the simplex of the clients' own solutions can be compared with.
    """
    draw = np.random.default_rng(3)
    truth = draw.normal(size=8)
    models, losses, moments = [], [], []
    for client in range(count):
        moment = draw.uniform(0.1, 1, size=8) * 10.0 ** (client % 3)
        solution = truth + draw.normal(size=8) / np.sqrt(moment)
        models.append(to_xp(xp, {"w": solution}))
        losses.append(LaplacePosterior(models[-1], Diagonal(to_xp(xp, {"w": moment}))))
        moments.append((moment, solution))
    optimum = sum(m * s for m, s in moments) / sum(m for m, _ in moments)
    return models, losses, to_xp(xp, {"w": optimum})


@pytest.mark.parametrize("count", [3, 6, 12])  # the last by the active-set walk
def test_clients_merged_on_the_simplex_beat_the_equal_average(xp: Any, count: int) -> None:
    models, losses, optimum = clients(xp, count)
    merged = Became(DiagonalFisher()).merge(models, losses)
    best, equal, simplex = (
        cumulative(losses, theta) for theta in (optimum, Equal().merge(models, losses).theta, merged.theta)
    )
    assert best <= simplex < 0.6 * equal + 0.4 * best
    coefficients = to_numpy(merged.alpha)
    assert coefficients.min() >= 0
    assert coefficients.sum() == pytest.approx(1)
    # The mode is the optimum itself here, since the curvatures are diagonal.
    np.testing.assert_allclose(
        to_numpy(FisherMerge().merge(models, losses).theta["w"]), to_numpy(optimum["w"]), rtol=1e-12
    )
    for corner in np.eye(count):  # and no mixture nearby is better
        for pull in (0.01, 0.2):
            mixed = MeanIMM(tuple((1 - pull) * coefficients + pull * corner)).merge(models, losses)
            assert simplex <= cumulative(losses, mixed.theta) + 1e-9


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Equal(), [1.0, 3.0]),
        (Fixed(0.25), [0.5, 2.5]),
        (MeanIMM((3.0, 1.0)), [0.5, 2.5]),
        (ModeIMM(), [0.5, 3.0]),  # (3 * 0 + 1 * 2) / 4, and the mean where nothing is known
        (ModeIMM((1.0, 3.0)), [1.0, 3.5]),
        (FisherMerge((1.0, 3.0)), [1.0, 3.5]),
    ],
)
def test_rules_by_hand(xp: Any, rule: MergeRule, expected: list[float]) -> None:
    first, second = ({"w": xp.asarray(values)} for values in ([0.0, 2.0], [2.0, 4.0]))
    losses = [
        LaplacePosterior(first, Diagonal({"w": xp.asarray([3.0, 0.0])})),
        LaplacePosterior(second, Diagonal({"w": xp.asarray([1.0, 0.0])})),
    ]
    np.testing.assert_allclose(to_numpy(rule.merge([first, second], losses).theta["w"]), expected, rtol=1e-15)


@pytest.mark.parametrize(
    "rule",
    [
        Equal(),
        Fixed(0.3),
        ModeIMM(),
        Became(),
        Became(per="layer"),
        Became(per="weight", shrinkage=0.3),
        Became(PaperClosedForm()),
        BecameCurve(),
    ],
)
def test_models_that_agree_stay_as_they_are(xp: Any, rule: MergeRule) -> None:
    model = {"a.weight": xp.asarray([0.1, 0.7]), "b.weight": xp.asarray([0.3])}
    loss = LaplacePosterior(model, Diagonal({name: value * 0 + 0.3 for name, value in model.items()}))
    merged = rule.merge([model, dict(model)], [loss, loss]).theta
    assert all(bool(xp.all(merged[name] == value)) for name, value in model.items())


def test_what_cannot_be_merged_is_said(xp: Any) -> None:
    model = {"w": xp.asarray([1.0])}
    loss = LaplacePosterior(model, Diagonal(model))
    with pytest.raises(BecameError, match=r"the merging coefficient is 1\.5; it must be in \[0, 1\]"):
        Fixed(1.5)
    with pytest.raises(BecameError, match="a fixed coefficient is for two models, not 3"):
        Fixed(0.5).merge([model] * 3, [loss] * 3)
    with pytest.raises(BecameError, match="there are 2 models and 1 losses; give each model's own loss"):
        ModeIMM().merge([model] * 2, [loss])
    with pytest.raises(BecameError, match=r"the mixing is \[1\.0\] for 2 models"):
        MeanIMM((1.0,)).merge([model] * 2, [])
    with pytest.raises(BecameError, match=r"the mixing is \[0\.0, 0\.0\] for 2 models"):
        ModeIMM((0.0, 0.0)).merge([model] * 2, [loss] * 2)
    with pytest.raises(BecameError, match=r"the weights are \[1\.0, -1\.0\] for 2 models"):
        FisherMerge((1.0, -1.0)).merge([model] * 2, [loss] * 2)
    for share in (float("nan"), float("inf")):
        with pytest.raises(BecameError, match=rf"the weights are \[{share}, 1\.0\] for 2 models"):
            FisherMerge((share, 1.0)).merge([model] * 2, [loss] * 2)
    with pytest.raises(BecameError, match="a coefficient per layer is for two models, not 3"):
        Became(per="layer").merge([model] * 3, [loss] * 3)
    with pytest.raises(BecameError, match="a grid of 1 points has no ends"):
        GridSearch(lambda theta: 0.0, points=1).merge([model] * 2, [])


@pytest.mark.parametrize(("broken", "value"), [(0.0, float("nan")), (0.5, float("inf"))])
def test_a_loss_that_is_not_finite_is_named_by_its_alpha(xp: Any, broken: float, value: float) -> None:
    def loss(theta: Any) -> float:
        return value if float(theta["w"]) == broken else 1.0

    with pytest.raises(BecameError, match=f"the loss at alpha = {broken:g} is {value}; it must be finite"):
        GridSearch(loss, points=3).merge([{"w": xp.asarray(0.0)}, {"w": xp.asarray(1.0)}], [])


@pytest.mark.parametrize(
    "rule", [Became(), Became(DiagonalFisher()), Became(PaperClosedForm()), ModeIMM(), FisherMerge(), BecameCurve()]
)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_losses_is_refused(xp: Any, rule: MergeRule, count: int) -> None:
    models = [{"w": xp.asarray([1.0, 2.0])}, {"w": xp.asarray([2.0, 3.0])}]
    loss = LaplacePosterior(models[0], Diagonal({"w": xp.asarray([1.0, 1.0])}))
    with pytest.raises(BecameError, match=f"there are 2 models and {count} losses; give each model's own loss"):
        rule.merge(models, [loss] * count)


def test_a_loss_that_does_not_depend_on_a_weight_leaves_it_to_the_other(xp: Any) -> None:
    """Kronecker factors of old tasks know nothing of a new task's head."""
    models = [{name: xp.asarray([value]) for name in ("shared", "head")} for value in (0.0, 1.0)]
    old = LaplacePosterior({"shared": models[0]["shared"]}, Diagonal({"shared": xp.asarray([3.0])}))
    new = LaplacePosterior(models[1], Diagonal({name: xp.asarray([1.0]) for name in models[1]}))
    for rule in (ModeIMM(), Became(per="weight")):
        merged = rule.merge(models, [old, new]).theta
        assert [float(merged[name][0]) for name in ("shared", "head")] == [0.25, 1.0]


DTYPES = [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float16"), ("float32", "float64")]
RULES: list[MergeRule] = [
    Became(),
    Became(per="leaf"),
    Became(per="weight", shrinkage=0.5),
    BecameCurve(),
    FisherMerge(),
    ModeIMM(),
    Became(PaperClosedForm()),
]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_weights_and_fishers_of_two_dtypes_are_merged_in_the_wider(
    xp: Any, dtypes: tuple[str, str], rule: MergeRule
) -> None:
    """The merged weights have the first model's dtype; TensorFlow's operators promote nothing by themselves."""
    if not all(hasattr(xp, name) for name in dtypes):
        pytest.skip(f"this backend has not both {' and '.join(dtypes)}")
    arrays = [np.array(each) for each in ([0.0, 0.0, 1.0], [1.0, 2.0, 1.0], [1.0, 3.0, 2.0], [2.0, 1.0, 2.0])]

    def merged(of_weights: Any, of_fishers: Any) -> Any:
        kinds = [of_weights, of_weights, of_fishers, of_fishers]
        gp, hat, old, new = ({"w": xp.astype(to_xp(xp, each), kind)} for each, kind in zip(arrays, kinds, strict=True))
        losses = [LaplacePosterior(gp, Diagonal(old)), LaplacePosterior(hat, Diagonal(new))]
        return rule.merge([gp, hat], losses).theta["w"]

    weights, fishers = (getattr(xp, name) for name in dtypes)
    found, exact = merged(weights, fishers), merged(xp.float64, xp.float64)
    assert found.dtype == weights
    rounding = float(xp.finfo(weights).eps)
    np.testing.assert_allclose(to_numpy(xp.astype(found, xp.float64)), to_numpy(exact), rtol=4 * rounding)
