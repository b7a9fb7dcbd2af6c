"""Properties that every projector has."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from became_core import BecameError
from became_core.projection import GPM, NSCL, OGD, SGP, TRGP, Projector, compact, full
from tests.backends import to_numpy, to_xp
from tests.compilers import compiled
from tests.projections import PROJECTORS, WIDTH, finished, orthonormal, representations, updates_for

Array = NDArray[np.float64]
Make = Callable[[], Projector]
SEEDS = st.integers(0, 1000)

every = pytest.mark.parametrize("make", PROJECTORS.values(), ids=PROJECTORS)
# The projectors that protect every direction as a whole.
whole = pytest.mark.parametrize(
    "make", [PROJECTORS[name] for name in ("GPM", "NSCL", "OGD", "TRGP", "InfLoRA", "OLoRA")]
)


def remembered(xp: Any, projector: Any, tasks: list[Array]) -> Any:
    for representation in tasks:
        projector = projector.remember(finished(xp, representation))
    return projector


def numbers(params: Any) -> dict[str, Array]:
    return {name: to_numpy(value) for name, value in params.items()}


def directions(projector: Any) -> Array:
    """Return the protected directions of a projector, as orthonormal columns."""
    if projector.protects_all:
        return orthonormal(projector, ("fc.weight", "fc.bias")).T
    return to_numpy(projector.bases["fc.weight"])


def flat(params: Any) -> Array:
    """Return updates as rows [n, d]: the rows of a weight's matrix, or one row of all leaves."""
    if set(params) == {"fc.weight"}:
        matrix = to_numpy(params["fc.weight"])
        return matrix.reshape(len(matrix), -1)
    parts = [to_numpy(params[name]) for name in ("fc.weight", "fc.bias")]
    return np.concatenate([part.reshape(1, -1) for part in parts], axis=1)


@every
def test_an_empty_memory_changes_nothing(xp: Any, make: Make) -> None:
    update = xp.ones((3, 4))
    empty = make()
    assert empty.project({"fc.weight": update})["fc.weight"] is update
    assert empty.project_rows("fc.weight", update) is update
    assert empty.rowwise == full(empty) == frozenset()
    assert dict(empty.rank) == {}


@every
def test_the_update_of_an_unprotected_weight_is_unchanged(xp: Any, make: Make) -> None:
    draw = np.random.default_rng(0)
    memory = remembered(xp, make(), [draw.normal(size=(WIDTH, 3))])
    update = xp.ones((3, 2))
    updates = {"heads.0.weight": update} | to_xp(xp, updates_for(memory, draw))
    assert memory.project(updates)["heads.0.weight"] is update
    assert memory.project_rows("other.weight", update) is update


@whole
@given(tasks=representations(), seed=SEEDS)
def test_projected_updates_have_no_part_in_the_protected_space(
    xp: Any, make: Make, tasks: list[Array], seed: int
) -> None:
    memory = remembered(xp, make(), tasks)
    update = updates_for(memory, np.random.default_rng(seed))
    projected = memory.project(to_xp(xp, update))
    basis = directions(memory)
    assert {name: leaf.shape for name, leaf in numbers(projected).items()} == {n: u.shape for n, u in update.items()}
    np.testing.assert_allclose(flat(projected) @ basis, 0, atol=1e-12)
    taken = flat(update) - flat(projected)
    np.testing.assert_allclose(
        taken, taken @ basis @ basis.T, atol=1e-12
    )  # Only the part in the protected space was removed.


@whole
@given(tasks=representations(), seed=SEEDS)
def test_projecting_twice_changes_nothing(xp: Any, make: Make, tasks: list[Array], seed: int) -> None:
    memory = remembered(xp, make(), tasks)
    once = memory.project(to_xp(xp, updates_for(memory, np.random.default_rng(seed))))
    np.testing.assert_allclose(flat(memory.project(once)), flat(once), atol=1e-12)


@every
@given(tasks=representations(), seed=SEEDS)
def test_projecting_the_inputs_projects_the_gradient(xp: Any, make: Make, tasks: list[Array], seed: int) -> None:
    memory = remembered(xp, make(), tasks)
    assert memory.rowwise == (frozenset() if memory.protects_all else {"fc.weight"})
    draw = np.random.default_rng(seed)
    a, g = draw.normal(size=(3, WIDTH)), draw.normal(size=(3, 2))
    for name in memory.rowwise:
        rows = to_numpy(memory.project_rows(name, to_xp(xp, a)))
        projected = to_numpy(memory.project({name: to_xp(xp, g.T @ a)})[name])
        np.testing.assert_allclose(g.T @ rows, projected, atol=1e-12)


