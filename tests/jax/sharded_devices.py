"""What one process with four processor devices checks of arrays spread over them: the work of ``test_sharded.py``.

Its argument is a folder for what it writes. With ``JAX_PROCESS_ID`` it is one of two processes with a device each,
which check the functions around a user's loop.

Convention: every check compares with whole arrays of NumPy, and counts the collectives of the compiled program.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from adapters.jax import memory as memories
from adapters.jax import own_loop
from adapters.jax.trees import here
from became_core import BecameError, merge, optimal_alpha, path_quadratic
from became_core.laplace import Became, LaplacePosterior
from became_core.laplace.estimators import PaperClosedForm, Secant
from became_core.precision import Dense, Diagonal, Isotropic, Kronecker, LowRank, Precision

SHAPES = {"fc.weight": (8, 4), "fc.bias": (4,), "out.weight": (3, 8), "conv.weight": (4, 2, 3, 3)}
SPECS = {"fc.weight": P("data"), "fc.bias": P(), "out.weight": P(None, "data"), "conv.weight": P("data")}
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
Trees = dict[str, Any]


def drawn(seed: int, positive: bool = False) -> Trees:
    generator = np.random.default_rng(seed)
    values = {name: generator.standard_normal(shape) for name, shape in SHAPES.items()}
    return {name: np.abs(value) for name, value in values.items()} if positive else values


def collectives(function: Callable[..., Any], *arguments: Any) -> tuple[Any, dict[str, int]]:
    """What a compiled function returns, and how many collectives of each kind its program has."""
    program = jax.jit(function).lower(*arguments).compile()
    text = program.as_text()
    counts = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in COLLECTIVES}
    return program(*arguments), {kind: count for kind, count in counts.items() if count}


def gathered(array: Any) -> Any:
    """The whole of an array that processes share."""
    return process_allgather(array, tiled=True)


def check_close(left: Any, right: Any) -> None:
    np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=1e-11, atol=1e-12)


def check_collectives(name: str, counts: dict[str, int], most: int = 2) -> None:
    assert set(counts) <= {"all-reduce"}, f"{name}: {counts}"
    assert sum(counts.values()) <= most, f"{name}: {counts}"


def precisions() -> Iterator[Precision]:
    diagonal = Diagonal(drawn(9, positive=True))
    yield diagonal
    yield Isotropic({name: np.asarray(0.5) for name in SHAPES}, SHAPES)
    columns = {name: np.stack([drawn(20)[name], drawn(21)[name]], axis=-1) for name in ("fc.weight", "conv.weight")}
    yield LowRank(columns, np.asarray([2.0, 0.5]), diagonal)
    kronecker = {}
    for name in ("fc.weight", "out.weight", "conv.weight"):
        inputs, outputs = (np.reshape(drawn(seed)[name], (SHAPES[name][0], -1)) for seed in (30, 31))
        kronecker[name] = (inputs.T @ inputs, outputs @ outputs.T)
    yield Kronecker(kronecker)
    vector = np.concatenate([np.ravel(value) for _, value in sorted(drawn(40).items())])
    yield Dense(np.outer(vector, vector) + np.eye(len(vector)), SHAPES)


def to_jax(value: Any) -> Any:
    """The same value with JAX's arrays: what is expected is computed by NumPy, which compiles nothing."""
    like = jax.tree.map(jnp.asarray, optimal_alpha(jnp.zeros(1), jnp.ones(1), jnp.ones(1), jnp.ones(1)))
    assert like.shape == ()  # a first array of JAX's has introduced our classes to it
    return jax.tree.map(jnp.asarray, value)


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
    more: dict[str, Any] = {"gradient": drawn(5), "mean": drawn(6)}
    own, own_more = spread(trees), spread(more)
    alpha, counts = collectives(lambda trees, more: optimal_alpha(*trees, **more), own, own_more)
    check_close(alpha, optimal_alpha(*trees, **more))
    check_collectives("optimal_alpha", counts)
    check_close(optimal_alpha(*own), optimal_alpha(*trees))  # without a compiled function around it
    expected = optimal_alpha(*trees, per="layer")
    by_layer, counts = collectives(lambda trees: optimal_alpha(*trees, per="layer"), own)
    check_collectives("optimal_alpha per layer", counts)
    merged, counts = collectives(merge, own[0], own[1], by_layer)
    check_collectives("merge", counts, most=0)
    for name, value in merge(trees[0], trees[1], expected).items():
        check_close(merged[name], value)
        assert merged[name].sharding.is_equivalent_to(own[0][name].sharding, value.ndim)
    for precision in precisions():
        name, shared = type(precision).__name__, spread(to_jax(precision))
        gram, counts = collectives(lambda precision, trees: precision.gram(trees), shared, own[:3])
        check_close(gram, precision.gram(trees[:3]))
        if not precision.couples:  # else devices exchange entries, in the way that XLA chooses
            check_collectives(f"gram of {name}", counts)
    old, new = (LaplacePosterior(own[index], Diagonal(own[index + 2])) for index in (0, 1))
    updated, counts = collectives(lambda old, new: old.update(new.mean, new.precision, weight=3.0), old, new)
    check_collectives("update", counts)
    check_close(updated.precision.values["fc.weight"], 3.0 * trees[3]["fc.weight"] + trees[2]["fc.weight"])
    losses = [LaplacePosterior(drawn(seed), Diagonal(drawn(seed, True))) for seed in (1, 2, 3)]
    models, of_models = [loss.mean for loss in losses], [spread(to_jax(loss)) for loss in losses]
    for rule in (Became(Secant()), Became(PaperClosedForm())):
        arguments = [loss.mean for loss in of_models[:2]], of_models[:2]
        between, counts = collectives(lambda models, losses, rule=rule: rule.merge(models, losses), *arguments)
        check_collectives(f"{rule}", counts)
        check_close(between.alpha, rule.merge(models[:2], losses[:2]).alpha)
    of_three = Became().merge([loss.mean for loss in of_models], of_models)
    check_close(of_three.alpha, Became().merge(models, losses).alpha)
    check_parts_by_hand(mesh, trees)
    check_own_loop(mesh)
    check_explicit_axes()


