"""TRGP against the published selection of bases, trust regions and effective weights."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from became_core import BecameError
from became_core.projection import GPM, TRGP, TrustRegion
from reference.projection import effective_weight, projection, trgp_bases, trusted_tasks
from tests.backends import to_numpy, to_xp
from tests.projections import EPSILONS, WIDTH, Finished, Started, finished, largest_angle, representations

Array = NDArray[np.float64]
SEEDS = st.integers(0, 1000)


def remembered(xp: Any, tasks: list[Array], epsilon: float = 0.9) -> TRGP:
    memory = TRGP(epsilon)
    for representation in tasks:
        memory = memory.remember(finished(xp, representation))
    return memory


@given(tasks=representations(), epsilon=EPSILONS)
def test_bases_are_the_published_ones(xp: Any, tasks: list[Array], epsilon: float) -> None:
    memory, union = TRGP(epsilon, increment=0.0002), None
    for index, representation in enumerate(tasks):
        memory = memory.remember(finished(xp, representation))
        union, own = trgp_bases(union, representation, epsilon + 0.0002 * index)
        for ours, theirs in (
            (to_numpy(memory.bases["fc.weight"]), union),
            (to_numpy(memory.task_basis("fc.weight", index)), own),
        ):
            assert ours.shape == theirs.shape
            assert largest_angle(ours, theirs) < 1e-6
            np.testing.assert_allclose(projection(ours), projection(theirs), atol=1e-6)


@given(tasks=representations(), epsilon=EPSILONS)
def test_each_task_has_its_share_within_the_union(xp: Any, tasks: list[Array], epsilon: float) -> None:
    memory, gpm = remembered(xp, tasks, epsilon), GPM(epsilon)
    union = to_numpy(memory.bases["fc.weight"])
    for index, representation in enumerate(tasks):
        own = to_numpy(memory.task_basis("fc.weight", index))
        assert largest_angle(own, union) < 1e-12
        np.testing.assert_allclose(own.T @ own, np.eye(own.shape[1]), atol=1e-12)
        assert np.sum((own.T @ representation) ** 2) >= (epsilon - 1e-9) * np.sum(representation**2)
        gpm = gpm.remember(finished(xp, representation))
    assert memory.rank["fc.weight"][0] >= gpm.rank["fc.weight"][0]  # It is at least that of GPM.


def test_old_directions_are_chosen_before_weaker_new_ones(xp: Any) -> None:
    memory = TRGP(0.9).remember(finished(xp, np.diag([3.0, 2.0, 0.0, 0.0])))
    memory = memory.remember(finished(xp, np.diag([0.1, 2.0, 3.0, 0.5])))  # energies .01, 4, 9, .25 of 13.26
    assert to_numpy(memory.selections["fc.weight@0"]).tolist() == [0, 1]
    assert to_numpy(memory.selections["fc.weight@1"]).tolist() == [2, 1]
    assert memory.rank == {"fc.weight": (3, 4)}
    np.testing.assert_allclose(np.abs(to_numpy(memory.task_basis("fc.weight", 1))), np.eye(4)[:, [2, 1]], atol=1e-15)


@given(tasks=representations(most=4), seed=SEEDS)
def test_the_trust_region_is_that_of_the_published_rule(xp: Any, tasks: list[Array], seed: int) -> None:
    memory = remembered(xp, tasks, 0.7)
    gradient = np.random.default_rng(seed).normal(size=(3, WIDTH))
    bases = [to_numpy(memory.task_basis("fc.weight", task)) for task in range(len(tasks))]
    region = memory.trust_region({"fc.weight": to_xp(xp, gradient.reshape(3, 2, 2, 2)), "other": xp.ones((2, 2))})
    assert list(region.bases) == list(region.scales) == [f"fc.weight@{t}" for t in trusted_tasks(gradient, bases)]
    for key, basis in region.bases.items():
        np.testing.assert_array_equal(to_numpy(basis), bases[int(key[-1])])
        np.testing.assert_array_equal(to_numpy(region.scales[key]), np.eye(basis.shape[1]))


@pytest.mark.parametrize(("along", "trusted"), [(0.49, []), (0.51, ["fc.weight@0"])])
def test_a_task_is_trusted_if_more_than_half_of_the_gradient_lies_in_its_space(
    xp: Any, along: float, trusted: list[str]
) -> None:
    memory = TRGP(1.0).remember(finished(xp, np.diag([1.0, 0.0])))
    gradient = np.asarray([[along, np.sqrt(1 - along**2)]])
    assert list(memory.trust_region({"fc.weight": to_xp(xp, gradient)}).bases) == trusted


def test_at_most_two_tasks_are_trusted_with_the_strongest_first(xp: Any) -> None:
    memory = TRGP(1.0)
    for axes in ([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]):
        memory = memory.remember(finished(xp, np.diag(np.asarray(axes, float))))
    region = memory.trust_region({"fc.weight": to_xp(xp, np.asarray([[3.0, 2.0, 1.0, 0.0]]))})
    assert list(region.bases) == ["fc.weight@2", "fc.weight@1"]
    assert not memory.trust_region({"fc.weight": xp.zeros((2, 4))}).bases


@given(tasks=representations(), seed=SEEDS)
def test_effective_weights_are_those_of_the_formula(xp: Any, tasks: list[Array], seed: int) -> None:
    draw, memory = np.random.default_rng(seed), remembered(xp, tasks)
    bases = {f"fc.weight@{task}": memory.task_basis("fc.weight", task) for task in range(2)}
    scales = {key: draw.normal(size=(basis.shape[1], basis.shape[1])) for key, basis in bases.items()}
    weight = draw.normal(size=(3, 2, 2, 2))
    other = xp.ones((2,))
    theta = {"fc.weight": to_xp(xp, weight), "fc.bias": other}
    result = TrustRegion(bases, to_xp(xp, scales)).effective(theta)
    expected = effective_weight(weight.reshape(3, -1), [to_numpy(b) for b in bases.values()], list(scales.values()))
    np.testing.assert_allclose(to_numpy(result["fc.weight"]), expected.reshape(weight.shape), atol=1e-12)
    assert result["fc.bias"] is other


@given(tasks=representations(), seed=SEEDS)
def test_a_new_trust_region_does_not_change_the_weights(xp: Any, tasks: list[Array], seed: int) -> None:
    memory = remembered(xp, tasks)
    weight = to_xp(xp, np.random.default_rng(seed).normal(size=(3, WIDTH)))
    region = memory.trust_region({"fc.weight": weight})
    np.testing.assert_array_equal(to_numpy(region.effective({"fc.weight": weight})["fc.weight"]), to_numpy(weight))


@given(tasks=representations(), seed=SEEDS)
def test_updates_leave_every_old_effective_weight_within_its_basis(xp: Any, tasks: list[Array], seed: int) -> None:
    """Updates of W are orthogonal to B, so the effective weight does not change on the task's inputs, for any Q."""
    draw, memory = np.random.default_rng(seed), remembered(xp, tasks)
    weight = draw.normal(size=(3, WIDTH))
    region = memory.trust_region({"fc.weight": to_xp(xp, weight)})
    region = region.with_scales(to_xp(xp, {k: draw.normal(size=tuple(q.shape)) for k, q in region.scales.items()}))
    update = to_numpy(memory.project({"fc.weight": to_xp(xp, draw.normal(size=(3, WIDTH)))})["fc.weight"])
    before, after = (
        to_numpy(region.effective({"fc.weight": to_xp(xp, value)})["fc.weight"]) for value in (weight, weight - update)
    )
    for task in range(len(tasks)):
        own = to_numpy(memory.task_basis("fc.weight", task))
        np.testing.assert_allclose(after @ own, before @ own, atol=1e-11)


