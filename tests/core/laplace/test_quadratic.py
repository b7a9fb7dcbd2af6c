"""The quadratic of K directions: its values, checks, and minimisers against brute force."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from became_core import BecameError, Quadratic
from became_core.laplace.quadratic import _Faces, segment_minimiser
from reference.quadratics import height, minimum_in_box, minimum_on_simplex
from tests.backends import to_numpy, to_xp
from tests.compilers import gradient_of
from tests.quadratics import crossed
from tests.strategies import few_if_compiled

Array = NDArray[np.float64]


def of(xp: Any, slope: Any, curvature: Any) -> Quadratic:
    return Quadratic(xp.asarray(np.array(slope, dtype=float)), xp.asarray(np.array(curvature, dtype=float)))


def scalar(xp: Any, slope: float, curvature: float) -> Quadratic:
    return of(xp, [slope], [[curvature]])


@st.composite
def problems(draw: st.DrawFn, low: int = 1, high: int = 4, indefinite: bool = False) -> tuple[Array, Array]:
    """Slope and curvature: a square of a matrix of small integers, so of any rank; or any symmetric matrix."""
    size = draw(few_if_compiled(st.integers(low, high), [low, high]))
    entries = st.integers(-3, 3)
    slope = np.array(draw(st.lists(entries, min_size=size, max_size=size)), dtype=float)
    root = np.array(draw(st.lists(entries, min_size=size * size, max_size=size * size)), dtype=float)
    root = root.reshape(size, size)
    if indefinite:
        return slope, root + root.T
    root = root[:, : draw(st.integers(1, size))]
    return slope, root @ root.T


@given(problem=problems())
def test_values_and_slopes_are_the_formulas(xp: Any, problem: tuple[Array, Array]) -> None:
    slope, curvature = problem
    quadratic = of(xp, slope, curvature)
    points = np.linspace(-1, 2, 3 * len(slope)).reshape(3, -1)
    values, slopes = quadratic.value(to_xp(xp, points)), quadratic.slope_at(to_xp(xp, points))
    for index, a in enumerate(points):
        assert float(values[index]) == pytest.approx(height(slope, curvature, a), abs=1e-12)
        np.testing.assert_allclose(to_numpy(slopes)[index], slope + curvature @ a, atol=1e-12)
        assert float(quadratic.value(to_xp(xp, a))) == pytest.approx(height(slope, curvature, a), abs=1e-12)


@given(problem=problems(), unit=st.sampled_from([0.5, 3.0]))
def test_quadratics_add_and_scale(xp: Any, problem: tuple[Array, Array], unit: float) -> None:
    slope, curvature = problem
    quadratic = of(xp, slope, curvature)
    total = quadratic + quadratic * unit
    np.testing.assert_allclose(to_numpy(total.slope), (1 + unit) * slope, rtol=1e-15)
    np.testing.assert_allclose(to_numpy(total.curvature), (1 + unit) * curvature, rtol=1e-15)


def test_several_quadratics_sum(xp: Any) -> None:
    parts = [Quadratic(to_xp(xp, np.ones(2) * k), to_xp(xp, np.eye(2) * k)) for k in (1.0, 2.0, 4.0)]
    total = sum(parts)
    assert isinstance(total, Quadratic)
    assert to_numpy(total.slope).tolist() == [7.0, 7.0]
    assert to_numpy(total.curvature).tolist() == [[7.0, 0.0], [0.0, 7.0]]
    with pytest.raises(TypeError):
        1 + parts[0]  # nothing but the start of a sum


def test_the_origin_is_a_model_of_its_own_on_the_simplex(xp: Any) -> None:
    between = Quadratic(to_xp(xp, np.asarray([-1.0])), to_xp(xp, np.asarray([[4.0]])))
    models = between.with_origin()
    assert to_numpy(models.minimiser("simplex")).tolist() == [0.75, 0.25]
    assert float(models.value(to_xp(xp, np.asarray([0.5, 0.5])))) == float(between.value(0.5))


@given(problem=problems())
def test_the_free_minimiser_is_stationary(xp: Any, problem: tuple[Array, Array]) -> None:
    slope, curvature = problem
    slope = curvature @ slope  # in the range of C, so that there is a minimum
    found = to_numpy(of(xp, slope, curvature).minimiser())
    np.testing.assert_allclose(slope + curvature @ found, 0, atol=1e-6 * (1 + np.abs(slope).max()))


@given(problem=problems())
def test_the_box_minimiser_is_that_of_brute_force(xp: Any, problem: tuple[Array, Array]) -> None:
    slope, curvature = problem
    found = to_numpy(of(xp, slope, curvature).minimiser("box"))
    assert found.min() >= 0
    assert found.max() <= 1
    best = minimum_in_box(slope, curvature)
    assert height(slope, curvature, found) <= best + 1e-9 * (1 + abs(best))


@pytest.mark.parametrize("kind", ["float32", "float64"])
@given(problem=problems(low=2, indefinite=True), deep=st.booleans())
def test_the_simplex_minimiser_is_global_where_the_loss_is_not_convex(
    xp: Any, kind: str, problem: tuple[Array, Array], deep: bool
) -> None:
    """Also where the largest curvature of all is a negative one, along one direction."""
    slope, curvature = problem
    if deep:
        curvature[-1, -1] = -np.abs(curvature).max()
    arrays = (to_xp(xp, each.astype(kind)) for each in (slope / 10, curvature))
    found = to_numpy(Quadratic(*arrays).minimiser("simplex")).astype(float)
    slope = np.asarray((slope / 10).astype(kind), dtype=float)
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1, abs=1e-6)
    best = minimum_on_simplex(slope, curvature)
    assert height(slope, curvature, found) <= best + (1e-5 if kind == "float32" else 1e-9) * (
        1 + np.abs(curvature).max()
    )


@given(problem=problems(), lift=st.sampled_from([0.0, 1024.0]))
def test_the_simplex_minimiser_is_that_of_brute_force(xp: Any, problem: tuple[Array, Array], lift: float) -> None:
    """Whatever is added to all slopes, which is no more than a constant there."""
    slope, curvature = problem
    found = to_numpy(of(xp, slope + lift, curvature).minimiser("simplex"))
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1, abs=1e-12)
    best = minimum_on_simplex(slope, curvature)
    assert height(slope, curvature, found) <= best + 1e-9 * (1 + abs(best))


@given(
    problem=problems(low=2, high=7), constraint=st.sampled_from(["box", "simplex"]), power=st.sampled_from([-60, 60])
)
def test_the_unit_of_the_loss_does_not_matter(
    xp: Any, problem: tuple[Array, Array], constraint: Any, power: int
) -> None:
    slope, curvature = problem[0], problem[1] + np.eye(len(problem[0]))  # one minimiser
    scaled = of(xp, slope * 2.0**power, curvature * 2.0**power).minimiser(constraint)
    expected = to_numpy(of(xp, slope, curvature).minimiser(constraint))
    np.testing.assert_allclose(to_numpy(scaled), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("lift", "slack"), [(0.0, 1e-6), (2.0**20, 1e-3)])
def test_large_slopes_that_differ_little_keep_their_digits_on_the_simplex(xp: Any, lift: float, slack: float) -> None:
    """In single precision, where 2^20 leaves an eighth."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        slope, root = draw.integers(-3, 4, size=4).astype(float), draw.integers(-3, 4, size=(4, 2)).astype(float)
        curvature = root @ root.T
        lifted = Quadratic(xp.asarray(slope + lift, dtype=xp.float32), xp.asarray(curvature, dtype=xp.float32))
        found = to_numpy(lifted.minimiser("simplex")).astype(float)
        best = minimum_on_simplex(slope, curvature)
        assert height(slope, curvature, found / found.sum()) <= best + slack * (1 + abs(best))


