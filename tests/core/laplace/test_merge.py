import re
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import array_api_strict
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from became_core import BecameError, combine, merge, optimal_alpha
from became_core.laplace import Dense, Diagonal, Isotropic, LowRank, Precision, Sum
from reference.formulas import alpha_in_circulation, alpha_star, brute_force_minimiser, laplace_loss
from tests.backends import to_numpy, to_xp
from tests.strategies import Segment, few_if_compiled, segments


def alpha_of(xp: Any, segment: Segment, *, full: bool = True, clip: bool = True) -> float:
    extra = {"gradient": to_xp(xp, segment.gradient), "mean": to_xp(xp, segment.mean)} if full else {}
    trees = (segment.theta_gp, segment.theta_hat, segment.fisher_old, segment.fisher_new)
    return float(optimal_alpha(*(to_xp(xp, tree) for tree in trees), clip=clip, **extra))


@given(segment=segments(), full=st.booleans())
def test_alpha_is_the_argmin_of_the_objective(xp: Any, segment: Segment, full: bool) -> None:
    def loss(alpha: float) -> float:
        return laplace_loss(alpha, *segment.dense(full=full))

    alpha = alpha_of(xp, segment, full=full)
    found = brute_force_minimiser(loss, 0.0, 1.0)
    rounding = 1e-14 * (1 + max(abs(loss(0.0)), abs(loss(1.0))))
    assert 0 <= alpha <= 1
    assert loss(alpha) <= loss(found) + rounding
    if segment.curvature > 0:
        # Comparing values tells two alphas apart up to the square root of rounding over curvature.
        assert alpha == pytest.approx(found, abs=1e-9 + 2 * np.sqrt(2 * rounding / segment.curvature))


@given(segment=segments(), full=st.booleans())
def test_alpha_agrees_with_the_oracle(xp: Any, segment: Segment, full: bool) -> None:
    assume(segment.curvature > 0)
    expected = alpha_star(*segment.dense(full=full))
    assert alpha_of(xp, segment, full=full, clip=False) == pytest.approx(expected, rel=1e-13, abs=1e-13)
    assert alpha_of(xp, segment, full=full) == pytest.approx(min(max(expected, 0.0), 1.0), rel=1e-13, abs=1e-13)


@given(segment=segments())
def test_the_papers_closed_form(xp: Any, segment: Segment) -> None:
    assume(segment.curvature > 0)
    squares = {name: (segment.theta_hat[name] - gp) ** 2 for name, gp in segment.theta_gp.items()}
    new = sum(float(np.sum(square * segment.fisher_new[name])) for name, square in squares.items())
    old = sum(float(np.sum(square * segment.fisher_old[name])) for name, square in squares.items())
    assert alpha_of(xp, segment, full=False) == pytest.approx(new / (new + old), rel=1e-14)


@given(segment=segments())
def test_swapping_the_two_sides_gives_the_complement(xp: Any, segment: Segment) -> None:
    assume(segment.curvature > 0)
    s = segment
    swapped = Segment(s.theta_hat, s.theta_gp, s.fisher_new, s.fisher_old, s.gradient, s.mean)
    assert alpha_of(xp, swapped, full=False) == pytest.approx(1 - alpha_of(xp, s, full=False), abs=1e-14)


@given(segment=segments())
def test_splitting_leaves_changes_nothing(xp: Any, segment: Segment) -> None:
    def split(tree: dict[str, Any]) -> dict[str, Any]:
        return {
            f"{name}.{index}": np.asarray(v) for name, value in tree.items() for index, v in enumerate(value.ravel())
        }

    trees = (
        segment.theta_gp,
        segment.theta_hat,
        segment.fisher_old,
        segment.fisher_new,
        segment.gradient,
        segment.mean,
    )
    assert alpha_of(xp, Segment(*map(split, trees)), clip=False) == alpha_of(xp, segment, clip=False)