def test_a_framework_differentiates_through_the_effective_weight(xp: Any, backend: str) -> None:
    if backend not in ("torch", "jax"):
        pytest.skip("gradients are taken with PyTorch and JAX")
    draw = np.random.default_rng(0)
    basis, scale = np.linalg.qr(draw.normal(size=(4, 2)))[0], draw.normal(size=(2, 2))
    weight, factor = draw.normal(size=(3, 4)), draw.normal(size=(3, 4))
    region = TrustRegion({"w@0": to_xp(xp, basis)}, {"w@0": to_xp(xp, scale)})

    def inner(weight: Any, scale: Any) -> Any:
        return xp.sum(region.with_scales({"w@0": scale}).effective({"w": weight})["w"] * to_xp(xp, factor))

    if backend == "torch":
        import torch

        result = torch.func.grad(inner, argnums=(0, 1))(to_xp(xp, weight), to_xp(xp, scale))
    else:
        import jax

        result = jax.grad(inner, argnums=(0, 1))(to_xp(xp, weight), to_xp(xp, scale))
    projector = basis @ (scale - np.eye(2)) @ basis.T
    np.testing.assert_allclose(to_numpy(result[0]), factor + factor @ projector.T, atol=1e-12)
    np.testing.assert_allclose(to_numpy(result[1]), (weight @ basis).T @ factor @ basis, atol=1e-12)


def test_a_task_without_a_layer_has_no_basis_for_it(xp: Any) -> None:
    memory = TRGP(0.9).remember(Finished({"a": xp.eye(3)}, {})).remember(Finished({"b": xp.eye(2)}, {}))
    assert set(memory.selections) == {"a@0", "b@1"}
    assert list(memory.trust_region({"a": xp.ones((1, 3)), "b": xp.ones((1, 2))}).bases) == ["a@0", "b@1"]


def test_bad_input_is_refused(xp: Any) -> None:
    with pytest.raises(BecameError, match=r"^the TRGP threshold is -1; it must be above 0 and at most 1\.$"):
        TRGP(-1)
    with pytest.raises(
        BecameError,
        match=r"^the Gram matrix of 'w' has shape \(3, 2\); it must be square, or ",
    ):
        TRGP(0.9).remember(Finished({"w": xp.ones((3, 2))}, {}))
    basis = xp.eye(3)[:, :2]
    with pytest.raises(BecameError, match=r"^the trust region has no scale 'w@0'\.$"):
        TrustRegion({"w@0": basis}, {})
    with pytest.raises(BecameError, match=r"^the scale 'w@0' has shape \(3, 3\); it must be \[2, 2\]\.$"):
        TrustRegion({"w@0": basis}, {"w@0": xp.eye(3)})
    with pytest.raises(BecameError, match=r"^the weights lack 'w', which has a trust region\.$"):
        TrustRegion({"w@0": basis}, {"w@0": xp.eye(2)}).effective({})