def test_of_many_minima_on_the_simplex_the_first_simple_one_is_taken(xp: Any) -> None:
    """The third model is the middle of the others, so it can stand in for both: rounding is not to say how much."""
    draw = np.random.default_rng(0)
    for share, curved in draw.uniform(0.1, 0.9, size=(20, 2)):
        direction = np.asarray([0.0, 1.0, 0.5])
        quadratic = of(xp, -share * curved * direction, curved * np.outer(direction, direction))
        np.testing.assert_allclose(to_numpy(quadratic.minimiser("simplex")), [1 - share, share, 0], rtol=0, atol=1e-13)


@given(
    problem=problems(low=2, high=3, indefinite=True),
    constraint=st.sampled_from(["box", "simplex"]),
    lift=st.sampled_from([0.0, 50.0]),  # on the simplex no more than a constant, which makes the loss positive
)
def test_an_indefinite_quadratic_has_its_global_minimum(
    xp: Any, problem: tuple[Array, Array], constraint: Any, lift: float
) -> None:
    slope, curvature = problem[0] + lift, problem[1]
    values = np.linalg.eigvalsh(curvature)
    assume(values[0] < -0.5)
    assume(np.abs(values).min() > 0.1)
    found = to_numpy(of(xp, slope, curvature).minimiser(constraint))
    oracle = minimum_in_box if constraint == "box" else minimum_on_simplex
    best = oracle(slope, curvature)
    assert height(slope, curvature, found) <= best + 1e-9 * (1 + abs(best))


