"""The algebra under each framework's compiler and transforms: the same numbers as without; values pass through.

One table of cases serves jax.jit, torch.compile and tf.function with XLA.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from became_core import BecameError, Quadratic, merge, optimal_alpha, path_quadratic, subspace_quadratic
from became_core.arrays import named_leaves
from became_core.laplace import (
    Became,
    BecameCurve,
    Dense,
    Diagonal,
    DiagonalFisher,
    Equal,
    FisherMerge,
    Kronecker,
    LaplacePosterior,
    bezier_path,
    combine,
    curve_minimiser,
    predicted_advantage,
)
from tests.backends import to_numpy, to_xp
from tests.compilers import compiled, gradient_of
from tests.quadratics import crossed

DRAW = np.random.default_rng(0)
SHAPES = {"fc1.bias": (2,), "fc1.weight": (2, 3), "fc2.weight": (3, 2)}


def model(low: float) -> dict[str, Any]:
    return {name: DRAW.uniform(low, 1, size=shape) for name, shape in SHAPES.items()}


GP, HAT, GRADIENT, MEAN = (model(-1.0) for _ in range(4))
OLD, NEW = (model(0.0) for _ in range(2))
ROOT = DRAW.normal(size=(14, 14))
A, G = (root @ root.T for root in (DRAW.normal(size=(3, 3)), DRAW.normal(size=(2, 2))))
SLOPE = DRAW.normal(size=3)
CURVATURE = (lambda root: root @ root.T)(DRAW.normal(size=(3, 3)))


# More directions than have their faces enumerated, and how far out: so far that some are held and some are not.
MANY = {"box": (6, 0.5), "simplex": (10, 0.1)}


def difference(left: Any, right: Any) -> Any:
    return {name: value - right[name] for name, value in left.items()}


def clients(gp: Any, hat: Any, old: Any, new: Any) -> tuple[list[Any], list[LaplacePosterior]]:
    middle = merge(gp, hat, 0.5)
    losses = [LaplacePosterior(theta, Diagonal(f)) for theta, f in ((gp, old), (hat, new), (middle, old))]
    return [gp, hat, middle], losses


def pair(gp: Any, hat: Any, old: Any, new: Any) -> tuple[list[Any], list[LaplacePosterior]]:
    models, losses = clients(gp, hat, old, new)
    return models[:2], losses[:2]


CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "alpha": (lambda *four: optimal_alpha(*four), (GP, HAT, OLD, NEW)),
    "alpha, full": (
        lambda gp, hat, old, new, g, mu: optimal_alpha(gp, hat, old, new, gradient=g, mean=mu, clip=False),
        (GP, HAT, OLD, NEW, GRADIENT, MEAN),
    ),
    "alpha per layer": (lambda *four: optimal_alpha(*four, per="layer"), (GP, HAT, OLD, NEW)),
    "alpha, dense": (
        lambda gp, hat, root, new: optimal_alpha(gp, hat, Dense(root, SHAPES), new),
        (GP, HAT, ROOT @ ROOT.T, NEW),
    ),
    "alpha, kronecker": (
        lambda gp, hat, a, g, new: optimal_alpha(
            {"fc1.weight": gp["fc1.weight"]},
            {"fc1.weight": hat["fc1.weight"]},
            Kronecker({"fc1.weight": (a, g)}).damped(0.1),
            {"fc1.weight": new["fc1.weight"]},
        ),
        (GP, HAT, A, G, NEW),
    ),
    "quadratic": (lambda *four: path_quadratic(*four), (GP, HAT, OLD, NEW)),
    "subspace": (
        lambda gp, hat, mu, old: subspace_quadratic([difference(gp, mu), difference(hat, mu)], Diagonal(old)),
        (GP, HAT, MEAN, OLD),
    ),
    "free": (lambda b, c: Quadratic(b, c).minimiser(), (SLOPE, CURVATURE)),
    "box": (lambda b, c: Quadratic(b, c).minimiser("box"), (SLOPE[:1], CURVATURE[:1, :1])),
    "checks": (
        lambda b, c: (
            Quadratic(b, c).is_convex,
            Quadratic(b, c).has_interior_optimum,
            Quadratic(b, c).predicted_gain(None),
        ),
        (SLOPE, CURVATURE),
    ),
    "merge": (lambda gp, hat: merge(gp, hat, 0.3), (GP, HAT)),
    "merge at alpha": (lambda gp, hat, old, new: merge(gp, hat, optimal_alpha(gp, hat, old, new)), (GP, HAT, OLD, NEW)),
    "combine": (lambda gp, hat, b: combine([gp, hat, gp], b / (b[0] + b[1] + b[2])), (GP, HAT, SLOPE)),
    "equal": (lambda *four: Equal().merge(*clients(*four)).theta, (GP, HAT, OLD, NEW)),
    "fisher merge": (lambda *four: FisherMerge().merge(*clients(*four)).theta, (GP, HAT, OLD, NEW)),
    "became": (lambda *four: Became(DiagonalFisher()).merge(*pair(*four)), (GP, HAT, OLD, NEW)),
    "curve": (lambda *four: bezier_path(*four).at(0.5), (GP, HAT, OLD, NEW)),
    "minimum of a curve": (lambda b, c: curve_minimiser(Quadratic(b, c)), (SLOPE[:2], CURVATURE[:2, :2])),
    "became, curve": (lambda *four: BecameCurve(DiagonalFisher()).merge(*pair(*four)), (GP, HAT, OLD, NEW)),
    "became, weights": (
        lambda *four: Became(DiagonalFisher(), "weight", shrinkage=0.3).merge(*pair(*four)).theta,
        (GP, HAT, OLD, NEW),
    ),
    "advantage": (lambda *four: predicted_advantage(*four), (GP, HAT, OLD, NEW)),
}


def leaves(result: Any) -> list[Any]:
    return [to_numpy(leaf) for leaf in named_leaves(result).values()]


def given(xp: Any, arguments: tuple[Any, ...]) -> list[Any]:
    return [to_xp(xp, argument) for argument in arguments]


@pytest.mark.parametrize("case", CASES)
def test_compiled_is_as_plain(backend: str, xp: Any, case: str) -> None:
    function, arguments = CASES[case]
    plain = function(*given(xp, arguments))
    through = compiled(backend, function)(*given(xp, arguments))
    assert type(through) is type(plain)  # a value comes out as the value it is
    for expected, found in zip(leaves(plain), leaves(through), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_values_go_in_and_come_out(backend: str, xp: Any) -> None:
    """A posterior, a precision and a quadratic as arguments and results of a compiled function."""
    posterior = LaplacePosterior(to_xp(xp, MEAN), Diagonal(to_xp(xp, OLD)))
    kronecker = Kronecker({"fc1.weight": (to_xp(xp, A), to_xp(xp, G))})

    def step(before: Any, factors: Any, theta: Any, fisher: Any, quadratic: Any) -> Any:
        after = before.update(theta, Diagonal(fisher), decay=0.5)
        return after, factors * 2.0, quadratic + after.quadratic(theta, [before.mean])

    quadratic = Quadratic(to_xp(xp, SLOPE[:1]), to_xp(xp, CURVATURE[:1, :1]))
    arguments = (posterior, kronecker, to_xp(xp, GP), to_xp(xp, NEW), quadratic)
    plain, through = step(*arguments), compiled(backend, step)(*arguments)
    for expected, found in zip(plain, through, strict=True):
        assert type(found) is type(expected)
        for left, right in zip(leaves(expected), leaves(found), strict=True):
            np.testing.assert_allclose(right, left, rtol=1e-12)
    again = through[0].update(to_xp(xp, GP), Diagonal(to_xp(xp, NEW)))  # it is as good as any
    assert float(again.loss(to_xp(xp, HAT))) > 0


def test_a_gain_of_nothing_is_no_negative_zero_when_compiled(backend: str, xp: Any) -> None:
    function = compiled(backend, lambda b, c: Quadratic(b, c).predicted_gain("box"))
    assert str(float(function(xp.asarray([1.0]), xp.asarray([[4.0]])))) == "0.0"


def test_nothing_is_checked_under_a_trace_but_structure(backend: str, xp: Any) -> None:
    bad = to_xp(xp, {name: -value - 1 for name, value in OLD.items()})
    arguments = [*given(xp, (GP, HAT)), bad, to_xp(xp, NEW)]
    function = compiled(backend, lambda *four: optimal_alpha(*four))
    with pytest.raises(BecameError, match=r"fisher_old 'fc1\.bias' has negative or NaN entries"):
        optimal_alpha(*arguments)
    assert np.isfinite(float(function(*arguments)))


@pytest.mark.parametrize("constraint", ["box", "simplex"])
def test_coupled_directions_are_refused_under_a_trace(backend: str, xp: Any, constraint: Any) -> None:
    """What is free depends on values: a wrong answer, or one without derivatives, would go unnoticed."""
    function = compiled(backend, lambda b, c: Quadratic(b, c).minimiser(constraint))
    with pytest.raises(Exception, match=f"a minimum along 3 directions with the constraint '{constraint}' depends on"):
        function(*given(xp, (SLOPE, CURVATURE)))


def test_alpha_is_differentiated_alike_everywhere(backend: str, xp: Any) -> None:
    """d alpha / d theta_hat by each framework's automatic differentiation, against finite differences in NumPy."""
    name = "fc1.weight"
    four = [{name: tree[name]} for tree in (GP, HAT, OLD, NEW)]
    gp, _, old, new = given(xp, tuple(four))
    slope = gradient_of(backend, lambda hat: optimal_alpha(gp, {name: hat}, old, new))
    found = to_numpy(slope(to_xp(xp, HAT[name])))
    for index in np.ndindex(HAT[name].shape):
        step = np.zeros_like(HAT[name])
        step[index] = 1e-6
        ends = [float(optimal_alpha(four[0], {name: HAT[name] + s * step}, four[2], four[3])) for s in (-1, 1)]
        assert found[index] == pytest.approx((ends[1] - ends[0]) / 2e-6, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("constraint", ["box", "simplex"])
@pytest.mark.parametrize("many", [False, True])
def test_constrained_minimisers_are_differentiated(backend: str, xp: Any, constraint: Any, many: bool) -> None:
    """By the slope and by the curvature, along the free coefficients only, where there are values."""
    if backend == "jax":
        pytest.skip("jax.grad traces, and coupled directions are refused under a trace")
    few = (np.array([-1.0, 3.0, -0.5]), np.diag([2.0, 1.0, 1.0]) + 0.1)
    slope, curvature = crossed(*MANY[constraint], np.random.default_rng(3)) if many else few
    weights, size = np.arange(1.0, len(slope) + 1), len(slope)

    def there(packed: Any) -> Any:
        b, c = packed[:size], np.reshape(packed[size:], (size, size))
        return float(weights @ Quadratic(b, 0.5 * (c + c.T)).minimiser(constraint))

    def total(packed: Any) -> Any:
        c = xp.reshape(packed[size:], (size, size))
        quadratic = Quadratic(packed[:size], 0.5 * (c + xp.matrix_transpose(c)))
        return xp.sum(to_xp(xp, weights) * quadratic.minimiser(constraint))

    packed = np.concatenate([slope, curvature.ravel()])
    gradient = to_numpy(eager_gradient(backend, total, to_xp(xp, packed)))
    assert np.abs(gradient[:size]).max() > 0.1
    for index in range(len(packed)):
        step = 1e-6 * np.eye(len(packed))[index]
        expected = (there(packed + step) - there(packed - step)) / 2e-6
        assert gradient[index] == pytest.approx(expected, rel=1e-4, abs=1e-7)


def eager_gradient(backend: str, function: Callable[[Any], Any], value: Any) -> Any:
    """The gradient by the framework's tape, which records values and hides none."""
    if backend == "torch":
        import torch

        value.requires_grad_()
        return torch.autograd.grad(function(value), value)[0]
    return gradient_of(backend, function)(value)


def test_alphas_of_many_models_at_once(backend: str, xp: Any) -> None:
    """Vectorised over candidates for theta_hat, in JAX and PyTorch."""
    if backend not in ("jax", "torch"):
        pytest.skip("this backend has no vmap")
    name = "fc1.weight"
    gp, old, new = (to_xp(xp, {name: tree[name]}) for tree in (GP, OLD, NEW))
    candidates = np.stack([HAT[name] * factor for factor in (0.5, 1.0, 2.0)])

    def alpha(hat: Any) -> Any:
        return optimal_alpha(gp, {name: hat}, old, new)

    if backend == "jax":
        import jax

        found = jax.vmap(alpha)(to_xp(xp, candidates))
    else:
        import torch

        found = torch.func.vmap(alpha)(to_xp(xp, candidates))
    np.testing.assert_allclose(to_numpy(found), [float(alpha(to_xp(xp, each))) for each in candidates], rtol=1e-12)
