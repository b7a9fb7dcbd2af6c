"""What one process with four processor devices checks of arrays spread over them: the work of ``test_sharded.py``.

Convention: every check compares with whole arrays on one device, and counts the collectives of the compiled program.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from became_core import merge, optimal_alpha, path_quadratic
from became_core.laplace import Became, LaplacePosterior
from became_core.laplace.estimators import Calibrated, DiagonalFisher, NativeExpansion, PaperClosedForm, Secant
from became_core.precision import Dense, Diagonal, Isotropic, Kronecker, LowRank, Precision

SHAPES = {"fc.weight": (8, 4), "fc.bias": (4,), "out.weight": (3, 8), "conv.weight": (4, 2, 3, 3)}
SPECS = {"fc.weight": P("data"), "fc.bias": P(), "out.weight": P(None, "data"), "conv.weight": P("data")}
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
Trees = dict[str, Any]


def drawn(seed: int, positive: bool = False) -> Trees:
    generator = np.random.default_rng(seed)
    values = {name: generator.standard_normal(shape) for name, shape in SHAPES.items()}
    return {name: jnp.asarray(np.abs(value) if positive else value) for name, value in values.items()}


def collectives(function: Callable[..., Any], *arguments: Any) -> tuple[Any, dict[str, int]]:
    """What a compiled function returns, and how many collectives of each kind its program has."""
    program = jax.jit(function).lower(*arguments).compile()
    text = program.as_text()
    counts = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in COLLECTIVES}
    return program(*arguments), {kind: count for kind, count in counts.items() if count}


def check_close(left: Any, right: Any) -> None:
    np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=1e-11, atol=1e-12)


def check_collectives(name: str, counts: dict[str, int], most: int = 2) -> None:
    assert set(counts) <= {"all-reduce"}, f"{name}: {counts}"
    assert sum(counts.values()) <= most, f"{name}: {counts}"


def precisions() -> Iterator[Precision]:
    diagonal = Diagonal(drawn(9, positive=True))
    yield diagonal
    yield Isotropic({name: jnp.asarray(0.5) for name in SHAPES}, SHAPES)
    columns = {name: jnp.stack([drawn(20)[name], drawn(21)[name]], axis=-1) for name in ("fc.weight", "conv.weight")}
    yield LowRank(columns, jnp.asarray([2.0, 0.5]), diagonal)
    kronecker = {}
    for name in ("fc.weight", "out.weight", "conv.weight"):
        inputs, outputs = (jnp.reshape(drawn(seed)[name], (SHAPES[name][0], -1)) for seed in (30, 31))
        kronecker[name] = (inputs.T @ inputs, outputs @ outputs.T)
    yield Kronecker(kronecker)
    vector = jnp.concatenate([jnp.ravel(value) for _, value in sorted(drawn(40).items())])
    yield Dense(jnp.outer(vector, vector) + jnp.eye(len(vector)), SHAPES)


def main() -> None:
    """Run every check."""
    jax.config.update("jax_enable_x64", True)
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    assert mesh.size == 4

    def spread(tree: Any) -> Any:
        """Spread the arrays of parameters' shapes; what else there is, is whole on every device."""

        def place(value: Any) -> Any:
            spec = next((SPECS[name] for name, shape in SHAPES.items() if shape == value.shape), P())
            return jax.device_put(value, NamedSharding(mesh, spec))

        return jax.tree.map(place, tree)

    trees = [drawn(1), drawn(2), drawn(3, True), drawn(4, True)]
    more = {"gradient": drawn(5), "mean": drawn(6)}
    own, own_more = spread(trees), spread(more)
    expected = optimal_alpha(*trees, **more)
    alpha, counts = collectives(lambda trees, more: optimal_alpha(*trees, **more), own, own_more)
    check_close(alpha, expected)
    check_collectives("optimal_alpha", counts)
    check_close(optimal_alpha(*own, **own_more), expected)  # without a compiled function around it
    by_layer, counts = collectives(lambda trees: optimal_alpha(*trees, per="layer"), own)
    check_collectives("optimal_alpha per layer", counts)
    merged, counts = collectives(lambda trees, alpha: merge(*trees, alpha), own[:2], by_layer)
    check_collectives("merge", counts, most=0)
    for name, value in merge(*trees[:2], optimal_alpha(*trees, per="layer")).items():
        check_close(merged[name], value)
        assert merged[name].sharding.is_equivalent_to(own[0][name].sharding, value.ndim)
    for precision in precisions():
        name, shared = type(precision).__name__, spread(precision)
        gram, counts = collectives(lambda precision, trees: precision.gram(trees), shared, own[:3])
        check_close(gram, precision.gram(trees[:3]))
        if not precision.couples:  # else devices exchange entries, in the way that XLA chooses
            check_collectives(f"gram of {name}", counts)
        posterior = LaplacePosterior(own[0], shared), own[1], shared
        updated, counts = collectives(lambda old, theta, new: old.update(theta, new, weight=3.0), *posterior)
        check_collectives(f"update of {name}", counts)
        # Kronecker(A, G) does not add to itself into one product, but the sum's Gram matrix is known all the same.
        check_close(updated.precision.gram(own[:1]), 4.0 * precision.gram(trees[:1]))
    losses = [LaplacePosterior(drawn(seed), Diagonal(drawn(seed, True))) for seed in (1, 2, 3)]
    models = [loss.mean for loss in losses]
    for estimator in (Secant(), Calibrated(), DiagonalFisher(), NativeExpansion(), PaperClosedForm()):
        rule = Became(estimator)
        arguments = (spread(models[:2]), spread(losses[:2]))
        between, counts = collectives(lambda models, losses, rule=rule: rule.merge(models, losses), *arguments)
        check_collectives(f"Became({type(estimator).__name__})", counts)
        check_close(between.alpha, rule.merge(models[:2], losses[:2]).alpha)
        check_close(rule.merge(spread(models), spread(losses)).alpha, rule.merge(models, losses).alpha)
    check_parts_by_hand(mesh, trees)