@given(
    problem=problems(low=6, high=7),
    constraint=st.sampled_from(["box", "simplex"]),
    unit=st.sampled_from([1.0, 2.0**40]),  # however small rounding is not
)
def test_the_walk_of_many_directions_meets_the_optimality_conditions(
    xp: Any, problem: tuple[Array, Array], constraint: Any, unit: float
) -> None:
    slope, curvature = problem[0] * unit, problem[1] * unit
    if constraint == "simplex":  # so many that faces are not enumerated
        slope, curvature = np.tile(slope, 2), np.kron(np.array([[2.0, 1.0], [1.0, 2.0]]), curvature)
    found = to_numpy(of(xp, slope, curvature).minimiser(constraint))
    gradient = slope + curvature @ found
    slack = 1e-7 * (1 + np.abs(slope).max() + np.abs(curvature).max())
    assert found.min() >= 0
    if constraint == "box":
        assert found.max() <= 1
        assert (gradient[found < 1] >= -slack).all()
        assert (gradient[found > 0] <= slack).all()
    else:
        assert found.sum() == pytest.approx(1)
        assert gradient[found > 1e-9].max() <= gradient.min() + slack


@pytest.mark.parametrize("size", [6, 16])
@pytest.mark.parametrize(("constraint", "reach"), [("box", 0.5), ("simplex", 0.1)])
def test_the_walk_changes_faces_often_and_ends(xp: Any, constraint: Any, reach: float, size: int) -> None:
    """With much in common, what is held and what is free changes often; K = 6 on the simplex is tried face by face."""
    draw = np.random.default_rng(0)
    for _ in range(15):
        slope, curvature = crossed(size, reach, draw, apart=0.3)
        slope = slope + draw.normal(size=size)
        point = to_numpy(of(xp, slope, curvature).minimiser(constraint))
        gradient = slope + curvature @ point
        slack = 1e-9 * np.abs(curvature).max()
        if constraint == "box":
            assert (gradient[point < 1] >= -slack).all()
            assert (gradient[point > 0] <= slack).all()
        else:
            assert gradient[point > 0].max() <= gradient.min() + slack


@pytest.mark.parametrize(("constraint", "size", "own"), [("box", 6, -1), ("simplex", 10, -1), ("box", 6, 1)])
def test_many_directions_want_a_convex_loss(xp: Any, constraint: Any, size: int, own: int) -> None:
    curvature = own * np.eye(size) - (np.ones((size, size)) if own > 0 else 0)
    message = f"a constrained minimum along {size} directions is found only where the loss is convex along them"
    with pytest.raises(BecameError, match=message):
        of(xp, np.linspace(-1, 1, size), curvature).minimiser(constraint)


def test_on_the_simplex_what_the_sum_feels_may_bend_down(xp: Any) -> None:
    """It is 1 at every point, so that the loss is as convex as without."""
    slope = np.linspace(-1, 1, 10)
    found = to_numpy(of(xp, slope, np.eye(10) - np.ones((10, 10))).minimiser("simplex"))
    np.testing.assert_allclose(found, to_numpy(of(xp, slope, np.eye(10)).minimiser("simplex")), atol=1e-12)


@pytest.mark.parametrize("size", [3, 10])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_several_directions_want_numbers(xp: Any, size: int, wrong: float) -> None:
    slope, curvature = np.arange(size, dtype=float), np.eye(size)
    slope[1] = wrong
    with pytest.raises(BecameError, match=f"a quadratic of {size} directions has NaN or infinite entries; all must be"):
        of(xp, slope, curvature).minimiser()
    slope[1], curvature[1, 1] = 1.0, wrong
    for ask in ("box", "simplex", None):
        with pytest.raises(BecameError, match="has NaN or infinite entries"):
            of(xp, slope, curvature).minimiser(ask)
    with pytest.raises(BecameError, match="has NaN or infinite entries"):
        _ = of(xp, slope, curvature).is_convex