def check_parts_by_hand(mesh: Mesh, trees: list[Trees]) -> None:
    """Within ``shard_map`` every device has a part, and ``reduce`` adds the sums."""
    names = [name for name, spec in SPECS.items() if spec != P()]  # parts that all devices have would count four times
    parts = [{name: tree[name] for name in names} for tree in trees]
    specs = {name: SPECS[name] for name in names}

    def reduce(numbers: Any) -> Any:
        return jax.lax.psum(numbers, "data")

    def by_hand(function: Callable[..., Any]) -> Any:
        return jax.shard_map(function, mesh=mesh, in_specs=(specs,) * 4, out_specs=P())

    def alpha_of(*trees: Trees, reduce: Any = None) -> Any:
        return optimal_alpha(trees[0], trees[1], trees[2], trees[3], reduce=reduce)

    def slope_of(*trees: Trees, reduce: Any = None) -> Any:
        old, new = Diagonal(trees[2]), Diagonal(trees[3])
        return path_quadratic(trees[0], trees[1], old, new, reduce=reduce).slope

    def became_of(*trees: Trees, reduce: Any = None) -> Any:
        losses = [LaplacePosterior(trees[0], Diagonal(trees[2])), LaplacePosterior(trees[1], Diagonal(trees[3]))]
        return Became(reduce=reduce).merge(trees[:2], losses).alpha

    for function in (alpha_of, slope_of, became_of):
        number, counts = collectives(by_hand(partial(function, reduce=reduce)), *parts)
        check_collectives(f"{function.__name__} in shard_map", counts, most=1)
        check_close(number, function(*parts))


