"""The transformer on all frameworks in float64: logits, gradients, what is made of taps, curvature and a step."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.networks import Architecture, Embedding, LastPosition, Positions, gpt
from became_core.continual import SGD, Batch, Constraint, Dataset, Learner, split_domains
from became_core.continual.evaluation import accuracies
from became_core.curvature import (
    Gaussian,
    batch_gradient,
    derivatives_along,
    diagonal_fisher,
    kronecker_factors,
)
from tests.agreement.frameworks import FRAMEWORKS, measured_by_all, rng
from tests.backends import to_numpy
from tests.streams import text_stream

STREAM = text_stream()
NETWORK = gpt(6, width=8, blocks=2, heads=2)


def measured(learner: Learner) -> dict[str, NDArray[Any]]:
    rows, theta = STREAM.tasks[0].train[:5], learner.parameters()
    outcome: dict[str, Any] = {"logits": learner.logits(rows, 3)}
    units = learner.likelihood.count(learner.targets(rows))
    for mode in ("empirical", "sampled"):
        taps = list(learner.taps(0, rows, 5, mode, rng()))
        fisher = diagonal_fisher(taps, theta, "empirical", samples=units)
        outcome |= {f"{mode} Fisher of {name}": value for name, value in fisher.items()}
        gradient = batch_gradient(taps[0])
        outcome |= {
            f"{mode} gradient of {name}": np.asarray(to_numpy(gradient[name])).reshape(theta[name].shape)
            for name in gradient
        }
    factors, _ = kronecker_factors(learner.taps(0, rows, 5, "empirical", rng()), samples=5, units=units)
    outcome |= {f"factor {side} of {n}": pair[side] for n, pair in factors.items() for side in (0, 1)}
    outcome |= measured_by_all(learner, STREAM, rows)
    constraint = Constraint(frozenset(theta))
    outcome["loss"] = np.array(learner.train([Batch(0, rows)], np.array([0.1]), constraint, SGD(), rng()).loss)
    outcome |= {f"{name} after a step": value for name, value in learner.parameters().items()}
    outcome["text"] = np.frombuffer(learner.written(STREAM.tasks[0], rng()).encode("utf-16"), np.uint8)
    return {name: np.array(to_numpy(value)) for name, value in outcome.items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, NDArray[Any]]:
    return measured(FRAMEWORKS["torch"].learner(NETWORK, STREAM, 3))


@pytest.mark.parametrize("name", ["jax", "tensorflow"])
def test_the_transformer_agrees(name: str, expected: dict[str, NDArray[Any]]) -> None:
    learner = FRAMEWORKS[name].learner(NETWORK, STREAM, 3)
    ours = measured(learner)
    assert learner.projectable == {f"block{b}.{m}.weight" for b in (0, 1) for m in ("qkv", "out", "fc1", "fc2")} | {
        "head.weight"
    }
    assert set(ours) == set(expected)
    for key, value in expected.items():
        scale = float(np.max(np.abs(value), initial=0))
        np.testing.assert_allclose(ours[key], value, rtol=1e-9, atol=1e-9 * scale + 1e-26, err_msg=key)


def test_no_position_sees_what_comes_after_it() -> None:
    """A change of the last byte changes the logits of the last position alone."""
    text = STREAM.dataset.images.copy()
    text[:, -1] += 1
    other = replace(STREAM, dataset=replace(STREAM.dataset, images=text))
    rows = STREAM.tasks[0].test
    for framework in FRAMEWORKS.values():
        first, second = (
            np.array(to_numpy(framework.learner(NETWORK, stream, 3).logits(rows, 8))) for stream in (STREAM, other)
        )
        np.testing.assert_array_equal(first[:, :, :-1], second[:, :, :-1])
        assert not np.array_equal(first[:, :, -1], second[:, :, -1])


def test_the_loss_and_its_curvature_by_finite_differences() -> None:
    """On PyTorch, with which the others agree: the slope is that of the mean over the bytes that have labels."""
    learner = FRAMEWORKS["torch"].learner(NETWORK, STREAM, 3)
    rows, theta, step = STREAM.tasks[0].train, learner.parameters(), 1e-5
    direction = {name: 0.1 * (value + 0.5) for name, value in theta.items()}

    def loss(by: float) -> float:
        with learner.at({name: value + by * direction[name] for name, value in theta.items()}):
            logits, labels = np.array(to_numpy(learner.logits(rows, 7)))[:, 0], STREAM.targets[rows]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        counts = labels >= 0
        return -float(np.take_along_axis(log_p, np.maximum(labels, 0)[..., None], -1)[..., 0][counts].mean())

    slope, _ = derivatives_along(learner.pushforward(0, rows, 7, [direction]), learner.likelihood)
    np.testing.assert_allclose(to_numpy(slope)[0], (loss(step) - loss(-step)) / (2 * step), rtol=1e-6)


def test_a_text_with_one_target_is_learned_alike() -> None:
    draw = np.random.default_rng(0)
    text, ratings = draw.integers(97, 100, (24, 5)).astype(np.uint8), draw.normal(size=(24, 1))
    domains = np.repeat([0, 1], 12)[draw.permutation(24)]
    dataset = Dataset(
        "rated", text, np.asarray(ratings, dtype=Any), 16, (), (), likelihood=Gaussian(noise=1.0), domains=domains
    )
    stream = split_domains(dataset, validation=0.0)
    network = Architecture((Embedding("tokens", 256, 4), Positions("positions", 5), LastPosition()), (5,))
    losses = {}
    for name, framework in FRAMEWORKS.items():
        learner = framework.learner(network, stream, 3)
        constraint = Constraint(frozenset(learner.parameters()))
        rows = stream.tasks[0].train[:5]
        first = learner.train([Batch(0, rows)], np.array([0.1]), constraint, SGD(), rng()).loss
        reached = accuracies(learner, stream.tasks, 3)
        losses[name] = np.array([first, *reached.loss, *reached.correlation])
    for name in FRAMEWORKS:
        np.testing.assert_allclose(losses[name], losses["torch"], rtol=1e-12, err_msg=name)