@given(problem=problems(low=2, high=4), on_simplex=st.booleans())
def test_walk_and_faces_agree(problem: tuple[Array, Array], on_simplex: bool) -> None:
    """The two ways to the same minimum."""
    slope, curvature = problem
    faces = _Faces(slope, curvature + np.eye(len(slope)), float(np.finfo(float).eps), on_simplex)  # one minimiser
    np.testing.assert_allclose(faces.walk()[0], faces.best()[0], atol=1e-9)


def test_directions_that_coincide_are_minimised_in_single_precision(xp: Any) -> None:
    """Rounding makes the curvature slightly indefinite; many directions are walked, few are tried face by face."""
    draw = np.random.default_rng(1)
    for size in (3, 8, 12):
        for constraint, oracle in (("box", minimum_in_box), ("simplex", minimum_on_simplex)):
            root = np.tile(draw.normal(size=(1, 2)), (size, 1))  # all directions are one
            curvature = (root @ root.T).astype(np.float32)
            slope = np.full(size, -0.3 * curvature[0, 0], dtype=np.float32)
            quadratic = Quadratic(xp.asarray(slope), xp.asarray(curvature))
            point = to_numpy(quadratic.minimiser(constraint)).astype(float)  # type: ignore[arg-type]
            wide, square = slope.astype(float), curvature.astype(float)
            best = oracle(wide[:3], square[:3, :3])  # one minimum, however many directions
            assert height(wide, square, point) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize(
    ("slope", "curvature", "clipped", "free"),
    [
        (-1.0, 4.0, 0.25, 0.25),
        (-8.0, 4.0, 1.0, 2.0),  # -b >= c
        (1.0, 4.0, 0.0, -0.25),  # b >= 0
        (0.0, 0.0, 0.0, 0.0),  # constant: the stable model
        (-1.0, 0.0, 1.0, 0.0),  # linear
        (1.0, 0.0, 0.0, 0.0),
        (-1.0, -4.0, 1.0, -0.25),  # concave: an end
        (3.0, -4.0, 0.0, 0.75),
        (1.0, -4.0, 1.0, 0.25),
        (-5e-324, 5e-324, 0.0, 0.0),  # denormal: nothing is curved
        (-1e-300, 4e-300, 0.25, 0.25),
    ],
)
def test_one_direction(xp: Any, slope: float, curvature: float, clipped: float, free: float) -> None:
    quadratic = scalar(xp, slope, curvature)
    assert float(quadratic.minimiser("box")[0]) == clipped
    assert float(quadratic.minimiser()[0]) == free


def test_a_number_that_is_none_does_not_pass_for_no_curvature(xp: Any) -> None:
    assert np.isnan(float(scalar(xp, -1.0, np.nan).minimiser("box")[0]))
    assert np.isnan(float(scalar(xp, np.nan, 1.0).minimiser()[0]))


