"""Expansions along directions: layers, leaves, K models and every structure of curvature, against dense matrices."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from became_core import BecameError, layerwise_quadratic, optimal_alpha, path_quadratic, subspace_quadratic
from became_core.laplace import Dense, Diagonal, Kronecker, merge
from reference.quadratics import height, minimum_in_box
from tests.backends import to_numpy, to_xp
from tests.strategies import Segment, eighths, segments

Array = NDArray[np.float64]
SHAPES = {"fc1.bias": (2,), "fc1.weight": (2, 3), "fc2.weight": (2, 2)}  # in sorted order, as Dense has them


def trees_of(xp: Any, segment: Segment) -> list[Any]:
    return [to_xp(xp, t) for t in (segment.theta_gp, segment.theta_hat, segment.fisher_old, segment.fisher_new)]


def extras_of(xp: Any, segment: Segment) -> dict[str, Any]:
    return {"gradient": to_xp(xp, segment.gradient), "mean": to_xp(xp, segment.mean)}


def tree_of(vector: Array) -> dict[str, Array]:
    parts, start = {}, 0
    for name, shape in SHAPES.items():
        parts[name] = vector[start : start + int(np.prod(shape))].reshape(shape)
        start += int(np.prod(shape))
    return parts


vectors = eighths((12,))
roots = eighths((12, 12))


@given(segment=segments(), per=st.sampled_from(["layer", "leaf"]))
def test_quadratics_of_the_parts_add_to_that_of_the_whole(xp: Any, per: Any, segment: Segment) -> None:
    whole = path_quadratic(*trees_of(xp, segment), **extras_of(xp, segment))
    parts = layerwise_quadratic(*trees_of(xp, segment), **extras_of(xp, segment), per=per)
    assert parts.directions == len(segment.theta_gp)  # each test leaf is a layer
    assert float(xp.sum(parts.slope)) == float(whole.slope[0])
    assert float(xp.sum(parts.curvature)) == float(whole.curvature[0, 0])
    for index, name in enumerate(segment.theta_gp):
        alone = Segment(*({name: getattr(segment, field)[name]} for field in segment.__dataclass_fields__))
        one = path_quadratic(*trees_of(xp, alone), **extras_of(xp, alone))
        assert float(parts.slope[index]) == float(one.slope[0])
        assert float(parts.curvature[index, index]) == float(one.curvature[0, 0])


@given(segment=segments(), clip=st.booleans())
def test_alphas_per_leaf_are_each_leafs_own(xp: Any, clip: bool, segment: Segment) -> None:
    alphas = optimal_alpha(*trees_of(xp, segment), **extras_of(xp, segment), per="leaf", clip=clip)
    for name in segment.theta_gp:
        alone = Segment(*({name: getattr(segment, field)[name]} for field in segment.__dataclass_fields__))
        own = optimal_alpha(*trees_of(xp, alone), **extras_of(xp, alone), clip=clip)
        assert float(alphas[name]) == float(own)
    gp, hat, *_ = trees_of(xp, segment)
    merged = merge(gp, hat, alphas)
    for name, stable in segment.theta_gp.items():
        alpha = float(alphas[name])
        np.testing.assert_allclose(
            to_numpy(merged[name]),
            (1 - alpha) * stable + alpha * segment.theta_hat[name],
            atol=1e-10 * (1 + abs(alpha)),
        )


def test_weights_and_bias_of_a_layer_share(xp: Any) -> None:
    tree = {
        "enc": {"fc1": {"weight": xp.ones((2, 2)), "bias": xp.ones((2,))}, "fc2": [xp.ones((3,))]},
        "w": xp.ones(()),
    }
    zero = {"enc": {"fc1": {"weight": xp.zeros((2, 2)), "bias": xp.zeros((2,))}, "fc2": [xp.zeros((3,))]}}
    zero["w"] = xp.zeros(())
    old = {"enc": {"fc1": {"weight": xp.ones((2, 2)), "bias": xp.zeros((2,))}, "fc2": [xp.full((3,), 3.0)]}}
    old["w"] = xp.zeros(())
    alphas = optimal_alpha(zero, tree, old, tree, per="layer")
    assert float(alphas["enc"]["fc1"]["weight"]) == float(alphas["enc"]["fc1"]["bias"]) == pytest.approx(0.6)
    assert float(alphas["enc"]["fc2"][0]) == 0.25
    assert float(alphas["w"]) == 1
    assert layerwise_quadratic(zero, tree, old, tree).directions == 3
    merged = merge(zero, tree, alphas)
    assert to_numpy(merged["enc"]["fc2"][0]).tolist() == [0.25] * 3


@given(
    points=st.tuples(*[vectors] * 4), root_old=roots, root_new=roots, per=st.sampled_from(["model", "layer", "leaf"])
)
def test_dense_curvatures_couple_layers(xp: Any, points: Any, root_old: Array, root_new: Array, per: Any) -> None:
    """The box minimum of the explicit quadratic, with all that a diagonal leaves out."""
    gp, hat, gradient, mean = points
    old, new = root_old @ root_old.T, root_new @ root_new.T
    bounds = {"model": (0, 12), "layer": (0, 8, 12), "leaf": (0, 2, 8, 12)}[per]
    directions = np.zeros((len(bounds) - 1, 12))
    for row, (start, end) in enumerate(pairwise(bounds)):
        directions[row, start:end] = (hat - gp)[start:end]
    slope = directions @ (gradient - new @ (hat - gp) + old @ (gp - mean))
    curvature = directions @ (old + new) @ directions.T
    theta_gp, theta_hat, g, mu = (to_xp(xp, tree_of(vector)) for vector in (gp, hat, gradient, mean))
    fishers = [Dense(to_xp(xp, matrix), SHAPES) for matrix in (old, new)]
    quadratic = layerwise_quadratic(theta_gp, theta_hat, *fishers, gradient=g, mean=mu, per=per)
    scale = 1 + np.abs(slope).max() + np.abs(curvature).max()
    np.testing.assert_allclose(to_numpy(quadratic.slope), slope, atol=1e-12 * scale)
    np.testing.assert_allclose(to_numpy(quadratic.curvature), curvature, atol=1e-12 * scale)
    found = optimal_alpha(theta_gp, theta_hat, *fishers, gradient=g, mean=mu, per=per)
    leaves = {"model": [], "layer": ["fc1.weight", "fc2.weight"], "leaf": list(SHAPES)}[per]
    alphas = np.array([float(found[name]) for name in leaves] or [float(found)])
    assert height(slope, curvature, alphas) <= minimum_in_box(slope, curvature) + 1e-9 * scale


@given(segment=segments())
def test_a_diagonal_precision_is_the_tree_it_holds(xp: Any, segment: Segment) -> None:
    assume(segment.curvature > 0)
    gp, hat, old, new = trees_of(xp, segment)
    plain = optimal_alpha(gp, hat, old, new, **extras_of(xp, segment))
    for fishers in ((Diagonal(old), Diagonal(new)), (Diagonal(old), new), (old, Diagonal(new))):
        assert float(optimal_alpha(gp, hat, *fishers, **extras_of(xp, segment))) == pytest.approx(
            float(plain), rel=1e-12, abs=1e-12
        )


def test_kronecker_factors_beside_a_diagonal(xp: Any) -> None:
    draw = np.random.default_rng(0)
    a, g = (root @ root.T for root in (draw.normal(size=(3, 3)), draw.normal(size=(2, 2))))
    gp, hat, new = draw.normal(size=(2, 3)), draw.normal(size=(2, 3)), draw.uniform(size=(2, 3))
    delta = hat - gp
    exact = float(np.sum(new * delta**2))
    kron = float(np.trace(delta.T @ g @ delta @ a))
    alpha = optimal_alpha(
        to_xp(xp, {"w": gp}),
        to_xp(xp, {"w": hat}),
        Kronecker({"w": (to_xp(xp, a), to_xp(xp, g))}),
        to_xp(xp, {"w": new}),
    )
    assert float(alpha) == pytest.approx(exact / (exact + kron), rel=1e-12)


@given(rows=st.lists(vectors, min_size=1, max_size=3), rest=st.tuples(vectors, vectors), root=roots)
def test_a_subspace_by_hand(xp: Any, rows: list[Array], rest: tuple[Array, Array], root: Array) -> None:
    gradient, offset = rest
    matrix, d = root @ root.T, np.array(rows)
    quadratic = subspace_quadratic(
        [to_xp(xp, tree_of(row)) for row in rows],
        Dense(to_xp(xp, matrix), SHAPES),
        gradient=to_xp(xp, tree_of(gradient)),
        offset=to_xp(xp, tree_of(offset)),
    )
    scale = 1e-12 * (1 + np.abs(d).max()) ** 2 * (1 + np.abs(matrix).sum())
    np.testing.assert_allclose(to_numpy(quadratic.slope), d @ gradient + d @ matrix @ offset, atol=scale)
    np.testing.assert_allclose(to_numpy(quadratic.curvature), d @ matrix @ d.T, atol=scale)


def test_leaves_without_elements_count_for_nothing(xp: Any) -> None:
    full, empty = xp.ones((3,)), xp.ones((0, 2))
    tree = {"w": full, "nothing": empty}
    alpha = optimal_alpha({"w": xp.zeros((3,)), "nothing": empty}, tree, tree, tree)
    assert float(alpha) == 0.5
    assert float(optimal_alpha(empty, empty, empty, empty)) == 0


def test_what_cannot_be_expanded_is_said(xp: Any) -> None:
    tree = {"w": xp.ones((2,))}
    with pytest.raises(BecameError, match="there is no coefficient per 'head'; choose from model, layer, leaf"):
        optimal_alpha(tree, tree, tree, tree, per="head")  # type: ignore[arg-type]
    with pytest.raises(BecameError, match="there are no directions; give at least one"):
        subspace_quadratic([], Diagonal(tree))
    with pytest.raises(BecameError, match="theta_gp has no arrays; give at least one"):
        path_quadratic({}, {}, {}, {})
    with pytest.raises(BecameError, match=r"^theta_hat has a leaf 'v' that theta_gp lacks"):
        optimal_alpha(tree, tree | {"v": tree["w"]}, Diagonal(tree), tree)
    with pytest.raises(BecameError, match=r"^fisher_new lacks the leaf 'v'"):
        optimal_alpha(tree | {"v": tree["w"]}, tree | {"v": tree["w"]}, Diagonal(tree | {"v": tree["w"]}), tree)
    wrong = {"w": xp.asarray([1.0, float("nan")])}
    for arguments in ((tree, wrong, Diagonal(tree)), (tree, tree, Diagonal({"w": xp.asarray([1.0, float("inf")])}))):
        with pytest.raises(BecameError, match="entries that are NaN, infinite, or too large to be summed"):
            optimal_alpha({"w": xp.zeros((2,))}, arguments[1], Diagonal(tree), arguments[2])
