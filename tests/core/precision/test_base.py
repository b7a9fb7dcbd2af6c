"""What every structure must answer as the matrix does that it is by definition."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core import BecameError, LaplacePosterior
from became_core.laplace import Dense, Diagonal, Kronecker, LowRank, Precision, Sum
from became_core.precision.vectors import inner_products
from tests.backends import to_numpy, to_xp
from tests.strategies import KINDS, Structured, each_structure, eighths, few_if_compiled, structured, structured_pairs

EPS = np.finfo(float).eps


def assert_close(actual: Any, expected: Any, condition: float = 1.0) -> None:
    """Equal to rounding, as a whole: 64 units in the last place of the largest entry, times a condition number."""
    expected = np.asarray(expected)
    scale = 64 * EPS * condition * (np.abs(expected).max() if expected.size else 0)
    np.testing.assert_allclose(to_numpy(actual), expected, rtol=0, atol=scale + 1e-300)


def columns(xp: Any, linear: Any, case: Structured) -> Any:
    """A linear map of parameters as a matrix, by the unit vectors."""
    units = np.eye(case.size)
    return np.stack([case.vector(linear(to_xp(xp, case.tree(unit)))) for unit in units], axis=1)


def inverse_of(case: Structured) -> tuple[Any, float]:
    return np.linalg.inv(case.matrix), float(np.linalg.cond(case.matrix))


@each_structure
@given(case=structured())
def test_the_dense_form_is_the_definition(xp: Any, case: Structured) -> None:
    dense = Dense.of(case.on(xp))
    np.testing.assert_array_equal(to_numpy(dense.matrix), case.matrix)
    assert list(dense.covered().items()) == sorted(case.shapes.items())
    assert case.on(xp).covered() == case.shapes


@each_structure
@given(
    case=structured(), data=st.data(), counts=few_if_compiled(st.tuples(st.integers(1, 3), st.integers(1, 3)), [(1, 3)])
)
def test_gram_is_that_of_the_matrix(xp: Any, case: Structured, data: st.DataObject, counts: tuple[int, int]) -> None:
    left, right = (data.draw(eighths((count, case.size))) for count in counts)
    precision = case.on(xp)
    left_trees, right_trees = ([to_xp(xp, case.tree(row)) for row in rows] for rows in (left, right))
    bound = float((np.abs(left) @ np.abs(case.matrix) @ np.abs(right).T).max()) + 1
    gram = to_numpy(precision.gram(left_trees, right_trees))
    np.testing.assert_allclose(gram, left @ case.matrix @ right.T, rtol=0, atol=64 * EPS * bound)
    own = to_numpy(precision.gram(left_trees))
    bound = float((np.abs(left) @ np.abs(case.matrix) @ np.abs(left).T).max()) + 1
    np.testing.assert_allclose(own, left @ case.matrix @ left.T, rtol=0, atol=64 * EPS * bound)
    np.testing.assert_array_equal(own, own.T)
    assert float(precision.inner(left_trees[0], right_trees[0])) == pytest.approx(gram[0, 0], abs=64 * EPS * bound)


@each_structure
@given(case=structured())
def test_apply_and_diagonal_are_those_of_the_matrix(xp: Any, case: Structured) -> None:
    precision = case.on(xp)
    assert_close(columns(xp, precision.apply, case), case.matrix)
    assert_close(case.vector(precision.diagonal()), np.diag(case.matrix))
    assert {name: tuple(part.shape) for name, part in precision.diagonal().items()} == case.shapes


@each_structure
@given(case=structured(), factor=st.sampled_from([0.0, 0.5, 3.0]), as_array=st.booleans())
def test_scaling_and_damping(xp: Any, case: Structured, factor: float, as_array: bool) -> None:
    precision, number = case.on(xp), to_xp(xp, np.asarray(factor)) if as_array else factor
    np.testing.assert_array_equal(to_numpy(Dense.of(precision * number).matrix), factor * case.matrix)
    damped = precision.damped(number)
    assert type(damped) is type(precision)
    assert_close(Dense.of(damped).matrix, case.matrix + factor * np.eye(case.size))
    np.testing.assert_array_equal(to_numpy(Dense.of(precision).matrix), case.matrix)  # itself unchanged


@each_structure
@given(case=structured(definite=True))
def test_solve_is_the_inverse(xp: Any, case: Structured) -> None:
    assert_close(columns(xp, case.on(xp).solve, case), *inverse_of(case))


@each_structure
@given(case=structured(definite=True))
def test_the_map_of_samples_is_a_root_of_the_inverse(xp: Any, case: Structured) -> None:
    root = columns(xp, case.on(xp).sample, case)
    assert_close(root @ root.T, *inverse_of(case))


@each_structure
@given(case=structured(definite=True))
def test_marginal_variances_are_the_diagonal_of_the_inverse(xp: Any, case: Structured) -> None:
    variances = case.on(xp).inverse_diagonal()
    inverse, condition = inverse_of(case)
    assert_close(case.vector(variances), np.diag(inverse), condition)
    assert {name: tuple(part.shape) for name, part in variances.items()} == case.shapes


@each_structure
@given(case=structured(definite=True), amount=st.sampled_from([0.0, 0.25, 8.0]))
def test_log_determinant_is_that_of_the_matrix(xp: Any, case: Structured, amount: float) -> None:
    precision = case.on(xp).damped(amount)
    spectrum = np.linalg.eigvalsh(case.matrix + amount * np.eye(case.size))
    # Rounding moves an eigenvalue by eps * the largest: its logarithm by as much, over the eigenvalue.
    bound = 64 * EPS * (np.sum(spectrum[-1] / spectrum) + np.sum(np.abs(np.log(spectrum))))
    assert float(precision.log_determinant()) == pytest.approx(np.sum(np.log(spectrum)), rel=0, abs=bound)


@each_structure
@given(pair=structured_pairs())
def test_precisions_of_any_structures_add(xp: Any, pair: tuple[Structured, Structured]) -> None:
    left, right = pair
    shapes = {**left.shapes, **right.shapes}
    expected = embed(left, shapes) + embed(right, shapes)
    total = left.on(xp) + right.on(xp)
    assert total.covered() == shapes
    assert_close(Dense.of(total).matrix, expected)
    case = Structured("Sum", {}, shapes, expected)
    assert_close(columns(xp, total.apply, case), expected)
    assert_close(case.vector(total.diagonal()), np.diag(expected))


@each_structure
@given(pair=structured_pairs(definite=True))
def test_a_sum_has_an_inverse_or_says_that_it_has_none(xp: Any, pair: tuple[Structured, Structured]) -> None:
    left, right = pair
    shapes = {**left.shapes, **right.shapes}
    case = Structured("Sum", {}, shapes, embed(left, shapes) + embed(right, shapes))
    total = left.on(xp) + right.on(xp)
    terms = total.terms if isinstance(total, Sum) else (total,)
    if sum(len(term.covered()) for term in terms) > len(shapes):
        for ask in (total.log_determinant, total.inverse_diagonal):
            with pytest.raises(
                BecameError, match=r"has no closed form where its terms share a parameter, '.*'; ask `Dense"
            ):
                ask()
        total = Dense.of(total)
    inverse, condition = inverse_of(case)
    assert_close(columns(xp, total.solve, case), inverse, condition)
    root = columns(xp, total.sample, case)
    assert_close(root @ root.T, inverse, condition)
    assert_close(case.vector(total.inverse_diagonal()), np.diag(inverse), condition)
    expected = float(np.linalg.slogdet(case.matrix)[1])
    assert float(total.log_determinant()) == pytest.approx(expected, rel=1e-13, abs=64 * EPS * condition * case.size)


def embed(case: Structured, shapes: dict[str, tuple[int, ...]]) -> Any:
    """A case's matrix over more parameters, with zeros for the others."""
    owner = np.concatenate([np.full(int(np.prod(shapes[name])), name in case.shapes) for name in sorted(shapes)])
    total = np.zeros((len(owner), len(owner)))
    total[np.ix_(owner, owner)] = case.matrix
    return total