@every
@given(tasks=representations(most=4))
def test_ranks_stay_within_the_width(xp: Any, make: Make, tasks: list[Array]) -> None:
    memory: Any = make()
    before = 0
    for representation in tasks:
        memory = memory.remember(finished(xp, representation))
        ((rank, width),) = memory.rank.values()
        assert width == WIDTH
        assert 0 <= rank <= directions(memory).shape[1] <= width
        if isinstance(memory, GPM | SGP | TRGP):
            assert rank >= before  # Other projectors may remove directions.
        before = rank


@pytest.mark.parametrize("make", [lambda: GPM(1.0), lambda: TRGP(1.0), lambda: OGD(capacity=WIDTH)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_full_space_stops_every_update(xp: Any, make: Make, dtype: Any) -> None:
    draw = np.random.default_rng(0)
    memory = remembered(xp, make(), [draw.normal(size=(WIDTH, 30)).astype(dtype)])
    assert full(memory) == frozenset(memory.rank)
    assert len(full(memory)) == 1
    for value in numbers(memory.project(to_xp(xp, updates_for(memory, draw, dtype=dtype)))).values():
        np.testing.assert_array_equal(value, 0)
    again = memory.remember(finished(xp, draw.normal(size=(WIDTH, 3)).astype(dtype)))
    # In OGD, old tasks give up directions, and this task has fewer samples than its share; the others stay full.
    assert list(again.rank.values()) == [(7, 8) if memory.protects_all else (8, 8)]


@every
@given(tasks=representations(), seed=SEEDS)
def test_a_memory_is_restored_from_its_arrays(xp: Any, make: Make, tasks: list[Array], seed: int) -> None:
    memory = remembered(xp, make(), tasks)
    again: Any = make().with_arrays(memory.to_arrays())
    assert type(again) is type(memory)
    assert again.rank == memory.rank
    update = to_xp(xp, updates_for(memory, np.random.default_rng(seed)))
    for one, other in ((memory, again), (memory.remember(finished(xp, tasks[0])),) * 2):
        for name, value in numbers(one.to_arrays()).items():
            np.testing.assert_array_equal(to_numpy(other.to_arrays()[name]), value)
        for name, value in numbers(one.project(update)).items():
            np.testing.assert_array_equal(to_numpy(other.project(update)[name]), value)
    # The next task is remembered in the same way, because the number of tasks, and so the threshold, is restored.
    ours, theirs = (projector.remember(finished(xp, tasks[-1])) for projector in (memory, again))
    for name, value in numbers(ours.to_arrays()).items():
        np.testing.assert_array_equal(to_numpy(theirs.to_arrays()[name]), value)


@every
@given(tasks=representations(), seed=SEEDS)
def test_a_compact_memory_projects_to_the_same_bits_as_one_from_a_file(
    xp: Any, make: Make, tasks: list[Array], seed: int
) -> None:
    memory = compact(remembered(xp, make(), tasks))
    from_file = {n: to_xp(xp, np.array(value, order="C")) for n, value in numbers(memory.to_arrays()).items()}
    again = make().with_arrays(from_file)
    update = to_xp(xp, updates_for(memory, np.random.default_rng(seed), dtype=np.float32))
    for name, value in numbers(memory.project(update)).items():
        np.testing.assert_array_equal(to_numpy(again.project(update)[name]), value)
    for name, value in numbers(memory.to_arrays()).items():
        assert value.flags.c_contiguous, name


@every
def test_an_empty_memory_is_restored_from_its_arrays(make: Make) -> None:
    assert make().with_arrays(make().to_arrays()) == make()


@every
def test_unknown_or_missing_arrays_are_refused(xp: Any, make: Make) -> None:
    name = type(make()).__name__
    with pytest.raises(BecameError, match=rf"^the array 'optimizer\.lr' is no part of a memory of {name}\.$"):
        make().with_arrays({"optimizer.lr": xp.ones((1,))})
    with pytest.raises(BecameError, match=rf"^the memory of {name} lacks '(tasks|blocks)', the number of .*\.$"):
        make().with_arrays({})


@every
def test_projection_can_be_compiled_with_the_memory_as_an_argument(xp: Any, backend: str, make: Make) -> None:
    draw = np.random.default_rng(3)
    memory = remembered(xp, make(), [draw.normal(size=(WIDTH, 3)), draw.normal(size=(WIDTH, 2))])
    update = to_xp(xp, updates_for(memory, draw))
    result = compiled(backend, lambda memory, update: memory.project(update))(memory, update)
    for name, value in numbers(memory.project(update)).items():
        np.testing.assert_allclose(to_numpy(result[name]), value, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(PROJECTORS) - {"SGP"}))  # The bases of SGP are those of GPM.
def test_many_tasks_in_float32_stay_orthonormal(xp: Any, backend: str, name: str) -> None:
    """Rounding does not accumulate: directions stay orthonormal, and updates stay out of the protected space.

    Where every width of a basis is compiled, a sixth of the space stands for a third, and at least 3 tasks for 25.
    """
    make = PROJECTORS[name]
    draw, width = np.random.default_rng(1), 96
    tasks, enough = (3, width // 6) if backend == "jax" else (25, width // 3)
    memory: Any = OGD(samples=30, capacity=75) if make().protects_all else make()
    decay = 1.5 ** -np.arange(width)[:, None]
    for task in range(25):
        turned = np.linalg.qr(draw.normal(size=(width, width)))[0] @ (decay * draw.normal(size=(width, 60)))
        memory = memory.remember(finished(xp, turned.astype(np.float32)))
        basis = directions(memory).astype(np.float64)
        stored = memory.gradients["fc.weight"].values if name == "OGD" else memory.bases["fc.weight"]
        assert to_numpy(stored).dtype == np.float32
        assert np.linalg.norm(basis.T @ basis - np.eye(basis.shape[1]), ord=2) < 1e-5
        if name != "GPCNS":  # GPCNS protects most directions in part.
            update = updates_for(memory, draw, width, np.float32)
            along = flat(memory.project(to_xp(xp, update))) @ basis
            assert np.abs(along).max() <= 1e-5 * np.linalg.norm(flat(update))
        if task + 1 >= tasks and basis.shape[1] > enough:
            break
    assert basis.shape[1] > enough


@pytest.mark.parametrize("make", [lambda: GPM(1.0), lambda: TRGP(1.0), lambda: NSCL(normalised=False)])
@given(seed=SEEDS)
def test_a_linear_network_keeps_its_outputs(xp: Any, make: Make, seed: int) -> None:
    """Old inputs have 3 of 8 dimensions, in two layers; projected updates change outputs by rounding alone."""
    draw = np.random.default_rng(seed)
    theta = {"fc1.weight": draw.normal(size=(WIDTH, WIDTH)), "fc2.weight": draw.normal(size=(2, WIDTH))}
    memory: Any = make()
    old = [draw.normal(size=(WIDTH, 2)) @ draw.normal(size=(2, 9)), draw.normal(size=(WIDTH, 1))]
    for x in old:
        hidden = theta["fc1.weight"] @ x
        first, second = finished(xp, x, "fc1.weight"), finished(xp, hidden, "fc2.weight")
        memory = memory.remember(type(first)(first.inputs | second.inputs, {}))

    def outputs(theta: dict[str, Array]) -> Array:
        return np.hstack([theta["fc2.weight"] @ theta["fc1.weight"] @ x for x in old])

    update = {name: draw.normal(size=value.shape) for name, value in theta.items()}
    projected = numbers(memory.project(to_xp(xp, update)))
    assert all(np.abs(value).max() > 1e-3 for value in projected.values())
    moved = {name: value - projected[name] for name, value in theta.items()}
    np.testing.assert_allclose(outputs(moved), outputs(theta), atol=1e-11)


@given(seed=SEEDS)
def test_ogd_keeps_the_outputs_of_a_linear_model(xp: Any, seed: int) -> None:
    """The gradient of the logit w.x by w is x."""
    draw = np.random.default_rng(seed)
    tasks = [draw.normal(size=(WIDTH, 2)), draw.normal(size=(WIDTH, 3))]
    memory = remembered(xp, OGD(), tasks)
    update = updates_for(memory, draw)
    projected = flat(memory.project(to_xp(xp, update)))
    assert np.abs(projected).max() > 1e-3
    for x in tasks:
        np.testing.assert_allclose(projected @ x, 0, atol=1e-12)


@every
def test_updates_keep_their_dtype_if_the_memory_has_another(xp: Any, make: Make) -> None:
    draw = np.random.default_rng(0)
    memory = remembered(xp, make(), [draw.normal(size=(WIDTH, 3))])
    update = updates_for(memory, draw)
    single = memory.project(to_xp(xp, {name: value.astype(np.float32) for name, value in update.items()}))
    for name, value in numbers(memory.project(to_xp(xp, update))).items():
        assert to_numpy(single[name]).dtype == np.float32
        np.testing.assert_allclose(to_numpy(single[name]), value, atol=1e-6)
