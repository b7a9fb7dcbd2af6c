"""What every learner must do at given weights: names, logits, gradients of samples, derivatives along directions."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from became_core.arrays import Params
from became_core.continual import SGD, Annealed, Batch, Training
from became_core.continual.measurement import Measurement
from became_core.curvature import (
    batch_gradient,
    derivatives_along,
    diagonal_fisher,
    input_grams,
    kronecker_factors,
    per_sample_gradients,
    per_sample_square_sum,
)
from became_core.projection import Products
from reference.formulas import softmax
from tests.backends import to_numpy
from tests.conformance.learners import (
    RATE,
    STEP,
    STREAM,
    Make,
    direction_of,
    everything,
    fresh_rng,
    in_the_framework_of,
    loss_at,
    moved,
    numbers,
    step,
)
from tests.streams import drifting_stream


def check_the_names_are_consistent(make: Make) -> None:
    learner = make(STREAM, 0)
    names = set(learner.parameters())
    assert len(learner.heads) == len(STREAM.tasks)
    assert all(head and head <= names for head in learner.heads)
    assert not learner.heads[0] & learner.heads[1]
    assert learner.projectable
    assert learner.projectable <= names - set().union(*learner.heads)


def check_a_seed_names_the_weights(make: Make) -> None:
    first, again, other = (numbers(make(STREAM, seed).parameters()) for seed in (0, 0, 1))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)


def check_parameters_are_values(make: Make) -> None:
    """What was read does not change when training goes on, and what was assigned is not changed either."""
    learner = make(STREAM, 0)
    held = learner.parameters()
    before = numbers(held)
    step(learner, everything(learner))
    assert all(np.array_equal(before[name], to_numpy(value)) for name, value in held.items())
    assert any(not np.array_equal(before[name], value) for name, value in numbers(learner.parameters()).items())
    learner.assign(held)
    assert all(np.array_equal(before[name], value) for name, value in numbers(learner.parameters()).items())
    step(learner, everything(learner))
    assert all(np.array_equal(before[name], to_numpy(value)) for name, value in held.items())


def check_logits_and_targets(make: Make) -> None:
    learner = make(STREAM, 0)
    rows = STREAM.tasks[1].test
    logits = to_numpy(learner.logits(rows, 8))
    assert logits.shape == (len(rows), 2, 3)
    np.testing.assert_array_equal(to_numpy(learner.targets(rows)), STREAM.targets[rows])
    np.testing.assert_array_equal(to_numpy(learner.logits(rows, 8)), logits)
    np.testing.assert_allclose(to_numpy(learner.logits(rows, len(rows))), logits, atol=1e-12)
    np.testing.assert_allclose(to_numpy(learner.logits(rows[::-1].copy(), 8))[::-1], logits, atol=1e-12)
    for heads in (slice(1), slice(1, 2)):
        np.testing.assert_array_equal(to_numpy(learner.logits(rows, 8, heads)), logits[:, heads])


def check_a_head_is_its_tasks_own(make: Make) -> None:
    learner = make(STREAM, 0)
    rows = STREAM.tasks[0].test
    before = to_numpy(learner.logits(rows, 8))
    changed = {n: value + 1 if n in learner.heads[1] else value for n, value in learner.parameters().items()}
    learner.assign(changed)
    after = to_numpy(learner.logits(rows, 8))
    np.testing.assert_array_equal(after[:, 0], before[:, 0])
    assert not np.array_equal(after[:, 1], before[:, 1])


def check_a_step_descends_the_gradient_of_taps(make: Make) -> None:
    """theta - rate * (mean gradient): training and taps differentiate the same function."""
    learner = make(STREAM, 0)
    before, expected_loss = numbers(learner.parameters()), loss_at(learner, learner.parameters())
    (taps,) = learner.taps(0, STREAM.tasks[0].train[:12], 12, "empirical", fresh_rng())
    gradient = numbers(batch_gradient(taps))
    loss = step(learner, everything(learner))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-10)
    for name, after in numbers(learner.parameters()).items():
        expected = before[name]
        if name in gradient:
            expected = expected - RATE * gradient[name].reshape(expected.shape) / 12
        np.testing.assert_allclose(after, expected, atol=1e-12)


def check_the_gradient_of_taps_by_finite_differences(make: Make) -> None:
    learner = make(STREAM, 0)
    theta, direction = learner.parameters(), direction_of(learner)
    (taps,) = learner.taps(0, STREAM.tasks[0].train[:12], 12, "empirical", fresh_rng())
    gradient, h = numbers(batch_gradient(taps)), STEP
    slope = sum(float(np.sum(gradient[n] * to_numpy(direction[n]).reshape(gradient[n].shape))) for n in gradient) / 12
    difference = (loss_at(learner, moved(theta, direction, h)) - loss_at(learner, moved(theta, direction, -h))) / (
        2 * h
    )
    np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-9)


def check_squares_are_per_sample(make: Make) -> None:
    learner = make(STREAM, 0)
    rows = STREAM.tasks[0].train[:12]
    (together,) = learner.taps(0, rows, 12, "empirical", fresh_rng())
    squares = numbers(per_sample_square_sum(together))
    one_by_one: dict[str, NDArray[Any]] = {}
    for row in rows:
        (alone,) = learner.taps(0, np.asarray([row]), 1, "empirical", fresh_rng())
        for name, gradient in numbers(batch_gradient(alone)).items():
            one_by_one[name] = one_by_one.get(name, 0) + gradient**2
    assert set(squares) == set(one_by_one)
    for name, square in squares.items():
        np.testing.assert_allclose(square, one_by_one[name], atol=1e-12)


def check_taps_speak_of_the_tasks_parameters(make: Make) -> None:
    learner = make(STREAM, 0)
    (taps,) = learner.taps(1, STREAM.tasks[1].train[:12], 12, "empirical", fresh_rng())
    spoken = set(batch_gradient(taps))
    assert spoken == set(learner.parameters()) - learner.heads[0]
    fisher = numbers(diagonal_fisher([taps], learner.parameters(), "empirical", samples=12))
    parameters = numbers(learner.parameters())
    assert all(fisher[name].shape == value.shape for name, value in parameters.items())
    for name in learner.projectable:
        layer = taps[name.removesuffix(".weight")]
        assert layer.kind == "matrix"
        assert layer.inputs.shape[2] == parameters[name][0].size


def check_regression_with_a_shared_head(make: Make) -> None:
    """Steps, taps and curvature are those of the Gaussian loss; the head is a shared weight like others."""
    stream = drifting_stream()
    learner, rows = make(stream, 0), stream.tasks[1].train[:12]
    assert learner.shares_head
    assert "head.weight" in learner.projectable
    theta, noise = learner.parameters(), 0.5

    def loss(parameters: Params) -> float:
        with learner.at(parameters):
            outputs = to_numpy(learner.logits(rows, 12))
        assert outputs.shape == (12, 1, 2)
        return float(((outputs[:, 0] - stream.targets[rows]) ** 2).sum() / (2 * noise**2) / 12)

    direction = direction_of(learner)
    slope, curvature = derivatives_along(learner.pushforward(1, rows, 8, [direction]), learner.likelihood)
    ahead, behind = (loss(moved(theta, direction, sign * STEP)) for sign in (1, -1))
    np.testing.assert_allclose(to_numpy(slope)[0], (ahead - behind) / (2 * STEP), rtol=1e-6)
    outputs = []
    for sign in (1, -1):
        with learner.at(moved(theta, direction, sign * STEP)):
            outputs.append(to_numpy(learner.logits(rows, 12)))
    tangent = (outputs[0] - outputs[1]) / (2 * STEP)
    np.testing.assert_allclose(to_numpy(curvature)[0, 0], (tangent**2).sum() / noise**2 / 12, rtol=1e-6)
    (taps,) = learner.taps(1, rows, 12, "empirical", fresh_rng())
    gradient, before = numbers(batch_gradient(taps)), numbers(theta)
    assert set(gradient) == set(before)
    parameters = {name: theta[name] for name in theta}
    trained = learner.train(
        [Batch(1, rows)], np.array([0.01]), everything(learner), SGD().initial(parameters), fresh_rng()
    )
    np.testing.assert_allclose(trained.loss, loss(theta), rtol=1e-9)
    for name, after in numbers(learner.parameters()).items():
        expected = before[name] - 0.01 * gradient[name].reshape(before[name].shape) / 12
        np.testing.assert_allclose(after, expected, atol=1e-12)
    assert len(list(learner.taps(1, rows, 12, "true", fresh_rng()))) == 2
    assert len(list(learner.taps(1, rows, 12, "sampled", fresh_rng()))) == 1


def check_true_taps_are_the_expectation_over_labels(make: Make) -> None:
    """Against the GGN by forward mode, an entry at a time: for cross-entropy their diagonals are the same."""
    learner = make(STREAM, 0)
    rows, draw = STREAM.tasks[0].train[:12], np.random.default_rng(0)
    batches = list(learner.taps(0, rows, 8, "true", fresh_rng()))
    assert len(batches) == 2 * 3  # as many for each batch as there are classes
    parameters = learner.parameters()
    fisher = numbers(diagonal_fisher(batches, parameters, "true", samples=12))
    entries = [
        (name, int(index))
        for name in sorted(set(parameters) - learner.heads[1])
        for index in draw.choice(fisher[name].size, size=min(4, fisher[name].size), replace=False)
    ]
    expected = np.zeros(len(entries))
    zeros = {name: value * 0 for name, value in parameters.items()}
    for place, (name, index) in enumerate(entries):
        unit = np.zeros(fisher[name].size)
        unit[index] = 1
        direction = zeros | {name: in_the_framework_of(parameters[name], unit.reshape(fisher[name].shape))}
        # One direction at a time: what is compiled for one serves all.
        _, curvature = derivatives_along(learner.pushforward(0, rows, 8, [direction]))
        expected[place] = float(curvature[0, 0])
    assert np.any(expected > 1e-6)
    found = [fisher[name].ravel()[index] for name, index in entries]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-14)


def check_sampled_taps_repeat_with_their_stream_and_follow_the_model(make: Make) -> None:
    learner = make(STREAM, 0)
    rows, head = STREAM.tasks[0].train[:12], next(iter(learner.heads[0])).rsplit(".", 1)[0]

    def gradients(rng: np.random.Generator) -> NDArray[Any]:
        batches = learner.taps(0, rows, 8, "sampled", rng)
        return np.concatenate([to_numpy(taps[head].output_gradients)[:, 0] for taps in batches])

    p = softmax(to_numpy(learner.logits(rows, 12))[:, 0])
    np.testing.assert_array_equal(gradients(fresh_rng()), gradients(fresh_rng()))
    rng, draws = fresh_rng(), 300
    drawn = np.stack([p - gradients(rng) for _ in range(draws)])
    np.testing.assert_allclose(np.sort(drawn, axis=-1), np.broadcast_to([0, 0, 1], drawn.shape), atol=1e-9)
    error = np.sqrt(p * (1 - p) / draws)
    assert np.all(np.abs(drawn.mean(axis=0) - p) <= 4.5 * error)


def check_logit_taps_are_the_gradient_of_the_true_logit(make: Make) -> None:
    learner = make(STREAM, 0)
    rows, h = STREAM.tasks[0].train[:12], STEP
    theta, direction, labels = learner.parameters(), direction_of(learner), STREAM.targets[rows]
    (taps,) = learner.taps(0, rows, 12, "logit", fresh_rng())
    gradients = numbers(per_sample_gradients(taps))
    slopes = sum(g.reshape(12, -1) @ to_numpy(direction[name]).ravel() for name, g in gradients.items())
    ends = []
    for by in (-h, h):
        learner.assign(moved(theta, direction, by))
        ends.append(to_numpy(learner.logits(rows, 12))[np.arange(12), 0, labels])
    np.testing.assert_allclose(slopes, (ends[1] - ends[0]) / (2 * h), rtol=1e-6, atol=1e-8)


def check_measured_logit_gradients_are_of_shared_parameters(make: Make) -> None:
    learner = make(STREAM, 0)
    training = Training(Annealed(0.05, 1), Annealed(0.05, 1), batch_size=8)
    measurement = Measurement(learner, STREAM.tasks[1], training, "empirical", 0, "posterior")
    shapes = {name: value.shape for name, value in numbers(learner.parameters()).items()}
    shared = set(shapes) - learner.heads[0] - learner.heads[1]
    measured = list(measurement.logit_gradients(12))
    assert any(isinstance(leaf, Products) for leaf in measured[0].values())
    batches, again = (
        [
            numbers({n: it.stacked(shapes[n]).values if isinstance(it, Products) else it for n, it in batch.items()})
            for batch in drawn
        ]
        for drawn in (measured, measurement.logit_gradients(12))
    )
    for size, batch in zip((8, 4), batches, strict=True):
        assert {name: value.shape for name, value in batch.items()} == {n: (size, *shapes[n]) for n in shared}
    assert all(np.any(value != 0) for value in batches[0].values())
    for name, value in batches[1].items():
        np.testing.assert_array_equal(value, again[1][name])


def check_kronecker_factors_are_a_precision(make: Make) -> None:
    """Exact where it must be: with one sample, along any direction, where a layer has one position; else a diagonal."""
    learner = make(STREAM, 0)
    row = STREAM.tasks[0].train[:1]
    (taps,) = learner.taps(0, row, 1, "empirical", fresh_rng())
    factors, _ = kronecker_factors([taps], samples=1)
    gradient, direction = numbers(batch_gradient(taps)), numbers(direction_of(learner))
    for name, (a, g) in factors.items():
        if name.endswith("weight") and taps[name.removesuffix(".weight")].inputs.shape[1] == 1:
            d = direction[name].reshape(gradient[name].shape)
            found = np.sum(d * (to_numpy(g) @ d @ to_numpy(a)))
            np.testing.assert_allclose(found, np.sum(d * gradient[name]) ** 2, rtol=1e-9, atol=1e-15)
    training = Training(Annealed(0.05, 1), Annealed(0.05, 1), batch_size=8)  # the last of them holds four
    for kind in ("empirical", "true", "sampled"):
        precision = Measurement(learner, STREAM.tasks[0], training, kind, 0, "posterior").kronecker()
        shapes = {name: value.shape for name, value in numbers(learner.parameters()).items()}
        assert precision.covered() == {n: shape for n, shape in shapes.items() if n not in learner.heads[1]}
        assert float(precision.inner(direction_of(learner), direction_of(learner))) > 0


def check_a_forward_pass_gives_the_inputs(make: Make) -> None:
    learner = make(STREAM, 0)
    rows = STREAM.tasks[0].train[:12]
    weights = learner.projectable
    assert weights
    whole, inputs = (
        numbers(input_grams(learner.taps(0, rows, 8, mode, fresh_rng()), weights)) for mode in ("empirical", "inputs")
    )
    assert set(inputs) == set(whole) == weights
    for name, gram in inputs.items():
        np.testing.assert_allclose(gram, whole[name], rtol=1e-10, atol=1e-12)


def check_published_taps_take_the_models_own_labels(make: Make) -> None:
    learner = make(STREAM, 0)
    rows = STREAM.tasks[0].train
    own = to_numpy(learner.logits(rows, 12))[:, 0].argmax(axis=1)
    right, wrong = rows[own == STREAM.targets[rows]][:4], rows[own != STREAM.targets[rows]][:4]
    for part, agree in ((right, True), (wrong, False)):
        assert len(part) == 4
        (frozen,) = learner.taps(0, part, len(part), "empirical", fresh_rng())
        (published,) = learner.taps(0, part, len(part), "published", fresh_rng())
        head = next(iter(learner.heads[0])).rsplit(".", 1)[0]
        pair = to_numpy(frozen[head].output_gradients), to_numpy(published[head].output_gradients)
        assert np.allclose(*pair, atol=1e-12) == agree


def check_pushforward_is_the_derivative_of_logits(make: Make) -> None:
    learner = make(STREAM, 0)
    rows, h = STREAM.tasks[0].train[:12], STEP
    theta, direction = learner.parameters(), direction_of(learner)
    twice = {name: 2 * value for name, value in direction.items()}
    batches = list(learner.pushforward(0, rows, 8, [direction, twice]))
    logits, labels = (np.concatenate([to_numpy(batch[part]) for batch in batches]) for part in (0, 2))
    tangent, doubled = np.concatenate([to_numpy(batch.tangents) for batch in batches], axis=1)
    np.testing.assert_allclose(doubled, 2 * tangent, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(logits, to_numpy(learner.logits(rows, 12))[:, 0], atol=1e-12)
    np.testing.assert_array_equal(labels, STREAM.targets[rows])
    ends = []
    for by in (-h, h):
        learner.assign(moved(theta, direction, by))
        ends.append(to_numpy(learner.logits(rows, 12))[:, 0])
    np.testing.assert_allclose(tangent, (ends[1] - ends[0]) / (2 * h), rtol=1e-6, atol=1e-8)


def check_pushforward_and_taps_agree_on_the_slope(make: Make) -> None:
    learner = make(STREAM, 0)
    rows, direction = STREAM.tasks[0].train[:12], direction_of(learner)
    slope, curvature = derivatives_along(learner.pushforward(0, rows, 8, [direction]))
    (taps,) = learner.taps(0, rows, 12, "empirical", fresh_rng())
    gradient = numbers(batch_gradient(taps))
    expected = sum(float(np.sum(gradient[n] * to_numpy(direction[n]).reshape(gradient[n].shape))) for n in gradient)
    np.testing.assert_allclose(float(slope[0]), expected / 12, rtol=1e-10)
    assert float(curvature[0, 0]) > 0