def test_precisions_that_are_the_same_matrix_agree(xp: Any) -> None:
    """A rank-one Kronecker product is a rank-one matrix: three structures for one precision."""
    a, g = np.asarray([1.0, -2.0, 0.5]), np.asarray([2.0, 1.0])
    factors = to_xp(xp, {"a": np.outer(a, a), "g": np.outer(g, g)})
    column = to_xp(xp, {"w": np.outer(g, a)[..., None]})
    matrix = np.outer(np.outer(g, a).ravel(), np.outer(g, a).ravel()) + 0.25 * np.eye(6)
    ground = Diagonal(to_xp(xp, {"w": np.full((2, 3), 0.25)}))
    same: list[Precision] = [
        Kronecker({"w": (factors["a"], factors["g"])}).damped(0.25),
        LowRank(column, xp.ones((1,), dtype=xp.float64), ground),
        Dense(to_xp(xp, matrix), {"w": (2, 3)}),
    ]
    u = to_xp(xp, {"w": np.asarray([[1.0, 0.5, -1.0], [0.0, 2.0, 1.0]])})
    for precision in same:
        assert float(precision.inner(u, u)) == pytest.approx(float(same[-1].inner(u, u)), rel=1e-13)
        assert float(precision.log_determinant()) == pytest.approx(np.linalg.slogdet(matrix)[1], rel=1e-13)
        np.testing.assert_allclose(to_numpy(precision.solve(u)["w"]), to_numpy(same[-1].solve(u)["w"]), rtol=1e-12)
        variances = to_numpy(precision.inverse_diagonal()["w"]).ravel()
        np.testing.assert_allclose(variances, np.diag(np.linalg.inv(matrix)), rtol=1e-12)


