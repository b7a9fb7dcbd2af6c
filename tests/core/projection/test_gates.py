"""Gated regions against the formulas of the paper and against finite differences."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from became_core import BecameError
from became_core.projection import GatedRegion
from reference.projection import clamped_gate_derivative
from tests.backends import load, to_numpy, to_xp

SHARPNESS, SPARSITY = 20.0, 0.75
SHAPES = {"fc.weight": (4, 6), "head.weight": (2, 4)}  # 3 units with 2 positions each, and 4 units
UNITS = {"fc.weight": 3, "head.weight": 4}
Arrays = dict[str, NDArray[np.float64]]


def drawn(seed: int) -> tuple[Arrays, Arrays, Arrays]:
    """Return weights, embeddings and unused units, by their keys."""
    draw = np.random.default_rng(seed)
    theta = {name: draw.normal(size=shape) for name, shape in SHAPES.items()}
    embeddings = {f"{name}@gates": draw.normal(size=units) for name, units in UNITS.items()}
    unused = {key: np.where(draw.random(value.shape) < 0.5, 1.0, 0.0) for key, value in embeddings.items()}
    unused["fc.weight@gates"][0] = 1.0
    return theta, embeddings, unused


def region_of(xp: Any, embeddings: Arrays, unused: Arrays, progress: float) -> GatedRegion:
    initial = GatedRegion(to_xp(xp, embeddings), to_xp(xp, unused), to_xp(xp, np.array(1.0)), SHARPNESS, SPARSITY)
    return initial.annealed(progress)


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-x)))


def steepness(progress: float) -> float:
    return 1 / SHARPNESS + (SHARPNESS - 1 / SHARPNESS) * progress


@given(seed=st.integers(0, 200), progress=st.sampled_from([0.0, 0.25, 1.0]))
def test_columns_are_scaled_by_the_sigmoid_of_the_annealed_embedding(xp: Any, seed: int, progress: float) -> None:
    theta, embeddings, unused = drawn(seed)
    result = region_of(xp, embeddings, unused, progress).effective(to_xp(xp, theta | {"bias": np.ones(2)}))
    fc, head = (sigmoid(steepness(progress) * embeddings[f"{name}@gates"]) for name in SHAPES)
    np.testing.assert_allclose(to_numpy(result["fc.weight"]), theta["fc.weight"] * np.repeat(fc, 2), atol=1e-14)
    np.testing.assert_allclose(to_numpy(result["head.weight"]), theta["head.weight"] * head, atol=1e-14)
    np.testing.assert_array_equal(to_numpy(result["bias"]), np.ones(2))


@given(seed=st.integers(0, 200), progress=st.sampled_from([0.02, 0.1, 0.3]))
def test_gradients_by_embeddings_follow_equations_4_and_5(xp: Any, seed: int, progress: float) -> None:
    """The loss is linear plus the capacity term; the gradients are computed unit by unit from the formulas."""
    theta, embeddings, unused = drawn(seed)
    gradients = {name: np.random.default_rng([seed, 1]).normal(size=shape) for name, shape in SHAPES.items()}
    region = region_of(xp, embeddings, unused, progress)
    result = region.pull_back(to_xp(xp, gradients), to_xp(xp, theta))
    s, free_units = steepness(progress), sum(float(np.sum(units)) for units in unused.values())

    for name, gradient in gradients.items():
        key = f"{name}@gates"
        gate = sigmoid(s * embeddings[key])
        columns = np.repeat(gate, gradient.shape[1] // len(gate))
        np.testing.assert_allclose(to_numpy(result[name]), gradient * columns, atol=1e-14)
        for unit, e in enumerate(embeddings[key]):
            in_unit = np.repeat(np.arange(len(gate)) == unit, gradient.shape[1] // len(gate))
            by_gate = (
                float(np.sum((gradient * theta[name])[:, in_unit])) + SPARSITY * float(unused[key][unit]) / free_units
            )
            plain = by_gate * s * gate[unit] * (1 - gate[unit])
            compensation = SHARPNESS * (np.cosh(s * e) + 1) / (s * (np.cosh(e) + 1))
            assert to_numpy(result[key])[unit] == pytest.approx(plain * compensation, rel=1e-7, abs=1e-12)


def test_clamped_gradients_are_those_of_the_published_code(xp: Any) -> None:
    """In single precision: they vanish where a gate is 1 to rounding, and where it is far below where eq. 4 stops."""
    far = np.array([-5.9, -0.3, -0.1, 0.0, 0.02, 0.3, 5.9], dtype=np.float32)  # s e: -2360 to 2360
    key, units = "fc.weight@gates", len(far)
    weight, gradient = np.ones((1, units), np.float32), np.arange(1.0, units + 1, dtype=np.float32)[None]
    unused, steep = {key: np.zeros(units, np.float32)}, np.array(400.0, np.float32)
    scales, unused_units, steepness = (to_xp(xp, array) for array in ({key: far}, unused, steep))
    regions = [GatedRegion(scales, unused_units, steepness, 400.0, 0.75, clamped) for clamped in (True, False)]
    clamped, closed = (
        to_numpy(region.pull_back({"fc.weight": to_xp(xp, gradient)}, {"fc.weight": to_xp(xp, weight)})[key])
        for region in regions
    )
    expected = gradient[0] * [clamped_gate_derivative(float(e), 400.0, 400.0) for e in far]
    np.testing.assert_allclose(clamped, expected, rtol=2e-5, atol=1e-12)
    assert list(np.abs(clamped) < 1e-9) == [True, True, False, False, False, True, True]
    inside = [2, 3, 4]  # the closed form is the same where neither clamp nor rounding acts
    np.testing.assert_allclose(clamped[inside], closed[inside], rtol=1e-3)
    assert np.linalg.norm(clamped - closed) > 0.5 * np.linalg.norm(clamped)


def test_clamped_embeddings_are_put_back_before_the_next_step(xp: Any) -> None:
    _, embeddings, unused = drawn(0)
    far = {key: 100 * value for key, value in embeddings.items()}
    loose = region_of(xp, far, unused, 0.5)
    tight = GatedRegion(loose.scales, loose.unused, loose.steepness, SHARPNESS, SPARSITY, clamped=True).annealed(0.5)
    for key, value in far.items():
        np.testing.assert_array_equal(to_numpy(tight.scales[key]), np.clip(value, -6, 6))
        np.testing.assert_array_equal(to_numpy(loose.scales[key]), value)


def test_without_compensation_the_gradient_is_that_of_the_loss(xp: Any) -> None:
    """Without the factor of eq. 4, the gradient agrees with finite differences of a linear loss plus capacity."""
    theta, embeddings, unused = drawn(3)
    gradients = {name: np.random.default_rng(4).normal(size=shape) for name, shape in SHAPES.items()}
    progress = 0.05
    result = region_of(xp, embeddings, unused, progress).pull_back(to_xp(xp, gradients), to_xp(xp, theta))
    s = steepness(progress)
    free_units = sum(float(np.sum(units)) for units in unused.values())

    def loss(embeddings: Arrays) -> float:
        region = region_of(load("numpy", "cpu"), embeddings, unused, progress)
        effective, gates = region.effective(theta), region.gates()
        linear = sum(float(np.sum(gradients[name] * effective[name])) for name in SHAPES)
        return linear + SPARSITY * sum(float(np.sum(gates[n] * unused[f"{n}@gates"])) for n in SHAPES) / free_units

    for key, embedding in embeddings.items():
        for unit, e in enumerate(embedding):
            ends = []
            for by in (-1e-5, 1e-5):
                moved = {name: value.copy() for name, value in embeddings.items()}
                moved[key][unit] += by
                ends.append(loss(moved))
            compensation = SHARPNESS * (np.cosh(s * e) + 1) / (s * (np.cosh(e) + 1))
            plain = to_numpy(result[key])[unit] / compensation
            assert plain == pytest.approx((ends[1] - ends[0]) / 2e-5, rel=1e-6, abs=1e-9)


def test_gates_are_0_or_1_at_the_end_of_an_epoch_and_do_not_overflow(xp: Any) -> None:
    theta, embeddings, unused = drawn(0)
    far = {key: 1e4 * value for key, value in embeddings.items()}
    region = region_of(xp, far, unused, 1.0)
    for name, gate in region.gates().items():
        np.testing.assert_array_equal(to_numpy(gate).round(12), embeddings[f"{name}@gates"] > 0)
    pulled = region.pull_back(to_xp(xp, theta), to_xp(xp, theta))
    assert all(np.all(np.isfinite(to_numpy(value))) for value in pulled.values())
    used_up = region_of(xp, embeddings, {key: 0 * value for key, value in unused.items()}, 0.5)
    assert np.all(np.isfinite(to_numpy(used_up.pull_back(to_xp(xp, theta), to_xp(xp, theta))["fc.weight@gates"])))


def test_a_missing_weight_is_named(xp: Any) -> None:
    _, embeddings, unused = drawn(0)
    with pytest.raises(BecameError, match=r"the weights lack 'fc\.weight', which reads gated units"):
        region_of(xp, embeddings, unused, 0.0).effective({})
