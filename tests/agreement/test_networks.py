"""One description, three frameworks: small networks drawn by hypothesis, and the benchmarks' own, in float64.

Each framework's learner has the same weights and data; logits, gradients, taps, all that curvature and projection make
of them, and what a merge comes to must be the same numbers, held against PyTorch's.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from adapters.networks import (
    Architecture,
    AveragePool,
    BatchNorm,
    Convolution,
    Dropout,
    Flatten,
    GroupNorm,
    Layer,
    Linear,
    MaxPool,
    Norm,
    ReLU,
    Residual,
    Tanh,
    build_network,
)
from became_core import optimal_alpha
from became_core.continual import SGD, Batch, Constraint, Learner, TapMode, TaskStream
from became_core.continual.learner import weights_of
from became_core.curvature import derivatives_along, diagonal_fisher, input_grams, kronecker_factors
from became_core.projection import GPM
from tests.agreement.frameworks import FRAMEWORKS
from tests.backends import to_numpy
from tests.projections import Finished
from tests.streams import prototype_stream

Numbers = dict[str, NDArray[Any]]
MODES: tuple[TapMode, ...] = ("empirical", "true", "published")


def _norms(name: str) -> list[list[Layer]]:
    return [[], [BatchNorm(name)], [BatchNorm(name, running=True)], [GroupNorm(name, most=2)]]


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """A convolution, perhaps a residual block, perhaps a linear layer, for images wider than tall."""
    activations: list[Layer] = [ReLU(), Tanh()]
    activation = draw(st.sampled_from(activations))

    def convolution(name: str, outputs: int, kernel: int, stride: int, padding: int) -> list[Layer]:
        found: list[Layer] = [Convolution(name, outputs, kernel, stride, padding, draw(st.booleans()))]
        return found + draw(st.sampled_from(_norms(f"{name}.norm")))

    width = draw(st.integers(2, 3))
    layers = convolution("conv1", width, draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 1)))
    layers += [activation, Dropout(draw(st.sampled_from([0.0, 0.25])))]
    if draw(st.booleans()):
        stride, outputs = draw(st.integers(1, 2)), draw(st.sampled_from([width, width + 1]))
        keeps = stride == 1 and outputs == width
        body = [*convolution("block.conv", outputs, 3, stride, 1), activation, Dropout(0.5)]
        shortcut = [] if keeps else convolution("block.shortcut", outputs, 1, stride, 0)
        layers += [Residual(tuple(body), tuple(shortcut)), activation]
    image = draw(st.integers(1, 2)), 6, 7
    _, before_pooling = Architecture((*layers, Flatten()), image).steps[-1]
    fits = min(before_pooling[1:]) >= 2
    pool = draw(st.sampled_from([None, MaxPool(2), AveragePool(2)] if fits else [None]))
    layers += [Flatten()] if pool is None else [pool, Flatten()]
    if draw(st.booleans()):
        layers += [Linear("fc1", draw(st.integers(3, 5)), draw(st.booleans())), BatchNorm("bn1"), activation]
    return Architecture(tuple(layers), image)


ROUNDING = 1e-28  # what a square is that would be zero but for float64
EVERYTHING = Architecture(
    (
        *(Convolution("conv1", 3, 2, stride=1, padding=1, bias=True), BatchNorm("bn1"), ReLU(), Dropout(0.25)),
        Residual(
            (Convolution("block.conv", 4, 3, 2, 1), BatchNorm("block.bn"), Dropout(0.5)),
            (Convolution("block.shortcut", 4, 1, 2), GroupNorm("block.norm", most=2), Dropout(0.25)),
        ),
        *(
            Tanh(),
            MaxPool(2),
            Flatten(),
            Linear("fc1", 4, bias=True),
            BatchNorm("bn2", running=True),
            ReLU(),
            Linear("fc2", 3),
        ),
    ),
    (2, 6, 7),
)


@cache
def stream_of(channels: int, height: int, width: int) -> TaskStream:
    """Images of this shape, which may be wider than tall."""
    stream = prototype_stream(tasks=2, classes_per_task=2, per_class=12, channels=channels, side=width)
    return replace(stream, dataset=replace(stream.dataset, images=stream.dataset.images[:, :, :height]))


def moved_weights(architecture: Architecture, stream: TaskStream, seed: int) -> Numbers:
    """Initial weights, moved, so that norms are not the identity and no bias is zero; variances stay above it."""
    learner, draw = FRAMEWORKS["torch"].learner(architecture, stream, seed), np.random.default_rng(seed)
    moved = {n: to_numpy(value) + 0.3 * draw.normal(size=value.shape) for n, value in learner.parameters().items()}
    return {n: 0.1 + abs(value) if n.endswith("running_var") else value for n, value in moved.items()}


def learners_of(architecture: Architecture, stream: TaskStream, seed: int) -> dict[str, Learner]:
    weights = moved_weights(architecture, stream, seed)
    learners = {name: each.learner(architecture, stream, seed) for name, each in FRAMEWORKS.items()}
    for name, learner in learners.items():
        learner.assign({key: FRAMEWORKS[name].array(value) for key, value in weights.items()})
    return learners


def fresh() -> np.random.Generator:
    return np.random.default_rng(11)


def labelled(label: str, tree: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    return ((f"{label} of {name}", np.array(to_numpy(value))) for name, value in tree.items())


def as_gram(gram: NDArray[Any]) -> NDArray[Any]:
    """The Gram matrix of which another, or a factor, is given."""
    return gram if gram.shape[0] == gram.shape[1] else gram.T @ gram


def taken(learner: Learner, rows: NDArray[Any]) -> Numbers:
    """What one pass gives: logits and all taps, by mode."""
    found: Numbers = {"logits": to_numpy(learner.logits(rows, len(rows)))}
    for mode in MODES:
        for index, taps in enumerate(learner.taps(0, rows, len(rows), mode, fresh())):
            for name, tap in taps.items():
                assert tap.has_bias == (f"{name}.bias" in learner.parameters())
                found[f"{mode} {index} inputs of {name}"] = to_numpy(tap.inputs)
                found[f"{mode} {index} gradients of {name}"] = to_numpy(tap.output_gradients)
    for index, (size, statistics) in enumerate(learner.batch_statistics(rows, 4)):
        assert size == min(4, len(rows) - 4 * index)
        found |= labelled(f"batch {index}", statistics)
    return found


def stepped(learner: Learner, rows: NDArray[Any]) -> Numbers:
    """The loss and the weights after a step on each task, with dropout."""
    constraint = Constraint(frozenset(weights_of(learner)))
    batches = [Batch(0, rows)]
    loss = learner.train(batches, np.array([0.1]), constraint, SGD(), fresh()).loss
    return {"loss": np.array(loss), **dict(labelled("weights after a step", learner.parameters()))}


def measured(learner: Learner, rows: NDArray[Any]) -> Numbers:
    """What the core makes of taps, and of two sets of weights."""
    theta, found = weights_of(learner), Numbers()
    fishers = {
        mode: diagonal_fisher(learner.taps(0, rows, len(rows), mode, fresh()), theta, mode, samples=len(rows))
        for mode in ("empirical", "true")
    }
    for mode, fisher in fishers.items():
        found |= labelled(f"{mode} Fisher", fisher)
    factors, rest = kronecker_factors(learner.taps(0, rows, len(rows), "empirical", fresh()), samples=len(rows))
    for side in (0, 1):
        found |= labelled(f"factor {side}", {name: pair[side] for name, pair in factors.items()})
    found |= labelled("diagonal beside factors", rest)
    grams = input_grams(learner.taps(0, rows, len(rows), "inputs", fresh()), learner.projectable)
    found |= {name: as_gram(gram) for name, gram in labelled("Gram matrix", grams)}
    memory = GPM(0.9).remember(Finished(grams, {}))
    for name, basis in labelled("projection", memory.bases):
        found[name] = basis @ basis.T
    direction = {name: 0.1 * (value + 0.5) for name, value in theta.items()}
    direction |= {name: learner.parameters()[name] * 0 for name in learner.running_statistics}
    slopes = derivatives_along(learner.pushforward(0, rows, len(rows), [direction]))
    found |= {f"derivative {order} along": to_numpy(value) for order, value in enumerate(slopes, start=1)}
    found |= stepped(learner, rows)
    alpha: Any = optimal_alpha(theta, weights_of(learner), fishers["empirical"], fishers["true"])
    return found | {"alpha": to_numpy(alpha)}


def assert_equal(found: Numbers, expected: Numbers, rtol: float) -> None:
    """Equal but for the last bits, of which a sum of large numbers leaves more than one of small ones.

    A norm over one channel takes away the bias before it, whose Fisher information is the square of rounding alone.
    """
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        scale = float(np.max(np.abs(value), initial=0))
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=rtol * scale + ROUNDING, err_msg=name)


# Each example compiles whatever it runs, on each framework: there are few, and none is made smaller.
@pytest.mark.timeout(1200)
@settings(max_examples=4, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(architecture=architectures(), batch=st.sampled_from([4, 6]), seed=st.integers(0, 100))
@example(architecture=EVERYTHING, batch=6, seed=0)
def test_drawn_networks_agree(architecture: Architecture, batch: int, seed: int) -> None:
    stream = stream_of(*architecture.image)
    rows = stream.tasks[0].train[:batch]
    learners = learners_of(architecture, stream, seed)
    expected = taken(learners["torch"], rows) | measured(learners["torch"], rows)
    assert expected["alpha"] > 0
    for name in ("jax", "tensorflow"):
        assert learners[name].projectable == learners["torch"].projectable
        assert learners[name].running_statistics == learners["torch"].running_statistics
        assert_equal(taken(learners[name], rows) | measured(learners[name], rows), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("network", "height", "width", "norm"),
    [
        ("alexnet", 22, 24, "batch"),
        ("resnet18", 17, 18, "batch"),
        ("alexnet", 22, 24, "running"),
        ("resnet18", 17, 18, "group"),
    ],
)
def test_the_benchmarks_networks_agree(network: str, height: int, width: int, norm: Norm) -> None:
    """By the seed alone: forward, taps of every mode, and a step with dropout; a few samples have deep batch norms."""
    stream = stream_of(3, height, width)
    architecture, rows = build_network(network, (3, height, width), norm), stream.tasks[0].train[:6]
    expected: Numbers = {}
    for framework in FRAMEWORKS.values():
        learner = framework.learner(architecture, stream, 3)
        found = taken(learner, rows) | stepped(learner, rows)
        expected = expected or found
        assert_equal(found, expected, rtol=1e-8)