@each_structure
@given(case=structured(definite=True))
def test_a_parameter_that_is_not_covered_has_no_curvature(xp: Any, case: Structured) -> None:
    precision, rest = case.on(xp), {"head": xp.ones((2,), dtype=xp.float64)}
    u = to_xp(xp, case.tree(np.ones(case.size)))
    assert float(precision.inner({**rest, **u}, u)) == float(precision.inner(u, u))
    applied = precision.apply({**rest, **u})
    np.testing.assert_array_equal(to_numpy(applied["head"]), np.zeros(2))
    np.testing.assert_array_equal(case.vector(applied), case.vector(precision.apply(u)))
    for inverse, label in ((precision.solve, "u"), (precision.sample, "noise")):
        with pytest.raises(BecameError, match=rf"^{label} has 'head', which the precision does not cover, .*\.$"):
            inverse({**rest, **u})


@each_structure
@given(case=structured(definite=True))
def test_a_direction_must_have_what_is_covered_or_coupled(xp: Any, case: Structured) -> None:
    precision = case.on(xp)
    u = to_xp(xp, case.tree(np.arange(case.size) / 8))
    missing, *others = sorted(u)
    part = {name: u[name] for name in others}
    with pytest.raises(
        BecameError, match=rf"^left direction 1 lacks '{missing}', which the precision covers; give all"
    ):
        precision.gram([u, part])
    for linear in (precision.apply, precision.solve, precision.sample):
        if case.kind in {"LowRank", "Dense"}:
            with pytest.raises(BecameError, match=rf" lacks '{missing}', which the precision covers; give all"):
                linear(part)
        elif part:
            whole = linear(u)
            for name, value in linear(part).items():
                np.testing.assert_array_equal(to_numpy(value), to_numpy(whole[name]))


@each_structure
@given(case=structured(definite=True))
def test_narrow_directions_are_reduced_wide_and_keep_their_dtype(xp: Any, case: Structured) -> None:
    precision = case.on(xp)
    u = to_xp(xp, {name: part.astype(np.float32) for name, part in case.tree(np.ones(case.size)).items()})
    assert precision.inner(u, u).dtype == xp.float64  # the precision's
    for linear in (precision.apply, precision.solve, precision.sample):
        assert all(value.dtype == xp.float32 for value in linear(u).values())


@each_structure
@given(case=structured(definite=True))
def test_a_negative_factor_or_damping_is_refused(xp: Any, case: Structured) -> None:
    precision = case.on(xp)
    with pytest.raises(BecameError, match=r"^a precision's factor is -1\.0; it must be at least 0\.$"):
        precision * -1.0
    with pytest.raises(
        BecameError, match=r"^a precision's factor is negative or not a number; it must be at least 0\.$"
    ):
        precision * xp.asarray(-1.0, dtype=xp.float64)
    with pytest.raises(BecameError, match=r"^the damping is nan; it must be at least 0\.$"):
        precision.damped(float("nan"))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_singular_precision_has_no_inverse(xp: Any, kind: str, data: st.DataObject) -> None:
    """Times zero, every structure is singular; damping mends it."""
    precision = data.draw(structured(kinds=[kind])).on(xp) * 0.0
    u = {name: xp.ones(shape, dtype=xp.float64) for name, shape in precision.covered().items()}
    asked: list[Any] = [precision.log_determinant, precision.inverse_diagonal]
    asked += [lambda: precision.solve(u), lambda: precision.sample(u)]
    for ask in asked:
        with pytest.raises(BecameError, match=r"no inverse; add a multiple of the identity with `damped`\.$"):
            ask()
    mended = precision.damped(4.0)
    for name, value in mended.solve(u).items():
        assert_close(value, np.full(u[name].shape, 0.25))


def _lists_of_covered(count: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how often a precision of so many parameters is asked which it covers, for an update and a Gram matrix."""
    values, calls, covered = {f"w{number}": np.ones(2) for number in range(count)}, [0], Diagonal.covered

    def counted(self: Diagonal) -> Any:
        calls[0] += 1
        return covered(self)

    with monkeypatch.context() as patched:
        patched.setattr(Diagonal, "covered", counted)
        posterior = LaplacePosterior(values, Diagonal(values)).update(values, Diagonal(values))
        assert float(posterior.precision.gram([values])[0, 0]) == 4 * count
    return calls[0]


def test_what_a_precision_covers_is_not_listed_anew_for_each_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each list is of all parameters, so that a check of many would take the square of their number."""
    assert _lists_of_covered(2, monkeypatch) == _lists_of_covered(20, monkeypatch)


def test_inner_products_of_numbers_are_their_products(xp: Any) -> None:
    """A parameter without axes, a scale of logits for example, whose shape is kept where several devices share work."""
    left, right = xp.asarray([1.0, 2.0]), xp.asarray([3.0, 4.0, 5.0])
    np.testing.assert_array_equal(to_numpy(inner_products(xp, left, right)), [[3, 4, 5], [6, 8, 10]])