def check_parts_by_hand(mesh: Mesh, trees: list[Trees]) -> None:
    """Within ``shard_map`` every device has a part, and ``reduce`` adds the sums."""
    names = [name for name, spec in SPECS.items() if spec != P()]  # parts that all devices have would count four times
    parts = [{name: tree[name] for name in names} for tree in trees]
    specs = {name: SPECS[name] for name in names}

    def reduce(numbers: Any) -> Any:
        return jax.lax.psum(numbers, "data")

    def by_hand(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.shard_map(function, mesh=mesh, in_specs=(specs,) * 4, out_specs=P())

    alpha, counts = collectives(by_hand(lambda *trees: optimal_alpha(*trees, reduce=reduce)), *parts)
    check_collectives("optimal_alpha in shard_map", counts, most=1)
    check_close(alpha, optimal_alpha(*parts))

    def quadratic(*trees: Trees) -> Any:
        return path_quadratic(*trees[:2], Diagonal(trees[2]), Diagonal(trees[3]), reduce=reduce).slope

    slope, counts = collectives(by_hand(quadratic), *parts)
    check_collectives("path_quadratic in shard_map", counts, most=1)
    check_close(slope, path_quadratic(*parts[:2], Diagonal(parts[2]), Diagonal(parts[3])).slope)

    def became(rule: Became, *trees: Trees) -> Any:
        losses = [LaplacePosterior(trees[0], Diagonal(trees[2])), LaplacePosterior(trees[1], Diagonal(trees[3]))]
        return rule.merge(trees[:2], losses).alpha

    alpha, counts = collectives(by_hand(lambda *trees: became(Became(reduce=reduce), *trees)), *parts)
    check_collectives("Became in shard_map", counts)
    check_close(alpha, became(Became(), *parts))


if __name__ == "__main__":
    main()