@given(segment=segments(), order=st.randoms(use_true_random=False))
def test_the_order_of_leaves_and_entries_changes_nothing(xp: Any, segment: Segment, order: Any) -> None:
    names = list(segment.theta_gp)
    places = {name: np.argsort([order.random() for _ in range(segment.theta_gp[name].size)]) for name in names}
    order.shuffle(names)

    def permuted(tree: dict[str, Any]) -> dict[str, Any]:
        return {f"p{index}": tree[name].ravel()[places[name]] for index, name in enumerate(names)}

    other = Segment(*(permuted(getattr(segment, field)) for field in segment.__dataclass_fields__))
    assert alpha_of(xp, other, clip=False) == alpha_of(xp, segment, clip=False)


@given(segment=segments(), more=segments(), factor=st.sampled_from([0.0, 0.5, 3.0]))
def test_alpha_grows_with_the_new_curvature_and_falls_with_the_old(
    xp: Any, segment: Segment, more: Segment, factor: float
) -> None:
    """Stage 2 converged and the mean at theta_gp, whatever is added to either curvature, and wherever."""
    extra = [factor * float(np.abs(value).max()) for value in more.fisher_new.values()]

    def raised(tree: dict[str, Any]) -> dict[str, Any]:
        return {name: value + extra[index % len(extra)] for index, (name, value) in enumerate(tree.items())}

    s = segment
    alpha = alpha_of(xp, s, full=False)
    newer = Segment(s.theta_gp, s.theta_hat, s.fisher_old, raised(s.fisher_new), s.gradient, s.mean)
    older = Segment(s.theta_gp, s.theta_hat, raised(s.fisher_old), s.fisher_new, s.gradient, s.mean)
    assert alpha_of(xp, newer, full=False) >= alpha - 1e-14
    assert alpha_of(xp, older, full=False) <= alpha + 1e-14


@given(segment=segments(), unit=st.sampled_from([0.25, 2.0, 1024.0]), scale=st.sampled_from([0.5, 4.0]))
def test_units_change_nothing(xp: Any, segment: Segment, unit: float, scale: float) -> None:
    """Neither that of the loss (a mean or a sum over samples) nor that of the weights (theta' = scale * theta)."""

    def times(tree: dict[str, Any], factor: float) -> dict[str, Any]:
        return {name: value * factor for name, value in tree.items()}

    s = segment
    other = Segment(
        theta_gp=times(s.theta_gp, scale),
        theta_hat=times(s.theta_hat, scale),
        fisher_old=times(s.fisher_old, unit / scale**2),
        fisher_new=times(s.fisher_new, unit / scale**2),
        gradient=times(s.gradient, unit / scale),
        mean=times(s.mean, scale),
    )
    assert alpha_of(xp, other) == alpha_of(xp, s)


def test_the_formula_in_circulation_is_not_the_argmin() -> None:
    """DESIGN section 3: what some accounts print has the wrong sign on the gradient and the wrong Hessian on top."""
    draw = np.random.default_rng(0)
    worse = 0
    for _ in range(10):
        gp, hat, gradient = draw.normal(size=(3, 5))
        old, new = (root @ root.T for root in draw.normal(size=(2, 5, 5)))

        def loss(alpha: float, at: tuple[Any, ...] = (gp, hat, old, new, gradient, gp)) -> float:
            return laplace_loss(alpha, *at)

        best = brute_force_minimiser(loss, -20.0, 20.0)
        ours, circulated = (
            alpha_star(gp, hat, old, new, gradient, gp),
            alpha_in_circulation(gp, hat, old, new, gradient),
        )
        assert ours == pytest.approx(best, abs=1e-6)
        assert loss(ours) < loss(circulated)
        worse += abs(circulated - best) > 0.01
    assert worse >= 9  # where the two happen to meet, it is by accident