@given(tasks=representations(), seed=SEEDS)
def test_pull_back_returns_the_derivatives_by_weights_and_scales(xp: Any, tasks: list[Array], seed: int) -> None:
    """The loss <G, effective(W, Q)> is linear in W and in each Q, so its differences are exact derivatives."""
    draw = np.random.default_rng(seed)
    memory = remembered(xp, tasks)
    gradient, weight, step = (draw.normal(size=(3, WIDTH)) for _ in range(3))
    bases = {f"fc.weight@{task}": memory.task_basis("fc.weight", task) for task in range(len(tasks))}
    scales, steps = ({key: draw.normal(size=(basis.shape[1],) * 2) for key, basis in bases.items()} for _ in range(2))

    def loss(at_weight: Array, at_scales: dict[str, Array]) -> float:
        region = TrustRegion(bases, to_xp(xp, at_scales))
        return float(np.sum(gradient * to_numpy(region.effective({"fc.weight": to_xp(xp, at_weight)})["fc.weight"])))

    region = TrustRegion(bases, to_xp(xp, scales))
    result = region.pull_back(
        {"fc.weight": to_xp(xp, gradient), "other": to_xp(xp, step)}, {"fc.weight": to_xp(xp, weight)}
    )
    assert set(result) == {"fc.weight", "other", *bases}
    np.testing.assert_array_equal(to_numpy(result["other"]), step)
    by_weight = loss(weight + step, scales) - loss(weight, scales)
    np.testing.assert_allclose(np.sum(to_numpy(result["fc.weight"]) * step), by_weight, rtol=1e-8, atol=1e-8)
    for key in bases:
        by_scale = loss(weight, scales | {key: scales[key] + steps[key]}) - loss(weight, scales)
        np.testing.assert_allclose(np.sum(to_numpy(result[key]) * steps[key]), by_scale, rtol=1e-8, atol=1e-8)


@given(tasks=representations(), seed=SEEDS)
def test_inputs_beneath_give_the_effective_outputs_with_the_shared_weight(
    xp: Any, tasks: list[Array], seed: int
) -> None:
    """The effective weight times an input is W times the result of ``inputs_beneath``."""
    draw = np.random.default_rng(seed)
    memory = remembered(xp, tasks)
    weight, rows = draw.normal(size=(3, WIDTH)), draw.normal(size=(4, 2, WIDTH))
    bases = {f"fc.weight@{task}": memory.task_basis("fc.weight", task) for task in range(len(tasks))}
    region = TrustRegion(bases, {key: to_xp(xp, draw.normal(size=(b.shape[1],) * 2)) for key, b in bases.items()})
    effective = to_numpy(region.effective({"fc.weight": to_xp(xp, weight)})["fc.weight"])
    inputs = to_numpy(region.inputs_beneath("fc.weight", to_xp(xp, rows)))
    np.testing.assert_allclose(inputs @ weight.T, rows @ effective.T, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(to_numpy(region.inputs_beneath("other", to_xp(xp, rows))), rows)
    assert region.weights == {"fc.weight"}


def test_trust_regions_are_part_of_the_memory_and_are_restored_from_its_arrays(xp: Any) -> None:
    memory = TRGP(0.9).remember(finished(xp, np.diag([3.0, 2.0, 0.0, 0.0])))
    assert memory.begin_task(Started(1, {})) is not None
    assert TRGP(0.9).begin_task(Started(0, {})) is None
    region = memory.trust_region({"fc.weight": xp.asarray(np.eye(4)[:2])})
    assert set(region.scales) == {"fc.weight@0"}
    scaled = region.with_scales({key: 2 * scale for key, scale in region.scales.items()})
    memory = memory.end_stage(1, scaled).end_stage(2, TrustRegion({}, {})).end_stage(3, None)
    again = TRGP(0.9).with_arrays(memory.to_arrays())
    assert set(again.regions) == set(memory.regions) == {1, 2}
    assert again.region(3) is None
    assert again.region(2) == TrustRegion({}, {})
    restored = again.region(1)
    assert restored is not None
    np.testing.assert_array_equal(to_numpy(restored.scales["fc.weight@0"]), to_numpy(scaled.scales["fc.weight@0"]))
    np.testing.assert_array_equal(to_numpy(restored.bases["fc.weight@0"]), to_numpy(scaled.bases["fc.weight@0"]))
    with pytest.raises(BecameError, match=r"the array 'regions\.x' is no part of a memory of TRGP"):
        TRGP(0.9).with_arrays(memory.to_arrays() | {"regions.x": xp.asarray(1)})