def check_own_loop(mesh: Mesh) -> None:
    """Around a user's own loop, parameters are whole on each device or spread, and so are batches, or NumPy's."""
    rng = np.random.default_rng(0)
    whole = {name: rng.normal(size=(8, 8)) / 3 for name in ("first", "last")}
    old, new = ([(rng.normal(size=(8, 8)), rng.integers(0, 8, size=8)) for _ in range(2)] for _ in range(2))

    def apply(params: Any, inputs: Any) -> Any:
        return jnp.tanh(inputs @ params["first"]) @ params["last"].T

    def learned(params: Any, old: Any, new: Any) -> tuple[Any, memories.Memory]:
        memory = memories.remember(apply, params, old, progress=False)
        constrained = own_loop.projected(memory, 0.1)

        @jax.jit  # type: ignore[untyped-decorator] # JAX is taken as untyped
        def step(params: Any, state: Any, batch: Any) -> Any:
            inputs, labels = batch
            gradients = jax.grad(
                lambda params: optax.softmax_cross_entropy_with_integer_labels(apply(params, inputs), labels).mean()
            )(params)
            free = jax.tree.map(lambda gradient: -0.1 * gradient, gradients)
            projected, state = constrained.update(free, state, params)
            return optax.apply_updates(params, projected), optax.apply_updates(params, free), state

        theta_gp, _, state = step(params, constrained.init(params), new[0])
        _, theta_hat, _ = step(theta_gp, state, new[1])
        report = own_loop.merge(apply, memory, theta_gp, theta_hat, new, trace=2, progress=False)
        return report, memories.remember(apply, report.params, new, memory=memory, check=False, progress=False)

    expected, memory = learned(jax.tree.map(jnp.asarray, whole), old, new)
    spread_old, spread_new = jax.device_put((old, new), NamedSharding(mesh, P("data")))
    for spec, batches in ((P(), (spread_old, spread_new)), (P("data"), (spread_old, spread_new)), (P(), (old, new))):
        place = NamedSharding(mesh, spec)
        report, spread = learned(jax.device_put(whole, place), *batches)
        np.testing.assert_allclose(report.alpha, expected.alpha, rtol=1e-9)
        np.testing.assert_allclose(report.trace, expected.trace, rtol=1e-9)
        for name in whole:
            np.testing.assert_allclose(gathered(report.params[name]), expected.params[name], rtol=1e-9, atol=1e-12)
            fisher = spread.posterior.precision.diagonal()[name]
            one = memory.posterior.precision.diagonal()[name]
            np.testing.assert_allclose(gathered(fisher), np.asarray(one), rtol=1e-9, atol=1e-15)
            for value in (report.params[name], spread.posterior.mean[name], fisher):
                assert value.sharding.is_equivalent_to(place, 2), f"{name}: {value.sharding}"
        check_saved(spread, whole)


def check_saved(memory: memories.Memory, params: Any) -> None:
    """One process writes the whole memory, and all read it; what it cannot write, all say in a sentence."""
    folder = Path(sys.argv[1])
    memories.save(memory, folder / "memory.safetensors")
    loaded = memories.load(params, folder / "memory.safetensors")
    for before, after in zip(jax.tree.leaves(memory), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(here(before), after)
    if jax.process_count() > 1:
        with pytest.raises(BecameError, match=r"process 1 could not write .*absent"):
            memories.save(memory, folder / "absent" / "memory.safetensors")


def check_explicit_axes() -> None:
    """Around a user's own loop, arrays whose shardings are parts of their types are refused, with what would do."""
    explicit = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    automatic = Mesh(np.asarray(jax.devices()), ("data",))
    inputs, labels = np.ones((4, 3)), np.arange(4)
    for place, of_params, what in ((explicit, explicit, "'w'"), (explicit, automatic, "a batch")):
        params = {"w": jax.device_put(np.ones((3, 4)), NamedSharding(of_params, P()))}
        batch = jax.device_put((inputs, labels), NamedSharding(place, P("data")))
        refused = rf"{what} lies on a mesh with Explicit axes.*axis_types=\(jax.sharding.AxisType.Auto,\) \* 1"
        with pytest.raises(BecameError, match=refused):
            memories.remember(lambda params, inputs: inputs @ params["w"], params, [batch], progress=False)


if __name__ == "__main__":
    if "JAX_PROCESS_ID" in os.environ:
        jax.distributed.initialize(num_processes=2, process_id=int(os.environ["JAX_PROCESS_ID"]))
        jax.config.update("jax_enable_x64", True)
        assert jax.process_count() == jax.device_count() == 2
        check_own_loop(Mesh(np.asarray(jax.devices()), ("data",)))
    else:
        main()