@given(segment=segments())
def test_a_float32_model_gets_a_float32_alpha(xp: Any, segment: Segment) -> None:
    assume(segment.curvature > 0)
    trees = (segment.theta_gp, segment.theta_hat, segment.fisher_old, segment.fisher_new)
    single = [{n: xp.astype(v, xp.float32) for n, v in to_xp(xp, tree).items()} for tree in trees]
    alpha = optimal_alpha(*single)
    assert alpha.dtype == xp.float32
    assert float(alpha) == pytest.approx(alpha_of(xp, segment, full=False), abs=1e-6)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_reduces_in_single_and_merges_in_half(xp: Any, name: str) -> None:
    if not hasattr(xp, name):
        pytest.skip(f"this backend has no {name}")
    half = getattr(xp, name)
    # 4096 * 16 = 65536 would overflow float16, and stop growing in bfloat16.
    zeros, fours, ones = (xp.full((4096,), value, dtype=half) for value in (0.0, 4.0, 1.0))
    alpha = optimal_alpha(zeros, fours, 3 * ones, ones)
    assert alpha.dtype == xp.float32
    assert float(alpha) == 0.25
    merged = merge(zeros, fours, alpha)
    assert merged.dtype == half
    assert bool(xp.all(merged == 1.0))


def test_a_nested_tree_is_a_tree(xp: Any) -> None:
    tree = {"encoder": [xp.asarray([1.0, 2.0]), {"weight": xp.asarray(3.0)}], "head": (xp.asarray([4.0]),)}
    flat = xp.asarray([1.0, 2.0, 3.0, 4.0])
    double = {"encoder": [xp.asarray([2.0, 4.0]), {"weight": xp.asarray(6.0)}], "head": (xp.asarray([8.0]),)}
    assert float(optimal_alpha(tree, double, tree, double)) == float(optimal_alpha(flat, 2 * flat, flat, 2 * flat))
    merged = merge(tree, double, 0.5)
    assert to_numpy(merged["encoder"][1]["weight"]) == 4.5
    assert isinstance(merged["head"], tuple)


def test_a_state_dict_meets_a_plain_dictionary(xp: Any) -> None:
    ordered = OrderedDict(b=xp.asarray(1.0), a=xp.asarray(2.0))
    plain = {"a": xp.asarray(4.0), "b": xp.asarray(3.0)}
    merged = merge(ordered, plain, 0.5)
    assert {name: float(value) for name, value in merged.items()} == {"a": 3.0, "b": 2.0}


@given(segment=segments(), alpha=st.sampled_from([0.0, 0.25, 0.5, 0.875, 1.0]), as_array=st.booleans())
def test_merge_is_the_convex_combination(xp: Any, segment: Segment, alpha: float, as_array: bool) -> None:
    given_alpha = xp.asarray(alpha, dtype=xp.float64) if as_array else alpha
    merged = merge(to_xp(xp, segment.theta_gp), to_xp(xp, segment.theta_hat), given_alpha)
    for name, stable in segment.theta_gp.items():
        np.testing.assert_array_equal(to_numpy(merged[name]), (1 - alpha) * stable + alpha * segment.theta_hat[name])


@given(
    pair=few_if_compiled(st.integers(1, 5), [1, 5]).flatmap(
        lambda size: st.tuples(*[st.tuples(*[st.floats(-1e3, 1e3, width=32)] * 2)] * size)
    ),
    alpha=st.floats(0, 1, width=32),
    as_array=st.booleans(),
)
def test_merge_is_exact_at_its_ends_and_where_the_models_agree(
    xp: Any, pair: tuple[tuple[float, float], ...], alpha: float, as_array: bool
) -> None:
    stable, plastic = (xp.asarray(list(values), dtype=xp.float32) for values in zip(*pair, strict=True))

    def of(value: float) -> Any:
        return xp.asarray(value, dtype=xp.float32) if as_array else value

    assert bool(xp.all(merge(stable, plastic, of(0.0)) == stable))
    assert bool(xp.all(merge(stable, plastic, of(1.0)) == plastic))
    # Parameters that stage 2 left alone, another task's head say, keep their bits.
    assert bool(xp.all(merge(stable, stable, of(alpha)) == stable))


def test_merge_changes_neither_model(xp: Any) -> None:
    stable, plastic = xp.asarray([1.0, 2.0]), xp.asarray([3.0, 4.0])
    merge(stable, plastic, 0.5)
    optimal_alpha(stable, plastic, stable, plastic)
    assert to_numpy(stable).tolist() == [1.0, 2.0]
    assert to_numpy(plastic).tolist() == [3.0, 4.0]