def test_directions_that_coincide_share_and_flat_ones_stay(xp: Any) -> None:
    twice = of(xp, [-1.0, -1.0], [[2.0, 2.0], [2.0, 2.0]])
    np.testing.assert_allclose(to_numpy(twice.minimiser()), [0.25, 0.25], atol=1e-12)
    flat = of(xp, [-1.0, 0.0], [[2.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(to_numpy(flat.minimiser()), [0.5, 0.0], atol=1e-12)
    assert to_numpy(of(xp, [0.0, 0.0, 0.0], np.zeros((3, 3))).minimiser("simplex")).tolist() == [1, 0, 0]


@given(problem=problems())
def test_convexity_is_positive_semi_definiteness(xp: Any, problem: tuple[Array, Array]) -> None:
    slope, curvature = problem
    assert bool(of(xp, slope, curvature).is_convex)
    assert not bool(of(xp, slope, curvature - (1 + np.trace(curvature)) * np.eye(len(slope))).is_convex)


@pytest.mark.parametrize(("least", "convex"), [(0.0, True), (-1.0, True), (-4.0, False)])
def test_convexity_is_told_up_to_rounding(xp: Any, least: float, convex: bool) -> None:
    """Rounding of the largest eigenvalue, here a million, once for each of the two directions."""
    curvature = np.diag([1e6, least * np.finfo(np.float64).eps * 1e6])
    assert bool(of(xp, np.zeros(2), curvature).is_convex) == convex


@pytest.mark.parametrize(
    ("slope", "curvature", "interior"),
    [(-1.0, 4.0, True), (-8.0, 4.0, False), (1.0, 4.0, False), (0.0, 4.0, False), (-4.0, 4.0, False), (-1, 0, False)],
)
def test_the_plasticity_theorem(xp: Any, slope: float, curvature: float, interior: bool) -> None:
    quadratic = scalar(xp, slope, curvature)
    assert bool(quadratic.has_interior_optimum) == interior
    if interior:
        alpha = quadratic.minimiser("box")
        assert float(quadratic.value(alpha)) < min(0.0, float(quadratic.value(1.0)))


def test_several_directions_have_their_optimum_inside_or_not(xp: Any) -> None:
    curvature = [[2.0, 1.0], [1.0, 2.0]]
    assert bool(of(xp, [-1.5, -1.5], curvature).has_interior_optimum)  # at (1/2, 1/2)
    assert not bool(of(xp, [-3.0, 0.0], curvature).has_interior_optimum)  # at (2, -1)


def test_the_predicted_gain_is_what_the_minimum_lies_below_the_origin(xp: Any) -> None:
    assert float(scalar(xp, -1.0, 4.0).predicted_gain()) == pytest.approx(1 / 8)
    assert float(scalar(xp, -8.0, 4.0).predicted_gain()) == pytest.approx(6)
    assert float(scalar(xp, -8.0, 4.0).predicted_gain(None)) == pytest.approx(8)
    assert str(float(scalar(xp, 1.0, 4.0).predicted_gain())) == "0.0"  # not -0.0


def test_single_precision_is_kept_and_resolves_minima_near_a_bound(xp: Any) -> None:
    """Near a minimum values differ by less than rounding; 0.9999 must not become 1."""
    curvature = xp.asarray(np.diag(np.array([2.0, 3.0], dtype=np.float32)))
    slope = xp.asarray(np.array([-2 * 0.9999, -3 * 1e-4], dtype=np.float32))
    found = Quadratic(slope, curvature).minimiser("box")
    assert found.dtype == xp.float32
    np.testing.assert_allclose(to_numpy(found), [0.9999, 1e-4], rtol=1e-5)


def test_what_cannot_be_used_is_said(xp: Any) -> None:
    with pytest.raises(BecameError, match=r"slope \(2,\) and curvature \(2, 3\); give \[K\] and \[K, K\]"):
        Quadratic(xp.zeros((2,)), xp.zeros((2, 3)))
    with pytest.raises(BecameError, match=r"slope .* give"):
        Quadratic(xp.asarray(1.0), xp.asarray(1.0))
    with pytest.raises(BecameError, match=r"there is no constraint 'ball'; give None, 'box' or 'simplex'\."):
        scalar(xp, 1.0, 1.0).minimiser("ball")  # type: ignore[arg-type]
    with pytest.raises(BecameError, match=r"a point of 2 directions is an array \[2\], not a number"):
        of(xp, [1.0, 1.0], np.eye(2)).value(0.5)


@pytest.mark.parametrize("constraint", [None, "box"])
@pytest.mark.parametrize("size", [2, 8])  # with eight, the box's faces are walked and not all tried
def test_a_direction_is_not_taken_for_rounding_beside_a_more_curved_one(xp: Any, size: int, constraint: Any) -> None:
    """In single precision, curvatures that differ by many orders; without coupling each minimum is its own."""
    curvature, least = 10.0 ** -np.linspace(0, 9, size), np.linspace(0.1, 0.9, size)
    slope = xp.asarray((-curvature * least).astype(np.float32))
    found = Quadratic(slope, xp.asarray(np.diag(curvature).astype(np.float32))).minimiser(constraint)
    np.testing.assert_allclose(to_numpy(found), least, rtol=1e-5)


def test_a_loss_without_curvature_has_its_minimum_in_a_corner(xp: Any) -> None:
    slope = [-1.0, -0.1, -0.01, 0.3, 0.2, -2.0]
    found = of(xp, slope, np.zeros((6, 6))).minimiser("box")
    np.testing.assert_array_equal(to_numpy(found), [1, 1, 1, 0, 0, 1])


def test_a_small_curvature_has_a_finite_gradient(xp: Any, backend: str) -> None:
    """Its square, by which a quotient's derivative is divided, is below the least number of float32."""
    slope = xp.asarray([-1e-20], dtype=xp.float32)
    gradient = gradient_of(backend, lambda curvature: segment_minimiser(slope, curvature, clip=True)[0])
    found = gradient(xp.asarray([4e-20], dtype=xp.float32))
    assert float(found[0]) == pytest.approx(-6.25e18, rel=1e-5)