NAMES = ["theta_gp", "theta_hat", "fisher_old", "fisher_new", "gradient", "mean"]


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda xp, tree: {"w": tree["w"]}, "{name} lacks the leaf 'b' that theta_gp has; give equal structures."),
        (
            lambda xp, tree: tree | {"c": tree["b"]},
            "{name} has a leaf 'c' that theta_gp lacks; give equal structures.",
        ),
        (
            lambda xp, tree: tree | {"b": xp.ones((3,))},
            "{name} 'b' has shape (3,) but theta_gp 'b' has (2,); make them equal.",
        ),
        (
            lambda xp, tree: tree | {"b": 1.0},
            "{name} 'b' is a builtins.float, not an array of a known framework.",
        ),
    ],
)
def test_mismatched_trees_name_the_leaf(xp: Any, name: str, spoil: Callable[..., Any], message: str) -> None:
    trees: dict[str, Any] = {key: {"w": xp.ones((2, 2)), "b": xp.ones((2,))} for key in NAMES}
    trees[name] = spoil(xp, trees[name])
    with pytest.raises(BecameError) as raised:
        optimal_alpha(**trees)
    assert str(raised.value) == message.format(name=name)


@pytest.mark.parametrize("name", NAMES)
def test_integer_arrays_are_refused(xp: Any, name: str) -> None:
    trees: dict[str, Any] = {key: {"w": xp.ones((2,))} for key in NAMES}
    trees[name] = {"w": xp.ones((2,), dtype=xp.int64)}
    with pytest.raises(
        BecameError, match=rf"^{name} 'w' has dtype .*int64; it must hold real floating-point numbers\.$"
    ):
        optimal_alpha(**trees)


@pytest.mark.parametrize("name", ["fisher_old", "fisher_new"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_negative_or_nan_curvatures_are_refused(xp: Any, name: str, value: float) -> None:
    trees: dict[str, Any] = {key: {"w": xp.ones((2,))} for key in NAMES}
    trees[name] = {"w": xp.asarray([1.0, value])}
    with pytest.raises(BecameError, match=rf"^{name} 'w' has negative or NaN entries; .* must be at least 0\.$"):
        optimal_alpha(**trees)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(xp: Any, name: str, value: float) -> None:
    trees: dict[str, Any] = {key: {"w": xp.ones((2,))} for key in NAMES}
    trees["theta_hat"] = {"w": xp.zeros((2,))}
    trees[name] = {"w": xp.asarray([1.0, value])}
    message = "negative or NaN entries" if "fisher" in name and np.isnan(value) else "infinite or not a number"
    with pytest.raises(BecameError, match=rf"^{name} 'w' has .*{message}"):
        optimal_alpha(**trees)


def test_a_sum_beyond_the_dtype_is_refused(xp: Any) -> None:
    huge = xp.asarray([1e30, 1e30], dtype=xp.float32)
    with pytest.raises(BecameError, match=r"^the curvature along theta_gp 'w' is too large for its dtype"):
        optimal_alpha(*({"w": each} for each in (-huge, huge, huge, huge)))


def test_leaves_whose_sum_alone_is_beyond_the_dtype_are_refused(xp: Any) -> None:
    stable, plastic, curvature = (
        {name: xp.full((1,), value, dtype=xp.float64) for name in "ab"} for value in (0.0, 1.0, 5e307)
    )
    assert float(optimal_alpha(stable["a"], plastic["a"], curvature["a"], curvature["a"])) == 0.5
    with pytest.raises(BecameError, match=r"^the curvature along all leaves is too large for its dtype"):
        optimal_alpha(stable, plastic, curvature, curvature)


@pytest.mark.parametrize("name", ["fisher_old", "fisher_new"])
def test_the_offending_one_of_many_leaves_is_named(xp: Any, name: str) -> None:
    trees: dict[str, Any] = {
        role: {f"layer{index}": xp.full((2, 3), 0.25 + index) for index in range(5)}
        for role in ("theta_gp", "theta_hat", "fisher_old", "fisher_new")
    }
    trees[name]["layer3"] = -trees[name]["layer3"]
    with pytest.raises(BecameError, match=rf"^{name} 'layer3' has negative or NaN entries"):
        optimal_alpha(**trees)


def test_mixed_frameworks_are_refused(xp: Any) -> None:
    other = np.ones(2) if xp is array_api_strict else array_api_strict.ones(2)
    with pytest.raises(BecameError, match=r"^theta_gp is an array of .* but theta_hat is one of .*; give arrays of a"):
        optimal_alpha(xp.ones((2,)), other, xp.ones((2,)), xp.ones((2,)))
    with pytest.raises(BecameError, match=r"^theta_gp is an array of .* but theta_hat is one of .*; give arrays of a"):
        merge(xp.ones((2,)), other, 0.5)


def test_merge_refuses_what_does_not_fit(xp: Any) -> None:
    with pytest.raises(BecameError, match=r"^theta_hat has shape \(3,\) but theta_gp has \(2,\); make them equal\.$"):
        merge(xp.ones((2,)), xp.ones((3,)), 0.5)
    with pytest.raises(BecameError, match=r"^theta_hat 'w' has dtype .*int64; it must hold real floating-point"):
        merge({"w": xp.ones((2,))}, {"w": xp.ones((2,), dtype=xp.int64)}, 0.5)
    with pytest.raises(BecameError, match=r"^theta_hat is nested otherwise than theta_gp; give equal structures\.$"):
        merge([xp.ones((2,))], (xp.ones((2,)),), 0.5)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_a_coefficient_that_is_no_number_is_refused(xp: Any, alpha: float) -> None:
    stable, plastic = ({"w": xp.asarray([value])} for value in (1.0, 2.0))
    with pytest.raises(BecameError, match=r"^alpha is (nan|inf); it must be a finite number\.$"):
        merge(stable, plastic, alpha)
    with pytest.raises(BecameError, match=r"^alpha is infinite or not a number; it must be finite\.$"):
        merge(stable, plastic, xp.asarray(alpha))
    with pytest.raises(BecameError, match=r"^alpha 'w' is (nan|inf)"):
        merge(stable, plastic, {"w": alpha})


@pytest.mark.parametrize("coefficients", [[1, 1, 1], [0.5, 0.5, 0.5], [float("nan"), 0.5, 0.5], [0.2, 0.2, 0.2]])
def test_coefficients_that_do_not_sum_to_one_are_refused(xp: Any, coefficients: list[float]) -> None:
    models = [{"w": xp.asarray([value])} for value in (1.0, 2.0, 3.0)]
    for several in (
        coefficients,
        xp.asarray(coefficients, dtype=xp.float64),
        list(np.asarray(coefficients, np.float32)),
    ):
        with pytest.raises(BecameError, match=r"^the coefficients sum to (nan|[0-9.]+); they must sum to 1\.$"):
            combine(models, several)


def test_numbers_of_numpy_are_numbers(xp: Any) -> None:
    stable, plastic = ({"w": xp.asarray([value], dtype=xp.float32)} for value in (1.0, 2.0))
    for number in (np.float32(0.25), np.float64(0.25), np.asarray(0.25)):
        assert to_numpy(merge(stable, plastic, number)["w"]).tolist() == [1.25]
        assert to_numpy(merge(stable, plastic, {"w": number})["w"]).tolist() == [1.25]
    assert to_numpy(combine([stable, plastic], list(np.asarray([0.75, 0.25], np.float32)))["w"]).tolist() == [1.25]


def _state_dict(xp: Any, value: float, count: int) -> dict[str, Any]:
    """Return a state dict as a batch norm and a layer with a mask have it."""
    return {
        "bn.weight": xp.full((2,), value),
        "bn.running_var": xp.full((2,), 3 * value),
        "bn.num_batches_tracked": xp.asarray(count),
        "fc.mask": xp.asarray([count > 5, True]),
    }


def test_integers_are_carried_over_by_a_merge(xp: Any) -> None:
    models = _state_dict(xp, 1.0, 3), _state_dict(xp, 2.0, 7)
    for alpha, count in ((0.25, 3), (0.75, 7), (xp.asarray(0.75), 7), (np.float32(0.25), 3)):
        merged = merge(*models, alpha)
        assert int(merged["bn.num_batches_tracked"]) == count
        assert merged["bn.num_batches_tracked"].dtype == models[0]["bn.num_batches_tracked"].dtype
        assert to_numpy(merged["fc.mask"]).tolist() == [count > 5, True]
        np.testing.assert_allclose(to_numpy(merged["bn.running_var"]), 3 * (1 + float(alpha)), rtol=1e-6)
    assert int(combine(models, [0.75, 0.25])["bn.num_batches_tracked"]) == 7


@pytest.mark.parametrize("whole", [True, False])
def test_what_no_optimiser_moves_has_no_part_in_alpha(xp: Any, whole: bool) -> None:
    models = _state_dict(xp, 1.0, 3), _state_dict(xp, 2.0, 7)
    fishers = _state_dict(xp, 2.0, 1), _state_dict(xp, 6.0, 1)
    old, new = fishers if whole else ({"bn.weight": fisher["bn.weight"]} for fisher in fishers)
    assert float(optimal_alpha(*models, old, new)) == 0.75
    by_leaf = optimal_alpha(*models, old, new, per="leaf")
    assert {name: float(alpha) for name, alpha in by_leaf.items()} == {
        name: 0.75 * (name == "bn.weight") for name in old | models[0]
    }
    by_layer = optimal_alpha(*models, old, new, per="layer")
    assert {name: float(alpha) for name, alpha in by_layer.items()} == {n: 0.75 * n.startswith("bn") for n in models[0]}
    assert int(merge(*models, by_layer)["bn.num_batches_tracked"]) == 7


class _Whole(Diagonal):
    """A diagonal that does not know how to be parted, as a precision of a user's own may not."""

    def _split(self, names: Collection[str]) -> Any:
        return None


@pytest.mark.parametrize("kind", ["diagonal", "whole", "isotropic", "low rank", "dense", "sum"])
def test_what_no_optimiser_moves_has_no_part_in_alpha_by_a_precision_that_covers_it(xp: Any, kind: str) -> None:
    models = _state_dict(xp, 1.0, 3), _state_dict(xp, 2.0, 7)
    named = {"bn.weight": xp.asarray([2.0, 4.0]), "bn.running_var": xp.asarray([5.0, 7.0])}
    ones = {name: xp.ones((2,)) for name in named}
    low_rank = LowRank({name: xp.ones((2, 1)) for name in named}, xp.asarray([2.0]), Diagonal(ones))
    precisions: dict[str, Precision] = {
        "diagonal": Diagonal(named),
        "whole": _Whole(named),
        "isotropic": Isotropic.over(named, 3.0),
        "low rank": low_rank,
        "dense": Dense.of(low_rank),
        "sum": Sum((low_rank, Diagonal({"bn.running_var": named["bn.running_var"]}))),
    }
    # delta.P_old.delta, of the weights alone: the sum of a diagonal, or of all entries of 2 [[1, 1], [1, 1]] + I.
    old = 6.0 if kind in ("diagonal", "whole", "isotropic") else 10.0
    new = {"bn.weight": xp.asarray([1.0, 1.0])}
    assert float(optimal_alpha(*models, precisions[kind], new)) == pytest.approx(2 / (old + 2))
    by_leaf = optimal_alpha(*models, precisions[kind], new, per="leaf")
    assert {name: float(alpha) for name, alpha in by_leaf.items()} == {
        name: pytest.approx(2 / (old + 2) * (name == "bn.weight")) for name in models[0]
    }
    assert float(optimal_alpha(*models, new, precisions[kind])) == pytest.approx(old / (old + 2))


def test_a_precision_of_nothing_that_an_optimiser_moves_is_refused(xp: Any) -> None:
    models = _state_dict(xp, 1.0, 3), _state_dict(xp, 2.0, 7)
    statistics = Diagonal({"bn.running_var": xp.ones((2,))})
    with pytest.raises(BecameError, match=r"the precision covers bn\.running_var alone, and none of the parameters"):
        optimal_alpha(*models, statistics, {"bn.weight": xp.ones((2,))})


def test_sparse_and_masked_arrays_are_refused(backend: str, xp: Any) -> None:
    if backend == "torch":
        gaps = xp.ones((2,)).to_sparse()
    elif backend == "numpy":
        gaps = np.ma.masked_array([1.0, 2.0], [True, False])
    else:
        pytest.skip("this backend has no such arrays")
    for models in ((gaps, xp.ones((2,))), (xp.ones((2,)), gaps)):
        with pytest.raises(BecameError, match=r"^theta_(gp|hat) is a sparse or masked array; give one with all its"):
            merge(*models, 0.5)
        with pytest.raises(BecameError, match=r"^theta_(gp|hat) is a sparse or masked array; give one with all its"):
            optimal_alpha(*models, xp.ones((2,)), xp.ones((2,)))


def test_models_on_two_devices_are_refused(backend: str, xp: Any) -> None:
    if backend != "torch":
        pytest.skip("this backend has one device here, or computes with arrays of several")
    here, there = {"w": xp.ones((2,))}, {"w": xp.ones((2,), device="meta")}
    message = rf"^{{}} 'w' is on {here['w'].device} but {{}} 'w' on meta; move both to one device\.$"
    with pytest.raises(BecameError, match=message.format("theta_gp", "theta_hat")):
        merge(here, there, 0.5)
    with pytest.raises(BecameError, match=message.format("theta_gp", "fisher_new")):
        optimal_alpha(here, here, here, there)
    with pytest.raises(BecameError, match=message.format("model 0", "model 1")):
        combine([here, there], [0.5, 0.5])


def test_gradients_flow(backend: str) -> None:
    if backend != "torch":
        pytest.skip("this backend has no automatic differentiation")
    import torch

    draw = torch.Generator(torch.get_default_device()).manual_seed(0)
    inputs = [torch.rand(5, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(6)]

    def alpha(gp: Any, hat: Any, old: Any, new: Any, gradient: Any, mean: Any) -> Any:
        return optimal_alpha(gp, hat, old, new, gradient=0.1 * gradient, mean=gp + 0.1 * mean, clip=False)

    assert torch.autograd.gradcheck(alpha, inputs)
    assert torch.autograd.gradcheck(lambda *four: optimal_alpha(*four), inputs[:4])
    assert torch.autograd.gradcheck(lambda gp, hat: merge(gp, hat, 0.3), inputs[:2])
    equal = inputs[0]
    (gradient,) = torch.autograd.grad(optimal_alpha(equal, equal.detach(), inputs[2], inputs[3]), equal)
    assert bool(torch.all(gradient == 0))  # and not NaN, where nothing is curved


@pytest.mark.parametrize("alpha", [[0.5], [0.0, 0.5, 1.0]])
def test_an_alpha_with_axes_is_refused_and_not_broadcast(xp: Any, alpha: list[float]) -> None:
    stable, plastic = ({"w": xp.full((2, 3), value), "s": xp.asarray(value)} for value in (0.0, 1.0))
    number = xp.asarray(alpha)
    expected = re.escape(f"alpha has shape ({len(alpha)},); give a number or a 0-d array, or a tree of them, one for")
    with pytest.raises(BecameError, match=f"^{expected}"):
        merge(stable, plastic, number)
    with pytest.raises(BecameError, match=r"^alpha 'w' has shape \(\d,\); give a number"):
        merge(stable, plastic, {"w": number, "s": number[0]})
    merged = merge(stable, plastic, {"w": number[0], "s": number[0]})
    assert [tuple(merged[name].shape) for name in ("w", "s")] == [(2, 3), ()]
